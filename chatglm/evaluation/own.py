"""Questions of one's own: a file with one on each line."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

from chatglm.evaluation.ceval import prepared
from chatglm.evaluation.files import Row, json_lines, letter_of, text_of
from chatglm.evaluation.question import (
    LETTERS,
    Benchmark,
    Question,
    chinese_extraction,
    english_extraction,
    with_choices,
)

CHINESE = re.compile(r"[\u4e00-\u9fff]")


class Own(Benchmark):
    """A .jsonl file, each line of one of these kinds; `subject` is optional:

    {"question": ..., "choices": [...], "answer": "B", 1 or a choice}   it thinks, then the scores of letters decide
    {"prompt": ..., "answer": text or list of texts}                    its text must be the answer
    {"inputs_pretokenized": ..., "label": 1}                            as in the published C-Eval

    Numbers count choices from 0.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.name = file, file.stem
        self.accepted: dict[str, set[str]] = {}  # the answers to prompts, by place

    def questions(self, data: Path | None = None) -> list[Question]:
        if not self.file.is_file():
            raise OSError(
                f"There is no file {self.file}; give one of the tasks, or a .jsonl file of questions."
            )
        questions = [
            self._question(row, f"{self.file.name}:{n}") for n, row in enumerate(json_lines(self.file), 1)
        ]
        if not questions:
            raise ValueError(f"{self.file} holds no questions; write one on each line.")
        return questions

    def _question(self, row: Row, place: str) -> Question:
        fields = row[1]
        subject = text_of(row, "subject") if "subject" in fields else self.name
        if "inputs_pretokenized" in fields:
            return prepared(row, place, subject)
        if "choices" in fields:
            return self._choice(row, place, subject)
        if "prompt" not in fields:
            raise ValueError(
                f"{row[0]} has neither question and choices nor prompt; it must have one of them."
            )
        answers = fields.get("answer") if isinstance(fields.get("answer"), list) else [text_of(row, "answer")]
        if not answers or not all(isinstance(answer, str) and answer.strip() for answer in answers):
            raise ValueError(f"{row[0]} has answer {answers!r:.100}; it must be a text or a list of texts.")
        self.accepted[place] = set(map(plain, answers))
        return Question(place, subject, text_of(row, "prompt"), " | ".join(answers))

    def _choice(self, row: Row, place: str, subject: str) -> Question:
        choices = row[1]["choices"]
        fits = isinstance(choices, list) and 2 <= len(choices) <= len(LETTERS)
        if not fits or not all(isinstance(choice, str) for choice in choices):
            raise ValueError(f"{row[0]} has choices that are no list of 2 to {len(LETTERS)} texts.")
        letters, answer = LETTERS[: len(choices)], row[1].get("answer")
        if answer in choices and answer not in list(letters):
            answer = letters[choices.index(answer)]
        else:
            answer = letter_of(row, "answer", letters)
        text = with_choices(text_of(row, "question"), choices)
        extraction = chinese_extraction if CHINESE.search(text) else english_extraction
        return Question(place, subject, text, answer, letters, extraction(letters))

    def is_right(self, question: Question, answer: str) -> bool:
        if question.letters:
            return super().is_right(question, answer)
        return plain(answer) in self.accepted[question.place]


def plain(text: str) -> str:
    """A text without what does not matter: width, case, white space at the ends and in rows, a full stop at the end."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(text.split()).rstrip(".。")
