"""What the benchmarks share: contestants that take turns in rounds, their options, their ratios."""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil

from . import report
from .measure import Probe, Samples, clean_block
from .ours import Path as OurPath
from .peers import INSTALL, PROGRAMS
from .shapes import SHAPES
from .worker import ContestantError, Worker

KINDS = ("q4_0", "q8_0", "f16")  # of the peers' weights


class Contestant(Protocol):
    """One of our paths, or a program with one kind of file."""

    name: str
    kind: str  # of the peers' files: the number of bits that are compared


@dataclass
class Entry:
    """A contestant that runs, and what was measured of it: task -> samples."""

    contestant: Contestant
    worker: Worker
    tokens: int = 0  # that it decodes in a turn
    about: dict[str, Any] = field(default_factory=dict)  # what it says of itself
    samples: dict[str, Samples] = field(default_factory=lambda: defaultdict(Samples))

    @property
    def name(self) -> str:
        return self.contestant.name

    @property
    def ours(self) -> bool:
        return isinstance(self.contestant, OurPath)


def add_options(parser: argparse.ArgumentParser, paths: str, rounds: int) -> None:
    """The options that all benchmarks have."""
    add = parser.add_argument
    add("--model", choices=SHAPES, default="chatglm2-6b", help="whose layer shapes")
    add("--threads", type=int, default=2, help="of every contestant and of the bandwidth probe")
    add("--paths", default=paths, help="WEIGHTS[/KERNELS][@DTYPE], comma-separated; '' for none")
    add("--peers", default=",".join(PROGRAMS), help="comma-separated; '' for none")
    add("--kinds", help="files of the peers: q4_0,q8_0,f16 (default: as many bits as the paths have)")
    add("--peers-python", default=sys.executable, help="the Python that has llama-cpp-python and chatglm-cpp")
    add("--only", default="", help="comma-separated: only contestants whose name contains one of them")
    add("--rounds", type=int, default=rounds, help="in which everybody takes a turn")
    add("--block-seconds", type=float, default=1.0, help="length of a turn, at least")
    add("--limit", type=float, default=0.04, help="share of the machine that others may take in a block")
    add("--patience", type=float, default=60, help="seconds to wait for a clean block")
    add("--output", type=Path, default=Path(__file__).parent / "results", help="folder for the results")
    add("--name", help="of the result files (default: made of the other options)")


def read_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse and check; lists become lists."""
    options = parser.parse_args()
    try:
        options.paths = [OurPath.parse(name) for name in options.paths.split(",") if name]
    except ValueError as error:
        parser.error(str(error))
    options.peers = [name for name in options.peers.split(",") if name]
    for name in options.peers:
        if name not in PROGRAMS:
            parser.error(f"--peers knows {' and '.join(PROGRAMS)}, not {name}.")
    wanted = dict.fromkeys(path.kind for path in options.paths) or KINDS
    options.kinds = options.kinds.split(",") if options.kinds else list(wanted)
    for kind in options.kinds:
        if kind not in KINDS:
            parser.error(f"--kinds knows {', '.join(KINDS)}, not {kind}.")
    return options


def line_up(options: argparse.Namespace, peers: Iterable[Contestant]) -> list[Contestant]:
    """The order of a round: path, peer, path, peer, as far as possible of equal bits."""
    waiting, order = list(peers), []
    for path in options.paths:
        order.append(path)
        rival = next((peer for peer in waiting if peer.kind == path.kind), None)
        if rival is not None:
            waiting.remove(rival)
            order.append(rival)
    only = [part for part in options.only.split(",") if part]
    return [c for c in order + waiting if not only or any(part in c.name for part in only)]


class Contest:
    """All entries of a run, the probe beside them, and the sentences about what could not be measured."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.probe = options, Probe(options.threads)
        self.entries: list[Entry] = []
        self.failures: list[str] = []

    def __enter__(self) -> Contest:
        return self

    def __exit__(self, *error: Any) -> None:
        for entry in self.entries:
            entry.worker.close()

    def enter(
        self,
        contestant: Contestant,
        needed_bytes: float,
        start: Callable[[], Worker],
        warm_up: Callable[[Entry], None],
    ) -> None:
        """Start a contestant if it fits into memory; if it fails it is left out and the reason reported."""
        print(f"Building {contestant.name}.", flush=True)
        free = psutil.virtual_memory().available
        if needed_bytes > free:
            self._leave_out(
                f"{contestant.name} needs about {needed_bytes / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; take "
                "fewer layers, or fewer contestants at a time."
            )
            return
        entry = Entry(contestant, start())
        try:
            warm_up(entry)
            entry.about = entry.worker.call("about")[0]
            self.entries.append(entry)
        except ContestantError as error:
            entry.worker.close()
            hint = ""
            if not entry.ours and "ModuleNotFoundError" in str(error):
                program = contestant.name.split()[0]
                hint = f" Install it ({INSTALL[program]}) or name its Python with --peers-python."
            self._leave_out(f"{error}{hint}")

    def _leave_out(self, sentence: str) -> None:
        self.failures.append(sentence)
        print(sentence, file=sys.stderr, flush=True)

    def take_turns(self, task: str, rounds: int, method: str, **arguments: Any) -> None:
        """`rounds` rounds of one task; `arguments` may be functions of the entry."""
        racing = list(self.entries)
        for number in range(rounds):
            for entry in list(racing):
                values = {name: v(entry) if callable(v) else v for name, v in arguments.items()}
                samples = entry.samples[task]
                try:
                    clean_block(
                        lambda entry=entry, values=values: entry.worker.call(method, **values),
                        self.probe, samples, self.options.limit, self.options.patience,
                    )  # fmt: skip
                except ContestantError as error:
                    racing.remove(entry)
                    self._leave_out(str(error))
                    continue
                block = samples.kept[-1]
                shown = "was never clean" if block is None else f"{block.seconds[''] * 1000:.2f} ms"
                print(f"{task}, round {number + 1} of {rounds}: {entry.name} {shown}", flush=True)

    @property
    def by_bits(self) -> list[Entry]:
        """The entries as tables show them: few bits first, ours before the peers."""
        return sorted(self.entries, key=lambda entry: (KINDS.index(entry.contestant.kind), not entry.ours))

    @property
    def programs(self) -> list[str]:
        """The peers that run."""
        return [p for p in PROGRAMS if any(e.name.startswith(p) for e in self.entries)]

    def ratios(self, entry: Entry, task: str) -> list[str]:
        """How many times as fast as each peer with as many bits, and as our bfloat16."""
        rivals = []
        for program in self.programs:
            name = f"{program} {entry.contestant.kind}"
            rivals.append(next((e for e in self.entries if e.name == name), None) if entry.ours else None)
        bfloat16 = (e for e in self.entries if e.ours and e.contestant.weights == "bfloat16")
        rivals.append(next(bfloat16, None) if entry.ours else None)
        samples = entry.samples[task]
        return [
            report.times(samples.ratio(rival.samples[task]) if rival and rival is not entry else None)
            for rival in rivals
        ]

    @property
    def ratio_header(self) -> list[str]:
        return [f"times {name}" for name in (*self.programs, "our bfloat16")]

    def introduction(self, title: str) -> str:
        versions: dict[str, str] = {}
        for entry in self.entries:
            versions.setdefault("ours" if entry.ours else entry.name.split()[0], entry.about["version"])
        return report.introduction(title, self.setting(), versions)

    def setting(self) -> dict[str, Any]:
        return report.setting(self.probe, [s for entry in self.entries for s in entry.samples.values()])

    def remarks(self) -> str:
        """What the contestants said of themselves, and what could not be measured."""
        said = [f"- {entry.name}: {line}" for entry in self.entries for line in entry.about.get("said", [])]
        parts = ["## What ran\n\n" + "\n".join(said) + "\n"] if said else []
        if self.failures:
            parts.append("## Not measured\n\n" + "\n".join(f"- {line}" for line in self.failures) + "\n")
        return "\n".join(parts)

    def data(self) -> dict[str, Any]:
        """Everything, for the JSON file."""
        return self.setting() | {
            "model": self.options.model,
            "threads": self.options.threads,
            "not measured": self.failures,
            "contestants": [
                {
                    "name": entry.name,
                    **entry.about,
                    "peak memory": entry.worker.peak,
                    "tasks": {task: report.as_json(samples) for task, samples in entry.samples.items()},
                }
                for entry in self.entries
            ],
        }

    def save(self, name: str, markdown: str, title: str, panels: list[tuple[str, list[Any]]]) -> None:
        """Write all results and say where; show the Markdown."""
        folder = self.options.output
        paths = report.save(folder, name, self.data(), markdown)
        panels = [(label, bars) for label, bars in panels if bars]
        print(f"\n{markdown}\nWritten: {', '.join(str(path) for path in paths)}")
        if not panels:
            return
        picture = report.chart(folder / f"{name}.svg", title, panels)
        print(f"Chart: {picture}" if picture else "No chart: matplotlib is missing (pip install matplotlib).")
