"""`chatglm chat [MODEL]`: a conversation in the terminal, with a model that is loaded here or served elsewhere."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from pathlib import Path

from chatglm.cli.backends import add_backend_options, open_backend
from chatglm.cli.conversation import Conversation
from chatglm.cli.errors import EXPECTED, in_words
from chatglm.cli.terminal import Screen, is_terminal, open_screen, piped_messages, typed_messages
from chatglm.find import MODEL_HELP

BANNER = "/help lists the commands; Ctrl-C stops an answer, stop or Ctrl-D leaves."
HELP = """\
clear, /clear  forget what was said
stop, /stop    leave, as Ctrl-D does; Ctrl-C stops an answer
/retry         another answer to the last question
/system TEXT   set the system prompt; /system shows it, /system - removes it
/save FILE     write the conversation as JSON; /save! FILE overwrites a file
/load FILE     go on with a conversation that was saved
//TEXT         send /TEXT to the model
Alt-Enter types a line break; pasted text of several lines is one message."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help=f"{MODEL_HELP}; with --url, one that the server offers")
    add_backend_options(parser)
    parser.add_argument(
        "--plain", action="store_true", help="show answers as they are, without Markdown or colours"
    )


def run(arguments: argparse.Namespace) -> None:
    interactive = is_terminal(sys.stdin)
    screen = open_screen(interactive, plain=arguments.plain or not interactive)
    if interactive and not arguments.url:
        screen.tell(f"Loading {arguments.model or 'demo'} ...")
    with closing(open_backend(arguments)) as backend:
        conversation = Conversation(backend)
        conversation.set_system(arguments.system)
        if interactive:
            screen.tell(f"{backend.description}.\n{BANNER}")
            converse(conversation, typed_messages(COMPLETIONS), screen, keep_going=True)
        else:
            converse(conversation, piped_messages(), screen)


def converse(
    conversation: Conversation, messages: Iterable[str], screen: Screen, keep_going: bool = False
) -> None:
    """Answers one message after another, or does what it commands, until `stop` or the last one.

    With `keep_going`, as people want it, Ctrl-C stops an answer alone, and what goes wrong is told.
    """
    for message in messages:
        if message.strip() in ("stop", "/stop"):
            return
        try:
            take(conversation, message, screen)
        except KeyboardInterrupt:
            if not keep_going:
                raise
        except EXPECTED as error:
            if not keep_going or isinstance(error, BrokenPipeError):
                raise
            screen.tell(in_words(error))


def take(conversation: Conversation, message: str, screen: Screen) -> None:
    """Does what one message asks for: a command, or an answer of the model."""
    text = message.strip()
    if text in ("clear", "/clear"):
        conversation.clear()
        screen.clear()
    elif text.startswith("//"):
        reply(conversation, conversation.ask(text[1:]), screen)
    elif text.startswith("/"):
        name, *rest = text.split(maxsplit=1)
        if name not in COMMANDS:
            raise ValueError(
                f"There is no command {name}; /help lists them, and /{name} sends it as a message."
            )
        COMMANDS[name](conversation, "".join(rest), screen)
    elif text:
        reply(conversation, conversation.ask(message), screen)


def reply(conversation: Conversation, pieces: Generator[str, None, None], screen: Screen) -> None:
    """Shows one answer, and says so where the model did not read the oldest rounds."""
    with closing(pieces):  # Ctrl-C while something is printed stops the model too, at once
        screen.show(pieces)
    left_out = conversation.last_answer.left_out
    if left_out:
        rounds = f"{left_out} rounds" if left_out > 1 else "round"
        screen.tell(f"(To make room, the model no longer reads the oldest {rounds}.)")


# ---- commands: what follows the name is one argument


def _retry(conversation: Conversation, argument: str, screen: Screen) -> None:
    reply(conversation, conversation.retry(), screen)


def _system(conversation: Conversation, argument: str, screen: Screen) -> None:
    if argument:
        conversation.set_system("" if argument == "-" else argument)
    screen.tell(
        f"System prompt: {conversation.system}" if conversation.system else "There is no system prompt."
    )


def _save(conversation: Conversation, argument: str, screen: Screen, overwrite: bool = False) -> None:
    file = _file(argument, "/save")
    conversation.save(file, overwrite)
    screen.tell(f"Saved {_count(conversation)} to {file}.")


def _save_over(conversation: Conversation, argument: str, screen: Screen) -> None:
    _save(conversation, argument, screen, overwrite=True)


def _load(conversation: Conversation, argument: str, screen: Screen) -> None:
    conversation.load(_file(argument, "/load"))
    system = ", with a system prompt" if conversation.system else ""
    screen.tell(f"Loaded {_count(conversation)}{system}.")


def _help(conversation: Conversation, argument: str, screen: Screen) -> None:
    screen.tell(HELP)


def _file(argument: str, command: str) -> Path:
    if not argument:
        raise ValueError(f"{command} needs the name of a file.")
    return Path(argument).expanduser()


def _count(conversation: Conversation) -> str:
    number = len(conversation.messages)
    return f"{number} messages" if number > 1 else "1 message"


COMMANDS: dict[str, Callable[[Conversation, str, Screen], None]] = {
    "/retry": _retry,
    "/system": _system,
    "/save": _save,
    "/save!": _save_over,
    "/load": _load,
    "/help": _help,
}
COMPLETIONS = ["/clear", "/stop", *COMMANDS]
