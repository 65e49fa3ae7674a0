"""One config for both families: published keys, standard names, and sentences for what cannot be."""

from __future__ import annotations

import copy
import json
import re

import pytest
from helpers import CHATGLM, CHATGLM2, FAMILIES, TINY, tiny_config
from transformers import AutoConfig

from chatglm.hub.configuration_chatglm import ChatGLMConfig

# The config.json files of the published checkpoints, without the keys every model has.
CHATGLM_6B = {
    "architectures": ["ChatGLMModel"],
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    },
    "bos_token_id": 130004,
    "eos_token_id": 130005,
    "mask_token_id": 130000,
    "gmask_token_id": 130001,
    "pad_token_id": 3,
    "hidden_size": 4096,
    "inner_hidden_size": 16384,
    "layernorm_epsilon": 1e-05,
    "max_sequence_length": 2048,
    "model_type": "chatglm",
    "num_attention_heads": 32,
    "num_layers": 28,
    "position_encoding_2d": True,
    "torch_dtype": "float16",
    "transformers_version": "4.23.1",
    "use_cache": True,
    "vocab_size": 130528,
}
CHATGLM2_6B = {
    "architectures": ["ChatGLMModel"],
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    },
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": 13696,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": 4096,
    "kv_channels": 128,
    "layernorm_epsilon": 1e-05,
    "model_type": "chatglm",
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 32,
    "num_layers": 28,
    "original_rope": True,
    "padded_vocab_size": 65024,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 32768,
    "use_cache": True,
    "torch_dtype": "float16",
    "transformers_version": "4.27.1",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
PUBLISHED = {CHATGLM: CHATGLM_6B, CHATGLM2: CHATGLM2_6B}
# What saving rewrites: the version that saved, the newer name of torch_dtype, the added Auto classes.
REWRITTEN = {"transformers_version", "torch_dtype", "auto_map", "_name_or_path"}


def saved(config: ChatGLMConfig, folder) -> dict:
    """The content of the config.json that `config` writes."""
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def assert_keeps(after: dict, before: dict) -> None:
    assert {k: after.get(k) for k in before.keys() - REWRITTEN} == {
        k: before[k] for k in before.keys() - REWRITTEN
    }


# Families


@pytest.mark.parametrize("family", FAMILIES)
def test_the_family_is_told_from_the_published_keys(family):
    assert ChatGLMConfig.from_dict(dict(PUBLISHED[family])).family == family


@pytest.mark.parametrize("key", ["inner_hidden_size", "position_encoding_2d"])
def test_one_key_of_chatglm_6b_is_enough(key):
    assert ChatGLMConfig.from_dict({key: CHATGLM_6B[key]}).family == CHATGLM


@pytest.mark.parametrize("key", ["padded_vocab_size", "multi_query_attention"])
def test_one_key_of_chatglm2_is_enough(key):
    assert ChatGLMConfig.from_dict({key: CHATGLM2_6B[key]}).family == CHATGLM2


def test_no_arguments_give_chatglm2_6b():
    config = ChatGLMConfig()
    assert_keeps(
        config.to_dict(),
        {k: v for k, v in CHATGLM2_6B.items() if k in config.to_dict() and k != "architectures"},
    )
    assert config.family == CHATGLM2


def test_chatglm_6b_gives_the_published_values():
    config = ChatGLMConfig.chatglm_6b()
    assert_keeps(
        config.to_dict(), {k: v for k, v in CHATGLM_6B.items() if k not in ("architectures", "auto_map")}
    )


def test_chatglm_6b_takes_overrides():
    config = ChatGLMConfig.chatglm_6b(vocab_size=150528, bos_token_id=150004, eos_token_id=150005)
    assert (config.vocab_size, config.mask_token_id) == (150528, 150000)


def test_slim_finds_its_mask_tokens_where_the_others_have_them():
    slim = {k: v for k, v in CHATGLM_6B.items() if k not in ("mask_token_id", "gmask_token_id")}
    config = ChatGLMConfig.from_dict(slim)
    assert (config.mask_token_id, config.gmask_token_id) == (130000, 130001)


def test_the_first_release_names_neither_mask_tokens_nor_padding():
    first = {
        k: v for k, v in CHATGLM_6B.items() if k not in ("mask_token_id", "gmask_token_id", "pad_token_id")
    } | {"vocab_size": 150528, "bos_token_id": 150004, "eos_token_id": 150005}
    config = ChatGLMConfig.from_dict(first)
    assert (config.mask_token_id, config.gmask_token_id, config.pad_token_id) == (150000, 150001, 20003)


def test_codegeex2_has_no_padding_id_and_gets_the_one_of_its_family():
    codegeex2 = {k: v for k, v in CHATGLM2_6B.items() if k != "pad_token_id"} | {
        "interleaved_qkv": False,
        "rotary_percent": 0.5,
        "seq_length": 8192,
    }
    config = ChatGLMConfig.from_dict(codegeex2)
    assert config.pad_token_id == 0
    assert config.to_dict()["rotary_percent"] == 0.5


@pytest.mark.parametrize("value", [[True], (True,)], ids=["list", "tuple"])
def test_a_prefix_projection_in_a_list_is_read_as_its_element(value):
    """A circulating copy of the ChatGLM2 code saved it so."""
    assert ChatGLMConfig(prefix_projection=value).prefix_projection is True


@pytest.mark.parametrize("value", [[False], []], ids=str)
def test_a_false_or_empty_list_is_no_prefix_projection(value):
    assert ChatGLMConfig(prefix_projection=value).prefix_projection is False


@pytest.mark.parametrize(("family", "tied"), [(CHATGLM, True), (CHATGLM2, False)])
def test_head_and_embedding_are_tied_as_published_whatever_the_config_leaves_out(family, tied):
    keys = {k: v for k, v in PUBLISHED[family].items() if k != "tie_word_embeddings"}
    assert ChatGLMConfig.from_dict(keys).tie_word_embeddings is tied


# Names


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "num_hidden_layers": (28, 28),
        "num_layers": (28, 28),
        "hidden_size": (4096, 4096),
        "num_attention_heads": (32, 32),
        "num_key_value_heads": (32, 2),
        "head_dim": (128, 128),
        "intermediate_size": (16384, 13696),
        "vocab_size": (130528, 65024),
        "max_position_embeddings": (2048, 32768),
        "use_cache": (True, True),
        "eos_token_id": (130005, 2),
        "pad_token_id": (3, 0),
        "pre_seq_len": (None, None),
        "quantization_bit": (0, 0),
    }.items(),
)
def test_the_standard_names_read_the_published_values(name, values):
    configs = (ChatGLMConfig.from_dict(dict(PUBLISHED[family])) for family in FAMILIES)
    assert tuple(getattr(config, name) for config in configs) == values


@pytest.mark.parametrize("family", FAMILIES)
def test_num_key_value_heads_is_a_real_key(family):
    config = tiny_config(family)
    assert config.to_dict()["num_key_value_heads"] == (4 if family == CHATGLM else 2)


def test_chatglm2_without_groups_has_a_key_value_head_for_every_head():
    assert ChatGLMConfig(multi_query_attention=False).num_key_value_heads == 32


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("num_hidden_layers", ("num_layers", "num_layers")),
        ("intermediate_size", ("inner_hidden_size", "ffn_hidden_size")),
        ("max_position_embeddings", ("max_sequence_length", "seq_length")),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_standard_names_may_be_given_and_assigned(family, name, published):
    published = published[FAMILIES.index(family)]
    keys = {key: value for key, value in TINY[family].items() if key != published}
    if published == "inner_hidden_size":
        keys["position_encoding_2d"] = True
    config = ChatGLMConfig(**keys, **{name: 40})
    assert getattr(config, published) == 40
    setattr(config, name, 48)
    assert getattr(config, published) == 48
    assert config.to_dict()[published] == 48


def test_padded_vocab_size_is_written_beside_vocab_size():
    config = tiny_config(CHATGLM2)
    config.vocab_size = 300
    assert config.padded_vocab_size == 300
    assert config.to_dict()["padded_vocab_size"] == config.to_dict()["vocab_size"] == 300


# Saving


def reference_configs(shared) -> dict[str, dict]:
    found = {}
    for path in sorted((shared / "golden").glob("*.json")):
        config = json.loads(path.read_text(encoding="utf-8")).get("config")
        if config:
            found[path.stem] = config
    return found


def test_every_key_of_the_reference_configs_survives_a_round_trip(shared, tmp_path):
    configs = reference_configs(shared)
    assert len(configs) > 20
    for name, keys in configs.items():
        assert_keeps(saved(ChatGLMConfig.from_dict(dict(keys)), tmp_path / name), keys)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_published_key_survives_a_round_trip(family, tmp_path):
    config = ChatGLMConfig.from_dict(dict(PUBLISHED[family]))
    assert_keeps(saved(config, tmp_path), PUBLISHED[family])


@pytest.mark.parametrize("make", [ChatGLMConfig, ChatGLMConfig.chatglm_6b], ids=FAMILIES)
def test_a_saved_config_loads_equal(make, tmp_path):
    config = make(pre_seq_len=8, quantization_bit=4, num_layers=3)
    config.save_pretrained(tmp_path)
    loaded = ChatGLMConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.family == config.family


@pytest.mark.parametrize("make", [ChatGLMConfig, ChatGLMConfig.chatglm_6b], ids=FAMILIES)
def test_the_difference_to_the_defaults_is_enough_to_build_the_config_again(make):
    config = make(num_layers=3)
    again = ChatGLMConfig.from_dict(config.to_diff_dict())
    assert again.to_dict() == config.to_dict()


def test_keys_that_a_file_of_chatglm2_leaves_out_have_the_published_meaning():
    named = ("multi_query_attention", "multi_query_group_num", "add_qkv_bias", "seq_length")
    content = {key: value for key, value in TINY[CHATGLM2].items() if key not in named}
    config = ChatGLMConfig.from_dict(content)
    assert [getattr(config, name) for name in named] == [False, 1, False, 2048]
    assert config.num_key_value_heads == config.num_attention_heads
    assert ChatGLMConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_the_rows_of_the_first_release_tell_its_special_tokens():
    config = ChatGLMConfig.from_dict({"inner_hidden_size": 16384, "vocab_size": 150528})
    assert (config.bos_token_id, config.eos_token_id, config.gmask_token_id) == (150004, 150005, 150001)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_deep_copy_is_equal_and_apart(family):
    config = tiny_config(family)
    other = copy.deepcopy(config)
    assert other.to_dict() == config.to_dict()
    other.num_layers = 9
    assert config.num_layers == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_prints(family):
    assert '"model_type": "chatglm"' in repr(tiny_config(family))


def test_all_auto_classes_are_named_after_loading_an_old_config():
    config = ChatGLMConfig.from_dict(dict(CHATGLM_6B))
    for auto in ("AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModelForDecision"):
        assert auto in config.to_dict()["auto_map"]


@pytest.mark.parametrize("family", FAMILIES)
def test_from_pretrained_takes_overrides(family, tmp_path):
    tiny_config(family).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, pre_seq_len=16, prefix_projection=True, num_hidden_layers=1)
    assert (config.pre_seq_len, config.prefix_projection, config.num_layers) == (16, True, 1)


def test_generation_settings_in_the_file_do_not_stay_in_the_config():
    config = ChatGLMConfig.from_dict(CHATGLM2_6B | {"top_p": 0.5})
    assert not hasattr(config, "top_p")


# What cannot be


def sentence(keys: dict, **overrides) -> str:
    """The error that `keys` with `overrides` raise: one sentence or two in one line."""
    with pytest.raises(ValueError) as caught:
        ChatGLMConfig(**(keys | overrides))
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


@pytest.mark.parametrize("value", [0, -1, "28", 28.0, None, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_must_be_positive_whole_numbers(family, value):
    for name in ("num_layers", "hidden_size", "num_attention_heads"):
        message = sentence(TINY[family], **{name: value})
        assert f"{name} is {value!r}" in message


@pytest.mark.parametrize(
    ("family", "names"),
    [
        (CHATGLM, ["vocab_size", "inner_hidden_size", "max_sequence_length"]),
        (CHATGLM2, ["ffn_hidden_size", "kv_channels", "seq_length", "multi_query_group_num"]),
    ],
)
def test_sizes_of_one_family_are_checked_too(family, names):
    for name in names:
        assert "is 0; it must be a positive whole number" in sentence(TINY[family], **{name: 0})


@pytest.mark.parametrize("value", [0, -1e-5, float("nan"), float("inf"), "small", None])
def test_numbers_that_divide_must_be_above_zero_and_finite(value):
    for name in ("layernorm_epsilon", "rope_ratio"):
        assert f"{name} is {value!r}" in sentence(TINY[CHATGLM2], **{name: value})


@pytest.mark.parametrize(
    ("family", "overrides", "words"),
    [
        (CHATGLM, {"padded_vocab_size": 256}, ["'inner_hidden_size'", "'padded_vocab_size'", "remove"]),
        (CHATGLM2, {"position_encoding_2d": True}, ["'position_encoding_2d'", "'padded_vocab_size'"]),
        (CHATGLM, {"hidden_size": 66}, ["hidden_size 66", "num_attention_heads 4"]),
        (CHATGLM, {"hidden_size": 24}, ["6 channels", "multiple of 4"]),
        (CHATGLM2, {"kv_channels": 6}, ["6 channels (kv_channels)", "multiple of 4"]),
        (CHATGLM2, {"multi_query_group_num": 3}, ["num_attention_heads 4", "3 groups"]),
        (CHATGLM2, {"num_key_value_heads": 4}, ["num_key_value_heads is 4", "say 2", "remove"]),
        (CHATGLM2, {"vocab_size": 300}, ["vocab_size 300", "padded_vocab_size 256", "remove one"]),
        (CHATGLM2, {"num_hidden_layers": 5}, ["num_layers 2", "num_hidden_layers 5"]),
        (CHATGLM, {"quantization_bit": 3}, ["quantization_bit is 3", "8 or 4"]),
        (CHATGLM, {"quantization_embeddings": True}, ["quantization_embeddings", "quantization_bit"]),
        (CHATGLM, {"pre_seq_len": -4}, ["pre_seq_len is -4"]),
        (CHATGLM, {"bos_token_id": 256}, ["bos_token_id is 256", "256 rows"]),
        (CHATGLM, {"eos_token_id": -1}, ["eos_token_id is -1"]),
        (CHATGLM, {"bos_token_id": None}, ["bos_token_id is None"]),
        (CHATGLM, {"gmask_token_id": 999}, ["gmask_token_id is 999"]),
        (CHATGLM, {"mask_token_id": None}, ["mask_token_id is None"]),
        (CHATGLM, {"pad_token_id": "3"}, ["pad_token_id is '3'"]),
        (CHATGLM2, {"pad_token_id": 256}, ["pad_token_id is 256"]),
        (CHATGLM2, {"eos_token_id": 70000}, ["eos_token_id is 70000"]),
        (CHATGLM2, {"eos_token_id": [2, 70000]}, ["eos_token_id is [2, 70000]"]),
        (CHATGLM2, {"head_dim": 8}, ["head_dim", "kv_channels"]),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else None,
)
@pytest.mark.filterwarnings("ignore")
def test_a_contradiction_is_told_with_both_values(family, overrides, words):
    message = sentence(TINY[family], **overrides)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "keys", [{}, {"model_type": "chatglm"}, {"model_type": "chatglm", "hidden_size": 64}], ids=str
)
def test_a_config_file_of_neither_family_is_refused(keys):
    with pytest.raises(ValueError, match="none of the keys that tell a ChatGLM family"):
        ChatGLMConfig.from_dict(keys)


def test_a_config_file_of_another_model_is_refused():
    with pytest.raises(ValueError, match=re.escape("model_type 'llama'")):
        ChatGLMConfig.from_dict({"model_type": "llama", "num_hidden_layers": 2})


def test_several_end_tokens_are_accepted():
    assert ChatGLMConfig(eos_token_id=[2, 64795]).eos_token_id == [2, 64795]


def test_an_unused_option_is_kept_and_does_no_harm():
    assert ChatGLMConfig(bias_dropout_fusion=True).to_dict()["bias_dropout_fusion"] is True
