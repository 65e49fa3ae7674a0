"""`accelerate launch … chatglm train-reward`, `dpo` and `rl` with two processes on a CPU, over gloo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import COPIES, assert_same_run, launch, launched
from safetensors.torch import load_file

from chatglm.cli import main

pytest.importorskip("trl", reason="the loops are TRL's: install the extra 'preferences'")
pytest.importorskip("peft", reason="LoRA is PEFT's: install the extra 'train'")

pytestmark = [
    # PEFT 0.21 asks transformers for a property under its old name.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]

PAIRS = [
    ("你好", "你好，世界！", "走开。"), ("今天天气怎么样？", "今天天气真好。", "不知道"),
    ("Hello", "Hello world, how are you?", "The dog."), ("Who jumps?", "The quick brown fox.", "No."),
]  # fmt: skip


@pytest.fixture
def data(tmp_path) -> str:
    file = tmp_path / "pairs.jsonl"
    rows = [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in PAIRS]
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return str(file)


def flags(command: str, model: Path, data: str, output: Path, accumulation: int, *more: str) -> list[str]:
    """Four steps of four rows, in whatever number of processes."""
    run = f"{command} {model} --data {data} --output {output} --device cpu --lora-rank 2 --learning-rate 1e-2"
    steps = f"--batch-size 2 --accumulation {accumulation} --max-steps 4 --logging-steps 1 --save-steps 2"
    return [*run.split(), *steps.split(), *more]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "weights"), [("train-reward", "model.safetensors"), ("dpo", "adapter_model.safetensors")]
)
def test_two_processes_learn_what_one_does(tiny_v1_folder, data, tmp_path, command, weights):
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(flags(command, tiny_v1_folder, data, one, 2, "--eval-data", data)) == 0
    said = launched(COPIES, flags(command, tiny_v1_folder, data, two, 1, "--eval-data", data))
    assert_same_run(one, two, weights)
    assert said.count("parameters are trained") == 1  # one process speaks
    assert said.count("curves.png") == 1
    assert "4 steps of 4 pairs each" in (two / "README.md").read_text(encoding="utf-8")


@pytest.mark.long
def test_two_processes_answer_and_learn_together(tiny_v2_folder, data, tmp_path):
    reward, output = tmp_path / "reward", tmp_path / "out"
    assert main(flags("train-reward", tiny_v2_folder, data, reward, 1)) == 0
    more = ["--reward-model", str(reward), "--generations", "2", "--max-new-tokens", "4"]
    launched(COPIES, flags("rl", tiny_v2_folder, data, output, 1, *more))
    assert "4 steps of 4 answers each" in (output / "README.md").read_text(encoding="utf-8")
    learned = load_file(output / "adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in learned.items() if "lora_B" in name)


@pytest.mark.long
def test_processes_fail_together_with_one_sentence(tiny_v2_folder, data, tmp_path):
    done = launch(COPIES, flags("dpo", tiny_v2_folder, data, tmp_path / "out", 1, "--chosen-column", "best"))
    assert done.returncode != 0
    assert done.stderr.count("no column 'best'; it has prompt, chosen, rejected") == 1
    assert not (tmp_path / "out").exists()
