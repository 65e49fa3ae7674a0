"""Data for finetuning: files of all kinds, what is wrong with them, and the published token layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import CHATGLM, CHATGLM2, assert_close, tiny_model
from vocabularies import vocabulary_config

from chatglm.training.files import read_records
from chatglm.training.layout import IGNORED, Collator, Layout, pack
from chatglm.training.rows import Data, Problems, Row, read_data

ROWS = [
    {"prompt": "你好", "response": "你好，世界！"},
    {"prompt": "What is 1 + 1?", "response": "2"},
]


def write(file: Path, rows: list) -> Path:
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return file


def pairs(data) -> list[tuple[str, str]]:
    return [(row.query, row.answer) for row in data.rows]


# ---- files


def write_json(file: Path) -> None:
    file.write_text(json.dumps(ROWS, ensure_ascii=False), encoding="utf-8")


def write_lines(file: Path) -> None:
    write(file, ROWS)


def write_csv(file: Path) -> None:
    file.write_text('prompt,response\n你好,"你好，世界！"\nWhat is 1 + 1?,2\n', encoding="utf-8-sig")


def write_parquet(file: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet files are read by pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)


@pytest.mark.parametrize(
    ("name", "write_file"),
    [
        ("a.json", write_json),
        ("a.jsonl", write_lines),
        ("lines.json", write_lines),
        ("a.csv", write_csv),
        ("a.parquet", write_parquet),
    ],
    ids=["json", "jsonl", "published-json", "csv", "parquet"],
)
def test_the_same_rows_are_read_from_every_kind_of_file(tmp_path, name, write_file):
    write_file(tmp_path / name)
    data = read_data([tmp_path / name])
    assert pairs(data) == [("你好", "你好，世界！"), ("What is 1 + 1?", "2")]
    assert data.problems.lines() == []


@pytest.mark.parametrize(
    ("columns", "options"),
    [
        (("content", "summary"), {}),
        (("prompt", "response"), {}),
        (("问题", "a b"), {"prompt_column": "问题", "response_column": "a b"}),
        (("prompt", "summary"), {"prompt_column": "prompt", "response_column": "summary"}),
    ],
    ids=str,
)
def test_columns_are_found_by_their_published_names_or_named(tmp_path, columns, options):
    file = write(tmp_path / "a.jsonl", [dict(zip(columns, ("q", "a"), strict=True)) | {"id": 7}])
    assert pairs(read_data([file], **options)) == [("q", "a")]


def test_history_columns_and_messages_give_the_same_conversation(tmp_path):
    history = {"prompt": "q2", "response": "a2", "history": [["q1", "a1"]]}
    messages = [
        {"role": role, "content": text}
        for role, text in zip(("user", "assistant") * 2, ("q1", "a1", "q2", "a2"), strict=True)
    ]
    files = [write(tmp_path / "h.jsonl", [history]), write(tmp_path / "m.jsonl", [{"messages": messages}])]
    (as_history,), (as_messages,) = (read_data([file]).rows for file in files)
    assert as_history.history == as_messages.history == (("q1", "a1"),)
    assert (as_messages.query, as_messages.answer) == ("q2", "a2")


def test_a_history_in_csv_is_a_list_in_json(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text('prompt,response,history\nq2,a2,"[[""q1"", ""a1""]]"\nq,a,\n', encoding="utf-8")
    first, second = read_data([file]).rows
    assert first.history == (("q1", "a1"),)
    assert second.history == ()


def test_every_turn_makes_each_answer_a_row_with_what_was_said_before(tmp_path):
    row = {"prompt": "q3", "response": "a3", "history": [["q1", "a1"], ["q2", "a2"]]}
    rows = read_data([write(tmp_path / "a.jsonl", [row])], every_turn=True).rows
    assert [(row.query, row.answer, len(row.history)) for row in rows] == [
        ("q1", "a1", 0),
        ("q2", "a2", 1),
        ("q3", "a3", 2),
    ]


def test_a_wrong_column_name_is_told_with_the_columns_that_exist(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"content": "q", "summary": "a"}])
    with pytest.raises(ValueError, match=r"no column 'contnet'; it has content, summary"):
        read_data([file], prompt_column="contnet", response_column="summary")


def test_unknown_columns_are_told(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"input": "q", "output": "a"}])
    with pytest.raises(ValueError, match=r"columns input, output.*--prompt-column"):
        read_data([file])


# ---- bad rows

GOOD = b'{"prompt": "q", "response": "a b c"}'
BAD = {
    b'{"prompt": "", "response": "a"}': "prompt is empty",
    b'{"prompt": "q", "response": "  "}': "response is empty",
    b'{"prompt": "q", "response": null}': "response is empty",
    b'{"prompt": "q"}': "there is no response",
    b'{"prompt": "q", "response": 7}': "response is int, not text",
    b'{"prompt": ["q"], "response": "a"}': "prompt is list, not text",
    b'["q", "a"]': "is list, not an object with columns",
    b'{"prompt": "q", "respo': "is no valid JSON",
    b'{"prompt": "\xc4\xe3\xba\xc3", "response": "a"}': "is not UTF-8",
    b'{"prompt": "q", "response": "\\ud83d"}': "is not UTF-8",
    b'{"prompt": "q", "response": "a", "history": [["only one"]]}': "history is no list of [query, response]",
    b'{"prompt": "q", "response": "a", "history": 3}': "history is no list of [query, response]",
    b"[" * 100_000: "is no valid JSON",
}


@pytest.mark.parametrize(("line", "reason"), BAD.items(), ids=list(BAD.values()))
def test_a_bad_row_is_counted_and_named_and_the_others_are_used(tmp_path, line, reason):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"prompt": "q", "response": "a b c", "history": []}\n' + line + b"\n" + GOOD)
    data = read_data([file])
    assert data.problems.left_out == {reason: [f"{file}:2"]}
    assert (len(data.rows), data.records) == (2, 3)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("hello", "messages is no list of {role, content}"),
        ([{"role": "user", "content": "q"}], "messages hold no answer"),
        ([{"role": "assistant", "content": "a"}], "messages are no turns of user and assistant with text"),
        (
            [{"role": "user", "content": "q"}, {"role": "assistant", "content": 3}],
            "messages are no turns of user and assistant with text",
        ),
        (
            [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}],
            "the last question or answer of messages is empty",
        ),
    ],
    ids=["no list", "no answer", "no question", "no text", "empty"],
)
def test_bad_messages_are_counted_and_named(tmp_path, messages, reason):
    good = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    data = read_data([write(tmp_path / "a.jsonl", [{"messages": messages}, {"messages": good}])])
    assert data.problems.left_out == {reason: [f"{tmp_path / 'a.jsonl'}:1"]}
    assert len(data.rows) == 1


def test_csv_lines_with_too_few_or_too_many_fields_are_counted(tmp_path):
    file = tmp_path / "a.csv"
    file.write_bytes(b"prompt,response\nq,a\nq\nq,a,b\n\xc4\xe3,a\n")
    problems = read_data([file]).problems
    assert [(reason, len(where)) for reason, where in problems.left_out.items()] == [
        ("has fewer fields than the first line has names", 1),
        ("has more fields than the first line has names", 1),
        ("is not UTF-8", 1),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"x", "data files end in"),
        ("a.json", b"[{]", "no valid JSON"),
        ("a.jsonl", b"", "nothing to learn; no rows"),
        ("a.jsonl", b'{"prompt": "", "response": ""}', "nothing to learn; 1 left out: prompt is empty"),
        ("a.csv", b'prompt,response\n"q', "nothing to learn"),
        ("a.parquet", b"PAR1", "Parquet"),
    ],
    ids=["ending", "json", "empty", "all bad", "csv", "parquet"],
)
def test_a_file_that_is_no_data_file_is_told_in_one_sentence(tmp_path, name, content, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="Parquet files are read by pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_data([tmp_path / name])
    assert "\n" not in str(error.value)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(OSError, match="no data file"):
        read_records(tmp_path / "a.jsonl")


def test_most_rows_counts_over_all_files(tmp_path):
    files = [write(tmp_path / name, ROWS) for name in ("a.jsonl", "b.jsonl")]
    assert len(read_data(files, most_rows=3).rows) == 3


# ---- token layout: what the published scripts make of a row, written out by hand

SHORT = {"max_source_length": 12, "max_target_length": 6}
ROUNDS_1 = "[Round 0]\n问：q1\n答：a1\n[Round 1]\n问：你好\n答："
ROUNDS_2 = "[Round 1]\n\n问：q1\n\n答：a1\n\n[Round 2]\n\n问：你好\n\n答："
LONG = "今天天气真好，我们去公园玩吧。" * 4
CASES = {  # row, lengths, prompt of ChatGLM-6B, prompt of ChatGLM2-6B
    "bare": (Row("", "你好", "世界"), {}, "你好", "[Round 1]\n\n问：你好\n\n答："),
    "english": (Row("", "Hello", "How are you?"), {}, "Hello", "[Round 1]\n\n问：Hello\n\n答："),
    "one token": (Row("", "你好", "2"), {}, "你好", "[Round 1]\n\n问：你好\n\n答："),
    "white space": (Row("", "a\n\tb", "def f():\n    x"), {}, "a\n\tb", "[Round 1]\n\n问：a\n\tb\n\n答："),
    "history": (Row("", "你好", "世界", (("q1", "a1"),), True), {}, ROUNDS_1, ROUNDS_2),
    "empty history column": (
        Row("", "你好", "世界", (), True), {}, "[Round 0]\n问：你好\n答：", "[Round 1]\n\n问：你好\n\n答：",
    ),
    "messages with history": (Row("", "你好", "世界", (("q1", "a1"),)), {}, ROUNDS_1, ROUNDS_2),
    "long prompt": (Row("", LONG, "世界"), SHORT, LONG, f"[Round 1]\n\n问：{LONG}\n\n答："),
    "long answer": (Row("", "你好", LONG), SHORT, "你好", "[Round 1]\n\n问：你好\n\n答："),
    "both long": (Row("", LONG, LONG), SHORT, LONG, f"[Round 1]\n\n问：{LONG}\n\n答："),
    "control tokens are text": (
        Row("", "[gMASK] <sop> [MASK]", "</s> <eop>"), {}, "[gMASK] <sop> [MASK]",
        "[Round 1]\n\n问：[gMASK] <sop> [MASK]\n\n答：",
    ),
    "emoji": (Row("", "😀", "🎉"), {}, "😀", "[Round 1]\n\n问：😀\n\n答："),
}  # fmt: skip


def pieces(tokenizer, text: str) -> list[int]:
    """Plain ids, by SentencePiece alone."""
    if tokenizer.family == CHATGLM:
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>").replace("    ", "<|blank_4|>")
    return tokenizer.sp_model.encode(text)


def by_hand(tokenizer, row: Row, prompts: tuple[str, str], source: int, target: int) -> tuple[list, list]:
    """Input ids and labels as sections 14 and 16 of the published behaviour tell them."""
    if tokenizer.family == CHATGLM:
        a = pieces(tokenizer, prompts[0])[: source - 1]
        b = pieces(tokenizer, row.answer)[: target - 2]
        gmask, sop, eop = (tokenizer.sp_model.piece_to_id(name) for name in ("[gMASK]", "<sop>", "<eop>"))
        return [*a, gmask, sop, *b, eop], [-100] * (len(a) + 1) + [sop, *b, eop]
    a = pieces(tokenizer, prompts[1])[: source - 2]
    b = pieces(tokenizer, row.answer)[:target]
    size = tokenizer.sp_model.get_piece_size()
    return [size + 1, size + 3, *a, *b, 2], [-100] * (len(a) + 2) + [*b, 2]


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
@pytest.mark.parametrize("vocabulary", ["tokenizer", "published"])
def test_rows_are_laid_out_as_published(request, family, vocabulary, case):
    tokenizer = request.getfixturevalue(vocabulary)
    row, lengths, *prompts = case
    lengths = {"max_source_length": 1024, "max_target_length": 128} | lengths
    example = Layout(tokenizer, **lengths).example(row)
    expected = by_hand(tokenizer, row, prompts, *lengths.values())
    assert (example["input_ids"], example["labels"]) == expected
    assert len(expected[0]) <= sum(lengths.values()) + 1


def test_the_published_ids_of_a_short_row(published, family):
    example = Layout(published).example(Row("", "你好", "你好"))
    if family == CHATGLM:
        assert example["input_ids"] == [5, 74874, 130001, 130004, 5, 74874, 130005]
        assert example["labels"] == [-100, -100, -100, 130004, 5, 74874, 130005]
    else:
        assert example["input_ids"][:2] == [64790, 64792]
        assert example["input_ids"][-3:] == [36474, 54591, 2]
        assert example["labels"] == [-100] * (len(example["labels"]) - 3) + [36474, 54591, 2]


def test_the_prompt_is_the_one_that_chat_asks(tokenizer):
    row = Row("", "你好", "世界", (("q1", "a1"),))
    ids = Layout(tokenizer).example(row)["input_ids"]
    prompt = tokenizer.encode_chat(row.query, list(row.history))
    assert ids[: len(prompt)] == prompt


def test_rows_that_are_cut_are_noted(tmp_path, tokenizer):
    rows = [{"prompt": "你好", "response": LONG}, {"prompt": LONG * 3, "response": "你好"}]
    data = read_data([write(tmp_path / "a.jsonl", rows)])
    assert len(Layout(tokenizer, 60, 24).examples(data, data.problems)) == 2
    assert data.problems.noted == {
        "the answer was cut to max_target_length 24": [f"{tmp_path / 'a.jsonl'}:1"],
        "the prompt was cut to max_source_length 60": [f"{tmp_path / 'a.jsonl'}:2"],
    }


def test_an_answer_of_one_token_is_noted_and_one_without_any_left_out(published, family):
    none = {CHATGLM: "\u200b", CHATGLM2: ""}[family]
    rows = [Row(f"a:{i}", "q", answer) for i, answer in enumerate(("你好，世界", "是", "Yes", none))]
    data = Data(rows, 4, Problems())
    assert len(Layout(published).examples(data, data.problems)) == 3
    assert data.problems.noted == {"the answer is one token": ["a:1", "a:2"]}
    assert data.problems.left_out == {"the answer has no token": ["a:3"]}


# ---- batches


def tiny_with(tokenizer):
    return tiny_model(tokenizer.family, **vocabulary_config(tokenizer))


def examples_of(tokenizer) -> list[dict[str, list[int]]]:
    rows = [Row("", "你好", "世界"), Row("", "Hello world", "How are you today?"), Row("", "q", LONG)]
    return [Layout(tokenizer).example(row) for row in rows]


@torch.no_grad()
def loss_sum(model, examples, pad_token_id) -> torch.Tensor:
    batch = Collator(pad_token_id)(examples)
    return model(**batch, use_cache=False, num_items_in_batch=torch.tensor(1)).loss


def test_padding_changes_no_loss(tokenizer):
    model, examples = tiny_with(tokenizer), examples_of(tokenizer)
    alone = sum(loss_sum(model, [example], 0) for example in examples)
    together = loss_sum(model, examples, tokenizer.pad_token_id)
    assert_close(together / alone, torch.tensor(1.0), atol=1e-4)


@pytest.mark.parametrize("family", [CHATGLM2], indirect=True, scope="module")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_rows_that_are_packed_do_not_see_each_other(tokenizer, checkpointing):
    model, examples = tiny_with(tokenizer), examples_of(tokenizer)
    (packed,) = pack(examples, 400)
    assert len(packed["input_ids"]) == sum(len(example["input_ids"]) for example in examples)
    if checkpointing:
        model.train()
        model.gradient_checkpointing = model.transformer.gradient_checkpointing = True
    alone = sum(loss_sum(model, [example], 0) for example in examples)
    together = loss_sum(model, [packed], 0)
    assert_close(together / alone, torch.tensor(1.0), atol=1e-4)


def test_packs_are_no_longer_than_allowed_and_lose_nothing(tokenizer):
    examples = examples_of(tokenizer) * 3
    packs = pack(examples, 150)
    assert all(len(one["input_ids"]) <= 150 for one in packs)
    assert sum(len(one["labels"]) for one in packs) == sum(len(one["labels"]) for one in examples)
    assert all(one["labels"][0] == IGNORED for one in packs)
