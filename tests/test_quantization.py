"""Packed layers: the storage format bit for bit, and equality with the plain layer they stand for."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import CHATGLM, FAMILIES, assert_close, prompt, tiny_config, tiny_model
from torch import nn
from transformers import StaticCache

from chatglm.hub import quantization_kernels as kernels
from chatglm.hub.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm.hub.quantization import (
    QUANTIZED_LAYERS,
    QuantizedEmbedding,
    QuantizedLinear,
    dequantize_weight,
    pack_int4,
    quantize,
    quantize_weight,
    unpack_int4,
)

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
BITS = [8, 4]
LIMIT = {8: 127, 4: 7}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nibble(value: int) -> int:
    """The number -8 ... 7 that four bits stand for."""
    return value - 16 if value > 7 else value


def test_every_byte_unpacks_to_its_high_and_then_its_low_nibble():
    every_byte = torch.arange(-128, 128).to(torch.int8)[:, None]
    expected = [[nibble(byte % 256 >> 4), nibble(byte % 16)] for byte in range(-128, 128)]
    assert unpack_int4(every_byte).tolist() == expected


def test_packing_every_pair_of_nibbles_and_unpacking_gives_it_back():
    pairs = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8)).to(torch.int8)
    assert pack_int4(pairs).dtype == torch.int8
    assert torch.equal(unpack_int4(pack_int4(pairs)), pairs)


def test_columns_keep_their_order_when_packed():
    row = torch.tensor([[1, -1, 7, -7, 0, 3]], dtype=torch.int8)
    assert [byte % 256 for byte in pack_int4(row)[0].tolist()] == [0x1F, 0x79, 0x03]


@pytest.mark.parametrize("bits", BITS)
def test_the_largest_number_of_a_row_becomes_the_largest_integer(bits):
    packed, scale = quantize_weight(torch.tensor([[1.0, -2.0], [0.5, 0.25]]), bits)
    integers = packed if bits == 8 else unpack_int4(packed)
    assert integers[0, 1] == -LIMIT[bits]
    assert integers[1, 0] == LIMIT[bits]
    torch.testing.assert_close(scale, torch.tensor([2.0, 0.5]) / LIMIT[bits])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_quantizing_is_off_by_half_a_step_at_most(bits, dtype):
    weight = random(40, 32).to(dtype)
    packed, scale = quantize_weight(weight, bits)
    assert scale.dtype == dtype
    error = (dequantize_weight(packed, scale, bits).float() - weight.float()).abs()
    rounding = torch.finfo(dtype).eps * weight.abs().max().float()
    assert (error <= 0.5 * scale[:, None].float() * 1.01 + 2 * rounding).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_numbers_too_small_for_an_exact_scale_keep_their_sign(bits, dtype):
    weight = (random(60, 16) * torch.logspace(-8, 0, 60)[:, None]).to(dtype)
    packed, _ = quantize_weight(weight, bits)
    integers = packed if bits == 8 else unpack_int4(packed)
    assert integers.abs().max() <= LIMIT[bits]
    assert (integers.sign() * weight.sign() >= 0).all()


@pytest.mark.parametrize("bits", BITS)
def test_a_row_of_zeros_stays_zero(bits):
    weight = random(3, 8)
    weight[1] = 0
    dequantized = dequantize_weight(*quantize_weight(weight, bits), bits)
    assert dequantized.isfinite().all()
    assert not dequantized[1].any()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(bits, broken):
    weight = random(3, 8)
    weight[2, 5] = broken
    with pytest.raises(ValueError, match="not finite"):
        quantize_weight(weight, bits)


def test_an_odd_width_cannot_be_packed_to_four_bits():
    with pytest.raises(ValueError, match="7 columns"):
        quantize_weight(random(4, 7), 4)


def test_an_odd_width_can_be_quantized_to_eight_bits():
    assert quantize_weight(random(4, 7), 8)[0].shape == (4, 7)


@pytest.mark.parametrize("bits", [2, 16, None])
def test_other_widths_than_eight_and_four_bits_are_refused(bits):
    with pytest.raises(ValueError, match="8 or 4 bits"):
        quantize_weight(random(4, 8), bits)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_packed_linear_layer_equals_the_plain_one_with_its_dequantized_weight(dtype, bits, bias):
    linear = nn.Linear(24, 40, bias=bias).to(dtype)
    layer = QuantizedLinear.from_linear(linear, bits)
    with torch.no_grad():
        linear.weight.copy_(dequantize_weight(layer.weight, layer.weight_scale, bits))
        states = random(2, 5, 24).to(dtype)
        # The sum is rounded once more where the bias is added after it.
        assert_close(layer(states), linear(states), atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("bits", BITS)
def test_gradients_reach_the_input_of_a_packed_layer_and_not_its_weight(bits):
    layer = QuantizedLinear.from_linear(nn.Linear(24, 40), bits)
    states = random(3, 24).requires_grad_()
    layer(states).sum().backward()
    expected = dequantize_weight(layer.weight, layer.weight_scale, bits).sum(0).expand(3, -1)
    assert_close(states.grad, expected, atol=1e-5)
    assert not layer.weight.requires_grad
    assert not layer.weight_scale.requires_grad


@pytest.mark.parametrize("bits", BITS)
def test_a_packed_embedding_equals_the_rows_of_its_dequantized_weight(bits):
    layer = QuantizedEmbedding.from_embedding(nn.Embedding(30, 16), bits)
    ids = torch.tensor([[0, 29, 7], [7, 1, 2]])
    table = dequantize_weight(layer.weight, layer.weight_scale, bits)
    assert torch.equal(layer(ids), table[ids])


@pytest.mark.parametrize("bits", BITS)
def test_layers_on_the_meta_device_are_packed_without_numbers(bits):
    linear = nn.Linear(24, 40, device="meta")
    layer = QuantizedLinear.from_linear(linear, bits)
    assert layer.weight.is_meta
    assert layer.weight.shape == (40, 24 * bits // 8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_four_linear_layers_of_every_block_are_packed_and_nothing_else(family, bits):
    model = tiny_model(family)
    before = {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    quantize(model, bits)
    packed = {name for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    assert packed == {name for name in before if name.rsplit(".")[-1] in QUANTIZED_LAYERS}
    assert len(packed) == 4 * model.config.num_layers


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantized_model_gives_the_logits_of_the_plain_one_with_dequantized_weights(family, bits):
    model = tiny_model(family)
    plain = copy.deepcopy(model)
    model.quantize(bits)
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            dequantized = dequantize_weight(layer.weight, layer.weight_scale, bits)
            plain.get_submodule(name).weight.data = dequantized
    with torch.no_grad():
        assert_close(model(prompt(family)).logits, plain(prompt(family)).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_quantizing_to_zero_bits_returns_the_model_unchanged(family):
    model = tiny_model(family)
    assert model.quantize(0) is model
    assert not model.config.quantization_bit
    assert not [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]


@pytest.mark.parametrize("family", FAMILIES)
def test_quantizing_twice_returns_the_model_as_it_is(family):
    model = tiny_model(family).quantize(8)
    before = model.state_dict()
    assert model.quantize(4) is model
    assert model.config.quantization_bit == 8
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unknown_number_of_bits_is_refused_before_anything_is_changed(family):
    model = tiny_model(family)
    with pytest.raises(ValueError, match="not 5"):
        model.quantize(5)
    assert not model.config.quantization_bit


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantized_model_saves_and_loads_equal(family, bits, tmp_path):
    model = tiny_model(family).half().quantize(bits)
    model.save_pretrained(tmp_path)
    loaded = ChatGLMForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.quantization_bit == bits
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for key, tensor in loaded.state_dict().items():
        assert tensor.dtype == expected[key].dtype, key
        assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_packed_embedding_saves_and_loads_equal(family, bits, group_size, tmp_path):
    if bits == 8 and group_size:
        pytest.skip("groups are for four bits")
    model = tiny_model(family).quantize(bits, quantize_embeddings=True, group_size=group_size)
    model.save_pretrained(tmp_path)
    loaded = ChatGLMForConditionalGeneration.from_pretrained(tmp_path)
    assert isinstance(loaded.get_input_embeddings(), QuantizedEmbedding)
    assert isinstance(loaded.get_output_embeddings(), QuantizedLinear)
    with torch.no_grad():
        assert torch.equal(loaded(prompt(family)).logits, model(prompt(family)).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_with_packed_weights_builds_packed_layers(family):
    model = ChatGLMForConditionalGeneration(tiny_config(family, quantization_bit=4))
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    assert len(layers) == 4 * model.config.num_layers


@pytest.mark.parametrize("change", [torch.nn.Module.half, torch.nn.Module.float, torch.nn.Module.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_casting_a_quantized_model_leaves_its_integers_alone(family, change):
    model = tiny_model(family).quantize(8)
    before = {k: v.clone() for k, v in model.state_dict().items() if v.dtype == torch.int8}
    change(model)
    with torch.no_grad():
        assert model(prompt(family)).logits.isfinite().all()
    for key, integers in before.items():
        assert torch.equal(model.state_dict()[key], integers)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_can_be_trained_on_a_quantized_model(family):
    model = tiny_model(family, pre_seq_len=4).quantize(4).train()
    ids = prompt(family)
    model(ids, labels=ids).loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {"transformer.prefix_encoder.embedding.weight"}


@pytest.mark.parametrize("layout", ["published", "the CPU's own"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_compiled_quantized_model_decodes_on_a_static_cache_as_the_eager_one(
    family, bits, layout, monkeypatch
):
    if layout != "published":
        monkeypatch.setattr(kernels, "WORTH_IT", 0)
    model = tiny_model(family).quantize(bits)
    ids = prompt(family)
    answers = []
    for step in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        torch._dynamo.reset()
        cache = StaticCache(config=model.config, max_cache_len=16)
        with torch.no_grad():
            model(ids, past_key_values=cache)
            past = ids.shape[1]
            positions = torch.tensor([[past]])
            if family == CHATGLM:
                positions = torch.tensor([[[past - 2], [2]]])
            outputs = step(torch.tensor([[7]]), past_key_values=cache, position_ids=positions)
        answers.append(outputs.logits)
    torch._dynamo.reset()
    assert_close(answers[1], answers[0])
