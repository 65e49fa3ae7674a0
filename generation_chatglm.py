"""From logits to tokens: a cache that grows in place, the choice of a token, and the one decoding loop.

`generate`, streams and chats come through `decode_steps`; ChatGLMGenerationMixin at the end puts it into `generate`. It
knows tokens and scores only: what the model makes of them is in modeling_chatglm.py, and all text in
tokenization_chatglm.py and chat_chatglm.py.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.masking_utils import create_causal_mask

from .configuration_chatglm import CHATGLM, CHATGLM2, ChatGLMConfig
from .layers_chatglm import OneTokenStep, can_step
from .positions_chatglm import (
    check_generation_mask,
    check_prompt,
    glm_positions,
    pack_positions,
    two_dimensional_mask,
)
from .quantization import prepack_all
from .quantization_plain import product_dtype

STEP = 256  # tokens by which caches, masks and rotary tables grow: short chats do not pay for long ones
CHUNK = 1024  # tokens of a prompt that ChatGLM2 reads at once


class GrowingLayer(DynamicLayer):
    """Keys and values [B, G, T, D] of one layer, at the front of buffers that have room for more.

    A token is written in place; `DynamicLayer` copies all that came before it. With `dtype` they are kept in
    another one than they come in.
    """

    _buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.kept_dtype = dtype

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [B, G, new, D]; return all keys and all values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.get_seq_length()
        end = past + key_states.shape[-2]
        if not self._has_room(end):
            self._buffers = (
                self._enlarged(self.keys, key_states, past, end),
                self._enlarged(self.values, value_states, past, end),
            )
        keys, values = self._buffers
        keys[:, :, past:end] = key_states
        values[:, :, past:end] = value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values

    def keep(self, length: int) -> None:
        """Forget all but the first `length` tokens, whatever a step that was broken off has left."""
        if self._buffers is not None:
            self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)

    def _has_room(self, end: int) -> bool:
        """Whether `end` tokens fit, and nobody has put other tensors into `keys` (beams do)."""
        buffers = self._buffers
        return (
            buffers is not None
            and end <= buffers[0].shape[2]
            and self.keys.data_ptr() == buffers[0].data_ptr()
        )

    def _enlarged(self, states: torch.Tensor, new: torch.Tensor, past: int, end: int) -> torch.Tensor:
        room = -(-(end + 1) // STEP) * STEP  # and not full right after the prompt
        with torch.inference_mode(False):  # `Steps` turns it on, but others will write here too
            buffer = new.new_empty(*new.shape[:2], room, new.shape[3], dtype=self.kept_dtype)
        if past:
            buffer[:, :, :past] = states
        return buffer


def to_int8(states: torch.Tensor) -> torch.Tensor:
    """[..., D] -> int8 [..., D + 2]: whole numbers of -127 to 127, then the bytes of their scale in float16.

    Every token of a head has its own scale, the largest of its values / 127.
    """
    half = torch.finfo(torch.float16)
    scale = (states.abs().amax(-1, keepdim=True).float() / 127).clamp(half.tiny, half.max).half()
    integers = (states.float() / scale.float()).round().clamp(-127, 127).to(torch.int8)
    return torch.cat((integers, scale.view(torch.int8)), dim=-1)


def from_int8(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """int8 [..., D + 2] as `to_int8` makes it -> [..., D]."""
    return packed[..., :-2].to(dtype).mul_(packed[..., -2:].view(torch.float16).to(dtype))


class Int8Layer(GrowingLayer):
    """Keeps keys and values as `to_int8` packs them, in one tensor each, and gives them out as numbers.

    Also the newest ones are given out rounded, so that a text has the same keys and values however it is cut up.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.given_dtype = dtype

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [B, G, new, D]; return all keys and all values."""
        dtype = self.given_dtype or key_states.dtype
        keys, values = super().update(to_int8(key_states), to_int8(value_states))
        return from_int8(keys, dtype), from_int8(values, dtype)


class GrowingCache(DynamicCache):
    """A DynamicCache whose layers are written in place."""

    layer_type = GrowingLayer

    def __init__(self, num_layers: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.layers = [self.layer_type(dtype) for _ in range(num_layers)]
        self.layer_class_to_replicate = self.layer_type

    def keep(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        for layer in self.layers:
            layer.keep(length)


class Int8Cache(GrowingCache):
    """A GrowingCache of about half the size of one in 16 bits; a token takes longer by the time of unpacking it."""

    layer_type = Int8Layer


class Sampler:
    """Chooses the next token of every row from scores [B, V]: the likeliest, or one drawn.

    Temperature, top-k and top-p at the end of the processors are done together: after top-k only its few scores are
    sorted, never the vocabulary. The distribution is that of the processors one by one.
    """

    def __init__(self, processors: LogitsProcessorList, do_sample: bool) -> None:
        self.processors, self.do_sample = list(processors), do_sample
        self.temperature, self.top_k, self.top_p = 1.0, 0, 1.0
        tail = [type(processor) for processor in self.processors[-3:]]
        if do_sample and tail == [TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper]:
            temperature, top_k, top_p = self.processors[-3:]
            self._take(3, temperature.temperature, top_k, top_p.top_p)
        elif do_sample and tail[-2:] == [TopKLogitsWarper, TopPLogitsWarper]:
            self._take(2, 1.0, self.processors[-2], self.processors[-1].top_p)

    def _take(self, number: int, temperature: float, top_k: TopKLogitsWarper, top_p: float) -> None:
        del self.processors[-number:]
        self.temperature, self.top_k, self.top_p = temperature, top_k.top_k, top_p

    def __call__(self, sequences: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Token ids [B]."""
        for processor in self.processors:
            scores = processor(sequences, scores)
        if not self.do_sample:
            return scores.argmax(dim=-1)
        ids, probabilities = self.distribution(scores)
        drawn = torch.multinomial(probabilities, 1)
        return (drawn if ids is None else ids.gather(1, drawn)).squeeze(1)

    def distribution(self, scores: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Ids [B, k] and their probabilities, or None for all ids; the sums need not be 1."""
        if not self.top_k:
            return None, scores.softmax(dim=-1)
        best, ids = scores.topk(min(self.top_k, scores.shape[-1]), dim=-1)  # descending
        probabilities = (best / self.temperature).softmax(dim=-1)
        # A token stays while those before it have less than top_p: the first one always does.
        before = probabilities.cumsum(dim=-1) - probabilities
        return ids, probabilities.masked_fill(before >= self.top_p, 0.0)


class StopCheck:
    """Tells which rows have ended: the usual two criteria from the new tokens alone, others as they ask."""

    def __init__(self, criteria: Any) -> None:
        self.max_length = min((c.max_length for c in criteria if type(c) is MaxLengthCriteria), default=None)
        self.ends = [c.eos_token_id for c in criteria if type(c) is EosTokenCriteria]
        self.others = [c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]

    def __call__(self, sequences: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """[B], True for rows that end with `tokens` [B]."""
        if self.max_length is not None and sequences.shape[1] >= self.max_length:
            return torch.ones_like(tokens, dtype=torch.bool)
        done = torch.zeros_like(tokens, dtype=torch.bool)
        for ids in self.ends:
            done |= torch.isin(tokens, ids.to(tokens.device))
        for criterion in self.others:
            done |= criterion(sequences, None)
        return done


class PromptLookup:
    """Guesses how a text goes on: as it did the last time that its last tokens stood in it (Saxena 2023).

    What an answer copies, names, code, a passage that it quotes, is guessed so without a second model. Guesses grow
    while they are right: `most` tokens at a time are tried only where they pay.

        text   a b c d ... a b      guess   c d
    """

    SHORTEST, LONGEST = 2, 3  # tokens in a row that must be found again; one alone guesses wrongly too often

    def __init__(self, ids: list[int], most: int, longest: int | None = None) -> None:
        if most < 1 or (longest is not None and longest < 1):
            raise ValueError(
                f"prompt_lookup_num_tokens is {most} and max_matching_ngram_size is {longest}; both must be 1 at "
                "least, or left out."
            )
        longest = self.LONGEST if longest is None else longest
        self.sizes = range(longest, min(self.SHORTEST, longest) - 1, -1)
        self.most, self.number = most, min(2, most)
        self.ids: list[int] = []
        self.followers: dict[tuple[int, ...], int] = {}  # a run of tokens -> where its last place ended
        for token in ids:
            self.append(token)

    def append(self, token: int) -> None:
        """The text has one token more."""
        for run in self._last_runs():
            self.followers[run] = len(self.ids)
        self.ids.append(token)

    def guess(self) -> list[int]:
        """The next tokens, or none; of a text that repeats itself as many as are asked for."""
        start = next((self.followers[run] for run in self._last_runs() if run in self.followers), None)
        if start is None:
            return []
        end = len(self.ids)
        return [self.ids[start + i % (end - start)] for i in range(self.number)]

    def judge(self, right: int, guessed: int) -> None:
        """So many of the guessed tokens were right: the next guess has twice as many, or one more than that."""
        self.number = min(2 * guessed if right == guessed else right + 1, self.most)

    def _last_runs(self) -> Iterator[tuple[int, ...]]:
        """The runs of tokens that the text ends with, the longest first."""
        return (tuple(self.ids[-size:]) for size in self.sizes if size <= len(self.ids))


def prompt_lookup(input_ids: torch.Tensor, generation_config: Any) -> PromptLookup | None:
    """What `prompt_lookup_num_tokens` asks for; ValueError for several rows, which would part."""
    most = generation_config.prompt_lookup_num_tokens
    if most is None:
        return None
    if len(input_ids) != 1:
        raise ValueError(
            f"prompt_lookup_num_tokens serves one conversation at a time, but there are {len(input_ids)} rows; "
            "leave it out."
        )
    return PromptLookup(input_ids[0].tolist(), most, generation_config.max_matching_ngram_size)


def decode_steps(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: Any,
    generation_config: Any,
    cached: int = 0,
    **model_kwargs: Any,
) -> Iterator[tuple[torch.Tensor, Cache]]:
    """The decoding loop: yields the sequences so far [B, T] and the cache after every token.

    `generate` calls it with everything prepared. The first `cached` tokens of `input_ids` are not computed: the cache
    holds them already. It never holds the token that was chosen last. Closing the iterator frees all of it at once.
    """
    sampler, stop = Sampler(logits_processor, generation_config.do_sample), StopCheck(stopping_criteria)
    padding = generation_config._pad_token_tensor
    sequences, finished = input_ids, torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    lookup = prompt_lookup(input_ids, generation_config)
    steps = next_scores(model, input_ids, cached, lookup, model_kwargs)
    scores, cache = next(steps)
    while True:
        with torch.no_grad():
            tokens = sampler(sequences, scores)
            if padding is not None and len(tokens) > 1:
                tokens = torch.where(finished, padding, tokens)
            sequences = torch.cat((sequences, tokens[:, None]), dim=-1)
            finished = finished | stop(sequences, tokens)
        ended = bool(finished.all())
        yield sequences, cache
        if ended:
            return
        scores, cache = steps.send(tokens[:, None])


def next_scores(
    model: Any,
    input_ids: torch.Tensor,
    cached: int,
    lookup: PromptLookup | None,
    model_kwargs: dict[str, Any],
) -> Iterator[tuple[torch.Tensor, Cache]]:
    """Scores [B, V] in float32 after `input_ids`, then after each [B, 1] that is sent in, and the cache."""
    mask, positions, cache = (
        model_kwargs.get(name) for name in ("attention_mask", "position_ids", "past_key_values")
    )
    input_ids, positions = input_ids[:, cached:], None if positions is None else positions[:, cached:]
    if cache is None or (type(cache) is DynamicCache and not cache.get_seq_length()):
        cache = model.new_cache()
    if lookup and not isinstance(cache, GrowingCache):
        raise ValueError(
            f"prompt_lookup_num_tokens takes back what was guessed wrongly, which a {type(cache).__name__} cannot; "
            "leave past_key_values and cache_implementation out."
        )
    tokens = yield read_prompt(model, input_ids, mask, positions, cache), cache
    run = (Steps if isinstance(cache, GrowingCache) else PlainSteps)(model, cache, mask, positions)
    while True:
        if lookup:
            tokens = yield from guessed_scores(run, lookup, cache, tokens)
        else:
            tokens = yield run(tokens)[:, -1], cache


def guessed_scores(
    run: Steps, lookup: PromptLookup, cache: GrowingCache, tokens: torch.Tensor
) -> Iterator[tuple[torch.Tensor, Cache]]:
    """Scores after `tokens` [1, 1] and after what is guessed to follow, all from one pass, until a guess is wrong.

    Returns the token that comes instead. Each one is chosen from scores that the model gives for just what stands
    before it, so a guess changes how fast an answer comes, not which; only sums in another order round otherwise.
    """
    lookup.append(int(tokens))
    guess, past = lookup.guess(), cache.get_seq_length()
    scores = run(torch.cat((tokens, tokens.new_tensor([guess])), dim=-1) if guess else tokens)
    for right in range(len(guess) + 1):
        cache.keep(past + 1 + right)  # of what the pass has computed, only what is known to be right
        tokens = yield scores[:, right], cache
        if right == len(guess) or int(tokens) != guess[right]:
            break
        lookup.append(guess[right])
    if guess:
        lookup.judge(right, len(guess))
    return tokens


def read_prompt(
    model: Any,
    input_ids: torch.Tensor,
    mask: torch.Tensor | None,
    positions: torch.Tensor | None,
    cache: Cache,
) -> torch.Tensor:
    """Scores [B, V] in float32 after the tokens [B, T] that follow on the cache; `mask` is of these and those.

    Where a token sees only what stands before it, they are read in chunks: beside the cache itself a long prompt
    then takes no more memory than a short one.
    """
    past, length = cache.get_seq_length(), input_ids.shape[1]
    chunk = CHUNK if model.reads_forward else length

    def inputs(start: int) -> dict[str, Any]:
        part = slice(start, start + chunk)
        return {
            "input_ids": input_ids[:, part],
            "attention_mask": None if mask is None else mask[:, : past + part.stop],
            "position_ids": None if positions is None else positions[:, part],
            "past_key_values": cache,
            "use_cache": True,
        }

    *starts, last = range(0, length, chunk)
    with torch.no_grad():
        for start in starts:
            model.transformer(**inputs(start))  # nobody asks for the scores of these
        return model(**inputs(last), logits_to_keep=1).logits[:, -1].float()


class PlainSteps:
    """Calls the whole model with one more token of every row, with arguments that grow, on any kind of cache."""

    def __init__(
        self, model: Any, cache: Cache, mask: torch.Tensor | None, positions: torch.Tensor | None
    ) -> None:
        self.model, self.cache, self.mask, self.positions = model, cache, mask, positions

    @torch.no_grad()
    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Scores [B, 1, V] in float32 after `tokens` [B, 1]."""
        if self.positions is not None:
            self.positions = self.positions[:, -1:] + 1
        if self.mask is not None:
            self.mask = F.pad(self.mask, (0, 1), value=1)
        return self.model(
            input_ids=tokens,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        ).logits.float()


class Steps:
    """Calls the model with further tokens of every row; on a GrowingCache, which may be cut back in between.

    One token goes through the model's `OneTokenStep`, with what does not depend on it made ahead.
    """

    def __init__(
        self, model: Any, cache: GrowingCache, mask: torch.Tensor | None, positions: torch.Tensor | None
    ) -> None:
        self.model, self.cache, self.step = model, cache, model.one_token_step()
        self.past, self.first = cache.get_seq_length(), model.next_position(cache, mask, positions)
        self.mask = None if mask is None or bool(mask.all()) else mask
        self.start, self.visible = -STEP, None  # of the tables: there are none yet

    @torch.no_grad()
    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Scores [B, T, V] in float32 after each of `tokens` [B, T]."""
        made, new = self.cache.get_seq_length() - self.past, tokens.shape[1]
        scores = self._one(tokens, made) if self.step and new == 1 else self._several(tokens, made)
        if hasattr(self.cache, "glm_next_position"):  # for a later `forward` without positions
            self.cache.glm_next_position = (self.past + made + new, self.first + made + new)
        return scores

    def _one(self, tokens: torch.Tensor, made: int) -> torch.Tensor:
        if not self.start <= made < self.start + STEP:
            self.start = made
            self.cos, self.sin = self.step.tables(self._positions(made, STEP))
            self.visible = None if self.mask is None else self._mask(made + STEP).bool()[:, None, None]
        i = made - self.start
        rotary = self.cos[:, :, i : i + 1], self.sin[:, :, i : i + 1]
        visible = None if self.visible is None else self.visible[..., : self.past + made + 1]
        # Every small operation takes a seventh less in this mode; the copy is a tensor that others may change.
        with torch.inference_mode():
            scores = self.step(tokens, rotary, visible, self.cache)
        return scores.clone()[:, None]

    def _several(self, tokens: torch.Tensor, made: int) -> torch.Tensor:
        new = tokens.shape[1]
        return self.model(
            input_ids=tokens,
            attention_mask=None if self.mask is None else self._mask(made + new),
            position_ids=self._positions(made, new),
            past_key_values=self.cache,
            use_cache=True,
        ).logits.float()

    def _positions(self, made: int, new: int) -> torch.Tensor:
        """[B or 1, new]; of ChatGLM-6B packed, where the next token is one more too."""
        return self.first + torch.arange(made, made + new, device=self.first.device)

    def _mask(self, made: int) -> torch.Tensor:
        """[B, T] of the prompt and `made` tokens after it."""
        return F.pad(self.mask, (0, made), value=1)


class PromptCache:
    """What was computed for the last prompt and answer of a conversation: the next turn computes only what is new.

        prompt_cache = PromptCache()
        for query in ("你好", "你是谁？"):
            response, history = model.chat(tokenizer, query, history, prompt_cache=prompt_cache)

    Prompts are encoded as ever, and keys and values are kept for equal tokens at equal places alone, up to the first
    difference: answers are those of a chat without it. A history that was changed or trimmed, another conversation
    or another model cost time, nothing else. Only after changing the weights of the model call `clear`.

    For ChatGLM-6B nothing is kept and every turn computes its whole prompt: there each token of a prompt sees those
    behind it too, so that a longer prompt has other keys and values throughout.

    A turn takes what is here out until it ends. One that begins meanwhile, in another thread or not, starts afresh;
    one that is stopped leaves what it has computed, one that fails leaves nothing.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: tuple[tuple, torch.Tensor, GrowingCache] | None = None

    def clear(self) -> None:
        """Forget everything and free its memory."""
        self._take()

    def generate(
        self, model: Any, input_ids: torch.Tensor, streamer: Any = None, **options: Any
    ) -> torch.Tensor:
        """`model.generate` for one whole prompt [1, T]: greedy or sampled, the sequence [1, T] with the answer."""
        sequences = input_ids
        for sequences in self.stream_generate(model, input_ids, streamer=streamer, **options):
            if streamer is not None:
                streamer.put(sequences[:, -1].cpu())
        if streamer is not None:
            streamer.end()
        return sequences

    def stream_generate(
        self, model: Any, input_ids: torch.Tensor, int8_cache: bool = False, **options: Any
    ) -> Iterator[torch.Tensor]:
        """Yield the sequence so far [1, T] after every token of the answer to one whole prompt [1, T]."""
        beams = options.get("num_beams", 1)
        if len(input_ids) != 1 or beams != 1:
            raise ValueError(
                f"A PromptCache serves one conversation and one beam, but there are {len(input_ids)} prompts and "
                f"num_beams is {beams}; leave it out."
            )
        key = weakref.ref(model), model.device, model.dtype, model.config.quantization_bit, int8_cache
        cache = self._beginning_of(input_ids[0], key)
        if cache is None:
            cache = model.new_cache(int8_cache)
        sequences, failed = input_ids, False
        try:
            for sequences, _ in model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                past_key_values=cache,
                custom_generate=decode_steps,
                cached=cache.get_seq_length(),
                **options,
            ):
                yield sequences
        except Exception:
            failed = True
            raise
        finally:  # also when it was closed or interrupted, which is no Exception
            if model.reads_forward and not failed:
                self._put(sequences[0], cache, key)

    def _take(self) -> tuple[tuple, torch.Tensor, GrowingCache] | None:
        with self._lock:
            kept, self._kept = self._kept, None
        return kept

    def _beginning_of(self, prompt: torch.Tensor, key: tuple) -> GrowingCache | None:
        """The cache, cut to what it has of `prompt` [T]; None if it is another model's. One token is left out."""
        known, ids, cache = self._take() or (None, None, None)
        if known != key:
            return None
        length = min(len(ids), len(prompt) - 1)
        cache.keep(int((ids[:length] == prompt[:length]).cumprod(dim=0).sum()))
        return cache

    def _put(self, sequence: torch.Tensor, cache: GrowingCache, key: tuple) -> None:
        """Keep `cache` and the tokens that all layers have: the last step may have been broken off in any of them."""
        length = min(layer.get_seq_length() for layer in cache.layers)
        with self._lock:
            self._kept = (key, sequence[:length], cache)


class FiniteScores(LogitsProcessor):
    """Stops a generation whose scores are no longer numbers, instead of sampling from them."""

    def __init__(self) -> None:
        self.step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.step += 1
        highest = scores.amax(dim=-1)  # NaN if there is one
        broken = torch.isnan(highest) | torch.isposinf(highest)
        if broken.any():
            row = int(broken.nonzero()[0])
            raise ValueError(
                f"The scores of new token {self.step} in row {row} are NaN or infinite: the weights are damaged, "
                "or float16 overflowed; check the files, or load the model in bfloat16 or float32."
            )
        return scores


class InvalidScoreLogitsProcessor(LogitsProcessor):
    """For old callers: a row with NaN or infinite scores gets one certain token, the published choice.

    Our own `chat` does not use it (see FiniteScores): it hides damaged weights.
    """

    FALLBACK_TOKEN_ID = 5

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        broken = ~torch.isfinite(scores).all(dim=-1, keepdim=True)
        fallback = torch.zeros_like(scores)
        fallback[:, self.FALLBACK_TOKEN_ID] = 5e4
        return torch.where(broken, fallback, scores)


class ChatGLMGenerationMixin(GenerationMixin):
    """`generate` and what it asks of a model: the loop above, and the library's where that can more."""

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        # The library reads config.json itself, and so misses the ids that ChatGLMConfig adds to it.
        super().adjust_generation_fn(*args, **kwargs)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self.generation_config, name) is None:
                setattr(self.generation_config, name, getattr(self.config, name))

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: Any = None,
        logits_processor: LogitsProcessorList | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """`GenerationMixin.generate`, which stops when scores are no longer finite (FiniteScores).

        For ChatGLM-6B the published four-dimensional masks and two-row positions are taken too. With
        `int8_cache=True` keys and values are kept in 8 bits (Int8Cache).
        """
        prepack_all(
            self, quantized_only=True
        )  # here for all layers at once; each would do it at its first use
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        if kwargs.pop("int8_cache", False):
            kwargs["past_key_values"] = self._int8_cache(kwargs.get("past_key_values"))
        check_generation_mask(kwargs.get("attention_mask"), ids)
        if self.config.family == CHATGLM:
            self._refuse_chunked_prefill(generation_config, kwargs)
            mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
            if mask is not None and mask.dim() == 4:
                kwargs["attention_mask"] = two_dimensional_mask(mask, ids, self.config)
            if positions is not None and positions.dim() == 3:
                kwargs["position_ids"] = pack_positions(positions)
        processors = LogitsProcessorList([FiniteScores(), *(logits_processor or [])])
        return super().generate(inputs, generation_config, processors, *args, **kwargs)

    # `generate` names all that it gives to the two methods below.
    def _sample(
        self, input_ids: torch.Tensor, *, synced_gpus: bool = False, streamer: Any = None, **kwargs: Any
    ) -> Any:
        """What `generate` runs for greedy decoding and sampling: our loop, or the library's where that can more."""
        if synced_gpus or not self._our_loop_will_do(**kwargs):
            return super()._sample(input_ids, synced_gpus=synced_gpus, streamer=streamer, **kwargs)
        sequences = input_ids
        for sequences, _ in decode_steps(self, input_ids, **kwargs):
            if streamer is not None:
                streamer.put(sequences[:, -1].cpu())
        if streamer is not None:
            streamer.end()
        return sequences

    def _assisted_decoding(
        self, input_ids: torch.Tensor, *, synced_gpus: bool = False, inputs_tensor: Any = None, **kwargs: Any
    ) -> Any:
        """What `generate` runs where several tokens may come of one pass; `prompt_lookup_num_tokens` is our loop's."""
        looked_up = kwargs["generation_config"].prompt_lookup_num_tokens is not None
        others = synced_gpus or kwargs.get("assistant_model") is not None
        if looked_up and not others and self._our_loop_will_do(**kwargs):
            return self._sample(input_ids, **kwargs)
        return super()._assisted_decoding(
            input_ids, synced_gpus=synced_gpus, inputs_tensor=inputs_tensor, **kwargs
        )

    def _our_loop_will_do(self, generation_config: Any, **kwargs: Any) -> bool:
        """Whether `decode_steps` gives what `generate` was asked for."""
        wanted_more = generation_config.return_dict_in_generate or generation_config.is_assistant
        cache = kwargs.get("past_key_values")
        # A filled cache comes with all ids, of which the library takes those that follow.
        known_cache = type(cache) in (DynamicCache, GrowingCache, Int8Cache)
        other_cache = not known_cache or cache.get_seq_length() > 0
        # PEFT's prefix tuning brings its keys in through this method, which our loop does not call.
        prepare = getattr(self.prepare_inputs_for_generation, "__func__", None)
        replaced = prepare is not type(self).prepare_inputs_for_generation
        uncached = "inputs_embeds" in kwargs or not kwargs.get("use_cache", True)
        return not (wanted_more or other_cache or replaced or uncached)

    def next_position(
        self, cache: Cache, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
    ) -> torch.Tensor:
        """Position [B or 1, 1] of the token after those on the cache, packed for ChatGLM-6B."""
        if self.config.family == CHATGLM:
            return cache.glm_next_position[1]
        if position_ids is not None:
            return position_ids[:, -1:] + 1
        if attention_mask is not None and attention_mask.dim() == 2:
            return attention_mask.sum(-1, keepdim=True)
        return torch.full((1, 1), cache.get_seq_length(), device=self.device)

    def new_cache(self, int8: bool = False) -> GrowingCache:
        """An empty cache of the kind that our decoding loop fills."""
        return (Int8Cache if int8 else GrowingCache)(self.config.num_layers, self.cache_dtype)

    def _int8_cache(self, cache: Cache | None) -> Cache:
        """`cache`, or a new one; ValueError if it is of another kind."""
        if cache is not None and not isinstance(cache, Int8Cache):
            raise ValueError(
                f"int8_cache is true, but past_key_values is a {type(cache).__name__}; begin with an Int8Cache, or "
                "leave one of the two out."
            )
        return self.new_cache(int8=True) if cache is None else cache

    @property
    def cache_dtype(self) -> torch.dtype | None:
        """What attention takes keys and values in, None: as they are computed.

        Many heads with keys of their own are slow in half precision on CPUs without instructions for it: 512 tokens
        take 4.5 ms a layer of ChatGLM-6B in bfloat16, 0.8 ms in float32 (Zen 3).
        """
        slow = self.device.type == "cpu" and self.dtype != product_dtype(self.dtype)
        return torch.float32 if slow and self.config.family == CHATGLM else None

    @property
    def reads_forward(self) -> bool:
        """Whether a token of a prompt sees only what stands before it; ChatGLM-6B's see each other both ways."""
        return self.config.family == CHATGLM2

    def one_token_step(self) -> OneTokenStep | None:
        """A faster way to call the model with one more token of every row; None where only `forward` will do."""
        return OneTokenStep(self) if can_step(self) else None

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Several requests in one batch that they join and leave at any step (ChatGLM2-6B only)."""
        self._refuse_causal_only_attention("paged")
        return super().init_continuous_batching(*args, **kwargs)

    def _refuse_chunked_prefill(self, generation_config: Any, kwargs: dict[str, Any]) -> None:
        config = generation_config or self.generation_config
        if kwargs.get("prefill_chunk_size") or getattr(config, "prefill_chunk_size", None):
            raise ValueError(
                "prefill_chunk_size cuts the prompt into pieces, but ChatGLM-6B reads its prompt in both "
                "directions and would answer wrongly; leave it out."
            )

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]
    ) -> torch.Tensor | None:
        if self.config.family == CHATGLM2:
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        input_ids = inputs_tensor if not inputs_tensor.is_floating_point() else model_kwargs.get("input_ids")
        if input_ids is None or input_ids.shape[1] == 0:
            return None
        check_prompt(input_ids, self.config)
        return glm_positions(input_ids, model_kwargs.get("attention_mask"), self.config)

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, *args: Any, inputs_embeds: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """`GenerationMixin`'s, with the packed positions under a name of their own."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, inputs_embeds=inputs_embeds, **kwargs
        )
        if self.config.family == CHATGLM and "position_ids" in inputs:
            # PEFT's prefix tuning adds its length to `position_ids`, which packed ones do not survive.
            inputs["packed_position_ids"] = inputs.pop("position_ids")
        return inputs

    def create_masks_for_generate(
        self,
        config: ChatGLMConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> torch.Tensor | None:
        """The mask that static caches are given ahead of `forward`; prompts draw theirs inside, from the ids."""
        if inputs_embeds.shape[1] > 1:
            return attention_mask
        mask = create_causal_mask(config, inputs_embeds, attention_mask, past_key_values)
        if isinstance(mask, torch.Tensor) and mask.dtype == torch.bool:
            return ~mask  # the published kind, which `forward` expects of a boolean one
        return mask

    def stream_generate(
        self,
        input_ids: torch.Tensor,
        generation_config: Any = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: Any = None,
        prefix_allowed_tokens_fn: Callable | None = None,
        return_past_key_values: bool = False,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Iterator:
        """Yield the sequences so far [B, T] after every token (and the cache, if asked for).

        On a filled `past_key_values`, `input_ids` are only the tokens that follow. The cache never holds the
        token that was sampled last, as in the published code.
        """
        if past_key_values is not None:
            past = past_key_values.get_seq_length()
            seen = torch.arange(past + input_ids.shape[1], device=input_ids.device).expand(len(input_ids), -1)
            kwargs.setdefault("attention_mask", torch.ones_like(seen))
            kwargs.update(past_key_values=past_key_values, position_ids=seen[:, past:])
        steps = self.generate(
            input_ids,
            generation_config,
            logits_processor,
            stopping_criteria,
            prefix_allowed_tokens_fn,
            custom_generate=decode_steps,
            **kwargs,
        )
        for sequences, cache in steps:
            yield (sequences, cache) if return_past_key_values else sequences
