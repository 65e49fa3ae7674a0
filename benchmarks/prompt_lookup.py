"""Prompt lookup: what it gains where an answer copies its prompt, and costs where nothing of it is found.

    python -m benchmarks.prompt_lookup [--model chatglm2-6b] [--path int4/native] [--layers 4] [--number 10]
    python -m benchmarks.prompt_lookup --model demo [--answers 60]

With random weights at the real shapes the answers are given, token by token, for a model without training copies
nothing; the demo models answer held-out questions. Both loops take turns in one process, and the ratio is taken
turn by turn.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from chatglm.tools.machine import machine

from .report import command_line, table, times
from .shapes import SHAPES

PROMPT, NEW = 512, 64
EVERY = 8  # tokens, of which one is another in the answer that is copied with changes


class Given:
    """A logits processor that makes a model say `ids`, and counts the tokens."""

    def __init__(self, ids: list[int]) -> None:
        self.rest = list(ids)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        forced = scores.new_full(scores.shape, -float("inf"))
        forced[:, self.rest.pop(0)] = 0.0
        return forced


def given_answers() -> dict[str, list[int]]:
    """Tokens of the three answers to a prompt that is the numbers 1000, 1001, ... in a row."""
    copied = list(range(1000, 1000 + NEW))
    changed = [5000 + i if i % EVERY == EVERY - 1 else token for i, token in enumerate(copied)]
    return {
        "copied from the prompt": copied,
        f"copied, every {EVERY}th token another": changed,
        "new from the first token to the last": list(range(9000, 9000 + NEW)),
    }


def seconds(model: Any, ids: Any, answer: list[int], **options: Any) -> float:
    """Of the answer without its first token, which belongs to the prompt."""
    stream = model.stream_generate(
        ids, do_sample=False, max_new_tokens=len(answer), eos_token_id=None, logits_processor=[Given(answer)],
        **options,
    )  # fmt: skip
    next(stream)
    start = time.perf_counter()
    for _ in stream:
        pass
    return time.perf_counter() - start


def passes(model: Any, ids: Any, answer: list[int], **options: Any) -> int:
    """How often the model is called for the answer after its first token."""
    import torch

    lookup, calls = torch.nn.functional.embedding, []
    torch.nn.functional.embedding = lambda *args, **kwargs: calls.append(1) or lookup(*args, **kwargs)
    try:
        seconds(model, ids, answer, **options)
    finally:
        torch.nn.functional.embedding = lookup
    return len(calls) - 1


def of_given_answers(arguments: argparse.Namespace) -> Iterator[list[str]]:
    import torch

    from .ours import Path as OurPath
    from .ours import build_model

    model = build_model(
        OurPath.parse(arguments.path), arguments.model, arguments.layers, "quantized"
    ).prepack()
    ids = torch.arange(1000, 1000 + PROMPT)[None]
    if model.config.family == "chatglm":
        ids[0, -2:] = torch.tensor([model.config.gmask_token_id, model.config.bos_token_id])
    looked_up = {"prompt_lookup_num_tokens": arguments.number}
    for name, answer in given_answers().items():
        turns: tuple[list[float], list[float]] = ([], [])
        calls = passes(model, ids, answer, **looked_up)  # the first pass pays for packing and pages
        for _ in range(arguments.rounds):
            for taken, options in zip(turns, ({}, looked_up), strict=True):
                taken.append(seconds(model, ids, answer, **options))
        yield row(name, turns, (NEW - 1) / calls, [NEW - 1] * arguments.rounds)


def of_held_out_questions(arguments: argparse.Namespace) -> Iterator[list[str]]:
    import chatglm
    from demo.book import Book
    from demo.held_out import held_out_questions

    model, tokenizer = chatglm.load(arguments.model)
    items = held_out_questions(Book())
    items = items[:: max(1, len(items) // arguments.answers)]
    turns: tuple[list[float], list[float]] = ([], [])
    lengths, same = [], 0
    for item in [items[0], *items]:  # the first one warms up
        answers = []
        for taken, number in zip(turns, (None, arguments.number), strict=True):
            start = time.perf_counter()
            answers.append(
                model.chat(
                    tokenizer, item.query, list(item.history), do_sample=False,
                    prompt_lookup_num_tokens=number,
                )[0]
            )  # fmt: skip
            taken.append(time.perf_counter() - start)
        same += answers[0] == answers[1]
        lengths.append(len(tokenizer.encode(answers[0], add_special_tokens=False)))
    name = f"{same - 1} of {len(items)} held-out answers are the same"
    yield row(name, (turns[0][1:], turns[1][1:]), None, lengths[1:])


def row(
    name: str, turns: tuple[list[float], list[float]], per_pass: float | None, lengths: list[int]
) -> list[str]:
    ratios = [plain / looked_up for plain, looked_up in zip(*turns, strict=True)]
    milliseconds = [f"{sum(taken) / sum(lengths) * 1e3:.1f}" for taken in turns]
    spread = times((statistics.median(ratios), min(ratios), max(ratios)))
    return [name, "-" if per_pass is None else f"{per_pass:.1f}", *milliseconds, spread]


def as_markdown(rows: list[list[str]], arguments: argparse.Namespace) -> str:
    from .ours import versions

    about = machine()
    what = f"{arguments.model}, float32, whole answers with their prompts"
    if arguments.model in SHAPES:
        what = (
            f"{arguments.model}'s shapes, {arguments.layers} of 28 layers, random weights, {arguments.path}; {PROMPT} "
            f"tokens of prompt, {NEW} given tokens of answer, {arguments.rounds} rounds"
        )
    return "\n".join(
        [
            "# Prompt lookup",
            "",
            f"`{command_line()}`, {date.today().isoformat()}",
            "",
            f"- {what}, {arguments.threads} threads, {arguments.number} tokens guessed at most",
            f"- {about['processor']}, {about['logical cores']} logical cores, {about['memory GB']} GB; {versions()}",
            "",
            table(["answer", "tokens a pass", "plain, ms a token", "looked up, ms", "times as fast"], rows),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=[*SHAPES, "demo", "demo-v1"], default="chatglm2-6b", help="(default: chatglm2-6b)")
    add(
        "--path",
        default="int4/native",
        help="weights, kernels and dtype, see README.md (default: int4/native)",
    )
    add("--layers", type=int, default=4, help="of 28 (default: 4)")
    add("--number", type=int, default=10, help="prompt_lookup_num_tokens (default: 10)")
    add("--rounds", type=int, default=3, help="(default: 3)")
    add("--answers", type=int, default=60, help="of a demo model, at least (default: 60)")
    add("--threads", type=int, default=os.cpu_count(), help="(default: all)")
    add("--output", type=Path, help="(default: results/prompt_lookup-MODEL-PATH.md)")
    arguments = parser.parse_args()
    if arguments.model in SHAPES:
        os.environ["CHATGLM_KERNELS"] = arguments.path.partition("@")[0].partition("/")[2] or "auto"
    import torch

    torch.set_num_threads(arguments.threads)
    real = arguments.model in SHAPES
    rows = list(of_given_answers(arguments) if real else of_held_out_questions(arguments))
    text = as_markdown(rows, arguments)
    kind = f"-{arguments.path.replace('/', '-')}" if real else ""
    default = Path(__file__).parent / "results" / f"prompt_lookup-{arguments.model}{kind}.md"
    (arguments.output or default).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
