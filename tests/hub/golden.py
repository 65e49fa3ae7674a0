"""Reading the reference data: model fixtures as folders, cases as tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel

SHARED = Path(__file__).resolve().parents[3] / "shared"
NOT_MODELS = ("rope_tables", "tokenizer_")
TOKENIZER_FILES = {  # of the fixtures that have a published vocabulary
    "v0_real": "chatglm-6b/ice_text.model",
    "slim_real": "chatglm-6b/ice_text.model",
    "v1_real": "chatglm-6b/ice_text.model",
    "v2_real": "chatglm2-6b/tokenizer.model",
}


class Golden:
    """One fixture: its config, its weights and its cases."""

    def __init__(self, name: str, golden: Path) -> None:
        self.name = name
        self.meta = json.loads((golden / f"{name}.json").read_text(encoding="utf-8"))
        self.tensors = load_file(golden / f"{name}.safetensors")
        self.config: dict[str, Any] = self.meta["config"]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        stored = {k.removeprefix("w::"): v for k, v in self.tensors.items() if k.startswith("w::")}
        formulas = self.meta.get("generated_weights", {})
        return stored | {key: generated_matrix(**formula) for key, formula in formulas.items()}

    def case(self, name: str) -> dict[str, Any]:
        return next(case for case in self.meta["cases"] if case["name"] == name)

    def part(self, case: str, part: str) -> dict[str, torch.Tensor]:
        """The tensors of `case` whose name goes on with `part`, for instance "in" or "step1::out"."""
        head = f"c::{case}::{part}::"
        return {k.removeprefix(head): v for k, v in self.tensors.items() if k.startswith(head)}

    def folder(self, make_folder: Callable, folder: Path) -> Path:
        """The fixture as a Hub folder, with its tokenizer where it has one."""
        file = TOKENIZER_FILES.get(self.name)
        file = file and SHARED / "tokenizers" / file
        return make_folder(folder, self.config, self.weights, self.meta.get("tokenizer_config"), file)

    def load(self, make_folder: Callable, folder: Path, **kwargs: Any) -> PreTrainedModel:
        """The model in float32, loaded from a Hub folder in the dtype of its file first."""
        self.folder(make_folder, folder)
        auto = AutoModel
        if self.meta.get("auto_class") == "AutoModelForSequenceClassification":
            auto = AutoModelForSequenceClassification
        return auto.from_pretrained(folder, trust_remote_code=True, **kwargs).float().eval()


def fixture_names() -> list[str]:
    """All model fixtures; empty where there is no reference data."""
    names = sorted(path.stem for path in (SHARED / "golden").glob("*.json"))
    return [name for name in names if not name.startswith(NOT_MODELS)]


def cases_of_kind(*kinds: str) -> list[tuple[str, str]]:
    """(fixture, case) of all cases of these kinds."""
    found = []
    for name in fixture_names():
        meta = json.loads((SHARED / "golden" / f"{name}.json").read_text(encoding="utf-8"))
        found += [(name, case["name"]) for case in meta.get("cases", []) if case["kind"] in kinds]
    return found


def each_case(*kinds: str) -> pytest.MarkDecorator:
    """Runs a test with (name, case) of all cases of these kinds."""
    cases = cases_of_kind(*kinds)
    return pytest.mark.parametrize(("name", "case"), cases, ids=["-".join(case) for case in cases])


def generated_matrix(
    rows: int,
    cols: int,
    seed: int,
    scale: float,
    zero_from: int | None = None,
    zero_first: int = 0,
    prepend_zero_rows: int = 0,
    dtype: str = "float16",
) -> torch.Tensor:
    """The big matrices that the fixtures give by a formula (32-bit wrap-around arithmetic)."""
    wrap = 0xFFFFFFFF
    i = torch.arange(rows, dtype=torch.int64)[:, None]
    j = torch.arange(cols, dtype=torch.int64)[None, :]
    h = (_times(i, 2654435761) + _times(j, 2246822519) + seed * 3266489917 % (wrap + 1)) & wrap
    h = _times(h ^ (h >> 15), 2246822519)
    h = _times(h ^ (h >> 13), 3266489917)
    h = h ^ (h >> 16)
    u = (h >> 8).double() / 2**24 - 0.5
    matrix = (u * scale).to(getattr(torch, dtype))
    if zero_from is not None:
        matrix[zero_from:] = 0
    matrix[:zero_first] = 0
    return torch.cat((matrix.new_zeros(prepend_zero_rows, cols), matrix))


def _times(x: torch.Tensor, factor: int) -> torch.Tensor:
    """x * factor modulo 2^32 without leaving int64: the factor in two halves."""
    low, high = factor & 0xFFFF, factor >> 16
    return (x * low + ((x * high & 0xFFFF) << 16)) & 0xFFFFFFFF
