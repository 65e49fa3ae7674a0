"""The sizes of the tiny models: config.json and the tensors of a published file, for both families.

Imports nothing of ``chatglm``: tests/hub, which does without, uses it too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

HUB_FILES = sorted(path.name for path in Path(__file__).parents[1].glob("*.py"))  # travel with the weights
CHATGLM, CHATGLM2 = FAMILIES = ["chatglm", "chatglm2"]
MASK, GMASK, SOP, EOP, PAD = 240, 241, 244, 245, 3

TINY: dict[str, dict[str, Any]] = {
    CHATGLM: {
        "vocab_size": 256,
        "hidden_size": 64,
        "inner_hidden_size": 128,
        "num_layers": 2,
        "num_attention_heads": 4,
        "max_sequence_length": 256,
        "position_encoding_2d": True,
        "bos_token_id": SOP,
        "eos_token_id": EOP,
        "mask_token_id": MASK,
        "gmask_token_id": GMASK,
        "pad_token_id": PAD,
    },
    CHATGLM2: {
        "padded_vocab_size": 256,
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "num_layers": 2,
        "num_attention_heads": 4,
        "kv_channels": 16,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "seq_length": 256,
    },
}
SHAPES = {
    CHATGLM: {
        "transformer.word_embeddings.weight": (256, 64),
        "transformer.final_layernorm.weight": (64,),
        "transformer.final_layernorm.bias": (64,),
        "lm_head.weight": (256, 64),
    },
    CHATGLM2: {
        "transformer.embedding.word_embeddings.weight": (256, 64),
        "transformer.rotary_pos_emb.inv_freq": (4,),
        "transformer.encoder.final_layernorm.weight": (64,),
        "transformer.output_layer.weight": (256, 64),
    },
}
LAYER_SHAPES = {
    CHATGLM: {
        "transformer.layers.{}.input_layernorm.weight": (64,),
        "transformer.layers.{}.input_layernorm.bias": (64,),
        "transformer.layers.{}.attention.rotary_emb.inv_freq": (4,),
        "transformer.layers.{}.attention.query_key_value.weight": (192, 64),
        "transformer.layers.{}.attention.query_key_value.bias": (192,),
        "transformer.layers.{}.attention.dense.weight": (64, 64),
        "transformer.layers.{}.attention.dense.bias": (64,),
        "transformer.layers.{}.post_attention_layernorm.weight": (64,),
        "transformer.layers.{}.post_attention_layernorm.bias": (64,),
        "transformer.layers.{}.mlp.dense_h_to_4h.weight": (128, 64),
        "transformer.layers.{}.mlp.dense_h_to_4h.bias": (128,),
        "transformer.layers.{}.mlp.dense_4h_to_h.weight": (64, 128),
        "transformer.layers.{}.mlp.dense_4h_to_h.bias": (64,),
    },
    CHATGLM2: {
        "transformer.encoder.layers.{}.input_layernorm.weight": (64,),
        "transformer.encoder.layers.{}.self_attention.query_key_value.weight": (128, 64),
        "transformer.encoder.layers.{}.self_attention.query_key_value.bias": (128,),
        "transformer.encoder.layers.{}.self_attention.dense.weight": (64, 64),
        "transformer.encoder.layers.{}.post_attention_layernorm.weight": (64,),
        "transformer.encoder.layers.{}.mlp.dense_h_to_4h.weight": (256, 64),
        "transformer.encoder.layers.{}.mlp.dense_4h_to_h.weight": (64, 128),
    },
}


def published_shapes(family: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of a published file by name; what old code alone wrote is among them."""
    layers = {
        name.format(i): shape
        for i in range(TINY[family]["num_layers"])
        for name, shape in LAYER_SHAPES[family].items()
    }
    return SHAPES[family] | layers


def published_keys(family: str) -> set[str]:
    """The names without those that loading passes over: rotary tables, and the tied head of ChatGLM-6B."""
    return {name for name in published_shapes(family) if "inv_freq" not in name and "lm_head" not in name}
