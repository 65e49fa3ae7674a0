"""Pairs and prompts to learn preferences from: what is read, what is left out and why, and how it becomes tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chatglm.preferences.layout import lay_out_pairs, lay_out_prompts
from chatglm.preferences.rows import Pair, Prompt, read_pairs, read_prompts

GOOD = {"prompt": "你好", "chosen": "你好，世界！", "rejected": "走开。"}


def written(folder: Path, *rows: object) -> Path:
    file = folder / "data.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogateescape")
    return file


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "二？", "history": [["一？", "一。"]], "chosen": "好", "rejected": "坏"},
        {
            "prompt": [user("一？"), assistant("一。"), user("二？")],
            "chosen": [assistant("好")],
            "rejected": [assistant("坏")],
        },
        {
            "chosen": [user("一？"), assistant("一。"), user("二？"), assistant("好")],
            "rejected": [user("一？"), assistant("一。"), user("二？"), assistant("坏")],
        },
    ],
    ids=["columns", "messages", "messages with the prompt in the answers"],
)
def test_every_form_gives_the_same_pair(tmp_path, row):
    assert read_pairs([written(tmp_path, row)]).rows == [
        Pair(f"{tmp_path / 'data.jsonl'}:1", "二？", (("一？", "一。"),), "好", "坏")
    ]


def test_columns_may_have_any_names(tmp_path):
    file = written(tmp_path, {"frage": "你好", "gut": "好", "schlecht": "坏", "vorher": [["a", "b"]]})
    data = read_pairs([file], "frage", "gut", "schlecht", "vorher")
    assert (data.rows[0].query, data.rows[0].chosen, data.rows[0].history) == ("你好", "好", (("a", "b"),))


def test_pairs_are_read_from_csv(tmp_path):
    file = tmp_path / "pairs.csv"
    file.write_text('prompt,chosen,rejected,history\n你好,好,坏,"[[""a"", ""b""]]"\n', encoding="utf-8")
    assert read_pairs([file]).rows[0].history == (("a", "b"),)


BAD = {
    "chosen is empty": GOOD | {"chosen": " "},
    "rejected is int, not text": GOOD | {"rejected": 3},
    "there is no rejected": {"prompt": "你好", "chosen": "好"},
    "there is no prompt": {"chosen": "好", "rejected": "坏"},
    "prompt is empty": GOOD | {"prompt": ""},
    "chosen and rejected are the same": GOOD | {"rejected": GOOD["chosen"]},
    "history is no list of [query, response]": GOOD | {"history": [["a"]]},
    "is no valid JSON": '{"prompt": ',
    "is not UTF-8": '{"prompt": "\udcff", "chosen": "a", "rejected": "b"}',
    "is list, not an object with columns": "[1]",
    "chosen has no turns of user and assistant with text": GOOD | {"chosen": [user("你好"), user("在吗")]},
    "chosen holds no answer": GOOD | {"chosen": [user("你好")], "rejected": [user("你好")]},
    "chosen brings another prompt than the column of prompts": GOOD
    | {"chosen": [user("别的"), assistant("好")]},
    "chosen and rejected answer different prompts": {
        "chosen": [user("一"), assistant("好")],
        "rejected": [user("二"), assistant("坏")],
    },
}


@pytest.mark.parametrize("reason", BAD)
def test_a_row_that_is_no_pair_is_left_out_and_named(tmp_path, reason):
    data = read_pairs([written(tmp_path, GOOD, BAD[reason])])
    assert [row.chosen for row in data.rows] == [GOOD["chosen"]]
    assert data.problems.left_out == {reason: [f"{tmp_path / 'data.jsonl'}:2"]}


def test_a_wrong_column_is_told_with_those_that_exist(tmp_path):
    file = written(tmp_path, GOOD)
    with pytest.raises(ValueError, match="no column 'better'; it has prompt, chosen, rejected"):
        read_pairs([file], chosen_column="better")
    with pytest.raises(ValueError, match="has the columns frage, but pairs need chosen and rejected"):
        read_pairs([written(tmp_path, {"frage": "?"})])
    with pytest.raises(ValueError, match="has the columns frage, of which none is known"):
        read_prompts([written(tmp_path, {"frage": "?"})])


@pytest.mark.parametrize(
    "row",
    [
        GOOD,
        {"messages": [user("你好"), assistant("好")]},
        {"messages": [user("你好")]},
        {"content": "你好", "summary": "好"},
    ],
    ids=["pair", "messages", "question alone", "AdvertiseGen"],
)
def test_prompts_are_found_in_data_of_every_kind(tmp_path, row):
    assert read_prompts([written(tmp_path, row)]).rows == [Prompt(f"{tmp_path / 'data.jsonl'}:1", "你好")]


def test_rows_that_are_too_long_are_left_out_not_cut(tmp_path, tokenizer):
    long = GOOD | {"rejected": "走开。" * 200}
    data = read_pairs([written(tmp_path, GOOD, long)])
    assert len(lay_out_pairs(tokenizer, data, 100)) == 1
    assert data.problems.left_out == {
        "prompt and answer are longer than max_length 100": [f"{tmp_path / 'data.jsonl'}:2"]
    }
    prompts = read_prompts([written(tmp_path, GOOD, GOOD | {"prompt": "走开。" * 200})])
    assert len(lay_out_prompts(tokenizer, prompts, 100)) == 1
    assert list(prompts.problems.left_out) == ["the prompt is longer than max_length 100"]


def test_a_row_as_long_as_the_limit_fits(tmp_path, tokenizer):
    data = read_pairs([written(tmp_path, GOOD)])
    (row,) = lay_out_pairs(tokenizer, data, 1024)
    longest = max(
        len(tokenizer.apply_chat_template(row["prompt"] + row[side], return_dict=False))
        for side in ("chosen", "rejected")
    )
    assert len(lay_out_pairs(tokenizer, data, longest)) == 1
    assert lay_out_pairs(tokenizer, data, longest - 1) == []


@pytest.mark.parametrize("spelling", ["<sop>", "[gMASK]", "<eop>", "</s>", "sop"])
def test_spellings_of_control_tokens_are_plain_text(tmp_path, tokenizer, spelling):
    row = {"prompt": f"a {spelling} b", "chosen": f"c {spelling}", "rejected": "d"}
    (laid,) = lay_out_pairs(tokenizer, read_pairs([written(tmp_path, row)]), 1024)
    ids = tokenizer.apply_chat_template(laid["prompt"] + laid["chosen"], return_dict=False)
    control = {
        tokenizer.gmask_token_id,
        tokenizer.sop_token_id,
        tokenizer.eop_token_id,
        tokenizer.end_token_id,
    }
    assert sum(index in control for index in ids) == 3  # [gMASK], <sop>, and the end of the answer
