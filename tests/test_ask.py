"""`chatglm ask`: what it asks, what it prints, and how it ends."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import stub_server
from processes import OBEY_CTRL_C
from stub_server import Stub, delta, error, event, raw_stream

from chatglm.cli import main

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def stub() -> Iterator[Stub]:
    with stub_server.stub_server() as stub:
        yield stub


class Typed(io.StringIO):
    """A standard input at which a person sits."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def ask(stub: Stub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs `chatglm ask` with a server; `piped` is the standard input, None a terminal."""
    monkeypatch.delenv("CHATGLM_API_KEY", raising=False)

    def run(*arguments: str, piped: str | None = None) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", Typed() if piped is None else io.StringIO(piped))
        capsys.readouterr()
        status = main(["ask", *arguments, "--url", stub.url])
        return status, *capsys.readouterr()

    return run


def questions(stub: Stub) -> list[str]:
    return [body["messages"][-1]["content"] for _, _, body in stub.requests if body]


@pytest.mark.parametrize(
    ("words", "piped", "expected"),
    [
        (["你好"], None, "你好"),
        (["several", "words"], None, "several words"),
        (["summarise"], "a\nb\n", "summarise\n\na\nb"),
        (["summarise"], "", "summarise"),
        (["summarise"], "\n \n", "summarise"),
        ([], "a\n\nb\n", "a\n\nb"),
        (["-"], "a\n", "a"),
    ],
)
def test_the_question_is_what_is_written_and_under_it_what_is_piped(
    words: list[str], piped: str | None, expected: str, stub: Stub, ask
):
    assert ask(*words, piped=piped) == (0, "Hello you\n", "")
    assert questions(stub) == [expected]


@pytest.mark.parametrize("arguments", [[], [""], ["-"]], ids=repr)
def test_without_a_question_nothing_is_asked(arguments: list[str], stub: Stub, ask):
    expected = 'chatglm: There is no question; write it behind the command (chatglm ask "…") or pipe it in.\n'
    assert ask(*arguments) == (1, "", expected)
    assert stub.requests == []


def test_json_tells_all_that_is_known_of_the_answer(ask):
    status, out, _ = ask("hi", "--json")
    assert status == 0
    assert json.loads(out) == {
        "answer": "Hello you",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
        "model": "stub",
    }


def test_a_model_of_ours_tells_the_same_about_itself(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(sys, "stdin", Typed())
    assert main(["ask", "12+30=?", "--json", "--device", "cpu"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert "42" in facts["answer"]
    assert facts["finish_reason"] == "stop"
    assert facts["usage"]["prompt_tokens"] > facts["usage"]["completion_tokens"] > 0
    assert facts["model"] == "demo"
    assert main(["ask", "12+30=?", "--json", "--device", "cpu", "--max-length", "25"]) == 0
    short = json.loads(capsys.readouterr().out)
    assert short["finish_reason"] == "length"
    assert sum(short["usage"].values()) == 25


def test_a_system_prompt_and_a_model_reach_the_server(stub: Stub, ask):
    ask("hi", "--system", "S", "--model", "mine")
    ((_, _, body),) = stub.requests
    assert body["model"] == "mine"
    assert body["messages"] == [{"role": "system", "content": "S"}, {"role": "user", "content": "hi"}]


def test_an_error_ends_with_one_sentence_and_status_1(stub: Stub, ask):
    stub.reply = error(429, "full", Retry_After="7")
    for arguments in (["hi"], ["hi", "--json"]):
        status, out, err = ask(*arguments)
        assert (status, out) == (1, "")
        assert err == f"chatglm: The server at {stub.url}/v1 is busy (429); ask again in 7 seconds.\n"


def test_what_came_before_the_server_died_is_printed(stub: Stub, ask):
    stub.reply = raw_stream([event(delta("half"))], broken=True)
    status, out, err = ask("hi")
    assert (status, out) == (1, "half\n")
    assert err.count("\n") == 1


def test_an_empty_answer_is_an_empty_line(stub: Stub, ask):
    stub.reply = stub_server.stream("")
    assert ask("hi") == (0, "\n", "")


def test_an_output_that_cannot_hold_the_answer_is_told_with_a_way_out(
    stub: Stub, ask, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    stub.reply = stub_server.stream("你好")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "latin-1"))
    status, _, err = ask("hi")
    assert (status, sys.stdout.buffer.getvalue()) == (1, b"\n")
    assert err == "chatglm: The output is latin-1, which has no '你'; set PYTHONIOENCODING=utf-8.\n"


def command(*arguments: str, **options) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    pipes["preexec_fn"] = OBEY_CTRL_C
    return subprocess.Popen(
        [sys.executable, "-m", "chatglm", "ask", *arguments], env=environment, **(pipes | options)
    )


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process alone")
def test_ctrl_c_keeps_what_was_printed_and_ends_with_130(stub: Stub):
    stub.reply = raw_stream([event(delta("word "))] * 100_000, pause=0.001)
    with command("hi", "--url", stub.url) as process:
        assert process.stdout.read(5) == b"word "
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130
    assert (b"word " + out).endswith(b"word \n")
    assert err == b"\n"
    assert stub.cancelled.wait(10)


def test_a_reader_that_has_seen_enough_ends_it_quietly(stub: Stub):
    stub.reply = raw_stream([event(delta("word "))] * 100_000, pause=0.001)
    with command("hi", "--url", stub.url) as process:
        assert process.stdout.read(5) == b"word "
        process.stdout.close()
        assert process.wait() == 141
        assert process.stderr.read() == b""
    assert stub.cancelled.wait(10)


@pytest.mark.skipif(os.name == "nt", reason="needs a shell that closes a standard stream")
def test_a_closed_standard_input_adds_nothing(stub: Stub):
    with command("hi", "--url", stub.url, stdin=None, preexec_fn=lambda: os.close(0)) as process:
        out, err = process.communicate()
    assert (process.returncode, out, err) == (0, b"Hello you\n", b"")
    assert questions(stub) == ["hi"]


@pytest.mark.parametrize("piped", [b"\xff\xfe", "好".encode("gbk")], ids=repr)
def test_bytes_that_are_no_text_are_refused(piped: bytes, stub: Stub):
    with command("hi", "--url", stub.url, stdin=subprocess.PIPE) as process:
        out, err = process.communicate(piped)
    assert (process.returncode, out) == (1, b"")
    assert err == b"chatglm: The standard input is not utf-8; convert it with iconv.\n"
    assert stub.requests == []
