"""`accelerate launch … chatglm finetune` with two processes on a CPU, over gloo: the same as one process."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from processes import COPIES, FSDP, LAUNCH, ZERO3, assert_same_run, launch, launched
from safetensors.torch import load_file

from chatglm.cli import main

pytest.importorskip("peft", reason="LoRA is PEFT's: install the extra 'train'")
pytestmark = [
    # PEFT 0.21 asks transformers for a property under its old name.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    # PEFT knows no packed layers of ours.
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
]

ROWS = [
    ("你好", "你好，世界！"), ("今天天气怎么样？", "今天天气真好。"), ("Hello", "Hello world!"), ("Who?", "Me."),
    ("Who jumps?", "The quick brown fox."), ("一加一等于几？", "等于二。"), ("a", "b c d"), ("x y", "z z"),
]  # fmt: skip


@pytest.fixture
def data(tmp_path) -> str:
    file = tmp_path / "data.jsonl"
    lines = [json.dumps({"prompt": q, "response": a}, ensure_ascii=False) for q, a in ROWS]
    file.write_text("\n".join(lines), encoding="utf-8")
    return str(file)


def flags(model: Path, data: str, output: Path, accumulation: int, *more: str) -> list[str]:
    """Four steps of four rows, in whatever number of processes."""
    run = f"finetune {model} --data {data} --output {output} --probe none --device cpu --learning-rate 1e-2"
    steps = f"--batch-size 2 --accumulation {accumulation} --max-steps 4 --logging-steps 1 --save-steps 2"
    return [*run.split(), *steps.split(), *more]


@pytest.mark.slow
def test_fsdp_trains_all_weights_as_one_process_does(tiny_v1_folder, data, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    more = "--method", "full", "--eval-data", data, "--predict"
    assert main(flags(tiny_v1_folder, data, one, 2, *more)) == 0
    said = launched(FSDP, flags(tiny_v1_folder, data, two, 1, *more))
    assert_same_run(one, two, "model.safetensors")
    assert said.count("parameters are trained") == 1  # one process speaks
    assert "4 steps of 4 rows each" in (two / "README.md").read_text(encoding="utf-8")
    answers = "generated_predictions.txt"
    assert (two / answers).read_bytes() == (one / answers).read_bytes()


@pytest.mark.slow
def test_fsdp_trains_lora_as_one_process_does_and_resumes(tiny_v2_folder, data, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(flags(tiny_v2_folder, data, one, 2)) == 0
    launched(FSDP, flags(tiny_v2_folder, data, two, 1))
    assert_same_run(one, two, "adapter_model.safetensors")

    whole = load_file(two / "adapter_model.safetensors")
    for path in (two / "checkpoint-4", two / "README.md", two / "adapter_model.safetensors"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "Going on after" in launched(FSDP, ["finetune", "--resume", "--output", str(two)])
    resumed = load_file(two / "adapter_model.safetensors")
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name
    assert main(["finetune", "--resume", "--output", str(two)]) == 1  # one process cannot go on with it


@pytest.mark.long
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("method", ["full", "lora"])
def test_zero3_trains_as_one_process_does(tiny_v1_folder, data, tmp_path, method, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(flags(tiny_v1_folder, data, one, 2, "--method", method)) == 0
    launched(ZERO3, flags(tiny_v1_folder, data, two, 1, "--method", method))
    assert_same_run(one, two, "model.safetensors" if method == "full" else "adapter_model.safetensors")


@pytest.mark.slow
def test_copies_of_a_packed_model_train_lora_as_one_process_does(tiny_v1_folder, data, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(flags(tiny_v1_folder, data, one, 2, "--quantize", "8")) == 0
    launched(COPIES, flags(tiny_v1_folder, data, two, 1, "--quantize", "8"))
    assert_same_run(one, two, "adapter_model.safetensors")


@pytest.mark.slow
def test_all_processes_fail_together_with_one_sentence(tiny_v2_folder, data, tmp_path):
    arguments = flags(tiny_v2_folder, data, tmp_path / "out", 1, "--prompt-column", "frage")
    done = launch(COPIES, arguments)
    assert done.returncode != 0
    assert done.stderr.count("has no column 'frage'; it has prompt, response") == 1
    assert not (tmp_path / "out").exists()


def test_packed_weights_are_not_shared_out(tiny_v2_folder, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert main(flags(tiny_v2_folder, data, tmp_path / "out", 1, "--quantize", "8")) == 1
    assert (
        "FSDP and DeepSpeed cannot share out; start with accelerate launch --multi_gpu"
        in capsys.readouterr().err
    )


def test_a_checkpoint_of_several_processes_is_not_gone_on_with_by_one(tiny_v2_folder, data, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(flags(tiny_v2_folder, data, output, 1)) == 0
    state = output / "checkpoint-4" / "rng_state.pth"
    state.rename(state.with_name("rng_state_0.pth"))
    shutil.copy(state.with_name("rng_state_0.pth"), state.with_name("rng_state_1.pth"))
    assert main(["finetune", "--resume", "--output", str(output)]) == 1
    assert "was made by 2 processes, but there are 1 now; start 2" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["fsdp", "zero3"])
def test_accelerate_takes_the_configurations_that_are_shipped(name):
    config = load_config_from_file(str(LAUNCH / f"{name}.yaml"))  # raises for a key that it does not know
    assert config.distributed_type == {"fsdp": "FSDP", "zero3": "DEEPSPEED"}[name]
