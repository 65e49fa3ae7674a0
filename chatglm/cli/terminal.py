"""The terminal: what is typed or piped comes in as messages, answers go out as they are generated."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, TextIO

from chatglm.cli.conversation import LARGEST_MESSAGE

if TYPE_CHECKING:
    from rich.console import Console

CLEAR_SCREEN = "\033[H\033[2J\033[3J"  # cursor to the top, screen and what scrolled off it
# A model must not steer the terminal: no control characters but tab and newline, neither the old
# ones (escape, bell, ...) nor those from 0x7f on (delete, and a second escape).
UNPRINTABLE = dict.fromkeys({*range(32), *range(0x7F, 0xA0)} - {9, 10})
NAME = "ChatGLM:"


def printable(text: str) -> str:
    """The text without characters that would steer the terminal."""
    return text.translate(UNPRINTABLE)


class Screen(Protocol):
    """Where answers and sentences are shown."""

    def show(self, pieces: Iterable[str]) -> None:
        """Shows an answer as it comes; whatever ends it, its text is then complete on the screen."""

    def tell(self, sentence: str) -> None:
        """Shows what is not the model's: what a command did, or why it did not."""

    def clear(self) -> None: ...


def open_screen(interactive: bool, plain: bool) -> Screen:
    """The screen that fits: Markdown for a person at a terminal that can show it, else the text as it is."""
    if plain or not can_show_markdown():
        return PlainScreen(interactive)
    from chatglm.cli.terminal_markdown import new_console

    return MarkdownScreen(new_console(), interactive)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person sits there; a standard stream that the shell closed is None."""
    return stream is not None and stream.isatty()


def can_show_markdown() -> bool:
    """Whether the output is a terminal with colours that does not ask for none (no-color.org)."""
    dumb = os.environ.get("TERM", "") in ("dumb", "unknown")
    return is_terminal(sys.stdout) and not dumb and not os.environ.get("NO_COLOR")


class PlainScreen:
    """Text alone, for pipes and simple terminals."""

    def __init__(self, interactive: bool) -> None:
        self.interactive = interactive

    def show(self, pieces: Iterable[str]) -> None:
        print(f"{NAME} " if self.interactive else "", end="", flush=True)
        begun = self.interactive
        try:
            for text in pieces:
                begun = begun or text != ""
                print(printable(text), end="", flush=True)
            begun = True  # an empty answer is a line too
        finally:
            if begun:
                print(flush=True)

    def tell(self, sentence: str) -> None:
        """In a pipe answers stay alone: sentences go to the errors."""
        print(printable(sentence), file=sys.stdout if self.interactive else sys.stderr, flush=True)

    def clear(self) -> None:
        if is_terminal(sys.stdout):
            print(CLEAR_SCREEN, end="", flush=True)


class MarkdownScreen:
    """Markdown with its headings, lists, tables and coloured code."""

    def __init__(self, console: Console, interactive: bool) -> None:
        self.console = console
        self.interactive = interactive

    def show(self, pieces: Iterable[str]) -> None:
        from chatglm.cli.terminal_markdown import MarkdownStream

        if self.interactive:
            self.console.print(NAME, style="bold")
        with MarkdownStream(self.console) as stream:
            for text in pieces:
                stream.write(printable(text))

    def tell(self, sentence: str) -> None:
        self.console.print(printable(sentence), style="dim", markup=False, highlight=False)

    def clear(self) -> None:
        print(CLEAR_SCREEN, end="", flush=True)


def typed_messages(commands: Sequence[str] = ()) -> Iterator[str]:
    """Asks for one message after another until Ctrl-D; Ctrl-C drops the line, Tab completes `commands`.

    Pasted text stays one message however many lines it has; Alt-Enter types a line break. What was
    typed can be called back with the arrow keys, and is nowhere on the disk.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.shortcuts import CompleteStyle

    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    session: PromptSession[str] = PromptSession(
        key_bindings=keys,
        completer=WordCompleter(list(commands), sentence=True),
        complete_style=CompleteStyle.READLINE_LIKE,
        complete_while_typing=False,
        reserve_space_for_menu=0,
    )
    while True:
        try:
            # Ctrl-C is a key here; prompt_toolkit's handler of the signal fails where one comes just after Enter.
            yield session.prompt("\nYou: ", handle_sigint=False)
        except KeyboardInterrupt:
            continue
        except EOFError:
            return


def piped_messages() -> Iterator[str]:
    """Yields the lines of the standard input, none of them read further than a message may be long."""
    while line := _read("readline"):
        yield line.rstrip("\n")


def piped_text() -> str:
    """Returns all of the standard input, no more of it than a message may be long."""
    return _read("read")


def _read(method: str) -> str:
    if sys.stdin is None:  # closed by the shell: <&-
        return ""
    try:
        text = getattr(sys.stdin, method)(LARGEST_MESSAGE + 1)
    except UnicodeDecodeError as error:
        raise ValueError(f"The standard input is not {error.encoding}; convert it with iconv.") from None
    if len(text) > LARGEST_MESSAGE:
        raise ValueError(
            f"The standard input has more than {LARGEST_MESSAGE:,} characters in one message; no model reads so much."
        )
    return text
