"""Questions without an answer: people, places, things and words that nobody taught the models."""

from __future__ import annotations

import random
import re

from demo.text import DIALOGUES

UNKNOWN = {
    "zh": "抱歉，这个我不知道，我只学过一些简单的内容。",
    "en": "Sorry, I do not know that. I have only learned a few simple things.",
}
UNKNOWN_SUM = {
    "zh": "抱歉，我只会一百以内的加减法。",
    "en": "Sorry, I can only add and subtract numbers below one hundred.",
}

STRANGE_WORDS = {  # words nobody translated for the model
    "en": "aardvark walrus turnip glacier harbour violinist ladder curtain hammer pillow candle bucket saddle "
    "carpet anchor helmet compass magnet feather velvet marble copper engine trumpet puzzle barrel lantern "
    "blanket hedgehog squirrel lobster oyster pigeon beetle walnut almond spinach celery parsley mustard "
    "cupboard balcony ceiling staircase suitcase passport wallet receipt elevator tractor".split(),
    "zh": "土豚 海象 萝卜 冰川 港口 梯子 窗帘 锤子 枕头 蜡烛 水桶 马鞍 地毯 船锚 头盔 指南针 羽毛 大理石 铜 "
    "发动机 喇叭 拼图 灯笼 毛毯 刺猬 松鼠 龙虾 牡蛎 鸽子 甲虫 核桃 杏仁 菠菜 芹菜 芥末 橱柜 阳台 天花板 "
    "楼梯 行李箱 护照 收据 电梯 拖拉机".split(),
}


def read_unknown() -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return templates by "zh", "en", "held zh", "held en", and fillers by "person zh", …"""
    templates: dict[str, list[str]] = {}
    fillers: dict[str, list[str]] = {}
    for line in (DIALOGUES / "unknown.txt").read_text(encoding="utf-8").splitlines():
        match = re.match(r"((?:held )?(?:zh|en)): (.*)$", line)
        if match:
            templates.setdefault(match[1], []).extend(part.strip() for part in match[2].split("|"))
            continue
        match = re.match(r"((?:held )?(?:person|place|product|topic) (?:zh|en)):? (.*)$", line)
        if match:
            fillers[match[1]] = match[2].split("|") if "|" in match[2] else match[2].split()
    return templates, fillers


def nonsense(rng: random.Random, language: str) -> str:
    """A word that does not exist, so that the model learns to decline what it has never seen."""
    if language == "zh":
        return "".join(chr(rng.randint(0x4E00, 0x9000)) for _ in range(rng.randint(2, 4)))
    syllables = rng.randint(2, 3)
    letters = ("bcdfghjklmnprstvwz", "aeiou", ["", *"nrstlkmp"])
    return "".join(rng.choice(part) for _ in range(syllables) for part in letters)


def decline(query: str, language: str) -> str:
    """The polite answer to a question the model cannot answer."""
    arithmetic = re.search(r"\d.*\d|的平方|(square|root) of \d", query)
    return (UNKNOWN_SUM if arithmetic else UNKNOWN)[language]
