"""Copies of a model behind one address: a request whose copy dies, and `chatglm serve --ray` for real."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="replicas need the extra 'ray'")
pytest.importorskip("fastapi", reason="the server needs the extra 'server'")

import httpx
import psutil
from live_server import wait_until
from processes import OBEY_CTRL_C
from server_load import put_under_load

from chatglm.cli import main, serve
from chatglm.engine.answer import Piece
from chatglm.engine.cluster import Cluster, Scale
from chatglm.engine.engine import Facts
from chatglm.engine.replica import Part
from chatglm.engine.replicas import ATTEMPTS, ReplicaEngine
from chatglm.engine.request import EngineClosed, QueueFull, Request, SchemaTooComplex

# Ray's own, at the import of its modules and in the process that uses it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:ray.*"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning:ray.*"),
]

LOAD_SECONDS = float(os.environ.get("CHATGLM_LOAD_SECONDS", "10"))
FACTS = Facts(context=100, bytes=0, most_cache_bytes=0, dtype="float32", device="cpu")
PARTS = [Part(), Part([Piece("On"), Piece("ce")], 2), Part([Piece(" upon")], 3), Part([], 4, 0, "stop")]


# ---- without Ray: a handle that does what it is told


@dataclass
class Copies:
    """Stands in for Ray Serve's handle. Each call plays the next script: parts to send, exceptions to raise."""

    scripts: list[list[Any]]
    asked: list[Request] = field(default_factory=list)
    cancelled: int = 0

    def options(self, stream: bool) -> Copies:
        return self

    @property
    def facts(self) -> Any:
        return _Method(lambda: _Result(FACTS))

    @property
    def answer(self) -> Any:
        return _Method(self._begin)

    @property
    def embed(self) -> Any:
        return _Method(self._embed)

    def _begin(self, request: Request) -> _Parts:
        self.asked.append(request)
        return _Parts(self, self.scripts.pop(0))

    async def _embed(self, prompts: list[list[int]]) -> list[list[float]]:
        step = self.scripts.pop(0)[0]
        if isinstance(step, Exception):
            raise step
        return step


@dataclass
class _Method:
    remote: Callable[..., Any]


@dataclass
class _Result:
    value: Any

    def result(self) -> Any:
        return self.value


@dataclass
class _Parts:
    copies: Copies
    script: list[Any]

    async def __aiter__(self) -> AsyncIterator[Part]:
        for step in self.script:
            await asyncio.sleep(0)
            if isinstance(step, Exception):
                raise step
            if step is None:
                await asyncio.sleep(60)
            yield step

    def cancel(self) -> None:
        self.copies.cancelled += 1


@dataclass
class NoCluster:
    """Stands in for the Cluster that a ReplicaEngine makes."""

    copies: Copies
    closed: bool = False

    def __call__(self, scale: Scale) -> NoCluster:
        return self

    def resources_of_one(self, device: str) -> dict[str, float]:
        return {"num_cpus": 1}

    def deploy(self, *arguments: Any) -> Copies:
        return self.copies

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def engine_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[ReplicaEngine, Copies]]]:
    """Makes an engine whose copies follow scripts."""
    from chatglm.hub.configuration_chatglm import ChatGLMConfig

    engines = []

    def make(*scripts: list[Any], **options: Any) -> tuple[ReplicaEngine, Copies]:
        copies = Copies(list(scripts))
        monkeypatch.setattr("chatglm.engine.replicas.Cluster", NoCluster(copies))
        engines.append(ReplicaEngine("folder", None, ChatGLMConfig(), {}, Scale(), **options))
        return engines[-1], copies

    yield make
    for engine in engines:
        engine.close()


def death() -> Exception:
    from ray.exceptions import ActorDiedError

    return ActorDiedError()


def test_an_answer_comes_in_the_pieces_in_which_it_is_made(engine_of):
    engine, _ = engine_of(PARTS)
    answer = engine.submit(Request([5, 6]))
    assert [piece.text for piece in answer] == ["On", "ce", " upon"]
    assert (answer.text, answer.finish_reason) == ("Once upon", "stop")
    assert (answer.prompt_tokens, answer.completion_tokens) == (2, 4)
    wait_until(lambda: engine.statistics().finished == 1)
    assert engine.statistics().generated_tokens == 4


@pytest.mark.parametrize("said", range(len(PARTS)))
def test_the_answer_of_a_copy_that_dies_is_finished_by_another_and_nothing_is_said_twice(engine_of, said):
    engine, copies = engine_of([*PARTS[:said], death()], PARTS)
    answer = engine.submit(Request([5], temperature=0.8))
    assert [piece.text for piece in answer] == ["On", "ce", " upon"]
    assert answer.finish_reason == "stop"
    assert copies.asked[0] == copies.asked[1]
    assert copies.asked[0].seed is not None  # or the other one would answer otherwise


def test_a_copy_that_is_taken_away_gives_its_answers_to_another(engine_of):
    engine, _ = engine_of([*PARTS[:2], Part(finish_reason="cancelled")], [EngineClosed()], PARTS)
    answer = engine.submit(Request([5]))
    assert "".join(piece.text for piece in answer) == "Once upon"
    assert answer.finish_reason == "stop"


def test_an_answer_that_another_copy_makes_otherwise_fails_and_does_not_become_a_mixture(engine_of):
    other = [Part(), Part([Piece("Long")], 1), Part([], 2, 0, "stop")]
    engine, copies = engine_of([*PARTS[:2], death()], other)
    answer = engine.submit(Request([5]))
    assert "".join(piece.text for piece in answer) == "Once"
    assert answer.finish_reason == "error" and "otherwise" in str(answer.error)
    assert copies.cancelled == 2


def test_a_request_that_kills_every_copy_is_given_up(engine_of):
    engine, copies = engine_of(*[[death()] for _ in range(ATTEMPTS + 1)])
    answer = engine.submit(Request([5]))
    assert list(answer) == []
    assert answer.finish_reason == "error" and len(copies.asked) == ATTEMPTS
    wait_until(lambda: engine.statistics().failed == 1)


def test_what_goes_wrong_in_a_copy_is_told(engine_of):
    engine, copies = engine_of([Part(), Part(finish_reason="error", error="ValueError: no number")])
    answer = engine.submit(Request([5]))
    assert list(answer) == []
    assert answer.finish_reason == "error" and "no number" in str(answer.error)
    assert len(copies.asked) == 1  # it would go wrong elsewhere too


def test_a_schema_that_a_copy_could_not_follow_is_the_fault_of_the_request(engine_of):
    engine, copies = engine_of([Part(finish_reason="error", error="too complex", schema_failed=True)])
    answer = engine.submit(Request([5], schema='{"$ref": "#"}'))
    assert list(answer) == []
    assert isinstance(answer.error, SchemaTooComplex) and str(answer.error) == "too complex"
    assert len(copies.asked) == 1


@pytest.mark.parametrize("schema", [{"$ref": "#"}, {"type": "string", "pattern": "^(a?){5000}a{5000}$"}])
def test_a_copy_tells_of_a_schema_that_it_could_not_follow(schema):
    import chatglm
    from chatglm.engine.engine import Engine
    from chatglm.engine.replica import Replica

    async def last_part() -> Part:
        asked = Request(replica.engine.tokenizer.encode_chat("hello"), schema=json.dumps(schema))
        return [part async for part in replica.answer(asked)][-1]

    replica = Replica.__new__(Replica)  # without a process of its own
    replica.engine = Engine(*chatglm.load("demo", device="cpu"))
    part = asyncio.run(last_part())
    replica.engine.close()
    assert (part.finish_reason, part.schema_failed) == ("error", True)
    assert part.error.startswith("The JSON schema is")


def test_whoever_cancels_ends_the_work_of_the_copy(engine_of):
    engine, copies = engine_of([*PARTS[:2], None])
    answer = engine.submit(Request([5]))
    pieces = iter(answer)
    assert next(pieces).text == "On"
    answer.cancel()
    assert [piece.text for piece in pieces] == ["ce"]
    assert answer.finish_reason == "cancelled" and copies.cancelled == 1


def test_more_than_the_places_and_the_queue_hold_is_refused_until_there_is_room(engine_of):
    engine, copies = engine_of([None], [None], [None], PARTS, max_batch=1, max_queue=2)
    answers = [engine.submit(Request([5])) for _ in range(3)]
    wait_until(lambda: len(copies.asked) == 3)
    with pytest.raises(QueueFull) as refused:
        engine.submit(Request([5]))
    assert refused.value.retry_after >= 1
    answers[0].cancel()
    wait_until(lambda: engine.statistics().cancelled == 1)
    assert "".join(piece.text for piece in engine.submit(Request([5]))) == "Once upon"


def test_what_no_copy_could_answer_is_refused_before_it_is_sent(engine_of):
    engine, copies = engine_of()
    for prompt in ([], [10**6], [5] * 100):
        with pytest.raises(ValueError):
            engine.submit(Request(prompt))
    assert copies.asked == []


def test_embeddings_are_computed_by_another_copy_where_one_dies(engine_of):
    engine, _ = engine_of([death()], [[[1.0, 2.0]]])
    assert engine.embed([[5]]).result(10) == [[1.0, 2.0]]


def test_a_closed_engine_lets_answers_end_and_takes_no_more(engine_of):
    engine, _ = engine_of([Part(), None])
    answer = engine.submit(Request([5]))
    threading.Timer(0.2, lambda: engine._call(engine._cancel, answer)).start()
    engine.close(patience=30)
    assert answer.finish_reason == "cancelled"
    assert engine._cluster.closed
    with pytest.raises(EngineClosed):
        engine.submit(Request([5]))


# ---- the command line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--replicas", "2"], "belong to --ray"),
        (["--ray-address", "auto"], "belong to --ray"),
        (["--ray", "--replicas", "0"], "'0' is neither"),
        (["--ray", "--replicas", "4-2"], "'4-2' is neither"),
        (["--ray", "--replicas", "many"], "'many' is neither"),
    ],
)
def test_options_that_make_no_sense_are_told_before_anything_is_loaded(words, message, capsys):
    try:
        code = main(["serve", "demo", *words])
    except SystemExit as left:  # argparse's way
        code = left.code
    assert code
    assert message in capsys.readouterr().err


def test_without_ray_the_message_names_the_extra(monkeypatch):
    from chatglm.engine.cluster import import_ray

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(OSError, match="extra 'ray'"):
        import_ray(local=False)


def cluster_of(nodes: list[dict[str, float]], **scale: Any) -> Cluster:
    """A cluster with these resources, of which nothing was started."""

    class FakeRay:
        @staticmethod
        def nodes() -> list[dict[str, Any]]:
            return [{"Alive": True, "Resources": node} for node in nodes] + [
                {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
            ]

    cluster = Cluster.__new__(Cluster)
    cluster.scale, cluster._ray = Scale(**scale), FakeRay
    return cluster


@pytest.mark.parametrize(
    ("nodes", "scale", "device", "resources"),
    [
        ([{"CPU": 8.0}], {"least": 2, "most": 2}, "", {"num_cpus": 4}),  # this machine is shared
        ([{"CPU": 2.0}], {"least": 4, "most": 4}, "", {"num_cpus": 0.5}),
        ([{"CPU": 8.0}, {"CPU": 6.0}], {"least": 2, "most": 2, "address": "a"}, "", {"num_cpus": 6}),
        ([{"CPU": 8.0, "GPU": 2.0}], {"least": 2, "most": 2}, "", {"num_gpus": 1, "num_cpus": 1}),
        ([{"CPU": 8.0, "GPU": 2.0}], {"least": 2, "most": 2}, "cpu", {"num_cpus": 4}),
    ],
)
def test_a_copy_has_a_card_or_its_share_of_the_processor(nodes, scale, device, resources):
    assert cluster_of(nodes, **scale).resources_of_one(device) == resources


def test_more_copies_than_there_is_room_for_are_refused():
    with pytest.raises(ValueError, match="3 replicas need a card each, but Ray has 2"):
        cluster_of([{"CPU": 8.0, "GPU": 2.0}], least=3, most=3).resources_of_one("")
    with pytest.raises(ValueError, match="2 replicas need a machine each, but Ray has 1"):
        cluster_of([{"CPU": 8.0}], least=2, most=2, address="a").resources_of_one("")


def test_an_address_at_which_there_is_no_ray_is_told_at_once():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(OSError, match=f"Ray cannot be reached at '{address}'"):
        Cluster(Scale(address=address))


def test_bounds_of_the_number_of_copies():
    assert serve.replicas("3") == (3, 3)
    assert serve.replicas("1-4") == (1, 4)


# ---- with Ray: a real server with two copies of the demo model


@dataclass
class RayServer:
    """`chatglm serve demo --ray --replicas 2` in a process of its own."""

    url: str
    process: subprocess.Popen
    client: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=120, trust_env=False))

    def get(self, path: str) -> httpx.Response:
        return self.client.get(self.url + path)

    def chat(self, content: str, **fields: Any) -> httpx.Response:
        body = {"model": "demo", "messages": [{"role": "user", "content": content}]} | fields
        return self.client.post(self.url + "/v1/chat/completions", json=body)

    def gauge(self, name: str) -> int:
        return int(float(re.search(rf"(?m)^chatglm_{name} (\S+)$", self.get("/metrics").text)[1]))

    def waiting(self) -> int:
        return self.gauge("waiting")

    def idle(self) -> bool:
        return self.gauge("running") == self.gauge("waiting") == 0

    def memory(self) -> int:
        return psutil.Process(self.process.pid).memory_info().rss

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def copies(self) -> list[psutil.Process]:
        return [process for process in self.descendants() if "ServeReplica" in " ".join(process.cmdline())]


BATCH, QUEUE = 4, 12
COMMAND = [sys.executable, "-m", "chatglm", "serve", "demo", "--ray", "--replicas", "2", "--port", "0",
           "--max-batch", str(BATCH), "--max-queue", str(QUEUE)]  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayServer]:
    folder = tmp_path_factory.mktemp("ray")
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            COMMAND,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            preexec_fn=OBEY_CTRL_C,
        )
    try:
        wait_until(lambda: "is ready" in log.read_text() or process.poll() is not None, seconds=300)
        assert process.poll() is None, log.read_text()
        url = re.search(r"Listening at (\S+)", log.read_text())[1]
        running = RayServer(url, process)
        yield running
        running.client.close()
    finally:
        process.kill()
        process.wait(30)


@pytest.mark.slow
def test_two_copies_answer_as_one_model_does(server):
    from live_server import demo

    model, tokenizer = demo()
    expected, _ = model.chat(tokenizer, "What is the capital of France?", [], do_sample=False)
    answer = server.chat("What is the capital of France?", temperature=0).json()
    assert answer["choices"][0]["message"]["content"] == expected
    assert answer["usage"]["completion_tokens"] > 1
    sampled = [
        server.chat("写一段代码", temperature=1.5, seed=7).json()["choices"][0]["message"]["content"]
        for _ in range(4)
    ]
    assert len(set(sampled)) == 1
    json_answer = server.chat("List three fruits", response_format={"type": "json_object"}, max_tokens=60)
    assert json_answer.status_code == 200
    vectors = server.client.post(server.url + "/v1/embeddings", json={"model": "demo", "input": ["a", "b"]})
    assert len(vectors.json()["data"]) == 2
    assert len(server.copies()) == 2


@pytest.mark.slow
def test_under_load_no_answer_is_lost_though_a_copy_is_killed(server):
    victim = server.copies()[0]
    killer = threading.Timer(LOAD_SECONDS / 3, victim.kill)
    killer.start()
    load = put_under_load(server, clients=32, seconds=LOAD_SECONDS, places=2 * BATCH + QUEUE)
    killer.join()
    assert load.outcomes["refused"] > 0
    assert not victim.is_running()
    wait_until(lambda: len(server.copies()) == 2, seconds=120)  # Ray starts another
    assert server.gauge("failed_total") == 0


@pytest.mark.slow
def test_a_stream_goes_on_when_its_copy_is_killed(server):
    body = {"model": "demo", "stream": True, "temperature": 1.2, "max_tokens": 400,
            "logit_bias": {"2": -100}, "messages": [{"role": "user", "content": "hello"}]}  # fmt: skip
    whole = server.chat(
        "hello", **{k: v for k, v in body.items() if k not in ("stream", "messages", "model")}, seed=3
    )
    text, killed = "", False
    with server.client.stream(
        "POST", server.url + "/v1/chat/completions", json=body | {"seed": 3}
    ) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
            if len(text) > 100 and not killed:
                busiest = max(server.copies(), key=lambda process: process.cpu_percent(0.2))
                busiest.kill()
                killed = True
    assert killed
    assert text == whole.json()["choices"][0]["message"]["content"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks at the sockets of processes as Linux tells them")
def test_ray_listens_on_loopback_and_lets_nobody_in_who_has_no_token(server):
    import grpc

    reachable = set()
    for process in [psutil.Process(server.process.pid), *server.descendants()]:
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                ip = connection.laddr.ip.removeprefix("::ffff:")
                if not ip.startswith("127.") and ip != "::1":
                    reachable.add((process.pid, connection.laddr.port))
    copies = {process.pid for process in server.copies()}
    assert {pid for pid, _ in reachable} <= copies  # Ray Serve opens one port for each on every address
    for _, port in reachable:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
            with pytest.raises(grpc.RpcError) as refused:
                call(b"", timeout=20)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.slow
def test_ctrl_c_lets_an_answer_end_and_leaves_no_process_and_no_file(server):
    started = server.descendants()
    folders = {
        Path(word.partition("=")[2]).parent
        for process in started
        for word in process.cmdline()
        if word.startswith("--session-dir=") or word.startswith("--session_dir=")
    }
    assert folders and all(folder.exists() for folder in folders)
    answers: list[httpx.Response] = []
    asking = threading.Thread(
        target=lambda: answers.append(server.chat("hello", logit_bias={"2": -100}, max_tokens=200))
    )
    asking.start()
    wait_until(lambda: server.gauge("running") == 1)
    server.process.send_signal(signal.SIGINT)
    asking.join(60)
    assert answers[0].status_code == 200 and answers[0].json()["usage"]["completion_tokens"] == 200
    assert server.process.wait(60) == 130  # as shells have it for Ctrl-C
    wait_until(lambda: not any(process.is_running() for process in started))
    assert not any(folder.exists() for folder in folders)
