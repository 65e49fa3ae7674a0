"""P-Tuning v2: models behind a learned prefix."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import (
    PAD,
    assert_close,
    continued,
    largest_difference,
    logits,
    pad_left,
    published_mask,
    three_rows,
    tiny_config,
    tiny_model,
)
from transformers import StaticCache

from chatglm.hub.modeling_chatglm import ChatGLMForConditionalGeneration


@pytest.fixture(params=[False, True], ids=["plain", "projection"])
def tuned(request, family):
    return tiny_model(family, pre_seq_len=4, prefix_projection=request.param)


def test_a_prefix_changes_the_logits(tuned, shared_model, ids):
    assert largest_difference(logits(tuned, ids), logits(shared_model, ids)) > 0.1


@pytest.mark.parametrize("pieces", [[9, 1, 1, 1, 1, 1], [9, 2, 3]], ids=str)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_pieces_on_a_cache_equal_one_pass_behind_a_prefix(tuned, ids, pieces, static):
    cache = StaticCache(config=tuned.config, max_cache_len=30) if static else None
    assert_close(continued(tuned, ids, pieces, cache), logits(tuned, ids))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_padded_batch_equals_its_rows_alone_behind_a_prefix(tuned, family, implementation):
    tuned.set_attn_implementation(implementation)
    rows = three_rows(family)
    ids, mask = pad_left(rows, PAD)
    batched = logits(tuned, ids, attention_mask=mask)
    for row, keep, alone in zip(batched, mask.bool(), rows, strict=True):
        assert_close(row[keep], logits(tuned, alone)[0])


def test_the_published_boolean_mask_leaves_out_the_columns_of_the_prefix(tuned, family, ids):
    assert_close(logits(tuned, ids, attention_mask=published_mask(family, ids)), logits(tuned, ids))


def test_the_prefix_has_dropout_in_training_only(tuned, ids):
    assert torch.equal(logits(tuned, ids), logits(tuned, ids))
    tuned.train()
    assert largest_difference(logits(tuned, ids), logits(tuned, ids)) > 0.1


def test_only_the_prefix_is_trainable(tuned):
    trainable = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert trainable
    assert all(name.startswith("transformer.prefix_encoder.") for name in trainable)


def test_only_the_prefix_is_trainable_after_loading(tuned, tmp_path):
    tuned.save_pretrained(tmp_path)
    loaded = ChatGLMForConditionalGeneration.from_pretrained(tmp_path)
    trainable = [name for name, p in loaded.named_parameters() if p.requires_grad]
    assert trainable
    assert all(name.startswith("transformer.prefix_encoder.") for name in trainable)


def test_a_prefix_is_not_read_with_another_projection_than_it_was_trained_with(tuned, tmp_path):
    """Of ChatGLM2 the embedding has the same shape with and without, so that nothing else would tell."""
    tuned.save_pretrained(tmp_path)
    other = {"prefix_projection": not tuned.config.prefix_projection}
    with pytest.raises(ValueError, match=r"prefix_projection|has shape"):
        ChatGLMForConditionalGeneration.from_pretrained(tmp_path, **other)


def test_a_prefix_learns(tuned, ids):
    torch.manual_seed(0)  # the dropout, with which one run in a hundred ends badly at this learning rate
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=0.2)
    tuned.train()
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = tuned(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_a_checkpoint_of_the_prefix_alone_is_loaded_into_the_base_model(
    tuned, shared_model, family, ids, tmp_path
):
    """The steps of the published finetuning guide."""
    shared_model.save_pretrained(tmp_path)
    prefix = {k: v for k, v in tuned.state_dict().items() if "prefix_encoder" in k}
    config = tiny_config(family, pre_seq_len=4, prefix_projection=tuned.config.prefix_projection)
    model = ChatGLMForConditionalGeneration.from_pretrained(tmp_path, config=config).eval()
    short = {k.removeprefix("transformer.prefix_encoder."): v for k, v in prefix.items()}
    model.transformer.prefix_encoder.load_state_dict(short)
    merged = copy.deepcopy(shared_model).state_dict() | prefix
    tuned.load_state_dict(merged, strict=True)
    assert_close(logits(model, ids), logits(tuned, ids))


def test_a_float32_prefix_works_on_a_half_model(tuned, ids):
    expected = logits(tuned, ids)
    tuned.half()
    tuned.transformer.prefix_encoder.float()
    actual = logits(tuned, ids)
    assert actual.dtype == torch.float16
    assert largest_difference(actual, expected) / expected.abs().max() < 0.15
