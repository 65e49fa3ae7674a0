"""Where the tokens of a prompt stand and which of them see each other: pure functions of token ids and masks.

All but `check_generation_mask` are about ChatGLM-6B, whose tokens have two positions and whose prompts are read in both
directions.
"""

from __future__ import annotations

import torch

from .configuration_chatglm import ChatGLMConfig

# A ChatGLM-6B token has two positions. They travel as one integer, `position * 65536 + block`, because
# adding 1 for the next token is then exactly the rule of the model: same position, next block.
POSITION_STRIDE = 1 << 16


def pack_positions(position_ids: torch.Tensor) -> torch.Tensor:
    """[B, 2, T] (position, block), the published form, -> [B, T] packed."""
    return position_ids[:, 0] * POSITION_STRIDE + position_ids[:, 1]


def unpack_positions(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T] packed -> position [B, T], block [B, T]."""
    return packed // POSITION_STRIDE, packed % POSITION_STRIDE


def is_context(input_ids: torch.Tensor, config: ChatGLMConfig) -> torch.Tensor:
    """[B, T], True before the first <sop> of a row; a row without one has no context."""
    is_sop = input_ids == config.bos_token_id
    return (is_sop.cumsum(-1) == 0) & is_sop.any(-1, keepdim=True)


def glm_positions(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, config: ChatGLMConfig
) -> torch.Tensor:
    """Packed positions [B, T] of rows that hold a whole prompt, from ids and an optional 2-D mask.

    token      x1  x2  [gMASK]  <sop>  y1  y2        with left padding:   pad  x1  [gMASK]  <sop>
    position    0   1     2       2     2   2                              0    0     1       1
    block       0   0     0       1     2   3                              0    0     0       1

    The context counts upwards; everything from <sop> on keeps the position of the mask token that it
    fills ([gMASK] if the row has one, else [MASK]) and counts in blocks. Without the second dimension
    (`position_encoding_2d` false) a row with [gMASK] simply counts on.
    """
    length = input_ids.shape[1]
    columns = torch.arange(length, device=input_ids.device).expand_as(input_ids)
    index = columns
    if attention_mask is not None:
        index = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    context = is_context(input_ids, config)
    sop_column = context.sum(-1, keepdim=True)  # [B, 1]
    is_gmask, is_mask = input_ids == config.gmask_token_id, input_ids == config.mask_token_id
    in_context = ((is_gmask | is_mask) & context).any(-1, keepdim=True)
    counts = context | ~in_context  # what an answer says moves nothing, unless there is no other one
    is_gmask, is_mask = is_gmask & counts, is_mask & counts
    has_gmask = is_gmask.any(-1, keepdim=True)
    is_mask = torch.where(has_gmask, is_gmask, is_mask)
    filled = index.gather(1, is_mask.int().argmax(-1, keepdim=True))  # [B, 1]
    if not config.position_encoding_2d:
        return torch.where(context | has_gmask, index, filled) * POSITION_STRIDE
    position = torch.where(context, index, filled)
    block = torch.where(context, 0, columns - sop_column + 1)
    return position * POSITION_STRIDE + block


def check_prompt(input_ids: torch.Tensor, config: ChatGLMConfig) -> None:
    """Raise ValueError for a row that lacks <sop> or a mask token: it has no positions."""
    is_mask = (input_ids == config.gmask_token_id) | (input_ids == config.mask_token_id)
    mask_names = f"[gMASK] (id {config.gmask_token_id}) or [MASK] (id {config.mask_token_id})"
    for name, found in {
        f"<sop> (id {config.bos_token_id})": input_ids == config.bos_token_id,
        mask_names: is_mask,
    }.items():
        missing = (~found.any(-1)).nonzero().flatten().tolist()
        if missing:
            raise ValueError(
                f"Row {missing[0]} of input_ids has no {name}: ChatGLM-6B reads a whole prompt at once; "
                "encode it with tokenizer(...), which adds both, and leave chunked prefill off."
            )


def check_packed(packed: torch.Tensor, input_ids: torch.Tensor, config: ChatGLMConfig) -> None:
    """Raise ValueError for plain positions 0, 1, 2, ... of a prompt: its context has block 0 throughout."""
    context = is_context(input_ids, config)
    if config.position_encoding_2d and (unpack_positions(packed)[1].expand_as(context)[context] != 0).any():
        raise ValueError(
            "position_ids of shape (batch, length) must be packed by pack_positions for ChatGLM-6B, whose tokens have "
            "two positions; pass (batch, 2, length), or leave them out."
        )


def check_generation_mask(mask: torch.Tensor | None, input_ids: torch.Tensor | None) -> None:
    """Raise ValueError for a mask that does not cover `input_ids` [B, T] (and what is cached before them)."""
    if mask is None or input_ids is None or input_ids.dim() != 2:
        return
    batch, length = input_ids.shape
    if mask.dim() == 2 and mask.shape[0] == batch and mask.shape[1] >= length:
        return
    if tuple(mask.shape) != (batch, 1, length, length):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; for {batch} rows of {length} tokens it must be "
            f"{(batch, length)}."
        )


def two_dimensional_mask(mask: torch.Tensor, input_ids: torch.Tensor, config: ChatGLMConfig) -> torch.Tensor:
    """The published boolean mask [B, 1, T, T] (True = masked) as a [B, T] one (1 = keep) that says the same.

    Raises ValueError for a mask that hides more than padding and the future.
    """
    keep = ~mask[:, 0, -1]  # the last row sees all that is not padding
    causal = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
    visible = (causal | is_context(input_ids, config)[:, None]) & keep[:, None]
    if not torch.equal(visible[keep], ~mask[:, 0][keep]):
        raise ValueError(
            "generate takes the attention_mask that the tokenizer makes; this 4-D one hides other positions "
            "than padding and the future. Pass a 2-D mask (1 = keep), or call the model step by step."
        )
    return keep.long()
