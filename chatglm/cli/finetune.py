"""`chatglm finetune MODEL --data FILE… --output DIR`: the work is in chatglm/training/finetune.py."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from chatglm.cli.options import add_run_options, run_options
from chatglm.find import as_typed
from chatglm.training.processes import is_main, leave, together
from chatglm.training.settings import LEARNING_RATES, Settings

if TYPE_CHECKING:
    from chatglm.training.report import Outcome

EPILOG = """
Examples:
  chatglm finetune THUDM/chatglm2-6b --data train.json --output lora-out
  chatglm finetune demo --data train.jsonl --method ptuning --pre-seq-len 16 --output prefix-out
  chatglm finetune --config run.yaml --learning-rate 1e-4
  chatglm finetune --resume --output lora-out

docs/finetuning.md tells how the data look, which method to take, and how fast it may learn.
"""
GROUPS = {"data": "data", "method": "method", "learning_rate": "training", "logging_steps": "watching"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    rates = ", ".join(f"{method} {rate:g}" for method, rate in LEARNING_RATES.items())
    add_run_options(parser, Settings, GROUPS, {"learning_rate": rates})


def run(arguments: argparse.Namespace) -> None:
    with together():
        settings, resume, overwrite = run_options(arguments, Settings)

    from chatglm.training.finetune import finetune

    outcome = finetune(settings, resume, overwrite)
    if is_main():
        _tell(settings, outcome)
    leave()


def _tell(settings: Settings, outcome: Outcome) -> None:
    from chatglm.training.report import USE, loss_table, score_table

    print(loss_table(outcome))
    print(score_table(outcome.scores), end="")
    names = {
        "model": settings.model,
        "folder": as_typed(Path(settings.output)),
        "pre_seq_len": settings.pre_seq_len,
    }
    steps = USE[settings.method].format(**names).split("```")[1].removeprefix("sh\n").splitlines()
    print(f"{settings.output}: what was learned, README.md and loss.png")
    print(f"Next: {' && '.join(steps)}")
