"""Losses, gradients, gradient checkpointing, dropout."""

from __future__ import annotations

import pytest
import torch
from helpers import CHATGLM2, assert_close, largest_difference, logits, prompt, tiny_model


def loss_by_hand(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def test_the_loss_is_the_mean_over_the_next_tokens_that_count(shared_model, ids):
    labels = ids.clone()
    labels[:, :9] = -100
    with torch.no_grad():
        loss = shared_model(ids, labels=labels).loss
    assert_close(loss, loss_by_hand(logits(shared_model, ids), labels))


def test_labels_together_with_a_cache_give_the_same_loss(shared_model, ids):
    with torch.no_grad():
        losses = [shared_model(ids, labels=ids, use_cache=use).loss for use in (True, False)]
    assert_close(*losses)


def test_num_items_in_batch_divides_the_summed_loss(shared_model, ids):
    with torch.no_grad():
        mean = shared_model(ids, labels=ids).loss
        halved = shared_model(ids, labels=ids, num_items_in_batch=torch.tensor(2 * 13)).loss
    assert_close(halved, mean / 2)


def gradients(model, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize("pre_seq_len", [None, 4], ids=["full", "prefix"])
def test_gradient_checkpointing_gives_the_same_gradients(family, ids, reentrant, pre_seq_len):
    model = tiny_model(family, pre_seq_len=pre_seq_len).train()
    if pre_seq_len:
        model.transformer.dropout.p = 0.0
    expected = gradients(model, ids)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    actual = gradients(model, ids)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(actual[name], gradient, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")
def test_gradient_checkpointing_is_off_again_after_disable(model, ids):
    model.train()
    model.gradient_checkpointing_enable()
    model.gradient_checkpointing_disable()
    assert model(ids).past_key_values is not None


def test_chatglm2_hidden_dropout_acts_in_training_only():
    model, ids = tiny_model(CHATGLM2, hidden_dropout=0.5), prompt(CHATGLM2)
    assert_close(logits(model, ids), logits(tiny_model(CHATGLM2), ids))
    assert largest_difference(logits(model.train(), ids), logits(model.eval(), ids)) > 0.1
