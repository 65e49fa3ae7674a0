"""Many chats at once beside one after another, and beside transformers' continuous batching.

    python -m benchmarks.concurrency [--models demo demo-v1] [--batch 8] [--rounds 5]
    python -m benchmarks.concurrency --shape chatglm2-6b --layers 4 --path int4/torch
    python -m benchmarks.concurrency --models demo --threads 1 --replicas 2

With --replicas, copies of the model with Ray Serve are measured too, each with so many places and threads.

Greedy answers of fixed lengths between 16 and 64 tokens. At once means that all are asked and so many are answered at
a time. The ways take turns in one process, and ratios are taken round by round.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from chatglm.tools.machine import machine

from .ours import Path as OurPath
from .ours import build_model, versions
from .report import command_line, table

QUERIES = [
    "你好",
    "12+30=?",
    "What is the capital of France?",
    "谢谢",
    "Who are you?",
    "写一段代码",
    "晚上睡不着应该怎么办？",
]
ONE, MANY, THEIRS = (
    "engine, one after another",
    "engine, at once",
    "transformers' continuous batching, at once",
)


def requests(tokenizer: Any, number: int) -> list[tuple[list[int], int]]:
    """Prompts, and how many tokens each answer shall have."""
    return [(tokenizer.encode_chat(QUERIES[i % len(QUERIES)]), 16 + 8 * (i % 7)) for i in range(number)]


def engine_way(engine: Any, work: list[tuple[list[int], int]], end: int, at_once: int) -> None:
    """Let so many requests be in the engine at a time; it has a row for each, or a queue for all."""
    from chatglm.engine.request import Request

    for start in range(0, len(work), at_once):
        answers = [
            engine.submit(
                Request(prompt, temperature=0, max_tokens=length, logit_bias={end: -1e9}, clean=False)
            )
            for prompt, length in work[start : start + at_once]
        ]
        for answer in answers:
            for _ in answer:
                pass
        assert all(answer.finish_reason == "length" for answer in answers)


def continuous_way(
    model: Any, work: list[tuple[list[int], int]], batch: int
) -> tuple[Any, Callable[[], None]]:
    """transformers' manager with so many requests in its batch, and what it shall do."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    longest = max(len(prompt) + length for prompt, length in work)
    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=64)
    sizes = ContinuousBatchingConfig(
        max_requests_per_batch=batch,
        max_batch_tokens=256,
        num_blocks=batch * (longest // 32 + 2),
        page_size=32,
    )
    manager = model.init_continuous_batching(generation_config=config, continuous_batching_config=sizes)
    manager.start()

    def run() -> None:
        for prompt, length in work:
            manager.add_request(prompt, max_new_tokens=length)
        for _ in work:
            result = manager.get_result(timeout=600)
            assert result is not None and result.is_finished()

    return manager, run


def replicas_of(name: str, model: Any, tokenizer: Any, arguments: argparse.Namespace, queue: int) -> Any:
    """Copies of one of our models in processes that Ray starts."""
    from chatglm.engine.cluster import Scale, import_ray
    from chatglm.find import OURS

    import_ray(local=True)
    from chatglm.engine.replicas import ReplicaEngine

    copies, threads = arguments.replicas, arguments.threads
    scale = Scale(copies, copies, threads=threads)
    folder, loading = str(OURS[name]), {"device": "cpu"}
    return ReplicaEngine(folder, tokenizer, model.config, loading, scale, arguments.batch, queue)


def measure(name: str, model: Any, tokenizer: Any, arguments: argparse.Namespace) -> list[list[str]]:
    """A row of the table for every way."""
    from chatglm.engine.engine import Engine

    work = requests(tokenizer, arguments.requests)
    tokens = sum(length for _, length in work)
    end = model.generation_config.eos_token_id
    engine = Engine(model, tokenizer, max_batch=arguments.batch, max_queue=len(work))
    ways: dict[str, Callable[[], None]] = {
        ONE: lambda: engine_way(engine, work, end, 1),
        MANY: lambda: engine_way(engine, work, end, len(work)),
    }
    manager = None
    if model.reads_forward and not arguments.shape:
        manager, ways[THEIRS] = continuous_way(copy.deepcopy(model), work, arguments.batch)
    replicas = None
    if arguments.replicas and not arguments.shape:
        replicas = replicas_of(name, model, tokenizer, arguments, len(work))
        ways[f"{arguments.replicas} replicas with Ray Serve, at once"] = lambda: engine_way(
            replicas, work, end, len(work)
        )
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for run in ways.values():
        run()  # the first pass pays for packing and pages
    for _ in range(arguments.rounds):
        for way, run in ways.items():
            start = time.perf_counter()
            run()
            rates[way].append(tokens / (time.perf_counter() - start))
    engine.close()
    if manager is not None:
        manager.stop()
    if replicas is not None:
        replicas.close()
    return [[f"{name}: {way}", *_figures(rates[way], rates[ONE])] for way in ways]


def _figures(rates: list[float], base: list[float]) -> list[str]:
    ratios = [each / one for each, one in zip(rates, base, strict=True)]
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    return [f"{statistics.median(rates):.1f}", spread]


def rows(arguments: argparse.Namespace) -> list[list[str]]:
    import torch

    import chatglm
    from chatglm.find import OURS
    from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer

    torch.set_num_threads(arguments.threads)
    if arguments.shape:
        tokenizer = ChatGLMTokenizer.from_pretrained(
            OURS["demo" if arguments.shape == "chatglm2-6b" else "demo-v1"]
        )
        path = OurPath.parse(arguments.path)
        model = build_model(path, arguments.shape, arguments.layers, "quantized").prepack()
        name = f"{arguments.shape}, {arguments.layers} layers, {arguments.path}"
        return measure(name, model, tokenizer, arguments)
    found = []
    for name in arguments.models:
        found += measure(name, *chatglm.load(name, device="cpu"), arguments)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", default=["demo", "demo-v1"])
    add("--shape", choices=["chatglm2-6b", "chatglm-6b"], help="random weights of this shape instead")
    add("--layers", type=int, default=4)
    add("--path", default="int4/torch")
    add("--batch", type=int, default=8)
    add("--requests", type=int, default=56)
    add("--rounds", type=int, default=5)
    add("--threads", type=int, default=2)
    add("--replicas", type=int, default=0, help="so many copies with Ray Serve, too")
    add("--output", type=Path, help="write the table to this file, too")
    arguments = parser.parse_args()
    found, about = rows(arguments), machine()
    text = "\n".join(
        [
            "# Many chats at once",
            "",
            f"`{command_line()}`, {date.today().isoformat()}",
            "",
            f"- {about['processor']}, {about['logical cores']} logical cores, {about['memory GB']} GB; {versions()}",
            f"- threads: {arguments.threads}; {arguments.batch} of {arguments.requests} answers at a time, "
            "16 to 64 tokens each, greedy",
            f"- median of {arguments.rounds} rounds, and the ratio to one after another, round by round",
            "",
            table(["", "tokens/s", "of one after another"], found),
            "",
        ]
    )
    print(text)
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
