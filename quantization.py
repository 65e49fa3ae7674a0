"""Packed int8 and int4 layers: the storage format of the published checkpoints, in plain PyTorch.

One row of a weight shares one scale, symmetric around zero:

    weight        int8  [out, in]      8 bits: the integer itself, -127 ... 127
                  int8  [out, in / 2]  4 bits: byte j holds column 2j in its high nibble and column
                                       2j + 1 in its low nibble, two's complement, -7 ... 7
    weight_scale  float [out]          the real weight is integer * scale

Everything runs on any device, in any floating dtype, and lets gradients through to the input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

QUANTIZED_LAYERS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


def quantize_weight(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (packed int8 weight, scale [out]) of a float `weight` [out, in].

    Computed in the dtype of `weight`: on half weights the integers equal the published ones bit for bit.
    Raises ValueError for another bit width than 8 or 4, an odd width at 4 bits, or values that are
    not finite.
    """
    _check_bits(bits)
    if bits == 4 and weight.shape[1] % 2:
        raise ValueError(
            f"A weight of {weight.shape[1]} columns cannot be packed two to a byte; quantize it to 8 bits."
        )
    limit = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(dim=1) / limit
    if not torch.isfinite(scale).all():
        raise ValueError(
            "The weight holds values that are not finite, so it has no scale; load an intact checkpoint."
        )
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale)  # an empty row stays 0
    # A scale so small that half rounded it may ask for more than the limit.
    integers = (weight / divisor[:, None]).round().clamp(-limit, limit).to(torch.int8)
    return (integers if bits == 8 else pack_int4(integers)), scale


def dequantize_weight(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the real weight [out, in] in the dtype of `scale` [out]."""
    integers = weight if bits == 8 else unpack_int4(weight)
    return integers.to(scale.dtype) * scale[:, None]


def pack_int4(integers: torch.Tensor) -> torch.Tensor:
    """int8 [out, in] with values -8 ... 7 -> int8 [out, in / 2].

    >>> pack_int4(torch.tensor([[1, -1]], dtype=torch.int8))  # 0001 1111
    tensor([[31]], dtype=torch.int8)
    """
    high, low = integers[:, 0::2], integers[:, 1::2]
    return (high << 4) | (low & 0x0F)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """int8 [out, in / 2] -> int8 [out, in], the inverse of `pack_int4`."""
    high = packed >> 4  # arithmetic shift: the sign comes along
    low = (packed << 4) >> 4
    return torch.stack((high, low), dim=-1).flatten(-2)


class _PackedWeight(nn.Module):
    """A packed weight [rows, columns] and its scale, empty until quantized or loaded."""

    def __init__(self, rows: int, columns: int, bits: int, dtype: torch.dtype | None, device=None) -> None:
        super().__init__()
        _check_bits(bits)
        self.bits = bits
        shape = (rows, columns * bits // 8)
        # A layer that nobody fills must not hold whatever lay in memory.
        self.weight = nn.Parameter(torch.zeros(shape, dtype=torch.int8, device=device), requires_grad=False)
        self.weight_scale = nn.Parameter(
            torch.zeros(rows, dtype=dtype or torch.get_default_dtype(), device=device),
            requires_grad=False,
        )

    def fill(self, weight: torch.Tensor) -> None:
        """Quantize `weight` [rows, columns] into this layer."""
        packed, scale = quantize_weight(weight.detach(), self.bits)
        self.weight.data, self.weight_scale.data = packed, scale

    def extra_repr(self) -> str:
        return (
            f"rows={self.weight.shape[0]}, columns={self.weight.shape[1] * 8 // self.bits}, bits={self.bits}"
        )


class QuantizedLinear(_PackedWeight):
    """y = x . (integers * scale)^T + bias, the definition every faster path must equal."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device=None,
    ) -> None:
        super().__init__(out_features, in_features, bits, dtype, device)
        self.in_features, self.out_features = in_features, out_features
        self.bias = None
        if bias:
            zeros = torch.zeros(out_features, dtype=dtype, device=device)
            self.bias = nn.Parameter(zeros, requires_grad=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, bits: int) -> QuantizedLinear:
        """Quantize `linear`; its bias is kept as it is."""
        layer = cls(
            linear.in_features,
            linear.out_features,
            bits,
            linear.bias is not None,
            linear.weight.dtype,
            linear.weight.device,
        )
        if not linear.weight.is_meta:
            layer.fill(linear.weight)
        if linear.bias is not None:
            layer.bias = linear.bias
        return layer

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = dequantize_weight(self.weight, self.weight_scale, self.bits)
        return F.linear(hidden_states, weight.to(hidden_states.dtype), self.bias)


class QuantizedEmbedding(_PackedWeight):
    """An embedding whose rows are unpacked as they are looked up."""

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, bits: int) -> QuantizedEmbedding:
        """Quantize `embedding`."""
        weight = embedding.weight
        layer = cls(*weight.shape, bits, weight.dtype, weight.device)
        if not weight.is_meta:
            layer.fill(weight)
        return layer

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        rows = F.embedding(input_ids, self.weight).flatten(0, -2)
        scales = self.weight_scale[input_ids].flatten()
        return dequantize_weight(rows, scales, self.bits).view(*input_ids.shape, -1)


def quantize(model: nn.Module, bits: int) -> nn.Module:
    """Replace the linear layers of every block by packed ones, in place, one at a time.

    `model` is any module that holds GLM blocks. The embedding, the head and all norms stay as they are.
    """
    _check_bits(bits)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in QUANTIZED_LAYERS and isinstance(child, nn.Linear):
                setattr(module, name, QuantizedLinear.from_linear(child, bits))
    return model


def _check_bits(bits: int) -> None:
    if bits not in (4, 8):
        raise ValueError(f"Weights are packed to 8 or 4 bits, not {bits!r}; call quantize(8) or quantize(4).")
