"""`chatglm convert` on a checkpoint of the published size: peak memory, and time beside `cp` of the same bytes.

    python -m benchmarks.convert [--work FOLDER] [--layers 28]

Writes ChatGLM2-6B's 12.5 GB of random float16 weights as eight .bin files and converts them, each time in a process
of its own and with the source thrown out of the page cache before; a process killed in the middle is one of the
runs. Needs Linux and twice the disk; the folders are deleted in the end.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from chatglm.tools.machine import machine

from .report import command_line, table

GB = 1e9
FILES = 8
POOL = 1 << 24  # random numbers, repeated over all tensors
CASES = ([], ["--dtype", "bfloat16"], ["--quantize", "8"], ["--quantize", "4"])


def make_source(folder: Path, layers: int) -> int:
    """A folder like the published one, in FILES .bin files; returns the bytes of its tensors."""
    import torch

    from chatglm.find import OURS
    from chatglm.hub.configuration_chatglm import ChatGLMConfig
    from chatglm.weights.expected import expected_shapes

    config = ChatGLMConfig(num_layers=layers, dtype="float16")
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(OURS["demo"] / name, folder)
    pool = (torch.randn(POOL, generator=torch.Generator().manual_seed(0)) * 0.02).half()
    shapes = expected_shapes(config)
    total = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    shard: dict[str, torch.Tensor] = {}
    where, number, done = {}, 1, 0
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        tensor = pool.repeat(-(-count // POOL))[:count].view(shape)
        shard[name] = tensor.clone() if len(shape) > 1 else torch.ones(shape, dtype=torch.float16)
        done += 2 * count
        where[name] = f"pytorch_model-{number:05}-of-{FILES:05}.bin"
        if done >= total * number // FILES:
            torch.save(shard, folder / where[name])
            shard, number = {}, number + 1
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return total


def forget(folder: Path) -> None:
    """Write what is pending and throw the files of `folder` out of the page cache."""
    os.sync()
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copied(source: Path, dest: Path) -> float:
    """Seconds that `cp` takes, until the copy is on the disk."""
    forget(source)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, dest], check=True)
    os.sync()
    seconds = time.perf_counter() - start
    shutil.rmtree(dest)
    return seconds


def convert_command(source: Path, dest: Path, options: list[str]) -> list[str]:
    return [sys.executable, "-m", "benchmarks.convert", "--convert", str(source), str(dest), *options]


def converted(source: Path, dest: Path, options: list[str]) -> dict[str, Any]:
    """Seconds until the result is on the disk, its bytes, and the peaks of the process."""
    forget(source)
    start = time.perf_counter()
    output = subprocess.run(convert_command(source, dest, options), check=True, stdout=subprocess.PIPE).stdout
    os.sync()
    result = json.loads(output.splitlines()[-1]) | {"seconds": time.perf_counter() - start}
    result["bytes"] = sum(path.stat().st_size for path in dest.iterdir())
    shutil.rmtree(dest)
    return result


def convert_here(arguments: list[str]) -> dict[str, int]:
    """Runs the command in this process; returns its peaks in bytes."""
    from chatglm.cli import main as chatglm

    from .memory import peak

    result: dict[str, Any] = {}
    with peak(result, "convert"):
        status = chatglm(["convert", *arguments])
    if status:
        raise SystemExit(status)
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"own": result["convert"]["own"], "resident": whole}


def killed(source: Path, dest: Path) -> str:
    """What is left of a conversion that was killed while it wrote, and of that after the next one."""
    process = subprocess.Popen(convert_command(source, dest, []), stdout=subprocess.DEVNULL)
    partial = dest.parent / f".{dest.name}.partial-{process.pid}"
    while not list(partial.glob("*.safetensors")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = "no destination" if not dest.exists() else "A DESTINATION"
    return f"{left}, {sum(path.stat().st_size for path in partial.iterdir()) / GB:.1f} GB beside it"


def as_markdown(size: int, rows: list[dict[str, Any]], left: str, copies: list[float]) -> str:
    about = machine()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "safetensors"))
    shown = [
        [
            f"`chatglm convert {' '.join(row['options'])}`".replace(" `", "`"),
            f"{row['bytes'] / GB:.1f}",
            f"{row['seconds']:.0f}",
            f"{row['seconds'] / row['cp']:.2f}",
            f"{row['own'] / GB:.2f}",
            f"{row['resident'] / GB:.2f}",
        ]
        for row in rows
    ]
    header = ("", "written GB", "s", "times cp", "own memory, peak GB", "resident, peak GB")
    return "\n".join(
        [
            "# Converting a checkpoint of the published size",
            "",
            f"`{command_line()}`",
            "",
            f"- source: ChatGLM2-6B's shape, random float16 weights, {size / GB:.2f} GB in {FILES} .bin files, not in",
            "  the page cache; every time ends when the result is on the disk",
            f"- {about['processor']}, {about['logical cores']} logical cores, {about['memory GB']} GB; {versions}",
            f"- `cp -r` of the source: {statistics.median(copies):.0f} s, {min(copies):.0f} to {max(copies):.0f}; each",
            "  conversion is compared with the copy just before it",
            "- own: memory that only the process can give back (RssAnon, sampled). resident: with the pages of mapped",
            "  files (`ru_maxrss`), which the system takes back whenever it needs them.",
            f"- killed (SIGKILL) while it wrote: {left}, which the next run removed",
            "",
            table(header, shown),
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
    add("--output", type=Path, default=Path(__file__).parent / "results" / "convert.md")
    add("--convert", nargs=argparse.REMAINDER, help="only run chatglm convert with these arguments")
    arguments = parser.parse_args()
    if arguments.convert:
        print(json.dumps(convert_here(arguments.convert)))
        return
    with tempfile.TemporaryDirectory(prefix="chatglm-convert-", dir=arguments.work) as work:
        source, dest = Path(work) / "source", Path(work) / "dest"
        size = make_source(source, arguments.layers)
        left = killed(source, dest)
        rows, copies = [], []
        for options in CASES:
            copies.append(copied(source, dest))
            rows.append(converted(source, dest, options) | {"options": options, "cp": copies[-1]})
            print(rows[-1], file=sys.stderr)
        if list(Path(work).glob(".dest.partial*")):
            raise SystemExit("What the killed process left was not removed.")
        text = as_markdown(size, rows, left, copies)
    arguments.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
