"""What figures of speed depend on: the machine, the memory bandwidth it has now, the memory that was needed."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

PROBE_BYTES = 512 << 20  # no cache holds it
PROBE_COLUMNS = 4096
VECTOR_EXTENSIONS = [
    *"avx2 f16c fma avx512f avx512_vnni avx_vnni avx512_bf16 avx512_fp16 amx_int8 amx_bf16".split(),
    *"asimd asimdhp asimddp i8mm bf16 sve".split(),
]


def machine() -> dict[str, object]:
    """Processor, its vector extensions, cores, memory, system."""
    flags = _cpu_flags()
    return {
        "processor": _cpu_name(),
        "vector extensions": [flag for flag in VECTOR_EXTENSIONS if flag in flags],
        "cores": psutil.cpu_count(logical=False),
        "logical cores": os.cpu_count(),
        "memory GB": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def read_probe(device: str = "cpu") -> Callable[[], float]:
    """A function that reads 512 MiB of `device` (or half of what is free) and returns bytes per second.

    The buffer lives as long as the function. Torch alone does the reading, in two ways, of which the faster one
    counts: a sum, and the product of a matrix with one vector, which is what decoding a token does.
    """
    import torch

    columns = torch.ones(PROBE_COLUMNS, device=device)
    rows = min(PROBE_BYTES, free_bytes(device) // 2) // columns.nbytes
    matrix = torch.ones(rows, PROBE_COLUMNS, device=device)
    repeats = 1 if columns.device.type == "cpu" else 20  # a GPU needs longer to start than to read

    def seconds(work: Callable[[], torch.Tensor]) -> float:
        work().cpu()  # wait for what came before
        start = time.perf_counter()
        for _ in range(repeats):
            result = work()
        result.cpu()
        return (time.perf_counter() - start) / repeats

    def read() -> float:
        return matrix.nbytes / min(seconds(matrix.sum), seconds(lambda: matrix @ columns))

    return read


def free_bytes(device: str) -> int:
    """Memory of `device` that nobody uses now; for a GPU without such a count, the machine's."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def peak_memory(device: str = "cpu") -> dict[str, int]:
    """Bytes this process needed at most so far: "resident", and on a GPU as "cuda" or "mps" (what it holds now)."""
    import torch

    memory = {"resident": _peak_resident()}
    kind = torch.device(device).type
    if kind == "cuda":
        memory[kind] = torch.cuda.max_memory_allocated(device)
    elif kind == "mps":
        memory[kind] = torch.mps.driver_allocated_memory()
    return memory


def _peak_resident() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _cpu_lines() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def _cpu_flags() -> list[str]:
    lines = _cpu_lines()
    return (lines.get("flags") or lines.get("Features") or "").split()


def _cpu_name() -> str:
    lines = _cpu_lines()
    name = lines.get("model name") or platform.processor() or platform.machine()
    family = f" (family {lines['cpu family']}, model {lines['model']})" if "cpu family" in lines else ""
    return name + family
