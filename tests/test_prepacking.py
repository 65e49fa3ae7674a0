"""Weights in the processor's own layout: nobody but the layer notices, in whatever order the model is used.

Tiny layers stay with the definition otherwise, so every test here lowers the size from which it is worth it.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from helpers import CHATGLM, logits, prompt, tiny_model

from chatglm.hub import quantization_kernels as kernels
from chatglm.hub.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm.hub.quantization import Prepackable, QuantizedLinear

ORDERS: dict[str, Callable] = {
    ".quantize(4).half()": lambda model, use: use(use(model.quantize(4)).half()),
    ".half().quantize(8)": lambda model, use: use(use(model.half()).quantize(8)),
    ".quantize(4).float()": lambda model, use: use(use(model.quantize(4)).float()),
    ".half().quantize(4).bfloat16()": lambda model, use: use(use(model.half().quantize(4)).bfloat16()),
    '.quantize(8).to("cpu")': lambda model, use: use(use(model.quantize(8)).to("cpu")),
    ".quantize(4, group_size=32).half()": lambda m, use: use(use(m.quantize(4, group_size=32)).half()),
    ".bfloat16().quantize(8).eval()": lambda model, use: use(use(model.bfloat16().quantize(8)).eval()),
}
PACKINGS = {
    "int8": {"bits": 8},
    "int4": {"bits": 4},
    "int4 in groups": {"bits": 4, "group_size": 32},
    "int4 with embedding": {"bits": 4, "quantize_embeddings": True},
    "float": {"bits": 0},
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def assert_alike(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Torch's own products compute in bfloat16, of which these models make up to 21 %; another weight makes 140 %."""
    difference = ((actual.float() - expected.float()).norm() / expected.float().norm()).item()
    assert difference < 0.4, f"they differ by {difference:.0%}"


@pytest.fixture(autouse=True)
def _every_layer_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHATGLM_KERNELS", raising=False)
    monkeypatch.setattr(kernels, "WORTH_IT", 0)


def prepacked(model: torch.nn.Module) -> list[Prepackable]:
    """The layers whose weight is held in the processor's layout alone."""
    return [
        m for m in model.modules() if isinstance(m, Prepackable) and m.packed is not None and m.weight.is_meta
    ]


def used(model: ChatGLMForConditionalGeneration) -> ChatGLMForConditionalGeneration:
    """After a forward and with the float layers brought into the processor's layout too."""
    model.prepack()
    logits(model, prompt(model.config.family))
    return model


def assert_same_tensors(model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    actual = model.state_dict()
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


@pytest.fixture(params=PACKINGS.values(), ids=PACKINGS)
def packing(request: pytest.FixtureRequest) -> dict:
    return request.param


@pytest.fixture
def packed_model(family: str, packing: dict) -> ChatGLMForConditionalGeneration:
    """A model in half precision that has been used."""
    model = used(tiny_model(family).half().quantize(**packing))
    assert len(prepacked(model)) >= 8, "the layers of these tests must be prepacked"
    return model


@pytest.fixture
def expected(family: str, packing: dict) -> dict[str, torch.Tensor]:
    """What its state dict was before."""
    return tiny_model(family).half().quantize(**packing).state_dict()


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_published_orders_of_calls_give_the_same_weights_used_or_not(family, order):
    expected = order(tiny_model(family), lambda model: model).state_dict()
    model = order(tiny_model(family), used)
    assert prepacked(model)
    assert_same_tensors(model, expected)


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_published_orders_of_calls_answer_as_the_definition(family, order, monkeypatch):
    model = order(tiny_model(family), used)
    actual = logits(model, prompt(family))
    monkeypatch.setattr(kernels, "WORTH_IT", 1 << 40)
    plain = logits(order(tiny_model(family), lambda model: model), prompt(family))
    assert_alike(actual, plain)


def test_the_state_dict_after_a_forward_is_the_one_before(packed_model, expected):
    assert_same_tensors(packed_model, expected)


def test_saving_after_a_forward_loads_equal(packed_model, expected, tmp_path):
    packed_model.save_pretrained(tmp_path)
    assert_same_tensors(ChatGLMForConditionalGeneration.from_pretrained(tmp_path), expected)


def test_a_copy_after_a_forward_is_equal(packed_model, expected):
    twin = copy.deepcopy(packed_model)
    assert_same_tensors(twin, expected)
    assert_same_tensors(packed_model, expected)
    family = packed_model.config.family
    assert torch.equal(logits(used(twin), prompt(family)), logits(used(packed_model), prompt(family)))


def test_a_pickle_after_a_forward_is_equal(packed_model, expected):
    file = io.BytesIO()
    torch.save(packed_model, file)
    file.seek(0)
    assert_same_tensors(torch.load(file, weights_only=False), expected)


def test_training_after_a_forward_restores_the_weights(packed_model, expected):
    packed_model.train()
    assert not prepacked(packed_model)
    assert_same_tensors(packed_model, expected)
    assert not [name for name, parameter in packed_model.named_parameters() if parameter.is_meta]


def test_weights_loaded_into_a_used_model_replace_the_old_ones(packed_model, family, packing):
    other = tiny_model(family, seed=1).half().quantize(**packing)
    packed_model.load_state_dict(other.state_dict())
    assert_same_tensors(packed_model, other.state_dict())
    assert torch.equal(logits(used(packed_model), prompt(family)), logits(used(other), prompt(family)))


def test_a_used_layer_that_is_filled_anew_multiplies_the_new_weight():
    layer = QuantizedLinear(64, 32, 8).eval()
    x = torch.randn(2, 64)
    for seed in range(2):
        new = torch.randn(32, 64, generator=torch.Generator().manual_seed(seed))
        layer.fill(new)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), x @ new.T, rtol=0.05, atol=0.5)
        assert layer.packed is not None


def test_gradients_reach_the_input_of_a_used_model(packed_model, family, expected):
    embeddings = packed_model.get_input_embeddings()(prompt(family)).detach().requires_grad_()
    extra = {"position_ids": torch.zeros(1, 2, 9, dtype=torch.long)} if family == CHATGLM else {}
    packed_model(inputs_embeds=embeddings, **extra).logits.float().sum().backward()
    assert embeddings.grad.abs().sum() > 0
    assert_same_tensors(packed_model, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_casting_a_used_model_and_back_keeps_its_integers(family, dtype):
    model = used(tiny_model(family).quantize(4))
    integers = {name: t for name, t in model.state_dict().items() if t.dtype == torch.int8}
    used(used(model.to(dtype)).float())
    for name, tensor in integers.items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_float_weights_survive_the_processors_layout_bit_for_bit(family, dtype):
    expected = tiny_model(family).to(dtype).state_dict()
    model = tiny_model(family).to(dtype)
    before = logits(model, prompt(family))
    model.prepack()
    assert_same_tensors(model, expected)
    assert_alike(logits(model, prompt(family)), before)


def test_the_head_that_is_the_embedding_keeps_its_weight():
    model = used(tiny_model(CHATGLM))
    assert model.lm_head.packed is None
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_a_packed_head_that_is_the_embedding_stays_tied():
    model = used(tiny_model(CHATGLM).quantize(4, quantize_embeddings=True))
    assert model.lm_head.packed is not None
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert not model.lm_head.weight.is_meta


def test_a_device_other_than_the_processor_is_told_after_a_forward_too():
    layer = QuantizedLinear.from_linear(torch.nn.Linear(32, 64), 4).eval()
    layer(torch.ones(1, 32))
    with pytest.raises(ValueError, match="input is on meta, but the packed weight on cpu"):
        layer(torch.ones(1, 32, device="meta"))


def test_an_answer_begins_with_all_packed_layers_in_their_layout(
    family: str, monkeypatch: pytest.MonkeyPatch
):
    """Side by side, before the first of them is used; float layers stay as they are."""
    model = tiny_model(family).quantize(8)
    packed_when_read = []
    read = type(model).forward
    monkeypatch.setattr(
        type(model),
        "forward",
        lambda self, *args, **kwargs: (
            packed_when_read.append(len(prepacked(self))) or read(self, *args, **kwargs)
        ),
    )
    model.generate(prompt(family), max_new_tokens=2, do_sample=False)
    assert packed_when_read[0] == sum(isinstance(module, QuantizedLinear) for module in model.modules())
