"""That a model with a smaller vocabulary answers as before: the same questions put to both, greedily."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch
from transformers import LogitsProcessorList

from chatglm.hub.chat_chatglm import KnownTokens
from chatglm.loading import LARGE
from chatglm.weights.parts import Parts, as_model
from chatglm.weights.write import total_bytes

NEW_TOKENS = 16


@dataclass(frozen=True)
class Proof:
    """How many answers were equal, and how many are so up to a token that the smaller vocabulary lacks."""

    equal: int
    left: int

    def __str__(self) -> str:
        total = self.equal + self.left
        if not total:
            return "No answers were compared: the model does not fit into the memory that is free."
        told = f"{self.equal} of {total} answers are the same as before, token for token"
        if not self.left:
            return f"{told}."
        return (
            f"{told}; {self.left} were, until they needed a piece that was dropped (texts like the answers, added "
            "to the corpus, keep more of them)."
        )


def same_answers(old: Parts, new: Parts, kept: Sequence[int], questions: Sequence[str]) -> Proof:
    """Compares greedy answers; `kept` holds the old id of each new id.

    One model at a time is in memory. Raises ValueError, with the question, for an answer that differs.
    """
    if total_bytes(old.state) * (2 if _is_small(old) else 1) > 0.9 * psutil.virtual_memory().available:
        return Proof(0, 0)
    before, after = _answers(old, questions), _answers(new, questions)
    equal = left = 0
    for question, expected, found in zip(questions, before, after, strict=True):
        known = next((i for i, old_id in enumerate(expected) if old_id not in set(kept)), len(expected))
        if [kept[new_id] for new_id in found[:known]] != expected[:known]:
            raise ValueError(
                f"The smaller model answers {question[:80]!r} with other tokens; nothing was written. Convert "
                "with --dtype float32 first, to see whether rounding is the reason, or report it as a mistake."
            )
        equal, left = equal + (known == len(expected)), left + (known < len(expected))
    return Proof(equal, left)


def _is_small(parts: Parts) -> bool:
    return total_bytes(parts.state) < 2 * LARGE


def _answers(parts: Parts, questions: Sequence[str]) -> list[list[int]]:
    model, tokenizer = as_model(parts), parts.tokenizer
    if _is_small(parts):
        model = model.float()  # where rounding makes no two scores equal
    known = LogitsProcessorList([KnownTokens(len(tokenizer))])
    answers = []
    for question in questions:
        ids = torch.tensor([tokenizer.encode_chat(question)])
        output = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, logits_processor=known)
        answers.append(output[0, ids.shape[1] :].tolist())
    return answers
