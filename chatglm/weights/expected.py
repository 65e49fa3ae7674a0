"""Which tensors a config.json asks for, and whether they are there."""

from __future__ import annotations

import torch

from chatglm.hub.configuration_chatglm import ChatGLMConfig
from chatglm.hub.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm.weights.tensors import State

HEAD = "classifier_head."  # of ChatGLMForSequenceClassification


def expected_shapes(config: ChatGLMConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the model, without memory for any of them."""
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def may_be_missing(name: str, config: ChatGLMConfig) -> bool:
    """Whether loading makes up for it: the output layer that is the embedding of ChatGLM-6B."""
    return name.startswith("lm_head.") and config.tie_word_embeddings


def is_passed_over(name: str) -> bool:
    """Whether a file may hold it without use: rotary tables of old files, heads of other tasks."""
    return name.endswith("inv_freq") or name.startswith(HEAD)


def check_state(state: State, config: ChatGLMConfig, source: object) -> None:
    """Raises ValueError, naming the first, for tensors that are missing, unknown or of another shape."""
    expected = expected_shapes(config)
    missing = [name for name in expected if name not in state and not may_be_missing(name, config)]
    if missing:
        raise ValueError(
            f"{source} holds no {missing[0]} and {len(missing) - 1} more that config.json asks for; download "
            "the checkpoint again, with all of its files."
        )
    unknown = [name for name in state if name not in expected and not is_passed_over(name)]
    if unknown:
        raise ValueError(
            f"{source} holds {unknown[0]} and {len(unknown) - 1} more that no model of its config.json has; "
            "take the config.json that was published with these weights."
        )
    for name, shape in expected.items():
        if name in state and state[name].shape != shape:
            raise ValueError(
                f"{name} in {source} has shape {state[name].shape}, but by config.json it must be {shape}; "
                "take weights and config.json from one checkpoint."
            )
