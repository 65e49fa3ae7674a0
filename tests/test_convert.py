"""chatglm convert: every kind of checkpoint, changed in every way, equals the model that was changed in memory."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    ALPHA,
    KINDS,
    RANK,
    make_checkpoint,
    make_lora,
    make_prefix,
    prefix_config,
    read_bins,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from chatglm.cli import main
from chatglm.hub.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer
from chatglm.tools import convert as convert_module
from chatglm.tools.convert import convert
from chatglm.weights import write
from chatglm.weights.transform import keep_rows

PACKINGS: dict[str, dict[str, Any]] = {
    "float16": {},
    "int8": {"quantize": 8},
    "int4": {"quantize": 4},
    "int4 with embeddings": {"quantize": 4, "quantize_embeddings": True},
}
QUESTION = "你好，世界！How are you?"


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """A checkpoint of each kind, with an adapter and a prefix beside it."""
    root = tmp_path_factory.mktemp("sources")
    folders = {kind: make_checkpoint(kind, root / kind) for kind in KINDS}
    for kind, folder in folders.items():
        make_lora(root / f"{kind} lora", folder)
        make_prefix(root / f"{kind} prefix", folder)
    return folders


@pytest.fixture(params=KINDS)
def source(request, sources) -> Path:
    return sources[request.param]


@pytest.fixture
def v1(sources) -> Path:
    return sources["v1.1"]


@pytest.fixture
def v2(sources) -> Path:
    return sources["ChatGLM2"]


def quietly(source: Path, dest: Path, **options: Any) -> Path:
    convert(source, dest, progress=False, **options)
    return dest


def beside(source: Path, what: str) -> Path:
    return source.with_name(f"{source.name} {what}")


def load(folder: Path, **options: Any) -> ChatGLMForConditionalGeneration:
    return ChatGLMForConditionalGeneration.from_pretrained(folder, dtype="auto", **options).eval()


def changed_in_memory(
    source: Path, variant: str, quantize: int = 0, quantize_embeddings: bool = False
) -> Any:
    """The model that the conversion has to give, made without it."""
    if variant == "prefix":
        model = load(source, config=prefix_config(source))
        model.load_state_dict(torch.load(beside(source, "prefix") / "pytorch_model.bin"), strict=False)
    else:
        model = load(source)
    if variant == "lora":
        factors = torch.load(beside(source, "lora") / "adapter_model.bin")
        for name, parameter in model.named_parameters():
            module = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{module}.lora_A.weight" in factors:
                a, b = factors[f"{module}.lora_A.weight"], factors[f"{module}.lora_B.weight"]
                parameter.data = torch.addmm(parameter.data.float(), b, a, alpha=ALPHA / RANK).half()
    return model.quantize(quantize, quantize_embeddings)


def answer(model: Any, tokenizer: Any) -> str:
    return model.chat(tokenizer, QUESTION, history=[("今天", "好")], max_length=64, do_sample=False)[0]


def assert_same_state(actual: Any, expected: Any) -> None:
    actual, expected = actual.state_dict(), expected.state_dict()
    assert actual.keys() == expected.keys()
    differ = [
        name for name in expected if not torch.equal(actual[name], expected[name].to(actual[name].dtype))
    ]
    assert not differ


# ---- all kinds, all ways


@pytest.mark.parametrize("variant", ["base", "prefix", "lora"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_a_converted_checkpoint_is_the_model_changed_in_memory(source, packing, variant, tmp_path):
    options = dict(PACKINGS[packing])
    expected = changed_in_memory(source, variant, **options)
    if variant == "lora":
        options["merge_adapter"] = beside(source, "lora")
    elif variant == "prefix":
        options["prefix"] = beside(source, "prefix")
    dest = quietly(source, tmp_path / "dest", **options)
    model = load(dest)
    assert_same_state(model, expected)
    assert model.config.quantization_bit == options.get("quantize", 0)
    expected_text = answer(expected.to(model.dtype), ChatGLMTokenizer.from_pretrained(source))
    assert answer(model, ChatGLMTokenizer.from_pretrained(dest)) == expected_text
    assert expected_text


@pytest.mark.parametrize("packing", PACKINGS)
def test_saved_again_the_converted_model_stays_the_same(source, packing, tmp_path):
    model = load(quietly(source, tmp_path / "dest", **PACKINGS[packing]))
    model.save_pretrained(tmp_path / "again")
    assert_same_state(load(tmp_path / "again"), model)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("bits", [None, 4])
def test_everything_that_is_not_packed_gets_the_dtype(v2, dtype, bits, tmp_path):
    dest = quietly(v2, tmp_path / "dest", dtype=dtype, quantize=bits)
    found = {tensor.dtype for tensor in load_file(dest / "model.safetensors").values()}
    assert found == {getattr(torch, dtype)} | ({torch.int8} if bits else set())
    assert json.loads((dest / "config.json").read_text())["dtype"] == dtype
    assert_same_state(load(dest), load(v2).quantize(bits or 0).to(getattr(torch, dtype)))


def test_the_published_layout_of_a_packed_embedding_has_the_head_too(v1, tmp_path):
    """The published code ties weights, but not scales."""
    dest = quietly(v1, tmp_path / "dest", quantize=4, quantize_embeddings=True)
    tensors = load_file(dest / "model.safetensors")
    for kind in ("weight", "weight_scale"):
        assert torch.equal(tensors[f"lm_head.{kind}"], tensors[f"transformer.word_embeddings.{kind}"])


def test_the_tied_head_of_a_float_checkpoint_is_written_once(v1, tmp_path):
    assert "lm_head.weight" in read_bins(v1)
    assert "lm_head.weight" not in load_file(quietly(v1, tmp_path / "dest") / "model.safetensors")


def test_groups_are_packed_as_in_memory(v2, tmp_path):
    dest = quietly(v2, tmp_path / "dest", quantize=4, group_size=32)
    assert_same_state(load(dest), load(v2).quantize(4, group_size=32))


def test_a_prefix_with_projection_is_taken_along(source, tmp_path):
    prefix = make_prefix(tmp_path / "prefix", source, projection=True)
    dest = quietly(source, tmp_path / "dest", prefix=prefix)
    model = load(dest)
    assert model.config.prefix_projection
    trained = torch.load(prefix / "pytorch_model.bin")["transformer.prefix_encoder.trans.2.bias"]
    assert torch.equal(model.transformer.prefix_encoder.trans[2].bias, trained.to(model.dtype))


def test_the_folder_carries_the_code_and_says_where_it_is(v2, tmp_path):
    dest = quietly(v2, tmp_path / "dest")
    config = json.loads((dest / "config.json").read_text())
    root = Path(__file__).resolve().parents[1]
    for name in {target.partition(".")[0] for target in config["auto_map"].values()}:
        assert (dest / f"{name}.py").read_bytes() == (root / f"{name}.py").read_bytes()
    assert "auto_map" in json.loads((dest / "tokenizer_config.json").read_text())


def test_weights_are_cut_into_shards_with_an_index(v2, tmp_path, monkeypatch):
    monkeypatch.setattr(write.write_state, "__defaults__", (60_000, True))
    dest = quietly(v2, tmp_path / "dest")
    index = json.loads((dest / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in dest.glob("*.safetensors"))
    assert len(files) > 2 and sorted(set(index["weight_map"].values())) == files
    for file in files:
        with safe_open(dest / file, "pt") as opened:
            assert set(opened.keys()) == {key for key, where in index["weight_map"].items() if where == file}
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for f in files for t in load_file(dest / f).values()
    )
    assert_same_state(load(dest), load(v2))


# ---- other sources


def rewrite(source: Path, folder: Path, save: Any) -> Path:
    """The checkpoint again, its weights written by `save(state, folder)`."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("pytorch_model*"))
    save(read_bins(source), folder)
    return folder


SAVERS = {
    "one .bin file": lambda state, folder: torch.save(state, folder / "pytorch_model.bin"),
    "a .bin file of old torch": lambda state, folder: torch.save(
        state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False
    ),
    "under a key": lambda state, folder: torch.save({"module": state}, folder / "pytorch_model.bin"),
    "names with module.": lambda state, folder: torch.save(
        {f"module.{name}": tensor for name, tensor in state.items()}, folder / "pytorch_model.bin"
    ),
    "one safetensors file": lambda state, folder: save_file(
        {name: tensor.clone() for name, tensor in state.items()}, folder / "model.safetensors"
    ),
}


@pytest.mark.parametrize("saver", SAVERS)
def test_weights_are_read_however_they_were_saved(v1, saver, tmp_path):
    source = rewrite(v1, tmp_path / "source", SAVERS[saver])
    assert_same_state(load(quietly(source, tmp_path / "dest")), load(v1))


def test_one_file_of_weights_may_be_named(v2, tmp_path):
    folder = rewrite(v2, tmp_path / "source", SAVERS["one safetensors file"])
    (folder / "model.safetensors").rename(folder / "finetuned.safetensors")
    assert_same_state(load(quietly(folder / "finetuned.safetensors", tmp_path / "dest")), load(v2))


def test_the_config_of_the_rlhf_fork_is_kept(sources, tmp_path):
    """It ends answers with <eop>, pads with 20003 and knows no mask ids."""
    source = shutil.copytree(sources["v0.1"], tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["pad_token_id"] = 20003
    (source / "config.json").write_text(json.dumps(config))
    dest = quietly(source, tmp_path / "dest")
    kept = json.loads((dest / "config.json").read_text())
    assert {key: kept[key] for key in config if key in kept and key != "transformers_version"}.items() <= (
        config | {"architectures": kept["architectures"]}
    ).items()
    assert_same_state(load(dest), load(source))


# ---- adapters


def test_an_adapter_is_merged_as_its_definition_says(v2, tmp_path):
    lora = make_lora(
        tmp_path / "lora", v2, use_rslora=True, alpha_pattern={"0.self_attention.query_key_value": 3}
    )
    dest = quietly(v2, tmp_path / "dest", merge_adapter=lora, dtype="float32")
    before, after = read_bins(v2), load_file(dest / "model.safetensors")
    factors = torch.load(lora / "adapter_model.bin")
    for i, alpha in enumerate([3, ALPHA]):
        name = f"transformer.encoder.layers.{i}.self_attention.query_key_value"
        a, b = (factors[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
        expected = before[f"{name}.weight"].float() + alpha / RANK**0.5 * (b @ a)
        torch.testing.assert_close(after[f"{name}.weight"], expected, rtol=0, atol=1e-6)  # rounded once


def test_adapters_in_safetensors_are_those_in_pickles(source, tmp_path):
    lora = shutil.copytree(beside(source, "lora"), tmp_path / "lora")
    save_file(torch.load(lora / "adapter_model.bin"), lora / "adapter_model.safetensors")
    (lora / "adapter_model.bin").unlink()
    dest = quietly(source, tmp_path / "dest", merge_adapter=lora)
    assert_same_state(load(dest), changed_in_memory(source, "lora"))


def test_whole_tensors_of_an_adapter_replace_the_old(v2, tmp_path):
    lora = make_lora(tmp_path / "lora", v2)
    tensors = torch.load(lora / "adapter_model.bin")
    trained = torch.full((512,), 7.0)[: read_bins(v2)["transformer.encoder.final_layernorm.weight"].numel()]
    tensors["base_model.model.transformer.encoder.final_layernorm.modules_to_save.default.weight"] = trained
    torch.save(tensors, lora / "adapter_model.bin")
    dest = quietly(v2, tmp_path / "dest", merge_adapter=lora)
    found = load_file(dest / "model.safetensors")["transformer.encoder.final_layernorm.weight"]
    assert torch.equal(found, trained.half())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"use_dora": True}, "use_dora True"),
        ({"r": 0}, "r 0 where a number above 0"),
        ({"alpha_pattern": {"(a+)+$": 3}}, r"alpha_pattern '\(a\+\)\+\$', which is no name"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_adapter_that_cannot_be_merged_is_refused(v2, settings, message, tmp_path):
    lora = make_lora(tmp_path / "lora", v2, **settings)
    with pytest.raises(ValueError, match=message):
        quietly(v2, tmp_path / "dest", merge_adapter=lora)
    assert not (tmp_path / "dest").exists()


def test_an_adapter_of_another_model_is_refused(v1, v2, tmp_path):
    with pytest.raises(ValueError, match="but the checkpoint has no such tensor"):
        quietly(v2, tmp_path / "dest", merge_adapter=make_lora(tmp_path / "lora", v1))


def test_an_adapter_of_another_width_is_refused(v2, tmp_path):
    lora = make_lora(tmp_path / "lora", v2)
    tensors = torch.load(lora / "adapter_model.bin")
    torch.save({name: tensor[:, :2] for name, tensor in tensors.items()}, lora / "adapter_model.bin")
    with pytest.raises(ValueError, match="do not make up transformer"):
        quietly(v2, tmp_path / "dest", merge_adapter=lora)


def test_an_adapter_is_not_merged_into_packed_weights(v2, tmp_path):
    packed = quietly(v2, tmp_path / "packed", quantize=8)
    with pytest.raises(ValueError, match="cannot be merged into packed weights"):
        quietly(packed, tmp_path / "dest", merge_adapter=beside(v2, "lora"))


# ---- smaller vocabularies


def test_slim_gives_the_logits_of_v01_behind_its_image_rows(sources, tmp_path):
    source = sources["v0.1"]
    dest = quietly(source, tmp_path / "dest", slim=True)
    old, new = load(source).float(), load(dest).float()
    old_tokenizer, new_tokenizer = (ChatGLMTokenizer.from_pretrained(folder) for folder in (source, dest))
    images = old_tokenizer.num_image_tokens
    assert images == 20000 and old.config.vocab_size - images == new.config.vocab_size
    ids = torch.tensor([old_tokenizer.encode_chat(QUESTION)])
    assert new_tokenizer.encode_chat(QUESTION) == (ids - images)[0].tolist()
    with torch.no_grad():
        expected = old(ids).logits[..., images:]
        torch.testing.assert_close(new(ids - images).logits, expected, rtol=0, atol=1e-4)
    for name in ("bos", "eos", "pad", "mask", "gmask"):
        assert getattr(new.config, f"{name}_token_id") == getattr(old.config, f"{name}_token_id") - images
    assert new.generation_config.eos_token_id == new.config.eos_token_id
    assert answer(new, new_tokenizer) == answer(old, old_tokenizer)


@pytest.mark.parametrize("kind", ["v1.1", "Slim", "ChatGLM2"])
def test_slim_without_image_rows_is_refused(sources, kind, tmp_path):
    with pytest.raises(ValueError, match="no image rows to drop"):
        quietly(sources[kind], tmp_path / "dest", slim=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("你好，世界！\nHow are you?\n今天天气真好。\n好\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_vocabulary_slimmed_to_a_corpus_reads_and_answers_as_before(
    source, packing, corpus, tmp_path, monkeypatch
):
    monkeypatch.setenv("CHATGLM_KERNELS", "plain")  # the fast ones differ with the number of rows
    dest = quietly(source, tmp_path / "dest", slim_to=[corpus], **PACKINGS[packing])
    old, new = load(source).quantize(*(PACKINGS[packing] or {0: 0}).values()), load(dest)
    old_tokenizer, new_tokenizer = (ChatGLMTokenizer.from_pretrained(folder) for folder in (source, dest))
    kept = json.loads((dest / "vocabulary_map.json").read_text())["old_ids"]
    assert len(kept) == len(new_tokenizer) < len(old_tokenizer) - old_tokenizer.num_image_tokens
    assert new.config.vocab_size % 32 == 0 or new.config.vocab_size < old.config.vocab_size
    ids = new_tokenizer.encode_chat("How are you?", [("你好，世界！", "好")])
    assert [kept[index] for index in ids] == old_tokenizer.encode_chat(
        "How are you?", [("你好，世界！", "好")]
    )
    with torch.no_grad():
        expected = old.float()(torch.tensor([[kept[index] for index in ids]])).logits[..., kept]
        found = new.float()(torch.tensor([ids])).logits[..., : len(kept)]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_slimming_says_what_it_saves_and_what_it_proved(v2, corpus, tmp_path, capsys):
    assert main(["convert", str(v2), str(tmp_path / "dest"), "--slim-to", str(corpus)]) == 0
    told = capsys.readouterr().out
    config = json.loads((tmp_path / "dest" / "config.json").read_text())
    assert f"{config['padded_vocab_size']:,} of" in told and "which saves" in told
    assert "answers are the same as before" in told


def test_a_packed_checkpoint_can_be_slimmed(v2, corpus, tmp_path):
    packed = quietly(v2, tmp_path / "packed", quantize=4, quantize_embeddings=True)
    both = load(quietly(packed, tmp_path / "a", slim_to=[corpus]))
    once = load(quietly(v2, tmp_path / "b", quantize=4, quantize_embeddings=True, slim_to=[corpus]))
    assert_same_state(both, once)


def test_answers_that_differ_stop_the_conversion(v2, corpus, tmp_path, monkeypatch):
    """Rows in another order than their ids: the tokens are right, the weights are not."""
    monkeypatch.setattr(convert_module, "keep_rows", lambda state, rows: keep_rows(state, rows[::-1]))
    with pytest.raises(
        ValueError, match=r"The smaller model answers .* with other tokens; nothing was written"
    ):
        quietly(v2, tmp_path / "dest", slim_to=[corpus])
    assert not any(tmp_path.iterdir())


# ---- refusals, before anything is written


@pytest.mark.parametrize("again", [4, 8])
def test_packed_weights_are_not_packed_again(source, again, tmp_path):
    packed = quietly(source, tmp_path / "packed", quantize=8)
    with pytest.raises(ValueError, match="packed already"):
        quietly(packed, tmp_path / "dest", quantize=again)
    assert not (tmp_path / "dest").exists()


def test_packed_weights_are_converted_without_change(source, tmp_path):
    packed = quietly(source, tmp_path / "packed", quantize=4, quantize_embeddings=True)
    dest = quietly(packed, tmp_path / "dest")
    assert_same_state(load(dest), load(packed))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"quantize": 5}, "8 or 4 bits, not 5"),
        ({"group_size": 32}, "group_size is 32, but nothing is packed"),
        ({"quantize_embeddings": True}, "quantize_embeddings is True, but nothing is packed"),
        ({"quantize": 8, "group_size": 32}, "group_size is 32 at 8 bits"),
        ({"quantize": 4, "group_size": 128}, "64 columns cannot be cut into groups of 128"),
        ({"prefix": Path("missing")}, "There is no folder missing"),
        ({"merge_adapter": Path("missing")}, "There is no folder missing"),
    ],
    ids=str,
)
def test_wrong_options_end_in_a_sentence(v2, options, message, tmp_path):
    with pytest.raises((ValueError, OSError), match=message):
        quietly(v2, tmp_path / "dest", **options)
    assert not any(tmp_path.iterdir())


def test_an_existing_folder_is_left_alone(v2, tmp_path):
    dest = tmp_path / "dest"
    dest.mkdir()
    (dest / "mine.txt").write_text("keep")
    with pytest.raises(OSError, match="exists; choose another destination, or --overwrite"):
        quietly(v2, dest)
    with pytest.raises(OSError, match="other things than a checkpoint"):
        quietly(v2, dest, overwrite=True)
    assert [path.name for path in dest.iterdir()] == ["mine.txt"]


def test_a_checkpoint_is_replaced_on_request_alone(v1, v2, tmp_path):
    dest = quietly(v1, tmp_path / "dest")
    with pytest.raises(OSError, match="exists"):
        quietly(v2, dest)
    assert_same_state(load(dest), load(v1))
    quietly(v2, dest, overwrite=True)
    assert_same_state(load(dest), load(v2))
    assert [path.name for path in tmp_path.iterdir()] == ["dest"]


@pytest.mark.parametrize("where", [".", ".."])
def test_the_source_is_not_overwritten(v2, where, tmp_path):
    source = shutil.copytree(v2, tmp_path / "a" / "source")
    shutil.copy(v2 / "config.json", source.parent)
    with pytest.raises(ValueError, match="where the source lies"):
        quietly(source, source / where if where == "." else source.parent, overwrite=True)
    assert_same_state(load(source), load(v2))


def test_a_prefix_folder_without_prefix_is_refused(v2, tmp_path):
    with pytest.raises(ValueError, match=r"holds no weights named transformer\.prefix_encoder"):
        quietly(v2, tmp_path / "dest", prefix=one_bin(tmp_path / "other", {"a": torch.zeros(1)}))


def one_bin(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def test_heads_that_differ_are_refused(v1, tmp_path):
    def save(state: dict[str, torch.Tensor], folder: Path) -> None:
        state["lm_head.weight"] = state["lm_head.weight"] + 1
        SAVERS["one .bin file"](state, folder)

    with pytest.raises(
        ValueError, match=r"lm_head\.weight differs from transformer\.word_embeddings\.weight"
    ):
        quietly(rewrite(v1, tmp_path / "source", save), tmp_path / "dest")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_numbers_that_are_not_finite_are_refused_and_nothing_is_left(v2, bad, tmp_path):
    def save(state: dict[str, torch.Tensor], folder: Path) -> None:
        state["transformer.encoder.final_layernorm.weight"][3] = bad
        SAVERS["one .bin file"](state, folder)

    source = rewrite(v2, tmp_path / "source", save)
    with pytest.raises(
        ValueError, match=r"final_layernorm\.weight holds numbers that are not finite; download"
    ):
        quietly(source, tmp_path / "dest")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_numbers_too_large_for_the_new_dtype_are_refused(v2, tmp_path):
    def save(state: dict[str, torch.Tensor], folder: Path) -> None:
        state = {name: tensor.float() for name, tensor in state.items()}
        state["transformer.encoder.final_layernorm.weight"][3] = 70000.0
        SAVERS["one .bin file"](state, folder)

    source = rewrite(v2, tmp_path / "source", save)
    with pytest.raises(ValueError, match="not finite in float16; choose bfloat16 or float32"):
        quietly(source, tmp_path / "dest", dtype="float16")
    kept = load_file(quietly(source, tmp_path / "dest", dtype="float32") / "model.safetensors")
    assert kept["transformer.encoder.final_layernorm.weight"][3] == 70000.0


class Harmful:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "old torch"])
def test_code_in_a_pickle_is_not_run(v2, new, tmp_path):
    def save(state: dict[str, Any], folder: Path) -> None:
        state["transformer.extra"] = Harmful(tmp_path / "harm")
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=new)

    source = rewrite(v2, tmp_path / "source", save)
    with pytest.raises(ValueError, match="holds more than tensors, which could run code"):
        quietly(source, tmp_path / "dest")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_tensor_larger_than_its_file_is_refused(v2, tmp_path):
    """One number, stretched by strides of zero to a terabyte."""

    def save(state: dict[str, torch.Tensor], folder: Path) -> None:
        state["transformer.output_layer.weight"] = torch.zeros(1).expand(1 << 20, 1 << 18)
        SAVERS["one .bin file"](state, folder)

    source = rewrite(v2, tmp_path / "source", save)
    with pytest.raises(ValueError, match="more than the file holds of it"):
        quietly(source, tmp_path / "dest")


def test_a_tensor_stretched_from_fewer_numbers_is_refused(v2, tmp_path):
    def save(state: dict[str, torch.Tensor], folder: Path) -> None:
        state["transformer.output_layer.weight"] = torch.zeros(1).expand(448, 64)
        SAVERS["one .bin file"](state, folder)

    source = rewrite(v2, tmp_path / "source", save)
    with pytest.raises(ValueError, match="more than the file holds of it"):
        quietly(source, tmp_path / "dest")


@pytest.mark.parametrize("name", [7, "x"], ids=["a name that is none", "no tensor"])
def test_a_file_of_other_things_than_tensors_is_refused(v2, name, tmp_path):
    source = rewrite(
        v2,
        tmp_path / "source",
        lambda state, folder: torch.save(
            state | {name: torch.zeros(1) if name == 7 else "text"}, folder / "pytorch_model.bin"
        ),
    )
    with pytest.raises(ValueError, match="holds more than tensors"):
        quietly(source, tmp_path / "dest")


@pytest.mark.parametrize("file", ["adapter_model.bin", "adapter_model.safetensors", "adapter_config.json"])
def test_a_damaged_adapter_is_refused(v2, file, tmp_path):
    lora = shutil.copytree(beside(v2, "lora"), tmp_path / "lora")
    (lora / file).write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises((ValueError, OSError), match=f"{file} "):
        quietly(v2, tmp_path / "dest", merge_adapter=lora)
    assert not (tmp_path / "dest").exists()


def test_an_adapter_of_numbers_that_are_not_finite_is_refused(v2, tmp_path):
    lora = shutil.copytree(beside(v2, "lora"), tmp_path / "lora")
    tensors = torch.load(lora / "adapter_model.bin")
    next(iter(tensors.values()))[0, 0] = float("nan")
    torch.save(tensors, lora / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"query_key_value\.weight holds numbers that are not finite"):
        quietly(v2, tmp_path / "dest", merge_adapter=lora)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_weights_that_do_not_fit_the_config_are_refused(v2, change, tmp_path):
    name = "transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"

    def save(state: dict[str, torch.Tensor], folder: Path) -> None:
        tensor = state.pop(name)
        if change != "missing":
            state |= (
                {name: tensor, "transformer.encoder.layers.9.x": tensor}
                if change == "unknown"
                else {name: tensor.T.clone()}
            )
        SAVERS["one .bin file"](state, folder)

    messages = {
        "missing": f"holds no {name} and 0 more",
        "unknown": "holds transformer.encoder.layers.9.x and 0 more that no model",
        "shape": r"has shape \(128, 64\), but by config.json it must be \(64, 128\)",
    }
    source = rewrite(v2, tmp_path / "source", save)
    with pytest.raises(ValueError, match=messages[change]):
        quietly(source, tmp_path / "dest")


def test_a_tensor_that_two_files_hold_is_refused(v2, tmp_path):
    source = shutil.copytree(v2, tmp_path / "source")
    first, second = sorted(source.glob("*.bin"))
    torch.save(torch.load(first) | dict(list(torch.load(second).items())[:1]), first)
    with pytest.raises(ValueError, match="which another file of the checkpoint holds too"):
        quietly(source, tmp_path / "dest")


# ---- disks, and processes that die


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(v2, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(write.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(OSError, match="only 1,000 are free") as caught:
        quietly(v2, tmp_path / "dest")
    size = write.total_bytes(convert_module.read_parts(v2).state)
    assert f"will have {size:,} bytes of weights" in str(caught.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs limits on the size of files")
@pytest.mark.parametrize("existing", [False, True], ids=["new", "in place of another"])
def test_a_disk_that_becomes_full_leaves_nothing_behind(v1, v2, existing, tmp_path):
    """A limit on the size of files stands for the full disk: the write fails in the middle as well."""
    dest = tmp_path / "dest"
    if existing:
        quietly(v1, dest)
    code = (
        "import resource, signal, sys\n"
        "from chatglm.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "sys.exit(main(['convert', *sys.argv[1:]]))"
    )
    command = [sys.executable, "-c", code, str(v2), str(dest), "--overwrite"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert f"The disk of {dest} became full" in result.stderr and "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == (["dest"] if existing else [])
    if existing:
        assert_same_state(load(dest), load(v1))


def test_what_a_killed_process_left_is_removed_by_the_next(v2, tmp_path):
    """Killed while it writes: there is no destination, and what lies beside it has the number of a dead process."""
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from chatglm.tools.convert import convert\n"
        "from chatglm.weights import parts\n"
        "def die(*args, **kwargs): os.kill(os.getpid(), signal.SIGKILL)\n"
        "parts._check_written = die\n"
        "convert(*sys.argv[1:], progress=False)\n"
    )
    dest = tmp_path / "dest"
    result = subprocess.run([sys.executable, "-c", code, str(v2), str(dest)], capture_output=True)
    assert result.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".dest.partial-") and (left / "model.safetensors").is_file()
    other = tmp_path / f".dest.partial-{os.getpid()}0000"  # no process has this number
    other.mkdir()
    living = tmp_path / f".dest.partial-{os.getppid()}"
    living.mkdir()
    quietly(v2, dest)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["dest", living.name])


def test_a_disk_error_of_another_kind_is_passed_on(v2, tmp_path, monkeypatch):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr(write, "save_file", fail)
    with pytest.raises(OSError, match="the disk is broken"):
        quietly(v2, tmp_path / "dest")
    assert not any(tmp_path.iterdir())


# ---- the command


def test_what_to_do_next_is_not_mistaken_for_a_model_of_ours(v2, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(v2), "demo"]) == 0
    assert "Next: chatglm chat ./demo\n" in capsys.readouterr().out


def test_the_command_converts_and_says_what_to_do_next(v2, tmp_path, capsys):
    assert main(["convert", str(v2), str(tmp_path / "dest"), "--quantize", "4"]) == 0
    output = capsys.readouterr()
    assert "of weights in 1 file" in output.out and f"chatglm chat {tmp_path / 'dest'}" in output.out
    assert "100%" in output.err
    assert_same_state(load(tmp_path / "dest"), load(v2).quantize(4))


def test_the_command_ends_with_one_sentence_for_mistakes(v2, tmp_path, capsys):
    assert main(["convert", str(tmp_path / "no"), str(tmp_path / "dest")]) == 1
    output = capsys.readouterr()
    assert output.err.count("\n") == 1 and output.err.startswith("chatglm: There is no folder")
