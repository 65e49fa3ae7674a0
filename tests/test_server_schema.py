"""Requests that schemathesis makes up from the live OpenAPI description, sound and unsound ones."""

from __future__ import annotations

import contextlib

import pytest

pytest.importorskip("fastapi", reason="the server needs the extra 'server'")
pytest.importorskip("schemathesis", reason="these tests need schemathesis: install the extra 'test'")

import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from live_server import LiveServer, live_server, wait_until
from schemathesis.generation import GenerationMode

from chatglm.server.settings import Settings

# Requests for each route and kind; the seed is fixed.
FEW = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
MANY = settings(FEW, max_examples=100)
AUTHORIZATION = {"Authorization": "Bearer key"}


@pytest.fixture(scope="module")
def server():
    # Short answers: what is made up is seldom worth a long one.
    with live_server(Settings(max_tokens=4, max_context=256, api_keys=("key",))) as running:
        running.client.headers["Authorization"] = "Bearer key"
        yield running


def operations(server: LiveServer) -> list:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers=AUTHORIZATION)
    found = [result.ok() for result in schema.get_all_operations()]
    assert len(found) == len([m for methods in schema.raw_schema["paths"].values() for m in methods])
    return found


def check(operation, mode: GenerationMode, how: settings) -> int:
    """Sends made-up requests for one route; returns how many."""
    sent = 0

    @how
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case) -> None:
        nonlocal sent
        sent += 1
        response = case.call(headers=AUTHORIZATION)
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["message"].endswith(".")

    with contextlib.suppress(Unsatisfiable):  # a route without fields cannot be asked wrongly
        send()
    return sent


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["sound", "unsound"])
@pytest.mark.parametrize("how", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"])
def test_no_request_made_up_from_the_schema_breaks_the_server(server: LiveServer, mode, how):
    sent = {operation.label: check(operation, mode, how) for operation in operations(server)}
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/", "/stream"):
        assert sent[f"POST {path}"] >= how.max_examples, sent


def test_the_server_is_alive_afterwards(server):
    wait_until(server.idle)
    assert server.chat("hello").status_code == 200
    assert server.get("/health").status_code == 200
