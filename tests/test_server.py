"""The routes of the server, field by field, on the demo model."""

from __future__ import annotations

import base64
import itertools
import json
import re
import struct

import pytest

pytest.importorskip("fastapi", reason="the server needs the extra 'server'")

from live_server import LiveServer, live_server
from test_tokenizer import NASTY

from chatglm.server.model import as_turns
from chatglm.server.schemas import Message
from chatglm.server.settings import Settings

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
HELLO = "Hello! I am the small demo model of the chatglm package. Nice to talk to you."
LONG = {"logit_bias": {"2": -100}}  # without its end token the model writes on
RANDOM = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 12}


@pytest.fixture(scope="module")
def server():
    with live_server() as running:
        yield running


def user(content: str) -> dict:
    return {"model": "demo", "messages": [{"role": "user", "content": content}]}


def answer(response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def refused(response, status: int = 400) -> dict:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].endswith(".")
    return error


def joined(chunks: list, index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content", "") for choice in choices)


# ---- chat completions


def test_a_chat_is_answered_with_its_numbers_of_tokens_and_why_it_ended(server: LiveServer):
    body = server.chat("hello").json()
    assert body["object"] == "chat.completion" and body["model"] == "demo"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": HELLO, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    tokenizer = server.model.tokenizer
    prompt = len(tokenizer.encode_chat("hello"))
    usage = body["usage"]
    assert usage["prompt_tokens"] == prompt
    assert usage["completion_tokens"] == len(tokenizer.encode(HELLO, add_special_tokens=False)) + 1  # its end
    assert usage["total_tokens"] == prompt + usage["completion_tokens"]


def test_the_answer_is_the_one_of_model_chat(server: LiveServer):
    model, tokenizer = server.model.engine.model, server.model.tokenizer
    expected, _ = model.chat(tokenizer, "12+30=?", [("hello", "Hello!")], do_sample=False)
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "12+30=?"},
    ]
    assert answer(server.chat(messages)) == expected


def test_a_stream_has_the_role_first_then_the_text_then_the_reason_and_done(server: LiveServer):
    chunks = server.chunks(CHAT, user("hello"))
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert joined(chunks) == HELLO
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert len({(chunk["id"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)


def test_include_usage_adds_a_last_chunk_with_the_numbers_of_tokens(server: LiveServer):
    chunks = server.chunks(CHAT, user("hello") | {"stream_options": {"include_usage": True}})
    whole = server.chat("hello").json()["usage"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == whole["completion_tokens"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_a_second_turn_reports_the_tokens_that_were_not_computed_again(server: LiveServer):
    first = [{"role": "user", "content": "What is the capital of France?"}]
    reply = answer(server.chat(first))
    turn = [*first, {"role": "assistant", "content": reply}, {"role": "user", "content": "hello"}]
    usage = server.chat(turn).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > len(server.model.tokenizer.encode_chat("")) + 5


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_max_tokens_ends_the_answer_with_length(server: LiveServer, name):
    body = server.chat("hello", **{name: 3}).json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 3
    assert HELLO.startswith(body["choices"][0]["message"]["content"])


@pytest.mark.parametrize("stop", ["demo", ["zzz", "small demo"]], ids=["one", "several"])
def test_a_stop_string_ends_the_answer_and_is_no_part_of_it(server: LiveServer, stop):
    body = server.chat("hello", stop=stop).json()["choices"][0]
    end = stop if isinstance(stop, str) else stop[1]
    assert body["message"]["content"] == HELLO[: HELLO.index(end)].rstrip()
    assert body["finish_reason"] == "stop"


def test_the_same_seed_gives_the_same_answers_and_n_gives_different_ones(server: LiveServer):
    def texts(**fields) -> list[str]:
        choices = server.chat("Tell me a story.", **RANDOM, **fields).json()["choices"]
        return [choice["message"]["content"] for choice in choices]

    four = texts(n=4, seed=7)
    assert four == texts(n=4, seed=7)
    assert len(set(four)) > 1
    assert texts(seed=7) == four[:1]
    assert texts(seed=8) == four[1:2]
    assert texts(seed=2**63 - 1, n=2) and texts(seed=-(2**63))


def test_every_answer_of_a_stream_with_n_is_the_one_without_a_stream(server: LiveServer):
    fields = {"n": 3, "seed": 3, **RANDOM}
    whole = server.chat("Tell me a story.", **fields).json()["choices"]
    chunks = server.chunks(CHAT, user("Tell me a story.") | fields)
    assert [joined(chunks, i) for i in range(3)] == [choice["message"]["content"] for choice in whole]


def test_temperature_zero_and_top_p_zero_are_zero(server: LiveServer):
    for fields in ({"temperature": 0}, {"temperature": 1.5, "top_p": 0}, {"temperature": 1.5, "top_k": 1}):
        assert answer(server.chat("hello", **fields)) == HELLO


def test_the_published_sampling_holds_where_a_request_says_nothing():
    with live_server(temperature=0.8) as server:
        choices = server.chat("Tell me a story.", n=4, seed=1, max_tokens=16).json()["choices"]
        assert len({choice["message"]["content"] for choice in choices}) > 1
        assert server.get("/info").json()["defaults"]["temperature"] == 0.8


def test_logit_bias_forbids_and_forces_tokens(server: LiveServer):
    tokenizer = server.model.tokenizer
    (first, *_) = tokenizer.encode("Hello", add_special_tokens=False)
    assert not answer(server.chat("hello", logit_bias={str(first): -100})).startswith("Hello")
    two = tokenizer.convert_tokens_to_ids("▁the")
    assert answer(server.chat("hello", logit_bias={str(two): 100}, max_tokens=3)) == "the the the"


def test_penalties_make_room_for_the_second_likeliest_token(server: LiveServer):
    the, of = (str(server.model.tokenizer.convert_tokens_to_ids(token)) for token in ("▁the", "▁of"))

    def words(bias: int, **fields) -> list[str]:
        return answer(server.chat("hello", logit_bias={the: 100, of: bias}, max_tokens=20, **fields)).split()

    assert words(80) == ["the"] * 20
    assert "of" in words(80, frequency_penalty=2.0)
    few, many = (
        sum(words(bias, presence_penalty=p).count("the") for bias in (85, 90, 95)) for p in (2.0, -2.0)
    )
    assert few < many


def test_logprobs_tell_every_token_with_its_bytes_and_the_likeliest_ones(server: LiveServer):
    choice = server.chat("hello", logprobs=True, top_logprobs=2).json()["choices"][0]
    tokens = choice["logprobs"]["content"]
    assert bytes(b for token in tokens for b in token["bytes"]).decode().strip() == HELLO
    for token in tokens:
        assert len(token["top_logprobs"]) == 2
        assert token["logprob"] <= 0
        assert token["top_logprobs"][0]["token"] == token["token"]  # temperature 0
        assert token["top_logprobs"][0]["logprob"] >= token["top_logprobs"][1]["logprob"]
    assert tokens[0]["top_logprobs"][0]["logprob"] == pytest.approx(tokens[0]["logprob"])


def test_the_logprobs_of_a_stream_are_those_of_the_whole_answer(server: LiveServer):
    fields = {"logprobs": True, "top_logprobs": 1, "max_tokens": 6}
    whole = server.chat("hello", **fields).json()["choices"][0]["logprobs"]["content"]
    chunks = [c["choices"][0]["logprobs"] for c in server.chunks(CHAT, user("hello") | fields)]
    streamed = [token for logprobs in chunks if logprobs for token in logprobs["content"]]
    assert [token["token"] for token in streamed] == [token["token"] for token in whole]
    differences = [abs(a["logprob"] - b["logprob"]) for a, b in zip(streamed, whole, strict=True)]
    assert max(differences) < 1e-3


def test_json_object_gives_one_json_object(server: LiveServer):
    pytest.importorskip("llguidance")
    # A small model can go on forever inside a string; forced ends show that what is complete is JSON.
    for seed in range(20):
        body = server.chat(
            "Give me JSON",
            response_format={"type": "json_object"},
            temperature=1.0,
            seed=seed,
            max_tokens=200,
        ).json()["choices"][0]
        if body["finish_reason"] == "stop":
            assert isinstance(json.loads(body["message"]["content"]), dict)
            return
        assert body["message"]["content"].startswith("{")
    pytest.fail("no answer came to its end")


def with_schema(schema: dict) -> dict:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}}


@pytest.mark.parametrize("stream", [False, True])
def test_json_schema_gives_what_the_schema_describes(server: LiveServer, stream: bool):
    pytest.importorskip("llguidance")
    number = {"type": "integer", "minimum": 1, "maximum": 9}
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "北京"]}, "numbers": {"type": "array", "items": number}},
        "required": ["city", "numbers"],
        "additionalProperties": False,
    }
    schema["properties"]["numbers"]["maxItems"] = 3
    fields = with_schema(schema) | {"temperature": 1.0, "seed": 1}
    if stream:
        chunks = server.chunks(CHAT, user("Which city?") | fields)
        text = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)
    else:
        text = answer(server.chat("Which city?", **fields))
    found = json.loads(text)
    assert set(found) == {"city", "numbers"} and found["city"] in ("Paris", "北京")
    assert len(found["numbers"]) <= 3 and all(n in range(1, 10) for n in found["numbers"])


@pytest.mark.parametrize("path", ["/", "/favicon.ico", "/static/style.css"])
def test_head_answers_as_get_does_without_the_body(server: LiveServer, path: str):
    got, asked = server.get(path), server.client.head(server.url + path)
    assert got.status_code == asked.status_code == 200
    names = ("content-type", "content-length", "etag", "cache-control")
    assert [asked.headers[name] for name in names] == [got.headers[name] for name in names]
    assert got.content and not asked.content


def test_browsers_find_the_icon_where_they_look_for_it(server: LiveServer):
    assert server.get("/favicon.ico").headers["content-type"] == "image/svg+xml"


def test_content_in_parts_is_the_text_of_the_parts(server: LiveServer):
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    assert answer(server.chat([{"role": "user", "content": parts}])) == HELLO


def test_the_message_that_was_received_can_be_sent_back(server: LiveServer):
    message = server.chat("hello").json()["choices"][0]["message"]
    messages = [{"role": "user", "content": "hello"}, message, {"role": "user", "content": "12+30=?"}]
    assert "42" in answer(server.chat(messages))


def turns(*messages: tuple[str, str]) -> list[tuple[str, str]]:
    made = as_turns([Message(role=role, content=content) for role, content in messages])
    return [(turn["role"], turn["content"]) for turn in made]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([("system", "s"), ("user", "u")], [("system", "s"), ("user", "u")]),
        ([("developer", "d"), ("system", "s"), ("user", "u")], [("system", "d\ns"), ("user", "u")]),
        ([("user", "a"), ("user", "b")], [("user", "a\nb")]),
        ([("user", "a"), ("assistant", "b"), ("assistant", "c"), ("user", "d")],
         [("user", "a"), ("assistant", "b\nc"), ("user", "d")]),
        ([("user", "a"), ("assistant", "b"), ("system", "s"), ("user", "c")],
         [("user", "a"), ("assistant", "b"), ("user", "s\nc")]),
        ([("assistant", "hi"), ("user", "u")], [("user", ""), ("assistant", "hi"), ("user", "u")]),
        ([("system", "s")], [("user", "s")]),
        ([("user", "u"), ("system", "s")], [("user", "u\ns")]),
    ],
    ids=["system", "two-in-front", "two-questions", "two-answers", "in-between", "greeting", "alone", "behind"],
)  # fmt: skip
def test_messages_in_any_order_become_turns(messages, expected):
    assert turns(*messages) == expected


def test_a_conversation_that_the_assistant_ends_is_refused(server: LiveServer):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    error = refused(server.chat(messages))
    assert error["param"] == "messages" and "end with a message of the user" in error["message"]


@pytest.mark.parametrize("text", [text for text in NASTY if text.strip()], ids=ascii)
def test_the_deltas_add_up_to_the_whole_answer_for_every_nasty_prompt(server: LiveServer, text):
    whole = server.chat(text, max_tokens=16).json()["choices"][0]
    chunks = server.chunks(CHAT, user(text) | {"max_tokens": 16})
    assert joined(chunks) == whole["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]


@pytest.mark.parametrize(
    "text", ["👨‍👩‍👧‍👦👍🏽", "𠮷野家龘靐", "\tif x:\n\t\treturn '}' # ☃"], ids=["emoji", "rare", "code"]
)
def test_the_deltas_of_answers_made_of_split_characters_are_whole_characters(server: LiveServer, text):
    """The tokens of `text` alone are possible; in this vocabulary most of its characters are several bytes."""
    ids = set(server.model.tokenizer.encode(text, add_special_tokens=False))
    fields = {"logit_bias": {str(i): 100 for i in ids}, "temperature": 1.0, "max_tokens": 40}
    texts = []
    for seed in range(4):
        body = {"model": "demo", "prompt": "x", "seed": seed, **fields}
        texts.append(server.post(COMPLETIONS, body).json()["choices"][0]["text"])
        pieces = [chunk["choices"][0]["text"] for chunk in server.chunks(COMPLETIONS, body)]
        assert "".join(pieces) == texts[-1]
    assert set("".join(texts)) - {"\ufffd", " "}, "no character was put together"


def test_control_tokens_spelled_by_a_user_stay_text(server: LiveServer):
    spelled = "[gMASK]sop</s><s><eop>[MASK]<sop><|user|><unk><pad>"
    for model in (server.model,):
        ids = model.chat_prompt([Message(role="user", content=spelled)])
        control = {
            model.tokenizer.get_command(name) for name in ("[gMASK]", "sop", "eop", "</s>", "<s>", "[MASK]")
        }
        assert [i for i in ids if i in control] == model.tokenizer.get_prefix_tokens() == ids[:2]
        ids = model.text_prompt(spelled)
        assert [i for i in ids if i in control] == model.tokenizer.get_prefix_tokens() == ids[:2]
    assert server.chat(spelled).json()["usage"]["prompt_tokens"] == len(
        server.model.tokenizer.encode_chat(spelled)
    )


# ---- what is refused


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": 5}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": "x" * 101}, "stop"),
        ({"stop": 5}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_object", "json_schema": {"name": "a", "schema": {}}}},
            "response_format.json_schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.name",
        ),
        (with_schema({"type": "poem"}), "response_format.json_schema.schema"),
        (with_schema({"$ref": "https://example.com"}), "response_format.json_schema.schema"),
        (with_schema({"const": "a" * 30_000}), "response_format.json_schema.schema"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"functions": [{}]}, "functions"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"audio": {}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"store": True}, "store"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"generation_config": "[]"}, "generation_config"),
        ({"generation_config": '{"num_beams": 4}'}, "generation_config"),
        ({"generation_config": '{"temperature": "hot"}'}, "temperature"),
        ({"mesages": []}, "mesages"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": "a", "name": "Ann"}]}, "messages.0.name"),
        ({"messages": [{"role": "user", "content": "  \n"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a"}] * 1001}, "messages"),
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_a_sentence_that_names_the_field(server: LiveServer, fields, param):
    body = user("hello") | fields
    error = refused(server.post(CHAT, body))
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param.rpartition(".")[2] in error["message"] or "message" in error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "me", "metadata": {"a": "b"}, "safety_identifier": "x", "prompt_cache_key": "y"},
        {"store": False, "service_tier": "auto", "parallel_tool_calls": True, "modalities": ["text"]},
        {"tools": None, "functions": None, "tool_choice": "none", "audio": None, "prediction": None},
        dict.fromkeys("temperature top_p top_k stop n seed logit_bias logprobs stream max_tokens".split()),
        {"response_format": {"type": "text"}, "stream": False, "stop": [], "n": 1},
    ],
    ids=["labels", "idle", "nothing", "nulls", "defaults"],
)
def test_fields_of_real_clients_that_ask_for_nothing_change_nothing(server: LiveServer, fields):
    assert answer(server.chat("hello", **fields)) == HELLO


def test_the_settings_of_transformers_chat_hold_where_the_request_says_nothing(server: LiveServer):
    config = json.dumps({"max_new_tokens": 3, "do_sample": False, "transformers_version": "5", "top_k": None})
    assert server.chat("hello", generation_config=config).json()["usage"]["completion_tokens"] == 3
    assert (
        server.chat("hello", generation_config=config, max_tokens=2).json()["usage"]["completion_tokens"] == 2
    )


@pytest.mark.parametrize("name", ["", "gpt-3.5-turbo", "Demo", "x" * 500])
def test_only_the_real_model_answers(server: LiveServer, name):
    error = refused(server.post(CHAT, user("hello") | {"model": name}), 404)
    assert error["code"] == "model_not_found" and error["param"] == "model" and "'demo'" in error["message"]


def test_an_alias_is_answered_by_the_real_model():
    with live_server(Settings(model_aliases=("gpt-3.5-turbo",))) as server:
        body = server.post(CHAT, user("hello") | {"model": "gpt-3.5-turbo"}).json()
        assert body["model"] == "demo"
        assert [model["id"] for model in server.get("/v1/models").json()["data"]] == ["demo"]


def test_a_prompt_beyond_the_context_is_refused_and_one_near_it_ends_with_length(server: LiveServer):
    error = refused(server.chat("word " * 3000))
    assert error["code"] == "context_length_exceeded"
    assert "2048" in error["message"]
    with live_server(Settings(max_context=40)) as small:
        body = small.chat("hello", max_tokens=40, **LONG).json()
        assert body["choices"][0]["finish_reason"] == "length"
        assert body["usage"]["total_tokens"] == 40


def test_the_bound_on_tokens_holds_with_and_without_max_tokens():
    with live_server(Settings(max_tokens=5)) as server:
        assert server.chat("hello").json()["usage"]["completion_tokens"] == 5
        assert refused(server.chat("hello", max_tokens=6))["param"] == "max_tokens"
        assert server.post("/", {"prompt": "hello"}).json()["response"] == "Hello! I am the"


# ---- completions


def test_a_completion_goes_on_from_the_plain_text(server: LiveServer):
    model, tokenizer = server.model.engine.model, server.model.tokenizer
    ids = tokenizer("The capital of", return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :].tolist()
    body = server.post(COMPLETIONS, {"model": "demo", "prompt": "The capital of"}).json()
    decoder = tokenizer.stream_decoder()
    assert body["object"] == "text_completion"
    assert body["choices"][0]["text"] == decoder.put(expected) + decoder.flush()
    assert body["usage"]["completion_tokens"] == 16


def test_completions_take_texts_and_ids_alone_and_in_lists(server: LiveServer):
    ids = server.model.text_prompt("hello")

    def texts(prompt, **fields) -> list[str]:
        body = {"model": "demo", "prompt": prompt, **fields}
        choices = server.post(COMPLETIONS, body).json()["choices"]
        assert [choice["index"] for choice in choices] == list(range(len(choices)))
        return [choice["text"] for choice in choices]

    (hello,), (other,) = texts("hello"), texts("你好")
    assert texts(ids) == [hello]
    assert texts(["hello", "你好"]) == [hello, other]
    assert texts([ids, ids], n=2) == [hello] * 4


def test_a_streamed_completion_adds_up_to_the_whole_one(server: LiveServer):
    body = {"model": "demo", "prompt": ["hello", "你好"], "max_tokens": 20, "logprobs": 2}
    whole = server.post(COMPLETIONS, body).json()["choices"]
    chunks = server.chunks(COMPLETIONS, body)
    for index in range(2):
        choices = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in choices) == whole[index]["text"]
        assert choices[-1]["finish_reason"] == whole[index]["finish_reason"]
        tokens = [t for choice in choices if choice["logprobs"] for t in choice["logprobs"]["tokens"]]
        offsets = [o for choice in choices if choice["logprobs"] for o in choice["logprobs"]["text_offset"]]
        assert tokens == whole[index]["logprobs"]["tokens"]
        assert offsets == whole[index]["logprobs"]["text_offset"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a"] * 17}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**12]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"prompt": "a" * 9000}, "prompt"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_completions_refuse_what_they_cannot_do(server: LiveServer, fields, param):
    error = refused(server.post(COMPLETIONS, {"model": "demo", "prompt": "x"} | fields))
    assert error["param"] == param


# ---- embeddings


def test_an_embedding_is_the_mean_of_the_last_hidden_states(server: LiveServer):
    import torch

    body = server.post(EMBEDDINGS, {"model": "demo", "input": ["你好", "hello"]}).json()
    model, tokenizer = server.model.engine.model, server.model.tokenizer
    for text, item in zip(["你好", "hello"], body["data"], strict=True):
        with torch.no_grad():
            states = model.transformer(tokenizer(text, return_tensors="pt")["input_ids"]).last_hidden_state[0]
        assert item["embedding"] == pytest.approx(states.mean(0).tolist(), abs=1e-4)
    tokens = sum(len(tokenizer(text)["input_ids"]) for text in ("你好", "hello"))
    assert body["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


def test_base64_holds_the_same_numbers_as_float(server: LiveServer):
    asked = {"model": "demo", "input": server.model.text_prompt("hello")}
    floats = server.post(EMBEDDINGS, asked).json()["data"][0]["embedding"]
    packed = server.post(EMBEDDINGS, asked | {"encoding_format": "base64"}).json()["data"][0]["embedding"]
    data = base64.b64decode(packed)
    assert struct.unpack(f"<{len(data) // 4}f", data) == pytest.approx(floats)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": ["a"] * 65}, "input"),
        ({"input": ["word " * 600] * 60}, "input"),
        ({"input": "word " * 3000}, "input"),
        ({"dimensions": 64}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_embeddings_refuse_what_they_cannot_do(server: LiveServer, fields, param):
    assert refused(server.post(EMBEDDINGS, {"model": "demo", "input": "x"} | fields))["param"] == param


# ---- the published API


def test_the_published_api_answers_as_it_did(server: LiveServer):
    body = server.post("/", {"prompt": "hello", "history": []}).json()
    assert set(body) == {"response", "history", "status", "time"}
    assert body["response"] == HELLO and body["history"] == [["hello", HELLO]] and body["status"] == 200
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", body["time"])
    sent = {"prompt": "12+30=?", "max_length": 2048, "top_p": 0.7, "temperature": 0} | {
        "history": body["history"]
    }
    again = server.post("/", sent).json()
    assert "42" in again["response"]
    assert again["history"] == [["hello", HELLO], ["12+30=?", again["response"]]]


def test_max_length_counts_prompt_and_answer(server: LiveServer):
    prompt = len(server.model.tokenizer.encode_chat("hello"))
    body = server.post("/", {"prompt": "hello", "max_length": prompt + 3}).json()
    assert HELLO.startswith(body["response"]) and len(body["response"]) < 10
    error = refused(server.post("/", {"prompt": "hello", "max_length": prompt}))
    assert error["code"] == "context_length_exceeded"
    assert refused(server.post("/", {"prompt": "hello", "max_length": 2049}))["param"] == "max_length"


def test_the_published_stream_grows_to_the_answer_and_ends_with_the_history(server: LiveServer):
    events = [json.loads(event) for event in server.events("/stream", {"prompt": "hello"})]
    responses = [event["response"] for event in events]
    assert responses[-1] == HELLO and len(responses) > 5
    assert all(b.startswith(a) for a, b in itertools.pairwise(responses))
    assert events[-1]["history"] == [["hello", HELLO]]
    assert all(event["status"] == 200 and "history" not in event for event in events[:-1])


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": ""},
        {"prompt": "a", "history": [["x"]]},
        {"prompt": "a", "history": "x"},
        {"prompt": "a", "n": 2},
    ],
    ids=str,
)
def test_the_published_api_refuses_in_the_same_shape(server: LiveServer, body):
    refused(server.post("/", body))
    refused(server.post("/stream", body))


# ---- what the server tells of itself


def test_models_info_health_and_docs(server: LiveServer):
    (model,) = server.get("/v1/models").json()["data"]
    assert model == server.get("/v1/models/demo").json()
    assert (model["id"], model["object"], model["owned_by"]) == ("demo", "model", "chatglm")
    refused(server.get("/v1/models/THUDM/other"), 404)
    info = server.get("/info").json()
    assert (info["model"], info["family"], info["context"]) == ("demo", "chatglm2", 2048)
    assert server.get("/health").json() == server.get("/v1/health").json() == {"status": "ok"}


def test_docs_list_every_route_and_field_without_scripts_and_other_sites(server: LiveServer):
    response = server.get("/docs")
    text = response.text
    schema = server.get("/openapi.json").json()
    assert [path for path in schema["paths"] if path not in text] == []
    for name in ("ChatRequest", "CompletionRequest", "EmbeddingRequest", "PublishedRequest"):
        assert [
            field for field in schema["components"]["schemas"][name]["properties"] if field not in text
        ] == []
    assert "<script" not in text
    assert set(re.findall(r"https?://[^/\s\"'<]+", text)) == {server.url}


def test_metrics_count_requests_tokens_and_times(server: LiveServer):
    def value(name: str) -> float:
        lines = [line for line in server.get("/metrics").text.splitlines() if line.startswith(name)]
        return sum(float(line.split()[-1]) for line in lines)

    names = {
        'chatglm_requests_total{method="POST",route="/v1/chat/completions",status="200"}': 1,
        "chatglm_prompt_tokens_total": len(server.model.tokenizer.encode_chat("hello")),
        "chatglm_generated_tokens_total": 3,
        "chatglm_time_to_first_token_seconds_count": 1,
        "chatglm_seconds_per_token_count": 1,
        "chatglm_finished_total": 1,
    }
    before = {name: value(name) for name in names}
    server.chat("hello", max_tokens=3)
    assert {name: value(name) - before[name] for name in names} == names
    assert value("chatglm_running ") == 0 and value("chatglm_waiting ") == 0


def test_unknown_routes_and_methods_are_refused_in_the_same_shape(server: LiveServer):
    refused(server.get("/nothing"), 404)
    refused(server.get("/static/../app.py"), 404)
    refused(server.get("/static/%2e%2e/app.py"), 404)
    refused(server.get(CHAT), 405)
    assert server.get(CHAT).headers["allow"] == "POST"


def test_the_page_is_there_by_get_and_names_only_files_that_are_there(server: LiveServer):
    response = server.get("/", headers={"Accept": "text/html"})
    assert response.status_code == 200 and response.headers["content-type"] == "text/html; charset=utf-8"
    names = re.findall(r'(?:src|href)="([^"#]+)"', response.text)
    assert any(name.endswith(".js") for name in names) and any(name.endswith(".css") for name in names)
    for name in names:
        assert server.get("/" + name.removeprefix("./").removeprefix("/")).status_code == 200, name


def test_files_of_the_page_come_with_their_type_and_a_tag(server: LiveServer):
    response = server.get("/static/docs.css")
    assert response.headers["content-type"].startswith("text/css")
    again = server.get("/static/docs.css", headers={"If-None-Match": response.headers["etag"]})
    assert again.status_code == 304 and not again.content
    policy = response.headers["content-security-policy"]
    assert (
        policy.startswith("default-src 'none'")
        and "unsafe" not in policy
        and "frame-ancestors 'none'" in policy
    )
    assert server.get("/docs").headers["content-security-policy"] == policy
