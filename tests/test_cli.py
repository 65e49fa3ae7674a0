"""The command line: what it prints, what it takes, and that mistakes end in one sentence."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

import chatglm
from chatglm.cli import main
from chatglm.cli.chat import add_arguments
from chatglm.hub.chat_chatglm import CHAT_DEFAULTS


@pytest.mark.parametrize(
    "arguments", [["--help"], ["ask", "--help"], ["chat", "--help"], ["info", "--help"], ["--version"]]
)
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
    assert not imported & {"torch", "transformers", "rich", "httpx2", "prompt_toolkit"}


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
    ("name", "expected"),
    [
        ("", "The name of the model is empty"),
        ("./nothing", "There is no folder './nothing'"),
        ("../some/nothing", "There is no folder '../some/nothing'"),
        (__file__, f"'{__file__}' is a file; give the folder that holds config.json"),
    ],
    ids=["empty", "a path", "a path upwards", "a file"],
)
@pytest.mark.parametrize("command", [["info"], ["ask", "hi", "--model"], ["verify"]], ids=lambda it: it[0])
def test_what_is_plainly_no_name_on_the_hub_is_told_as_what_it_is(
    command: list[str],
    name: str,
    expected: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch,
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", None)
    assert main([*command, name]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"chatglm: {expected}")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "command", [["info", "demo"], ["ask", "hi"], ["bench", "demo"]], ids=lambda it: it[0]
)
def test_a_revision_of_a_model_that_lies_here_is_refused(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch
):
    monkeypatch.setattr(sys, "stdin", None)
    assert main([*command, "--revision", "v1.0"]) == 1
    expected = "The revision 'v1.0' is for a Hub name, but 'demo' is a model that lies here; leave it out."
    assert capsys.readouterr().err == f"chatglm: {expected}\n"


def test_a_key_without_a_server_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["ask", "hi", "--api-key", "secret"]) == 1
    assert capsys.readouterr().err == "chatglm: --api-key is for a server; give --url too, or leave it out.\n"


@pytest.mark.parametrize(
    ("command", "choices"),
    [("finetune", "(lora and ptuning)"), ("dpo", "so many bits Examples"), ("rl", "so many bits Examples")],
)
def test_the_help_tells_of_packing_what_the_command_has(
    command: str, choices: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert choices in " ".join(capsys.readouterr().out.split())


def test_the_help_of_train_reward_lists_the_model_first(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["train-reward", "--help"])
    out = capsys.readouterr().out
    assert out.index("positional arguments:\n  model ") < out.index("\noptions:\n")
    assert "reward model:\n  --method" in out


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
        ["--seed", "-1"],
        ["--seed", str(2**32)],
        ["--device", "meta"],
        ["--device", "cpu:99"],
        ["--device", "gpu"],
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
    line += " --top-p 0.5 --seed 7 --system Hello --url http://here --api-key key --plain"
    line += " --adapter learned --prompt-lookup 8 --int8-cache"
    arguments = parser.parse_args(line.split())
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
        "system": "Hello",
        "url": "http://here",
        "api_key": "key",
        "plain": True,
        "adapter": Path("learned"),
        "prompt_lookup": 8,
        "int8_cache": True,
    }


@pytest.mark.skipif(os.name == "nt", reason="a reader that leaves is told otherwise on Windows")
@pytest.mark.parametrize("arguments", [["info"], ["info", "--help"], ["info", "nothing"]], ids=" ".join)
def test_a_reader_that_has_left_ends_every_command_quietly(arguments: list[str]):
    there, here = os.pipe()
    os.close(there)
    streams = {"stdout": here, "stderr": subprocess.PIPE}
    if "nothing" in arguments:
        streams = {"stdout": subprocess.PIPE, "stderr": here}
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    environment["PYTHONUNBUFFERED"] = ""  # else argparse itself passes over it, with status 0
    result = subprocess.run([sys.executable, "-m", "chatglm", *arguments], env=environment, **streams)
    os.close(here)
    assert result.returncode == 141
    assert not result.stdout
    assert not result.stderr


def test_a_place_that_may_not_be_read_is_told_with_a_way_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    import chatglm.cli.info

    def refuse(arguments: argparse.Namespace) -> None:
        raise PermissionError(13, "Permission denied", "/mine/config.json")

    monkeypatch.setattr(chatglm.cli.info, "run", refuse)
    assert main(["info"]) == 1
    expected = "Permission denied: /mine/config.json; choose another place, or change its permissions."
    assert capsys.readouterr().err == f"chatglm: {expected}\n"


def test_ctrl_c_while_a_command_is_imported_leaves_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def interrupt(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("chatglm.cli.importlib.import_module", interrupt)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "\n"


def test_ctrl_c_while_loading_leaves_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    import chatglm.cli.info

    def interrupt(arguments: argparse.Namespace) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(chatglm.cli.info, "run", interrupt)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "\n"
