"""How the engine chooses tokens, and how it turns them into text that stays as it is."""

from __future__ import annotations

import random

import pytest
import torch
from test_tokenizer import nasty_strings
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from chatglm.engine import sampling
from chatglm.engine.answer import Transcript
from chatglm.engine.request import Request
from chatglm.engine.sampling import Chooser, choose
from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer, process_response

SIZE = 50


def scores(rows: int = 1, seed: int = 0, size: int = SIZE) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 3


def request(**options: object) -> Request:
    return Request([1], **options)


# ---- which token


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, 0, 1.0),
        (0.7, 5, 1.0),
        (1.3, 0, 0.6),
        (0.9, 20, 0.8),
        (1.0, SIZE + 9, 0.3),
        (2.0, 1, 1.0),
        (1.0, 0, 1e-9),
    ],
)
@pytest.mark.parametrize("likeliest", [4, 1024], ids=["sorted", "among-the-likeliest"])
def test_tokens_are_drawn_as_temperature_top_k_and_top_p_say(
    temperature: float, top_k: int, top_p: float, likeliest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "LIKELIEST", likeliest)
    row = scores()
    expected = TemperatureLogitsWarper(temperature)(None, row.clone())
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    expected = (
        TopPLogitsWarper(top_p)(None, expected).softmax(-1)[0] if top_p < 1 else expected.softmax(-1)[0]
    )
    draws = 4000
    asked = request(temperature=temperature, top_k=top_k, top_p=top_p)
    choosers = [Chooser(asked) for _ in range(draws)]
    for i, chooser in enumerate(choosers):
        chooser.random = Even((i + 0.5) / draws)
    found = torch.zeros(SIZE)
    for each in choose(row.repeat(draws, 1), choosers, SIZE):
        found[each.id] += 1 / draws
    assert torch.allclose(found, expected, atol=2 / draws)
    assert not found[expected == 0].any()


class Even(random.Random):
    """Evenly spread numbers instead of random ones, so that shares can be counted."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def random(self) -> float:
        return self.value


def test_each_row_follows_its_own_settings() -> None:
    table = scores(rows=4, seed=1)
    asked = [
        request(temperature=0),
        request(top_k=1),
        request(temperature=1e-9, seed=1),
        request(top_p=1e-6, top_k=30),
    ]
    found = choose(table.clone(), [Chooser(each) for each in asked], SIZE)
    assert [each.id for each in found] == table.argmax(-1).tolist()


@pytest.mark.parametrize("top_k", [0, 7])
def test_chance_never_leads_outside_what_may_be_drawn(top_k: int) -> None:
    row = scores(seed=2)
    for value in (0.0, 1 - 2**-53):
        chooser = Chooser(request(top_k=top_k))
        chooser.random = Even(value)
        (found,) = choose(row.clone(), [chooser], 20)
        assert found.id < 20


def test_rows_that_fill_up_the_vocabulary_are_never_chosen() -> None:
    row = scores()
    row[0, 40:] = 100.0
    for asked in (request(temperature=0), request(seed=1), request(top_p=0.5, seed=1)):
        (found,) = choose(row.clone(), [Chooser(asked)], 40)
        assert found.id < 40


def test_penalties_are_taken_off_what_the_answer_has() -> None:
    row = torch.zeros(1, SIZE)
    row[0, :3] = torch.tensor([3.0, 2.5, 1.0])
    chooser = Chooser(request(temperature=0, presence_penalty=0.4, frequency_penalty=0.3))
    ids = [choose(row.clone(), [chooser], SIZE)[0].id for _ in range(5)]
    # 0: 3.0, then 2.3, 2.0, ...; 1: 2.5, then 1.8, 1.5; the higher one each time.
    assert ids == [0, 1, 0, 0, 1]


def test_a_bias_bans_and_forces_tokens() -> None:
    row = scores()
    best = int(row.argmax())
    (banned,) = choose(row.clone(), [Chooser(request(temperature=0, logit_bias={best: -100.0}))], SIZE)
    (forced,) = choose(row.clone(), [Chooser(request(logit_bias={7: 100.0}, seed=0))], SIZE)
    assert banned.id == int(row[0].topk(2).indices[1])
    assert forced.id == 7


def test_a_row_of_scores_that_are_no_numbers_is_an_error_for_itself() -> None:
    table = scores(rows=3)
    table[1, 4] = float("nan")
    first, second, third = choose(table.clone(), [Chooser(request(temperature=0)) for _ in range(3)], SIZE)
    assert (first.id, third.id) == (int(table[0].argmax()), int(table[2].argmax()))
    assert isinstance(second, ValueError)


# ---- text


def transcript(tokenizer: ChatGLMTokenizer, text: str, **options: object) -> tuple[list[str], Transcript]:
    """The pieces of an answer that is `text`, and its transcript."""
    result = Transcript(tokenizer, request(**options))
    pieces = []
    for token in tokenizer._encode_plain(text):
        pieces.append(result.put(token))
        if result.stopped:
            break
    return [*pieces, result.finish()], result


@pytest.mark.parametrize("clean", [True, False], ids=["clean", "raw"])
def test_pieces_add_up_to_the_whole_for_nasty_strings(published: ChatGLMTokenizer, clean: bool) -> None:
    for text in [
        *nasty_strings(seed=11, count=300),
        "中, 中,a,中",
        "[[训练时间]][[训练",
        " a \n",
        "中,\n\n文!",
        "😀👋🏽",
    ]:
        ids = published._encode_plain(text)
        pieces, result = transcript(published, text, clean=clean)
        whole = published.decode(ids)
        assert (
            "".join(pieces) == result.text == (process_response(published.family, whole) if clean else whole)
        )
        shown = ""
        for piece in pieces:  # what has been shown is never taken back
            shown += piece
            assert result.text.startswith(shown)


def test_a_stop_string_is_found_wherever_tokens_part_it(published: ChatGLMTokenizer) -> None:
    rng = random.Random(3)
    for text in [t for t in nasty_strings(seed=12, count=200) if len(published._encode_plain(t)) > 1]:
        whole = published.decode(published._encode_plain(text))
        start = rng.randrange(len(whole))
        stop = whole[start : start + rng.randint(1, 5)]
        pieces, result = transcript(published, text, stop=(stop, "\ue000 is nowhere"), clean=False)
        assert "".join(pieces) == result.text == whole[: whole.index(stop)]
        assert result.stopped


def test_the_first_of_several_stop_strings_counts(tokenizer: ChatGLMTokenizer) -> None:
    _, result = transcript(tokenizer, "one two three", stop=("three", "two", "e two"), clean=False)
    assert result.text == "on"


def test_blanks_in_front_of_a_clean_answer_do_not_stop_it(tokenizer: ChatGLMTokenizer) -> None:
    _, result = transcript(tokenizer, "\n\none\ntwo", stop=("\n",))
    assert result.text == "one"
