"""Scores as JSON, as Markdown and as a chart, beside the published figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatglm.evaluation.question import Published
from chatglm.tools.chart import draw_bars

MOST_BARS = 30


@dataclass(frozen=True)
class Score:
    """How many questions of a subject, a group or all were answered right."""

    name: str
    group: str = ""
    right: int = 0
    asked: int = 0
    cut: int = 0  # questions whose prompt was too long

    @property
    def percent(self) -> float:
        return 100 * self.right / self.asked


def total(name: str, scores: Sequence[Score]) -> Score:
    """All of them together: every question counts the same, as published."""
    right, asked, cut = (
        sum(getattr(score, field) for score in scores) for field in ("right", "asked", "cut")
    )
    return Score(name, "", right, asked, cut)


@dataclass(frozen=True)
class Results:
    """What a run found. `about` tells model, task and options; `published` was not measured here."""

    about: dict[str, Any]
    subjects: list[Score]
    published: tuple[Published, ...] = ()

    @property
    def all(self) -> Score:
        return total("all", self.subjects)

    @property
    def groups(self) -> list[Score]:
        names = dict.fromkeys(score.group for score in self.subjects if score.group)
        return [total(name, [score for score in self.subjects if score.group == name]) for name in names]

    @property
    def mean_of_subjects(self) -> float:
        """Percent; every subject counts the same."""
        return sum(score.percent for score in self.subjects) / len(self.subjects)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON; shares in percent."""
        return {
            "about": self.about,
            "percent": self.all.percent,
            "right": self.all.right,
            "asked": self.all.asked,
            "cut": self.all.cut,
            "mean_of_subjects": self.mean_of_subjects,
            "groups": {score.name: _counts(score) for score in self.groups},
            "subjects": {score.name: {"group": score.group} | _counts(score) for score in self.subjects},
            "published": {figure.name: figure.percent for figure in self.published},
        }

    def as_markdown(self) -> str:
        """A table for people, which can be pasted into an issue."""
        about = self.about
        packed = "" if about["packing"] == "none" else f", {about['packing']}"
        lines = [f"# {about['task']}: {about['name']}, {about['dtype']}{packed}", ""]
        lines += ["| | right | of | % |", "|---|--:|--:|--:|"]
        rows = self.subjects if len(self.subjects) > 1 else []
        lines += [_line(score) for score in [*rows, *self.groups, self.all]]
        if rows:
            lines.append(f"| mean of the subjects | | | {self.mean_of_subjects:.2f} |")
        lines += [
            f"| {figure.name} (published, not measured here) | | | {figure.percent:.2f} |"
            for figure in self.published
        ]
        if self.all.cut:
            lines += ["", f"{self.all.cut} prompts were too long and were cut at their end."]
        return "\n".join(lines) + "\n"

    def write(self, folder: Path) -> None:
        """results.json and results.md."""
        text = json.dumps(self.as_dict(), indent=2, ensure_ascii=False)
        (folder / "results.json").write_text(text + "\n", encoding="utf-8")
        (folder / "results.md").write_text(self.as_markdown(), encoding="utf-8")

    def draw(self, path: Path) -> None:
        """Bars of all questions beside the published figures, and of the groups or subjects (.png or .svg)."""
        first = [(Path(self.about["name"]).name, self.all.percent, True)]
        first += [(f"{figure.name} (published)", figure.percent, False) for figure in self.published]
        panels = [("% of all questions right", first)]
        parts = self.groups or self.subjects
        if 1 < len(parts) <= MOST_BARS:
            panels.append(("% right", [(part.name, part.percent, True) for part in parts]))
        draw_bars(path, self.about["task"], panels)


def _counts(score: Score) -> dict[str, Any]:
    return {"right": score.right, "asked": score.asked, "cut": score.cut, "percent": score.percent}


def _line(score: Score) -> str:
    name = score.name.replace("|", "\\|")
    return f"| {name} | {score.right} | {score.asked} | {score.percent:.2f} |"
