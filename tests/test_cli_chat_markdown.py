"""Markdown in the terminal: drawn as it grows, complete in the end, and never in command of the terminal."""

from __future__ import annotations

import io
import os
import random
import re
import subprocess
import sys
import threading
import unicodedata
from pathlib import Path

import pytest
import stub_server
from rich.console import Console

from chatglm.cli.terminal import MarkdownScreen
from chatglm.cli.terminal_markdown import THEME, MarkdownStream, render, split_blocks

ROOT = Path(__file__).resolve().parents[1]
# What Live writes besides text: colours, cursor to the column or lines up, erase a line, cursor shown or not.
HARMLESS = re.compile(r"\x1b\[[0-9;]*m|\x1b\[\d*A|\x1b\[2K|\x1b\[\?25[lh]|\r")

DOCUMENT = """\
# 标题

Hello **bold** `code`
second line

- one
- two
  1. inner

```python
x = [1]

print(x)
```

| a | 算法 |
|---|---:|
| 1 | 快速 |

> quoted

Bye 🎉
"""

SHOWN = """\
标题

Hello bold code
second line

 • one
 • two
    1 inner

```python
x = [1]

print(x)
```

 a  算法
 ───────
 1  快速

▌ quoted

Bye 🎉
"""


def console(width: int = 40, height: int = 12) -> Console:
    # A file that is no terminal, but is written to as if it were one.
    return Console(
        file=io.StringIO(), force_terminal=True, width=width, height=height, theme=THEME, _environ={}
    )


def shown(text: str, width: int = 40) -> str:
    lines = render(console(width), text)
    return "".join("".join(segment.text for segment in line) + "\n" for line in lines)


def written(pieces: list[str], width: int = 40, height: int = 12) -> str:
    """All that goes to the terminal while the pieces are shown, each of them drawn."""
    target = console(width, height)
    with MarkdownStream(target) as stream:
        for piece in pieces:
            stream.write(piece)
            stream.live.refresh()
    return target.file.getvalue()


def screen(output: str, height: int) -> str:
    """What a terminal shows after `output`, with all that scrolled away above it; it cannot go up into that."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", output):
        if part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif part == "\r":
            column = 0
        elif part.endswith("A") and part[0] == "\x1b":
            row = max(row - int(part[2:-1] or 1), len(lines) - height)
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part[0] != "\x1b":
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return "".join(f"{line.rstrip()}\n" for line in lines)


def test_every_kind_of_block_is_shown_as_it_should():
    assert screen(written([DOCUMENT]), 12).strip("\n") == SHOWN.strip("\n")


@pytest.mark.parametrize("height", [5, 12, 50])
@pytest.mark.parametrize("seed", range(3))
def test_what_grows_in_pieces_looks_in_the_end_as_if_it_had_come_at_once(
    seed: int, height: int, monkeypatch: pytest.MonkeyPatch
):
    """Also where a block is higher than the screen."""
    monkeypatch.setattr("chatglm.cli.terminal_markdown.PATIENCE", 0)
    choose = random.Random(seed)
    text, pieces = DOCUMENT * 2, []
    while text:
        length = choose.randint(1, 9)
        pieces.append(text[:length])
        text = text[length:]
    output = written(pieces, height=height)
    assert output.count("\x1b[2K") > 100  # lines that were drawn again
    assert "\x1b[2J" not in output
    assert screen(output, height).strip("\n") == f"{SHOWN}\n{SHOWN}".strip("\n")


def test_blocks_put_together_are_the_text():
    blocks = split_blocks(DOCUMENT)
    assert "".join(blocks) == DOCUMENT
    assert [block.split("\n")[0] for block in blocks][:5] == [
        "# 标题",
        "Hello **bold** `code`",
        "- one",
        "```python",
        "| a | 算法 |",
    ]
    assert split_blocks("") == split_blocks(" \n\n") == []


def test_an_interrupted_answer_is_complete_on_the_screen():
    target = console()

    def pieces():
        yield "one\n\ntw"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        MarkdownScreen(target, interactive=True).show(pieces())
    assert screen(target.file.getvalue(), 12).strip("\n") == "ChatGLM:\none\n\ntw"


@pytest.mark.parametrize(
    "text",
    [
        "\x1b[31mred",
        "\x9b31mred",
        "&#27;[31m &#x9b;31m",
        "<http://x/%1b[2J>",
        "[\x1b]8;;http://x\x07](http://y/%1b)",
        "![\x1b[2J](http://%1b[2J 'a\x1b[2Jb')",
        "```\x1b[2J\n\x1b[2J\n```",
        "```&#27;[2J\nx\n```",
        "| \x1b[2J |\n|---|\n| &#155;2J |",
        "a\rb\x08c\x7fd",
    ],
    ids=repr,
)
def test_a_model_cannot_steer_the_terminal(text: str):
    target = console()
    MarkdownScreen(target, interactive=False).show(iter([text]))
    rest = HARMLESS.sub("", target.file.getvalue())
    assert [char for char in rest if unicodedata.category(char) == "Cc" and char != "\n"] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<script>alert(1)</script> List<String>", "<script>alert(1)</script> List<String>\n"),
        ("<div>\nx\n</div>", "<div>\nx\n</div>\n"),
        ("[here](http://a.example)", "here (http://a.example)\n"),
        ("[**he**re](http://a.example) on", "here (http://a.example) on\n"),
        ("<http://a.example>", "http://a.example\n"),
        ("![a picture](http://a.example/b.png)", "![a picture](http://a.example/b.png)\n"),
        ("[1]: http://a.example", "[1]: http://a.example\n"),
        ("[bold]not a colour[/bold] :smile:", "[bold]not a colour[/bold] :smile:\n"),
        ("一\n二", "一\n二\n"),
        ("```\n    deep\n```", "```\n    deep\n```\n"),
    ],
    ids=repr,
)
def test_nothing_that_is_written_disappears(text: str, expected: str):
    assert shown(text) == expected


def test_a_narrow_terminal_cuts_nothing_off():
    text = (
        "| 算法名称 | x |\n|---|---|\n| 快速排序算法 | abcdefghij |\n\n超长的中文句子没有空格\n\n`"
        + "y" * 30
        + "`"
    )
    letters = re.sub(r"[\s─]", "", shown(text, width=12))
    assert all(
        letters.count(char) == text.count(char) for char in "算法名称快速排序超长的中文句子没有空格defghijy"
    )
    assert max(len(line) for line in shown(text, width=12).splitlines()) <= 12


# ---- the whole program at a terminal


def at_a_terminal(*arguments: str, **environment: str) -> str:
    """Runs `chatglm chat` with a stub server at a terminal of its own; returns all that was written to it."""
    pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")
    terminal, child = pty.openpty()
    settings = {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT), "PROMPT_TOOLKIT_NO_CPR": "1"}
    inherited = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    with stub_server.stub_server() as stub:
        stub.reply = stub_server.stream("**Hello**\n", "\n```python\n", "print(1)\n```\n")
        process = subprocess.Popen(
            [sys.executable, "-m", "chatglm", "chat", "--url", stub.url, *arguments],
            stdin=child,
            stdout=child,
            stderr=child,
            env=inherited | settings | environment,
            start_new_session=True,
        )
        os.close(child)
        alarm = threading.Timer(60, process.kill)  # so that a program that hangs fails the test
        alarm.start()
        output = b""
        try:
            while data := os.read(terminal, 65536):
                if b"You:" in data and b"You:" not in output:
                    os.write(terminal, b"hi\rstop\r")
                output += data
        except OSError:  # what Linux says when the program has ended
            pass
        finally:
            alarm.cancel()
            os.close(terminal)
        assert process.wait() == 0
    return output.decode()


def test_at_a_terminal_answers_are_markdown_in_colours():
    output = at_a_terminal()
    assert "\x1b[1mHello" in output
    assert "**" not in output
    assert re.search(r"\x1b\[\S*3[0-9;]*mprint|\x1b\[\S*9[0-9;]*mprint", output)


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [(["--plain"], {}), ([], {"NO_COLOR": "1"}), ([], {"TERM": "dumb"})],
    ids=["--plain", "NO_COLOR", "TERM=dumb"],
)
def test_who_wants_plain_text_gets_it(arguments: list[str], environment: dict[str, str]):
    output = at_a_terminal(*arguments, **environment)
    assert "ChatGLM: **Hello**\r\n\r\n```python\r\nprint(1)\r\n```\r\n" in output
