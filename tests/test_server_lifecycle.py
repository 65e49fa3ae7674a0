"""From loading to the shutdown: queue, cancellation, failures, the command line."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the server needs the extra 'server'")

import httpx
from live_server import LiveServer, demo_loader, live_server, received, wait_until
from processes import OBEY_CTRL_C

from chatglm.cli import main, serve, web
from chatglm.engine.request import EngineClosed
from chatglm.server.answers import EventStream, Running
from chatglm.server.model import load_model, model_id
from chatglm.server.run import listen
from chatglm.server.settings import Settings

CHAT = "/v1/chat/completions"
ENDLESS = {"logit_bias": {"2": -100}, "max_tokens": 2000}  # without its end token the model writes on


def body(**fields) -> dict:
    return {"model": "demo", "messages": [{"role": "user", "content": "hello"}]} | fields


def stream_socket(server: LiveServer, path: str = CHAT, **fields) -> socket.socket:
    """A connection on which an answer has begun."""
    data = json.dumps(body(**fields) if path == CHAT else fields).encode()
    connection = socket.create_connection(server.address, timeout=30)
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def running(server: LiveServer) -> int:
    return server.model.engine.statistics().running


# ---- loading


def test_health_says_503_while_loading_and_200_then():
    go = threading.Event()
    settings = Settings()

    def load():
        assert go.wait(60)
        return demo_loader(settings)()

    with live_server(settings, load) as server:
        health = server.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "loading"})
        answer = server.chat("hello")
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "loading"
        assert int(answer.headers["retry-after"]) > 0
        for path in ("/v1/models", "/info"):
            assert server.get(path).status_code == 503
        assert server.get("/metrics").status_code == 200
        go.set()
        wait_until(lambda: server.get("/health").status_code == 200)
        assert server.chat("hello").status_code == 200


def test_a_model_that_cannot_be_loaded_ends_the_server_with_its_error():
    from chatglm.server.run import serve as serve_until_told

    def load():
        raise ValueError("The weights are damaged; download them again.")

    with pytest.raises(ValueError, match="damaged"):
        serve_until_told(load, Settings(), port=0)


def test_a_port_that_is_taken_is_told_before_anything_is_loaded():
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(OSError, match="give another --port"):
            listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(OSError, match="give another --host"):
        listen("256.1.1.1.invalid", 8000)


# ---- the queue


def test_a_full_queue_is_refused_with_429_and_when_to_come_again():
    with live_server(Settings(max_batch=1, max_queue=1)) as server:
        connections = [stream_socket(server, stream=True, **ENDLESS) for _ in range(2)]
        statistics = server.model.engine.statistics
        wait_until(lambda: (statistics().running, statistics().waiting) == (1, 1))
        response = server.chat("hello")
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) > 0
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        for connection in connections:
            connection.close()
        wait_until(server.idle)
        assert server.chat("hello").status_code == 200


def test_answers_that_do_not_all_fit_beside_those_of_others_leave_none_behind():
    with live_server(Settings(max_batch=1, max_queue=3)) as server:
        connection = stream_socket(server, stream=True, **ENDLESS)
        wait_until(lambda: server.model.engine.statistics().running == 1)
        response = server.chat("hello", n=4, **ENDLESS)
        assert response.status_code == 429
        assert "no room for 4 more, as 0 requests are waiting" in response.json()["error"]["message"]
        assert server.waiting() == 0
        connection.close()
        wait_until(server.idle)
        assert server.chat("hello", n=4, max_tokens=2).status_code == 200


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "hello"}], "n": 4}, "n"),
        ("/v1/completions", {"prompt": "hello", "n": 4}, "n"),
        ("/v1/completions", {"prompt": ["a", "b"], "n": 2}, "prompt"),
        ("/v1/completions", {"prompt": ["a"] * 4}, "prompt"),
    ],
)
def test_more_answers_than_there_is_ever_room_for_are_no_matter_of_waiting(path, fields, param):
    with live_server(Settings(max_batch=1, max_queue=2)) as server:
        response = server.post(path, {"model": "demo"} | fields)
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["param"], error["code"]) == (param, "invalid_value")
        assert error["message"] == f"{param} asks for 4 answers; at most 3 are possible at once."


def test_many_chats_at_once_get_the_answers_they_get_alone():
    questions = ["hello", "你好", "12+30=?", "What is the capital of France?", "7*8=?", "你是谁？"] * 2
    with live_server() as server:

        def ask(question: str) -> str:
            response = httpx.post(
                server.url + CHAT, json=body(messages=[{"role": "user", "content": question}]), timeout=60
            )
            return response.json()["choices"][0]["message"]["content"]

        alone = {question: ask(question) for question in dict.fromkeys(questions)}
        with ThreadPoolExecutor(12) as pool:
            assert list(pool.map(ask, questions)) == [alone[question] for question in questions]


# ---- cancellation


@pytest.mark.parametrize("streamed", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/stream", "/"])
def test_a_client_that_hangs_up_frees_its_row_at_once(path, streamed):
    with live_server() as server:
        fields = {"stream": streamed, **ENDLESS}
        if path == "/v1/completions":
            fields |= {"model": "demo", "prompt": "x"}
        elif path != CHAT:  # the published API cannot be kept from ending: a long prompt instead
            fields = {"prompt": "Tell me a long story. " * 40, "temperature": 2.0}
        connection = stream_socket(server, path, **fields)
        wait_until(lambda: running(server) == 1)
        generated = server.model.engine.statistics().generated_tokens
        connection.close()
        wait_until(server.idle)
        statistics = server.model.engine.statistics()
        assert statistics.generated_tokens - generated < 1000
        if path == CHAT or path == "/v1/completions":
            assert statistics.cancelled == 1 and statistics.finished == 0


def test_a_client_that_hangs_up_is_no_success_in_the_metrics():
    with live_server() as server:
        connection = stream_socket(server, **ENDLESS)
        wait_until(lambda: running(server) == 1)
        connection.close()
        line = 'chatglm_requests_total{method="POST",route="/v1/chat/completions",status="499"} 1.0'
        wait_until(lambda: line in server.get("/metrics").text)


def test_embeddings_that_nobody_waits_for_are_given_up(monkeypatch):
    from concurrent.futures import Future

    with live_server() as server:
        future: Future = Future()
        monkeypatch.setattr(server.model.engine, "embed", lambda prompts: future)
        connection = stream_socket(server, "/v1/embeddings", model="demo", input="hello")
        connection.close()
        wait_until(future.cancelled)
        later: Future = Future()
        monkeypatch.setattr(server.model.engine, "embed", lambda prompts: later)
        threading.Timer(0.2, later.cancel).start()  # as the engine does when it is closed
        response = server.post("/v1/embeddings", {"model": "demo", "input": "hello"})
        assert response.status_code == 503 and response.json()["error"]["code"] == "shutting_down"
        failed: Future = Future()
        failed.set_exception(EngineClosed())
        monkeypatch.setattr(server.model.engine, "embed", lambda prompts: failed)
        assert server.post("/v1/embeddings", {"model": "demo", "input": "hello"}).status_code == 503


def test_without_the_packages_of_the_extra_the_command_says_what_is_missing(monkeypatch, capsys):
    import chatglm

    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.setattr(chatglm, "server", chatglm.server)  # put back afterwards, as its modules are
    for name in [name for name in sys.modules if name.startswith("chatglm.server")]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["serve"]) == 1
    error = capsys.readouterr().err
    assert "fastapi" in error and "extra 'server'" in error and error.count("\n") == 1


def test_an_answer_is_ended_after_its_time():
    with live_server(Settings(answer_seconds=0.3)) as server:
        choice = server.chat("hello", **ENDLESS).json()["choices"][0]
        assert choice["finish_reason"] == "cancelled" and choice["message"]["content"]
        chunks = server.chunks(CHAT, body(**ENDLESS))
        assert chunks[-1]["choices"][0]["finish_reason"] == "cancelled"


def test_a_stream_that_has_nothing_to_tell_sends_comments():
    with live_server(Settings(max_batch=1, keep_alive_seconds=0.05)) as server:
        first = stream_socket(server, stream=True, **ENDLESS)
        wait_until(lambda: running(server) == 1)
        second = stream_socket(server, stream=True)
        text = b""
        while b"\n: " not in text:
            text += second.recv(65536)
        first.close()
        assert text.count(b"data: ") == 1  # the role
        second.shutdown(socket.SHUT_WR)
        second.close()


def test_a_client_that_takes_nothing_is_given_up():
    class Answers:
        """One answer that never ends."""

        cancelled = False

        def cancel(self) -> None:
            self.cancelled = True

    async def events():
        while True:
            yield "data: x\n\n"

    async def stuck(message) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def silent() -> dict:
        await asyncio.Event().wait()
        raise AssertionError

    answer = Answers()
    running = Running([answer], Settings(send_seconds=0.05), None)
    asyncio.run(asyncio.wait_for(EventStream(events(), running)({"type": "http"}, silent, stuck), 10))
    assert answer.cancelled


# ---- failures


def test_a_failure_tells_the_client_nothing_and_the_log_everything(monkeypatch, caplog):
    with live_server() as server:
        monkeypatch.setattr(type(server.model.engine), "submit_all", lambda *_: 1 / 0)
        with caplog.at_level(logging.ERROR, "chatglm.server"):
            response = server.chat("hello")
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "server_error"
        assert "ZeroDivision" not in response.text and "Traceback" not in response.text
        assert "ZeroDivisionError" in caplog.text
        assert response.headers["content-security-policy"]
        monkeypatch.undo()
        assert server.chat("hello").status_code == 200


def test_an_answer_that_fails_in_the_engine_is_a_500_or_an_error_event(monkeypatch):
    with live_server() as server:
        engine = server.model.engine
        real = engine._read

        def broken(*_):
            raise RuntimeError("secret details")

        monkeypatch.setattr(engine, "_read", broken)
        response = server.chat("hello")
        assert response.status_code == 500 and "secret" not in response.text
        events = server.events(CHAT, body(stream=True))
        assert json.loads(events[-2])["error"]["code"] == "internal_error" and events[-1] == "[DONE]"
        assert "error" in json.loads(server.events("/stream", {"prompt": "hello"})[-1])
        monkeypatch.setattr(engine, "_read", real)
        assert server.chat("hello").status_code == 200


def test_the_log_has_no_prompts_unless_asked(caplog):
    secret = "the combination is 3141"
    for log_prompts in (False, True):
        caplog.clear()
        with live_server(Settings(log_prompts=log_prompts)) as server, caplog.at_level(logging.DEBUG):
            server.chat(secret)
            server.post("/", {"prompt": secret})
            server.post("/v1/completions", {"model": "demo", "prompt": secret})
            server.post(
                "/v1/completions?q=" + secret.replace(" ", "+"), {"model": "demo", "prompt": secret, "n": 9}
            )
        ours = [
            record.getMessage() for record in caplog.records if record.name.startswith(("chatglm", "uvicorn"))
        ]
        assert any("POST /v1/chat/completions 200" in line for line in ours)
        assert any(secret in line for line in ours) == log_prompts
        assert not any("combination+is" in line for line in ours)


def test_a_path_cannot_forge_lines_of_the_log(caplog):
    with live_server() as server, caplog.at_level(logging.INFO, "chatglm.server"):
        server.raw(b"GET /a%0d%0aforged HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    assert not any(
        "\n" in record.getMessage() for record in caplog.records if record.name == "chatglm.server"
    )


# ---- the end


def test_at_the_shutdown_running_answers_end_and_new_ones_are_refused():
    with live_server(Settings(patience=20)) as server:
        connection = stream_socket(server, stream=True, **ENDLESS | {"max_tokens": 60})
        wait_until(lambda: running(server) == 1)
        with httpx.Client() as kept:  # a connection that was opened before
            kept.get(server.url + "/health")
            server.server.should_exit = True
            wait_until(lambda: not server.server.servers[0].is_serving())
        with pytest.raises(EngineClosed):
            wait_until(lambda: bool(server.model.engine.submit(_request(server))), 5)
        text = received(connection).decode()
        connection.close()
    assert '"finish_reason":"length"' in text
    assert "data: [DONE]" in text


def _request(server: LiveServer):
    from chatglm.engine.request import Request

    return Request(server.model.text_prompt("x"), max_tokens=1)


def test_answers_that_outlast_the_patience_are_ended_and_say_so():
    with live_server(Settings(patience=0.3)) as server:
        connection = stream_socket(server, stream=True, **ENDLESS)
        wait_until(lambda: running(server) == 1)
        server.server.should_exit = True
        text = received(connection).decode()
        connection.close()
    assert '"finish_reason":"cancelled"' in text
    assert "data: [DONE]" in text


def start(*arguments: str, **environment: str) -> tuple[subprocess.Popen, str]:
    """`chatglm serve` in a process of its own; returns it and its address when the model is ready."""
    command = [sys.executable, "-m", "chatglm", "serve", "--port", "0", *arguments]
    process = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, encoding="utf-8", preexec_fn=OBEY_CTRL_C,
    )  # fmt: skip
    url, lines = "", []
    for line in process.stdout:
        lines.append(line)
        url = url or "".join(re.findall(r"Listening at (\S+) ", line))
        if "is ready" in line:
            return process, url
    pytest.fail("".join(lines))


def test_the_command_serves_until_ctrl_c_and_a_second_one_ends_it_at_once():
    process, url = start("demo", "--patience", "600", CHATGLM_API_KEY="k")
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        assert client.get("/v1/models").status_code == 401
        client.headers["Authorization"] = "Bearer k"
        response = client.post(CHAT, json=body(max_tokens=3))
        assert response.json()["choices"][0]["message"]["content"] == "Hello! I"
        with client.stream("POST", CHAT, json=body(stream=True, **ENDLESS)) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            assert "600 seconds to end" in next(line for line in process.stdout if "Open answers: 1" in line)
            process.send_signal(signal.SIGINT)
            rest, _ = process.communicate(timeout=60)
            *_, last, done = [line for line in lines if line]
    assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "cancelled"
    assert done == "data: [DONE]"
    assert "Traceback" not in rest and "hello" not in rest
    assert process.returncode == 130


@pytest.mark.slow
def test_sigterm_ends_the_command():
    process, _ = start("demo")
    process.terminate()
    rest, _ = process.communicate(timeout=60)
    assert "Traceback" not in rest
    assert process.returncode == -signal.SIGTERM


# ---- the command line


def settings_for(*options: str) -> Settings:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return serve.settings_from(parser.parse_args(options))


def test_keys_come_from_options_the_environment_and_a_file(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("CHATGLM_API_KEY", "c")
    file = tmp_path / "keys"
    file.write_text("# ours\nd\n\n e \n", encoding="utf-8")
    settings = settings_for("--api-key", "a", "--api-key", "b", "--api-key-file", str(file))
    assert settings.api_keys == ("a", "b", "c", "d", "e")
    assert settings.allowed_hosts == ()


@pytest.mark.parametrize("key", ["", "with blank", "schlüssel"])
def test_a_key_that_no_header_can_carry_is_refused(key):
    with pytest.raises(ValueError, match="API key"):
        settings_for("--api-key", key)


def test_a_key_file_without_keys_is_refused(tmp_path: Path):
    (tmp_path / "keys").write_text("# nothing\n")
    with pytest.raises(ValueError, match="no API key"):
        settings_for("--api-key-file", str(tmp_path / "keys"))


def test_a_key_file_that_cannot_be_read_is_told_with_its_option(tmp_path: Path):
    (tmp_path / "bytes").write_bytes(b"\xff")
    for name, reason in {"missing": "No such file", ".": "Is a directory", "bytes": "not UTF-8"}.items():
        with pytest.raises(OSError, match=rf"^--api-key-file {tmp_path / name} cannot be read \(.*{reason}"):
            settings_for("--api-key-file", str(tmp_path / name))


def test_a_bad_line_of_a_key_file_is_told_by_its_number(tmp_path: Path):
    (tmp_path / "keys").write_text("# ours\ngood\nbad key\n")
    with pytest.raises(
        ValueError, match=rf"The API key in {tmp_path / 'keys'}, line 3, has blanks"
    ) as caught:
        settings_for("--api-key-file", str(tmp_path / "keys"))
    assert "bad key" not in str(caught.value)


def test_other_machines_are_let_in_only_with_a_key_or_when_told():
    with pytest.raises(ValueError, match="--no-key"):
        settings_for("--host", "0.0.0.0")
    assert settings_for("--host", "0.0.0.0", "--no-key").api_keys == ()
    assert settings_for("--host", "0.0.0.0", "--api-key", "k").allowed_hosts == ()
    for host in ("127.0.0.1", "localhost", "::1", "127.1.2.3"):
        assert host in settings_for("--host", host).allowed_hosts


def test_options_become_settings():
    settings = settings_for(
        "--max-batch", "3", "--max-queue", "5", "--max-context", "100", "--max-tokens", "7", "--patience", "1.5",
        "--cors", "https://a.example", "--model-alias", "gpt-3.5-turbo", "--log-prompts",
    )  # fmt: skip
    expected = Settings(
        allowed_hosts=("localhost", "127.0.0.1", "::1", "127.0.0.1"), max_batch=3, max_queue=5, max_context=100,
        max_tokens=7, patience=1.5, cors_origins=("https://a.example",), model_aliases=("gpt-3.5-turbo",),
        log_prompts=True,
    )  # fmt: skip
    assert settings == expected


@pytest.mark.parametrize("origin", ["a.example", "https://a.example/", "https://"])
def test_an_origin_is_scheme_and_host(origin):
    with pytest.raises(ValueError, match="scheme and host"):
        settings_for("--cors", origin)


def test_mistakes_are_told_before_anything_is_loaded(capsys, tmp_path):
    assert main(["serve", str(tmp_path)]) == 1
    assert "config.json" in capsys.readouterr().err
    assert main(["serve", "--host", "0.0.0.0"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_context_beyond_the_model_ends_the_command_with_a_sentence(capsys):
    assert main(["serve", "demo", "--port", "0", "--max-context", "99999"]) == 1
    out, error = capsys.readouterr()
    assert "Listening at http://127.0.0.1:" in out
    assert "99999" in error and "Traceback" not in error


def test_a_device_that_is_too_small_is_told(monkeypatch):
    import torch

    from chatglm.checkpoint import read_checkpoint
    from chatglm.find import find_checkpoint

    def too_large(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("chatglm.server.model.load_model", too_large)
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    with pytest.raises(MemoryError, match="--quantize 4"):
        serve._load(parser.parse_args(["demo"]), read_checkpoint(find_checkpoint("demo")), Settings(), None)


def test_web_opens_the_page_unless_told_not_to(monkeypatch):
    opened = threading.Event()
    seen: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: (seen.append(url), opened.set()))
    monkeypatch.setattr(web, "serve_model", lambda arguments, listening: listening("http://127.0.0.1:1"))
    parser = argparse.ArgumentParser()
    web.add_arguments(parser)
    web.run(parser.parse_args(["--no-browser"]))
    web.run(parser.parse_args([]))
    assert opened.wait(10)
    assert seen == ["http://127.0.0.1:1"]


def test_a_model_is_called_by_its_name(tmp_path):
    (tmp_path / "my-model").mkdir()
    assert model_id("demo") == "demo"
    assert model_id("THUDM/chatglm2-6b") == "THUDM/chatglm2-6b"
    assert (
        model_id(str(tmp_path / "my-model"))
        == model_id(str(tmp_path / "my-model" / "..") + "/my-model/")
        == "my-model"
    )


@pytest.mark.parametrize("name", ["demo", "demo-v1"])
def test_both_families_load_and_answer_as_chat_does(name):
    settings = Settings(max_batch=2)
    with live_server(settings, lambda: load_model(name, settings, device="cpu")) as server:
        wait_until(lambda: server.service.settled.is_set(), 60)
        facts = server.get("/info").json()
        assert facts["model"] == name and facts["family"] == ("chatglm2" if name == "demo" else "chatglm")
        assert facts["parameters"] * 4 <= facts["bytes"] < facts["parameters"] * 5
        model, tokenizer = server.model.engine.model, server.model.tokenizer
        history = [("你好", "你好！")]
        expected, _ = model.chat(tokenizer, "12+30=?", history, do_sample=False)
        answer = server.post("/", {"prompt": "12+30=?", "history": [list(turn) for turn in history]}).json()
        assert answer["response"] == expected
        vector = server.post("/v1/embeddings", {"model": name, "input": "你好"}).json()["data"][0][
            "embedding"
        ]
        assert len(vector) == model.config.hidden_size
        spelled = tokenizer.get_command("[gMASK]")
        assert server.model.text_prompt("[gMASK] <sop> <eop>").count(spelled) == 1
