"""Folders as the Hub has them: root files, config.json, weights; loaded as remote code.

These tests stand for users who never installed the package, so nothing here imports ``chatglm``:
its registration would take the place of the folder's own code. Run them in a process of their own,
``pytest tests/hub``; together with the other tests they skip.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import HUB_FILES

ROOT = Path(__file__).resolve().parents[2]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "chatglm" not in sys.modules:
        return
    here = Path(__file__).parent
    ours = [item for item in items if here in item.path.parents]
    if len(ours) == len(items):
        raise pytest.UsageError("a test in tests/hub imported chatglm, which they must do without")
    for item in ours:
        item.add_marker(pytest.mark.skip(reason="needs a process of its own: pytest tests/hub"))


def make_folder(
    folder: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor] | None = None,
    tokenizer_config: Mapping[str, Any] | None = None,
    tokenizer_file: Path | None = None,
) -> Path:
    """Writes a Hub folder: the root files, config.json and what else is given.

    ``weights`` become model.safetensors; tensors that share memory are written apart, as in the
    published files. ``tokenizer_file`` keeps its name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in HUB_FILES:
        shutil.copy(ROOT / name, folder / name)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    if weights is not None:
        apart = {name: tensor.detach().clone().contiguous() for name, tensor in weights.items()}
        save_file(apart, folder / "model.safetensors", metadata={"format": "pt"})
    if tokenizer_config is not None:
        text = json.dumps(tokenizer_config, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    if tokenizer_file is not None:
        shutil.copy(tokenizer_file, folder / tokenizer_file.name)
    return folder


@pytest.fixture(name="make_folder", scope="session")
def make_folder_fixture():
    return make_folder
