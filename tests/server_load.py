"""Many clients that talk to a server at once, a third of whom hang up early."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

import httpx
from live_server import demo, wait_until

QUESTIONS = [
    "你好",
    "12+30=?",
    "What is the capital of France?",
    "谢谢",
    "Who are you?",
    "你是谁？",
    "写一段代码",
    "List three fruits",
    "😀",
    "苹果用英语怎么说？",
    "def f(x):\n\treturn x",
]


class Server(Protocol):
    """What the clients and those who watch over them need to know of a server."""

    url: str

    def get(self, path: str) -> httpx.Response: ...
    def waiting(self) -> int: ...
    def memory(self) -> int: ...
    def idle(self) -> bool: ...


@dataclass
class Load:
    """What the clients do and what has come of it."""

    server: Server
    conversations: list[tuple[list[dict[str, str]], str]]  # messages, and the answer they have alone
    until: float
    outcomes: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    most_waiting: int = 0
    memory: list[int] = field(default_factory=list)

    async def run(self, clients: int) -> None:
        limits = httpx.Limits(max_connections=clients)
        async with httpx.AsyncClient(timeout=60, trust_env=False, limits=limits) as http:
            await asyncio.gather(self.watch(), *(self.client(http, random.Random(i)) for i in range(clients)))

    async def watch(self) -> None:
        while time.monotonic() < self.until:
            self.most_waiting = max(self.most_waiting, self.server.waiting())
            self.memory.append(self.server.memory())
            await asyncio.sleep(0.1)

    async def client(self, http: httpx.AsyncClient, chance: random.Random) -> None:
        while time.monotonic() < self.until:
            messages, expected = chance.choice(self.conversations)
            body = {"model": "demo", "messages": messages, "temperature": 0}
            kind = chance.choice(["whole", "stream", "hang up"])
            if kind == "whole":
                response = await http.post(self.server.url + "/v1/chat/completions", json=body)
                if await self.accepted(response):
                    self.check(kind, response.json()["choices"][0]["message"]["content"], expected)
            else:
                await self.stream(http, body | {"stream": True}, expected, hang_up=kind == "hang up")
            await asyncio.sleep(chance.uniform(0, 0.02))

    async def stream(self, http: httpx.AsyncClient, body: dict, expected: str, hang_up: bool) -> None:
        url, text = self.server.url + "/v1/chat/completions", ""
        async with http.stream("POST", url, json=body) as response:
            if not await self.accepted(response):
                return
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
                if hang_up and text:
                    self.outcomes["hang up"] += 1
                    if not expected.startswith(text):
                        self.wrong.append(text)
                    return
        self.check("stream", text, expected)

    async def accepted(self, response: httpx.Response) -> bool:
        if response.status_code == 429:
            assert int(response.headers["retry-after"]) >= 1
            self.outcomes["refused"] += 1
            await asyncio.sleep(0.2)  # less patient than asked
            return False
        assert response.status_code == 200
        return True

    def check(self, kind: str, text: str, expected: str) -> None:
        self.outcomes[kind] += 1
        if text != expected:
            self.wrong.append(text)


def conversations() -> list[tuple[list[dict[str, str]], str]]:
    """Single questions, and the same as second turns; with the answers of `chat`."""
    model, tokenizer = demo()
    found = []
    for query in QUESTIONS:
        answer, history = model.chat(tokenizer, query, do_sample=False)
        asked = {"role": "user", "content": query}
        found.append(([asked], answer))
        second, _ = model.chat(tokenizer, "谢谢", history, do_sample=False)
        follows = [asked, {"role": "assistant", "content": answer}, {"role": "user", "content": "谢谢"}]
        found.append((follows, second))
    return found


def put_under_load(server: Server, clients: int, seconds: float, places: int) -> Load:
    load = Load(server, conversations(), time.monotonic() + seconds)
    asyncio.run(load.run(clients))
    assert load.wrong == []
    assert min(load.outcomes[kind] for kind in ("whole", "stream", "hang up")) > 0, load.outcomes
    assert load.most_waiting <= places
    wait_until(server.idle)  # whoever hung up left nothing behind
    assert server.get("/health").status_code == 200
    return load
