"""The lm-evaluation-harness, unpatched, on a local task: choices and generated text, both families."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval", reason="the lm-evaluation-harness is not installed")

from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402, after the check that it is there

from chatglm.evaluation.harness import ChatGLMHarness  # noqa: E402

pytestmark = [
    pytest.mark.slow,  # its imports alone take ten seconds
    pytest.mark.filterwarnings("ignore"),  # those of the harness and of what it imports
]
ROOT = Path(__file__).resolve().parents[1]
MODELS = {"chatglm": "demo-v1", "chatglm2": "demo"}
QUESTIONS = [
    {"question": "1+1=?", "choices": ["1", "2"], "answer": 1},
    {"question": "中国的首都是？", "choices": ["上海的", "北京"], "answer": 1},
    {"question": "你好", "choices": ["好", "你好！"], "answer": 1},
]
CHOICES = """
task: own_choices
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""
TEXTS = """
task: own_texts
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {max_gen_toks: 40, do_sample: false, until: ["\\n\\n"]}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, text in {"choices": CHOICES, "texts": TEXTS}.items():
        (folder / f"{name}.yaml").write_text(text.replace("FILE", str(file)))
    return folder


@pytest.fixture(scope="module")
def harness(family: str) -> ChatGLMHarness:
    return ChatGLMHarness(MODELS[family], device="cpu", dtype="float32", batch_size=1)


def responses(harness: ChatGLMHarness, tasks: Path, name: str, **options: Any) -> list[Any]:
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = lm_eval.simple_evaluate(
        harness, tasks=[name], task_manager=manager, log_samples=True, bootstrap_iters=0, **options
    )
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"] for sample in samples]


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("chat", [False, True], ids=["bare", "chat template"])
@torch.no_grad()
def test_the_likelihoods_of_choices_are_those_of_plain_calls(
    harness: ChatGLMHarness, tasks: Path, chat: bool, batch_size: int
):
    model, tokenizer = harness.model, harness.tokenizer
    harness.batch_size_per_gpu = batch_size
    for question, found in zip(
        QUESTIONS, responses(harness, tasks, "own_choices", apply_chat_template=chat), strict=True
    ):
        text = question["question"]
        prompt = tokenizer.encode_chat(text) if chat else tokenizer.encode(text)
        for choice, (likelihood, _) in zip(question["choices"], found, strict=True):
            answer = tokenizer.encode(choice, add_special_tokens=False)
            scores = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            expected = sum(float(scores[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))
            assert likelihood == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_generated_texts_are_those_of_chat(harness: ChatGLMHarness, tasks: Path, batch_size: int):
    harness.batch_size_per_gpu = batch_size
    found = responses(harness, tasks, "own_texts", apply_chat_template=True)
    for question, (text,) in zip(QUESTIONS, found, strict=True):
        prompt = harness.model.build_inputs(harness.tokenizer, question["question"])
        ids = harness.model.generate(**prompt, do_sample=False, max_new_tokens=40)
        expected = harness.tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :])
        assert text == expected.split("\n\n")[0]
    assert any(len(text) > 8 for (text,) in found)


@torch.no_grad()
def test_with_the_chat_template_choices_work_with_the_class_of_the_harness_too_for_chatglm2(tasks: Path):
    folder = ROOT / "chatglm/models/demo"
    theirs = HFLM(str(folder), device="cpu", dtype="float32", batch_size=2)
    likelihoods = responses(theirs, tasks, "own_choices", apply_chat_template=True)
    for question, found in zip(QUESTIONS, likelihoods, strict=True):
        prompt = theirs.tokenizer.encode_chat(question["question"])
        for choice, (likelihood, _) in zip(question["choices"], found, strict=True):
            text = theirs.tokenizer.build_prompt(question["question"]) + choice
            ids = theirs.tokenizer.encode(text)
            scores = theirs.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected = sum(float(scores[i - 1, ids[i]]) for i in range(len(prompt), len(ids)))
            assert likelihood == pytest.approx(expected, abs=1e-3)


def test_a_prompt_that_is_too_long_loses_its_beginning(harness: ChatGLMHarness):
    whole = harness.tok_encode("一二三四五六七八九十")
    short = harness.tok_encode("一二三四五六七八九十", left_truncate_len=6)
    assert len(short) == 6
    front = len(harness.tokenizer.get_prefix_tokens())
    assert short == whole[:front] + whole[len(whole) - 6 + front :]


def test_perplexity_tasks_are_refused(harness: ChatGLMHarness):
    with pytest.raises(NotImplementedError, match="--quantization"):
        harness.loglikelihood_rolling([])


def test_its_own_command_line_knows_our_models(tasks: Path, tmp_path: Path):
    command = [sys.executable, "-m", "chatglm.evaluation.harness", "run", "--model", "chatglm"]
    command += ["--model_args", "pretrained=demo,dtype=float32", "--include_path", str(tasks)]
    command += ["--tasks", "own_choices", "--device", "cpu", "--output_path", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "own_choices" in result.stdout
