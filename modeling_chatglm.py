"""ChatGLM-6B and ChatGLM2-6B side by side: from token ids to hidden states and logits.

The file reads from the parts to the whole: what transformers asks of every model, the model, the language model, the
classifier. Their layers are made in layers_chatglm.py, positions and masks in positions_chatglm.py; how tokens become
longer texts is a mixin in generation_chatglm.py, and the methods that chat are one in chat_chatglm.py.
"chatglm" is the first family (ChatGLM-6B v0.1, v1.1, Slim), "chatglm2" the second (ChatGLM2-6B, ChatGLM3-6B,
CodeGeeX2).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.utils import can_return_tuple

from .chat_chatglm import ChatMixin
from .configuration_chatglm import (
    CHATGLM,
    CHATGLM2,
    ChatGLMConfig,
    check_loaded,
    check_shares,
    check_weight_files,
)
from .generation_chatglm import (  # noqa: F401 - old callers import the last one from here
    ChatGLMGenerationMixin,
    InvalidScoreLogitsProcessor,
)
from .layers_chatglm import (
    GLM2Block,
    GLMBlock,
    PrefixEncoder,
    RotaryEmbedding,
    attention_function,
    attention_of,
    device_of,
    make_norm,
)
from .positions_chatglm import (
    check_packed,
    check_prompt,
    glm_positions,
    is_context,
    pack_positions,
    unpack_positions,
)
from .quantization import (
    Linear,
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
    prepack_all,
    quantize,
    register_with_transformers,
)

PREFIX_DROPOUT = 0.1


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
        """Where inputs belong."""
        return device_of(self)

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
        prepack_all(self)
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


class ChatGLMForConditionalGeneration(ChatMixin, ChatGLMPreTrainedModel, ChatGLMGenerationMixin):
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
