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


# ---- small random models, with everything that a published folder has but size

TEXT = [
    "你好，我是一个小模型。今天天气很好，我们去公园走走吧！",
    "Hello, I am a small model. The weather is fine today; let us take a walk.",
    "[Round 1]\n\n问：你是谁？\n\n答：我是示例。",
    "1 + 2 = 3，10 - 4 = 6。",
]


def train_tokenizer(family: str, folder: Path) -> Path:
    """A SentencePiece model of some hundred pieces, in the manner of the published ones."""
    import io

    from sentencepiece import SentencePieceTrainer

    settings: dict = {"model_type": "bpe", "normalization_rule_name": "identity"}
    name = "tokenizer.model"
    if family == "chatglm":
        name = "ice_text.model"
        settings = {
            "model_type": "unigram",
            "control_symbols": ["<pad>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"],
            "user_defined_symbols": ["<n>", "<|tab|>", *(f"<|blank_{n}|>" for n in range(2, 81))],
        }
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 20),
        model_writer=model,
        vocab_size=512,
        hard_vocab_limit=False,
        byte_fallback=True,
        minloglevel=2,
        **settings,
    )
    path = folder / name
    path.write_bytes(model.getvalue())
    return path


def save_tiny_model(family: str, folder: Path) -> Path:
    """A random model of two layers with its tokenizer, saved as users save."""
    import torch

    from chatglm.hub.configuration_chatglm import ChatGLMConfig
    from chatglm.hub.modeling_chatglm import ChatGLMForConditionalGeneration
    from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer

    tokenizer = ChatGLMTokenizer(train_tokenizer(family, folder))
    sizes = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    rows = (len(tokenizer) + 15) // 16 * 16  # published vocabularies are filled up too
    if family == "chatglm":
        ids = {
            "bos_token_id": tokenizer.sop_token_id,
            "eos_token_id": tokenizer.eop_token_id,
            "mask_token_id": tokenizer.get_command("[MASK]"),
            "gmask_token_id": tokenizer.gmask_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        config = ChatGLMConfig.chatglm_6b(**sizes, **ids, vocab_size=rows, inner_hidden_size=128)
    else:
        config = ChatGLMConfig(
            **sizes, padded_vocab_size=rows, ffn_hidden_size=128, kv_channels=16, seq_length=512
        )
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
