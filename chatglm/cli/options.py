"""Options that several commands have: which model, and how it is loaded; and what numbers they take."""

from __future__ import annotations

import argparse

from chatglm.find import MODEL_HELP


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """MODEL, --revision, --device, --dtype and --quantize, as `chatglm.load` takes them."""
    parser.add_argument("model", nargs="?", default="demo", help=MODEL_HELP)
    add_loading_options(parser)


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    """--revision, --device, --dtype and --quantize, as `chatglm.load` takes them."""
    add = parser.add_argument
    add("--revision", help="branch, tag or commit of a Hub name (default: main)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: the first there is of cuda, mps, cpu)")
    own = "the checkpoint's own; on a CPU float32, or bfloat16 from a billion parameters on"
    dtypes = ["float32", "float16", "bfloat16"]
    add("--dtype", choices=dtypes, help=f"what it computes in (default: {own})")
    add("--quantize", type=int, choices=[8, 4], help="pack the weights into so many bits")


def whole_number(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def temperature(text: str) -> float:
    if not 0 <= float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return float(text)


def share(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and at most 1")
    return float(text)
