"""The questions that training never shows, by skill, and some that it does show, to compare with."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from demo.book import Book
from demo.sums import SUMS, negative_problems, sum_answer, sum_problems
from demo.tables import ATTRIBUTES
from demo.text import LANGUAGES, SWITCH, Turn
from demo.unknown import decline
from demo.words import switch_word, translation_answer, translation_templates, word

TAUGHT = "questions as taught"


@dataclass(frozen=True)
class Item:
    """One held-out question: what was said before, what is asked, what is right."""

    skill: str
    language: str
    history: tuple[Turn, ...]
    query: str
    answer: str


def held_out_questions(book: Book, seed: int = 1) -> list[Item]:
    """Return the questions that training never shows, some hundreds, by skill."""
    rng = random.Random(seed)
    alone = [*_questions(book), *_tables(book, rng), *_sums(rng)]
    alone += [*_translations(book, rng), *_unknown(book, rng)]
    follow_ups = [*_table_follow_ups(book, rng), *_word_follow_ups(book, rng)]
    return [*alone, *rng.sample(follow_ups, min(len(follow_ups), 200)), *_with_history(book, alone, rng)]


def taught_questions(book: Book, number: int = 200) -> list[Item]:
    """Return questions in phrasings that training does show, to compare with."""
    items = [
        Item(TAUGHT, question.language, (), text, question.answer)
        for question in book.questions
        for text in question.phrasings
    ]
    return random.Random(1).sample(items, number)


def _questions(book: Book) -> list[Item]:
    return [
        Item(question.skill, question.language, (), text, question.answer)
        for question in book.questions
        for text in question.held_out
    ]


def _tables(book: Book, rng: random.Random) -> list[Item]:
    items = [
        Item("countries and animals", language, (), ask, table.answer(row, attribute, language))
        for table in book.tables
        for row in table.rows
        for attribute in ATTRIBUTES[table.name]
        for language in LANGUAGES
        for ask in table.asks(row, attribute, language, held_out=True)
    ]
    return rng.sample(items, min(len(items), 100))


def _sums(rng: random.Random) -> Iterator[Item]:
    problems = [("sums", problem) for problem in rng.sample(sum_problems(held_out=True), 300)]
    below = rng.sample(negative_problems(held_out=True), 60)
    problems += [("sums with a negative result", problem) for problem in below]
    for skill, (a, sign, b) in problems:
        language = rng.choice(LANGUAGES)
        query = rng.choice(SUMS[sign][language]).format(a=a, b=b)
        yield Item(skill, language, (), query, sum_answer(a, sign, b))


def _translations(book: Book, rng: random.Random) -> list[Item]:
    items = [
        Item("translation", language, (), template.format(w=word(pair, direction)),
             translation_answer(pair, direction, language))
        for pair in book.words
        for direction in LANGUAGES
        for language in LANGUAGES
        for template in translation_templates(pair, direction, language, held_out=True)
    ]  # fmt: skip
    return rng.sample(items, 200)


def _unknown(book: Book, rng: random.Random) -> list[Item]:
    items = []
    for language in LANGUAGES:
        for template in [*book.templates[language], *2 * book.templates[f"held {language}"]]:
            if "{" not in template and template in book.templates[language]:
                continue
            query = book.fill(template, language, rng, held="held ")
            items.append(Item("unknown questions", language, (), query, decline(query, language)))
    return rng.sample(items, 150) if len(items) > 150 else items


def _table_follow_ups(book: Book, rng: random.Random) -> Iterator[Item]:
    for table in book.tables:
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
                        query = table.switch(row, language, rng)
                        yield Item("follow-up", language, history, query, answer)


def _word_follow_ups(book: Book, rng: random.Random) -> Iterator[Item]:
    for pair in book.words:
        for direction in LANGUAGES:
            for language in LANGUAGES:
                if switch_word(pair, direction, language, held_out=True) and rng.random() < 0.4:
                    first = rng.choice(book.words)
                    ask = rng.choice(translation_templates(first, direction, language, held_out=False))
                    ask = ask.format(w=word(first, direction))
                    history = ((ask, translation_answer(first, direction, language)),)
                    query = rng.choice(SWITCH[language]).format(x=word(pair, direction))
                    answer = translation_answer(pair, direction, language)
                    yield Item("follow-up", language, history, query, answer)


def _with_history(book: Book, alone: list[Item], rng: random.Random) -> Iterator[Item]:
    """Held-out questions of every skill after one to three rounds of other skills."""
    for item in rng.sample(alone, 200):
        history: list[Turn] = []
        for _ in range(rng.randint(1, 3)):
            history += rng.choice(
                (book.draw_sum, book.draw_question, book.draw_translation, book.draw_table)
            )(rng)
        yield Item("any skill after other rounds", item.language, tuple(history), item.query, item.answer)
