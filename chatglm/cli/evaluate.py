"""`chatglm evaluate MODEL`: how good a model is, or what packing costs it; the work is in chatglm/evaluation."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from chatglm.checkpoint import read_checkpoint
from chatglm.cli.options import add_model_options, whole_number
from chatglm.find import find_checkpoint
from chatglm.tools.chart import check_chart

EPILOG = """
Examples:
  chatglm evaluate THUDM/chatglm2-6b --task ceval --data CEval
  chatglm evaluate demo --task questions.jsonl --new-tokens 64
  chatglm evaluate THUDM/chatglm2-6b --quantization text.txt

A run that was cut off goes on where it was. docs/evaluation.md tells how each task is asked and judged.
"""
# Options that only one of the two kinds of evaluation has.
OF_TASKS = ("data", "batch_size", "new_tokens", "limit", "chart", "quantize", "group_size")
OF_QUANTIZATION = ("tokens",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    add_model_options(parser)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--task", help="ceval, mmlu, gsm8k, bbh, or a .jsonl file of your own questions")
    packing = "what 8 and 4 bits cost the model on these text files or folders"
    what.add_argument("--quantization", type=Path, nargs="+", metavar="TEXT", help=packing)
    output = "for answers and results (default: evaluation-TASK-MODEL)"
    add("--output", type=Path, metavar="FOLDER", help=output)
    data = "folder of the task's data (default: from the Hub, with the package datasets)"
    add("--data", type=Path, metavar="FOLDER", help=data)
    add("--batch-size", type=whole_number, metavar="N", help="questions at a time (default: 8)")
    length = "longest answer in tokens (default: 512, as published)"
    add("--new-tokens", type=whole_number, metavar="N", help=length)
    add("--limit", type=whole_number, metavar="N", help="only the first N questions of each subject")
    chart = "draw bars beside the published figures into this .png or .svg file; needs matplotlib"
    add("--chart", type=Path, metavar="FILE", help=chart)
    grouped = "with --quantize 4: columns that share a scale"
    add("--group-size", type=int, choices=[32, 64, 128], help=grouped)
    tokens = "with --quantization: how much of the text is read (default: 8192 tokens)"
    add("--tokens", type=whole_number, metavar="N", help=tokens)


def run(arguments: argparse.Namespace) -> None:
    check(arguments)
    options = {name: value for name, value in vars(arguments).items() if value is not None and name != "run"}
    checkpoint = read_checkpoint(find_checkpoint(arguments.model, arguments.revision))
    import transformers

    from chatglm.loading import LARGE

    if checkpoint.sizes.parameters < LARGE:
        transformers.utils.logging.disable_progress_bar()
    if arguments.quantization:
        print(compare(**options), end="")
    else:
        print(answer(**options), end="")


def check(arguments: argparse.Namespace) -> None:
    """Raises ValueError or OSError for options that do not go together, before anything is imported."""
    kind, foreign = ("--task", OF_QUANTIZATION) if arguments.task else ("--quantization", OF_TASKS)
    for name in foreign:
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} does not go with {kind}; leave it out.")
    if arguments.chart:
        check_chart(arguments.chart)
    if arguments.group_size and arguments.quantize != 4:
        raise ValueError(f"--group-size {arguments.group_size} is for packing to 4 bits; add --quantize 4.")


def answer(model: str, chart: Path | None = None, **options: Any) -> str:
    """Asks the questions of a task; returns the scores as Markdown."""
    import torch

    from chatglm.evaluation.run import evaluate

    try:
        results = evaluate(model, **options)
    except torch.OutOfMemoryError:
        raise MemoryError(
            "The memory of the device is used up; give a smaller --batch-size: what was answered is kept."
        ) from None
    if chart:
        results.draw(chart)
    return results.as_markdown()


def compare(model: str, quantization: list[Path], output: Path | None = None, **options: Any) -> str:
    """Compares packed weights with unpacked ones; returns what they cost as Markdown."""
    from chatglm.evaluation.packing import packing_costs

    costs = packing_costs(model, quantization, **options)
    costs.write(output or Path(f"evaluation-quantization-{Path(model).name}"))
    return costs.as_markdown()
