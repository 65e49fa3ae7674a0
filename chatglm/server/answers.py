"""The running answers of one HTTP request: their pieces as they come, and their end when nobody waits any more."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from chatglm.server.errors import INTERNAL, ApiError
from chatglm.server.settings import Settings

if TYPE_CHECKING:
    from chatglm.engine.answer import Answer, Piece
    from chatglm.server.metrics import Metrics

logger = logging.getLogger("chatglm.server")


class Running:
    """Answers that are computed for one client; they end with it, and after `answer_seconds`."""

    def __init__(self, answers: list[Answer], settings: Settings, metrics: Metrics) -> None:
        self.answers, self.settings, self.metrics = answers, settings, metrics

    def cancel(self) -> None:
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
        if answer.finish_reason == "error":
            logger.error("An answer failed.", exc_info=answer.error)

    async def all_pieces(self, receive: Receive) -> list[list[Piece]]:
        """Waits for all answers, and gives up when the client does. Raises ApiError if one failed."""
        found: list[list[Piece]] = [[] for _ in self.answers]
        async with cancelled_when_gone(self, receive), aclosing(self.pieces()) as pieces:
            async for item in pieces:
                if item is not None and item[1] is not None:
                    found[item[0]].append(item[1])
        self.check()
        return found

    def check(self) -> None:
        """Raises ApiError if an answer failed."""
        if any(answer.finish_reason == "error" for answer in self.answers):
            raise ApiError(500, INTERNAL, code="internal_error")


async def _pump(index: int, answer: Answer, queue: asyncio.Queue) -> None:
    try:
        async for piece in answer:
            queue.put_nowait((index, piece))
    finally:
        queue.put_nowait((index, None))


@contextlib.asynccontextmanager
async def cancelled_when_gone(running: Running, receive: Receive) -> AsyncIterator[None]:
    """Cancels the answers at the moment the client hangs up, and at the end of the block."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        running.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        running.cancel()


class EventStream(Response):
    """Server-sent events, written as they come; a client that takes nothing for `send_seconds` is given up."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], running: Running) -> None:
        # Proxies shall neither keep it nor collect it.
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events, self.running = events, running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with cancelled_when_gone(self.running, receive), aclosing(self.events) as events:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for event in events:
                    await self._send(send, event, more_body=True)
                await self._send(send, "", more_body=False)
            except asyncio.TimeoutError:
                logger.info(
                    "A client took nothing of its answer for %s s.", self.running.settings.send_seconds
                )

    async def _send(self, send: Send, text: str, more_body: bool) -> None:
        message: Message = {"type": "http.response.body", "body": text.encode(), "more_body": more_body}
        await asyncio.wait_for(send(message), self.running.settings.send_seconds)


def event(data: Any) -> str:
    """One event: a line of JSON."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


KEEP_ALIVE = ": the answer is being computed\n\n"
DONE = "data: [DONE]\n\n"
