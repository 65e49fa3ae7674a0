"""Every model fixture recorded from the published code, on a folder loaded as its users load it."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from golden import Golden, each_case
from transformers import AutoModel


@pytest.fixture(scope="module")
def load(shared, make_folder, tmp_path_factory):
    """(fixture, model) by name; the model is built once for all of its cases."""

    @lru_cache(maxsize=1)
    def loaded(name: str):
        fixture = Golden(name, shared / "golden")
        return fixture, fixture.load(make_folder, tmp_path_factory.mktemp(name) / name)

    return loaded


def assert_close(actual, expected, atol, valid=None, what="logits"):
    actual, expected = actual.float(), expected.float()
    assert actual.shape == expected.shape
    if valid is not None:
        actual, expected = actual[valid], expected[valid]
    difference = (actual - expected).abs()
    worst = difference.max().item() if difference.numel() else 0.0
    assert (difference <= atol + 1e-4 * expected.abs()).all(), f"{what} differ by up to {worst}"


@each_case("forward", "forward_columns")
def test_one_pass_gives_the_published_logits_and_hidden_states(load, name, case):
    fixture, model = load(name)
    spec, expected = fixture.case(case), fixture.part(case, "out")
    hidden = {int(k.split(".")[1]): v for k, v in expected.items() if k.startswith("hidden.")}
    with torch.no_grad():
        outputs = model(
            **fixture.part(case, "in"), **spec.get("kwargs", {}), output_hidden_states=bool(hidden)
        )
    logits = outputs.logits
    if "logit_columns" in expected:
        assert torch.equal(logits.argmax(-1), expected["argmax"])
        logits = logits[..., expected["logit_columns"]]
    assert_close(logits, expected["logits"], spec["atol"], expected.get("valid"))
    for layer, states in hidden.items():
        assert_close(
            outputs.hidden_states[layer],
            states,
            spec["atol"],
            expected.get("valid"),
            f"layer {layer}",
        )


@each_case("decode")
def test_step_by_step_on_a_cache_gives_the_published_logits(load, name, case):
    fixture, model = load(name)
    spec, cache = fixture.case(case), None
    for step in range(spec["steps"]):
        expected = fixture.part(case, f"step{step}::out")
        with torch.no_grad():
            outputs = model(**fixture.part(case, f"step{step}::in"), past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        assert_close(outputs.logits, expected["logits"], spec["atol"], expected.get("valid"))


@each_case("decode")
def test_positions_are_derived_from_ids_mask_and_cache_when_they_are_left_out(load, name, case):
    fixture, model = load(name)
    spec, cache, keep = fixture.case(case), None, None
    for step in range(spec["steps"]):
        inputs = fixture.part(case, f"step{step}::in")
        expected = fixture.part(case, f"step{step}::out")
        inputs.pop("position_ids", None)
        mask = inputs.get("attention_mask")
        if mask is not None and mask.dim() == 2 and step == 0:
            keep = mask
        elif mask is None and keep is not None:
            # Only a mask tells on which columns of the cache there is padding.
            keep = torch.cat((keep, torch.ones_like(inputs["input_ids"])), dim=1)
            inputs["attention_mask"] = keep
        with torch.no_grad():
            outputs = model(**inputs, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        assert_close(outputs.logits, expected["logits"], spec["atol"], expected.get("valid"))


@each_case("generate")
def test_greedy_generation_gives_the_published_tokens(load, name, case):
    fixture, model = load(name)
    spec = fixture.case(case)
    sequences = model.generate(**fixture.part(case, "in"), **spec["kwargs"])
    assert torch.equal(sequences, fixture.part(case, "out")["sequences"])


# The name that finetuning scripts use; transformers 5.23 calls it activation_checkpointing.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@each_case("loss")
def test_loss_and_gradients_are_the_published_ones(load, name, case, checkpointing):
    fixture, model = load(name)
    spec, expected = fixture.case(case), fixture.part(case, "out")
    if checkpointing and not spec["gradient_checkpointing_ok"]:
        pytest.skip("recorded in eval mode only: in training the prefix has dropout")
    model.zero_grad()
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable()
    try:
        loss = model(**fixture.part(case, "in")).loss
        loss.backward()
    finally:
        if checkpointing:
            model.gradient_checkpointing_disable()
        model.eval()
    assert_close(loss.reshape(1), expected["loss"], 1e-4, what="losses")
    gradients = {n: p.grad for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    if spec["trainable"] is not None:
        assert sorted(gradients) == sorted(spec["trainable"])
    for parameter, norm in spec["grad_norms"].items():
        assert gradients[parameter].norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-4), parameter
    for key, gradient in expected.items():
        if key.startswith("grad::"):
            parameter = key.removeprefix("grad::")
            assert_close(gradients[parameter], gradient, 1e-3 * gradient.abs().max().item(), what=parameter)


@each_case("forward_half")
def test_half_precision_on_the_cpu_stays_within_the_error_of_the_published_code(
    shared, make_folder, tmp_path, name, case
):
    fixture = Golden(name, shared / "golden")
    spec, expected = fixture.case(case), fixture.part(case, "out")
    model = fixture.load(make_folder, tmp_path / name).half()
    with torch.no_grad():
        logits = model(**fixture.part(case, "in")).logits
    assert logits.dtype == torch.float16
    assert_close(logits, expected["logits"], spec["atol"])


@each_case("quantize")
def test_quantize_gives_the_published_integers_and_scales(shared, make_folder, tmp_path, name, case):
    fixture = Golden(name, shared / "golden")
    spec, prefix = fixture.case(case), f"c::{case}::expect::"
    make_folder(tmp_path / name, fixture.config, fixture.weights)
    model = AutoModel.from_pretrained(tmp_path / name, trust_remote_code=True).half().eval()
    assert model.quantize(spec["bits"]) is model
    state = model.state_dict()
    expected = {k.removeprefix(prefix): v for k, v in fixture.tensors.items() if k.startswith(prefix)}
    assert expected
    for key, tensor in expected.items():
        assert torch.equal(state[key], tensor), key
    with torch.no_grad():
        logits = model.float()(**fixture.part(case, "in")).logits
    assert_close(logits, fixture.part(case, "out")["logits"], spec["atol"])


@pytest.mark.parametrize("name", ["v1_int8", "v1_int4", "v1_int8_qe", "v1_int4_qe", "v2_int8", "v2_int4"])
def test_packed_weights_stand_for_the_published_matrices(load, name):
    fixture, model = load(name)
    matrices = {
        k.removeprefix("dequant::"): v for k, v in fixture.tensors.items() if k.startswith("dequant::")
    }
    assert matrices
    for key, matrix in matrices.items():
        layer = model.get_submodule(key.removesuffix(".weight"))
        columns = torch.eye(matrix.shape[1])
        unpacked = (
            layer(columns) - (layer.bias if layer.bias is not None else 0) if hasattr(layer, "bias") else None
        )
        if unpacked is None:  # an embedding
            unpacked = layer(torch.arange(matrix.shape[0])).T
        assert_close(unpacked.T, matrix, 1e-6, what=key)
