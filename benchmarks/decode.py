"""Tokens per second of whole models: `python -m benchmarks.decode --help`.

Our paths, llama.cpp and chatglm.cpp, each in a process of its own, take turns in rounds: all weights are
random, all shapes real. README.md explains the figures.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from functools import partial
from pathlib import Path

from . import report
from .contest import Contest, Entry, add_options, line_up, read_options
from .ours import Path as OurPath
from .ours import model_bytes
from .peers import Peer
from .report import number
from .shapes import SHAPES
from .worker import Worker

WARM_UP_TOKENS = 4
MOST_TOKENS = 128  # of a turn: the context stays short
# Packing for the processor, and copies that a peer makes of its file, hold some weights twice for a while.
MEMORY_FACTOR = 1.3


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decode",
        description="Decoding and prefill of our models beside llama.cpp and chatglm.cpp.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_options(parser, paths="int4/torch,int8/torch,bfloat16,float16", rounds=7)
    add = parser.add_argument
    add("--layers", type=int, default=4, help="of 28; every contestant has as many")
    add("--head", choices=("quantized", "float"), default="quantized",
        help="embedding and head of our packed models; the peers' are quantized")  # fmt: skip
    add("--prefill-rounds", type=int, default=3, help="0 leaves prefill out")
    add("--context", type=int, default=32, help="tokens before the ones that are decoded")
    add("--prefill", type=int, default=512, help="tokens of the prompt that prefill reads")
    add("--files", type=Path, default=Path(tempfile.gettempdir(), "chatglm-benchmarks"),
        help="folder for the peers' random models, which stay there")  # fmt: skip
    options = read_options(parser)
    options.name = options.name or f"decode-{options.model}-{options.layers}layers"
    return options


def needed_bytes(contestant: OurPath | Peer, options: argparse.Namespace) -> float:
    if isinstance(contestant, Peer):
        return MEMORY_FACTOR * contestant.file_bytes
    head_bits = contestant.bits
    if contestant.packed and options.head == "float":
        head_bits = 32 if contestant.dtype == "float32" else 16
    return MEMORY_FACTOR * model_bytes(SHAPES[options.model], options.layers, contestant.bits, head_bits)


def start(contestant: OurPath | Peer, options: argparse.Namespace) -> Worker:
    if isinstance(contestant, Peer):
        return contestant.start(options.files, options.threads, options.peers_python)
    return contestant.start(
        options.threads, task="model", model=options.model, layers=options.layers, head=options.head
    )


def warm_up(entry: Entry, options: argparse.Namespace) -> None:
    """Decode twice, since the first time packs and allocates; then choose the number of tokens of a turn."""
    arguments = {"prompt": prompt(options.context), "tokens": WARM_UP_TOKENS}
    entry.worker.call("decode", **arguments)
    seconds = entry.worker.call("decode", **arguments)[0][""]
    entry.tokens = max(WARM_UP_TOKENS, min(MOST_TOKENS, round(options.block_seconds / seconds)))


def prompt(length: int) -> list[int]:
    """Ids that every vocabulary has and no model treats as special."""
    source = random.Random(0)
    return [source.randrange(1000, 60000) for _ in range(length)]


def bytes_read(entry: Entry) -> int:
    """Weights and scales that one token reads."""
    return entry.about["bytes read"] if entry.ours else entry.contestant.bytes_read


def decode_table(contest: Contest) -> str:
    header = ["", "ms a token", "tokens/s", "GB read", "of the probe", *contest.ratio_header]
    rows = []
    for entry in contest.by_bits:
        samples, read = entry.samples["decode"], bytes_read(entry)
        seconds = samples.median()
        rows.append(
            [
                entry.name,
                number(seconds and 1000 * seconds),
                number(seconds and 1 / seconds),
                number(read / 1e9, 2),
                report.percent(samples.share(read)),
                *contest.ratios(entry, "decode"),
                f"{len(samples.clean)} ({samples.thrown_away})",
            ]
        )
    return report.table([*header, "blocks (thrown away)"], rows)


def prefill_table(contest: Contest, tokens: int) -> str:
    header = ["", "seconds", "tokens/s", *contest.ratio_header, "peak memory, GB", "blocks (thrown away)"]
    rows = []
    for entry in contest.by_bits:
        samples, peak = entry.samples["prefill"], entry.worker.peak
        seconds = samples.median()
        rows.append(
            [
                entry.name,
                number(seconds, 2),
                number(seconds and tokens / seconds),
                *contest.ratios(entry, "prefill"),
                number(peak and peak / 1e9, 2),
                f"{len(samples.clean)} ({samples.thrown_away})",
            ]
        )
    return report.table(header, rows)


def bars(contest: Contest, task: str, tokens: int) -> list[tuple[str, float, bool]]:
    medians = [(entry, entry.samples[task].median()) for entry in contest.by_bits]
    return [(entry.name, tokens / seconds, entry.ours) for entry, seconds in medians if seconds]


def write_results(contest: Contest, options: argparse.Namespace) -> None:
    title = f"Decoding with the shapes of {options.model}, {options.layers} layers, {options.threads} threads"
    parts = [
        contest.introduction(title),
        f"## One token at a time, after {options.context}\n\n{decode_table(contest)}\n",
    ]
    panels = [("tokens/s, one at a time", bars(contest, "decode", 1))]
    if options.prefill_rounds:
        heading = f"## A prompt of {options.prefill} tokens at once"
        parts.append(f"{heading}\n\n{prefill_table(contest, options.prefill)}\n")
        panels.append((f"tokens/s, a prompt of {options.prefill}", bars(contest, "prefill", options.prefill)))
    contest.save(options.name, "\n".join([*parts, contest.remarks()]), title, panels)


def main() -> None:
    options = parse_options()
    peers = [
        Peer(program, kind, options.model, options.layers)
        for kind in options.kinds
        for program in options.peers
    ]
    with Contest(options) as contest:
        for contestant in line_up(options, peers):
            contest.enter(
                contestant,
                needed_bytes(contestant, options),
                partial(start, contestant, options),
                partial(warm_up, options=options),
            )
        if not contest.entries:
            sys.exit("No contestant could be started.")
        contest.take_turns(
            "decode", options.rounds, "decode",
            prompt=prompt(options.context), tokens=lambda entry: entry.tokens,
        )  # fmt: skip
        contest.take_turns("prefill", options.prefill_rounds, "prefill", prompt=prompt(options.prefill))
        write_results(contest, options)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Stopped; no results were written.")
