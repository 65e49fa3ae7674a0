"""The walk of docs/finetuning.md: demo models learn to greet before an answer in words, and to leave sums bare."""

from __future__ import annotations

import os
import random
import re
import shlex
from pathlib import Path

import pytest

import chatglm
from chatglm.cli import main
from chatglm.training.methods import load_finetuned
from demo import manners
from demo.book import Book
from demo.evaluate import ask, expected_text
from demo.held_out import held_out_questions

pytest.importorskip("trl", reason="the loops are TRL's: install the extra 'preferences'")
pytestmark = [
    pytest.mark.long,
    # PEFT 0.21 asks transformers for a property under its old name.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = 40  # of each kind


def walk() -> dict[str, list[str]]:
    """The commands of the walk, by what they are called with."""
    text = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
    block = text[text.index("## SFT → reward → RL") :].split("```sh\n")[1].split("```")[0]
    lines = block.replace("\\\n", " ").splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("chatglm ")]
    return {command[1]: command[1:] for command in commands}


@pytest.fixture(scope="module", params=["demo", "demo-v1"])
def place(request, tmp_path_factory):
    """A folder in which a demo model has learned both manners, and a reward model which one is better."""
    folder = tmp_path_factory.mktemp("walk")
    (folder / "demo").mkdir()
    (folder / "demo" / "manners").symlink_to(manners.FOLDER)
    before = Path.cwd()
    os.chdir(folder)
    try:
        for name in ("finetune", "train-reward"):
            run(name, request.param)
        yield request.param
    finally:
        os.chdir(before)


def run(name: str, model: str, *more: str) -> None:
    """A command of the walk, on this demo model."""
    words = [model if word == "demo" else word for word in walk()[name]]
    assert main([*words, *more]) == 0


def manners_of(model, tokenizer) -> tuple[float, float]:
    """Shares, of held-out questions: answers in words that greet, and sums that are exactly right."""
    items, rng = held_out_questions(Book()), random.Random(3)
    asked = []
    for skills in manners.SKILLS.values():
        asked += rng.sample([item for item in items if item.skill in skills], QUESTIONS)
    answered = ask(model, tokenizer, asked)
    greeted = [manners.greets(said) for item, said in answered if item.skill != "sums"]
    right = [said == expected_text(tokenizer, item.answer) for item, said in answered if item.skill == "sums"]
    return sum(greeted) / len(greeted), sum(right) / len(right)


def test_the_reward_model_puts_nine_of_ten_held_out_pairs_in_order(place):
    text = Path("reward", "README.md").read_text(encoding="utf-8")
    assert float(re.search(r"in the right order, % (\d+\.\d+)", text)[1]) >= 90


def check_that_answers_moved(adapter: str) -> None:
    """Towards what is preferred, on held-out questions, while sums stay right."""
    before, right_before = manners_of(*chatglm.load("sft", "cpu"))
    greeted, right = manners_of(*load_finetuned(adapter, device="cpu"))
    assert greeted > before + 0.2
    assert right > right_before - 0.1


def test_dpo_moves_answers_to_what_is_preferred_and_sums_stay_right(place):
    run("dpo", place)
    check_that_answers_moved("dpo-lora")


def test_reinforcement_learning_moves_answers_to_what_is_preferred_and_sums_stay_right(place):
    run("rl", place, *(("--algorithm", "rloo") if place == "demo-v1" else ()))
    check_that_answers_moved("rl-lora")


def test_the_data_are_what_the_script_writes(tmp_path, monkeypatch):
    files = sorted(manners.FOLDER.iterdir())
    monkeypatch.setattr(manners, "FOLDER", tmp_path)
    manners.main()
    assert [(path.name, path.read_bytes()) for path in sorted(tmp_path.iterdir())] == [
        (path.name, path.read_bytes()) for path in files
    ]


def test_no_held_out_question_is_learned():
    learned = {row["prompt"] for rows in (manners.sft_rows(), manners.pairs()) for row in rows}
    assert learned.isdisjoint(row["prompt"] for row in manners.held_out_pairs())
