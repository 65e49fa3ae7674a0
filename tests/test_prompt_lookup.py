"""prompt_lookup_num_tokens: several tokens a pass, and the tokens that come without it."""

from __future__ import annotations

import itertools

import pytest
import torch
from conversations import Conversation, computed_tokens
from helpers import (
    CHATGLM,
    EOP,
    GMASK,
    PAD,
    SOP,
    assert_close,
    pad_left,
    prompt,
    three_rows,
    tiny_model,
)
from transformers import GenerationMixin, LogitsProcessorList
from transformers.cache_utils import DynamicCache

from chatglm.hub import generation_chatglm
from chatglm.hub.generation_chatglm import PromptCache, PromptLookup

GREEDY = {"do_sample": False, "eos_token_id": None}
PERIOD = [20, 30, 40, 50, 60, 70]


def repeating(family: str, times: int = 3) -> torch.Tensor:
    """A prompt [1, T] that says the same again and again."""
    ids = PERIOD * times
    return torch.tensor([[*ids, GMASK, SOP] if family == CHATGLM else ids])


class Say:
    """Makes a model say `tokens`, and keeps the scores that it gave itself and the sequences it was asked with."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.scores, self.seen = tokens, [], []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token = self.tokens[len(self.scores)]
        self.scores.append(scores)
        self.seen.append(input_ids[0].tolist())
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([token]), 0.0)


def said(model, ids: torch.Tensor, tokens: list[int], **options) -> tuple[Say, list[int]]:
    """What the model was asked while it said `tokens`, and the number of tokens of every pass."""
    say, options = Say(tokens), {**GREEDY, "max_new_tokens": len(tokens), **options}
    with computed_tokens() as counts:
        out = model.generate(ids, logits_processor=LogitsProcessorList([say]), **options)
    assert out[0, ids.shape[1] :].tolist() == tokens
    return say, counts


# ---- the same answers


@pytest.mark.parametrize("number", [1, 3, 10])
@pytest.mark.parametrize("packing", [None, 8, 4], ids=["float", "int8", "int4"])
def test_greedy_answers_are_those_without(model, family, number, packing):
    model = model.quantize(packing) if packing else model
    for ids in (repeating(family), prompt(family, 20)):
        expected = model.generate(ids, max_new_tokens=30, **GREEDY)
        actual = model.generate(ids, max_new_tokens=30, prompt_lookup_num_tokens=number, **GREEDY)
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("answer", ["copied", "copied with mistakes", "new"])
def test_scores_and_what_processors_see_are_those_without(shared_model, family, answer, monkeypatch):
    """Positions, mask and cache are right wherever a guess begins and ends, also where tables are made anew."""
    monkeypatch.setattr(generation_chatglm, "STEP", 8)
    tokens = PERIOD * 4 if answer != "new" else list(range(100, 124))
    if answer == "copied with mistakes":
        tokens[4::5] = [90 + i for i in range(len(tokens[4::5]))]
    ids = repeating(family)
    plain, _ = said(shared_model, ids, tokens)
    looked_up, counts = said(shared_model, ids, tokens, prompt_lookup_num_tokens=7)
    assert looked_up.seen == plain.seen
    assert_close(torch.cat(looked_up.scores), torch.cat(plain.scores))
    assert (max(counts[1:]) > 1) == (answer != "new")


@pytest.mark.parametrize("options", [{"pre_seq_len": 3}, {"attn_implementation": "eager"}], ids=str)
def test_rare_options_give_the_answers_without(family, options):
    model, ids = tiny_model(family, **options), repeating(family)
    expected = model.generate(ids, max_new_tokens=30, **GREEDY)
    actual = model.generate(ids, max_new_tokens=30, prompt_lookup_num_tokens=4, **GREEDY)
    assert torch.equal(actual, expected)


def test_a_padded_row_gives_the_scores_without(shared_model, family):
    ids, tokens = repeating(family), PERIOD * 3
    padded, mask = pad_left([ids, prompt(family, 25)], PAD)
    plain, _ = said(shared_model, ids, tokens)
    looked_up, counts = said(
        shared_model, padded[:1], tokens, attention_mask=mask[:1], prompt_lookup_num_tokens=5
    )
    assert max(counts[1:]) > 1
    assert_close(torch.cat(looked_up.scores), torch.cat(plain.scores))


def test_the_same_seed_draws_the_same_tokens(shared_model, family):
    def drawn(**options) -> list[int]:
        torch.manual_seed(3)
        return shared_model.generate(
            repeating(family), do_sample=True, temperature=0.3, top_p=0.9, max_new_tokens=40, **options
        )[0].tolist()

    assert drawn(prompt_lookup_num_tokens=6) == drawn()


def test_an_answer_ends_where_it_does_without(shared_model, family):
    """In the middle of a guess that would have gone on."""
    tokens = [*PERIOD, 20, 30, EOP]
    ids = torch.cat((torch.tensor([[*PERIOD, 20, 30, EOP, 99, 98]]), prompt(family)), dim=1)
    say, counts = said(
        shared_model, ids, tokens, eos_token_id=EOP, max_new_tokens=50, prompt_lookup_num_tokens=8
    )
    assert len(say.scores) == len(tokens)
    assert max(counts[1:]) > 1


def test_chats_answer_as_without_and_reuse_their_cache(family, tmp_path):
    talk, history = Conversation(family, tmp_path), []
    caches, options = (PromptCache(), PromptCache()), {"do_sample": False, "max_new_tokens": 24}
    for query in ("你好 你好 你好 你好", "abc abc abc", "1+1=2 1+1=2"):
        expected = list(talk.stream(query, history, **options))
        options["prompt_lookup_num_tokens"] = 4
        assert list(talk.stream(query, history, **options)) == expected
        assert list(talk.stream(query, history, prompt_cache=caches[0], **options)) == expected
        assert talk.chat(query, history, prompt_cache=caches[1], **options) == expected[-1]
        del options["prompt_lookup_num_tokens"]
        _, history = expected[-1]


# ---- in fewer passes


def test_guesses_are_tried_in_one_pass_and_grow_while_they_are_right(shared_model, family):
    """2, 4, 6, 6 tokens are guessed, and each pass gives one more; two tokens must be said to be found again."""
    text = list(range(20, 60))
    ids = torch.tensor([[*text, GMASK, SOP] if family == CHATGLM else text])
    _, counts = said(shared_model, ids, text[:24], prompt_lookup_num_tokens=6)
    assert counts == [ids.shape[1], 1, 3, 5, 7, 7]


def test_where_nothing_is_found_every_pass_has_one_token(shared_model, family):
    ids = prompt(family, 20)
    _, counts = said(shared_model, ids, list(range(100, 130)), prompt_lookup_num_tokens=10)
    assert counts == [ids.shape[1]] + [1] * 29


def test_tokens_are_handed_out_one_by_one_beside_a_cache_without_the_last(shared_model, family):
    ids = repeating(family)
    steps = shared_model.stream_generate(
        ids,
        max_new_tokens=20,
        prompt_lookup_num_tokens=6,
        return_past_key_values=True,
        logits_processor=[Say(PERIOD * 4)],
        **GREEDY,
    )
    lengths = [(sequences.shape[1], cache.get_seq_length()) for sequences, cache in steps]
    assert lengths == [(ids.shape[1] + i, ids.shape[1] + i - 1) for i in range(1, 21)]


def test_a_stream_closed_inside_a_guess_leaves_a_cache_that_goes_on(shared_model, family):
    """The wrong half of a guess is not among what the next turn reuses."""
    ids, tokens = repeating(family), [*PERIOD[:4], 99, 98, 97, 96]
    stream = shared_model.stream_generate(
        ids,
        max_new_tokens=8,
        prompt_lookup_num_tokens=6,
        return_past_key_values=True,
        logits_processor=[Say(tokens)],
        **GREEDY,
    )
    *_, (sequences, cache) = itertools.islice(stream, 4)
    stream.close()
    with torch.no_grad():
        actual = shared_model(sequences[:, -1:], past_key_values=cache, use_cache=True).logits
        expected = shared_model(sequences).logits[:, -1:]
    assert_close(actual, expected)


def test_the_library_is_left_to_what_it_alone_can(model, family, monkeypatch):
    def noted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    calls, original = [], GenerationMixin._assisted_decoding
    monkeypatch.setattr(GenerationMixin, "_assisted_decoding", noted)
    options = {"max_new_tokens": 12, "prompt_lookup_num_tokens": 4, **GREEDY}
    ours = model.generate(repeating(family), **options)
    assert not calls
    theirs = model.generate(repeating(family), return_dict_in_generate=True, **options).sequences
    assert calls and torch.equal(theirs, ours)


# ---- what is guessed


def test_a_guess_is_what_followed_the_last_time():
    lookup = PromptLookup([1, 2, 3, 4, 1, 2, 5, 6, 7, 8, 1, 2], most=3)
    lookup.judge(2, 2)
    assert lookup.guess() == [5, 6, 7]


def test_the_longest_run_that_is_found_decides():
    assert PromptLookup([9, 1, 2, 3, 4, 8, 1, 2, 5, 5, 9, 1, 2], most=2).guess() == [3, 4]


def test_a_text_that_repeats_itself_is_guessed_to_go_on_so():
    lookup = PromptLookup([7, 1, 2, 1, 2], most=8)
    lookup.judge(4, 4)
    assert lookup.guess() == [1, 2] * 4


@pytest.mark.parametrize("ids", [[], [1], [1, 1], [1, 2, 3], [1, 2, 1]], ids=str)
def test_one_token_found_again_is_no_guess(ids):
    assert PromptLookup(ids, most=4).guess() == []


def test_a_run_of_one_token_is_enough_where_that_is_asked_for():
    assert PromptLookup([1, 2, 3, 1], most=2, longest=1).guess() == [2, 3]


def test_guesses_shrink_to_what_was_right_and_one_more():
    lookup, numbers = PromptLookup([1] * 9, most=10), []
    for right, guessed in [(2, 2), (4, 4), (8, 8), (3, 10), (0, 4), (1, 1)]:
        lookup.judge(right, guessed)
        numbers.append(lookup.number)
    assert numbers == [4, 8, 10, 4, 1, 2]


# ---- what does not go together


def test_several_rows_are_refused(shared_model, family):
    ids, mask = pad_left(three_rows(family), PAD)
    with pytest.raises(ValueError, match="there are 3 rows"):
        shared_model.generate(ids, attention_mask=mask, max_new_tokens=3, prompt_lookup_num_tokens=3)


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_lookup_num_tokens": 0},
        {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 0},
    ],
    ids=str,
)
def test_nothing_to_guess_is_refused(shared_model, family, options):
    with pytest.raises(ValueError, match="must be 1 at least"):
        shared_model.generate(prompt(family), max_new_tokens=3, **options)


def test_a_stream_on_another_cache_is_refused(shared_model, family):
    cache, ids = DynamicCache(), prompt(family)
    with torch.no_grad():
        shared_model(ids, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="which a DynamicCache cannot"):
        next(
            shared_model.stream_generate(
                ids[:, :1], past_key_values=cache, max_new_tokens=3, prompt_lookup_num_tokens=3
            )
        )
