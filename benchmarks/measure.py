"""Clean blocks of time on a machine that others use too, and the memory bandwidth beside each of them.

A block is a stretch of work of a second or so. It counts only if other processes took less than 4 % of the
machine meanwhile: a thread that has to wait for its core holds up all threads of a parallel loop.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from chatglm.tools.machine import PROBE_BYTES, read_probe

PROBE_PASSES = 3
SETTLE_SECONDS = 0.05  # idle OpenMP threads spin for some milliseconds before they sleep
QUIET_SECONDS = 0.3  # of watching before a block begins
IDLE_FIELDS = ("idle", "iowait")
GUEST_FIELDS = ("guest", "guest_nice")  # Linux counts them in `user` already


class Probe:
    """Read bandwidth of the machine at this moment, in bytes per second."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.read, self.description = _compiled_probe(threads) or _torch_probe(threads)
        self.read()  # the first pass pays for pages and frequency

    def __call__(self) -> float:
        time.sleep(SETTLE_SECONDS)
        return statistics.median(self.read() for _ in range(PROBE_PASSES))


def _compiled_probe(threads: int) -> tuple[Callable[[], float], str] | None:
    """The C probe, built into a folder that is removed again; None without a compiler that takes it."""
    compiler = next((found for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name
                     and (found := shutil.which(name))), None)  # fmt: skip
    if compiler is None:
        return None
    source = Path(__file__).with_name("read_bandwidth.c")
    with tempfile.TemporaryDirectory() as folder:
        library = str(Path(folder, "read_bandwidth.so"))
        for native in ("-march=native", "-mcpu=native", "-O3"):  # whichever this compiler knows
            command = [compiler, "-O3", native, "-shared", "-fPIC", "-pthread", str(source), "-o", library]
            if subprocess.run(command, capture_output=True).returncode == 0:
                break
        else:
            return None
        loaded = ctypes.CDLL(library)
    loaded.allocate.restype, loaded.allocate.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    loaded.read_once.restype = ctypes.c_double
    loaded.read_once.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    buffer = loaded.allocate(PROBE_BYTES)
    if not buffer:
        raise MemoryError(
            f"The bandwidth probe needs {PROBE_BYTES >> 20} MiB of memory; close other programs."
        )
    return (
        lambda: loaded.read_once(buffer, PROBE_BYTES, threads),
        f"C, built with {Path(compiler).name} {native}",
    )


def _torch_probe(threads: int) -> tuple[Callable[[], float], str]:
    """The probe of `chatglm bench`, where no C compiler is found."""
    import torch

    torch.set_num_threads(threads)
    return read_probe(), "torch, because no C compiler was found; a C probe may read a little faster"


def busy_seconds() -> float:
    """CPU seconds that the whole machine has worked since it started."""
    times = psutil.cpu_times()._asdict()
    return sum(value for name, value in times.items() if name not in IDLE_FIELDS + GUEST_FIELDS)


@dataclass
class Block:
    """One stretch of work: what it measured (name -> seconds), and what went on around it."""

    seconds: dict[str, float]
    bandwidth: float  # bytes per second, mean of the probes before and after
    others: float  # share of the machine that other processes took


@dataclass
class Samples:
    """The blocks of one contestant and task. `kept` has one entry a round, None where none was clean."""

    kept: list[Block | None] = field(default_factory=list)
    thrown_away: int = 0

    @property
    def clean(self) -> list[Block]:
        return [block for block in self.kept if block is not None]

    def median(self, name: str = "") -> float | None:
        """Median seconds over the clean blocks."""
        return statistics.median(block.seconds[name] for block in self.clean) if self.clean else None

    def share(self, bytes_read: float, name: str = "") -> float | None:
        """Bytes per second of the work in relation to the probe, median over the clean blocks."""
        shares = [bytes_read / block.seconds[name] / block.bandwidth for block in self.clean]
        return statistics.median(shares) if shares else None

    def ratio(self, other: Samples, name: str = "") -> tuple[float, float, float] | None:
        """How many times as fast as `other`, round by round: median, lowest, highest."""
        pairs = [(mine, its) for mine, its in zip(self.kept, other.kept, strict=False) if mine and its]
        ratios = [its.seconds[name] / mine.seconds[name] for mine, its in pairs]
        return (statistics.median(ratios), min(ratios), max(ratios)) if ratios else None


def others_at_work(seconds: float = QUIET_SECONDS) -> float:
    """Share of the machine that other processes take while this one sleeps."""
    busy = busy_seconds()
    time.sleep(seconds)
    return (busy_seconds() - busy) / (seconds * (os.cpu_count() or 1))


def clean_block(
    work: Callable[[], tuple[dict[str, float], float]],
    probe: Probe,
    samples: Samples,
    limit: float,
    patience: float,
) -> None:
    """Add one block to `samples`: repeat `work` until nobody disturbed it, for `patience` seconds at most.

    `work` returns what it measured and the CPU seconds its process used. Nothing runs while others are at work.
    """
    give_up = time.monotonic() + patience
    while time.monotonic() < give_up:
        if others_at_work() > limit:
            continue
        before = probe()
        busy, start = busy_seconds(), time.perf_counter()
        seconds, own = work()
        wall, busy = time.perf_counter() - start, busy_seconds() - busy
        others = max(0.0, busy - own) / (wall * (os.cpu_count() or 1))
        if others <= limit:
            samples.kept.append(Block(seconds, (before + probe()) / 2, others))
            return
        samples.thrown_away += 1
    samples.kept.append(None)
