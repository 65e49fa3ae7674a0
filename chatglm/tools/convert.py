"""From one checkpoint to another: safetensors, another dtype, adapters merged, fewer rows, packed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from chatglm.checkpoint import is_lfs_pointer
from chatglm.find import local_folder
from chatglm.hub.configuration_chatglm import CHATGLM, ChatGLMConfig
from chatglm.hub.quantization import check_packing
from chatglm.weights.adapter import merge_lora, read_lora
from chatglm.weights.expected import check_state
from chatglm.weights.parts import Parts, read_parts, write_parts
from chatglm.weights.read import read_state
from chatglm.weights.transform import (
    EMBEDDINGS,
    PREFIX,
    add_prefix,
    cast,
    checked,
    drop_tied_head,
    is_packed,
    quantize,
    share_packed_head,
)
from chatglm.weights.write import check_destination, complete_folder, total_bytes

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX_FILES = ("model.safetensors", "pytorch_model.bin")


def convert(
    source: str | Path,
    dest: str | Path,
    *,
    dtype: str | None = None,
    merge_adapter: str | Path | None = None,
    prefix: str | Path | None = None,
    slim: bool = False,
    slim_to: Sequence[str | Path] = (),
    quantize: int | None = None,
    group_size: int | None = None,
    quantize_embeddings: bool = False,
    overwrite: bool = False,
    revision: str | None = None,
    progress: bool = True,
) -> Parts:
    """Writes the checkpoint `source` into the folder `dest`, changed as asked, in this order.

    Args:
        source: a folder, one file of weights in a folder, a Hub name, "demo" or "demo-v1".
        dest: the folder to write; it appears complete or not at all.
        merge_adapter: the folder of a LoRA adapter, added to the weights it was trained on.
        prefix: the folder of a P-Tuning v2 prefix, which goes along with the weights.
        slim: drops the 20000 image rows of a ChatGLM-6B v0.1 vocabulary.
        slim_to: text files or folders; only the pieces of the vocabulary that they need are kept.
        quantize: 8 or 4 packs the linear layers into so many bits, in the published format.
        group_size: with 4 bits, 32, 64 or 128 columns that share a scale; the published code stops there.
        quantize_embeddings: packs embedding and output layer too.
        dtype: "float16", "bfloat16" or "float32" for all that is not packed; None: as it was.
        overwrite: replaces a checkpoint that is in `dest`.
        revision: of a Hub name.

    Returns the parts of what was written. Raises OSError for files and disks, ValueError for contents and
    arguments; nothing is left in `dest` then. The memory needed is about one shard, 1 GB.
    """
    dest = Path(dest).expanduser()
    _check_arguments(dtype, quantize, group_size, quantize_embeddings)
    check_destination(dest, overwrite)
    _check_apart(source, dest)
    parts = read_parts(source, revision)
    parts = replace(parts, state=checked(parts.state))
    if merge_adapter is not None:
        parts = with_adapter(parts, Path(merge_adapter).expanduser())
    if prefix is not None:
        parts = with_prefix(parts, Path(prefix).expanduser())
    if quantize is not None:
        parts = packed(parts, quantize, group_size, quantize_embeddings)
    elif parts.config.family == CHATGLM and parts.config.tie_word_embeddings and not is_packed(parts.state):
        parts = replace(parts, state=drop_tied_head(parts.state))
    parts = in_dtype(parts, dtype)
    with complete_folder(dest, overwrite, total_bytes(parts.state)) as folder:
        write_parts(parts, folder, progress)
    return parts


def with_adapter(parts: Parts, folder: Path) -> Parts:
    """The LoRA adapter that PEFT saved in `folder`, merged."""
    lora = read_lora(
        _read_settings(folder, "adapter_config.json"), read_state([_one_of(folder, ADAPTER_FILES)])
    )
    state = parts.state
    if parts.config.family == CHATGLM and parts.config.tie_word_embeddings:
        state = drop_tied_head(state)  # an adapter of one of the two would part them
    return replace(parts, state=merge_lora(state, lora))


def with_prefix(parts: Parts, folder: Path) -> Parts:
    """The prefix encoder of P-Tuning v2 that was saved in `folder`, put beside the weights."""
    state = add_prefix(parts.state, read_state([_one_of(folder, PREFIX_FILES)]))
    embedding = state.get(f"{PREFIX}embedding.weight")
    if embedding is None:
        raise ValueError(
            f"{folder} holds no {PREFIX}embedding.weight; give the folder that P-Tuning v2 saved."
        )
    config = changed(
        parts.config,
        pre_seq_len=embedding.shape[0],
        prefix_projection=f"{PREFIX}trans.0.weight" in state,
    )
    check_state(state, config, folder)
    return replace(parts, config=config, state=state)


def packed(parts: Parts, bits: int, group_size: int | None, embeddings: bool) -> Parts:
    """Linear layers as packed integers, as `model.quantize` makes them."""
    tied = parts.config.family == CHATGLM and parts.config.tie_word_embeddings
    if embeddings and parts.config.family == CHATGLM and not tied:
        raise ValueError(
            "quantize_embeddings packs embedding and head of ChatGLM-6B as one tensor, but tie_word_embeddings "
            "is false in config.json; leave quantize_embeddings out."
        )
    state = quantize(drop_tied_head(parts.state) if tied else parts.state, bits, group_size, embeddings)
    if tied:
        state = share_packed_head(state)
    config = changed(
        parts.config,
        quantization_bit=bits,
        quantization_group_size=group_size,
        quantization_embeddings=embeddings,
    )
    return replace(parts, config=config, state=state)


def in_dtype(parts: Parts, dtype: str | None) -> Parts:
    """All that is not packed in `dtype`; config.json tells the dtype that most of the weights have."""
    state = cast(parts.state, DTYPES[dtype]) if dtype else parts.state
    embedding = next(state[name] for module in EMBEDDINGS for name in _float_names(module) if name in state)
    return replace(parts, config=changed(parts.config, dtype=embedding.dtype), state=state)


def changed(config: ChatGLMConfig, **values: Any) -> ChatGLMConfig:
    """A copy of `config` with other values."""
    return ChatGLMConfig.from_dict(config.to_dict() | values)


def _float_names(module: str) -> tuple[str, str]:
    return f"{module}.weight_scale", f"{module}.weight"


def _check_arguments(
    dtype: str | None, bits: int | None, group_size: int | None, quantize_embeddings: bool
) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; give one of {', '.join(DTYPES)}.")
    if bits is not None:
        check_packing(bits, group_size)
    elif group_size or quantize_embeddings:
        name, value = ("group_size", group_size) if group_size else ("quantize_embeddings", True)
        raise ValueError(f"{name} is {value!r}, but nothing is packed; say quantize 8 or 4 too.")


def _check_apart(source: str | Path, dest: Path) -> None:
    path = Path(source).expanduser()
    folder = (path.parent if path.is_file() else local_folder(source) or path).resolve()
    target = dest.resolve()
    if target == folder or target in folder.parents:
        raise ValueError(f"{dest} is where the source lies; choose another destination.")


def _one_of(folder: Path, names: Sequence[str]) -> Path:
    if not folder.is_dir():
        raise OSError(f"There is no folder {folder}; give the folder that the training saved.")
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise OSError(
            f"{folder} holds neither {' nor '.join(names)}; give the folder that the training saved."
        )
    if is_lfs_pointer(path):
        raise OSError(f"{path} is a git-lfs pointer, not the file; run `git lfs pull` in its folder.")
    return path


def _read_settings(folder: Path, name: str) -> dict[str, Any]:
    path = _one_of(folder, [name])
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); copy it again.") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold a JSON object; copy it again.")
    return settings
