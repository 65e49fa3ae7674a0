"""What all routes share: the settings, the metrics, and the model once it is loaded."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Depends, Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json

from chatglm.server.asking import RETRY_AFTER
from chatglm.server.errors import ApiError
from chatglm.server.metrics import Metrics
from chatglm.server.model import Model
from chatglm.server.settings import Settings

# For the OpenAPI description: routes that answer with server-sent events, always or if asked.
STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}

Loader = Callable[[], Model]


class Service:
    """A model that loads in the background, so that /health answers from the first moment."""

    def __init__(self, load: Loader, settings: Settings) -> None:
        self.settings, self.created = settings, int(time.time())
        self.metrics = Metrics(lambda: self.model.engine if self.model else None)
        self.model: Model | None = None
        self.failure: Exception | None = None  # why it could not be loaded
        self.settled = threading.Event()  # loaded, or failed
        self._load = load

    def start(self) -> None:
        """Begins to load."""
        threading.Thread(target=self._run, name="chatglm-load", daemon=True).start()

    def _run(self) -> None:
        try:
            self.model = self._load()
        except Exception as error:
            self.failure = error
        self.settled.set()

    def close(self, patience: float = 0.0) -> None:
        """Takes no more requests; running answers have `patience` seconds to end."""
        if self.model is not None:
            self.model.engine.close(patience)

    def answers(self) -> int:
        """How many answers run or wait."""
        statistics = self.model.engine.statistics() if self.model else None
        return statistics.running + statistics.waiting if statistics else 0

    def loaded(self) -> Model:
        """The model; raises ApiError while there is none."""
        if self.model is not None:
            return self.model
        if self.failure is not None:
            raise ApiError(
                503, "The model could not be loaded; the server's log tells why.", code="not_loaded"
            )
        retry = {"Retry-After": str(RETRY_AFTER)}
        raise ApiError(
            503, "The model is being loaded; try again in a moment.", code="loading", headers=retry
        )


async def _service(request: Request) -> Service:
    return request.app.state.service


async def _model(request: Request) -> Model:
    return request.app.state.service.loaded()


TheService = Annotated[Service, Depends(_service)]
TheModel = Annotated[Model, Depends(_model)]


class JsonRequest(Request):
    """Reads JSON strictly: UTF-8, whole characters, no NaN, at most 200 levels deep."""

    async def json(self) -> Any:
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(400, f"The body is no JSON: {error}.", code="invalid_json") from None


class JsonRoute(APIRoute):
    """A route whose body is read by JsonRequest."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return handle_json
