"""What is built from the repository holds what it should, and works where it is installed."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
from tiny import HUB_FILES

pytest.importorskip("hatchling", reason="building needs hatchling: install the extra 'test'")

ROOT = Path(__file__).resolve().parents[1]


def run_python(*arguments: str, cwd: Path, path: Path | None = None) -> str:
    """Runs Python and returns what it printed; `path` comes before everything installed."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, *arguments]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def build(source: Path, kind: str, target: Path) -> Path:
    run_python("-m", "hatchling", "build", "-t", kind, "-d", str(target), cwd=source)
    (archive,) = target.iterdir()
    return archive


def install(wheel: Path, target: Path) -> Path:
    options = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    run_python("-m", "pip", "install", *options, "--target", str(target), str(wheel), cwd=ROOT)
    return target


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, "sdist", tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as pip builds it for users: from the source distribution."""
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    (source,) = unpacked.iterdir()
    return build(source, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(wheel, tmp_path_factory.mktemp("installed"))


def test_the_wheel_holds_the_package_with_the_root_files_as_hub_and_nothing_else(wheel: Path):
    package = ROOT / "chatglm"
    files = {path for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    expected = {path.relative_to(ROOT).as_posix() for path in files}
    expected |= {f"chatglm/hub/{name}" for name in HUB_FILES}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == expected


def test_the_wheel_carries_both_licences_and_the_version_of_the_package(wheel: Path):
    from chatglm import __version__

    with zipfile.ZipFile(wheel) as archive:
        info = f"chatglm-{__version__}.dist-info"
        metadata = HeaderParser().parsestr(archive.read(f"{info}/METADATA").decode())
        assert {f"{info}/licenses/{name}" for name in ("LICENSE", "MODEL_LICENSE")} <= set(archive.namelist())
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"


def test_the_source_distribution_holds_the_tests_and_what_they_need(sdist: Path):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {*HUB_FILES, "tests/conftest.py", "tests/hub/conftest.py", "Makefile"} <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith(".venv")]


def test_the_installed_wheel_imports_its_own_files(installed: Path, tmp_path: Path):
    code = "import chatglm.hub.modeling_chatglm as modeling; print(modeling.__file__)"
    file = Path(run_python("-c", code, cwd=tmp_path, path=installed))
    assert file == installed / "chatglm" / "hub" / "modeling_chatglm.py"


def test_the_installed_wheel_chats(installed: Path, tmp_path: Path):
    code = (
        "import chatglm; model, tokenizer = chatglm.load('demo', device='cpu');"
        "print(model.chat(tokenizer, '你好', temperature=0)[0]); print(chatglm.__file__)"
    )
    *answer, file = run_python("-c", code, cwd=tmp_path, path=installed).splitlines()
    assert Path(file).parent == installed / "chatglm"
    assert answer[0]


def test_an_editable_install_uses_the_files_in_the_root(tmp_path: Path):
    # What `pip install --editable` does, less the environment it does it in.
    code = "import hatchling.build, sys; hatchling.build.build_editable(sys.argv[1])"
    run_python("-c", code, str(tmp_path), cwd=ROOT)
    (editable,) = tmp_path.iterdir()
    site = install(editable, tmp_path / "site")
    code = (
        f"import site; site.addsitedir({str(site)!r});"
        "import chatglm.hub.modeling_chatglm as modeling; print(modeling.__file__)"
    )
    file = Path(run_python("-I", "-c", code, cwd=tmp_path))
    assert file == ROOT / "modeling_chatglm.py"
