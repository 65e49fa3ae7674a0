"""OpenAI's routes: chat, completions, embeddings and models under /v1."""

from __future__ import annotations

import base64
import logging
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse

from chatglm.server.answers import DONE, KEEP_ALIVE, EventStream, Running, event, result_of
from chatglm.server.asking import ask_chat, ask_completions, check_model, embedding_prompts, refusal_of
from chatglm.server.errors import failure
from chatglm.server.model import Model
from chatglm.server.schemas import ChatRequest, CompletionRequest, EmbeddingRequest
from chatglm.server.service import STREAM, JsonRoute, Service, TheModel, TheService
from chatglm.server.shapes import ChatShape, CompletionShape, Shape

logger = logging.getLogger("chatglm.server")
router = APIRouter(prefix="/v1", route_class=JsonRoute, tags=["OpenAI"])


@router.post("/chat/completions", responses=STREAM)
async def chat_completions(
    body: ChatRequest, request: Request, service: TheService, model: TheModel
) -> Response:
    """The next answer of a conversation."""
    if service.settings.log_prompts:
        logger.info("chat: %s", [(message.role, message.text) for message in body.messages])
    answers = await run_in_threadpool(ask_chat, body, model, service.settings)
    return await _answer(ChatShape(body, model, answers), request, service)


@router.post("/completions", responses=STREAM)
async def completions(
    body: CompletionRequest, request: Request, service: TheService, model: TheModel
) -> Response:
    """How a text goes on."""
    if service.settings.log_prompts:
        logger.info("completion: %r", body.prompt)
    answers = await run_in_threadpool(ask_completions, body, model, service.settings)
    return await _answer(CompletionShape(body, model, answers), request, service)


@router.post("/embeddings")
async def embeddings(
    body: EmbeddingRequest, request: Request, service: TheService, model: TheModel
) -> dict[str, Any]:
    """One vector for each text: the mean of the model's last hidden states over its tokens."""
    prompts = await run_in_threadpool(embedding_prompts, body, model, service.settings)
    try:
        future = await run_in_threadpool(model.engine.embed, prompts)
        vectors = await result_of(future, request.receive)
    except Exception as error:
        refused = refusal_of(error, "input")
        if refused is None:
            raise
        raise refused from None
    data = [
        {"object": "embedding", "index": i, "embedding": _vector(vector, body.encoding_format)}
        for i, vector in enumerate(vectors)
    ]
    tokens = sum(map(len, prompts))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": model.id, "usage": usage}


@router.get("/models")
async def models(service: TheService, model: TheModel) -> dict[str, Any]:
    """The one model that is served."""
    return {"object": "list", "data": [_model_object(service, model)]}


@router.get("/models/{name:path}")
async def one_model(name: str, service: TheService, model: TheModel) -> dict[str, Any]:
    """The same, by its id."""
    check_model(name, model, service.settings)
    return _model_object(service, model)


def _model_object(service: Service, model: Model) -> dict[str, Any]:
    return {"id": model.id, "object": "model", "created": service.created, "owned_by": "chatglm"}


def _vector(numbers: Sequence[float], encoding: str | None) -> list[float] | str:
    if encoding != "base64":
        return list(numbers)
    return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()


async def _answer(shape: Shape, request: Request, service: Service) -> Response:
    running = Running(shape.answers, service.settings, service.metrics)
    if shape.body.stream:
        return EventStream(_events(shape, running), running)
    pieces = await running.all_pieces(request.receive)
    return JSONResponse(shape.whole(pieces))


async def _events(shape: Shape, running: Running) -> AsyncIterator[str]:
    for index in range(len(shape.answers)):
        for chunk in shape.begin(index):
            yield event(chunk)
    async with aclosing(running.pieces()) as pieces:
        async for item in pieces:
            if item is None:
                yield KEEP_ALIVE
                continue
            index, piece = item
            if piece is not None:
                yield event(shape.delta(index, piece))
            elif shape.answers[index].finish_reason == "error":
                yield event(failure(shape.answers[index].error).body)
            else:
                yield event(shape.end(index))
    if shape.body.includes_usage:
        yield event(shape.usage_chunk())
    yield DONE
