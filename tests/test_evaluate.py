"""chatglm evaluate --task: questions, answers, judgement, and runs that are cut off."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_model
from vocabularies import PUBLISHED, train_vocabulary, vocabulary_config

from chatglm.cli import _parser, main
from chatglm.evaluation import ceval, mmlu, run
from chatglm.evaluation.bbh import BBH
from chatglm.evaluation.ceval import CEval
from chatglm.evaluation.gsm8k import GSM8K
from chatglm.evaluation.mmlu import MMLU
from chatglm.evaluation.own import Own
from chatglm.evaluation.question import Question
from chatglm.evaluation.reader import Reader, letter_ids
from chatglm.evaluation.results import Results, Score
from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer
from chatglm.loading import load

ROOT = Path(__file__).resolve().parents[1]
MODELS = {"chatglm": "demo-v1", "chatglm2": "demo"}
FEW = 24  # tokens of an answer
QUESTIONS = {
    "STEM/sums": [
        ("1加1等于几？\nA. 1\nB. 2\nC. 3\nD. 4", 1),
        ("下列哪个数最大，也就是说比其他的数都大，请你先想一想再回答？\nA. 7\nB. 3\nC. 9\nD. 1", 2),
        ("[gMASK]sop</s> <eop> 2加2？\nA. 4\nB. 5\nC. 6\nD. 7", 0),
    ],
    "Humanities/cities": [
        ("中国的首都是哪里？\nA. 上海\nB. 北京\nC. 广州\nD. 深圳", 1),
        ("你好\nA. 好\nB. 坏\nC. 大\nD. 小", 3),
        ("今天天气怎么样？\nA. 晴\nB. 雨\nC. 雪\nD. 风", 0),
    ],
    "Humanities/words": [("Hello, how are you?\nA. fine\nB. bad\nC. big\nD. no", 2)] * 3,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small file set in the format that was published with ChatGLM2-6B."""
    folder = tmp_path_factory.mktemp("CEval")
    for name, questions in QUESTIONS.items():
        file = folder / "val" / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [
            {"id": i, "inputs_pretokenized": text, "choices_pretokenized": list("ABCD"), "label": label}
            for i, (text, label) in enumerate(questions)
        ]
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def sharp(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random model whose choices vary, unlike those of the demo models."""
    folder = tmp_path_factory.mktemp("sharp")
    tokenizer = ChatGLMTokenizer(train_vocabulary(family, folder))
    longest = {"chatglm": "max_sequence_length", "chatglm2": "seq_length"}[family]
    model = tiny_model(family, **vocabulary_config(tokenizer), **{longest: 1024})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def demo(family: str):
    return load(MODELS[family], device="cpu")


def evaluate(name: str | Path, task: Any, output: Path, **options: Any) -> Results:
    return run.evaluate(name, task, output=output, device="cpu", progress=False, new_tokens=FEW, **options)


def saved_answers(output: Path) -> dict[str, dict[str, Any]]:
    lines = (output / "answers.jsonl").read_text(encoding="utf-8").rpartition("\n")[0].split("\n")[1:]
    return {answer["place"]: answer for answer in map(json.loads, lines)}


# ---- C-Eval


def published_procedure(model: Any, tokenizer: Any, text: str, new_tokens: int) -> tuple[str, int]:
    """Reasoning and choice for one question by itself, with no code of chatglm.evaluation and without `generate`."""

    def prompt(query: str) -> list[int]:
        if tokenizer.family == "chatglm2":
            ids = tokenizer.sp_model.encode(f"[Round 1]\n\n问：{query}\n\n答：")
            return [*tokenizer.convert_tokens_to_ids(["[gMASK]", "sop"]), *ids]
        ids = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(query, split_special_tokens=True))
        return [*ids, *tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>"])]

    ids, answer = prompt(text), []
    while len(answer) < new_tokens and model.config.eos_token_id not in answer:
        answer.append(int(model(torch.tensor([ids + answer])).logits[0, -1].argmax()))
    reasoning = tokenizer.decode(answer)
    scores = model(torch.tensor([prompt(text + reasoning + "\n" + "综上所述，ABCD中正确的选项是：")])).logits[
        0, -1
    ]
    letters = [tokenizer.encode(letter, add_special_tokens=False)[-1] for letter in "ABCD"]
    return reasoning, int(scores[letters].argmax())


@pytest.fixture(scope="module")
def expected(sharp: Path) -> dict[str, tuple[str, int, int]]:
    """By place: reasoning, choice, right choice."""
    model, tokenizer = load(sharp, device="cpu")
    with torch.no_grad():
        return {
            f"{name}.jsonl:{number}": (*published_procedure(model, tokenizer, text, FEW), label)
            for name, questions in QUESTIONS.items()
            for number, (text, label) in enumerate(questions, 1)
        }


@pytest.mark.parametrize("batch_size", [1, 8])
def test_ceval_gives_what_the_published_procedure_gives_question_by_question(
    sharp: Path, data: Path, expected: dict, tmp_path: Path, batch_size: int
):
    results = evaluate(sharp, "ceval", tmp_path, data=data, batch_size=batch_size)
    found = {place: (answer["text"], answer["answer"]) for place, answer in saved_answers(tmp_path).items()}
    assert found == {place: (text, "ABCD"[choice]) for place, (text, choice, _) in expected.items()}
    right = [choice == label for _, choice, label in expected.values()]
    assert (results.all.right, results.all.asked) == (sum(right), len(right))
    assert results.all.percent == 100 * sum(right) / len(right)
    by_subject = {score.name: (score.group, score.right, score.asked) for score in results.subjects}
    assert by_subject == {
        name.partition("/")[2]: (
            name.partition("/")[0],
            sum(choice == label for place, (_, choice, label) in expected.items() if place.startswith(name)),
            3,
        )
        for name in QUESTIONS
    }


def test_the_questions_of_these_tests_have_different_answers(expected: dict):
    assert len({choice for _, choice, _ in expected.values()}) > 1
    assert len({text for text, _, _ in expected.values()}) > 4


@pytest.mark.parametrize(
    ("name", "ids"), [("chatglm", [167, 333, 251, 416]), ("chatglm2", [316, 347, 319, 367])]
)
def test_the_letters_of_the_published_vocabularies_have_the_known_ids(
    shared: Path, name: str, ids: list[int]
):
    tokenizer = ChatGLMTokenizer(shared / "tokenizers" / PUBLISHED[name])
    assert letter_ids(tokenizer, "ABCD") == ids
    assert [tokenizer.encode(letter, add_special_tokens=False) for letter in "ABCD"] == [[i] for i in ids]


def test_a_vocabulary_without_letters_is_refused():
    tokenizer = types.SimpleNamespace(encode=lambda text, add_special_tokens: [5, 0])
    with pytest.raises(ValueError, match="no token for each of A, B"):
        letter_ids(tokenizer, "AB")


def test_a_prompt_that_is_too_long_is_cut_at_its_end_and_counted(demo, family: str):
    model, tokenizer = demo
    reader = Reader(model, tokenizer, new_tokens=2, longest_prompt=20)
    question = Question("1", "s", "你好，" * 40, "")
    ids, cut = reader._encode(question.text, 20)
    whole = tokenizer.encode_chat(question.text)
    assert cut == len(whole) - 20
    assert ids == (whole[:20] if family == "chatglm2" else whole[:18] + whole[-2:])
    assert reader.write([question])[0][1] == cut


def test_examples_that_do_not_fit_are_left_out_and_the_question_stays_whole(demo):
    reader = Reader(*demo, new_tokens=2)
    question = Question(
        "1", "s", "Q: 3?\nA:", "", task="Count.\n\n", examples=("Q: 1?\nA: 1\n\n", "Q: 2?\nA: 2\n\n")
    )
    whole = question.task + "".join(question.examples) + question.text
    room = len(reader.tokenizer.encode_chat(whole))
    assert reader._prompt(question, room) == whole
    assert reader._prompt(question, room - 1) == "Count.\n\nQ: 2?\nA: 2\n\nQ: 3?\nA:"
    assert reader._prompt(question, 1) == "Count.\n\nQ: 3?\nA:"


def test_answers_that_fill_the_whole_context_are_refused(demo):
    with pytest.raises(ValueError, match="leave no room for a question"):
        Reader(*demo, new_tokens=4096)


# ---- runs that are cut off


class PulledPlug(BaseException):
    """What no code catches."""


def test_a_run_that_was_killed_loses_one_batch_at_most_and_goes_on(
    sharp: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    evaluate(sharp, "ceval", tmp_path / "whole", data=data, batch_size=2)
    asked: list[int] = []
    write = Reader.write

    def counted(self: Reader, batch: list[Question]) -> Any:
        asked.append(len(batch))
        if len(asked) == 3:
            raise PulledPlug
        return write(self, batch)

    monkeypatch.setattr(Reader, "write", counted)
    with pytest.raises(PulledPlug):
        evaluate(sharp, "ceval", tmp_path / "cut", data=data, batch_size=2)
    assert len(saved_answers(tmp_path / "cut")) == 4
    results = evaluate(sharp, "ceval", tmp_path / "cut", data=data, batch_size=3)
    assert asked == [2, 2, 2, 3, 2]  # 4 were answered, 5 were left
    assert saved_answers(tmp_path / "cut") == saved_answers(tmp_path / "whole")
    assert results.as_dict() == json.loads((tmp_path / "whole" / "results.json").read_text(encoding="utf-8"))


def test_a_process_that_was_killed_goes_on(sharp: Path, data: Path, tmp_path: Path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    evaluate(sharp, "ceval", whole, data=data)
    command = ["-m", "chatglm", "evaluate", sharp, "--task", "ceval", "--data", data, "--output", cut]
    options = ["--device", "cpu", "--batch-size", "1", "--new-tokens", str(FEW)]
    process = subprocess.Popen([sys.executable, *map(str, command), *options], cwd=ROOT)
    try:
        deadline = time.monotonic() + 120
        while not (cut / "answers.jsonl").exists() or len(saved_answers(cut)) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert not (cut / "results.json").exists()
    evaluate(sharp, "ceval", cut, data=data)
    assert saved_answers(cut) == saved_answers(whole)
    assert (cut / "results.md").read_bytes() == (whole / "results.md").read_bytes()


def test_half_a_line_that_a_kill_left_is_answered_again(data: Path, tmp_path: Path):
    evaluate("demo", "ceval", tmp_path, data=data)
    journal = tmp_path / "answers.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-20])
    evaluate("demo", "ceval", tmp_path, data=data)
    assert journal.read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"name": "demo-v1"}, "begun with model"),
        ({"dtype": "bfloat16"}, "begun with dtype float32, now it is bfloat16"),
        ({"quantize": 8}, "begun with packing none, now it is int8"),
        ({"task": "mmlu"}, "begun with task"),
        ({"other_data": True}, "begun with data"),
        ({"new_tokens": 3}, "begun with new_tokens 2, now it is 3"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_run_with_another_model_or_option_is_refused(
    tmp_path: Path, data: Path, change: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
):
    if change.pop("other_data", False):
        data = Path(shutil.copytree(data, tmp_path / "other"))
        (data / "val/STEM/sums.jsonl").write_text('{"inputs_pretokenized": "?", "label": 0}\n')
    begun = {
        "task": "ceval", "data": "x", "model": "x", "dtype": "float32", "packing": "none", "new_tokens": 2
    }  # fmt: skip
    questions = CEval().questions(data)
    arguments = {"name": "demo", "task": "ceval", "data": data, "output": tmp_path, "new_tokens": 2} | change
    monkeypatch.setattr(CEval, "questions", lambda self, data: questions)
    if "begun with data" not in named:
        begun["data"] = run.fingerprint(questions)
    if "begun with model" not in named:
        begun["model"] = run.model_fingerprint(run.read_checkpoint(run.find_checkpoint("demo")))
    if "mmlu" in change.values():
        monkeypatch.setattr(MMLU, "questions", lambda self, data: questions)
    (tmp_path / "answers.jsonl").write_text(json.dumps({"settings": begun}) + "\n")
    with pytest.raises(ValueError, match=f"{named}.*or another --output"):
        run.evaluate(**arguments, device="cpu", progress=False)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"hello\n", "line 1 is damaged"),
        (b'{"place": "1"}\n', "is no file of answers"),
        (b"", "is no file of answers"),
        (b'{"settings": {}}\n{"place": "1"}\n{"pla\n', "line 3 is damaged"),
        (b'{"settings": {}}\n{"text": "1"}\n', "is no file of answers"),
    ],
    ids=["text", "without settings", "empty", "damaged", "without place"],
)
def test_a_broken_file_of_answers_is_named(tmp_path: Path, content: bytes, named: str):
    file = tmp_path / "answers.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=named) as caught:
        run.Journal(file, {})
    assert str(file) in str(caught.value)
    assert file.read_bytes() == content


def test_more_questions_of_each_subject_go_on_from_fewer(data: Path, tmp_path: Path):
    few = evaluate("demo", "ceval", tmp_path, data=data, limit=1)
    assert [score.asked for score in few.subjects] == [1, 1, 1]
    more = evaluate("demo", "ceval", tmp_path, data=data, limit=2)
    assert [score.asked for score in more.subjects] == [2, 2, 2]
    assert len(saved_answers(tmp_path)) == 6


def test_trained_weights_of_the_same_size_are_another_model(tiny_v2_folder: Path, tmp_path: Path):
    folder = Path(shutil.copytree(tiny_v2_folder, tmp_path / "model"))
    before = run.model_fingerprint(run.read_checkpoint(folder))
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert run.model_fingerprint(run.read_checkpoint(folder)) != before


# ---- the data of the other benchmarks


def test_ceval_reads_the_files_of_ceval_itself(tmp_path: Path):
    (tmp_path / "val").mkdir()
    file = tmp_path / "val" / "computer_network_val.csv"
    file.write_text("id,question,A,B,C,D,answer\n0,几个？,一,二,三,四,C\n", encoding="utf-8")
    (question,) = CEval().questions(tmp_path)
    assert question.text == "几个？\nA. 一\nB. 二\nC. 三\nD. 四\n让我们一步一步思考。"
    assert (question.answer, question.subject, question.group) == ("C", "computer_network", "STEM")
    assert question.extraction == "综上所述，ABCD中正确的选项是："


def test_mmlu_reads_its_published_files_and_asks_for_reasoning(tmp_path: Path):
    with (tmp_path / "anatomy_test.csv").open("w", newline="") as file:
        csv.writer(file).writerow(['A "bone",\nsaid?', "femur", "", "liver", "skin", "A"])
    (question,) = MMLU().questions(tmp_path)
    assert question.text.startswith('A "bone",\nsaid?\nA. femur\nB. \nC. liver\nD. skin\nLet\'s think')
    assert question.extraction == "Therefore, among A through D, the answer is"
    assert (question.answer, question.group, question.letters) == ("A", "Others", "ABCD")


@pytest.mark.parametrize(("groups", "number"), [(ceval.GROUPS, 52), (mmlu.GROUPS, 57)], ids=["ceval", "mmlu"])
def test_every_subject_has_one_group(groups: dict[str, list[str]], number: int):
    subjects = [subject for names in groups.values() for subject in names]
    assert len(subjects) == len(set(subjects)) == number


def gsm8k_folder(folder: Path, prompt: str | None = None) -> Path:
    row = {"question": "Two and two?", "answer": "2+2=<<2+2=4>>4.\n#### 1,004"}
    for name in ("test", "train"):
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    if prompt is not None:
        (folder / "prompt.txt").write_text(prompt)
    return folder


def test_gsm8k_shows_the_prompt_file_or_else_the_first_of_the_training_set(tmp_path: Path):
    (question,) = GSM8K().questions(gsm8k_folder(tmp_path))
    assert question.examples == ("Q: Two and two?\nA: 2+2=4. The answer is 1,004.\n\n",)
    assert (question.text, question.answer) == ("Q: Two and two?\nA:", "1,004")
    (question,) = GSM8K().questions(gsm8k_folder(tmp_path, "Q: One?\nA: 1. The answer is 1.\n\nQ: B\nA: 2\n"))
    assert question.examples == ("Q: One?\nA: 1. The answer is 1.\n\n", "Q: B\nA: 2\n\n")


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("It is 3+1. The answer is 1004.", "1004", True),
        ("The answer is $1,004.00.\n\nQ: Next? The answer is 7.", "1,004.00", True),
        ("所以答案是：1004元", "1004", True),
        ("First 3, then 1004", "1004", True),
        ("The answer is -1004", "-1004", False),
        ("I do not know.", "", False),
        ("7\n\nQ: 1004", "7", False),
    ],
)
def test_gsm8k_judges_the_number_at_the_end(text: str, answer: str, right: bool):
    benchmark, question = GSM8K(), Question("1", "gsm8k", "", "1,004")
    assert benchmark.answer_in(text) == answer
    assert benchmark.is_right(question, answer) == right


def test_bbh_reads_a_clone_and_judges_what_follows_the_answer_is(tmp_path: Path):
    (tmp_path / "bbh").mkdir()
    (tmp_path / "cot-prompts").mkdir()
    examples = {"examples": [{"input": "Which?\nOptions:\n(A) x", "target": "(A)"}]}
    (tmp_path / "bbh/navigate.json").write_text(json.dumps({"canary": "c"} | examples))
    (tmp_path / "cot-prompts/navigate.txt").write_text(
        "canary\n-----\nTell where.\n\nQ: a\nA: Let's think step by step.\nb. So the answer is (B).\n\nQ: c\nA: d\n"
    )
    (question,) = BBH().questions(tmp_path)
    prompt = question.task + "".join(question.examples) + question.text
    assert prompt == (
        "Tell where.\n\nQ: a\nA: Let's think step by step.\nb. So the answer is (B).\n\nQ: c\nA: d\n\n"
        "Q: Which?\nOptions:\n(A) x\nA: Let's think step by step."
    )
    assert BBH().answer_in("Well. So the answer is (A).\n\nQ: e\nSo the answer is (C).") == "(A)"
    assert BBH().answer_in("So the answer is ] ] ).\nMore") == "] ] )"
    assert BBH().answer_in("(A)") == ""


def hub(monkeypatch: pytest.MonkeyPatch, load_dataset: Callable) -> None:
    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    module.__spec__ = types.SimpleNamespace(name="datasets")
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_without_a_folder_questions_come_through_the_package_datasets(monkeypatch: pytest.MonkeyPatch):
    sets = {
        ("cais/mmlu", "all", "test"): {
            "question": "?", "choices": list("wxyz"), "answer": 3, "subject": "law"
        },
        ("openai/gsm8k", "main", "test"): {"question": "?", "answer": "#### 5"},
        ("openai/gsm8k", "main", "train[:8]"): {"question": "!", "answer": "So.\n#### 6"},
    }  # fmt: skip
    hub(monkeypatch, lambda name, config, split: [sets[name, config, split]])
    (question,) = MMLU().questions(None)
    assert question.text.startswith("?\nA. w\nB. x\nC. y\nD. z\n")
    assert (question.answer, question.subject) == ("D", "law")
    (question,) = GSM8K().questions(None)
    assert (question.answer, question.examples) == ("5", ("Q: !\nA: So. The answer is 6.\n\n",))
    row = {"question": "?", **dict.fromkeys("ABCD", "x"), "answer": "B"}
    hub(
        monkeypatch, lambda name, config, split: [row] if (name, split) == ("ceval/ceval-exam", "val") else []
    )
    assert {question.subject for question in CEval().questions(None)} == set(ceval.GROUP_OF)


def test_a_data_set_that_cannot_be_had_ends_in_one_sentence(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network\nand much more")

    hub(monkeypatch, fail)
    with pytest.raises(OSError, match=r"cais/mmlu, all, test cannot be had \(no network\); give a folder"):
        MMLU().questions(None)


# ---- broken data


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (b'{"inputs_pretokenized": "?", "label": 4}', "label 4; it must be one of A, B, C, D, or 0 to 3"),
        (b'{"inputs_pretokenized": "?", "label": true}', "label True"),
        (b'{"inputs_pretokenized": "?"}', "label None"),
        (b'{"inputs_pretokenized": " ", "label": 0}', "inputs_pretokenized ' '; it must be a text"),
        (b'{"label": 0}', "has no 'inputs_pretokenized'"),
        (b'{"inputs_pretokenized": ["?"], "label": 0}', "it must be a text"),
        (b'{"inputs_pretokenized": "\\ud800", "label": 0}', "half of a surrogate pair"),
        (b'{"inputs_pretokenized": "?', "is no valid JSON"),
        (b"[1]", "is no object"),
        (b"[" * 100_000, "is no valid JSON"),
        (b'{"inputs_pretokenized": "\xff", "label": 0}', "is not UTF-8"),
    ],
    ids=[
        "range",
        "bool",
        "no label",
        "blank",
        "no text",
        "list",
        "surrogate",
        "cut off",
        "array",
        "deep",
        "bytes",
    ],
)
def test_a_broken_line_is_told_with_file_and_line_before_a_model_is_loaded(
    tmp_path: Path,
    line: bytes,
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(run, "load", None)
    file = tmp_path / "val" / "a.jsonl"
    file.parent.mkdir()
    file.write_bytes(b'{"inputs_pretokenized": "?", "label": 0}\n\n' + line + b"\n")
    assert (
        main(["evaluate", "demo", "--task", "ceval", "--data", str(tmp_path), "--output", str(tmp_path)]) == 1
    )
    error = capsys.readouterr().err
    assert error.startswith(f"chatglm: {file}, line 3 ")
    assert named in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("?,1,2,3,4,A\n?,1,2,3\n", "line 2 has 4 fields where 6 belong"),
        ("?,1,2,3,4,A\n?,1,2,3,4,E\n", "line 2 has answer 'E'"),
        ('?,1,2,3,4,A\n"?,1,2\n', "line 2 has 1 fields where 6 belong"),
        ("?,1,2,3,4,A\n" + "x" * 200_000 + ",1,2,3,4,A\n", "line 2 is no valid CSV: field larger than"),
    ],
    ids=["fields", "answer", "quote", "long"],
)
def test_a_broken_row_is_told_with_file_and_line(tmp_path: Path, content: str, named: str):
    file = tmp_path / "law_test.csv"
    file.write_text(content)
    with pytest.raises(ValueError, match=named) as caught:
        MMLU().questions(tmp_path)
    assert str(caught.value).startswith(str(file))


@pytest.mark.parametrize(
    ("benchmark", "files", "named"),
    [
        (CEval(), {}, "neither .jsonl files"),
        (MMLU(), {}, r"no \*_test.csv files"),
        (GSM8K(), {}, "no test.jsonl"),
        (GSM8K(), {"test.jsonl": ""}, "neither prompt.txt"),
        (GSM8K(), {"test.jsonl": "", "prompt.txt": "Q: 1\nA: 2\n\nhello"}, "block 2 is no pair"),
        (GSM8K(), {"test.jsonl": '{"question": "?", "answer": "5"}', "prompt.txt": "Q:\nA:"}, "line 1 has an answer"),
        (BBH(), {}, "no bbh/.*json"),
        (BBH(), {"bbh/a.json": "{}"}, "There is no .*a.txt"),
        (BBH(), {"bbh/a.json": "{}", "cot-prompts/a.txt": "a"}, "a.json has no list of examples"),
        (BBH(), {"bbh/a.json": '{"examples": [{"input": "?"}]}', "cot-prompts/a.txt": "a"}, "example 1 has no 't"),
    ],
)  # fmt: skip
def test_a_folder_that_lacks_something_is_told(
    tmp_path: Path, benchmark: Any, files: dict[str, str], named: str
):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises((OSError, ValueError), match=named) as caught:
        benchmark.questions(tmp_path)
    assert str(tmp_path) in str(caught.value)


# ---- own questions


@pytest.mark.parametrize(
    ("row", "letters", "answer"),
    [
        ({"question": "1+1?", "choices": ["1", "2", "3"], "answer": "B"}, "ABC", "B"),
        ({"question": "1+1?", "choices": ["1", "2", "3"], "answer": "3"}, "ABC", "C"),
        ({"question": "1+1?", "choices": ["1", "2", "3"], "answer": 0}, "ABC", "A"),
        ({"question": "1+1?", "choices": ["B", "A"], "answer": "B"}, "AB", "B"),
        ({"inputs_pretokenized": "?", "label": 2}, "ABCD", "C"),
        ({"prompt": "?", "answer": "yes"}, "", "yes"),
    ],
    ids=["letter", "text", "number", "letter before text", "prepared", "prompt"],
)
def test_own_questions_come_in_three_kinds(tmp_path: Path, row: dict, letters: str, answer: str):
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps(row))
    (question,) = Own(file).questions()
    assert (question.letters, question.answer, question.subject) == (letters, answer, "own")


def test_the_phrase_that_asks_for_a_letter_is_in_the_language_of_the_question(tmp_path: Path):
    file = tmp_path / "own.jsonl"
    rows = [{"question": text, "choices": ["1", "2"], "answer": "A"} for text in ("几？", "How many?")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chinese, english = Own(file).questions()
    assert chinese.extraction == "综上所述，AB中正确的选项是："
    assert english.extraction == "Therefore, among A through B, the answer is"


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Paris", True),
        (" paris.\n", True),
        ("ＰＡＲＩＳ。", True),
        ("巴黎", True),
        ("In Paris", False),
        ("", False),
    ],
)
def test_text_must_be_one_of_the_answers_apart_from_case_width_and_full_stop(
    tmp_path: Path, text: str, right: bool
):
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps({"prompt": "?", "answer": ["Paris", "巴黎"]}))
    own = Own(file)
    (question,) = own.questions()
    assert own.is_right(question, own.answer_in(text)) == right


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"question": "?"}, "neither question and choices nor prompt"),
        ({"question": "?", "choices": ["1"], "answer": 0}, "no list of 2 to 26 texts"),
        ({"question": "?", "choices": [1, 2], "answer": 0}, "no list of 2 to 26 texts"),
        ({"question": "?", "choices": ["1", "2"], "answer": "C"}, "answer 'C'"),
        ({"prompt": "?"}, "has no 'answer'"),
        ({"prompt": "?", "answer": []}, r"answer \[\]"),
        ({"prompt": "?", "answer": [1]}, r"answer \[1\]"),
    ],
)
def test_an_own_question_that_lacks_something_is_told(tmp_path: Path, row: dict, named: str):
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps(row))
    with pytest.raises(ValueError, match=f"own.jsonl, line 1 .*{named}"):
        Own(file).questions()


# ---- the command


def test_the_command_asks_own_questions_and_writes_scores(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], demo
):
    model, tokenizer = demo
    answer, _ = model.chat(tokenizer, "你好", do_sample=False)
    file = tmp_path / "mine.jsonl"
    rows = [
        {"prompt": "你好", "answer": answer},
        {"prompt": "你好", "answer": "Nobody says this."},
        {"question": "1+1?", "choices": ["1", "2"], "answer": "2", "subject": "sums"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        "--task",
        str(file),
        "--output",
        str(tmp_path / "out"),
        "--device",
        "cpu",
        "--new-tokens",
        "64",
    ]
    assert main(["evaluate", MODELS[family], *arguments]) == 0
    shown = capsys.readouterr().out
    assert "| mine | 1 | 2 | 50.00 |" in shown
    assert shown == (tmp_path / "out/results.md").read_text(encoding="utf-8")
    results = json.loads((tmp_path / "out/results.json").read_text(encoding="utf-8"))
    assert results["subjects"]["mine"] == {"group": "", "right": 1, "asked": 2, "cut": 0, "percent": 50.0}
    assert results["about"]["family"] == family


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--task", "nothing"], "There is no task 'nothing'; give ceval, mmlu, gsm8k, bbh, or a .jsonl file"),
        (["--task", "ceval", "--data", "nowhere"], "There is no folder nowhere"),
        (["--task", "bbh"], "--data"),
        (["--task", "ceval", "--tokens", "9"], "--tokens does not go with --task"),
        (["--quantization", "x", "--batch-size", "9"], "--batch-size does not go with --quantization"),
        (["--quantization", "x", "--quantize", "8"], "--quantize does not go with --quantization"),
        (["--quantization", "nowhere"], "There is no file or folder nowhere"),
        (["--task", "ceval", "--chart", "a.jpg"], "neither a .png nor a .svg"),
        (["--task", "ceval", "--group-size", "32"], "add --quantize 4"),
    ],
)
def test_mistakes_end_in_one_sentence(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "demo", *arguments]) == 1
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_without_datasets_the_user_is_told_of_both_ways(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("chatglm.evaluation.files.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"give a folder with --data, or pip install datasets"):
        MMLU().questions(None)


# ---- results


@pytest.fixture
def results() -> Results:
    about = {"task": "ceval", "name": "models/mine", "dtype": "bfloat16", "packing": "int4"}
    subjects = [Score("a", "X", 1, 2), Score("b", "X", 0, 1, cut=1), Score("c", "Y", 3, 5)]
    return Results(about, subjects, CEval.published)


def test_every_question_counts_the_same_and_published_figures_are_marked(results: Results):
    text = results.as_markdown()
    assert "# ceval: models/mine, bfloat16, int4" in text
    assert "| all | 4 | 8 | 50.00 |" in text
    assert "| X | 1 | 3 | 33.33 |" in text
    assert "| mean of the subjects | | | 36.67 |" in text
    assert "| ChatGLM2-6B, bf16, validation (published, not measured here) | | | 53.57 |" in text
    assert "1 prompts were too long" in text


def test_the_chart_has_our_bar_and_the_published_ones(results: Results, tmp_path: Path):
    pytest.importorskip("matplotlib")
    results.draw(tmp_path / "chart.svg")
    drawn = (tmp_path / "chart.svg").read_text(encoding="utf-8")
    for text in ("mine", "ChatGLM2-6B, int4, validation (published)", "% of all questions right", "50.3"):
        assert text in drawn


def test_a_batch_of_random_models_gives_what_its_rows_give(family: str, tmp_path: Path):
    tokenizer = ChatGLMTokenizer(train_vocabulary(family, tmp_path))
    model = tiny_model(family, **vocabulary_config(tokenizer))
    reader = Reader(model, tokenizer, new_tokens=12)
    texts = ["你好", "Hello world, how are you?", "一加一等于几？" * 5]
    questions = [Question(text, "s", text, "A", "ABC") for text in texts]
    alone = [reader.write([question])[0] for question in questions]
    assert reader.write(questions) == alone
    assert len({text for text, _ in alone}) == 3
    letters = ["AB", "ABCD", "BC"]
    chosen = [reader.choose([text], [some])[0] for text, some in zip(texts, letters, strict=True)]
    assert reader.choose(texts, letters) == chosen


# ---- the documentation


def page() -> str:
    return (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")


def test_the_commands_of_the_page_are_understood():
    commands = [line.split()[1:] for line in page().splitlines() if line.startswith("chatglm evaluate ")]
    assert len(commands) >= 5
    for command in commands:
        options = _parser(command).parse_args(command)
        assert bool(options.task) != bool(options.quantization)


def test_the_questions_of_the_page_are_read(tmp_path: Path):
    file = tmp_path / "page.jsonl"
    file.write_text(page().partition("```json\n")[2].partition("```")[0], encoding="utf-8")
    assert [question.answer for question in Own(file).questions()] == ["B", "Paris | Paris, France", "B"]


def test_the_published_figures_of_the_page_are_those_of_the_charts():
    table = page().partition("## Published figures")[2].partition("## ")[0]
    in_table = {float(number) for number in re.findall(r"\d+\.\d+(?= \|)", table)}
    drawn = {
        figure.percent
        for task in run.BENCHMARKS.values()
        for figure in task.published
        if "base" not in figure.name
    }
    assert in_table == drawn
