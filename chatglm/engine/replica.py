"""One copy of a model with its engine, in a process that Ray starts, watches and replaces. replicas.py talks to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import torch

from chatglm.engine.answer import Answer, Piece
from chatglm.engine.engine import Engine, Facts
from chatglm.engine.request import EngineClosed, Request, SchemaTooComplex
from chatglm.loading import load

GATHER = 0.02  # seconds: what is said in them travels together, as every message costs about a millisecond


@dataclass(frozen=True)
class Part:
    """A message about an answer: what is new of it, and how it stands. The first one tells that it was taken on."""

    pieces: list[Piece] = field(default_factory=list)
    completion_tokens: int = 0
    cached_tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None  # what happened, where finish_reason is "error"
    schema_failed: bool = False  # it is the sentence of a SchemaTooComplex


class Replica:
    """What Ray runs. `loading` is what `chatglm.load` takes, `threads` those of the processor that it may use."""

    def __init__(
        self, folder: str, loading: dict[str, Any], threads: int, max_batch: int, context: int | None
    ) -> None:
        torch.set_num_threads(threads)
        model, tokenizer = load(folder, **loading)
        # Ray sends a replica as many requests as it answers at once; the others wait where they came in.
        self.engine = Engine(model, tokenizer, max_batch, max_queue=max_batch, context=context)

    def facts(self) -> Facts:
        return self.engine.facts

    async def answer(self, request: Request) -> AsyncIterator[Part]:
        """The answer in parts; whoever stops listening ends it."""
        try:
            answer = await asyncio.to_thread(self.engine.submit, request)
        except SchemaTooComplex as error:
            yield Part(finish_reason="error", error=str(error), schema_failed=True)
            return
        try:
            yield Part()
            async for pieces in answer.gathered():
                yield Part(pieces, answer.completion_tokens, answer.cached_tokens)
                await asyncio.sleep(GATHER)
            yield _last_part(answer)
        finally:
            answer.cancel()

    async def embed(self, prompts: list[list[int]]) -> list[list[float]]:
        """Mean last hidden states, see Engine.embed."""
        return await asyncio.wrap_future(self.engine.embed(prompts))

    def check_health(self) -> None:
        """Ray asks every few seconds, and replaces a replica that raises."""
        if self.engine.closed:
            raise EngineClosed


def _last_part(answer: Answer) -> Part:
    error, schema_failed = answer.error, isinstance(answer.error, SchemaTooComplex)
    told = None if error is None else str(error) if schema_failed else f"{type(error).__name__}: {error}"
    return Part([], answer.completion_tokens, answer.cached_tokens, answer.finish_reason, told, schema_failed)
