"""`chatglm export SOURCE DEST`: a folder for the Hub; the work is in chatglm/tools/export.py."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from chatglm.find import MODEL_HELP

EPILOG = """
Examples:
  chatglm export chatglm2-6b-int4 my-model
  chatglm export chatglm2-6b-int4 --push me/my-model --private

--push takes the token of `hf auth login`, or HF_TOKEN; HF_ENDPOINT names another Hub.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("source", help=f"{MODEL_HELP.partition(' (default')[0]}, or one file of weights")
    parser.add_argument("dest", type=Path, nargs="?", help="folder to write; with --push it may be left out")
    parser.add_argument("--push", metavar="REPO_ID", help="upload the folder to this repository of the Hub")
    parser.add_argument("--private", action="store_true", help="make a new repository a private one")
    parser.add_argument(
        "--license", help="the Hub's name for the licence of the weights (default: other, see MODEL_LICENSE)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub name (default: main)")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint that is in DEST")
    parser.set_defaults(error=parser.error)


def run(arguments: argparse.Namespace) -> None:
    if not (arguments.dest or arguments.push):
        arguments.error("give a folder DEST, or --push REPO_ID, or both")
    if arguments.dest:
        _export(arguments, arguments.dest)
        return
    with tempfile.TemporaryDirectory(prefix="chatglm-export-") as folder:
        _export(arguments, Path(folder, arguments.push.rpartition("/")[2]))


def _export(arguments: argparse.Namespace, dest: Path) -> None:
    from chatglm.tools.export import export, push

    export(
        arguments.source,
        dest,
        license=arguments.license,
        overwrite=arguments.overwrite,
        revision=arguments.revision,
        name=arguments.push,
    )
    print(f"{dest}: loads with AutoModel.from_pretrained(..., trust_remote_code=True)")
    if arguments.push:
        print(f"Uploaded to {push(dest, arguments.push, private=arguments.private)}")
