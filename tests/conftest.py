"""What every test shares. Nothing here imports ``chatglm`` at the top; tests/hub does without."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer

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


# ---- models of both families, one after the other


@pytest.fixture(scope="module", params=["chatglm", "chatglm2"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def shared_model(family: str) -> PreTrainedModel:
    """A tiny model, for tests that change nothing on it."""
    from helpers import tiny_model

    return tiny_model(family)


@pytest.fixture
def model(shared_model: PreTrainedModel) -> PreTrainedModel:
    """A copy for one test alone."""
    return copy.deepcopy(shared_model)


@pytest.fixture(scope="module")
def ids(family: str) -> torch.Tensor:
    """A prompt and the beginning of an answer."""
    import torch
    from helpers import ANSWER, prompt

    return torch.cat((prompt(family), ANSWER), dim=1)


# ---- tokenizers of both families


@pytest.fixture(scope="module")
def tokenizer(family: str, tmp_path_factory: pytest.TempPathFactory) -> ChatGLMTokenizer:
    """A small vocabulary, in which most Chinese characters are three byte tokens."""
    from vocabularies import train_vocabulary

    from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer

    return ChatGLMTokenizer(train_vocabulary(family, tmp_path_factory.mktemp(family)))


@pytest.fixture(scope="module")
def published(family: str, shared: Path) -> ChatGLMTokenizer:
    """The published vocabulary."""
    from vocabularies import PUBLISHED

    from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer

    return ChatGLMTokenizer(shared / "tokenizers" / PUBLISHED[family])


# ---- folders of small random models, with everything that a published folder has but size


def save_tiny_model(family: str, folder: Path) -> Path:
    """A random model of two layers with its tokenizer, saved as users save."""
    import torch
    from vocabularies import train_vocabulary, vocabulary_config

    from chatglm.hub.configuration_chatglm import ChatGLMConfig
    from chatglm.hub.modeling_chatglm import ChatGLMForConditionalGeneration
    from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer

    tokenizer = ChatGLMTokenizer(train_vocabulary(family, folder))
    sizes = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    # Published vocabularies are filled up too.
    sizes |= vocabulary_config(tokenizer, spare=-len(tokenizer) % 16)
    if family == "chatglm":
        config = ChatGLMConfig.chatglm_6b(**sizes, inner_hidden_size=128)
    else:
        config = ChatGLMConfig(**sizes, ffn_hidden_size=128, kv_channels=16, seq_length=512)
    torch.manual_seed(0)
    model = ChatGLMForConditionalGeneration(config).half()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_v1_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("chatglm", tmp_path_factory.mktemp("tiny-v1"))


@pytest.fixture(scope="session")
def tiny_v2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("chatglm2", tmp_path_factory.mktemp("tiny-v2"))


@pytest.fixture(scope="session", params=["chatglm", "chatglm2"])
def tiny_folder(request: pytest.FixtureRequest) -> Path:
    """Both families, one after the other."""
    short = {"chatglm": "v1", "chatglm2": "v2"}[request.param]
    return request.getfixturevalue(f"tiny_{short}_folder")
