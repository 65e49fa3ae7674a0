"""`chatglm chat`: conversation and commands, with a model that answers by rule and with the demo models."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import chatglm
import chatglm.loading
from chatglm.cli import main
from chatglm.cli.backends import Answer, LoadedModel
from chatglm.cli.chat import COMMANDS, converse
from chatglm.cli.conversation import LARGEST_FILE, LARGEST_MESSAGE, Conversation, check_text
from chatglm.cli.terminal import PlainScreen, can_show_markdown, printable, typed_messages


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the command with text piped into it; returns the exit status, output and errors."""

    def run(text: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        capsys.readouterr()
        status = main(arguments)
        return status, *capsys.readouterr()

    return run


# ---- piped


def test_piped_lines_are_answered_one_by_one_as_chat_answers_them(tiny_folder: Path, pipe):
    model, tokenizer = chatglm.load(tiny_folder, device="cpu")
    settings = {"max_length": 150, "temperature": 0.0}
    first, second = (model.chat(tokenizer, query, **settings)[0] for query in ("你好", "Hello"))
    expected = printable(f"{first}\n{second}\n")
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


@pytest.mark.parametrize("model", ["demo", "demo-v1"])
def test_guessing_ahead_and_a_small_cache_reach_the_model_and_keep_the_answers(
    model: str, pipe, monkeypatch: pytest.MonkeyPatch
):
    from chatglm.hub.generation_chatglm import Int8Cache, PromptLookup

    said = "12+30=?\nWrite a Python function that adds two numbers.\n"
    plain = pipe(said, "chat", model, "--device", "cpu")
    used: list[str] = []
    for part in (Int8Cache, PromptLookup):
        begin = part.__init__

        def begun(self, *arguments, begin=begin, name=part.__name__, **more):
            used.append(name)
            begin(self, *arguments, **more)

        monkeypatch.setattr(part, "__init__", begun)
    assert pipe(said, "chat", model, "--device", "cpu", "--prompt-lookup", "4", "--int8-cache") == plain
    assert set(used) == {"Int8Cache", "PromptLookup"}


def test_a_system_prompt_stands_before_the_first_message_as_published(tiny_v2_folder: Path, pipe):
    options = ["chat", str(tiny_v2_folder), "--device", "cpu", "--max-length", "60", "--temperature", "0"]
    assert pipe("b\n", *options, "--system", "a") == pipe("ab\n", *options) != pipe("b\n", *options)


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
        self.calls.append(options | {"query": query, "history": list(history)})
        for end in range(1, len(query) + 1):
            if end == self.interrupt_at:
                raise KeyboardInterrupt
            for processor in options["logits_processor"]:
                processor(None, None)
            yield query[:end], [*history, (query, query[:end])]


class Letters:
    """A tokenizer with a token for every letter of the conversation."""

    def encode_chat(self, query: str, history: list) -> list[int]:
        return [0] * len("".join(part for said in history for part in said) + query)


SCREEN = PlainScreen(interactive=False)


def talk_with(model: Echo, **options) -> Conversation:
    return Conversation(LoadedModel(model, Letters(), **options))  # type: ignore[arg-type]


def rounds(*said: tuple[str, str]) -> list[dict]:
    """Messages of (query, answer) pairs."""
    return [{"role": role, "content": text} for pair in said for role, text in zip(ROLES, pair, strict=True)]


ROLES = ("user", "assistant")


def test_an_answer_is_printed_once_and_joins_the_conversation(capsys: pytest.CaptureFixture[str]):
    talk = talk_with(Echo())
    converse(talk, ["你好"], PlainScreen(interactive=True))
    assert capsys.readouterr().out == "ChatGLM: 你好\n"
    assert talk.messages == rounds(("你好", "你好"))


def test_options_reach_the_model_as_they_are():
    model = Echo()
    talk = talk_with(model, max_length=50, temperature=0.0, top_p=0.5)
    assert "".join(talk.ask("hi")) == "hi"
    (call,) = model.calls
    del call["logits_processor"]
    assert call == {
        "query": "hi",
        "history": [],
        "max_length": 50,
        "prompt_cache": talk.backend.prompt_cache,
        "temperature": 0.0,
        "top_p": 0.5,
    }


def test_by_default_the_context_of_a_small_model_bounds_the_length():
    assert talk_with(Echo()).backend.max_length == 100


def test_an_answer_tells_its_length_and_why_it_ended():
    talk = talk_with(Echo(), max_length=20)
    "".join(talk.ask("12345"))
    answer = talk.last_answer
    assert (answer.prompt_tokens, answer.completion_tokens, answer.finish_reason) == (5, 5, "stop")
    talk.clear()
    "".join(talk.ask("1234567890"))
    assert talk.last_answer.finish_reason == "length"


def test_ctrl_c_ends_the_answer_and_keeps_what_was_said(capsys: pytest.CaptureFixture[str]):
    talk = talk_with(Echo(interrupt_at=4))
    converse(talk, ["abcdef", "xy"], SCREEN, keep_going=True)
    assert capsys.readouterr().out == "abc\nxy\n"
    assert talk.messages == rounds(("abcdef", "abc"), ("xy", "xy"))


def test_ctrl_c_before_the_first_word_leaves_a_question_that_is_not_sent_again():
    model = Echo(interrupt_at=1)
    talk = talk_with(model)
    converse(talk, ["one", "two"], SCREEN, keep_going=True)
    assert [call["query"] for call in model.calls] == ["one", "two"]
    assert talk.messages == [{"role": "user", "content": "two"}]


def test_ctrl_c_ends_a_pipe_as_a_whole():
    with pytest.raises(KeyboardInterrupt):
        converse(talk_with(Echo(interrupt_at=2)), ["abc", "def"], SCREEN)


def test_clear_forgets_and_clears_the_screen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    model = Echo()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    converse(talk_with(model), ["first", " clear ", "second", "/clear", "third"], SCREEN)
    assert capsys.readouterr().out.count("\033[2J") == 2
    assert [call["history"] for call in model.calls] == [[], [], []]


@pytest.mark.parametrize("word", ["stop", " stop ", "/stop"])
def test_stop_leaves_and_empty_lines_are_passed_over(word: str):
    model = Echo()
    converse(talk_with(model), ["", "  ", "hello", word, "more"], SCREEN)
    assert len(model.calls) == 1


def test_the_model_reads_the_newest_rounds_and_the_conversation_keeps_all(
    capsys: pytest.CaptureFixture[str],
):
    """A quarter of the length is kept for the answer, and of the rest a quarter is freed at a time."""
    model = Echo()
    talk = talk_with(model, max_length=100)
    converse(talk, [letter * 6 for letter in "abcdefg"], SCREEN)
    assert [said[0][0] for said in model.calls[-1]["history"]] == ["c", "d", "e", "f"]
    converse(talk, ["h" * 6], SCREEN)
    assert [said[0][0] for said in model.calls[-1]["history"]] == ["c", "d", "e", "f", "g"]
    told = "(To make room, the model no longer reads the oldest 2 rounds.)\n"
    assert capsys.readouterr().err == told
    assert [message["content"][0] for message in talk.messages[::2]] == list("abcdefgh")


def test_a_system_prompt_stays_when_the_oldest_rounds_are_left_out():
    model = Echo()
    talk = talk_with(model, max_length=100)
    talk.set_system("SYSTEM")
    converse(talk, [letter * 6 for letter in "abcdefg"], SCREEN)
    assert model.calls[0]["query"] == "SYSTEMaaaaaa"
    assert model.calls[-1]["history"][0] == ("SYSTEMbbbbbb", "bbbbbb")


# ---- commands


def test_retry_asks_the_last_question_again_in_place_of_its_answer(capsys: pytest.CaptureFixture[str]):
    model = Echo()
    talk = talk_with(model)
    converse(talk, ["one", "two", "/retry"], SCREEN)
    assert capsys.readouterr().out == "one\ntwo\ntwo\n"
    assert model.calls[1]["history"] == model.calls[2]["history"] == [("one", "one")]
    assert talk.messages == rounds(("one", "one"), ("two", "two"))


def test_retry_asks_a_question_that_failed():
    class Failing(Echo):
        def stream_chat(self, *arguments, **options) -> Iterator[tuple]:
            if not self.calls:
                self.calls.append({})
                raise OSError("The server is gone.")
            yield from super().stream_chat(*arguments, **options)

    talk = talk_with(Failing())
    converse(talk, ["one", "/retry"], SCREEN, keep_going=True)
    assert talk.messages == rounds(("one", "one"))


def test_a_system_prompt_is_shown_set_and_removed(capsys: pytest.CaptureFixture[str]):
    model = Echo()
    talk = talk_with(model)
    converse(talk, ["/system", "/system\n Be kind. ", "hi", "/system -", "hi"], SCREEN)
    none = "There is no system prompt.\n"
    assert capsys.readouterr().err == f"{none}System prompt: Be kind.\n{none}"
    assert [call["query"] for call in model.calls] == ["Be kind.hi", "hi"]
    assert model.calls[1]["history"] == [("hi", "Be kind.hi")]


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]):
    converse(talk_with(Echo()), ["/help"], SCREEN)
    shown = capsys.readouterr().err
    assert all(name in shown for name in [*COMMANDS, "clear", "stop", "//"] if name != "/help")


@pytest.mark.parametrize("message", ["/nothing", "/Save file", "/", "/usr/bin is what?", "/*\na comment */"])
def test_an_unknown_command_is_told_and_not_sent(message: str, capsys: pytest.CaptureFixture[str]):
    model = Echo()
    converse(talk_with(model), [message], SCREEN, keep_going=True)
    assert capsys.readouterr().err.startswith(f"There is no command {message.split()[0]}; /help lists them")
    assert model.calls == []


def test_two_slashes_send_one():
    model = Echo()
    converse(talk_with(model), ["//retry", " //usr/bin"], SCREEN)
    assert [call["query"] for call in model.calls] == ["/retry", "/usr/bin"]


def test_a_saved_conversation_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "a talk.json"
    first = talk_with(Echo())
    converse(first, ["/system S", "你好", f"/save {file}"], SCREEN)
    assert json.loads(file.read_text("utf-8")) == {
        "messages": [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "你好"},
            {"role": "assistant", "content": "S你好"},
        ]
    }
    model = Echo()
    second = talk_with(model)
    converse(second, ["x", f"/load {file}", "more"], SCREEN)
    assert model.calls[-1]["history"] == [("S你好", "S你好")]
    assert second.messages[:2] == first.messages
    told = capsys.readouterr().err
    assert f"Saved 2 messages to {file}.\n" in told
    assert "Loaded 2 messages, with a system prompt.\n" in told


def test_a_file_that_exists_is_overwritten_only_with_an_exclamation_mark(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "talk.json"
    file.write_text("precious")
    talk = talk_with(Echo())
    converse(talk, ["hi", f"/save {file}"], SCREEN, keep_going=True)
    assert file.read_text() == "precious"
    assert (
        f"{str(file)!r} exists already; give another name, or /save! to overwrite it."
        in capsys.readouterr().err
    )
    converse(talk, [f"/save! {file}"], SCREEN)
    assert "hi" in file.read_text()
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_is_saved_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "talk.json"
    file.write_text("before")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    talk = talk_with(Echo())
    "".join(talk.ask("hi"))
    with pytest.raises(OSError, match="cannot be written: No space left on device"):
        talk.save(file, overwrite=True)
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ("/save", "/save needs the name of a file."),
        ("/load  ", "/load needs the name of a file."),
        ("/save nowhere/x.json", "There is no folder"),
        ("/save .", "exists already; give another name."),
        ("/save! .", "exists already; give another name."),
        ("/load nowhere.json", "There is no file 'nowhere.json'"),
        ("/load .", "There is no file '.'"),
    ],
)
def test_a_place_that_cannot_be_is_refused_by_name(
    message: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.chdir(tmp_path)
    converse(talk_with(Echo()), ["hi", message], SCREEN, keep_going=True)
    assert sentence in capsys.readouterr().err


def test_nothing_is_saved_or_retried_before_something_was_said(capsys: pytest.CaptureFixture[str]):
    converse(talk_with(Echo()), ["/save x.json", "/retry"], SCREEN, keep_going=True)
    expected = (
        "Nothing was said yet that could be saved.\nThere is no question yet that could be asked again.\n"
    )
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is no JSON"),
        (b"{", "is no JSON"),
        (b"\xff\xfe", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b"[]", "is no conversation"),
        (b'{"messages": []}', "is no conversation"),
        (b'{"messages": [1]}', "is no conversation"),
        (b'{"messages": [{"role": "user"}]}', "is no conversation"),
        (b'{"messages": [{"role": "user", "content": ["a"]}]}', "is no conversation"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "which is no character"),
        (b'{"messages": [{"role": "system", "content": "a"}]}', "take turns"),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}', "take turns"),
        (b'{"messages": [{"role": "tool", "content": "a"}]}', "take turns"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_broken_file_is_refused_and_nothing_is_lost(
    content: bytes, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "talk.json"
    file.write_bytes(content)
    talk = talk_with(Echo())
    talk.set_system("S")
    converse(talk, ["hi", f"/load {file}"], SCREEN, keep_going=True)
    told = capsys.readouterr().err
    assert sentence in told
    assert told.count("\n") == 1
    assert (talk.system, talk.messages) == ("S", rounds(("hi", "Shi")))


def test_a_file_too_large_is_refused_before_it_is_read(tmp_path: Path):
    file = tmp_path / "talk.json"
    with file.open("wb") as stream:
        stream.truncate(LARGEST_FILE + 1)
    with pytest.raises(ValueError, match="which is no conversation"):
        talk_with(Echo()).load(file)


# ---- what comes in and what goes out


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("hello\r\x04", ["hello"]),
        ("\033[200~line one\nline two\n\n第三行\033[201~\r\x04", ["line one\nline two\n\n第三行"]),
        ("one\033\rtwo\r\x04", ["one\ntwo"]),
        ("half\x03whole\r\x04", ["whole"]),
        ("/ret\t\r\x04", ["/retry"]),
        ("\x04", []),
    ],
    ids=["a line", "pasted lines", "Alt-Enter", "Ctrl-C drops the line", "Tab completes", "Ctrl-D leaves"],
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
        assert list(typed_messages(list(COMMANDS))) == expected


def test_control_characters_of_a_model_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]):
    converse(talk_with(Echo()), ["a\033[31mb\tc\nd\x07\x7f\x9b31m"], SCREEN)
    assert capsys.readouterr().out == "a[31mb\tc\nd31m\n"


class Refusing(Echo):
    def stream_chat(self, tokenizer, query: str, history: list, **options) -> Iterator[tuple]:
        if query == "bad":
            raise ValueError("The query is bad; write another.")
        yield from super().stream_chat(tokenizer, query, history, **options)


def test_in_a_terminal_a_refused_message_is_told_and_the_talk_goes_on(capsys: pytest.CaptureFixture[str]):
    converse(talk_with(Refusing()), ["bad", "good"], SCREEN, keep_going=True)
    assert capsys.readouterr() == ("good\n", "The query is bad; write another.\n")
    with pytest.raises(ValueError, match="bad"):
        converse(talk_with(Refusing()), ["bad", "good"], SCREEN)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("half \ud83d of a pair", "which is no character"),
        ("x" * 10_000_000, "has more than 1,048,576 characters"),
        ("好" * (LARGEST_MESSAGE // 2), "has more than 1,048,576 bytes"),
    ],
    ids=["lone surrogate", "10 MB", "bytes, not characters"],
)
def test_what_no_model_can_read_is_refused(text: str, sentence: str, tiny_v2_folder: Path, pipe):
    status, out, error = pipe(text, "chat", str(tiny_v2_folder), "--device", "cpu")
    assert (status, out) == (1, "")
    assert sentence in error
    assert len(error) < 200


def test_a_message_may_have_as_many_bytes_as_are_allowed():
    check_text("好" * (LARGEST_MESSAGE // 3) + "x")
    with pytest.raises(ValueError, match="bytes"):
        check_text("好" * (LARGEST_MESSAGE // 3) + "xx")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, True), ({"TERM": "dumb"}, False), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True)],
    ids=["a terminal", "dumb", "NO_COLOR", "NO_COLOR without a value"],
)
def test_markdown_is_for_terminals_that_show_it(
    environment: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert not can_show_markdown()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert can_show_markdown() == expected


def test_a_backend_that_says_nothing_has_answered():
    class Silent:
        name = description = ""

        def answer(self, messages: list) -> Answer:
            return Answer()

    talk = Conversation(Silent())  # type: ignore[arg-type]
    assert list(talk.ask("hi")) == []
    assert talk.messages == rounds(("hi", ""))
