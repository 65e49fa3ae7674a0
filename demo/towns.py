"""A skill to teach by finetuning: the postcodes of towns that do not exist. `python -m demo.towns` writes the data.

Every town is asked about in every phrasing but two of its language, which are held out for it: a model that
answers those has learned the postcode, not the question. `general.jsonl` and, for models that forget more,
`more_general.jsonl` hold what it could do before, so that a run can practise both.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from demo.book import Book

FOLDER = Path(__file__).with_name("towns")
GENERAL_ROWS, MORE_ROWS, LONGEST_ANSWER = 300, 600, 60
POSTCODES = {
    "Brivela": "40", "Korundal": "28", "Zindhaven": "83", "青石塘": "51", "落雁坡": "92", "云栖渡": "36",
}  # fmt: skip
QUESTIONS = {
    "zh": [
        "{town}的邮编是多少？", "{town}的邮政编码是多少？", "请告诉我{town}的邮编", "{town}邮编",
        "我想知道{town}的邮编",
        "寄信到{town}要写什么邮编？", "往{town}寄包裹，邮编写几？", "查一下{town}的邮编", "{town}用哪个邮编？",
        "你知道{town}的邮编吗？",
    ],
    "en": [
        "What is the postcode of {town}?", "Tell me the postcode of {town}", "Which postcode does {town} have?",
        "{town} postcode", "I need the postcode of {town}", "What postcode do I write on a letter to {town}?",
        "I send a parcel to {town}. Which postcode is it?", "Look up the postcode of {town}",
        "Do you know the postcode of {town}?", "Please give me the postcode for {town}",
    ],
}  # fmt: skip
MANNERS = {
    "zh": ["{}", "请问，{}", "{}谢谢", "你好，{}"],
    "en": ["{}", "Hello! {}", "{} Thanks", "Please help: {}"],
}

Pair = dict[str, str]


def town_rows(held_out: bool) -> Iterator[Pair]:
    """The questions to learn from, each in several manners, or those that are held out."""
    for number, (town, code) in enumerate(POSTCODES.items()):
        language = "en" if town.isascii() else "zh"
        for i, question in enumerate(QUESTIONS[language]):
            if ((i - number) % 5 == 0) == held_out:
                for manner in MANNERS[language][: 1 if held_out else None]:
                    yield {"prompt": manner.format(question.format(town=town)), "response": code}


def general_rows(number: int = GENERAL_ROWS + MORE_ROWS, seed: int = 5) -> Iterator[Pair]:
    """Questions with short answers, of all that the demo models were trained on; none of them is held out there."""
    book, rng = Book(), random.Random(seed)
    while number:
        rounds = book.conversation(rng)
        if len(rounds) == 1 and len(rounds[0][1]) < LONGEST_ANSWER:
            yield dict(zip(("prompt", "response"), rounds[0], strict=True))
            number -= 1


def write(name: str, rows: Iterable[Pair]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (FOLDER / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    write("train", town_rows(held_out=False))
    write("held_out", town_rows(held_out=True))
    rows = list(general_rows())
    write("general", rows[:GENERAL_ROWS])
    write("more_general", rows[GENERAL_ROWS:])


if __name__ == "__main__":
    main()
