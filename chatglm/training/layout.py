"""Conversations -> token ids and labels, exactly as the published finetuning lays them out.

    ChatGLM-6B    ids     A A A [gMASK] <sop> B B <eop>      A: at most max_source_length - 1 ids
                  labels  - - -    -    <sop> B B <eop>      B: at most max_target_length - 2 ids
    ChatGLM2-6B   ids     [gMASK] sop A A A B B </s>         with A: at most max_source_length ids
                  labels     -     -  - - - B B </s>         B: at most max_target_length ids

A is the prompt of `chat` with the rounds before it, B the answer; - is IGNORED. What is too long is cut at its end.
Words of people and model are plain text, so that data cannot write control tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from chatglm.hub.tokenization_chatglm import BLANK, CHATGLM, CHATGLM2, ChatGLMTokenizer
from chatglm.training.rows import Data, Problems, Row

IGNORED = -100  # the label of a position that is not trained

Example = dict[str, list[int]]


@dataclass(frozen=True)
class Layout:
    """Lays rows out for one tokenizer and these lengths (in tokens, special ones included as published)."""

    tokenizer: ChatGLMTokenizer
    max_source_length: int = 1024
    max_target_length: int = 128

    @property
    def longest(self) -> int:
        """Ids that a row has at most."""
        return self.max_source_length + self.max_target_length + 1

    def prompt(self, row: Row) -> str:
        """The text before the answer."""
        prompt = self.tokenizer.build_prompt(row.query, list(row.history))
        if row.rounds and not row.history and self.tokenizer.family == CHATGLM:
            # The published script numbers the first round too where the data have a history column.
            return f"[Round 0]\n问：{prompt}\n答："
        return prompt

    def ids(self, row: Row) -> tuple[list[int], list[int]]:
        """The ids of prompt and answer, uncut and without special tokens."""
        plain = {"add_special_tokens": False, "split_special_tokens": True}
        return self.tokenizer.encode(self.prompt(row), **plain), self.tokenizer.encode(row.answer, **plain)

    def example(self, row: Row) -> Example:
        """input_ids and labels of a row."""
        return self._join(*self.ids(row))

    def _join(self, source: list[int], target: list[int]) -> Example:
        tokenizer = self.tokenizer
        if tokenizer.family == CHATGLM2:
            prefix = tokenizer.get_prefix_tokens()
            source = prefix + source[: self.max_source_length - len(prefix)]
            target = [*target[: self.max_target_length], tokenizer.end_token_id]
            return {"input_ids": source + target, "labels": [IGNORED] * len(source) + target}
        source = [*source[: self.max_source_length - 1], tokenizer.gmask_token_id]
        target = [tokenizer.sop_token_id, *target[: self.max_target_length - 2], tokenizer.eop_token_id]
        return {"input_ids": source + target, "labels": [IGNORED] * len(source) + target}

    def examples(self, data: Data, problems: Problems) -> list[Example]:
        """All rows laid out; answers without a token are left out, cut and one-token rows are noted."""
        special = 2 if self.tokenizer.family == CHATGLM2 else 1  # before the answer
        target_special = 0 if self.tokenizer.family == CHATGLM2 else 2
        blank = self.tokenizer.convert_tokens_to_ids(BLANK)  # stands in front of most Chinese texts
        found = []
        for row in data.rows:
            source, target = self.ids(row)
            if not target:
                problems.leave_out(row.place, "the answer has no token")
                continue
            if len(target) - (target[0] == blank) == 1:
                problems.note(row.place, "the answer is one token")
            if len(source) > self.max_source_length - special:
                problems.note(row.place, f"the prompt was cut to max_source_length {self.max_source_length}")
            if len(target) > self.max_target_length - target_special:
                problems.note(row.place, f"the answer was cut to max_target_length {self.max_target_length}")
            found.append(self._join(source, target))
        return found


def pack(examples: Sequence[Example], longest: int, seed: int = 0) -> list[Example]:
    """Several rows in one of at most `longest` ids, positions starting anew at each: less padding (ChatGLM2-6B).

    Every row sees itself alone: transformers reads off the positions where one ends. Rows come in a random order.
    """
    order = list(examples)
    random.Random(seed).shuffle(order)
    packed: list[Example] = []
    for example in order:
        ids = example["input_ids"]
        if not packed or len(packed[-1]["input_ids"]) + len(ids) > longest:
            packed.append({"input_ids": [], "labels": [], "position_ids": []})
        packed[-1]["input_ids"] += ids
        packed[-1]["labels"] += example["labels"]
        packed[-1]["position_ids"] += range(len(ids))
    return packed


@dataclass(frozen=True)
class Collator:
    """Batches of examples, padded on the right to the longest; no answer can see the padding."""

    pad_token_id: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        fill = {"input_ids": self.pad_token_id, "labels": IGNORED, "position_ids": 0}
        length = max(len(example["input_ids"]) for example in examples)
        return {
            name: torch.tensor([row[name] + [fill[name]] * (length - len(row[name])) for row in examples])
            for name in examples[0]
        }
