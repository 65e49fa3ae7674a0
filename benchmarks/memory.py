"""Memory that loading needs, at ChatGLM2-6B's real size, with random weights, each folder in a process of its own.

    python -m benchmarks.memory [--work FOLDER] [--layers 28]

It needs Linux and 13 GB of disk; the folders are deleted in the end. Two numbers are told, because files are mapped
into memory: "own" is memory that only the process can give back (RssAnon), "resident" counts the pages of the
file that lie in memory too, which the system takes back whenever it needs them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from chatglm.tools.machine import machine

from .report import command_line, table

GB = 1e9
SHARD = 2 * 10**9  # bytes of a weight file
TOKENS = 8
POOL = 1 << 24  # random numbers, repeated over all tensors
DTYPES = {"torch.int8": "I8", "torch.float16": "F16"}


# ---------------------------------------------------------------------------------------------------------------
# Folders of random weights
# ---------------------------------------------------------------------------------------------------------------


def make_folder(folder: Path, layers: int, **config_keys: Any) -> None:
    """Write a folder of ChatGLM2-6B's shape in float16, or packed."""
    import torch

    from chatglm.hub.configuration_chatglm import ChatGLMConfig
    from chatglm.hub.modeling_chatglm import ChatGLMForConditionalGeneration

    config = ChatGLMConfig(num_layers=layers, dtype="float16", **config_keys)
    with torch.device("meta"):
        tensors = ChatGLMForConditionalGeneration(config).half().state_dict()
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    random = torch.Generator().manual_seed(0)
    pools = {
        torch.int8: torch.randint(-128, 128, (POOL,), dtype=torch.int8, generator=random),
        torch.float16: (torch.randn(POOL, generator=random) * 0.02).half(),
    }
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in tensors.items():
        if sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > SHARD:
            shards.append({})
        shards[-1][name] = tensor
    where = {}
    for number, shard in enumerate(shards, start=1):
        path = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(path, shard, pools)
        where |= dict.fromkeys(shard, path.name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_shard(path: Path, tensors: dict[str, Any], pools: dict[Any, Any]) -> None:
    """One safetensors file, streamed: norms are 1, scales 0.001, all else is random."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": DTYPES[str(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    described = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(described).to_bytes(8, "little") + described)
        for name, tensor in tensors.items():
            pool = pools[tensor.dtype]
            if tensor.dim() == 1:
                pool = pool.new_full((tensor.numel(),), 0.001 if name.endswith("scale") else 1)
            data, left = memoryview(pool.numpy()).cast("B"), tensor.nbytes
            while left > 0:
                left -= file.write(data[:left])


# ---------------------------------------------------------------------------------------------------------------
# One measurement, in a process of its own
# ---------------------------------------------------------------------------------------------------------------


def memory() -> dict[str, int]:
    """Bytes of this process: RssAnon, RssFile, VmRSS, ... (Linux)."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if words[-1] == "kB"}


@contextmanager
def peak(result: dict[str, Any], name: str) -> Iterator[None]:
    """Write the peaks and the seconds of a block into `result[name]`."""
    Path("/proc/self/clear_refs").write_text("5")  # begins a new VmHWM
    own, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            own[0] = max(own[0], memory()["RssAnon"])

    watcher, start = threading.Thread(target=watch), time.perf_counter()
    watcher.start()
    try:
        yield
    finally:
        seconds = time.perf_counter() - start
        done.set()
        watcher.join()
    now = memory()
    result[name] = {
        "own": max(own[0], now["RssAnon"]),
        "resident": now["VmHWM"],
        "own after": now["RssAnon"],
        "resident after": now["VmRSS"],
        "seconds": seconds,
    }


def measure(folder: str, bits: int | None) -> dict[str, Any]:
    """Load `folder`, packing to `bits` if asked for, and run a few tokens twice."""
    import torch

    from chatglm.hub.modeling_chatglm import ChatGLMForConditionalGeneration

    packing = {"quantization_config": {"quant_method": "chatglm", "bits": bits}} if bits else {}
    result: dict[str, Any] = {"start": memory()["VmRSS"]}
    with peak(result, "load"):
        model = ChatGLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float16, **packing)
    for step in ("first forward", "next forward"):
        with peak(result, step), torch.no_grad():
            model(torch.arange(100, 100 + TOKENS)[None], logits_to_keep=1)
    return result


def in_own_process(folder: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.memory", "--measure", str(folder), *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])


# ---------------------------------------------------------------------------------------------------------------
# All of them
# ---------------------------------------------------------------------------------------------------------------

CASES = (  # what is loaded, keys of its config.json, arguments of the measurement
    ("int4 folder", {"quantization_bit": 4}, ()),
    ("int8 folder", {"quantization_bit": 8}, ()),
    ("float16 folder, packed to int4 while loading", {}, ("--bits", "4")),
    ("float16 folder, packed to int8 while loading", {}, ("--bits", "8")),
)


def measure_all(work: Path, layers: int) -> list[tuple[str, int, dict[str, Any]]]:
    """(what, bytes of the tensors in the folder, peaks), one folder on the disk at a time."""
    measured = []
    for what, keys, arguments in CASES:
        folder = work / f"{keys.get('quantization_bit', 16)} bits"
        if not folder.exists():
            for other in work.glob("* bits"):
                shutil.rmtree(other)
            make_folder(folder, layers, **keys)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        measured.append((what, size, in_own_process(folder, *arguments)))
        print(what, measured[-1][1:], file=sys.stderr)
    return measured


def as_markdown(measured: list[tuple[str, int, dict[str, Any]]]) -> str:
    about = machine()
    rows = []
    for what, size, result in measured:
        for step in ("load", "first forward", "next forward"):
            peaks = result[step]
            shown = [f"{peaks[key] / GB:.2f}" for key in ("own", "resident", "own after", "resident after")]
            rows.append([what, f"{size / GB:.2f}", step, *shown, f"{peaks['seconds']:.0f}"])
            what = ""
    begin = measured[0][2]["start"]
    header = (
        "",
        "folder GB",
        "step",
        "own, peak GB",
        "resident, peak GB",
        "own after",
        "resident after",
        "s",
    )
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "safetensors"))
    return "\n".join(
        [
            "# Memory that loading needs",
            "",
            f"`{command_line()}`",
            "",
            f"- ChatGLM2-6B's shape, random weights, float16 scales and activations; forward of {TOKENS} tokens",
            f"- {about['processor']}, {about['logical cores']} logical cores, {about['memory GB']} GB; {versions}",
            f"- {begin / GB:.2f} GB are resident once the libraries are imported; they are part of every figure",
            "- own: memory that only the process can give back (RssAnon, sampled). resident: with the pages of mapped",
            "  files (VmHWM, which `ru_maxrss` reports), which the system takes back whenever it needs them.",
            "- seconds are of one run, and the machine had other work",
            "",
            table(header, rows),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--work", type=Path, help="where the folders are written (default: the system's place for such)")
    add("--layers", type=int, default=28, help="fewer for a try (default: 28)")
    add("--output", type=Path, default=Path(__file__).parent / "results" / "memory.md")
    add("--measure", metavar="FOLDER", help="only load this folder, and print the figures as JSON")
    add("--bits", type=int, choices=[4, 8], help="with --measure: pack while loading")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.bits)))
        return
    with tempfile.TemporaryDirectory(prefix="chatglm-memory-", dir=arguments.work) as work:
        text = as_markdown(measure_all(Path(work), arguments.layers))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
