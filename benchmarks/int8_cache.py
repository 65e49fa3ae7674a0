"""What an int8 cache costs: how far the scores of the demo models move, and how often an answer becomes another.

    python -m benchmarks.int8_cache [--every 4]

Held-out questions, answered greedily. The scores are compared over the tokens of the answer without it, token for
token; an answer that becomes another one needs two tokens that were about equally likely.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from chatglm.tools.machine import machine

from .report import command_line, table

MODELS = ("demo", "demo-v1")


def given(model: Any, prompt: Any, sequence: Any, int8: bool) -> Any:
    """Scores [T, V] from which the tokens of the answer in `sequence` would be chosen."""
    import torch

    cache = model.new_cache(int8)
    answer = sequence[:, prompt.shape[1] : -1]
    with torch.no_grad():
        scores = model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        if answer.numel():
            scores = torch.cat((scores, model(answer, past_key_values=cache, use_cache=True).logits), dim=1)
    return scores[0]


def compared(name: str, every: int) -> Iterator[tuple[bool, Any]]:
    """(whether the answers are the same, differences [T, V] of the scores over the answer) of every question."""
    import torch

    import chatglm
    from demo.book import Book
    from demo.held_out import held_out_questions

    model, tokenizer = chatglm.load(name, device="cpu", dtype="float32")
    for item in held_out_questions(Book())[::every]:
        inputs = model.build_inputs(tokenizer, item.query, list(item.history))
        sequences = [
            model.generate(**inputs, do_sample=False, max_new_tokens=120, int8_cache=int8)
            for int8 in (False, True)
        ]
        scores = [given(model, inputs["input_ids"], sequences[0], int8) for int8 in (False, True)]
        yield torch.equal(*sequences), scores[1] - scores[0]


def row(name: str, every: int) -> list[str]:
    same, asked, largest, total, tokens = 0, 0, 0.0, 0.0, 0
    for equal, differences in compared(name, every):
        same, asked = same + equal, asked + 1
        largest = max(largest, differences.abs().max().item())
        total, tokens = total + differences.std(-1).sum().item(), tokens + len(differences)
    return [name, f"{same} of {asked}", f"{largest:.2f}", f"{total / tokens:.3f}"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--every", type=int, default=4, help="ask each so many-th question (default: 4)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "int8_cache.md")
    arguments = parser.parse_args()
    import torch

    from .ours import versions

    torch.set_num_threads(1)
    header = ["", "same answers", "largest difference of a score", "standard deviation"]
    about = machine()
    text = "\n".join(
        [
            "# An int8 cache beside one in float32",
            "",
            f"`{command_line()}`, {date.today().isoformat()}",
            "",
            f"- {about['processor']}; {versions()}",
            "",
            table(header, [row(name, arguments.every) for name in MODELS]),
            "",
        ]
    )
    arguments.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
