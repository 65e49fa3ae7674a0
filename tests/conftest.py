"""What every test shares. Nothing here imports ``chatglm`` at the top; tests/hub does without."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before transformers is imported: no test goes to the network, and remote code that a test loads is
# copied to a place of this run's own, not to the user's cache.
os.environ["HF_HUB_OFFLINE"] = "1"
_modules_cache = tempfile.TemporaryDirectory(prefix="chatglm-tests-")
os.environ["HF_MODULES_CACHE"] = _modules_cache.name

ROOT = Path(__file__).resolve().parents[1]


def pytest_unconfigure() -> None:
    _modules_cache.cleanup()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data that lies beside a developer's checkout."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no reference data: there is no folder 'shared' beside the repository")
    return folder


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """One thread: tiny models run faster so, and sums are the same on every machine."""
    import torch

    torch.set_num_threads(1)
    yield
