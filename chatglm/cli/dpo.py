"""`chatglm dpo MODEL --data FILE… --output DIR`: the work is in chatglm/preferences/dpo.py."""

from __future__ import annotations

import argparse

from chatglm.cli.options import add_run_options, run_options
from chatglm.preferences.settings import DPO_RATE, DpoSettings
from chatglm.training.processes import leave, together

EPILOG = """
Examples:
  chatglm dpo THUDM/chatglm2-6b --data pairs.jsonl --output dpo-out
  chatglm convert THUDM/chatglm2-6b preferred --merge-adapter dpo-out

docs/preferences.md tells how the data look.
"""
GROUPS = {
    "data": "data",
    "lora_rank": "model",
    "learning_rate": "training",
    "logging_steps": "watching",
    "chosen_column": "pairs",
    "beta": "DPO",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add_run_options(parser, DpoSettings, GROUPS, {"learning_rate": f"{DPO_RATE:g}"})


def run(arguments: argparse.Namespace) -> None:
    with together():
        settings, resume, overwrite = run_options(arguments, DpoSettings)

    from chatglm.preferences.dpo import DpoTask, dpo
    from chatglm.preferences.report import tell

    tell(dpo(settings, resume, overwrite), DpoTask.panels)
    leave()
