"""Products with packed int8 and int4 weights: the definition, and faster paths that must equal it.

    y = x . dequantized(weight, scale)^T + bias        x [..., in], y [..., out]

The file reads from the plain to the special: the definition in plain PyTorch; the choice of a path;
torch's own operators on a CPU, for float weights too; kernels of our own. quantization.py says how weights
are stored and holds the layers.
"""

from __future__ import annotations

import ctypes
import functools
import glob
import hashlib
import importlib.util
import itertools
import logging
import os
import pkgutil
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
import weakref
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

logger = logging.getLogger(__name__)

# ---------------------------------------------------------------------------------------------------------------
# The definition
# ---------------------------------------------------------------------------------------------------------------

# Weights are dequantized in pieces of so many numbers: a piece stays in the caches of a CPU, and a small card can
# spare the memory.
CHUNK = {"cpu": 1 << 21, "cuda": 1 << 25}


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

ROWS_AT_ONCE = 1024  # whose order is changed at a time, so that little is held beside the weight


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


BASE, HALF = (
    127,
    64,
)  # a digit is at most HALF in size; rounding the lower ones may take the highest from 63 there
POWERS = torch.tensor([1, 1 / BASE, 1 / BASE**2], dtype=torch.float32, device="cpu")[:, None, None]


def small_digits(x: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [M, in] as `count` digits of base 127, the lowest first: whole numbers from -64 to 64 [count, M, in].

    The second result [M, 1] is what 1 in the lowest digit is worth. Two digits hold thirteen bits of the largest
    number of the row, three of them twenty: usually the error of a product is about 1e-4 or 1e-6.
    """
    x = x.float()
    peak = x.abs().amax(-1, keepdim=True).clamp_(min=1e-30)
    peak.add_(peak - peak)  # an infinite one becomes nan, as does its row
    scale = peak.mul_(1 / ((HALF - 1) * sum(BASE**i for i in range(count))))
    digits = (x * (POWERS[:count] / scale)).round_()  # below 2^24: all that follows is exact
    for lower, higher in itertools.pairwise(digits.unbind()):
        lower.sub_(higher, alpha=BASE)
    return digits, scale


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
    """Whether `pack` is asked at all: of large weights on a CPU whose path is torch's."""
    large = weight.device.type == "cpu" and weight.numel() * 8 // bits >= WORTH_IT
    return large and choose_path("cpu") == "torch"


def pack(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> Packed | None:
    """Bring a packed weight on a CPU into the layout of torch's fastest product, or None if the definition is it."""
    if not may_pack(weight, bits):
        return None
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
    if weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and multiplies_bfloat16()):
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
# Native C: a kernel that is compiled on the user's machine, only if CHATGLM_KERNELS asks for it
# ---------------------------------------------------------------------------------------------------------------

NATIVE_SOURCE = r"""
/* y = x . (integers * scale)^T for rows x, straight from the packed weight; GNU C for gcc and clang.

   Activations become 16-bit integers, block by block of columns, so that sums of products are exact.
   For nibbles they are split into two digits of base 256, because processors multiply bytes best: nibbles are
   made unsigned by adding 8, and -8 times the activations, added up beforehand, puts that right.
   256 bits are as wide as it gets: beyond, memory is the limit. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX2__)
enum { WIDTH = 32 }; /* bytes of a vector */
#else
enum { WIDTH = 16 };
#endif
enum { FLOAT32, BFLOAT16, FLOAT16 }; /* dtypes of x and scale */
enum { SLAB = 32 }; /* blocks whose factors are computed together */
enum { TILE = 64 }; /* vectors of a row of the weight that four rows of x are multiplied by at a time */
/* Measured: bytes to prefetch, and rows that a thread takes at a time; with 32 it was 15 % slower than with 256. */
enum { AHEAD = 4096, MOST_ROWS = 256, FEWEST_ROWS = 16 };
#define INLINE static inline __attribute__((always_inline))

typedef int8_t bytes __attribute__((vector_size(WIDTH)));
typedef uint8_t ubytes __attribute__((vector_size(WIDTH)));
typedef int16_t shorts __attribute__((vector_size(WIDTH)));
typedef int32_t ints __attribute__((vector_size(WIDTH)));
typedef float floats __attribute__((vector_size(WIDTH)));
#if (defined(__AVX512VNNI__) && defined(__AVX512VL__)) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD)
typedef ints partial;
#else
typedef shorts partial; /* four vectors of nibbles may be added: 4 * 2 * 2 * 15 * 128 < 32768 */
#endif

struct linear {
  const int8_t *weight; /* [rows][row_bytes] */
  const void *scale;    /* [rows], or [rows][groups] */
  const void *x;        /* [m][columns] */
  float *y;             /* [m][rows] */
  int64_t rows, columns, m, group; /* group: columns that share a scale, 0 if the whole row does */
  int32_t bits, scale_type, x_type, threads;
  /* from here on ours */
  int64_t row_bytes, groups, blocks;
  int64_t take, next;    /* rows to take at a time, and the first that no thread has taken (of the weight, or x) */
  int32_t block, split;  /* vectors of a block of columns, groups in it */
  int8_t *digits;        /* [m][blocks * block][8 * WIDTH / bits]: four vectors for nibbles, two for bytes */
  ints *bias;            /* [m][blocks]: what a block's sums begin with */
  float *step;           /* [m][blocks][split]: what one unit of the integers is worth */
  void (*multiply_rows)(const struct linear *, int64_t row, int64_t end);
};

/* sum[i] += a[j] * b[j] for the j of lane i: 2 of 16 bits, 4 of 32 */
INLINE partial multiply_add(partial sum, ubytes a, bytes b) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  return (partial)_mm256_dpbusd_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#elif defined(__AVXVNNI__)
  return (partial)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#elif defined(__AVX2__)
  return sum + (partial)_mm256_maddubs_epi16((__m256i)a, (__m256i)b);
#elif defined(__ARM_FEATURE_DOTPROD)
  return (partial)vdotq_s32((int32x4_t)sum, (int8x16_t)a, (int8x16_t)b);
#elif defined(__ARM_NEON)
  int16x8_t half = vmlal_s8((int16x8_t)sum, vget_low_s8((int8x16_t)a), vget_low_s8((int8x16_t)b));
  return (partial)vmlal_s8(half, vget_high_s8((int8x16_t)a), vget_high_s8((int8x16_t)b));
#else
  for (int i = 0; i < WIDTH / 2; i++) sum[i] += a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
  return sum;
#endif
}

/* sum[i] += a[j] * b[j] for the two j of lane i */
INLINE ints multiply_add_shorts(ints sum, shorts a, shorts b) {
#if defined(__AVX2__)
  return sum + (ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__ARM_NEON)
  int32x4_t half = vmlal_s16((int32x4_t)sum, vget_low_s16((int16x8_t)a), vget_low_s16((int16x8_t)b));
  return (ints)vmlal_s16(half, vget_high_s16((int16x8_t)a), vget_high_s16((int16x8_t)b));
#else
  for (int i = 0; i < WIDTH / 4; i++) sum[i] += a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
  return sum;
#endif
}

INLINE ints join(ints sum, partial high, partial low) {
  if (sizeof high[0] == 4) return sum + ((ints)high << 8) + (ints)low;
  const shorts one = (shorts){0} + 1;
  return multiply_add_shorts(multiply_add_shorts(sum, (shorts)high, one << 8), (shorts)low, one);
}

INLINE shorts widen(const int8_t *p) {
#if defined(__AVX2__) /* gcc 12 makes four instructions of the general form */
  return (shorts)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p));
#else
  int8_t narrow __attribute__((vector_size(WIDTH / 2)));
  memcpy(&narrow, p, WIDTH / 2);
  return __builtin_convertvector(narrow, shorts);
#endif
}

INLINE bytes vector(const int8_t *p) {
  bytes v;
  memcpy(&v, p, WIDTH);
  return v;
}

INLINE float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

/* n numbers of p from `start` on */
static void load(float *out, const void *p, int64_t start, int64_t n, int type) {
  const uint16_t *halves = (const uint16_t *)p + start;
  if (type == FLOAT32) memcpy(out, (const float *)p + start, n * sizeof *out);
  if (type == BFLOAT16)
    for (int64_t i = 0; i < n; i++) out[i] = from_bits((uint32_t)halves[i] << 16);
  int64_t i = 0;
#if defined(__F16C__)
  for (; type == FLOAT16 && i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(halves + i))));
#endif
  if (type == FLOAT16)
    for (; i < n; i++) {
      uint32_t rest = (uint32_t)(halves[i] & 0x7fff) << 13, sign = (uint32_t)(halves[i] & 0x8000) << 16;
      float finite = from_bits(sign | rest) * 0x1p112f; /* the biases of the exponents differ by 112 */
      out[i] = rest < 0x0f800000 ? finite : from_bits(sign | 0x7f800000 | rest); /* inf, nan */
    }
}

/* Block b of row m of x to integers of at most 32639, which have two signed digits; zeros beyond the last column.
   A block with inf or nan gives nan. */
static void quantize(const struct linear *t, int64_t m, int64_t b) {
  const int64_t width = t->block * WIDTH * 8 / t->bits, at = m * t->blocks + b;
  const int64_t count = t->columns - b * width < width ? t->columns - b * width : width;
  float values[WIDTH * 8] = {0};
  uint32_t bits, largest = 0; /* absolute floats order like their bits, and nan comes last */
  load(values, t->x, m * t->columns + b * width, count, t->x_type);
  for (int64_t i = 0; i < width; i++) {
    memcpy(&bits, values + i, 4);
    largest = (bits & 0x7fffffff) > largest ? bits & 0x7fffffff : largest;
  }
  float peak = from_bits(largest), inverse = peak > 1e-30f ? 32639 / peak : 0;
  for (int i = 0; i < t->split; i++) t->step[at * t->split + i] = largest < 0x7f800000 ? peak / 32639 : NAN;
  if (largest >= 0x7f800000) memset(values, 0, sizeof values);
  int16_t integers[WIDTH * 8];
  for (int64_t i = 0; i < width; i++) integers[i] = (int16_t)rintf(values[i] * inverse);
  int8_t *restrict out = t->digits + at * width * 2;
  if (t->bits == 8) {
    memcpy(out, integers, width * 2);
    return;
  }
  ints bias = {0};
  for (int64_t v = 0; v < t->block; v++, out += 4 * WIDTH) {
    int8_t digits[4][WIDTH];
    for (int i = 0; i < WIDTH; i++) {
      int16_t even = integers[2 * (v * WIDTH + i)], odd = integers[2 * (v * WIDTH + i) + 1];
      digits[0][i] = (int8_t)((even + 128) >> 8), digits[1][i] = (int8_t)((odd + 128) >> 8);
      digits[2][i] = (int8_t)even, digits[3][i] = (int8_t)odd; /* the low byte, signed */
    }
    memcpy(out, digits, sizeof digits);
    const int16_t *x = integers + 2 * WIDTH * v;
    for (int i = 0; i < WIDTH / 4; i++)
      for (int j = 0; j < 8; j++) bias[i] -= 8 * x[8 * i + j];
  }
  t->bias[at] = bias;
}

/* A block of a row of the weight times that of M rows of x, added to sum. */
INLINE void multiply(ints *sum, const int8_t *w, const int8_t *x, int64_t span, int M, int bits, int block) {
  partial high[4], low[4];
  for (int m = 0; m < M; m++) high[m] = low[m] = (partial){0};
  for (int v = 0; v < block; v++, w += WIDTH, x += 16 * WIDTH / bits) {
    const ubytes nibbles = (ubytes)vector(w) ^ 0x88, even = nibbles >> 4, odd = nibbles & 15;
    for (int m = 0; m < M; m++) {
      const int8_t *d = x + m * span;
      if (bits == 4) {
        high[m] = multiply_add(multiply_add(high[m], even, vector(d)), odd, vector(d + WIDTH));
        low[m] = multiply_add(multiply_add(low[m], even, vector(d + 2 * WIDTH)), odd, vector(d + 3 * WIDTH));
      } else {
        sum[m] = multiply_add_shorts(sum[m], widen(w), (shorts)vector(d));
        sum[m] = multiply_add_shorts(sum[m], widen(w + WIDTH / 2), (shorts)vector(d + WIDTH));
      }
    }
  }
  for (int m = 0; m < M && bits == 4; m++) sum[m] = join(sum[m], high[m], low[m]);
}

/* The factor of a block, or two of them for a half each. */
INLINE floats spread(const float *factor, int split) {
#if defined(__AVX2__)
  if (split == 2) return (floats)_mm256_set_m128(_mm_set1_ps(factor[1]), _mm_set1_ps(factor[0]));
#endif
  (void)split;
  return (floats){0} + factor[0];
}

/* Blocks `from` to `to` of a row of the weight times those of M rows of x from `first` on; all but the first ones are
   added to what is in y. `ahead` is how far to prefetch, 0 for not. The compiler knows M, bits, block and split. */
INLINE void multiply_part(const struct linear *t, int64_t row, int64_t first, int64_t from, int64_t to, int64_t ahead,
                          int M, int bits, int block, int split) {
  const int64_t size = block * WIDTH, whole = t->row_bytes / size, rest = t->row_bytes % size;
  const int64_t unit = size * 16 / bits, span = t->blocks * unit;
  const int8_t *w = t->weight + row * t->row_bytes, *x = t->digits + first * span;
  int8_t last[8 * WIDTH]; /* the last columns, filled up with zeros */
  if (rest && to == t->blocks) memcpy(memset(last, 0, size), w + whole * size, rest);
  floats total[4];
  for (int m = 0; m < M; m++) total[m] = (floats){0};
  for (int64_t slab = from; slab < to; slab += SLAB) {
    const int64_t n = to - slab < SLAB ? to - slab : SLAB, groups = t->groups - slab * split;
    const float *factor = t->step + (first * t->blocks + slab) * split;
    int64_t next = t->blocks * split; /* from the factors of one row of x to those of the next */
    float scale[2 * SLAB], product[4][2 * SLAB];
    if (t->group) {
      scale[n * split - 1] = 0; /* the last vector may be half a group too long */
      load(scale, t->scale, row * t->groups + slab * split, groups < n * split ? groups : n * split,
           t->scale_type);
      for (int m = 0; m < M; m++)
        for (int64_t i = 0; i < n * split; i++) product[m][i] = scale[i] * factor[m * next + i];
      factor = product[0], next = 2 * SLAB;
    }
    for (int64_t b = slab; b < slab + n; b++) {
      ints sum[4];
      for (int m = 0; m < M; m++) sum[m] = bits == 4 ? t->bias[(first + m) * t->blocks + b] : (ints){0};
      for (int p = 0; p < size && ahead; p += 64) __builtin_prefetch(w + b * size + p + ahead);
      multiply(sum, b < whole ? w + b * size : last, x + b * unit, span, M, bits, block);
      for (int m = 0; m < M; m++)
        total[m] += __builtin_convertvector(sum[m], floats) * spread(factor + m * next + (b - slab) * split, split);
    }
  }
  for (int m = 0; m < M; m++) {
    float sum = 0, scale = 1, *y = t->y + (first + m) * t->rows + row;
    for (int i = 0; i < WIDTH / 4; i++) sum += total[m][i];
    if (!t->group) load(&scale, t->scale, row, 1, t->scale_type);
    *y = (from ? *y : 0) + sum * scale;
  }
}

/* A function for each shape of a block, so that the compiler can unroll it. One row of x goes along the weight as it
   lies in memory; four rows take tiles of it, so that their own part stays in the nearest cache. */
#define MULTIPLY_ROWS(name, bits, block, split)                                                              \
  static void name(const struct linear *t, int64_t row, int64_t end) {                                       \
    const int64_t tile = TILE / block;                                                                       \
    int64_t m = 0;                                                                                           \
    for (; m + 4 <= t->m; m += 4)                                                                            \
      for (int64_t from = 0; from < t->blocks; from += tile)                                                 \
        for (int64_t r = row, to = from + tile < t->blocks ? from + tile : t->blocks; r < end; r++)          \
          multiply_part(t, r, m, from, to, m ? 0 : t->row_bytes, 4, bits, block, split);                     \
    for (int64_t r = row; r < end; r++)                                                                      \
      for (int64_t rest = m; rest < t->m; rest++)                                                            \
        multiply_part(t, r, rest, 0, t->blocks, rest ? 0 : AHEAD, 1, bits, block, split);                    \
  }
MULTIPLY_ROWS(nibbles_half, 4, 1, 2)
MULTIPLY_ROWS(nibbles_1, 4, 1, 1)
MULTIPLY_ROWS(nibbles_2, 4, 2, 1)
MULTIPLY_ROWS(nibbles_4, 4, 4, 1)
MULTIPLY_ROWS(bytes_1, 8, 1, 1)
MULTIPLY_ROWS(bytes_2, 8, 2, 1)
MULTIPLY_ROWS(bytes_4, 8, 4, 1)
MULTIPLY_ROWS(bytes_8, 8, 8, 1)

/* Every thread takes the next rows that nobody has taken. */
static void quantize_rows(void *data) {
  struct linear *t = data;
  for (int64_t m; (m = __atomic_fetch_add(&t->next, 1, __ATOMIC_RELAXED)) < t->m;)
    for (int64_t b = 0; b < t->blocks; b++) quantize(t, m, b);
}

static void multiply_all(void *data) {
  struct linear *t = data;
  for (int64_t row; (row = __atomic_fetch_add(&t->next, t->take, __ATOMIC_RELAXED)) < t->rows;)
    t->multiply_rows(t, row, row + t->take < t->rows ? row + t->take : t->rows);
}

typedef void run_parallel(void (*)(void *), void *, unsigned threads, unsigned flags); /* as GOMP_parallel */

static void run(void work(void *), struct linear *t, run_parallel *parallel) {
  t->next = 0;
  if (parallel && t->threads > 1) parallel(work, t, t->threads, 0);
  else work(t);
}

/* Returns 0, or 1 if there is no memory. */
int chatglm_linear(struct linear *t, run_parallel *parallel) {
  const int64_t columns = WIDTH * 8 / t->bits; /* of a vector */
  t->row_bytes = t->columns * t->bits / 8;
  t->groups = t->group ? t->columns / t->group : 0;
  t->split = t->group && t->group < columns ? columns / t->group : 1;
  t->block = t->group ? (t->group + columns - 1) / columns : 4;
  t->blocks = (t->columns + t->block * columns - 1) / (t->block * columns);
  t->take = t->rows / (8 * t->threads); /* several times for each thread, since one may be held up */
  t->take = t->take > MOST_ROWS ? MOST_ROWS : t->take < FEWEST_ROWS ? FEWEST_ROWS : t->take;
  if (t->split == 2) t->multiply_rows = nibbles_half;
  else if (t->bits == 4) t->multiply_rows = t->block == 1 ? nibbles_1 : t->block == 2 ? nibbles_2 : nibbles_4;
  else t->multiply_rows = t->block == 1 ? bytes_1 : t->block == 2 ? bytes_2 : t->block == 4 ? bytes_4 : bytes_8;
  const int64_t n = t->m * t->blocks, size = t->block * columns * 2;
  const int64_t needed = n * (size + sizeof(ints) + t->split * sizeof(float));
  char *memory = aligned_alloc(WIDTH, (needed + WIDTH - 1) / WIDTH * WIDTH);
  if (!memory) return 1;
  t->digits = (int8_t *)memory;
  t->bias = (ints *)(memory + n * size);
  t->step = (float *)(t->bias + n);
  run(quantize_rows, t, t->m > 1 ? parallel : NULL);
  run(multiply_all, t, parallel);
  free(memory);
  return 0;
}
"""

# Without -fno-tree-ter gcc computes all products of a block before it adds them, which takes more registers than there
# are: 1.3 to 1.5 times as slow with 4 rows and more. clang ignores it.
NATIVE_FLAGS = ("-O3", "-fno-tree-ter", "-fno-math-errno", "-std=gnu11", "-shared", "-fPIC")
# For the processor at hand: the first that the compiler knows.
NATIVE_TARGETS = (("-march=native",), ("-mcpu=native",), ())
NATIVE_ROWS = 128  # multiplied at a time, so that their integers stay in the caches
_NATIVE_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _NativeLinear(ctypes.Structure):
    """`struct linear` of the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "weight scale x y".split()),
        *((name, ctypes.c_int64) for name in "rows columns m group".split()),
        *((name, ctypes.c_int32) for name in "bits scale_type x_type threads".split()),
        *((name, ctypes.c_int64) for name in "row_bytes groups blocks take next".split()),
        *((name, ctypes.c_int32) for name in "block split".split()),
        *((name, ctypes.c_void_p) for name in "digits bias step multiply_rows".split()),
    ]


def native_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """x [M, in] times the packed weight by the kernel in C: [M, out]. Many rows may go by way of the definition.
    Activations are rounded to 16 bits of the largest of 256 (or of their group): the error is about 3e-5.
    """
    group = weight.shape[1] * 8 // bits // scale.shape[1] if scale.dim() == 2 else 0
    if (
        not 0 < len(x) <= (NATIVE_ROWS if many_are_faster_as_floats(group) else len(x))
        or not {x.dtype, scale.dtype} <= _NATIVE_DTYPES.keys()
        or not (weight.is_contiguous() and scale.is_contiguous())
        or group not in (0, 32, 64, 128)
    ):
        return plain_on_cpu(x, weight, scale, bits)
    return _run_native(native_kernel(), x.contiguous(), weight, scale, bits, group)


def many_are_faster_as_floats(group: int) -> bool:
    """Whether more than NATIVE_ROWS are multiplied faster in floating point than by their integers.

    Measured with AVX2 and 512 rows: integers 1.1 to 1.3 times as fast, with groups of 32 and 64 0.75 to 0.87 times.
    Elsewhere floating point is assumed to be faster.
    """
    return group in (32, 64) or torch.backends.cpu.get_cpu_capability() != "AVX2"


def native_missing(device_type: str = "cpu") -> str | None:
    """What the native kernel lacks here, in a sentence, or None. Builds it where that was not done yet."""
    if device_type != "cpu":
        return f"The 'native' path is for the CPU, not for {device_type}."
    try:
        native_kernel()
    except RuntimeError as error:
        return str(error)
    return None


@functools.cache
def native_kernel() -> Callable[[_NativeLinear], int]:
    """The kernel, compiled if the user's cache does not hold it, after its check against the definition.

    Raises RuntimeError, in a sentence, where there is none.
    """
    if os.name != "posix":
        raise RuntimeError("The 'native' path is for Linux and macOS; leave CHATGLM_KERNELS unset.")
    try:
        library = _build_native(_native_folder())
        _check_private(library)
        function = ctypes.CDLL(str(library)).chatglm_linear
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        raise RuntimeError(f"The 'native' kernel could not be built or loaded: {error}.") from error
    # The thread pool is torch's own; with a second OpenMP runtime both would want all cores.
    parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if parallel is None:
        logger.info("This build of torch does not lend its threads; the native kernel runs on one.")
    pool = ctypes.cast(parallel, ctypes.c_void_p)

    def kernel(job: _NativeLinear) -> int:
        return function(ctypes.byref(job), pool)

    _check_native(kernel, library)
    return kernel


def _run_native(
    kernel: Callable[[_NativeLinear], int],
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bits: int,
    group: int,
) -> torch.Tensor:
    out, columns = len(weight), weight.shape[1] * 8 // bits
    if x.shape[1] != columns or len(scale) != out:
        raise ValueError(
            f"A weight [{out}, {columns}] cannot be multiplied with {x.shape[1]} columns and {len(scale)} scales."
        )
    y = torch.empty(len(x), out, dtype=torch.float32)
    for rows, result in zip(x.split(NATIVE_ROWS), y.split(NATIVE_ROWS), strict=True):
        job = _NativeLinear(
            weight.data_ptr(), scale.data_ptr(), rows.data_ptr(), result.data_ptr(), out, columns, len(rows), group,
            bits, _NATIVE_DTYPES[scale.dtype], _NATIVE_DTYPES[x.dtype], torch.get_num_threads(),
        )  # fmt: skip
        if kernel(job):
            raise MemoryError(f"No memory for {len(rows)} rows of {columns} activations.")
    return y.to(x.dtype)


def _native_folder() -> Path:
    """A folder in the user's cache that nobody else can write to."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = cache / "chatglm" / "kernels"
    for part in (cache, folder.parent, folder):
        part.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_private(folder.parent)
    _check_private(folder)
    return folder


def _check_private(path: Path) -> None:
    """Code that another user may have put there is not loaded."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise RuntimeError(
            f"The 'native' path does not load code from {path}, which others can write to or own; remove it, "
            "or set XDG_CACHE_HOME to a folder of your own."
        )


def _build_native(folder: Path) -> Path:
    """The library for this source, compiler and processor in `folder`."""
    compiler = _find_compiler()
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=60).stdout
    identity = (NATIVE_SOURCE, *NATIVE_FLAGS, *compiler, version, platform.machine(), _processor())
    library = folder / f"linear-{hashlib.sha256(chr(0).join(identity).encode()).hexdigest()[:24]}.so"
    if library.exists():
        return library
    descriptor, name = tempfile.mkstemp(dir=folder, suffix=".part")
    os.close(descriptor)
    start = time.perf_counter()
    try:
        for target in NATIVE_TARGETS:
            command = [*compiler, *NATIVE_FLAGS, *target, "-x", "c", "-", "-o", name, "-lm"]
            done = subprocess.run(command, input=NATIVE_SOURCE, capture_output=True, text=True, timeout=300)
            if done.returncode == 0:
                os.chmod(name, 0o700)
                os.replace(name, library)  # another process sees the whole file or none
                logger.info("Compiled %s in %.1f s.", library, time.perf_counter() - start)
                return library
    finally:
        Path(name).unlink(missing_ok=True)
    said = next((line for line in done.stderr.splitlines() if "error" in line), "no reason given")
    raise RuntimeError(f"The 'native' kernel could not be compiled by {shlex.join(compiler)}: {said}.")


def _find_compiler() -> list[str]:
    for command in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    raise RuntimeError("The 'native' path needs a C compiler: install gcc or clang, or name one in CC.")


def _processor() -> str:
    """What -march=native depends on, so that a home directory may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(names)}))


def _check_native(kernel: Callable[[_NativeLinear], int], library: Path) -> None:
    """Compare with the definition, every path through the source once; a compiler may be wrong, or a file."""
    generator = torch.Generator().manual_seed(0)
    for bits, m, out, columns, group in (
        (4, 1, 71, 768, 0), (4, 5, 3, 4354, 0), (4, 1, 5, 34, 0), (4, 16, 35, 550, 0), (4, 1, 69, 1088, 32),
        (4, 7, 3, 96, 32), (4, 3, 37, 192, 64), (4, 1, 6, 384, 128), (8, 1, 71, 768, 0), (8, 6, 5, 301, 0),
        (8, 2, 34, 96, 32), (8, 1, 3, 192, 64), (8, 4, 5, 384, 128),
    ):  # fmt: skip
        weight = torch.randint(
            -128, 128, (out, columns * bits // 8), dtype=torch.int8, generator=generator
        )  # every byte, thus every pair of nibbles
        scale = torch.rand((out, columns // group) if group else (out,), generator=generator)
        x = torch.randn(m, columns, generator=generator)
        y = _run_native(kernel, x, weight, scale, bits, group)
        expected = x.double() @ dequantize_weight(weight, scale.double(), bits).T
        if not (y - expected).abs().max() < 1e-3 * expected.abs().max():  # nan is not less
            raise RuntimeError(
                f"The 'native' kernel is not used, because {library} fails its check against the definition "
                f"({bits} bits, {m} rows, {out} x {columns}, groups of {group}); try another compiler in CC."
            )


LINEARS["native"] = native_linear
MISSING["native"] = native_missing


# ---------------------------------------------------------------------------------------------------------------
# CUDA C through cpm_kernels
# ---------------------------------------------------------------------------------------------------------------

FEW_ROWS = 16  # on a GPU: up to here a product is as good as free beside reading the weight

# What needs the instructions of the card. The source includes no header, so NVRTC compiles it wherever it is found.
# A pair is two numbers of TYPE in 32 bits, the first in the lower half.
CUDA_INSTRUCTIONS = r"""
#define KERNEL extern "C" __global__ void __launch_bounds__(256)
typedef unsigned short u16;
typedef unsigned int u32;

float half_to_float(u16 bits) { float x; asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits)); return x; }
u16 float_to_half(float x) { u16 bits; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x)); return bits; }

#if TYPE == 0
#define NUMBERS "f16"
#else
#define NUMBERS "bf16"
#endif
#if TYPE != 2 && (__CUDA_ARCH__ >= 800 || (__CUDA_ARCH__ >= 750 && TYPE == 0))
#define TENSOR_CORES

u32 multiply_add(u32 a, u32 b, u32 c) {  // a * b + c of pairs
    u32 d;
    asm("fma.rn." NUMBERS "x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// sums [16, 8] += a [16, 16] . b [16, 8], spread over a warp as the PTX manual draws it under mma.m16n8k16.
void matrix_multiply_add(float *sums, const u32 *a, const u32 *b) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32." NUMBERS "." NUMBERS ".f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    for (int half = 0; half < 2; half++)
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
#endif
}
#endif
"""

# Compiled once for each TYPE of activations (0 float16, 1 bfloat16, 2 float32), BITS (8, 4) and GROUP (columns that
# share a scale, 0 for one scale a row). `rows` and `columns` are those of the weight, `tokens` are the rows of x.
CUDA_KERNELS = r"""
typedef long long i64;
typedef unsigned char u8;

float bfloat16_to_float(u16 bits) { return __int_as_float((int)((u32)bits << 16)); }

u16 float_to_bfloat16(float x) {  // to the nearest, ties to even
    u32 bits = __float_as_int(x);
    return x != x ? 0x7FC0 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

#if TYPE == 2
typedef float number;
float to_float(number x) { return x; }
number from_float(float x) { return x; }
#else
typedef u16 number;
float to_float(number x) { return TYPE == 0 ? half_to_float(x) : bfloat16_to_float(x); }
number from_float(float x) { return TYPE == 0 ? float_to_half(x) : float_to_bfloat16(x); }
#endif

// The scale of a row and column; its type has the numbers of TYPE.
float scale_of(const void *scale, int type, i64 row, int column, int columns) {
    i64 index = GROUP ? row * (columns / (GROUP + !GROUP)) + column / (GROUP + !GROUP) : row;
    if (type == 2) return ((const float *)scale)[index];
    u16 bits = ((const u16 *)scale)[index];
    return type == 0 ? half_to_float(bits) : bfloat16_to_float(bits);
}

// The integer of column i among those in `word`. It goes into the lowest bits of 2^23, without its sign.
float integer(u32 word, int i) {
    const u32 sign = 1 << (BITS - 1), mask = 2 * sign - 1;
    const int shift = BITS == 8 ? 8 * i : 4 * (i ^ 1);  // high nibbles come first
    return __int_as_float(0x4B000000 | ((word >> shift & mask) ^ sign)) - (8388608.0f + sign);
}

const int IN_WORD = 32 / BITS;  // columns in four bytes
struct __align__(IN_WORD * sizeof(number) < 16 ? IN_WORD * sizeof(number) : 16) Numbers { number at[IN_WORD]; };

// One row of the weight a block.
KERNEL dequantize(const u8 *weight, const void *scale, number *y, int columns, int scale_type) {
    const i64 row = blockIdx.x;
    for (int column = threadIdx.x * IN_WORD; column < columns; column += 256 * IN_WORD) {
        const u32 word = *(const u32 *)(weight + (row * columns + column) * BITS / 8);
        const float factor = scale_of(scale, scale_type, row, column, columns);
        Numbers numbers;
        for (int i = 0; i < IN_WORD; i++) numbers.at[i] = from_float(integer(word, i) * factor);
        *(Numbers *)(y + row * columns + column) = numbers;
    }
}

// A warp for each row of the weight, on any card; grid (rows / 8, tokens / TOKENS).
template <int TOKENS>
void multiply(const number *x, const u8 *weight, const void *scale, number *y,
              int tokens, int rows, int columns, int scale_type) {
    const i64 row = (i64)blockIdx.x * 8 + threadIdx.x / 32;
    const int lane = threadIdx.x % 32, first = blockIdx.y * TOKENS;
    if (row >= rows) return;
    float sums[TOKENS] = {};
#pragma unroll(TOKENS == 1 ? 4 : 1)
    for (int column = lane * IN_WORD; column < columns; column += 32 * IN_WORD) {
        const u32 word = *(const u32 *)(weight + (row * columns + column) * BITS / 8);
        const float factor = GROUP ? scale_of(scale, scale_type, row, column, columns) : 1;
        for (int token = 0; token < TOKENS && first + token < tokens; token++) {
            const Numbers numbers = *(const Numbers *)(x + (i64)(first + token) * columns + column);
            float sum = 0;
            for (int i = 0; i < IN_WORD; i++) sum += integer(word, i) * to_float(numbers.at[i]);
            sums[token] += sum * factor;
        }
    }
    for (int token = 0; token < TOKENS && first + token < tokens; token++) {
        for (int other = 16; other; other /= 2) sums[token] += __shfl_xor_sync(~0u, sums[token], other);
        const float factor = GROUP ? 1 : scale_of(scale, scale_type, row, 0, columns);
        if (lane == 0) y[(i64)(first + token) * rows + row] = from_float(sums[token] * factor);
    }
}

#define MULTIPLY(name, function) \
KERNEL name(const number *x, const u8 *weight, const void *scale, number *y, \
            int tokens, int rows, int columns, int scale_type) { \
    function(x, weight, scale, y, tokens, rows, columns, scale_type); \
}
MULTIPLY(multiply_1, multiply<1>)
MULTIPLY(multiply_4, multiply<4>)

#ifdef TENSOR_CORES
const u32 ONE = TYPE == 0 ? 0x3C003C00 : 0x3F803F80, MINUS_ZERO = 0x80008000;
// A pair whose lowest bits count ones: 1024 in float16, 128 in bfloat16.
const u32 BASE = TYPE == 0 ? 0x64006400 : 0x43004300;
const int IN_PIECE = 128 / BITS;  // columns in sixteen bytes

// Four columns of two rows of the weight, in the order of the first operand of matrix_multiply_add; `which` counts
// the fours in a word. With 4 bits they are columns 0, 4, 1, 5 or 2, 6, 3, 7 of the word: pairs lie 16 bits apart.
void four_columns(u32 *a, const u32 *words, int which, const u32 *factors) {
    for (int i = 0; i < 4; i++) {
        const u32 word = words[i % 2];
        u32 base, minus;
        if (BITS == 8) {  // the seven low bits, and the sign bit, which counts -128
            const u32 bytes = __byte_perm(word, 0, i < 2 ? 0x4140 : 0x4342);
            base = BASE | (bytes & 0x007F007F);
            minus = MINUS_ZERO | BASE | (bytes & 0x00800080);
        } else {
            base = (word >> (8 * which + (i < 2 ? 4 : 0)) & 0x000F000F) ^ (BASE | 0x00080008);
            minus = MINUS_ZERO | BASE | 0x00080008;
        }
        a[i] = multiply_add(base, ONE, minus);
        if (GROUP) a[i] = multiply_add(a[i], factors[i % 2], MINUS_ZERO);
    }
}

// The same columns of x, which lie in order in two (8 bits) or four (4 bits) pairs.
void four_columns_of_x(u32 *b, const u32 *pairs, int which) {
    if (BITS == 8) {
        b[0] = pairs[0], b[1] = pairs[1];
    } else {
        b[0] = __byte_perm(pairs[which], pairs[which + 2], 0x5410);
        b[1] = __byte_perm(pairs[which], pairs[which + 2], 0x7632);
    }
}

struct Words { u32 at[4]; };

Words load(const void *pointer, bool inside) {
    const uint4 v = inside ? __ldcs((const uint4 *)pointer) : uint4{0, 0, 0, 0};
    return {{v.x, v.y, v.z, v.w}};
}

// A block multiplies 16 rows of the weight by up to 8 * TILES tokens; grid (rows / 16). Its eight warps take turns
// along the columns. In a warp, lane 4 q + m reads pieces of sixteen bytes: of rows q and q + 8 of the weight and of
// tokens q and q + 8 of x, four neighbouring pieces for m = 0 ... 3. Which column goes under which number of the
// matrix product does not matter, as long as both sides agree.
template <int TILES>
void multiply_tensor(const number *x, const u8 *weight, const void *scale, number *y,
                     int tokens, int rows, int columns, int scale_type) {
    const int AHEAD = 4;  // pieces of a row on their way at a time
    const int warp = threadIdx.x / 32, q = threadIdx.x % 32 / 4, m = threadIdx.x % 4, pieces = columns / IN_PIECE;
    const i64 top = (i64)blockIdx.x * 16;
    i64 row[2];
    for (int i = 0; i < 2; i++) row[i] = top + q + 8 * i < rows ? top + q + 8 * i : rows - 1;
    float sums[TILES][4] = {};
    for (int start = warp * 4; start < pieces; start += 32 * AHEAD) {
        Words read[AHEAD][2];
#pragma unroll
        for (int ahead = 0; ahead < AHEAD; ahead++)
            for (int i = 0; i < 2; i++) {
                const int piece = start + 32 * ahead + m;
                read[ahead][i] = load(weight + (row[i] * pieces + piece) * 16, piece < pieces);
            }
#pragma unroll
        for (int ahead = 0; ahead < AHEAD; ahead++) {
            const int piece = start + 32 * ahead + m;
            if (piece - m >= pieces) break;
            u32 factors[2] = {};
            for (int i = 0; GROUP && piece < pieces && i < 2; i++)
                factors[i] = 0x10001 * (u32)from_float(scale_of(scale, scale_type, row[i], piece * IN_PIECE, columns));
            Words here[TILES][IN_PIECE / 8];
            for (int tile = 0; tile < TILES; tile++)
                for (int i = 0; i < IN_PIECE / 8; i++) {
                    const int token = tile * 8 + q;
                    here[tile][i] = load(x + (i64)token * columns + piece * IN_PIECE + 8 * i,
                                         token < tokens && piece < pieces);
                }
            for (int word = 0; word < 4; word++)
                for (int which = 0; which < 8 / BITS; which++) {
                    const u32 both[2] = {read[ahead][0].at[word], read[ahead][1].at[word]};
                    u32 a[4], b[2];
                    four_columns(a, both, which, factors);
                    for (int tile = 0; tile < TILES; tile++) {
                        four_columns_of_x(b, &here[tile][0].at[0] + word * IN_WORD / 2, which);
                        matrix_multiply_add(sums[tile], a, b);
                    }
                }
        }
    }
    __shared__ float partial[8][8 * TILES][16];  // [warp, token, row]
    for (int tile = 0; tile < TILES; tile++)
        for (int i = 0; i < 4; i++) partial[warp][tile * 8 + 2 * m + i % 2][q + i / 2 * 8] = sums[tile][i];
    __syncthreads();
    const int token = threadIdx.x / 16, r = threadIdx.x % 16;
    if (token >= 8 * TILES || token >= tokens || top + r >= rows) return;
    float sum = 0;
    for (int other = 0; other < 8; other++) sum += partial[other][token][r];
    const float factor = GROUP ? 1 : scale_of(scale, scale_type, top + r, 0, columns);
    y[(i64)token * rows + top + r] = from_float(sum * factor);
}

MULTIPLY(multiply_tensor_8, multiply_tensor<1>)
MULTIPLY(multiply_tensor_16, multiply_tensor<2>)
#endif
"""

NUMBER_TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
TENSOR_CORES_FROM = {torch.float16: (7, 5), torch.bfloat16: (8, 0)}  # compute capability
GROUPS = (32, 64, 128)


def cuda_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """x [M, in] times a packed weight on an NVIDIA card: [M, out] in the dtype of x, summed in float32.

    Up to 16 rows are multiplied by the packed weight, more by pieces of it dequantized to the dtype of x.
    The first call compiles the kernels; later ones launch on torch's current stream and do nothing else, so a
    CUDA graph can hold them. Raises ValueError for operands that do not fit together.
    """
    group = check_operands(x, weight, scale, bits)
    tokens, rows, columns = len(x), len(weight), x.shape[1]
    if columns * bits % 32 or weight.data_ptr() % 16:  # rows that cannot be read a word at a time
        return plain_linear(x, weight, scale, bits)
    if tokens > FEW_ROWS:
        return multiply_in_chunks(
            x, rows, lambda part: cuda_dequantize(weight[part], scale[part], bits, x.dtype)
        )
    y = x.new_empty(tokens, rows)
    if not y.numel():
        return y
    x = x.contiguous() if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)
    kernels = cuda_kernels(x.device.index, x.dtype, bits, group)
    if "multiply_tensor_8" in kernels and columns * bits % 128 == 0:
        name, grid = f"multiply_tensor_{8 if tokens <= 8 else 16}", (-(-rows // 16), 1, 1)
    else:
        at_once = 1 if tokens == 1 else 4
        name, grid = f"multiply_{at_once}", (-(-rows // 8), -(-tokens // at_once), 1)
    _launch(kernels[name], grid, (x, weight, scale, y), (tokens, rows, columns, NUMBER_TYPES[scale.dtype]))
    return y


def cuda_dequantize(weight: torch.Tensor, scale: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """The real weight [out, in] in `dtype`, on an NVIDIA card; in * bits is a multiple of 32."""
    y = torch.empty(len(weight), weight.shape[1] * 8 // bits, dtype=dtype, device=weight.device)
    group = check_operands(y, weight, scale, bits)
    if y.numel():
        kernel = cuda_kernels(weight.device.index, dtype, bits, group)["dequantize"]
        _launch(kernel, (len(y), 1, 1), (weight, scale, y), (y.shape[1], NUMBER_TYPES[scale.dtype]))
    return y


def check_operands(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int) -> int:
    """Raise ValueError unless x [M, in] can be multiplied; return the columns of a group, 0 for a scale a row."""
    sizes = f"activations {list(x.shape)}, a weight {list(weight.shape)} of {bits} bits, scales {list(scale.shape)}"
    if x.dim() != 2 or bits not in (8, 4) or tuple(weight.shape[1:]) != (x.shape[1] * bits / 8,):
        raise ValueError(
            f"These do not fit together: {sizes}; a weight is [out, in] or, in 4 bits, [out, in / 2]."
        )
    group = x.shape[1] / scale.shape[1] if scale.dim() == 2 and scale.shape[1] else 0
    if scale.shape[:1] != weight.shape[:1] or (scale.dim() != 1 and group not in GROUPS):
        raise ValueError(
            f"These do not fit together: {sizes}; scales are [out] or [out, in / (32, 64 or 128)]."
        )
    if not weight.device == scale.device == x.device:
        raise ValueError(
            f"The activations are on {x.device}, the packed weight on {weight.device} and its scales on "
            f"{scale.device}; move the layer with .to({str(x.device)!r})."
        )
    if weight.dtype != torch.int8 or not {x.dtype, scale.dtype} <= NUMBER_TYPES.keys():
        raise ValueError(
            f"The kernels multiply float16, bfloat16 and float32 by int8, not {x.dtype} by {weight.dtype} with "
            f"scales of {scale.dtype}; CHATGLM_KERNELS=plain may."
        )
    if not weight.is_contiguous() or not scale.is_contiguous():
        raise ValueError("A packed weight and its scales must be contiguous; call .contiguous() on them.")
    return int(group)


def _launch(
    kernel: Callable, grid: tuple, tensors: tuple[torch.Tensor, ...], numbers: tuple[int, ...]
) -> None:
    arguments = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    arguments += [ctypes.c_int(number) for number in numbers]
    with torch.cuda.device_of(tensors[0]):
        kernel(grid, (256, 1, 1), 0, torch.cuda.current_stream().cuda_stream, arguments)


@functools.cache
def cuda_kernels(device: int, dtype: torch.dtype, bits: int, group: int) -> dict[str, Callable]:
    """Kernels for activations of `dtype` by name, compiled for the card with the index `device`."""
    capability = torch.cuda.get_device_capability(device)
    names = ["dequantize", "multiply_1", "multiply_4"]
    if capability >= TENSOR_CORES_FROM.get(dtype, (99, 0)):
        names += ["multiply_tensor_8", "multiply_tensor_16"]
    launcher = load_cpm_kernels()
    module = launcher.LazyKernelCModule(compile_cuda(capability, dtype, bits, group))
    return {name: launcher.KernelFunction(module, name) for name in names}


class MissingForCuda(RuntimeError):
    """What keeps the CUDA kernels from running, in a sentence."""


def cuda_missing(device_type: str) -> str | None:
    """What the CUDA kernels lack on devices of this type, in a sentence, or None if they can run there."""
    if device_type != "cuda" or torch.version.cuda is None:
        return f"The 'cuda' path is for NVIDIA cards, not for {device_type} in this build of torch."
    try:
        load_cpm_kernels()
        cuda_architecture(load_nvrtc(), torch.cuda.get_device_capability())
    except MissingForCuda as missing:
        return str(missing)
    return None


MISSING["cuda"], LINEARS["cuda"] = cuda_missing, cuda_linear


@functools.cache
def load_cpm_kernels() -> Any:
    """The module cpm_kernels.kernels.base on the CUDA libraries of torch; MissingForCuda where it does not load.

    Version 1.0.11 looks for the libraries in the system alone, raises RuntimeError or OSError where there is no
    driver, and reads its own kernels through pkg_resources, which setuptools no longer has. So its module
    library/base.py, which looks for them, is loaded first and told where they are.
    """
    finder = "cpm_kernels.library.base"
    stand_in = types.ModuleType("pkg_resources")
    stand_in.resource_string, stand_in.resource_exists = pkgutil.get_data, lambda package, name: True
    before = set(sys.modules)
    try:
        package = importlib.util.find_spec("cpm_kernels")
        if package is None:
            raise MissingForCuda("The CUDA kernels need cpm_kernels: pip install cpm_kernels.")
        if finder not in sys.modules:
            path = os.path.join(package.submodule_search_locations[0], "library", "base.py")
            spec = importlib.util.spec_from_file_location(finder, path)
            module = sys.modules[finder] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            module.unix_find_lib = module.windows_find_lib = find_cuda_library
        sys.modules.setdefault("pkg_resources", stand_in)
        base = importlib.import_module("cpm_kernels.kernels.base")
        base.Device(torch.cuda.current_device())  # knows the card only if it found the libraries
        return base
    except (ImportError, OSError, RuntimeError, AttributeError, IndexError) as error:
        for name in set(sys.modules) - before:
            if name.startswith("cpm_kernels"):
                del sys.modules[name]
        if isinstance(error, MissingForCuda):
            raise
        raise MissingForCuda(f"cpm_kernels does not run here ({error}).") from error
    finally:
        if sys.modules.get("pkg_resources") is stand_in:
            del sys.modules["pkg_resources"]


def find_cuda_library(name: str) -> str | None:
    """A file by which "cuda" (the driver), "cudart", "cublasLt" or "nvrtc" of torch's CUDA release loads."""
    major = cuda_major()
    if sys.platform == "win32":
        file = "nvcuda.dll" if name == "cuda" else f"{name}64_{major}{'0_0' if name == 'nvrtc' else ''}.dll"
    else:
        file = "libcuda.so.1" if name == "cuda" else f"lib{name}.so.{major}"
    torch_folder = os.path.dirname(torch.__file__)
    candidates = []
    for folder in ("nvidia/*/lib", "nvidia/*/bin", "nvidia/*/bin/x86_64", "torch/lib"):
        candidates += sorted(glob.glob(os.path.join(os.path.dirname(torch_folder), folder, file)))
    # The plain name means what torch has loaded already, whose state the others must share, or the system's.
    candidates.insert(len(candidates) if name == "nvrtc" else 0, file)
    for candidate in candidates:
        try:
            ctypes.CDLL(candidate)
        except OSError:
            continue
        return candidate
    return None


def cuda_major() -> int:
    return int((torch.version.cuda or "13").split(".")[0])


def load_nvrtc() -> ctypes.CDLL:
    """NVIDIA's run-time compiler, from the pip package that torch brings or from the system."""
    path = find_cuda_library("nvrtc")
    if path is None:
        package = "nvidia-cuda-nvrtc" + ("" if cuda_major() > 12 else f"-cu{cuda_major()}")
        raise MissingForCuda(f"The CUDA kernels need NVRTC {cuda_major()}: pip install {package}.")
    # Release 13.0 does not look for its other half beside itself.
    for pattern in ("libnvrtc-builtins.so.*", "nvrtc-builtins64_*.dll"):
        for builtins in glob.glob(os.path.join(os.path.dirname(path) or os.curdir, pattern)):
            ctypes.CDLL(builtins)
    return ctypes.CDLL(path)


def cuda_architecture(nvrtc: ctypes.CDLL, capability: tuple[int, int]) -> str:
    """What to compile for: "sm_80", or "compute_80" where the card is newer than the compiler."""
    count = ctypes.c_int()
    nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    known = (ctypes.c_int * count.value)()
    nvrtc.nvrtcGetSupportedArchs(known)
    wanted = 10 * capability[0] + capability[1]
    older = [arch for arch in known if 70 <= arch <= wanted]
    if not older:
        raise MissingForCuda(
            f"NVRTC {cuda_major()} compiles for compute capability {max(70, min(known)) / 10} and newer, "
            f"and the card has {wanted / 10}."
        )
    # Machine code runs on later cards of the same generation; others translate the intermediate code.
    return f"{'sm' if max(older) // 10 == capability[0] else 'compute'}_{max(older)}"


def compile_cuda(capability: tuple[int, int], dtype: torch.dtype, bits: int, group: int) -> bytes:
    """Compile the kernels for activations of `dtype` to what the driver loads; RuntimeError with the log."""
    nvrtc, program, size = load_nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()
    target = cuda_architecture(nvrtc, capability)
    source = (CUDA_INSTRUCTIONS + CUDA_KERNELS).encode()
    options = [f"--gpu-architecture={target}", "--std=c++17", "--device-as-default-execution-space"]
    options += [f"-DTYPE={NUMBER_TYPES[dtype]}", f"-DBITS={bits}", f"-DGROUP={group}"]
    arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))

    def fetch(what: str) -> bytes:
        getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        getattr(nvrtc, f"nvrtcGet{what}")(program, text)
        return text.raw

    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"chatglm.cu", 0, None, None)
    try:
        if nvrtc.nvrtcCompileProgram(program, len(options), arguments):
            raise RuntimeError(
                f"NVRTC does not compile the kernels for {target}: {fetch('ProgramLog').decode()}"
            )
        return fetch("CUBIN" if target.startswith("sm") else "PTX")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


# ---------------------------------------------------------------------------------------------------------------
# Triton
# ---------------------------------------------------------------------------------------------------------------

if triton is not None:

    @triton.jit
    def _triton_weight(packed, scale, row, byte, rows, columns, BITS: tl.constexpr, SECOND: tl.constexpr,
                       GROUP: tl.constexpr):  # fmt: skip
        """The numbers in `packed`, times the scale of their group; their columns."""
        column = byte if BITS == 8 else 2 * byte + SECOND
        if BITS == 4:
            packed = (packed << 4) >> 4 if SECOND else packed >> 4
        numbers = packed.to(tl.float32)
        if GROUP:
            inside = (row < rows) & (column < columns)
            numbers *= tl.load(scale + row * (columns // GROUP) + column // GROUP, inside, other=0).to(
                tl.float32
            )
        return numbers, column

    @triton.jit(do_not_specialize=["tokens"])
    def _triton_multiply(x, weight, scale, y, tokens, rows, columns, BITS: tl.constexpr, GROUP: tl.constexpr,
                         TOKENS: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr):  # fmt: skip
        """ROWS rows of the weight times all tokens; grid (rows / ROWS)."""
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[None, :]
        token = tl.arange(0, TOKENS)[:, None]
        width = columns * BITS // 8
        sums = tl.zeros((TOKENS, ROWS), dtype=tl.float32)
        for start in range(0, width, BYTES):
            byte = start + tl.arange(0, BYTES)[:, None]
            packed = tl.load(
                weight + row * width + byte, (row < rows) & (byte < width), other=0
            )  # [BYTES, ROWS]
            for second in tl.static_range(8 // BITS):
                numbers, column = _triton_weight(packed, scale, row, byte, rows, columns, BITS, second, GROUP)
                column = tl.trans(column)
                part = tl.load(
                    x + token.to(tl.int64) * columns + column, (token < tokens) & (column < columns), other=0
                )
                sums = tl.dot(part, numbers.to(part.dtype), sums, input_precision="ieee")
        if not GROUP:
            sums *= tl.load(scale + row, row < rows, other=0).to(tl.float32)
        inside = (token < tokens) & (row < rows)
        tl.store(y + token * rows + row, sums.to(y.dtype.element_ty), inside)

    @triton.jit
    def _triton_dequantize(weight, scale, y, rows, columns, BITS: tl.constexpr, GROUP: tl.constexpr,
                           BYTES: tl.constexpr):  # fmt: skip
        """BYTES bytes of a row; grid (rows, columns / BYTES)."""
        row = tl.program_id(0).to(tl.int64)
        byte = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
        width = columns * BITS // 8
        packed = tl.load(weight + row * width + byte, byte < width, other=0)
        for second in tl.static_range(8 // BITS):
            numbers, column = _triton_weight(packed, scale, row, byte, rows, columns, BITS, second, GROUP)
            if not GROUP:
                numbers *= tl.load(scale + row).to(tl.float32)
            tl.store(y + row * columns + column, numbers.to(y.dtype.element_ty), byte < width)


def triton_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """The same as `cuda_linear`, by Triton, on any card that Triton knows."""
    group = check_operands(x, weight, scale, bits)
    if len(x) > FEW_ROWS:
        return multiply_in_chunks(
            x, len(weight), lambda rows: triton_dequantize(weight[rows], scale[rows], bits, x.dtype)
        )
    x, y = x.contiguous(), x.new_empty(len(x), len(weight))
    if y.numel():
        grid, size = (triton.cdiv(len(weight), 16),), 64 if x.dtype == torch.float32 else 128
        with torch.cuda.device_of(x):
            _triton_multiply[grid](
                x, weight, scale, y, len(x), len(weight), x.shape[1], bits, group, 16, 16, size
            )
    return y


def triton_dequantize(
    weight: torch.Tensor, scale: torch.Tensor, bits: int, dtype: torch.dtype
) -> torch.Tensor:
    """The same as `cuda_dequantize`, by Triton."""
    y = torch.empty(len(weight), weight.shape[1] * 8 // bits, dtype=dtype, device=weight.device)
    group = check_operands(y, weight, scale, bits)
    if y.numel():
        grid = (len(weight), triton.cdiv(weight.shape[1], 512))
        with torch.cuda.device_of(weight):
            _triton_dequantize[grid](weight, scale, y, *y.shape, bits, group, 512)
    return y


def triton_missing(device_type: str) -> str | None:
    """What the Triton kernels lack on devices of this type, in a sentence, or None if they can run there."""
    if device_type != "cuda":
        return f"The 'triton' path is for graphics cards, not for {device_type}."
    if triton is None:
        return "The Triton kernels need triton: pip install triton."
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler: install gcc or clang."
    return None


MISSING["triton"], LINEARS["triton"] = triton_missing, triton_linear


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
