"""A model that answers batches of prompts with the likeliest tokens, or with the letter of a choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from chatglm.evaluation.question import Question
from chatglm.hub.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm.hub.tokenization_chatglm import CHATGLM, ChatGLMTokenizer


@dataclass(frozen=True)
class Reader:
    """A model, its tokenizer, and how much it may read and write (tokens).

    Prompts are those of `chat`: words in them are plain text, whatever they look like. Rows of a batch are padded on
    the left, so that a batch gives what its rows would give one by one.
    """

    model: ChatGLMForConditionalGeneration
    tokenizer: ChatGLMTokenizer
    new_tokens: int = 512
    longest_prompt: int | None = None

    def __post_init__(self) -> None:
        if self.new_tokens < 1 or self.context - self.new_tokens < 1:
            raise ValueError(
                f"Answers of {self.new_tokens} tokens leave no room for a question in the context of {self.context} "
                f"tokens that this model has; give from 1 to {self.context - 1}."
            )

    @property
    def context(self) -> int:
        """Tokens that the model was made for."""
        return self.model.config.max_position_embeddings

    def write(self, questions: Sequence[Question]) -> list[tuple[str, int]]:
        """What the model writes to each question, and by how many tokens its prompt was too long and was cut."""
        room = self._at_most(self.context - self.new_tokens)
        prompts = [self._encode(self._prompt(question, room), room) for question in questions]
        inputs = self.model._batch(self.tokenizer, [ids for ids, _ in prompts])
        outputs = self.model.generate(
            **inputs, do_sample=False, num_beams=1, max_new_tokens=self.new_tokens, max_length=None
        )
        texts = [self.tokenizer.decode(ids) for ids in outputs[:, inputs["input_ids"].shape[1] :].tolist()]
        return [(text, cut) for text, (_, cut) in zip(texts, prompts, strict=True)]

    @torch.inference_mode()
    def choose(self, texts: Sequence[str], letters: Sequence[str]) -> list[tuple[str, int]]:
        """The letter with the highest score right after each text, and by how many tokens it was cut."""
        prompts = [self._encode(text, self._at_most(self.context)) for text in texts]
        inputs = self.model._batch(self.tokenizer, [ids for ids, _ in prompts])
        scores = self.model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1].float().cpu()
        chosen = [
            allowed[int(row[letter_ids(self.tokenizer, allowed)].argmax())]
            for row, allowed in zip(scores, letters, strict=True)
        ]
        return [(letter, cut) for letter, (_, cut) in zip(chosen, prompts, strict=True)]

    def _at_most(self, room: int) -> int:
        return room if self.longest_prompt is None else min(room, self.longest_prompt)

    def _prompt(self, question: Question, room: int) -> str:
        """Task, examples and question; where they do not fit, without the first examples."""
        examples = list(question.examples)
        while True:
            text = question.task + "".join(examples) + question.text
            if not examples or len(self.tokenizer.encode_chat(text)) <= room:
                return text
            examples.pop(0)

    def _encode(self, text: str, room: int) -> tuple[list[int], int]:
        """The ids of a prompt with at most `room` of them, cut at the end of the text as published."""
        ids = self.tokenizer.encode_chat(text)
        surplus = max(0, len(ids) - room)
        end = len(ids) - 2 if self.tokenizer.family == CHATGLM else len(ids)  # [gMASK] <sop> stay
        del ids[end - surplus : end]
        return ids, surplus


def letter_ids(tokenizer: Any, letters: str) -> list[int]:
    """The token of each letter; ValueError for a vocabulary that has not one for each.

    In the published vocabularies a letter is one token. In smaller ones it may be two, of which the first is the
    blank in front: the last one tells letters apart.
    """
    ids = [tokenizer.encode(letter, add_special_tokens=False)[-1] for letter in letters]
    if len(set(ids)) < len(letters):
        raise ValueError(f"The vocabulary of this model has no token for each of {', '.join(letters)}.")
    return ids
