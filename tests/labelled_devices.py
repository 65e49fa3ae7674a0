"""Devices that do not exist: tensors that lie on the CPU, say that they lie elsewhere, and refuse to be mixed.

Within `labelled_devices()` a tensor may be moved to DEVICES as to a card. Operations compute real numbers, and
raise RuntimeError where a machine with these cards would: two tensors on different devices in one operation. As on
cards, a CPU tensor without dimensions may be mixed with anything, and CPU indices with anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICES = [
    torch.device("lazy", number) for number in range(2)
]  # a kind of device that torch knows by name alone
CPU = torch.device("cpu")
aten = torch.ops.aten
CROSS_DEVICES = (aten._to_copy.default, aten.copy_.default)
INDEX_BY_CPU = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)


class Labelled(torch.Tensor):
    """`held`, a CPU tensor, that says that it lies on `device`."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: torch.device) -> Labelled:
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=device
        )

    def __init__(self, held: torch.Tensor, device: torch.device) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return run(func, args, kwargs or {})


class Operations(TorchDispatchMode):
    """Makes `.to(device)` and `torch.zeros(device=...)` work for DEVICES."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return run(func, args, kwargs or {})


class FromAndToNumbers(TorchFunctionMode):
    """Makes tensors of Python numbers on the CPU and then moves them, and back: torch asks no dispatch mode there."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.tolist, torch.Tensor.data_ptr) and isinstance(args[0], Labelled):
            return func(args[0].held)
        if func is torch.Tensor.new_tensor:
            like, numbers = args
            return torch.tensor(numbers, **{"dtype": like.dtype, "device": like.device, **kwargs})
        device = kwargs.get("device") if func is torch.tensor else None
        if device is None:
            return func(*args, **kwargs)
        return func(*args, **{**kwargs, "device": CPU}).to(device)


@contextmanager
def labelled_devices() -> Iterator[None]:
    """Within it DEVICES exist."""
    with Operations(), FromAndToNumbers():
        yield


def run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """`func` on the CPU tensors, its results labelled with the device of its arguments."""
    device = kwargs.get("device") or device_of(func, args, kwargs)
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": CPU}
    given = {id(leaf.held): leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Labelled)}
    held_args, held_kwargs = tree_map(lambda leaf: getattr(leaf, "held", leaf), (args, kwargs))

    def label(result: Any) -> Any:
        if not isinstance(result, torch.Tensor) or device == CPU:
            return result
        given_one = given.get(id(result))  # the operation was one in place
        return Labelled(result, torch.device(device)) if given_one is None else given_one

    return tree_map(label, func(*held_args, **held_kwargs))


def device_of(func: Any, args: tuple, kwargs: dict[str, Any]) -> torch.device:
    """The one device of all tensors; RuntimeError if there are two."""
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
    if func in CROSS_DEVICES + INDEX_BY_CPU:
        return tensors[0].device if tensors else CPU
    devices = {tensor.device for tensor in tensors if tensor.dim() or tensor.device != CPU}
    if len(devices) > 1:
        raise RuntimeError(f"{func} was given tensors on {sorted(map(str, devices))}")
    return next(iter(devices), CPU)


@contextmanager
def counted_moves() -> Iterator[list[torch.Size]]:
    """The shape of every tensor, empty ones aside, that is copied from one device to another."""
    moves: list[torch.Size] = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
        ) -> Any:
            kwargs = kwargs or {}
            target = kwargs.get("device") if func is aten._to_copy.default else None
            if target is not None and target != args[0].device and args[0].numel():
                moves.append(args[0].shape)
            return func(*args, **kwargs)

    with Counting():
        yield moves
