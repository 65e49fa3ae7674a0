"""From a checked body to requests that the engine takes: the bounds of the settings, the model's defaults, refusals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from chatglm.engine.guide import JSON_OBJECT, grammar_of
from chatglm.engine.request import EngineClosed, QueueFull, Request, SchemaTooComplex
from chatglm.server.errors import SCHEMA, ApiError, failure, shown
from chatglm.server.model import Model
from chatglm.server.schemas import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    PublishedRequest,
    ResponseFormat,
    Sampling,
)
from chatglm.server.settings import Settings

if TYPE_CHECKING:
    from chatglm.engine.answer import Answer

COMPLETION_TOKENS = 16  # of /v1/completions where the request does not say: OpenAI's number
RETRY_AFTER = 5  # seconds, where there is nothing to reckon it from


def ask_chat(body: ChatRequest, model: Model, settings: Settings) -> list[Answer]:
    """Starts the answers of /v1/chat/completions; it encodes, so it belongs into a thread."""
    check_sampling(body, model, settings)
    check_places("n", body.n or 1, model)
    at_most("messages", len(body.messages), settings.max_messages, "messages")
    at_most("top_logprobs", body.top_logprobs, settings.max_top_logprobs)
    prompt = encoded("messages", model.chat_prompt, body.messages)
    asked = request_for(
        body, prompt, model, settings, body.max_tokens or body.max_completion_tokens, "messages"
    )
    asked = replace(
        asked,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        schema=schema_of(body.response_format, settings),
    )
    return submit(choices(asked, body.n), model, "messages")


def schema_of(asked: ResponseFormat | None, settings: Settings) -> str | None:
    """The JSON schema that an answer shall follow, if any; ApiError for one that cannot be followed."""
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return JSON_OBJECT
    schema = json.dumps(asked.json_schema.content, ensure_ascii=False)
    at_most(SCHEMA, len(schema), settings.max_schema_length, "characters")
    try:
        grammar_of(schema)
    except ValueError as error:
        raise ApiError(400, str(error), SCHEMA, "invalid_value") from None
    return schema


def ask_completions(body: CompletionRequest, model: Model, settings: Settings) -> list[Answer]:
    """Starts the answers of /v1/completions, all of the first prompt first."""
    check_sampling(body, model, settings)
    at_most("logprobs", body.logprobs, settings.max_top_logprobs)
    prompts = token_lists("prompt", body.prompt, model, settings.max_prompts)
    check_places("prompt" if len(prompts) > 1 else "n", len(prompts) * (body.n or 1), model)
    asked: list[Request] = []
    for prompt in prompts:
        request = request_for(body, prompt, model, settings, body.max_tokens or COMPLETION_TOKENS, "prompt")
        asked += choices(replace(request, top_logprobs=body.logprobs, clean=False), body.n)
    return submit(asked, model, "prompt")


def ask_published(body: PublishedRequest, model: Model, settings: Settings) -> list[Answer]:
    """Starts the answer of POST / and /stream."""
    at_most("history", len(body.history or []), settings.max_messages, "rounds")
    at_most("max_length", body.max_length, model.engine.context)
    history = [(query, response) for query, response in body.history or []]
    if not body.prompt.strip():
        raise ApiError(400, "prompt is empty; write what the model shall answer.", "prompt", "invalid_value")
    prompt = encoded("prompt", lambda text: model.tokenizer.encode_chat(text, history), body.prompt)
    room = (body.max_length or model.max_length) - len(prompt)
    if room < 1:
        raise too_long("prompt", len(prompt), body.max_length or model.max_length)
    return submit([sampled(body, prompt, model, capped(room, settings))], model, "prompt")


def embedding_prompts(body: EmbeddingRequest, model: Model, settings: Settings) -> list[list[int]]:
    """The ids of every text of /v1/embeddings."""
    check_model(body.model, model, settings)
    prompts = token_lists("input", body.input, model, settings.max_embedding_inputs)
    at_most("input", sum(map(len, prompts)), settings.max_embedding_tokens, "tokens altogether")
    for prompt in prompts:
        if len(prompt) >= model.engine.context:
            raise too_long("input", len(prompt), model.engine.context)
    return prompts


def check_model(name: str, model: Model, settings: Settings) -> None:
    if name != model.id and name not in settings.model_aliases:
        message = f"The model {shown(name)} is not served here; this server has {model.id!r}."
        raise ApiError(404, message, "model", "model_not_found")


def check_sampling(body: Sampling, model: Model, settings: Settings) -> None:
    """Raises ApiError for numbers beyond the settings."""
    check_model(body.model, model, settings)
    at_most("n", body.n, settings.max_choices)
    at_most("stop", len(body.stop_strings), settings.max_stop, "strings")
    if "" in body.stop_strings:
        raise ApiError(400, "stop has an empty string; leave it out.", "stop", "invalid_value")
    longest = max(map(len, body.stop_strings), default=0)
    at_most("stop", longest, settings.max_stop_length, "characters in one string")
    at_most("logit_bias", len(body.logit_bias or {}), settings.max_logit_bias, "tokens")


def check_places(name: str, answers: int, model: Model) -> None:
    """Raises ApiError for more answers than there is ever room for; what others take of it is told later."""
    if answers > model.engine.places:
        message = f"{name} asks for {answers} answers; at most {model.engine.places} are possible at once."
        raise ApiError(400, message, name, "invalid_value")


def at_most(name: str, value: int | None, bound: int, what: str = "") -> None:
    if value is not None and value > bound:
        has = f"has {value} {what}" if what else f"is {value}"
        raise ApiError(400, f"{name} {has}; at most {bound} are possible.", name, "invalid_value")


def capped(tokens: int, settings: Settings) -> int:
    """The bound of the settings, where it is less."""
    return min(tokens, settings.max_tokens or tokens)


def token_lists(name: str, texts: str | Sequence, model: Model, most: int) -> list[list[int]]:
    """Text, ids, or a list of either as lists of ids."""
    listed = [texts] if isinstance(texts, str) or (texts and isinstance(texts[0], int)) else texts
    at_most(name, len(listed), most, "entries")
    if not listed or not all(listed):
        raise ApiError(400, f"{name} is empty; give at least one character or token.", name, "invalid_value")
    return [
        encoded(name, model.text_prompt, entry) if isinstance(entry, str) else check_ids(name, entry, model)
        for entry in listed
    ]


def check_ids(name: str, ids: Sequence[int], model: Model) -> list[int]:
    size = len(model.tokenizer)
    wrong = next((i for i in ids if not 0 <= i < size), None)
    if wrong is not None:
        message = f"{name} has the token id {shown(wrong)}; this model's ids go from 0 to {size - 1}."
        raise ApiError(400, message, name, "invalid_value")
    return list(ids)


def encoded(name: str, encode, text) -> list[int]:
    try:
        return encode(text)
    except ValueError as error:
        raise ApiError(400, str(error), name, "invalid_value") from None


def too_long(name: str, length: int, room: int) -> ApiError:
    message = f"{name} has {length} tokens, but prompt and answer together may have {room}; shorten it."
    return ApiError(400, message, name, "context_length_exceeded")


def request_for(
    body: Sampling, prompt: list[int], model: Model, settings: Settings, max_tokens: int | None, name: str
) -> Request:
    """The engine's request for one answer to `prompt`."""
    context = model.engine.context
    room = context - len(prompt)
    if room < 1:
        raise too_long(name, len(prompt), context)
    at_most("max_tokens", max_tokens, capped(context, settings))
    # A bound, not an order: where the prompt leaves less room, the answer ends with finish_reason "length".
    return replace(
        sampled(body, prompt, model, capped(min(room, max_tokens or room), settings)),
        top_k=body.top_k or 0,
        seed=body.seed,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()},
        stop=body.stop_strings,
    )


def sampled(body: Sampling | PublishedRequest, prompt: list[int], model: Model, max_tokens: int) -> Request:
    """What chat, completions and the published API have in common. A value of 0 means 0."""
    temperature = model.temperature if body.temperature is None else body.temperature
    top_p = model.top_p if body.top_p is None else body.top_p
    if top_p == 0:  # no share at all: the likeliest token alone
        temperature, top_p = 0.0, 1.0
    return Request(prompt, max_tokens=max_tokens, temperature=temperature, top_p=top_p)


def choices(request: Request, n: int | None) -> list[Request]:
    """`n` requests for the same prompt; with a seed each has another one, and all are the same next time."""
    if request.seed is None:
        return [request] * (n or 1)
    return [replace(request, seed=(request.seed + i) % 2**63) for i in range(n or 1)]


def submit(requests: Sequence[Request], model: Model, name: str) -> list[Answer]:
    """Gives all requests to the engine, or none of them; raises ApiError for what it refuses."""
    try:
        return model.engine.submit_all(requests)
    except Exception as error:
        refused = refusal_of(error, name)
        if refused is None:
            raise
        raise refused from None


def refusal_of(error: BaseException, name: str) -> ApiError | None:
    """What the client is told where the engine takes nothing more, or not this."""
    if isinstance(error, QueueFull):
        retry = {"Retry-After": str(error.retry_after)}
        return ApiError(429, str(error), code="queue_full", headers=retry)
    if isinstance(error, EngineClosed):
        return ApiError(503, str(error), code="shutting_down", headers={"Retry-After": str(RETRY_AFTER)})
    if isinstance(error, SchemaTooComplex):
        return failure(error)
    if isinstance(error, ValueError):
        first = str(error).split(maxsplit=1)[0]
        return ApiError(400, str(error), first if first in Sampling.model_fields else name, "invalid_value")
    return None
