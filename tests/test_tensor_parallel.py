"""Tensor parallelism: two processes that each hold half of every layer compute what one computes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CHATGLM2, assert_close, tiny_config, tiny_model
from safetensors.torch import load_file
from tensor_parallel_process import last_logits, said
from vocabularies import train_vocabulary, vocabulary_config

from chatglm.hub.configuration_chatglm import ChatGLMConfig, check_shares
from chatglm.hub.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer

Shared = tuple[ChatGLMForConditionalGeneration, ChatGLMTokenizer, Path]

pytestmark = pytest.mark.slow

PROCESS = Path(__file__).with_name("tensor_parallel_process.py")
MODELS: dict[str, dict[str, Any]] = {
    "chatglm": {},
    "chatglm_prefix": {"pre_seq_len": 3},
    "chatglm2": {},
    "chatglm2_one_group_prefix": {"multi_query_group_num": 1, "pre_seq_len": 3},
    "chatglm2_head_by_head": {"multi_query_attention": False},
}


@pytest.fixture(scope="module")
def shared_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Shared]:
    """Every model and its folder, in which two processes have written what they make of it."""
    models = {name: saved_model(name, tmp_path_factory.mktemp(name)) for name in MODELS}
    # --standalone: the processes find each other on this machine, at a port that is free.
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(PROCESS),
    ]
    folders = [str(folder) for _, _, folder in models.values()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROCESS.parents[1])}
    ended = subprocess.run(
        command + folders, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return models


def saved_model(name: str, folder: Path) -> Shared:
    family = name.partition("_")[0]
    tokenizer = ChatGLMTokenizer(train_vocabulary(family, folder))
    # transformers 5.16 gathers only what can be cut evenly; the published vocabularies can.
    vocabulary = vocabulary_config(tokenizer, spare=-len(tokenizer) % 2)
    model = tiny_model(family, **vocabulary, **MODELS[name])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer, folder


def of_process(folder: Path, process: int) -> dict[str, Any]:
    return torch.load(folder / f"process{process}.pt")


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_compute_the_logits_of_one(shared_models, name: str):
    model, tokenizer, folder = shared_models[name]
    expected = last_logits(model, tokenizer)
    for process in range(2):
        assert_close(of_process(folder, process)["logits"], expected)


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_say_what_one_says(shared_models, name: str):
    model, tokenizer, folder = shared_models[name]
    expected = said(model, tokenizer)
    for process in range(2):
        assert of_process(folder, process)["said"] == expected


@pytest.mark.parametrize("name", MODELS)
def test_each_process_holds_half_of_the_matrices(shared_models, name: str):
    model, _, folder = shared_models[name]
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    whole = sum(sizes.values())
    small = sum(size for name, size in sizes.items() if re.search("norm|bias|prefix", name))
    for process in range(2):
        assert of_process(folder, process)["share"] <= (whole - small) / 2 + small


@pytest.mark.parametrize("name", MODELS)
def test_what_two_processes_save_is_what_they_loaded(shared_models, name: str):
    folder = shared_models[name][2]
    expected, saved = (load_file(path / "model.safetensors") for path in (folder, folder / "saved"))
    head = saved.pop(
        "lm_head.weight", None
    )  # written beside the embedding that it is, as in the published files
    assert head is None or torch.equal(head, expected["transformer.word_embeddings.weight"])
    assert expected.keys() == saved.keys()
    assert [key for key in expected if not torch.equal(expected[key], saved[key])] == []


@pytest.mark.parametrize("options", [{}, {"multi_query_attention": False}], ids=["published", "head_by_head"])
def test_the_plan_names_every_matrix_and_nothing_else(family: str, options: dict[str, Any]):
    model = tiny_model(family, **(options if family == CHATGLM2 else {}))
    matrices = {name.removesuffix(".weight") for name, p in model.named_parameters() if p.dim() == 2}
    by_layer = {re.sub(r"\.\d+\.", ".*.", name) for name in matrices}
    assert set(model.tp_plan) - {"lm_head"} == by_layer  # the head of ChatGLM-6B is its embedding


def test_a_plan_is_not_written_to_the_config(family: str):
    assert not [key for key in tiny_config(family).to_dict() if "plan" in key]


@pytest.mark.parametrize(
    ("processes", "options"),
    [(3, {}), (8, {}), (2, {"quantization_bit": 4}), (2, {"add_bias_linear": True})],
    ids=["uneven", "too many", "packed", "biases"],
)
def test_what_cannot_be_shared_is_refused(processes: int, options: dict[str, Any]):
    with pytest.raises(ValueError, match=r"tp_size is|no plan for"):
        check_shares(tiny_config(CHATGLM2, **options), processes)


def test_the_published_models_are_shared_by_up_to_32_processes():
    for config in (ChatGLMConfig(), ChatGLMConfig.chatglm_6b()):
        for processes in (2, 4, 8, 16, 32):
            check_shares(config, processes)
