"""Options that several commands have: which model, and how it is loaded; numbers; the settings of a training run."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatglm.find import MODEL_HELP

if TYPE_CHECKING:
    from chatglm.training.settings import Options


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """MODEL, --revision, --device, --dtype and --quantize, as `chatglm.load` takes them."""
    parser.add_argument("model", nargs="?", default="demo", help=MODEL_HELP)
    add_loading_options(parser)


def add_adapter_option(parser: argparse.ArgumentParser) -> None:
    """--adapter; the default of MODEL must be None then, see `named_model`."""
    parser.add_argument(
        "--adapter",
        type=Path,
        metavar="FOLDER",
        help="what chatglm finetune wrote: a LoRA adapter or a prefix (the model is then the one it was made for)",
    )


def named_model(arguments: argparse.Namespace) -> str:
    """The model that is named, or the one that the adapter was made for; without either, ours."""
    if not arguments.adapter:
        return "demo" if arguments.model is None else arguments.model
    from chatglm.training.methods import base_of, check_adapter

    check_adapter(arguments.adapter)
    return base_of(arguments.adapter) if arguments.model is None else arguments.model


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    """--revision, --device, --dtype and --quantize, as `chatglm.load` takes them."""
    add = parser.add_argument
    add("--revision", help="branch, tag or commit of a Hub name (default: main)")
    add(
        "--device",
        type=device,
        help="cpu, cuda, cuda:1, mps, or auto: all of them share the model (default: the first of cuda, mps, cpu)",
    )
    own = "the checkpoint's own; on a CPU float32, or bfloat16 from a billion parameters on"
    dtypes = ["float32", "float16", "bfloat16"]
    add("--dtype", choices=dtypes, help=f"what it computes in (default: {own})")
    add("--quantize", type=int, choices=[8, 4], help="pack the weights into so many bits")


def device(text: str) -> str:
    """One that `chatglm.load` takes; of unusual ones torch is asked, whose import takes seconds."""
    if text not in ("auto", "balanced", "cpu", "cuda", "mps"):
        from chatglm.loading import find_device

        try:
            find_device(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return text


def whole_number(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def seed(text: str) -> int:
    """One that transformers and every server take."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**32 - 1}")
    return int(text)


def temperature(text: str) -> float:
    if not 0 <= float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return float(text)


def share(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and at most 1")
    return float(text)


def add_run_options(
    parser: argparse.ArgumentParser,
    settings: type[Options],
    groups: Mapping[str, str],
    defaults: Mapping[str, str],
) -> None:
    """--config, --resume, --overwrite, and a flag for every field of `settings`.

    A field named in `groups` begins a group of flags; `defaults` tells those that are no constant.
    """
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML with the settings; flags win over it"
    )
    parser.add_argument("--resume", action="store_true", help="go on after the last checkpoint in the output")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier run wrote there")
    group: Any = parser
    for option in fields(settings):
        if option.name in groups:
            group = parser.add_argument_group(groups[option.name])
        _add_setting(group, settings, option, defaults.get(option.name, ""))


def _add_setting(group: Any, settings: type[Options], option: Any, default: str) -> None:
    """The flag of a field of `settings`; left out, it is absent from the namespace."""
    from chatglm.training.settings import kind_of

    kind, several, _ = kind_of(settings, option.name)
    name = f"--{option.name.replace('_', '-')}"
    help = option.metadata["help"]
    if not default and option.default not in (None, "", (), False, MISSING):
        default = str(option.default)
    if default:
        help += f" (default: {default})"
    more: dict[str, Any] = {"default": argparse.SUPPRESS, "help": help}
    if kind is bool:
        group.add_argument(name, action=argparse.BooleanOptionalAction, **more)
        return
    if option.name == "model":
        group.add_argument("model", nargs="?", **more)
        return
    if several:
        more |= {"nargs": "+", "metavar": "FILE" if kind is str and "data" in option.name else "NAME"}
    elif not option.metadata.get("choices"):
        more["metavar"] = {int: "N", float: "X", str: "NAME"}[kind]
    group.add_argument(name, type=kind, choices=option.metadata.get("choices"), **more)


def run_options(arguments: argparse.Namespace, settings: type[Options]) -> tuple[Any, bool, bool]:
    """(checked settings, resume, overwrite) of a command line; a run that is resumed brings its own."""
    from chatglm.training.settings import RUN_FILES, make_settings

    options = dict(vars(arguments))
    options.pop("run")
    config, resume, overwrite = (options.pop(name) for name in ("config", "resume", "overwrite"))
    flags = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    if resume and config is None and "output" in flags:
        config = Path(flags["output"]) / RUN_FILES[settings.command]
    return make_settings(config, flags, settings).check(), resume, overwrite
