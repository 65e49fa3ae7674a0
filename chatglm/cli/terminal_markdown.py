"""Markdown that grows: what is finished is printed for good, what is not is drawn again under it.

A text is a row of blocks: paragraphs, lists, tables, code. All but the last one stay as they are
however the text goes on. So only the last one is redrawn, at most a screen of it, and what has
scrolled away is never touched.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich import markdown
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.segment import Segment, Segments
from rich.syntax import Syntax
from rich.text import Text
from rich.theme import Theme

from chatglm.cli.terminal import printable

REDRAWS = 12  # a second, at most
PATIENCE = 10  # drawing waits so many times as long as it took: a model on the CPU needs the time more
# Only colours of the terminal's own palette and no backgrounds: they fit light and dark ones.
THEME = Theme(
    {
        "markdown.code": "cyan",
        "markdown.h1": "bold underline",
        "markdown.h2": "bold underline",
        "markdown.h3": "bold",
        "markdown.h4": "bold",
        "markdown.h5": "bold",
        "markdown.h6": "bold",
        "markdown.item.bullet": "bold",
        "markdown.item.number": "bold",
        "markdown.block_quote": "dim",
        "markdown.hr": "dim",
        "markdown.table.border": "dim",
        "markdown.table.header": "bold",
    }
)


def new_console() -> Console:
    return Console(theme=THEME, highlight=False, markup=False, emoji=False)


class MarkdownStream:
    """Shows Markdown while it is written piece by piece; leaving the `with` completes it.

    with MarkdownStream(console) as stream:
        stream.write("| a |\\n|---|\\n")
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.text = ""  # of the last block, which may still change
        self.nothing_printed = True
        self._split_after = 0.0
        self._drawn_text = ""
        self._drawn: Segments | Text = Text("…", style="dim")
        self._redraw_after = 0.0
        self.live = Live(
            get_renderable=self._draw,
            console=console,
            refresh_per_second=REDRAWS,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> MarkdownStream:
        self.live.start()
        return self

    def write(self, text: str) -> None:
        self.text += text
        started = time.monotonic()
        if "\n" in text and started >= self._split_after:
            self._print_finished()
            self._split_after = time.monotonic() + max(1 / REDRAWS, PATIENCE * (time.monotonic() - started))

    def __exit__(self, *exception: Any) -> None:
        self.live.stop()
        self._print(self.text)

    def _print_finished(self) -> None:
        *finished, last = split_blocks(self.text) or [""]
        if finished:
            self.text = last
            self.live.refresh()  # printing draws the last picture again under it: it must not have these blocks
            self._print("".join(finished))

    def _print(self, text: str) -> None:
        lines = self._under_what_is_printed(render(self.console, text))
        self.console.print(_segments(lines), end="")
        self.nothing_printed = self.nothing_printed and not lines

    def _under_what_is_printed(self, lines: list[list[Segment]]) -> list[list[Segment]]:
        return [[], *lines] if lines and not self.nothing_printed else lines

    def _draw(self) -> Segments | Text:
        """The end of the last block, as much as fits."""
        started, text = time.monotonic(), self.text
        if text and (started >= self._redraw_after or not text.startswith(self._drawn_text)):
            lines = self._under_what_is_printed(render(self.console, text))
            self._drawn_text = text
            self._drawn = _segments(lines[-max(1, self.console.height - 1) :])
            self._redraw_after = time.monotonic() + PATIENCE * (time.monotonic() - started)
        return self._drawn


def split_blocks(text: str) -> list[str]:
    """Cuts Markdown into its blocks; put together they are the text again.

    "Hello\\n\\n- a\\n- b\\n\\n```\\nx\\n\\ny\\n```\\n"  ->  "Hello\\n\\n", "- a\\n- b\\n\\n", "```\\nx\\n\\ny\\n```\\n"
    """
    starts = [token.map[0] for token in _parse(text) if token.level == 0 and token.nesting >= 0 and token.map]
    lines = re.split(r"(?<=\n)", text)
    ends = [*starts[1:], len(lines)]
    return (
        ["".join(lines[start:end]) for start, end in zip([0, *starts[1:]], ends, strict=True)]
        if starts
        else []
    )


def render(console: Console, text: str) -> list[list[Segment]]:
    """Lines of segments, as wide as the console: the blocks with one blank line between them."""
    lines: list[list[Segment]] = []
    for block in split_blocks(text):
        rendered = [_stripped(line) for line in console.render_lines(ChatMarkdown(block), pad=False)]
        while rendered and not rendered[0]:
            del rendered[0]
        while rendered and not rendered[-1]:
            del rendered[-1]
        lines += [[], *rendered] if lines else rendered
    return lines


def _stripped(line: list[Segment]) -> list[Segment]:
    """The line without blanks at its end."""
    # Markdown can spell characters ("&#27;", "%1B" in an address): printable() comes last.
    line = [Segment(printable(text), style) for text, style, control in line if not control]
    while line and not line[-1].text.rstrip():
        del line[-1]
    if line:
        text, style, _ = line[-1]
        line[-1] = Segment(text.rstrip(), style)
    return line


def _segments(lines: Sequence[list[Segment]]) -> Segments:
    return Segments([segment for line in lines for segment in [*line, Segment.line()]])


def _parse(text: str) -> list[Token]:
    """HTML and definitions of links are text like any other: nothing that a model writes disappears."""
    parser = MarkdownIt("commonmark", {"html": False})  # a new one: the thread that redraws parses too
    return parser.enable(["table", "strikethrough"]).disable("reference").parse(text)


class Heading(markdown.Heading):
    """At the left, as everything else."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        yield self.text


class Table(markdown.TableElement):
    """Narrow columns go on in the next line; nothing is cut off."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for table in super().__rich_console__(console, options):
            for column in table.columns:
                column.overflow = "fold"
            yield table


class CodeBlock(markdown.CodeBlock):
    """Between its fences and without a margin, so that it can be copied as it is."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        language = "" if self.lexer_name == "text" else self.lexer_name
        code = Syntax(
            str(self.text).rstrip(),
            self.lexer_name,
            theme=self.theme,
            background_color="default",
            word_wrap=True,
        )
        fence = Text("```", style="dim")
        yield Group(fence + Text(language, style="dim"), code, fence)


class ChatMarkdown(markdown.Markdown):
    """Markdown as a chat needs it: line breaks stay, addresses are seen, code can be copied."""

    elements = {
        **markdown.Markdown.elements,
        "heading_open": Heading,
        "fence": CodeBlock,
        "code_block": CodeBlock,
        "table_open": Table,
    }

    def __init__(self, text: str) -> None:
        super().__init__("", code_theme="ansi_dark", hyperlinks=False)
        self.parsed = _parse(text)
        for token in self.parsed:
            if token.children:
                token.children = _visible(token.children)


def _visible(tokens: list[Token]) -> list[Token]:
    """Inline tokens without the parts of Markdown that would hide something in a terminal."""
    visible: list[Token] = []
    links: list[tuple[int, str]] = []  # the links that are open: where their text begins, their address
    for token in tokens:
        if token.type == "softbreak":  # models end lines where they want them to end
            visible.append(Token("hardbreak", "br", 0))
        elif token.type == "image":
            visible.append(_text(f"![{token.content}]({token.attrs.get('src', '')})"))
        elif token.type == "link_open":
            links.append((len(visible), str(token.attrs.get("href", ""))))
        elif token.type == "link_close":
            start, address = links.pop()
            if address != "".join(shown.content for shown in visible[start:]):
                visible.append(_text(f" ({address})"))
        else:
            visible.append(token)
    return visible


def _text(content: str) -> Token:
    return Token("text", "", 0, content=content)
