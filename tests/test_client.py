"""The client of an OpenAI-compatible server, and `chatglm chat --url`, against a server that misbehaves on demand."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import stub_server
from stub_server import END, Stub, as_json, delta, error, event, raw_stream, stream

from chatglm.cli.backends import ServedModel
from chatglm.cli.chat import converse
from chatglm.cli.conversation import Conversation
from chatglm.cli.terminal import PlainScreen
from chatglm.client import LARGEST, Client, PromptTooLong, ServerError, events

QUESTION = [{"role": "user", "content": "你好"}]
DONE = b"data: [DONE]\n\n"
SCREEN = PlainScreen(interactive=False)


@pytest.fixture
def stub() -> Iterator[Stub]:
    with stub_server.stub_server() as stub:
        yield stub


@pytest.fixture
def connect() -> Iterator[Callable[..., Client]]:
    """Makes clients that are closed after the test."""
    with ExitStack() as clients:
        yield lambda *arguments: clients.enter_context(closing(Client(*arguments)))


@pytest.fixture
def client(stub: Stub, connect) -> Client:
    return connect(stub.url, "sesame")


def answer(client: Client) -> str:
    return "".join(chunk.text for chunk in client.stream_chat("stub", QUESTION))


def failure(client: Client) -> str:
    """What is told when an answer fails: one line."""
    with pytest.raises(ServerError) as caught:
        answer(client)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- events


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b"data: a\n\ndata: b\n\n", ["a", "b"]),
        (b"data: a\r\n\r\ndata:b\r\n\r\n", ["a", "b"]),
        (b"data: one\ndata: two\n\n", ["one\ntwo"]),
        (b": keep-alive\n\n\n\nevent: x\nid: 1\nretry: 3\n: more\ndata: a\n\n", ["a"]),
        ("data: 你好🎉\n\n".encode(), ["你好🎉"]),
        (b"data:  blank\n\n", [" blank"]),
        (b"data: not ended\n", []),
    ],
)
def test_events_are_the_same_however_their_bytes_arrive(sent: bytes, expected: list[str]):
    assert list(events([sent])) == expected
    assert list(events([sent[i : i + 1] for i in range(len(sent))])) == expected


def test_a_line_without_an_end_is_given_up():
    with pytest.raises(ServerError, match="which is no event"):
        list(events(b"x" * 65536 for _ in range(LARGEST // 65536 + 1)))


# ---- the protocol


def test_the_request_is_what_the_protocol_asks_for(stub: Stub, client: Client):
    assert client.models() == ["stub"]
    list(client.stream_chat("stub", QUESTION, temperature=0.0, top_p=None, seed=7))
    (models, headers, _), (path, _, body) = stub.requests
    assert (models, path) == ("/v1/models", "/v1/chat/completions")
    assert headers["Authorization"] == "Bearer sesame"
    assert body == {
        "model": "stub",
        "messages": QUESTION,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.0,
        "seed": 7,
    }


def test_text_reason_and_usage_come_as_they_are_sent(stub: Stub, client: Client):
    chunks = list(client.stream_chat("stub", QUESTION))
    assert "".join(chunk.text for chunk in chunks) == "Hello you"
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["stop"]
    assert [chunk.usage for chunk in chunks if chunk.usage] == [stub_server.USAGE["usage"]]


def test_characters_that_come_byte_by_byte_stay_whole(stub: Stub, client: Client):
    sent = (
        b": wait\n\n"
        + event(delta("你好🎉"))
        + b": still here\n\n"
        + event(delta("，\n世界"))
        + event(END)
        + DONE
    )
    stub.reply = raw_stream([sent[i : i + 1] for i in range(len(sent))])
    assert answer(client) == "你好🎉，\n世界"


def test_an_end_without_done_is_an_end_if_a_reason_was_given(stub: Stub, client: Client):
    stub.reply = raw_stream([event(delta("all")), event(END)])
    assert answer(client) == "all"


def test_half_a_surrogate_pair_is_replaced(stub: Stub, client: Client):
    stub.reply = raw_stream([b'data: {"choices": [{"delta": {"content": "a\\ud83d"}}]}\n\n', DONE])
    assert answer(client) == "a\ufffd"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1"),
        ("http://localhost/v1/", "http://localhost/v1"),
        ("https://host.example/api/paas/v4", "https://host.example/api/paas/v4"),
        ("http://[::1]:8000", "http://[::1]:8000/v1"),
    ],
)
def test_an_address_without_a_path_gets_the_usual_one(url: str, expected: str, connect):
    assert connect(url).url == expected


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:8000",
        "ftp://host",
        "http://",
        "http://a b",
        "http://host:99999",
        "http://[",
        "http://a\n",
    ],
)
def test_what_is_no_url_is_refused_by_value(url: str):
    with pytest.raises(ValueError, match="give one such as"):
        Client(url)


@pytest.mark.parametrize("url", ["http://me:secret@host", "http://host?key=secret", "http://host/#secret"])
def test_a_url_with_a_secret_is_refused_without_repeating_it(url: str):
    with pytest.raises(ValueError, match="leave out what is before @") as caught:
        Client(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("key", ["se same", "sesame\n", "sésame", "sesame\r\nX: y"])
def test_a_key_that_is_none_is_refused_without_repeating_it(key: str):
    with pytest.raises(ValueError, match="copy it again") as caught:
        Client("http://127.0.0.1", key)
    assert "same" not in str(caught.value)


def test_proxies_of_the_environment_are_not_asked_for_this_machine(stub: Stub, connect, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")
    assert connect(stub.url).models() == ["stub"]


# ---- what goes wrong


def test_a_server_that_is_not_there_is_told_with_the_way_out(connect):
    with socket.socket() as listener:  # bound and not listening: connections are refused
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        told = failure(connect(url))
    assert told.startswith(f"No connection to {url}/v1 (")
    assert told.endswith("start the server (chatglm serve), or correct the URL.")


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        (error(401, "no"), "refuses the key (401); correct CHATGLM_API_KEY or --api-key."),
        (error(403, "no"), "refuses the key (403)"),
        (
            error(404, "There is no model 'stub'."),
            "does not have what was asked for (404): There is no model 'stub'.",
        ),
        (error(429, "full", Retry_After="7"), "is busy (429); ask again in 7 seconds."),
        (error(429, "full", Retry_After="1"), "is busy (429); ask again in a second."),
        (error(429, "full", Retry_After="Sat, 21 Nov 2026 00:00:00 GMT"), "is busy (429); ask again later."),
        (error(429, "full"), "is busy (429); ask again later."),
        (error(400, "temperature is 9"), "refuses (400): temperature is 9"),
        (as_json(b"<html>", 502), "refuses (502)."),
        (as_json({"error": "as a string"}, 500), "refuses (500): as a string"),
        (as_json(b"[" * 50_000, 500), "refuses (500)."),
        (as_json({}, 307, Location="http://elsewhere/"), "sends on to http://elsewhere/ (307)"),
        (as_json({"choices": []}), "answers with application/json instead of a stream of events."),
        (raw_stream([b"data: nonsense\n\n"]), "'nonsense', which is no piece of a chat completion."),
        (raw_stream([b'data: {"choices": 3}\n\n']), "which is no piece"),
        (raw_stream([b'data: {"choices": [{"delta": {"content": 3}}]}\n\n']), "which is no piece"),
        (raw_stream([b"data: [1]\n\n"]), "which is no piece"),
        (raw_stream([event({"error": {"message": "out of memory"}})]), "broke off: out of memory"),
        (raw_stream([]), "broke off in the middle of its answer."),
    ],
)
def test_a_refusal_becomes_one_sentence(reply, sentence: str, stub: Stub, client: Client):
    stub.reply = reply
    assert sentence in failure(client)


def test_a_missing_key_is_asked_for(stub: Stub, connect):
    stub.reply = error(401, "no")
    assert failure(connect(stub.url)).endswith("wants a key (401); put it into CHATGLM_API_KEY.")


def test_words_of_the_server_cannot_steer_the_terminal_nor_give_the_key_away(stub: Stub, client: Client):
    stub.reply = error(400, "your key sesame\x1b[2J\r\n is \x9b31m bad " + "x" * 1_000)
    told = failure(client)
    assert "your key *** [2J is 31m bad" in told
    assert told.isprintable()
    assert len(told) < 400


def test_an_endless_refusal_is_not_read_to_its_end(stub: Stub, client: Client):
    stub.reply = as_json(b'"' + b"x" * (4 * LARGEST) + b'"', 500)
    assert failure(client).endswith("refuses (500).")


@pytest.mark.parametrize("listed", [{}, [], {"data": 3}, None], ids=repr)
def test_a_list_of_models_that_is_none_is_told(listed, stub: Stub, client: Client):
    stub.models = as_json(listed)
    with pytest.raises(ServerError, match="is no list of models"):
        client.models()


# ---- a conversation with a server


@pytest.fixture
def talk(stub: Stub, connect) -> Conversation:
    return Conversation(ServedModel(connect(stub.url), "stub"))


def test_a_conversation_sends_all_that_was_said(
    stub: Stub, talk: Conversation, capsys: pytest.CaptureFixture[str]
):
    converse(talk, ["/system S", "one", "two"], SCREEN)
    assert capsys.readouterr().out == "Hello you\nHello you\n"
    *_, (_, _, body) = stub.requests
    assert [(message["role"], message["content"]) for message in body["messages"]] == [
        ("system", "S"),
        ("user", "one"),
        ("assistant", "Hello you"),
        ("user", "two"),
    ]


def test_when_the_server_dies_what_was_shown_stays_said(
    stub: Stub, talk: Conversation, capsys: pytest.CaptureFixture[str]
):
    stub.reply = raw_stream([event(delta("half an ")), event(delta("answer"))], broken=True)
    converse(talk, ["one"], SCREEN, keep_going=True)
    captured = capsys.readouterr()
    assert captured.out == "half an answer\n"
    assert captured.err.endswith("broke off in the middle of its answer.\n")
    assert talk.messages == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "half an answer"},
    ]
    stub.reply = stream("whole")
    converse(talk, ["/retry"], SCREEN)
    assert talk.messages[1]["content"] == "whole"


def test_ctrl_c_closes_the_connection_and_so_cancels_the_answer(stub: Stub, talk: Conversation):
    stub.reply = raw_stream([event(delta("x" * 1000))] * 10_000, pause=0.001)

    class Impatient(PlainScreen):
        def show(self, pieces) -> None:
            next(iter(pieces))
            raise KeyboardInterrupt

    converse(talk, ["one"], Impatient(interactive=False), keep_going=True)
    assert stub.cancelled.wait(10)
    assert talk.messages[1]["content"] == "x" * 1000


def test_rounds_for_which_the_server_has_no_room_are_left_out(
    stub: Stub, talk: Conversation, capsys: pytest.CaptureFixture[str]
):
    """The server tells that there is no room; a quarter of the rounds is left out at a time, and stays out."""
    whole = stream("yes")

    def reply(handler: stub_server.Handler) -> None:
        messages = stub.requests[-1][2]["messages"]
        too_long = error(400, "too long", "context_length_exceeded")
        (too_long if len(messages) > 14 else whole)(handler)

    stub.reply = reply
    converse(talk, ["/system S", *"abcdefgh"], SCREEN)
    assert [message["content"] for message in stub.requests[-1][2]["messages"][::2]] == ["S", *["yes"] * 6]
    assert [message["content"] for message in stub.requests[-1][2]["messages"][1::2]] == list("bcdefgh")
    assert capsys.readouterr().err.endswith("(To make room, the model no longer reads the oldest round.)\n")
    assert len(talk.messages) == 16
    asked = len(stub.requests)
    converse(talk, ["i"], SCREEN)
    assert len(stub.requests) == asked + 2


def test_a_question_that_is_too_long_by_itself_is_told(stub: Stub, talk: Conversation):
    stub.reply = error(400, "9 tokens, and 8 is the most", "context_length_exceeded")
    with pytest.raises(PromptTooLong, match="9 tokens"):
        list(talk.ask("hi"))


# ---- the command


def command(*arguments: str, text: str = "", key: str = "") -> subprocess.CompletedProcess:
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
        "CHATGLM_API_KEY": key,
    }
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "chatglm", *arguments],
        input=text,
        capture_output=True,
        text=True,
        env=environment,
        encoding="utf-8",
    )


def imported(result: subprocess.CompletedProcess) -> set[str]:
    return {line.split("|")[-1].strip() for line in result.stderr.splitlines()}


def test_a_server_is_asked_without_torch_and_with_the_first_model_it_offers(stub: Stub):
    result = command("chat", "--url", stub.url, text="你好\n", key="sesame")
    assert (result.returncode, result.stdout) == (0, "Hello you\n")
    assert not imported(result) & {"torch", "transformers", "numpy", "rich"}
    assert [path for path, _, _ in stub.requests] == ["/v1/models", "/v1/chat/completions"]
    assert {headers["Authorization"] for _, headers, _ in stub.requests} == {"Bearer sesame"}
    assert stub.requests[1][2]["model"] == "stub"


def test_options_reach_the_server(stub: Stub):
    options = "--temperature 0 --top-p 0.5 --max-length 9 --seed 3 --system S --api-key other".split()
    result = command("chat", "mine", "--url", stub.url, *options, text="hi\n", key="sesame")
    assert result.returncode == 0
    ((_, headers, body),) = stub.requests
    assert headers["Authorization"] == "Bearer other"
    assert json.dumps(body["messages"]) == json.dumps(
        [{"role": "system", "content": "S"}, {"role": "user", "content": "hi"}]
    )
    settings = {name: body[name] for name in ("model", "temperature", "top_p", "max_tokens", "seed")}
    assert settings == {"model": "mine", "temperature": 0.0, "top_p": 0.5, "max_tokens": 9, "seed": 3}


@pytest.mark.parametrize(
    "option",
    [
        "--device cpu",
        "--dtype float32",
        "--quantize 4",
        "--revision main",
        "--prompt-lookup 8",
        "--int8-cache",
    ],
)
def test_options_of_a_model_here_are_refused_for_a_server(option: str, stub: Stub, capsys):
    from chatglm.cli import main

    assert main(["chat", "--url", stub.url, *option.split()]) == 1
    name = option.split()[0]
    expected = f"chatglm: {name} is for a model that is loaded here; leave it out with --url.\n"
    assert capsys.readouterr().err == expected
    assert stub.requests == []
