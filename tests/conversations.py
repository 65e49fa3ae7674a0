"""A tiny model with random weights and a tokenizer that belongs to it, to chat with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from helpers import tiny_model
from vocabularies import train_vocabulary, vocabulary_config

from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer


class Conversation:
    """Model and tokenizer; without a tokenizer a small vocabulary is trained in `folder`."""

    def __init__(
        self, family: str, folder: Path | None = None, tokenizer: Any = None, **options: Any
    ) -> None:
        self.family = family
        self.tokenizer = tokenizer or ChatGLMTokenizer(train_vocabulary(family, folder))
        self.model = tiny_model(family, **vocabulary_config(self.tokenizer, spare=6), **options)

    def chat(self, query: str, history: Any = None, **options: Any) -> tuple:
        return self.model.chat(self.tokenizer, query, history, **options)

    def stream(self, query: str, history: Any = None, **options: Any) -> Iterator[tuple]:
        return self.model.stream_chat(self.tokenizer, query, history, **options)


@contextmanager
def computed_tokens() -> Iterator[list[int]]:
    """The number of tokens of every pass of any model, on whichever path: hooks would change the path."""
    lookup, counts = torch.nn.functional.embedding, []

    def counted(ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        counts.append(ids.numel())
        return lookup(ids, *args, **kwargs)

    torch.nn.functional.embedding = counted
    try:
        yield counts
    finally:
        torch.nn.functional.embedding = lookup
