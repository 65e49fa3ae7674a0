"""chatglm info: facts from small files and headers, before anything is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import chatglm
from chatglm.cli import info, main


def test_the_facts_are_those_of_the_loaded_model(tiny_folder: Path):
    facts = info.describe(str(tiny_folder))
    model, _ = chatglm.load(tiny_folder, device="cpu")
    assert facts["family"] == model.config.family
    assert facts["parameters"] == model.num_parameters()
    assert facts["layers"] == 2
    assert facts["vocabulary"] == model.config.vocab_size
    assert facts["context"] == model.config.max_position_embeddings
    assert facts["file_dtype"] == "float16"
    sizes = {path.name: path.stat().st_size for path in tiny_folder.glob("*.safetensors")}
    assert facts["file_sizes"] == sizes


@pytest.mark.parametrize("bits", [32, 16])
def test_the_memory_of_the_weights_is_that_of_the_loaded_ones(tiny_folder: Path, bits: int):
    dtype = {32: "float32", 16: "float16"}[bits]
    model, _ = chatglm.load(tiny_folder, device="cpu", dtype=dtype)
    (row,) = [
        row
        for row in info.describe(str(tiny_folder))["memory"]
        if row["loaded_as"] == {32: "float32", 16: "16 bits"}[bits]
    ]
    held = sum(parameter.nbytes for parameter in model.parameters())
    assert row["weights"] == held


@pytest.mark.parametrize("bits", [8, 4])
def test_the_memory_of_packed_weights_is_that_of_a_packed_model(tiny_folder: Path, bits: int):
    model, _ = chatglm.load(tiny_folder, device="cpu", dtype="float16", quantize=bits)
    row = {row["loaded_as"]: row for row in info.describe(str(tiny_folder))["memory"]}[f"int{bits}"]
    held = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    assert row["weights"] == pytest.approx(sum(held.values()), rel=0.01)


def test_the_cache_is_as_large_as_a_real_one(tiny_folder: Path):
    model, tokenizer = chatglm.load(tiny_folder, device="cpu")
    cache = model(**model.build_inputs(tokenizer, "你好"), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    (row, *_) = info.describe(str(tiny_folder))["memory"]
    assert row["cache"] == held / cache.get_seq_length() * info.CACHE_TOKENS


def test_the_memory_of_a_token_is_that_of_a_real_cache(tiny_folder: Path):
    model, tokenizer = chatglm.load(tiny_folder, device="cpu", dtype="float32")
    held = []
    for cache in (model.new_cache(), model.new_cache(int8=True)):
        model(**model.build_inputs(tokenizer, "你好"), past_key_values=cache, use_cache=True)
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        held.append(size // cache.get_seq_length())
    text = info.as_text(info.describe(str(tiny_folder)))
    expected = (
        f"{held[0] // 2:,} bytes a token in 16 bits, {held[0]:,} in float32, {held[1]:,} with int8_cache"
    )
    assert f"  cache       {expected}\n" in text


def test_a_packed_checkpoint_tells_its_bits_and_one_way_to_load(tiny_v2_folder: Path, tmp_path: Path):
    model, tokenizer = chatglm.load(tiny_v2_folder, device="cpu", dtype="float16", quantize=4)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    facts = info.describe(str(tmp_path))
    assert facts["packed_bits"] == 4
    assert [row["loaded_as"] for row in facts["memory"]] == ["int4"]


def test_what_fits_depends_on_the_free_memory(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch):
    needs = info.describe(str(tiny_folder))["memory"][1]
    enough = needs["weights"] + needs["cache"] + 1
    monkeypatch.setattr(info, "free_memory", lambda: {"RAM": enough, "GPU 0": enough - 2})
    fits = [row["fits"] for row in info.describe(str(tiny_folder))["memory"]]
    assert fits[0] == {"RAM": False, "GPU 0": False}
    assert fits[1] == {"RAM": True, "GPU 0": False}


def test_json_is_the_same_facts(tiny_folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["info", str(tiny_folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    expected = info.describe(str(tiny_folder))
    for changing in ("free_memory", "memory"):
        facts.pop(changing), expected.pop(changing)
    assert facts == expected


def test_the_text_is_laid_out_for_people(tiny_v2_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(info, "free_memory", lambda: {"RAM": 700_000})
    text = info.as_text(info.describe(str(tiny_v2_folder)))
    assert text.splitlines()[0] == f"{tiny_v2_folder}: {info.FAMILY_NAMES['chatglm2']}"
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert rows["layers"] == "  layers      2, hidden size 64"
    assert rows["float32"].endswith("nothing here")
    assert rows["int4"].endswith("RAM")
    assert "free here   700.0 kB RAM" in text


def test_torch_is_not_imported(tiny_v2_folder: Path):
    code = (
        "import sys; sys.argv[0] = 'chatglm'; from chatglm.cli import main; main();"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-c", code, "info", str(tiny_v2_folder)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr


def test_a_hub_name_in_the_cache_is_found_without_network(
    tiny_v2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import shutil

    from huggingface_hub import constants

    commit = "0" * 40
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(tiny_v2_folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    facts = info.describe("someone/tiny")
    assert facts["file_sizes"]
    (repository / "snapshots" / commit / "model.safetensors").unlink()
    without = info.describe("someone/tiny")
    assert without["file_sizes"] == {}
    assert without["parameters"] == facts["parameters"]
    assert "not downloaded" in info.as_text(without)
