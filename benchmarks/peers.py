"""llama.cpp and chatglm.cpp as contestants, through their Python packages from PyPI.

The upper half runs where the benchmark runs: files and processes. The lower half runs in the Python that has
the peers (`--peers-python`), which needs nothing of ours but this folder.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .model_files import Tensor, ggml_tensors, gguf_tensors, write_ggml, write_gguf
from .shapes import SHAPES
from .worker import ROOT, Contestant, Worker, serve

VOCABULARY = ROOT / "chatglm" / "models" / "demo" / "tokenizer.model"
INSTALL = {
    "llama.cpp": "pip install llama-cpp-python",
    "chatglm.cpp": 'CMAKE_ARGS="-DCMAKE_POLICY_VERSION_MINIMUM=3.5" pip install chatglm-cpp',
}


@dataclass(frozen=True)
class Peer:
    """One peer with one kind of file, e.g. llama.cpp with q4_0."""

    program: str
    kind: str
    model: str
    layers: int

    @property
    def name(self) -> str:
        return f"{self.program} {self.kind}"

    @property
    def tensors(self) -> list[Tensor]:
        make = gguf_tensors if self.program == "llama.cpp" else ggml_tensors
        return make(SHAPES[self.model], self.layers, self.kind)

    @property
    def file_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bytes_read(self) -> int:
        """Weights and scales that one token reads: all but the embedding, unless that is the head too."""
        embedding, *others = self.tensors
        tied = self.program == "chatglm.cpp" and SHAPES[self.model].family == "chatglm"
        return sum(tensor.nbytes for tensor in others) + embedding.nbytes * tied

    def write_file(self, folder: Path) -> Path:
        """The random model in `folder`, written unless it is there already."""
        suffix = "gguf" if self.program == "llama.cpp" else "ggml"
        path = folder / f"{self.model}-{self.layers}layers-{self.kind}.{suffix}"
        if path.exists():
            return path
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        if self.program == "llama.cpp":
            write_gguf(unfinished, SHAPES[self.model], self.layers, self.kind)
        else:
            write_ggml(unfinished, SHAPES[self.model], self.layers, self.kind, VOCABULARY.read_bytes())
        return unfinished.rename(path)

    def start(self, folder: Path, threads: int, python: str) -> Worker:
        arguments = {"program": self.program, "file": str(self.write_file(folder)), "threads": threads}
        return Worker(self.name, "peers", arguments, python, {"OMP_NUM_THREADS": str(threads)})


class LlamaCpp(Contestant):
    """llama-cpp-python with its defaults: float16 cache, prompts in batches of 512."""

    def __init__(self, file: str, threads: int) -> None:
        import llama_cpp
        import numpy

        self.library, self.numpy = llama_cpp, numpy
        self.model = llama_cpp.Llama(
            file, n_ctx=1024, n_batch=512, n_ubatch=512, n_threads=threads, n_threads_batch=threads, verbose=False
        )  # fmt: skip

    def about(self) -> dict[str, Any]:
        return {
            "version": f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')}",
            "built with": self.library.llama_print_system_info().decode().strip(" |"),
        }

    def read(self, ids: list[int]) -> None:
        self.model.reset()
        self._evaluate(ids)

    def rewind(self, length: int) -> None:
        self.model.n_tokens = length  # `eval` drops what the cache holds beyond it

    def step(self, token: int) -> int:
        return self._evaluate([token])

    def _evaluate(self, ids: list[int]) -> int:
        self.model.eval(ids)
        scores = self.library.llama_get_logits_ith(self.model._ctx.ctx, -1)
        return int(self.numpy.ctypeslib.as_array(scores, (self.model.n_vocab(),)).argmax())


class ChatGLMCpp(Contestant):
    """chatglm-cpp; its number of threads follows the processors that the process may use."""

    def __init__(self, file: str, threads: int) -> None:
        if threads < (os.cpu_count() or 1) and hasattr(os, "sched_setaffinity"):
            available = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(
                0, available[: threads if threads <= 4 else 2 * threads]
            )  # it halves from 5 on
        import chatglm_cpp._C as library

        self.model = library.Pipeline(file, 1024).model
        # It generates greedily: like the others it reads all scores once and takes the highest.
        self.options = library.GenerationConfig(max_length=1024, do_sample=False)

    def about(self) -> dict[str, Any]:
        return {"version": f"chatglm-cpp {importlib.metadata.version('chatglm-cpp')}"}

    def read(self, ids: list[int]) -> None:
        self.ids, self.prompt_length = list(ids), len(ids)
        self._next(past=0)

    def rewind(self, length: int) -> None:
        del self.ids[length:]  # the cache is overwritten from there

    def step(self, token: int) -> int:
        self.ids.append(token)
        return self._next(past=len(self.ids) - 1)

    def _next(self, past: int) -> int:
        return self.model.generate_next_token(self.ids, None, self.options, past, self.prompt_length)


PROGRAMS = {"llama.cpp": LlamaCpp, "chatglm.cpp": ChatGLMCpp}


def start(program: str, file: str, threads: int) -> Contestant:
    return PROGRAMS[program](file, threads)


if __name__ == "__main__":
    serve(start, json.loads(sys.argv[1]))
