"""`chatglm bench MODEL`: how fast a model is on this machine; the work is in chatglm/tools/bench.py."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from chatglm.checkpoint import read_checkpoint
from chatglm.cli.options import add_model_options, whole_number
from chatglm.find import find_checkpoint
from chatglm.tools.chart import check_chart, three_digits

EPILOG = """
Examples:
  chatglm bench demo
  chatglm bench THUDM/chatglm2-6b --quantize 4 --prompt-tokens 128 --rounds 1
  chatglm bench chatglm2-6b-int4 --compare --json bench.json --chart bench.png

docs/performance.md tells what every line means.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    add_model_options(parser)
    add = parser.add_argument
    add("--compare", action="store_true", help="let the plain loop of transformers run the same, turn about")
    add("--json", type=Path, metavar="FILE", help="write everything that was measured to this file")
    add("--chart", type=Path, metavar="FILE", help="draw bars into this .png or .svg file; needs matplotlib")
    prompt = "length of the prompt (default: 512, or a quarter of a shorter context)"
    add("--prompt-tokens", type=whole_number, metavar="N", help=prompt)
    new = "length of every answer (default: 128, or a sixteenth of a shorter context)"
    add("--new-tokens", type=whole_number, metavar="N", help=new)
    add("--rounds", type=whole_number, default=3, metavar="N", help="values for every figure (default: 3)")
    grouped = "with --quantize 4: columns that share a scale"
    add("--group-size", type=int, choices=[32, 64, 128], help=grouped)


def run(arguments: argparse.Namespace) -> None:
    options = dict(vars(arguments))
    options.pop("run")
    model, json_file, chart_file = (options.pop(name) for name in ("model", "json", "chart"))
    # Before torch is imported, and long before there is something to write: most mistakes are told at once.
    for file in filter(None, (json_file, chart_file)):
        check_file(file)
    if chart_file:
        check_chart(chart_file)
    if arguments.group_size and arguments.quantize != 4:
        raise ValueError(f"--group-size {arguments.group_size} is for packing to 4 bits; add --quantize 4.")
    checkpoint = read_checkpoint(find_checkpoint(model, arguments.revision))
    import torch
    import transformers

    from chatglm.loading import LARGE
    from chatglm.tools.bench import bench, draw

    if checkpoint.sizes.parameters < LARGE:
        transformers.utils.logging.disable_progress_bar()
    try:
        report = bench(model, **options)
    except torch.OutOfMemoryError:
        raise MemoryError(
            "The memory of the device is used up; try --quantize 4, a smaller --prompt-tokens or --device cpu, and "
            "see what chatglm info tells."
        ) from None
    facts = report.as_dict()
    print(as_text(facts))
    if json_file:
        json_file.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if chart_file:
        draw(report, chart_file)


def check_file(path: Path) -> None:
    """Raises OSError unless a file can be written there."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise OSError(f"{path} cannot be written; name a file in a folder that exists and is yours.")


def as_text(facts: dict[str, Any]) -> str:
    """What `Report.as_dict` tells, for people: Markdown, so that it can be pasted into an issue."""
    compared = facts["same_tokens"] is not None
    header = ["", "", "median", "lowest", "highest"] + ["plain loop", "times as fast"] * compared
    rows = [_row(figure, compared) for figure in facts["figures"]]
    lines = [f"chatglm bench, {facts['date']}", "", *_head(facts), "", *table(header, rows)]
    if compared:
        rounding = "rounding can do that in half precision and behind long prompts, else please report it"
        different = f"different tokens; {rounding}"
        same = "the same tokens" if facts["same_tokens"] else different
        lines += ["", f"Taking the likeliest token, chatglm and the plain loop gave {same}."]
    return "\n".join(lines)


def _head(facts: dict[str, Any]) -> list[str]:
    machine, rounds, threads = facts["machine"], facts["rounds"], facts["threads"]
    where = [machine["processor"], f"{machine['logical cores']} logical cores", f"{machine['memory GB']} GB"]
    where += [machine["system"], " ".join(machine["vector extensions"])]
    device = machine.get("GPU") or f"{threads} thread{'s' * (threads != 1)}"
    rows = {
        "model": f"{facts['model']}, {facts['family']}, {facts['parameters']:,} parameters, {facts['layers']} layers",
        "machine": ", ".join(filter(None, where)),
        "versions": ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        "device": f"{facts['device']}, {device}",
        "dtype": facts["dtype"],
        "packing": facts["packing"],
        "measured": f"{rounds} round{'s' * (rounds != 1)}, prompts of {facts['prompt_tokens']:,} tokens, "
        f"answers of {facts['new_tokens']:,}",
    }
    return [f"- {name}: {text}" for name, text in rows.items()]


def _row(figure: dict[str, Any], compared: bool) -> list[str]:
    several = len(figure["values"]) > 1
    row = [figure["name"], figure["unit"], three_digits(figure["median"])]
    row += [three_digits(figure[edge]) if several else "" for edge in ("lowest", "highest")]
    if "plain" in figure:
        ratio = figure["times_as_fast"]
        extent = f" ({ratio['lowest']:.2f} to {ratio['highest']:.2f})" if several else ""
        return [*row, three_digits(figure["plain"]["median"]), f"{ratio['median']:.2f}{extent}"]
    return row + ["", ""] * compared


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table in aligned columns, numbers to the right of two columns of words."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    sides = ["<", "<"] + [">"] * (len(header) - 2)
    ruler = [
        "-" * (width - 1) + (":" if side == ">" else "-") for width, side in zip(widths, sides, strict=True)
    ]
    return [
        "| "
        + " | ".join(f"{cell:{side}{width}}" for cell, side, width in zip(cells, sides, widths, strict=True))
        + " |"
        for cells in (header, ruler, *rows)
    ]
