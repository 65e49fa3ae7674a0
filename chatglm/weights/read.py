"""The tensors of weight files, memory-mapped; no pickle is read but by torch's reader for tensors alone."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache, partial
from pathlib import Path
from pickle import UnpicklingError  # the error alone: nothing is unpickled here

import torch
from safetensors import SafetensorError, safe_open

from chatglm.weights.tensors import State, Tensor

MORE_THAN_TENSORS = (
    "{path} is damaged or holds more than tensors, which could run code; take safetensors files, or the "
    ".bin files of a source you trust."
)
# Training frameworks put the state dict under one of these keys, or one of these in front of each name.
NESTED_UNDER = ("module", "state_dict", "model")
PREFIXES = ("module.", "base_model.model.")


def read_state(files: Iterable[Path]) -> State:
    """The tensors of `files` (.safetensors, or anything that torch.save wrote), in their order.

    Raises ValueError for files that are damaged, hold anything but tensors, or name a tensor twice.
    """
    state: State = {}
    for path in files:
        tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_bin(path)
        twice = state.keys() & tensors.keys()
        if twice:
            raise ValueError(
                f"{path} holds {min(twice)}, which another file of the checkpoint holds too; download the "
                "checkpoint again."
            )
        state |= tensors
    return state


def _read_safetensors(path: Path) -> State:
    try:
        with safe_open(path, framework="pt") as file:
            views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            return {
                _plain(name): Tensor(
                    _dtype_of(view.get_dtype(), path), tuple(view.get_shape()), partial(_load, path, name)
                )
                for name, view in views.items()
            }
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); download it again.") from None


def _load(path: Path, name: str) -> torch.Tensor:
    # Opened anew each time, so that the mapping goes when the tensor does.
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def _dtype_of(name: str, path: Path) -> torch.dtype:
    names = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    names |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}
    names |= {"U8": torch.uint8, "BOOL": torch.bool}
    if name not in names:
        raise ValueError(f"{path} holds numbers of type {name}, which no ChatGLM has; take another copy.")
    return names[name]


def _read_bin(path: Path) -> State:
    described = _unpickle(path, "meta")
    for name, tensor in described.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(MORE_THAN_TENSORS.format(path=path))
        if tensor.layout != torch.strided:
            raise ValueError(f"{path} holds {name} as a {tensor.layout} tensor, which no ChatGLM has.")
        # Strides of zero make a tensor larger than the numbers it has; the storage tells how many these are.
        if tensor.nbytes > min(tensor.untyped_storage().nbytes(), path.stat().st_size):
            raise ValueError(
                f"{path} says that {name} has shape {tuple(tensor.shape)}, more than the file holds of it; "
                "download it again."
            )
    return {
        _plain(name): Tensor(tensor.dtype, tuple(tensor.shape), partial(_load_from_bin, path, name))
        for name, tensor in described.items()
    }


def _plain(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _load_from_bin(path: Path, name: str) -> torch.Tensor:
    tensor = _contents(path, path.stat().st_mtime_ns)[name]
    if tensor.is_meta:
        raise ValueError(f"{path} holds no data for {name}; download it again.")
    return tensor.contiguous()


# One file at a time: the files of old torch releases cannot be mapped and are held whole.
@lru_cache(maxsize=1)
def _contents(path: Path, changed: int) -> dict[str, torch.Tensor]:
    return _unpickle(path, "cpu")


def _unpickle(path: Path, device: str) -> dict[str, torch.Tensor]:
    with path.open("rb") as file:
        mapped = file.read(2) == b"PK"  # a zip archive, as torch writes since 1.6
    try:
        contents = torch.load(path, map_location=device, weights_only=True, mmap=mapped)
    except (UnpicklingError, EOFError, RuntimeError, KeyError) as error:
        if "memory" in str(error):
            raise MemoryError(f"{path} does not fit into the memory that is free ({error}).") from None
        raise ValueError(MORE_THAN_TENSORS.format(path=path)) from None
    for key in NESTED_UNDER:
        if isinstance(contents, dict) and isinstance(contents.get(key), dict):
            contents = contents[key]
    if not isinstance(contents, dict):
        raise ValueError(f"{path} holds no state dict but a {type(contents).__name__}; take another file.")
    return contents
