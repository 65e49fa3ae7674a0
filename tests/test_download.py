"""chatglm download: from a Hub, here a small one on loopback, to the cache or a folder."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from small_hub import SmallHub, commit_of

from chatglm.checkpoint import read_checkpoint
from chatglm.cli import main
from chatglm.find import find_checkpoint
from chatglm.tools.download import download

ROOT = Path(__file__).resolve().parents[1]
NAME = "someone/tiny"
CODE = "raise RuntimeError('the code of the repository ran')\n"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1018370\n"
MISTAKES = (OSError, ValueError)


@pytest.fixture
def files(tiny_v2_folder: Path) -> dict[str, bytes]:
    """A repository as published ones are: the checkpoint, code, and what nobody needs to chat."""
    files = {path.name: path.read_bytes() for path in tiny_v2_folder.iterdir()}
    files |= dict.fromkeys(("modeling_chatglm.py", "ptuning/main.PY"), CODE.encode())
    return files | {"README.md": b"A tiny model.", "MODEL_LICENSE": b"Be kind.", "notes/a.json": b"{}"}


@pytest.fixture(scope="module", autouse=True)
def _session() -> Iterator[None]:
    """huggingface_hub keeps its connections; these go straight to this machine."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        huggingface_hub.close_session()
        yield
        huggingface_hub.close_session()


@pytest.fixture
def hub(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallHub]:
    """A Hub with one repository, and a cache and login of this test's own."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what is lost where a connection breaks
    with SmallHub({NAME: {"main": files}}) as hub:
        yield hub


def names_in(folder: Path) -> set[str]:
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name for name in found if not name.startswith(".cache/")}


def fetch(hub: SmallHub, name: str = NAME, **options) -> Path:
    # huggingface_hub reads HF_ENDPOINT when it is imported, so the address is always an argument here.
    return download(name, **{"mirror": hub.address} | options)


def error_of(hub: SmallHub, name: str = NAME, **options) -> str:
    """The one sentence with which a download is refused."""
    with pytest.raises(MISTAKES) as caught:
        fetch(hub, name, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_a_whole_checkpoint_comes_to_the_cache(hub: SmallHub, files: dict[str, bytes], tmp_path: Path):
    folder = fetch(hub)
    assert folder.parent.parent == tmp_path / "cache" / "models--someone--tiny"
    assert read_checkpoint(folder).family == "chatglm2"
    for name in names_in(folder):
        assert (folder / name).read_bytes() == files[name]


def test_only_what_a_checkpoint_needs_is_fetched(hub: SmallHub):
    needed = {"config.json", "generation_config.json", "tokenizer.model", "tokenizer_config.json"}
    needed |= {"model.safetensors", "chat_template.jinja"}
    assert names_in(fetch(hub)) == needed
    assert set(hub.fetched()) == needed


def test_a_whole_checkpoint_comes_to_a_folder(hub: SmallHub, tmp_path: Path):
    folder = fetch(hub, folder=tmp_path / "new" / "folder")
    assert folder == tmp_path / "new" / "folder"
    assert read_checkpoint(folder).weights
    assert not (tmp_path / "cache" / "models--someone--tiny" / "blobs").exists()


@pytest.mark.parametrize("place", ["cache", "folder"])
def test_what_is_there_is_not_fetched_again(hub: SmallHub, tmp_path: Path, place: str):
    folder = tmp_path / "folder" if place == "folder" else None
    fetch(hub, folder=folder)
    hub.asked.clear()
    fetch(hub, folder=folder)
    assert hub.fetched() == []


def test_a_new_commit_fetches_only_what_it_changed(hub: SmallHub, files: dict[str, bytes]):
    fetch(hub)
    hub.asked.clear()
    hub.repositories[NAME]["main"] = files | {"tokenizer_config.json": b"{}"}
    folder = fetch(hub)
    assert hub.fetched() == ["tokenizer_config.json"]
    assert (folder / "tokenizer_config.json").read_bytes() == b"{}"


@pytest.mark.parametrize("place", ["cache", "folder"])
def test_a_connection_that_breaks_is_taken_up_where_it_broke(
    hub: SmallHub, files: dict[str, bytes], tmp_path: Path, place: str
):
    weights = "model.safetensors"
    hub.break_after[weights] = 50_000
    folder = fetch(hub, folder=tmp_path / "folder" if place == "folder" else None)
    assert (folder / weights).read_bytes() == files[weights]
    ranges = [asked for method, path, asked in hub.asked if method == "GET" and path.endswith(weights)]
    assert ranges == [None, "bytes=50000-"]


def test_a_checkpoint_in_the_cache_serves_without_the_hub(hub: SmallHub, monkeypatch: pytest.MonkeyPatch):
    folder = fetch(hub)
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(hub) == folder
    assert find_checkpoint(NAME) == folder
    assert hub.asked == []


def test_files_that_the_cache_lacks_are_told_when_the_hub_is_out_of_reach(
    hub: SmallHub, monkeypatch: pytest.MonkeyPatch
):
    fetch(hub, include=["*.md"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(hub, include=["*.md"])
    assert "MODEL_LICENSE" in error_of(hub, include=["MODEL_LICENSE"])


def test_a_checkpoint_in_a_folder_serves_without_the_hub(
    hub: SmallHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = fetch(hub, folder=tmp_path / "folder")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(hub, folder=folder) == folder


def test_a_cache_that_lacks_files_is_told_when_the_hub_is_out_of_reach(
    hub: SmallHub, monkeypatch: pytest.MonkeyPatch
):
    (fetch(hub) / "model.safetensors").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "holds no weights" in error_of(hub)


def test_a_repository_that_is_gone_is_still_found_in_the_cache(hub: SmallHub):
    folder = fetch(hub)
    hub.repositories.clear()
    assert fetch(hub) == folder


def test_offline_and_not_in_the_cache_ends_in_one_sentence(hub: SmallHub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in error_of(hub)


@pytest.mark.parametrize("by_commit", [False, True], ids=["branch", "commit"])
def test_a_revision_is_what_is_fetched(hub: SmallHub, files: dict[str, bytes], by_commit: bool):
    older = files | {"generation_config.json": b'{"top_p": 0.5}'}
    hub.repositories[NAME]["v1.0"] = older
    folder = fetch(hub, revision=commit_of(older) if by_commit else "v1.0")
    assert (folder / "generation_config.json").read_bytes() == older["generation_config.json"]
    assert folder.name == commit_of(older)


def test_patterns_bring_further_files_but_never_python(hub: SmallHub, tmp_path: Path):
    folder = fetch(hub, folder=tmp_path / "folder", include=["*.md", "notes/*", "*LICENSE", "*m*"])
    assert {"README.md", "notes/a.json", "MODEL_LICENSE"} <= names_in(folder)
    assert not [name for name in names_in(folder) if name.lower().endswith(".py")]


@pytest.mark.parametrize("pattern", ["modeling_*", "*.PY", "missing.txt"])
def test_a_pattern_that_brings_nothing_is_told(hub: SmallHub, pattern: str):
    message = error_of(hub, include=[pattern])
    assert pattern in message
    assert "README.md" in message
    assert hub.fetched() == []


def test_safetensors_are_taken_before_pickles(hub: SmallHub, files: dict[str, bytes]):
    files |= {"pytorch_model.bin": b"PK", "model-00001-of-00002.safetensors": b"other"}
    hub.repositories[NAME]["main"] = files
    assert [name for name in names_in(fetch(hub)) if "model" in name and name != "tokenizer.model"] == [
        "model.safetensors"
    ]


def sharded(files: dict[str, bytes], shards: list[str]) -> dict[str, bytes]:
    """The repository with its weights under other names and an index."""
    files = dict(files)
    weights = files.pop("model.safetensors")
    index = {"weight_map": {f"tensor{i}": name for i, name in enumerate(shards)}}
    return files | {shards[0]: weights, "model.safetensors.index.json": json.dumps(index).encode()}


def test_an_index_brings_its_shards(hub: SmallHub, files: dict[str, bytes]):
    shard = "model-00001-of-00001.safetensors"
    hub.repositories[NAME]["main"] = sharded(files, [shard]) | {"pytorch_model-00001-of-00001.bin": b""}
    folder = fetch(hub)
    assert {"model.safetensors.index.json", shard} <= names_in(folder)
    assert "pytorch_model-00001-of-00001.bin" not in names_in(folder)


def test_an_index_that_leaves_the_folder_is_refused(hub: SmallHub, files: dict[str, bytes]):
    hub.repositories[NAME]["main"] = sharded(files, ["model-1.safetensors", "../x.safetensors"])
    assert "../x.safetensors" in error_of(hub)


def test_files_that_would_leave_the_folder_are_not_fetched(
    hub: SmallHub, files: dict[str, bytes], tmp_path: Path
):
    hub.repositories[NAME]["main"] = files | {"../../config.json": b"{}", "/tmp/chatglm.md": b""}
    assert "README.md" in error_of(hub, folder=tmp_path / "folder", include=["../*"])
    assert "README.md" in error_of(hub, folder=tmp_path / "folder", include=["/tmp/*"])
    fetch(hub, folder=tmp_path / "folder", include=["*.md"])
    assert {path.name for path in tmp_path.iterdir()} <= {"folder", "cache"}


@pytest.mark.parametrize("place", ["cache", "folder"])
def test_a_pointer_in_place_of_weights_is_named_and_leaves_nothing_behind(
    hub: SmallHub, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
):
    folder = tmp_path / "folder" if place == "folder" else None
    hub.instead["model.safetensors"] = POINTER
    message = error_of(hub, folder=folder)
    assert f"a git-lfs pointer of {len(POINTER)} bytes for model.safetensors" in message
    assert f"{len(files['model.safetensors']):,}" in message
    hub.instead.clear()  # and so the next attempt is a new one
    assert (fetch(hub, folder=folder) / "model.safetensors").stat().st_size > 1000


def test_a_pointer_that_is_in_the_repository_is_named(hub: SmallHub, files: dict[str, bytes]):
    hub.repositories[NAME]["main"] = files | {"model.safetensors": POINTER}
    assert "model.safetensors is a git-lfs pointer" in error_of(hub)


def test_weights_that_were_cut_off_before_the_upload_are_named(hub: SmallHub, files: dict[str, bytes]):
    hub.repositories[NAME]["main"] = files | {"model.safetensors": files["model.safetensors"][:-10]}
    assert "where its header says" in error_of(hub)


def test_another_kind_of_model_is_told_before_its_weights_are_fetched(hub: SmallHub, files: dict[str, bytes]):
    hub.repositories[NAME]["main"] = files | {"config.json": b'{"model_type": "llama"}'}
    assert "model_type 'llama'" in error_of(hub)
    assert "model.safetensors" not in hub.fetched()


def test_a_repository_without_a_config_is_told(hub: SmallHub):
    hub.repositories[NAME]["main"] = {"model.gguf": b"GGUF"}
    assert "has no config.json" in error_of(hub)


def test_too_little_disk_space_is_told_with_both_sizes_before_anything_is_fetched(
    hub: SmallHub, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    free = shutil.disk_usage(tmp_path)._replace(free=1234)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    message = error_of(hub)
    fetched = {"config.json", "generation_config.json", "tokenizer.model", "tokenizer_config.json"}
    fetched |= {"model.safetensors", "chat_template.jinja"}
    assert f"{sum(len(files[name]) for name in fetched):,} bytes" in message
    assert "1,234 are free" in message
    assert hub.fetched() == []


def test_what_is_in_the_cache_needs_no_disk_space(
    hub: SmallHub, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fetch(hub)
    hub.repositories[NAME]["main"] = files | {"tokenizer_config.json": b"{ }"}
    free = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    assert fetch(hub)


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "The disk was full"), (errno.EACCES, "cannot be written")],
    ids=["disk full", "no permission"],
)
def test_a_disk_that_refuses_ends_in_one_sentence(
    hub: SmallHub, monkeypatch: pytest.MonkeyPatch, number: int, words: str
):
    def refuse(*arguments, **options):
        raise OSError(number, "refused", "/some/where")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    message = error_of(hub)
    assert words in message
    assert "--to" in message


def test_a_name_that_is_not_there_is_told(hub: SmallHub):
    message = error_of(hub, "someone/typo")
    assert "someone/typo" in message
    assert "check the spelling" in message
    assert hub.address in message


def test_a_gated_model_is_told_with_the_page_to_ask_on(hub: SmallHub):
    hub.tokens[NAME] = "hf_right"
    hub.gated.add(NAME)
    message = error_of(hub)
    assert "gated" in message
    assert f"{hub.address}/{NAME}" in message


def test_a_revision_that_is_not_there_is_told(hub: SmallHub):
    assert "no revision 'v9'" in error_of(hub, revision="v9")


def test_the_right_token_opens_a_private_model(hub: SmallHub):
    hub.tokens[NAME] = "hf_right"
    assert "hf auth login" in error_of(hub)
    assert read_checkpoint(fetch(hub, token="hf_right"))


def test_a_token_from_the_environment_opens_a_private_model(hub: SmallHub, monkeypatch: pytest.MonkeyPatch):
    hub.tokens[NAME] = "hf_right"
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert read_checkpoint(fetch(hub))


@pytest.mark.parametrize("token", ["hf_wrong", "hf wrong", "hf_wröng", "hf_\nwrong"])
def test_a_wrong_token_is_told_and_never_shown(hub: SmallHub, token: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(MISTAKES) as caught:
        fetch(hub, token=token)
    shown = "".join(traceback.format_exception(caught.value)) + "".join(capsys.readouterr())
    assert "token" in str(caught.value)
    assert token not in shown
    assert repr(token)[1:-1] not in shown


@pytest.mark.parametrize("offline", [False, True], ids=["online", "offline"])
def test_the_environment_says_where_the_hub_is_and_whether_it_may_be_asked(
    hub: SmallHub, tmp_path: Path, offline: bool
):
    environment = {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": str(int(offline)),
    }
    command = [sys.executable, "-m", "chatglm", "download", NAME]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, cwd=ROOT)
    if offline:
        assert "HF_HUB_OFFLINE" in result.stderr
        assert hub.asked == []
    else:
        assert result.returncode == 0, result.stderr
        assert str(tmp_path / "home" / "hub" / "models--someone--tiny") in result.stdout


def test_a_mirror_out_of_reach_is_told(hub: SmallHub):
    message = error_of(hub, mirror="http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached" in message
    assert "--mirror" in message


@pytest.mark.parametrize("mirror", ["hf-mirror.com", "ftp://host", "https://", ""])
def test_a_mirror_that_is_no_address_is_refused(hub: SmallHub, mirror: str):
    assert repr(mirror) in error_of(hub, mirror=mirror)


def test_an_address_that_is_no_hub_is_told(hub: SmallHub):
    assert "check the address" in error_of(hub, mirror=f"{hub.address}/other")


@pytest.mark.parametrize(
    "name", ["tiny", "demo", "https://huggingface.co/a/b", "a/b/c", "../x", "a/b..c", "a/", "a b/c", ""]
)
def test_a_name_that_cannot_be_on_the_hub_is_refused(hub: SmallHub, name: str):
    assert "write owner/model" in error_of(hub, name)


def test_a_folder_with_other_things_in_it_is_left_alone(hub: SmallHub, tmp_path: Path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "draft.txt").write_text("dear")
    assert "holds no checkpoint" in error_of(hub, folder=tmp_path / "letters")
    assert "is a file" in error_of(hub, folder=tmp_path / "letters" / "draft.txt")
    assert hub.asked == []


def test_weights_that_would_be_loaded_in_place_of_the_fetched_ones_are_told(
    hub: SmallHub, files: dict[str, bytes], tmp_path: Path
):
    folder = fetch(hub, folder=tmp_path / "folder")
    hub.repositories[NAME]["main"] = sharded(files, ["model-00001-of-00001.safetensors"])
    assert "holds model.safetensors of another checkpoint" in error_of(hub, folder=folder)


def test_a_folder_that_lost_a_file_is_completed(hub: SmallHub, tmp_path: Path):
    folder = fetch(hub, folder=tmp_path / "folder")
    (folder / "model.safetensors").unlink()
    hub.asked.clear()
    assert read_checkpoint(fetch(hub, folder=folder))
    assert hub.fetched() == ["model.safetensors"]


def test_without_weights_only_small_files_are_fetched(hub: SmallHub):
    folder = fetch(hub, weights=False)
    assert (folder / "config.json").is_file()
    assert "model.safetensors" not in hub.fetched()


def test_the_command_tells_the_folder_and_what_to_do_next(
    hub: SmallHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "a folder"
    line = [
        "download",
        NAME,
        "--to",
        str(folder),
        "--mirror",
        hub.address,
        "--include",
        "*.md",
        "--include",
        "MODEL_*",
    ]
    assert main(line) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert str(folder) in first
    assert second == f"chatglm chat '{folder}'"
    assert {"README.md", "MODEL_LICENSE"} <= names_in(folder)


def test_the_command_ends_in_one_sentence(hub: SmallHub, capsys: pytest.CaptureFixture[str]):
    line = ["download", "someone/typo", "--revision", "v1", "--mirror", hub.address, "--token", "hf_wrong"]
    assert main(line) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "hf_wrong" not in captured.err


def test_the_help_names_better_ways_to_give_a_token(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["download", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "HF_TOKEN or `hf auth login`" in text
