"""The checks before loading: what is wrong with a folder is said in one sentence, and early."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from chatglm import checkpoint
from chatglm.checkpoint import family_of, read_checkpoint, read_config, sizes_of

CHATGLM_6B = {
    "model_type": "chatglm",
    "num_layers": 28,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "inner_hidden_size": 16384,
    "vocab_size": 130528,
    "max_sequence_length": 2048,
    "position_encoding_2d": True,
}
CHATGLM2_6B = {
    "model_type": "chatglm",
    "num_layers": 28,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "ffn_hidden_size": 13696,
    "padded_vocab_size": 65024,
    "kv_channels": 128,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "add_qkv_bias": True,
    "add_bias_linear": False,
    "rmsnorm": True,
    "post_layer_norm": True,
    "seq_length": 32768,
}
EMBEDDING = "transformer.embedding.word_embeddings.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1018370\n"


def write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A file of zeros in the format, written without its library: 8 bytes, header, tensors."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2
        for length in shape:
            size *= length
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole ChatGLM2 folder with weights of one small tensor."""
    config = CHATGLM2_6B | {"auto_map": {"AutoModel": "evil.Model"}, "_attn": "evil/kernel"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    write_safetensors(tmp_path / "model.safetensors", {EMBEDDING: (65024, 1)})
    return tmp_path


def error_of(folder: Path) -> str:
    """The message with which the checks refuse `folder`: one line that names a file of it."""
    with pytest.raises((OSError, ValueError)) as caught:
        read_checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_a_whole_folder_passes_and_tells_its_tensors(folder: Path):
    whole = read_checkpoint(folder)
    (file,) = whole.weights
    assert whole.family == "chatglm2"
    assert file.tensors[EMBEDDING].shape == (65024, 1)
    assert file.tensors[EMBEDDING].dtype == "F16"
    assert file.size == (folder / "model.safetensors").stat().st_size


def test_keys_that_may_name_code_are_left_out(folder: Path):
    config = read_config(folder)
    assert "auto_map" not in config
    assert not [key for key in config if key.startswith("_")]


def test_a_missing_folder_is_named(tmp_path: Path):
    assert str(tmp_path / "none") in error_of(tmp_path / "none")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model"])
def test_a_missing_file_is_named(folder: Path, name: str):
    (folder / name).unlink()
    assert f"{name} is missing" in error_of(folder)


def test_missing_weights_are_told(folder: Path):
    (folder / "model.safetensors").unlink()
    assert "holds no weights" in error_of(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "model.safetensors"])
def test_a_git_lfs_pointer_is_named_with_the_size_it_stands_for(folder: Path, name: str):
    (folder / name).write_text(POINTER)
    message = error_of(folder)
    assert name in message
    assert "git-lfs pointer" in message
    assert "1,018,370 bytes" in message


def test_an_empty_tokenizer_file_is_named(folder: Path):
    (folder / "tokenizer.model").write_bytes(b"")
    assert "tokenizer.model is empty" in error_of(folder)


@pytest.mark.parametrize("length", [0, 5, 40, 1000])
def test_a_truncated_safetensors_file_is_told_with_both_sizes(folder: Path, length: int):
    path = folder / "model.safetensors"
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[:length])
    message = error_of(folder)
    assert "model.safetensors" in message
    assert f"{length:,} bytes" in message
    if length == 1000:  # the header is there and tells the true size
        assert f"{whole:,}" in message


def test_a_file_longer_than_its_header_says_is_refused(folder: Path):
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"more")
    assert "where its header says" in error_of(folder)


def test_a_damaged_header_is_told(folder: Path):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"{{{{")
    assert "damaged header" in error_of(folder)


def test_a_header_of_absurd_length_is_not_read(folder: Path):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    assert "cut off or no safetensors file" in error_of(folder)


def write_index(folder: Path, names: list[str], kind: str = "model.safetensors") -> None:
    weight_map = {f"tensor{i}": name for i, name in enumerate(names)}
    (folder / f"{kind}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_missing_shards_are_counted_and_one_is_named(folder: Path):
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    write_index(folder, ["model-1.safetensors", "model-2.safetensors", "model-3.safetensors"])
    message = error_of(folder)
    assert "2 of the 3" in message
    assert "model-2.safetensors" in message


def test_shards_that_are_all_there_pass(folder: Path):
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    write_safetensors(folder / "model-2.safetensors", {"more": (2,)})
    write_index(folder, ["model-1.safetensors", "model-2.safetensors"])
    assert len(read_checkpoint(folder).weights) == 2


def test_a_shard_outside_the_folder_is_refused(folder: Path):
    (folder / "model.safetensors").unlink()
    write_index(folder, ["../model.safetensors"])
    write_safetensors(folder.parent / "model.safetensors", {"tensor0": (2,)})
    assert "../model.safetensors" in error_of(folder)


def test_a_truncated_bin_file_is_named(folder: Path):
    torch = pytest.importorskip("torch")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save({"tensor": torch.zeros(1000)}, path)
    read_checkpoint(folder)
    path.write_bytes(path.read_bytes()[:-100])
    message = error_of(folder)
    assert "pytorch_model.bin is cut off" in message
    assert f"{path.stat().st_size:,} bytes" in message


def test_a_vocabulary_of_another_release_is_told_with_both_sizes(folder: Path):
    write_safetensors(folder / "model.safetensors", {EMBEDDING: (64000, 1)})
    message = error_of(folder)
    assert "64000" in message
    assert "65024" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"inner_hidden_size": 4}, "keys of both families"),
        ({"padded_vocab_size": "many"}, "padded_vocab_size 'many'"),
        ({"num_layers": 0}, "num_layers 0"),
    ],
    ids=["another type", "both families", "a word for a number", "no layers"],
)
def test_a_config_that_cannot_be_is_refused(folder: Path, change: dict[str, Any], words: str):
    (folder / "config.json").write_text(json.dumps(CHATGLM2_6B | change))
    assert words in error_of(folder)


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_config_that_is_no_json_object_is_refused(folder: Path, text: str):
    (folder / "config.json").write_text(text)
    assert "config.json" in error_of(folder)


def test_sizes_of_the_published_checkpoints():
    first, second = sizes_of(CHATGLM_6B), sizes_of(CHATGLM2_6B)
    assert first.parameters == 6_173_286_400
    assert second.parameters == 6_243_584_000
    assert first.cache_values_per_token * 2 == 458_752
    assert second.cache_values_per_token * 2 == 28_672


@pytest.mark.parametrize(("bits", "gigabytes"), [(16, (12.35, 12.49)), (8, (6.71, 6.78)), (4, (3.89, 3.92))])
def test_memory_of_the_published_checkpoints(bits: int, gigabytes: tuple[float, float]):
    for config, expected in zip((CHATGLM_6B, CHATGLM2_6B), gigabytes, strict=True):
        assert sizes_of(config).weight_bytes(bits) / 1e9 == pytest.approx(expected, abs=0.005)


def test_keys_and_file_names_are_those_of_the_root_files():
    from chatglm.hub import configuration_chatglm, tokenization_chatglm

    assert checkpoint.FAMILY_KEYS == configuration_chatglm.FAMILY_KEYS
    assert checkpoint.TOKENIZER_FILES == tokenization_chatglm.VOCAB_FILES


def test_family_and_parameters_agree_with_the_model_for_every_reference_config(shared: Path):
    import torch

    from chatglm.hub.configuration_chatglm import ChatGLMConfig
    from chatglm.hub.modeling_chatglm import ChatGLMForConditionalGeneration

    checked = 0
    for path in sorted((shared / "golden").glob("v[12]_*.json")):
        keys = json.loads(path.read_text())["config"]
        if keys.get("quantization_bit") or keys.get("pre_seq_len"):
            continue  # packed weights and prefixes are counted apart
        config = ChatGLMConfig.from_dict(dict(keys))
        with torch.device("meta"):
            model = ChatGLMForConditionalGeneration(config)
        assert family_of(keys) == config.family
        assert sizes_of(keys).parameters == model.num_parameters(), path.name
        checked += 1
    assert checked >= 10
