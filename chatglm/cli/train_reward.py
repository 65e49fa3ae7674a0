"""`chatglm train-reward MODEL --data FILE… --output DIR`: the work is in chatglm/preferences/reward.py."""

from __future__ import annotations

import argparse

from chatglm.cli.options import add_run_options, run_options
from chatglm.preferences.settings import REWARD_RATES, RewardSettings
from chatglm.training.processes import leave, together

EPILOG = """
Examples:
  chatglm train-reward demo --data pairs.jsonl --eval-data held_out.jsonl --output reward
  chatglm train-reward THUDM/chatglm-6b --data pairs.jsonl --form value-head --output reward

docs/preferences.md tells how the data look.
"""
GROUPS = {
    "data": "data",
    "lora_rank": "model",
    "learning_rate": "training",
    "logging_steps": "watching",
    "chosen_column": "pairs",
    "method": "reward model",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    rates = ", ".join(f"{method} {rate:g}" for method, rate in REWARD_RATES.items())
    add_run_options(parser, RewardSettings, GROUPS, {"learning_rate": rates})


def run(arguments: argparse.Namespace) -> None:
    with together():
        settings, resume, overwrite = run_options(arguments, RewardSettings)

    from chatglm.preferences.report import tell
    from chatglm.preferences.reward import RewardTask, train_reward

    tell(train_reward(settings, resume, overwrite), RewardTask.panels)
    leave()
