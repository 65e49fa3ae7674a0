"""What one pass takes and returns: logits, hidden states, attentions, embeddings, positions, classes."""

from __future__ import annotations

import weakref

import pytest
import torch
from helpers import (
    CHATGLM,
    CHATGLM2,
    PAD,
    assert_close,
    largest_difference,
    logits,
    pad_left,
    pad_right,
    prompt,
    three_rows,
    tiny_model,
)

from chatglm.hub.modeling_chatglm import ChatGLMForSequenceClassification
from chatglm.hub.positions_chatglm import glm_positions, pack_positions, unpack_positions

# Outputs


def test_hidden_states_hold_every_layer_as_batch_tokens_hidden(shared_model, family, ids):
    with torch.no_grad():
        states = shared_model(ids, output_hidden_states=True).hidden_states
    assert [tuple(state.shape) for state in states] == [(1, 14, 64)] * 3


def test_the_last_hidden_state_is_normed_for_chatglm_6b_only(shared_model, family, ids):
    with torch.no_grad():
        outputs = shared_model(ids, output_hidden_states=True)
        last = outputs.hidden_states[-1]
        if family == CHATGLM2:
            last = shared_model.transformer.encoder.final_layernorm(last)
        assert_close(shared_model.get_output_embeddings()(last), outputs.logits)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attentions_are_returned_and_each_row_sums_to_one(model, family, ids, implementation):
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        outputs = model(ids, output_attentions=True)
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(1, 4, 14, 14)] * 2
    for weights in outputs.attentions:
        assert_close(weights.sum(-1), torch.ones(1, 4, 14))
    assert_close(outputs.logits, logits(model, ids))


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_attentions_of_functions_that_have_none_to_show_are_refused(implementation):
    model = tiny_model(CHATGLM2)
    model.config._attn_implementation = implementation  # as set where its library is installed
    with pytest.raises(ValueError, match="output_attentions"):
        logits(model, prompt(CHATGLM2), output_attentions=True)


def test_outputs_that_nobody_asked_for_are_none(shared_model, ids):
    with torch.no_grad():
        outputs = shared_model(ids)
    assert outputs.hidden_states is None
    assert outputs.attentions is None


def test_no_layer_output_is_kept_longer_than_the_next_layer_needs_it(family, ids):
    model = tiny_model(family, num_layers=6)
    outputs: list[weakref.ref] = []
    alive: list[int] = []

    def watch(block, inputs, output):
        outputs.append(weakref.ref(output[0]))
        alive.append(sum(reference() is not None for reference in outputs))

    for block in model.transformer.blocks:
        block.register_forward_hook(watch)
    logits(model, ids, use_cache=False)
    assert max(alive) <= 2


def test_return_dict_false_gives_a_tuple(shared_model, ids):
    with torch.no_grad():
        first, *_ = shared_model(ids, return_dict=False)
    assert torch.equal(first, logits(shared_model, ids))


def test_the_base_model_gives_hidden_states_as_batch_tokens_hidden(shared_model, ids):
    with torch.no_grad():
        states = shared_model.transformer(ids).last_hidden_state
        first = shared_model.transformer(ids, return_dict=False)[0]
        assert torch.equal(states, first)
        assert_close(shared_model.get_output_embeddings()(states), logits(shared_model, ids))


def test_base_model_is_the_transformer(shared_model):
    assert shared_model.base_model is shared_model.transformer


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 5])], ids=["last", "three", "chosen"])
def test_logits_to_keep_gives_those_positions(shared_model, ids, keep):
    every = logits(shared_model, ids)
    expected = every[:, -keep:] if isinstance(keep, int) else every[:, keep]
    assert_close(logits(shared_model, ids, logits_to_keep=keep), expected)


def test_return_last_logit_gives_the_last_position(shared_model, ids):
    assert_close(logits(shared_model, ids, return_last_logit=True), logits(shared_model, ids)[:, -1:])


def test_embeddings_instead_of_ids_give_the_same_logits(shared_model, family, ids):
    embeds = shared_model.get_input_embeddings()(ids)
    position_ids = glm_positions(ids, None, shared_model.config) if family == CHATGLM else None
    with torch.no_grad():
        outputs = shared_model(inputs_embeds=embeds, position_ids=position_ids)
    assert_close(outputs.logits, logits(shared_model, ids))


def test_chatglm_6b_embeddings_without_positions_are_refused():
    model = tiny_model(CHATGLM)
    embeds = model.get_input_embeddings()(prompt(CHATGLM))
    with pytest.raises(ValueError, match="pass position_ids too"):
        model(inputs_embeds=embeds)


def test_the_published_two_row_positions_equal_the_derived_ones():
    model, ids = tiny_model(CHATGLM), prompt(CHATGLM)
    packed = glm_positions(ids, None, model.config)
    published = torch.stack(unpack_positions(packed), dim=1)
    assert torch.equal(pack_positions(published), packed)
    assert_close(logits(model, ids, position_ids=published), logits(model, ids))


def test_shifting_all_positions_of_chatglm2_changes_nothing():
    """Rotary positions are relative."""
    model, ids = tiny_model(CHATGLM2), prompt(CHATGLM2)
    shifted = torch.arange(9)[None] + 5
    assert_close(logits(model, ids, position_ids=shifted), logits(model, ids), atol=1e-3)


def test_positions_of_chatglm2_are_used_as_given():
    model, ids = tiny_model(CHATGLM2), prompt(CHATGLM2)
    stretched = 3 * torch.arange(9)[None]
    assert largest_difference(logits(model, ids, position_ids=stretched), logits(model, ids)) > 0.1


# Classification


@pytest.mark.parametrize("pad", [pad_left, pad_right], ids=["left", "right"])
def test_a_padded_batch_is_classified_as_its_rows_alone(family, pad):
    model = tiny_model(family, ChatGLMForSequenceClassification, num_labels=3)
    rows = three_rows(family)
    ids, mask = pad(rows, PAD)
    batched = logits(model, ids, attention_mask=mask)
    assert batched.shape == (3, 3)
    for row, alone in zip(batched, rows, strict=True):
        assert_close(row, logits(model, alone)[0])


@pytest.mark.parametrize(
    ("num_labels", "labels"),
    [(3, torch.tensor([1])), (1, torch.tensor([0.5])), (3, torch.tensor([[1.0, 0.0, 1.0]]))],
    ids=["one of several", "a number", "several of several"],
)
def test_classification_has_a_loss_for_every_kind_of_label(family, num_labels, labels):
    model = tiny_model(family, ChatGLMForSequenceClassification, num_labels=num_labels).train()
    loss = model(prompt(family), labels=labels).loss
    loss.backward()
    assert loss.isfinite()
    assert model.classifier_head.weight.grad.abs().sum() > 0


def test_a_classifier_starts_from_the_weights_of_the_language_model(family, shared_model, tmp_path):
    shared_model.save_pretrained(tmp_path)
    model = ChatGLMForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    expected = shared_model.transformer.state_dict()
    for key, tensor in model.transformer.state_dict().items():
        assert torch.equal(tensor, expected[key]), key


# Half precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat16"])
def test_low_precision_stays_near_float32(model, ids, dtype):
    expected = logits(model, ids)
    actual = logits(model.to(dtype), ids)
    assert actual.dtype == dtype
    # Errors of single roundings (0.05 % and 0.4 %), grown through sharp softmaxes.
    limit = 0.15 if dtype == torch.float16 else 0.6
    assert largest_difference(actual, expected) / expected.abs().max() < limit


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat16"])
@pytest.mark.parametrize(
    "variant",
    [{}, {"post_layer_norm": False}, {"apply_residual_connection_post_layernorm": True}, {"rmsnorm": False}],
    ids=str,
)
def test_float32_residuals_work_with_low_precision_weights(dtype, variant):
    model = tiny_model(CHATGLM2, fp32_residual_connection=True, **variant)
    ids = prompt(CHATGLM2)
    expected = logits(model, ids)
    actual = logits(model.to(dtype), ids)
    assert actual.dtype == dtype
    assert largest_difference(actual, expected) / expected.abs().max() < 0.6
