"""BIG-Bench Hard: 27 tasks, few-shot chain of thought with the prompts that were published with it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from chatglm.evaluation.files import existing_folder, json_object, read_text, text_of
from chatglm.evaluation.question import Benchmark, Published, Question, first_answer

THINK = "A: Let's think step by step."
ANSWER = re.compile(r"the answer is (.*?)\.?\s*$", re.IGNORECASE | re.MULTILINE)


class BBH(Benchmark):
    """The data are a clone of BIG-Bench-Hard: `bbh/TASK.json` and `cot-prompts/TASK.txt`."""

    name = "bbh"
    published = (
        Published("ChatGLM2-6B", 30.00),
        Published("ChatGLM2-6B base", 33.68),
        Published("ChatGLM-6B", 18.73),
    )

    def questions(self, data: Path | None) -> list[Question]:
        if data is None:
            raise ValueError(
                "BBH needs its published prompts too: git clone https://github.com/suzgunmirac/BIG-Bench-Hard, and "
                "give the folder with --data."
            )
        folder = existing_folder(data)
        files = sorted((folder / "bbh").glob("*.json"))
        if not files:
            raise OSError(f"{folder} holds no bbh/*.json; give the folder of a clone of BIG-Bench-Hard.")
        return [question for file in files for question in self._of_file(file)]

    def _of_file(self, file: Path) -> Iterator[Question]:
        prompt = file.parents[1] / "cot-prompts" / f"{file.stem}.txt"
        if not prompt.is_file():
            raise OSError(f"There is no {prompt}, the prompt for {file.name}; take the whole clone.")
        task, examples = split_prompt(read_text(prompt))
        rows = json_object(file).get("examples")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(
                f"{file} has no list of examples with input and target; take the file once more."
            )
        for number, fields in enumerate(rows, 1):
            row = (f"{file}, example {number}", fields)
            text = f"Q: {text_of(row, 'input')}\n{THINK}"
            answer = text_of(row, "target").strip()
            yield Question(f"{file.stem}:{number}", file.stem, text, answer, task=task, examples=examples)

    def answer_in(self, text: str) -> str:
        """What follows "the answer is", without the full stop; nothing if the model never says so."""
        told = ANSWER.search(first_answer(text))
        return told[1].strip() if told else ""


def split_prompt(text: str) -> tuple[str, tuple[str, ...]]:
    """A published prompt -> the description of its task, and its examples."""
    text = text.partition("-----\n")[2] or text  # above stands a mark that keeps it out of training data
    task, *examples = text.strip().split("\n\nQ: ")
    return task + "\n\n", tuple(f"Q: {example}\n\n" for example in examples)
