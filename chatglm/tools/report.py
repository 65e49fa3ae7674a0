"""What `verify` finds: a report of named checks, each with a sentence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from chatglm.checkpoint import shown

OK, PROBLEM, NOT_CHECKED = "ok", "problem", "not checked"
FEW = 3  # of the names that a problem has, how many are told
LONG = 250  # characters; what is longer is cut


@dataclass(frozen=True)
class Check:
    """One line of the report: what was checked, "ok", "problem" or "not checked", and a sentence."""

    name: str
    result: str
    text: str


@dataclass(frozen=True)
class Report:
    """What `verify` returns."""

    folder: Path
    checks: tuple[Check, ...]

    @property
    def sound(self) -> bool:
        """Whether no check found a problem."""
        return all(check.result != PROBLEM for check in self.checks)


def sentence(error: Exception) -> str:
    """What an error says; ours are a sentence already."""
    if isinstance(error, (OSError, ValueError)):
        return str(error)
    first = (str(error).splitlines() or [""])[0]
    return f"It cannot be checked ({type(error).__name__}: {first[:200]}); take another copy."


def result(name: str, problems: list[str], fine: str) -> Check:
    """A check with the problems it found, or else what is fine."""
    return Check(name, PROBLEM, " ".join(problems)) if problems else Check(name, OK, fine)


def some(names: Iterable[str]) -> str:
    """A few of the names, and how many more there are."""
    names = [name if name.isprintable() and len(name) < LONG else shown(name) for name in names]
    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    return ", ".join(names[:FEW]) + more


def byte_bar(name: str, total: int, progress: bool) -> tqdm:
    """A progress bar, which is shown on a terminal only."""
    return tqdm(desc=name, total=total, unit="B", unit_scale=True, disable=None if progress else True)
