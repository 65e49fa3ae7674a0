"""What people with bad intentions send: the server refuses it, takes no harm, and answers the next request."""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("fastapi", reason="the server needs the extra 'server'")

import httpx
from live_server import LiveServer, live_server, received, wait_until
from starlette.routing import Route

from chatglm.server.guard import OPEN_PATHS, given_key, host_name
from chatglm.server.settings import Settings

CHAT = "/v1/chat/completions"
KEYS = ("first-key", "second-key")
SHORT = Settings(api_keys=KEYS, header_seconds=0.5, body_seconds=0.5, max_body_bytes=100_000)
KEY = {"Authorization": f"Bearer {KEYS[1]}"}


@pytest.fixture(scope="module")
def server():
    with live_server(SHORT) as running:
        running.client.headers.update(KEY)
        yield running


@pytest.fixture(autouse=True)
def _alive_afterwards(server: LiveServer):
    yield
    wait_until(server.idle)
    response = server.chat("hello", max_tokens=2)
    assert response.status_code == 200
    assert response.json()["usage"]["completion_tokens"] == 2


def refused(response: httpx.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    return response.json()["error"]


def head(answer: bytes) -> tuple[int, dict]:
    """Status and error of a raw answer."""
    top, _, body = answer.partition(b"\r\n\r\n")
    return int(top.split()[1]), json.loads(body)["error"]


def request(body: bytes = b"", *headers: str, path: str = CHAT, length: int | None = None) -> bytes:
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: 127.0.0.1",
        f"Authorization: Bearer {KEYS[0]}",
        "Connection: close",
    ]
    lines += ["Content-Type: application/json", *headers]
    lines += [f"Content-Length: {len(body) if length is None else length}"] if length != -1 else []
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


# ---- keys


def routes(server: LiveServer) -> list[tuple[str, str]]:
    def all_routes(some) -> list[Route]:
        found = []
        for route in some:
            inner = getattr(route, "routes", None) or getattr(
                getattr(route, "original_router", None), "routes", None
            )
            found += all_routes(inner) if inner else [route]
        return found

    app = server.server.config.app
    return [
        (method, route.path.replace("{name:path}", "demo"))
        for route in all_routes(app.routes)
        for method in sorted(route.methods)
    ]


@pytest.mark.parametrize(
    "authorization", [None, "Bearer wrong", "Bearer", "Basic !!!", "first-key", "Bearer first-ke"]
)
def test_every_route_but_health_wants_a_key(server: LiveServer, authorization):
    listed = routes(server)
    paths = {path for _, path in listed}
    assert {
        CHAT,
        "/v1/completions",
        "/v1/embeddings",
        "/v1/models",
        "/",
        "/stream",
        "/metrics",
        "/docs",
        "/info",
    } <= paths
    assert {"/static/demo", "/openapi.json", "/load_model", "/health"} <= paths
    headers = {"Authorization": authorization} if authorization is not None else {}
    with httpx.Client(base_url=server.url, trust_env=False) as client:
        for method, path in [*listed, ("GET", "/nothing"), ("OPTIONS", CHAT), ("TRACE", "/"), ("POST", "//")]:
            response = client.request(method, path, headers=headers)
            if path in OPEN_PATHS:
                assert response.status_code == 200, path
            else:
                assert response.status_code == 401, (method, path)
                if method != "HEAD":
                    refused(response, 401)


@pytest.mark.parametrize("key", KEYS)
def test_every_key_opens_as_bearer_and_as_password(server: LiveServer, key):
    with httpx.Client(base_url=server.url, trust_env=False) as client:
        assert client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
        assert client.get("/v1/models", headers={"Authorization": f"bearer  {key}"}).status_code == 200
        assert client.get("/v1/models", auth=("anybody", key)).status_code == 200
        assert client.get("/v1/models", auth=(key, "")).status_code == 401


def test_a_browser_is_asked_for_the_key_and_a_program_is_told(server: LiveServer):
    with httpx.Client(base_url=server.url, trust_env=False) as client:
        page = client.get("/", headers={"Accept": "text/html,*/*"})
        assert page.headers["www-authenticate"].startswith("Basic")
        assert client.post(CHAT).headers["www-authenticate"].startswith("Bearer")


def test_all_keys_are_compared_in_constant_time(monkeypatch, server: LiveServer):
    import hmac

    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(b) or real(a, b))
    assert server.get("/v1/models", headers={"Authorization": f"Bearer {KEYS[0]}"}).status_code == 200
    assert compared == [key.encode() for key in KEYS]


@pytest.mark.parametrize(
    ("header", "key"),
    [("Bearer a", b"a"), ("BEARER  a ", b"a"), ("Basic eDphOmI=", b"a:b"), ("Basic eA==", b""), ("Basic é", None),
     ("Digest a", None), ("", None)],
)  # fmt: skip
def test_the_key_of_a_header(header, key):
    assert given_key(header) == key


# ---- sizes and times


def test_a_body_of_100_mb_that_is_announced_is_refused_before_it_is_sent(server: LiveServer):
    status, error = head(server.raw(request(length=100_000_000)))
    assert (status, error["code"]) == (413, "body_too_large")


def test_a_body_of_100_mb_in_chunks_is_refused_at_its_bound():
    sent = 0

    def chunks():
        nonlocal sent
        for _ in range(1600):
            sent += 65536
            yield b" " * 65536

    with live_server() as server:
        headers = {"Content-Type": "application/json"}
        refused(server.client.post(server.url + CHAT, content=chunks(), headers=headers), 413)
    assert sent == 1600 * 65536  # the rest is dropped as it comes, so that the client hears why


def test_the_bound_of_the_body_is_exact(server: LiveServer):
    def body(size: int) -> bytes:
        text = json.dumps(
            {"model": "demo", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
        )
        return text.encode().ljust(size)

    headers = {"Content-Type": "application/json"}
    most = SHORT.max_body_bytes
    assert server.client.post(server.url + CHAT, content=body(most), headers=headers).status_code == 200
    refused(server.client.post(server.url + CHAT, content=body(most + 1), headers=headers), 413)


@pytest.mark.parametrize("name", ["X-Long", "Authorization", "Cookie"])
def test_a_header_of_1_mb_is_refused(server: LiveServer, name):
    with socket.create_connection(server.address, timeout=10) as connection:
        try:
            connection.sendall(b"GET /health HTTP/1.1\r\n" + f"{name}: ".encode() + b"a" * 1_000_000)
        except ConnectionError:
            return  # refused before all of it was sent
        answer = received(connection)
    assert not answer or head(answer)[0] == 400


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/health", "X-Long: " + "a" * 32_000, 200),
        ("/health", "X-Long: " + "a" * 40_000, 400),
        ("/health", "\r\n".join(f"X-{i}: a" for i in range(5000)), 400),
        ("/health?" + "a" * 40_000, "X: a", 400),
        ("/" + "a" * 40_000, "X: a", 400),
    ],
    ids=["below", "long", "many", "query", "path"],
)
def test_headers_beyond_the_bound_are_refused_also_where_they_arrive_in_one_piece(
    server: LiveServer, path, headers, status
):
    lines = f"GET {path} HTTP/1.1", "Host: 127.0.0.1", "Connection: close", headers
    answer = server.raw("\r\n".join(lines).encode() + b"\r\n\r\n")
    assert int(answer.split()[1]) == status
    if status == 400:
        assert head(answer)[1]["message"].endswith("more than 32,768 bytes; send less.")


def test_a_path_of_1_mb_is_refused(server: LiveServer):
    try:
        answer = server.raw(b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\n\r\n")
    except ConnectionError:
        return
    assert not answer or head(answer)[0] == 400


def test_a_client_that_sends_its_headers_slowly_is_cut_off(server: LiveServer):
    with socket.create_connection(server.address, timeout=10) as connection:
        began = time.monotonic()
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n")
        assert received(connection) == b""
        assert time.monotonic() - began >= 0.4


def test_a_client_that_drips_its_headers_is_cut_off(server: LiveServer):
    with socket.create_connection(server.address, timeout=10) as connection, pytest.raises(ConnectionError):
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        for _ in range(200):
            connection.sendall(b"a: b\r\n")
            time.sleep(0.05)


def test_a_client_that_sends_its_body_slowly_is_told_and_cut_off(server: LiveServer):
    status, error = head(server.raw(request(b'{"model":', length=1000)))
    assert (status, error["code"]) == (408, "body_too_slow")


def test_a_body_that_breaks_off_harms_nobody(server: LiveServer):
    for _ in range(20):
        with socket.create_connection(server.address, timeout=10) as connection:
            connection.sendall(request(b'{"model": "demo"', length=1000))


def test_connections_beyond_the_bound_are_refused():
    with live_server(Settings(max_connections=5)) as server:
        idle = [socket.create_connection(server.address, timeout=10) for _ in range(8)]
        try:
            wait_until(lambda: len(server.server.server_state.connections) >= 8)
            assert server.get("/health").status_code == 503
        finally:
            for connection in idle:
                connection.close()
        wait_until(lambda: len(server.server.server_state.connections) <= 1)
        assert server.get("/health").status_code == 200


# ---- numbers that multiply


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2**31},
        {"n": 10**400},
        {"max_tokens": 2**63},
        {"max_tokens": 10**400},
        {"stop": ["x"] * 10_000},
        {"stop": ["x" * 90_000]},
        {"logit_bias": {str(i): 1 for i in range(5000)}},
        {"logit_bias": {"9" * 5000: 1}},
        {"top_logprobs": 10**9, "logprobs": True},
        {"messages": []},
        {"messages": [{"role": "user", "content": ""}]},
        {"messages": [{"role": "user", "content": "a"}] * 1500},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 1500}]},
        {"tools": [{}] * 1000},
        {"tools": {"type": ["string"], "pattern": "(a+)+$"}},
        {"best_of": 10**9},
        {"metadata": {str(i): "x" for i in range(3000)}, "n": 9},
        {"generation_config": "[" * 9000},
        {"model": "m" * 60_000},
        {"model": "../../../etc/passwd"},
        {"seed": 10**40},
        {"temperature": 10**40},
    ],
    ids=lambda fields: f"{next(iter(fields))}-{str(next(iter(fields.values())))[:12]}",
)
def test_huge_numbers_lists_and_strings_are_refused(server: LiveServer, fields):
    body = {"model": "demo", "messages": [{"role": "user", "content": "hello"}]} | fields
    response = server.post(CHAT, body)
    assert response.status_code in (400, 404)
    assert len(response.text) < 1000, "the error repeats what was sent"


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-38])
def test_the_smallest_temperatures_are_answered(server: LiveServer, temperature):
    response = server.chat("hello", temperature=temperature, top_p=1e-300, max_tokens=4)
    assert response.status_code == 200


def test_a_context_full_of_text_is_refused_before_the_model_sees_it(server: LiveServer):
    before = server.model.engine.statistics().prompt_tokens
    assert refused(server.chat("字" * 30_000), 400)["code"] == "context_length_exceeded"
    assert refused(server.post("/", {"prompt": "字" * 30_000}), 400)["code"] == "context_length_exceeded"
    assert server.model.engine.statistics().prompt_tokens == before


# ---- JSON schemas that are taken for sound, and turn out not to be

ENDLESS = {"$ref": "#"}
TOO_COMPLEX = {"type": "string", "pattern": "^(a?){5000}a{5000}$"}


def with_schema(schema: dict) -> dict:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}}


@pytest.fixture
def logged(caplog):
    """What the log of the server holds."""
    caplog.set_level("DEBUG", "chatglm.server")
    return lambda: caplog.text


@pytest.mark.parametrize(("schema", "kind"), [(ENDLESS, "NoExtensionBias"), (TOO_COMPLEX, "LexerTooComplex")])
def test_a_schema_that_cannot_be_followed_is_the_fault_of_who_sent_it(
    server: LiveServer, schema, kind, logged, capfd
):
    pytest.importorskip("llguidance")
    error = refused(server.chat("secret question", n=2, **with_schema(schema)), 400)
    assert error["param"] == "response_format.json_schema.schema"
    assert kind in error["message"] and error["message"].endswith("simplify it.")
    told = error["message"] + logged() + capfd.readouterr().err
    for secret in ("$ref", "pattern", "5000", "secret", "Traceback", "Tokens:"):
        assert secret not in told


def test_a_schema_that_is_endless_is_refused_before_the_stream_begins(server: LiveServer):
    pytest.importorskip("llguidance")
    refused(server.chat("hello", stream=True, **with_schema(ENDLESS)), 400)


def test_a_stream_whose_schema_becomes_too_complex_says_so_and_ends(server: LiveServer, logged):
    pytest.importorskip("llguidance")
    body = {"model": "demo", "messages": [{"role": "user", "content": "hello"}]} | with_schema(TOO_COMPLEX)
    *_, last = server.chunks(CHAT, body)
    assert (last["error"]["type"], last["error"]["code"]) == ("invalid_request_error", "invalid_value")
    assert "LexerTooComplex" in last["error"]["message"]
    assert "Traceback" not in logged()


def test_a_schema_that_fails_leaves_the_answers_beside_it_alone(server: LiveServer):
    pytest.importorskip("llguidance")
    alone = server.chat("hello", max_tokens=20).json()["choices"][0]["message"]
    with ThreadPoolExecutor(9) as pool:
        beside = [pool.submit(server.chat, "hello", max_tokens=20) for _ in range(5)]
        schemas = [with_schema(schema) for schema in (ENDLESS, TOO_COMPLEX)] * 2
        failing = [pool.submit(server.chat, "hello", **schema) for schema in schemas]
        assert {future.result().status_code for future in failing} == {400}
        assert all(future.result().json()["choices"][0]["message"] == alone for future in beside)


# ---- bytes that are no request


def raw_json(server: LiveServer, body: bytes) -> dict:
    status, error = head(server.raw(request(body)))
    assert status == 400
    return error


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[" * 50_000,
        b'{"a":' * 10_000,
        b'{"messages":' + b"[" * 1000 + b"]" * 1000 + b"}",
        b'{"model": "\xff\xfe"}',
        b'{"model": "\xed\xa0\x80"}',
        b'{"model": "\\ud800"}',
        b'{"model": "\\udc00\\ud800"}',
        b'{"model": "a\x00b"}',
        b'{"temperature": NaN}',
        b'{"temperature": Infinity}',
        b'{"temperature": -Infinity}',
        b'{"n": ' + b"9" * 50_000 + b"}",
        b"\xef\xbb\xbf{}",
        b"\x1f\x8b\x08",
        b"null",
        b"5",
        b'"text"',
        b"[]",
        b'{"model": "demo"} {"model": "demo"}',
        '{"model": "demo"}'.encode("utf-16"),
    ],
    ids=lambda body: repr(body[:16]),
)
def test_what_is_no_json_object_is_refused(server: LiveServer, body):
    raw_json(server, body)


@pytest.mark.parametrize("number", [b"1e400", b"-1e400", b"1e999999999"])
def test_numbers_beyond_all_bounds_are_refused(server: LiveServer, number):
    body = (
        b'{"model": "demo", "messages": [{"role": "user", "content": "a"}], "temperature": ' + number + b"}"
    )
    assert raw_json(server, body)["param"] == "temperature"


@pytest.mark.parametrize("path", ["/", "/stream", "/v1/completions", "/v1/embeddings"])
def test_lone_surrogates_and_bad_utf8_are_refused_everywhere(server: LiveServer, path):
    for text in (b"\\ud800", b"\xff", b"\xc3"):
        body = b'{"model": "demo", "input": "%s", "prompt": "%s"}' % (text, text)
        assert head(server.raw(request(body, path=path)))[0] == 400


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""]
)
def test_only_json_is_taken_so_that_no_other_site_can_write_here(server: LiveServer, kind):
    content = b'{"prompt": "hello"}'
    response = server.client.post(server.url + "/", content=content, headers={"Content-Type": kind})
    assert refused(response, 415)["code"] == "not_json"


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\r\n\r\n\r\n",
        b"GET /health\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n",
    ],
    ids=["tls", "no-host", "empty", "old", "length", "lengths", "chunk", "path", "null"],
)
def test_what_is_no_http_is_refused_or_cut_off(server: LiveServer, data):
    answer = server.raw(data)
    assert not answer or 400 <= int(answer.split()[1]) < 500


@pytest.mark.parametrize(
    "value", ["bytes=0-" + ",0-" * 5000, "bytes=" + ",".join(f"{i}-" for i in range(2000)), "bytes=-1"]
)
def test_range_headers_are_not_followed(server: LiveServer, value):
    response = server.get("/static/docs.css", headers={"Range": value})
    assert response.status_code == 200 and "content-range" not in response.headers


@pytest.mark.parametrize(
    "path", ["/static/../app.py", "/static/%2e%2e/app.py", "/static//etc/passwd", "/static/..%2fapp.py"]
)
def test_no_path_leads_out_of_the_page(server: LiveServer, path):
    answer = server.raw(
        f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nAuthorization: Bearer {KEYS[0]}\r\n\r\n".encode()
    )
    assert head(answer)[0] == 404


# ---- other sites


def test_other_sites_pages_may_not_read_unless_they_are_named(server: LiveServer):
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    response = server.client.options(server.url + CHAT, headers=asked)
    assert "access-control-allow-origin" not in response.headers
    with live_server(Settings(cors_origins=("https://chat.example",), api_keys=("k",))) as open_to_one:
        preflight = open_to_one.client.options(
            open_to_one.url + CHAT,
            headers={"Origin": "https://chat.example", "Access-Control-Request-Method": "POST",
                     "Access-Control-Request-Headers": "authorization,content-type"},
        )  # fmt: skip
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://chat.example"
        unknown = open_to_one.get("/v1/models", headers={"Origin": "https://evil.example"})
        assert unknown.status_code == 401 and "access-control-allow-origin" not in unknown.headers
        known = open_to_one.get("/v1/models", headers={"Origin": "https://chat.example"})
        assert known.headers["access-control-allow-origin"] == "https://chat.example"
        assert "access-control-allow-credentials" not in known.headers


def test_without_a_key_another_name_for_this_machine_is_refused():
    with live_server(Settings(allowed_hosts=("127.0.0.1", "localhost"))) as server:
        assert server.get("/health").status_code == 200
        assert server.get("/health", headers={"Host": "LOCALHOST:80"}).status_code == 200
        for host in ("evil.example", "127.0.0.1.evil.example", ""):
            assert refused(server.get("/v1/models", headers={"Host": host}), 400)["code"] == "host"


@pytest.mark.parametrize(
    ("header", "name"),
    [("a.B:80", "a.b"), ("[::1]:80", "::1"), ("[::1]", "::1"), ("", ""), ("localhost", "localhost")],
)
def test_the_name_in_a_host_header(header, name):
    assert host_name(header) == name
