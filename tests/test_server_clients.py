"""The clients that people have drive the server: OpenAI's, LangChain's, curl, transformers chat."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

pytest.importorskip("fastapi", reason="the server needs the extra 'server'")

from live_server import LiveServer, live_server

from chatglm.server.settings import Settings

HELLO = "Hello! I am the small demo model of the chatglm package. Nice to talk to you."
KEY = "sk-test"
MESSAGES = [{"role": "system", "content": ""}, {"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server():
    with live_server(Settings(api_keys=("other", KEY))) as running:
        yield running


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


# ---- the official client


@pytest.fixture
def client(server: LiveServer):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_openai_chats(client):
    completion = client.chat.completions.create(
        model="demo", messages=MESSAGES, n=2, logprobs=True, top_logprobs=1
    )
    assert [choice.message.content for choice in completion.choices] == [HELLO] * 2
    assert completion.choices[0].finish_reason == "stop"
    assert (
        completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens
    )
    assert completion.choices[0].logprobs.content[0].top_logprobs[0].logprob <= 0


def test_openai_streams(client):
    stream = client.chat.completions.create(
        model="demo", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == HELLO
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens > 10


def test_openai_streams_with_its_helper(client):
    with client.chat.completions.stream(model="demo", messages=MESSAGES) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content == HELLO


def test_openai_parses_answers_into_a_type_of_ours(client):
    pytest.importorskip("llguidance")
    pydantic = pytest.importorskip("pydantic")

    class Trip(pydantic.BaseModel):
        city: Literal["Paris", "北京"]
        days: Literal[1, 2, 3]

    completion = client.chat.completions.parse(model="demo", messages=MESSAGES, response_format=Trip)
    assert isinstance(completion.choices[0].message.parsed, Trip)


def test_openai_async_chats_and_streams(server: LiveServer):
    openai = pytest.importorskip("openai")

    async def both() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
            create = client.chat.completions.create
            whole, stream = await asyncio.gather(
                create(model="demo", messages=MESSAGES), create(model="demo", messages=MESSAGES, stream=True)
            )
            return whole.choices[0].message.content, "".join(
                [c.choices[0].delta.content or "" async for c in stream]
            )

    assert asyncio.run(both()) == (HELLO, HELLO)


def test_openai_completes_embeds_and_lists(client):
    completion = client.completions.create(model="demo", prompt="The capital of", max_tokens=4, logprobs=1)
    assert completion.choices[0].text and len(completion.choices[0].logprobs.tokens) == 4
    embedding = client.embeddings.create(model="demo", input=["你好", "hello"])  # as base64, which it decodes
    assert [len(item.embedding) for item in embedding.data] == [192, 192]
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").owned_by == "chatglm"


def test_openai_raises_its_own_errors_with_our_sentences(client, server: LiveServer):
    import openai

    with pytest.raises(openai.BadRequestError, match="at most 4 are possible") as caught:
        client.chat.completions.create(model="demo", messages=MESSAGES, n=5)
    assert (caught.value.param, caught.value.code) == ("n", "invalid_value")
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.chat.completions.create(model="gpt-4o", messages=MESSAGES)
    with pytest.raises(openai.AuthenticationError, match="not known"):
        client.with_options(api_key="sk-wrong").models.list()
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
        client.chat.completions.create(model="demo", messages=MESSAGES, tools=[tool])


# ---- LangChain


def test_langchain_invokes_and_streams(server: LiveServer):
    langchain_openai = pytest.importorskip("langchain_openai")
    chat = langchain_openai.ChatOpenAI(
        model="demo", base_url=f"{server.url}/v1", api_key=KEY, temperature=0, seed=1, stream_usage=True
    )
    message = chat.invoke([("system", ""), ("human", "hello")])
    assert message.content == HELLO
    assert message.usage_metadata["output_tokens"] > 10
    assert message.response_metadata["finish_reason"] == "stop"
    pieces = list(chat.stream("hello"))
    assert "".join(piece.content for piece in pieces) == HELLO

    async def answer() -> str:
        message = await chat.ainvoke("hello")
        await chat.root_async_client.close()
        return message.content

    assert asyncio.run(answer()) == HELLO


def test_langchain_embeds(server: LiveServer):
    langchain_openai = pytest.importorskip("langchain_openai")
    embeddings = langchain_openai.OpenAIEmbeddings(
        model="demo", base_url=f"{server.url}/v1", api_key=KEY, check_embedding_ctx_length=False
    )
    assert [len(vector) for vector in embeddings.embed_documents(["a", "b"])] == [192, 192]


# ---- curl


def curl(*arguments: str) -> str:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    command = ["curl", "--silent", "--show-error", "--noproxy", "*", "--max-time", "60", *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout


HEADERS = ("-H", "Content-Type: application/json", "-H", f"Authorization: Bearer {KEY}")


def test_curl_chats(server: LiveServer):
    data = json.dumps({"model": "demo", "messages": MESSAGES})
    body = json.loads(curl(f"{server.url}/v1/chat/completions", *HEADERS, "-d", data))
    assert body["choices"][0]["message"]["content"] == HELLO


def test_curl_streams(server: LiveServer):
    data = json.dumps({"model": "demo", "messages": MESSAGES, "stream": True})
    lines = curl("--no-buffer", f"{server.url}/v1/chat/completions", *HEADERS, "-d", data).splitlines()
    assert lines[-2:] == ["data: [DONE]", ""]
    texts = [json.loads(line[6:])["choices"][0]["delta"].get("content", "") for line in lines[:-2:2]]
    assert "".join(texts) == HELLO


def test_curl_as_the_published_readme_has_it(server: LiveServer):
    data = '{"prompt": "你好", "history": []}'
    body = json.loads(curl("-X", "POST", server.url, *HEADERS, "-d", data))
    assert body["status"] == 200 and body["history"] == [["你好", body["response"]]]


def test_curl_gives_its_key_as_a_browser_does(server: LiveServer):
    assert "chat/completions" in curl("--user", f"anybody:{KEY}", f"{server.url}/docs")


# ---- the examples of docs/serving.md

GUIDE = (Path(__file__).resolve().parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
CURLS = [
    line
    for kind, text in BLOCKS
    if kind == "bash"
    for line in text.replace("\\\n", " ").splitlines()
    if "curl" in line
]
EXAMPLES = [text for kind, text in BLOCKS if kind == "python"]


@pytest.fixture(scope="module")
def open_server():
    with live_server() as running:
        yield running


@pytest.mark.parametrize("command", CURLS, ids=lambda command: command.split("8000")[1][:24])
def test_every_curl_of_the_guide_works(open_server: LiveServer, command):
    _, *arguments = shlex.split(command.replace("http://127.0.0.1:8000", open_server.url))
    out = curl("--fail", *arguments)
    assert out


@pytest.mark.parametrize("example", EXAMPLES, ids=["openai", "application"])
def test_every_python_example_of_the_guide_runs(open_server: LiveServer, example, capsys):
    pytest.importorskip("openai")
    exec(compile(example.replace("http://127.0.0.1:8000", open_server.url), "docs/serving.md", "exec"), {})
    assert bool(capsys.readouterr().out) == ("print" in example)


def test_the_guide_names_every_field_and_every_metric(open_server: LiveServer):
    schemas = open_server.get("/openapi.json").json()["components"]["schemas"]
    asked = ("ChatRequest", "CompletionRequest", "EmbeddingRequest", "PublishedRequest")
    fields = {field for name in asked for field in schemas[name]["properties"]}
    assert {field for field in fields if f"`{field}`" not in GUIDE} == set()
    metrics = set(
        re.findall(
            r"^# TYPE (chatglm_\w+) (?:counter|gauge|histogram)", open_server.get("/metrics").text, re.M
        )
    )
    metrics = {name for name in metrics if not name.endswith("_created")}
    assert {name for name in metrics if f"`{name}" not in GUIDE} == set()


# ---- transformers chat


def test_transformers_chat_talks_to_the_server(tmp_path):
    """It cannot send a key, and asks POST /load_model before it begins."""
    program = Path(sys.executable).parent / "transformers"
    if not program.exists():
        pytest.skip("the command of transformers is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {
        "NO_PROXY": "127.0.0.1",
        "HF_HOME": str(tmp_path),
        "COLUMNS": "200",
        "PYTHONIOENCODING": "utf-8",
    }
    with live_server() as server:
        result = subprocess.run(
            [str(program), "chat", "demo", server.url, "max_new_tokens=40"],
            input="hello\n12+30=?\n!exit\n",
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            encoding="utf-8",
            timeout=240,
        )
    missing = re.search(r"ModuleNotFoundError: (.*)", result.stderr)
    if missing:
        pytest.skip(f"transformers chat cannot run here: {missing[1]}")
    assert result.returncode == 0, result.stderr[-2000:]
    assert HELLO in result.stdout
    assert "42" in result.stdout
