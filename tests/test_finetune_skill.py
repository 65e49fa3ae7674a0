"""Every method teaches the demo models a new skill: postcodes of towns that do not exist."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

import chatglm
from chatglm.training.finetune import finetune
from chatglm.training.methods import load_finetuned
from chatglm.training.settings import Settings
from demo import towns
from demo.book import Book
from demo.evaluate import ask, expected_text
from demo.held_out import held_out_questions

pytest.importorskip("peft", reason="LoRA is PEFT's: install the extra 'train'")
pytest.importorskip("nltk", reason="answers are scored with NLTK: install the extra 'train'")
pytestmark = [
    pytest.mark.slow,
    # PEFT 0.21 asks transformers for a property under its old name.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    # PEFT knows no packed layers of ours.
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
]

TRAIN, HELD_OUT, GENERAL, MORE_GENERAL = (
    str(towns.FOLDER / f"{name}.jsonl") for name in ("train", "held_out", "general", "more_general")
)
RECIPES = {
    "lora": {"lora_rank": 16, "learning_rate": 5e-3, "max_steps": 60},
    "ptuning": {"pre_seq_len": 32, "learning_rate": 0.1, "max_steps": 160},
    "full": {"learning_rate": 5e-4, "max_steps": 50},
    "freeze": {"freeze_layers": 2, "learning_rate": 1e-3, "max_steps": 50},
}


def settings(model: str, method: str, output: Path, **changes) -> Settings:
    return Settings(
        model=model, method=method, data=(TRAIN,), eval_data=(HELD_OUT,), predict=True, output=str(output),
        probe="none", device="cpu", accumulation=1, eval_steps=1000, save_steps=1000,
        **{"batch_size": 8} | RECIPES[method] | changes,
    )  # fmt: skip


def share_right(settings: Settings) -> float:
    outcome = finetune(settings, progress=False, say=lambda line: None)
    return outcome.scores["the last step"]["exact"]


@pytest.mark.parametrize(
    ("model", "method", "bits"),
    [
        ("demo-v1", "ptuning", None),
        ("demo", "full", None),
        ("demo-v1", "freeze", None),
        ("demo", "lora", 8),
        ("demo-v1", "lora", 4),
        pytest.param("demo", "ptuning", 8, marks=pytest.mark.long),
        ("demo", "ptuning", 4),
    ],
)
def test_nine_of_ten_held_out_questions_are_answered(model, method, bits, tmp_path):
    assert share_right(settings(model, method, tmp_path / "out", quantize=bits)) >= 90


def general_share(model, tokenizer) -> float:
    """Of a sample of the questions that were held out when the demo model was trained, in per cent."""
    items = random.Random(3).sample(held_out_questions(Book()), 160)
    answered = ask(model, tokenizer, items)
    return 100 * sum(said == expected_text(tokenizer, item.answer) for item, said in answered) / len(items)


@pytest.mark.parametrize(
    ("model", "data", "changes"),
    [
        ("demo", (TRAIN, GENERAL), {"learning_rate": 3e-3, "batch_size": 12, "max_steps": 110}),
        pytest.param(
            "demo-v1",
            (TRAIN, GENERAL, MORE_GENERAL),
            {"learning_rate": 4e-3, "batch_size": 16, "max_steps": 300, "lora_target": ("all-linear",)},
            marks=pytest.mark.long,
        ),
    ],
    ids=["demo", "demo-v1"],
)
def test_lora_with_general_rows_keeps_what_the_model_could_do(model, data, changes, tmp_path):
    run = replace(settings(model, "lora", tmp_path / "out"), data=data, **changes)
    assert share_right(run) >= 90
    before, after = general_share(*chatglm.load(model, "cpu")), general_share(*load_finetuned(run.output))
    assert after > before - 5


def test_the_data_are_what_the_script_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(towns, "FOLDER", tmp_path)
    towns.main()
    for file in (TRAIN, HELD_OUT, GENERAL, MORE_GENERAL):
        assert (tmp_path / Path(file).name).read_bytes() == Path(file).read_bytes()


def test_no_held_out_question_is_learned():
    learned = {row["prompt"] for row in towns.town_rows(held_out=False)}
    assert learned.isdisjoint(row["prompt"] for row in towns.town_rows(held_out=True))
