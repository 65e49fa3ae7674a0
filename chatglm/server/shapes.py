"""Answers in the shapes of OpenAI's API: whole ones, and the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from chatglm import __version__
from chatglm.server.model import Model
from chatglm.server.schemas import ChatRequest, CompletionRequest, Sampling

if TYPE_CHECKING:
    from chatglm.engine.answer import Answer, Piece, TokenScore

LEAST_LOGPROB = -9999.0  # OpenAI's number for "as good as never"; JSON has no infinity

Json = dict[str, Any]
Asked = TypeVar("Asked", bound=Sampling)


class Shape(Generic[Asked]):
    """What all answers have in common: who answers, when, and the numbers of tokens."""

    prefix = kind = chunk_kind = ""

    def __init__(self, body: Asked, model: Model, answers: Sequence[Answer]) -> None:
        self.body, self.model, self.answers = body, model, answers
        self._id, self._created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())

    def _object(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self.model.id,
            # Answers to the same seed can differ where this differs.
            "system_fingerprint": f"chatglm-{__version__}-{self.model.device}-{self.model.dtype}",
            "choices": choices,
        }

    def _chunk(self, choice: Json) -> Json:
        chunk = self._object(self.chunk_kind, [choice])
        return chunk | {"usage": None} if self.body.includes_usage else chunk

    def usage_chunk(self) -> Json:
        """The last chunk of a stream that tells the numbers of tokens."""
        return self._object(self.chunk_kind, []) | {"usage": self.usage()}

    def usage(self) -> Json:
        """The numbers of tokens, those of a prompt once however many answers it has."""
        prompts = self.answers[:: self.body.n or 1]
        prompt_tokens = sum(answer.prompt_tokens for answer in prompts)
        completion_tokens = sum(answer.completion_tokens for answer in self.answers)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(answer.cached_tokens for answer in prompts)},
        }

    def whole(self, pieces: Sequence[Sequence[Piece]]) -> Json:
        """The body of an answer that is not streamed."""
        choices = [self._choice(i, answer, _tokens(pieces[i])) for i, answer in enumerate(self.answers)]
        return self._object(self.kind, choices) | {"usage": self.usage()}

    def begin(self, index: int) -> list[Json]:
        """The chunks in front of an answer."""
        return []

    def delta(self, index: int, piece: Piece) -> Json:
        """The chunk of a piece of text."""
        raise NotImplementedError

    def end(self, index: int) -> Json:
        """The chunk that tells why an answer has ended."""
        raise NotImplementedError

    def _choice(self, index: int, answer: Answer, tokens: list[TokenScore]) -> Json:
        raise NotImplementedError


class ChatShape(Shape[ChatRequest]):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def begin(self, index: int) -> list[Json]:
        return [self._piece(index, {"role": "assistant", "content": ""})]

    def delta(self, index: int, piece: Piece) -> Json:
        return self._piece(index, {"content": piece.text}, self._logprobs(piece.tokens))

    def end(self, index: int) -> Json:
        return self._piece(index, {}, None, self.answers[index].finish_reason)

    def _piece(
        self, index: int, delta: Json, logprobs: Json | None = None, finish_reason: str | None = None
    ) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._chunk(choice)

    def _choice(self, index: int, answer: Answer, tokens: list[TokenScore]) -> Json:
        return {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": self._logprobs(tokens),
            "finish_reason": answer.finish_reason,
        }

    def _logprobs(self, tokens: Sequence[TokenScore]) -> Json | None:
        if not self.body.logprobs:
            return None
        content = [
            self._token(token.id, token.text, token.logprob)
            | {"top_logprobs": [self._token(*candidate) for candidate in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, text: str, logprob: float) -> Json:
        data = list(self.model.tokenizer.token_bytes(token_id))
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": data}


class CompletionShape(Shape[CompletionRequest]):
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, body: CompletionRequest, model: Model, answers: Sequence[Answer]) -> None:
        super().__init__(body, model, answers)
        self._offsets = [0] * len(answers)  # characters of each answer before the next token

    def delta(self, index: int, piece: Piece) -> Json:
        return self._piece(index, piece.text, self._logprobs(index, piece.tokens))

    def end(self, index: int) -> Json:
        return self._piece(index, "", None, self.answers[index].finish_reason)

    def _piece(self, index: int, text: str, logprobs: Json | None, finish_reason: str | None = None) -> Json:
        return self._chunk(
            {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
        )

    def _choice(self, index: int, answer: Answer, tokens: list[TokenScore]) -> Json:
        return {
            "index": index,
            "text": answer.text,
            "logprobs": self._logprobs(index, tokens),
            "finish_reason": answer.finish_reason,
        }

    def _logprobs(self, index: int, tokens: Sequence[TokenScore]) -> Json | None:
        if self.body.logprobs is None:
            return None
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token.text)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [max(token.logprob, LEAST_LOGPROB) for token in tokens],
            "top_logprobs": [
                {text: max(logprob, LEAST_LOGPROB) for _, text, logprob in reversed(token.top)}
                for token in tokens
            ],
            "text_offset": offsets,
        }


def _tokens(pieces: Sequence[Piece]) -> list[TokenScore]:
    return [token for piece in pieces for token in piece.tokens]
