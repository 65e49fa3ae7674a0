"""Conversations: what chat, stream_chat and batch_chat promise beyond the recorded answers."""

from __future__ import annotations

import functools
import gc
import itertools
import threading
import weakref

import pytest
import torch
from conversations import Conversation
from transformers import LogitsProcessor, LogitsProcessorList

GREEDY = {"do_sample": False, "max_new_tokens": 10}
HISTORY = [("你好", "你好！"), ("1+1=?", "2")]


@pytest.fixture(scope="module")
def conversation(family, tmp_path_factory):
    return Conversation(family, tmp_path_factory.mktemp(family))


def force(*ids: int) -> LogitsProcessorList:
    """A processor that makes the model say `ids`, one after the other, whatever its scores are."""

    class Script(LogitsProcessor):
        def __init__(self) -> None:
            self.rest = list(ids)

        def __call__(self, input_ids, scores):
            forced = torch.full_like(scores, -torch.inf)
            forced[:, self.rest.pop(0)] = 0.0
            return forced

    return LogitsProcessorList([Script()])


def test_history_goes_in_untouched_and_comes_out_longer(conversation):
    history = list(HISTORY)
    response, longer = conversation.model.chat(conversation.tokenizer, "晚上", history=history, **GREEDY)
    assert history == HISTORY
    assert longer == [*HISTORY, ("晚上", response)]


def test_the_last_yield_of_a_stream_equals_chat(conversation):
    expected = conversation.model.chat(conversation.tokenizer, "你好", history=HISTORY, **GREEDY)
    *_, last = conversation.model.stream_chat(conversation.tokenizer, "你好", history=HISTORY, **GREEDY)
    assert last == expected


def test_sampling_with_the_same_seed_gives_chat_and_stream_the_same_answer(conversation):
    settings = {"top_p": 0.9, "temperature": 1.5, "max_new_tokens": 12}
    torch.manual_seed(7)
    expected = conversation.model.chat(conversation.tokenizer, "你好", **settings)
    torch.manual_seed(7)
    *_, last = conversation.model.stream_chat(conversation.tokenizer, "你好", **settings)
    assert last == expected


def test_every_text_of_a_stream_is_longer_than_the_one_before_or_equal(conversation):
    texts = [r for r, _ in conversation.model.stream_chat(conversation.tokenizer, "你好", **GREEDY)]
    assert all(b.startswith(a.rstrip()[:-1]) for a, b in itertools.pairwise(texts))


def test_a_stream_holds_half_a_character_back(conversation):
    to_ids = conversation.tokenizer.convert_tokens_to_ids
    emoji = [to_ids(f"<0x{byte:02X}>") for byte in "😀".encode()]
    eos = conversation.model.generation_config.eos_token_id
    texts = [
        response
        for response, _ in conversation.model.stream_chat(
            conversation.tokenizer,
            "你好",
            do_sample=False,
            max_new_tokens=6,
            logits_processor=force(*emoji, eos),
        )
    ]
    assert texts[0] == "😀"
    assert not any("\ufffd" in text for text in texts)


def test_an_answer_that_ends_inside_a_character_is_shown_as_chat_shows_it(conversation):
    half = conversation.tokenizer.convert_tokens_to_ids("<0xF0>")
    settings = {"do_sample": False, "max_new_tokens": 1}
    turns = list(
        conversation.model.stream_chat(
            conversation.tokenizer, "你好", logits_processor=force(half), **settings
        )
    )
    response, _ = conversation.model.chat(
        conversation.tokenizer, "你好", logits_processor=force(half), **settings
    )
    assert [text for text, _ in turns] == [response] == ["\ufffd"]


def test_an_empty_answer_is_yielded_once(conversation):
    eos = conversation.model.generation_config.eos_token_id
    turns = list(
        conversation.model.stream_chat(
            conversation.tokenizer, "你好", do_sample=False, logits_processor=force(eos)
        )
    )
    assert turns == [("", [("你好", "")])]


def test_greedy_answers_of_a_batch_equal_those_of_each_conversation_alone(conversation):
    queries = ["你好", "晚上睡不着应该怎么办？", "Hello world, how are you today?"]
    histories = [None, HISTORY, HISTORY[:1]]
    together = conversation.model.batch_chat(conversation.tokenizer, queries, histories, **GREEDY)
    alone = [
        conversation.model.chat(conversation.tokenizer, query, history, **GREEDY)
        for query, history in zip(queries, histories, strict=True)
    ]
    assert together == alone


def test_rows_of_a_batch_that_end_early_lose_their_padding(conversation):
    eos = conversation.model.generation_config.eos_token_id
    word = conversation.tokenizer.encode("天", add_special_tokens=False)[-1]

    class Uneven(LogitsProcessor):
        step = 0

        def __call__(self, input_ids, scores):
            forced = torch.full_like(scores, -torch.inf)
            forced[0, eos if self.step else word] = 0
            forced[1, eos if self.step == 3 else word] = 0
            self.step += 1
            return forced

    answers = conversation.model.batch_chat(
        conversation.tokenizer, ["你好", "天气"], do_sample=False, logits_processor=[Uneven()]
    )
    assert [response for response, _ in answers] == ["天", "天天天"]


def test_tokens_that_have_no_text_are_never_sampled(conversation):
    size = len(conversation.tokenizer)
    head = conversation.model.get_output_embeddings().weight

    seen = []

    class Record(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(scores[:, size:].max().item())
            return scores

    conversation.model.chat(conversation.tokenizer, "你好", logits_processor=[Record()], **GREEDY)
    assert head.shape[0] > size
    assert seen == [-torch.inf] * len(seen) and seen


def test_temperature_zero_means_the_likeliest_token(conversation):
    greedy = conversation.model.chat(conversation.tokenizer, "你好", **GREEDY)
    assert conversation.model.chat(conversation.tokenizer, "你好", temperature=0, max_new_tokens=10) == greedy


def test_max_length_counts_prompt_and_answer(conversation):
    prompt = len(conversation.tokenizer.encode_chat("你好"))
    sizes = [
        sequences.shape[1]
        for sequences in conversation.model.stream_generate(
            torch.tensor([conversation.tokenizer.encode_chat("你好")]),
            do_sample=False,
            max_length=prompt + 3,
            eos_token_id=None,
        )
    ]
    assert sizes == [prompt + 1, prompt + 2, prompt + 3]


@pytest.mark.parametrize("call", ["chat", "stream_chat"])
def test_a_prompt_that_leaves_no_room_is_refused_before_any_computing(conversation, call, monkeypatch):
    monkeypatch.setattr(conversation.model, "forward", None)
    length = len(conversation.tokenizer.encode_chat("你好"))
    with pytest.raises(ValueError, match=f"{length} tokens and max_length is {length}"):
        list(getattr(conversation.model, call)(conversation.tokenizer, "你好", max_length=length))


@pytest.mark.parametrize("query", [None, 3])
@pytest.mark.parametrize("call", ["chat", "stream_chat"])
def test_a_query_that_is_no_text_is_refused(conversation, call, query):
    with pytest.raises(ValueError, match="The query is"):
        list(getattr(conversation.model, call)(conversation.tokenizer, query))


@pytest.mark.parametrize("query", ["", "  \n"], ids=["empty", "blank"])
def test_a_query_without_letters_is_answered(conversation, query):
    answer, history = conversation.model.chat(conversation.tokenizer, query, **GREEDY)
    assert history == [(query, answer)]


@pytest.mark.parametrize(
    "history", [["你好"], [("a", "b", "c")], [("a", None)], "你好", [{"role": "user"}]], ids=repr
)
def test_a_history_of_the_wrong_shape_is_refused(conversation, history):
    with pytest.raises(ValueError, match="history"):
        conversation.model.chat(conversation.tokenizer, "你好", history=history, **GREEDY)


def test_a_batch_needs_a_history_for_each_query(conversation):
    with pytest.raises(ValueError, match="2 queries and 1 histories"):
        conversation.model.batch_chat(conversation.tokenizer, ["a", "b"], [[]])
    with pytest.raises(ValueError, match="list of queries"):
        conversation.model.batch_chat(conversation.tokenizer, "ab")


def test_scores_that_are_not_numbers_end_the_answer_with_a_sentence(conversation, tmp_path):
    broken = Conversation(conversation.family, tmp_path)
    with torch.no_grad():
        broken.model.get_output_embeddings().weight[7] = torch.nan
    with pytest.raises(ValueError, match="new token 1 in row 0 are NaN"):
        broken.model.chat(broken.tokenizer, "你好", **GREEDY)
    with pytest.raises(ValueError, match="new token 1 in row 0 are NaN"):
        list(broken.model.stream_chat(broken.tokenizer, "你好", **GREEDY))


def test_closing_a_stream_frees_its_cache_at_once(conversation):
    caches = []
    forward = conversation.model.forward

    @functools.wraps(forward)
    def watch(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        caches.append(weakref.ref(outputs.past_key_values))
        return outputs

    conversation.model.forward = watch
    try:
        stream = conversation.model.stream_chat(conversation.tokenizer, "你好", **GREEDY)
        next(stream)
        assert caches[0]() is not None
        gc.disable()  # freed by the close itself, not by a later collection
        stream.close()
        assert caches[0]() is None
    finally:
        gc.enable()
        del conversation.model.forward


def test_two_threads_that_chat_with_one_model_never_mix_their_answers(conversation):
    queries = ["你好", "晚上睡不着应该怎么办？", "Hello world"]
    expected = {q: conversation.model.chat(conversation.tokenizer, q, **GREEDY) for q in queries}
    wrong = []

    def talk(query: str) -> None:
        for _ in range(3):
            *_, last = conversation.model.stream_chat(conversation.tokenizer, query, **GREEDY)
            if last != expected[query]:
                wrong.append(query)

    threads = [threading.Thread(target=talk, args=(query,)) for query in queries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_chatglm2_computes_only_the_new_tokens_of_a_further_turn(tmp_path):
    chat = Conversation("chatglm2", tmp_path)
    *_, (_, history, cache) = chat.model.stream_chat(
        chat.tokenizer, "你好", return_past_key_values=True, **GREEDY
    )
    lengths = []
    forward = chat.model.forward

    @functools.wraps(forward)
    def watch(*args, **kwargs):
        lengths.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    chat.model.forward = watch
    list(
        chat.model.stream_chat(chat.tokenizer, "晚上", history, cache, return_past_key_values=True, **GREEDY)
    )
    assert lengths[0] == len(chat.tokenizer.encode_chat_continuation("晚上", history))
    assert set(lengths[1:]) == {1}


def test_chatglm_6b_says_why_it_cannot_continue_on_a_cache(tmp_path):
    chat = Conversation("chatglm", tmp_path)
    with pytest.raises(ValueError, match="both directions"):
        list(chat.model.stream_chat(chat.tokenizer, "你好", return_past_key_values=True))
