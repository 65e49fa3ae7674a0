"""Products with packed int8 and int4 weights: the definition, which every faster path must equal.

    y = x . dequantized(weight, scale)^T + bias        x [..., in], y [..., out]

In plain PyTorch, on any device, in any dtype, with gradients to x. quantization.py says how weights are stored.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

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


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 on this CPU; elsewhere torch is six times slower than in float32."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """What matrix products of many rows in `dtype` are computed in on this CPU."""
    if dtype == torch.bfloat16 and multiplies_bfloat16():
        return dtype
    return torch.float32


def plain_on_cpu(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """The definition, computed in the dtype that this CPU multiplies well."""
    return plain_linear(x.to(product_dtype(x.dtype)), weight, scale, bits).to(x.dtype)


class Packed:
    """A weight made ready for the products of this processor, often in a layout of its own, which is never saved."""

    out_features: int
    in_place = False  # whether it reads the published layout where that lies, so that it has to stay there

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, in] -> [M, out] in the dtype of x."""
        raise NotImplementedError

    def unpack(self) -> torch.Tensor:
        """The weight as it was, bit for bit."""
        raise NotImplementedError
