"""The lines of the published README files, on folders whose own code runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import CHATGLM, CHATGLM2, GMASK, HUB_FILES, SOP, TINY, published_keys, published_shapes
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

AUTO_MAP = {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig",
    "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSequenceClassification": "modeling_chatglm.ChatGLMForSequenceClassification",
}
# Fields of the published files that have no bearing on the sizes.
MORE_FIELDS: dict[str, dict[str, Any]] = {
    CHATGLM: {"layernorm_epsilon": 1e-05, "use_cache": True},
    CHATGLM2: {
        "layernorm_epsilon": 1e-05,
        "add_qkv_bias": True,
        "add_bias_linear": False,
        "rmsnorm": True,
        "post_layer_norm": True,
        "original_rope": True,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "use_cache": True,
    },
}


def weights_of(family: str) -> dict[str, torch.Tensor]:
    """Every tensor of a published file, in its dtype: float16, LayerNorm of ChatGLM-6B float32."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in published_shapes(family).items():
        tensor = torch.randn(shape, generator=generator) * 0.3
        is_norm = "norm" in name
        weights[name] = (tensor + 1 if is_norm else tensor).to(
            torch.float32 if is_norm and family == CHATGLM else torch.float16
        )
    if family == CHATGLM:
        weights["lm_head.weight"] = weights["transformer.word_embeddings.weight"].clone()
    return weights


@pytest.fixture(scope="module")
def folder(family, make_folder, tmp_path_factory) -> Path:
    config = {
        "architectures": ["ChatGLMModel"],
        "auto_map": AUTO_MAP,
        "model_type": "chatglm",
        "torch_dtype": "float16",
        "transformers_version": "4.27.1",
        **TINY[family],
        **MORE_FIELDS[family],
    }
    return make_folder(tmp_path_factory.mktemp("hub") / family, config, weights_of(family))


@pytest.fixture(scope="module")
def ids(family) -> torch.Tensor:
    row = [17, 23, 99, 140, 201, 54]
    return torch.tensor([[*row, GMASK, SOP] if family == CHATGLM else row])


@pytest.fixture(scope="module")
def expected(folder, ids) -> torch.Tensor:
    """Logits in float32."""
    return logits(AutoModel.from_pretrained(folder, trust_remote_code=True).float(), ids)


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM])
def test_every_auto_class_loads_the_language_model(folder, ids, expected, auto):
    model = auto.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__name__ == "ChatGLMForConditionalGeneration"
    assert type(model).__module__.startswith("transformers_modules")
    torch.testing.assert_close(logits(model.float(), ids), expected)


def test_a_classifier_loads_from_the_same_folder(folder, ids):
    model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True, num_labels=3)
    assert logits(model.float(), ids).shape == (1, 3)


def test_the_published_dtype_is_kept_unless_another_is_asked_for(folder):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert {p.dtype for p in model.parameters()} == {torch.float16}


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:.*torch_dtype.*")
def test_every_weight_has_the_dtype_that_was_asked_for(folder, name, dtype):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, **{name: dtype})
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize(
    "arguments",
    [
        {"device": "cpu"},
        {"revision": "main"},
        {"revision": "v1.1.0"},
        {"empty_init": True},
        {"empty_init": False},
        {"low_cpu_mem_usage": True},
        {"device_map": "auto"},
        {"device_map": "cpu"},
        {"resume_download": True},
        {"use_auth_token": False},
        {"cache_dir": None},
    ],
    ids=str,
)
def test_the_keyword_arguments_of_old_readmes_are_taken(folder, ids, expected, arguments):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, **arguments)
    torch.testing.assert_close(logits(model.float(), ids), expected)


def test_a_config_with_a_prefix_may_be_passed(folder, ids):
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True, pre_seq_len=4)
    model = AutoModel.from_pretrained(folder, config=config, trust_remote_code=True)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"transformer.prefix_encoder.embedding.weight"}
    assert logits(model.float(), ids).isfinite().all()


def test_the_prefix_weights_of_the_finetuning_guide_load(folder, ids, expected):
    """Its lines: the prefix alone from the small file, the prefix in float32 on a half model."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True, pre_seq_len=4)
    model = AutoModel.from_pretrained(folder, config=config, trust_remote_code=True)
    size = model.transformer.prefix_encoder.embedding.weight.shape
    saved = {"transformer.prefix_encoder.embedding.weight": torch.ones(size)}
    short = {name[len("transformer.prefix_encoder.") :]: tensor for name, tensor in saved.items()}
    model.transformer.prefix_encoder.load_state_dict(short)
    model = model.quantize(4).half()
    model.transformer.prefix_encoder.float()
    assert logits(model, ids).isfinite().all()
    assert (logits(model.float(), ids) - expected).abs().max() > 0.1


@pytest.mark.parametrize("dtype", ["half", "float", "bfloat16"])
def test_dtype_methods_and_eval_return_the_model(folder, ids, dtype):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    cast = getattr(model, dtype)().eval()
    assert cast is model
    assert not model.training
    assert logits(model, ids).isfinite().all()


@pytest.mark.parametrize("bits", [0, 8, 4])
def test_quantize_returns_the_model_at_the_end_of_a_loading_line(folder, ids, bits):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).quantize(bits).float().eval()
    assert model.config.quantization_bit == bits
    assert logits(model, ids).isfinite().all()


def test_loading_twice_gives_the_same_model(folder, ids):
    """The second class comes from the registry of remote classes."""
    first, second = (AutoModel.from_pretrained(folder, trust_remote_code=True) for _ in range(2))
    assert type(first) is type(second)
    assert torch.equal(logits(first, ids), logits(second, ids))
    assert torch.equal(first.transformer.rotary_pos_emb.inv_freq, second.transformer.rotary_pos_emb.inv_freq)
    assert second.generate(ids, max_new_tokens=2, do_sample=False).shape[1] == ids.shape[1] + 2


def test_a_model_built_from_the_config_has_numbers_that_make_sense(folder, ids):
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert logits(model.float(), ids).abs().max() < 100


@pytest.fixture(scope="module")
def resaved(folder, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("resaved")
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).save_pretrained(target)
    return target


def test_a_saved_folder_carries_the_root_files(resaved):
    for name in HUB_FILES:
        assert (resaved / name).is_file(), name


def test_a_saved_folder_loads_equal_with_its_own_code(resaved, ids, expected):
    model = AutoModel.from_pretrained(resaved, trust_remote_code=True)
    torch.testing.assert_close(logits(model.float(), ids), expected)


def test_a_saved_folder_has_the_published_key_names(resaved, family):
    with safe_open(resaved / "model.safetensors", "pt") as file:
        assert set(file.keys()) == published_keys(family)


def test_a_saved_config_names_every_auto_class(resaved):
    auto_map = json.loads((resaved / "config.json").read_text(encoding="utf-8"))["auto_map"]
    assert AUTO_MAP.items() <= auto_map.items()


@pytest.mark.parametrize("old", [True, False], ids=["old keys only", "no auto_map key for it"])
def test_a_folder_with_the_auto_map_of_its_time_still_loads(
    folder, family, make_folder, tmp_path, ids, expected, old
):
    """The first release named three classes; the others are added when the config is read."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = ("AutoConfig", "AutoModel", "AutoModelForSeq2SeqLM")
    config["auto_map"] = {key: AUTO_MAP[key] for key in kept}
    make_folder(tmp_path / "old", config, weights_of(family))
    auto = AutoModel if old else AutoModelForCausalLM
    model = auto.from_pretrained(tmp_path / "old", trust_remote_code=True)
    torch.testing.assert_close(logits(model.float(), ids), expected)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_model_saves_and_loads_equal(folder, ids, bits, tmp_path):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).quantize(bits)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(logits(loaded.float(), ids), logits(model.float(), ids))


def test_a_sharded_folder_loads_equal(folder, family, make_folder, tmp_path, ids, expected):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    target = make_folder(tmp_path / "sharded", config)
    names = sorted(weights_of(family))
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, keys in shards.items():
        tensors = {key: weights_of(family)[key].contiguous() for key in keys}
        save_file(tensors, target / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: file for file, keys in shards.items() for key in keys}}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    model = AutoModel.from_pretrained(target, trust_remote_code=True)
    torch.testing.assert_close(logits(model.float(), ids), expected)


def test_importing_the_root_files_leaves_no_global_switch_changed(folder):
    before = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads())
    AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()) == before
