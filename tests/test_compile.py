"""torch.compile gives what the plain model gives, without a break in the graph."""

from __future__ import annotations

import pytest
import torch
from helpers import CHATGLM2, assert_close, continued, logits, tiny_model
from transformers import StaticCache

from chatglm.hub.positions_chatglm import glm_positions


@pytest.fixture
def compiled(model):
    torch._dynamo.reset()
    yield torch.compile(model, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


def test_a_compiled_model_equals_the_eager_one(compiled, shared_model, ids):
    assert_close(logits(compiled, ids, use_cache=False), logits(shared_model, ids))


def test_a_compiled_model_behind_a_prefix_equals_the_eager_one(family, ids):
    model = tiny_model(family, pre_seq_len=4)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(logits(compiled, ids, use_cache=False), logits(model, ids))


def test_compiled_steps_on_a_static_cache_equal_one_pass(compiled, shared_model, family, ids):
    cache = StaticCache(config=shared_model.config, max_cache_len=30)
    expected = logits(shared_model, ids)
    assert_close(logits(shared_model, ids[:, :9], past_key_values=cache), expected[:, :9])
    positions = (
        torch.arange(14)[None] if family == CHATGLM2 else glm_positions(ids, None, shared_model.config)
    )
    for i in range(9, 14):
        step = logits(
            compiled, ids[:, i : i + 1], past_key_values=cache, position_ids=positions[:, i : i + 1]
        )
        assert_close(step[:, 0], expected[:, i])


def test_compiled_steps_without_positions_equal_one_pass_or_are_refused(model, shared_model, ids):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    try:
        steps = continued(compiled, ids[:, :12], [9, 1, 1, 1])
    except ValueError as error:
        assert "position_ids" in str(error)
    else:
        assert_close(steps, logits(shared_model, ids)[:, :12])
