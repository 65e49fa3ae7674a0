"""Copies of one model behind the interface of one engine; Ray Serve runs them, here or on many machines.

    ReplicaEngine ── Ray Serve chooses the copy that has least to do ──> Replica (replica.py) ── Engine

A copy that dies loses nothing: Ray starts another, and what it was answering is answered again from the beginning by
one that lives. The same request gives the same pieces, so those that were handed out are left out, and whoever reads
the answer sees no more than a pause.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from chatglm.engine.answer import Answer, Piece
from chatglm.engine.cluster import Cluster, Scale
from chatglm.engine.engine import Facts, Statistics
from chatglm.engine.guide import grammar_of
from chatglm.engine.replica import Part
from chatglm.engine.request import EngineClosed, QueueFull, Request, SchemaTooComplex, check_request
from chatglm.hub.positions_chatglm import check_prompt
from chatglm.hub.tokenization_chatglm import CHATGLM

if TYPE_CHECKING:
    from chatglm.hub.configuration_chatglm import ChatGLMConfig
    from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer

logger = logging.getLogger("chatglm.server")

ATTEMPTS = 5  # copies that may die under one request before it fails
LAST_SECONDS = 5.0  # in which answers that were cancelled end

Result = TypeVar("Result")


class RemoteAnswer(Answer):
    """An answer that a copy of the model makes in another process."""

    def __init__(self, request: Request, wake: Callable[[], None]) -> None:
        super().__init__(request, wake)
        self.taken = False  # by a copy
        self._given: list[Piece] = []
        self._seen = 0

    def begin(self) -> None:
        """It is made from the beginning, perhaps not for the first time."""
        self.taken, self._seen = False, 0

    def take(self, part: Part) -> None:
        """Hand out what is new in a part; RuntimeError if it is not what was handed out before."""
        self.taken = True
        self.completion_tokens, self.cached_tokens = part.completion_tokens, part.cached_tokens
        for piece in part.pieces:
            if self._seen == len(self._given):
                self._given.append(piece)
                self.give(piece)
            elif piece.text != self._given[self._seen].text:
                raise RuntimeError("A replica died, and the other one answers otherwise than it had begun.")
            self._seen += 1


class ReplicaEngine:
    """Answers requests from any number of threads with copies of one model; see Engine, whose interface this is.

    Args:
        folder: of the model, on every machine of the cluster.
        tokenizer, config: of the model; with them requests are made and checked before they are sent.
        loading: device, dtype and so on, as `chatglm.load` takes them.
        scale: how many copies, and where.
        max_batch: requests that one copy answers at the same time.
        max_queue: requests that may wait; further ones are refused with QueueFull.
        context: most tokens of prompt and answer together, as Engine has it.

    Raises OSError if Ray is not installed, cannot be reached or cannot load the model, ValueError if there is no room
    for so many copies.
    """

    def __init__(
        self,
        folder: str,
        tokenizer: ChatGLMTokenizer,
        config: ChatGLMConfig,
        loading: Mapping[str, Any],
        scale: Scale,
        max_batch: int = 8,
        max_queue: int = 64,
        context: int | None = None,
    ) -> None:
        self.tokenizer, self.config = tokenizer, config
        self._rows, self._max_queue = scale.most * max_batch, max_queue
        self._cluster = Cluster(scale)
        try:
            resources = self._cluster.resources_of_one(str(loading.get("device") or ""))
            threads = scale.threads or max(1, int(resources["num_cpus"]))
            arguments = (folder, dict(loading), threads, max_batch, context)
            self._handle = self._cluster.deploy(arguments, resources, max_batch)
            self.facts: Facts = self._handle.facts.remote().result()
        except BaseException:
            self._cluster.close()
            raise
        self.context = self.facts.context
        self._open: set[RemoteAnswer] = set()
        self._statistics, self._seconds = Statistics(), 1.0  # of an answer, a running mean
        self._closing = False
        self._changed = threading.Condition()
        self._tasks: dict[RemoteAnswer, asyncio.Task[str]] = {}
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="chatglm-replicas", daemon=True).start()

    def submit(self, request: Request) -> Answer:
        """As Engine.submit, but a schema may prove too complex in the answer only."""
        return self.submit_all([request])[0]

    def submit_all(self, requests: Sequence[Request]) -> list[Answer]:
        """As Engine.submit_all."""
        answers = [self._new_answer(request) for request in requests]
        with self._changed:
            self._admit(len(answers))
            self._open.update(answers)
        for answer in answers:
            self._call(self._begin, answer)
        return list(answers)

    @property
    def places(self) -> int:
        """As Engine.places."""
        return self._rows + self._max_queue

    def embed(self, prompts: Sequence[Sequence[int]]) -> Future:
        """As Engine.embed."""
        listed = [list(prompt) for prompt in prompts]
        for prompt in listed:
            self._check(Request(prompt))
        with self._changed:
            self._admit(1)

        async def ask() -> list[list[float]]:
            return await self._handle.embed.remote(listed)

        return asyncio.run_coroutine_threadsafe(self._at_one_that_lives(ask), self._loop)

    def statistics(self) -> Statistics:
        """As Engine.statistics, of all copies together; tokens are counted when their answer has ended."""
        with self._changed:
            running = sum(answer.taken for answer in self._open)
            return replace(self._statistics, running=running, waiting=len(self._open) - running)

    def close(self, patience: float = 0.0) -> None:
        """As Engine.close; what was started in Ray ends."""
        with self._changed:
            self._closing = True
            self._changed.wait_for(lambda: not self._open, patience)
            left = list(self._open)
        for answer in left:
            answer.cancel()
        with self._changed:
            self._changed.wait_for(lambda: not self._open, LAST_SECONDS)
        self._cluster.close()

    def _new_answer(self, request: Request) -> RemoteAnswer:
        self._check(request)
        if request.seed is None:  # so that another copy would give the same answer
            request = replace(request, seed=secrets.randbits(63))
        answer = RemoteAnswer(request, lambda: self._call(self._cancel, answer))
        return answer

    def _check(self, request: Request) -> None:
        check_request(request, self.context, self.config.vocab_size)
        if request.schema is not None:
            grammar_of(request.schema)
        if self.config.family == CHATGLM:
            check_prompt(torch.tensor([request.prompt]), self.config)

    def _admit(self, asked: int) -> None:
        if self._closing:
            raise EngineClosed
        if len(self._open) + asked > self.places:
            waiting = max(0, len(self._open) - self._rows)
            turns = 1 + waiting // self._rows
            raise QueueFull(asked, waiting, min(60, max(1, round(turns * self._seconds))))

    def _call(self, function: Callable[[RemoteAnswer], None], answer: RemoteAnswer) -> None:
        self._loop.call_soon_threadsafe(function, answer)

    # ---- everything below runs in the loop's thread

    def _begin(self, answer: RemoteAnswer) -> None:
        self._tasks[answer] = task = self._loop.create_task(self._follow(answer))
        task.add_done_callback(lambda task: self._finish(answer, task))

    def _cancel(self, answer: RemoteAnswer) -> None:
        if answer in self._tasks:
            self._tasks[answer].cancel()

    async def _follow(self, answer: RemoteAnswer) -> str:
        """Hand on an answer as a copy makes it; why it ended."""

        async def ask() -> str:
            answer.begin()
            parts = self._handle.options(stream=True).answer.remote(answer.request)
            reason = None
            try:
                async for part in parts:  # to its end: what is left before it would have to be cancelled
                    answer.take(part)
                    reason = part.finish_reason
                    if reason == "cancelled":
                        raise EngineClosed  # not by us: the copy is being taken away
                    if reason == "error":
                        raise (SchemaTooComplex if part.schema_failed else RuntimeError)(part.error)
            except BaseException:
                parts.cancel()
                raise
            return reason or "error"

        return await self._at_one_that_lives(ask)

    async def _at_one_that_lives(self, ask: Callable[[], Awaitable[Result]]) -> Result:
        """What `ask` returns; asked again where the copy that it came to dies."""
        from ray.exceptions import RayActorError

        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await ask()
            except (RayActorError, EngineClosed) as error:
                if self._closing or attempt == ATTEMPTS:
                    raise
                logger.warning("A replica has gone (%s); another takes over.", type(error).__name__)
        raise AssertionError

    def _finish(self, answer: RemoteAnswer, task: asyncio.Task[str]) -> None:
        """Count an answer that is over, for whatever reason, and tell its readers."""
        del self._tasks[answer]
        error = None if task.cancelled() else task.exception()
        reason = "cancelled" if task.cancelled() else "error" if error else task.result()
        counted = {"cancelled": "cancelled", "error": "failed"}.get(reason, "finished")
        answer.end(reason, error if isinstance(error, Exception) else None)
        with self._changed:
            self._open.discard(answer)
            counts = self._statistics
            setattr(counts, counted, getattr(counts, counted) + 1)
            counts.prompt_tokens += answer.prompt_tokens
            counts.cached_tokens += answer.cached_tokens
            counts.generated_tokens += answer.completion_tokens
            if counted == "finished":
                self._seconds += 0.1 * (answer.ended - (answer.started or answer.ended) - self._seconds)
            self._changed.notify_all()
