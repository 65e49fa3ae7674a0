"""One model on several devices: cards that share its layers, and layers that stay in memory or on disk.

There need not be a card: labelled_devices.py has two that are the CPU, and refuse what cards would refuse.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import labelled_devices
import pytest
import torch
from accelerate import dispatch_model, infer_auto_device_map
from conversations import Conversation
from helpers import CHATGLM, PAD, assert_close, logits, pad_left, prompt, three_rows, tiny_config, tiny_model
from labelled_devices import DEVICES
from transformers import StaticCache

from chatglm import load, load_model_on_gpus
from chatglm.devices import layers_on_gpus
from chatglm.engine.engine import Engine
from chatglm.engine.request import Request
from chatglm.hub.configuration_chatglm import ChatGLMConfig
from chatglm.hub.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm.hub.quantization import ChatGLMQuantizationConfig, QuantizedLinear
from chatglm.loading import find_device
from chatglm.tools.convert import convert
from chatglm.training.methods import training_device

QUERIES = ["你好", "晚上睡不着"]
GREEDY = {"do_sample": False, "max_new_tokens": 4}
KINDS: dict[str, dict[str, Any]] = {
    "16bit": {},
    "int8": {"bits": 8},
    "int4": {"bits": 4},
    "prefix": {"pre_seq_len": 3, "prefix_projection": True},
}


def halves(config: ChatGLMConfig, first: Any, second: Any) -> dict[str, Any]:
    """The published map for two cards, with other names for them."""
    return {name: [first, second][number] for name, number in layers_on_gpus(config, 2).items()}


def split(model: ChatGLMForConditionalGeneration) -> ChatGLMForConditionalGeneration:
    """A copy whose layers two labelled devices share; only while they exist."""
    model, (first, second) = copy.deepcopy(model), DEVICES
    skip = model._skip_keys_device_placement
    dispatch_model(model, halves(model.config, first, second), main_device=first, skip_keys=skip)
    return model


@pytest.fixture(params=KINDS, ids=str)
def whole(request: pytest.FixtureRequest, family: str) -> ChatGLMForConditionalGeneration:
    """A model of every kind that is split; of its three layers the second device has two."""
    options = dict(KINDS[request.param])
    bits = options.pop("bits", 0)
    return tiny_model(family, num_layers=3, **options).quantize(bits)


# ---- the published map


@pytest.mark.parametrize("family", ["chatglm", "chatglm2"])
def test_two_gpus_share_28_layers_as_published(family: str):
    config = ChatGLMConfig.chatglm_6b() if family == CHATGLM else ChatGLMConfig()
    layers = "transformer.layers" if family == CHATGLM else "transformer.encoder.layers"
    device_map = layers_on_gpus(config, 2)
    assert [device_map.pop(f"{layers}.{i}") for i in range(28)] == 13 * [0] + 15 * [1]
    assert set(device_map.values()) == {0}  # both ends


@pytest.mark.parametrize("num_gpus", range(2, 9))
def test_no_gpu_takes_more_than_its_share_and_a_layer(family: str, num_gpus: int):
    config = tiny_config(family, num_layers=28)
    names = dict(ChatGLMForConditionalGeneration(config).named_modules())
    device_map = layers_on_gpus(config, num_gpus)
    assert set(device_map) <= set(names)
    placed = [gpu for name, gpu in device_map.items() if ".layers." in name]
    assert len(placed) == 28
    assert placed == sorted(placed)
    assert set(placed) <= set(range(num_gpus))
    taken = [2 * (gpu == 0) + placed.count(gpu) for gpu in range(num_gpus)]
    assert max(taken) <= 30 / num_gpus + 1


def test_every_weight_has_its_gpu(family: str):
    model = tiny_model(family, pre_seq_len=3)
    names = tuple(layers_on_gpus(model.config, 2))
    assert [name for name in model.state_dict() if not name.startswith(names)] == []


def test_more_gpus_than_there_are_are_refused_before_anything_is_read():
    with pytest.raises(ValueError, match="num_gpus is 99, but torch sees"):
        load_model_on_gpus("no-such-folder", num_gpus=99)


# ---- names of devices


def test_a_device_is_one_that_torch_has_here(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    for name in ("cpu", "cpu:0", "xpu", "xpu:1"):
        assert find_device(name) == torch.device(name)
    for name in ("cpu:1", "xpu:2", "cuda", "meta", "gpu", ""):
        with pytest.raises(ValueError, match="torch has only cpu, xpu, xpu:1 here"):
            find_device(name)


def test_training_takes_no_device_that_is_not_there():
    with pytest.raises(ValueError, match="device is 'meta'"):
        training_device("meta")


# ---- two devices


def test_labelled_devices_refuse_to_be_mixed():
    with labelled_devices.labelled_devices():
        there = torch.ones(2).to(DEVICES[0])
        assert (there + 1).sum().item() == 4
        with pytest.raises(RuntimeError, match="was given tensors on"):
            there + there.to(DEVICES[1])
        with pytest.raises(RuntimeError, match="was given tensors on"):
            there + torch.ones(2)


def test_a_model_split_over_two_devices_computes_what_one_computes(whole, family: str):
    ids, mask = pad_left(three_rows(family), PAD)
    expected = logits(whole, ids, attention_mask=mask)
    answer = whole.generate(ids, attention_mask=mask, **GREEDY)
    with labelled_devices.labelled_devices():
        model = split(whole)
        ids, mask = ids.to(DEVICES[0]), mask.to(DEVICES[0])
        assert model.device == DEVICES[0]
        assert {parameter.device for parameter in model.parameters()} == set(DEVICES)
        assert_close(logits(model, ids, attention_mask=mask).cpu(), expected)
        assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY).cpu(), answer)


@pytest.mark.parametrize("kind", ["int8_cache", "static", "beams", "lookup"])
def test_every_way_to_generate_works_across_devices(family: str, kind: str):
    whole = tiny_model(family)
    ids = prompt(family)
    options = {
        "int8_cache": {"int8_cache": True},
        "static": {"past_key_values": StaticCache(config=whole.config, max_cache_len=40)},
        "beams": {"num_beams": 2},
        "lookup": {"prompt_lookup_num_tokens": 3},
    }.get(kind, {})
    expected = whole.generate(ids, **GREEDY, **options)
    if kind == "static":
        options["past_key_values"] = StaticCache(config=whole.config, max_cache_len=40)
    with labelled_devices.labelled_devices():
        answer = split(whole).generate(ids.to(DEVICES[0]), **GREEDY, **options)
    assert torch.equal(answer.cpu(), expected)


def test_chats_streams_and_batches_say_the_same_across_devices(family: str, tmp_path: Path):
    conversation = Conversation(family, tmp_path)
    model, tokenizer, history = conversation.model, conversation.tokenizer, [("你好", "你好！")]
    chat = model.chat(tokenizer, "晚上", history, **GREEDY)
    batch = model.batch_chat(tokenizer, QUERIES, **GREEDY)
    with labelled_devices.labelled_devices():
        model = split(model)
        *_, streamed = model.stream_chat(tokenizer, "晚上", history, **GREEDY)
        assert model.chat(tokenizer, "晚上", history, **GREEDY) == streamed == chat
        assert model.batch_chat(tokenizer, QUERIES, **GREEDY) == batch


def test_each_layer_keeps_its_keys_and_its_prefix_where_it_lies(family: str):
    whole = tiny_model(family, num_layers=4, pre_seq_len=3)
    with labelled_devices.labelled_devices():
        model = split(whole)
        cache = model.new_cache()
        logits(model, prompt(family).to(DEVICES[0]), past_key_values=cache, use_cache=True)
        places = [DEVICES[number] for number in (0, 1, 1, 1)]
        assert [layer.keys.device for layer in cache.layers] == places
        assert [key.device for key, _ in cache.glm_prefix] == places


def test_masks_and_rotary_tables_are_moved_once_for_each_device_not_for_each_layer(family: str):
    def moves(num_layers: int) -> int:
        ids, mask = pad_left(three_rows(family), PAD)
        whole = tiny_model(family, num_layers=num_layers)
        with labelled_devices.labelled_devices():
            model = split(whole)
            ids, mask = ids.to(DEVICES[0]), mask.to(DEVICES[0])
            with labelled_devices.counted_moves() as counted:
                logits(model, ids, attention_mask=mask)
        return len(counted)

    assert moves(4) == moves(7) > 0


# ---- layers on disk


@pytest.fixture(scope="module")
def saved(family: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Conversation, Path]:
    """A model that says something, and its folder."""
    folder = tmp_path_factory.mktemp(f"{family}-saved")
    conversation = Conversation(family, folder)
    conversation.model.save_pretrained(folder)
    conversation.tokenizer.save_pretrained(folder)
    return conversation, folder


def map_of(kind: str, config: ChatGLMConfig) -> dict[str, str]:
    """Which modules stay on disk; the others come to the CPU."""
    if kind == "all":
        return {"": "disk"}
    away, here = ("cpu", "disk") if kind == "both ends" else ("disk", "cpu")
    return {name: away if ".layers." in name else here for name in layers_on_gpus(config, 2)}


ON_DISK = pytest.mark.parametrize("kind", ["layers", "both ends", "all"])


@ON_DISK
def test_layers_on_disk_compute_what_they_compute_in_memory(saved, kind: str):
    (model, tokenizer), folder = (saved[0].model, saved[0].tokenizer), saved[1]
    device_map = map_of(kind, model.config)
    offloaded = ChatGLMForConditionalGeneration.from_pretrained(folder, device_map=device_map).eval()
    ids = tokenizer(["你好"], return_tensors="pt")["input_ids"]
    assert offloaded.device == torch.device("cpu")
    assert_close(logits(offloaded, ids), logits(model, ids))
    chat = model.chat(tokenizer, "你好", **GREEDY)
    *_, streamed = offloaded.stream_chat(tokenizer, "你好", **GREEDY)
    assert offloaded.chat(tokenizer, "你好", **GREEDY) == streamed == chat
    batch = model.batch_chat(tokenizer, QUERIES, **GREEDY)
    assert offloaded.batch_chat(tokenizer, QUERIES, **GREEDY) == batch


@ON_DISK
@pytest.mark.parametrize("bits", [8, 4])
def test_packed_layers_come_from_disk_and_leave_again(saved, kind: str, bits: int, tmp_path: Path):
    packed = tmp_path / "packed"
    convert(saved[1], packed, quantize=bits, progress=False)
    model = ChatGLMForConditionalGeneration.from_pretrained(packed).eval()
    offloaded = ChatGLMForConditionalGeneration.from_pretrained(
        packed, device_map=map_of(kind, model.config)
    ).eval()
    tokenizer = saved[0].tokenizer
    assert offloaded.chat(tokenizer, "你好", **GREEDY) == model.chat(tokenizer, "你好", **GREEDY)
    layers = [layer for layer in offloaded.modules() if isinstance(layer, QuantizedLinear)]
    if kind != "both ends":
        assert all(layer.weight.is_meta and layer.packed is None for layer in layers)


def test_the_server_answers_from_layers_on_disk(saved):
    device_map = map_of("all", saved[0].model.config)
    model = load_model_on_gpus(saved[1], device_map=device_map, dtype=torch.float32)
    tokenizer = saved[0].tokenizer
    engine = Engine(model, tokenizer, max_batch=2)
    try:
        requests = [
            Request(tokenizer.encode_chat(query, None), temperature=0, max_tokens=4) for query in QUERIES
        ]
        texts = ["".join(piece.text for piece in answer) for answer in map(engine.submit, requests)]
    finally:
        engine.close()
    assert texts == [saved[0].model.chat(tokenizer, query, **GREEDY)[0] for query in QUERIES]


def test_packing_layers_that_stay_on_disk_is_refused(saved):
    device_map = map_of("layers", saved[0].model.config)
    with pytest.raises(ValueError, match="pack it first"):
        ChatGLMForConditionalGeneration.from_pretrained(
            saved[1], device_map=device_map, quantization_config=ChatGLMQuantizationConfig(bits=4)
        )
    offloaded = ChatGLMForConditionalGeneration.from_pretrained(saved[1], device_map=device_map)
    with pytest.raises(ValueError, match="is offloaded"):
        offloaded.quantize(4)


def test_a_map_of_the_users_own_goes_to_load_model_on_gpus(saved):
    device_map = map_of("layers", saved[0].model.config)
    model = load_model_on_gpus(saved[1], device_map=device_map, trust_remote_code=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert model.hf_device_map == device_map
    query = (saved[0].tokenizer, "你好")
    assert model.chat(*query, **GREEDY) == load(saved[1], device="cpu", dtype="float16")[0].chat(
        *query, **GREEDY
    )


@pytest.mark.parametrize("device", ["auto", "balanced"])
def test_load_spreads_a_model_over_what_there_is(saved, device: str):
    model, tokenizer = load(saved[1], device=device, dtype="float32")
    assert model.chat(tokenizer, "你好", **GREEDY) == saved[0].model.chat(tokenizer, "你好", **GREEDY)


def test_auto_fills_the_cards_and_then_the_memory_with_whole_layers(family: str):
    model = tiny_model(family, num_layers=6)
    layer = sum(p.nbytes for p in model.base_model.blocks[0].parameters())
    ends = sum(p.nbytes for p in model.parameters()) - 6 * layer
    room = {0: ends + 3 * layer, 1: 3 * layer, "cpu": 1 << 30}
    found = infer_auto_device_map(model, room, no_split_module_classes=model._no_split_modules)
    placed = [found[name] for name in found if ".layers." in name]
    assert len(placed) == 6  # by whole layers, and none is missing
    assert set(placed) >= {0, 1}


# ---- cards


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_two_cards_say_what_one_says(saved, bits: int | None):
    packing = ChatGLMQuantizationConfig(bits) if bits else None
    one = load_model_on_gpus(saved[1], num_gpus=1, quantization_config=packing)
    for device_map in (None, "auto", "balanced"):
        two = load_model_on_gpus(saved[1], num_gpus=2, device_map=device_map, quantization_config=packing)
        tokenizer = saved[0].tokenizer
        *_, streamed = two.stream_chat(tokenizer, "你好", **GREEDY)
        assert two.chat(tokenizer, "你好", **GREEDY) == streamed == one.chat(tokenizer, "你好", **GREEDY)
        assert two.batch_chat(tokenizer, QUERIES, **GREEDY) == one.batch_chat(tokenizer, QUERIES, **GREEDY)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rest", ["cpu", "disk"])
@pytest.mark.parametrize("bits", [0, 8, 4])
def test_a_card_and_what_is_offloaded_say_what_the_card_says(saved, bits: int, rest: str, tmp_path: Path):
    folder = saved[1]
    if bits:
        folder = tmp_path / "packed"
        convert(saved[1], folder, quantize=bits, progress=False)
    whole = load_model_on_gpus(folder, num_gpus=1)
    offloaded = load_model_on_gpus(folder, device_map=halves(whole.config, 0, rest))
    tokenizer = saved[0].tokenizer
    assert offloaded.chat(tokenizer, "你好", **GREEDY) == whole.chat(tokenizer, "你好", **GREEDY)
