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
    code = {"auto_map": {"AutoModel": "evil.Model"}, "_attn_implementation": "evil/kernel"}
    config = CHATGLM2_6B | code | {"attn_implementation": "evil/kernel"}
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


def write_header(path: Path, header: dict[str, Any] | bytes, size: int) -> None:
    """A safetensors file with this header over `size` bytes of zeros."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))


def test_a_whole_folder_passes_and_tells_its_tensors(folder: Path):
    whole = read_checkpoint(folder)
    (file,) = whole.weights
    assert whole.family == "chatglm2"
    assert file.tensors[EMBEDDING].shape == (65024, 1)
    assert file.tensors[EMBEDDING].dtype == "F16"
    assert file.size == (folder / "model.safetensors").stat().st_size


def test_keys_that_may_name_code_are_left_out(folder: Path):
    assert read_config(folder) == CHATGLM2_6B


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


def entry(begin: int, end: int, shape: Any = None, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"a": entry(0, 60), "b": entry(40, 100)}, "'b' overlaps the tensor before it"),
        ({"a": entry(0, 100), "b": entry(0, 100)}, "overlaps"),
        ({"a": entry(0, 40), "b": entry(60, 100)}, "'b' leaves a hole behind"),
        ({"a": entry(10, 100)}, "leaves a hole behind"),
        ({"a": entry(0, 100, [99])}, "'a' is U8 [99], which does not take 100 bytes"),
        ({"a": entry(0, 100, [100], "F16")}, "does not take 100 bytes"),
        ({"a": entry(100, 0, [])}, "does not take -100 bytes"),
        ({"a": entry(-100, 0)}, "'a' has no known dtype, shape and data_offsets"),
        ({"a": entry(0, 100, [10**30])}, "no known dtype, shape"),
        ({"a": entry(0, 100, [2**40] * 3 + [0])}, "does not take 100 bytes"),
        ({"a": entry(0, 100, [1] * 100_000)}, "no known dtype, shape"),
        ({"a": entry(0, 100, [100.0])}, "no known dtype, shape"),
        ({"a": entry(0, 100, [True, 100])}, "no known dtype, shape"),
        ({"a": entry(0, 100, "100")}, "no known dtype, shape"),
        ({"a": entry(0, 100, dtype="object")}, "no known dtype, shape"),
        ({"a": entry(0, 100, dtype=["U8"])}, "no known dtype, shape"),
        ({"a": {"dtype": "U8", "shape": [100]}}, "no known dtype, shape"),
        ({"a": [0, 100]}, "no known dtype, shape"),
        (b"[1, 2]", "it is no JSON object"),
        (b'{"a": 1, "a": 2}', "the key 'a' is there twice"),
        (b'{"a": {"dtype": "U8", "dtype": "F16"}}', "the key 'dtype' is there twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "nested too deeply"),
        (b'{"a": ' + b"9" * 100_000 + b"}", "damaged header"),
        (b'"\xff"', "damaged header"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_header_that_lies_is_refused(folder: Path, header: Any, words: str):
    write_header(folder / "model.safetensors", header, 100)
    message = error_of(folder)
    assert "model.safetensors has a damaged header" in message
    assert words in message
    assert len(message) < 500


def test_tensors_may_stand_in_any_order_and_be_empty(folder: Path):
    header = {
        "b": entry(60, 100),
        "none": entry(60, 60, [0, 7]),
        "a": entry(0, 60, [3, 20]),
        "__metadata__": {},
    }
    write_header(folder / "model.safetensors", header, 100)
    (file,) = read_checkpoint(folder).weights
    assert file.tensors["a"].shape == (3, 20)


def test_a_header_of_a_hundred_megabytes_is_not_read(folder: Path):
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_001))
    with path.open("r+b") as file:
        file.truncate(300_000_000)  # the rest takes no space on the disk
    assert "its header alone would end at byte 100,000,009" in error_of(folder)


def test_the_names_in_a_message_are_short_and_printable(folder: Path):
    name = "\x1b[31m" + "x" * 10_000
    write_header(folder / "model.safetensors", {name: entry(0, 1, [7])}, 1)
    message = error_of(folder)
    assert "\x1b" not in message
    assert len(message) < 500


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": ' * 500 + "1" + "}" * 500, "nested too deeply"),
        ('{"a": ' * 200_000, "nested too deeply"),
        ('{"model_type": 1, "model_type": 2}', "the key 'model_type' is there twice"),
        ('{"a": "' + "x" * 10_000_000 + '"}', "far more than belong there"),
    ],
    ids=["500 levels", "200,000 levels", "a key twice", "10 MB"],
)
def test_json_that_is_made_to_harm_is_refused(folder: Path, name: str, text: str, words: str):
    if "index" in name:
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / name).write_text(text)
    message = error_of(folder)
    assert name in message
    assert words in message


@pytest.mark.parametrize("key", [key for key in checkpoint.LARGEST if key in CHATGLM_6B | CHATGLM2_6B])
@pytest.mark.parametrize("size", [10**12, 10**4000], ids=["10**12", "10**4000"])
def test_absurd_sizes_are_refused_before_anything_is_computed_with_them(folder: Path, key: str, size: int):
    config = CHATGLM_6B if key in CHATGLM_6B and key not in CHATGLM2_6B else CHATGLM2_6B
    (folder / "config.json").write_text(json.dumps(config | {key: size}))
    message = error_of(folder)
    assert f"{key} 1000000000" in message
    assert "more than any ChatGLM has" in message
    assert len(message) < 500


LINKS = [
    "config.json",
    "tokenizer.model",
    "model.safetensors",
    "tokenizer_config.json",
    "chat_template.jinja",
]


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("absolute", [False, True], ids=["relative", "absolute"])
def test_a_link_that_leaves_the_folder_is_refused(folder: Path, name: str, absolute: bool):
    outside = folder.parent / f"outside-{folder.name}"
    outside.mkdir()
    for each in LINKS[3:]:
        (folder / each).write_text("{}")
    (folder / name).rename(outside / name)
    (folder / name).symlink_to(outside / name if absolute else Path("..", outside.name, name))
    message = error_of(folder)
    assert f"{name} is a link to {outside / name}" in message


def test_a_link_inside_the_folder_is_followed(folder: Path):
    (folder / "files").mkdir()
    (folder / "model.safetensors").rename(folder / "files" / "weights")
    (folder / "model.safetensors").symlink_to(Path("files", "weights"))
    assert read_checkpoint(folder)


@pytest.mark.parametrize(
    "store", ["models--someone--tiny/blobs", "blobs"], ids=["its own blobs", "shared blobs"]
)
def test_the_links_of_the_cache_of_the_hub_are_followed(folder: Path, tmp_path_factory, store: str):
    cache = tmp_path_factory.mktemp("cache")
    snapshot = cache / "models--someone--tiny" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (cache / store).mkdir(parents=True)
    for path in folder.iterdir():
        path.rename(cache / store / path.name)
        (snapshot / path.name).symlink_to(cache / store / path.name)
    assert read_checkpoint(snapshot)
    other = cache / "models--someone--other" / "blobs"
    other.mkdir(parents=True)
    (cache / store / "config.json").rename(other / "config.json")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(other / "config.json")
    assert "is a link to" in error_of(snapshot)


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


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "model.bin",
        "..",
        "",
        "x\0.safetensors",
        7,
        None,
        ["x"],
    ],
    ids=repr,
)
def test_an_index_may_only_name_files_of_its_folder_and_kind(folder: Path, name: Any):
    (folder / "model.safetensors").unlink()
    write_index(folder, ["model-1.safetensors", name])
    message = error_of(folder)
    assert "which is no .safetensors file of its own folder" in message
    assert checkpoint.shown(name) in message


def test_a_bin_file_that_would_grow_when_it_is_read_is_refused(folder: Path):
    import zipfile

    (folder / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
    assert "data.pkl' in it is compressed" in error_of(folder)


def test_a_damaged_archive_is_told(folder: Path):
    (folder / "model.safetensors").unlink()
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 9, 9, 1 << 30, 1 << 30, 0)  # its table is nowhere
    (folder / "pytorch_model.bin").write_bytes(b"PK" + bytes(100) + end)
    assert "pytorch_model.bin is a damaged archive" in error_of(folder)


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
        ({"torch_dtype": "int4"}, "torch_dtype 'int4'"),
        ({"dtype": ["float16"]}, "dtype ['float16']"),
    ],
    ids=["another type", "both families", "a word for a number", "no layers", "no dtype", "several dtypes"],
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
