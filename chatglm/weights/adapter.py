"""LoRA adapters as PEFT saves them, merged into the weights they were trained on.

LoRA (https://arxiv.org/abs/2106.09685) learns W + s B A, with B [out, r], A [r, in] and
s = alpha / r, or alpha / sqrt(r) with `use_rslora` (https://arxiv.org/abs/2312.03732).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from chatglm.weights.tensors import State, Tensor
from chatglm.weights.transform import is_packed

FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(\.default)?\.weight")
# Settings under which the weights are not W + s B A.
UNSUPPORTED = ("use_dora", "fan_in_fan_out", "use_qalora", "alora_invocation_tokens")


@dataclass
class Lora:
    """An adapter: pairs of factors by the module they belong to, and tensors that replace others."""

    settings: dict[str, Any]
    factors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    replaced: State = field(default_factory=dict)

    def scaling(self, module: str) -> float:
        """What B A of `module` is multiplied by."""
        rank = self._of(module, "rank_pattern", self.settings["r"])
        alpha = self._of(module, "alpha_pattern", self.settings["lora_alpha"])
        return alpha / (rank**0.5 if self.settings.get("use_rslora") else rank)

    def _of(self, module: str, patterns: str, default: float) -> float:
        """The value of the first pattern that is the module's name or the end of it, from a dot on."""
        for pattern, value in (self.settings.get(patterns) or {}).items():
            # PEFT takes any regular expression, but writes names, escaped and anchored at most.
            name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
            if not re.fullmatch(r"[\w.]+", name):
                raise ValueError(
                    f"adapter_config.json has {patterns} {pattern!r}, which is no name of a module; merge the "
                    "adapter with PEFT's merge_and_unload and convert what that saves."
                )
            if f".{module}".endswith(f".{name}"):
                return value
        return default


def read_lora(settings: dict[str, Any], state: State) -> Lora:
    """The adapter of an adapter_config.json and the tensors beside it.

    Raises ValueError for adapters of another kind and for tensors that belong to none.
    """
    kind = settings.get("peft_type")
    odd = [name for name in UNSUPPORTED if settings.get(name)]
    if kind != "LORA" or odd:
        what = f"{odd[0]} {settings[odd[0]]!r}" if odd else f"peft_type {kind!r}"
        raise ValueError(
            f"The adapter has {what}, which cannot be merged here; merge it with PEFT's merge_and_unload "
            "and convert what that saves."
        )
    for name in ("r", "lora_alpha"):
        value = settings.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise ValueError(f"adapter_config.json has {name} {value!r} where a number above 0 belongs.")
    lora = Lora(settings)
    for name, tensor in state.items():
        match = FACTOR.fullmatch(name)
        if match:
            lora.factors.setdefault(match["module"], {})[match["factor"]] = tensor
        elif "lora_" in name:
            raise ValueError(
                f"The adapter holds {name}, which cannot be merged here; merge it with PEFT's "
                "merge_and_unload and convert what that saves."
            )
        else:  # biases that were trained, and whole layers (modules_to_save)
            lora.replaced[re.sub(r"\.modules_to_save(\.default)?", "", name)] = tensor
    if not lora.factors:
        raise ValueError("The adapter holds no lora_A and lora_B weights; give the folder that PEFT saved.")
    return lora


def merge_lora(state: State, lora: Lora, dtype: torch.dtype | None = None) -> State:
    """The weights with the adapter in them; the sum is made in float32 and rounded once.

    What was changed is in `dtype`, or in the dtype that it had.

    Raises ValueError for packed weights, and for an adapter that does not fit the weights.
    """
    if is_packed(state):
        raise ValueError(
            "An adapter cannot be merged into packed weights without losing most of it; merge it into the "
            "float checkpoint, and pack that: --merge-adapter and --quantize together do both."
        )
    merged = dict(state)
    for module, factors in lora.factors.items():
        name = f"{module}.weight"
        _check_fit(name, state.get(name), factors)
        wanted = dtype or state[name].dtype
        load = _sum(state[name], factors, lora.scaling(module), wanted)
        merged[name] = Tensor(wanted, state[name].shape, load)
    for name, tensor in lora.replaced.items():
        if name not in state or state[name].shape != tensor.shape:
            found = state[name].shape if name in state else "no such tensor"
            raise ValueError(
                f"The adapter replaces {name} by one of shape {tensor.shape}, but the checkpoint has {found}; "
                "take the checkpoint that it was trained on."
            )
        wanted = dtype or state[name].dtype
        merged[name] = Tensor(wanted, tensor.shape, _in_dtype(tensor, wanted))
    return merged


def _check_fit(name: str, weight: Tensor | None, factors: dict[str, Tensor]) -> None:
    if weight is None or set(factors) != {"A", "B"}:
        problem = "the checkpoint has no such tensor" if weight is None else "one of its factors is missing"
        raise ValueError(
            f"The adapter changes {name}, but {problem}; take the checkpoint that it was trained on."
        )
    a, b = factors["A"].shape, factors["B"].shape
    if len(a) != 2 or len(b) != 2 or (b[0], a[1]) != weight.shape or a[0] != b[1]:
        raise ValueError(
            f"The adapter's factors {b} and {a} do not make up {name} of shape {weight.shape}; take the "
            "checkpoint that it was trained on."
        )


def _sum(
    weight: Tensor, factors: dict[str, Tensor], scaling: float, dtype: torch.dtype
) -> Callable[[], torch.Tensor]:
    def load() -> torch.Tensor:
        a, b = factors["A"].load().float(), factors["B"].load().float()
        return torch.addmm(weight.load().float(), b, a, alpha=scaling).to(dtype)

    return load


def _in_dtype(tensor: Tensor, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    return lambda: tensor.load().to(dtype)
