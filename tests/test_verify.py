"""chatglm verify: every fault of a folder has its line, the other lines stay, and nothing of it is run."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatglm.cli import main
from chatglm.cli.verify import as_text
from chatglm.hub import tokenization_chatglm
from chatglm.hub.configuration_chatglm import ChatGLMConfig
from chatglm.hub.modeling_chatglm import ChatGLMForConditionalGeneration, ChatGLMForSequenceClassification
from chatglm.tools import contents
from chatglm.tools.convert import convert
from chatglm.tools.hashes import read_hashes
from chatglm.tools.report import Report
from chatglm.tools.verify import verify
from chatglm.weights.tensors import Tensor

QKV = "transformer.encoder.layers.0.self_attention.query_key_value.weight"
CHECKS = [
    "config",
    "code",
    "files",
    "index",
    "names",
    "shapes",
    "dtypes",
    "numbers",
    "tied",
    "tokenizer",
    "sha256",
]


@pytest.fixture
def v1(tiny_v1_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_v1_folder, tmp_path / "v1")


@pytest.fixture
def v2(tiny_v2_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_v2_folder, tmp_path / "v2")


def problems(report: Report) -> list[str]:
    """The names of the checks that found one; every check has one line, and a sentence."""
    assert [check.name for check in report.checks] == CHECKS
    assert all(check.text.rstrip(")").endswith(".") for check in report.checks)
    return [check.name for check in report.checks if check.result == "problem"]


def text_of(report: Report, name: str) -> str:
    return next(check.text for check in report.checks if check.name == name)


def result_of(report: Report, name: str) -> str:
    return next(check.result for check in report.checks if check.name == name)


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def as_bin(folder: Path) -> Path:
    """The weights as a pickle."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder / "pytorch_model.bin"


def in_shards(folder: Path) -> dict[str, str]:
    """The weights in two files and an index; returns its weight_map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {
        "model-00001-of-00002.safetensors": names[: len(names) // 2],
        "model-00002-of-00002.safetensors": names[len(names) // 2 :],
    }
    for file, half in halves.items():
        save_file({name: tensors[name] for name in half}, folder / file)
    weight_map = {name: file for file, half in halves.items() for name in half}
    write_index(folder, weight_map, sum(tensor.nbytes for tensor in tensors.values()))
    return weight_map


def write_index(folder: Path, weight_map: dict[str, str], size: int = 0) -> None:
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# ---- sound folders


def test_a_folder_that_was_saved_is_sound(tiny_folder: Path):
    report = verify(tiny_folder)
    assert problems(report) == []
    assert report.sound
    assert "2 layers" in text_of(report, "config")


@pytest.mark.parametrize("name", ["demo", "demo-v1"])
def test_our_own_models_are_sound(name: str):
    assert problems(verify(name)) == []


@pytest.mark.parametrize(
    "options",
    [
        {"quantize": 8},
        {"quantize": 4},
        {"quantize": 4, "quantize_embeddings": True},
        {"quantize": 4, "group_size": 32},
    ],
    ids=["int8", "int4", "int4 with embeddings", "int4 in groups"],
)
def test_a_packed_folder_is_sound(tiny_folder: Path, tmp_path: Path, options: dict[str, Any]):
    convert(tiny_folder, tmp_path / "packed", **options, progress=False)
    report = verify(tmp_path / "packed")
    assert problems(report) == []
    assert f"packed to {options['quantize']} bits" in text_of(report, "config")
    assert "int8" in text_of(report, "dtypes")


@pytest.mark.parametrize("projection", [False, True], ids=["embedding", "projection"])
def test_a_folder_with_a_prefix_is_sound_and_so_is_the_prefix_alone(
    tiny_folder: Path, tmp_path: Path, projection: bool
):
    folder = shutil.copytree(tiny_folder, tmp_path / "prefix")
    config = ChatGLMConfig.from_pretrained(folder, pre_seq_len=3, prefix_projection=projection)
    ChatGLMForConditionalGeneration(config).half().save_pretrained(folder)
    report = verify(folder)
    assert problems(report) == []
    assert "a prefix of 3 tokens" in text_of(report, "config")

    def keep_the_prefix(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "prefix_encoder" not in name]:
            del tensors[name]

    change_weights(folder, keep_the_prefix)
    report = verify(folder)
    assert problems(report) == []
    assert "prefix alone" in text_of(report, "names")


def test_a_classifier_is_sound_with_and_without_the_output_layer(v2: Path):
    config = ChatGLMConfig.from_pretrained(v2, num_labels=5)
    ChatGLMForSequenceClassification(config).half().save_pretrained(v2)
    report = verify(v2)
    assert problems(report) == []
    assert "head for classes" in text_of(report, "names")
    rows = config.vocab_size
    change_weights(
        v2, lambda tensors: tensors.update({"transformer.output_layer.weight": torch.zeros(rows, 64)})
    )
    assert problems(verify(v2)) == []
    change_weights(v2, lambda tensors: tensors.update({"classifier_head.bias": torch.zeros(4)}))
    assert problems(verify(v2)) == ["shapes"]


def test_a_folder_in_shards_is_sound(v2: Path):
    in_shards(v2)
    report = verify(v2)
    assert problems(report) == []
    assert "2 files" in text_of(report, "files")


def test_a_folder_with_pickles_is_sound(v2: Path):
    as_bin(v2)
    assert problems(verify(v2)) == []


def test_a_folder_as_it_was_published_is_sound_and_what_is_odd_in_it_is_told(v1: Path):
    def as_published(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["transformer.word_embeddings.weight"].clone()
        for i in range(2):
            tensors[f"transformer.layers.{i}.attention.rotary_emb.inv_freq"] = torch.ones(4).half()
        for name in [name for name in tensors if "layernorm" in name]:
            tensors[name] = tensors[name].float()

    change_weights(v1, as_published)
    in_shards(v1)
    change_json(v1 / "model.safetensors.index.json", metadata={"total_size": 13744473856})
    change_json(v1 / "config.json", _name_or_path="THUDM/chatglm-6b")
    (v1 / "modeling_chatglm.py").write_text("raise RuntimeError('this ran')")
    report = verify(v1)
    assert problems(report) == []
    assert "inv_freq" in text_of(report, "names")
    assert "float16 (" in text_of(report, "dtypes")
    assert "float32 (" in text_of(report, "dtypes")
    assert "total_size is 13744473856" in text_of(report, "index")
    assert "lm_head and transformer.word_embeddings are equal" in text_of(report, "tied")
    assert "configuration_chatglm.py" in text_of(report, "code")


def test_every_reference_checkpoint_is_sound(shared: Path, tmp_path: Path):
    checked = 0
    for path in sorted((shared / "golden").glob("v[12]_*.json")):
        golden = json.loads(path.read_text())
        if "generated_weights" in golden:
            continue  # its embedding is not in the file
        folder = tmp_path / path.stem
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(golden["config"]))
        tensors = load_file(path.with_suffix(".safetensors"))
        weights = {name[3:]: tensor for name, tensor in tensors.items() if name.startswith("w::")}
        save_file(weights, folder / "model.safetensors")
        report = verify(folder)
        assert problems(report) == ["tokenizer"], (path.name, as_text(report))  # there is none
        checked += 1
    assert checked >= 15


# ---- faults


def forget_a_tensor(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.pop(QKV))


def add_a_tensor(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.update(surplus=torch.zeros(2)))


def cut_a_tensor(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.update({QKV: tensors[QKV][:, 1:].contiguous()}))


def store_integers(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.update({QKV: tensors[QKV].int()}))


def put_nan(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[QKV][1, :3] = torch.tensor([float("nan"), float("inf"), float("-inf")])

    change_weights(folder, change)


def cut_the_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def forget_a_layer_of_the_config(folder: Path) -> None:
    change_json(folder / "config.json", num_layers=1)


def widen_the_config(folder: Path) -> None:
    change_json(folder / "config.json", hidden_size=96)


def break_the_config(folder: Path) -> None:
    change_json(folder / "config.json", kv_channels="many")


def contradict_the_config(folder: Path) -> None:
    change_json(folder / "config.json", multi_query_group_num=3, num_key_value_heads=3)


def say_packed(folder: Path) -> None:
    change_json(folder / "config.json", quantization_bit=4)


def forget_the_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.model").unlink()


def change_the_end(folder: Path) -> None:
    change_json(folder / "config.json", eos_token_id=7)


def cut_the_rows(folder: Path) -> None:
    change_json(folder / "config.json", padded_vocab_size=256, vocab_size=256)


def break_generation_settings(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "expected", "words"),
    [
        (forget_a_tensor, ["names"], [f"1 of the 17 tensors that config.json asks for are missing: {QKV}"]),
        (add_a_tensor, ["names"], ["No model with this config.json has surplus;"]),
        (cut_a_tensor, ["shapes"], [QKV, "(128, 63), not (128, 64)"]),
        (store_integers, ["dtypes"], [f"{QKV} is int32"]),
        (put_nan, ["numbers"], [f"{QKV} (3 of 8,192)"]),
        (cut_the_file, ["files"], ["where its header says"]),
        (forget_a_layer_of_the_config, ["names"], ["layers.1", "and 4 more"]),
        (widen_the_config, ["shapes"], ["asks for other shapes", "more"]),
        (break_the_config, ["config"], ["kv_channels 'many'"]),
        (contradict_the_config, ["config"], ["multi_query_group_num 3 groups"]),
        (say_packed, ["names", "shapes"], ["8 of the 25 tensors", "weight_scale"]),
        (forget_the_tokenizer, ["tokenizer"], ["tokenizer.model is missing"]),
        (change_the_end, ["tokenizer"], ["eos_token_id 7 is not 2"]),
        (cut_the_rows, ["shapes", "tokenizer"], ["(256, 64)"]),
        (break_generation_settings, ["config", "tokenizer"], ["generation_config.json is not valid JSON"]),
    ],
    ids=lambda value: value.__name__.replace("_", " ") if callable(value) else "",
)
def test_a_fault_is_named_on_its_line_and_the_other_lines_stay(
    v2: Path, damage: Callable[[Path], None], expected: list[str], words: list[str]
):
    damage(v2)
    report = verify(v2)
    assert problems(report) == expected
    for each in words:
        assert each in text_of(report, expected[0])
    if "config" not in expected:
        assert result_of(report, "config") == "ok"


def test_with_a_damaged_shard_the_others_are_still_read(v2: Path):
    weight_map = in_shards(v2)
    first = v2 / "model-00001-of-00002.safetensors"
    first.write_bytes(first.read_bytes()[:100])
    name = next(name for name, file in weight_map.items() if file != first.name)
    path = v2 / "model-00002-of-00002.safetensors"
    tensors = load_file(path)
    tensors[name][0] = float("nan")
    save_file(tensors, path)
    report = verify(v2)
    assert problems(report) == ["files", "names", "numbers"]
    assert first.name in text_of(report, "files")
    assert name in text_of(report, "numbers")


@pytest.mark.parametrize("bits", [8, 4])
def test_scales_that_cannot_be_are_told(tiny_v2_folder: Path, tmp_path: Path, bits: int):
    folder = tmp_path / "packed"
    convert(tiny_v2_folder, folder, quantize=bits, progress=False)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        names = [name for name in tensors if name.endswith(".weight_scale")]
        tensors[names[0]][0] = -1
        tensors[names[1]][1] = 0
        tensors[names[2]][2], tensors[names[2].removesuffix("_scale")][2] = 0, 0  # right: a row of zeros

    change_weights(folder, change)
    report = verify(folder)
    assert problems(report) == ["numbers"]
    text = text_of(report, "numbers")
    assert "scales that are negative, or zero" in text
    assert text.count(".weight_scale") == 2


@pytest.mark.parametrize("packed", [False, True], ids=["float", "packed"])
def test_an_output_layer_that_is_not_the_embedding_is_told(
    tiny_v1_folder: Path, tmp_path: Path, packed: bool
):
    folder = tmp_path / "copy"
    options = {"quantize": 8, "quantize_embeddings": True} if packed else {}
    convert(tiny_v1_folder, folder, **options, progress=False)
    embedding = "transformer.word_embeddings.weight"
    change_weights(folder, lambda tensors: tensors.update({"lm_head.weight": tensors[embedding].flip(0)}))
    report = verify(folder)
    assert problems(report) == ["tied"]
    assert f"lm_head.weight and {embedding} differ" in text_of(report, "tied")


def test_special_ids_of_another_release_are_told(v1: Path):
    change_json(v1 / "config.json", gmask_token_id=7, pad_token_id=0)
    report = verify(v1)
    assert problems(report) == ["tokenizer"]
    assert "gmask_token_id 7" in text_of(report, "tokenizer")
    assert "pad_token_id 0" in text_of(report, "tokenizer")


def test_a_tokenizer_of_the_other_family_is_told(v1: Path, tiny_v2_folder: Path):
    shutil.copyfile(tiny_v2_folder / "tokenizer.model", v1 / "ice_text.model")
    assert problems(verify(v1)) == ["tokenizer"]


def test_an_index_that_does_not_fit_its_files_is_told(v2: Path):
    weight_map = in_shards(v2)
    names, files = list(weight_map), sorted(set(weight_map.values()))
    weight_map[names[0]] = files[1]  # elsewhere
    del weight_map[names[1]]
    weight_map["nowhere"] = files[0]
    write_index(v2, weight_map)
    shutil.copyfile(v2 / files[0], v2 / "model-00003-of-00003.safetensors")
    report = verify(v2)
    assert problems(report) == ["index"]
    text = text_of(report, "index")
    assert "tensors that their files do not hold: nowhere" in text
    assert f"another file for tensors than the one that holds them: {names[0]}" in text
    assert f"all tensors that the files hold: {names[1]}" in text
    assert "model-00003-of-00003.safetensors" in text


def test_a_tensor_that_two_files_hold_is_told(v2: Path):
    in_shards(v2)
    first, second = (v2 / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    tensors = load_file(first)
    save_file(load_file(second) | dict(list(tensors.items())[:1]), second)
    report = verify(v2)
    assert problems(report) == ["index"]
    assert f"Several files hold {next(iter(tensors))}" in text_of(report, "index")


def test_missing_shards_are_told(v2: Path):
    in_shards(v2)
    (v2 / "model-00001-of-00002.safetensors").unlink()
    report = verify(v2)
    assert problems(report) == ["files", "names"]
    assert "model-00001-of-00002.safetensors is missing" in text_of(report, "files")


def test_without_weights_what_can_be_checked_is(v2: Path):
    (v2 / "model.safetensors").unlink()
    report = verify(v2)
    assert problems(report) == ["files"]
    assert result_of(report, "numbers") == "not checked"
    assert result_of(report, "tokenizer") == "ok"


def test_an_empty_folder_has_a_report_too(tmp_path: Path):
    report = verify(tmp_path)
    assert problems(report) == ["config", "files"]
    for name in ("code", "names", "tied", "tokenizer"):
        assert text_of(report, name) == "Not possible, as config.json is missing."


def test_a_folder_that_is_not_there_is_told(tmp_path: Path):
    with pytest.raises(OSError, match="There is no folder"):
        verify(tmp_path / "none")
    with pytest.raises(OSError, match="chatglm download some/model"):
        verify("some/model")
    with pytest.raises(OSError, match=r"There is no folder '\./none'"):
        verify("./none")


def test_one_tensor_at_a_time_is_in_memory(v2: Path, monkeypatch: pytest.MonkeyPatch):
    alive: list[weakref.ref] = []

    def counted(files: list[Path]) -> dict[str, Tensor]:
        def load() -> torch.Tensor:
            assert not [each for each in alive if each() is not None]
            tensor = torch.ones(3, dtype=torch.float16)
            alive.append(weakref.ref(tensor))
            return tensor

        return {f"tensor{i}": Tensor(torch.float16, (3,), load) for i in range(5)}

    monkeypatch.setattr(contents, "read_state", counted)
    report = verify(v2)
    assert result_of(report, "numbers") == "ok"
    assert len(alive) == 5


# ---- made to harm


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_a_pickle_with_code_is_told_and_does_not_run(v2: Path, tmp_path: Path):
    path = as_bin(v2)
    torch.save({"tensor": Trap(tmp_path / "ran")}, path)
    report = verify(v2)
    assert problems(report) == ["files"]
    assert "could run code" in text_of(report, "files")
    assert not (tmp_path / "ran").exists()


def test_a_tensor_that_claims_more_than_its_file_holds_is_told(v2: Path):
    path = as_bin(v2)
    torch.save({QKV: torch.zeros(1).expand(10**6, 10**6)}, path)  # 4 TB
    report = verify(v2)
    assert problems(report) == ["files"]
    assert "more than the file holds of it" in text_of(report, "files")


def test_a_header_that_lies_is_told(v2: Path):
    text = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}}).encode()
    (v2 / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    report = verify(v2)
    assert problems(report) == ["files"]
    assert "damaged header" in text_of(report, "files")


def test_an_index_that_leaves_the_folder_is_told(v2: Path):
    weight_map = in_shards(v2)
    write_index(v2, weight_map | {"x": "../x.safetensors"})
    report = verify(v2)
    assert "files" in problems(report)
    assert "'../x.safetensors'" in text_of(report, "files")


def test_a_link_that_leaves_the_folder_is_told(v2: Path):
    for name in ("model.safetensors", "tokenizer.model"):
        (v2 / name).rename(v2.parent / name)
        (v2 / name).symlink_to(v2.parent / name)
    report = verify(v2)
    assert problems(report) == ["files", "tokenizer"]
    assert "is a link to" in text_of(report, "files")


@pytest.mark.parametrize(
    "key", ["hidden_size", "num_layers", "padded_vocab_size", "pre_seq_len", "num_labels"]
)
def test_absurd_sizes_are_told_before_anything_is_built_of_them(v2: Path, key: str):
    change_json(v2 / "config.json", **{key: 10**12})
    report = verify(v2)
    assert problems(report) == ["config"]
    assert f"{key} 1000000000000" in text_of(report, "config")


def test_code_that_the_settings_name_is_told_and_never_loaded(v2: Path):
    auto_map = {"AutoModel": "evil.Model", "AutoConfig": "me/mine--configuration_chatglm.ChatGLMConfig"}
    change_json(v2 / "config.json", auto_map=auto_map, _private="x", attn_implementation="evil/kernel")
    change_json(v2 / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.Tokenizer"]})
    (v2 / "evil.py").write_text("raise RuntimeError('this ran')")
    report = verify(v2)
    assert problems(report) == ["code"]
    text = text_of(report, "code")
    for each in ("AutoModel: evil.Model", "evil.Tokenizer", "_private", "attn_implementation"):
        assert each in text
    assert "configuration_chatglm" not in text


@pytest.mark.parametrize(
    "auto_map", ["evil.Model", ["evil.Model"], {"AutoModel": {"a": "evil.Model"}}], ids=repr
)
def test_an_auto_map_of_any_form_is_told(v2: Path, auto_map: Any):
    change_json(v2 / "config.json", auto_map=auto_map)
    report = verify(v2)
    assert problems(report) == ["code"]
    assert "evil.Model" in text_of(report, "code")


def many_pieces(count: int) -> bytes:
    return b"\n\0" * count  # each an empty message in field 1


@pytest.mark.parametrize("count", [250_001, 7_000_000, 10_000_000])
def test_a_vocabulary_of_millions_of_pieces_is_refused_before_sentencepiece_sees_it(
    v2: Path, monkeypatch: pytest.MonkeyPatch, count: int
):
    class Unwanted:
        def LoadFromSerializedProto(self, proto: bytes) -> bool:
            raise AssertionError("sentencepiece was given the file")

    monkeypatch.setattr(tokenization_chatglm, "SentencePieceProcessor", Unwanted)
    (v2 / "tokenizer.model").write_bytes(many_pieces(count))
    report = verify(v2)
    assert problems(report) == ["tokenizer"]
    assert "no tokenizer of ChatGLM has" in text_of(report, "tokenizer") or count > 8_000_000
    assert "tokenizer.model has" in text_of(report, "tokenizer")


def test_a_length_without_an_end_in_a_vocabulary_is_refused(v2: Path):
    (v2 / "tokenizer.model").write_bytes(b"\n" + b"\xff" * 15_000_000)
    assert "is not a complete SentencePiece model" in text_of(verify(v2), "tokenizer")


def test_names_in_a_file_cannot_steer_the_terminal(v2: Path):
    change_weights(v2, lambda tensors: tensors.update({"\x1b[2J" + "x" * 1000: torch.zeros(1)}))
    text = as_text(verify(v2))
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) < 600


# ---- hashes


def sha256sum(folder: Path, *names: str) -> str:
    return "".join(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names)


def test_files_that_are_as_listed_pass(v2: Path):
    (v2 / "SHA256SUMS").write_text(
        sha256sum(v2, "config.json", "./model.safetensors").replace("  con", " *con")
    )
    report = verify(v2, sha256=v2 / "SHA256SUMS")
    assert problems(report) == []
    assert "2 files on the list" in text_of(report, "sha256")


def test_files_that_differ_are_missing_or_lie_elsewhere_are_told(v2: Path, tmp_path: Path):
    (tmp_path / "secret").write_text("x")
    (v2 / "link").symlink_to(tmp_path / "secret")
    outside = sha256sum(v2, "../secret", "link") + f"{'0' * 64}  /etc/passwd\n{'0' * 64}  a\\b\n"
    listed = sha256sum(v2, "config.json", "model.safetensors") + f"{'0' * 64}  none.bin\n" + outside
    (tmp_path / "list").write_text(listed)
    change_json(v2 / "config.json", more=1)
    report = verify(v2, sha256=tmp_path / "list")
    assert problems(report) == ["sha256"]
    text = text_of(report, "sha256")
    assert (
        "Not of the folder, so not looked at, 4 of the 7 files on the list: ../secret, link, /etc/passwd"
        in text
    )
    assert "Missing, 1 of the 7 files on the list: none.bin" in text
    assert "so to be downloaded again, 1 of the 7 files on the list: config.json" in text


@pytest.mark.parametrize(
    "text", ["", "no hash\n", "abc  config.json\n"], ids=["nothing", "words", "a short hash"]
)
def test_a_list_in_another_format_is_told(v2: Path, tmp_path: Path, text: str):
    (tmp_path / "list").write_text(text)
    with pytest.raises(ValueError, match="sha256sum wrote"):
        read_hashes(tmp_path / "list")
    assert problems(verify(v2, sha256=tmp_path / "list")) == ["sha256"]


def test_a_list_that_is_not_there_is_told(v2: Path, tmp_path: Path):
    with pytest.raises(OSError, match="There is no file"):
        verify(v2, sha256=tmp_path / "none")


# ---- the command


def test_the_command_prints_a_line_for_each_check(tiny_folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["verify", str(tiny_folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[: len(CHECKS)]] == CHECKS
    assert lines[-1] == f"No problems in {tiny_folder}."


def test_the_command_ends_with_status_1_where_there_is_a_problem(
    v2: Path, capsys: pytest.CaptureFixture[str]
):
    put_nan(v2)
    assert main(["verify", str(v2)]) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == f"1 problem in {v2}."
    assert captured.err == ""


def test_the_command_prints_json(v2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "list").write_text(sha256sum(v2, "config.json"))
    put_nan(v2)
    assert main(["verify", str(v2), "--json", "--sha256", str(tmp_path / "list")]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["folder"] == str(v2)
    assert report["sound"] is False
    assert [check["name"] for check in report["checks"]] == CHECKS
    results = {check["name"]: check["result"] for check in report["checks"]}
    assert results["numbers"] == "problem"
    assert results["sha256"] == "ok"


def test_what_is_no_folder_ends_in_one_sentence(capsys: pytest.CaptureFixture[str]):
    assert main(["verify", "nothing"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
