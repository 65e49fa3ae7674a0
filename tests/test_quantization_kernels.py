"""Every way of multiplying with packed weights on a CPU equals the definition, in float64."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from chatglm.hub import quantization_kernels as kernels
from chatglm.hub import quantization_plain as plain
from chatglm.hub.quantization import Linear, QuantizedLinear, quantize_weight
from chatglm.hub.quantization_kernels import (
    AtenInt4,
    AtenInt8,
    FbgemmHalf,
    FbgemmInt8,
    OneDnnFloat,
    OneDnnInt8,
    digits,
    float_linear,
    pack,
    quantized_linear,
    small_digits,
)
from chatglm.hub.quantization_plain import dequantize_weight, multiply_in_chunks, plain_on_cpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(64, 256), (96, 128), (72, 544)]  # rows that fill no block of 64, columns of 17 groups
ROWS = [1, 3, 4, 17, 100]
GROUPS = [None, 32]
# Relative errors of whole products; a wrong nibble, scale or row makes them larger than 0.1.
EXACT = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
IN_BFLOAT16 = 4e-3


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def every_byte(*shape: int) -> torch.Tensor:
    """Packed weights with all values, -128 and -8 too, which our own quantizer never makes."""
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(3)).to(torch.int8)


def scales(rows: int, columns: int, group_size: int | None) -> torch.Tensor:
    """float16 scales; those of groups are numbers that bfloat16 has too, as quantize_weight makes them."""
    if group_size is None:
        return random(rows, seed=1).abs().half()
    return random(rows, columns // group_size, seed=1).abs().bfloat16().half()


def packed_weight(rows: int, columns: int, bits: int, group_size: int | None = None):
    return every_byte(rows, columns * bits // 8), scales(rows, columns, group_size)


def expected(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    return x.double() @ dequantize_weight(weight, scale.double(), bits).T


def error(y: torch.Tensor, correct: torch.Tensor) -> float:
    """Of the whole product, relative."""
    return ((y.double() - correct).norm() / correct.norm()).item()


@pytest.fixture(autouse=True)
def small_weights_are_worth_it(monkeypatch):
    """Without this only weights of a million numbers leave the definition."""
    monkeypatch.setattr(kernels, "WORTH_IT", 0)
    monkeypatch.delenv("CHATGLM_KERNELS", raising=False)


@pytest.fixture
def forget_choices():
    kernels._choose_path.cache_clear()
    yield
    kernels._choose_path.cache_clear()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_torchs_int4_product_equals_the_definition(dtype, shape, group_size, rows):
    weight, scale = packed_weight(*shape, 4, group_size)
    x = random(rows, shape[1], seed=2).to(dtype)
    y = AtenInt4(weight, scale)(x)
    assert y.dtype == dtype
    assert error(y, expected(x, weight, scale, 4)) < IN_BFLOAT16


has_fbgemm = pytest.mark.skipif(not kernels.fbgemm_packs(), reason="torch has no FBGEMM on this CPU")
has_vnni = pytest.mark.skipif(
    not kernels.has_vnni(), reason="without VNNI oneDNN's int8 product is wrong, and not used"
)
INT8 = [AtenInt8, pytest.param(FbgemmInt8, marks=has_fbgemm), pytest.param(OneDnnInt8, marks=has_vnni)]


def rounding(kind: type, rows: int) -> float:
    """What sending the activations in the way of this product costs."""
    if kind is FbgemmInt8:
        return 3e-6 if rows <= kind.FEW else 3e-4
    return IN_BFLOAT16 if kind is AtenInt8 else 1e-4


@pytest.mark.parametrize("kind", INT8)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_torchs_int8_products_equal_the_definition(dtype, shape, rows, kind):
    weight, scale = packed_weight(*shape, 8)
    x = random(rows, shape[1], seed=2).to(dtype)
    y = kind(weight, scale)(x)
    assert y.dtype == dtype
    assert error(y, expected(x, weight, scale, 8)) < max(EXACT[dtype], rounding(kind, rows))


@has_fbgemm
@pytest.mark.parametrize("value", [-128, 127])
@pytest.mark.parametrize("sign", [-1, 1])
def test_fbgemms_sums_do_not_overflow(value, sign, monkeypatch):
    """The largest digits times the largest weights, in pairs, are what its 16 bits must hold."""
    all_largest = torch.full((3, 1, 4096), 64.0 * sign), torch.ones(1, 1)
    monkeypatch.setattr(kernels, "small_digits", lambda x, count: all_largest)
    y = FbgemmInt8(torch.full((64, 4096), value, dtype=torch.int8), torch.ones(64))(torch.zeros(1, 4096))
    assert y.flatten().tolist() == pytest.approx(
        [64 * sign * value * 4096 * (1 + 127 + 127**2)] * 64, rel=1e-6
    )


@pytest.mark.parametrize("count", [2, 3])
def test_small_digits_are_the_numbers(count):
    x = torch.cat((random(5, 300), random(5, 300) * 1e-20, torch.zeros(1, 300)))
    found, scale = small_digits(x, count)
    assert found.abs().max() <= 64
    assert torch.equal(found, found.round())
    whole = sum(127**i * found[i] for i in range(count))
    assert whole.abs().max() == 63 * sum(127**i for i in range(count))
    assert ((whole * scale - x).abs() <= 0.6 * scale).all()


@has_fbgemm
@pytest.mark.parametrize("rows", [2, 9])
@pytest.mark.parametrize("times", [100, 10000])
def test_a_very_large_channel_leaves_the_others_their_precision(times, rows):
    """The channel's own weights are 0, so the product is what the others add up to."""
    weight, scale = packed_weight(64, 4096, 8)
    weight[:, 7] = 0
    x = random(rows, 4096, seed=2)
    x[::2, 7] = times
    assert error(FbgemmInt8(weight, scale)(x), expected(x, weight, scale, 8)) < 4e-3


@has_fbgemm
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_the_dtype_that_torch_makes_by_default_changes_nothing(dtype):
    code = (
        "import torch; torch.set_default_dtype(torch.{dtype}); from chatglm.hub import quantization_kernels as kernels;"
        "assert kernels.fbgemm_packs() and kernels.POWERS[2][0].dtype == torch.float32"
    )
    subprocess.run([sys.executable, "-c", code.format(dtype=dtype)], check=True, timeout=300)


@has_fbgemm
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_number_that_is_none_spoils_its_row_alone(value):
    weight, scale = packed_weight(64, 256, 8)
    x = random(2, 256)
    x[0, 3] = value
    y = FbgemmInt8(weight, scale)(x)
    assert not y[0].isfinite().any()
    assert y[1].isfinite().all()


def test_onednns_int8_product_is_right_where_nothing_saturates():
    """On any CPU: integers up to 7 stay far from the 16 bits that overflow without VNNI."""
    weight, scale = every_byte(64, 256) >> 4, scales(64, 256, None)
    x = random(5, 256, seed=2)
    assert error(OneDnnInt8(weight, scale)(x), expected(x, weight, scale, 8)) < 1e-4


def test_many_bfloat16_rows_take_the_bfloat16_product(monkeypatch):
    monkeypatch.setattr(plain, "multiplies_bfloat16", lambda: True)
    weight, scale = every_byte(64, 256) >> 4, scales(64, 256, None)
    x = random(OneDnnInt8.MANY_ROWS, 256, seed=2).bfloat16()
    assert error(OneDnnInt8(weight, scale)(x), expected(x, weight, scale, 8)) < IN_BFLOAT16


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("group_size", GROUPS)
def test_int4_weights_come_back_from_torchs_layout_bit_for_bit(shape, group_size):
    weight, scale = packed_weight(*shape, 4, group_size)
    assert torch.equal(AtenInt4(weight, scale).unpack(), weight)


@pytest.mark.parametrize("kind", [OneDnnInt8, pytest.param(FbgemmInt8, marks=has_fbgemm), AtenInt8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_weights_come_back_from_torchs_layout_bit_for_bit(kind, shape):
    weight, scale = packed_weight(*shape, 8)
    assert torch.equal(kind(weight, scale).unpack(), weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_float_weights_come_back_from_their_layout_bit_for_bit(dtype):
    weight = random(72, 100).to(dtype)
    packed = kernels.pack_float(weight)
    if packed is None:
        pytest.skip(f"torch has no faster layout for {dtype} on this CPU")
    assert torch.equal(packed.unpack(), weight)
    assert packed.unpack().dtype == dtype
    x = random(5, 100, seed=2).to(dtype)
    assert error(packed(x), x.double() @ weight.double().T) < EXACT[dtype]


@pytest.fixture
def no_bfloat16(monkeypatch):
    """A CPU without instructions for bfloat16."""
    if torch.backends.quantized.engine not in ("fbgemm", "x86"):
        pytest.skip("torch has no FBGEMM on this CPU")
    monkeypatch.setattr(plain, "multiplies_bfloat16", lambda: False)


def test_bfloat16_weights_that_float16_cannot_hold_stay_as_they_are(no_bfloat16):
    assert kernels.pack_float(torch.full((64, 64), 1e30).bfloat16()) is None


def test_bfloat16_weights_too_small_for_float16_come_back_bit_for_bit(no_bfloat16):
    weight = (random(72, 100) * torch.logspace(-12, 0, 72)[:, None]).bfloat16()
    packed = kernels.pack_float(weight)
    assert isinstance(packed, FbgemmHalf)
    assert len(packed.small) > 100
    assert torch.equal(packed.unpack(), weight)
    x = random(5, 100, seed=2).bfloat16()
    assert error(packed(x), x.double() @ weight.double().T) < EXACT[torch.bfloat16]


@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_multiplied_with_the_accuracy_of_their_dtype(dtype, rows):
    weight, x = random(40, 96).to(dtype), random(rows, 96, seed=2).to(dtype)
    assert error(float_linear(x, weight), x.double() @ weight.double().T) < EXACT[dtype]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_definition_is_as_exact_as_its_dtype(dtype, bits):
    weight, scale = packed_weight(72, 544, bits, 32)
    x = random(3, 544, seed=2).to(dtype)
    assert (
        error(plain_on_cpu(x, weight, scale.to(dtype), bits), expected(x, weight, scale, bits)) < EXACT[dtype]
    )


def test_a_product_in_chunks_equals_the_whole_one(monkeypatch):
    monkeypatch.setitem(plain.CHUNK, "cpu", 64 * 50)
    weight, x = random(200, 50), random(7, 50, seed=2)
    seen = []
    y = multiply_in_chunks(x, 200, lambda rows: seen.append(rows) or weight[rows])
    assert len(seen) == 4
    assert error(y, x.double() @ weight.double().T) < 1e-6


def test_two_digits_hold_fifteen_bits():
    x = random(6, 300) * torch.logspace(-6, 4, 6)[:, None]
    both, scale = digits(x)
    high, low = (both.double() - 128).chunk(2)
    again = (high * 256 + low) * scale
    assert ((again - x).abs().amax(-1) <= x.abs().amax(-1) / 32000).all()


def test_a_row_of_zeros_has_digits_too():
    both, scale = digits(torch.zeros(1, 8))
    assert (both == 128).all()
    assert scale.isfinite().all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(0, 256), (2, 0, 256), (2, 3, 256)], ids=str)
def test_batches_of_any_shape_and_empty_ones_keep_it(shape, bits):
    weight, scale = packed_weight(64, 256, bits)
    layer = QuantizedLinear(256, 64, bits)
    layer.weight.data, layer.weight_scale.data = weight, scale
    layer.eval()
    x = random(*shape)
    assert quantized_linear(x, weight, scale, bits).shape == (*shape[:-1], 64)
    assert layer(x).shape == (*shape[:-1], 64)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_in_its_cpus_layout_compiles_into_one_graph(bits):
    layer = QuantizedLinear.from_linear(nn.Linear(256, 64), bits).eval()
    x = random(2, 256)
    with torch.no_grad():
        eager = layer(x)
        assert layer.packed is not None
        torch.compiler.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(compiled, eager)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_in_the_published_layout_compiles_into_one_graph(bits, monkeypatch):
    monkeypatch.setenv("CHATGLM_KERNELS", "plain")
    layer = QuantizedLinear.from_linear(nn.Linear(256, 64), bits).eval()
    x = random(2, 256)
    with torch.no_grad():
        eager = layer(x)
        assert layer.packed is None
        torch.compiler.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(compiled, eager)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_operators_pass_the_checks_that_torch_has_for_operators(bits):
    weight, scale = packed_weight(64, 256, bits)
    x = random(2, 3, 256)
    torch.library.opcheck(kernels.quantized_linear_op, (x, weight, scale, bits))
    packed = pack(weight, scale, bits)
    torch.library.opcheck(kernels.packed_linear_op, (x, kernels.register(packed), packed.out_features))


def test_an_unknown_path_is_told(monkeypatch):
    monkeypatch.setenv("CHATGLM_KERNELS", "fast")
    with pytest.raises(ValueError, match="CHATGLM_KERNELS is 'fast'; set one of auto, plain"):
        kernels.choose_path("cpu")


def test_the_chosen_path_is_said_once(forget_choices, caplog):
    with caplog.at_level(logging.INFO, logger=kernels.logger.name):
        assert kernels.choose_path("cpu") == kernels.choose_path("cpu") == "torch"
    assert caplog.messages == ["Packed weights on cpu are multiplied by the 'torch' path."]


def test_a_forced_path_that_cannot_run_warns_once_and_the_usual_one_runs(forget_choices, caplog, monkeypatch):
    monkeypatch.setenv("CHATGLM_KERNELS", "cuda")
    assert kernels.choose_path("cpu") == kernels.choose_path("cpu") == "torch"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.text.count("by the 'torch' path. ") == 1


def test_a_device_without_a_path_of_its_own_takes_the_definition(forget_choices, caplog):
    assert kernels.choose_path("mps") == "plain"
    assert not caplog.records


def test_a_card_without_any_of_its_kernels_warns_of_what_is_missing(forget_choices, caplog, monkeypatch):
    for path in kernels.PATHS["cuda"]:
        monkeypatch.setitem(kernels.MISSING, path, lambda device_type, path=path: f"{path} is not here.")
    assert kernels.choose_path("cuda") == "plain"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().endswith("by the 'plain' path. cuda is not here. triton is not here.")


@pytest.mark.parametrize("bits", [4, 8])
def test_small_weights_keep_to_the_definition(bits, monkeypatch):
    monkeypatch.setattr(kernels, "WORTH_IT", 1 << 20)
    layer = QuantizedLinear.from_linear(nn.Linear(256, 64), bits).eval()
    x = random(2, 256)
    with torch.no_grad():
        assert torch.equal(layer(x), plain_on_cpu(x, layer.weight, layer.weight_scale, bits) + layer.bias)
    assert layer.packed is None


def test_scales_of_groups_are_the_same_numbers_in_bfloat16():
    _, scale = quantize_weight(random(64, 256).half(), 4, group_size=32)
    assert scale.shape == (64, 8)
    assert torch.equal(scale.bfloat16().half(), scale)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_smaller_groups_are_closer_to_the_weight(group_size):
    weight = random(64, 256)
    grouped = dequantize_weight(*quantize_weight(weight, 4, group_size), 4)
    whole = dequantize_weight(*quantize_weight(weight, 4), 4)
    assert (grouped - weight).norm() < 0.95 * (whole - weight).norm()


def test_every_group_has_a_scale_of_its_own():
    weight = torch.cat((torch.ones(1, 32), torch.full((1, 32), -1e-3)), dim=1)
    packed, scale = quantize_weight(weight, 4, group_size=32)
    torch.testing.assert_close(dequantize_weight(packed, scale, 4), weight, rtol=4e-3, atol=0)
    torch.testing.assert_close(scale[0, 0] * -1e-3, scale[0, 1], rtol=8e-3, atol=0)


def test_a_group_leaves_a_quarter_less_error_than_the_published_rule_would():
    weight = random(64, 256)
    published = dequantize_weight(*quantize_weight(weight.view(-1, 32), 4), 4).view(64, 256)
    grouped = dequantize_weight(*quantize_weight(weight, 4, group_size=32), 4)
    assert (grouped - weight).square().sum() < 0.75 * (published - weight).square().sum()


def test_a_group_of_zeros_stays_zero():
    weight = random(4, 64)
    weight[1, :32] = 0
    dequantized = dequantize_weight(*quantize_weight(weight, 4, group_size=32), 4)
    assert dequantized.isfinite().all()
    assert not dequantized[1, :32].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_float_layer_gives_the_same_before_and_after_it_is_brought_into_the_cpus_layout(dtype):
    layer = Linear(100, 72).to(dtype).eval()
    x = random(5, 100).to(dtype)
    with torch.no_grad():
        before = layer(x)
        layer.prepack()
        assert error(layer(x), before.double()) < 2 * EXACT[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_float_layer_equals_torchs_own(dtype):
    layer = Linear(100, 72).to(dtype)
    x = random(5, 100).to(dtype)
    with torch.no_grad():
        assert error(layer(x), F.linear(x, layer.weight, layer.bias).double()) < 2 * EXACT[dtype]


def test_threads_that_ask_at_once_wait_for_one_answer():
    """Compiling, which one of the answers may need, is not done twice."""
    asked = []

    @kernels.once
    def answer(question: str) -> str:
        asked.append(question)
        time.sleep(0.05)
        return question.upper()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(answer, ["a"] * 4)) == ["A"] * 4
    assert asked == ["a"]


def test_kinds_exist_for_this_machine():
    """What `pack` takes here, so that a machine that can do better does not fall back unseen."""
    int8 = OneDnnInt8 if kernels.has_vnni() else FbgemmInt8 if kernels.fbgemm_packs() else AtenInt8
    assert type(pack(*packed_weight(64, 256, 8), 8)) is int8
    assert type(pack(*packed_weight(64, 256, 4), 4)) is AtenInt4
    assert type(kernels.pack_float(random(64, 64))) is OneDnnFloat
    if not plain.multiplies_bfloat16() and torch.backends.quantized.engine in ("fbgemm", "x86"):
        assert type(kernels.pack_float(random(64, 64).half())) is FbgemmHalf
