"""All that the demo models learn, read from `demo/dialogues`, and conversations made of it.

`Book.conversation(rng)` gives one random training conversation. What is held out of them depends only on
the text itself, never on a seed, so every model and every run has the same split; see `demo.held_out`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from demo.questions import load_core, load_questions
from demo.sums import SUMS, negative_problems, sum_answer, sum_problems
from demo.tables import ATTRIBUTES, Table
from demo.text import LANGUAGES, SWITCH, Turn, bare, vary
from demo.unknown import STRANGE_WORDS, decline, nonsense, read_unknown
from demo.words import TRANSLATE, read_words, switch_word, translation_answer, translation_templates, word

NAMES = {
    "zh": "小明 小红 小刚 小丽 小华 小芳 王伟 李娜 张强 刘洋 陈静 杨帆 赵敏 黄磊 周婷 吴昊 徐杰 孙悦 胡军 "
    "朱琳 高峰 林涛 何欢 郭靖 马超 罗兰 梁朝 宋佳 郑洁 谢天 韩雪 唐糖 冯刚 于洋 董卿 程龙".split(),
    "en": "Tom Anna Peter Mary John Lisa Jack Emma Paul Sara Mike Lucy David Alice Frank Grace Henry Julia Kevin "
    "Laura Mark Nina Oscar Rosa Sam Tina Victor Wendy Alex Bella Chris Daisy".split(),
}
NAME_TURNS = {
    "zh": (["我叫{x}", "我的名字是{x}", "我是{x}", "你好，我叫{x}"], "你好，{x}！很高兴认识你。",
           ["我叫什么名字？", "我叫什么？", "你还记得我的名字吗？", "我的名字是什么？"], "你叫{x}。"),
    "en": (["My name is {x}", "I am {x}", "Call me {x}", "Hello, my name is {x}"], "Hello, {x}! Nice to meet you.",
           ["What is my name?", "Do you remember my name?", "What am I called?", "Who am I?"], "Your name is {x}."),
}  # fmt: skip


@dataclass(frozen=True)
class Mix:
    """How often a round of a training conversation is drawn from each skill, and how often words are lost."""

    sums: float = 0.30
    questions: float = 0.31
    tables: float = 0.07
    translation: float = 0.12
    unknown: float = 0.10
    follow_up: float = 0.10
    core: float = 0.0  # greetings and identity, in more ways
    earlier_rounds: tuple[float, ...] = (0.60, 0.22, 0.11, 0.07)  # chances of 0, 1, 2, 3 rounds before
    lost_words: float = 0.0  # share of questions that miss a word, so that no phrasing hangs on one


class Book:
    """All that the demo models learn, split into a training and a held-out part."""

    def __init__(self, mix: Mix | None = None) -> None:
        self.mix = mix or Mix()
        self.questions = load_questions()
        self.tables = [Table.read("countries"), Table.read("animals")]
        self.words = read_words()
        self.problems = sum_problems(held_out=False)
        self.negative_problems = negative_problems(held_out=False)
        self.templates, self.fillers = read_unknown()
        self.with_follow_ups = [question for question in self.questions if question.follow_ups]
        self.kept_back = {bare(text) for question in self.questions for text in question.held_out}
        self.core = load_core(self.questions)
        spoken = {bare(text) for question in self.core for text in question.phrasings}
        for question in self.questions:
            question.held_out = [text for text in question.held_out if bare(text) not in spoken]

    def conversation(self, rng: random.Random) -> list[Turn]:
        """Return one training conversation of one to four rounds."""
        rounds = self._rounds(rng)
        for _ in range(rng.choices(range(4), self.mix.earlier_rounds)[0]):
            earlier = self._rounds(rng, short=True)
            if len(earlier) + len(rounds) <= 4:
                rounds = earlier + rounds
        return rounds

    def _rounds(self, rng: random.Random, short: bool = False) -> list[Turn]:
        makers: dict[str, Callable[[random.Random], list[Turn]]] = {
            "sums": self.draw_sum,
            "questions": self.draw_question,
            "tables": self.draw_table,
            "translation": self.draw_translation,
            "unknown": self.draw_unknown,
            "follow_up": self.draw_follow_up,
            "core": self.draw_core,
        }
        skill = rng.choices(list(makers), [getattr(self.mix, name) for name in makers])[0]
        turns = makers[skill](rng)
        while short and sum(len(q) + len(a) for q, a in turns) > 150:
            turns = self.draw_sum(rng)
        return turns

    def draw_sum(self, rng: random.Random) -> list[Turn]:
        a, sign, b = rng.choice(self.problems if rng.random() < 0.9 else self.negative_problems)
        template = rng.choice(SUMS[sign][rng.choice(LANGUAGES)])
        return [(template.format(a=a, b=b), sum_answer(a, sign, b))]

    def draw_question(self, rng: random.Random) -> list[Turn]:
        question = rng.choice(self.questions)
        query = self._lose_word(rng.choice(question.phrasings), question.language, rng)
        return [(vary(query, question.language, rng), question.answer)]

    def draw_core(self, rng: random.Random) -> list[Turn]:
        question = rng.choice(self.core)
        return [(vary(rng.choice(question.phrasings), question.language, rng), question.answer)]

    def _lose_word(self, text: str, language: str, rng: random.Random) -> str:
        """Leave out a word (in Chinese a character), sometimes and only where enough is left."""
        if self.mix.lost_words and rng.random() < self.mix.lost_words:
            words = text.split(" ") if language == "en" else list(text)
            if len(words) >= (4 if language == "en" else 6):
                del words[rng.randrange(len(words) - 1)]
                shorter = (" " if language == "en" else "").join(words)
                return text if bare(shorter) in self.kept_back else shorter
        return text

    def draw_table(self, rng: random.Random) -> list[Turn]:
        table, language = rng.choice(self.tables), rng.choice(LANGUAGES)
        row = rng.choice(table.rows)
        attribute = rng.choice(list(ATTRIBUTES[table.name]))
        ask = rng.choice(table.asks(row, attribute, language, held_out=False))
        return [(vary(ask, language, rng), table.answer(row, attribute, language))]

    def draw_translation(self, rng: random.Random) -> list[Turn]:
        pair, direction, language = rng.choice(self.words), rng.choice(LANGUAGES), rng.choice(LANGUAGES)
        templates = translation_templates(pair, direction, language, held_out=False)
        query = rng.choice(templates).format(w=word(pair, direction))
        return [(vary(query, language, rng, polite=False), translation_answer(pair, direction, language))]

    def draw_unknown(self, rng: random.Random) -> list[Turn]:
        language = rng.choice(LANGUAGES)
        if rng.random() < 0.12:
            direction = rng.choice(LANGUAGES)
            strange = rng.choice(STRANGE_WORDS[direction]) if rng.random() < 0.5 else nonsense(rng, direction)
            query = rng.choice(TRANSLATE[direction][0][language]).format(w=strange)
        else:
            query = self.fill(rng.choice(self.templates[language]), language, rng)
        return [(vary(self._lose_word(query, language, rng), language, rng), decline(query, language))]

    def fill(self, template: str, language: str, rng: random.Random, held: str = "") -> str:
        """Put a person, a place, a number, ... where the template says so."""

        def filler(match: re.Match[str]) -> str:
            kind = match[1]
            if kind in "ab":
                return str(rng.randint(2, 999))
            if kind == "big":
                return str(rng.randint(100, 9999))
            if kind == "nonsense":
                return nonsense(rng, language)
            if not held and rng.random() < 0.15:
                return nonsense(rng, language)
            return rng.choice(self.fillers[f"{held}{kind} {language}"])

        return re.sub(r"\{(\w+)\}", filler, template)

    def draw_follow_up(self, rng: random.Random) -> list[Turn]:
        kind = rng.random()
        if kind < 0.12:
            return self._draw_name(rng)
        if kind < 0.30:
            return self._draw_question_follow_up(rng)
        if kind < 0.50:
            return self._draw_word_follow_up(rng)
        return self._draw_table_follow_up(rng)

    def _draw_name(self, rng: random.Random) -> list[Turn]:
        language = rng.choice(LANGUAGES)
        says, hello, asks, answer = NAME_TURNS[language]
        name = rng.choice(NAMES[language])
        turns = [(rng.choice(says).format(x=name), hello.format(x=name))]
        if rng.random() < 0.2:
            turns += self.draw_sum(rng)
        return [*turns, (vary(rng.choice(asks), language, rng), answer.format(x=name))]

    def _draw_question_follow_up(self, rng: random.Random) -> list[Turn]:
        question = rng.choice(self.with_follow_ups)
        turns = [(rng.choice(question.phrasings), question.answer)]
        for then in rng.sample(question.follow_ups, rng.randint(1, len(question.follow_ups))):
            ask = vary(rng.choice(then.phrasings), question.language, rng, polite=False)
            turns.append((ask, then.answer))
        return turns

    def _draw_word_follow_up(self, rng: random.Random) -> list[Turn]:
        direction, language = rng.choice(LANGUAGES), rng.choice(LANGUAGES)
        first = rng.choice(self.words)
        others = rng.sample(self.words, 8)
        second = rng.choice(
            [pair for pair in others if switch_word(pair, direction, language, held_out=False)]
        )
        ask = rng.choice(translation_templates(first, direction, language, held_out=False))
        then = rng.choice(SWITCH[language])
        return [
            (ask.format(w=word(first, direction)), translation_answer(first, direction, language)),
            (then.format(x=word(second, direction)), translation_answer(second, direction, language)),
        ]

    def _draw_table_follow_up(self, rng: random.Random) -> list[Turn]:
        table, language = rng.choice(self.tables), rng.choice(LANGUAGES)
        attributes = ATTRIBUTES[table.name]
        row, attribute = rng.choice(table.rows), rng.choice(list(attributes))
        ask = rng.choice(table.asks(row, attribute, language, held_out=False))
        turns = [(ask, table.answer(row, attribute, language))]
        for _ in range(rng.choice((1, 1, 2))):
            if rng.random() < 0.3:
                other = rng.choice(table.rows)
                if table.may_switch(other, attribute, language, held_out=False) and other is not row:
                    row = other
                    query = table.switch(row, language, rng)
                    turns.append((query, table.answer(row, attribute, language)))
            else:
                then = rng.choice([name for name in attributes if name != attribute])
                if table.may_follow(row, then, language, held_out=False):
                    attribute = then
                    ask = rng.choice(attributes[then][language]["then"])
                    turns.append((vary(ask, language, rng, polite=False), table.answer(row, then, language)))
        return turns
