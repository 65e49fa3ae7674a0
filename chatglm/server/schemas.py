"""What may be asked, field by field: types, ranges, and what is refused with its reason.

Strict: "1" is no number, and a field that is not listed is refused. Bounds that `Settings` has are checked in
asking.py, where a request meets the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError, from_json

NO_EFFECT = "Accepted for the sake of clients that send it; has no effect on the answer."
# What transformers' own chat client sends along, and the field that means the same here.
GENERATION_CONFIG = {
    "max_new_tokens": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
}
GENERATION_CONFIG_ABOUT_NOTHING = {"transformers_version", "_from_model_config", "do_sample"}

# Fields of OpenAI that are not done: what they may hold all the same, because it asks for nothing, and the reason.
Refused = dict[str, tuple[tuple[Any, ...], str]]
NO_TOOLS = "the ChatGLM prompt has no place for tools; write what the model shall know into a message"
TEXT_ONLY = "the model reads and writes text only"
NO_REASONING = "the model has no way to choose how long it thinks or writes; say it in a message"


class Body(BaseModel):
    """A JSON object whose fields are all known, with the types they should have."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    refused: ClassVar[Refused] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        for name, (idle, reason) in cls.refused.items():
            if name in data and not any(
                type(data[name]) is type(value) and data[name] == value for value in idle
            ):
                raise refusal(name, f"{name} is not supported: {reason}.")
        return {name: value for name, value in data.items() if name not in cls.refused}


def refusal(param: str, message: str) -> PydanticCustomError:
    """An error that is about one field, though it was found when looking at several."""
    return PydanticCustomError("refused", "{error}", {"error": message, "param": param})


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    """One message of a conversation."""

    refused: ClassVar[Refused] = {
        "name": ((None,), "the ChatGLM prompt has no place for names; write the name into the content"),
        "tool_calls": ((None, []), NO_TOOLS),
        "tool_call_id": ((None,), NO_TOOLS),
        "function_call": ((None,), NO_TOOLS),
        "audio": ((None,), TEXT_ONLY),
        "refusal": ((None,), "the model knows no refusals apart from its text; put it into the content"),
        "annotations": ((None, []), "the ChatGLM prompt has no place for them"),
    }
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] = Field(description="Text, or a list of parts of text.")

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(Body):
    refused: ClassVar[Refused] = {"include_obfuscation": ((None, False), "nothing is added to the stream")}
    include_usage: bool | None = Field(None, description="A last chunk tells the numbers of tokens.")


class JsonSchema(Body):
    name: str = Field(max_length=64, description="What the schema is called; it has no effect.")
    description: str | None = Field(None, description="Accepted; the model does not read it.")
    content: dict[str, Any] = Field(alias="schema", description="The JSON schema that the answer follows.")
    strict: bool | None = Field(None, description="Accepted; the schema is always followed.")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"] = Field(
        description="`json_object`: the answer is one JSON object; `json_schema`: one that `json_schema` describes."
    )
    json_schema: JsonSchema | None = Field(None, description="With `json_schema`.")

    @model_validator(mode="after")
    def _belong_together(self) -> ResponseFormat:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            has = "has no json_schema" if self.json_schema is None else "has a json_schema"
            raise refusal(
                "json_schema", f"response_format {has}, but its type is {self.type!r}; make them fit."
            )
        return self


class Sampling(Body):
    """What chat and plain completions have in common."""

    model: str = Field(max_length=500, description="The model's id, as /v1/models tells it.")
    stream: bool | None = Field(
        None, description="Send the answer in pieces, as server-sent events. Default false."
    )
    stream_options: StreamOptions | None = Field(None, description="Only with `stream`.")
    temperature: float | None = Field(
        None, ge=0, le=2, description="0: always the likeliest token. Default: as published for the model."
    )
    top_p: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Choose among the likeliest tokens with this share; 0: the likeliest alone. Default: as published.",
    )
    top_k: int | None = Field(
        None, ge=0, le=1_000_000, description="Choose among so many tokens. Default 0: all. Not OpenAI's."
    )
    max_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens of the answer at most. Default: as many as there is room for; 16 in /v1/completions.",
    )
    stop: str | list[str] | None = Field(
        None, description="Up to 4 strings that end the answer and are no part of it."
    )
    n: int | None = Field(None, ge=1, description="Answers to the same prompt, at most 4. Default 1.")
    seed: int | None = Field(
        None,
        ge=-(2**63),
        lt=2**63,
        description="The same seed and request give the same answer. Default: another one each time.",
    )
    presence_penalty: float | None = Field(
        None,
        ge=-2,
        le=2,
        description="Above 0: tokens that the answer has already become less likely. Default 0.",
    )
    frequency_penalty: float | None = Field(
        None,
        ge=-2,
        le=2,
        description="As presence_penalty, for each time that the answer has the token. Default 0.",
    )
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, description="Token id to a number from -100 (never) to 100 (always), at most 300 of them."
    )
    user: str | None = Field(None, max_length=1000, description=NO_EFFECT)

    @model_validator(mode="after")
    def _agree(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise refusal(
                "stream_options", "stream_options is only for streams; add stream: true or leave it out."
            )
        for token in self.logit_bias or ():
            if not (token.isascii() and token.isdigit() and len(token) < 10):
                raise refusal(
                    "logit_bias", "logit_bias has a key that is no token id; keys are whole numbers."
                )
        return self

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(Sampling):
    """Messages of a conversation, to which the model gives the next answer."""

    refused: ClassVar[Refused] = {
        "tools": ((None, []), NO_TOOLS),
        "tool_choice": ((None, "none"), NO_TOOLS),
        "functions": ((None, []), NO_TOOLS),
        "function_call": ((None, "none"), NO_TOOLS),
        "audio": ((None,), TEXT_ONLY),
        "modalities": ((None, ["text"]), TEXT_ONLY),
        "prediction": ((None,), "answers are not computed from a draft of the client"),
        "reasoning_effort": ((None, "none"), NO_REASONING),
        "verbosity": ((None,), NO_REASONING),
        "web_search_options": ((None,), "the server does not look into the web"),
        "moderation": ((None,), "nothing is moderated here"),
        "prompt_cache_options": ((None,), "what prompts have in common is found without being told"),
        "prompt_cache_retention": ((None, "in_memory"), "what was computed is kept in memory only"),
        "store": ((None, False), "nothing is stored here; leave it out"),
        "service_tier": ((None, "auto", "default"), "there is one tier only; leave it out"),
    }
    messages: list[Message] = Field(
        min_length=1, description="The conversation, the user's last message at its end."
    )
    max_completion_tokens: int | None = Field(None, ge=1, description="OpenAI's newer name of max_tokens.")
    logprobs: bool | None = Field(None, description="Tell the log-probability of each token. Default false.")
    top_logprobs: int | None = Field(
        None, ge=0, description="Those of the likeliest tokens too, at most 20. Needs `logprobs`."
    )
    response_format: ResponseFormat | None = None
    generation_config: str | None = Field(
        None,
        max_length=10_000,
        description="What `transformers chat` sends: JSON with max_new_tokens, do_sample, temperature, top_p, top_k, "
        "each of which holds where the request itself says nothing.",
    )
    metadata: dict[str, str] | None = Field(None, description=NO_EFFECT)
    parallel_tool_calls: bool | None = Field(None, description=NO_EFFECT)
    safety_identifier: str | None = Field(None, max_length=1000, description=NO_EFFECT)
    prompt_cache_key: str | None = Field(None, max_length=1000, description=NO_EFFECT)

    @model_validator(mode="before")
    @classmethod
    def _take_generation_config(cls, data: Any) -> Any:
        config = data.get("generation_config") if isinstance(data, Mapping) else None
        return {**generation_config(config), **data} if isinstance(config, str) else data

    @model_validator(mode="after")
    def _agree_in_chat(self) -> ChatRequest:
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            message = (
                f"max_tokens is {self.max_tokens} and max_completion_tokens {self.max_completion_tokens}"
            )
            raise refusal("max_completion_tokens", f"{message}; they mean the same, give one of them.")
        if self.top_logprobs is not None and not self.logprobs:
            raise refusal("top_logprobs", "top_logprobs needs logprobs: true.")
        return self


def generation_config(text: str) -> dict[str, Any]:
    """The fields of ours that a GenerationConfig of transformers, written as JSON, stands for."""
    name = "generation_config"
    try:
        config = from_json(text, allow_inf_nan=False)
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise refusal(name, f"{name} is no JSON object.")
    config = {key: value for key, value in config.items() if value is not None}
    for key in config:
        if key not in GENERATION_CONFIG and key not in GENERATION_CONFIG_ABOUT_NOTHING:
            raise refusal(name, f"{name} has {key[:60]!r}, which is not supported; leave it out.")
    fields = {ours: config[theirs] for theirs, ours in GENERATION_CONFIG.items() if theirs in config}
    return fields | ({"temperature": 0} if config.get("do_sample") is False else {})


class CompletionRequest(Sampling):
    """Text, or token ids, with which the model goes on. Nothing is put around it but the tokens every prompt has."""

    refused: ClassVar[Refused] = {
        "echo": ((None, False), "an answer does not repeat its prompt; put it in front yourself"),
        "suffix": ((None, ""), "the model cannot be told what shall follow its answer"),
        "best_of": ((None, 1), "every answer that is computed is also sent; ask for n of them"),
    }
    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        description="Text or token ids, or a list of either with at most 16 entries."
    )
    logprobs: int | None = Field(
        None,
        ge=0,
        description="Tell the log-probability of each token, and those of so many likeliest ones, at most 20.",
    )


class EmbeddingRequest(Body):
    """Texts, or lists of token ids, each of which becomes one vector."""

    refused: ClassVar[Refused] = {
        "dimensions": ((None,), "vectors have the model's hidden size, and cutting them would harm them")
    }
    model: str = Field(max_length=500, description="The model's id, as /v1/models tells it.")
    input: str | list[str] | list[int] | list[list[int]] = Field(
        description="Text or token ids, or a list of either with at most 64 entries."
    )
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="base64: the little-endian float32 numbers. Default float."
    )
    user: str | None = Field(None, max_length=1000, description=NO_EFFECT)


class PublishedRequest(Body):
    """What clients of the published api.py send."""

    prompt: str = Field(description="What the user says.")
    history: list[Annotated[list[str], Field(min_length=2, max_length=2)]] | None = Field(
        None, description="Pairs of what the user said and what the model answered before."
    )
    max_length: int | None = Field(
        None,
        ge=1,
        description="Tokens of prompt and answer together. Default: as published, if the context has room.",
    )
    top_p: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Choose among the likeliest tokens with this share. Default: as published.",
    )
    temperature: float | None = Field(
        None, ge=0, le=2, description="0: always the likeliest token. Default: as published."
    )


class LoadRequest(Body):
    """What `transformers chat` asks before it begins."""

    model: str = Field(max_length=500)


class Error(BaseModel):
    """Why a request was refused."""

    message: str
    type: str
    param: str | None = Field(description="The field that it is about.")
    code: str | None = Field(description="A word for programs.")


class ErrorBody(BaseModel):
    """The shape of every error."""

    error: Error
