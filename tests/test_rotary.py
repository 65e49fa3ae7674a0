"""The rotary tables: the recorded ones, the formula, and what loading and casting may not do to them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers import (
    CHATGLM,
    CHATGLM2,
    FAMILIES,
    assert_close,
    largest_difference,
    prompt,
    tiny_config,
    tiny_model,
)
from safetensors.torch import load_file

from chatglm.hub.configuration_chatglm import ChatGLMConfig
from chatglm.hub.layers_chatglm import RotaryEmbedding, partners_of, rotate
from chatglm.hub.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm.hub.positions_chatglm import pack_positions


@pytest.fixture(scope="module")
def recorded(shared) -> dict[str, torch.Tensor]:
    return load_file(shared / "golden" / "rope_tables.safetensors")


def frequencies(family: str, head_dim: int) -> torch.Tensor:
    """The formula in Python's double precision, rounded once."""
    turned = head_dim // 2
    exact = [10000 ** (-2 * j / turned) for j in range(turned // 2)]
    inv_freq = torch.tensor(exact, dtype=torch.float64)
    return inv_freq.half().float() if family == CHATGLM else inv_freq.float()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_frequencies_follow_the_formula(family):
    rotary = RotaryEmbedding(tiny_config(family))
    torch.testing.assert_close(rotary.inv_freq, frequencies(family, 16), rtol=1e-6, atol=0)


def make_meta(model):
    return model.to("meta").to_empty(device="cpu")


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.half(),
        lambda model: model.to(torch.bfloat16),
        lambda model: model.half().float(),
        lambda model: model.double(),
        make_meta,
        copy.deepcopy,
    ],
    ids=["half", "bfloat16", "half and back", "double", "to_empty", "deepcopy"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_casting_or_moving_a_model_leaves_its_frequencies_exact_and_in_float32(family, change):
    changed = change(tiny_model(family))
    inv_freq = changed.transformer.rotary_pos_emb.inv_freq
    assert inv_freq.dtype == torch.float32
    torch.testing.assert_close(inv_freq, frequencies(family, 16), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_loading_leaves_no_garbage_in_the_frequencies(family, dtype, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    for _ in range(2):
        model = ChatGLMForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
        inv_freq = model.transformer.rotary_pos_emb.inv_freq
        torch.testing.assert_close(inv_freq, frequencies(family, 16), rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_frequencies_are_not_saved(family):
    assert not [key for key in tiny_model(family).state_dict() if "inv_freq" in key]


DTYPES = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16}


@pytest.mark.parametrize("dtype", DTYPES)
def test_chatglm2_tables_are_the_recorded_ones_of_float32_angles_in_every_dtype(recorded, dtype):
    expected = recorded[f"v3_{dtype}"]  # [positions, pairs, (cos, sin)]
    cos, sin = RotaryEmbedding(ChatGLMConfig())(recorded["positions"][None], DTYPES[dtype])
    for ours, published, sign in ((cos, expected[..., 0], 1), (sin, expected[..., 1], -1)):
        turned, passing = ours[0, 0].chunk(2, dim=-1)
        # A pair shares its angle. The angle of position 32767 has steps of 0.002 in float32.
        assert torch.equal(turned[..., 0::2], sign * turned[..., 1::2])
        assert_close(turned[..., 1::2], published, atol=2e-3 + torch.finfo(DTYPES[dtype]).eps)
        assert torch.equal(passing, torch.full_like(passing, float(sign == 1)))


@pytest.mark.parametrize("dtype", ["float", "half"])
def test_chatglm_6b_tables_are_the_recorded_ones_half_arithmetic_included(recorded, dtype):
    positions = recorded["positions"]
    positions = positions[positions < 2048]
    packed = pack_positions(torch.stack((positions, positions.flip(0)))[None])
    cos, sin = RotaryEmbedding(ChatGLMConfig.chatglm_6b())(packed, DTYPES[dtype])
    for ours, name, sign in ((cos, "cos", 1), (sin, "sin", -1)):
        published = recorded[f"v1_{name}_{dtype}"]
        first, second = ours[0, 0].chunk(2, dim=-1)  # turned by the position, by the block
        for part, expected in ((first, published), (second, published.flip(0))):
            assert torch.equal(part[:, :32], sign * part[:, 32:])
            assert_close(part[:, 32:], expected, atol=2 * torch.finfo(DTYPES[dtype]).eps)


def test_chatglm_6b_in_bfloat16_has_float32_angles(recorded):
    positions = recorded["positions"]
    positions = positions[positions < 2048]
    packed = pack_positions(torch.stack((positions, positions))[None])
    cos, _ = RotaryEmbedding(ChatGLMConfig.chatglm_6b())(packed, torch.bfloat16)
    assert_close(cos[0, 0, :, :32], recorded["v1_cos_float"], atol=torch.finfo(torch.bfloat16).eps)


def test_rope_ratio_divides_the_positions():
    positions = torch.arange(0, 400, 8)[None]
    stretched = RotaryEmbedding(tiny_config(CHATGLM2, rope_ratio=8.0))(positions, torch.float32)
    plain = RotaryEmbedding(tiny_config(CHATGLM2))(positions // 8, torch.float32)
    for ours, expected in zip(stretched, plain, strict=True):
        assert torch.equal(ours, expected)


def test_rope_ratio_changes_the_logits():
    ids = prompt(CHATGLM2)
    with torch.no_grad():
        plain, stretched = (tiny_model(CHATGLM2, rope_ratio=ratio)(ids).logits for ratio in (1.0, 4.0))
    assert largest_difference(plain, stretched) > 0.1


def test_chatglm2_positions_are_not_limited_by_seq_length():
    model, ids = tiny_model(CHATGLM2, seq_length=16), prompt(CHATGLM2, 40)
    with torch.no_grad():
        assert model(ids).logits.isfinite().all()


ANGLE = 0.3


def test_chatglm_6b_turns_the_halves_of_each_part():
    states = torch.tensor([[[[1.0, 0.0, 0.0, 2.0]]]])  # parts (1, 0) and (0, 2)
    cos, sin = math.cos(ANGLE), math.sin(ANGLE)
    turned = rotate(states, torch.full((4,), cos), torch.tensor([-sin, sin, -sin, sin]), (2, 2, 1), -2)
    torch.testing.assert_close(turned[0, 0, 0], torch.tensor([cos, sin, -2 * sin, 2 * cos]))


def test_chatglm2_turns_neighbouring_pairs_of_the_first_half_only():
    states = torch.tensor([[[[1.0, 0.0, 5.0, 6.0]]]])
    cos, sin = math.cos(ANGLE), math.sin(ANGLE)
    turned = rotate(states, torch.tensor([cos, cos, 1, 1]), torch.tensor([-sin, sin, 0, 0]), (2, 2), -1)
    torch.testing.assert_close(turned[0, 0, 0], torch.tensor([cos, sin, 5.0, 6.0]))


@pytest.mark.parametrize("overrides", [{}, {"position_encoding_2d": False}], ids=["2d", "1d"])
def test_partners_of_chatglm_6b_lie_half_a_part_away(overrides):
    config = tiny_config(CHATGLM, **overrides)
    pairs, axis = partners_of(config)
    channels = torch.arange(config.head_dim).view(pairs)
    distance = (channels.flip(axis) - channels).abs()
    assert (distance == config.head_dim // (2 if overrides else 4)).all()
