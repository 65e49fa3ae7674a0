"""A state dict whose tensors are not read yet.

What the tools do to weights is said on these: names, dtypes and shapes of the result are known before a
byte of data is read, and then one tensor at a time is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tensor:
    """A tensor that `load` reads or computes; it has `dtype` and `shape`, on the CPU, contiguous."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


State = dict[str, Tensor]  # by the names of the published checkpoints


def in_memory(tensors: Mapping[str, torch.Tensor]) -> State:
    """The state dict of a model as a State."""
    return {name: _held(tensor.detach().contiguous()) for name, tensor in tensors.items()}


def _held(tensor: torch.Tensor) -> Tensor:
    return Tensor(tensor.dtype, tuple(tensor.shape), lambda: tensor)
