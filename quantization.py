"""Packed int8 and int4 layers: the storage format of the published checkpoints.

One row of a weight shares one scale, symmetric around zero:

    weight        int8  [out, in]      8 bits: the integer itself, -127 ... 127
                  int8  [out, in / 2]  4 bits: byte j holds column 2j in its high nibble and column
                                       2j + 1 in its low nibble, two's complement, -7 ... 7
    weight_scale  float [out]          the real weight is integer * scale

With a group size, which the published format does not have, every 32, 64 or 128 columns of a row share one
scale: weight_scale is [out, in / group size], and older readers stop at its shape. Products with these
weights are in quantization_kernels.py.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .quantization_kernels import (
    Packed,
    PlainProduct,
    dequantize_weight,
    float_linear,
    pack,
    pack_float,
    packed_linear,
    quantized_linear,
    register,
    unpack_int4,
)

__all__ = ["dequantize_weight", "unpack_int4"]  # defined beside the kernels, part of the format

QUANTIZED_LAYERS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
GROUP_SIZES = (32, 64, 128)
CHUNK = 1 << 24  # numbers that are quantized at a time, so that little is held beside the weight


def quantize_weight(
    weight: torch.Tensor, bits: int, group_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (packed int8 weight, scale) of a float `weight` [out, in].

    The scale is [out], or [out, in / group_size]. Computed in the dtype of `weight`: on half weights the
    integers equal the published ones bit for bit. Scales of groups are rounded to what bfloat16 can hold, so
    that every kernel reads the same ones. Raises ValueError for another bit width than 8 or 4, a width that
    cannot be packed or grouped, or values that are not finite.
    """
    check_packing(bits, group_size, columns=weight.shape[1])
    parts = weight.split(max(1, CHUNK // weight.shape[1]))
    packed, scale = zip(*(_quantize_rows(part, bits, group_size) for part in parts), strict=True)
    return torch.cat(packed), torch.cat(scale)


def _quantize_rows(
    weight: torch.Tensor, bits: int, group_size: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    limit = 2 ** (bits - 1) - 1
    groups = weight.unflatten(-1, (-1, group_size or weight.shape[1]))  # [out, groups, columns]
    scale = groups.abs().amax(dim=-1) / limit
    if not torch.isfinite(scale).all():
        raise ValueError(
            "The weight holds values that are not finite, so it has no scale; load an intact checkpoint."
        )
    if group_size:
        scale = scale.bfloat16().to(weight.dtype)
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale)  # an empty row stays 0
    # A scale so small that half rounded it may ask for more than the limit.
    integers = (groups / divisor[..., None]).round().clamp(-limit, limit).to(torch.int8).flatten(-2)
    return (integers if bits == 8 else pack_int4(integers)), scale if group_size else scale[:, 0]


def pack_int4(integers: torch.Tensor) -> torch.Tensor:
    """int8 [out, in] with values -8 ... 7 -> int8 [out, in / 2].

    >>> pack_int4(torch.tensor([[1, -1]], dtype=torch.int8))  # 0001 1111
    tensor([[31]], dtype=torch.int8)
    """
    high, low = integers[:, 0::2], integers[:, 1::2]
    return (high << 4) | (low & 0x0F)


def check_packing(bits: int, group_size: int | None = None, columns: int | None = None) -> None:
    """Raise ValueError for weights that cannot be packed so."""
    if bits not in (4, 8):
        raise ValueError(f"Weights are packed to 8 or 4 bits, not {bits!r}; call quantize(8) or quantize(4).")
    if group_size is not None and (bits != 4 or group_size not in GROUP_SIZES):
        raise ValueError(
            f"group_size is {group_size!r} at {bits} bits; it may be 32, 64 or 128 at 4 bits, or be left out."
        )
    if bits == 4 and columns is not None and columns % 2:
        raise ValueError(
            f"A weight of {columns} columns cannot be packed two to a byte; quantize it to 8 bits."
        )
    if group_size and columns is not None and columns % group_size:
        raise ValueError(
            f"A weight of {columns} columns cannot be cut into groups of {group_size}; choose another group_size."
        )


class Prepackable(nn.Module):
    """A layer whose weight may lie in the layout that its CPU multiplies fastest.

    Only the layer itself knows: its parameter keeps name, shape and dtype (on the meta device meanwhile), the
    state dict holds the published layout, and moving, casting, copying or training the layer restores it.
    """

    weight: nn.Parameter
    packed: Packed | None = None
    number = -1
    weight_is_shared = False  # with an embedding, which goes on needing it
    _lock = threading.Lock()

    def faster_weight(self) -> Packed | None:
        """The weight in a faster layout, if there is one here."""
        raise NotImplementedError

    def prepack(self) -> None:
        """Bring the weight into the fastest layout that this machine has for it."""
        with self._lock:
            if self.packed is None and not self.training and self.weight.device.type == "cpu":
                packed = self.faster_weight()
                if packed is not None:
                    self.number = register(packed)
                    if not self.weight_is_shared:
                        self.weight = nn.Parameter(
                            torch.empty_like(self.weight, device="meta"), self.weight.requires_grad
                        )
                    self.packed = packed

    def restore(self) -> None:
        """Bring the weight back into the published layout."""
        with self._lock:
            if self.packed is not None:
                if self.weight.is_meta:
                    self.weight = nn.Parameter(self.packed.unpack(), self.weight.requires_grad)
                self.packed = None

    def published_weight(self) -> torch.Tensor:
        """The weight in the published layout, wherever it is."""
        return self.packed.unpack() if self.packed is not None and self.weight.is_meta else self.weight

    def _apply(self, fn: Any, recurse: bool = True) -> Prepackable:
        self.restore()
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> Prepackable:
        if mode:
            self.restore()
        return super().train(mode)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight.is_meta and self.packed is not None:
            destination[prefix + "weight"] = self.packed.unpack()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.restore()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        self.restore()
        return self.__dict__.copy()


class Linear(Prepackable, nn.Linear):
    """`nn.Linear` that never takes torch's slow way through half-precision products on a CPU."""

    def faster_weight(self) -> Packed | None:
        return None if self.weight_is_shared else pack_float(self.weight.detach())

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.packed is not None and not (hidden_states.requires_grad and torch.is_grad_enabled()):
            y = packed_linear(hidden_states, self.packed, self.number)
            return y if self.bias is None else y + self.bias
        weight = self.published_weight()
        slow = weight.dtype in (torch.float16, torch.bfloat16) and weight.device.type == "cpu"
        # Other libraries put their own kinds of tensor here, which know best.
        if slow and not torch.is_grad_enabled() and type(weight) in (torch.Tensor, nn.Parameter):
            y = float_linear(hidden_states, weight)
            return y if self.bias is None else y + self.bias
        return F.linear(hidden_states, weight, self.bias)


class PackedWeight(nn.Module):
    """A packed weight [rows, columns] and its scale, empty until quantized or loaded."""

    def __init__(
        self,
        rows: int,
        columns: int,
        bits: int,
        group_size: int | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        check_packing(bits, group_size, columns)
        self.bits, self.group_size = bits, group_size
        groups = (columns // group_size,) if group_size else ()
        dtype = dtype or torch.get_default_dtype()
        # A layer that nobody fills must not hold whatever lay in memory.
        weight = torch.zeros(rows, columns * bits // 8, dtype=torch.int8, device=device)
        scale = torch.zeros(rows, *groups, dtype=dtype, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)

    def fill(self, weight: torch.Tensor) -> None:
        """Quantize `weight` [rows, columns] into this layer."""
        packed, scale = quantize_weight(weight.detach(), self.bits, self.group_size)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)

    def extra_repr(self) -> str:
        rows, columns = self.weight.shape[0], self.weight.shape[1] * 8 // self.bits
        grouped = f", group_size={self.group_size}" if self.group_size else ""
        return f"rows={rows}, columns={columns}, bits={self.bits}{grouped}"


class QuantizedLinear(Prepackable, PackedWeight):
    """y = x . (integers * scale)^T + bias; the bias and all gradients stay in floating point."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        bias: bool = False,
        group_size: int | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> None:
        super().__init__(out_features, in_features, bits, group_size, dtype, device)
        self.in_features, self.out_features = in_features, out_features
        self.bias = None
        if bias:
            zeros = torch.zeros(out_features, dtype=dtype, device=device)
            self.bias = nn.Parameter(zeros, requires_grad=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, bits: int, group_size: int | None = None) -> QuantizedLinear:
        """Quantize `linear`; its bias is kept as it is."""
        weight = linear.weight
        layer = cls(linear.in_features, linear.out_features, bits, False, group_size, weight.dtype, "meta")
        if not weight.is_meta:
            layer.fill(weight)
        layer.bias = linear.bias
        return layer

    def faster_weight(self) -> Packed | None:
        return pack(self.weight, self.weight_scale, self.bits)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.requires_grad and torch.is_grad_enabled():
            y = PlainProduct.apply(hidden_states, self.published_weight(), self.weight_scale, self.bits)
        else:
            if self.packed is None and not torch.compiler.is_compiling():
                self.prepack()
            if self.packed is not None:
                y = packed_linear(hidden_states, self.packed, self.number)
            else:
                y = quantized_linear(hidden_states, self.weight, self.weight_scale, self.bits)
        return y if self.bias is None else y + self.bias


class QuantizedEmbedding(PackedWeight):
    """An embedding whose rows are unpacked as they are looked up."""

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, bits: int, group_size: int | None = None
    ) -> QuantizedEmbedding:
        """Quantize `embedding`."""
        weight = embedding.weight
        layer = cls(*weight.shape, bits, group_size, weight.dtype, "meta")
        if not weight.is_meta:
            layer.fill(weight)
        return layer

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        rows = F.embedding(input_ids, self.weight).flatten(0, -2)
        scales = self.weight_scale[input_ids].flatten(0, input_ids.dim() - 1)
        return dequantize_weight(rows, scales, self.bits).view(*input_ids.shape, -1)


def quantize(model: nn.Module, bits: int, group_size: int | None = None) -> nn.Module:
    """Replace the linear layers of every block by packed ones, in place, freeing each before the next.

    `model` is any module that holds GLM blocks. The embedding, the head and all norms stay as they are.
    """
    found = [
        (module, name)
        for module in model.modules()
        for name, child in module.named_children()
        if name in QUANTIZED_LAYERS and isinstance(child, nn.Linear)
    ]
    for module, name in found:  # before anything is changed
        check_packing(bits, group_size, columns=getattr(module, name).in_features)
    for module, name in found:
        setattr(module, name, QuantizedLinear.from_linear(getattr(module, name), bits, group_size))
    return model
