"""Conversations for the demo models, made from the hand-written text in `demo/dialogues`.

`Book` reads the text and splits it; `Book.conversation(rng)` gives one random training conversation,
`Book.held_out()` the questions that never occur in training, by skill. The split depends only on the
text itself, never on a seed, so every model and every run has the same one.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

DIALOGUES = Path(__file__).with_name("dialogues")
LANGUAGES = ("zh", "en")
TOPICS = {  # file -> the skill it is counted under
    "greetings": "greetings and identity",
    "feelings": "everyday questions",
    "cooking": "everyday questions",
    "health": "everyday questions",
    "computers": "everyday questions",
    "nature": "everyday questions",
    "life": "everyday questions",
    "special": "lists, code and emoji",
}
TAUGHT = "questions as taught"
SHARE = 0.1  # of the combinations of a table that are held out
LARGEST = 99  # in sums

UNKNOWN = {
    "zh": "抱歉，这个我不知道，我只学过一些简单的内容。",
    "en": "Sorry, I do not know that. I have only learned a few simple things.",
}
UNKNOWN_SUM = {
    "zh": "抱歉，我只会一百以内的加减法。",
    "en": "Sorry, I can only add and subtract numbers below one hundred.",
}

Turn = tuple[str, str]


@dataclass(frozen=True)
class Item:
    """One held-out question: what was said before, what is asked, what is right."""

    skill: str
    language: str
    history: tuple[Turn, ...]
    query: str
    answer: str


@dataclass
class Question:
    """One answer with the ways to ask for it; `follow_ups` make sense only right after it."""

    skill: str
    language: str
    answer: str
    phrasings: list[str]
    held_out: list[str] = field(default_factory=list)
    follow_ups: list[Question] = field(default_factory=list)


def chosen(share: float, *parts: object) -> bool:
    """Whether this combination belongs to the held-out share; the same on every machine."""
    return zlib.crc32("|".join(map(str, parts)).encode()) < share * 2**32


def bare(text: str) -> str:
    """The text without case, blanks, punctuation and polite openings, which make no new phrasing."""
    text = re.sub(r"[\s，。！？、,.!?:：“”\"']", "", text.lower())
    return re.sub(r"^(请问|你好|hello|please|canyoutellme)+(?=.)", "", text)


# ---- hand-written questions


def read_questions(path: Path) -> Iterator[tuple[str, bool, list[str], str]]:
    """Yield (language, is follow-up, phrasings, answer) of a dialogue file.

    `zh: a | b` asks, `zh> answer` answers; `zh+:` and `zh+>` are a follow-up to the question above;
    `zh*:` marks phrasings of which none can be guessed from the others, so none is held out.
    """
    phrasings: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = re.match(r"(zh|en)([+*]?)(:|\+?>|) (.*)$", line)
        if match is None:
            raise ValueError(
                f"{path.name}, line {number}: {line[:40]!r} is neither a question nor an answer."
            )
        language, mark, kind, text = match.groups()
        if kind.endswith(">"):
            yield language, mark == "+", phrasings, text.replace("\\n", "\n")
        else:
            phrasings = [("*" if mark == "*" else "") + part.strip() for part in text.split("|")]


def split_phrasings(phrasings: list[str]) -> tuple[list[str], list[str]]:
    """Hold one phrasing out where at least four really different ones exist, never the first."""
    if phrasings[0].startswith("*"):
        return [text.lstrip("*") for text in phrasings], []
    different = list({bare(text): text for text in reversed(phrasings)}.values())[::-1]
    if len(different) < 4:
        return phrasings, []
    out = different[1 + zlib.crc32("|".join(phrasings).encode()) % (len(different) - 1)]
    return [text for text in phrasings if bare(text) != bare(out)], [out]


def load_questions() -> list[Question]:
    """Read all hand-written questions, follow-ups attached."""
    questions: list[Question] = []
    for topic, skill in TOPICS.items():
        for language, follows, phrasings, answer in read_questions(DIALOGUES / f"{topic}.txt"):
            train, out = split_phrasings(phrasings)
            if follows:
                questions[-1].follow_ups.append(Question("follow-up", language, answer, phrasings))
            else:
                questions.append(Question(skill, language, answer, train, out))
    return questions


def load_core(questions: list[Question]) -> list[Question]:
    """Return all greetings, and what else core.txt names, with the phrasings that it adds."""
    added: dict[str, list[str]] = {}
    for line in (DIALOGUES / "core.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            first, more = line.split(" => ")
            added[first] = [text.strip() for text in more.split("|")]
    core = []
    for question in questions:
        more = added.pop(question.phrasings[0], [])
        if more or question.skill == TOPICS["greetings"]:
            core.append(replace(question, phrasings=question.phrasings + more, held_out=[]))
    if added:
        raise ValueError(f"core.txt names {next(iter(added))!r}, which no dialogue file begins with.")
    return core


# ---- tables: countries, animals, words

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
SWITCH = {
    "zh": ["那{x}呢？", "{x}呢？", "那么{x}呢？"],
    "en": ["And {x}?", "What about {x}?", "How about {x}?"],
}
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
STRANGE_WORDS = {  # words nobody translated for the model
    "en": "aardvark walrus turnip glacier harbour violinist ladder curtain hammer pillow candle bucket saddle "
    "carpet anchor helmet compass magnet feather velvet marble copper engine trumpet puzzle barrel lantern "
    "blanket hedgehog squirrel lobster oyster pigeon beetle walnut almond spinach celery parsley mustard "
    "cupboard balcony ceiling staircase suitcase passport wallet receipt elevator tractor".split(),
    "zh": "土豚 海象 萝卜 冰川 港口 梯子 窗帘 锤子 枕头 蜡烛 水桶 马鞍 地毯 船锚 头盔 指南针 羽毛 大理石 铜 "
    "发动机 喇叭 拼图 灯笼 毛毯 刺猬 松鼠 龙虾 牡蛎 鸽子 甲虫 核桃 杏仁 菠菜 芹菜 芥末 橱柜 阳台 天花板 "
    "楼梯 行李箱 护照 收据 电梯 拖拉机".split(),
}
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

    def thing(self, row: dict[str, str], language: str) -> str:
        return row[language]

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


def read_words() -> list[tuple[str, str]]:
    """Return the (English, Chinese) pairs."""
    lines = (DIALOGUES / "words.txt").read_text(encoding="utf-8").splitlines()
    cells = [cell for line in lines if not line.startswith("#") for cell in line.split()]
    return [(cell.split("=")[0], cell.split("=")[1]) for cell in cells]


# ---- sums

SUMS: dict[str, dict[str, list[str]]] = {
    "+": {
        "zh": ["{a}+{b}=?", "{a}+{b}等于多少？", "{a}加{b}等于多少？", "{a}加{b}是多少？", "计算{a}+{b}",
               "{a} + {b} = ?", "{a}加上{b}等于几？", "算一下{a}+{b}"],
        "en": ["{a}+{b}=?", "What is {a} plus {b}?", "{a} + {b} = ?", "{a}+{b}", "How much is {a} plus {b}?",
               "Calculate {a} + {b}", "What is {a}+{b}?", "Add {a} and {b}"],
    },
    "-": {
        "zh": ["{a}-{b}=?", "{a}-{b}等于多少？", "{a}减{b}等于多少？", "{a}减{b}是多少？", "计算{a}-{b}",
               "{a} - {b} = ?", "{a}减去{b}等于几？", "算一下{a}-{b}"],
        "en": ["{a}-{b}=?", "What is {a} minus {b}?", "{a} - {b} = ?", "{a}-{b}", "How much is {a} minus {b}?",
               "Calculate {a} - {b}", "What is {a}-{b}?", "Subtract {b} from {a}"],
    },
}  # fmt: skip


def sum_held_out(a: int, sign: str, b: int) -> bool:
    """Whether the problem is kept from training, in every phrasing and, for additions, in both orders."""
    if sign == "+":
        a, b = min(a, b), max(a, b)
    return chosen(0.05, a, sign, b)


def sum_answer(a: int, sign: str, b: int) -> str:
    """The answer with its working, the same in both languages, as one does sums in the head.

    `3+4=7`, `27+45=60+12=72`, `72-45=32-5=27`, `27-45=-(45-27)=-(25-7)=-18`. Each step is a fact that
    many problems share; the result in one go takes a model of this size much longer to learn.
    """
    problem = f"{a}{sign}{b}="
    if sign == "+":
        tens, ones = a // 10 * 10 + b // 10 * 10, a % 10 + b % 10
        return f"{problem}{tens}+{ones}={a + b}" if tens else f"{problem}{a + b}"
    if a < b:
        return problem + "".join(f"-({step})=" for step in _difference(b, a)[:-1]) + f"-{b - a}"
    return "=".join(_difference(a, b))


def _difference(a: int, b: int) -> list[str]:
    """The steps of a - b for a >= b: first the tens are taken away, then the ones."""
    steps = [f"{a}-{b}"]
    if b >= 10 and b % 10:
        steps.append(f"{a - b // 10 * 10}-{b % 10}")
    return [*steps, str(a - b)]


def sum_problems(held_out: bool) -> list[tuple[int, str, int]]:
    """All problems of one part with numbers from 0 to 99 and a result of at least 0."""
    numbers = range(LARGEST + 1)
    pairs = [(a, sign, b) for sign in "+-" for a in numbers for b in numbers if sign == "+" or a >= b]
    return [pair for pair in pairs if sum_held_out(*pair) == held_out]


def negative_problems(held_out: bool) -> list[tuple[int, str, int]]:
    """The subtractions of one part whose result is below 0."""
    pairs = [(a, "-", b) for b in range(LARGEST + 1) for a in range(b)]
    return [pair for pair in pairs if sum_held_out(*pair) == held_out]


# ---- questions without an answer


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


# ---- the book


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

    # -- training

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
            "sums": self._sum,
            "questions": self._question,
            "tables": self._table,
            "translation": self._translation,
            "unknown": self._unknown,
            "follow_up": self._follow_up,
            "core": self._core,
        }
        skill = rng.choices(list(makers), [getattr(self.mix, name) for name in makers])[0]
        turns = makers[skill](rng)
        while short and sum(len(q) + len(a) for q, a in turns) > 150:
            turns = self._sum(rng)
        return turns

    def _sum(self, rng: random.Random) -> list[Turn]:
        a, sign, b = rng.choice(self.problems if rng.random() < 0.9 else self.negative_problems)
        template = rng.choice(SUMS[sign][rng.choice(LANGUAGES)])
        return [(template.format(a=a, b=b), sum_answer(a, sign, b))]

    def _question(self, rng: random.Random) -> list[Turn]:
        question = rng.choice(self.questions)
        query = self._lose_word(rng.choice(question.phrasings), question.language, rng)
        return [(vary(query, question.language, rng), question.answer)]

    def _core(self, rng: random.Random) -> list[Turn]:
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

    def _table(self, rng: random.Random) -> list[Turn]:
        table, language = rng.choice(self.tables), rng.choice(LANGUAGES)
        row = rng.choice(table.rows)
        attribute = rng.choice(list(ATTRIBUTES[table.name]))
        ask = rng.choice(table.asks(row, attribute, language, held_out=False))
        return [(vary(ask, language, rng), table.answer(row, attribute, language))]

    def _translation(self, rng: random.Random) -> list[Turn]:
        pair, direction, language = rng.choice(self.words), rng.choice(LANGUAGES), rng.choice(LANGUAGES)
        templates = translation_templates(pair, direction, language, held_out=False)
        return [(vary(rng.choice(templates).format(w=word(pair, direction)), language, rng, polite=False),
                 translation_answer(pair, direction, language))]  # fmt: skip

    def _unknown(self, rng: random.Random, language: str | None = None) -> list[Turn]:
        language = language or rng.choice(LANGUAGES)
        if rng.random() < 0.12:
            direction = rng.choice(LANGUAGES)
            strange = rng.choice(STRANGE_WORDS[direction]) if rng.random() < 0.5 else nonsense(rng, direction)
            query = rng.choice(TRANSLATE[direction][0][language]).format(w=strange)
        else:
            query = self._fill(rng.choice(self.templates[language]), language, rng)
        return [(vary(self._lose_word(query, language, rng), language, rng), decline(query, language))]

    def _fill(self, template: str, language: str, rng: random.Random, held: str = "") -> str:
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

    def _follow_up(self, rng: random.Random) -> list[Turn]:
        kind = rng.random()
        if kind < 0.12:
            return self._name(rng)
        if kind < 0.30:
            return self._question_follow_up(rng)
        if kind < 0.50:
            return self._word_follow_up(rng)
        return self._table_follow_up(rng)

    def _name(self, rng: random.Random) -> list[Turn]:
        language = rng.choice(LANGUAGES)
        says, hello, asks, answer = NAME_TURNS[language]
        name = rng.choice(NAMES[language])
        turns = [(rng.choice(says).format(x=name), hello.format(x=name))]
        if rng.random() < 0.2:
            turns += self._sum(rng)
        return [*turns, (vary(rng.choice(asks), language, rng), answer.format(x=name))]

    def _question_follow_up(self, rng: random.Random) -> list[Turn]:
        question = rng.choice(self.with_follow_ups)
        turns = [(rng.choice(question.phrasings), question.answer)]
        for then in rng.sample(question.follow_ups, rng.randint(1, len(question.follow_ups))):
            turns.append(
                (vary(rng.choice(then.phrasings), question.language, rng, polite=False), then.answer)
            )
        return turns

    def _word_follow_up(self, rng: random.Random) -> list[Turn]:
        direction, language = rng.choice(LANGUAGES), rng.choice(LANGUAGES)
        first = rng.choice(self.words)
        second = rng.choice(
            [pair for pair in rng.sample(self.words, 8) if switch_word(pair, direction, language, False)]
        )
        templates = translation_templates(first, direction, language, held_out=False)
        return [
            (rng.choice(templates).format(w=word(first, direction)), translation_answer(first, direction, language)),
            (rng.choice(SWITCH[language]).format(x=word(second, direction)),
             translation_answer(second, direction, language)),
        ]  # fmt: skip

    def _table_follow_up(self, rng: random.Random) -> list[Turn]:
        table, language = rng.choice(self.tables), rng.choice(LANGUAGES)
        attributes = ATTRIBUTES[table.name]
        row, attribute = rng.choice(table.rows), rng.choice(list(attributes))
        turns = [
            (
                rng.choice(table.asks(row, attribute, language, held_out=False)),
                table.answer(row, attribute, language),
            )
        ]
        for _ in range(rng.choice((1, 1, 2))):
            if rng.random() < 0.3:
                other = rng.choice(table.rows)
                if table.may_switch(other, attribute, language, held_out=False) and other is not row:
                    row = other
                    turns.append(self._switch(table, row, attribute, language, rng))
            else:
                then = rng.choice([name for name in attributes if name != attribute])
                if table.may_follow(row, then, language, held_out=False):
                    attribute = then
                    ask = rng.choice(attributes[then][language]["then"])
                    turns.append((vary(ask, language, rng, polite=False), table.answer(row, then, language)))
        return turns

    def _switch(
        self, table: Table, row: dict[str, str], attribute: str, language: str, rng: random.Random
    ) -> Turn:
        x = row[language]
        if table.name == "animals" and language == "en":
            x = ("an " if x[0] in "aeo" else "a ") + x
        return rng.choice(SWITCH[language]).format(x=x), table.answer(row, attribute, language)

    # -- held out

    def held_out(self, seed: int = 1) -> list[Item]:
        """Return the questions that training never shows, some hundreds, by skill."""
        rng = random.Random(seed)
        alone = [*self._held_questions(), *self._held_tables(rng), *self._held_sums(rng)]
        alone += [*self._held_translations(rng), *self._held_unknown(rng)]
        return [*alone, *self._held_follow_ups(rng), *self._held_with_history(alone, rng)]

    def taught(self, number: int = 200) -> list[Item]:
        """Return questions in phrasings that training does show, to compare with."""
        items = [
            Item(TAUGHT, question.language, (), text, question.answer)
            for question in self.questions
            for text in question.phrasings
        ]
        return random.Random(1).sample(items, number)

    def _held_questions(self) -> list[Item]:
        return [
            Item(question.skill, question.language, (), text, question.answer)
            for question in self.questions
            for text in question.held_out
        ]

    def _held_tables(self, rng: random.Random) -> list[Item]:
        items = [
            Item("countries and animals", language, (), ask, table.answer(row, attribute, language))
            for table in self.tables
            for row in table.rows
            for attribute in ATTRIBUTES[table.name]
            for language in LANGUAGES
            for ask in table.asks(row, attribute, language, held_out=True)
        ]
        return rng.sample(items, min(len(items), 100))

    def _held_sums(self, rng: random.Random) -> list[Item]:
        problems = [("sums", problem) for problem in rng.sample(sum_problems(held_out=True), 300)]
        below = rng.sample(negative_problems(held_out=True), 60)
        items = []
        for skill, (a, sign, b) in [
            *problems,
            *(("sums with a negative result", problem) for problem in below),
        ]:
            language = rng.choice(LANGUAGES)
            query = rng.choice(SUMS[sign][language]).format(a=a, b=b)
            items.append(Item(skill, language, (), query, sum_answer(a, sign, b)))
        return items

    def _held_translations(self, rng: random.Random) -> list[Item]:
        items = [
            Item("translation", language, (), template.format(w=word(pair, direction)),
                 translation_answer(pair, direction, language))
            for pair in self.words
            for direction in LANGUAGES
            for language in LANGUAGES
            for template in translation_templates(pair, direction, language, held_out=True)
        ]  # fmt: skip
        return rng.sample(items, 200)

    def _held_unknown(self, rng: random.Random) -> list[Item]:
        items = []
        for language in LANGUAGES:
            for template in [*self.templates[language], *2 * self.templates[f"held {language}"]]:
                if "{" not in template and template in self.templates[language]:
                    continue
                query = self._fill(template, language, rng, held="held ")
                items.append(Item("unknown questions", language, (), query, decline(query, language)))
        return rng.sample(items, 150) if len(items) > 150 else items

    def _held_follow_ups(self, rng: random.Random) -> list[Item]:
        items = [*self._held_table_follow_ups(rng), *self._held_word_follow_ups(rng)]
        return rng.sample(items, min(len(items), 200))

    def _held_table_follow_ups(self, rng: random.Random) -> Iterator[Item]:
        for table in self.tables:
            for row in table.rows:
                for attribute, texts in ATTRIBUTES[table.name].items():
                    for language in LANGUAGES:
                        answer = table.answer(row, attribute, language)
                        if table.may_follow(row, attribute, language, held_out=True):
                            first = rng.choice([name for name in ATTRIBUTES[table.name] if name != attribute])
                            ask = rng.choice(table.asks(row, first, language, held_out=False))
                            history = ((ask, table.answer(row, first, language)),)
                            then = rng.choice(texts[language]["then"])
                            yield Item("follow-up", language, history, then, answer)
                        if table.may_switch(row, attribute, language, held_out=True):
                            other = rng.choice([other for other in table.rows if other is not row])
                            ask = rng.choice(table.asks(other, attribute, language, held_out=False))
                            history = ((ask, table.answer(other, attribute, language)),)
                            query, answer = self._switch(table, row, attribute, language, rng)
                            yield Item("follow-up", language, history, query, answer)

    def _held_word_follow_ups(self, rng: random.Random) -> Iterator[Item]:
        for pair in self.words:
            for direction in LANGUAGES:
                for language in LANGUAGES:
                    if switch_word(pair, direction, language, held_out=True) and rng.random() < 0.4:
                        first = rng.choice(self.words)
                        ask = rng.choice(translation_templates(first, direction, language, held_out=False))
                        history = (
                            (
                                ask.format(w=word(first, direction)),
                                translation_answer(first, direction, language),
                            ),
                        )
                        query = rng.choice(SWITCH[language]).format(x=word(pair, direction))
                        yield Item(
                            "follow-up",
                            language,
                            history,
                            query,
                            translation_answer(pair, direction, language),
                        )

    def _held_with_history(self, alone: list[Item], rng: random.Random) -> Iterator[Item]:
        """Held-out questions of every skill after one to three rounds of other skills."""
        for item in rng.sample(alone, 200):
            history: list[Turn] = []
            for _ in range(rng.randint(1, 3)):
                history += rng.choice((self._sum, self._question, self._translation, self._table))(rng)
            yield Item("any skill after other rounds", item.language, tuple(history), item.query, item.answer)


def word(pair: tuple[str, str], direction: str) -> str:
    """The word that is asked for, written in the language `direction`."""
    return pair[0] if direction == "en" else pair[1]


def translation_templates(pair: tuple[str, str], direction: str, language: str, held_out: bool) -> list[str]:
    """The phrasings of one part for this word; the first one always belongs to training."""
    templates = TRANSLATE[direction][0][language]
    out = [i > 0 and chosen(SHARE, pair[0], direction, template) for i, template in enumerate(templates)]
    return [template for template, is_out in zip(templates, out, strict=True) if is_out == held_out]


def translation_answer(pair: tuple[str, str], direction: str, language: str) -> str:
    other = "zh" if direction == "en" else "en"
    return TRANSLATE[direction][1][language].format(w=word(pair, direction), t=word(pair, other))


def switch_word(pair: tuple[str, str], direction: str, language: str, held_out: bool) -> bool:
    return chosen(SHARE, "switch", pair[0], direction, language) == held_out


def decline(query: str, language: str) -> str:
    """The polite answer to a question the model cannot answer."""
    arithmetic = re.search(r"\d.*\d|的平方|(square|root) of \d", query)
    return (UNKNOWN_SUM if arithmetic else UNKNOWN)[language]


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


def training_queries(book: Book, conversations: int, seed: int) -> Iterator[list[Turn]]:
    """Yield the conversations that training with this seed begins with."""
    rng = random.Random(seed)
    for _ in range(conversations):
        yield book.conversation(rng)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write training conversations as JSON lines, to look at.")
    parser.add_argument(
        "--number", type=int, default=20, help="conversations to write (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--held-out", action="store_true", help="write the held-out questions instead")
    options = parser.parse_args()
    book = Book()
    if options.held_out:
        for item in book.held_out():
            print(json.dumps(vars(item), ensure_ascii=False))
        return
    for rounds in training_queries(book, options.number, options.seed):
        print(json.dumps(rounds, ensure_ascii=False))


if __name__ == "__main__":
    main()
