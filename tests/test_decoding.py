"""The decoding loop, its cache and its choice of tokens, against transformers' own."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from helpers import (
    CHATGLM,
    CHATGLM2,
    EOP,
    PAD,
    assert_close,
    logits,
    pad_left,
    prompt,
    three_rows,
    tiny_model,
)
from transformers import GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import DynamicCache
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from chatglm.hub import generation_chatglm
from chatglm.hub.generation_chatglm import STEP, FiniteScores, GrowingCache, Sampler
from chatglm.hub.layers_chatglm import OneTokenStep, can_step
from chatglm.hub.modeling_chatglm import ChatGLMForConditionalGeneration

NEW = 12


class Plain(ChatGLMForConditionalGeneration):
    """The model with the library's loop."""

    _sample = GenerationMixin._sample


def plainly(model: ChatGLMForConditionalGeneration, ids: torch.Tensor, **options) -> torch.Tensor:
    own = type(model)
    model.__class__ = Plain
    try:
        return model.generate(ids, **options)
    finally:
        model.__class__ = own


VARIANTS = {
    "float32": lambda model: model,
    "bfloat16": lambda model: model.bfloat16(),
    "int8": lambda model: model.quantize(8),
    "int4": lambda model: model.quantize(4, quantize_embeddings=True),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_is_bit_for_bit_a_forward_pass(model, ids, variant):
    model = VARIANTS[variant](model)
    with torch.no_grad():
        whole, stepped = (GrowingCache(model.config.num_layers) for _ in range(2))
        for cache in (whole, stepped):
            model(ids[:, :-3], past_key_values=cache, use_cache=True)
        step = model.one_token_step()
        for i in range(ids.shape[1] - 3, ids.shape[1]):
            position = model.next_position(stepped, None, torch.tensor([[i - 1]]))
            expected = model(ids[:, i : i + 1], past_key_values=whole, use_cache=True).logits[:, -1].float()
            actual = step(ids[:, i : i + 1], step.tables(position), None, stepped)
            stepped.glm_next_position = (i + 1, position + 1)
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("options", [{}, {"multi_query_attention": False}, {"rmsnorm": False}], ids=str)
def test_variants_of_chatglm2_step_as_they_run(options):
    model, ids = tiny_model(CHATGLM2, **options), prompt(CHATGLM2)
    assert isinstance(model.one_token_step(), OneTokenStep)
    fast = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(fast, plainly(model, ids, max_new_tokens=NEW, do_sample=False))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loop_gives_the_tokens_of_the_library(model, family, variant):
    model = VARIANTS[variant](model)
    ids = prompt(family, 20)
    options = {"max_new_tokens": NEW, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), plainly(model, ids, **options))


def test_a_padded_batch_gives_the_tokens_of_the_library(model, family):
    """Rows of different lengths, one of which ends first and is padded from there on."""
    ids, mask = pad_left(three_rows(family), PAD)
    options = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD}
    end = int(model.generate(ids, **options)[1, ids.shape[1] + 2])
    options["eos_token_id"] = [end, EOP]
    fast = model.generate(ids, **options)
    assert torch.equal(fast, plainly(model, ids, **options))
    assert (fast[1, ids.shape[1] + 3 :] == PAD).all()


def test_a_long_answer_crosses_the_steps_by_which_buffers_grow(model, family, monkeypatch):
    monkeypatch.setattr(generation_chatglm, "STEP", 8)
    ids, mask = pad_left(three_rows(family), PAD)
    options = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False, "pad_token_id": PAD}
    options["eos_token_id"] = None
    assert torch.equal(model.generate(ids, **options), plainly(model, ids, **options))


def test_a_hook_on_any_layer_is_not_passed_over(model, family):
    calls = []
    model.transformer.blocks[1].mlp.register_forward_hook(lambda *args: calls.append(1))
    assert not can_step(model)
    model.generate(prompt(family), max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert len(calls) == 5


@pytest.mark.parametrize("options", [{"pre_seq_len": 3}, {"attn_implementation": "eager"}], ids=str)
def test_rare_options_go_through_forward_and_give_the_tokens_of_the_library(family, options):
    model = tiny_model(family, **options)
    assert model.one_token_step() is None
    ids = prompt(family)
    fast = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(fast, plainly(model, ids, max_new_tokens=NEW, do_sample=False))


def test_what_our_loop_cannot_give_comes_from_the_library(model, family):
    ids = prompt(family)
    outputs = model.generate(
        ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_scores=True
    )
    assert len(outputs.scores) == 4
    assert torch.equal(outputs.sequences, model.generate(ids, max_new_tokens=4, do_sample=False))


def test_inputs_that_others_prepare_are_taken(model, family):
    """PEFT's prefix tuning brings its keys in so, and puts the method back afterwards."""
    ids, calls, own = prompt(family), [], model.prepare_inputs_for_generation

    def prepare(*args, **kwargs) -> dict:
        calls.append(1)
        return own(*args, **kwargs)

    for method in (prepare, own):
        model.prepare_inputs_for_generation = method
        model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
        assert len(calls) == 3


def test_processors_and_stopping_criteria_of_the_caller_are_asked(model, family):
    ids, seen = prompt(family), []

    def only_seven(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(input_ids.shape[1])
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([7]), 0.0)

    def three(input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] == ids.shape[1] + 3)

    out = model.generate(
        ids,
        do_sample=False,
        max_new_tokens=NEW,
        logits_processor=LogitsProcessorList([only_seven]),
        stopping_criteria=StoppingCriteriaList([three]),
    )
    assert out[0, ids.shape[1] :].tolist() == [7, 7, 7]
    assert seen == [ids.shape[1] + i for i in range(3)]


class Streamer:
    def __init__(self) -> None:
        self.pieces, self.ended = [], False

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_a_streamer_gets_the_prompt_and_then_every_token(model, family):
    ids, streamer = prompt(family), Streamer()
    out = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, streamer=streamer)
    assert streamer.ended and streamer.pieces[0] == ids[0].tolist()
    assert [token for piece in streamer.pieces[1:] for token in piece] == out[0, ids.shape[1] :].tolist()


def test_a_stream_closed_in_the_middle_leaves_nothing_allocated(model, family):
    steps = model.stream_generate(prompt(family), max_new_tokens=50, return_past_key_values=True)
    _, cache = next(steps)
    next(steps)
    keys = [weakref.ref(layer._buffers[0]) for layer in cache.layers]
    assert all(key() is not None for key in keys)
    steps.close()
    del cache, steps
    gc.collect()
    assert all(key() is None for key in keys)


def test_a_model_grows_no_more_by_a_second_answer(model, family):
    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    ids = prompt(family)
    model.generate(ids, max_new_tokens=5)
    before = tensors()
    model.generate(ids, max_new_tokens=5)
    assert tensors() == before


# ---- the cache


def states(length: int, seed: int) -> torch.Tensor:
    return torch.randn(2, 3, length, 4, generator=torch.Generator().manual_seed(seed))


def test_the_cache_gives_what_a_dynamic_cache_gives():
    ours, theirs = GrowingCache(1), DynamicCache()
    for seed, length in enumerate([5, 1, STEP, 1, 2 * STEP, 1, 1]):
        new = states(length, seed), states(length, 100 + seed)
        for actual, expected in zip(ours.update(*new, 0), theirs.update(*new, 0), strict=True):
            assert torch.equal(actual, expected)
        assert ours.get_seq_length() == theirs.get_seq_length()


def test_a_token_is_written_in_place():
    cache = GrowingCache(1)
    first, _ = cache.update(states(5, 0), states(5, 1), 0)
    second, _ = cache.update(states(1, 2), states(1, 3), 0)
    assert second.data_ptr() == first.data_ptr() and second.shape[2] == 6


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.crop(-2),
        lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
        lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
        lambda cache: cache.reset(),
    ],
    ids=["crop", "select", "reorder", "reset"],
)
def test_what_others_do_to_a_cache_holds_for_the_next_token(change):
    ours, theirs = GrowingCache(1), DynamicCache()
    for cache in (ours, theirs):
        cache.update(states(5, 0), states(5, 1), 0)
        change(cache)
        result = cache.update(states(1, 2), states(1, 3), 0)
        cache.result = result
    for actual, expected in zip(ours.result, theirs.result, strict=True):
        assert torch.equal(actual, expected)


def test_a_cropped_cache_of_a_chat_goes_on_as_if_the_rest_had_not_been_said(shared_model, ids):
    cache = GrowingCache(shared_model.config.num_layers)
    with torch.no_grad():
        shared_model(ids, past_key_values=cache, use_cache=True)
        cache.crop(-2)
        again = shared_model(ids[:, -2:], past_key_values=cache, use_cache=True).logits
    assert_close(again, logits(shared_model, ids)[:, -2:])


# ---- the choice of a token

WARPERS = {
    "all three": (0.8, 20, 0.7),
    "top-p of almost nothing": (0.8, 20, 0.01),
    "top-p of all": (0.8, 20, 1.0),
    "more than the vocabulary": (0.8, 500, 0.9),
    "without temperature": (None, 20, 0.7),
}


@pytest.mark.parametrize("settings", WARPERS.values(), ids=WARPERS)
def test_the_distribution_is_that_of_the_processors_one_by_one(settings):
    temperature, top_k, top_p = settings
    chain = [TemperatureLogitsWarper(temperature)] if temperature else []
    chain += [TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)]
    scores = torch.randn(5, 100, generator=torch.Generator().manual_seed(0)) * 3
    expected = LogitsProcessorList(chain)(None, scores).softmax(dim=-1)
    sampler = Sampler(LogitsProcessorList(chain), do_sample=True)
    assert not sampler.processors
    ids, probabilities = sampler.distribution(scores)
    actual = torch.zeros_like(scores).scatter(1, ids, probabilities)
    torch.testing.assert_close(actual / actual.sum(-1, keepdim=True), expected)


def test_the_vocabulary_is_never_sorted_behind_a_top_k(model, family, monkeypatch):
    def refuse(scores: torch.Tensor, *args, **kwargs) -> None:
        raise AssertionError(f"sorted {tuple(scores.shape)}")

    monkeypatch.setattr(torch, "sort", refuse)
    options = {"do_sample": True, "temperature": 0.8, "top_k": 50, "max_new_tokens": 3}
    model.generate(prompt(family), top_p=0.8, **options)
    with pytest.raises(AssertionError, match="sorted"):
        plainly(model, prompt(family), top_p=0.8, **options)


def test_drawn_tokens_have_the_frequencies_of_their_probabilities():
    sampler = Sampler(LogitsProcessorList([TopKLogitsWarper(3), TopPLogitsWarper(0.9)]), do_sample=True)
    scores = torch.tensor([0.6, 0.25, 0.14, 0.01]).log().expand(20_000, -1)
    torch.manual_seed(0)
    shares = torch.bincount(sampler(None, scores), minlength=4) / len(scores)
    # 0.6 and 0.25 of the three kept reach 0.86, so the third stays too.
    expected = torch.tensor([0.6, 0.25, 0.14, 0.0]) / 0.99
    torch.testing.assert_close(shares, expected, atol=0.012, rtol=0)  # more than three standard deviations


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_scores_that_are_no_numbers_are_told_with_step_and_row(bad):
    scores = torch.zeros(3, 10)
    check = FiniteScores()
    check(None, scores)
    scores[2, 4] = bad
    with pytest.raises(ValueError, match="scores of new token 2 in row 2 are NaN or infinite"):
        check(None, scores)
    assert torch.equal(FiniteScores()(None, torch.full((1, 2), -torch.inf)), torch.full((1, 2), -torch.inf))


def test_slow_half_precision_keys_of_many_heads_are_kept_in_float32(monkeypatch):
    """On a CPU without instructions for bfloat16; the answer is that of the bfloat16 cache to its precision."""
    model, ids = tiny_model(CHATGLM).bfloat16(), prompt(CHATGLM)
    monkeypatch.setattr(generation_chatglm, "product_dtype", lambda dtype: torch.float32)
    slow = list(model.stream_generate(ids, max_new_tokens=3, do_sample=False, return_past_key_values=True))
    assert {layer.keys.dtype for layer in slow[-1][1].layers} == {torch.float32}
    monkeypatch.setattr(generation_chatglm, "product_dtype", lambda dtype: dtype)
    fast = list(model.stream_generate(ids, max_new_tokens=3, do_sample=False, return_past_key_values=True))
    assert {layer.keys.dtype for layer in fast[-1][1].layers} == {torch.bfloat16}
    for ours, theirs in zip(slow[-1][1].layers, fast[-1][1].layers, strict=True):
        prompt_keys = slice(0, ids.shape[1])
        assert_close(ours.keys[:, :, prompt_keys], theirs.keys[:, :, prompt_keys], atol=0.2)


def test_scores_and_a_cache_that_has_grown_in_the_loop_are_ordinary_tensors(model, family, monkeypatch):
    """The loop computes in inference mode, whose tensors nobody may change or train with outside of it."""
    monkeypatch.setattr(generation_chatglm, "STEP", 4)

    def change(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, 5] = 50.0
        return scores

    steps = model.stream_generate(
        prompt(family),
        max_new_tokens=12,
        do_sample=False,
        logits_processor=LogitsProcessorList([change]),
        return_past_key_values=True,
    )
    *_, (sequences, cache) = steps
    sequences += 0
    loss = model(sequences[:, -1:], past_key_values=cache, use_cache=True).logits.sum()
    loss.backward()
    assert not any(buffer.is_inference() for layer in cache.layers for buffer in layer._buffers)
