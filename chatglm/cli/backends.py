"""Where answers come from: a model that is loaded here, or a server that runs already."""

from __future__ import annotations

import argparse
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from chatglm.checkpoint import Checkpoint, read_checkpoint
from chatglm.cli.options import (
    add_adapter_option,
    add_loading_options,
    named_model,
    seed,
    share,
    temperature,
    whole_number,
)
from chatglm.find import OURS, find_checkpoint
from chatglm.streaming import new_text

if TYPE_CHECKING:
    from chatglm.client import Client
    from chatglm.hub.modeling_chatglm import ChatGLMForConditionalGeneration
    from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer

Message = dict[str, str]  # {"role": "system", "user" or "assistant", "content": text}

ROOM = 256  # tokens an answer should have at least, or a quarter of a shorter context


@dataclass
class Answer:
    """An answer on its way: iterate over it for its text; the rest is known when that has ended."""

    pieces: Generator[str, None, None] = field(default_factory=lambda: (text for text in ()))
    finish_reason: str | None = None  # "stop" or "length"
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    left_out: int = 0  # rounds, the oldest ones, that the model did not read for want of room

    def __iter__(self) -> Iterator[str]:
        return self.pieces


class Backend(Protocol):
    """Answers conversations.

    `answer` takes messages that end with a user's. What goes wrong is raised while the answer is iterated over, as
    OSError, ValueError or MemoryError with one sentence; breaking the iteration off stops the answer.
    """

    name: str
    description: str

    def answer(self, messages: list[Message]) -> Answer: ...

    def clear(self) -> None:
        """Frees what is kept of the conversation so far."""

    def close(self) -> None:
        """Gives back what is held; there are no answers after that."""


# ---- from options to a backend


def add_backend_options(parser: argparse.ArgumentParser) -> None:
    """All but the model itself: how it is loaded or where it is served, and how it answers."""
    add_loading_options(parser)
    add_adapter_option(parser)
    add = parser.add_argument
    add(
        "--url",
        help="ask this OpenAI-compatible server, such as http://127.0.0.1:8000, instead of loading a model",
    )
    add(
        "--api-key",
        metavar="KEY",
        help="with --url: for the server (better: the environment variable CHATGLM_API_KEY)",
    )
    lengths = "2048 for ChatGLM-6B, 8192 for ChatGLM2-6B, less for models with a shorter context"
    length = f"tokens of prompt and answer (default: {lengths}); with --url, of the answer alone"
    add("--max-length", type=whole_number, metavar="N", help=length)
    temperatures = "0.95 for ChatGLM-6B, 0.8 for ChatGLM2-6B, 0 for demo and demo-v1"
    add(
        "--temperature",
        type=temperature,
        metavar="T",
        help=f"0: always the likeliest (default: {temperatures})",
    )
    shares = "0.7 for ChatGLM-6B, 0.8 for ChatGLM2-6B"
    add(
        "--top-p",
        type=share,
        metavar="P",
        help=f"choose among the likeliest with this share (default: {shares})",
    )
    add(
        "--seed",
        type=seed,
        metavar="N",
        help="the same number, from 0 to 4294967295, gives the same answers (default: another each time)",
    )
    add(
        "--prompt-lookup",
        type=whole_number,
        metavar="N",
        help="guess up to N tokens at a time from what was said: faster where answers copy text, never other answers",
    )
    add(
        "--int8-cache",
        action="store_true",
        help="keep what was said in 8 bits: half the memory of 16, hardly other answers",
    )
    add("--system", metavar="TEXT", default="", help="a system prompt: it stands before the first message")


def open_backend(arguments: argparse.Namespace) -> Backend:
    """Returns the backend that the options ask for, ready to answer."""
    return _open_server(arguments) if arguments.url else _load_model(arguments)


def _open_server(arguments: argparse.Namespace) -> ServedModel:
    for name in ("adapter", "revision", "device", "dtype", "quantize", "prompt_lookup", "int8_cache"):
        if getattr(arguments, name):
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} is for a model that is loaded here; leave it out with --url.")
    from chatglm.client import Client, ServerError

    client = Client(arguments.url, arguments.api_key or os.environ.get("CHATGLM_API_KEY"))
    model = arguments.model
    if model is None:
        offered = client.models()
        if not offered:
            raise ServerError(f"The server at {client.url} offers no model.")
        model = offered[0]
    return ServedModel(
        client,
        model,
        max_tokens=arguments.max_length,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )


def _load_model(arguments: argparse.Namespace) -> LoadedModel:
    if arguments.api_key is not None:
        raise ValueError("--api-key is for a server; give --url too, or leave it out.")
    name = named_model(arguments)
    # Before torch is imported, which takes seconds: most mistakes are told at once.
    checkpoint = read_checkpoint(find_checkpoint(name, arguments.revision))
    temperature = arguments.temperature
    if temperature is None and name in OURS:
        temperature = 0.0  # so small a model knows one answer at most
    with _used_up_memory_in_words():
        model, tokenizer = _load(checkpoint, arguments)
    dtype = str(model.dtype).removeprefix("torch.")
    taught = f" with {arguments.adapter}" if arguments.adapter else ""
    return LoadedModel(
        model,
        tokenizer,
        name=name,
        description=f"{name}{taught}: {checkpoint.sizes.parameters:,} parameters, {dtype} on {model.device}",
        max_length=arguments.max_length,
        temperature=temperature,
        top_p=arguments.top_p,
        prompt_lookup_num_tokens=arguments.prompt_lookup,
        int8_cache=arguments.int8_cache,
    )


def _load(checkpoint: Checkpoint, arguments: argparse.Namespace) -> tuple:
    import transformers

    from chatglm.loading import LARGE, load

    if checkpoint.sizes.parameters < LARGE:
        transformers.utils.logging.disable_progress_bar()
    loading = {name: getattr(arguments, name) for name in ("device", "dtype", "quantize", "adapter")}
    loaded = load(checkpoint.folder, **loading)
    if arguments.seed is not None:
        transformers.set_seed(arguments.seed)
    return loaded


# ---- a model that is loaded here


class LoadedModel:
    """Answers with a model of this process; every turn of a conversation computes only what is new."""

    def __init__(
        self,
        model: ChatGLMForConditionalGeneration,
        tokenizer: ChatGLMTokenizer,
        name: str = "",
        description: str = "",
        max_length: int | None = None,
        **generation: Any,
    ) -> None:
        from chatglm.hub.generation_chatglm import PromptCache

        self.name = name
        self.description = description
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = max_length or _default_max_length(model)
        self.generation = generation
        self.prompt_cache = PromptCache()

    def answer(self, messages: list[Message]) -> Answer:
        answer = Answer()
        answer.pieces = self._pieces(messages, answer)
        return answer

    def clear(self) -> None:
        self.prompt_cache.clear()

    def close(self) -> None:
        self.clear()

    def _pieces(self, messages: list[Message], answer: Answer) -> Generator[str, None, None]:
        from chatglm.hub.tokenization_chatglm import split_messages

        messages, answer.left_out = self._with_room(messages)
        history, query, _ = split_messages(messages)
        answer.prompt_tokens = len(self.tokenizer.encode_chat(query, history))
        answer.completion_tokens = 0

        def count(input_ids: Any, scores: Any) -> Any:
            answer.completion_tokens += 1
            return scores

        stream = self.model.stream_chat(
            self.tokenizer,
            query,
            history,
            max_length=self.max_length,
            prompt_cache=self.prompt_cache,
            logits_processor=[count],
            **self.generation,
        )
        with _used_up_memory_in_words():
            for text, _ in new_text(stream, self.model.config.family):
                yield text
        # An end of the answer on the very last token that had room counts as "length".
        full = answer.prompt_tokens + answer.completion_tokens >= self.max_length
        answer.finish_reason = "length" if full else "stop"

    def _with_room(self, messages: list[Message]) -> tuple[list[Message], int]:
        """The system message and the newest rounds after which an answer has room; how many rounds that leaves out."""
        from chatglm.hub.chat_chatglm import trim_history
        from chatglm.hub.tokenization_chatglm import split_messages

        system = messages[:1] if messages[0]["role"] == "system" else []
        history, query, _ = split_messages(messages[len(system) :])
        longest = self.max_length - min(ROOM, self.max_length // 4)
        # The system message stands in front of whichever round is the first one: it is counted with the last.
        text = "".join(message["content"] for message in system) + query
        left_out = len(history) - len(trim_history(self.tokenizer, text, history, longest))
        return system + messages[len(system) + 2 * left_out :], left_out


def _default_max_length(model: ChatGLMForConditionalGeneration) -> int:
    from chatglm.hub.chat_chatglm import CHAT_DEFAULTS

    published = CHAT_DEFAULTS[model.config.family]["max_length"]
    return min(published, model.config.max_position_embeddings)


@contextmanager
def _used_up_memory_in_words() -> Iterator[None]:
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise MemoryError(
            "The memory of the device is used up; try --quantize 4, a smaller --max-length or "
            "--device cpu, and see what chatglm info tells."
        ) from None


# ---- a server


class ServedModel:
    """Answers with a model that an OpenAI-compatible server runs."""

    def __init__(self, client: Client, name: str, **settings: Any) -> None:
        self.client = client
        self.name = name
        self.description = f"{name} at {client.url}"
        self.settings = settings

    def answer(self, messages: list[Message]) -> Answer:
        answer = Answer()
        answer.pieces = self._pieces(messages, answer)
        return answer

    def clear(self) -> None:
        """The server keeps nothing of a conversation that could be told to go."""

    def close(self) -> None:
        self.client.close()

    def _pieces(self, messages: list[Message], answer: Answer) -> Generator[str, None, None]:
        from chatglm.client import PromptTooLong

        system = messages[:1] if messages[0]["role"] == "system" else []
        rounds = (len(messages) - len(system)) // 2
        while True:
            kept = system + messages[len(system) + 2 * answer.left_out :]
            try:
                yield from self._stream(kept, answer)
                return
            except PromptTooLong:  # which is told before the first piece
                if answer.left_out == rounds:
                    raise
                answer.left_out = min(rounds, answer.left_out + max(1, rounds // 4))

    def _stream(self, messages: list[Message], answer: Answer) -> Iterator[str]:
        for chunk in self.client.stream_chat(self.name, messages, **self.settings):
            answer.finish_reason = chunk.finish_reason or answer.finish_reason
            if chunk.usage:
                answer.prompt_tokens = chunk.usage.get("prompt_tokens")
                answer.completion_tokens = chunk.usage.get("completion_tokens")
            yield chunk.text
