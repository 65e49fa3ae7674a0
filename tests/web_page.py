"""A browser and a server whose answers are scripted, for the tests of the web page and for its pictures.

`python tests/web_page.py docs/images` takes the pictures of docs/web.md again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

    from chatglm.engine.answer import Answer, GeneratedAnswer
    from chatglm.engine.request import Request
    from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer
    from chatglm.server.settings import Settings

PAUSE = "⏸"  # in a scripted answer: nothing more comes until `resume`
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER_ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-sync",
    "--no-first-run",
]


class ScriptedEngine:
    """Stands in for the engine: answers known questions word for word, token by token, and echoes all others."""

    context = 2048
    places = 72

    def __init__(self, tokenizer: ChatGLMTokenizer) -> None:
        self.tokenizer = tokenizer
        self.script: dict[str, str] = {}
        self.requests: list[Request] = []
        self.answers: list[Answer] = []
        self.seconds_per_token = 0.0
        self._resumed = threading.Event()

    def submit_all(self, requests: Sequence[Request]) -> list[Answer]:
        return [self._submit(request) for request in requests]

    def _submit(self, request: Request) -> Answer:
        from chatglm.engine.answer import GeneratedAnswer

        answer = GeneratedAnswer(request, self.tokenizer, wake=lambda: None)
        self.requests.append(request)
        self.answers.append(answer)
        question = self.prompt(request).rpartition("问：")[2].removesuffix("\n\n答：")
        text = self.script.get(question, f"You said: {question}")
        threading.Thread(target=self._answer, args=(answer, text), daemon=True).start()
        return answer

    def prompt(self, request: Request) -> str:
        return self.tokenizer.decode(request.prompt, skip_special_tokens=True)

    def resume(self) -> None:
        """Lets the answers that pause go on."""
        self._resumed.set()

    def reset(self) -> None:
        self._resumed.set()
        self._resumed = threading.Event()
        self.script.clear()
        self.requests.clear()
        self.answers.clear()

    def close(self, patience: float = 0.0) -> None:
        for answer in self.answers:
            answer.cancel()

    def _answer(self, answer: GeneratedAnswer, text: str) -> None:
        from chatglm.engine.sampling import Chosen

        resumed = self._resumed
        for part, until in enumerate(text.split(PAUSE)):
            while part and not resumed.wait(0.01) and not answer.cancelled:
                pass
            for token in self.tokenizer.encode(until, add_special_tokens=False):
                if answer.cancelled:
                    return answer.end("cancelled")
                answer.put(Chosen(token))
                time.sleep(self.seconds_per_token)
        return answer.end("stop")


class Network:
    """Carries connections to the server, until it is cut: then they break, and no new ones come about."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._sockets: list[socket.socket] = []
        self._listen(0)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def cut(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()
        sockets, self._sockets = self._sockets, []
        for end in sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def restore(self) -> None:
        self._listen(int(self.url.rpartition(":")[2]))

    def _listen(self, port: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", self._port))
                self._sockets += [near, far]
                for source, target in ((near, far), (far, near)):
                    threading.Thread(target=_carry, args=(source, target), daemon=True).start()


def _carry(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):  # cut
        while data := source.recv(65536):
            target.sendall(data)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def scripted_model(tokenizer: ChatGLMTokenizer) -> Any:
    from chatglm.server.model import Model

    return Model(
        id="demo",
        engine=ScriptedEngine(tokenizer),  # type: ignore[arg-type]
        tokenizer=tokenizer,
        family="chatglm2",
        parameters=3_200_000,
        bytes=12_800_000,
        dtype="float32",
        device="cpu",
        temperature=0.8,
        top_p=0.8,
        max_length=2048,
    )


@contextlib.contextmanager
def served(load: Callable[[], Any], settings: Settings | None = None, port: int = 0) -> Iterator[int]:
    """Serves a model, as `chatglm serve` does, in a thread; yields the port, any that is free if it is 0."""
    import uvicorn

    from chatglm.server.app import create_app

    app = create_app(load, settings)
    listener = socket.create_server(("127.0.0.1", port))
    config = uvicorn.Config(app, log_config=None, ws="none", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        app.state.service.settled.wait()
        yield listener.getsockname()[1]
    finally:
        app.state.service.close()
        server.should_exit = True
        thread.join()


def demo_tokenizer() -> ChatGLMTokenizer:
    from chatglm.find import find_checkpoint
    from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer

    return ChatGLMTokenizer.from_pretrained(find_checkpoint("demo"))


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@contextlib.contextmanager
def browser(profile: Path | None = None) -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=find_browser(), args=BROWSER_ARGUMENTS)
        yield started
        started.close()


# ---- the pictures

EARLIER = ["晚上睡不着应该怎么办", "What is the capital of France?", "12+30=?"]
PICTURED = ["写一首关于秋天的诗", "Write a for loop in Python"]
PICTURES = {"desk": {"width": 1280, "height": 800}, "phone": {"width": 390, "height": 844}}


def take_pictures(folder: Path) -> None:
    """A conversation with the demo model, which ships with the package: these are its own answers."""
    from chatglm.server.model import load_model
    from chatglm.server.settings import Settings

    with served(lambda: load_model("demo", Settings(), device="cpu")) as port, browser() as chromium:
        for name, viewport in PICTURES.items():
            for scheme in ("light", "dark"):
                touch = name == "phone"
                context = chromium.new_context(
                    viewport=viewport,
                    color_scheme=scheme,
                    locale="zh-CN" if touch else "en-GB",
                    has_touch=touch,
                    is_mobile=touch,
                )
                page = context.new_page()
                page.goto(f"http://127.0.0.1:{port}/")
                page.locator("#model", has_text="demo").wait_for()
                for question in EARLIER:
                    talk(page, question)
                    page.evaluate("document.querySelector('#new').click()")
                for question in PICTURED:
                    talk(page, question)
                page.mouse.move(0, 0)
                page.screenshot(path=folder / f"web-{name}-{scheme}.png")
                context.close()


def talk(page: Page, question: str) -> None:
    """Asks and waits for the end of the answer."""
    page.locator("#question").fill(question)
    page.locator("#question").press("Enter")
    page.locator("#send").wait_for(state="visible")
    page.locator(".turn.running").wait_for(state="detached")


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    parser = argparse.ArgumentParser(description="Takes the pictures of the web page.")
    parser.add_argument("folder", type=Path)
    take_pictures(parser.parse_args().folder)
