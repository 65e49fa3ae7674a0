"""What a token costs beside its arithmetic: 28 layers of hidden size 128, one thread, beside transformers' loop.

    python -m benchmarks.overhead [--rounds 15]

Both loops decode greedily with the same model in the same process, turn about; the ratio is taken round by round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from chatglm.tools.machine import machine

from .report import command_line, table

LAYERS, HIDDEN, INNER, HEADS, GROUPS = 28, 128, 256, 4, 2
PROMPT, NEW = 32, 96
SIZES = {
    "chatglm": {"position_encoding_2d": True, "vocab_size": 256, "inner_hidden_size": INNER,
                "bos_token_id": 244, "eos_token_id": 245, "mask_token_id": 240, "gmask_token_id": 241},
    "chatglm2": {"padded_vocab_size": 256, "ffn_hidden_size": INNER, "kv_channels": HIDDEN // HEADS,
                 "multi_query_group_num": GROUPS},
}  # fmt: skip


def loops(family: str) -> dict[str, Callable[[], Any]]:
    """One answer of NEW tokens by our loop and by the library's."""
    import torch
    from transformers import GenerationMixin

    from chatglm.hub.configuration_chatglm import ChatGLMConfig
    from chatglm.hub.modeling_chatglm import ChatGLMForConditionalGeneration

    class Plain(ChatGLMForConditionalGeneration):
        _sample = GenerationMixin._sample

    torch.manual_seed(0)
    config = ChatGLMConfig(num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=HEADS, **SIZES[family])
    ids = torch.randint(5, 230, (1, PROMPT))
    if family == "chatglm":
        ids[0, -2:] = torch.tensor([config.gmask_token_id, config.bos_token_id])
    ours = ChatGLMForConditionalGeneration(config).eval()
    plain = Plain(config).eval()
    plain.load_state_dict(ours.state_dict())
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    assert torch.equal(ours.generate(ids, **options), plain.generate(ids, **options))
    return {
        "ours": lambda: ours.generate(ids, **options),
        "transformers": lambda: plain.generate(ids, **options),
    }


def milliseconds(answer: Callable[[], Any]) -> float:
    """Of one token, the prompt included."""
    start = time.perf_counter()
    answer()
    return (time.perf_counter() - start) / NEW * 1e3


def measured(family: str, rounds: int) -> list[str]:
    answers = loops(family)
    seconds: dict[str, list[float]] = {name: [] for name in answers}
    for i in range(rounds):
        for name in list(answers)[:: 1 if i % 2 else -1]:
            seconds[name].append(milliseconds(answers[name]))
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["transformers"], strict=True)]
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    return [
        family,
        *(f"{statistics.median(each):.2f}" for each in seconds.values()),
        f"{middle:.2f} ({low:.2f} to {high:.2f})",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "overhead.md")
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    rows = [measured(family, arguments.rounds) for family in SIZES]
    about = machine()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    text = "\n".join(
        [
            "# What a token costs beside its arithmetic",
            "",
            f"`{command_line()}`",
            "",
            f"- {LAYERS} layers, hidden size {HIDDEN}, float32, eager, one thread; {PROMPT} tokens read, {NEW} written",
            f"- {about['processor']}, {about['logical cores']} logical cores, {about['memory GB']} GB; {versions}",
            "",
            table(["", "ours, ms a token", "transformers' loop, ms", "ours / transformers"], rows),
            "",
        ]
    )
    arguments.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
