"""From a name to a model that is ready to chat, running no code but our own."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError  # the error alone: nothing is unpickled here
from typing import Any

import torch

from chatglm.checkpoint import Checkpoint, read_checkpoint
from chatglm.find import find_checkpoint
from chatglm.hub.configuration_chatglm import ChatGLMConfig
from chatglm.hub.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm.hub.quantization import ChatGLMQuantizationConfig
from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer

# Devices that share one model, as `device_map` of transformers names them.
SPREAD = ("auto", "balanced")
# Above this many parameters float32 on a CPU costs more memory than most machines have.
LARGE = 1_000_000_000


def load(
    name: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    quantize: int | None = None,
    revision: str | None = None,
    group_size: int | None = None,
    adapter: str | Path | None = None,
) -> tuple[ChatGLMForConditionalGeneration, ChatGLMTokenizer]:
    """Loads a model for chatting and its tokenizer.

    Args:
        name: "demo" or "demo-v1", which ship with this package, a folder, or a Hub name.
        device: default is the first there is of "cuda", "mps", "cpu"; "auto" spreads a model that one GPU
            cannot hold over all of them, then the memory, then the disk, "balanced" evenly over all GPUs.
        dtype: "float32", "float16", "bfloat16" or the torch dtype; None: see default_dtype.
        quantize: 8 or 4 packs the weights of the linear layers into so many bits while they load, so
            that the memory holds the packed model and little more.
        revision: of a Hub name: a branch, tag or commit.
        group_size: with `quantize=4`, 32, 64 or 128 columns that share a scale; None: a whole row.
        adapter: a folder that `chatglm finetune`, `dpo` or `rl` wrote for this model: LoRA factors or a prefix.

    On a CPU the weights are brought into the order that it reads fastest; `model.train()` undoes
    that, for code that looks at them.

    Raises OSError for missing, cut off or git-lfs pointer files and ValueError for wrong arguments
    or contents, before any weight is read. Weights come from safetensors where there are any, else
    from .bin files, of whose pickles torch takes tensors alone. No Python file of the folder runs.
    """
    if adapter is not None:
        from chatglm.training.methods import check_adapter, load_finetuned

        check_adapter(Path(adapter).expanduser())
        loading = {"device": device, "dtype": dtype, "quantize": quantize, "revision": revision}
        model, tokenizer = load_finetuned(adapter, name, group_size=group_size, **loading)
        # Of PEFT's model, the one that the factors were put into, which chats by itself.
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        return model.prepack() if model.device.type == "cpu" else model, tokenizer
    if quantize not in (None, 4, 8):
        raise ValueError(f"quantize is {quantize!r}; give 8 or 4 bits, or None for no packing.")
    if group_size and not quantize:
        raise ValueError(f"group_size is {group_size!r}, but nothing is packed; give quantize=4 too.")
    packing = ChatGLMQuantizationConfig(quantize, group_size) if quantize else None
    spread = device if device in SPREAD else None
    device = _device(None if spread else device)
    dtype = _dtype(dtype)
    checkpoint = read_checkpoint(find_checkpoint(name, revision))
    tokenizer = ChatGLMTokenizer.from_pretrained(checkpoint.folder)
    model = load_weights(
        checkpoint,
        dtype=dtype or default_dtype(device, checkpoint),
        quantization_config=packing,
        # Packing on MPS is untested.
        device_map=spread or {"": "cpu" if packing and device.type != "cuda" else device},
    )
    model = model.eval() if spread else model.to(device).eval()
    return model.prepack() if device.type == "cpu" else model, tokenizer


def load_weights(checkpoint: Checkpoint, **options: Any) -> ChatGLMForConditionalGeneration:
    """The model of a checkpoint that was read, with `options` of `from_pretrained`."""
    # The checked keys of config.json, not the file, so that nothing in it can name code.
    config = ChatGLMConfig.from_dict(dict(checkpoint.config))
    try:
        return ChatGLMForConditionalGeneration.from_pretrained(checkpoint.folder, config=config, **options)
    except UnpicklingError:
        raise ValueError(
            f"A .bin file in {checkpoint.folder} is damaged or holds more than tensors, which could "
            "run code; take safetensors files, or the .bin files of a source you trust."
        ) from None


def default_device() -> torch.device:
    """The fastest device of this machine: CUDA, Apple's MPS or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def find_device(name: str) -> torch.device:
    """The device of that name, such as "cpu" or "cuda:1"; ValueError where torch has none of it here."""
    there = {"cpu": 1}
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator:
        there[accelerator.type] = torch.accelerator.device_count()
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or (device.index or 0) >= there.get(device.type, 0):
        names = [f"{kind}:{i}" if i else kind for kind, count in there.items() for i in range(count)]
        raise ValueError(
            f"device is {name!r}, but torch has only {', '.join(names)} here; give one that there is."
        )
    return device


def default_dtype(device: torch.device, checkpoint: Checkpoint) -> torch.dtype | str:
    """The checkpoint's own dtype on accelerators; on a CPU float32, or bfloat16 for large models.

    CPUs compute float16 slowly if at all, and 6 billion parameters would take 25 GB in float32.
    """
    if device.type != "cpu":
        return "auto"
    return torch.bfloat16 if checkpoint.sizes.parameters >= LARGE else torch.float32


def _device(device: str | torch.device | None) -> torch.device:
    return default_device() if device is None else find_device(str(device))


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    names = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype is None:
        return None
    chosen = names.get(dtype) if isinstance(dtype, str) else dtype
    if chosen not in names.values():
        raise ValueError(f"dtype is {dtype!r}; give one of {', '.join(names)}.")
    return chosen
