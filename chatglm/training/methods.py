"""What of a model is trained, and how that is saved and loaded again.

lora     PEFT's LoRA: small factors beside the linear layers; saved as PEFT saves adapters
ptuning  P-Tuning v2: keys and values in front of every layer; saved as published, the prefix encoder alone
full     all weights; saved as a checkpoint
freeze   the weights of the last layers; saved as a checkpoint
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from chatglm.checkpoint import read_config, read_weight_file
from chatglm.hub.modeling_chatglm import PREFIX_DROPOUT, ChatGLMForConditionalGeneration, PrefixEncoder
from chatglm.hub.quantization import QuantizedLinear
from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer
from chatglm.loading import default_device, find_device, load
from chatglm.training.processes import is_sharded, number_of_processes
from chatglm.training.settings import RUN_FILES, Settings
from chatglm.weights.read import read_state

PREFIX_FILE = "pytorch_model.bin"  # the name and format that the published code reads
PREFIX = "transformer.prefix_encoder."
ADAPTER_CONFIG = "adapter_config.json"


def check_method(settings: Settings, config: dict[str, Any], device: torch.device) -> None:
    """Raises ValueError for a method that the model of this config.json, or this machine, cannot do."""
    if settings.method == "lora":
        check_peft()
    packed = config.get("quantization_bit")
    if packed and settings.method in ("full", "freeze"):
        raise ValueError(
            f"The weights of {settings.model} are packed to {packed} bits and cannot be trained by method "
            f"{settings.method!r}; take lora or ptuning, or the float checkpoint."
        )
    if is_sharded() and (packed or settings.quantize):
        raise ValueError(
            f"The weights are packed to {packed or settings.quantize} bits, which FSDP and DeepSpeed cannot share out; "
            "start with accelerate launch --multi_gpu, which gives every GPU a copy."
        )
    if config.get("pre_seq_len"):
        raise ValueError(
            f"{settings.model} has a P-Tuning prefix already (pre_seq_len {config['pre_seq_len']}); finetune the model "
            "that it was made for."
        )
    layers = config.get("num_layers", 28)
    if settings.method == "freeze" and settings.freeze_layers > layers:
        raise ValueError(
            f"freeze_layers is {settings.freeze_layers}, but {settings.model} has {layers} layers."
        )
    if settings.dtype == "float16" and device.type == "cpu":
        raise ValueError("dtype is float16, which cannot be trained on a CPU; take bfloat16 or float32.")


def check_peft() -> None:
    """Raises ValueError if PEFT is missing."""
    if find_spec("peft") is None:
        raise ValueError("LoRA needs PEFT, which is not installed; pip install peft.")


def training_device(name: str | None) -> torch.device:
    """The device of this process: the one that is asked for, or the best; of several GPUs each process has its own.

    Raises ValueError if there is none of that name, or there are too few.
    """
    device = find_device(name) if name else default_device()
    if number_of_processes() == 1 or device.type != "cuda":
        return device
    own, there_are = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if device.index is not None:
        raise ValueError(
            f"device is {name!r}, but every process takes a GPU of its own; give cuda, or leave it out."
        )
    if own >= there_are:
        raise ValueError(
            f"There are {there_are} GPUs for {os.environ['LOCAL_WORLD_SIZE']} processes; give --num_processes "
            f"{there_are} to accelerate launch."
        )
    return torch.device("cuda", own)


def training_dtype(settings: Settings, device: torch.device) -> str:
    """What is computed in, asked for or by device."""
    if settings.dtype:
        return settings.dtype
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    return "float32"


def stored_dtype(config: dict[str, Any]) -> torch.dtype:
    """What the weights beside this config.json are stored in."""
    return getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float16")


def load_base(
    settings: Settings, device: torch.device
) -> tuple[ChatGLMForConditionalGeneration, ChatGLMTokenizer]:
    """The model to train and its tokenizer; frozen weights in the dtype of the computing, others in float32."""
    whole = settings.method in ("full", "freeze")
    dtype = "float32" if whole else training_dtype(settings, device)
    if is_sharded():  # the launcher's FSDP or DeepSpeed brings each GPU its share
        device = torch.device("cpu")
    model, tokenizer = load(settings.model, device, dtype, settings.quantize, settings.revision)
    # FSDP fetches one layer at a time, and wants no names of layers that the other family has.
    model._no_split_modules = [type(model.transformer.blocks[0]).__name__]
    return model.train(), tokenizer  # train() brings the weights back into the layout that learns


def prepare(model: ChatGLMForConditionalGeneration, settings: Settings) -> Any:
    """`model` with nothing trainable but what the method trains: itself, or a PeftModel around it."""
    if settings.method == "lora":
        return add_lora(model, settings)
    if settings.method == "ptuning":
        add_prefix(model, settings.pre_seq_len, settings.prefix_projection)
    elif settings.method == "freeze":
        model.requires_grad_(False)
        for block in model.transformer.blocks[-settings.freeze_layers :]:
            block.requires_grad_(True)
    else:
        model.requires_grad_(True)
    return model.train()


def add_lora(model: ChatGLMForConditionalGeneration, settings: Settings) -> Any:
    """`model` with new LoRA factors, which start without an effect. Packed layers take them too."""
    from peft import get_peft_model

    try:
        with _old_name_unsaid():
            return get_peft_model(model, lora_config(settings, "CAUSAL_LM")).train()
    except ValueError as error:
        raise ValueError(f"lora_target is {settings.lora_target!r}: {error}") from None


def lora_config(settings: Settings, task_type: str) -> Any:
    """PEFT's LoraConfig for these settings and a kind of model ("CAUSAL_LM", "SEQ_CLS")."""
    from peft import LoraConfig

    target: Any = list(settings.lora_target) or None  # None: PEFT's own table, query_key_value
    config = LoraConfig(
        task_type=task_type,
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha or 2 * settings.lora_rank,
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear" if target == ["all-linear"] else target,
    )
    config._register_custom_module(packed_layers())
    return config


def packed_layers() -> dict[type, type]:
    """What PEFT must be told to put LoRA on packed layers: it knows no classes but its own and torch's."""
    from peft.tuners.lora.layer import Linear

    class PackedLora(Linear):
        """LoRA beside a packed layer; what is packed cannot take it in."""

        def merge(self, *args: Any, **kwargs: Any) -> None:
            raise ValueError(
                "An adapter cannot be merged into packed weights; chatglm convert --merge-adapter merges it into the "
                "float checkpoint, and packs that with --quantize."
            )

    return {QuantizedLinear: PackedLora}


def add_prefix(model: ChatGLMForConditionalGeneration, length: int, projection: bool) -> None:
    """Puts a new P-Tuning v2 prefix, in float32, in front of `model`; nothing else is trainable then."""
    config, transformer = model.config, model.transformer
    config.pre_seq_len, config.prefix_projection = length, projection
    transformer.prefix_encoder = PrefixEncoder(config)
    for module in transformer.prefix_encoder.modules():
        transformer._init_weights(module)
    transformer.prefix_encoder.to(model.device)
    transformer.dropout = nn.Dropout(PREFIX_DROPOUT)
    model.requires_grad_(False)
    transformer.train_only_prefix()


def prefix_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a P-Tuning v2 checkpoint, under their published names, of all that a model has."""
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items() if name.startswith(PREFIX)}


def save_prefix(
    model: ChatGLMForConditionalGeneration, folder: Path, state: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Writes the prefix as the published finetuning did, and the config.json that tells its length.

    `state` are all tensors of a model whose own are shared out over several processes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(prefix_state(model.state_dict() if state is None else state), folder / PREFIX_FILE)
    model.config.save_pretrained(folder)


def save_checkpoint(
    model: ChatGLMForConditionalGeneration,
    state: Mapping[str, torch.Tensor],
    folder: Path,
    dtype: torch.dtype,
) -> None:
    """Writes all tensors `state` of a model, whose own may be shared out over several processes, in `dtype`."""
    # FSDP makes a class of its own of a model, whose source would be saved with it.
    with torch.device("meta"):
        plain = ChatGLMForConditionalGeneration(model.config).to(dtype)
    plain.generation_config = model.generation_config
    tied = plain.all_tied_weights_keys  # names of what is stored under another
    weights = {name: tensor.to(dtype) for name, tensor in state.items() if name not in tied}
    plain.save_pretrained(folder, state_dict=weights)


def load_finetuned(
    folder: str | Path, base: str | Path | None = None, **loading: Any
) -> tuple[Any, ChatGLMTokenizer]:
    """The model that `chatglm finetune`, `dpo` or `rl` wrote into `folder`, ready to chat, and its tokenizer.

    Args:
        folder: LoRA adapter, P-Tuning prefix or checkpoint.
        base: the model it was trained on; default is the one that the settings beside it name. Checkpoints need none.
        loading: device, dtype, quantize and so on, as `chatglm.load` takes them.

    Raises OSError and ValueError as `chatglm.load`.
    """
    folder = Path(folder).expanduser()
    adapter, prefix = folder / ADAPTER_CONFIG, folder / PREFIX_FILE
    if not adapter.is_file() and not prefix.is_file():
        return load(folder, **loading)
    model, tokenizer = load(base or base_of(folder), **loading)
    if adapter.is_file():
        check_peft()
        from peft import LoraConfig, PeftModel

        config = LoraConfig.from_pretrained(folder)
        config._register_custom_module(packed_layers())
        model.train()  # out of the layout in which PEFT would find no weights
        with _misfits_in_words(folder, model), _old_name_unsaid():
            return PeftModel.from_pretrained(model, folder, config=config).eval(), tokenizer
    config = read_config(folder)
    add_prefix(model, config["pre_seq_len"], config["prefix_projection"])
    state = read_state([read_weight_file(prefix).path])
    encoder = {
        name.removeprefix(PREFIX): tensor.load() for name, tensor in state.items() if name.startswith(PREFIX)
    }
    with _misfits_in_words(folder, model):
        model.transformer.prefix_encoder.load_state_dict(encoder)
    return model.eval(), tokenizer


@contextmanager
def _old_name_unsaid() -> Iterator[None]:
    """PEFT 0.21 asks transformers for a property under its old name, about which no user can do anything."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


@contextmanager
def _misfits_in_words(folder: Path, model: nn.Module) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch and PEFT list every tensor of another shape
        if "size mismatch" not in str(error):
            raise
        raise ValueError(
            f"{folder} was made for a model of other sizes than {model.config.name_or_path}; name the one it was made "
            "for."
        ) from None


def check_adapter(folder: Path) -> None:
    """Raises OSError if `folder` holds nothing that is put on a base."""
    if not any((folder / name).is_file() for name in (ADAPTER_CONFIG, PREFIX_FILE)):
        raise OSError(
            f"{folder} holds no adapter ({ADAPTER_CONFIG}) and no prefix ({PREFIX_FILE}); give the output of "
            "chatglm finetune --method lora or ptuning."
        )


def base_of(folder: Path) -> str:
    """The model that the settings of the run name, whichever command it was."""
    files = [folder / name for name in RUN_FILES.values() if (folder / name).is_file()]
    keys = yaml.safe_load(files[0].read_text(encoding="utf-8")) if files else None
    if not isinstance(keys, dict):
        raise OSError(f"{folder} does not tell its base (no {' or '.join(RUN_FILES.values())}); name it.")
    return keys.get("model", Settings.model)
