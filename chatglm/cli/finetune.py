"""`chatglm finetune MODEL --data FILE… --output DIR`: the work is in chatglm/training/finetune.py."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from chatglm.training.settings import LEARNING_RATES, Settings, kind_of, make_settings

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
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML with the settings; flags win over it"
    )
    parser.add_argument("--resume", action="store_true", help="go on after the last checkpoint in the output")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier run wrote there")
    group: Any = parser
    for option in fields(Settings):
        if option.name in GROUPS:
            group = parser.add_argument_group(GROUPS[option.name])
        _add(group, option)


def _add(group: Any, option: Any) -> None:
    """The flag of a field of Settings; left out, it is absent from the namespace."""
    kind, several, _ = kind_of(option.name)
    name = f"--{option.name.replace('_', '-')}"
    help, default = option.metadata["help"], option.default
    if option.name == "learning_rate":
        rates = ", ".join(f"{method} {rate:g}" for method, rate in LEARNING_RATES.items())
        help = f"the highest (default: {rates})"
    elif default not in (None, "", (), False, MISSING):
        help += f" (default: {default})"
    more: dict[str, Any] = {"default": argparse.SUPPRESS, "help": help}
    if kind is bool:
        group.add_argument(name, action=argparse.BooleanOptionalAction, **more)
        return
    if option.name == "model":
        group.add_argument("model", nargs="?", **more)
        return
    if several:
        more |= {"nargs": "+", "metavar": "FILE" if kind is str and "data" in option.name else "NAME"}
    elif not option.metadata.get("choices"):
        more["metavar"] = {int: "N", float: "X", str: "NAME"}[kind]
    group.add_argument(name, type=kind, choices=option.metadata.get("choices"), **more)


def run(arguments: argparse.Namespace) -> None:
    options = dict(vars(arguments))
    options.pop("run")
    config, resume, overwrite = (options.pop(name) for name in ("config", "resume", "overwrite"))
    flags = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    if resume and config is None and "output" in flags:
        config = Path(flags["output"]) / "finetune.yaml"
    settings = make_settings(config, flags).check()

    from chatglm.training.finetune import finetune

    outcome = finetune(settings, resume, overwrite)

    from chatglm.training.report import USE, loss_table, score_table

    print(loss_table(outcome))
    print(score_table(outcome.scores), end="")
    names = {"model": settings.model, "folder": settings.output, "pre_seq_len": settings.pre_seq_len}
    steps = USE[settings.method].format(**names).split("```")[1].removeprefix("sh\n").splitlines()
    print(f"{settings.output}: what was learned, README.md and loss.png")
    print(f"Next: {' && '.join(steps)}")
