"""New text of a growing answer: printed once, never taken back."""

from __future__ import annotations

import random

import pytest

from chatglm.hub.tokenization_chatglm import process_response
from chatglm.streaming import new_text, settled_length

ALPHABET = "你好aB,!:;? \n[]训练时间2"


def grow(text: str, family: str) -> list[tuple[str, list]]:
    """The answers that stream_chat yields when `text` comes one character at a time."""
    return [(process_response(family, text[:end]), []) for end in range(1, len(text) + 1)]


@pytest.mark.parametrize("family", ["chatglm", "chatglm2"])
def test_the_pieces_add_up_to_the_last_answer_for_any_text(family: str):
    generator = random.Random(0)
    texts = ["".join(generator.choices(ALPHABET, k=30)) for _ in range(300)]
    for text in [*texts, "今天是[[训练时间]]吗?好的!!好", "a,你", "[[训练"]:
        answers = grow(text, family)
        pieces = [piece for piece, _ in new_text(answers, family)]
        assert "".join(pieces) == answers[-1][0], text


def test_text_is_shown_as_soon_as_it_is_certain():
    answers = [(text, []) for text in ("你", "你好", "你好a,", "你好a，我")]
    assert [piece for piece, _ in new_text(answers, "chatglm")] == ["你", "好", "a", "，我"]


def test_the_history_of_each_step_comes_along():
    steps = [("你", [("q", "你")]), ("你好", [("q", "你好")])]
    assert [history for _, history in new_text(steps, "chatglm2")] == [h for _, h in steps]


def test_an_empty_answer_gives_no_text():
    assert [piece for piece, _ in new_text([("", [("q", "")])], "chatglm")] == [""]


def test_only_chatglm_6b_waits_after_a_mark():
    assert settled_length("well,", "chatglm") == 4
    assert settled_length("well,", "chatglm2") == 5
