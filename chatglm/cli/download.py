"""`chatglm download MODEL`: a checkpoint from the Hub to the cache or to a folder."""

from __future__ import annotations

import argparse

from chatglm.find import as_typed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help="a name on the Hub, owner/model, for instance zai-org/chatglm2-6b")
    add("--to", metavar="FOLDER", help="put the files there (default: the cache of the Hub, see HF_HOME)")
    add("--revision", help="branch, tag or commit (default: main)")
    add(
        "--mirror",
        metavar="URL",
        help="fetch from this address, which is told the token (default: HF_ENDPOINT)",
    )
    own = "better, as other users of the machine may see this line: HF_TOKEN or `hf auth login`"
    add("--token", help=f"access token for a private or gated model ({own})")
    more = "fetch such files too, for instance 'MODEL_LICENSE' or '*.md'; never Python files"
    add("--include", metavar="PATTERN", action="append", default=[], help=f"{more} (may be repeated)")


def run(arguments: argparse.Namespace) -> None:
    from chatglm.tools.download import download

    folder = download(
        arguments.model,
        revision=arguments.revision,
        folder=arguments.to,
        mirror=arguments.mirror,
        token=arguments.token,
        include=arguments.include,
    )
    print(f"{arguments.model} is in {folder}. To talk with it:")
    print(f"chatglm chat {as_typed(folder)}")
