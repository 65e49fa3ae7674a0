"""Answers on disk, a line each, so that a run that was cut off goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Settings = dict[str, Any]
Answer = dict[str, Any]  # "place" names its question


class Journal:
    """A file whose first line holds the settings of the run, and each further one an answer.

    Opening one that is there goes on with it. Raises ValueError if it was begun with other settings, or is none, and
    OSError if it cannot be written.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path, self.answers = path, {}
        if path.exists():
            self._go_on(settings)
        else:
            self._write(json.dumps({"settings": settings}, ensure_ascii=False) + "\n")

    def append(self, answers: Sequence[Answer]) -> None:
        """Adds the answers of a batch; they are on the disk when this returns."""
        self._write("".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers))
        self.answers |= {answer["place"]: answer for answer in answers}

    def _write(self, text: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def _go_on(self, settings: Settings) -> None:
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1  # a kill may have left a part of a line behind
        first, *lines = [self._line(*each) for each in enumerate(data[:whole].splitlines(), 1)] or [{}]
        begun = first.get("settings")
        if not isinstance(begun, dict) or not all(isinstance(line.get("place"), str) for line in lines):
            raise ValueError(f"{self.path} is no file of answers; move it away, or give another --output.")
        for name in settings | begun:
            if begun.get(name) != settings.get(name):
                raise ValueError(
                    f"{self.path} was begun with {name} {begun.get(name)}, now it is {settings.get(name)}; give the "
                    "same, or another --output."
                )
        if whole < len(data):
            os.truncate(self.path, whole)
        self.answers = {line["place"]: line for line in lines}

    def _line(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise ValueError(f"{self.path}, line {number} is damaged; remove the line and run once more.")
        return value
