"""chatglm.load: from a name to a model that chats, without running anybody else's code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny import HUB_FILES

import chatglm
from chatglm.checkpoint import Checkpoint
from chatglm.hub.configuration_chatglm import ChatGLMConfig
from chatglm.loading import default_dtype


def test_a_folder_loads_ready_to_chat(tiny_folder: Path):
    model, tokenizer = chatglm.load(tiny_folder, device="cpu")
    response, history = model.chat(tokenizer, "你好", max_length=40)
    assert history == [("你好", response)]
    assert not model.training


def test_on_a_cpu_small_models_compute_in_float32(tiny_v2_folder: Path):
    model, _ = chatglm.load(tiny_v2_folder, device="cpu")
    assert model.dtype == torch.float32
    assert model.device.type == "cpu"


def test_the_dtype_is_what_was_asked_for(tiny_folder: Path):
    model, _ = chatglm.load(tiny_folder, device="cpu", dtype="bfloat16")
    assert model.dtype == torch.bfloat16


def test_large_models_take_bfloat16_on_a_cpu_and_their_own_dtype_elsewhere():
    large = Checkpoint(Path(), ChatGLMConfig().to_dict(), ())
    assert default_dtype(torch.device("cpu"), large) == torch.bfloat16
    assert default_dtype(torch.device("cuda"), large) == "auto"


def test_ids_that_a_folder_leaves_out_are_known_to_generate(tiny_folder: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_folder, tmp_path / "folder")
    (folder / "generation_config.json").unlink(missing_ok=True)
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    left_out = {"pad_token_id"} | ({"eos_token_id"} if "padded_vocab_size" in content else set())
    kept = {key: value for key, value in content.items() if key not in left_out}
    (folder / "config.json").write_text(json.dumps(kept), encoding="utf-8")
    model, _ = chatglm.load(folder, device="cpu")
    for name in left_out:
        assert getattr(model.generation_config, name) == getattr(model.config, name) is not None


@pytest.mark.parametrize("bits", [8, 4])
def test_quantize_packs_the_weights_on_the_way(tiny_folder: Path, bits: int):
    model, tokenizer = chatglm.load(tiny_folder, device="cpu", quantize=bits)
    assert model.config.quantization_bit == bits
    assert torch.int8 in {tensor.dtype for tensor in model.state_dict().values()}
    assert model.chat(tokenizer, "你好", max_length=40)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"quantize": 3}, "give 8 or 4"),
        ({"device": "gpu"}, "torch has only"),
        ({"device": "meta"}, "torch has only"),
        ({"device": "cuda:63"}, "torch has only"),
        ({"dtype": "int8"}, "float32, float16, bfloat16"),
        ({"dtype": torch.int8}, "float32, float16, bfloat16"),
    ],
    ids=["bits", "device name", "device without memory", "device number", "dtype name", "dtype"],
)
def test_wrong_arguments_are_told_before_anything_is_read(arguments: dict, words: str):
    with pytest.raises(ValueError, match=words):
        chatglm.load("/no/such/folder", **arguments)


def test_a_name_that_is_nothing_is_told():
    with pytest.raises(OSError, match="no folder 'nothing'; give a folder, a Hub name"):
        chatglm.load("nothing")


def test_a_hub_name_that_cannot_be_reached_is_told():
    with pytest.raises(OSError, match="some/model is no folder here"):
        chatglm.load("some/model")


def test_a_truncated_shard_is_told_before_loading(tiny_v2_folder: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_v2_folder, tmp_path / "copy")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(OSError, match="where its header says"):
        chatglm.load(folder)


def test_a_bin_checkpoint_loads_like_a_safetensors_one(tiny_v2_folder: Path, tmp_path: Path):
    from safetensors.torch import load_file

    folder = shutil.copytree(tiny_v2_folder, tmp_path / "copy")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    expected, _ = chatglm.load(tiny_v2_folder, device="cpu")
    model, _ = chatglm.load(folder, device="cpu")
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tiny_v2_folder: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_v2_folder, tmp_path / "copy")
    (folder / "model.safetensors").unlink()
    torch.save({"tensor": Trap(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds more than tensors"):
        chatglm.load(folder)
    assert not (tmp_path / "ran").exists()


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("trust", [None, False, True], ids=["unset", "false", "true"])
def test_the_code_in_a_folder_never_runs(tiny_folder: Path, tmp_path: Path, trust: bool | None):
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    folder = as_published(shutil.copytree(tiny_folder, tmp_path / "copy"), tmp_path / "ran")
    arguments = {} if trust is None else {"trust_remote_code": trust}
    chats = "ChatGLMForConditionalGeneration"
    for auto, name in {
        AutoConfig: "ChatGLMConfig",
        AutoTokenizer: "ChatGLMTokenizer",
        AutoModel: chats,
        AutoModelForCausalLM: chats,
        AutoModelForSeq2SeqLM: chats,
        AutoModelForSequenceClassification: "ChatGLMForSequenceClassification",
    }.items():
        kind = type(auto.from_pretrained(folder, **arguments))
        assert kind.__name__ == name
        assert kind.__module__.startswith("chatglm.hub.")
    chatglm.load(folder, device="cpu")
    assert not (tmp_path / "ran").exists()


def as_published(folder: Path, mark: Path) -> Path:
    """Gives the folder the auto_map of a published one, and files of code that leave a mark."""
    code = f"open({str(mark)!r}, 'w').close()\nraise RuntimeError('the code of the folder ran')\n"
    for kind in ("configuration", "modeling", "tokenization"):
        (folder / f"{kind}_chatglm.py").write_text(code)
    chats = "modeling_chatglm.ChatGLMForConditionalGeneration"
    auto_map = {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": chats,
        "AutoModelForCausalLM": chats,
        "AutoModelForSeq2SeqLM": chats,
        "AutoModelForSequenceClassification": "modeling_chatglm.ChatGLMForSequenceClassification",
    }
    tokenizer_map = {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}
    for name, change in {
        "config.json": {"auto_map": auto_map, "_attn_implementation_internal": "evil/kernel"},
        "tokenizer_config.json": {
            "auto_map": tokenizer_map,
            "tokenizer_class": "ChatGLMTokenizer",
        },
    }.items():
        content = json.loads((folder / name).read_text()) | change
        (folder / name).write_text(json.dumps(content))
    return folder


def test_registering_again_changes_nothing(tiny_v2_folder: Path):
    from transformers import AutoModel

    chatglm.register()
    chatglm.register()
    assert type(AutoModel.from_pretrained(tiny_v2_folder)).__module__.startswith("chatglm.hub.")


def test_a_loaded_model_is_saved_with_our_code_and_loads_equal(tiny_folder: Path, tmp_path: Path):
    model, tokenizer = chatglm.load(tiny_folder, device="cpu")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = chatglm.load(tmp_path, device="cpu")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert {path.name for path in tmp_path.iterdir()} >= set(HUB_FILES)
