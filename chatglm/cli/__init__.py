"""The `chatglm` command: one module for each subcommand, imported when it is called.

A module offers `add_arguments(parser)` and `run(arguments)`, which may return an exit status; what takes
long to import is imported inside `run`, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from chatglm import __version__
from chatglm.cli.errors import EXPECTED, in_words

COMMANDS = {
    "ask": "answer one question, for scripts and pipes",
    "bench": "measure how fast a model is on this machine, and the memory it needs",
    "chat": "talk with a model in the terminal",
    "convert": "write a checkpoint in another form: safetensors, another dtype, packed, adapters merged",
    "dpo": "teach a model which of two answers is better, by DPO",
    "download": "fetch a model from the Hub to its cache or to a folder",
    "evaluate": "measure how good a model is: C-Eval, MMLU, GSM8K, BBH, own questions, the cost of packing",
    "export": "write a folder for the Hub that loads anywhere, with a model card",
    "finetune": "teach a model from data: LoRA, P-Tuning v2, all weights or the last layers",
    "info": "tell what a model is and the memory it needs, without loading it",
    "rl": "teach a model to answer as a reward model likes: GRPO, RLOO",
    "serve": "serve a model: OpenAI's API, the published one, and a chat page",
    "train-reward": "train a reward model on pairs of a better and a worse answer",
    "verify": "check that a checkpoint is whole and sound, down to every number",
    "web": "talk with a model in the browser",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; returns the exit status."""
    try:
        try:
            return _run(sys.argv[1:] if argv is None else list(argv))
        finally:
            if sys.stdout is not None:  # closed by the shell: >&-
                sys.stdout.flush()  # here, where a reader that has left can be met
    except BrokenPipeError:
        # A reader that has seen enough, such as `head -1`, ends the program without a word. Python flushes both
        # streams once more at its end, which must not fail again.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in filter(None, (sys.stdout, sys.stderr)):
            os.dup2(nowhere, stream.fileno())
        return 128 + 13  # what shells report of a program that SIGPIPE ended


def _run(argv: Sequence[str]) -> int:
    try:
        arguments = _parser(argv).parse_args(argv)
        return arguments.run(arguments) or 0
    except BrokenPipeError:
        raise
    except EXPECTED as error:
        print(f"chatglm: {in_words(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("chatglm", description="ChatGLM on your own machine.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        description = summary[0].upper() + summary[1:] + "."
        command = commands.add_parser(name, help=summary, description=description)
        if name in argv[:1]:
            module = importlib.import_module(f"chatglm.cli.{name.replace('-', '_')}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser
