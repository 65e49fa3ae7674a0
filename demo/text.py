"""What all parts of the demo data share: languages, the split into training and held-out, ways of writing."""

from __future__ import annotations

import random
import re
import zlib
from pathlib import Path

DIALOGUES = Path(__file__).with_name("dialogues")
LANGUAGES = ("zh", "en")
SHARE = 0.1  # of the combinations of a table that are held out
SWITCH = {
    "zh": ["那{x}呢？", "{x}呢？", "那么{x}呢？"],
    "en": ["And {x}?", "What about {x}?", "How about {x}?"],
}

Turn = tuple[str, str]


def chosen(share: float, *parts: object) -> bool:
    """Whether this combination belongs to the held-out share; the same on every machine."""
    return zlib.crc32("|".join(map(str, parts)).encode()) < share * 2**32


def bare(text: str) -> str:
    """The text without case, blanks, punctuation and polite openings, which make no new phrasing."""
    text = re.sub(r"[\s，。！？、,.!?:：“”\"']", "", text.lower())
    return re.sub(r"^(请问|你好|hello|please|canyoutellme)+(?=.)", "", text)


def vary(text: str, language: str, rng: random.Random, polite: bool = True) -> str:
    """Write a question as people do: without its mark, politely, in small letters."""
    chance = rng.random()
    if chance < 0.6:
        return text
    if chance < 0.8:
        return text.rstrip("？?！!。.")
    if language == "zh":
        if chance < 0.87:
            return text.replace("？", "?").replace("，", ",")
        return ("请问" if chance < 0.94 else "你好，") + text if polite and text.endswith("？") else text
    if chance < 0.92:
        return text.lower()
    return "Hello, " + text[0].lower() + text[1:] if polite and text.endswith("?") else text
