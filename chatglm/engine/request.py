"""What is asked of the engine, and the reasons for which it may refuse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Request:
    """One prompt and how it is to be answered.

    `presence_penalty` and `frequency_penalty` are OpenAI's: subtracted from the score of a token that the answer has
    already, once and for each time. `logit_bias` is added to the scores of its token ids.
    """

    prompt: Sequence[int]  # token ids, special ones included
    max_tokens: int | None = None  # of the answer; None: as many as there is room for
    temperature: float = 1.0  # 0: always the likeliest token
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    seed: int | None = None  # the same seed and request give the same tokens; None: others each time
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int | None = None  # None: no log-probabilities; 0: those of the chosen tokens
    stop: tuple[str, ...] = ()  # end the answer and are no part of it
    schema: str | None = (
        None  # the answer is JSON that this JSON schema describes; guide.JSON_OBJECT: any object
    )
    clean: bool = True  # tidy the text as `chat` does; False: as it was generated


class SchemaTooComplex(ValueError):
    """A JSON schema that turned out, at the first token or in the middle of an answer, not to be followed.

    Its sentence holds nothing of the schema and the answer: it may stand in a log.
    """


class QueueFull(RuntimeError):
    """No more requests may wait; `retry_after` is a guess in seconds when there will be room.

    `waiting` are those of others, beside which there is no room for the `asked` ones.
    """

    def __init__(self, asked: int, waiting: int, retry_after: int) -> None:
        super().__init__(
            f"There is no room for {asked} more, as {waiting} requests are waiting already; "
            f"try again in {retry_after} seconds."
        )
        self.retry_after = retry_after


class EngineClosed(RuntimeError):
    """The engine takes no more requests, because it is shutting down."""

    def __init__(self) -> None:
        super().__init__("The model is being shut down and takes no more requests.")


def check_request(request: Request, context: int, vocab_size: int) -> None:
    """Raise ValueError for what no model with `context` tokens of room could answer."""
    length = len(request.prompt)
    if not length:
        raise ValueError("The prompt has no tokens; give at least one.")
    unknown = next((i for i in request.prompt if not 0 <= i < vocab_size), None)
    if unknown is not None:
        raise ValueError(f"The prompt has the token id {unknown}; ids go from 0 to {vocab_size - 1}.")
    if length >= context:
        raise ValueError(
            f"The prompt has {length} tokens, but prompt and answer together may have {context}; shorten the prompt."
        )
    if request.max_tokens is not None and not 1 <= request.max_tokens <= context - length:
        raise ValueError(
            f"max_tokens is {request.max_tokens}, but the prompt has {length} tokens and there is room for {context}; "
            f"give 1 to {context - length}."
        )
    _check_sampling(request)
    unknown = next((i for i in request.logit_bias if not 0 <= i < vocab_size), None)
    if unknown is not None:
        raise ValueError(f"logit_bias has the token id {unknown}; ids go from 0 to {vocab_size - 1}.")


def _check_sampling(request: Request) -> None:
    wrong = {
        "temperature": not 0 <= request.temperature < float("inf"),
        "top_p": not 0 < request.top_p <= 1,
        "top_k": request.top_k < 0,
        "seed": request.seed is not None and not -(2**63) <= request.seed < 2**63,
        "stop": "" in request.stop,
    }
    name = next((name for name, is_wrong in wrong.items() if is_wrong), None)
    if name is not None:
        ranges = {"temperature": "0 or more", "top_p": "above 0 and at most 1", "top_k": "0 or more",
                  "seed": "a whole number of 64 bits", "stop": "texts that are not empty"}  # fmt: skip
        raise ValueError(f"{name} is {getattr(request, name)!r}; it must be {ranges[name]}.")
