"""Every contestant lives in a process of its own: its environment variables, its OpenMP pool, its Python.

One JSON line in, one JSON line out. `serve` is the side of the contestant and needs nothing but Python;
`Worker` is the side that measures.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CLOSE_SECONDS = 20


class ContestantError(RuntimeError):
    """A contestant could not be started or failed; the message is one sentence for the user."""


def serve(start: Any, arguments: dict[str, Any]) -> None:
    """Build a contestant with `start(**arguments)` and call its methods as they are asked for.

    A method returns a dictionary. The reply adds the CPU seconds and the peak memory of this process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the other side, which then closes the pipe
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to standard output; it belongs to the protocol
    contestant = None  # built at the first request, whose reply can say what went wrong
    for line in sys.stdin:
        request = json.loads(line)
        cpu = time.process_time()
        try:
            if contestant is None:
                contestant = start(**arguments)
            result = getattr(contestant, request["call"])(**request["arguments"])
            reply = {"result": result, "cpu": time.process_time() - cpu, "peak": peak_memory()}
        except Exception as error:  # whatever it is, the user reads it beside the contestant's name
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


class Contestant:
    """A language model that reads and continues token ids; subclasses say how."""

    def read(self, ids: list[int]) -> None:
        """Start again with the prompt `ids`."""
        raise NotImplementedError

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        raise NotImplementedError

    def step(self, token: int) -> int:
        """Read one more token; return the most likely next one."""
        raise NotImplementedError

    def about(self) -> dict[str, Any]:
        """`version`: what is measured, and whatever else a reader should know."""
        raise NotImplementedError

    prompt: list[int] | None = None  # what the cache begins with

    def decode(self, prompt: list[int], tokens: int) -> dict[str, float]:
        """Seconds per token, one at a time after `prompt`; every call does the same work."""
        if self.prompt != prompt:
            self.read(prompt)
            self.prompt = prompt
        self.rewind(len(prompt))
        token, start = prompt[0], time.perf_counter()
        for _ in range(tokens):
            token = self.step(token)
        return {"": (time.perf_counter() - start) / tokens}

    def prefill(self, prompt: list[int]) -> dict[str, float]:
        """Seconds until `prompt` is read and the scores of the next token are there."""
        self.prompt = None
        start = time.perf_counter()
        self.read(prompt)
        return {"": time.perf_counter() - start}


def peak_memory() -> int | None:
    """Largest resident size of this process so far, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Worker:
    """A contestant in another process; its standard error is shown when it fails."""

    def __init__(
        self,
        name: str,
        module: str,
        arguments: dict[str, Any],
        python: str = sys.executable,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.name = name
        self.peak: int | None = None
        self.process = subprocess.Popen(
            [python, "-m", f"benchmarks.{module}", json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            text=True,
        )

    def call(self, method: str, **arguments: Any) -> tuple[Any, float]:
        """Return (what the method returned, CPU seconds of the other process)."""
        try:
            print(json.dumps({"call": method, "arguments": arguments}), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ContestantError(f"{self.name} ended with exit code {self.process.wait()}; see above.")
        reply = json.loads(line)
        if "error" in reply:
            raise ContestantError(f"{self.name}: {reply['error']}")
        self.peak = reply["peak"]
        return reply["result"], reply["cpu"]

    def close(self) -> None:
        """End the process; its memory is free when this returns."""
        self.process.stdin.close()
        try:
            self.process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
