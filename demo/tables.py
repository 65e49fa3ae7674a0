"""Countries and animals: things with attributes, and all the ways to ask for one."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from demo.text import DIALOGUES, SHARE, SWITCH, chosen

ATTRIBUTES: dict[str, dict[str, dict[str, dict[str, list[str]]]]] = {
    "countries": {
        "capital": {
            "zh": {
                "ask": ["{x}的首都是哪里？", "{x}的首都是什么？", "{x}的首都是哪座城市？", "哪里是{x}的首都？"],
                "then": ["它的首都是哪里？", "那里的首都是什么？", "它的首都呢？"],
                "say": ["{x}的首都是{v}。"],
            },
            "en": {
                "ask": ["What is the capital of {x}?", "Which city is the capital of {x}?",
                        "Tell me the capital of {x}", "What's the capital city of {x}?"],
                "then": ["What is its capital?", "And its capital?", "Which city is its capital?"],
                "say": ["The capital of {x} is {v}."],
            },
        },
        "continent": {
            "zh": {
                "ask": ["{x}在哪个洲？", "{x}在哪里？", "{x}位于哪个大洲？", "{x}是哪个洲的国家？"],
                "then": ["它在哪个洲？", "它在哪里？", "这个国家在哪里？"],
                "say": ["{x}在{v}。"],
            },
            "en": {
                "ask": ["Where is {x}?", "Which continent is {x} in?", "On which continent is {x}?",
                        "What continent does {x} belong to?"],
                "then": ["Where is it?", "Which continent is it in?", "Where is that country?"],
                "say": ["{x} is in {v}."],
            },
        },
        "famous": {
            "zh": {
                "ask": ["{x}有什么有名的？", "{x}以什么闻名？", "说说{x}的特色", "{x}最有名的是什么？"],
                "then": ["它有什么有名的？", "它以什么闻名？", "它有什么特色？"],
                "say": ["{x}以{v}闻名。"],
            },
            "en": {
                "ask": ["What is {x} famous for?", "What is {x} known for?", "What is special about {x}?",
                        "Tell me what {x} is famous for"],
                "then": ["What is it famous for?", "What is it known for?", "What is special about it?"],
                "say": ["{x} is famous for {v}."],
            },
        },
    },
    "animals": {
        "is": {
            "zh": {
                "ask": ["{x}是什么？", "{x}是什么动物？", "介绍一下{x}", "什么是{x}？"],
                "then": ["它是什么动物？"],
                "say": ["{x}是{v}。"],
            },
            "en": {
                "ask": ["What is a {x}?", "What kind of animal is a {x}?", "Tell me about the {x}", "Describe a {x}"],
                "then": ["What kind of animal is it?"],
                "say": ["A {x} is {v}."],
            },
        },
        "food": {
            "zh": {
                "ask": ["{x}吃什么？", "{x}喜欢吃什么？", "{x}以什么为食？", "{x}的食物是什么？"],
                "then": ["它吃什么？", "它喜欢吃什么？", "它的食物是什么？"],
                "say": ["{x}吃{v}。"],
            },
            "en": {
                "ask": ["What does a {x} eat?", "What do you feed a {x}?", "What is the food of a {x}?",
                        "What does the {x} like to eat?"],
                "then": ["What does it eat?", "What is its food?", "What does it like to eat?"],
                "say": ["A {x} eats {v}."],
            },
        },
        "home": {
            "zh": {
                "ask": ["{x}住在哪里？", "{x}生活在哪里？", "哪里有{x}？", "在哪里能看到{x}？"],
                "then": ["它住在哪里？", "它生活在哪里？", "在哪里能看到它？"],
                "say": ["{x}生活在{v}。"],
            },
            "en": {
                "ask": ["Where does a {x} live?", "Where do I find a {x}?", "What is the home of a {x}?",
                        "Where can I see a {x}?"],
                "then": ["Where does it live?", "Where is it found?", "Where can I see it?"],
                "say": ["A {x} lives in {v}."],
            },
        },
        "feature": {
            "zh": {
                "ask": ["{x}有什么特点？", "{x}有什么特别的？", "{x}的特点是什么？", "说说{x}的特点"],
                "then": ["它有什么特点？", "它有什么特别的？", "它的特点是什么？"],
                "say": ["{v}。"],
            },
            "en": {
                "ask": ["What is special about a {x}?", "Tell me something special about the {x}",
                        "What makes a {x} special?", "What is interesting about a {x}?"],
                "then": ["What is special about it?", "What makes it special?", "What is interesting about it?"],
                "say": ["{v}."],
            },
        },
    },
}  # fmt: skip

ARTICLE_AN = re.compile(r"\b([Aa]) (?=(?:elephant|ant|owl|eagle|octopus)\b)")


def phrase(template: str, x: str, v: str = "", language: str = "en") -> str:
    """Fill a template of a table; in English with the right article and a capital at the start."""
    text = template.format(x=x, v=v)
    if language == "en":
        text = ARTICLE_AN.sub(r"\1n ", text)
        text = text[:1].upper() + text[1:]
    return text


@dataclass
class Table:
    """Things with attributes, asked for directly or after another question about the thing."""

    name: str
    rows: list[dict[str, str]]

    @classmethod
    def read(cls, name: str) -> Table:
        lines = (DIALOGUES / f"{name}.tsv").read_text(encoding="utf-8").splitlines()
        head = lines[0].split("\t")
        return cls(name, [dict(zip(head, line.split("\t"), strict=True)) for line in lines[1:]])

    def answer(self, row: dict[str, str], attribute: str, language: str) -> str:
        template = ATTRIBUTES[self.name][attribute][language]["say"][0]
        return phrase(template, row[language], row[f"{attribute}_{language}"], language)

    def asks(self, row: dict[str, str], attribute: str, language: str, held_out: bool) -> list[str]:
        """Direct questions of the training or of the held-out part."""
        templates = ATTRIBUTES[self.name][attribute][language]["ask"]
        return [
            phrase(template, row[language], language=language)
            for i, template in enumerate(templates)
            if chosen(SHARE, row["en"], attribute, language, template) == held_out
            or (not held_out and i == 0)
            if not (held_out and i == 0)
        ]

    def may_follow(self, row: dict[str, str], attribute: str, language: str, held_out: bool) -> bool:
        return chosen(1.5 * SHARE, "then", row["en"], attribute, language) == held_out

    def may_switch(self, row: dict[str, str], attribute: str, language: str, held_out: bool) -> bool:
        return chosen(1.5 * SHARE, "switch", row["en"], attribute, language) == held_out

    def switch(self, row: dict[str, str], language: str, rng: random.Random) -> str:
        """The question that asks for the same attribute of another thing."""
        x = row[language]
        if self.name == "animals" and language == "en":
            x = ("an " if x[0] in "aeo" else "a ") + x
        return rng.choice(SWITCH[language]).format(x=x)
