"""The conversations the demo models are trained on, and what is kept from training."""

from __future__ import annotations

import random
import re

import pytest

from chatglm.hub.tokenization_chatglm import CHATGLM, CHATGLM2, ChatGLMTokenizer, build_prompt
from demo import train
from demo.book import Book
from demo.held_out import held_out_questions
from demo.sums import SUMS, negative_problems, sum_answer, sum_held_out, sum_problems
from demo.tables import ATTRIBUTES
from demo.text import bare
from demo.words import translation_templates

SEED_OF_THE_RECIPE = 0
MANY = 20_000
A_SUM = re.compile(r"(\d+)([+-])(\d+)=(?:.*=)?-?\d+$")


@pytest.fixture(scope="module")
def book() -> Book:
    return Book()


@pytest.fixture(scope="module", params=range(len(train.RECIPES["demo"].stages)), ids="stage {}".format)
def conversations(request) -> list[list[tuple[str, str]]]:
    book = Book(train.RECIPES["demo"].stages[request.param].mix)
    rng = random.Random(SEED_OF_THE_RECIPE + request.param)
    return [book.conversation(rng) for _ in range(MANY)]


def test_the_same_seed_gives_the_same_conversations():
    def first(seed: int) -> list:
        book, rng = Book(), random.Random(seed)
        return [book.conversation(rng) for _ in range(20)]

    assert first(0) == first(0)
    assert first(0) != first(1)


def test_the_held_out_questions_are_the_same_in_every_run(book):
    assert held_out_questions(book) == held_out_questions(Book())


def test_no_held_out_sum_is_asked_in_training(conversations):
    seen = {
        (int(match[1]), match[2], int(match[3]))
        for rounds in conversations
        for _, answer in rounds
        if (match := A_SUM.match(answer))
    }
    assert len(seen) > 5000
    assert not [sum_ for sum_ in seen if sum_held_out(*sum_)]


def test_an_addition_is_held_out_in_both_orders():
    held_out = set(sum_problems(held_out=True))
    assert {(b, "+", a) for a, sign, b in held_out if sign == "+"} <= held_out


def test_every_step_of_every_sum_is_right():
    for a, sign, b in sum_problems(held_out=False) + sum_problems(held_out=True) + negative_problems(False):
        steps = sum_answer(a, sign, b).split("=")
        assert steps[0] == f"{a}{sign}{b}"
        assert {value_of(step) for step in steps} == {a + b if sign == "+" else a - b}, steps


def value_of(step: str) -> int:
    """7, 60+12, 32-5, -(25-7) as a number."""
    if step.startswith("-("):
        return -value_of(step[2:-1])
    return sum(int(number) for number in re.findall(r"[+-]?\d+", step))


def test_no_held_out_phrasing_is_asked_in_training(book, conversations):
    asked = {bare(query) for rounds in conversations for query, _ in rounds}
    alone = [
        item for item in held_out_questions(book) if not item.history and item.skill != "unknown questions"
    ]
    assert len(alone) > 900
    assert not [item.query for item in alone if bare(item.query) in asked]


def test_no_held_out_follow_up_is_asked_in_training_after_the_same_thing(book, conversations):
    """What is held out is the pair of answers: this thing, then this attribute or this word."""
    followed = {(rounds[i][0], rounds[i][1]) for rounds in conversations for i in range(1, len(rounds))}
    items = [item for item in held_out_questions(book) if item.skill == "follow-up"]
    assert len(items) == 200
    assert not [item for item in items if (item.query, item.answer) in followed]


def test_every_question_can_be_asked_in_both_languages(book):
    count = {language: sum(q.language == language for q in book.questions) for language in ("zh", "en")}
    assert count["zh"] == count["en"]
    assert len(book.questions) >= 500
    for question in book.questions:
        written_in_chinese = re.search(r"[\u4e00-\u9fff]", question.phrasings[0]) is not None
        assert written_in_chinese == (question.language == "zh"), question.phrasings[0]


def test_no_phrasing_asks_for_two_answers(book):
    answers: dict[str, str] = {}
    for question in book.questions + book.core:
        for text in [*question.phrasings, *question.held_out]:
            assert answers.setdefault(bare(text), question.answer) == question.answer, text


def test_what_everybody_says_first_is_never_held_out(book):
    spoken = {text for question in book.core for text in question.phrasings}
    assert {"你好", "hi", "你是谁？", "你叫什么名字？", "Who are you?", "What is your name?"} <= spoken
    assert not {bare(text) for text in spoken} & {bare(item.query) for item in held_out_questions(book)}


def test_tables_are_complete_and_words_are_distinct(book):
    for table in book.tables:
        for row in table.rows:
            for attribute in ATTRIBUTES[table.name]:
                assert row[f"{attribute}_zh"] and row[f"{attribute}_en"], row
    assert len(book.words) >= 300
    for side in range(2):
        assert len({pair[side] for pair in book.words}) == len(book.words)
    for pair in book.words:
        assert translation_templates(pair, "zh", "zh", held_out=False)


def test_every_phrasing_of_a_sum_names_both_numbers():
    for phrasings in SUMS.values():
        for template in phrasings["zh"] + phrasings["en"]:
            assert {"{a}", "{b}"} <= set(re.findall(r"\{\w\}", template))


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, ChatGLMTokenizer]:
    from chatglm.find import find_checkpoint

    return {
        family: ChatGLMTokenizer.from_pretrained(find_checkpoint(name))
        for name, family in (("demo", CHATGLM2), ("demo-v1", CHATGLM))
    }


@pytest.mark.parametrize("family", [CHATGLM, CHATGLM2])
def test_training_rows_are_the_prompt_of_chat_and_then_the_answer(tokenizers, family):
    tokenizer = tokenizers[family]
    rounds = [("你好", "你好！"), ("12+7=?", "12+7=19")]
    ids, targets, weights = train.Encoder(tokenizer).whole_prompt(rounds)
    prompt = tokenizer.encode_chat("12+7=?", rounds[:1])
    answer = tokenizer("12+7=19", add_special_tokens=False)["input_ids"]
    assert ids == prompt + answer
    trained = [target for target in targets if target != train.IGNORED]
    assert trained == [*answer, tokenizer.eos_token_id]
    assert targets[len(prompt) - 1] == answer[0]
    assert [weight > 0 for weight in weights] == [target != train.IGNORED for target in targets]
    if family == CHATGLM2:
        assert tokenizer.decode(prompt) == build_prompt(family, "12+7=?", rounds[:1])


def test_rows_for_the_cache_hold_what_stream_chat_has_in_it(tokenizers):
    tokenizer = tokenizers[CHATGLM2]
    rounds = [("你好", "你好！"), ("12+7=?", "12+7=19")]
    ids, targets, _ = train.Encoder(tokenizer).on_the_cache(rounds)
    answers = [tokenizer(answer, add_special_tokens=False)["input_ids"] for _, answer in rounds]
    first = tokenizer.encode_chat("你好")
    assert ids == first + answers[0] + tokenizer.encode_chat_continuation("12+7=?", rounds[:1]) + answers[1]
    end = tokenizer.eos_token_id
    assert [target for target in targets if target != train.IGNORED] == [*answers[0], end, *answers[1], end]


@pytest.mark.parametrize("name", ["demo", "demo-v1"])
def test_a_few_training_steps_lower_the_loss(tokenizers, name):
    tiny = {"hidden_size": 32, "inner_size": 64, "num_layers": 1, "num_heads": 2}
    recipe = train.replace(train.RECIPES[name], **tiny)
    tokenizer = tokenizers[recipe.family]
    model = train.make_model(recipe, tokenizer, seed=0)
    encoder = train.Encoder(tokenizer)
    batch = next(train.batches(Book(), encoder, 512, random.Random(0)))
    optimizer = train.optimizer_for(model, recipe)
    for group in optimizer.param_groups:
        group["lr"] = 3e-3
    losses = []
    for _ in range(15):
        loss = train.answer_loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("stage", train.RECIPES["demo"].stages)
def test_the_learning_rate_of_a_stage_rises_and_then_falls(stage):
    rates = [train.learning_rate(step, stage) for step in range(stage.steps)]
    peak = rates.index(max(rates))
    assert peak in (stage.warmup - 1, stage.warmup)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] < 0.02 * stage.learning_rate


def test_a_shortened_recipe_keeps_its_stages():
    recipe = train.RECIPES["demo"]
    short = train.shortened(recipe, 33)
    assert [stage.mix for stage in short.stages] == [stage.mix for stage in recipe.stages]
    assert abs(short.steps - 33) <= 1
