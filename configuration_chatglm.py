"""The configuration of ChatGLM-6B, ChatGLM2-6B and their close kin.

Every published checkpoint says `"model_type": "chatglm"`, so the family is told from the other keys:
`inner_hidden_size` or `position_encoding_2d` belong to ChatGLM-6B ("chatglm"), `padded_vocab_size`
or `multi_query_attention` to ChatGLM2-6B, ChatGLM3-6B and CodeGeeX2 ("chatglm2"). The last functions check
that the files beside a config.json are whole and hold what it says.
"""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

CHATGLM = "chatglm"
CHATGLM2 = "chatglm2"

FAMILY_KEYS = {
    CHATGLM: ("inner_hidden_size", "position_encoding_2d"),
    CHATGLM2: ("padded_vocab_size", "multi_query_attention"),
}

# The keys of the published config.json files with the values of the published 6B checkpoints.
SHARED_DEFAULTS: dict[str, Any] = {
    "num_layers": 28,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "layernorm_epsilon": 1e-5,
    "use_cache": True,
    "quantization_bit": 0,  # 8 or 4: the linear weights in the file are packed integers
    "quantization_embeddings": False,  # embedding and head are packed too
    "quantization_group_size": None,  # 32, 64, 128: columns that share a scale; None: all of a row
    "pre_seq_len": None,  # length of the P-Tuning v2 prefix
    "prefix_projection": False,
    "initializer_range": 0.02,
}
FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    CHATGLM: {
        "vocab_size": 130528,
        "inner_hidden_size": 16384,
        "max_sequence_length": 2048,
        "position_encoding_2d": True,
        "bos_token_id": 130004,
        "eos_token_id": 130005,
        "tie_word_embeddings": True,  # the published files leave it out and mean true
    },
    CHATGLM2: {
        "vocab_size": 65024,  # written as `padded_vocab_size` too
        "ffn_hidden_size": 13696,
        "kv_channels": 128,  # channels of one head
        "multi_query_attention": True,
        "multi_query_group_num": 2,  # key-value heads, each shared by 16 query heads
        "seq_length": 32768,
        "rope_ratio": 1.0,  # positions are divided by it; above 1 in the 32k checkpoints
        "original_rope": True,  # read by vLLM only
        "rmsnorm": True,
        "post_layer_norm": True,
        "apply_residual_connection_post_layernorm": False,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "fp32_residual_connection": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,  # without effect, as in the published code
        "classifier_dropout": None,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    },
}


# What the published code takes for keys that a config.json of ChatGLM2 leaves out, where that is not what its own has.
LEFT_OUT = {
    "multi_query_attention": False,
    "multi_query_group_num": 1,
    "add_qkv_bias": False,
    "seq_length": 2048,
}

# Second names of a value: those of transformers, and the one that ChatGLM2 has for its rows.
ALIASES = {
    "max_position_embeddings": {CHATGLM: "max_sequence_length", CHATGLM2: "seq_length"},
    "intermediate_size": {CHATGLM: "inner_hidden_size", CHATGLM2: "ffn_hidden_size"},
    "padded_vocab_size": {CHATGLM: "vocab_size", CHATGLM2: "vocab_size"},
    "num_hidden_layers": {CHATGLM: "num_layers", CHATGLM2: "num_layers"},
}

# Which class an Auto class takes from a folder that carries our files. `transformers serve` looks for
# AutoModelForDecision first and cannot load remote code under any other name.
AUTO_MAP = {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig",
    "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForDecision": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSequenceClassification": "modeling_chatglm.ChatGLMForSequenceClassification",
}


def family_of(keys: dict[str, Any]) -> str | None:
    """Return "chatglm" or "chatglm2", whichever `keys` of a config.json belong to; None if neither.

    Raises ValueError when keys of both families are present.
    """
    found = {family: [key for key in telling if key in keys] for family, telling in FAMILY_KEYS.items()}
    if found[CHATGLM] and found[CHATGLM2]:
        raise ValueError(
            f"The config mixes two families: {found[CHATGLM][0]!r} belongs to ChatGLM-6B and "
            f"{found[CHATGLM2][0]!r} to ChatGLM2-6B; remove the keys of one of them."
        )
    return next((family for family, telling in found.items() if telling), None)


def _alias(name: str) -> property:
    def get(config: ChatGLMConfig) -> Any:
        return getattr(config, ALIASES[name][config.family])

    def put(config: ChatGLMConfig, value: Any) -> None:
        setattr(config, ALIASES[name][config.family], value)

    return property(get, put)


class ChatGLMConfig(PreTrainedConfig):
    """Sizes and switches of one checkpoint, under the names of the published config.json files.

    `ChatGLMConfig()` is ChatGLM2-6B, `ChatGLMConfig.chatglm_6b()` ChatGLM-6B v1.1; both take any key
    of FAMILY_DEFAULTS as an argument. The standard names of transformers (`num_hidden_layers`,
    `num_key_value_heads`, `head_dim`, `intermediate_size`, `max_position_embeddings`) read the same
    values. Raises ValueError for unknown families and contradictory values.
    """

    model_type = "chatglm"
    _auto_class = "AutoConfig"  # save_pretrained copies this file too
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"num_hidden_layers": "num_layers"}  # the library reads this one here

    max_position_embeddings = _alias("max_position_embeddings")
    intermediate_size = _alias("intermediate_size")
    padded_vocab_size = _alias("padded_vocab_size")

    def __init__(self, **kwargs: Any) -> None:
        family = family_of(kwargs) or CHATGLM2
        kwargs = _with_one_name_each(family, kwargs)
        for name, default in {**SHARED_DEFAULTS, **FAMILY_DEFAULTS[family]}.items():
            setattr(self, name, kwargs.pop(name, default))
        if family == CHATGLM:
            # The oldest checkpoints name none of them; the distances are the same in all vocabularies.
            sop = self.bos_token_id if isinstance(self.bos_token_id, int) else 4
            self.mask_token_id = kwargs.pop("mask_token_id", sop - 4)
            self.gmask_token_id = kwargs.pop("gmask_token_id", sop - 3)
            self.pad_token_id = kwargs.pop("pad_token_id", max(sop - 130001, 0))
        if isinstance(self.prefix_projection, (list, tuple)):
            # A circulating copy of the ChatGLM2 code saved a one-element list here.
            self.prefix_projection = any(self.prefix_projection)
        self.pre_seq_len = self.pre_seq_len or None
        self.quantization_bit = self.quantization_bit or 0
        self.num_key_value_heads = kwargs.pop("num_key_value_heads", None)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self._published_key_value_heads()
        _check_sizes(self)  # the base class computes with them
        if kwargs.get("auto_map"):
            kwargs["auto_map"] = complete_auto_map(kwargs["auto_map"])
        super().__init__(**kwargs)
        self.base_model_tp_plan = tensor_parallel_plan(self)
        self.check()

    @classmethod
    def chatglm_6b(cls, **overrides: Any) -> ChatGLMConfig:
        """ChatGLM-6B v1.1 with `overrides`, for instance `vocab_size=150528, bos_token_id=150004`."""
        return cls(**{"position_encoding_2d": True, **overrides})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> ChatGLMConfig:
        """Build from the content of a config.json; ValueError if it is of neither family."""
        if config_dict.get("model_type", cls.model_type) != cls.model_type:
            raise ValueError(
                f"config.json says model_type {config_dict['model_type']!r}; ChatGLM checkpoints say 'chatglm'. Load "
                "this one with the Auto classes of transformers."
            )
        if family_of(config_dict) is None:
            raise ValueError(
                f"config.json says model_type {config_dict.get('model_type')!r} but has none of the keys "
                f"that tell a ChatGLM family ({', '.join(sum(FAMILY_KEYS.values(), ()))}); take the "
                "config.json that was published with the weights."
            )
        if family_of(config_dict) == CHATGLM2:
            given = _with_one_name_each(CHATGLM2, config_dict)
            left_out = LEFT_OUT | {"multi_query_group_num": given.get("num_key_value_heads") or 1}
            config_dict = config_dict | {name: value for name, value in left_out.items() if name not in given}
        elif config_dict.get("vocab_size") == 150528:  # v0.1, whose special tokens follow 20,000 images
            config_dict = {"bos_token_id": 150004, "eos_token_id": 150005} | config_dict
        return super().from_dict(config_dict, **kwargs)

    @property
    def family(self) -> str:
        """ "chatglm" (ChatGLM-6B v0.1, v1.1, Slim) or "chatglm2" (ChatGLM2/3-6B, CodeGeeX2)."""
        return CHATGLM if "inner_hidden_size" in self.__dict__ else CHATGLM2

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        if self.family == CHATGLM:
            return self.hidden_size // self.num_attention_heads
        return self.kv_channels

    @property
    def key_value_heads_are_shared(self) -> bool:
        """Whether `query_key_value` is laid out by kind, [all q | few k | few v], else head by head."""
        return self.family == CHATGLM2 and self.multi_query_attention

    def to_dict(self) -> dict[str, Any]:
        """Return the keys of the published config.json, and `num_key_value_heads`."""
        output = super().to_dict()
        if output.get("auto_map"):
            output["auto_map"] = complete_auto_map(output["auto_map"])
        if self.family == CHATGLM2:
            output["padded_vocab_size"] = self.vocab_size
        return output

    def check(self) -> None:
        """Raise ValueError, naming field and value, where the values contradict each other."""
        _check_sizes(self)
        _check_heads(self)
        _check_token_ids(self)
        if self.quantization_bit not in (0, 4, 8):
            raise ValueError(
                f"quantization_bit is {self.quantization_bit!r}; set 8 or 4 for packed weights, 0 for none."
            )
        if self.quantization_embeddings and not self.quantization_bit:
            raise ValueError(
                "quantization_embeddings is true but quantization_bit is 0; set quantization_bit to 8 or 4 too."
            )
        if self.quantization_group_size is not None and self.quantization_bit != 4:
            raise ValueError(
                f"quantization_group_size is {self.quantization_group_size!r} but quantization_bit is "
                f"{self.quantization_bit}; groups are for 4 bits, so change one of them."
            )

    def _published_key_value_heads(self) -> int:
        if self.family == CHATGLM2 and self.multi_query_attention:
            return self.multi_query_group_num
        return self.num_attention_heads


def complete_auto_map(published: dict[str, str]) -> dict[str, str]:
    """Add the Auto classes that older config.json files do not name yet; code in another repository stays there."""
    repository, separator, _ = str(published.get("AutoConfig", "")).rpartition("--")
    return {auto: f"{repository}{separator}{name}" for auto, name in AUTO_MAP.items()} | published


def tensor_parallel_plan(config: ChatGLMConfig) -> dict[str, str]:
    """How processes share each weight under tensor parallelism, in the words of transformers.

    Rows of a weight that is laid out head by head are cut as they lie ("colwise"), of [gate | up] in both halves
    ("packed_colwise"). [all q | few k | few v] has no such cut: its rows are cut anywhere, what they make is
    gathered ("colwise_gather_output"), and each process takes its heads from it, see `Attention.keep_heads`.
    """
    second = config.family == CHATGLM2
    layer, attention = ("encoder.layers.*", "self_attention") if second else ("layers.*", "attention")
    return {
        "embedding.word_embeddings" if second else "word_embeddings": "embedding_rowwise",
        f"{layer}.{attention}.query_key_value": "colwise_gather_output"
        if config.key_value_heads_are_shared
        else "colwise",
        f"{layer}.{attention}.dense": "rowwise",
        f"{layer}.mlp.dense_h_to_4h": "packed_colwise" if second else "colwise",
        f"{layer}.mlp.dense_4h_to_h": "rowwise",
        **({"output_layer": "colwise_gather_output"} if second else {}),
    }


def check_shares(config: ChatGLMConfig, processes: int) -> None:
    """Raise ValueError for a model that `processes` cannot share by tensor parallelism."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if heads % processes or (groups % processes and processes % groups):
        raise ValueError(
            f"tp_size is {processes}, but {heads} heads with {groups} keys and values cannot be shared evenly; choose "
            "a number that divides both, or a multiple of the second that divides the first."
        )
    for field in ("quantization_bit", "add_bias_linear"):
        if getattr(config, field, None):
            raise ValueError(
                f"Tensor parallelism has no plan for {field} {getattr(config, field)!r}; spread the layers instead: "
                'device_map="auto".'
            )


def _with_one_name_each(family: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Replace the second names of a value by its first; ValueError if the two disagree."""
    kwargs = dict(kwargs)
    for alias, name in [(alias, names[family]) for alias, names in ALIASES.items()]:
        value = kwargs.pop(alias, None)
        if value is not None and kwargs.setdefault(name, value) != value:
            raise ValueError(
                f"The config gives {name} {kwargs[name]!r} and {alias} {value!r}, which mean the same; "
                "make them equal or remove one."
            )
    if "head_dim" in kwargs:
        raise ValueError(
            f"head_dim is given as {kwargs['head_dim']!r}, but it follows from kv_channels (ChatGLM2-6B) or from "
            "hidden_size / num_attention_heads (ChatGLM-6B); set those."
        )
    return kwargs


def _check_sizes(config: ChatGLMConfig) -> None:
    positive = [
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    ]
    if config.family == CHATGLM:
        positive += ["inner_hidden_size", "max_sequence_length"]
    else:
        positive += ["ffn_hidden_size", "kv_channels", "seq_length"]
    if config.pre_seq_len is not None:
        positive.append("pre_seq_len")
    for name in positive:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(
                f"{name} is {value!r}; it must be a positive whole number, as in the published config.json."
            )
    for name in ["layernorm_epsilon"] + (["rope_ratio"] if config.family == CHATGLM2 else []):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{name} is {value!r}; it must be a number above 0.")


def _check_heads(config: ChatGLMConfig) -> None:
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if config.family == CHATGLM and config.hidden_size % heads:
        raise ValueError(
            f"hidden_size {config.hidden_size} is not a multiple of num_attention_heads {heads}; change one "
            "of them."
        )
    if config.head_dim % 4:
        source = "hidden_size / num_attention_heads" if config.family == CHATGLM else "kv_channels"
        raise ValueError(
            f"A head has {config.head_dim} channels ({source}); rotary positions need a multiple of 4."
        )
    if groups != config._published_key_value_heads():
        raise ValueError(
            f"num_key_value_heads is {groups} but the published keys say "
            f"{config._published_key_value_heads()} (multi_query_group_num, or num_attention_heads without "
            "multi_query_attention); remove num_key_value_heads."
        )
    if heads % groups:
        raise ValueError(
            f"num_attention_heads {heads} cannot be shared by multi_query_group_num {groups} groups; "
            "it must be a multiple."
        )


def _check_token_ids(config: ChatGLMConfig) -> None:
    names = ["bos_token_id", "eos_token_id", "pad_token_id"]
    if config.family == CHATGLM:
        names += ["mask_token_id", "gmask_token_id"]
    for name in names:
        value = getattr(config, name)
        if value is None and config.family == CHATGLM2:
            continue
        several = name == "eos_token_id" and isinstance(value, (list, tuple))
        for token in value if several else [value]:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < config.vocab_size:
                raise ValueError(
                    f"{name} is {value!r}, outside the vocabulary of {config.vocab_size} rows; take the ids and "
                    "vocab_size from the config.json that was published with these weights."
                )


def check_weight_files(folder: Path) -> None:
    """Raise OSError for a weight file in `folder` that is cut off or only a pointer to the real one."""
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]):
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            if head == b"version ":  # the first word of a git-lfs pointer
                raise OSError(
                    f"{path} is a git-lfs pointer of {size} bytes, not the weights; run `git lfs pull` in "
                    "that folder or download the file again."
                )
            expected = 8
            if path.suffix == ".safetensors" and len(head) == 8:
                expected += int.from_bytes(head, "little")
                if expected <= size:
                    expected += data_size(file.read(expected - 8), path)
            whole = head[:2] != b"PK" or zipfile.is_zipfile(path)  # the end of a zip holds its table
        if size < expected or not whole:
            needed = f" and needs at least {expected}" if size < expected else ""
            raise OSError(
                f"{path} has {size} bytes{needed}: the download is incomplete; download the file again."
            )


def data_size(header: bytes, path: Path) -> int:
    """Bytes of the tensors that the header of a safetensors file describes; OSError if it is damaged."""
    try:
        tensors = [tensor for name, tensor in json.loads(header).items() if name != "__metadata__"]
        return max((tensor["data_offsets"][1] for tensor in tensors), default=0)
    except (ValueError, AttributeError, KeyError, TypeError, IndexError):
        raise OSError(f"The header of {path} is damaged; download the file again.") from None


def check_loaded(info: dict[str, Any], name: Any, ignore_mismatched_sizes: bool) -> None:
    """Raise ValueError for weights of another shape than the config says, and for missing ones."""
    mismatched = sorted(info["mismatched_keys"]) if not ignore_mismatched_sizes else []
    if mismatched:
        key, in_file, in_model = mismatched[0]
        raise ValueError(
            f"{key} in {name} has shape {tuple(in_file)}, but by config.json it must be {tuple(in_model)}; take "
            "weights and config.json from one checkpoint."
        )
    projection = "prefix_encoder.trans."
    kept = [key for key in info["unexpected_keys"] if projection in key]
    absent = [key for key in info["missing_keys"] if projection in key]
    if kept or (absent and not any("prefix_encoder.embedding" in key for key in info["missing_keys"])):
        raise ValueError(
            f"The prefix in {name} was trained {'with' if kept else 'without'} a projection, but config.json says "
            f"prefix_projection {'false' if kept else 'true'}; change it there."
        )
    new = ("prefix_encoder.", "classifier_head.")  # trained by the user, and often saved elsewhere
    missing = sorted(key for key in info["missing_keys"] if not any(part in key for part in new))
    if missing:
        raise ValueError(
            f"{name} holds no weights for {missing[0]} and {len(missing) - 1} more; the checkpoint is incomplete "
            "or of another model: download it again, with all of its files."
        )
