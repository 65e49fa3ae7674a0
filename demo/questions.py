"""The hand-written questions of `demo/dialogues`, with their phrasings, follow-ups and answers."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from demo.text import DIALOGUES, bare

TOPICS = {  # file -> the skill it is counted under
    "greetings": "greetings and identity",
    "feelings": "everyday questions",
    "cooking": "everyday questions",
    "health": "everyday questions",
    "computers": "everyday questions",
    "nature": "everyday questions",
    "life": "everyday questions",
    "special": "lists, code and emoji",
}


@dataclass
class Question:
    """One answer with the ways to ask for it; `follow_ups` make sense only right after it."""

    skill: str
    language: str
    answer: str
    phrasings: list[str]
    held_out: list[str] = field(default_factory=list)
    follow_ups: list[Question] = field(default_factory=list)


def read_questions(path: Path) -> Iterator[tuple[str, bool, list[str], str]]:
    """Yield (language, is follow-up, phrasings, answer) of a dialogue file.

    `zh: a | b` asks, `zh> answer` answers; `zh+:` and `zh+>` are a follow-up to the question above;
    `zh*:` marks phrasings of which none can be guessed from the others, so none is held out.
    """
    phrasings: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = re.match(r"(zh|en)([+*]?)(:|\+?>|) (.*)$", line)
        if match is None:
            raise ValueError(
                f"{path.name}, line {number}: {line[:40]!r} is neither a question nor an answer."
            )
        language, mark, kind, text = match.groups()
        if kind.endswith(">"):
            yield language, mark == "+", phrasings, text.replace("\\n", "\n")
        else:
            phrasings = [("*" if mark == "*" else "") + part.strip() for part in text.split("|")]


def split_phrasings(phrasings: list[str]) -> tuple[list[str], list[str]]:
    """Hold one phrasing out where at least four really different ones exist, never the first."""
    if phrasings[0].startswith("*"):
        return [text.lstrip("*") for text in phrasings], []
    different = list({bare(text): text for text in reversed(phrasings)}.values())[::-1]
    if len(different) < 4:
        return phrasings, []
    out = different[1 + zlib.crc32("|".join(phrasings).encode()) % (len(different) - 1)]
    return [text for text in phrasings if bare(text) != bare(out)], [out]


def load_questions() -> list[Question]:
    """Read all hand-written questions, follow-ups attached."""
    questions: list[Question] = []
    for topic, skill in TOPICS.items():
        for language, follows, phrasings, answer in read_questions(DIALOGUES / f"{topic}.txt"):
            train, out = split_phrasings(phrasings)
            if follows:
                questions[-1].follow_ups.append(Question("follow-up", language, answer, phrasings))
            else:
                questions.append(Question(skill, language, answer, train, out))
    return questions


def load_core(questions: list[Question]) -> list[Question]:
    """Return all greetings, and what else core.txt names, with the phrasings that it adds."""
    added: dict[str, list[str]] = {}
    for line in (DIALOGUES / "core.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            first, more = line.split(" => ")
            added[first] = [text.strip() for text in more.split("|")]
    core = []
    for question in questions:
        more = added.pop(question.phrasings[0], [])
        if more or question.skill == TOPICS["greetings"]:
            core.append(replace(question, phrasings=question.phrasings + more, held_out=[]))
    if added:
        raise ValueError(f"core.txt names {next(iter(added))!r}, which no dialogue file begins with.")
    return core
