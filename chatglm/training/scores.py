"""BLEU-4 and ROUGE as the published finetuning measured them, so that its figures can be compared.

BLEU-4 is over characters, smoothed by method 3 of NLTK, ROUGE over Chinese words, F values; both are means over
the answers, in per cent. `exact` is the share of answers that are right to the letter.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from chatglm.hub.tokenization_chatglm import process_response
from chatglm.training.rows import Row

NAMES = ("bleu-4", "rouge-1", "rouge-2", "rouge-l", "exact")
BATCH = 8


def check_scores() -> None:
    """Raises ValueError if a library is missing."""
    for module in ("nltk", "rouge_chinese", "rjieba"):
        if find_spec(module) is None:
            package = module.replace("_", "-")
            raise ValueError(f"BLEU and ROUGE need {package}, which is not installed; pip install {package}.")


def answer(
    model: Any, tokenizer: Any, rows: Sequence[Row], most_tokens: int, progress: bool = True
) -> list[str]:
    """The model's greedy answers to the questions of `rows`, as `chat` gives them."""
    from tqdm import tqdm

    was_training = model.training
    model.eval()
    answers: dict[int, str] = {}
    order = sorted(
        range(len(rows)), key=lambda i: len(rows[i].query) + sum(map(len, sum(rows[i].history, ())))
    )
    for start in tqdm(range(0, len(order), BATCH), desc="answering", disable=not progress, leave=False):
        part = order[start : start + BATCH]
        replies = model.batch_chat(
            tokenizer,
            [rows[i].query for i in part],
            [list(rows[i].history) for i in part],
            do_sample=False,
            max_new_tokens=most_tokens,
        )
        answers |= {i: response for i, (response, _) in zip(part, replies, strict=True)}
    model.train(was_training)
    return [answers[i] for i in range(len(rows))]


def expected_answers(tokenizer: Any, rows: Sequence[Row]) -> list[str]:
    """The right answers as the tokenizer writes them: ChatGLM-6B changes the width of some characters."""
    decode, encode = tokenizer.decode, tokenizer.encode
    return [
        process_response(
            tokenizer.family, decode(encode(row.answer, add_special_tokens=False, split_special_tokens=True))
        )
        for row in rows
    ]


def score(expected: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Means over all pairs, in per cent."""
    pairs = [score_one(*pair) for pair in zip(expected, answers, strict=True)]
    return {name: round(sum(pair[name] for pair in pairs) / len(pairs), 4) for name in NAMES}


def score_one(expected: str, answer: str) -> dict[str, float]:
    """The scores of one answer, in per cent; an empty one has nothing right."""
    import rjieba
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_chinese import Rouge

    found = dict.fromkeys(NAMES, 0.0) | {"exact": 100.0 * (expected == answer)}
    if not answer.strip() or not expected.strip():
        return found
    smoothing = SmoothingFunction().method3
    found["bleu-4"] = 100 * sentence_bleu([list(expected)], list(answer), smoothing_function=smoothing)
    cut = [" ".join(rjieba.cut(text)) for text in (answer, expected)]
    with _deep_recursion(len(answer) + len(expected)):
        (rouge,) = Rouge().get_scores(*cut)
    return found | {name: 100 * rouge[name]["f"] for name in ("rouge-1", "rouge-2", "rouge-l")}


@contextmanager
def _deep_recursion(depth: int) -> Iterator[None]:
    """rouge_chinese walks along both texts by calling itself once a word."""
    usual = sys.getrecursionlimit()
    sys.setrecursionlimit(usual + depth)
    try:
        yield
    finally:
        sys.setrecursionlimit(usual)


def write_predictions(file: Path, expected: Sequence[str], answers: Sequence[str]) -> None:
    """One JSON object a line, as the published generated_predictions.txt."""
    lines = [
        json.dumps({"labels": right, "predict": said}, ensure_ascii=False)
        for right, said in zip(expected, answers, strict=True)
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
