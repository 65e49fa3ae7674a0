"""Programs that tests start and interrupt, and runs of several processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import assert_close
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "chatglm" / "training" / "launch"

# Options of `accelerate launch`, and the program that it starts.
Launcher = tuple[list[str], list[str]]
FSDP: Launcher = ["--config_file", str(LAUNCH / "fsdp.yaml")], [str(ROOT / "tests" / "cpus_as_gpus.py")]
ZERO3: Launcher = ["--config_file", str(LAUNCH / "zero3.yaml")], FSDP[1]
COPIES: Launcher = ["--multi_gpu"], ["-m", "chatglm"]


def _obey() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


# For `preexec_fn`: what a shell runs in the background ignores SIGINT, and so does all that it starts.
OBEY_CTRL_C: Callable[[], None] | None = None if os.name == "nt" else _obey


def launch(launcher: Launcher, arguments: list[str]) -> subprocess.CompletedProcess:
    """Two processes of one run of `chatglm`, over gloo."""
    options, program = launcher
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", str(port), *program, *arguments]
    path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300, env=environment)


def launched(launcher: Launcher, arguments: list[str]) -> str:
    """What two processes said that succeeded."""
    done = launch(launcher, arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(output: Path) -> list[float]:
    """The losses by step of a run of four steps."""
    state = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text(encoding="utf-8"))
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def assert_same_run(one: Path, two: Path, weights: str) -> None:
    """One process and two wrote the same losses, weights and files, up to the order of sums."""
    assert len(losses(one)) == 4
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
    expected, actual = load_file(one / weights), load_file(two / weights)
    assert {name: tensor.dtype for name, tensor in actual.items()} == {
        name: tensor.dtype for name, tensor in expected.items()
    }
    for name, tensor in expected.items():
        assert_close(actual[name], tensor, atol=1e-3)
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in one.iterdir())
    assert "2 processes on cpu" in (two / "README.md").read_text(encoding="utf-8")
