"""The methods that chat: `chat`, `stream_chat` and `batch_chat` of the models, text in and text out.

Prompts and answers are texts of tokenization_chatglm.py, and their tokens come from generation_chatglm.py; what is
decided here is which rounds of a conversation the model reads, and the published defaults.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import Cache

from .tokenization_chatglm import CHATGLM, CHATGLM2, History, check_history, process_response

# The published defaults of chat and stream_chat.
CHAT_DEFAULTS = {
    CHATGLM: {"max_length": 2048, "top_p": 0.7, "temperature": 0.95},
    CHATGLM2: {"max_length": 8192, "top_p": 0.8, "temperature": 0.8},
}


class ChatMixin:
    """Gives a model that generates tokens the methods that chat: text in, text out.

    The model brings `generate`, `stream_generate`, `config` and `device`.
    """

    def process_response(self, response: str) -> str:
        """The published clean-up of an answer: stripped, and for ChatGLM-6B with Chinese punctuation."""
        return process_response(self.config.family, response)

    def build_inputs(self, tokenizer: Any, query: str, history: History | None = None):
        """The model inputs of one chat turn, [1, T], on the device of the model."""
        return self._batch(tokenizer, [tokenizer.encode_chat(query, history)])

    def build_stream_inputs(self, tokenizer: Any, query: str, history: History | None = None):
        """What a further turn adds to the cache of the turns before, [1, T] (ChatGLM2-6B)."""
        return self._batch(tokenizer, [tokenizer.encode_chat_continuation(query, history)])

    def _batch(self, tokenizer: Any, rows: list[list[int]]):
        batch = tokenizer.pad({"input_ids": rows}, padding=True, padding_side="left", return_tensors="pt")
        return batch.to(self.device)

    def chat(
        self,
        tokenizer: Any,
        query: str,
        history: History | None = None,
        max_length: int | None = None,
        num_beams: int = 1,
        do_sample: bool = True,
        top_p: float | None = None,
        temperature: float | None = None,
        logits_processor: LogitsProcessorList | None = None,
        prompt_cache: Any = None,
        max_history_tokens: int | None = None,
        **kwargs: Any,
    ) -> tuple[str, History]:
        """Answer `query` after the rounds of `history`; return the answer and the longer history.

        `max_length` counts prompt and answer in tokens. Other keyword arguments go to `generate`. None means
        the default of the family (CHAT_DEFAULTS). Raises ValueError when the prompt leaves no room.

        prompt_cache: the same PromptCache (generation_chatglm.py) for all turns of a conversation; with ChatGLM2-6B
            each of them then computes its new tokens alone. The answers are those without it.
        max_history_tokens: the model reads only the newest rounds, with which the prompt has so many tokens at
            most, see `trim_history`. The history that is returned has all rounds.
        """
        answers = self.batch_chat(
            tokenizer, [query], [history], max_length=max_length, num_beams=num_beams, do_sample=do_sample,
            top_p=top_p, temperature=temperature, logits_processor=logits_processor, prompt_cache=prompt_cache,
            max_history_tokens=max_history_tokens, **kwargs,
        )  # fmt: skip
        return answers[0]

    def batch_chat(
        self,
        tokenizer: Any,
        queries: list[str],
        histories: list[History | None] | None = None,
        prompt_cache: Any = None,
        max_history_tokens: int | None = None,
        **kwargs: Any,
    ) -> list[tuple[str, History]]:
        """`chat` for several conversations at once; its keyword arguments hold for all of them.

        A `prompt_cache` belongs to one conversation: with it there must be one query, and no beams.
        """
        histories = [None] * len(queries) if histories is None else histories
        if len(histories) != len(queries) or isinstance(queries, str):
            raise ValueError(
                f"{len(queries)} queries and {len(histories)} histories; pass a list of queries and one history "
                "for each."
            )
        for query in queries:
            check_query(query)
        rows = [
            tokenizer.encode_chat(query, trim_history(tokenizer, query, history, max_history_tokens))
            for query, history in zip(queries, histories, strict=True)
        ]
        inputs = self._batch(tokenizer, rows)
        arguments = self._generation_arguments(tokenizer, inputs["input_ids"].shape[1], **kwargs)
        if prompt_cache is None:
            outputs = self.generate(**inputs, **arguments)
        else:
            outputs = prompt_cache.generate(self, inputs["input_ids"], **arguments)
        answers = outputs[:, inputs["input_ids"].shape[1] :].tolist()
        eos = arguments.get("eos_token_id", self.generation_config.eos_token_id)
        eos = eos if isinstance(eos, (list, tuple)) else [eos]
        result = []
        for query, history, ids in zip(queries, histories, answers, strict=True):
            end = next((i + 1 for i, token in enumerate(ids) if token in eos), len(ids))  # then only padding
            response = self.process_response(tokenizer.decode(ids[:end]))
            result.append((response, [*(history or []), (query, response)]))
        return result

    def stream_chat(
        self,
        tokenizer: Any,
        query: str,
        history: History | None = None,
        past_key_values: Cache | None = None,
        max_length: int | None = None,
        do_sample: bool = True,
        top_p: float | None = None,
        temperature: float | None = None,
        logits_processor: LogitsProcessorList | None = None,
        return_past_key_values: bool = False,
        prompt_cache: Any = None,
        max_history_tokens: int | None = None,
        **kwargs: Any,
    ) -> Iterator[tuple]:
        """As `chat`, yielding (answer so far, history) with every token that completes a character.

        The published way to go on without computing everything again, ChatGLM2-6B only: with
        `return_past_key_values` the cache comes along as a third value; given back as `past_key_values` together
        with the history, the next turn computes only its own tokens. That cache holds the tokens that were
        generated, which may differ from those of the same text in a prompt; with a `prompt_cache` they are the same.
        """
        check_query(query)
        history = list(history or [])
        continued = past_key_values is not None or return_past_key_values
        if continued and (prompt_cache is not None or max_history_tokens is not None):
            raise ValueError(
                "past_key_values and return_past_key_values continue a cache as it is, without prompt_cache and "
                "max_history_tokens; leave out the ones or the others."
            )
        if continued:
            inputs = self.build_stream_inputs(tokenizer, query, history)
        else:
            kept = trim_history(tokenizer, query, history, max_history_tokens)
            inputs = self.build_inputs(tokenizer, query, kept)
        input_ids = inputs["input_ids"]
        arguments = self._generation_arguments(
            tokenizer, input_ids.shape[1], max_length=max_length, do_sample=do_sample, top_p=top_p,
            temperature=temperature, logits_processor=logits_processor, **kwargs,
        )  # fmt: skip

        def turn(response: str, cache: Cache | None) -> tuple:
            longer = [*history, (query, response)]
            return (response, longer, cache) if return_past_key_values else (response, longer)

        decoder, shown = tokenizer.stream_decoder(), None
        if prompt_cache is None:
            steps = self.stream_generate(
                input_ids, past_key_values=past_key_values, return_past_key_values=True, **arguments
            )
        else:
            steps = ((ids, None) for ids in prompt_cache.stream_generate(self, input_ids, **arguments))
        for sequences, cache in steps:
            decoder.put(int(sequences[0, -1]))
            if decoder.text and not decoder.pending:
                shown = self.process_response(decoder.text)
                yield turn(shown, cache)
        decoder.flush()
        response = self.process_response(decoder.text)
        if response != shown:  # an answer that is empty or ends inside a character
            yield turn(response, cache)

    def _generation_arguments(
        self,
        tokenizer: Any,
        prompt_length: int,
        max_length: int | None = None,
        do_sample: bool = True,
        top_p: float | None = None,
        temperature: float | None = None,
        logits_processor: LogitsProcessorList | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What `chat` and `stream_chat` hand to `generate`; ValueError if the prompt leaves no room."""
        defaults = CHAT_DEFAULTS[self.config.family]
        if "max_new_tokens" not in kwargs:
            kwargs["max_length"] = defaults["max_length"] if max_length is None else max_length
            if prompt_length >= kwargs["max_length"]:
                raise ValueError(
                    f"The prompt has {prompt_length} tokens and max_length is {kwargs['max_length']}, which "
                    "leaves no room for an answer; raise max_length, or pass a shorter history or max_history_tokens."
                )
        temperature = defaults["temperature"] if temperature is None else temperature
        kwargs["do_sample"] = do_sample and temperature > 0  # temperature 0 means the likeliest token
        if kwargs["do_sample"]:
            kwargs.update(temperature=temperature, top_p=defaults["top_p"] if top_p is None else top_p)
        processors = [KnownTokens(len(tokenizer))] if len(tokenizer) < self.config.vocab_size else []
        kwargs["logits_processor"] = LogitsProcessorList([*processors, *(logits_processor or [])])
        return kwargs


def trim_history(tokenizer: Any, query: str, history: History | None, max_tokens: int | None) -> History:
    """Return the newest rounds with which the prompt for `query` has at most `max_tokens` tokens (None: all).

    Whole rounds are dropped, the oldest first, and a quarter of `max_tokens` at a time: then the prompts of the next
    turns begin alike, and what is cached for one serves the other. The query alone always stays.
    """
    rounds = list(check_history(query, history))
    if max_tokens is None:
        return rounds
    if not isinstance(max_tokens, int) or max_tokens < 0:
        raise ValueError(f"max_history_tokens is {max_tokens!r}; pass a number of tokens, 0 for no history.")
    if len(tokenizer.encode_chat(query, rounds)) <= max_tokens:
        return rounds
    sizes = [round_length(tokenizer, *turn) for turn in rounds]
    surplus = max(1, len(tokenizer.encode_chat(query, [])) + sum(sizes) - max_tokens)
    portion = max(1, max_tokens // 4)
    surplus = -(-surplus // portion) * portion
    while rounds and (surplus > 0 or len(tokenizer.encode_chat(query, rounds)) > max_tokens):
        surplus -= sizes.pop(0)
        del rounds[0]
    return rounds


def round_length(tokenizer: Any, query: str, response: str) -> int:
    """Return how many tokens a round adds to a prompt; a large number in "[Round 100]" may add one more."""
    one, two = (len(tokenizer.encode_chat("", [(query, response)] * times)) for times in (1, 2))
    return two - one


def check_query(query: Any) -> None:
    """Raise ValueError unless `query` is a text; an empty one is answered, as in the published code."""
    if not isinstance(query, str):
        raise ValueError(f"The query is {query!r}; pass a text.")


class KnownTokens(LogitsProcessor):
    """Rules out the rows of the vocabulary that only fill it up and have no text."""

    def __init__(self, number_of_tokens: int) -> None:
        self.number_of_tokens = number_of_tokens
        self.unknown = torch.empty(0, dtype=torch.bool)  # [V], made at the first token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if len(self.unknown) != scores.shape[-1] or self.unknown.device != scores.device:
            ids = torch.arange(scores.shape[-1], device=scores.device)
            self.unknown = ids >= self.number_of_tokens
        return scores.masked_fill(self.unknown, -torch.inf)
