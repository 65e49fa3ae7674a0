"""A question, and what every benchmark offers: its questions, and how an answer is judged."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Question:
    """What is asked, and what is right.

    With `letters` ("ABCD") the model writes what it thinks, is then asked with `extraction` for a letter, and its
    scores for the letters decide. Without, its text is judged.
    """

    place: str  # file and line, or set and number: the same in every run
    subject: str
    text: str
    answer: str  # the letter, or the text
    letters: str = ""
    extraction: str = ""
    group: str = ""  # of subjects
    task: str = ""  # what stands before the examples
    examples: tuple[str, ...] = ()  # the first ones are left out where the prompt would be too long


@dataclass(frozen=True)
class Published:
    """A figure that others have published; nothing of it was measured here."""

    name: str
    percent: float


class Benchmark(ABC):
    """A set of questions with the way its answers are judged."""

    name: str
    longest_prompt: int | None = None  # tokens; None: as many as the context has room for
    published: tuple[Published, ...] = ()

    @abstractmethod
    def questions(self, data: Path | None) -> list[Question]:
        """All questions, from a folder or file, or with None from the Hub.

        Raises OSError or ValueError with one sentence that names the file and the line.
        """

    def answer_in(self, text: str) -> str:
        """What of the model's text counts as the answer, for questions without letters."""
        return text.strip()

    def is_right(self, question: Question, answer: str) -> bool:
        """Whether `answer` is the answer to the question."""
        return answer == question.answer


def with_choices(text: str, choices: list[str]) -> str:
    """The question with its choices below it, as C-Eval and MMLU print them."""
    return "\n".join(
        [text, *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))]
    )


def chinese_extraction(letters: str) -> str:
    """The published phrase of evaluation/evaluate_ceval.py."""
    return f"综上所述，{letters}中正确的选项是："


def english_extraction(letters: str) -> str:
    """The phrase of zero-shot chain of thought (Kojima et al. 2022, arXiv 2205.11916)."""
    return f"Therefore, among {letters[0]} through {letters[-1]}, the answer is"


def first_answer(text: str) -> str:
    """The part of a text that answers; after examples a model may go on with a question of its own."""
    return re.split(r"\n\s*Q:", text)[0]
