"""A small client of an OpenAI-compatible server: its models, and chat completions as they are streamed.

It knows the protocol. Whatever goes wrong ends in a ServerError: one sentence that can be shown to
people, with nothing in it that could steer a terminal and never the key.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx2

LARGEST = 1 << 20  # bytes of one line of a stream, or of a reply as a whole
LONGEST_MESSAGE = 300  # characters of a server's own words in an error
# A server may be busy with others, or read a long prompt, before it says its first word.
TIMEOUT = httpx2.Timeout(60.0, connect=10.0, read=600.0)


class ServerError(OSError):
    """The server cannot be reached, refused what it was asked, or broke off."""


class PromptTooLong(ServerError):
    """The messages have more tokens than the model can read."""


@dataclass(frozen=True)
class Chunk:
    """What one event of a stream brings; most bring text alone, the last ones the rest."""

    text: str = ""
    finish_reason: str | None = None
    usage: Mapping[str, Any] | None = None


class Client:
    """Talks with the server at `url`: "http://127.0.0.1:8000" or the base URL of any OpenAI client.

    Raises ValueError for a URL or a key that cannot be one. Redirections are not followed: the key
    is for this server alone. The proxies of the environment are used, but not for this machine.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = _base_url(url)
        self._key = _checked_key(key)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._http = httpx2.Client(
            headers=headers, timeout=TIMEOUT, trust_env=not _is_this_machine(self.url), follow_redirects=False
        )

    def close(self) -> None:
        """Closes the connections; a server stops answers nobody waits for."""
        self._http.close()

    def models(self) -> list[str]:
        """Returns the ids of the models that the server offers."""
        with self._request("GET", "/models") as response:
            listed = self._json(response)
        entries = listed.get("data") if isinstance(listed, dict) else None
        if not isinstance(entries, list):
            raise ServerError(f"{self.url}/models is no list of models; give the URL of an OpenAI server.")
        return [
            entry["id"] for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)
        ]

    def stream_chat(
        self, model: str, messages: Sequence[Mapping[str, str]], **settings: Any
    ) -> Iterator[Chunk]:
        """Yields the answer to `messages` piece by piece; closing the iterator cancels it on the server.

        `settings` are fields of the protocol, such as temperature; None leaves them to the server.
        Raises ServerError also in the middle: what was yielded before is then all there is.
        """
        body = {
            "model": model,
            "messages": list(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            **{name: value for name, value in settings.items() if value is not None},
        }
        complete = False
        with self._request("POST", "/chat/completions", json=body) as response:
            kind = response.headers.get("content-type", "nothing")
            if not kind.startswith("text/event-stream"):
                raise ServerError(
                    f"{self.url} answers with {self._told(kind)} instead of a stream of events."
                )
            for data in events(self._bytes(response)):
                if data == "[DONE]":
                    return
                chunk = self._chunk(data)
                complete = complete or chunk.finish_reason is not None
                yield chunk
        if not complete:
            raise ServerError(f"The server at {self.url} broke off in the middle of its answer.")

    @contextmanager
    def _request(self, method: str, path: str, **options: Any) -> Iterator[httpx2.Response]:
        """A response with status 200, its body still to be read; every failure as a ServerError."""
        try:
            with self._http.stream(method, self.url + path, **options) as response:
                if response.status_code != 200:
                    raise self._refusal(response)
                yield response
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise ServerError(
                f"No connection to {self.url} ({self._told(error) or 'no answer'}); start the server "
                "(chatglm serve), or correct the URL."
            ) from None
        except httpx2.TimeoutException:
            raise ServerError(
                f"The server at {self.url} has sent nothing for {TIMEOUT.read:.0f} seconds; ask again later."
            ) from None
        except httpx2.HTTPError as error:
            raise ServerError(
                f"The connection to {self.url} broke ({self._told(error)}); ask again when the server is back."
            ) from None

    def _bytes(self, response: httpx2.Response) -> Iterator[bytes]:
        try:
            yield from response.iter_bytes()
        except (httpx2.RemoteProtocolError, httpx2.ReadError):
            raise ServerError(f"The server at {self.url} broke off in the middle of its answer.") from None

    def _json(self, response: httpx2.Response) -> Any:
        """The body as JSON, None where it is none; no more of it is read than is sensible."""
        body = b""
        for part in response.iter_bytes():
            body += part
            if len(body) > LARGEST:
                return None
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            return None

    def _refusal(self, response: httpx2.Response) -> ServerError:
        """The sentence for a status that is not 200."""
        status, where = response.status_code, f"The server at {self.url}"
        message, code = self._error(self._json(response))
        said = f": {message}" if message else "."
        if code == "context_length_exceeded":
            return PromptTooLong(f"{where} cannot read so much{said}")
        if status in (401, 403) and self._key:
            return ServerError(f"{where} refuses the key ({status}); correct CHATGLM_API_KEY or --api-key.")
        if status in (401, 403):
            return ServerError(f"{where} wants a key ({status}); put it into CHATGLM_API_KEY.")
        if status == 404:
            return ServerError(f"{where} does not have what was asked for (404){said}")
        if status == 429:
            return ServerError(
                f"{where} is busy (429); ask again {_when(response.headers.get('retry-after'))}."
            )
        if response.has_redirect_location:
            place = self._told(response.headers["location"])
            return ServerError(f"{where} sends on to {place} ({status}); give that URL if you trust it.")
        return ServerError(f"{where} refuses ({status}){said}")

    def _chunk(self, data: str) -> Chunk:
        try:
            event = json.loads(data)
        except (ValueError, RecursionError):
            event = None
        if isinstance(event, dict) and event.get("error"):
            message, _ = self._error(event)
            raise ServerError(f"The server at {self.url} broke off: {message or 'it does not say why'}")
        try:
            choice = event["choices"][0] if event["choices"] else {}
            text = choice.get("delta", {}).get("content") or ""
            return Chunk(_without_halves(text), choice.get("finish_reason"), event.get("usage"))
        except (TypeError, KeyError, AttributeError):
            raise ServerError(
                f"The server at {self.url} sent {self._told(data)!r}, which is no piece of a chat completion."
            ) from None

    def _error(self, reply: Any) -> tuple[str, Any]:
        """(message, code) of an error in OpenAI's shape; without a code where it is a string alone."""
        error = reply.get("error") if isinstance(reply, dict) else None
        if isinstance(error, dict):
            return self._told(error.get("message") or ""), error.get("code")
        return self._told(error or ""), None

    def _told(self, words: Any) -> str:
        """Words of others on one line: short, without control characters, without the key."""
        text = str(words).replace(self._key, "***") if self._key else str(words)
        text = "".join(char if char.isprintable() else " " for char in text[: 2 * LONGEST_MESSAGE])
        text = " ".join(text.split())
        return text if len(text) <= LONGEST_MESSAGE else text[:LONGEST_MESSAGE] + "…"


def events(chunks: Iterable[bytes]) -> Iterator[str]:
    """Yields the data of each server-sent event; comments, which keep connections alive, are passed over.

        [b'data: {"a":', b' 1}\\n\\n', b': comment\\n\\ndata: [DONE]\\n\\n']  ->  '{"a": 1}', '[DONE]'

    Raises ServerError for a line that does not end.
    """
    data: list[str] = []
    for line in _lines(chunks):
        if line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
        elif not line and data:
            yield "\n".join(data)
            data = []


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Whole lines are decoded, so characters may come in halves."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r").decode(errors="replace")
        if len(rest) > LARGEST:
            raise ServerError(f"The server sends a line of more than {LARGEST:,} bytes, which is no event.")


def _base_url(url: str) -> str:
    try:
        httpx2.URL(url)
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and " " not in url
    except (ValueError, httpx2.InvalidURL):
        valid = False
    if not valid:
        raise ValueError(f"The URL is {url!r}; give one such as http://127.0.0.1:8000.")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError("The URL holds more than a place; leave out what is before @ and after ? or #.")
    return url.rstrip("/") if parts.path.strip("/") else f"{url.rstrip('/')}/v1"


def _checked_key(key: str | None) -> str | None:
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise ValueError("The key has blanks or characters that no key has; copy it again.")
    return key or None


def _is_this_machine(url: str) -> bool:
    host = urlsplit(url).hostname
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _when(retry_after: str | None) -> str:
    if retry_after is None or not retry_after.isdecimal():
        return "later"
    return "in a second" if int(retry_after) == 1 else f"in {int(retry_after)} seconds"


def _without_halves(text: str) -> str:
    """Half a surrogate pair, which JSON can spell, is no character and could not be sent back."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
