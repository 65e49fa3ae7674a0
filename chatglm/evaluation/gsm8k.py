"""GSM8K: school mathematics; few-shot chain of thought (Wei et al. 2022, arXiv 2201.11903), the last number counts."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from pathlib import Path

from chatglm.evaluation.files import Row, existing_folder, hub_rows, json_lines, read_text, text_of
from chatglm.evaluation.question import Benchmark, Published, Question, first_answer

PROMPT_FILE = "prompt.txt"
SHOTS = 8  # as many examples as the published prompt has
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
ANSWER = re.compile(r"(?:the answer is|答案是)\D{0,10}?(-?\d[\d,]*(?:\.\d+)?)", re.IGNORECASE)
CALCULATION = re.compile(r"<<[^<>]*>>")  # GSM8K's notes for a calculator


class GSM8K(Benchmark):
    """The data are GSM8K's own folder (`test.jsonl`: question, answer that ends in "#### 18"), or openai/gsm8k.

    The examples are those of `prompt.txt` beside it, blocks "Q: ...\\nA: ..." with an empty line between them, where
    the published prompt of the paper goes; else the first 8 of `train.jsonl`.
    """

    name = "gsm8k"
    published = (
        Published("ChatGLM2-6B", 28.05),
        Published("ChatGLM2-6B base", 32.37),
        Published("ChatGLM-6B", 4.82),
    )

    def questions(self, data: Path | None) -> list[Question]:
        if data is None:
            rows = hub_rows("openai/gsm8k", "main", "test")
            examples = tuple(map(worked, hub_rows("openai/gsm8k", "main", f"train[:{SHOTS}]")))
        else:
            folder = existing_folder(data)
            if not (folder / "test.jsonl").is_file():
                raise OSError(f"{folder} holds no test.jsonl; give the folder that has GSM8K's test.jsonl.")
            rows = list(json_lines(folder / "test.jsonl"))
            examples = local_examples(folder)
        return [
            Question(f"test:{number}", "gsm8k", asked(row), result(row), examples=examples)
            for number, row in enumerate(rows, 1)
        ]

    def answer_in(self, text: str) -> str:
        """The number after "The answer is", else the last number."""
        text = first_answer(text)
        told, numbers = ANSWER.search(text), NUMBER.findall(text)
        return told[1] if told else numbers[-1] if numbers else ""

    def is_right(self, question: Question, answer: str) -> bool:
        return bool(answer) and number(answer) == number(question.answer)


def local_examples(folder: Path) -> tuple[str, ...]:
    """What is shown before each question."""
    prompt, train = folder / PROMPT_FILE, folder / "train.jsonl"
    if prompt.is_file():
        blocks = [block.strip() for block in read_text(prompt).split("\n\n") if block.strip()]
        for count, block in enumerate(blocks, 1):
            if not block.startswith("Q:") or "\nA:" not in block:
                raise ValueError(f"{prompt}, block {count} is no pair of lines that begin with Q: and A:.")
        return tuple(block + "\n\n" for block in blocks)
    if train.is_file():
        return tuple(worked(row) for row, _ in zip(json_lines(train), range(SHOTS), strict=False))
    raise OSError(
        f"{folder} holds neither {PROMPT_FILE}, the examples of arXiv 2201.11903, nor train.jsonl; put one beside "
        "test.jsonl."
    )


def asked(row: Row) -> str:
    return f"Q: {text_of(row, 'question').strip()}\nA:"


def worked(row: Row) -> str:
    """A row of the training set as an example."""
    reasoning = CALCULATION.sub("", text_of(row, "answer").partition("####")[0]).strip()
    return f"{asked(row)} {reasoning} The answer is {result(row)}.\n\n"


def result(row: Row) -> str:
    """The number at the end of an answer of the data."""
    _, mark, value = text_of(row, "answer").rpartition("####")
    if not mark or number(value) is None:
        raise ValueError(f"{row[0]} has an answer that does not end in #### and a number.")
    return value.strip()


def number(text: str) -> Decimal | None:
    """The number that a text is, whatever its commas; None if it is none."""
    try:
        return Decimal(text.strip().replace(",", ""))
    except InvalidOperation:
        return None
