"""Time to the first token of the first and the second turn of a long chat, with a PromptCache and without.

    python -m benchmarks.second_turn [--tokens 2000] [--path bfloat16] [--layers 4]

Random weights at ChatGLM2-6B's shapes. They would write noise, which is encoded otherwise when it is read back, so
the answers are given: their tokens are those of a text, as they are with a trained model.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from datetime import date
from pathlib import Path
from typing import Any

from chatglm.tools.machine import machine

from .ours import Path as OurPath
from .ours import build_model, versions
from .report import command_line, table

SAID = (
    "晚上睡不着应该怎么办？",
    "可以喝一杯热牛奶，听听轻音乐，也可以试试深呼吸。睡前少看手机，早一点上床。",
)
MODEL = "chatglm2-6b"


def long_history(tokenizer: Any, tokens: int) -> list[tuple[str, str]]:
    """Rounds with which the prompt of a further query has about as many tokens."""
    rounds = [SAID]
    while len(tokenizer.encode_chat(SAID[0], rounds)) < tokens:
        rounds.append(SAID)
    return rounds


def given(ids: list[int]) -> Any:
    """A logits processor that makes the model say `ids` one after the other."""
    rest = list(ids)

    def force(input_ids: Any, scores: Any) -> Any:
        forced = scores.new_full(scores.shape, -float("inf"))
        forced[:, rest.pop(0)] = 0.0
        return forced

    return force


def turn(model: Any, tokenizer: Any, history: list[tuple[str, str]], prompt_cache: Any) -> tuple[float, list]:
    """(seconds to the first token, history afterwards) of one turn."""
    answer = tokenizer.encode(SAID[1], add_special_tokens=False)
    start = time.perf_counter()
    stream = model.stream_chat(
        tokenizer, SAID[0], history, do_sample=False, max_new_tokens=len(answer),
        logits_processor=[given(answer)], prompt_cache=prompt_cache,
    )  # fmt: skip
    next(stream)
    seconds = time.perf_counter() - start
    *_, (_, history) = stream
    return seconds, history


def measure(arguments: argparse.Namespace) -> list[tuple[str, int, list[float]]]:
    """(turn, tokens of its prompt, seconds of every round)."""
    import torch

    from chatglm.find import OURS
    from chatglm.hub.generation_chatglm import PromptCache
    from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer

    torch.set_num_threads(arguments.threads)
    tokenizer = ChatGLMTokenizer.from_pretrained(OURS["demo"])
    model = build_model(OurPath.parse(arguments.path), MODEL, arguments.layers, "quantized").prepack()
    history = long_history(tokenizer, arguments.tokens)
    turn(model, tokenizer, history[:3], None)  # the first pass pays for packing and pages
    first, second, again = [], [], []
    for _ in range(arguments.rounds):
        prompt_cache = PromptCache()
        seconds, longer = turn(model, tokenizer, history, prompt_cache)
        first.append(seconds)
        second.append(turn(model, tokenizer, longer, prompt_cache)[0])
        again.append(turn(model, tokenizer, longer, None)[0])
    lengths = [len(tokenizer.encode_chat(SAID[0], rounds)) for rounds in (history, longer)]
    return [
        ("first turn", lengths[0], first),
        ("second turn, with a PromptCache", lengths[1], second),
        ("second turn, without", lengths[1], again),
    ]


def as_markdown(measured: list[tuple[str, int, list[float]]], arguments: argparse.Namespace) -> str:
    about, firsts = machine(), measured[0][2]
    rows = []
    for name, tokens, seconds in measured:
        ratios = [own / first for own, first in zip(seconds, firsts, strict=True)]
        shown = f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})"
        rows.append([name, str(tokens), f"{statistics.median(seconds):.3f}", shown])
    return "\n".join(
        [
            "# Time to the first token of a second turn",
            "",
            f"`{command_line()}`, {date.today().isoformat()}",
            "",
            f"- ChatGLM2-6B's shapes, {arguments.layers} of 28 layers, random weights, {arguments.path}, "
            f"{arguments.threads} threads, {arguments.rounds} rounds; the answers are given, token by token",
            f"- {about['processor']}, {about['logical cores']} logical cores, {about['memory GB']} GB; {versions()}",
            "- from the call of `stream_chat` to its first yield; median, and the ratio round by round",
            "",
            table(["", "tokens of the prompt", "seconds to the first token", "of the first turn's"], rows),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tokens", type=int, default=2000, help="of the first turn's prompt (default: 2000)")
    add("--path", default="bfloat16", help="weights, kernels and dtype, see README.md (default: bfloat16)")
    add("--layers", type=int, default=4, help="of 28 (default: 4)")
    add("--rounds", type=int, default=3, help="(default: 3)")
    add("--threads", type=int, default=os.cpu_count(), help="(default: all)")
    add("--output", type=Path, default=Path(__file__).parent / "results" / "second_turn.md")
    arguments = parser.parse_args()
    text = as_markdown(measure(arguments), arguments)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
