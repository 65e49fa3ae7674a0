"""A checkpoint as one value: config, weights, tokenizer and generation settings; from a folder and to one."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from transformers import GenerationConfig

from chatglm.checkpoint import read_checkpoint, read_config
from chatglm.find import find_checkpoint
from chatglm.hub import configuration_chatglm
from chatglm.hub.configuration_chatglm import AUTO_MAP, ChatGLMConfig
from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer
from chatglm.weights.expected import check_state
from chatglm.weights.read import read_state
from chatglm.weights.tensors import State
from chatglm.weights.write import write_state

WEIGHT_SUFFIXES = (".safetensors", ".bin")
HUB_FILES = (
    "configuration_chatglm.py",
    "modeling_chatglm.py",
    "quantization.py",
    "quantization_kernels.py",
    "tokenization_chatglm.py",
)


@dataclass(frozen=True)
class Parts:
    """What a checkpoint consists of; nothing of the weights is read yet."""

    config: ChatGLMConfig
    state: State
    tokenizer: ChatGLMTokenizer
    generation: GenerationConfig


def read_parts(source: str | Path, revision: str | None = None) -> Parts:
    """The parts of `source`: a folder, a Hub name, "demo", "demo-v1", or one file of weights in a folder.

    Raises OSError and ValueError where something is missing, damaged, or does not fit the rest.
    """
    path = Path(source).expanduser()
    if path.is_file() and path.suffix in WEIGHT_SUFFIXES:
        folder, keys, files = path.parent, read_config(path.parent), [path]
    else:
        checkpoint = read_checkpoint(find_checkpoint(source, revision))
        folder, keys = checkpoint.folder, checkpoint.config
        files = [file.path for file in checkpoint.weights]
    config = ChatGLMConfig.from_dict(keys)
    state = read_state(files)
    check_state(state, config, files[0] if len(files) == 1 else folder)
    return Parts(config, state, ChatGLMTokenizer.from_pretrained(folder), _generation(folder, config))


def write_parts(parts: Parts, folder: Path, progress: bool = True) -> None:
    """Writes a folder that loads with our code, with `trust_remote_code`, and with the published code."""
    config = ChatGLMConfig.from_dict(
        parts.config.to_dict()
        | {"auto_map": dict(AUTO_MAP), "architectures": ["ChatGLMForConditionalGeneration"]}
    )
    config.save_pretrained(folder)
    parts.generation.save_pretrained(folder)
    parts.tokenizer.save_pretrained(folder)
    code = Path(configuration_chatglm.__file__).parent
    for name in HUB_FILES:
        shutil.copyfile(code / name, folder / name)
    write_state(parts.state, folder, progress=progress)
    _check_written(parts.state, folder)


def _generation(folder: Path, config: ChatGLMConfig) -> GenerationConfig:
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_model_config(config)


def _check_written(state: State, folder: Path) -> None:
    """Reads the headers of what was written, before it takes its place."""
    written = read_state(file.path for file in read_checkpoint(folder).weights)
    wanted = {name: (tensor.dtype, tensor.shape) for name, tensor in state.items()}
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in written.items()}
    if found != wanted:
        raise OSError(f"{folder} was not written as it should be; look whether the disk is sound.")
