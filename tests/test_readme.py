"""What the READMEs show is run here: every command and every example, as it stands there."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tiny_model
from vocabularies import train_vocabulary, vocabulary_config

from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXPLAINED_ELSEWHERE = {
    "pip install .": "tests/test_packaging.py installs the built wheel",
    "chatglm download THUDM/chatglm2-6b --to chatglm2-6b": "tests/test_download.py has a Hub of its own",
}


def blocks(name: str) -> list[tuple[str, str]]:
    """(language, content) of the code blocks of a README."""
    return BLOCK.findall((ROOT / name).read_text(encoding="utf-8"))


def commands() -> list[str]:
    return [
        line for language, text in blocks("README.md") if language == "bash" for line in text.splitlines()
    ]


def examples() -> list[str]:
    return [text for language, text in blocks("README.md") if language == "python"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder in which the names of the README are local folders with tiny models."""
    place = tmp_path_factory.mktemp("readme")
    for name, family in (("chatglm-6b", "chatglm"), ("chatglm2-6b", "chatglm2")):
        folder = place / "THUDM" / name
        folder.mkdir(parents=True)
        tokenizer = ChatGLMTokenizer(train_vocabulary(family, folder))
        model = tiny_model(family, **vocabulary_config(tokenizer))
        model.generation_config.max_new_tokens = 4  # random weights rarely end an answer
        model.save_pretrained(folder)  # with our four files, as the README asks for
        tokenizer.save_pretrained(folder)
    return place


def run(command: list[str], place: Path, text: str = "") -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run(
        command, cwd=place, env=environment, input=text, capture_output=True, encoding="utf-8", timeout=300
    )


@pytest.mark.parametrize("example", examples(), ids=lambda text: text.splitlines()[-1].strip())
def test_python_example_runs_unchanged(place, example):
    if "trust_remote_code=True" in example:
        assert "import chatglm" not in example
    result = run([sys.executable, "-c", example], place)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


@pytest.mark.parametrize("command", commands())
def test_command_runs(place, command):
    if command in EXPLAINED_ELSEWHERE:
        pytest.skip(EXPLAINED_ELSEWHERE[command])
    if command.startswith("make "):
        # The environment that make would build is the one that runs this test.
        assert run(["make", "--dry-run", *shlex.split(command)[1:]], ROOT).returncode == 0
        assert shutil.which("chatglm", path=str(Path(sys.executable).parent))
        command = {"make chat": "chatglm chat"}[command]
    result = run(shlex.split(command), place, text="你好\n")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    assert "Traceback" not in result.stderr


def test_both_readmes_show_the_same_commands_and_examples():
    assert blocks("README_zh.md") == blocks("README.md")


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_links_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    targets = [t for t in re.findall(r"\]\(([^)]+)\)", text) if "://" not in t]
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
