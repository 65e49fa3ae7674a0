"""`chatglm ask QUESTION`: one question, and nothing but its answer on the standard output."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import closing
from typing import Any

from chatglm.cli.backends import add_backend_options, open_backend
from chatglm.cli.conversation import Conversation
from chatglm.cli.terminal import is_terminal, open_screen, piped_text
from chatglm.find import MODEL_HELP

EPILOG = """
Examples:
  chatglm ask "What is the capital of France?"
  chatglm ask "Summarise this." < report.txt
  git diff | chatglm ask --url http://127.0.0.1:8000 "Write a commit message."
  chatglm ask --json "12+30=?"

docs/terminal.md tells more.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    question = "the question; text that is piped in stands under it, and - means that it is piped in alone"
    parser.add_argument("question", nargs="*", metavar="QUESTION", help=question)
    parser.add_argument("--model", help=f"{MODEL_HELP}; with --url, one that the server offers")
    add_backend_options(parser)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object: answer, finish_reason, usage, model"
    )
    parser.add_argument("--plain", action="store_true", help="show the answer as it is, also in a terminal")


def run(arguments: argparse.Namespace) -> None:
    question = read_question(" ".join(arguments.question))
    with closing(open_backend(arguments)) as backend:
        conversation = Conversation(backend)
        conversation.set_system(arguments.system)
        if arguments.json:
            print(json.dumps(answer_facts(conversation, question), ensure_ascii=False, indent=2), flush=True)
        else:
            open_screen(interactive=False, plain=arguments.plain).show(conversation.ask(question))


def read_question(words: str) -> str:
    """The words of the command line and under them what is piped in; ValueError where there is neither."""
    piped = piped_text() if words == "-" or not is_terminal(sys.stdin) else ""
    parts = [part for part in ("" if words == "-" else words, piped.strip("\n")) if part.strip()]
    if not parts:
        raise ValueError('There is no question; write it behind the command (chatglm ask "…") or pipe it in.')
    return "\n\n".join(parts)


def answer_facts(conversation: Conversation, question: str) -> dict[str, Any]:
    """The whole answer and what is known of it; None stands for what a server does not tell."""
    text = "".join(conversation.ask(question))
    answer = conversation.last_answer
    return {
        "answer": text,
        "finish_reason": answer.finish_reason,
        "usage": {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens},
        "model": conversation.backend.name,
    }
