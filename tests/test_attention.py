"""Who sees whom: masks, padding, and the attention functions that transformers offers."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    CHATGLM,
    GMASK,
    MASK,
    PAD,
    SOP,
    assert_close,
    largest_difference,
    logits,
    pad_left,
    pad_right,
    published_mask,
    three_rows,
    tiny_config,
    tiny_model,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from chatglm.hub.layers_chatglm import Attention, eager_attention_forward, sdpa_attention

# Masks and padding


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("pad", [pad_left, pad_right], ids=["left", "right"])
def test_a_padded_batch_equals_its_rows_alone(model, family, pad, implementation):
    model.set_attn_implementation(implementation)
    rows = three_rows(family)
    ids, mask = pad(rows, PAD)
    batched = logits(model, ids, attention_mask=mask)
    for row, keep, alone in zip(batched, mask.bool(), rows, strict=True):
        assert_close(row[keep], logits(model, alone)[0])


def test_a_right_padded_batch_without_mask_equals_its_rows_alone(shared_model, family):
    rows = three_rows(family)
    ids, mask = pad_right(rows, PAD)
    batched = logits(shared_model, ids)
    for row, keep, alone in zip(batched, mask.bool(), rows, strict=True):
        assert_close(row[keep], logits(shared_model, alone)[0])


def test_a_batch_may_mix_both_mask_tokens_and_padding():
    model = tiny_model(CHATGLM)
    rows = [torch.tensor([[5, MASK, 7, 8, SOP, 9]]), torch.tensor([[5, 6, 7, 8, 9, MASK, 11, GMASK, SOP, 9]])]
    ids, mask = pad_left(rows, PAD)
    batched = logits(model, ids, attention_mask=mask)
    for row, keep, alone in zip(batched, mask.bool(), rows, strict=True):
        assert_close(row[keep], logits(model, alone)[0])


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32])
def test_a_mask_may_be_boolean_float_or_integer(shared_model, family, dtype):
    ids, mask = pad_left(three_rows(family), PAD)
    expected = logits(shared_model, ids, attention_mask=mask)[mask.bool()]
    assert_close(logits(shared_model, ids, attention_mask=mask.to(dtype))[mask.bool()], expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_padding_makes_no_output_and_no_gradient_infinite(model, family, implementation):
    model.set_attn_implementation(implementation)
    ids, mask = pad_left(three_rows(family), PAD)
    labels = ids.masked_fill(mask == 0, -100)
    outputs = model(ids, attention_mask=mask, labels=labels)
    outputs.loss.backward()
    assert outputs.logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_published_boolean_mask_equals_the_derived_one(model, family, ids, implementation):
    model.set_attn_implementation(implementation)
    mask = published_mask(family, ids)
    assert_close(logits(model, ids, attention_mask=mask), logits(model, ids))


def test_a_boolean_mask_hides_what_it_marks(shared_model, family, ids):
    mask = published_mask(family, ids)
    mask[:, :, :, 1] = True
    hidden = logits(shared_model, ids, attention_mask=mask)[:, 2:]
    assert largest_difference(hidden, logits(shared_model, ids)[:, 2:]) > 0.1
    other = ids.clone()
    other[0, 1] += 1
    assert_close(logits(shared_model, other, attention_mask=mask)[:, 2:], hidden)


def test_full_attention_mask_is_the_same_mask_under_its_published_name(family, ids):
    base = tiny_model(family).transformer
    mask = published_mask(family, ids)
    mask[:, :, :, 1] = True
    with torch.no_grad():
        one = base(ids, full_attention_mask=mask).last_hidden_state
        two = base(ids, attention_mask=mask).last_hidden_state
    assert torch.equal(one, two)


def test_only_what_stands_before_sop_sees_in_both_directions(shared_model, family, ids):
    later = ids.clone()
    later[0, 12] += 1  # in the answer
    assert_close(logits(shared_model, later)[:, :12], logits(shared_model, ids)[:, :12])
    earlier = ids.clone()
    earlier[0, 5] += 1  # in the prompt
    before = largest_difference(logits(shared_model, earlier)[:, :5], logits(shared_model, ids)[:, :5])
    assert before > 0.1 if family == CHATGLM else before < 1e-4


# Attention functions


def test_eager_equals_sdpa(model, family, ids):
    model.set_attn_implementation("eager")
    eager = logits(model, ids)
    model.set_attn_implementation("sdpa")
    assert_close(eager, logits(model, ids))


def flex_and_sdpa(model, ids: torch.Tensor, **kwargs) -> list[torch.Tensor]:
    found = []
    # After another shape torch would compile for all shapes, and its C++ for CPUs then does not build.
    torch.compiler.reset()
    for implementation in ("flex_attention", "sdpa"):
        model.set_attn_implementation(implementation)
        found.append(logits(model, ids, **kwargs))
    return found


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "causal"])
def test_shared_keys_are_read_in_place_with_what_copies_of_them_give(family, masked, monkeypatch):
    attention, shapes = Attention(tiny_config(family), 0), []
    query = torch.randn(2, 4, 5, 16, requires_grad=True)
    key, value = (torch.randn(2, attention.num_key_value_heads, 5 + 3 * masked, 16) for _ in range(2))
    mask = torch.ones(5, 8, dtype=torch.bool).tril(3).expand(2, 1, 5, 8) if masked else None
    expected, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](attention, query, key, value, mask, scaling=0.25)
    compute = torch.nn.functional.scaled_dot_product_attention

    def watch(query: torch.Tensor, key: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        shapes.append(key.shape)
        return compute(query, key, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    actual, _ = sdpa_attention(attention, query, key, value, mask, scaling=0.25)
    assert torch.equal(actual, expected)
    assert shapes == [key.shape]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's own compiler
def test_flex_attention_equals_sdpa(model, family, ids):
    assert_close(*flex_and_sdpa(model, ids))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_flex_attention_of_a_padded_batch_equals_sdpa(model, family):
    ids, mask = pad_left(three_rows(family), PAD)
    flex, sdpa = flex_and_sdpa(model, ids, attention_mask=mask)
    assert_close(flex[mask.bool()], sdpa[mask.bool()])


def test_a_four_dimensional_mask_under_flex_attention_is_refused(model, family, ids, monkeypatch):
    """Torch's kernel for the CPU ends the process on one."""

    def computed(*args, **kwargs):
        raise AssertionError("it was not refused")

    monkeypatch.setattr(Attention, "forward", computed)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="flex_attention"):
        logits(model, ids, attention_mask=published_mask(family, ids))


def test_flex_attention_behind_a_prefix_is_refused(family, ids):
    model = tiny_model(family, pre_seq_len=4)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="'sdpa' or 'eager', not 'flex_attention'"):
        logits(model, ids)


@pytest.mark.parametrize("implementation", ["flash_attention_2", "paged|sdpa", "paged|eager"])
def test_chatglm_6b_refuses_attention_that_sees_only_the_past(implementation):
    with pytest.raises(ValueError, match="reads its prompt in both directions"):
        tiny_model(CHATGLM).set_attn_implementation(implementation)


def test_half_precision_scores_of_deep_layers_may_pass_the_range_of_float16(family):
    """Scores of 160000 are infinite in float16, but not when they are divided by the layer number first."""
    attention = Attention(tiny_config(family), layer_idx=27)
    generator = torch.Generator().manual_seed(0)
    query = 200 * torch.randn(1, 4, 6, 16, generator=generator).sign()
    key = 200 * torch.randn(1, attention.num_key_value_heads, 6, 16, generator=generator).sign()
    value = torch.randn(key.shape, generator=generator)
    low, _ = eager_attention_forward(attention, query.half(), key.half(), value.half(), None, scaling=0.25)
    high, _ = eager_attention_forward(attention, query, key, value, None, scaling=0.25)
    assert_close(low, high, atol=5e-3)
