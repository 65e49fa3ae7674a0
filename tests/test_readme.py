"""What the READMEs show is run here: every command and every example, as it stands there."""

from __future__ import annotations

import http.client
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import tiny_model
from vocabularies import train_vocabulary, vocabulary_config

from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ADDRESS = "http://127.0.0.1:8000"  # of the server in the READMEs; here it takes a port that is free
EXPLAINED_ELSEWHERE = {
    "pip install .": "tests/test_packaging.py installs the built wheel",
    "pip install '.[server]'": "the environment of the tests has the same packages",
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
        model.save_pretrained(folder)  # with our root files, as the README asks for
        tokenizer.save_pretrained(folder)
    rows = [{"content": f"类型#裤*第{i}条", "summary": f"这是第{i}条裤子。"} for i in range(4)]
    (place / "train.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    question = {"question": "1+1=?", "choices": ["1", "2", "3"], "answer": "B"}
    (place / "questions.jsonl").write_text(json.dumps(question) + "\n", encoding="utf-8")
    return place


def run(command: list[str], place: Path, text: str = "") -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run(
        command, cwd=place, env=environment, input=text, capture_output=True, encoding="utf-8", timeout=300
    )


BEFORE = {  # what a command needs the result of
    "chatglm convert demo my-finetuned --merge-adapter my-lora": (
        "chatglm finetune demo --data train.json --output my-lora",
        "my-lora",
    ),
}
EXTRAS = {"chatglm finetune": "peft", "chatglm serve": "uvicorn", "chatglm web": "uvicorn"}


@contextmanager
def serving(command: list[str], place: Path) -> Iterator[str]:
    """Runs a command that serves until the end of the block; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "BROWSER": "true"}  # "true" opens nothing
    command = [*command, "--port", str(port)]
    server = subprocess.Popen(
        [sys.executable, "-m", *command], cwd=place, env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        end = time.monotonic() + 120
        while not healthy(port):
            assert server.poll() is None and time.monotonic() < end, server.stderr.read()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        _, errors = server.communicate(timeout=60)
    assert "Traceback" not in errors


def healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


@pytest.fixture(scope="module")
def address(place: Path) -> Iterator[str]:
    """Where the demo model is served."""
    pytest.importorskip("uvicorn", reason="the server needs its extra: pip install '.[server]'")
    with serving(["chatglm", "serve"], place) as url:
        yield url


@pytest.mark.parametrize("example", examples(), ids=lambda text: text.splitlines()[-1].strip())
def test_python_example_runs_unchanged(place, example, request):
    if ADDRESS in example:
        pytest.importorskip("openai", reason="the example needs OpenAI's client")
        example = example.replace(ADDRESS, request.getfixturevalue("address"))
    if "trust_remote_code=True" in example:
        assert "import chatglm" not in example
    result = run([sys.executable, "-c", example], place)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


@pytest.mark.parametrize("command", commands())
def test_command_runs(place, command, request):
    if command in EXPLAINED_ELSEWHERE:
        pytest.skip(EXPLAINED_ELSEWHERE[command])
    before, result = BEFORE.get(command, ("", ""))
    for start, package in EXTRAS.items():
        if start in (command[: len(start)], before[: len(start)]):
            pytest.importorskip(package, reason=f"{start} needs {package}, which is not installed")
    if command.startswith(("chatglm serve", "chatglm web")):
        with serving(shlex.split(command), place):
            return
    if before and not (place / result).exists():
        assert run(shlex.split(before), place).returncode == 0
    if ADDRESS in command:
        command = command.replace(ADDRESS, request.getfixturevalue("address"))
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


PAGES = ["README.md", "README_zh.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("name", PAGES)
def test_links_and_pictures_lead_somewhere(name):
    page = ROOT / name
    text = re.sub(r"^````?.*?^````?$|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    found = re.findall(r"\]\(([^)#]+)[^)]*\)|<img src=\"([^\"]+)\"", text)
    targets = [target for pair in found for target in pair if target and "://" not in target]
    assert [target for target in targets if not (page.parent / target).exists()] == []
    assert targets or "README" not in name
