"""The parts of ChatGLM-6B and ChatGLM2-6B side by side, under the parameter names of the published checkpoints.

From the small to the large: rotary embedding, attention, MLPs, norms, blocks, prefix encoder; and at the end the short
way through all of them that one more token takes. modeling_chatglm.py makes models of them.

One layout everywhere: hidden states [B, T, hidden], queries, keys and values [B, heads, T, head_dim].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_chatglm import CHATGLM, CHATGLM2, ChatGLMConfig
from .positions_chatglm import unpack_positions
from .quantization import Linear

# The published blocks scale their residuals for 28 layers, whatever the depth of the model.
RESIDUAL_SCALE = math.sqrt(2 * 28)


def partners_of(config: ChatGLMConfig) -> tuple[tuple[int, ...], int]:
    """How the channels of a head make pairs: their shape, and its axis of length 2. See `rotate`."""
    if config.family == CHATGLM2:
        return (config.head_dim // 2, 2), -1
    parts = 2 if config.position_encoding_2d else 1
    return (parts, 2, config.head_dim // (2 * parts)), -2


class RotaryEmbedding(nn.Module):
    """Cosines and signed sines [B, 1, T, head_dim] of the positions in one call, shared by all layers.

    "chatglm": the first half of the channels is turned by the position, the second by the block, and partners
    lie a quarter of the head apart. "chatglm2": the first half is turned, partners side by side; the second
    half passes (cosine 1, sine 0). The sine of the first of two partners is negative, see `rotate`.
    """

    inv_freq: torch.Tensor

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.config = config
        self.pairs, self.axis = partners_of(config)
        self.register_buffer("inv_freq", self.inverse_frequencies(), persistent=False)

    def inverse_frequencies(self, device: torch.device | None = None) -> torch.Tensor:
        """float32 [turned channels / 2]."""
        turned = self.config.head_dim
        if self.config.family == CHATGLM2 or self.config.position_encoding_2d:
            turned //= 2
        exponents = torch.arange(0, turned, 2, dtype=torch.float32, device=device) / turned
        inv_freq = 1.0 / 10000**exponents
        if self.config.family == CHATGLM:
            # ChatGLM-6B was trained with these rounded to half, and so needs them in every dtype.
            return inv_freq.half().float()
        return inv_freq

    def _apply(self, fn: Callable, *args: Any, **kwargs: Any) -> RotaryEmbedding:
        # `model.half()` must not round the frequencies: only the device of the buffer ever changes.
        super()._apply(fn, *args, **kwargs)
        if not self.inv_freq.is_meta:
            self.inv_freq = self.inverse_frequencies(self.inv_freq.device)
        return self

    @torch.no_grad()
    def forward(self, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids [B, T] (packed for "chatglm") -> cosines, signed sines in `dtype`."""
        if self.config.family == CHATGLM2:
            angles = self._angles(position_ids / self.config.rope_ratio)
            angles = F.pad(angles.repeat_interleave(2, dim=-1), (0, 2 * angles.shape[-1]))
        else:
            # ChatGLM-6B in float16 was trained with positions, angles and tables in float16.
            angle_dtype = torch.float16 if dtype == torch.float16 else torch.float32
            position, block = unpack_positions(position_ids)
            if self.config.position_encoding_2d:
                position, block = (
                    self._angles(position, angle_dtype),
                    self._angles(block, angle_dtype),
                )
                angles = torch.cat((position, position, block, block), dim=-1)
            else:
                angles = self._angles(position + block, angle_dtype).repeat(1, 1, 2)
        angles = angles[:, None]  # one for all heads
        sines = angles.sin().unflatten(-1, self.pairs)
        first, second = sines.split(1, dim=self.axis)
        sines = torch.cat((-first, second), dim=self.axis).flatten(-len(self.pairs))
        return angles.cos().to(dtype), sines.to(dtype)

    def _angles(self, position: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        # The published device maps do not name this module, so it may lie elsewhere.
        return position.to(dtype)[..., None] * self.inv_freq.to(position.device, dtype)


def rotate(
    states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, pairs: tuple[int, ...], axis: int
) -> torch.Tensor:
    """Turn pairs of channels (u1, u2) -> (u1 cos - u2 sin, u2 cos + u1 sin); `sin` carries the sign.

    `pairs` is how the channels are cut up, and `axis` the one of its axes on which partners lie.
    """
    partners = states.view(*states.shape[:-1], *pairs).flip(axis).view(states.shape)
    return states * cos + partners * sin


def eager_attention_forward(
    module: Attention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out: -> context [B, T, H, D], weights [B, H, T, S].

    A mask [B, 1, T, S] is boolean (True = may see) or is added to the scores.
    """
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    # Dividing by the layer number before the product and multiplying back in float32 cancels; it keeps
    # the scores of deep layers inside the range of float16.
    layer_number = module.layer_idx + 1
    scores = torch.matmul(query * (scaling / layer_number), key.transpose(-1, -2)).float() * layer_number
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = F.dropout(scores.softmax(dim=-1).to(query.dtype), dropout, module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


def sdpa_attention(
    module: Attention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`scaled_dot_product_attention` that reads shared keys where they lie: -> context [B, T, H, D].

    Of one new token the heads that share keys go in as rows of one query, so that the keys are read once for all of
    them: with 16 heads a group 3 to 25 times faster on CPUs. Of several tokens torch shares them itself on CPUs; the
    library copies them for each head behind a mask, which at 32,768 tokens of ChatGLM2-6B takes 0.5 GB.
    """
    one = query.shape[2] == 1
    if one:
        query = query.view(query.shape[0], key.shape[1], -1, query.shape[-1])  # [B, G, H / G, D]
    context = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        is_causal=attention_mask is None and not one,
        scale=scaling,
        enable_gqa=not one,
    )
    return context.flatten(1, 2)[:, None] if one else context.transpose(1, 2), None


def attention_function(
    implementation: str, new_tokens: int, device: torch.device, output_attentions: bool, paged: bool = False
) -> Callable:
    """What all layers of one forward pass compute attention with; the library's own fills a `paged` cache itself."""
    if output_attentions:
        return eager_attention_forward  # no other one has weights to show
    if paged:
        return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    if implementation == "sdpa" and (new_tokens == 1 or device.type == "cpu"):
        return sdpa_attention
    return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)


class Attention(nn.Module):
    """Attention of both families; they differ in how the fused weight is laid out and in what turns.

    "chatglm": rows of `query_key_value` are grouped by head, [head 0: q k v | head 1: q k v | ...].
    "chatglm2": grouped by kind, [all q | all k | all v], few key-value heads shared by many query heads.
    """

    is_causal = True  # read by the attention functions when there is no mask

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim, self.num_heads = config.head_dim, config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.pairs, self.axis = partners_of(config)
        if config.family == CHATGLM:
            qkv_bias, dense_bias, self.by_kind = True, True, False
        else:
            qkv_bias, dense_bias = (
                config.add_bias_linear or config.add_qkv_bias,
                config.add_bias_linear,
            )
            self.by_kind = config.key_value_heads_are_shared
        width = self.num_heads * self.head_dim
        key_value_width = 2 * self.num_key_value_heads * self.head_dim
        self.query_key_value = Linear(config.hidden_size, width + key_value_width, bias=qkv_bias)
        self.dense = Linear(width, config.hidden_size, bias=dense_bias)
        self.share: list[slice] = []  # of the heads by kind, if other processes compute the rest
        self.shared_groups = slice(None)

    def keep_heads(self, process: int, processes: int) -> None:
        """Tensor parallelism: compute the heads of this process alone, for which it has columns of `dense`.

        With more processes than keys and values several compute the same ones.
        """
        heads, groups = self.num_heads, self.num_key_value_heads
        self.num_heads, self.num_key_value_heads = heads // processes, max(groups // processes, 1)
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        first, first_group = process * self.num_heads, process * groups // processes
        self.shared_groups = slice(first_group, first_group + self.num_key_value_heads)
        if self.by_kind:  # else the columns that come here are those of the heads already
            key, value = heads + first_group, heads + groups + first_group
            self.share = [
                slice(first, first + self.num_heads),
                slice(key, key + self.num_key_value_heads),
                slice(value, value + self.num_key_value_heads),
            ]

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        attend: Callable,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        prefix: tuple[torch.Tensor, ...] = (),
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query_and_key, value = self.split_heads(self.query_key_value(hidden_states))
        turned = rotate(query_and_key, *rotary, self.pairs, self.axis)  # one pass over both
        query, key = turned[:, : self.num_heads], turned[:, self.num_heads :]
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        query = query.to(key.dtype)  # see cache_dtype
        if prefix:
            key, value = (
                torch.cat((p[:, self.shared_groups].expand(len(s), -1, -1, -1), s), 2)
                for p, s in zip(prefix, (key, value), strict=True)
            )
        context, weights = attend(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        return self.dense(context.flatten(-2).to(hidden_states.dtype)), weights

    def split_heads(self, fused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, T, q + k + v] -> queries and keys together [B, H + G, T, D], values [B, G, T, D]."""
        batch, length, _ = fused.shape
        if self.by_kind:
            heads = fused.view(batch, length, -1, self.head_dim).transpose(1, 2)
            if self.share:
                heads = torch.cat([heads[:, part] for part in self.share], dim=1)
            before_value = self.num_heads + self.num_key_value_heads
            return heads[:, :before_value], heads[:, before_value:]
        heads = fused.view(batch, length, self.num_heads, 3 * self.head_dim).transpose(1, 2)
        query, key, value = heads.chunk(3, dim=-1)
        return torch.cat((query, key), dim=1), value


class MLP(nn.Module):
    """The MLP of ChatGLM-6B: GELU (tanh form), with biases."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dense_4h_to_h(self.activate(self.dense_h_to_4h(hidden_states)))

    @staticmethod
    def activate(states: torch.Tensor) -> torch.Tensor:
        return F.gelu(states, approximate="tanh")


class SwiGLU(nn.Module):
    """The MLP of ChatGLM2-6B: one weight makes [gate | up], silu(gate) scales up."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        bias = config.add_bias_linear
        self.dense_h_to_4h = Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=bias)
        self.dense_4h_to_h = Linear(config.ffn_hidden_size, config.hidden_size, bias=bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dense_4h_to_h(self.activate(self.dense_h_to_4h(hidden_states)))

    @staticmethod
    def activate(states: torch.Tensor) -> torch.Tensor:
        gate, up = states.chunk(2, dim=-1)
        return F.silu(gate) * up


class RMSNorm(nn.Module):
    """x / rms(x) * weight, evaluated in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if weight.dtype == hidden_states.dtype:
            own = hidden_states.device.type == "cpu" and weight.dtype == torch.float32
            if own and not torch.compiler.is_compiling():
                return rms_norm_on_cpu(hidden_states, weight, self.eps)
            return F.rms_norm(hidden_states, weight.shape, weight, self.eps)
        states = hidden_states.float()  # float32 residuals beside half-precision weights
        states = states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.eps)
        return (weight * states).to(hidden_states.dtype)


def rms_norm_on_cpu(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight in float32, by fewer operators than torch's, which runs twelve on a CPU.

    Between two products of one token, whose weights have driven all code from the caches, 93 against 160 microseconds.
    """
    size = x.shape[-1]
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * weight / (torch.hypot(length, constant((size * eps) ** 0.5)) * constant(size**-0.5))


@functools.cache
def constant(value: float) -> torch.Tensor:
    """A number as torch takes it fastest, on the CPU."""
    with torch.inference_mode(False):  # or gradients could never pass by it
        return torch.tensor(value, dtype=torch.float32, device="cpu")


class LayerNorm(nn.LayerNorm):
    """torch's, which also takes float32 residuals beside half-precision weights."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.weight.dtype == hidden_states.dtype:
            return super().forward(hidden_states)
        weight, bias = self.weight.float(), self.bias.float()
        states = F.layer_norm(hidden_states.float(), self.normalized_shape, weight, bias, self.eps)
        return states.to(hidden_states.dtype)


def make_norm(config: ChatGLMConfig) -> nn.Module:
    """The norm that both families put before attention, before the MLP and at the end."""
    if config.family == CHATGLM2 and config.rmsnorm:
        return RMSNorm(config.hidden_size, config.layernorm_epsilon)
    return LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)


class GLMBlock(GradientCheckpointingLayer):
    """One layer of ChatGLM-6B: the residual is the normed input, scaled (DeepNorm, Wang 2022)."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.attention = Attention(config, layer_idx)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = MLP(config)

    def forward(
        self, hidden_states: torch.Tensor, *prefix: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        normed = self.input_layernorm(hidden_states)
        attended, weights = self.attention(normed, prefix=prefix, **kwargs)
        hidden_states = RESIDUAL_SCALE * normed + attended
        normed = self.post_attention_layernorm(hidden_states)
        return RESIDUAL_SCALE * normed + self.mlp(normed), weights


class GLM2Block(GradientCheckpointingLayer):
    """One layer of ChatGLM2-6B: the usual pre-norm residuals."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.residual_is_normed = config.apply_residual_connection_post_layernorm
        self.fp32_residual = config.fp32_residual_connection
        self.hidden_dropout = config.hidden_dropout
        self.input_layernorm = make_norm(config)
        self.self_attention = Attention(config, layer_idx)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = SwiGLU(config)

    def forward(
        self, hidden_states: torch.Tensor, *prefix: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        normed = self.input_layernorm(hidden_states)
        attended, weights = self.self_attention(self._compute(normed), prefix=prefix, **kwargs)
        hidden_states = (normed if self.residual_is_normed else hidden_states) + self._drop(attended)
        normed = self.post_attention_layernorm(hidden_states)
        residual = normed if self.residual_is_normed else hidden_states
        return residual + self._drop(self.mlp(self._compute(normed))), weights

    def _drop(self, states: torch.Tensor) -> torch.Tensor:
        return F.dropout(states, self.hidden_dropout) if self.training else states

    def _compute(self, normed: torch.Tensor) -> torch.Tensor:
        # With float32 residuals only the stream between the layers is wide, not the products.
        return normed.to(self.input_layernorm.weight.dtype) if self.fp32_residual else normed


def device_of(module: nn.Module) -> torch.device:
    """Where `module` computes: where its first weight lies, or comes to if it is offloaded."""
    owner = next(part for part in module.modules() if any(True for _ in part.parameters(recurse=False)))
    weight, hook = next(owner.parameters(recurse=False)), getattr(owner, "_hf_hook", None)
    return torch.device(hook.execution_device) if weight.is_meta and hook else weight.device


def attention_of(block: nn.Module) -> Attention:
    """The attention of a block, whatever its family calls it."""
    return block.attention if isinstance(block, GLMBlock) else block.self_attention


class PrefixEncoder(nn.Module):
    """The trained keys and values of P-Tuning v2 (Liu 2021): [B, prefix] -> [B, prefix, 2 L G D]."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        size = 2 * config.num_layers * config.num_key_value_heads * config.head_dim
        self.prefix_projection = config.prefix_projection
        if not self.prefix_projection:
            self.embedding = nn.Embedding(config.pre_seq_len, size)
            return
        width = config.hidden_size if config.family == CHATGLM else size
        self.embedding = nn.Embedding(config.pre_seq_len, width)
        self.trans = nn.Sequential(
            nn.Linear(width, config.hidden_size), nn.Tanh(), nn.Linear(config.hidden_size, size)
        )

    def forward(self, prefix: torch.Tensor) -> torch.Tensor:
        states = self.embedding(prefix)
        return self.trans(states) if self.prefix_projection else states


def can_step(model: Any) -> bool:
    """Whether `OneTokenStep` computes what `model` would: usual options, and nothing hooked in between."""
    config = model.config
    rare = config.pre_seq_len or config.output_hidden_states or config.output_attentions
    if config.family == CHATGLM2:
        rare = rare or config.fp32_residual_connection or config.apply_residual_connection_post_layernorm
    changed = any(
        "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks
        for module in model.modules()
    )
    return config._attn_implementation == "sdpa" and not (rare or changed or model.training)


class OneTokenStep:
    """The model for one more token of every row, on a filled cache: bit for bit what `forward` computes.

    For one token the way through `nn.Module` and the library costs as much as the arithmetic of a small layer
    (13 against 9 ms with 28 layers of hidden size 128), so here the layers are called directly.
    """

    def __init__(self, model: Any) -> None:
        transformer, config = model.transformer, model.config
        self.rotary = transformer.rotary_pos_emb
        self.dtype, self.embed = model.dtype, transformer.get_input_embeddings().forward
        self.final_norm, self.head = transformer.final_norm, model.get_output_embeddings().forward
        self.scale = RESIDUAL_SCALE if config.family == CHATGLM else None
        self.layers = [self._functions(block) for block in transformer.blocks]
        pairs, axis = partners_of(config)  # as `rotate` takes them
        channels = torch.arange(config.head_dim, device=transformer.rotary_pos_emb.inv_freq.device)
        self.partners = channels.view(pairs).flip(axis).flatten()

    @staticmethod
    def _functions(block: nn.Module) -> tuple:
        attention, mlp = attention_of(block), block.mlp
        return (
            *(attention, block.input_layernorm.forward, block.post_attention_layernorm.forward),
            *(attention.query_key_value.forward, attention.dense.forward),
            *(mlp.dense_h_to_4h.forward, mlp.activate, mlp.dense_4h_to_h.forward),
        )

    def tables(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [B or 1, 1, T, head_dim] of positions [B or 1, T]."""
        return self.rotary(position_ids, self.dtype)

    def __call__(
        self,
        input_ids: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        cache: Cache,
    ) -> torch.Tensor:
        """Scores [B, V] in float32 after tokens [B, 1]; attention_mask: boolean [B, 1, 1, T], True = may see."""
        hidden_states, scale = self.embed(input_ids), self.scale
        for (attention, norm, next_norm, fuse, dense, widen, activate, narrow), cached in zip(
            self.layers, cache.layers, strict=True
        ):
            normed = norm(hidden_states)
            query, key, value = self._heads(attention, fuse(normed), rotary)
            key, value = cached.update(key, value)
            if key.dtype != query.dtype:  # see cache_dtype
                query = query.to(key.dtype)
            attended, _ = sdpa_attention(attention, query, key, value, attention_mask, attention.scaling)
            if attended.dtype != normed.dtype:
                attended = attended.to(normed.dtype)
            hidden_states = dense(attended.flatten(-2)) + (hidden_states if scale is None else scale * normed)
            normed = next_norm(hidden_states)
            widened = activate(widen(normed))
            hidden_states = narrow(widened) + (hidden_states if scale is None else scale * normed)
        return self.head(self.final_norm(hidden_states))[:, -1].float()

    def _heads(
        self, attention: Attention, fused: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[B, 1, q + k + v] -> query [B, H, 1, D] and key, both turned, and value [B, G, 1, D]."""
        batch, heads, (cos, sin) = fused.shape[0], attention.num_heads, rotary
        if attention.by_kind:
            axis, queries, keys = 1, heads, attention.num_key_value_heads
            states = fused.view(batch, -1, 1, attention.head_dim)
        else:  # query, key and value lie where tokens would
            axis, queries, keys = 2, 1, 1
            states = fused.view(batch, heads, 3, attention.head_dim)
        # `narrow` and `index_select` are what slices and `flip` are, at half their cost.
        both = states.narrow(axis, 0, queries + keys)
        turned = both * cos + both.index_select(-1, self.partners) * sin
        value = states.narrow(axis, queries + keys, keys)
        return turned.narrow(axis, 0, queries), turned.narrow(axis, queries, keys), value
