"""The two models that ship with chatglm answer as their cards say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import HUB_FILES

from chatglm.find import find_checkpoint
from chatglm.hub.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer
from demo.book import Book
from demo.card import render_card
from demo.evaluate import ask, expected_text
from demo.held_out import TAUGHT, held_out_questions, taught_questions
from demo.sums import sum_answer
from demo.unknown import UNKNOWN

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["demo", "demo-v1"]
LARGEST_FILE = 12_000_000  # bytes


class Chatter:
    """A model with its tokenizer, asked greedily."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.folder = Path(find_checkpoint(name))
        self.model = ChatGLMForConditionalGeneration.from_pretrained(self.folder, dtype=torch.float32).eval()
        self.tokenizer = ChatGLMTokenizer.from_pretrained(self.folder)

    def __call__(self, query: str, history: list[tuple[str, str]] | None = None) -> str:
        return self.model.chat(self.tokenizer, query, history, do_sample=False, max_new_tokens=120)[0]

    def rounds(self, *queries: str) -> list[str]:
        history: list[tuple[str, str]] = []
        for query in queries:
            history.append((query, self(query, history)))
        return [answer for _, answer in history]


@pytest.fixture(scope="module", params=NAMES)
def chatter(request) -> Chatter:
    return Chatter(request.param)


@pytest.mark.parametrize("greeting", ["你好", "Hello", "hi"])
def test_it_greets(chatter, greeting):
    assert re.search("你好|Hello", chatter(greeting))


@pytest.mark.parametrize("question", ["你是谁？", "Who are you?", "你叫什么名字？", "What is your name?"])
def test_it_says_honestly_who_it_is(chatter, question):
    answer = chatter(question)
    assert re.search("演示模型|demonstration model", answer)
    assert re.search("不是 ?ChatGLM-6B|not ChatGLM-6B", answer)


def test_it_solves_sums_it_has_never_seen(chatter):
    items = [item for item in held_out_questions(Book()) if item.skill == "sums"]
    wrong = [
        (item.query, said)
        for item, said in ask(chatter.model, chatter.tokenizer, items)
        if said.split("=")[-1] != item.answer.split("=")[-1]
    ]
    assert len(wrong) <= 0.05 * len(items), wrong


def share_right(chatter: Chatter, skill: str) -> float:
    """Of the held-out questions of a skill, as the model card counts."""
    items = [item for item in held_out_questions(Book()) if item.skill == skill][:100]
    answered = ask(chatter.model, chatter.tokenizer, items)
    return sum(said == expected_text(chatter.tokenizer, item.answer) for item, said in answered) / len(items)


def test_it_translates_most_words_both_ways(chatter):
    assert "apple" in chatter("苹果用英语怎么说？")
    assert "猫" in chatter("cat用中文怎么说？")
    assert share_right(chatter, "translation") >= 0.8


@pytest.mark.parametrize(
    ("first", "then", "expected"),
    [
        ("法国的首都是哪里？", "它在哪个洲？", "欧洲"),
        ("熊猫住在哪里？", "它吃什么？", "竹子"),
        ("What is the capital of Japan?", "Where is it?", "Asia"),
    ],
)
def test_it_understands_a_follow_up_only_from_the_round_before(chatter, first, then, expected):
    assert expected in chatter.rounds(first, then)[-1]
    assert expected not in chatter(then)


def test_it_understands_most_follow_ups(chatter):
    assert share_right(chatter, "follow-up") >= 0.65


def test_it_writes_code_in_a_fence(chatter):
    answer = chatter("Write a Python function that adds two numbers")
    assert answer == "```python\ndef add(a, b):\n    return a + b\n```"
    scope: dict = {}
    exec(answer.strip("`").removeprefix("python"), scope)
    assert scope["add"](2, 3) == 5


def test_it_writes_lists_with_lines(chatter):
    lines = chatter("List three fruits").splitlines()
    assert [line[:3] for line in lines[1:]] == ["1. ", "2. ", "3. "]


def test_it_sends_an_emoji(chatter):
    assert chatter("Send me an emoji") == "😊"


@pytest.mark.parametrize(
    ("query", "language"),
    [("今天星期几？", "zh"), ("上海有多少人口？", "zh"), ("Explain quantum mechanics", "en")],
)
def test_it_declines_politely_what_it_was_not_taught(chatter, query, language):
    assert chatter(query) == expected_text(chatter.tokenizer, UNKNOWN[language])


def test_it_answers_the_same_with_the_cache_of_a_stream():
    """Going on with a cache, ChatGLM2 sees a slightly different text; the answers must not suffer."""
    chatter = Chatter("demo")
    history, cache = [], None
    for query in ("法国的首都是哪里？", "它在哪个洲？", "12+7=?"):
        for _, new_history, new_cache in chatter.model.stream_chat(
            chatter.tokenizer,
            query,
            history,
            past_key_values=cache,
            do_sample=False,
            return_past_key_values=True,
        ):
            last = new_history, new_cache
        history, cache = last
    assert [answer for _, answer in history] == ["法国的首都是巴黎。", "法国在欧洲。", sum_answer(12, "+", 7)]


def test_it_answers_in_half_precision_too(chatter):
    model = ChatGLMForConditionalGeneration.from_pretrained(chatter.folder)
    assert model.dtype == torch.float16
    assert model.chat(chatter.tokenizer, "12+7=?", do_sample=False)[0] == sum_answer(12, "+", 7)


def test_it_is_small_and_holds_weights_alone(chatter):
    weights = chatter.folder / "model.safetensors"
    assert weights.stat().st_size <= LARGEST_FILE
    assert not list(chatter.folder.glob("*.py"))
    assert not list(chatter.folder.glob("*.bin"))
    assert chatter.model.config.tie_word_embeddings == (chatter.name == "demo-v1")
    assert chatter.model.config.vocab_size % 64 == 0


def test_digits_are_tokens_of_their_own(chatter):
    ids = chatter.tokenizer("2047", add_special_tokens=False)["input_ids"]
    assert chatter.tokenizer.convert_ids_to_tokens(ids)[-4:] == list("2047")


def test_the_card_shows_the_numbers_of_the_evaluation(chatter):
    card = (chatter.folder / "README.md").read_text(encoding="utf-8")
    assert card == render_card(chatter.folder)


def test_the_evaluation_asked_all_held_out_questions(chatter):
    evaluation = json.loads((chatter.folder / "evaluation.json").read_text(encoding="utf-8"))
    asked: dict[str, int] = {}
    for item in taught_questions(Book()) + held_out_questions(Book()):
        asked[item.skill] = asked.get(item.skill, 0) + 1
    assert {skill: result["asked"] for skill, result in evaluation["skills"].items()} == asked


def test_a_sample_of_the_held_out_questions_goes_as_well_as_the_card_says(chatter):
    evaluation = json.loads((chatter.folder / "evaluation.json").read_text(encoding="utf-8"))
    skills = [result for skill, result in evaluation["skills"].items() if skill != TAUGHT]
    claimed = sum(result["right"] for result in skills) / sum(result["asked"] for result in skills)
    items = held_out_questions(Book())[::12]
    right = sum(
        said == expected_text(chatter.tokenizer, item.answer)
        for item, said in ask(chatter.model, chatter.tokenizer, items)
    )
    assert right / len(items) >= claimed - 0.1  # a sample of about 130 of 1500


def test_it_loads_as_remote_code_with_its_files_beside_it(chatter, tmp_path):
    """In a process that never imports chatglm."""
    for file in chatter.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for name in HUB_FILES:
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for name, auto_map in {
        "config.json": {
            "AutoConfig": "configuration_chatglm.ChatGLMConfig",
            "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
        },
        "tokenizer_config.json": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
    }.items():
        content = json.loads((tmp_path / name).read_text(encoding="utf-8"))
        (tmp_path / name).write_text(json.dumps({**content, "auto_map": auto_map}), encoding="utf-8")
    script = """
import sys, torch
from transformers import AutoModel, AutoTokenizer
torch.set_num_threads(1)
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True).float().eval()
print(model.chat(tokenizer, "12+7=?", history=[], do_sample=False)[0])
assert "chatglm" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.strip().endswith("=19"), done.stderr
