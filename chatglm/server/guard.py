"""Stands in front of all routes: who may come in, and how much they may bring.

    Observer    counts and logs every request, adds the headers that protect the page, and turns a failure into a 500
    Guard       the size of the headers, the Host header, the API key, the type and size of the body

Pure ASGI, so that a body is refused before it is read, and streams pass through as they are.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import ipaddress
import logging
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chatglm.server.errors import INTERNAL, ApiError
from chatglm.server.metrics import Metrics
from chatglm.server.settings import Settings

logger = logging.getLogger("chatglm.server")

OPEN_PATHS = ("/health", "/v1/health")  # for whoever watches over the server, with and without a key
OFTEN_ASKED = (*OPEN_PATHS, "/metrics")  # by programs, every few seconds
BODIES = ("POST", "PUT", "PATCH", "DELETE")
METHODS = ("GET", "HEAD", "OPTIONS", *BODIES)  # that metrics tell apart
# Nothing but the server's own files, no scripts inside the page, no page around this one.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SECURITY_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """Refuses what may not come in, with a sentence in OpenAI's shape."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.settings = app, settings
        self._keys = [key.encode() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check_size(scope)
            headers = Headers(scope=scope)
            self._check_host(headers)
            self._check_key(scope["path"], headers)
            if scope["method"] in BODIES:
                receive = await self._with_body(headers, receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _check_size(self, scope: Scope) -> None:
        """uvicorn's own bound does not see a request that arrives in one piece."""
        most = self.settings.max_header_bytes
        line = len(scope["method"]) + len(scope.get("raw_path") or b"") + len(scope["query_string"])
        if line + sum(len(name) + len(value) + 4 for name, value in scope["headers"]) > most:
            message = f"The request line and headers have more than {most:,} bytes; send less."
            close = {"Connection": "close"}
            raise ApiError(400, message, code="headers_too_large", headers=close)

    def _check_host(self, headers: Headers) -> None:
        """Without a key, a web site could let its own name point here and read everything (DNS rebinding)."""
        allowed = self.settings.allowed_hosts
        host = host_name(headers.get("host", ""))
        if allowed and host not in allowed:
            raise ApiError(
                400,
                "The Host header names another machine; use an address that the server was told.",
                code="host",
            )

    def _check_key(self, path: str, headers: Headers) -> None:
        if not self._keys or path in OPEN_PATHS:
            return
        given = given_key(headers.get("authorization", ""))
        if given is None:
            message = "This server wants an API key: send the header Authorization: Bearer KEY."
            raise ApiError(401, message, code="missing_api_key", headers=_challenge(headers))
        # All keys are compared, each in the same time: the clock tells nothing of them.
        if sum(hmac.compare_digest(given, key) for key in self._keys) == 0:
            raise ApiError(
                401, "This API key is not known here.", code="invalid_api_key", headers=_challenge(headers)
            )

    async def _with_body(self, headers: Headers, receive: Receive) -> Receive:
        """Reads the body up to its bound; returns a `receive` that gives it out."""
        most = self.settings.max_body_bytes
        length = headers.get("content-length", "0")
        too_large = ApiError(413, f"The body has more than {most:,} bytes; send less.", code="body_too_large")
        if length.isdigit() and int(length[:20]) > most:
            raise too_large
        if length != "0" or "transfer-encoding" in headers:
            _check_type(headers)
        try:
            body = await asyncio.wait_for(_read(receive, most), self.settings.body_seconds)
        except asyncio.TimeoutError:
            message = f"The body did not arrive within {self.settings.body_seconds:g} seconds."
            close = {"Connection": "close"}
            raise ApiError(408, message, code="body_too_slow", headers=close) from None
        if body is None:
            raise too_large
        return _replay(body, receive)


def _check_type(headers: Headers) -> None:
    """JSON only. Other sites' pages cannot send this type without asking, and so cannot write here."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = f"The body has the type {kind[:60] or 'unknown'!r}; send JSON with Content-Type: application/json."
        raise ApiError(415, message, code="not_json")


async def _read(receive: Receive, most: int) -> bytes | None:
    """The whole body, or None as soon as it has more than `most` bytes."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return bytes(body)
        body += message.get("body", b"")
        if len(body) > most:
            return None
        if not message.get("more_body"):
            return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives out the body once, and then what else there is to receive: that the client has gone."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


def given_key(authorization: str) -> bytes | None:
    """The key of `Bearer KEY`, or of a browser that was asked: `Basic base64(anything:KEY)`."""
    kind, _, value = authorization.strip().partition(" ")
    value = value.strip()
    if kind.lower() == "bearer" and value:
        return value.encode()
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return None
    return None


def _challenge(headers: Headers) -> dict[str, str]:
    """Browsers that open the page ask for the key as a password; programs are told what they know."""
    if "text/html" in headers.get("accept", ""):
        return {"WWW-Authenticate": 'Basic realm="chatglm: the API key is the password", charset="UTF-8"'}
    return {"WWW-Authenticate": 'Bearer realm="chatglm"'}


def host_name(host: str) -> str:
    """The name in a Host header: lower case, without port and brackets."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


class Observer:
    """Counts and logs every request, without its query and body; whatever fails below becomes a 500."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, began = 0, time.monotonic()

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(raw=message.setdefault("headers", []))
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception:
            logger.exception("%s failed.", _line(scope))
            if status:
                raise  # the answer has begun: the connection is cut, which tells the client
            await ApiError(500, INTERNAL, code="internal_error").response()(scope, receive, watched)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in METHODS else "other"
            self.metrics.requests.labels(method, route, str(status)).inc()
            level = logging.DEBUG if status == 200 and scope["path"] in OFTEN_ASKED else logging.INFO
            logger.log(level, "%s %s %.3f s", _line(scope), status, time.monotonic() - began)


def _line(scope: Scope) -> str:
    """Method and path of a request as they may stand in a log."""
    path = scope.get("raw_path", b"").partition(b"?")[0].decode("ascii", "backslashreplace")
    client = scope.get("client") or ("?",)
    return f"{client[0]} {scope['method'][:20]} {path[:200]}"


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own, which no other machine reaches."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
