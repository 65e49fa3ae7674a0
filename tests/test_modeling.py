"""One pass of the models: masks, caches, outputs, training, P-Tuning, saving. Generation is next door."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from helpers import (
    CHATGLM,
    CHATGLM2,
    FAMILIES,
    GMASK,
    MASK,
    PAD,
    SOP,
    assert_close,
    largest_difference,
    pad_left,
    pad_right,
    prompt,
    tiny_config,
    tiny_model,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, StaticCache

from chatglm.hub.modeling_chatglm import (
    Attention,
    ChatGLMForConditionalGeneration,
    ChatGLMForSequenceClassification,
    ChatGLMModel,
    eager_attention_forward,
    glm_positions,
    pack_positions,
    unpack_positions,
)

ANSWER = torch.tensor([[20, 30, 40, 50, 60]])


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def shared_model(family):
    """For tests that change nothing on it."""
    return tiny_model(family)


@pytest.fixture
def model(shared_model):
    return copy.deepcopy(shared_model)


@pytest.fixture(scope="module")
def ids(family) -> torch.Tensor:
    """A prompt and the beginning of an answer."""
    return torch.cat((prompt(family), ANSWER), dim=1)


@torch.no_grad()
def logits(model, ids: torch.Tensor, **kwargs) -> torch.Tensor:
    return model(ids, **kwargs).logits


# Caches


def continued(model, ids: torch.Tensor, pieces: list[int], cache=None, **kwargs) -> torch.Tensor:
    """Logits of all pieces (lengths that sum to T), one call each on one cache, positions left out."""
    parts = []
    for piece in ids.split(pieces, dim=1):
        with torch.no_grad():
            outputs = model(piece, past_key_values=cache, use_cache=True, **kwargs)
        cache = outputs.past_key_values
        parts.append(outputs.logits)
    return torch.cat(parts, dim=1)


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


# Masks and padding


def three_rows(family: str) -> list[torch.Tensor]:
    return [prompt(family, length, seed) for seed, length in enumerate((5, 9, 7))]


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


def published_mask(family: str, ids: torch.Tensor) -> torch.Tensor:
    """Boolean [1, 1, T, T], True = masked, of a row without padding."""
    length = ids.shape[1]
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    if family == CHATGLM:
        visible[:, : ids[0].tolist().index(SOP)] = True
    return ~visible[None, None]


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


# Training


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
    [{}, {"post_layer_norm": False}, {"apply_residual_connection_post_layernorm": True}],
    ids=str,
)
def test_float32_residuals_work_with_low_precision_weights(dtype, variant):
    model = tiny_model(CHATGLM2, fp32_residual_connection=True, **variant)
    ids = prompt(CHATGLM2)
    expected = logits(model, ids)
    actual = logits(model.to(dtype), ids)
    assert actual.dtype == dtype
    assert largest_difference(actual, expected) / expected.abs().max() < 0.6


# P-Tuning


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


def test_a_prefix_learns(tuned, ids):
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


# Weights and files

PUBLISHED_KEYS = {
    CHATGLM: {
        "transformer.word_embeddings.weight",
        "transformer.final_layernorm.weight",
        "transformer.final_layernorm.bias",
        *(
            f"transformer.layers.{i}.{layer}.{kind}"
            for i in range(2)
            for layer in (
                "input_layernorm",
                "attention.query_key_value",
                "attention.dense",
                "post_attention_layernorm",
                "mlp.dense_h_to_4h",
                "mlp.dense_4h_to_h",
            )
            for kind in ("weight", "bias")
        ),
    },
    CHATGLM2: {
        "transformer.embedding.word_embeddings.weight",
        "transformer.encoder.final_layernorm.weight",
        "transformer.output_layer.weight",
        *(
            f"transformer.encoder.layers.{i}.{tensor}"
            for i in range(2)
            for tensor in (
                "input_layernorm.weight",
                "self_attention.query_key_value.weight",
                "self_attention.query_key_value.bias",
                "self_attention.dense.weight",
                "post_attention_layernorm.weight",
                "mlp.dense_h_to_4h.weight",
                "mlp.dense_4h_to_h.weight",
            )
        ),
    },
}


def keys_in(folder) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_a_saved_folder_has_the_published_key_names(shared_model, family, tmp_path):
    """Without lm_head, which is the embedding of ChatGLM-6B; the published files may leave it out too."""
    shared_model.save_pretrained(tmp_path)
    assert keys_in(tmp_path) == PUBLISHED_KEYS[family]


def test_saving_and_loading_gives_the_same_logits(shared_model, ids, tmp_path):
    shared_model.save_pretrained(tmp_path)
    loaded = ChatGLMForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, ids), logits(shared_model, ids))


def test_saving_in_shards_and_loading_gives_the_same_logits(shared_model, ids, tmp_path):
    shared_model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = ChatGLMForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, ids), logits(shared_model, ids))


def test_the_bare_model_loads_from_the_same_folder(shared_model, ids, tmp_path):
    shared_model.save_pretrained(tmp_path)
    bare = ChatGLMModel.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = shared_model.transformer(ids).last_hidden_state
        assert torch.equal(bare(ids).last_hidden_state, expected)


def test_the_head_of_chatglm_6b_is_its_embedding():
    model = tiny_model(CHATGLM)
    assert model.lm_head.weight is model.transformer.word_embeddings.weight


@pytest.mark.parametrize("with_head", [False, True], ids=["without lm_head", "with lm_head"])
def test_the_head_of_chatglm_6b_is_its_embedding_after_loading(with_head, tmp_path):
    model = tiny_model(CHATGLM)
    model.save_pretrained(tmp_path)
    if with_head:
        weights = load_file(tmp_path / "model.safetensors")
        weights["lm_head.weight"] = weights["transformer.word_embeddings.weight"].clone()
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = ChatGLMForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.transformer.word_embeddings.weight
    assert torch.equal(logits(loaded, prompt(CHATGLM)), logits(model, prompt(CHATGLM)))


def test_the_head_of_chatglm2_is_its_own():
    model = tiny_model(CHATGLM2)
    assert model.transformer.output_layer.weight is not model.transformer.embedding.word_embeddings.weight
    assert model.get_output_embeddings() is model.transformer.output_layer


def test_rotary_frequencies_in_old_files_are_passed_over(shared_model, family, ids, tmp_path):
    shared_model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "layers.0.attention.rotary_emb" if family == CHATGLM else "rotary_pos_emb"
    weights[f"transformer.{name}.inv_freq"] = torch.full((4,), 7.0)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = ChatGLMForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert torch.equal(logits(loaded, ids), logits(shared_model, ids))


def test_the_vocabulary_can_grow_and_is_saved_with_its_new_size(model, family, ids, tmp_path):
    before = logits(model, ids)
    model.resize_token_embeddings(300, mean_resizing=False)
    assert_close(logits(model, ids)[..., :256], before)
    model.save_pretrained(tmp_path)
    loaded = ChatGLMForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.vocab_size == 300
    assert torch.equal(logits(loaded, ids), logits(model, ids))


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
def test_a_device_map_loads_the_same_model(shared_model, ids, device_map, tmp_path):
    shared_model.save_pretrained(tmp_path)
    loaded = ChatGLMForConditionalGeneration.from_pretrained(tmp_path, device_map=device_map)
    assert torch.equal(logits(loaded, ids), logits(shared_model, ids))


def test_layers_kept_on_disk_give_the_same_logits(shared_model, family, ids, tmp_path):
    shared_model.save_pretrained(tmp_path / "model")
    second_block = "layers.1" if family == CHATGLM else "encoder.layers.1"
    device_map = {"transformer.rotary_pos_emb": "cpu"}
    for name, module in shared_model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            device_map[name] = "disk" if second_block in name else "cpu"
    loaded = ChatGLMForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert torch.equal(logits(loaded, ids), logits(shared_model, ids))


# Compiling


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
