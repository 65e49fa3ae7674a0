"""ChatGLM-6B and ChatGLM2-6B side by side, under the parameter names of the published checkpoints.

The file reads from the parts to the whole: rotary embedding, attention, MLPs, blocks, prefix encoder, model, the two
heads, generation. Positions and masks are made in positions_chatglm.py; the methods that chat are a mixin in
tokenization_chatglm.py, where all text is. "chatglm" is the first family
(ChatGLM-6B v0.1, v1.1, Slim), "chatglm2" the second (ChatGLM2-6B, ChatGLM3-6B, CodeGeeX2).

One layout everywhere: hidden states [B, T, hidden], queries, keys and values [B, heads, T, head_dim].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, LogitsProcessorList, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from .configuration_chatglm import (
    CHATGLM,
    CHATGLM2,
    ChatGLMConfig,
    check_loaded,
    check_shares,
    check_weight_files,
)
from .generation_chatglm import (  # noqa: F401 - old callers import the last one from here
    FiniteScores,
    GrowingCache,
    Int8Cache,
    InvalidScoreLogitsProcessor,
    decode_steps,
)
from .positions_chatglm import (
    check_generation_mask,
    check_packed,
    check_prompt,
    glm_positions,
    is_context,
    pack_positions,
    two_dimensional_mask,
    unpack_positions,
)
from .quantization import (
    Linear,
    Prepackable,
    QuantizedEmbedding,
    QuantizedLinear,
    check_packed_file,
    check_packing,
    check_same_packing,
    check_scales,
    freeze,
    make_plain,
    mismatched_shapes,
    own_quantization_config,
    packed_by_another_library,
    quantize,
    register_with_transformers,
)
from .quantization_kernels import product_dtype
from .tokenization_chatglm import ChatMixin

# The published blocks scale their residuals for 28 layers, whatever the depth of the model.
RESIDUAL_SCALE = math.sqrt(2 * 28)
PREFIX_DROPOUT = 0.1


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
            return F.rms_norm(hidden_states, weight.shape, weight, self.eps)
        states = hidden_states.float()  # float32 residuals beside half-precision weights
        states = states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.eps)
        return (weight * states).to(hidden_states.dtype)


def make_norm(config: ChatGLMConfig) -> nn.Module:
    """The norm that both families put before attention, before the MLP and at the end."""
    if config.family == CHATGLM2 and config.rmsnorm:
        return RMSNorm(config.hidden_size, config.layernorm_epsilon)
    return nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)


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


class ChatGLMPreTrainedModel(PreTrainedModel):
    """What transformers asks of every model class here: loading, initialising, dispatching."""

    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GLMBlock", "GLM2Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _keys_to_ignore_on_load_unexpected = [r"rotary_(pos_)?emb\.inv_freq"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: ChatGLMConfig, *args: Any, **kwargs: Any) -> None:
        config.check()
        super().__init__(config)
        self._refuse_causal_only_attention(config._attn_implementation)

    @property
    def device(self) -> torch.device:
        """Where inputs belong; of an embedding that is offloaded, where it computes."""
        device = super().device
        hook = getattr(self.get_input_embeddings(), "_hf_hook", None) if device.type == "meta" else None
        return device if hook is None else torch.device(hook.execution_device)

    def set_attn_implementation(self, attn_implementation: str | dict, **kwargs: Any) -> None:
        self._refuse_causal_only_attention(attn_implementation)
        super().set_attn_implementation(attn_implementation, **kwargs)

    def _refuse_causal_only_attention(self, implementation: str | dict | None) -> None:
        causal_only = isinstance(implementation, str) and implementation.startswith(("flash", "paged"))
        if self.config.family == CHATGLM and causal_only:
            raise ValueError(
                f"attn_implementation {implementation!r} sees only the past, but ChatGLM-6B reads its prompt in "
                "both directions and would answer wrongly; use 'sdpa', 'eager' or 'flex_attention', without "
                "continuous batching."
            )

    def post_init(self) -> None:
        if packed_by_another_library(self.config):
            make_plain(self)
        super().post_init()

    def quantize(
        self,
        bits: int,
        quantize_embeddings: bool = False,
        group_size: int | None = None,
        device: Any = None,
        **kwargs: Any,
    ) -> ChatGLMPreTrainedModel:
        """Pack the linear weights to 8 or 4 bits in place and return the model; 0 changes nothing.

        A model that is packed already stays as it is. With `quantize_embeddings` the embedding and the head
        are packed too. With `group_size` (32, 64 or 128, at 4 bits) so many columns share a scale, which
        costs 0.5 to 0.125 bits per weight and keeps more of the model; the published code cannot read it.
        """
        config = self.config
        if bits and not config.quantization_bit:
            check_packing(bits, group_size)
            if quantize_embeddings and config.family == CHATGLM and not config.tie_word_embeddings:
                raise ValueError(
                    "quantize_embeddings packs embedding and head of ChatGLM-6B as one tensor, but "
                    "tie_word_embeddings is false; leave quantize_embeddings out."
                )
            quantize(self.base_model, bits, group_size)
            config.quantization_bit, config.quantization_group_size = bits, group_size
            if quantize_embeddings:
                config.quantization_embeddings = True
                self._quantize_embeddings()
        return self if device is None else self.to(device)

    def _quantize_embeddings(self) -> None:
        """Pack the embedding and, where there is one, the head."""
        self.base_model._quantize_embeddings()

    def prepack(self) -> ChatGLMPreTrainedModel:
        """Bring all linear weights into the layout that this CPU multiplies fastest, and return the model.

        Packed weights do it by themselves at their first use; for float ones it is asked for here, because
        other code may look at them. Saving, moving, casting and training work as ever.
        """
        for module in self.modules():
            if isinstance(module, Prepackable):
                module.prepack()
        return self

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, *args: Any) -> Any:
        """What `from_pretrained` calls before it loads weights: with `tp_plan` each process keeps its heads."""
        processes = getattr(distributed_config, "tp_size", None) or 1
        if processes > 1:
            check_shares(model.config, processes)
            for block in model.base_model.blocks:
                attention_of(block).keep_heads(torch.distributed.get_rank() % processes, processes)
        return super().maybe_distribute_model(model, distributed_config, *args)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RotaryEmbedding):
            init.copy_(module.inv_freq, module.inverse_frequencies())

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        device: Any = None,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load as `PreTrainedModel.from_pretrained`, and accept what the published README lines pass.

        `quantization_config=ChatGLMQuantizationConfig(bits=4)`, or `{"quant_method": "chatglm", "bits": 4}`, packs
        the weights while they load: see `quantize`. They are packed in the dtype of the file, whatever `dtype` is.
        `device` moves the loaded model there. `empty_init` and `resume_download` have no effect today.
        Raises OSError for damaged files and ValueError for weights that do not fit the config: nothing is
        left at random values silently, except a new prefix encoder or classification head.
        """
        for obsolete in ("empty_init", "resume_download"):
            kwargs.pop(obsolete, None)
        if "use_auth_token" in kwargs:
            kwargs["token"] = kwargs.pop("use_auth_token")
        folder = Path(str(pretrained_model_name_or_path), kwargs.get("subfolder", ""))
        if folder.is_dir():
            check_weight_files(folder)
        packing = kwargs["quantization_config"] = own_quantization_config(kwargs.get("quantization_config"))
        register_with_transformers()
        model, info = super().from_pretrained(
            pretrained_model_name_or_path,
            *args,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **kwargs,
        )
        if model.config.quantization_bit:
            check_same_packing(model.config, packing)
            info["mismatched_keys"] = [*info["mismatched_keys"], *mismatched_shapes(model)]
        check_packed_file(info, model, pretrained_model_name_or_path)
        check_loaded(info, pretrained_model_name_or_path, ignore_mismatched_sizes)
        check_scales(model, pretrained_model_name_or_path)
        freeze(model)
        if model.config.pre_seq_len:
            model.base_model.train_only_prefix()  # loading makes every parameter trainable
        if device is not None:
            model.to(device)
        return (model, info) if output_loading_info else model


class Embedding(nn.Module):
    """Token embedding of ChatGLM2-6B, one level down because the checkpoint has it there."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)


class Encoder(nn.Module):
    """Layers and final norm of ChatGLM2-6B, one level down because the checkpoint has them there."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GLM2Block(config, i) for i in range(config.num_layers))
        if config.post_layer_norm:
            self.final_layernorm = make_norm(config)


class ChatGLMModel(ChatGLMPreTrainedModel):
    """Token ids -> hidden states [B, T, hidden], for both families.

    With `config.pre_seq_len` every layer also sees the trained keys and values of a P-Tuning v2 prefix;
    then nothing but the prefix encoder is trainable.
    """

    def __init__(self, config: ChatGLMConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config)
        if config.family == CHATGLM:
            self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
            self.layers = nn.ModuleList(GLMBlock(config, i) for i in range(config.num_layers))
            self.final_layernorm = make_norm(config)
        else:
            self.embedding = Embedding(config)
            self.encoder = Encoder(config)
            self.output_layer = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary_pos_emb = RotaryEmbedding(config)
        self.gradient_checkpointing = False
        if config.quantization_bit:
            quantize(self, config.quantization_bit, config.quantization_group_size)
            if config.quantization_embeddings:
                self._quantize_embeddings()
        if config.pre_seq_len:
            self.prefix_encoder = PrefixEncoder(config)
            self.dropout = nn.Dropout(PREFIX_DROPOUT)
            self.train_only_prefix()
        self.post_init()

    def train_only_prefix(self) -> None:
        """Freeze everything but the prefix encoder."""
        self.requires_grad_(False)
        self.prefix_encoder.requires_grad_(True)

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers, wherever the family keeps them."""
        return self.layers if self.config.family == CHATGLM else self.encoder.layers

    def get_input_embeddings(self) -> nn.Module:
        return self.word_embeddings if self.config.family == CHATGLM else self.embedding.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        holder = self if self.config.family == CHATGLM else self.embedding
        holder.word_embeddings = value

    def _quantize_embeddings(self) -> None:
        """Pack the embedding and, where it is a tensor of its own, the head."""
        bits, group_size = self.config.quantization_bit, self.config.quantization_group_size
        embedding = self.get_input_embeddings()
        self.set_input_embeddings(QuantizedEmbedding.from_embedding(embedding, bits, group_size))
        if self.config.family == CHATGLM2:
            self.output_layer = QuantizedLinear.from_linear(self.output_layer, bits, group_size)

    def final_norm(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The norm after the last layer (ChatGLM2 variants may have none)."""
        if self.config.family == CHATGLM:
            return self.final_layernorm(hidden_states)
        return self.encoder.final_layernorm(hidden_states) if self.config.post_layer_norm else hidden_states

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        full_attention_mask: torch.Tensor | None = None,
        packed_position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run all layers.

        Args:
            input_ids: [B, T]. Or `inputs_embeds` [B, T, hidden]; ChatGLM-6B then needs `position_ids` too.
            position_ids: [B, T]; for ChatGLM-6B the published [B, 2, T] or `pack_positions` of it. Derived
                from ids, mask and cache when not given.
            attention_mask: [B, past + T], 1 = keep; or the published boolean [B, 1, T, past + T],
                True = masked. The columns of a P-Tuning prefix are never part of it.
            packed_position_ids: what `generate` passes instead of `position_ids` for ChatGLM-6B.
            full_attention_mask: the same boolean mask under the name that the ChatGLM2 model has for it.

        `hidden_states` holds the input of every layer and then, as published, the normed output (ChatGLM-6B)
        or the output of the last layer before the norm (ChatGLM2-6B). Raises ValueError for ids outside the
        vocabulary, masks of the wrong shape and prompts without their special tokens.
        """
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        self._check_arguments(input_ids, inputs_embeds, past_key_values, output_attentions)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache, past_key_values = False, None  # the second forward would write into it again
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        attention_mask = attention_mask if full_attention_mask is None else full_attention_mask
        position_ids = position_ids if packed_position_ids is None else packed_position_ids
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        self._check_shapes(attention_mask, position_ids, inputs_embeds, past_key_values)
        position_ids = self._positions(
            position_ids, input_ids, inputs_embeds, attention_mask, past_key_values
        )
        prefix = self._prefix(inputs_embeds, past_key_values)
        mask = self._attention_mask(
            attention_mask, input_ids, inputs_embeds, position_ids, past_key_values,
            must_be_drawn=bool(prefix or output_attentions),
        )  # fmt: skip
        attend = attention_function(
            self.config._attn_implementation,
            inputs_embeds.shape[1],
            inputs_embeds.device,
            output_attentions,
            paged="cache" in kwargs,
        )

        hidden_states = inputs_embeds
        if self.config.family == CHATGLM2 and self.config.fp32_residual_connection:
            hidden_states = hidden_states.float()
        hidden_states, all_hidden_states, all_attentions = self._run_blocks(
            hidden_states,
            prefix,
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states,
            rotary=self.rotary_pos_emb(position_ids, inputs_embeds.dtype),
            attention_mask=mask,
            past_key_values=past_key_values,
            attend=attend,
            **kwargs,
        )
        normed = self.final_norm(hidden_states).to(inputs_embeds.dtype)
        if all_hidden_states and self.config.family == CHATGLM:
            all_hidden_states = (*all_hidden_states[:-1], normed)
        return BaseModelOutputWithPast(
            last_hidden_state=normed,
            past_key_values=past_key_values,
            hidden_states=all_hidden_states,
            attentions=all_attentions if output_attentions else None,
        )

    def _run_blocks(
        self,
        hidden_states: torch.Tensor,
        prefix: list[tuple[torch.Tensor, torch.Tensor]] | None,
        output_hidden_states: bool,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, tuple | None, tuple]:
        """The stack: output [B, T, hidden], and if asked for the inputs of all layers, and attention weights."""
        all_hidden_states, all_attentions = (hidden_states,), ()
        for i, block in enumerate(self.blocks):
            key_and_value = prefix[i] if prefix else ()  # by place: reentrant checkpointing sees only these
            device = hidden_states.device
            hidden_states, weights = block(hidden_states, *key_and_value, **kwargs)
            if hidden_states.device != device:
                kwargs = to_device(kwargs, hidden_states.device)  # once for all layers there, not for each
            if prefix and key_and_value[0].device != hidden_states.device:
                prefix[i] = tuple(states.to(hidden_states.device) for states in key_and_value)
            if output_hidden_states:
                all_hidden_states += (hidden_states,)
            all_attentions += (weights,)
        return hidden_states, all_hidden_states if output_hidden_states else None, all_attentions

    def _check_arguments(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        past_key_values: Cache | None,
        output_attentions: bool,
    ) -> None:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass either input_ids or inputs_embeds, not both and not neither.")
        if past_key_values is not None and not isinstance(past_key_values, Cache):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}; pass the Cache object that the model "
                "returned."
            )
        if output_attentions and self.config._attn_implementation not in ("eager", "sdpa"):
            raise ValueError(
                f"attn_implementation {self.config._attn_implementation!r} keeps no attention weights; for "
                "output_attentions load the model with attn_implementation='eager'."
            )
        if input_ids is not None:
            self._check_ids(input_ids, past_key_values)

    def _check_ids(self, input_ids: torch.Tensor, past_key_values: Cache | None) -> None:
        if input_ids.dim() != 2 or not input_ids.numel() or input_ids.is_floating_point():
            raise ValueError(
                f"input_ids are {input_ids.dtype} of shape {tuple(input_ids.shape)}; they must be whole numbers of "
                "shape (batch, length) with at least one token."
            )
        # In the decode loop the ids are our own, and looking at them would wait for the device.
        step = past_key_values is not None and input_ids.shape[1] == 1
        if step or torch.compiler.is_compiling() or input_ids.is_meta:
            return
        low, high = (int(bound) for bound in input_ids.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(
                f"input_ids hold {low if low < 0 else high}, outside the vocabulary of {self.config.vocab_size} "
                "rows; use the tokenizer that belongs to this checkpoint."
            )

    def _check_shapes(
        self,
        mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        past_key_values: Cache | None,
    ) -> None:
        if torch.compiler.is_compiling():
            return
        batch, length = inputs_embeds.shape[:2]
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        allowed = [(batch, length), (1, length)] + [(batch, 2, length)] * (self.config.family == CHATGLM)
        if position_ids is not None and tuple(position_ids.shape) not in allowed:
            raise ValueError(
                f"position_ids have shape {tuple(position_ids.shape)}; for {batch} rows of {length} tokens it must be "
                f"{' or '.join(str(shape) for shape in allowed)}."
            )
        if not isinstance(mask, torch.Tensor):
            return
        columns = past + length  # a static cache has room for more
        if past_key_values is not None:
            columns = past_key_values.get_mask_sizes(length, 0)[0]
        shape, expected = tuple(mask.shape), {2: (batch, past + length), 4: (batch, 1, length, columns)}
        fits = shape == expected.get(mask.dim()) and (mask.dim() == 2 or mask.dtype == torch.bool)
        # Drawn by the library: added to the scores; over a paged cache with columns of its own number.
        drawn = mask.dim() == 4 and mask.is_floating_point() and shape[2] == length and shape[3] >= length
        if not fits and not drawn:
            raise ValueError(
                f"attention_mask is {mask.dtype} of shape {shape}; for {batch} rows of {length} tokens after {past} "
                f"cached ones it must have shape {expected[2]}, or be boolean of shape {expected[4]}."
            )

    def _positions(
        self,
        position_ids: torch.Tensor | None,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> torch.Tensor:
        """Positions [B or 1, T], packed for ChatGLM-6B."""
        length = inputs_embeds.shape[1]
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if self.config.family == CHATGLM2:
            if position_ids is not None:
                return position_ids
            if attention_mask is not None and attention_mask.dim() == 2:
                return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
            return torch.arange(length, device=inputs_embeds.device)[None] + past
        derived = position_ids is None
        if derived:
            position_ids = self._glm_positions(input_ids, length, attention_mask, past_key_values)
        elif position_ids.dim() == 3:
            position_ids = pack_positions(position_ids)
        elif input_ids is not None and length > 1 and not torch.compiler.is_compiling() and not past:
            check_packed(position_ids, input_ids, self.config)
        if past_key_values is not None and (derived or not torch.compiler.is_compiling()):
            # What comes next on this cache, for callers who pass no positions.
            past_key_values.glm_next_position = (past + length, position_ids[:, -1:] + 1)
        return position_ids

    def _glm_positions(
        self,
        input_ids: torch.Tensor | None,
        length: int,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> torch.Tensor:
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        known_past, start = getattr(past_key_values, "glm_next_position", (-1, None))
        if past and known_past >= past:
            # After <sop> every token counts one further, so what was cropped off the cache counts back.
            cropped = known_past - past
            if cropped and bool((unpack_positions(start)[1] <= cropped).any()):
                raise ValueError(
                    f"The cache was cropped to {past} tokens, into the prompt, which ChatGLM-6B reads in both "
                    "directions; start again with an empty cache."
                )
            return start - cropped + torch.arange(length, device=start.device)
        if input_ids is None:
            raise ValueError(
                "ChatGLM-6B finds its positions in the token ids: with inputs_embeds pass position_ids too, "
                "as [batch, 2, length] or packed by pack_positions."
            )
        if not torch.compiler.is_compiling():
            check_prompt(input_ids, self.config)
        keep = attention_mask
        if keep is not None and keep.dim() == 4:
            last = keep[:, 0, -1]  # this row sees all that is not padding
            keep = ~last if last.dtype == torch.bool else last >= 0
        return glm_positions(input_ids, keep if keep is None else keep[:, -length:], self.config)

    def _attention_mask(
        self,
        attention_mask: torch.Tensor | None,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: Cache | None,
        must_be_drawn: bool,
    ) -> torch.Tensor | None:
        """The mask that the attention function takes; a P-Tuning prefix is visible to every token."""
        if self.config.pre_seq_len and self.config._attn_implementation.startswith("flex"):
            raise ValueError(
                "A P-Tuning prefix works with attn_implementation 'sdpa' or 'eager', not 'flex_attention'."
            )
        if attention_mask is not None and attention_mask.dim() == 4:
            mask = self._four_dimensional_mask(attention_mask)
        else:
            blocks = None
            if self.config.family == CHATGLM and inputs_embeds.shape[1] > 1:
                blocks = self._context_blocks(input_ids, position_ids, past_key_values)
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids if self.config.family == CHATGLM2 else None,
                block_sequence_ids=blocks,
                allow_is_causal_skip=not must_be_drawn,
            )
        if not self.config.pre_seq_len or mask is None:
            return mask
        visible = 0 if mask.is_floating_point() else 1
        return F.pad(mask, (self.config.pre_seq_len, 0), value=visible)

    def _four_dimensional_mask(self, mask: torch.Tensor) -> torch.Tensor:
        implementation = self.config._attn_implementation
        if implementation.startswith(("flex", "flash")):
            raise ValueError(
                f"attn_implementation {implementation!r} takes 2-D masks only; use 'sdpa' or 'eager' for a 4-D "
                "attention_mask."
            )
        # Published: True = masked; attention functions: True = may see.
        return ~mask if mask.dtype == torch.bool else mask

    def _context_blocks(
        self,
        input_ids: torch.Tensor | None,
        position_ids: torch.Tensor,
        past_key_values: Cache | None,
    ) -> torch.Tensor:
        """0 for tokens that see each other in both directions, -1 for the others: [B, past + T].

        The context is what stands before <sop>, also on a cache that is already filled (PEFT prefix tuning).
        """
        context = torch.ones_like(position_ids, dtype=torch.bool)
        if input_ids is not None:
            context = is_context(input_ids, self.config)
        if self.config.position_encoding_2d:
            context = context & (unpack_positions(position_ids)[1] == 0)  # answers may quote a <sop>
        blocks = torch.where(context, 0, -1)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if isinstance(past, int) and past:
            blocks = F.pad(blocks, (past, 0), value=-1)
        return blocks

    def _prefix(
        self, inputs_embeds: torch.Tensor, past_key_values: Cache | None
    ) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
        """Keys and values [B or 1, G, pre_seq_len, D] of every layer, encoded once per cache."""
        if not self.config.pre_seq_len:
            return None
        known = getattr(past_key_values, "glm_prefix", None)
        if known is not None:
            return known
        config, rows = self.config, len(inputs_embeds) if self.training else 1
        prefix_ids = torch.arange(config.pre_seq_len, device=inputs_embeds.device).expand(rows, -1)
        states = self.prefix_encoder(prefix_ids).to(inputs_embeds.dtype)
        states = states.view(rows, config.pre_seq_len, -1, config.num_key_value_heads, config.head_dim)
        states = self.dropout(states).permute(2, 0, 3, 1, 4)  # [2 L, B, G, pre_seq_len, D]
        prefix = list(zip(states[0::2], states[1::2], strict=True))
        if past_key_values is not None and not self.training:
            past_key_values.glm_prefix = prefix
        return prefix


def to_device(kwargs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What all layers share (rotary tables, the mask) on `device`; a cache stays, each layer has its own part."""
    rotary, mask = kwargs["rotary"], kwargs["attention_mask"]
    rotary = tuple(table.to(device) for table in rotary)
    return {**kwargs, "rotary": rotary, "attention_mask": None if mask is None else mask.to(device)}


def can_step(model: ChatGLMForConditionalGeneration) -> bool:
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

    def __init__(self, model: ChatGLMForConditionalGeneration) -> None:
        transformer, config = model.transformer, model.config
        self.rotary = transformer.rotary_pos_emb
        self.dtype, self.embed = model.dtype, transformer.get_input_embeddings().forward
        self.final_norm, self.head = transformer.final_norm, model.get_output_embeddings().forward
        self.scale = RESIDUAL_SCALE if config.family == CHATGLM else None
        self.layers = [self._functions(block) for block in transformer.blocks]

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

    @staticmethod
    def _heads(
        attention: Attention, fused: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[B, 1, q + k + v] -> query [B, H, 1, D] and key, both turned, and value [B, G, 1, D]."""
        batch, heads = fused.shape[0], attention.num_heads
        if attention.by_kind:
            states = fused.view(batch, -1, 1, attention.head_dim)
            end = heads + attention.num_key_value_heads
            turned = rotate(states[:, :end], *rotary, attention.pairs, attention.axis)
            return turned[:, :heads], turned[:, heads:], states[:, end:]
        states = fused.view(batch, heads, 3, attention.head_dim)  # query and key lie where tokens would
        turned = rotate(states[:, :, :2], *rotary, attention.pairs, attention.axis)
        return turned[:, :, :1], turned[:, :, 1:], states[:, :, 2:]


class ChatGLMForConditionalGeneration(ChatMixin, ChatGLMPreTrainedModel, GenerationMixin):
    """The language model: next-token logits, generation and chat."""

    _auto_class = "AutoModel"  # save_pretrained copies the code too

    def __init__(self, config: ChatGLMConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        if config.family == CHATGLM:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
            self.lm_head.weight_is_shared = config.tie_word_embeddings
            self._tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}
            if config.quantization_embeddings:
                self._share_quantized_embedding()
        self.post_init()
        if config.family == CHATGLM:  # that of the other family lies in the base model, and so does its plan
            self._tp_plan["lm_head"] = "colwise_gather_output"

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head if self.config.family == CHATGLM else self.transformer.output_layer

    def set_output_embeddings(self, value: nn.Module) -> None:
        if self.config.family == CHATGLM:
            self.lm_head = value
        else:
            self.transformer.output_layer = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_last_logit: bool = False,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, vocab_size]; the arguments of `ChatGLMModel.forward`, and

        labels: [B, T], shifted inside, -100 is not counted; the loss is the mean over the others, in float32.
        logits_to_keep: number of last positions (or their indices) to compute logits for, 0 = all.
        return_last_logit: the published name for `logits_to_keep=1`.
        """
        loss_kwargs = {"num_items_in_batch": kwargs.pop("num_items_in_batch", None)}
        outputs = self.transformer(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        keep = 1 if return_last_logit else logits_to_keep
        kept = (
            slice(-keep, None)
            if isinstance(keep, int) and keep
            else keep
            if torch.is_tensor(keep)
            else slice(None)
        )
        logits = self.get_output_embeddings()(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _quantize_embeddings(self) -> None:
        super()._quantize_embeddings()
        if self.config.family == CHATGLM:
            self._share_quantized_embedding()
            self.all_tied_weights_keys = self.get_expanded_tied_weights_keys()

    def _share_quantized_embedding(self) -> None:
        """Make the packed embedding of ChatGLM-6B the head too: they are one tensor."""
        config, embedding = self.config, self.transformer.word_embeddings
        head = QuantizedLinear(
            config.hidden_size, config.vocab_size, embedding.bits,
            group_size=embedding.group_size, device="meta",
        )  # fmt: skip
        head.weight, head.weight_scale, head.weight_is_shared = embedding.weight, embedding.weight_scale, True
        head.training = embedding.training
        self.lm_head = head
        self._tied_weights_keys = {
            f"lm_head.{name}": f"transformer.word_embeddings.{name}" for name in ("weight", "weight_scale")
        }

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: Any = None,
        logits_processor: LogitsProcessorList | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """`GenerationMixin.generate`, which stops when scores are no longer finite (FiniteScores).

        For ChatGLM-6B the published four-dimensional masks and two-row positions are taken too. With
        `int8_cache=True` keys and values are kept in 8 bits (Int8Cache).
        """
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        if kwargs.pop("int8_cache", False):
            kwargs["past_key_values"] = self._int8_cache(kwargs.get("past_key_values"))
        check_generation_mask(kwargs.get("attention_mask"), ids)
        if self.config.family == CHATGLM:
            self._refuse_chunked_prefill(generation_config, kwargs)
            mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
            if mask is not None and mask.dim() == 4:
                kwargs["attention_mask"] = two_dimensional_mask(mask, ids, self.config)
            if positions is not None and positions.dim() == 3:
                kwargs["position_ids"] = pack_positions(positions)
        processors = LogitsProcessorList([FiniteScores(), *(logits_processor or [])])
        return super().generate(inputs, generation_config, processors, *args, **kwargs)

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **kwargs: Any,
    ) -> Any:
        """What `generate` runs for greedy decoding and sampling: our loop, or the library's where that can more."""
        if not self._our_loop_will_do(generation_config, synced_gpus, **kwargs):
            return super()._sample(
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus,
                streamer,
                **kwargs,
            )
        sequences = input_ids
        steps = decode_steps(
            self, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs
        )
        for sequences, _ in steps:
            if streamer is not None:
                streamer.put(sequences[:, -1].cpu())
        if streamer is not None:
            streamer.end()
        return sequences

    def _assisted_decoding(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        inputs_tensor: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """What `generate` runs where several tokens may come of one pass; `prompt_lookup_num_tokens` is our loop's."""
        looked_up = generation_config.prompt_lookup_num_tokens is not None and not kwargs.get(
            "assistant_model"
        )
        if not looked_up or not self._our_loop_will_do(generation_config, synced_gpus, **kwargs):
            return super()._assisted_decoding(
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus,
                streamer,
                inputs_tensor,
                **kwargs,
            )
        return self._sample(
            input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **kwargs
        )

    def _our_loop_will_do(self, generation_config: Any, synced_gpus: bool, **kwargs: Any) -> bool:
        """Whether `decode_steps` gives what `generate` was asked for."""
        wanted_more = (
            generation_config.return_dict_in_generate or synced_gpus or generation_config.is_assistant
        )
        cache = kwargs.get("past_key_values")
        # A filled cache comes with all ids, of which the library takes those that follow.
        known_cache = type(cache) in (DynamicCache, GrowingCache, Int8Cache)
        other_cache = not known_cache or cache.get_seq_length() > 0
        # PEFT's prefix tuning brings its keys in through this method, which our loop does not call.
        prepare = getattr(self.prepare_inputs_for_generation, "__func__", None)
        replaced = prepare is not type(self).prepare_inputs_for_generation
        uncached = "inputs_embeds" in kwargs or not kwargs.get("use_cache", True)
        return not (wanted_more or other_cache or replaced or uncached)

    def next_position(
        self, cache: Cache, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
    ) -> torch.Tensor:
        """Position [B or 1, 1] of the token after those on the cache, packed for ChatGLM-6B."""
        if self.config.family == CHATGLM:
            return cache.glm_next_position[1]
        if position_ids is not None:
            return position_ids[:, -1:] + 1
        if attention_mask is not None and attention_mask.dim() == 2:
            return attention_mask.sum(-1, keepdim=True)
        return torch.full((1, 1), cache.get_seq_length(), device=self.device)

    def new_cache(self, int8: bool = False) -> GrowingCache:
        """An empty cache of the kind that our decoding loop fills."""
        return (Int8Cache if int8 else GrowingCache)(self.config.num_layers, self.cache_dtype)

    def _int8_cache(self, cache: Cache | None) -> Cache:
        """`cache`, or a new one; ValueError if it is of another kind."""
        if cache is not None and not isinstance(cache, Int8Cache):
            raise ValueError(
                f"int8_cache is true, but past_key_values is a {type(cache).__name__}; begin with an Int8Cache, or "
                "leave one of the two out."
            )
        return self.new_cache(int8=True) if cache is None else cache

    @property
    def cache_dtype(self) -> torch.dtype | None:
        """What attention takes keys and values in, None: as they are computed.

        Many heads with keys of their own are slow in half precision on CPUs without instructions for it: 512 tokens
        take 4.5 ms a layer of ChatGLM-6B in bfloat16, 0.8 ms in float32 (Zen 3).
        """
        slow = self.device.type == "cpu" and self.dtype != product_dtype(self.dtype)
        return torch.float32 if slow and self.config.family == CHATGLM else None

    @property
    def reads_forward(self) -> bool:
        """Whether a token of a prompt sees only what stands before it; ChatGLM-6B's see each other both ways."""
        return self.config.family == CHATGLM2

    def one_token_step(self) -> OneTokenStep | None:
        """A faster way to call the model with one more token of every row; None where only `forward` will do."""
        return OneTokenStep(self) if can_step(self) else None

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Several requests in one batch that they join and leave at any step (ChatGLM2-6B only)."""
        self._refuse_causal_only_attention("paged")
        return super().init_continuous_batching(*args, **kwargs)

    def _refuse_chunked_prefill(self, generation_config: Any, kwargs: dict[str, Any]) -> None:
        config = generation_config or self.generation_config
        if kwargs.get("prefill_chunk_size") or getattr(config, "prefill_chunk_size", None):
            raise ValueError(
                "prefill_chunk_size cuts the prompt into pieces, but ChatGLM-6B reads its prompt in both "
                "directions and would answer wrongly; leave it out."
            )

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]
    ) -> torch.Tensor | None:
        if self.config.family == CHATGLM2:
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        input_ids = inputs_tensor if not inputs_tensor.is_floating_point() else model_kwargs.get("input_ids")
        if input_ids is None or input_ids.shape[1] == 0:
            return None
        check_prompt(input_ids, self.config)
        return glm_positions(input_ids, model_kwargs.get("attention_mask"), self.config)

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, *args: Any, inputs_embeds: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """`GenerationMixin`'s, with the packed positions under a name of their own."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, inputs_embeds=inputs_embeds, **kwargs
        )
        if self.config.family == CHATGLM and "position_ids" in inputs:
            # PEFT's prefix tuning adds its length to `position_ids`, which packed ones do not survive.
            inputs["packed_position_ids"] = inputs.pop("position_ids")
        return inputs

    def create_masks_for_generate(
        self,
        config: ChatGLMConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> torch.Tensor | None:
        """The mask that static caches are given ahead of `forward`; prompts draw theirs inside, from the ids."""
        if inputs_embeds.shape[1] > 1:
            return attention_mask
        mask = create_causal_mask(config, inputs_embeds, attention_mask, past_key_values)
        if isinstance(mask, torch.Tensor) and mask.dtype == torch.bool:
            return ~mask  # the published kind, which `forward` expects of a boolean one
        return mask

    def stream_generate(
        self,
        input_ids: torch.Tensor,
        generation_config: Any = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: Any = None,
        prefix_allowed_tokens_fn: Callable | None = None,
        return_past_key_values: bool = False,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Iterator:
        """Yield the sequences so far [B, T] after every token (and the cache, if asked for).

        On a filled `past_key_values`, `input_ids` are only the tokens that follow. The cache never holds the
        token that was sampled last, as in the published code.
        """
        if past_key_values is not None:
            past = past_key_values.get_seq_length()
            seen = torch.arange(past + input_ids.shape[1], device=input_ids.device).expand(len(input_ids), -1)
            kwargs.setdefault("attention_mask", torch.ones_like(seen))
            kwargs.update(past_key_values=past_key_values, position_ids=seen[:, past:])
        steps = self.generate(
            input_ids,
            generation_config,
            logits_processor,
            stopping_criteria,
            prefix_allowed_tokens_fn,
            custom_generate=decode_steps,
            **kwargs,
        )
        for sequences, cache in steps:
            yield (sequences, cache) if return_past_key_values else sequences


class ChatGLMForSequenceClassification(ChatGLMPreTrainedModel):
    """A linear head over the last token of a text: logits [B, num_labels].

    The last token is the last that `attention_mask` keeps, so padding may stand on either side.
    """

    _auto_class = "AutoModelForSequenceClassification"

    def __init__(self, config: ChatGLMConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = ChatGLMModel(config)
        self.classifier_head = nn.Linear(config.hidden_size, config.num_labels)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """The arguments of `ChatGLMModel.forward`, and `labels` [B] (or [B, num_labels] for several)."""
        outputs = self.transformer(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        last = torch.full((len(hidden_states),), hidden_states.shape[1] - 1, device=hidden_states.device)
        if attention_mask is not None and attention_mask.dim() == 2:
            kept = attention_mask[:, -hidden_states.shape[1] :]
            last = (kept * torch.arange(kept.shape[1], device=kept.device)).argmax(-1)
        pooled = hidden_states[torch.arange(len(last), device=last.device), last]
        pooled = pooled if self.dropout is None else self.dropout(pooled)
        logits = self.classifier_head(pooled)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
