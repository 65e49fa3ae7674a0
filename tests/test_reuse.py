"""What a PromptCache promises: the answers of a chat without it, for the work of the new tokens."""

from __future__ import annotations

import gc
import itertools
import threading

import pytest
import torch
from conversations import Conversation, computed_tokens
from helpers import CHATGLM, CHATGLM2
from transformers import LogitsProcessor

from chatglm.cli.backends import LoadedModel
from chatglm.cli.conversation import Conversation as Talk
from chatglm.hub.chat_chatglm import trim_history
from chatglm.hub.generation_chatglm import STEP, GrowingLayer, PromptCache

GREEDY = {"do_sample": False, "max_new_tokens": 8}
QUERIES = [
    "你好",
    "Hello world, how are you today?",
    "第一行\n第二行\n\n  end",
    "晚上睡不着\t应该怎么办？",
    "1+1=?\n",
    " [Round 2]\n\n问：😀",
]


@pytest.fixture(scope="module")
def talk(family, tmp_path_factory) -> Conversation:
    return Conversation(family, tmp_path_factory.mktemp(family))


@pytest.fixture(scope="module")
def talk2(tmp_path_factory) -> Conversation:
    return Conversation(CHATGLM2, tmp_path_factory.mktemp(CHATGLM2))


def check_rounds(talk: Conversation, **options) -> None:
    """Every round answered with one PromptCache, as without, by chat and by stream_chat."""
    history, chatted, streamed = [], PromptCache(), PromptCache()
    for query in QUERIES:
        expected = list(talk.stream(query, history, **options))
        assert list(talk.stream(query, history, prompt_cache=streamed, **options)) == expected
        assert talk.chat(query, history, prompt_cache=chatted, **options) == expected[-1]
        _, history = expected[-1]
    assert len(history) == len(QUERIES)


# ---- the same answers


def test_the_answers_of_several_rounds_are_those_without(talk):
    check_rounds(talk, **GREEDY)


def test_the_answers_of_several_rounds_are_those_without_in_the_published_vocabularies(family, published):
    check_rounds(Conversation(family, tokenizer=published), **GREEDY)


@pytest.mark.parametrize("options", [{"pre_seq_len": 3}, {"attn_implementation": "eager"}], ids=str)
def test_the_answers_of_rare_models_are_those_without(family, tmp_path, options):
    check_rounds(Conversation(family, tmp_path, **options), **GREEDY)


@pytest.mark.parametrize("limit", [0, 60, 120, 200])
def test_the_answers_to_trimmed_histories_are_those_without(talk, limit):
    check_rounds(talk, max_history_tokens=limit, **GREEDY)


def test_the_same_seed_draws_the_same_answers(talk):
    def sampled(**options) -> tuple:
        torch.manual_seed(5)
        return talk.chat(QUERIES[1], history, max_new_tokens=8, temperature=1.5, **options)

    prompt_cache = PromptCache()
    _, history = talk.chat(QUERIES[0], prompt_cache=prompt_cache, **GREEDY)
    assert sampled(prompt_cache=prompt_cache) == sampled()


def test_processors_see_the_whole_prompt(talk):
    """What counts words that were said, a repetition penalty for instance, is told of those on the cache too."""

    class Watch(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(input_ids.tolist())
            return scores

    def watched(**options) -> list:
        seen.clear()
        talk.chat(QUERIES[1], history, logits_processor=[Watch()], **GREEDY, **options)
        return list(seen)

    seen, prompt_cache = [], PromptCache()
    _, history = talk.chat(QUERIES[0], prompt_cache=prompt_cache, **GREEDY)
    assert watched(prompt_cache=prompt_cache) == watched()


@pytest.mark.parametrize(
    "edit",
    [
        lambda history: [("晚上", history[0][1]), *history[1:]],
        lambda history: [*history[:-1], (history[-1][0], "something else")],
        lambda history: history[1:],
        lambda history: history[:1],
        lambda history: [],
        lambda history: [("Another conversation?", "Yes.")] * 3,
    ],
    ids=["first query", "last answer", "oldest dropped", "newest dropped", "none", "another conversation"],
)
def test_a_history_that_was_changed_is_answered_as_without(talk, edit):
    history, prompt_cache = [], PromptCache()
    for query in QUERIES[:3]:
        _, history = talk.chat(query, history, prompt_cache=prompt_cache, **GREEDY)
    expected = talk.chat(QUERIES[3], edit(history), **GREEDY)
    assert talk.chat(QUERIES[3], edit(history), prompt_cache=prompt_cache, **GREEDY) == expected
    again = talk.chat(QUERIES[3], history, prompt_cache=prompt_cache, **GREEDY)
    assert again == talk.chat(QUERIES[3], history, **GREEDY)


def test_the_same_question_twice_is_answered_twice(talk):
    prompt_cache = PromptCache()
    answers = [talk.chat("你好", prompt_cache=prompt_cache, **GREEDY) for _ in range(3)]
    assert answers == [talk.chat("你好", **GREEDY)] * 3


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.double(),
        lambda model: model.quantize(8),
    ],
    ids=["dtype", "packed"],
)
def test_a_model_that_was_changed_computes_afresh(family, tmp_path, change):
    talk, prompt_cache = Conversation(family, tmp_path), PromptCache()
    _, history = talk.chat("你好", prompt_cache=prompt_cache, **GREEDY)
    change(talk.model)
    expected = talk.chat("晚上", history, **GREEDY)
    with computed_tokens() as counts:
        assert talk.chat("晚上", history, prompt_cache=prompt_cache, **GREEDY) == expected
    assert counts[0] == len(talk.tokenizer.encode_chat("晚上", history))


def test_another_model_computes_afresh(talk, family, tmp_path):
    other, prompt_cache = Conversation(family, tmp_path, seed=1), PromptCache()
    _, history = talk.chat("你好", prompt_cache=prompt_cache, **GREEDY)
    for each in (other, talk, other):
        expected = each.chat("晚上", history, **GREEDY)
        with computed_tokens() as counts:
            assert each.chat("晚上", history, prompt_cache=prompt_cache, **GREEDY) == expected
        assert counts[0] == len(talk.tokenizer.encode_chat("晚上", history))


# ---- for less work


def test_chatglm2_computes_only_the_new_tokens_of_a_further_turn(talk2):
    encode, prompt_cache = talk2.tokenizer.encode_chat, PromptCache()
    first = torch.tensor([encode("你好")])
    known = talk2.model.generate(first, **GREEDY)[0, :-1].tolist()  # the token chosen last is not computed
    _, history = talk2.chat("你好", prompt_cache=prompt_cache, **GREEDY)
    second = encode("晚上", history)
    shared = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(known, second, strict=False))))
    assert shared >= first.shape[1]
    with computed_tokens() as counts:
        talk2.chat("晚上", history, prompt_cache=prompt_cache, eos_token_id=None, **GREEDY)
    assert counts == [len(second) - shared] + [1] * (GREEDY["max_new_tokens"] - 1)


def test_a_trimmed_history_is_reused_until_it_is_trimmed_again(talk2):
    """A quarter of the limit is dropped at a time, here the tokens of three rounds or four."""
    limit, prompt_cache, history, afresh = 400, PromptCache(), [], 0
    for i in range(40):
        query = f"你好 {i}"
        kept = trim_history(talk2.tokenizer, query, history, limit)
        with computed_tokens() as counts:
            _, history = talk2.chat(
                query, history, prompt_cache=prompt_cache, max_history_tokens=limit, **GREEDY
            )
        afresh += counts[0] > len(talk2.tokenizer.encode_chat(query, kept)) / 2
    assert len(kept) < 15 < len(history)
    assert afresh <= 12


def test_chatglm_6b_computes_everything_and_keeps_nothing(tmp_path):
    """It reads its prompt in both directions: a longer one changes the keys of every token."""
    talk, prompt_cache = Conversation(CHATGLM, tmp_path), PromptCache()
    before = layers()
    _, history = talk.chat("你好", prompt_cache=prompt_cache, **GREEDY)
    assert layers() == before
    for _ in range(2):
        with computed_tokens() as counts:
            talk.chat("晚上", history, prompt_cache=prompt_cache, **GREEDY)
        assert counts[0] == len(talk.tokenizer.encode_chat("晚上", history))


# ---- turns that end otherwise


def layers() -> int:
    """Layers of caches that are alive."""
    gc.collect()
    return sum(type(thing) is GrowingLayer for thing in gc.get_objects())


def next_turn(talk: Conversation, history: list, prompt_cache: PromptCache) -> int:
    """Check a further turn; return how many tokens of its prompt were reused."""
    expected = talk.chat("晚上", history, **GREEDY)
    with computed_tokens() as counts:
        assert talk.chat("晚上", history, prompt_cache=prompt_cache, **GREEDY) == expected
    return len(talk.tokenizer.encode_chat("晚上", history)) - counts[0]


def test_a_stream_closed_in_the_middle_leaves_what_it_computed(talk, family):
    prompt_cache = PromptCache()
    stream = talk.stream("你好", prompt_cache=prompt_cache, **GREEDY)
    next(stream)
    _, history = next(stream)
    stream.close()
    prompt = len(talk.tokenizer.encode_chat("你好"))
    assert next_turn(talk, history, prompt_cache) >= prompt * (family == CHATGLM2)


@pytest.mark.parametrize("calls", [1, 2, 7, 8], ids=lambda calls: f"call {calls}")
def test_ctrl_c_between_two_layers_leaves_whole_tokens(talk, family, calls, monkeypatch):
    """Calls 1 and 2 are the two layers over the prompt, 7 and 8 those over the third token of the answer."""
    prompt_cache, update = PromptCache(), GrowingLayer.update

    def interrupted(*args, **kwargs):
        seen.append(1)
        if len(seen) == calls:
            raise KeyboardInterrupt
        return update(*args, **kwargs)

    seen, history = [], []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(GrowingLayer, "update", interrupted)
        for turn in talk.stream("你好", prompt_cache=prompt_cache, **GREEDY):
            history = turn[1]
    reused = next_turn(talk, history, prompt_cache)
    if calls > 2 and family == CHATGLM2:
        assert reused >= len(talk.tokenizer.encode_chat("你好"))


def test_a_turn_that_fails_leaves_nothing(talk):
    class Fail(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if len(input_ids[0]) > len(prompt) + 2:
                raise ValueError("enough")
            return scores

    prompt, prompt_cache, before = talk.tokenizer.encode_chat("你好"), PromptCache(), layers()
    with pytest.raises(ValueError, match="enough"):
        talk.chat("你好", prompt_cache=prompt_cache, logits_processor=[Fail()], **GREEDY)
    assert layers() == before
    assert next_turn(talk, [], prompt_cache) == 0


def test_clear_frees_the_memory(talk):
    prompt_cache, before = PromptCache(), layers()
    _, history = talk.chat("你好", prompt_cache=prompt_cache, **GREEDY)
    prompt_cache.clear()
    assert layers() == before
    assert next_turn(talk, history, prompt_cache) == 0


# ---- several at once


def test_two_streams_in_turn_never_mix(talk):
    prompt_cache = PromptCache()
    _, history = talk.chat("你好", prompt_cache=prompt_cache, **GREEDY)
    queries = ["晚上", "Hello world"]
    expected = [list(talk.stream(query, history, **GREEDY)) for query in queries]
    streams = [talk.stream(query, history, prompt_cache=prompt_cache, **GREEDY) for query in queries]
    actual = [[], []]
    while len(actual[0]) < len(expected[0]) or len(actual[1]) < len(expected[1]):
        for turns, stream in zip(actual, streams, strict=True):
            turns += [turn for turn in [next(stream, None)] if turn]
    assert actual == expected


def test_threads_with_one_prompt_cache_never_mix(talk):
    prompt_cache, wrong = PromptCache(), []
    _, history = talk.chat("你好", prompt_cache=prompt_cache, **GREEDY)
    expected = {query: talk.chat(query, history, **GREEDY) for query in QUERIES[:4]}

    def ask(query: str) -> None:
        for _ in range(4):
            if talk.chat(query, history, prompt_cache=prompt_cache, **GREEDY) != expected[query]:
                wrong.append(query)

    threads = [threading.Thread(target=ask, args=(query,)) for query in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ---- what does not go together


def test_several_conversations_or_beams_are_refused(talk):
    with pytest.raises(ValueError, match="2 prompts"):
        talk.model.batch_chat(talk.tokenizer, ["a", "b"], prompt_cache=PromptCache())
    with pytest.raises(ValueError, match="num_beams is 3"):
        talk.chat("a", num_beams=3, prompt_cache=PromptCache())


@pytest.mark.parametrize(
    "option",
    [{"prompt_cache": PromptCache()}, {"max_history_tokens": 9}],
    ids=lambda option: next(iter(option)),
)
def test_the_published_way_to_continue_stands_alone(talk2, option):
    with pytest.raises(ValueError, match="leave out the ones or the others"):
        next(talk2.stream("a", return_past_key_values=True, **option))


def test_a_streamer_gets_the_prompt_and_then_every_token(talk):
    class Streamer:
        def __init__(self) -> None:
            self.tokens, self.ended = [], False

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    streamers = Streamer(), Streamer()
    talk.chat("你好", streamer=streamers[0], **GREEDY)
    talk.chat("你好", streamer=streamers[1], prompt_cache=PromptCache(), **GREEDY)
    assert vars(streamers[0]) == vars(streamers[1])
    assert streamers[0].ended


# ---- max_history_tokens

LONG = [(f"question {i}\n你好", f"answer {i} 晚上") for i in range(30)]


@pytest.mark.parametrize("limit", [0, 1, 30, 100, 250, 10_000])
def test_the_prompt_has_so_many_tokens_at_most_or_is_the_query_alone(tokenizer, limit):
    kept = trim_history(tokenizer, "query", LONG, limit)
    length = len(tokenizer.encode_chat("query", kept))
    assert kept == LONG[len(LONG) - len(kept) :]
    assert length <= limit or kept == []
    if kept != LONG:  # a quarter of the limit and a round may be missing
        assert length >= limit * 3 / 4 - 60
    assert trim_history(tokenizer, "query", LONG, None) == LONG


def test_the_history_that_comes_back_has_all_rounds(talk):
    for call in (talk.chat, lambda *args, **options: list(talk.stream(*args, **options))[-1]):
        response, history = call("晚上", LONG, max_history_tokens=100, **GREEDY)
        assert history == [*LONG, ("晚上", response)]


def test_every_conversation_of_a_batch_is_trimmed_on_its_own(talk):
    queries, histories = ["晚上", "你好"], [LONG, LONG[:1]]
    together = talk.model.batch_chat(talk.tokenizer, queries, histories, max_history_tokens=100, **GREEDY)
    for answer, query, history in zip(together, queries, histories, strict=True):
        kept = trim_history(talk.tokenizer, query, history, 100)
        assert answer[0] == talk.chat(query, kept, **GREEDY)[0]
        assert answer[1][:-1] == history


@pytest.mark.parametrize("limit", [-1, 2.5, "100"], ids=str)
def test_a_limit_that_is_no_number_of_tokens_is_refused(talk, limit):
    with pytest.raises(ValueError, match="max_history_tokens is"):
        talk.chat("a", max_history_tokens=limit)


# ---- chatglm chat


def talk_in_terminal(talk, **options) -> Talk:
    return Talk(LoadedModel(talk.model, talk.tokenizer, temperature=0.0, **options))


def test_the_second_turn_in_the_terminal_computes_only_its_new_tokens(talk2):
    chat = talk_in_terminal(talk2, max_length=400)
    for query, response in LONG[:5]:
        chat.messages += [{"role": "user", "content": query}, {"role": "assistant", "content": response}]
    with computed_tokens() as first:
        next(chat.ask("你好"))
    with computed_tokens() as second:
        next(chat.ask("晚上"))
    assert second[0] < first[0] / 4


def test_clear_in_the_terminal_forgets_the_cache_too(talk2):
    before = layers()
    chat = talk_in_terminal(talk2, max_length=200)
    "".join(chat.ask("你好"))
    assert layers() > before
    chat.clear()
    assert layers() == before


def test_memory_stays_flat_over_200_rounds(talk2):
    def tensor_bytes() -> int:
        """Of all tensors that are alive but parameters; parts of others count once more."""
        gc.collect()
        alive = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
        return sum(tensor.numel() * tensor.element_size() for tensor in alive)

    chat = talk_in_terminal(talk2, max_length=120, max_new_tokens=4)
    sizes, empty, forgotten = [], tensor_bytes(), 0
    for i in range(200):
        "".join(chat.ask(f"你好 {i}"))
        forgotten += chat.last_answer.left_out > 0
        if i % 20 == 19:
            sizes.append(tensor_bytes() - empty)
    assert forgotten > 20
    token = 2 * 2 * 2 * 16 * 4  # bytes of keys and values of two layers with two heads
    assert max(sizes) <= (STEP + 120) * token + 120 * 8  # one buffer, the part of it in use, and the ids
