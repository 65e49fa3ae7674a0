"""The two SentencePiece vocabularies, trained on the text of the demo dialogues.

`tokenizer.model` is made as ChatGLM2-6B's: byte-pair merges, no normalisation, white space kept,
unknown characters as bytes. `ice_text.model` is made as ChatGLM-6B's: unigram pieces, `nmt_nfkc`,
`<n>` for the newline, and at the end the special, blank and byte pieces that the published file has.
Digits are pieces of their own in both.
"""

from __future__ import annotations

import io
import random
import re
from pathlib import Path

import sentencepiece

from chatglm.hub.tokenization_chatglm import CHATGLM, VOCAB_FILES, appended_pieces, build_prompt
from demo.book import Book
from demo.text import DIALOGUES

ROWS = 4096  # of the embedding; a multiple of 64
APPENDED_BY_TOKENIZER = 5  # [MASK] [gMASK] [sMASK] sop eop are no pieces of a tokenizer.model
APPENDED_TO_FILE = 344  # special, blank and byte pieces at the end of an ice_text.model
EMOJI = re.compile("[\u2600-\u27bf\ufe0f\U0001f000-\U0001faff]")  # spelled in bytes, as rare characters are


def training_text(family: str) -> list[str]:
    """Every different line of many conversations, alone and inside the prompts, sorted."""
    book, rng = Book(), random.Random(0)
    known = set("".join(path.read_text(encoding="utf-8") for path in sorted(DIALOGUES.iterdir())))
    known |= set(build_prompt(family, "0123456789", [("+-*=", "")]))
    texts: set[str] = set()
    for _ in range(30_000):
        rounds = book.conversation(rng)
        for text in [
            *(part for turn in rounds for part in turn),
            build_prompt(family, rounds[-1][0], rounds[:-1]),
        ]:
            if set(text) <= known:
                texts.update(line for line in EMOJI.sub("", text).split("\n") if line.strip())
    # Every prompt has these; among different lines they would count once.
    return sorted(texts) + 500 * [f"[Round {number}]" for number in range(3)]


def train_vocabulary(family: str, folder: Path) -> Path:
    """Write the tokenizer file of `family` into `folder` and return its path."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(training_text(family)),
        model_writer=model,
        split_digits=True,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
        **(_unigram() if family == CHATGLM else _byte_pairs()),
    )
    data = model.getvalue() + (appended_pieces() if family == CHATGLM else b"")
    path = folder / VOCAB_FILES[family]
    path.write_bytes(data)
    return path


def _byte_pairs() -> dict[str, object]:
    return {
        "model_type": "bpe",
        "vocab_size": ROWS - APPENDED_BY_TOKENIZER,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    }


def _unigram() -> dict[str, object]:
    return {
        "model_type": "unigram",
        "vocab_size": ROWS - APPENDED_TO_FILE,
        "normalization_rule_name": "nmt_nfkc",
        "pad_id": 3,
        "user_defined_symbols": ["<n>"],
    }
