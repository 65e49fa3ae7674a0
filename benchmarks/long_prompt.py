"""Seconds and peak memory of a long prompt: read at once, and in chunks of several lengths.

    python -m benchmarks.long_prompt [--tokens 8192] [--path bfloat16] [--layers 4]

Random weights at ChatGLM2-6B's shapes, a process for each. `generation_chatglm.CHUNK` is chosen by this.
Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

from chatglm.tools.machine import machine

from .memory import peak
from .ours import Path as OurPath
from .ours import build_model, versions
from .report import command_line, table

GB = 1e9
CHUNKS = (0, 512, 1024, 2048)  # 0: at once


def measure(path: str, layers: int, threads: int, tokens: int, chunk: int) -> dict[str, Any]:
    """Seconds, and bytes at the peak beyond those of model and libraries."""
    import torch

    from chatglm.hub import generation_chatglm
    from chatglm.hub.generation_chatglm import GrowingCache, read_prompt

    torch.set_num_threads(threads)
    model = build_model(OurPath.parse(path), "chatglm2-6b", layers, "quantized").prepack()
    ids = torch.randint(1000, 60000, (1, tokens), generator=torch.Generator().manual_seed(0))
    generation_chatglm.CHUNK = chunk or tokens
    read_prompt(
        model, ids[:, :64], None, None, GrowingCache(layers)
    )  # the first pass pays for packing and pages
    result: dict[str, Any] = {}
    with peak(result, "before"):
        pass
    with peak(result, "prompt"):
        start = time.perf_counter()
        cache = GrowingCache(layers)
        read_prompt(model, ids, None, None, cache)
        seconds = time.perf_counter() - start
    own = result["prompt"]["own"] - result["before"]["own after"]
    kept = sum(buffer.nbytes for layer in cache.layers for buffer in layer._buffers)
    return {"chunk": chunk, "seconds": seconds, "memory": own, "cache": kept, "versions": versions()}


def in_own_process(arguments: argparse.Namespace, chunk: int) -> dict[str, Any]:
    words = [arguments.path, arguments.layers, arguments.threads, arguments.tokens, chunk]
    command = [sys.executable, "-m", "benchmarks.long_prompt", "--measure", json.dumps(words)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])


def as_markdown(measured: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    about = machine()
    rows = [
        [
            f"chunks of {result['chunk']}" if result["chunk"] else "at once",
            f"{result['seconds']:.1f}",
            f"{arguments.tokens / result['seconds']:.0f}",
            f"{result['memory'] / GB:.2f}",
            f"{result['cache'] / GB:.3f}",
        ]
        for result in measured
    ]
    return "\n".join(
        [
            f"# A prompt of {arguments.tokens} tokens",
            "",
            f"`{command_line()}`, {date.today().isoformat()}",
            "",
            f"- ChatGLM2-6B's shapes, {arguments.layers} of 28 layers, random weights, {arguments.path}, "
            f"{arguments.threads} threads",
            f"- {about['processor']}, {about['logical cores']} logical cores, {about['memory GB']} GB; "
            f"{measured[0]['versions']}",
            "- memory: at the peak, beyond the model and the libraries (RssAnon, sampled); the cache is part of it",
            "- seconds are of one run each",
            "",
            table(["", "seconds", "tokens/s", "memory, GB", "of it cache, GB"], rows),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tokens", type=int, default=8192, help="of the prompt (default: 8192)")
    add("--path", default="bfloat16", help="weights, kernels and dtype, see README.md (default: bfloat16)")
    add("--layers", type=int, default=4, help="of 28 (default: 4)")
    add("--threads", type=int, default=os.cpu_count(), help="(default: all)")
    add("--output", type=Path, default=Path(__file__).parent / "results" / "long_prompt.md")
    add("--measure", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return
    text = as_markdown([in_own_process(arguments, chunk) for chunk in CHUNKS], arguments)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
