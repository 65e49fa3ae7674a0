"""The running answers of one HTTP request: their pieces as they come, and their end when nobody waits any more."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from chatglm.engine.request import SchemaTooComplex
from chatglm.server.errors import ApiError, failure
from chatglm.server.settings import Settings

if TYPE_CHECKING:
    from chatglm.engine.answer import Answer, Piece
    from chatglm.server.metrics import Metrics

logger = logging.getLogger("chatglm.server")

KEEP_ALIVE = ": the answer is being computed\n\n"
DONE = "data: [DONE]\n\n"


class Running:
    """Answers that are computed for one client; they end with it, and after `answer_seconds`."""

    def __init__(self, answers: list[Answer], settings: Settings, metrics: Metrics) -> None:
        self.answers, self.settings, self.metrics = answers, settings, metrics

    def cancel(self) -> None:
        """Ends them all with the token that is being computed."""
        for answer in self.answers:
            answer.cancel()

    async def pieces(self) -> AsyncIterator[tuple[int, Piece | None] | None]:
        """Yields (which answer, piece) as they come, (which answer, None) at its end, and None while nothing comes."""
        queue: asyncio.Queue[tuple[int, Piece | None]] = asyncio.Queue()
        tasks = [asyncio.create_task(_pump(i, answer, queue)) for i, answer in enumerate(self.answers)]
        limit = asyncio.get_running_loop().call_later(self.settings.answer_seconds, self.cancel)
        left = len(tasks)
        try:
            while left:
                try:
                    index, piece = await asyncio.wait_for(queue.get(), self.settings.keep_alive_seconds)
                except asyncio.TimeoutError:
                    yield None
                    continue
                if piece is None:
                    left -= 1
                    self._ended(self.answers[index])
                yield index, piece
        finally:
            limit.cancel()
            self.cancel()
            for task in tasks:
                task.cancel()

    def _ended(self, answer: Answer) -> None:
        self.metrics.answered(answer)
        if isinstance(answer.error, SchemaTooComplex):
            logger.info("An answer was given up: %s", answer.error)
        elif answer.finish_reason == "error":
            logger.error("An answer failed.", exc_info=answer.error)

    async def all_pieces(self, receive: Receive) -> list[list[Piece]]:
        """Waits for all answers; raises ApiError if one failed, or the client has gone."""
        found: list[list[Piece]] = [[] for _ in self.answers]
        async with when_gone(receive, self.cancel) as gone, aclosing(self.pieces()) as pieces:
            async for item in pieces:
                if item is not None and item[1] is not None:
                    found[item[0]].append(item[1])
        if gone.is_set():
            raise client_gone()
        for answer in self.answers:
            if answer.finish_reason == "error":
                raise failure(answer.error)
        return found


async def _pump(index: int, answer: Answer, queue: asyncio.Queue) -> None:
    try:
        async for piece in answer:
            queue.put_nowait((index, piece))
    finally:
        queue.put_nowait((index, None))


@contextlib.asynccontextmanager
async def when_gone(receive: Receive, cancel: Callable[[], Any]) -> AsyncIterator[asyncio.Event]:
    """Calls `cancel` at the moment the client hangs up; what it yields tells whether it has."""
    gone = asyncio.Event()

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        gone.set()
        cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield gone
    finally:
        watcher.cancel()


def client_gone() -> ApiError:
    """For the log and the metrics; nobody is there to read it. The number is nginx's."""
    return ApiError(499, "The client has gone.", code="client_gone")


async def result_of(future: Future, receive: Receive) -> Any:
    """What the engine computes besides answers; raises ApiError if it was given up."""
    async with when_gone(receive, future.cancel) as gone:
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if not future.cancelled():
                raise
    raise (
        client_gone()
        if gone.is_set()
        else ApiError(503, "The server is shutting down.", code="shutting_down")
    )


class EventStream(Response):
    """Server-sent events, written as they come; a client that takes nothing for `send_seconds` is given up."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], running: Running) -> None:
        # Proxies shall neither keep it nor collect it.
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events, self.running = events, running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        cancel = self.running.cancel
        async with when_gone(receive, cancel), aclosing(self.events) as events:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for event in events:
                    await self._send(send, event, more_body=True)
                await self._send(send, "", more_body=False)
            except asyncio.TimeoutError:
                seconds = self.running.settings.send_seconds
                logger.info("A client took nothing of its answer for %s s, and is given up.", seconds)
            finally:
                cancel()  # also where the events were never begun

    async def _send(self, send: Send, text: str, more_body: bool) -> None:
        message: Message = {"type": "http.response.body", "body": text.encode(), "more_body": more_body}
        await asyncio.wait_for(send(message), self.running.settings.send_seconds)


def event(data: Any) -> str:
    """One event: a line of JSON."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
