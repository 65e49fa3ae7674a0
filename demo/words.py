"""Word pairs and the ways to ask for a translation, in both directions and both languages."""

from __future__ import annotations

from demo.text import DIALOGUES, SHARE, chosen

TRANSLATE = {  # direction -> (templates by language, answers by language); {w} the word, {t} its translation
    "zh": (
        {"zh": ["{w}用英语怎么说？", "{w}的英文是什么？", "把{w}翻译成英语", "“{w}”的英语单词是什么？",
                "{w}英文怎么说？"],
         "en": ["How do you say {w} in English?", "What is {w} in English?", "Translate {w} into English",
                "What is the English word for {w}?"]},
        {"zh": "{w}的英文是 {t}。", "en": "{w} is {t} in English."},
    ),
    "en": (
        {"zh": ["{w}是什么意思？", "{w}用中文怎么说？", "把{w}翻译成中文", "{w}的中文是什么？",
                "英语单词{w}是什么意思？"],
         "en": ["How do you say {w} in Chinese?", "What is {w} in Chinese?", "Translate {w} into Chinese",
                "What is the Chinese word for {w}?"]},
        {"zh": "{w} 的中文是{t}。", "en": "{w} is {t} in Chinese."},
    ),
}  # fmt: skip

Pair = tuple[str, str]  # English, Chinese


def read_words() -> list[Pair]:
    """Return the (English, Chinese) pairs."""
    lines = (DIALOGUES / "words.txt").read_text(encoding="utf-8").splitlines()
    cells = [cell for line in lines if not line.startswith("#") for cell in line.split()]
    return [(cell.split("=")[0], cell.split("=")[1]) for cell in cells]


def word(pair: Pair, direction: str) -> str:
    """The word that is asked for, written in the language `direction`."""
    return pair[0] if direction == "en" else pair[1]


def translation_templates(pair: Pair, direction: str, language: str, held_out: bool) -> list[str]:
    """The phrasings of one part for this word; the first one always belongs to training."""
    templates = TRANSLATE[direction][0][language]
    out = [i > 0 and chosen(SHARE, pair[0], direction, template) for i, template in enumerate(templates)]
    return [template for template, is_out in zip(templates, out, strict=True) if is_out == held_out]


def translation_answer(pair: Pair, direction: str, language: str) -> str:
    other = "zh" if direction == "en" else "en"
    return TRANSLATE[direction][1][language].format(w=word(pair, direction), t=word(pair, other))


def switch_word(pair: Pair, direction: str, language: str, held_out: bool) -> bool:
    return chosen(SHARE, "switch", pair[0], direction, language) == held_out
