"""Answers that are JSON as a schema describes it: which tokens may come next, by llguidance."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from chatglm.engine.request import SchemaTooComplex

try:
    import llguidance
except ImportError:
    llguidance = None

if TYPE_CHECKING:
    from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer

JSON_OBJECT = '{"type": "object"}'
# Without a bound a model that has nothing to say goes on with blanks for ever.
BLANKS = {"whitespace_pattern": r"[ \t\n\r]{0,20}"}


@lru_cache(maxsize=64)
def grammar_of(schema: str) -> str:
    """The grammar of a JSON schema, for llguidance; ValueError for a schema that is none, or asks for what it cannot.

    References to other documents are refused, not fetched.
    """
    if llguidance is None:
        raise ValueError("JSON answers need the package llguidance: pip install llguidance.")
    content = json.loads(schema)
    if not isinstance(content, dict):
        raise ValueError(f"A JSON schema is an object, but this one is {schema[:60]}.")
    grammar = llguidance.LLMatcher.grammar_from_json_schema(content | {"x-guidance": BLANKS})
    fault = llguidance.LLMatcher.validate_grammar(grammar)
    if fault:
        raise ValueError(f"The JSON schema cannot be followed: {fault[:200].rstrip('.')}.")
    return grammar


class JsonGuides:
    """Makes a guide for each answer; the table of the vocabulary, which takes a second, is made once."""

    def __init__(self, tokenizer: ChatGLMTokenizer, end_tokens: list[int]) -> None:
        self._vocabulary = llguidance.LLTokenizer(_Vocabulary(tokenizer, end_tokens), eos_token=end_tokens)

    def new(self, schema: str) -> JsonGuide:
        """A guide for one answer; SchemaTooComplex where it cannot even begin."""
        return JsonGuide(llguidance.LLMatcher(self._vocabulary, grammar_of(schema), log_level=0))


class JsonGuide:
    """Follows one answer and tells which tokens keep it the beginning of what its schema describes.

    What may come next is found out ahead, so that a schema fails alone, and not amid the rows of a step.
    """

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher
        self._next = self._bits()

    def allowed(self, size: int) -> torch.Tensor:
        """Booleans [size], True for the token ids that may come next."""
        places = torch.arange(8, dtype=torch.uint8)
        known = (
            (self._next[:, None] >> places & 1).bool().flatten()[:size]
        )  # the lowest bit is the first token
        return torch.nn.functional.pad(known, (0, size - len(known)))

    def took(self, token: int) -> None:
        """Go on with the token that was chosen; SchemaTooComplex where that is not possible."""
        self._matcher.consume_token(token)
        self._next = self._bits()

    def _bits(self) -> torch.Tensor:
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        if self._matcher.is_error():
            # The rest of the error repeats the schema and the answer so far, which are nobody else's business.
            kind = re.findall(r"^Stop: (\w+)$", self._matcher.get_error(), re.MULTILINE)
            reason = f" ({kind[-1]})" if kind else ""
            raise SchemaTooComplex(
                f"The JSON schema is endless or too complex to follow{reason}; simplify it."
            )
        return bits


class _Vocabulary:
    """The tokens as bytes, in the shape that llguidance reads."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: ChatGLMTokenizer, end_tokens: list[int]) -> None:
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.eos_token_id, self.bos_token_id = end_tokens[0], None
        self.special_token_ids = [i for i, text in enumerate(self.tokens) if not text]
        self._ids = {text: i for i, text in enumerate(self.tokens) if text}
        self._longest = max(map(len, self._ids))

    def __call__(self, text: str) -> list[int]:
        """Tokens that spell `text`, the longest first; llguidance asks where there is only one way to go on."""
        left, ids = text.encode(), []
        while left:
            lengths = range(min(len(left), self._longest), 0, -1)
            length = next(n for n in lengths if left[:n] in self._ids)  # each byte is a token
            ids.append(self._ids[left[:length]])
            left = left[length:]
        return ids
