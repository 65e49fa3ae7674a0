"""What packing costs in quality, on the demo models: `python -m benchmarks.quality`.

For every precision the perplexity of answers in conversations that training did not draw (another seed of the
same generator), the held-out questions answered right, and how far the next-token distributions are from those
of float32 (mean Kullback-Leibler divergence). Writes quality.md and quality.json into benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from benchmarks.report import command_line, table
from chatglm.evaluation.packing import log_probabilities, megabytes
from chatglm.hub.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer
from chatglm.tools.machine import machine
from demo.book import Book
from demo.evaluate import ask, score
from demo.held_out import held_out_questions
from demo.train import IGNORED, Batch, Encoder, batches

MODELS = Path(__file__).parents[1] / "chatglm" / "models"
RESULTS = Path(__file__).parent / "results"
SEED = 20_000  # of the conversations; training drew with others
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"bits": 0},
    "int8": {"bits": 8},
    "int8, embeddings too": {"bits": 8, "quantize_embeddings": True},
    "int4, groups of 32": {"bits": 4, "group_size": 32},
    "int4, groups of 64": {"bits": 4, "group_size": 64},
    "int4, a scale a row": {"bits": 4},
    "int4, embeddings too": {"bits": 4, "quantize_embeddings": True},
    "int4, groups of 32, embeddings too": {"bits": 4, "group_size": 32, "quantize_embeddings": True},
}


@torch.no_grad()
def compare(
    model: ChatGLMForConditionalGeneration, reference: ChatGLMForConditionalGeneration, data: list[Batch]
) -> dict[str, float]:
    """Perplexity of the answers under `model`, and its mean divergence from `reference`."""
    loss, divergence, tokens = 0.0, 0.0, 0
    for ids, labels, _ in data:
        answers = labels != IGNORED
        ours, theirs = log_probabilities(model, ids, answers), log_probabilities(reference, ids, answers)
        targets = labels[answers]
        loss += F.nll_loss(ours, targets, reduction="sum").item()
        divergence += F.kl_div(ours, theirs, reduction="sum", log_target=True).item()
        tokens += len(targets)
    return {"perplexity": math.exp(loss / tokens), "divergence": divergence / tokens, "tokens": tokens}


def measure(name: str, number_of_batches: int, number_of_questions: int) -> dict[str, dict[str, Any]]:
    """Every precision of one demo model."""
    folder, book = MODELS / name, Book()
    tokenizer = ChatGLMTokenizer.from_pretrained(folder)
    drawn = batches(book, Encoder(tokenizer), 4096, random.Random(SEED))
    data = [next(drawn) for _ in range(number_of_batches)]
    questions = held_out_questions(book)
    if number_of_questions < len(questions):
        questions = random.Random(SEED).sample(questions, number_of_questions)
    load = ChatGLMForConditionalGeneration.from_pretrained
    reference = load(folder, dtype=torch.float32).eval()
    results = {}
    for precision, arguments in tqdm(PRECISIONS.items(), desc=name):
        model = load(folder, dtype=torch.float16).quantize(**arguments).float().eval()
        skills = score(tokenizer, ask(model, tokenizer, questions))
        right, asked = (sum(skill[key] for skill in skills.values()) for key in ("right", "asked"))
        results[precision] = {
            **compare(model, reference, data),
            "right": right,
            "asked": asked,
            "megabytes": megabytes(model.half()),
        }
    return results


def rows(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    plain = results["float32"]["perplexity"]
    lost_by_rows = results["int4, a scale a row"]["perplexity"] / plain - 1
    lines = []
    for precision, result in results.items():
        lost = result["perplexity"] / plain - 1
        grouped = "groups" in precision and "embeddings" not in precision
        share = f"{lost / lost_by_rows:.0%}" if grouped else "-"
        lines.append([
            precision,
            f"{result['megabytes']:.1f}",
            f"{result['perplexity']:.4f}",
            f"{lost:+.2%}",
            share,
            f"{result['divergence']:.5f}",
            f"{result['right']} of {result['asked']} ({result['right'] / result['asked']:.1%})",
        ])  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--batches", type=int, default=40, help="of about 4096 tokens (default: 40)")
    parser.add_argument("--questions", type=int, default=10**6, help="a sample of so many (default: all)")
    options = parser.parse_args()
    results = {name: measure(name, options.batches, options.questions) for name in ("demo", "demo-v1")}
    header = [
        "precision", "MB", "perplexity", "lost", "of what a scale a row loses", "divergence", "held-out right",
    ]  # fmt: skip
    where = f"{machine()['processor']}, torch {torch.__version__}, float32 on the CPU"
    parts = [f"# Quality of packed weights\n\n`{command_line()}` on {where}"]
    for name, result in results.items():
        parts.append(
            f"## {name}, {result['float32']['tokens']} answer tokens\n\n{table(header, rows(result))}"
        )
    (RESULTS / "quality.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    saved = {"command": command_line(), "machine": machine(), "models": results}
    (RESULTS / "quality.json").write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")
    print("\n\n".join(parts))


if __name__ == "__main__":
    main()
