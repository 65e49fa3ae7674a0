"""`chatglm rl MODEL --data FILE… --output DIR`: the work is in chatglm/preferences/rl.py."""

from __future__ import annotations

import argparse

from chatglm.cli.options import add_run_options, run_options
from chatglm.preferences.settings import RL_RATE, RlSettings

EPILOG = """
Examples:
  chatglm rl demo --data prompts.jsonl --reward-model reward --output rl-out
  chatglm rl THUDM/chatglm2-6b --data prompts.jsonl --reward-model reward --algorithm rloo --output rl-out

docs/preferences.md tells how the data look.
"""
GROUPS = {
    "data": "data",
    "lora_rank": "model",
    "learning_rate": "training",
    "logging_steps": "watching",
    "reward_model": "reinforcement learning",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add_run_options(parser, RlSettings, GROUPS, {"learning_rate": f"{RL_RATE:g}"})


def run(arguments: argparse.Namespace) -> None:
    settings, resume, overwrite = run_options(arguments, RlSettings, "rl.yaml")

    from chatglm.preferences.report import curve_table
    from chatglm.preferences.rl import RlTask, rl

    print(curve_table(rl(settings, resume, overwrite), RlTask.panels))
    print(f"{settings.output}: the adapter, README.md and curves.png")
    print(f"Next: chatglm convert {settings.model} preferred --merge-adapter {settings.output}")
