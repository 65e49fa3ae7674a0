"""`chatglm finetune` as a process: killed without warning, again and again, it ends as if it had not been."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("peft", reason="LoRA is PEFT's: install the extra 'train'")

ROWS = [
    ("你好", "你好，世界！"),
    ("今天天气怎么样？", "今天天气真好。"),
    ("Hello", "Hello world!"),
    ("Who?", "Me."),
]

# Runs the command; call number N of the named function stops for good, torch.save in the middle of its file.
PROGRAM = """
import pkgutil, sys, time
from chatglm.cli import main

holder, _, name = sys.argv[1].rpartition(".")
holder, most_calls = pkgutil.resolve_name(holder), int(sys.argv[2])
function, calls = getattr(holder, name), []

def stop_at_last(*args, **kwargs):
    calls.append(1)
    if len(calls) != most_calls:
        return function(*args, **kwargs)
    if name == "save":
        with open(args[1], "wb") as file:
            file.write(b"PK half of a file")
    print("stopped", flush=True)
    time.sleep(600)

setattr(holder, name, stop_at_last)
sys.exit(main(sys.argv[3:]))
"""
TRAINING = "chatglm.training.trainer:FinetuneTrainer.training_step"


def start(arguments: list[str], stop_in: str = TRAINING, call: int = 0) -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM, stop_in, str(call), "finetune", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8")


def kill_in(stop_in: str, call: int, arguments: list[str]) -> None:
    """Starts the command, waits until it is where it is to die, and kills it."""
    with start(arguments, stop_in, call) as process:
        try:
            assert any(line == "stopped\n" for line in process.stdout), "it ended by itself"
        finally:
            process.kill()


def let_end(arguments: list[str]) -> str:
    with start(arguments) as process:
        said = process.stdout.read()
    assert process.returncode == 0, said
    return said


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_with_the_weights_of_one_that_is_not(
    tiny_v2_folder, tmp_path
):
    data = tmp_path / "data.jsonl"
    lines = [json.dumps({"prompt": q, "response": a}, ensure_ascii=False) for q, a in ROWS]
    data.write_text("\n".join(lines), encoding="utf-8")
    flags = (
        "--probe none --device cpu --lora-dropout 0.2 --batch-size 1 --accumulation 1 --save-steps 2".split()
    )
    run = [str(tiny_v2_folder), "--data", str(data), *flags, "--max-steps", "9", "--learning-rate", "1e-2"]
    whole, output = tmp_path / "whole", tmp_path / "out"
    let_end([*run, "--output", str(whole)])

    kill_in("chatglm.training.folder.to_yaml", 1, [*run, "--output", str(output)])
    assert not output.exists()  # so the same command starts again
    kill_in(TRAINING, 6, [*run, "--output", str(output)])
    assert (output / "checkpoint-4").is_dir()
    resume = ["--resume", "--output", str(output)]
    kill_in("torch.save", 2, resume)  # in the middle of checkpoint-6
    assert (output / "checkpoint-6").is_dir()
    kill_in("chatglm.training.report.draw_losses", 1, resume)  # while the result is written
    assert not (output / "README.md").exists()
    assert f"Going on after {output / 'checkpoint-9'}" in let_end(resume)

    assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in whole.iterdir())
    assert_same_tensors(whole / "adapter_model.safetensors", output / "adapter_model.safetensors")
    assert not list(tmp_path.glob(".out.partial-*"))


def assert_same_tensors(expected: Path, actual: Path) -> None:
    whole, other = load_file(expected), load_file(actual)
    assert whole.keys() == other.keys()
    for name, tensor in whole.items():
        assert torch.equal(other[name], tensor), name
