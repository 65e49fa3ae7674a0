"""The keys and values of many conversations: one row each in buffers that all share.

row 0   ████████████░░░░░░░░    answers: takes a token with every step
row 1   ██████░░░░░░░░░░░░░░    answers
row 2   ███████████████░░░░░    idle: kept for a prompt that begins alike
        0                  T    every row is filled from the front, so no token ever moves
"""

from __future__ import annotations

from typing import Any

import torch

from chatglm.hub.generation_chatglm import STEP, GrowingCache, GrowingLayer
from chatglm.hub.layers_chatglm import device_of


class RowLayer(GrowingLayer):
    """One row of a layer's buffers [1, G, T, D] as the cache of a single conversation."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self._buffers = keys, values
        self.keep(length)

    def _has_room(self, end: int) -> bool:
        return True  # Rows.make_room has seen to it


class StepLayer:
    """The first rows of a layer's buffers, to each of which a step adds one token at its own place."""

    def __init__(
        self, keys: torch.Tensor, values: torch.Tensor, ends: torch.Tensor, rows: torch.Tensor, longest: int
    ) -> None:
        self.keys, self.values, self.ends, self.rows, self.longest = keys, values, ends, rows, longest

    def update(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [n, G, 1, D] at the ends of the rows; return keys and values [n, G, longest, D]."""
        self.keys[self.rows, :, self.ends] = key[:, :, 0].to(self.keys.dtype)
        self.values[self.rows, :, self.ends] = value[:, :, 0].to(self.values.dtype)
        number = len(self.rows)
        return self.keys[:number, :, : self.longest], self.values[:number, :, : self.longest]


class StepCache:
    """What `OneTokenStep` takes for a cache."""

    def __init__(self, layers: list[StepLayer]) -> None:
        self.layers = layers


class Rows:
    """Buffers [number, G, T, D] for keys and values of each layer; T grows by STEP up to `context`."""

    def __init__(self, model: Any, number: int, context: int) -> None:
        config = model.config
        self.number, self.context, self.room = number, context, 0
        self.shape = config.num_key_value_heads, config.head_dim
        self.dtype = model.cache_dtype or model.dtype
        devices = [device_of(block) for block in model.transformer.blocks]
        self.layers = [(self._empty(0, device), self._empty(0, device)) for device in devices]

    @property
    def most_bytes(self) -> int:
        """What the buffers take when a row has been filled to the end of the context."""
        values = 2 * len(self.layers) * self.number * self.shape[0] * self.shape[1]
        return values * self._rounded(self.context) * self.dtype.itemsize

    def make_room(self, length: int) -> None:
        """Let every row have `length` tokens and one more."""
        if length < self.room:
            return
        room = self._rounded(length)
        for i in range(len(self.layers)):
            self.layers[i] = tuple(self._grown(states, room) for states in self.layers[i])
        self.room = room

    def cache(self, row: int, length: int) -> GrowingCache:
        """The first `length` tokens of a row, as a cache that writes into it; until `make_room` grows the buffers."""
        cache = GrowingCache(0)
        cache.layers = [
            RowLayer(keys[row : row + 1], values[row : row + 1], length) for keys, values in self.layers
        ]
        return cache

    def step(self, lengths: list[int], longest: int) -> tuple[StepCache, torch.Tensor | None]:
        """A cache that adds a token to the rows 0 to n - 1, and who may see what: [n, 1, 1, longest].

        `lengths` are the tokens of these rows, `longest` what the longest one that counts will have. The mask is None
        where all is visible.
        """
        device = self.layers[0][0].device
        ends, rows = torch.tensor(lengths, device=device), torch.arange(len(lengths), device=device)
        cache = StepCache([StepLayer(keys, values, ends, rows, longest) for keys, values in self.layers])
        if all(length + 1 >= longest for length in lengths):
            return cache, None
        visible = torch.arange(longest, device=device) <= ends[:, None]
        return cache, visible[:, None, None]

    def copy(self, source: int, target: int, length: int) -> None:
        """Give `target` the first `length` tokens of `source`."""
        for keys, values in self.layers:
            keys[target, :, :length] = keys[source, :, :length]
            values[target, :, :length] = values[source, :, :length]

    def swap(self, first: int, second: int, length: int) -> None:
        """Exchange the first `length` tokens of two rows."""
        for states in (each for layer in self.layers for each in layer):
            kept = states[first, :, :length].clone()
            states[first, :, :length] = states[second, :, :length]
            states[second, :, :length] = kept

    def _rounded(self, length: int) -> int:
        return (length // STEP + 1) * STEP

    def _empty(self, room: int, device: torch.device) -> torch.Tensor:
        return torch.zeros(self.number, self.shape[0], room, self.shape[1], dtype=self.dtype, device=device)

    def _grown(self, states: torch.Tensor, room: int) -> torch.Tensor:
        grown = self._empty(room, states.device)  # zeros: a row that counts for nothing must not bring in NaN
        grown[:, :, : states.shape[2]] = states
        return grown
