"""chatglm export: a folder that stands by itself, with a card that says what is true of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file
from tiny import HUB_FILES

from chatglm import load
from chatglm.cli import main
from chatglm.tools.convert import convert
from chatglm.tools.export import export, push

PAPERS = {"README.md", "LICENSE", "MODEL_LICENSE", "conversion.json"}
# In a process of its own, so that nothing but the folder's own code can run.
CHAT_ELSEWHERE = """
import sys
from transformers import AutoModel, AutoTokenizer
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
print(model.chat(tokenizer, "你好", history=[])[0])
assert "chatglm" not in sys.modules
"""


def quietly(source: Any, dest: Path, **options: Any) -> Path:
    return export(source, dest, progress=False, **options)


@pytest.mark.parametrize("name", ["demo", "demo-v1"])
def test_an_exported_folder_chats_where_the_package_is_not_imported(name, tmp_path):
    dest = quietly(name, tmp_path / "exported")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-c", CHAT_ELSEWHERE, str(dest)]
    result = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", cwd=tmp_path, env=environment
    )
    assert result.returncode == 0, result.stderr
    model, tokenizer = load(name, dtype="float16")
    assert result.stdout.strip() == model.chat(tokenizer, "你好", history=[])[0]


def test_the_folder_holds_weights_code_tokenizer_and_papers_and_nothing_else(tiny_folder, tmp_path):
    dest = quietly(tiny_folder, tmp_path / "exported")
    vocabulary = {"ice_text.model", "tokenizer.model"} & {path.name for path in tiny_folder.iterdir()}
    configs = {"config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja"}
    expected = {"model.safetensors", *HUB_FILES, *vocabulary, *configs, *PAPERS}
    assert {path.name for path in dest.iterdir()} == expected
    before, after = load_file(tiny_folder / "model.safetensors"), load_file(dest / "model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)
    root = Path(__file__).resolve().parents[1]
    for paper in ("LICENSE", "MODEL_LICENSE"):
        assert (dest / paper).read_bytes() == (root / paper).read_bytes()


def front_matter(card: str) -> dict[str, str]:
    block = card.split("---\n")[1]
    return dict(line.split(": ", 1) for line in block.splitlines())


def test_the_card_tells_family_sizes_licence_and_how_the_weights_were_made(tiny_v2_folder, tmp_path):
    packed = tmp_path / "packed"
    convert(tiny_v2_folder, packed, quantize=4, dtype="bfloat16", progress=False)
    card = (quietly(packed, tmp_path / "mine") / "README.md").read_text(encoding="utf-8")
    fields = front_matter(card)
    assert fields["license"] == "other" and fields["license_link"] == "MODEL_LICENSE"
    config = json.loads((tiny_v2_folder / "config.json").read_text())
    for fact in (
        "# mine",
        "ChatGLM2-6B architecture",
        f"vocabulary of {config['padded_vocab_size']:,} rows",
        f"context of {config['seq_length']:,} tokens",
        "The linear layers are packed to 4 bits",
        f"- The weights are those of {tiny_v2_folder.name}.",
        "- The linear layers were packed to 4 bits, with a scale for a row.",
        "- What is not packed was brought to bfloat16.",
    ):
        assert fact in card
    size = sum(tensor.nbytes for tensor in load_file(packed / "model.safetensors").values())
    assert f"The weights take {size / 1e3:.1f} kB" in card
    assert str(tmp_path) not in card


def test_our_own_weights_are_under_apache(tmp_path):
    card = (quietly("demo", tmp_path / "a") / "README.md").read_text(encoding="utf-8")
    assert front_matter(card)["license"] == "apache-2.0"
    card = (quietly("demo", tmp_path / "b", license="mit") / "README.md").read_text(encoding="utf-8")
    assert front_matter(card)["license"] == "mit"


def test_an_existing_folder_is_left_alone(tiny_folder, tmp_path):
    dest = quietly(tiny_folder, tmp_path / "exported")
    with pytest.raises(OSError, match="exists; choose another destination"):
        quietly("demo", dest)
    with pytest.raises(ValueError, match="where the source lies"):
        quietly(dest, dest, overwrite=True)


class Hub:
    """What a test's Hub was asked to do."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Any]] = {}
        self.files: dict[str, set[str]] = {}
        self.error: Exception | None = None

    def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> str:
        if self.error:
            raise self.error
        self.repositories[repo_id] = {"private": private, "exist_ok": exist_ok}
        return f"https://hub.example/{repo_id}"

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
        self.files[repo_id] = {path.name for path in Path(folder_path).iterdir()}
        self.card = Path(folder_path, "README.md").read_text(encoding="utf-8")


@pytest.fixture
def hub(monkeypatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token=None: hub)
    return hub


@pytest.mark.parametrize("keep", [True, False], ids=["with DEST", "without DEST"])
def test_push_uploads_the_whole_folder(hub, keep, tmp_path, capsys):
    dest = [str(tmp_path / "exported")] if keep else []
    assert main(["export", "demo", *dest, "--push", "me/my-model", "--private"]) == 0
    assert hub.repositories == {"me/my-model": {"private": True, "exist_ok": True}}
    assert hub.files["me/my-model"] >= {"model.safetensors", *HUB_FILES, *PAPERS}
    assert 'name = "me/my-model"' in hub.card
    assert "Uploaded to https://hub.example/me/my-model" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == (["exported"] if keep else [])


def test_a_hub_that_refuses_is_told_in_one_sentence(hub, tmp_path):
    response = type("Response", (), {"headers": {}, "status_code": 403, "request": None})()
    hub.error = HfHubHTTPError("403 Forbidden", response=response)
    with pytest.raises(OSError, match=r"did not take me/mine \(403 Forbidden.*hf auth login"):
        push(tmp_path, "me/mine")
    hub.error = OSError("Connection refused")
    with pytest.raises(OSError, match="cannot be reached"):
        push(tmp_path, "me/mine")


def test_a_name_that_is_no_repository_is_refused(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="'a/b/c' is no name for a repository"):
        push(tmp_path, "a/b/c")


def test_the_command_needs_a_folder_or_a_repository(capsys):
    with pytest.raises(SystemExit):
        main(["export", "demo"])
    assert "give a folder DEST, or --push REPO_ID" in capsys.readouterr().err
