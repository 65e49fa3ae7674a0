"""Options that several commands have: which model, and how it is loaded."""

from __future__ import annotations

import argparse

from chatglm.find import MODEL_HELP


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """MODEL, --revision, --device, --dtype and --quantize, as `chatglm.load` takes them."""
    add = parser.add_argument
    add("model", nargs="?", default="demo", help=MODEL_HELP)
    add("--revision", help="branch, tag or commit of a Hub name (default: main)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: the first there is of cuda, mps, cpu)")
    own = "the checkpoint's own; on a CPU float32, or bfloat16 from a billion parameters on"
    dtypes = ["float32", "float16", "bfloat16"]
    add("--dtype", choices=dtypes, help=f"what it computes in (default: {own})")
    add("--quantize", type=int, choices=[8, 4], help="pack the weights into so many bits")
