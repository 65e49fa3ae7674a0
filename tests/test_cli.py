"""The command line: what it prints, what it takes, and that mistakes end in one sentence."""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import chatglm
import chatglm.loading
from chatglm.cli import main
from chatglm.cli.chat import UNPRINTABLE, Chat, add_arguments, converse, reply, typed_messages
from chatglm.hub.tokenization_chatglm import CHAT_DEFAULTS


@pytest.mark.parametrize("arguments", [["--help"], ["chat", "--help"], ["info", "--help"], ["--version"]])
@pytest.mark.parametrize(
    "start",
    [["-m", "chatglm"], ["-c", "import sys; sys.argv[0] = 'chatglm'; from chatglm.cli import main; main()"]],
    ids=["python -m chatglm", "chatglm"],
)
def test_help_and_version_do_without_torch(start: list[str], arguments: list[str]):
    path = str(Path(__file__).resolve().parents[1])
    result = subprocess.run(
        [sys.executable, "-X", "importtime", *start, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert result.returncode == 0
    assert "chatglm" in result.stdout
    assert "chatglm.cli" in imported
    assert not imported & {"torch", "transformers"}


@pytest.mark.parametrize(
    ("argv", "orig_argv", "is_command"),
    [
        (["/usr/bin/chatglm", "chat"], ["python", "/usr/bin/chatglm", "chat"], True),
        (["chatglm.exe"], ["python", "chatglm.exe"], True),
        (["-m", "--help"], ["python", "-I", "-m", "chatglm", "--help"], True),
        (["-m"], ["python", "-mchatglm"], True),
        (["-m", "chatglm"], ["python", "-m", "app", "chatglm"], False),
        (["-c"], ["python", "-c", "import chatglm"], False),
        (["app.py", "chatglm"], ["python", "app.py", "chatglm"], False),
        ([""], ["python"], False),
        ([], [], False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_every_program_but_the_command_registers_the_classes(
    argv: list[str], orig_argv: list[str], is_command: bool
):
    assert chatglm._is_command(argv, orig_argv) == is_command


def test_the_commands_and_their_purpose_stand_in_the_help(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "talk with a model" in out
    assert "the memory it needs" in out


@pytest.mark.parametrize("arguments", [["chat", "nothing"], ["info", "nothing"]], ids=["chat", "info"])
def test_a_name_that_is_nothing_ends_in_one_sentence(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
):
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("chatglm: There is no folder 'nothing'")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "option",
    [
        ["--temperature", "-1"],
        ["--temperature", "nan"],
        ["--top-p", "0"],
        ["--top-p", "1.5"],
        ["--max-length", "0"],
        ["--max-length", "much"],
        ["--quantize", "5"],
        ["--dtype", "int8"],
    ],
    ids=" ".join,
)
def test_a_value_out_of_range_is_refused_by_name(option: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main(["chat", *option])
    assert caught.value.code == 2
    assert option[0] in capsys.readouterr().err


def test_the_help_of_chat_tells_the_published_defaults(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["chat", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    first, second = CHAT_DEFAULTS["chatglm"], CHAT_DEFAULTS["chatglm2"]
    for name in ("max_length", "temperature", "top_p"):
        assert f"{first[name]} for ChatGLM-6B, {second[name]} for ChatGLM2-6B" in text


def test_every_option_of_chat_is_parsed():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    line = "folder --device cpu --dtype bfloat16 --quantize 4 --max-length 99 --temperature 0"
    arguments = parser.parse_args([*line.split(), "--top-p", "0.5", "--seed", "7"])
    assert vars(arguments) == {
        "model": "folder",
        "revision": None,
        "device": "cpu",
        "dtype": "bfloat16",
        "quantize": 4,
        "max_length": 99,
        "temperature": 0.0,
        "top_p": 0.5,
        "seed": 7,
    }


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the command with text piped into it; returns the exit status, output and errors."""

    def run(text: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        capsys.readouterr()
        status = main(arguments)
        return status, *capsys.readouterr()

    return run


def test_piped_lines_are_answered_one_by_one_as_chat_answers_them(tiny_folder: Path, pipe):
    model, tokenizer = chatglm.load(tiny_folder, device="cpu")
    settings = {"max_length": 150, "temperature": 0.0}
    first, second = (model.chat(tokenizer, query, **settings)[0] for query in ("你好", "Hello"))
    expected = f"{first}\n{second}\n".translate(UNPRINTABLE)
    options = ["--device", "cpu", "--max-length", "150", "--temperature", "0"]
    assert pipe("你好\nclear\nHello\nstop\nmore\n", "chat", str(tiny_folder), *options) == (0, expected, "")


def test_the_same_seed_gives_the_same_answers(tiny_v2_folder: Path, pipe):
    options = ["chat", str(tiny_v2_folder), "--device", "cpu", "--max-length", "60", "--seed"]
    first, again = (pipe("你好\n", *options, "3") for _ in range(2))
    assert first == again
    assert first != pipe("你好\n", *options, "4")


def test_a_model_of_ours_gives_its_likeliest_answer(pipe):
    model, tokenizer = chatglm.load("demo", device="cpu")
    expected, _ = model.chat(tokenizer, "你好", do_sample=False)
    assert pipe("你好\n", "chat", "--device", "cpu") == (0, f"{expected}\n", "")


def test_a_prompt_without_room_ends_in_one_sentence(tiny_v2_folder: Path, pipe):
    status, _, error = pipe("你好\n", "chat", str(tiny_v2_folder), "--max-length", "5")
    assert status == 1
    assert "max_length is 5" in error
    assert error.count("\n") == 1


def test_memory_that_is_used_up_ends_in_one_sentence(
    tiny_v2_folder: Path, pipe, monkeypatch: pytest.MonkeyPatch
):
    import torch

    def exhausted(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(chatglm.loading, "load", exhausted)
    status, _, error = pipe("你好\n", "chat", str(tiny_v2_folder))
    assert status == 1
    assert "try --quantize 4" in error
    assert error.count("\n") == 1


# ---- a conversation, with a model that answers by rule


class Config:
    family = "chatglm2"
    max_position_embeddings = 100


class Echo:
    """Answers a query with itself, one character a step; its stream_chat is the real one's shape."""

    config = Config()

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.interrupt_at = interrupt_at
        self.calls: list[dict] = []

    def stream_chat(self, tokenizer, query: str, history: list, **options) -> Iterator[tuple]:
        self.calls.append(options | {"history": list(history)})
        for end in range(1, len(query) + 1):
            if end == self.interrupt_at:
                raise KeyboardInterrupt
            yield query[:end], [*history, (query, query[:end])]


class Letters:
    """A tokenizer with a token for every letter of the conversation."""

    def encode_chat(self, query: str, history: list) -> list[int]:
        return [0] * len("".join(part for said in history for part in said) + query)


def chat_with(model: Echo, **options) -> Chat:
    return Chat(model, Letters(), **options)  # type: ignore[arg-type]


def test_an_answer_is_printed_once_and_joins_the_history(capsys: pytest.CaptureFixture[str]):
    chat = chat_with(Echo())
    reply(chat, "你好", prefix="ChatGLM: ")
    assert capsys.readouterr().out == "ChatGLM: 你好\n"
    assert chat.history == [("你好", "你好")]


def test_options_reach_the_model_as_they_are():
    model = Echo()
    chat = chat_with(model, max_length=50, temperature=0.0, top_p=0.5)
    reply(chat, "hi")
    assert model.calls[0] == {
        "history": [],
        "max_length": 50,
        "prompt_cache": chat.prompt_cache,
        "temperature": 0.0,
        "top_p": 0.5,
    }


def test_by_default_the_context_of_a_small_model_bounds_the_length():
    assert chat_with(Echo()).max_length == 100


def test_ctrl_c_ends_the_answer_and_keeps_what_was_said(capsys: pytest.CaptureFixture[str]):
    chat = chat_with(Echo(interrupt_at=4))
    converse(chat, ["abcdef", "xy"])
    assert capsys.readouterr().out == "abc\nxy\n"
    assert chat.history == [("abcdef", "abc"), ("xy", "xy")]


def test_clear_forgets_and_clears_the_screen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    model = Echo()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    converse(chat_with(model), ["first", " clear ", "second"])
    assert "\033[2J" in capsys.readouterr().out
    assert model.calls[-1]["history"] == []


def test_stop_leaves_and_empty_lines_are_passed_over():
    model = Echo()
    converse(chat_with(model), ["", "  ", "hello", "stop", "more"])
    assert len(model.calls) == 1


def test_the_oldest_rounds_are_forgotten_when_there_is_no_room(capsys: pytest.CaptureFixture[str]):
    """A quarter of the length is kept for the answer, and of the rest a quarter is freed at a time."""
    model = Echo()
    chat = chat_with(model, max_length=100)
    converse(chat, [letter * 6 for letter in "abcdefg"])
    assert [said[0][0] for said in model.calls[-1]["history"]] == ["c", "d", "e", "f"]
    converse(chat, ["h" * 6])
    assert [said[0][0] for said in model.calls[-1]["history"]] == ["c", "d", "e", "f", "g"]
    assert capsys.readouterr().out.count("oldest 2 of the rounds were forgotten") == 1


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("hello\r\x04", ["hello"]),
        ("\033[200~line one\nline two\n\n第三行\033[201~\r\x04", ["line one\nline two\n\n第三行"]),
        ("one\033\rtwo\r\x04", ["one\ntwo"]),
        ("half\x03whole\r\x04", ["whole"]),
        ("\x04", []),
    ],
    ids=["a line", "pasted lines", "Alt-Enter", "Ctrl-C drops the line", "Ctrl-D leaves"],
)
def test_what_is_typed_becomes_messages(keys: str, expected: list[str]):
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    with (
        create_pipe_input() as keyboard,
        create_app_session(input=keyboard, output=DummyOutput()),
    ):
        keyboard.send_text(keys)
        assert list(typed_messages()) == expected


def test_control_characters_of_a_model_do_not_reach_the_terminal(
    capsys: pytest.CaptureFixture[str],
):
    reply(chat_with(Echo()), "a\033[31mb\tc\nd\x07")
    assert capsys.readouterr().out == "a[31mb\tc\nd\n"


class Refusing(Echo):
    def stream_chat(self, tokenizer, query: str, history: list, **options) -> Iterator[tuple]:
        if query == "bad":
            raise ValueError("The query is bad; write another.")
        yield from super().stream_chat(tokenizer, query, history, **options)


def test_in_a_terminal_a_refused_message_is_told_and_the_talk_goes_on(
    capsys: pytest.CaptureFixture[str],
):
    converse(chat_with(Refusing()), ["bad", "good"], keep_going=True)
    assert capsys.readouterr().out == "\nThe query is bad; write another.\ngood\n"
    with pytest.raises(ValueError, match="bad"):
        converse(chat_with(Refusing()), ["bad", "good"])


def test_ctrl_c_while_loading_leaves_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    import chatglm.cli.info

    def interrupt(arguments: argparse.Namespace) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(chatglm.cli.info, "run", interrupt)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "\n"
