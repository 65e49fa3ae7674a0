"""Products with packed int8 and int4 weights, and with float weights on a CPU, on the fastest path of the machine.

The choice of a path; torch's own operators on a CPU, for float weights too; the operators that torch.compile sees.
quantization_plain.py holds the definition, quantization_native.py and quantization_gpu.py kernels of our own;
quantization.py says how weights are stored and holds the layers.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import threading
import warnings
import weakref
import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .quantization_gpu import cuda_linear, cuda_missing, triton_linear, triton_missing
from .quantization_native import NativeWeight, native_linear, native_missing
from .quantization_plain import (
    Packed,
    dequantize_weight,
    multiply_in_chunks,
    plain_linear,
    plain_on_cpu,
    product_dtype,
    unpack_int4,
)

logger = logging.getLogger(__name__)

# ---------------------------------------------------------------------------------------------------------------
# The choice of a path
# ---------------------------------------------------------------------------------------------------------------


def once(function: Callable) -> Callable:
    """`functools.cache` for what must not be done twice at a time, such as compiling: other threads wait."""
    cached, lock = functools.cache(function), threading.Lock()

    @functools.wraps(function)
    def wait(*args: Any) -> Any:
        with lock:
            return cached(*args)

    wait.cache_clear = cached.cache_clear
    return wait


# CHATGLM_KERNELS forces one; "auto" takes the first of its device that can run.
PATHS = {"cpu": ("torch",), "cuda": ("cuda", "triton")}
ALL_PATHS = ("auto", "plain", "torch", "native", "cuda", "triton")
# Smaller weights stay with the definition: nothing is gained, and their sums stay exact.
WORTH_IT = 1 << 20


def choose_path(device_type: str) -> str:
    """The name of the path that products on a device of this type take: "plain", or one of PATHS or "native".

    Says once in the log what was chosen, and warns once where a faster path is missing something.
    """
    return _choose_path(device_type, os.environ.get("CHATGLM_KERNELS", "auto"))


@once
def _choose_path(device_type: str, forced: str) -> str:
    if forced not in ALL_PATHS:
        raise ValueError(f"CHATGLM_KERNELS is {forced!r}; set one of {', '.join(ALL_PATHS)}.")
    if forced == "plain":
        return "plain"
    usual = PATHS.get(device_type, ())
    candidates = usual if forced == "auto" else (forced, *(path for path in usual if path != forced))
    missing = []
    for path in candidates:
        reason = MISSING[path](device_type)
        if reason is None:
            break
        missing.append(reason)
    else:
        path = "plain"
    asked_for_more = missing and (forced != "auto" or path == "plain")
    logger.log(
        logging.WARNING if asked_for_more else logging.INFO,
        "Packed weights on %s are multiplied by the %r path.%s",
        device_type,
        path,
        "".join(f" {reason}" for reason in missing),
    )
    return path


def _torch_missing(device_type: str) -> str | None:
    return None if device_type == "cpu" else f"The 'torch' path is for the CPU, not for {device_type}."


# What a path lacks on a device type, in a sentence, or None if it can run there.
MISSING: dict[str, Callable[[str], str | None]] = {
    "torch": _torch_missing,
    "native": native_missing,
    "cuda": cuda_missing,
    "triton": triton_missing,
}


def quantized_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """x [..., in] times a weight in the published layout, on the path of its device: [..., out]."""
    if torch.compiler.is_compiling():
        return quantized_linear_op(x, weight, scale, bits)
    return _quantized_linear(x, weight, scale, bits)


def _quantized_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    path = choose_path(x.device.type) if weight.numel() * 8 // bits >= WORTH_IT else "plain"
    rows = x.reshape(-1, x.shape[-1])
    product = LINEARS.get(path, plain_on_cpu if x.device.type == "cpu" else plain_linear)
    return product(rows, weight, scale, bits).view(*x.shape[:-1], len(weight))


# Products in the published layout, by path. Torch's own CPU operators need a layout of their own: see Packed.
LINEARS: dict[str, Callable[..., torch.Tensor]] = {
    "native": native_linear,
    "cuda": cuda_linear,
    "triton": triton_linear,
}


# ---------------------------------------------------------------------------------------------------------------
# Torch's own operators on a CPU
# ---------------------------------------------------------------------------------------------------------------

ROWS_AT_ONCE = 1024  # whose order is changed at a time, so that little is held beside the weight


@functools.cache
def has_vnni() -> bool:
    """Without it oneDNN's int8 products saturate at 16 bits, silently."""
    return torch.cpu._is_vnni_supported()


def digits(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [M, in] as two digits of base 256 each: unsigned [2 M, in] around 128, and their scale [M, 1].

    Fifteen bits of the largest number of the row: the error of a product is about 4e-5.
    """
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / (127 * 256)
    whole = (x / scale).round_()
    high = ((whole + 128) / 256).floor_()
    return torch.cat((high, whole - high * 256)).add_(128).to(torch.uint8), scale


class OneDnnInt8(Packed):
    """int8 rows for oneDNN's 8-bit product, whose activations are sent as two digits.

    Only with VNNI; one scale a row. Many rows in bfloat16 are multiplied in bfloat16 instead.
    """

    MANY_ROWS = 64

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        self.out_features = len(weight)
        self.packed = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)  # [in, out]
        self.scale = scale.float()
        self.zero = torch.zeros(len(weight), dtype=torch.int32)
        self.one, self.middle = torch.ones(()), torch.tensor(128, dtype=torch.int32)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) >= self.MANY_ROWS and product_dtype(x.dtype) == torch.bfloat16:
            weight = self.unpack()
            return multiply_in_chunks(x, len(weight), lambda rows: weight[rows]) * self.scale.to(x.dtype)
        both, row_scale = digits(x)
        y = torch.ops.onednn.qlinear_pointwise.tensor(
            both, self.one, self.middle, self.packed, self.scale, self.zero, None,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        high, low = y.chunk(2)
        return (high.mul_(256).add_(low) * row_scale).to(x.dtype)

    def unpack(self) -> torch.Tensor:
        return self.packed.to_dense().t().contiguous()


BASE = 127
HALF = 64  # a digit is at most so large; rounding the lower ones may take the highest from 63 there


def _powers(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How often 1 in each of `count` digits goes into the largest number [count, 1, 1]; the lowest's inverse."""
    largest = (HALF - 1) * sum(BASE**i for i in range(count))
    times = torch.tensor([largest / BASE**i for i in range(count)], dtype=torch.float32, device="cpu")
    return times[:, None, None], 1 / times[0]


POWERS = {count: _powers(count) for count in (2, 3)}


def small_digits(x: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [M, in] as `count` digits of base 127, the lowest first: whole numbers from -64 to 64 [count, M, in].

    The second result [M, 1] is what 1 in the lowest digit is worth. Two digits hold thirteen bits of the largest
    number of the row, three of them twenty: usually the error of a product is about 1e-4 or 1e-6.
    """
    # Few operators, and no Python numbers among them: of one token each costs more than its arithmetic.
    x, (times, inverse) = x.float(), POWERS[count]
    peak = torch.linalg.vector_norm(x, torch.inf, -1, keepdim=True).clamp_(min=1e-30)
    digits = (x * (times / peak)).round_()  # below 2^24: all that follows is exact
    for lower, higher in itertools.pairwise(digits.unbind()):
        lower.sub_(higher, alpha=BASE)
    return digits, peak * inverse


class FbgemmInt8(Packed):
    """int8 rows for FBGEMM's product with bytes, on any x86 CPU; activations are sent as digits. One scale a row.

    Without VNNI it adds pairs of products in 16 bits, which such digits cannot overflow, 2 * 128 * 128 = 32768 with
    the sign of the weight -128: so the integers are exact.
    """

    FEW = 4  # up to here three digits cost little; two of many rows cost what float32 would
    WILD = 64  # so many times the mean of a row, a largest number leaves the others too little of two digits

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        self.out_features = len(weight)
        zero = torch.zeros(len(weight), dtype=torch.int64)
        tensor = torch._make_per_channel_quantized_tensor(weight.contiguous(), scale.double(), zero, 0)
        self.packed = torch.ops.quantized.linear_prepack(tensor, None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) <= self.FEW:
            return self._multiply(x, 3)
        sizes = x.float().abs()
        wild = sizes.amax(-1) > self.WILD * sizes.mean(-1)
        if not wild.any():
            return self._multiply(x, 2)
        y = x.new_empty(len(x), self.out_features)
        y[wild], y[~wild] = self._multiply(x[wild], 3), self._multiply(x[~wild], 2)
        return y

    def _multiply(self, x: torch.Tensor, count: int) -> torch.Tensor:
        sent, row_scale = small_digits(x, count)
        # -64 to 64 become bytes from 0 to 128.
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        *lower, y = product(sent, 1.0, HALF, self.packed).unbind()
        for digit in reversed(lower):
            y = digit.add_(y, alpha=BASE)
        return y.mul_(row_scale).to(x.dtype)

    def unpack(self) -> torch.Tensor:
        return torch.ops.quantized.linear_unpack(self.packed)[0].int_repr()


def fbgemm_packs() -> bool:
    """Whether torch multiplies by FBGEMM here, and its int8 product gives the right numbers."""
    return torch.backends.quantized.engine in ("fbgemm", "x86") and _fbgemm_is_right()


@once
def _fbgemm_is_right() -> bool:
    """Torch means to remove the tensors that FBGEMM packs one day, and says so the first time: here."""
    weight = (torch.arange(64 * 64, device="cpu") * 37 % 256 - 128).to(torch.int8).view(64, 64)
    x = torch.linspace(-1, 1, 64, dtype=torch.float32, device="cpu")[None]
    scale = torch.ones(64, dtype=torch.float32, device="cpu")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*quantized tensor creation functions", UserWarning)
            y = FbgemmInt8(weight, scale)(x)
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return False
    return torch.allclose(y, x @ weight.t().float(), rtol=0, atol=1e-2)


class AtenInt8(Packed):
    """int8 rows for torch's bfloat16 product, which needs no special instructions; one scale a row."""

    FEW = 32  # above, widening the weight once costs less: 58 ms for 13696 x 4096 on two cores, 1.5 ms a row here

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        self.out_features = len(weight)
        self.weight, self.scale = weight.contiguous(), scale.float()
        self.ones = torch.ones(len(weight), dtype=torch.bfloat16)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) <= self.FEW:
            # The scale stays outside, where it is not rounded to bfloat16.
            y = torch.ops.aten._weight_int8pack_mm(x.bfloat16(), self.weight, self.ones)
        else:
            wide = x.to(product_dtype(x.dtype))
            y = multiply_in_chunks(wide, self.out_features, lambda rows: self.weight[rows])
        return (y * self.scale).to(x.dtype)

    def unpack(self) -> torch.Tensor:
        return self.weight


class AtenInt4(Packed):
    """Nibbles in the order of torch's int4 product, whose inputs and outputs are bfloat16 (error 2e-3).

    Blocks of `block` rows lie column by column; a byte holds row r in its low nibble and row r + block / 2 in
    its high one, each 8 too large.
    """

    FEW = 80  # above, unpacking once costs less than the product's own unpacking for every four rows

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        self.out_features, columns = len(weight), 2 * weight.shape[1]
        self.block = int4_block()
        padded = len(weight) + -len(weight) % self.block  # whole blocks
        self.packed = torch.empty(padded, weight.shape[1], dtype=torch.uint8)
        for start in range(0, padded, ROWS_AT_ONCE):
            rows = weight[start : start + ROWS_AT_ONCE]
            rows = F.pad(rows, (0, 0, 0, min(ROWS_AT_ONCE, padded - start) - len(rows)))
            self.packed[start : start + ROWS_AT_ONCE] = arrange_int4(rows, self.block)
        self.group = next(g for g in (256, 128, 64, 32) if columns % g == 0)
        self.scale = None if scale.dim() == 2 else scale.float()
        if self.scale is None:
            self.group = columns // scale.shape[1]
        # [groups, out, (scale, zero)]. A scale a row is multiplied in outside, where it is not rounded.
        self.inside = torch.zeros(columns // self.group, padded, 2, dtype=torch.bfloat16)
        self.inside[:, : len(weight), 0] = 1 if self.scale is not None else scale.t()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) <= self.FEW:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(
                x.bfloat16(), self.packed, self.group, self.inside
            )[:, : self.out_features]
        else:
            y = multiply_in_chunks(x.to(product_dtype(x.dtype)), self.out_features, self._rows)
        return (y if self.scale is None else y * self.scale).to(x.dtype)

    def _rows(self, rows: slice) -> torch.Tensor:
        integers = unpack_int4(self._published(rows))
        if self.scale is not None:
            return integers
        return dequantize_weight(integers, self.inside[:, rows, 0].t()[: len(integers)], 8)

    def _published(self, rows: slice) -> torch.Tensor:
        """int8 [rows, in / 2]; `rows` begins with a block, and ends with one or with the last row."""
        start, stop, _ = rows.indices(self.out_features)
        return restore_int4(self.packed[start : stop + -stop % self.block], self.block)[: stop - start]

    def unpack(self) -> torch.Tensor:
        parts = range(0, self.out_features, ROWS_AT_ONCE)
        return torch.cat([self._published(slice(start, start + ROWS_AT_ONCE)) for start in parts])


def arrange_int4(weight: torch.Tensor, block: int) -> torch.Tensor:
    """int8 [rows, in / 2] as published, whole blocks -> uint8 [rows, in / 2] in torch's order."""
    unsigned = weight.view(torch.uint8) ^ 0x88  # each nibble 8 too large
    low, high = unsigned.view(-1, 2, block // 2, weight.shape[1]).unbind(1)
    packed = torch.empty(len(low), weight.shape[1], 2, block // 2, dtype=torch.uint8)
    packed[:, :, 0] = ((low >> 4) | (high & 0xF0)).transpose(1, 2)  # even columns
    packed[:, :, 1] = ((low & 0x0F) | (high << 4)).transpose(1, 2)  # odd ones
    return packed.view(weight.shape)


def restore_int4(packed: torch.Tensor, block: int) -> torch.Tensor:
    """The inverse of `arrange_int4`."""
    even, odd = packed.view(-1, packed.shape[1], 2, block // 2).transpose(1, 3).unbind(2)
    unsigned = torch.empty(len(even), 2, block // 2, packed.shape[1], dtype=torch.uint8)
    unsigned[:, 0] = (even << 4) | (odd & 0x0F)
    unsigned[:, 1] = (even & 0xF0) | (odd >> 4)
    return (unsigned ^ 0x88).view(torch.int8).view(packed.shape)


@functools.cache
def int4_block() -> int:
    """Rows that torch's int4 layout keeps together on this CPU, found by looking; 0 if it is another layout."""
    integers = (torch.arange(128 * 32) * 7 % 16 - 8).view(128, 32)
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers.int() + 8, 1)
    published = ((integers[:, 0::2] << 4) | (integers[:, 1::2] & 15)).to(torch.int8)
    for block in (64, 32, 16):
        if torch.equal(arrange_int4(published, block).flatten(), theirs.flatten()):
            return block
    return 0


class OneDnnFloat(Packed):
    """bfloat16 or float32 rows in the order that oneDNN reads fastest."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.out_features = len(weight)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.ops.mkldnn._linear_pointwise(x.to(self.packed.dtype), self.packed, None, "none", [], "")
        return y.to(x.dtype)

    def unpack(self) -> torch.Tensor:
        return self.packed.to_dense()


class FbgemmHalf(Packed):
    """float16 weights that FBGEMM multiplies in float32, on any x86 CPU.

    bfloat16 weights become float16: all but the very small ones, whose error is below 3e-8, are the same numbers.
    Those are kept beside, so that `unpack` can give back every bit.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self.out_features, self.dtype = len(weight), weight.dtype
        wide = weight.half().float()
        self.small = (wide.to(weight.dtype) != weight).flatten().nonzero().squeeze(1)
        self.kept = weight.flatten()[self.small]
        self.packed = torch.ops.quantized.linear_prepack_fp16(wide, None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x.float(), self.packed).to(x.dtype)

    def unpack(self) -> torch.Tensor:
        weight = torch.ops.quantized.linear_unpack_fp16(self.packed)[0].to(self.dtype)
        weight.view(-1)[self.small] = self.kept
        return weight


def may_pack(weight: torch.Tensor, bits: int) -> bool:
    """Whether `pack` is asked at all: of large weights on a CPU, unless its path is the definition."""
    large = weight.device.type == "cpu" and weight.numel() * 8 // bits >= WORTH_IT
    return large and choose_path("cpu") in ("torch", "native")


def pack(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> Packed | None:
    """Make a packed weight ready for the fastest product of this CPU, or None if that is the definition."""
    if not may_pack(weight, bits):
        return None
    if choose_path("cpu") == "native":
        return NativeWeight(weight, scale, bits) if NativeWeight.takes(weight, scale, bits) else None
    if bits == 4 and weight.shape[1] % 16 == 0 and int4_block():
        return AtenInt4(weight, scale)
    if bits == 8 and scale.dim() == 1:
        kind = OneDnnInt8 if has_vnni() else FbgemmInt8 if fbgemm_packs() else AtenInt8
        return kind(weight, scale)
    return None


def may_pack_float(weight: torch.Tensor) -> bool:
    """The same for a float weight, which "plain" alone leaves as it is."""
    return weight.device.type == "cpu" and weight.numel() >= WORTH_IT and choose_path("cpu") != "plain"


def pack_float(weight: torch.Tensor) -> Packed | None:
    """Bring a float weight on a CPU into the layout of torch's fastest product, or None if there is no faster one."""
    if not may_pack_float(weight):
        return None
    if weight.dtype == product_dtype(weight.dtype):
        return OneDnnFloat(weight)
    if torch.backends.quantized.engine not in ("fbgemm", "x86"):
        return None
    return FbgemmHalf(weight) if weight.abs().amax() <= torch.finfo(torch.float16).max else None


def float_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """F.linear for half-precision weights on a CPU, without torch's slow products of several rows.

    Measured on a CPU without AVX512, 512 rows: 24 GFLOP/s in float16, 19 in bfloat16, 118 in float32.
    """
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) == 1 or weight.dtype == product_dtype(weight.dtype):
        return F.linear(x, weight)
    y = multiply_in_chunks(rows.float(), len(weight), lambda part: weight[part])
    return y.to(x.dtype).view(*x.shape[:-1], len(weight))


# ---------------------------------------------------------------------------------------------------------------
# Operators that torch.compile and CUDA graphs take as they are
# ---------------------------------------------------------------------------------------------------------------

# Packed weights by number, since they are no tensors that an operator could take.
_packed: weakref.WeakValueDictionary[int, Packed] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register(packed: Packed) -> int:
    """A number under which `packed_linear` finds it, for as long as it lives."""
    number = next(_numbers)
    _packed[number] = packed
    return number


def packed_linear(x: torch.Tensor, packed: Packed, number: int) -> torch.Tensor:
    """x [..., in] times a packed weight: [..., out]."""
    if torch.compiler.is_compiling():
        return packed_linear_op(x, number, packed.out_features)
    shape = (*x.shape[:-1], packed.out_features)
    return packed(x.reshape(-1, x.shape[-1])).view(shape) if x.numel() else x.new_empty(shape)


def _packed_linear(x: torch.Tensor, number: int, out_features: int) -> torch.Tensor:
    return packed_linear(x, _packed[number], number)


def _define(name: str, schema: str, function: Callable, shape: Callable) -> Callable:
    """Make `function` an operator whose output has the dtype of its first argument and the given shape.

    This file may be loaded in several copies at once, one for each folder of weights, so its operators carry
    the name of the copy.
    """
    namespace = f"chatglm_{zlib.crc32(__name__.encode()):08x}"
    operator = torch.library.custom_op(f"{namespace}::{name}", function, mutates_args=(), schema=schema)
    operator.register_fake(lambda x, *arguments: x.new_empty(shape(x, *arguments)))
    return getattr(getattr(torch.ops, namespace), name).default


quantized_linear_op = _define(
    "quantized_linear",
    "(Tensor x, Tensor weight, Tensor scale, int bits) -> Tensor",
    _quantized_linear,
    lambda x, weight, scale, bits: (*x.shape[:-1], weight.shape[0]),
)
packed_linear_op = _define(
    "packed_linear",
    "(Tensor x, int number, int out_features) -> Tensor",
    _packed_linear,
    lambda x, number, out_features: (*x.shape[:-1], out_features),
)
