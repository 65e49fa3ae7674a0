"""What can be done to the weights of a checkpoint: functions from one State to another.

Nothing is read here but what a comparison needs; the tensors of the result do their work when loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial

import torch

from chatglm.hub.quantization import QUANTIZED_LAYERS, check_packing, give_back, quantize_weight
from chatglm.weights.tensors import State, Tensor

HEADS = ("lm_head", "transformer.output_layer")
EMBEDDINGS = ("transformer.word_embeddings", "transformer.embedding.word_embeddings")
LINEAR = re.compile(rf"transformer\.(encoder\.)?layers\.\d+\.\w+\.({'|'.join(QUANTIZED_LAYERS)})\.weight")
PREFIX = "transformer.prefix_encoder."


def is_packed(state: State) -> bool:
    """Whether linear layers, or the embedding, are packed integers with a scale."""
    return any(name.endswith(".weight_scale") for name in state)


def cast(state: State, dtype: torch.dtype) -> State:
    """Every floating-point tensor in `dtype`, packed integers as they are.

    A tensor with numbers that `dtype` cannot hold raises ValueError when it is loaded.
    """

    def one(name: str, tensor: Tensor) -> Tensor:
        if not tensor.dtype.is_floating_point or tensor.dtype == dtype:
            return tensor

        def load() -> torch.Tensor:
            source = tensor.load()
            result = source.to(dtype)
            give_back(source)
            check_finite(name, result, f" in {dtype_name(dtype)}; choose bfloat16 or float32")
            return result

        return Tensor(dtype, tensor.shape, load)

    return {name: one(name, tensor) for name, tensor in state.items()}


def drop_tied_head(state: State) -> State:
    """Leaves out ChatGLM-6B's output layer, which is its embedding once more.

    Raises ValueError where the two differ: which of them was meant cannot be told.
    """
    head, embedding = (
        {kind: state[name] for kind in ("weight", "weight_scale") if (name := f"{module}.{kind}") in state}
        for module in (HEADS[0], EMBEDDINGS[0])
    )
    for kind, tensor in head.items():
        if kind not in embedding or not torch.equal(tensor.load(), embedding[kind].load()):
            raise ValueError(
                f"{HEADS[0]}.{kind} differs from {EMBEDDINGS[0]}.{kind}, but the model has one tensor for "
                "both; take all files from one checkpoint."
            )
    return {name: tensor for name, tensor in state.items() if name.rpartition(".")[0] != HEADS[0]}


def share_packed_head(state: State) -> State:
    """Adds ChatGLM-6B's packed embedding once more as its output layer.

    The published code ties the weights of the two by itself, but not their scales.
    """
    shared = {
        f"{HEADS[0]}.{kind}": replace(tensor, load=_copy_of(tensor))
        for kind in ("weight", "weight_scale")
        if (tensor := state.get(f"{EMBEDDINGS[0]}.{kind}")) is not None
    }
    return state | shared if f"{EMBEDDINGS[0]}.weight_scale" in state else state


def _copy_of(tensor: Tensor) -> Callable[[], torch.Tensor]:
    return lambda: tensor.load().clone()  # safetensors refuses two names for one piece of memory


def keep_rows(state: State, rows: Sequence[int]) -> State:
    """Row i of the new embedding and output layer is row `rows[i]` of the old."""
    index = torch.tensor(rows)

    def one(name: str, tensor: Tensor) -> Tensor:
        if name.rpartition(".")[0] not in HEADS + EMBEDDINGS:
            return tensor
        shape = (len(rows), *tensor.shape[1:])
        return Tensor(tensor.dtype, shape, partial(_rows_of, tensor, index))

    return {name: one(name, tensor) for name, tensor in state.items()}


def _rows_of(tensor: Tensor, index: torch.Tensor) -> torch.Tensor:
    source = tensor.load()
    result = source.index_select(0, index)
    give_back(source)
    return result


def quantize(state: State, bits: int, group_size: int | None = None, embeddings: bool = False) -> State:
    """The linear layers, and with `embeddings` embedding and output layer, packed to `bits` bits.

    The same integers and scales as `model.quantize` makes. Raises ValueError for weights that are
    packed already and for sizes that cannot be packed.
    """
    if is_packed(state):
        raise ValueError(
            "The weights are packed already, and packing them again would lose more; convert the "
            "checkpoint with the float weights."
        )
    result: State = {}
    for name, tensor in state.items():
        table = name.rpartition(".")[0] in HEADS + EMBEDDINGS
        if LINEAR.fullmatch(name) or (embeddings and table):
            check_packing(bits, group_size, columns=tensor.shape[1])
            result |= _packed(name, tensor, bits, group_size)
        else:
            result[name] = tensor
    return result


def _packed(name: str, tensor: Tensor, bits: int, group_size: int | None) -> State:
    rows, columns = tensor.shape
    groups = (columns // group_size,) if group_size else ()

    @lru_cache(maxsize=1)
    def both() -> tuple[torch.Tensor, torch.Tensor]:
        source = tensor.load()
        check_finite(name, source, "; download the file that it comes from again")
        result = quantize_weight(source, bits, group_size)
        give_back(source)  # a mapped file's pages, which would stay as long as there is room
        return result

    def weight() -> torch.Tensor:
        return both()[0]

    def scale() -> torch.Tensor:  # the last to be loaded
        result = both()[1]
        both.cache_clear()
        return result

    return {
        name: Tensor(torch.int8, (rows, columns * bits // 8), weight),
        f"{name}_scale": Tensor(tensor.dtype, (rows, *groups), scale),
    }


def add_prefix(state: State, prefix: State) -> State:
    """The weights with the prefix encoder of P-Tuning v2 from `prefix`, of which nothing else is taken.

    Raises ValueError when `prefix` has none.
    """
    encoder = {name: tensor for name, tensor in prefix.items() if name.startswith(PREFIX)}
    if not encoder:
        raise ValueError(
            f"The prefix folder holds no weights named {PREFIX}...; give the folder that P-Tuning v2 saved."
        )
    return {name: tensor for name, tensor in state.items() if not name.startswith(PREFIX)} | encoder


def checked(state: State) -> State:
    """The same tensors; one that holds NaN or infinity raises ValueError when it is loaded."""

    def one(name: str, tensor: Tensor) -> Tensor:
        if not tensor.dtype.is_floating_point:
            return tensor

        def load() -> torch.Tensor:
            result = tensor.load()
            check_finite(name, result, "; download the file that it comes from again")
            return result

        return replace(tensor, load=load)

    return {name: one(name, tensor) for name, tensor in state.items()}


def check_finite(name: str, tensor: torch.Tensor, where: str) -> None:
    """Raises ValueError if `tensor` holds NaN or infinity."""
    # aminmax hands NaN on, and is vectorized for every dtype where isfinite is not (24 against 0.6 GB/s).
    if tensor.numel() and not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
        raise ValueError(f"{name} holds numbers that are not finite{where}.")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
