"""Files against a list of hashes in the format of sha256sum."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from chatglm.checkpoint import LARGEST_JSON, leaves
from chatglm.tools.report import NOT_CHECKED, Check, byte_bar, result, some

HASH_LINE = re.compile(r"\\?([0-9a-fA-F]{64})[ \t][ *]?(.+)")  # hash, blank, blank or *, name


def check_hashes(folder: Path, sha256: str | Path | None, progress: bool) -> Check:
    if sha256 is None:
        return Check("sha256", NOT_CHECKED, "No list of hashes was given (--sha256).")
    listed = read_hashes(Path(sha256).expanduser())
    paths = {name: folder / name for name in listed if not _is_outside(name, folder)}
    outside = [name for name in listed if name not in paths]
    missing = [name for name, path in paths.items() if not path.is_file()]
    for name in missing:
        del paths[name]
    different = []
    total = sum(path.stat().st_size for path in paths.values())
    with byte_bar("sha256", total, progress) as bar:
        for name, path in paths.items():
            if _sha256(path, bar) != listed[name]:
                different.append(name)
    problems = [
        f"{fault}, {len(names)} of the {len(listed)} files on the list: {some(names)}."
        for names, fault in (
            (outside, "Not of the folder, so not looked at"),
            (missing, "Missing"),
            (different, "With other contents than listed, so to be downloaded again"),
        )
        if names
    ]
    return result(
        "sha256", problems, f"The {len(listed)} files on the list have the contents they should have."
    )


def read_hashes(path: Path) -> dict[str, str]:
    """The sha256 of each file on a list in the format of sha256sum; ValueError for another format."""
    size = path.stat().st_size
    if size > LARGEST_JSON:
        raise ValueError(
            f"{path} has {size:,} bytes, too many for a list of hashes; give what sha256sum wrote."
        )
    listed = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        match = HASH_LINE.fullmatch(line)
        if match:
            listed[match[2].removeprefix("./")] = match[1].lower()
        elif line.strip():
            raise ValueError(
                f"Line {number} of {path} is not `hash  name`; give a list that sha256sum wrote."
            )
    if not listed:
        raise ValueError(f"{path} is empty; give a list that sha256sum wrote.")
    return listed


def _is_outside(name: str, folder: Path) -> bool:
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        return True
    return leaves(folder / name, folder)


def _sha256(path: Path, bar: tqdm) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()
