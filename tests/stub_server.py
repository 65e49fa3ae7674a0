"""A server on this machine that answers as a test tells it to, byte by byte."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODELS = {"object": "list", "data": [{"id": "stub", "object": "model"}]}


class Stub:
    """`reply` answers every POST; `requests` holds (path, headers, body) of what came."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.models: Callable[[Handler], None] = as_json(MODELS)
        self.reply: Callable[[Handler], None] = stream("Hello", " you")
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.cancelled = threading.Event()  # a stream's client has gone


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stub: Stub

    def do_GET(self) -> None:
        self.stub.requests.append((self.path, dict(self.headers), None))
        self.stub.models(self)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.stub.requests.append((self.path, dict(self.headers), json.loads(body)))
        self.stub.reply(self)

    def log_message(self, *arguments: Any) -> None:
        """Nothing on the screen."""

    def start(self, status: int, kind: str, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def chunk(self, data: bytes) -> None:
        """One piece of a body in chunked encoding, on its way at once; the last one is empty."""
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()


def as_json(content: Any, status: int = 200, **headers: str) -> Callable[[Handler], None]:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()

    def reply(handler: Handler) -> None:
        handler.start(status, "application/json", Content_Length=str(len(body)), **headers)
        handler.wfile.write(body)

    return reply


def error(status: int, message: str, code: str | None = None, **headers: str) -> Callable[[Handler], None]:
    """OpenAI's shape of an error."""
    return as_json({"error": {"message": message, "type": "error", "code": code}}, status, **headers)


def delta(text: str) -> dict:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}


END = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
USAGE = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}}


def event(content: Any) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


def stream(*texts: str) -> Callable[[Handler], None]:
    """A whole answer, one event for each text, as a good server sends it."""
    return raw_stream(
        [event(content) for content in [*map(delta, texts), END, USAGE]] + [b"data: [DONE]\n\n"]
    )


def raw_stream(
    pieces: Sequence[bytes], pause: float = 0.0, broken: bool = False
) -> Callable[[Handler], None]:
    """These bytes, each piece on its own; `broken`: then the connection breaks without an end."""

    def reply(handler: Handler) -> None:
        handler.start(200, "text/event-stream; charset=utf-8", Transfer_Encoding="chunked")
        try:
            for piece in pieces:
                handler.chunk(piece)
                time.sleep(pause)
            if broken:
                handler.close_connection = True
            else:
                handler.chunk(b"")
        except OSError:  # the client has gone
            handler.stub.cancelled.set()
            handler.close_connection = True

    return reply


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *arguments: Any) -> None:
        """Clients that go away are what is tested; everything else is printed."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(*arguments)


@contextmanager
def stub_server() -> Iterator[Stub]:
    server = Server(("127.0.0.1", 0), type("StubHandler", (Handler,), {}))
    stub = Stub(f"http://127.0.0.1:{server.server_port}")
    server.RequestHandlerClass.stub = stub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
