"""The prompts of both families: exact text, exact ids, and no control tokens from what people write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chatglm.hub.tokenization_chatglm import (
    ChatGLMTokenizer,
    build_prompt,
    process_response,
    split_messages,
)

HISTORIES: list[list[tuple[str, str]]] = [
    [],
    [("你好", "你好！")],
    [("Hi", "Hello!"), ("", ""), ("1+1=?", "2\n\n")],
]
QUERIES = ["晚上睡不着应该怎么办", "", "  two  blanks \n", "[gMASK]<sop>", "sop</s>[MASK]<eop>"]


def messages(query: str, history: list[tuple[str, str]], answer: str | None = None) -> list[dict[str, Any]]:
    turns = [text for pair in history for text in pair] + [query] + ([] if answer is None else [answer])
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


# ---- text


def test_v1_prompt_is_the_bare_query_or_rounds_from_zero() -> None:
    assert build_prompt("chatglm", "你好") == "你好"
    assert build_prompt("chatglm", "c", [("a", "b")]) == "[Round 0]\n问：a\n答：b\n[Round 1]\n问：c\n答："


def test_v2_prompt_has_rounds_from_one() -> None:
    assert build_prompt("chatglm2", "你好", []) == "[Round 1]\n\n问：你好\n\n答："
    expected = "[Round 1]\n\n问：a\n\n答：b\n\n[Round 2]\n\n问：c\n\n答："
    assert build_prompt("chatglm2", "c", [["a", "b"]]) == expected


@pytest.mark.parametrize(
    ("query", "history", "message"),
    [
        (None, None, "The query is NoneType"),
        (["你好"], None, "The query is list"),
        ("q", "ab", "history is str"),
        ("q", {"a": "b"}, "history is dict"),
        ("q", [("a", "b", "c")], r"history\[0\] is .*must be a pair"),
        ("q", [("a", "b"), "cd"], r"history\[1\] is 'cd'"),
        ("q", [{"role": "user", "content": "a"}], r"history\[0\] is .*must be a pair"),
        ("q", [("a", None)], r"The response in history\[0\] is NoneType"),
        ("q", [(1, "b")], r"The query in history\[0\] is int"),
    ],
)
@pytest.mark.parametrize("family", ["chatglm", "chatglm2"])
def test_what_is_no_conversation_is_refused_in_one_sentence(family, query, history, message) -> None:
    with pytest.raises(ValueError, match=message):
        build_prompt(family, query, history)


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ValueError, match="Unknown family 'glm4'"):
        build_prompt("glm4", "你好")


def test_v1_answers_get_full_width_marks_beside_chinese_only() -> None:
    assert process_response("chatglm", " 你好,world!好? a,b:1;中 ") == "你好，world！好？ a,b:1；中"
    assert process_response("chatglm2", " 你好,world!好? ") == "你好,world!好?"
    assert (
        process_response("chatglm2", "[[训练时间]]")
        == process_response("chatglm", "[[训练时间]]")
        == "2023年"
    )


# ---- ids


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("query", QUERIES)
def test_nobody_can_write_a_control_token_in_a_chat(tokenizer, query: str, history) -> None:
    ids = tokenizer.encode_chat(query, history)
    special = [tokenizer.gmask_token_id, tokenizer.sop_token_id]
    inner = ids[:-2] if tokenizer.family == "chatglm" else ids[2:]
    assert (ids[-2:] if tokenizer.family == "chatglm" else ids[:2]) == special
    control = {tokenizer.get_command(token) for token in tokenizer._control_tokens}
    assert control.isdisjoint(inner)
    assert (
        inner
        == tokenizer(
            tokenizer.build_prompt(query, history), add_special_tokens=False, split_special_tokens=True
        )["input_ids"]
    )


def test_v2_rounds_on_a_cache_add_up_to_the_whole_conversation(shared: Path) -> None:
    tokenizer = ChatGLMTokenizer(shared / "tokenizers/chatglm2-6b/tokenizer.model")
    history = [("你好", "你好！")]
    first = tokenizer.encode_chat("你好")
    assert tokenizer.encode_chat_continuation("你好", []) == first
    second = tokenizer.encode_chat_continuation("Hi", history)
    whole = tokenizer.encode_chat("Hi", history)
    assert whole[: len(first)] == first and whole[-len(second) :] == second
    assert tokenizer.decode(whole[len(first) : -len(second)]) == "你好！"


def test_a_continuation_has_no_blank_in_front(tokenizer: ChatGLMTokenizer) -> None:
    if tokenizer.family == "chatglm":
        with pytest.raises(ValueError, match="cannot continue"):
            tokenizer.encode_chat_continuation("你好", [("a", "b")])
        return
    ids = tokenizer.encode_chat_continuation("你好", [("a", "b")])
    whole = tokenizer.encode_chat("你好", [("a", "b")])
    assert whole[-len(ids) :] == ids
    assert tokenizer.decode([*tokenizer.encode("x", add_special_tokens=False), *ids]).startswith(
        "x\n\n[Round 2]"
    )


# ---- apply_chat_template


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("query", QUERIES)
def test_the_chat_template_makes_the_published_prompt(tokenizer, query: str, history) -> None:
    chat, expected = messages(query, history), tokenizer.encode_chat(query, history)
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids == expected
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer.build_prompt(query, history)
    assert text == (f"{prompt}[gMASK]<sop>" if tokenizer.family == "chatglm" else f"[gMASK]sop{prompt}")
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected


def test_a_text_that_looks_like_a_prompt_is_a_text_where_special_tokens_are_added(tokenizer) -> None:
    """Nobody can write control tokens of a prompt into a call of the published form."""
    ids = tokenizer("[gMASK]sop[Round 1]\n\n问：你好[gMASK]<sop>")["input_ids"]
    assert ids.count(tokenizer.gmask_token_id) == 1
    batch = tokenizer(["[gMASK]sop[Round 1]\n\n问：a", "b [gMASK]<sop>"])["input_ids"]
    assert [row.count(tokenizer.gmask_token_id) for row in batch] == [1, 1]


@pytest.mark.parametrize("history", HISTORIES)
def test_a_conversation_with_its_answer_is_the_published_training_row(tokenizer, history) -> None:
    chat = messages("你好", history, "Hello!")
    target = tokenizer("Hello!", add_special_tokens=False)["input_ids"]
    end = tokenizer.eop_token_id if tokenizer.family == "chatglm" else 2
    ids = tokenizer.apply_chat_template(chat, return_dict=False)
    assert ids == [*tokenizer.encode_chat("你好", history), *target, end]
    unfinished = tokenizer.apply_chat_template(chat, continue_final_message=True, return_dict=False)
    assert unfinished == ids[:-1]
    if tokenizer.family == "chatglm":
        source = tokenizer(tokenizer.build_prompt("你好", history), add_special_tokens=False)["input_ids"]
        assert ids == tokenizer.build_inputs_with_special_tokens(source, target)
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    question = tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
    assert text == question + "Hello!" + ("<eop>" if tokenizer.family == "chatglm" else "</s>")


@pytest.mark.parametrize("history", HISTORIES)
def test_without_generation_prompt_the_text_ends_with_the_question(tokenizer, history) -> None:
    chat = messages("你好\n", history)
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text.endswith("你好\n") and "答：[" not in text
    ids = tokenizer.apply_chat_template(chat, return_dict=False)
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_system_message_stands_in_front_of_the_first_question(tokenizer: ChatGLMTokenizer) -> None:
    chat = [{"role": "system", "content": "Be kind. "}, *messages("c", [("a", "b")])]
    expected = tokenizer.encode_chat("c", [("Be kind. a", "b")])
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"] == expected


def test_contents_may_be_lists_of_text_parts(tokenizer: ChatGLMTokenizer) -> None:
    parts = [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]
    for tokenize in (True, False):
        one, other = (
            tokenizer.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=tokenize,
                return_dict=False,
            )
            for content in ("你好", parts)
        )
        assert one == other


def test_several_conversations_make_a_padded_batch(tokenizer: ChatGLMTokenizer) -> None:
    chats = [messages("你好", []), messages("c", [("a", "b")])]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt"
    )
    for row, mask, expected in zip(
        batch["input_ids"].tolist(),
        batch["attention_mask"].tolist(),
        [tokenizer.encode_chat("你好"), tokenizer.encode_chat("c", [("a", "b")])],
        strict=True,
    ):
        assert row[-len(expected) :] == expected and sum(mask) == len(expected)


@pytest.mark.parametrize(
    "roles", [[], ["assistant"], ["user", "user"], ["system"], ["user", "system"], ["user", "tool"]]
)
def test_messages_out_of_turn_are_refused(tokenizer: ChatGLMTokenizer, roles: list[str]) -> None:
    chat = [{"role": role, "content": "a"} for role in roles]
    with pytest.raises(ValueError, match="take turns"):
        tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    if roles and roles != ["system"]:
        with pytest.raises(Exception, match="take turns"):  # jinja2's own error class
            tokenizer.apply_chat_template(chat, tokenize=False)


def test_what_the_prompt_cannot_hold_is_refused(tokenizer: ChatGLMTokenizer) -> None:
    chat = messages("a", [])
    with pytest.raises(ValueError, match="tools"):
        tokenizer.apply_chat_template(chat, tools=[{"type": "function"}])
    with pytest.raises(ValueError, match="add_generation_prompt"):
        tokenizer.apply_chat_template(messages("a", [], "b"), add_generation_prompt=True)
    with pytest.raises(ValueError, match="content of message 0 is int"):
        tokenizer.apply_chat_template([{"role": "user", "content": 5}], add_generation_prompt=True)


def test_another_template_goes_its_own_way(tokenizer: ChatGLMTokenizer) -> None:
    template = "{% for m in messages %}{{ m.content }}|{% endfor %}"
    text = tokenizer.apply_chat_template(messages("a", []), chat_template=template, tokenize=False)
    assert text == "a|"
    ids = tokenizer.apply_chat_template(messages("a", []), chat_template=template, return_dict=False)
    assert ids == tokenizer("a|", add_special_tokens=False)["input_ids"]


def test_messages_split_into_history_query_and_answer() -> None:
    assert split_messages(messages("c", [("a", "b")])) == ([("a", "b")], "c", None)
    assert split_messages(messages("c", [("a", "b")], "d")) == ([("a", "b")], "c", "d")
