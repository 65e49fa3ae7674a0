"""chatglm evaluate --quantization: perplexity, agreement and the error of each layer."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_model
from vocabularies import train_vocabulary, vocabulary_config

from chatglm.cli import main
from chatglm.evaluation import packing
from chatglm.evaluation.packing import Cost, Costs, packing_costs, packings
from chatglm.hub.configuration_chatglm import ChatGLMConfig
from chatglm.hub.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer
from chatglm.tools.convert import convert

TEXT = "你好，世界！\nThe quick brown fox jumps over the lazy dog, again and again.\n" * 12
WINDOW = 100


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a vocabulary of its own."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = ChatGLMTokenizer(train_vocabulary(family, folder))
    tiny_model(family, **vocabulary_config(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def costs(folder: Path, text: Path) -> Costs:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "WINDOW", WINDOW)
        return packing_costs(folder, text, device="cpu", tokens=250, progress=False)


@torch.no_grad()
def measured(
    folder: Path, quantization: dict[str, int] | None
) -> tuple[float, list[int], list[torch.Tensor]]:
    """Perplexity, likeliest ids, and hidden states of the first window, by plain calls of the model."""
    model = ChatGLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = ChatGLMTokenizer.from_pretrained(folder)
    if quantization:
        model.quantize(quantization["quantize"], group_size=quantization.get("group_size"))
    ids = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(TEXT, split_special_tokens=True))[:250]
    start = [tokenizer.gmask_token_id, tokenizer.sop_token_id]
    losses, likeliest, layers = [], [], []
    for window in (ids[:100], ids[100:200], ids[200:]):
        outputs = model(torch.tensor([start + window]), output_hidden_states=True)
        for position, token in enumerate(window, 1):
            scores = outputs.logits[0, position].double()
            losses.append(scores.logsumexp(0) - scores[token])
            likeliest.append(int(scores.argmax()))
        layers = layers or [states[0] for states in outputs.hidden_states[1:]]
    return float(torch.exp(torch.stack(losses).mean())), likeliest, layers


def test_perplexity_and_agreement_are_those_of_plain_calls(folder: Path, costs: Costs):
    perplexity, likeliest, layers = measured(folder, None)
    assert costs.costs[0].perplexity == pytest.approx(perplexity, rel=1e-4)
    config = ChatGLMConfig.from_pretrained(folder)
    for cost, (name, quantization) in zip(costs.costs[1:], packings(config), strict=True):
        packed = measured(folder, quantization)
        assert cost.name == name
        assert cost.perplexity == pytest.approx(packed[0], rel=1e-3)
        same = sum(ours == theirs for ours, theirs in zip(packed[1], likeliest, strict=True)) / 250
        assert cost.agreement == pytest.approx(same, abs=0.005)
        # What stands before the final norm; the library gives the last layer behind it.
        pairs = list(zip(packed[2], layers, strict=True))[:-1]
        errors = [float((ours - theirs).norm() / theirs.norm()) for ours, theirs in pairs]
        assert cost.layer_errors[: len(errors)] == pytest.approx(errors, rel=1e-2)


def test_fewer_bits_cost_more(costs: Costs):
    by_name = {cost.name: cost for cost in costs.costs}
    assert by_name["int8"].agreement > by_name["int4"].agreement
    for layer in range(2):
        errors = [by_name[name].layer_errors[layer] for name in ("int8", "int4, groups of 32", "int4")]
        assert 0 < errors[0] < errors[1] < errors[2]
    assert by_name["float32"].megabytes > by_name["int8"].megabytes > by_name["int4"].megabytes


def test_the_memory_holds_one_model_at_a_time(folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch):
    loaded: list[weakref.ref] = []
    load = packing.load

    def only_one(*arguments: Any, **options: Any) -> Any:
        assert not any(model() for model in loaded)
        model, tokenizer = load(*arguments, **options)
        loaded.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr(packing, "load", only_one)
    packing_costs(folder, text, device="cpu", tokens=20, progress=False)
    assert len(loaded) > 3


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [
        ({}, [128, 64, 32]),
        ({"ffn_hidden_size": 13696 + 32}, [32]),
        ({"ffn_hidden_size": 13700}, []),
    ],
    ids=["ChatGLM2-6B", "other width", "odd width"],
)
def test_every_group_size_that_the_shapes_allow_is_measured(sizes: dict[str, int], groups: list[int]):
    names = [name for name, _ in packings(ChatGLMConfig(**sizes))]
    assert names == ["int8", "int4", *(f"int4, groups of {size}" for size in groups)]


def test_a_packed_checkpoint_is_refused(tiny_v2_folder: Path, tmp_path: Path, text: Path):
    convert(tiny_v2_folder, tmp_path / "packed", quantize=4, progress=False)
    with pytest.raises(ValueError, match="packed to 4 bits already"):
        packing_costs(tmp_path / "packed", text)


def test_a_text_without_tokens_to_predict_is_refused(tiny_v2_folder: Path, tmp_path: Path):
    (tmp_path / "short.txt").write_text("")
    with pytest.raises(ValueError, match="holds no text"):
        packing_costs(tiny_v2_folder, [tmp_path / "short.txt"])


def test_the_command_prints_and_writes_the_tables(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = [
        "--quantization",
        str(text),
        "--tokens",
        "60",
        "--device",
        "cpu",
        "--output",
        str(tmp_path / "o"),
    ]
    assert main(["evaluate", str(folder), *arguments]) == 0
    shown = capsys.readouterr().out
    assert shown == (tmp_path / "o/quantization.md").read_text(encoding="utf-8")
    assert "| float32 | " in shown
    assert shown.count("\n| 1 | ") == 1
    saved = json.loads((tmp_path / "o/quantization.json").read_text(encoding="utf-8"))
    assert saved["about"]["tokens"] == 60
    assert [len(cost["layer_errors"]) for cost in saved["costs"]] == [0, 2, 2, 2, 2, 2][: len(saved["costs"])]


def test_what_is_lost_is_told_against_the_unpacked_model():
    costs = Costs(
        {"name": "m", "tokens": 1000, "layers": 1}, [Cost("a", 4, 2.0), Cost("b", 1, 2.1, 0.5, [0.25])]
    )
    assert costs.lost(costs.costs[1]) == pytest.approx(0.05)
    assert "| b | 1.0 | 2.1000 | +5.00% | 50.00% |" in costs.as_markdown()
    assert "| 0 | 25.00% |" in costs.as_markdown()
