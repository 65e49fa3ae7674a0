"""`pipeline("text-generation")` on folders with real vocabularies."""

from __future__ import annotations

import pytest
import torch
from golden import Golden
from tiny import HUB_FILES
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline


@pytest.fixture(scope="module", params=["v1_real", "v2_real"])
def folder(request, shared, make_folder, tmp_path_factory):
    fixture = Golden(request.param, shared / "golden")
    return fixture.folder(make_folder, tmp_path_factory.mktemp("pipeline") / request.param)


@pytest.fixture(scope="module")
def generate(folder):
    return pipeline(
        "text-generation", model=str(folder), trust_remote_code=True, dtype=torch.float32, device="cpu"
    )


SETTINGS = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}


def expected_texts(folder, texts: list[str]) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).float().eval()
    answers = []
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt")
        outputs = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        answer = outputs[0, inputs["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(answer, skip_special_tokens=True))
    return answers


TEXTS = ["你好", "What is the capital of France?", "1+1="]


def test_a_pipeline_generates_what_the_model_does(folder, generate):
    answers = [generate(text, **SETTINGS)[0]["generated_text"] for text in TEXTS]
    assert answers == expected_texts(folder, TEXTS)
    assert any(answers)


def test_a_batch_in_a_pipeline_gives_the_answers_of_its_rows(folder, generate):
    answers = [answer[0]["generated_text"] for answer in generate(TEXTS, batch_size=3, **SETTINGS)]
    assert answers == expected_texts(folder, TEXTS)


def test_a_pipeline_takes_chat_messages(generate):
    messages = [{"role": "user", "content": "你好"}]
    answer = generate(messages, max_new_tokens=6, do_sample=False)[0]["generated_text"]
    assert answer[:1] == messages
    assert answer[1]["role"] == "assistant"


def test_a_saved_model_and_tokenizer_load_together(folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True).save_pretrained(tmp_path)
    for name in HUB_FILES:
        assert (tmp_path / name).is_file(), name
    again = pipeline("text-generation", model=str(tmp_path), trust_remote_code=True, dtype=torch.float32)
    assert [again(text, **SETTINGS)[0]["generated_text"] for text in TEXTS] == expected_texts(folder, TEXTS)
