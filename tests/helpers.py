"""Tiny models of both families, with weights sharp enough that their answers vary."""

from __future__ import annotations

from typing import Any

import torch
from tiny import CHATGLM, CHATGLM2, EOP, FAMILIES, GMASK, MASK, PAD, SOP, TINY  # noqa: F401, for the tests

from chatglm.hub.configuration_chatglm import ChatGLMConfig
from chatglm.hub.modeling_chatglm import ChatGLMForConditionalGeneration

# ChatGLM-6B multiplies its residuals by 7.5: with smaller weights a model repeats its last token.
SHARPNESS = {CHATGLM: 0.6, CHATGLM2: 0.4}
ANSWER = torch.tensor([[20, 30, 40, 50, 60]])


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


def three_rows(family: str) -> list[torch.Tensor]:
    """Prompts [1, length] of different lengths."""
    return [prompt(family, length, seed) for seed, length in enumerate((5, 9, 7))]


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


def published_mask(family: str, ids: torch.Tensor) -> torch.Tensor:
    """Boolean [1, 1, T, T], True = masked, of a row without padding."""
    length = ids.shape[1]
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    if family == CHATGLM:
        visible[:, : ids[0].tolist().index(SOP)] = True
    return ~visible[None, None]


@torch.no_grad()
def logits(model, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return model(ids, **kwargs).logits


@torch.no_grad()
def continued(model, ids: torch.Tensor, pieces: list[int], cache=None, **kwargs: Any) -> torch.Tensor:
    """Logits of all pieces (lengths that sum to T), one call each on one cache, positions left out."""
    parts = []
    for piece in ids.split(pieces, dim=1):
        outputs = model(piece, past_key_values=cache, use_cache=True, **kwargs)
        cache = outputs.past_key_values
        parts.append(outputs.logits)
    return torch.cat(parts, dim=1)


def largest_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return (actual.float() - expected.float()).abs().max().item()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, atol: float = 1e-3) -> None:
    """Sums in another order differ by up to 3e-4 behind sharp weights (logits of size 20); mistakes by 0.1 and more."""
    difference = largest_difference(actual, expected)
    assert difference <= atol, f"they differ by up to {difference}"
