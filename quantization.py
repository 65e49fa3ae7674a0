"""Packed int8 and int4 layers: the storage format of the published checkpoints.

One row of a weight shares one scale, symmetric around zero:

    weight        int8  [out, in]      8 bits: the integer itself, -127 ... 127
                  int8  [out, in / 2]  4 bits: byte j holds column 2j in its high nibble and column
                                       2j + 1 in its low nibble, two's complement, -7 ... 7
    weight_scale  float [out]          the real weight is integer * scale

With a group size, which the published format does not have, every 32, 64 or 128 columns of a row share one
scale: weight_scale is [out, in / group size], and older readers stop at its shape. Products with these
weights are defined in quantization_plain.py and made fast in quantization_kernels.py.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from .quantization_kernels import (
    float_linear,
    may_pack,
    may_pack_float,
    pack,
    pack_float,
    packed_linear,
    quantized_linear,
    register,
)
from .quantization_plain import Packed, PlainProduct, dequantize_weight, unpack_int4

__all__ = ["dequantize_weight", "unpack_int4"]  # defined with the plain product, part of the format

QUANTIZED_LAYERS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
GROUP_SIZES = (32, 64, 128)
EXTREME_BECOMES = (7.2, 8.0, 9.0)  # what the largest number of a group is tried as; 9 is cut to the range
QUANT_METHOD = "chatglm"  # our name in transformers' table of quantizers
# Layers: while it is packed, one is in memory three times in int8, and four in bfloat16.
PREPACKED_AT_ONCE = 2
CHUNK = 1 << 22  # numbers that are quantized at a time, so that little is held beside the weight


def quantize_weight(
    weight: torch.Tensor, bits: int, group_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (packed int8 weight, scale) of a float `weight` [out, in].

    The scale is [out], or [out, in / group_size]. Computed in the dtype of `weight`: on half weights the
    integers equal the published ones bit for bit. Scales of groups are numbers that bfloat16 can hold, so that
    every kernel reads the same ones. Raises ValueError for another bit width than 8 or 4, a width that
    cannot be packed or grouped, or values that are not finite.
    """
    check_packing(bits, group_size, columns=weight.shape[1])
    parts = []
    for rows in weight.split(max(1, CHUNK // weight.shape[1])):
        parts.append(_quantize_groups(rows, group_size) if group_size else _quantize_rows(rows, bits))
    packed, scale = zip(*parts, strict=True)
    return torch.cat(packed), torch.cat(scale)


def _check_finite(extreme: torch.Tensor) -> None:
    if not torch.isfinite(extreme).all():
        raise ValueError(
            "The weight holds values that are not finite, so it has no scale; load an intact checkpoint."
        )


def _quantize_rows(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The published rule: the largest number of a row becomes the largest integer."""
    limit = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(dim=1) / limit
    _check_finite(scale)
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale)  # an empty row stays 0
    # A scale so small that half rounded it may ask for more than the limit.
    integers = (weight / divisor[:, None]).round().clamp(-limit, limit).to(torch.int8)
    return (integers if bits == 8 else pack_int4(integers)), scale


def _quantize_groups(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each group the best of a few scales, by squared error: 28 % less than the published rule leaves.

    The largest number becomes about -8, the one integer without a counterpart, so the scale may be negative.
    Each scale is fitted once more to the integers that it gave.
    """
    groups = weight.float().unflatten(-1, (-1, group_size))  # [out, groups, columns]
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    _check_finite(extreme)
    tried = [_fit_groups(groups, -extreme / becomes) for becomes in EXTREME_BECOMES]
    integers, scale, error = tried[0]
    for other_integers, other_scale, other_error in tried[1:]:
        better = other_error < error
        integers = torch.where(better, other_integers, integers)
        scale, error = torch.where(better, other_scale, scale), torch.where(better, other_error, error)
    return pack_int4(integers.flatten(-2)), scale.squeeze(-1).to(weight.dtype)


def _fit_groups(groups: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Integers of `groups` under about this scale, the scale that suits them best, and the error left."""
    integers = (groups / torch.where(scale == 0, 1.0, scale)).round().clamp(-8, 7)
    fitted = (groups * integers).sum(-1, keepdim=True) / integers.square().sum(-1, keepdim=True).clamp(min=1)
    fitted = fitted.bfloat16().float()
    error = (integers * fitted - groups).square().sum(-1, keepdim=True)
    return integers.to(torch.int8), fitted, error


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


def give_back(tensor: torch.Tensor) -> None:
    """Let go of the memory of a tensor that is not needed any more, as far as Linux would keep it (else nothing).

    Weights of a file are mapped, and pages that were read stay in memory until it runs short. They are dropped
    only if all of them still are the file's own, so the tensor, and whoever else holds it, reads the same again.
    """
    if not sys.platform.startswith("linux") or tensor.device.type != "cpu":
        return
    page = mmap.PAGESIZE
    first, end = -(-tensor.data_ptr() // page), (tensor.data_ptr() + tensor.nbytes) // page
    try:
        libc = ctypes.CDLL(None)
        if first < end:
            with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
                pagemap.seek(first * 8)
                flags = torch.frombuffer(bytearray(pagemap.read((end - first) * 8)), dtype=torch.int64)
            present, swapped, of_a_file = (flags >> 63) & 1, (flags >> 62) & 1, (flags >> 61) & 1
            if present.any() and torch.equal(present | swapped, present & of_a_file):
                address, size = ctypes.c_void_p(first * page), ctypes.c_size_t((end - first) * page)
                libc.madvise(address, size, mmap.MADV_DONTNEED)
        libc.malloc_trim(0)  # what was needed on the way, which glibc would keep
    except (OSError, AttributeError):  # no /proc, another C library
        return


class Prepackable(nn.Module):
    """A layer whose weight may lie in the layout that its CPU multiplies fastest.

    Only the layer itself knows: its parameter keeps name, shape and dtype (on the meta device meanwhile, unless the
    product reads it in place), the state dict holds the published layout, and moving, casting, copying or training the
    layer restores it.
    """

    weight: nn.Parameter
    packed: Packed | None = None
    number = -1
    weight_is_shared = False  # with an embedding, which goes on needing it
    # Of the class, since a lock cannot be copied with a layer; two layers may share one, and wait for each other.
    _locks = tuple(threading.Lock() for _ in range(61))

    @property
    def _lock(self) -> threading.Lock:
        return self._locks[id(self) // 16 % len(self._locks)]

    def faster_weight(self) -> Packed | None:
        """The weight in a faster layout, if there is one here."""
        raise NotImplementedError

    def prepack(self) -> None:
        """Bring the weight into the fastest layout that this machine has for it."""
        with self._lock:
            packed = self.faster_weight() if self.may_be_packed() else None
            if packed is not None:
                self.number = register(packed)
                self.packed = packed  # before the weight goes, which other threads may be looking for
                if not (self.weight_is_shared or packed.in_place):
                    old = self.weight
                    self.weight = nn.Parameter(torch.empty_like(old, device="meta"), old.requires_grad)
                    give_back(old.detach())

    def may_be_packed(self) -> bool:
        """Whether the weight lies here as published, and is to stay here and as it is."""
        offloaded = getattr(getattr(self, "_hf_hook", None), "offload", False)  # here for one call alone
        return self.packed is None and not (self.training or offloaded)

    def restore(self) -> None:
        """Bring the weight back into the published layout."""
        with self._lock:
            if self.packed is not None:
                if self.weight.is_meta:
                    with torch.inference_mode(False):  # or training could never use it
                        self.weight = nn.Parameter(self.packed.unpack(), self.weight.requires_grad)
                self.packed = None

    def published_weight(self) -> torch.Tensor:
        """The weight in the published layout, wherever it is."""
        weight, packed = self.weight, self.packed
        return packed.unpack() if packed is not None and weight.is_meta else weight

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


def prepack_all(model: nn.Module, quantized_only: bool = False) -> None:
    """Bring all weights of `model`, or the int8 and int4 ones alone, into their fastest layout, if they are not.

    A few layers at a time, because packing one often uses one thread only.
    """
    kind = QuantizedLinear if quantized_only else Prepackable
    layers = [module for module in model.modules() if isinstance(module, kind) and module.may_be_packed()]
    if layers:
        with ThreadPoolExecutor(min(torch.get_num_threads(), PREPACKED_AT_ONCE)) as pool:
            list(pool.map(Prepackable.prepack, layers))


class Linear(Prepackable, nn.Linear):
    """`nn.Linear` that never takes torch's slow way through half-precision products on a CPU."""

    def may_be_packed(self) -> bool:
        known = self._is_plain() and not self.weight_is_shared
        return known and super().may_be_packed() and may_pack_float(self.weight)

    def faster_weight(self) -> Packed | None:
        return pack_float(self.weight.detach())

    def _is_plain(self) -> bool:
        """Whether no other library has put its own kind of tensor here, which would know best itself."""
        return type(self.weight) in (torch.Tensor, nn.Parameter)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.packed is not None:
            if hidden_states.requires_grad and torch.is_grad_enabled():
                return F.linear(hidden_states, self.published_weight(), self.bias)
            y = packed_linear(hidden_states, self.packed, self.number)
            return y if self.bias is None else y + self.bias
        weight = self.weight
        slow = weight.dtype in (torch.float16, torch.bfloat16) and weight.device.type == "cpu"
        if slow and self._is_plain() and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
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
        if isinstance(linear, Prepackable):
            linear.restore()
        weight = linear.weight
        layer = cls(linear.in_features, linear.out_features, bits, False, group_size, weight.dtype, "meta")
        layer.training = linear.training
        if not weight.is_meta:
            layer.fill(weight)
        layer.bias = linear.bias
        return layer

    def fill(self, weight: torch.Tensor) -> None:
        self.restore()
        super().fill(weight)

    def may_be_packed(self) -> bool:
        return super().may_be_packed() and may_pack(self.weight, self.bits)

    def faster_weight(self) -> Packed | None:
        return pack(self.weight, self.weight_scale, self.bits)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.device != self.weight_scale.device:
            raise ValueError(
                f"The input is on {hidden_states.device}, but the packed weight on {self.weight_scale.device}; move "
                "the model, or its inputs: model.to(...)."
            )
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
        layer.training = embedding.training
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
        hook = getattr(getattr(module, name), "_hf_hook", None)
        if getattr(hook, "offload", False):
            raise ValueError(
                f"quantize packs what lies in memory, but {name} is offloaded; load the model packed instead, with "
                "quantization_config, or from a folder that `chatglm convert` packed."
            )
        check_packing(bits, group_size, columns=getattr(module, name).in_features)
    for module, name in found:
        setattr(module, name, QuantizedLinear.from_linear(getattr(module, name), bits, group_size))
    return model


def mismatched_shapes(model: Any) -> list[tuple[str, tuple, tuple]]:
    """(name, shape, shape by the config) of tensors that transformers set without a look at their shapes.

    It does so where weights are packed while they load.
    """
    with torch.device("meta"):
        expected = type(model)(model.config).state_dict()
    shapes = [(name, tensor.shape, expected[name].shape) for name, tensor in model.state_dict().items()]
    return [(name, found, wanted) for name, found, wanted in shapes if found != wanted]


def check_packed_file(info: dict[str, Any], model: Any, name: Any) -> None:
    """Raise ValueError for a file that is packed in another way than the config says."""
    bits = model.config.quantization_bit
    field = "quantization_embeddings" if bits else "quantization_bit"
    for key in sorted(key for key in info["unexpected_keys"] if key.endswith(".weight_scale")):
        raise ValueError(
            f"{name} holds packed weights ({key}) that its config.json does not tell of; set {field} there, or "
            "take the config.json that was published with these weights."
        )
    for key in sorted(key for key in info["missing_keys"] if key.endswith(".weight_scale")):
        raise ValueError(
            f"{name} holds no {key}, but by config.json its weights are packed to {bits} bits; take quantization_bit "
            "out of config.json, and pass quantization_config to pack the weights while they load."
        )
    for key, found, wanted in sorted(info["mismatched_keys"]):
        if key.endswith(".weight_scale") and len(found) != len(wanted):
            kinds = {1: "one scale a row", 2: "a scale for every group of columns"}
            raise ValueError(
                f"{key} in {name} holds {kinds.get(len(found), f'numbers of shape {tuple(found)}')}, but by "
                f"quantization_group_size in config.json it is {kinds[len(wanted)]}; take weights and config.json "
                "from one checkpoint."
            )
        other = {4: 8, 8: 4}.get(bits, bits)
        packed = isinstance(model.get_submodule(key.rpartition(".")[0]), PackedWeight)
        if packed and found[:-1] == wanted[:-1] and found[-1] * bits == wanted[-1] * other:
            raise ValueError(
                f"{key} in {name} is packed to {other} bits, but quantization_bit in config.json says {bits}; take "
                "weights and config.json from one checkpoint."
            )


def check_scales(model: nn.Module, source: Any) -> None:
    """Raise ValueError, naming the tensor, for scales that no quantizer has written.

    A scale of zero is right for numbers that are all zero, and only for them.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, PackedWeight) or layer.weight_scale.is_meta:
            continue
        scale = layer.weight_scale
        if not torch.isfinite(scale).all():
            raise ValueError(
                f"{name}.weight_scale in {source} holds NaN or infinity; download the file again."
            )
        empty = scale == 0
        if empty.any():
            numbers = layer.weight.view(*empty.shape, -1)  # of a row, or of each of its groups
            if numbers[empty].any():
                raise ValueError(
                    f"{name}.weight_scale in {source} is zero where the weight is not; download the file again."
                )


def freeze(model: nn.Module) -> None:
    """Make nothing trainable that is packed; loading makes every float tensor so."""
    for layer in model.modules():
        if isinstance(layer, PackedWeight):
            layer.weight_scale.requires_grad_(False)


class ChatGLMQuantizationConfig(QuantizationConfigMixin):
    """What `from_pretrained(..., quantization_config=...)` packs while it loads: see `model.quantize`."""

    def __init__(
        self,
        bits: int = 4,
        group_size: int | None = None,
        quantize_embeddings: bool = False,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise ValueError(
                f"quantization_config has an unknown key {sorted(unknown)[0]!r}; it takes bits, group_size and "
                "quantize_embeddings."
            )
        check_packing(bits, group_size)
        self.quant_method, self.bits, self.group_size = quant_method, bits, group_size
        self.quantize_embeddings = quantize_embeddings


def check_same_packing(config: Any, asked: Any) -> None:
    """Raise ValueError where `asked`, a quantization_config, is not how the model of `config` is packed."""
    if not isinstance(asked, ChatGLMQuantizationConfig):
        return
    wanted = (asked.bits, asked.group_size, asked.quantize_embeddings)
    found = (config.quantization_bit, config.quantization_group_size, config.quantization_embeddings)
    if wanted != found:
        raise ValueError(
            f"The weights are packed already, with (bits, group_size, quantize_embeddings) = {found}, but "
            f"quantization_config asks for {wanted}; leave it out, or take the checkpoint that is not packed."
        )


class ChatGLMQuantizer(HfQuantizer):
    """Packs each weight as it is read, in the dtype of the file, so that one at a time is held in full.

    Weights that are packed already pass through. Nothing of it stays on the model: what comes out is what
    `model.quantize` makes of the unpacked checkpoint.
    """

    def __init__(self, quantization_config: ChatGLMQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, pre_quantized=False)
        self.problem, self.packs = "", False

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """ValueError for layers to pack that shall stay on disk: they would be read from the file, unpacked."""
        if self.packs and isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "device_map leaves layers on disk, where only a folder that is packed already can be read from; pack "
                "it first (chatglm convert SOURCE DEST --quantize 4) and load that."
            )

    def _process_model_before_weight_loading(self, model: Any, device_map: Any = None, **kwargs: Any) -> None:
        wanted = self.quantization_config
        self.packs = not model.config.quantization_bit
        self.validate_environment(device_map=device_map)  # one that is worked out comes later
        if model.config.quantization_bit:
            check_same_packing(model.config, wanted)
        model.quantize(wanted.bits, wanted.quantize_embeddings, wanted.group_size)
        # By their looks, not their class: another copy of this file may serve the model of this one.
        layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "weight_scale")}
        self.layers = {f"{name}.weight": layer for name, layer in layers.items()}
        plan, uncast = model._get_dtype_plan, {f"^{re.escape(name)}$": None for name in self.layers}
        model._get_dtype_plan = lambda dtype: plan(dtype) | uncast

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.layers

    def get_quantize_ops(self) -> ChatGLMQuantizer:
        return self

    @torch.no_grad()
    def convert(self, tensors: dict[str, Any], **kwargs: Any) -> dict[str, torch.Tensor]:
        """{name: what the file holds} -> {name: packed weight, its scale}, which transformers then sets."""
        ((name, weight),) = tensors.items()
        weight = weight[0] if isinstance(weight, list) else weight
        layer = self.layers[name]
        rows, columns = layer.weight.shape[0], layer.weight.shape[1] * 8 // layer.bits
        if self.problem or not weight.is_floating_point():
            return {name: weight}  # packed already, or told in the end
        try:
            if weight.shape != (rows, columns):
                raise ValueError(
                    f"the shape is {tuple(weight.shape)}, but by config.json it must be {(rows, columns)}; take "
                    "weights and config.json from one checkpoint."
                )
            packed, scale = quantize_weight(weight, layer.bits, layer.group_size)
        except ValueError as error:  # the loader would bury it in its report
            self.problem = f"{name}: {error}"
            return {name: weight}
        give_back(weight)
        return {name: packed, f"{name}_scale": scale.to(layer.weight_scale.dtype)}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.problem:
            raise ValueError(self.problem)
        self.remove_quantization_config(model)  # models that carry it refuse half() and float()
        del model._get_dtype_plan, model.is_quantized, model.config._is_quantized

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def packed_by_another_library(config: Any) -> bool:
    """Whether weights are loaded under somebody else's quantization_config."""
    found = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return found is not None and method != QUANT_METHOD


def make_plain(model: nn.Module) -> None:
    """Make every layer that is not packed exactly an `nn.Linear`: bitsandbytes replaces no other class."""
    for layer in model.modules():
        if type(layer) is Linear:
            layer.__class__ = nn.Linear


def register_with_transformers() -> None:
    """Let transformers find the two classes above, those of the copy of this file that loads now."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = ChatGLMQuantizationConfig
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = ChatGLMQuantizer


def own_quantization_config(given: Any) -> Any:
    """`given` as an object of this copy of the file if it asks for our packing, else as it is."""
    keys = given if isinstance(given, dict) else getattr(given, "__dict__", {})
    return ChatGLMQuantizationConfig(**keys) if keys.get("quant_method") == QUANT_METHOD else given
