"""The route of the published api.py, and the stream that people asked for and never got."""

from __future__ import annotations

import datetime
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from chatglm.server.answers import KEEP_ALIVE, EventStream, Running, event
from chatglm.server.asking import ask_published
from chatglm.server.errors import failure
from chatglm.server.model import Model
from chatglm.server.schemas import PublishedRequest
from chatglm.server.service import STREAM, JsonRoute, Service, TheModel, TheService

logger = logging.getLogger("chatglm.server")
router = APIRouter(route_class=JsonRoute, tags=["Published API"])


@router.post("/")
async def answer(
    body: PublishedRequest, request: Request, service: TheService, model: TheModel
) -> dict[str, Any]:
    """The answer to a prompt after a history, as the published api.py gave it."""
    running = await _start(body, service, model)
    await running.all_pieces(request.receive)
    return _finished(body, running)


@router.post("/stream", response_class=StreamingResponse, responses=STREAM)
async def stream(body: PublishedRequest, service: TheService, model: TheModel) -> EventStream:
    """The same in pieces: every event has the response so far, the last one the history too."""
    running = await _start(body, service, model)
    return EventStream(_events(body, running), running)


async def _start(body: PublishedRequest, service: Service, model: Model) -> Running:
    if service.settings.log_prompts:
        logger.info("prompt: %r after %r", body.prompt, body.history)
    answers = await run_in_threadpool(ask_published, body, model, service.settings)
    return Running(answers, service.settings, service.metrics)


async def _events(body: PublishedRequest, running: Running) -> AsyncIterator[str]:
    response = ""
    async with aclosing(running.pieces()) as pieces:
        async for item in pieces:
            if item is None:
                yield KEEP_ALIVE
            elif item[1] is not None:
                response += item[1].text
                yield event({"response": response, "status": 200, "time": _now()})
    if running.answers[0].finish_reason == "error":
        yield event(failure(running.answers[0].error).body)
    else:
        yield event(_finished(body, running))


def _finished(body: PublishedRequest, running: Running) -> dict[str, Any]:
    response = running.answers[0].text
    history = [*(body.history or []), [body.prompt, response]]
    return {"response": response, "history": history, "status": 200, "time": _now()}


def _now() -> str:
    return datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
