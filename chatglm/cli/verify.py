"""`chatglm verify FOLDER`: whether a checkpoint is sound; the work is in chatglm/tools/verify.py."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chatglm.tools.verify import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", help="the folder of a checkpoint, demo or demo-v1; nothing in it is run")
    listed = "compare the files with the hashes of this list, as sha256sum writes it"
    add("--sha256", type=Path, metavar="LIST", help=listed)
    add("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Returns 1 if there is a problem."""
    from chatglm.tools.verify import verify

    report = verify(arguments.folder, arguments.sha256)
    print(json.dumps(as_dict(report), indent=2) if arguments.json else as_text(report))
    return 0 if report.sound else 1


def as_dict(report: Report) -> dict[str, Any]:
    """The report as JSON has it."""
    return {
        "folder": str(report.folder),
        "sound": report.sound,
        "checks": [vars(check) for check in report.checks],
    }


def as_text(report: Report) -> str:
    """The report for people: a line for each check, and one that sums up."""
    lines = [f"{check.name:<12}{check.result:<13}{check.text}" for check in report.checks]
    problems = sum(check.result == "problem" for check in report.checks)
    summary = f"{problems} problem{'s' * (problems != 1)}" if problems else "No problems"
    return _printable("\n".join([*lines, "", f"{summary} in {report.folder}."]))


def _printable(text: str) -> str:
    # Names out of a file must not steer the terminal.
    return "".join(each if each.isprintable() or each == "\n" else "?" for each in text)
