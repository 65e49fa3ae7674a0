"""`chatglm convert SOURCE DEST`: a checkpoint in another form; the work is in chatglm/tools/convert.py."""

from __future__ import annotations

import argparse
from pathlib import Path

from chatglm.find import MODEL_HELP, as_typed

EPILOG = """
Examples:
  chatglm convert THUDM/chatglm2-6b chatglm2-6b-int4 --quantize 4
  chatglm convert chatglm-6b-v0.1 chatglm-6b-slim --slim --dtype bfloat16
  chatglm convert chatglm2-6b mine --merge-adapter lora-out --quantize 8
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("source", help=f"{MODEL_HELP.partition(' (default')[0]}, or one file of weights")
    parser.add_argument("dest", type=Path, help="folder to write; it appears complete or not at all")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub name (default: main)")
    parser.add_argument(
        "--dtype",
        choices=["float16", "bfloat16", "float32"],
        help="of all weights that are not packed (default: as they are)",
    )
    parser.add_argument(
        "--merge-adapter", type=Path, metavar="FOLDER", help="add a LoRA adapter to the weights"
    )
    parser.add_argument(
        "--prefix", type=Path, metavar="FOLDER", help="take along a prefix trained with P-Tuning v2"
    )
    parser.add_argument(
        "--slim", action="store_true", help="drop the 20000 image rows of the first ChatGLM-6B"
    )
    parser.add_argument(
        "--slim-to",
        type=Path,
        nargs="+",
        default=[],
        metavar="CORPUS",
        help="keep only the pieces of the vocabulary that these text files or folders need",
    )
    parser.add_argument(
        "--quantize", type=int, choices=[8, 4], help="pack the linear layers into so many bits"
    )
    parser.add_argument(
        "--group-size",
        type=int,
        choices=[32, 64, 128],
        help="with --quantize 4: columns that share a scale; better, but the published code cannot read it",
    )
    parser.add_argument(
        "--quantize-embeddings", action="store_true", help="pack embedding and output layer too"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint that is in DEST")


def run(arguments: argparse.Namespace) -> None:
    from chatglm.checkpoint import readable
    from chatglm.tools.convert import convert
    from chatglm.weights.write import total_bytes

    options = dict(vars(arguments))
    options.pop("run")
    parts = convert(**options)
    files = len(list(arguments.dest.glob("*.safetensors")))
    for step in parts.history:
        print(step)
    size = readable(total_bytes(parts.state))
    print(f"{arguments.dest}: {size} of weights in {files} file{'s' * (files > 1)}")
    print(f"Next: chatglm chat {as_typed(arguments.dest)}")
