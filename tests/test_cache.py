"""One pass of the models on a cache: in pieces, cut short, padded, filled by somebody else."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    ANSWER,
    CHATGLM,
    CHATGLM2,
    GMASK,
    MASK,
    PAD,
    SOP,
    assert_close,
    continued,
    largest_difference,
    logits,
    pad_left,
    prompt,
    tiny_model,
)
from transformers import DynamicCache, StaticCache

from chatglm.hub.positions_chatglm import glm_positions


@pytest.mark.parametrize("pieces", [[9, 1, 1, 1, 1, 1], [9, 2, 3], [10, 4]], ids=str)
def test_pieces_on_a_cache_equal_one_pass(shared_model, ids, pieces):
    assert_close(continued(shared_model, ids, pieces), logits(shared_model, ids))


@pytest.mark.parametrize("pieces", [[9, 1, 1, 1, 1, 1], [9, 2, 3]], ids=str)
def test_pieces_on_a_static_cache_equal_one_pass(shared_model, ids, pieces):
    cache = StaticCache(config=shared_model.config, max_cache_len=30)
    assert_close(continued(shared_model, ids, pieces, cache), logits(shared_model, ids))


def test_a_prompt_token_by_token_equals_one_pass_for_chatglm2():
    model, ids = tiny_model(CHATGLM2), prompt(CHATGLM2)
    assert_close(continued(model, ids, [1] * 9), logits(model, ids))


def test_half_a_prompt_is_refused_for_chatglm_6b():
    with pytest.raises(ValueError, match="no <sop>"):
        logits(tiny_model(CHATGLM), prompt(CHATGLM)[:, :4])


def test_a_prompt_in_the_middle_of_an_answer_stays_causal_on_a_cache():
    model = tiny_model(CHATGLM)
    answer = torch.tensor([[20, 30, GMASK, SOP, 40]])
    ids = torch.cat((prompt(CHATGLM), answer), dim=1)
    assert_close(continued(model, ids, [9, 5]), logits(model, ids))


def test_a_mask_token_in_the_answer_changes_nothing_on_a_cache():
    model = tiny_model(CHATGLM)
    ids = torch.tensor([[5, MASK, 7, 8, SOP, 20, GMASK, 40]])
    assert_close(continued(model, ids, [5, 1, 1, 1]), logits(model, ids))


def test_a_cache_that_was_cut_short_continues_where_it_ends(shared_model, family, ids):
    with torch.no_grad():
        cache = shared_model(ids).past_key_values
    cache.crop(-3)
    rest = logits(shared_model, ids[:, -3:], past_key_values=cache)
    assert_close(rest, logits(shared_model, ids)[:, -3:])


def test_a_batch_continues_on_a_cache_with_the_mask_of_its_padding(shared_model, family, ids):
    padded, mask = pad_left([ids, ids[:, 3:]], PAD)
    with torch.no_grad():
        cache = shared_model(padded, attention_mask=mask).past_key_values
    more, longer = ANSWER.expand(2, -1), torch.cat((mask, torch.ones(2, 5, dtype=torch.long)), dim=1)
    batched = logits(shared_model, more, past_key_values=cache, attention_mask=longer)
    for row, start in enumerate((0, 3)):
        alone = logits(shared_model, torch.cat((ids[:, start:], ANSWER), dim=1))
        assert_close(batched[row], alone[0, -5:])


def test_without_use_cache_no_cache_is_returned(shared_model, ids):
    with torch.no_grad():
        assert shared_model(ids, use_cache=False).past_key_values is None


def test_keys_and_values_lie_as_batch_heads_tokens_channels(shared_model, family, ids):
    with torch.no_grad():
        layer = shared_model(ids).past_key_values.layers[0]
    heads = 4 if family == CHATGLM else 2
    assert layer.keys.shape == layer.values.shape == (1, heads, 14, 16)


def test_chatglm_6b_on_a_foreign_filled_cache_reads_the_ids_as_a_whole_prompt():
    """As PEFT's prefix tuning does: learned keys in a cache, a mask that covers them, the prompt as ids."""
    model, ids = tiny_model(CHATGLM), prompt(CHATGLM)
    generator = torch.Generator().manual_seed(3)
    pairs = [[torch.randn(1, 4, 3, 16, generator=generator) for _ in range(2)] for _ in range(2)]

    def cache() -> DynamicCache:
        return DynamicCache([tuple(t.clone() for t in pair) for pair in pairs])

    mask = torch.ones(1, 12, dtype=torch.long)
    whole = logits(model, ids, past_key_values=cache(), attention_mask=mask)
    # The same with the mask drawn by hand: the context sees itself and the prefix in both directions.
    visible = torch.ones(9, 12, dtype=torch.bool)
    visible[:, 3:] = torch.ones(9, 9, dtype=torch.bool).tril()
    visible[:, 3:11] = True
    drawn = logits(
        model,
        ids,
        past_key_values=cache(),
        attention_mask=~visible[None, None],
        position_ids=glm_positions(ids, None, model.config),
    )
    assert_close(whole, drawn)
    assert largest_difference(whole, logits(model, ids)) > 0.1


def test_chatglm2_on_a_foreign_filled_cache_sees_it_everywhere_and_the_future_nowhere():
    model, ids = tiny_model(CHATGLM2), prompt(CHATGLM2)
    generator = torch.Generator().manual_seed(3)
    pairs = [[torch.randn(1, 2, 3, 16, generator=generator) for _ in range(2)] for _ in range(2)]

    def run(ids: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(1, 3 + ids.shape[1], dtype=torch.long)
        cache = DynamicCache([tuple(t.clone() for t in pair) for pair in pairs])
        return logits(model, ids, past_key_values=cache, attention_mask=mask)

    assert_close(run(ids)[:, :4], run(ids[:, :4]))
    assert largest_difference(run(ids), logits(model, ids)) > 0.1
