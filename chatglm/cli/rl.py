"""`chatglm rl MODEL --data FILE… --output DIR`: the work is in chatglm/preferences/rl.py."""

from __future__ import annotations

import argparse

from chatglm.cli.options import add_run_options, run_options
from chatglm.preferences.settings import RL_RATE, RlSettings
from chatglm.training.processes import leave, together

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
    with together():
        settings, resume, overwrite = run_options(arguments, RlSettings)

    from chatglm.preferences.report import tell
    from chatglm.preferences.rl import RlTask, rl

    tell(rl(settings, resume, overwrite), RlTask.panels)
    leave()
