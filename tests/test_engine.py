"""Many conversations on one model: each is answered as if it were alone."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conversations import Conversation, computed_tokens

from chatglm.engine.answer import Answer
from chatglm.engine.engine import Engine, common_length
from chatglm.engine.guide import JSON_OBJECT
from chatglm.engine.request import EngineClosed, QueueFull, Request, SchemaTooComplex

QUERIES = ["你好", "12+30=?", "What is the capital of France?", "谢谢", "Who are you?", "写一段代码"]
TIMEOUT = 60  # seconds after which a test that waits for the engine has failed


@pytest.fixture(scope="module", params=["chatglm", "chatglm2"])
def talk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Conversation:
    """A random model with room for some hundred tokens."""
    length = {"chatglm": "max_sequence_length", "chatglm2": "seq_length"}[request.param]
    return Conversation(request.param, tmp_path_factory.mktemp(request.param), **{length: 600})


@pytest.fixture(scope="module", params=["demo", "demo-v1"])
def demo(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    import chatglm

    return chatglm.load(request.param, device="cpu")


@pytest.fixture
def start() -> Iterator[Callable[..., Engine]]:
    """Makes engines, and closes them after the test."""
    engines: list[Engine] = []

    def make(model: Any, tokenizer: Any, **options: Any) -> Engine:
        engines.append(Engine(model, tokenizer, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def read(answer: Answer) -> str:
    """Wait for the end of an answer; returns its pieces put together."""
    text = "".join(piece.text for piece in answer)
    assert text == answer.text
    return text


def wait_until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.002)


def greedy(talk: Conversation, query: str, history: Any = None, **options: Any) -> Request:
    return Request(talk.tokenizer.encode_chat(query, history), temperature=0, **options)


def endless(talk: Conversation, query: str) -> Request:
    """A request whose answer goes on until it is stopped."""
    return greedy(talk, query, logit_bias={talk.model.config.eos_token_id: -1e9})


# ---- the same answers


@pytest.mark.parametrize("max_batch", [1, 3, 8])
def test_many_at_once_are_answered_as_one_by_one(
    demo: tuple[Any, Any], max_batch: int, start: Callable[..., Engine]
) -> None:
    model, tokenizer = demo
    engine = start(model, tokenizer, max_batch=max_batch)
    answers = [engine.submit(Request(tokenizer.encode_chat(query), temperature=0)) for query in QUERIES]
    for query, answer in zip(QUERIES, answers, strict=True):
        assert read(answer) == model.chat(tokenizer, query, do_sample=False)[0]
        assert answer.finish_reason == "stop"
    statistics = engine.statistics()
    assert (statistics.finished, statistics.running, statistics.waiting) == (len(QUERIES), 0, 0)
    assert statistics.generated_tokens == sum(answer.completion_tokens for answer in answers)


def test_requests_join_and_leave_at_any_step(talk: Conversation, start: Callable[..., Engine]) -> None:
    lengths = [3, 40, 7, 1, 25, 12, 300]  # beyond the first step of the buffers, too
    engine = start(talk.model, talk.tokenizer, max_batch=3)
    answers = []
    for i, length in enumerate(lengths):
        answers.append(engine.submit(greedy(talk, f"问题{i}" * (i + 1), max_tokens=length)))
        time.sleep(0.01 * (i % 3))
    for i, (answer, length) in enumerate(zip(answers, lengths, strict=True)):
        alone = talk.chat(f"问题{i}" * (i + 1), do_sample=False, max_new_tokens=length)[0]
        assert read(answer) == alone
        assert answer.completion_tokens == length or answer.finish_reason == "stop"


def test_a_model_that_only_forward_can_compute_is_served_too(
    tmp_path: Path, family: str, start: Callable[..., Engine]
) -> None:
    talk = Conversation(family, tmp_path, pre_seq_len=3)
    assert talk.model.one_token_step() is None
    engine = start(talk.model, talk.tokenizer)
    answers = [engine.submit(greedy(talk, query, max_tokens=9)) for query in QUERIES]
    for query, answer in zip(QUERIES, answers, strict=True):
        assert read(answer) == talk.chat(query, do_sample=False, max_new_tokens=9)[0]


# ---- what is known is not computed again


def test_the_next_turn_computes_only_what_is_new(demo: tuple[Any, Any], start: Callable[..., Engine]) -> None:
    model, tokenizer = demo
    engine, history = start(model, tokenizer), []
    for query in ["法国的首都是哪里？", "谢谢", "15+7=?"]:
        prompt = tokenizer.encode_chat(query, history)
        known = len(tokenizer.encode_chat(*history[-1][:1], history[:-1])) if history else 0
        with computed_tokens() as counts:
            answer = engine.submit(Request(prompt, temperature=0))
            text = read(answer)
        assert text == model.chat(tokenizer, query, history, do_sample=False)[0]
        kept = answer.cached_tokens
        assert (kept >= known) if model.reads_forward else (kept == 0)
        assert sum(counts) == len(prompt) - kept + answer.completion_tokens - 1
        history.append((query, text))


def test_a_prompt_takes_its_beginning_from_a_conversation_that_goes_on(
    talk: Conversation, start: Callable[..., Engine]
) -> None:
    engine = start(talk.model, talk.tokenizer)
    system = "You are kind. " * 20
    first = engine.submit(endless(talk, system + "one"))
    wait_until(lambda: first.started)
    second = engine.submit(greedy(talk, system + "two", max_tokens=8))
    assert read(second) == talk.chat(system + "two", do_sample=False, max_new_tokens=8)[0]
    assert first.finish_reason is None
    assert bool(second.cached_tokens > 20) == talk.model.reads_forward


def test_a_conversation_keeps_its_row_while_there_are_free_ones(
    talk: Conversation, start: Callable[..., Engine]
) -> None:
    engine = start(talk.model, talk.tokenizer, max_batch=3)
    text = read(engine.submit(greedy(talk, "a long question " * 9, max_tokens=30)))
    read(engine.submit(greedy(talk, "b", max_tokens=3)))  # begins alike: the tokens in front of any prompt
    again = engine.submit(greedy(talk, "go on", [("a long question " * 9, text)], max_tokens=3))
    read(again)
    known = len(talk.tokenizer.encode_chat("a long question " * 9))
    assert bool(again.cached_tokens >= known) == talk.model.reads_forward


def test_rows_that_hold_the_same_are_told_apart(talk: Conversation, start: Callable[..., Engine]) -> None:
    engine = start(talk.model, talk.tokenizer, max_batch=3)
    alone = talk.chat("一样", do_sample=False, max_new_tokens=20)[0]
    for _ in range(2):
        answers = [engine.submit(greedy(talk, "一样", max_tokens=20)) for _ in range(6)]
        assert [read(answer) for answer in answers] == [alone] * 6


def test_common_length_leaves_one_token_to_read() -> None:
    assert common_length([1, 2, 3], [1, 2, 3, 4]) == 3
    assert common_length([1, 2, 3], [1, 2, 3]) == 2
    assert common_length([1, 9], [1, 2, 3]) == 1
    assert common_length([], [1]) == 0


# ---- chance


def test_the_same_seed_gives_the_same_answer_in_any_company(
    talk: Conversation, start: Callable[..., Engine]
) -> None:
    engine = start(talk.model, talk.tokenizer)
    request = Request(talk.tokenizer.encode_chat("你好"), max_tokens=12, temperature=0.9, top_p=0.9, seed=7)
    alone = read(engine.submit(request))
    company = [engine.submit(greedy(talk, query, max_tokens=20)) for query in QUERIES]
    assert read(engine.submit(request)) == alone
    others = {read(engine.submit(Request(request.prompt, max_tokens=12, seed=seed))) for seed in (1, 2, None)}
    assert len(others) == 3
    for answer in company:
        read(answer)


# ---- where an answer ends


def test_a_stop_string_ends_the_answer_and_is_no_part_of_it(
    demo: tuple[Any, Any], start: Callable[..., Engine]
) -> None:
    model, tokenizer = demo
    engine = start(model, tokenizer)
    prompt = tokenizer.encode_chat("Who are you?")
    whole = read(engine.submit(Request(prompt, temperature=0)))
    for stop in (whole[5:9], whole[-3:], whole[2], whole[:4]):
        answer = engine.submit(Request(prompt, temperature=0, stop=("never there", stop)))
        assert read(answer) == whole[: whole.index(stop)].strip()
        assert answer.finish_reason == "stop"
    assert read(engine.submit(Request(prompt, temperature=0, stop=("never there",)))) == whole


def test_an_answer_ends_where_the_context_does(talk: Conversation, start: Callable[..., Engine]) -> None:
    prompt = talk.tokenizer.encode_chat("你好")
    engine = start(talk.model, talk.tokenizer, context=len(prompt) + 5)
    answer = engine.submit(Request(prompt, temperature=0))
    read(answer)
    assert (answer.finish_reason, answer.completion_tokens) == ("length", 5)


def test_a_cancelled_answer_frees_its_place_at_once(talk: Conversation, start: Callable[..., Engine]) -> None:
    engine = start(talk.model, talk.tokenizer, max_batch=1)
    running, waiting = engine.submit(endless(talk, "one")), engine.submit(endless(talk, "two"))
    wait_until(lambda: running.completion_tokens > 3)
    waiting.cancel()
    wait_until(lambda: waiting.finish_reason)
    running.cancel()
    tokens = running.completion_tokens
    read(running)
    assert running.finish_reason == waiting.finish_reason == "cancelled"
    assert running.completion_tokens <= tokens + 1
    assert read(engine.submit(greedy(talk, "three", max_tokens=2))) != ""
    assert engine.statistics().cancelled == 2


def test_close_lets_answers_end_and_then_ends_them(talk: Conversation, start: Callable[..., Engine]) -> None:
    engine = start(talk.model, talk.tokenizer, max_batch=1)
    short, long, waiting = (
        engine.submit(greedy(talk, "one", max_tokens=1)),
        engine.submit(endless(talk, "two")),
        engine.submit(endless(talk, "three")),
    )
    wait_until(lambda: long.started)
    closing = threading.Thread(target=engine.close, args=(0.05,))
    closing.start()
    wait_until(lambda: engine._closing)
    with pytest.raises(EngineClosed, match="shut down"):
        engine.submit(greedy(talk, "four"))
    closing.join(TIMEOUT)
    assert [a.finish_reason for a in (short, long, waiting)] == ["length", "cancelled", "cancelled"]


def test_close_ends_embeddings_too(talk: Conversation, start: Callable[..., Engine]) -> None:
    engine = start(talk.model, talk.tokenizer)
    prompt = talk.tokenizer.encode_chat("你好")
    begun, waiting = engine.embed([prompt] * 10_000), engine.embed([prompt])
    wait_until(begun.running)
    engine.close()
    assert waiting.cancelled()
    with pytest.raises(EngineClosed):
        begun.result(0)


def test_a_full_queue_refuses_and_says_when_to_come_back(
    talk: Conversation, start: Callable[..., Engine]
) -> None:
    engine = start(talk.model, talk.tokenizer, max_batch=1, max_queue=2)
    answers = [engine.submit(endless(talk, "one"))]
    wait_until(lambda: engine.statistics().running)
    answers += [engine.submit(endless(talk, "more")) for _ in range(2)]
    with pytest.raises(QueueFull, match="2 requests are waiting") as refused:
        engine.submit(endless(talk, "too many"))
    assert 1 <= refused.value.retry_after <= 60
    for answer in answers:
        answer.cancel()
        read(answer)


# ---- what goes wrong


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": []}, "no tokens"),
        ({"prompt": [5, 10**9]}, "1000000000"),
        ({"prompt": [-1]}, "-1"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 10**12}, "max_tokens is 1000000000000"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"seed": 2**63}, "seed is"),
        ({"stop": ("a", "")}, "stop is"),
        ({"logit_bias": {10**9: 1.0}}, "1000000000"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_request_that_cannot_be_answered_is_refused(
    talk: Conversation, change: dict, message: str, start: Callable[..., Engine]
) -> None:
    engine = start(talk.model, talk.tokenizer)
    fields = {"prompt": talk.tokenizer.encode_chat("你好"), **change}
    with pytest.raises(ValueError, match=message):
        engine.submit(Request(**fields))


def test_a_prompt_that_fills_the_context_is_refused(talk: Conversation, start: Callable[..., Engine]) -> None:
    prompt = talk.tokenizer.encode_chat("你好")
    engine = start(talk.model, talk.tokenizer, context=len(prompt))
    with pytest.raises(ValueError, match=f"has {len(prompt)} tokens.*may have {len(prompt)}"):
        engine.submit(Request(prompt))


def test_scores_that_are_no_numbers_end_their_own_answer_alone(
    talk: Conversation, start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(talk.model, talk.tokenizer)
    good, ill, place = engine.submit(endless(talk, "one")), engine.submit(endless(talk, "two")), []
    scores_of = engine._step_scores

    def broken(rows: list) -> torch.Tensor:
        scores = scores_of(rows)
        for i, row in enumerate(rows):
            if row.job.answer is ill:
                scores[i, 3] = float("nan")
                place.append(i)
        return scores

    monkeypatch.setattr(engine, "_step_scores", broken)
    read(ill)
    assert ill.finish_reason == "error"
    assert "NaN or infinite" in str(ill.error)
    tokens = good.completion_tokens
    wait_until(lambda: good.completion_tokens > tokens + 5)
    assert good.finish_reason is None
    assert place


def test_an_error_in_a_step_ends_what_it_computed_and_nothing_else(
    talk: Conversation, start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(talk.model, talk.tokenizer, max_batch=2)
    scores_of, failures = engine._step_scores, [MemoryError("no more")]

    def failing(rows: list) -> torch.Tensor:
        if failures:
            raise failures.pop()
        return scores_of(rows)

    monkeypatch.setattr(engine, "_step_scores", failing)
    first = engine.submit(greedy(talk, "one", max_tokens=5))
    read(first)
    assert (first.finish_reason, str(first.error)) == ("error", "no more")
    assert (
        read(engine.submit(greedy(talk, "one", max_tokens=5)))
        == talk.chat("one", do_sample=False, max_new_tokens=5)[0]
    )
    assert engine.statistics().failed == 1


# ---- log-probabilities, JSON, embeddings


def test_log_probabilities_are_those_of_the_model(talk: Conversation, start: Callable[..., Engine]) -> None:
    engine = start(talk.model, talk.tokenizer)
    prompt = talk.tokenizer.encode_chat("你好")
    request = Request(
        prompt, temperature=0, max_tokens=6, top_logprobs=3, frequency_penalty=0.5, stop=("\0",)
    )
    tokens = [token for piece in engine.submit(request) for token in piece.tokens]
    assert len(tokens) == 6
    ids = torch.tensor([[*prompt, *(token.id for token in tokens)]])
    known = len(talk.tokenizer)
    with torch.no_grad():
        logprobs = talk.model(ids).logits[0, len(prompt) - 1 : -1, :known].float().log_softmax(-1)
    for token, expected in zip(tokens, logprobs, strict=True):
        assert token.logprob == pytest.approx(float(expected[token.id]), abs=1e-4)
        assert [i for i, _, _ in token.top] == expected.topk(3).indices.tolist()
        assert [p for _, _, p in token.top] == pytest.approx(expected.topk(3).values.tolist(), abs=1e-4)
        assert token.text == talk.tokenizer.token_bytes(token.id).decode(errors="replace")


def test_a_json_answer_is_a_json_object(demo: tuple[Any, Any], start: Callable[..., Engine]) -> None:
    pytest.importorskip("llguidance", reason="JSON answers need llguidance")
    model, tokenizer = demo
    engine = start(model, tokenizer)
    prompt = tokenizer.encode_chat("Who are you?")
    # So that it comes to an end: the model knows no JSON.
    bias = {tokenizer.convert_tokens_to_ids(mark): 9.0 for mark in '":}'}
    requests = [
        Request(prompt, seed=i, schema=JSON_OBJECT, max_tokens=200, logit_bias=bias) for i in range(8)
    ]
    answers = [engine.submit(request) for request in requests]
    ended = [answer for answer in answers if read(answer) and answer.finish_reason == "stop"]
    assert ended
    for answer in ended:
        assert isinstance(json.loads(answer.text), dict)


def test_answers_follow_their_schemas_each_its_own(
    demo: tuple[Any, Any], start: Callable[..., Engine]
) -> None:
    pytest.importorskip("llguidance", reason="JSON answers need llguidance")
    model, tokenizer = demo
    engine = start(model, tokenizer)
    prompt = tokenizer.encode_chat("Who are you?")
    city = {"type": "object", "properties": {"city": {"enum": ["巴黎", "Rome"]}}, "required": ["city"]}
    schemas = [{"enum": ["yes", "no"]}, city | {"additionalProperties": False}, {"type": "boolean"}]
    answers = [engine.submit(Request(prompt, seed=i, schema=json.dumps(schemas[i % 3]))) for i in range(9)]
    found = [json.loads(read(answer)) for answer in answers]
    assert {answer.finish_reason for answer in answers} == {"stop"}
    assert set(found[0::3]) <= {"yes", "no"}
    assert all(answer in ({"city": "巴黎"}, {"city": "Rome"}) for answer in found[1::3])
    assert all(isinstance(answer, bool) for answer in found[2::3])


@pytest.mark.parametrize(
    "schema", ['{"type": "poem"}', '{"$ref": "http://127.0.0.1:9/a"}', '{"not": {"type": "string"}}', "[]"]
)
def test_a_schema_that_cannot_be_followed_is_refused(
    schema: str, demo: tuple[Any, Any], start: Callable[..., Engine]
) -> None:
    pytest.importorskip("llguidance", reason="JSON answers need llguidance")
    engine = start(*demo)
    with pytest.raises(ValueError, match="JSON schema"):
        engine.submit(Request(demo[1].encode_chat("Who are you?"), schema=schema))


def test_a_schema_that_fails_says_so_without_what_it_holds(
    demo: tuple[Any, Any], start: Callable[..., Engine]
) -> None:
    pytest.importorskip("llguidance", reason="JSON answers need llguidance")
    engine, prompt = start(*demo), demo[1].encode_chat("Who are you?")
    with pytest.raises(SchemaTooComplex, match="NoExtensionBias"):
        engine.submit(Request(prompt, schema='{"$ref": "#"}'))
    pattern = {"type": "string", "pattern": "^(a?){5000}a{5000}$"}
    answer = engine.submit(Request(prompt, schema=json.dumps(pattern)))
    read(answer)
    assert answer.finish_reason == "error" and isinstance(answer.error, SchemaTooComplex)
    assert "LexerTooComplex" in str(answer.error) and "5000" not in str(answer.error)


def test_embeddings_are_the_mean_of_the_last_hidden_states(
    talk: Conversation, start: Callable[..., Engine]
) -> None:
    engine = start(talk.model, talk.tokenizer)
    prompts = [talk.tokenizer.encode_chat(query) for query in QUERIES[:3]]
    busy = engine.submit(greedy(talk, "one", max_tokens=20))
    for prompt, found in zip(prompts, engine.embed(prompts).result(TIMEOUT), strict=True):
        with torch.no_grad():
            states = talk.model.transformer(torch.tensor([prompt])).last_hidden_state[0]
        assert found == pytest.approx(states.mean(0).tolist(), abs=1e-5)
    read(busy)
    with pytest.raises(ValueError, match="1000000000"):
        engine.embed([prompts[0], [10**9]])


# ---- readers of answers


def test_answers_can_be_read_in_asyncio_and_left_early(
    talk: Conversation, start: Callable[..., Engine]
) -> None:
    engine = start(talk.model, talk.tokenizer)

    async def talks() -> tuple[str, str]:
        left = engine.submit(greedy(talk, "two"))
        async for _ in left:
            left.cancel()
            break
        whole = engine.submit(greedy(talk, "one", max_tokens=40))
        text = "".join([piece.text async for piece in whole])
        again = "".join([piece.text async for piece in whole])  # it has ended: nothing more, and no waiting
        return text, again

    text, again = asyncio.run(asyncio.wait_for(talks(), TIMEOUT))
    assert (text, again) == (talk.chat("one", do_sample=False, max_new_tokens=40)[0], "")
    wait_until(lambda: engine.statistics().running == 0)


def test_the_cache_has_the_size_that_is_told(talk: Conversation, start: Callable[..., Engine]) -> None:
    engine = start(talk.model, talk.tokenizer, max_batch=3, context=300)
    read(engine.submit(endless(talk, "你好")))
    used = sum(states.nbytes for layer in engine._buffers.layers for states in layer)
    assert used == engine.facts.most_cache_bytes
