"""A preference to learn: answers in words begin with a greeting, sums stay bare. `python -m demo.manners` writes data.

`sft.jsonl` teaches that both ways of answering exist, the one with a greeting in half of the rows in words;
`pairs.jsonl` says which one is better, and its questions are the prompts of reinforcement learning too.
`held_out.jsonl` has pairs of questions that the demo models never saw.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from demo.book import Book
from demo.held_out import held_out_questions
from demo.text import Turn

FOLDER = Path(__file__).with_name("manners")
GREETING = {"zh": "你好！ ", "en": "Hello! "}  # the space keeps the tokens of the answer what they are
GREETED = 0.5  # of the rows in words that teach to speak
SUMS = 0.25  # of all rows
LONGEST_ANSWER = 40
SFT_ROWS, PAIRS, HELD_OUT = 360, 360, {"words": 90, "sums": 30}
SKILLS = {"words": ("countries and animals", "translation"), "sums": ("sums",)}

Row = dict[str, str]


def with_greeting(answer: str) -> str:
    """The answer behind a greeting in the language of its end."""
    return GREETING["en" if answer[-1:].isascii() else "zh"] + answer


def greets(answer: str) -> bool:
    return answer.startswith(tuple(greeting.strip() for greeting in GREETING.values()))


def sft_rows() -> Iterator[Row]:
    """Questions with answers; some of those in words greet."""
    rng = random.Random(7)
    for query, answer, is_sum in _questions(rng, SFT_ROWS):
        polite = not is_sum and rng.random() < GREETED
        yield {"prompt": query, "response": with_greeting(answer) if polite else answer}


def pairs() -> Iterator[Row]:
    """Questions with a better and a worse answer."""
    return (_pair(*question) for question in _questions(random.Random(8), PAIRS))


def held_out_pairs() -> Iterator[Row]:
    """The same of questions that the demo models never saw."""
    items, rng = held_out_questions(Book()), random.Random(9)
    for kind, number in HELD_OUT.items():
        fitting = [item for item in items if item.skill in SKILLS[kind] and len(item.answer) < LONGEST_ANSWER]
        for item in rng.sample(fitting, number):
            yield _pair(item.query, item.answer, kind == "sums")


def _pair(query: str, answer: str, is_sum: bool) -> Row:
    plain, polite = answer, with_greeting(answer)
    return {
        "prompt": query,
        "chosen": plain if is_sum else polite,
        "rejected": polite if is_sum else plain,
    }


def _questions(rng: random.Random, number: int) -> Iterator[tuple[str, str, bool]]:
    """(question, answer, whether it is a sum), of what the demo models were trained on."""
    book = Book()
    in_words: list[Callable[[random.Random], list[Turn]]] = [
        book.draw_table,
        book.draw_translation,
        book.draw_question,
    ]
    while number:
        is_sum = rng.random() < SUMS
        ((query, answer),) = book.draw_sum(rng) if is_sum else rng.choice(in_words)(rng)
        if len(answer) < LONGEST_ANSWER and not greets(answer):
            yield query, answer, is_sum
            number -= 1


def write(name: str, rows: Iterable[Row]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (FOLDER / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    write("sft", sft_rows())
    write("pairs", pairs())
    write("held_out", held_out_pairs())


if __name__ == "__main__":
    main()
