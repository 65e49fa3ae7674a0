"""What the server tells of itself, and the page: /health, /info, /metrics, /docs, / and /static."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import HTMLResponse, JSONResponse, StreamingResponse

from chatglm import __version__
from chatglm.server.asking import check_model
from chatglm.server.docs_page import docs_page
from chatglm.server.errors import ApiError
from chatglm.server.schemas import LoadRequest
from chatglm.server.service import STREAM, JsonRoute, TheModel, TheService

router = APIRouter(route_class=JsonRoute, tags=["Server"])

STATIC = Path(__file__).parent / "static"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".webmanifest": "application/manifest+json",
}


@router.get("/health")
@router.head("/health", include_in_schema=False)
@router.get("/v1/health", include_in_schema=False)
@router.head("/v1/health", include_in_schema=False)
async def health(service: TheService) -> JSONResponse:
    """200 when requests are answered, 503 while the model is loading. Needs no key."""
    status = "ok" if service.model else "failed" if service.failure else "loading"
    return JSONResponse({"status": status}, 200 if service.model else 503)


@router.get("/info")
async def info(service: TheService, model: TheModel) -> dict[str, Any]:
    """What the model is, and what holds where a request does not say."""
    return {
        "model": model.id,
        "family": model.family,
        "parameters": model.parameters,
        "bytes": model.bytes,
        "dtype": model.dtype,
        "device": model.device,
        "context": model.engine.context,
        "defaults": {
            "temperature": model.temperature,
            "top_p": model.top_p,
            "max_tokens": service.settings.max_tokens,
        },
        "version": __version__,
    }


@router.get("/metrics", response_class=Response)
def metrics(service: TheService) -> Response:
    """Counters and times for Prometheus."""
    return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})


@router.get("/docs", response_class=HTMLResponse, include_in_schema=False)
async def docs(request: Request) -> HTMLResponse:
    """Every route with its fields and an example; a page without scripts."""
    return HTMLResponse(docs_page(request.app.openapi(), str(request.base_url).rstrip("/")))


@router.post("/load_model", response_class=StreamingResponse, responses=STREAM)
async def load_model(body: LoadRequest, service: TheService, model: TheModel) -> StreamingResponse:
    """What `transformers chat` asks before it begins: whether the model is there. Nothing is loaded."""
    check_model(body.model, model, service.settings)

    async def events() -> AsyncIterator[str]:
        yield f"data: {json.dumps({'status': 'ready', 'model': model.id, 'cached': True})}\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


@router.get("/", include_in_schema=False)
@router.head("/", include_in_schema=False)
async def page(request: Request) -> Response:
    """The chat page."""
    return _file(request, "index.html")


@router.get("/favicon.ico", include_in_schema=False)
@router.head("/favicon.ico", include_in_schema=False)
async def icon(request: Request) -> Response:
    """The page's icon, where browsers look for it by themselves."""
    return _file(request, "icon.svg")


@router.get("/static/{name:path}", include_in_schema=False)
@router.head("/static/{name:path}", include_in_schema=False)
async def static(name: str, request: Request) -> Response:
    """A file of the chat page."""
    return _file(request, name)


def _file(request: Request, name: str) -> Response:
    found = static_files().get(name)
    if found is None:
        raise ApiError(404, "The page has no such file.", code="not_found")
    content, media_type, tag = found
    headers = {"ETag": tag, "Cache-Control": "no-cache"}  # browsers ask every time whether it has changed
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=media_type)


@cache
def static_files() -> dict[str, tuple[bytes, str, str]]:
    """The page's files by name: content, type, tag. Few and small: no request ever names a path on the disk."""
    files = {}
    for path in sorted(STATIC.rglob("*")):
        if path.suffix in MEDIA_TYPES:
            content = path.read_bytes()
            tag = f'"{sha256(content).hexdigest()[:16]}"'
            files[path.relative_to(STATIC).as_posix()] = (content, MEDIA_TYPES[path.suffix], tag)
    return files
