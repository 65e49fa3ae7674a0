"""Every limit and choice of the server, in one place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """What the server allows; `Settings()` is a server for one's own machine.

    Every number that a client sends multiplies work or memory somewhere, so every one has its bound here, and is
    checked before anything is made of it.
    """

    # Who may talk to it
    api_keys: tuple[str, ...] = ()  # none: everybody who reaches the port
    cors_origins: tuple[str, ...] = ()  # pages of other sites that may read answers in a browser
    allowed_hosts: tuple[str, ...] = ()  # names in the Host header; none: any
    model_aliases: tuple[str, ...] = ()  # further names under which requests may ask for the model

    # What a connection may bring
    max_connections: int = 256
    max_header_bytes: int = 32_768  # request line and headers
    max_body_bytes: int = 1_000_000  # some three times the longest prompt that a model reads
    header_seconds: float = 10.0  # until the headers are there
    body_seconds: float = 30.0  # until the body is there
    send_seconds: float = 60.0  # until a client has taken a part of its answer

    # What a request may ask for
    max_messages: int = 1000
    max_prompts: int = 16  # of /v1/completions
    max_choices: int = 4  # n
    max_tokens: int | None = None  # of one answer; None: what the context has room for
    max_stop: int = 4
    max_stop_length: int = 100  # characters
    max_logit_bias: int = 300  # token ids
    max_top_logprobs: int = 20
    max_schema_length: int = 20_000  # characters of a JSON schema
    max_embedding_inputs: int = 64
    max_embedding_tokens: int = 32_768  # of all inputs together
    answer_seconds: float = 3600.0  # from the request to the end of its answer

    # What runs at the same time
    max_batch: int = 8  # answers that are computed together
    max_queue: int = 64  # answers that wait
    max_context: int | None = None  # tokens of prompt and answer; None: as the engine has it

    # How it behaves
    keep_alive_seconds: float = 15.0  # between two comments in a stream that has nothing to tell
    patience: float = 30.0  # seconds that running answers have when the server is told to end
    log_prompts: bool = False  # write what people ask and get into the log
