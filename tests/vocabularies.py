"""Small vocabularies in the manner of the published ones, trained in a moment, and the published ones."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import sentencepiece
from tiny import CHATGLM, CHATGLM2

FILES = {CHATGLM: "ice_text.model", CHATGLM2: "tokenizer.model"}
PUBLISHED = {CHATGLM: "chatglm-6b/ice_text.model", CHATGLM2: "chatglm2-6b/tokenizer.model"}
TEXT = [
    "你好，世界！今天天气真好，我们去公园玩吧。",
    "晚上睡不着应该怎么办？可以喝一杯热牛奶。",
    "问：一加一等于几？答：等于二。",
    "[Round 1] Hello world, how are you today?",
    "The quick brown fox jumps over the lazy dog.",
    "def main(): return [1, 2, 3]",
] * 4


def train_vocabulary(family: str, folder: Path) -> Path:
    """Write the tokenizer file of `family` into the folder and return its path."""
    train = train_ice_text if family == CHATGLM else train_tokenizer_model
    return train(folder / FILES[family])


def vocabulary_config(tokenizer: Any, spare: int = 0) -> dict[str, int]:
    """The fields of a config that belong to this tokenizer; `spare` rows more than it has tokens."""
    rows = len(tokenizer) + spare
    if tokenizer.family == CHATGLM2:
        return {"padded_vocab_size": rows}
    names = {"bos": "<sop>", "eos": "<eop>", "mask": "[MASK]", "gmask": "[gMASK]", "pad": "<pad>"}
    ids = {f"{key}_token_id": tokenizer.convert_tokens_to_ids(name) for key, name in names.items()}
    return {"vocab_size": rows, **ids}


def train_ice_text(path: Path) -> Path:
    """A unigram vocabulary with the pieces and the normaliser of ice_text.model."""
    controls = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
    blanks = [f"<|blank_{n}|>" for n in range(2, 17)]  # shorter runs than the published 80
    return _train(
        path,
        model_type="unigram",
        vocab_size=480,
        pad_id=3,
        control_symbols=controls,
        user_defined_symbols=["<n>", "<|tab|>", *blanks],
        normalization_rule_name="nmt_nfkc",
    )


def train_tokenizer_model(path: Path) -> Path:
    """A BPE vocabulary that keeps all white space, as tokenizer.model does."""
    return _train(
        path,
        model_type="bpe",
        vocab_size=420,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )


def _train(path: Path, **options: object) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_writer=model,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    path.write_bytes(model.getvalue())
    return path
