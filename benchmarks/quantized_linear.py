"""Single layers of a block, path by path: `python -m benchmarks.quantized_linear --help`.

All four matrices of a block at the real shapes, in several copies that are walked in turn so that no cache
holds the next one, for 1, 4, 16 and 512 rows of input. README.md explains the figures.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from functools import partial

from . import report
from .contest import Contest, Entry, add_options, line_up, read_options
from .ours import Path as OurPath
from .report import number
from .shapes import SHAPES
from .worker import Worker

WALKED_BYTES = 400e6  # of weights, in copies of the layers: far more than any cache
MEMORY_FACTOR = 2  # weights as they are stored and as they are packed
SEVERAL_ROWS = 16  # up to here the time is mostly reading, and compared with the bandwidth


@dataclass(frozen=True)
class GgmlPeer:
    """The products of a peer with one kind of weights."""

    program: str
    kind: str

    @property
    def name(self) -> str:
        return f"{self.program} {self.kind}"

    @property
    def bits(self) -> float:
        return {"q4_0": 4.5, "q8_0": 8.5}.get(self.kind, 16)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantized_linear",
        description="The four layers of a block beside the products of llama.cpp and chatglm.cpp.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_options(parser, paths="int4/torch,int8/torch,bfloat16,float16,float32", rounds=5)
    parser.set_defaults(block_seconds=0.5)
    parser.add_argument("--rows", default="1,4,16,512", help="of the input, comma-separated")
    options = read_options(parser)
    try:
        options.rows = [int(rows) for rows in options.rows.split(",")]
    except ValueError:
        parser.error(f"--rows is {options.rows!r}; give whole numbers with commas between them.")
    options.name = options.name or f"quantized_linear-{options.model}"
    return options


def copies(contestant: OurPath | GgmlPeer, options: argparse.Namespace) -> int:
    block_bytes = SHAPES[options.model].block_weights * contestant.bits / 8
    return max(1, round(WALKED_BYTES / block_bytes))


def start(contestant: OurPath | GgmlPeer, options: argparse.Namespace) -> Worker:
    arguments = {"model": options.model, "copies": copies(contestant, options)}
    if isinstance(contestant, OurPath):
        return contestant.start(options.threads, task="layers", **arguments)
    arguments |= {"program": contestant.program, "kind": contestant.kind, "threads": options.threads}
    environment = {"OMP_NUM_THREADS": str(options.threads)}
    return Worker(contestant.name, "ggml", arguments, options.peers_python, environment)


def warm_up(entry: Entry) -> None:
    entry.worker.call("run", rows=1, seconds=0)  # the first time packs


def rows_table(contest: Contest, rows: int, weights: int) -> str:
    """Times for inputs of `rows` rows; `weights` numbers are in a block."""
    header = ["", "ms a block"]
    header += ["GB/s", "of the probe"] if rows <= SEVERAL_ROWS else ["GFLOP/s"]
    body = []
    for entry in contest.by_bits:
        samples, read = entry.samples[str(rows)], sum(entry.about["bytes read"].values())
        seconds = samples.median()
        cells = [entry.name, number(seconds and 1000 * seconds, 2)]
        if rows <= SEVERAL_ROWS:
            cells += [number(seconds and read / seconds / 1e9), report.percent(samples.share(read))]
        else:
            cells.append(number(seconds and 2 * rows * weights / seconds / 1e9, 0))
        body.append(
            [*cells, *contest.ratios(entry, str(rows)), f"{len(samples.clean)} ({samples.thrown_away})"]
        )
    return report.table([*header, *contest.ratio_header, "blocks (thrown away)"], body)


def matrix_table(contest: Contest, matrices: dict[str, tuple[int, int]]) -> str:
    """Share of the probe of every matrix with one row, and the error."""
    header = ["", *(f"{name} {rows}x{columns}" for name, (rows, columns) in matrices.items())]
    body = []
    for entry in contest.by_bits:
        samples, read = entry.samples["1"], entry.about["bytes read"]
        shares = [report.percent(samples.share(read[name], name)) for name in matrices]
        error = entry.about.get("relative error")
        body.append([entry.name, *shares, report.MISSING if error is None else f"{error:.1e}"])
    return report.table([*header, "relative error"], body)


def write_results(contest: Contest, options: argparse.Namespace) -> None:
    shape = SHAPES[options.model]
    title = f"The layers of a {options.model} block, {options.threads} threads"
    parts = [contest.introduction(title)]
    for rows in options.rows:
        parts.append(f"## {rows} row{'s' * (rows > 1)}\n\n{rows_table(contest, rows, shape.block_weights)}\n")
    panels = []
    if 1 in options.rows:
        parts.append(f"## Every matrix, one row: of the probe\n\n{matrix_table(contest, shape.matrices)}\n")
        shares = [(e, e.samples["1"].share(sum(e.about["bytes read"].values()))) for e in contest.by_bits]
        panels.append(
            ("% of the probed bandwidth, 1 row", [(e.name, 100 * s, e.ours) for e, s in shares if s])
        )
    many = options.rows[-1]
    if many > SEVERAL_ROWS:
        flop = 2 * many * shape.block_weights
        medians = [(e, e.samples[str(many)].median()) for e in contest.by_bits]
        panels.append((f"GFLOP/s, {many} rows", [(e.name, flop / s / 1e9, e.ours) for e, s in medians if s]))
    contest.save(options.name, "\n".join([*parts, contest.remarks()]), title, panels)


def main() -> None:
    options = parse_options()
    peers = [GgmlPeer(program, kind) for kind in options.kinds for program in options.peers]
    with Contest(options) as contest:
        for contestant in line_up(options, peers):
            block_bytes = SHAPES[options.model].block_weights * contestant.bits / 8
            contest.enter(
                contestant,
                MEMORY_FACTOR * copies(contestant, options) * block_bytes,
                partial(start, contestant, options),
                warm_up,
            )
        if not contest.entries:
            sys.exit("No contestant could be started.")
        for rows in options.rows:
            contest.take_turns(str(rows), options.rounds, "run", rows=rows, seconds=options.block_seconds)
        write_results(contest, options)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Stopped; no results were written.")
