"""Products with packed int8 and int4 weights: the definition, and faster paths that must equal it.

    y = x . dequantized(weight, scale)^T + bias        x [..., in], y [..., out]

The file reads from the plain to the special: the definition in plain PyTorch; the choice of a path;
torch's own operators on a CPU, for float weights too; kernels of our own. quantization.py says how weights
are stored and holds the layers.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import weakref
import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

logger = logging.getLogger(__name__)

# ---------------------------------------------------------------------------------------------------------------
# The definition
# ---------------------------------------------------------------------------------------------------------------

# Weights are dequantized in pieces of so many numbers: a piece stays in the caches of a CPU, and a small card can
# spare the memory.
CHUNK = {"cpu": 1 << 20, "cuda": 1 << 25}


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """int8 [out, in / 2] -> int8 [out, in]: the high nibble of every byte, then its low one."""
    high = packed >> 4  # arithmetic shift: the sign comes along
    low = (packed << 4) >> 4
    return torch.stack((high, low), dim=-1).flatten(-2)


def dequantize_weight(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the real weight [out, in] in the dtype of `scale`, which is [out] or [out, groups]."""
    integers = weight if bits == 8 else unpack_int4(weight)
    if scale.dim() == 1:
        return integers.to(scale.dtype) * scale[:, None]
    grouped = integers.to(scale.dtype).unflatten(-1, (scale.shape[1], -1))
    return (grouped * scale[..., None]).flatten(-2)


class PlainProduct(torch.autograd.Function):
    """The definition. It keeps the packed weight for the way back, not the dequantized one."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int
    ) -> torch.Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.bits = bits
        return F.linear(x, dequantize_weight(weight, scale, bits).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        weight, scale = ctx.saved_tensors
        return grad @ dequantize_weight(weight, scale, ctx.bits).to(grad.dtype), None, None, None


def plain_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """The definition without gradients, a few rows of the weight at a time: x [M, in] -> [M, out]."""
    return multiply_in_chunks(x, len(weight), lambda rows: dequantize_weight(weight[rows], scale[rows], bits))


def multiply_in_chunks(x: torch.Tensor, out: int, rows_of: Callable[[slice], torch.Tensor]) -> torch.Tensor:
    """x [M, in] times the matrix [out, in] whose rows `rows_of` makes, never all of them at once: [M, out]."""
    step = CHUNK.get(x.device.type, 1 << 23) // max(1, x.shape[1]) // 64 * 64 or 64
    if out <= step:
        return F.linear(x, rows_of(slice(None)).to(x.dtype))
    y = x.new_empty(x.shape[0], out)
    for start in range(0, out, step):
        rows = slice(start, min(start + step, out))
        y[:, rows] = F.linear(x, rows_of(rows).to(x.dtype))
    return y


# ---------------------------------------------------------------------------------------------------------------
# The choice of a path
# ---------------------------------------------------------------------------------------------------------------

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


@functools.cache
def _choose_path(device_type: str, forced: str) -> str:
    if forced not in ALL_PATHS:
        raise ValueError(f"CHATGLM_KERNELS is {forced!r}; set one of {', '.join(ALL_PATHS)}.")
    if forced == "plain":
        return "plain"
    candidates = PATHS.get(device_type, ()) if forced == "auto" else (forced,)
    if forced == "native" and device_type != "cpu":
        candidates = ()
    missing = []
    for path in candidates:
        reason = MISSING[path](device_type)
        if reason is None:
            logger.info("Packed weights on %s are multiplied by the %r path.", device_type, path)
            return path
        missing.append(reason)
    if missing:
        logger.warning(
            "Packed weights on %s are multiplied in plain PyTorch: %s", device_type, " ".join(missing)
        )
    return "plain"


def _torch_missing(device_type: str) -> str | None:
    return None if device_type == "cpu" else f"The 'torch' path is for the CPU, not for {device_type}."


# What a path lacks on a device type, in a sentence, or None if it can run there.
MISSING: dict[str, Callable[[str], str | None]] = {"torch": _torch_missing}


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
LINEARS: dict[str, Callable[..., torch.Tensor]] = {}


def plain_on_cpu(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """The definition, computed in the dtype that this CPU multiplies well."""
    return plain_linear(x.to(product_dtype(x.dtype)), weight, scale, bits).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------
# Torch's own operators on a CPU
# ---------------------------------------------------------------------------------------------------------------

FEW_ROWS = 16  # up to here a product is as good as free beside reading the weight


@functools.cache
def has_vnni() -> bool:
    """Without it oneDNN's int8 products saturate at 16 bits, silently."""
    return torch.cpu._is_vnni_supported()


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 on this CPU; elsewhere torch is six times slower than in float32."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """What matrix products of many rows in `dtype` are computed in on this CPU."""
    if dtype == torch.bfloat16 and multiplies_bfloat16():
        return dtype
    return torch.float32


class Packed:
    """A weight in a layout of the processor's own, which is never saved: `unpack` gives back the published one."""

    out_features: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, in] -> [M, out] in the dtype of x."""
        raise NotImplementedError

    def unpack(self) -> torch.Tensor:
        """The weight as it was, bit for bit."""
        raise NotImplementedError


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


class AtenInt8(Packed):
    """int8 rows for torch's bfloat16 product, which needs no special instructions; one scale a row."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        self.out_features = len(weight)
        self.weight, self.scale = weight.contiguous(), scale.float()
        self.ones = torch.ones(len(weight), dtype=torch.bfloat16)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) <= 4:
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
        for start in range(0, padded, 1024):  # the operator wants 32 bits for every number
            integers = unpack_int4(weight[start : start + 1024])
            missing = min(1024, padded - start) - len(integers)
            self.packed[start : start + 1024] = _int4_pack(F.pad(integers, (0, 0, 0, missing)))
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
        integers = self._integers(rows)
        if self.scale is not None:
            return integers
        return dequantize_weight(integers, self.inside[:, rows, 0].t()[: len(integers)], 8)

    def _integers(self, rows: slice) -> torch.Tensor:
        """int8 [rows, in]; `rows` begins with a block, and ends with one or with the last row."""
        start, stop, _ = rows.indices(self.out_features)
        blocks = self.packed[start : stop + -stop % self.block].view(
            -1, self.inside.shape[0] * self.group, self.block // 2
        )
        integers = torch.empty(len(blocks), self.block, blocks.shape[1], dtype=torch.int8)
        integers[:, : self.block // 2] = (blocks & 15).view(torch.int8).transpose(1, 2)
        integers[:, self.block // 2 :] = (blocks >> 4).view(torch.int8).transpose(1, 2)
        return integers.sub_(8).flatten(0, 1)[: stop - start]

    def unpack(self) -> torch.Tensor:
        weight = torch.empty(self.out_features, self.packed.shape[1], dtype=torch.int8)
        for start in range(0, self.out_features, 1024):
            integers = self._integers(slice(start, start + 1024))
            weight[start : start + 1024] = (integers[:, 0::2] << 4) | (integers[:, 1::2] & 15)
        return weight


def _int4_pack(integers: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers.int() + 8, 1)


@functools.cache
def int4_block() -> int:
    """Rows that torch's int4 layout keeps together on this CPU, found by looking; 0 if it is another layout."""
    integers = (torch.arange(128 * 32) * 7 % 16 - 8).to(torch.int8).view(128, 32)
    packed = _int4_pack(integers)
    for block in (64, 32, 16):
        low, high = (integers + 8).view(-1, 2, block // 2, 32).transpose(2, 3).unbind(1)
        if torch.equal((low | high << 4).flatten().view(torch.uint8), packed.flatten()):
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
    """float16 weights that FBGEMM multiplies in float32, on any x86 CPU; bfloat16 ones that float16 can hold."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.out_features, self.dtype = len(weight), weight.dtype
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x.float(), self.packed).to(x.dtype)

    def unpack(self) -> torch.Tensor:
        return torch.ops.quantized.linear_unpack_fp16(self.packed)[0].to(self.dtype)


def pack(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> Packed | None:
    """Bring a packed weight on a CPU into the layout of torch's fastest product, or None if the definition is it."""
    if weight.device.type != "cpu" or weight.numel() * 8 // bits < WORTH_IT or choose_path("cpu") != "torch":
        return None
    if bits == 4 and weight.shape[1] % 16 == 0 and int4_block():
        return AtenInt4(weight, scale)
    if bits == 8 and scale.dim() == 1:
        return OneDnnInt8(weight, scale) if has_vnni() else AtenInt8(weight, scale)
    return None


def pack_float(weight: torch.Tensor) -> Packed | None:
    """The same for a float weight."""
    if weight.device.type != "cpu" or weight.numel() < WORTH_IT or choose_path("cpu") == "plain":
        return None
    if weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and multiplies_bfloat16()):
        return OneDnnFloat(weight)
    if torch.backends.quantized.engine not in ("fbgemm", "x86"):
        return None
    if weight.dtype == torch.bfloat16 and not torch.equal(weight.half().bfloat16(), weight):
        return None
    return FbgemmHalf(weight)


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
    return _packed_linear(x, number, packed.out_features)


def _packed_linear(x: torch.Tensor, number: int, out_features: int) -> torch.Tensor:
    y = x.new_empty(*x.shape[:-1], out_features)
    return y if not x.numel() else _packed[number](x.reshape(-1, x.shape[-1])).view_as(y)


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
