"""Folders of ChatGLM2 that we write are what vLLM and SGLang load: their demands, written down and checked.

They read config.json with a class of their own, load weights by the published names into layers of their own, and
run our tokenizer. What they want was taken from the source of vLLM 0.33.0 and SGLang 0.5.23.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, logits, tiny_model
from safetensors.torch import load_file
from transformers import AutoTokenizer
from vocabularies import train_vocabulary, vocabulary_config

from chatglm.hub.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer
from chatglm.tools.convert import convert
from chatglm.tools.export import export

# vLLM knows both names, SGLang the published one; see docs/scaling.md for what save_pretrained writes.
ARCHITECTURES = {
    "export": "ChatGLMModel",
    "convert": "ChatGLMModel",
    "save_pretrained": "ChatGLMForConditionalGeneration",
}
CONFIG_KEYS = """
    num_layers padded_vocab_size hidden_size ffn_hidden_size kv_channels num_attention_heads seq_length
    layernorm_epsilon rmsnorm post_layer_norm apply_residual_connection_post_layernorm add_bias_linear add_qkv_bias
    multi_query_attention multi_query_group_num fp32_residual_connection hidden_dropout original_rope
    tie_word_embeddings eos_token_id
""".split()


def save_pretrained(source: Path, dest: Path) -> None:
    ChatGLMForConditionalGeneration.from_pretrained(source).save_pretrained(dest)
    ChatGLMTokenizer.from_pretrained(source).save_pretrained(dest)


WRITERS: dict[str, Callable[[Path, Path], Any]] = {
    "export": lambda source, dest: export(source, dest, progress=False),
    "convert": lambda source, dest: convert(source, dest, progress=False),
    "save_pretrained": save_pretrained,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ChatGLM2 model in float32 whose answers vary."""
    folder = tmp_path_factory.mktemp("source")
    tokenizer = ChatGLMTokenizer(train_vocabulary("chatglm2", folder))
    model = tiny_model("chatglm2", **vocabulary_config(tokenizer, spare=6))
    for i, parameter in enumerate(p for name, p in model.named_parameters() if "norm" in name):
        torch.nn.init.normal_(parameter, 1, 0.3, generator=torch.Generator().manual_seed(i))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=WRITERS)
def written(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as each of our ways to write a folder has it."""
    dest = tmp_path_factory.mktemp("written") / request.param
    WRITERS[request.param](source, dest)
    return dest


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


# ---- config.json


def test_the_config_has_every_key_that_the_engines_read(written: Path, source: Path):
    config = config_of(written)
    assert [key for key in CONFIG_KEYS if key not in config] == []
    assert {key: config[key] for key in CONFIG_KEYS} == {key: config_of(source)[key] for key in CONFIG_KEYS}
    assert (config["model_type"], config["original_rope"]) == ("chatglm", True)
    assert config["tie_word_embeddings"] is False
    assert (
        config["kv_channels"] * config["num_attention_heads"] == config["hidden_size"]
    )  # they take it for granted


def test_the_architecture_is_one_that_the_engines_know(written: Path):
    assert config_of(written)["architectures"] == [ARCHITECTURES[written.name]]


# ---- weights


def names_in_an_engine(num_layers: int) -> set[str]:
    """The parameters of both engines' models: the published names, without the level of `word_embeddings`."""
    layer = """
        input_layernorm.weight post_attention_layernorm.weight mlp.dense_h_to_4h.weight mlp.dense_4h_to_h.weight
        self_attention.query_key_value.weight self_attention.query_key_value.bias self_attention.dense.weight
    """.split()
    names = {f"encoder.layers.{i}.{name}" for i in range(num_layers) for name in layer}
    names |= {"embedding.weight", "encoder.final_layernorm.weight", "output_layer.weight"}
    return {f"transformer.{name}" for name in names}


def test_every_weight_has_the_name_that_the_engines_load(written: Path):
    names = {name.replace(".word_embeddings", "") for name in load_file(written / "model.safetensors")}
    assert names == names_in_an_engine(config_of(written)["num_layers"])


def test_a_model_built_by_the_engines_rules_computes_our_logits(written: Path, source: Path):
    ids = torch.tensor([[5, 60, 17, 101, 44, 9, 31]])
    expected = logits(ChatGLMForConditionalGeneration.from_pretrained(source).eval(), ids)
    found = engine_logits(config_of(written), load_file(written / "model.safetensors"), ids[0])
    assert_close(found, expected[0])


def engine_logits(
    config: dict[str, Any], weights: dict[str, torch.Tensor], ids: torch.Tensor
) -> torch.Tensor:
    """[T, V], from how the engines cut and combine the weights, with nothing of our model."""
    heads, groups, head_dim = (
        config[key] for key in ("num_attention_heads", "multi_query_group_num", "kv_channels")
    )

    def linear(states: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(states, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(states: torch.Tensor, name: str) -> torch.Tensor:
        scale = torch.rsqrt(states.square().mean(-1, keepdim=True) + config["layernorm_epsilon"])
        return states * scale * weights[f"{name}.weight"]

    def turned(states: torch.Tensor) -> torch.Tensor:  # [T, H, D]: neighbours, in the first half of a head
        half = head_dim // 2
        angles = torch.outer(torch.arange(len(ids)), 10000 ** (-torch.arange(0, half, 2) / half))[:, None]
        even, odd = states[..., :half:2], states[..., 1:half:2]
        pairs = (even * angles.cos() - odd * angles.sin(), odd * angles.cos() + even * angles.sin())
        return torch.cat((torch.stack(pairs, -1).flatten(-2), states[..., half:]), -1)

    states = weights["transformer.embedding.word_embeddings.weight"][ids]
    future = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
    for i in range(config["num_layers"]):
        layer = f"transformer.encoder.layers.{i}"
        fused = linear(norm(states, f"{layer}.input_layernorm"), f"{layer}.self_attention.query_key_value")
        sizes = [heads * head_dim, groups * head_dim, groups * head_dim]
        query, key, value = (part.unflatten(-1, (-1, head_dim)) for part in fused.split(sizes, dim=-1))
        key, value = (part.repeat_interleave(heads // groups, 1) for part in (turned(key), value))
        scores = torch.einsum("thd,shd->hts", turned(query), key) / head_dim**0.5
        context = torch.einsum("hts,shd->thd", scores.masked_fill(future, -torch.inf).softmax(-1), value)
        states = states + linear(context.flatten(1), f"{layer}.self_attention.dense")
        gate, up = linear(
            norm(states, f"{layer}.post_attention_layernorm"), f"{layer}.mlp.dense_h_to_4h"
        ).chunk(2, -1)
        states = states + linear(F.silu(gate) * up, f"{layer}.mlp.dense_4h_to_h")
    return linear(norm(states, "transformer.encoder.final_layernorm"), "transformer.output_layer")


# ---- the tokenizer


@pytest.fixture(scope="module")
def tokenizer(written: Path) -> ChatGLMTokenizer:
    """As an engine loads it."""
    return AutoTokenizer.from_pretrained(written, trust_remote_code=True)


def test_all_ids_that_the_tokenizer_names_have_a_row_of_the_model(tokenizer, written: Path):
    rows = config_of(written)["padded_vocab_size"]
    vocabulary = tokenizer.get_vocab()
    assert max(vocabulary.values()) < rows
    assert len(set(vocabulary.values())) == len(vocabulary) == len(tokenizer)
    assert tokenizer.vocab_size <= rows
    assert max(tokenizer.all_special_ids) < rows
    assert len(tokenizer.all_special_tokens) == len(tokenizer.all_special_ids)
    assert tokenizer.eos_token_id == config_of(written)["eos_token_id"]


def test_a_chat_request_becomes_the_published_prompt(tokenizer):
    messages = [{"role": "user", "content": "你好"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == tokenizer(tokenizer.build_prompt("你好"))["input_ids"]


@pytest.mark.parametrize("text", ["你好，世界", "a  b\n\tc", "😀 emoji", "def f(x):\n    return x"])
def test_text_that_is_decoded_token_by_token_is_the_whole_text(tokenizer, text: str):
    """Engines give out what a longer piece of the answer adds, and nothing while a character is unfinished."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces, before, read = "", 0, 0
    for end in range(1, len(ids) + 1):
        tokens = tokenizer.convert_ids_to_tokens(ids[before:end])
        known = tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(ids[before:read]))
        longer = tokenizer.convert_tokens_to_string(tokens)
        if len(longer) > len(known) and not longer.endswith("�"):
            pieces, before, read = pieces + longer[len(known) :], read, end
    assert pieces.strip() == tokenizer.decode(ids).strip() == text


def test_the_engines_have_no_place_for_packed_weights_and_prefixes(source: Path, tmp_path: Path):
    convert(source, tmp_path / "packed", quantize=4, progress=False)
    packed = {
        name.replace(".word_embeddings", "") for name in load_file(tmp_path / "packed" / "model.safetensors")
    }
    assert packed - names_in_an_engine(2)  # so they stop, and do not answer wrongly
