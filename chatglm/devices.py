"""One model on several GPUs: the published `load_model_on_gpus` and its device map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from chatglm.checkpoint import read_checkpoint
from chatglm.find import find_checkpoint
from chatglm.hub.configuration_chatglm import CHATGLM, CHATGLM2, ChatGLMConfig
from chatglm.hub.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm.loading import load_weights

# Everything that token ids, or what becomes of them, touch first and last.
AT_BOTH_ENDS = {
    CHATGLM: ["word_embeddings", "final_layernorm"],
    CHATGLM2: ["embedding", "encoder.final_layernorm", "output_layer"],
}


def load_model_on_gpus(
    path: str | Path,
    num_gpus: int = 2,
    device_map: str | dict[str, Any] | None = None,
    **kwargs: Any,
) -> ChatGLMForConditionalGeneration:
    """Loads a model in half precision onto several GPUs, as the function of the published repositories.

    Args:
        path: "demo", "demo-v1", a folder or a Hub name.
        num_gpus: how many GPUs share the layers, see `layers_on_gpus`.
        device_map: another placement: "auto", "balanced" or {name of a module: device}, where a device may
            also be "cpu" or "disk", from which layers come to the GPU when they are needed.
        kwargs: of `from_pretrained`, for instance `quantization_config`, `max_memory`, `offload_folder`.

    Weights go straight to their device. Raises ValueError if there are fewer GPUs, and what `chatglm.load`
    raises; no Python file of the folder runs.
    """
    if device_map is None:
        _check_gpus(num_gpus)
    checkpoint = read_checkpoint(find_checkpoint(path, kwargs.pop("revision", None)))
    if device_map is None:
        device_map = layers_on_gpus(ChatGLMConfig.from_dict(dict(checkpoint.config)), num_gpus)
    kwargs.pop("trust_remote_code", None)  # part of every published line
    kwargs["dtype"] = kwargs.pop("torch_dtype", kwargs.get("dtype", torch.float16))
    return load_weights(checkpoint, device_map=device_map, **kwargs).eval()


def layers_on_gpus(config: ChatGLMConfig, num_gpus: int) -> dict[str, int]:
    """{name of a module: number of its GPU}, by the published rule.

    Embedding and head count as one layer each and lie on GPU 0, where the token ids go in and the scores come
    out. Each GPU takes layers until it has its share of `num_layers + 2`:

        28 layers on 2 GPUs    GPU 0: both ends and layers 0 to 12    GPU 1: layers 13 to 27
    """
    if num_gpus < 2:
        return {"": 0}
    ends = [f"transformer.{name}" for name in ["rotary_pos_emb", *AT_BOTH_ENDS[config.family]]]
    ends += ["lm_head"] if config.family == CHATGLM else []
    ends += ["transformer.prefix_encoder"] if config.pre_seq_len else []
    device_map = dict.fromkeys(ends, 0)
    layers = "transformer.layers" if config.family == CHATGLM else "transformer.encoder.layers"
    gpu, used, share = 0, 2, (config.num_layers + 2) / num_gpus
    for i in range(config.num_layers):
        if used >= share:
            gpu, used = gpu + 1, 0
        device_map[f"{layers}.{i}"] = gpu
        used += 1
    return device_map


def _check_gpus(num_gpus: int) -> None:
    there = torch.cuda.device_count()
    if max(num_gpus, 1) > there:
        raise ValueError(
            f"num_gpus is {num_gpus}, but torch sees {there} CUDA devices; give a smaller number, or a device_map "
            'with "cpu" and "disk" in it, such as "auto".'
        )
