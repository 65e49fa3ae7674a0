"""Runs the server under uvicorn: the port first, the model in the background, and an end that loses no answer."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from chatglm.server.app import create_app
from chatglm.server.errors import error_body
from chatglm.server.guard import SECURITY_HEADERS
from chatglm.server.service import Loader, Service
from chatglm.server.settings import Settings

logger = logging.getLogger("chatglm.server")


def serve(
    load: Loader,
    settings: Settings,
    host: str = "127.0.0.1",
    port: int = 8000,
    listening: Callable[[str], None] = lambda url: None,
) -> None:
    """Serves until Ctrl-C or SIGTERM.

    Args:
        load: returns the model, see `create_app`; what it raises ends the server and is raised here.
        listening: called with the address as soon as /health answers; the model may still be loading.

    Running answers then have `settings.patience` seconds to end; a second Ctrl-C ends them at once. Raises OSError
    if the port is taken.
    """
    listener = listen(host, port)
    server = make_server(load, settings, lambda: listening(url_of(host, listener)))
    server.run(sockets=[listener])
    if server.service.failure is not None:
        raise server.service.failure


def make_server(load: Loader, settings: Settings, listening: Callable[[], None] = lambda: None) -> Server:
    """The application in uvicorn, with the bounds of the settings on connections and headers."""
    app = create_app(load, settings)
    config = uvicorn.Config(
        app,
        http=_connection(settings),
        ws="none",
        lifespan="on",
        log_config=None,  # ours, see chatglm/cli/serve.py
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nothing here depends on who a proxy says the client is
        limit_concurrency=settings.max_connections,
        h11_max_incomplete_event_size=settings.max_header_bytes,
        timeout_graceful_shutdown=round(settings.patience) + 5,
    )
    return Server(config, app.state.service, listening)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; OSError with a sentence if there can be none."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror:
        raise OSError(f"There is no address {host!r} on this machine; give another --host.") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(
            f"Port {port} of {host} cannot be used ({error.strerror}); give another --port."
        ) from None
    return listener


def url_of(host: str, listener: socket.socket) -> str:
    """The address to type into a browser."""
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    name = f"[{name}]" if ":" in name else name
    return f"http://{name}:{listener.getsockname()[1]}"


class Server(uvicorn.Server):
    """uvicorn's server, which ends when loading fails, and lets running answers end before it ends itself."""

    def __init__(self, config: uvicorn.Config, service: Service, listening: Callable[[], None]) -> None:
        super().__init__(config)
        self.service, self._listening, self._took_signals = service, listening, False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._listening()

    async def on_tick(self, counter: int) -> bool:
        if self.service.settled.is_set() and not self._took_signals:
            self._take_signals()
        return await super().on_tick(counter) or self.service.failure is not None

    def _take_signals(self) -> None:
        """Takes SIGTERM back from Ray, which, once started, prints its stack as if something had failed."""
        self._took_signals = True
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        patience, answers = self.service.settings.patience, self.service.answers()
        if answers:
            logger.warning(
                "Open answers: %d. They have %g seconds to end; Ctrl-C ends them now.", answers, patience
            )
        # From now on the engine refuses new requests; connections that are open go on until their answers end.
        close = threading.Thread(target=self.service.close, args=(patience,), daemon=True)
        close.start()
        ending = asyncio.create_task(super().shutdown(sockets))
        while not (ending.done() or self.force_exit):
            await asyncio.sleep(0.1)
        # Nothing is left to do by now, unless Ctrl-C came again, or somebody does not take the end of an answer.
        await asyncio.to_thread(self.service.close)
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=2)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await ending  # which from Python 3.12 on waits for every connection
        if self.force_exit:
            await self.lifespan.shutdown()


def _connection(settings: Settings) -> type[H11Protocol]:
    class Connection(H11Protocol):
        """Closes a connection on which no whole request line with its headers arrives in time."""

        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait_for_request()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_waiting()
            elif self._deadline is None:
                self._wait_for_request()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            """In the shape of all other errors; uvicorn's own is plain text."""
            message = (
                f"This is no HTTP request, or its headers have more than {settings.max_header_bytes:,} bytes."
            )
            body = json.dumps(error_body(400, message, code="bad_request")).encode()
            headers = {
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
                "Connection": "close",
            }
            headers |= SECURITY_HEADERS
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                response = h11.Response(status_code=400, headers=list(headers.items()), reason=b"Bad Request")
                for part in (response, h11.Data(data=body), h11.EndOfMessage()):
                    self.transport.write(self.conn.send(part))
            self.transport.close()

        def _wait_for_request(self) -> None:
            self._deadline = self.loop.call_later(settings.header_seconds, self.transport.close)

        def _stop_waiting(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    return Connection
