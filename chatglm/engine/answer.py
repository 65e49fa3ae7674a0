"""What comes back from the engine: text in settled pieces, why it ended, and how long it took."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chatglm.engine.request import Request
from chatglm.engine.sampling import Chosen
from chatglm.streaming import settled_length

if TYPE_CHECKING:
    from chatglm.engine.guide import JsonGuide
    from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer


@dataclass(frozen=True)
class TokenScore:
    """A token of an answer with its log-probability, and the best ones at its place as (id, text, log-probability)."""

    id: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...]


@dataclass(frozen=True)
class Piece:
    """New text that stays as it is, and the tokens behind it if their log-probabilities were asked for."""

    text: str
    tokens: tuple[TokenScore, ...] = ()


class Transcript:
    """Turns the tokens of one answer into text that is settled, and finds the strings that end it.

    Held back are characters whose bytes are not complete, what may become a stop string, and what the clean-up of
    `chat` may still change. All pieces together are exactly the answer.
    """

    def __init__(self, tokenizer: ChatGLMTokenizer, request: Request) -> None:
        self._decoder = tokenizer.stream_decoder()
        self._family, self._stop = tokenizer.family, request.stop
        self._clean = request.clean and request.schema is None  # JSON is not prose
        self._raw, self._searched = "", 0
        self.text, self.stopped = "", False

    def put(self, token: int) -> str:
        """Take a token; return the text that is settled with it. `stopped` tells that the answer ends here."""
        self._raw += self._decoder.put(token)
        end = self._stop_at()
        if end is not None:
            self.stopped, self._raw = True, self._raw[:end]
            return self._give(self._tidy(self._raw))
        tidy = self._tidy(self._raw[: len(self._raw) - self._open_stop()])
        settled = settled_length(tidy, self._family) if self._clean else len(tidy)
        return self._give(tidy[: max(settled, len(self.text))])

    def finish(self) -> str:
        """End the answer; return what was held back."""
        if self.stopped:
            return ""
        self._raw += self._decoder.flush()
        return self._give(self._tidy(self._raw))

    def _give(self, text: str) -> str:
        new, self.text = text[len(self.text) :], text
        return new

    def _tidy(self, raw: str) -> str:
        from chatglm.hub.tokenization_chatglm import process_response

        return process_response(self._family, raw) if self._clean else raw

    def _stop_at(self) -> int | None:
        """Where the first stop string begins; in a cleaned answer blanks in front are not searched."""
        start = len(self._raw) - len(self._raw.lstrip()) if self._clean else 0
        found = [at for at in (self._raw.find(s, max(start, self._searched)) for s in self._stop) if at >= 0]
        self._searched = max(0, len(self._raw) - max(map(len, self._stop), default=0) + 1)
        return min(found, default=None)

    def _open_stop(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._raw)), longest, -1):
                if self._raw.endswith(stop[:length]):
                    longest = length
                    break
        return longest


class Answer:
    """The answer to one request while it is made: iterate over its pieces, in a thread or in asyncio.

    `finish_reason` is None until the end, then "stop" (the model or a stop string ended it), "length" (max_tokens or
    the context), "cancelled" or "error", with `error`. Times are those of `time.monotonic`.
    """

    def __init__(self, request: Request, wake: Callable[[], None]) -> None:
        self.request = request
        self.prompt_tokens, self.cached_tokens, self.completion_tokens = len(request.prompt), 0, 0
        self.text = ""  # so far
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self.cancelled = False
        self.submitted = time.monotonic()
        self.started: float | None = None
        self.ended: float | None = None
        self._wake = wake
        self._pieces: deque[Piece] = deque()
        self._changed = threading.Condition()
        self._watchers: list[Callable[[], None]] = []

    def cancel(self) -> None:
        """End it with the token that is being computed; does nothing if it has ended."""
        self.cancelled = True
        self._wake()

    def __iter__(self) -> Iterator[Piece]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pieces or self.finish_reason)
            yield from self._waiting_pieces()
            if self.finish_reason and not self._pieces:
                return

    async def __aiter__(self) -> AsyncIterator[Piece]:
        async with aclosing(self.gathered()) as gathered:
            async for pieces in gathered:
                for piece in pieces:
                    yield piece

    async def gathered(self) -> AsyncIterator[list[Piece]]:
        """Its pieces, all those together that are there when the next are asked for."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody listens any more
                loop.call_soon_threadsafe(changed.set)

        with self._changed:
            self._watchers.append(tell)
        changed.set()
        try:
            while True:
                await changed.wait()
                changed.clear()
                if pieces := list(self._waiting_pieces()):
                    yield pieces
                if self.finish_reason and not self._pieces:
                    return
        finally:
            with self._changed:
                self._watchers.remove(tell)

    def _waiting_pieces(self) -> Iterator[Piece]:
        while self._pieces:
            yield self._pieces.popleft()

    # ---- the side of whoever makes it

    def give(self, piece: Piece) -> None:
        """Hand out new text."""
        self.started = self.started or time.monotonic()
        with self._changed:
            self.text += piece.text
            self._pieces.append(piece)
            self._tell()

    def end(self, reason: str, error: Exception | None = None) -> None:
        """Say why it ended."""
        self.error, self.ended = error, time.monotonic()
        with self._changed:
            self.finish_reason = reason
            self._tell()

    def _tell(self) -> None:
        self._changed.notify_all()
        for tell in self._watchers:
            tell()


class GeneratedAnswer(Answer):
    """An answer made from the tokens that a model chooses."""

    def __init__(self, request: Request, tokenizer: ChatGLMTokenizer, wake: Callable[[], None]) -> None:
        super().__init__(request, wake)
        self.guide: JsonGuide | None = None  # what keeps it to a schema
        self._tokenizer, self._transcript = tokenizer, Transcript(tokenizer, request)
        self._held: list[TokenScore] = []

    def put(self, chosen: Chosen) -> bool:
        """Take the next token; returns whether a stop string has ended the answer."""
        self.completion_tokens += 1
        self.started = self.started or time.monotonic()
        text = self._transcript.put(chosen.id)
        if chosen.logprob is not None:
            top = tuple((i, self._token_text(i), p) for i, p in chosen.top)
            self._held.append(TokenScore(chosen.id, self._token_text(chosen.id), chosen.logprob, top))
        if text:
            self._give_text(text)
        return self._transcript.stopped

    def end(self, reason: str, error: Exception | None = None) -> None:
        """Give out what was held back, and say why it ended."""
        rest = self._transcript.finish()
        if rest or self._held:
            self._give_text(rest)
        super().end(reason, error)

    def _give_text(self, text: str) -> None:
        piece, self._held = Piece(text, tuple(self._held)), []
        self.give(piece)

    def _token_text(self, token: int) -> str:
        return self._tokenizer.token_bytes(token).decode(errors="replace")
