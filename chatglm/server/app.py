"""`create_app`: the routes, in front of them the guard, behind them a model that loads in the background."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from chatglm import __version__
from chatglm.server import openai_routes, published_routes, status_routes
from chatglm.server.errors import add_error_handlers
from chatglm.server.guard import Guard, Observer
from chatglm.server.schemas import ErrorBody
from chatglm.server.service import Loader, Service
from chatglm.server.settings import Settings


def create_app(load: Loader, settings: Settings | None = None) -> FastAPI:
    """The server as an ASGI application.

    Args:
        load: returns the model (`chatglm.server.model.load_model` makes one); called in a thread when the
            application starts. Until it returns, /health says 503.
        settings: who may come in, and every limit.

    `app.state.service` holds the model; whoever runs the application closes it (see run.py).
    """
    settings = settings or Settings()
    service = Service(load, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.close()

    app = FastAPI(
        title="chatglm",
        version=__version__,
        description="ChatGLM on your own machine: OpenAI's API, and that of the published api.py.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's own page fetches its scripts from another site
        redoc_url=None,
        responses={
            "4XX": {"model": ErrorBody, "description": "Refused, with a sentence that says why."},
            "5XX": {"model": ErrorBody, "description": "Loading, shutting down, or a failure."},
        },
    )
    app.state.service = service
    for routes in (openai_routes, published_routes, status_routes):
        app.include_router(routes.router)
    add_error_handlers(app)
    # The last one added sees a request first.
    app.add_middleware(Guard, settings=settings)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=["Retry-After"],
        )
    app.add_middleware(Observer, metrics=service.metrics)
    return app
