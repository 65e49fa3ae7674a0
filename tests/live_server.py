"""The server under uvicorn on a port of this machine, with the demo model, for tests of all kinds."""

from __future__ import annotations

import contextlib
import functools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import psutil

from chatglm.server.model import Model
from chatglm.server.run import Server, listen, make_server
from chatglm.server.service import Loader, Service
from chatglm.server.settings import Settings

Json = Mapping[str, Any]


@dataclass
class LiveServer:
    """A server that runs: where it is, and its inside."""

    url: str
    server: Server
    client: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=60, trust_env=False))

    @property
    def service(self) -> Service:
        return self.server.service

    @property
    def model(self) -> Model:
        return self.service.loaded()

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return self.client.post(self.url + path, json=body, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.client.get(self.url + path, **options)

    def chat(self, content: Any, **fields: Any) -> httpx.Response:
        messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
        return self.post("/v1/chat/completions", {"model": "demo", "messages": messages} | fields)

    def events(self, path: str, body: Json) -> list[str]:
        """The data of all events of a stream."""
        with self.client.stream("POST", self.url + path, json=body) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            text = response.read().decode()
        assert text.endswith("\n\n")
        lines = [line for line in text.split("\n\n") if line and not line.startswith(":")]
        assert all(line.startswith("data: ") for line in lines), lines
        return [line.removeprefix("data: ") for line in lines]

    def chunks(self, path: str, body: Json) -> list[Json]:
        """The chunks of an OpenAI stream, which ends in [DONE]."""
        *chunks, last = self.events(path, {**body, "stream": True})
        assert last == "[DONE]"
        return [json.loads(chunk) for chunk in chunks]

    def raw(self, data: bytes, wait: float = 10.0) -> bytes:
        """What comes back for bytes that no HTTP client would send."""
        with socket.create_connection(self.address, timeout=wait) as connection:
            connection.sendall(data)
            return received(connection)

    def idle(self) -> bool:
        statistics = self.model.engine.statistics()
        return statistics.running == statistics.waiting == 0

    def waiting(self) -> int:
        return self.model.engine.statistics().waiting

    def memory(self) -> int:
        """Bytes that this process has in memory."""
        return psutil.Process().memory_info().rss


def received(connection: socket.socket) -> bytes:
    """All that the server sends until it closes the connection."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while block := connection.recv(65536):
            data += block
    return data


def wait_until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    """Waits for what must come sooner or later."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


@functools.cache
def demo() -> tuple[Any, Any]:
    import chatglm

    return chatglm.load("demo", device="cpu")


def demo_loader(settings: Settings, **changes: Any) -> Loader:
    """Returns the demo model in an engine of its own."""

    def load() -> Model:
        from chatglm.engine.engine import Engine

        model, tokenizer = demo()
        engine = Engine(model, tokenizer, settings.max_batch, settings.max_queue, settings.max_context)
        facts = Model(
            id="demo",
            engine=engine,
            tokenizer=tokenizer,
            family="chatglm2",
            parameters=3_198_144,
            bytes=12_792_624,
            dtype="float32",
            device="cpu",
            temperature=0.0,
            top_p=0.8,
            max_length=engine.context,
        )
        return replace(facts, **changes)

    return load


@contextlib.contextmanager
def live_server(
    settings: Settings | None = None, load: Loader | None = None, **changes: Any
) -> Iterator[LiveServer]:
    """Runs a server until the end of the block; with `load` the model may not be there yet."""
    settings = settings or Settings()
    listener = listen("127.0.0.1", 0)
    server = make_server(load or demo_loader(settings, **changes), settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    if load is None:
        assert server.service.settled.wait(60)
    running = LiveServer("http://{}:{}".format(*listener.getsockname()), server)
    try:
        yield running
    finally:
        running.client.close()
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not end"
