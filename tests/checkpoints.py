"""Folders like the published ones, with tiny random models: v1.1, v0.1, Slim and ChatGLM2, as .bin files with an index.

Also adapters and prefixes as training leaves them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from helpers import SHARPNESS, sharpen
from vocabularies import FILES, TEXT, train_vocabulary, vocabulary_config

from chatglm.hub.configuration_chatglm import ChatGLMConfig
from chatglm.hub.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm.hub.tokenization_chatglm import IMAGE_TOKENS, ChatGLMTokenizer

KINDS = ["v1.1", "v0.1", "Slim", "ChatGLM2"]
FAMILY_OF = {"v1.1": "chatglm", "v0.1": "chatglm", "Slim": "chatglm", "ChatGLM2": "chatglm2"}
PREFIX_LENGTH = 3
RANK, ALPHA = 4, 8


def make_checkpoint(kind: str, folder: Path) -> Path:
    """Writes a checkpoint of `kind` in float16, with the tensors that old code alone wrote, in two .bin files."""
    folder.mkdir(parents=True)
    tokenizer = _tokenizer(kind, folder)
    sizes = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "dtype": "float16"}
    sizes |= vocabulary_config(tokenizer, spare=-len(tokenizer) % 16)
    if FAMILY_OF[kind] == "chatglm":
        config = ChatGLMConfig.chatglm_6b(**sizes, inner_hidden_size=128)
    else:
        config = ChatGLMConfig(**sizes, ffn_hidden_size=128, kv_channels=16, seq_length=512)
    model = ChatGLMForConditionalGeneration(config).half()
    sharpen(model, SHARPNESS[FAMILY_OF[kind]])
    with torch.no_grad():  # images are never the answer
        model.get_input_embeddings().weight[: tokenizer.num_image_tokens] = 0
    config.save_pretrained(folder)
    _save_bins(model.state_dict() | _of_old_code(config), folder)
    if kind in ("v0.1", "Slim"):
        _forget(folder / "config.json", "mask_token_id", "gmask_token_id")
    return folder


def make_lora(folder: Path, source: Path, seed: int = 5, **settings: Any) -> Path:
    """An adapter of all query_key_value layers, as PEFT saves it."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in read_bins(source).items():
        if name.endswith("query_key_value.weight"):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            rows, columns = weight.shape
            tensors[f"{module}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) * 0.1
            tensors[f"{module}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * 0.1
    torch.save(tensors, folder / "adapter_model.bin")  # PEFT of today writes safetensors
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA} | settings
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def make_prefix(folder: Path, source: Path, projection: bool = False) -> Path:
    """A prefix encoder as P-Tuning v2 saves it: nothing but its own weights, in float32."""
    folder.mkdir(parents=True)
    config = prefix_config(source, projection)
    torch.manual_seed(6)
    with torch.no_grad():
        model = ChatGLMForConditionalGeneration(config)
    encoder = {name: weight for name, weight in model.state_dict().items() if ".prefix_encoder." in name}
    torch.save(encoder, folder / "pytorch_model.bin")
    return folder


def prefix_config(source: Path, projection: bool = False) -> ChatGLMConfig:
    config = ChatGLMConfig.from_pretrained(source)
    config.pre_seq_len, config.prefix_projection = PREFIX_LENGTH, projection
    return config


def read_bins(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the .bin files of a folder."""
    state = {}
    for path in sorted(folder.glob("pytorch_model*.bin")):
        state |= torch.load(path, weights_only=True)
    return state


def _tokenizer(kind: str, folder: Path) -> ChatGLMTokenizer:
    images = {"num_image_tokens": IMAGE_TOKENS} if kind == "v0.1" else {}
    train = _train_old_ice_text if kind in ("v0.1", "Slim") else train_vocabulary
    tokenizer = ChatGLMTokenizer(train(FAMILY_OF[kind], folder), **images)
    tokenizer.save_pretrained(folder)
    for name in ("num_image_tokens", "auto_map"):  # the published files tell neither
        _forget(folder / "tokenizer_config.json", name)
    return tokenizer


def _train_old_ice_text(family: str, folder: Path) -> Path:
    """A vocabulary without the pieces that the tokenizers of v0.1 and Slim append themselves."""
    path = folder / FILES[family]
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT),
            model_writer=file,
            model_type="unigram",
            vocab_size=140,
            pad_id=3,
            user_defined_symbols=["<n>"],
            normalization_rule_name="nmt_nfkc",
            hard_vocab_limit=False,
            minloglevel=2,
        )
    return path


def _of_old_code(config: ChatGLMConfig) -> dict[str, torch.Tensor]:
    table = torch.ones(4, dtype=torch.float16)
    if config.family == "chatglm2":
        return {"transformer.rotary_pos_emb.inv_freq": table}
    return {
        f"transformer.layers.{i}.attention.rotary_emb.inv_freq": table.clone()
        for i in range(config.num_layers)
    }


def _save_bins(state: dict[str, torch.Tensor], folder: Path) -> None:
    names = list(state)
    parts = [names[: len(names) // 2], names[len(names) // 2 :]]
    where = {}
    for number, part in enumerate(parts, start=1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: state[name] for name in part}, folder / file)
        where |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def _forget(path: Path, *keys: str) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({key: value for key, value in content.items() if key not in keys}))
