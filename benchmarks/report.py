"""Results as JSON, as Markdown and as a chart, all three from the same figures."""

from __future__ import annotations

import json
import re
import shlex
import statistics
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from chatglm.tools.chart import Bar, draw_bars
from chatglm.tools.machine import machine

from .measure import Samples

MISSING = "-"


def number(value: float | None, digits: int = 1) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    return MISSING if value is None else f"{value:.0%}"


def times(ratio: tuple[float, float, float] | None) -> str:
    """A ratio with its range over the rounds."""
    return MISSING if ratio is None else f"{ratio[0]:.2f} ({ratio[1]:.2f}-{ratio[2]:.2f})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, numbers to the right."""
    ruler = ["---"] + ["--:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ruler, *rows))


def command_line() -> str:
    """What was typed, without options that name a place on this machine alone."""
    words: list[str] = []
    for word in sys.argv[1:]:
        if not Path(word.partition("=")[2] or word).is_absolute():
            words.append(word)
        elif not word.startswith("--"):
            words.pop()  # the option before it
    return shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *words])


def setting(probe: Any, samples: Sequence[Samples]) -> dict[str, Any]:
    """What every result begins with: machine, command, probe, and how clean the run was."""
    blocks = [block for each in samples for block in each.clean]
    bandwidths = [block.bandwidth / 1e9 for block in blocks]
    return {
        "date": date.today().isoformat(),
        "command": command_line(),
        "machine": machine(),
        "probe": probe.description,
        "probe GB/s": {
            "median": statistics.median(bandwidths),
            "lowest": min(bandwidths),
            "highest": max(bandwidths),
        }
        if bandwidths
        else None,
        "blocks kept": len(blocks),
        "blocks thrown away": sum(each.thrown_away for each in samples),
    }


def introduction(title: str, setting: dict[str, Any], versions: dict[str, str]) -> str:
    """The head of the Markdown file."""
    about, bandwidth = setting["machine"], setting["probe GB/s"]
    lines = [
        f"# {title}",
        "",
        f"`{setting['command']}`, {setting['date']}",
        "",
        f"- {about['processor']}, {about['logical cores']} logical cores, {about['memory GB']} GB, {about['system']}",
        f"- vector extensions: {', '.join(about['vector extensions']) or 'unknown'}",
        f"- bandwidth probe ({setting['probe']}): "
        + (
            f"{bandwidth['median']:.1f} GB/s, {bandwidth['lowest']:.1f} to {bandwidth['highest']:.1f}"
            if bandwidth
            else "no clean block"
        ),
        f"- {setting['blocks kept']} blocks measured, {setting['blocks thrown away']} thrown away because other "
        "processes were at work",
        *(f"- {name}: {version}" for name, version in versions.items()),
        "",
    ]
    return "\n".join(lines)


def as_json(samples: Samples) -> dict[str, Any]:
    """The samples as columns with one number a round, None where no block was clean."""
    blocks = samples.kept
    names = list(samples.clean[0].seconds) if samples.clean else []
    return {
        "seconds": {name: [block and block.seconds[name] for block in blocks] for name in names},
        "bandwidth": [block and block.bandwidth for block in blocks],
        "others": [block and block.others for block in blocks],
        "thrown away": samples.thrown_away,
    }


def save(folder: Path, name: str, data: dict[str, Any], markdown: str) -> list[Path]:
    """Write NAME.json and NAME.md; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.json", folder / f"{name}.md"]
    text = json.dumps(data, indent=1)
    text = re.sub(r"\[[^][{}]*\]", lambda numbers: " ".join(numbers[0].split()), text)  # a list on a line
    paths[0].write_text(text + "\n")
    paths[1].write_text(markdown)
    return paths


def chart(path: Path, title: str, panels: Sequence[tuple[str, list[Bar]]]) -> Path | None:
    """Bars in an SVG file, see `draw_bars`; None where matplotlib is not installed."""
    try:
        draw_bars(path, title, panels)
    except ImportError:
        return None
    return path
