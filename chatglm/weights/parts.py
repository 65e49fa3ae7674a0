"""A checkpoint as one value: config, weights, tokenizer and generation settings; from a folder and to one."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from chatglm import __version__
from chatglm.checkpoint import read_checkpoint, read_config, read_weight_file
from chatglm.find import OURS, find_checkpoint, local_folder
from chatglm.hub import configuration_chatglm
from chatglm.hub.configuration_chatglm import AUTO_MAP, ChatGLMConfig
from chatglm.hub.modeling_chatglm import ChatGLMForConditionalGeneration, RotaryEmbedding
from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer
from chatglm.weights.expected import check_state
from chatglm.weights.read import read_state
from chatglm.weights.tensors import State
from chatglm.weights.transform import checked
from chatglm.weights.write import write_state

HISTORY_FILE = "conversion.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin")
HUB_FILES = (
    "chat_chatglm.py",
    "configuration_chatglm.py",
    "generation_chatglm.py",
    "layers_chatglm.py",
    "modeling_chatglm.py",
    "positions_chatglm.py",
    "quantization.py",
    "quantization_gpu.py",
    "quantization_kernels.py",
    "quantization_native.py",
    "quantization_plain.py",
    "tokenization_chatglm.py",
)


@dataclass(frozen=True)
class Parts:
    """What a checkpoint consists of; nothing of the weights is read yet."""

    config: ChatGLMConfig
    state: State
    tokenizer: ChatGLMTokenizer
    generation: GenerationConfig
    history: tuple[str, ...]  # where the weights came from and what was done to them, a sentence each
    notes: dict[str, str] = field(default_factory=dict)  # further small files, by name

    def with_step(self, sentence: str, **values: Any) -> Parts:
        """The parts with other `values`, and the sentence that says what was done."""
        return replace(self, history=(*self.history, sentence), **values)


def read_parts(source: str | Path, revision: str | None = None) -> Parts:
    """The parts of `source`: a folder, a Hub name, "demo", "demo-v1", or one file of weights in a folder.

    Raises OSError and ValueError where something is missing, damaged, or does not fit the rest.
    """
    path = Path(source).expanduser()
    if path.is_file() and path.suffix in WEIGHT_SUFFIXES:
        folder, keys, files = path.parent, read_config(path.parent), [read_weight_file(path).path]
    else:
        checkpoint = read_checkpoint(find_checkpoint(source, revision))
        folder, keys = checkpoint.folder, checkpoint.config
        files = [file.path for file in checkpoint.weights]
    config = ChatGLMConfig.from_dict(keys)
    state = read_state(files)
    check_state(state, config, files[0] if len(files) == 1 else folder)
    tokenizer = ChatGLMTokenizer.from_pretrained(folder)
    return Parts(config, state, tokenizer, _generation(folder, config), read_history(folder, str(source)))


def write_parts(parts: Parts, folder: Path, progress: bool = True) -> None:
    """Writes a folder that loads with our code, with `trust_remote_code`, and with the published code.

    Raises ValueError, naming the tensor, for numbers that are not finite.
    """
    published = {"auto_map": dict(AUTO_MAP), "architectures": ["ChatGLMModel"]}  # SGLang knows no other
    config = ChatGLMConfig.from_dict(parts.config.to_dict() | published)
    config.save_pretrained(folder)
    parts.generation.save_pretrained(folder)
    parts.tokenizer.save_pretrained(folder)
    history = {"made_with": f"chatglm {__version__}", "steps": parts.history}
    (folder / HISTORY_FILE).write_text(json.dumps(history, indent=2, ensure_ascii=False), encoding="utf-8")
    for name, text in parts.notes.items():
        (folder / name).write_text(text, encoding="utf-8")
    code = Path(configuration_chatglm.__file__).parent
    for name in HUB_FILES:
        shutil.copyfile(code / name, folder / name)
    write_state(checked(parts.state), folder, progress=progress)
    _check_written(parts.state, folder)


def check_apart(source: str | Path, dest: Path) -> None:
    """Raises ValueError where writing `dest` would replace what is read."""
    path = Path(source).expanduser()
    folder = (path.parent if path.is_file() else local_folder(source) or path).resolve()
    target = dest.resolve()
    if target == folder or target in folder.parents:
        raise ValueError(f"{dest} is where the source lies; choose another destination.")


def as_model(parts: Parts) -> ChatGLMForConditionalGeneration:
    """The model that the parts make up, in memory, in the dtypes that they have."""
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(parts.config)
    model.load_state_dict(
        {name: tensor.load() for name, tensor in parts.state.items()}, strict=False, assign=True
    )
    model.transformer.rotary_pos_emb = RotaryEmbedding(parts.config)  # never part of the state
    model.tie_weights()
    return model.requires_grad_(False).eval()


def read_history(folder: Path, name: str) -> tuple[str, ...]:
    """What earlier conversions wrote down, or that the weights are those of `name`."""
    try:
        steps = json.loads((folder / HISTORY_FILE).read_text(encoding="utf-8"))["steps"]
        if steps and all(isinstance(step, str) for step in steps):
            return tuple(steps)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none, or not ours: nothing depends on it but the model card
    is_path = Path(name).expanduser().exists() and name not in OURS
    return (f"The weights are those of {Path(name).resolve().name if is_path else name}.",)


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
