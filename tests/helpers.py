"""Tiny models of both families, with weights sharp enough that their answers vary."""

from __future__ import annotations

from typing import Any

import torch

from chatglm.hub.configuration_chatglm import CHATGLM, CHATGLM2, ChatGLMConfig
from chatglm.hub.modeling_chatglm import ChatGLMForConditionalGeneration

FAMILIES = [CHATGLM, CHATGLM2]
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
# ChatGLM-6B multiplies its residuals by 7.5: with smaller weights a model repeats its last token.
SHARPNESS = {CHATGLM: 0.6, CHATGLM2: 0.4}


def tiny_config(family: str, **overrides: Any) -> ChatGLMConfig:
    """A config of `family` with two layers and 256 tokens."""
    return ChatGLMConfig(**{**TINY[family], **overrides})


def sharpen(model: torch.nn.Module, std: float, seed: int = 0) -> None:
    """Fill the matrices (and biases) with normal numbers; norms keep their ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, std, generator=generator)


def tiny_model(family: str, cls: type = ChatGLMForConditionalGeneration, seed: int = 0, **overrides: Any):
    """A model of `cls` in evaluation mode with sharp weights, the same ones for the same seed."""
    model = cls(tiny_config(family, **overrides)).eval()
    sharpen(model, SHARPNESS[family], seed)
    return model


def prompt(family: str, length: int = 9, seed: int = 1) -> torch.Tensor:
    """Random ids [1, length] of a prompt that the family can read: ChatGLM-6B's ends with [gMASK] <sop>."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 230, (1, length), generator=generator)
    if family == CHATGLM:
        ids[:, -2:] = torch.tensor([GMASK, SOP])
    return ids


def pad_left(rows: list[torch.Tensor], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [1, length] -> ids [B, longest] and their mask (1 = keep)."""
    width = max(row.shape[1] for row in rows)
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - row.shape[1] :] = row
        mask[i, width - row.shape[1] :] = 1
    return ids, mask


def pad_right(rows: list[torch.Tensor], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [1, length] -> ids [B, longest] and their mask (1 = keep)."""
    ids, mask = pad_left([row.flip(1) for row in rows], pad)
    return ids.flip(1), mask.flip(1)


def largest_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return (actual.float() - expected.float()).abs().max().item()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, atol: float = 1e-3) -> None:
    """Sums in another order differ by up to 3e-4 behind sharp weights (logits of size 20); mistakes by 0.1 and more."""
    difference = largest_difference(actual, expected)
    assert difference <= atol, f"they differ by up to {difference}"
