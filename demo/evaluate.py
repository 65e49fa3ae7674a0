"""Ask a demo model the held-out questions: `python -m demo.evaluate FOLDER`.

Answers are greedy (`do_sample=False`) and count only if they equal the expected text exactly. Writes
`evaluation.json` into the folder and renders its model card, README.md, from the numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from chatglm.hub.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer, process_response
from demo.book import Book
from demo.card import write_card
from demo.held_out import Item, held_out_questions, taught_questions

BATCH = 32
LONGEST_ANSWER = 120  # tokens
WRONG_TO_SHOW = 3  # of each skill


def expected_text(tokenizer: ChatGLMTokenizer, answer: str) -> str:
    """The answer as `chat` would return it: ChatGLM-6B's tokenizer writes some characters differently."""
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return process_response(tokenizer.family, tokenizer.decode(ids))


def ask(
    model: ChatGLMForConditionalGeneration,
    tokenizer: ChatGLMTokenizer,
    items: Iterable[Item],
    progress: bool = False,
) -> list[tuple[Item, str]]:
    """Return every item with the model's greedy answer; items of about equal length share a batch."""
    items = sorted(items, key=lambda item: len(tokenizer.encode_chat(item.query, item.history)))
    answered = []
    for start in tqdm(range(0, len(items), BATCH), desc="asking", disable=not progress):
        part = items[start : start + BATCH]
        answers = model.batch_chat(
            tokenizer,
            [item.query for item in part],
            [list(item.history) for item in part],
            do_sample=False,
            max_new_tokens=LONGEST_ANSWER,
        )
        answered += [(item, response) for item, (response, _) in zip(part, answers, strict=True)]
    return answered


def score(tokenizer: ChatGLMTokenizer, answered: Iterable[tuple[Item, str]]) -> dict[str, dict[str, Any]]:
    """Count right answers by skill, and keep a few wrong ones to look at."""
    skills: dict[str, dict[str, Any]] = {}
    for item, response in sorted(answered, key=lambda pair: (pair[0].skill, pair[0].query)):
        result = skills.setdefault(item.skill, {"right": 0, "asked": 0, "wrong": []})
        result["asked"] += 1
        if response == expected_text(tokenizer, item.answer):
            result["right"] += 1
        elif len(result["wrong"]) < WRONG_TO_SHOW:
            result["wrong"].append({"asked": item.query, "answered": response, "expected": item.answer})
    return skills


def evaluate(folder: Path) -> dict[str, Any]:
    """Evaluate the model of a folder in float32 and return what belongs into evaluation.json."""
    model = ChatGLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = ChatGLMTokenizer.from_pretrained(folder)
    start = time.perf_counter()
    book = Book()
    items = [*taught_questions(book), *held_out_questions(book)]
    skills = score(tokenizer, ask(model, tokenizer, items, progress=True))
    return {
        "skills": skills,
        "command": f"python -m demo.evaluate chatglm/models/{folder.resolve().name}",
        "seconds": round(time.perf_counter() - start),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores "
        f"({torch.backends.cpu.get_cpu_capability()})",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def evaluate_folder(folder: Path) -> None:
    """Evaluate, write evaluation.json and README.md, and print the card's table."""
    results = evaluate(folder)
    text = json.dumps(results, indent=2, ensure_ascii=False)
    (folder / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    print(write_card(folder))


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Ask a demo model the held-out questions and write its card."
    )
    parser.add_argument("folder", type=Path, help="folder of the model, with the training.json of demo.train")
    options = parser.parse_args()
    for name in ("config.json", "model.safetensors", "training.json"):
        if not (options.folder / name).is_file():
            parser.error(f"{options.folder} has no {name}; name a folder that demo.train wrote.")
    evaluate_folder(options.folder)


if __name__ == "__main__":
    main()
