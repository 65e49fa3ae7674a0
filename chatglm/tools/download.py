"""From a name on the Hub to the files of a checkpoint here, in the Hub's cache or in a folder.

huggingface_hub fetches: it goes on where a connection broke, keeps every file that is whole, shows its
progress, and knows mirrors, tokens and the cache. Here stands which files are fetched, and what is checked
before and afterwards.
"""

from __future__ import annotations

import errno
import glob
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from chatglm import __version__
from chatglm.checkpoint import TOKENIZER_FILES, WEIGHT_FILES, is_lfs_pointer, read_checkpoint, read_config

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)  # ./model is a folder
# What a checkpoint needs besides its weights. Python files are not among it: only our own code runs.
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    *TOKENIZER_FILES.values(),
)
# Few files at a time: what is half fetched when the process is killed has to be fetched again.
WORKERS = 2


class HubError(OSError):
    """The Hub did not give what was asked for; the message is one sentence with the way out."""


@dataclass(frozen=True)
class Listing:
    """The files of a repository at one commit, less those that may be run or would leave the folder."""

    commit: str
    files: dict[str, RepoSibling]


@dataclass(frozen=True)
class Repository:
    """A repository of the Hub, and from where and as whom it is read."""

    name: str
    revision: str | None = None
    mirror: str | None = None
    token: str | None = field(default=None, repr=False)

    @property
    def address(self) -> str:
        """The Hub or its mirror: `mirror`, or else HF_ENDPOINT, or else the Hub itself."""
        from huggingface_hub import constants

        return (self.mirror or constants.ENDPOINT).rstrip("/")

    @property
    def cache(self) -> Path:
        """Where huggingface_hub keeps all that was ever fetched of this repository."""
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        return Path(constants.HF_HUB_CACHE).expanduser() / repo_folder_name(
            repo_id=self.name, repo_type="model"
        )

    def list_files(self) -> Listing:
        from huggingface_hub import HfApi, constants

        api = HfApi(self.address, token=self.token, library_name="chatglm", library_version=__version__)
        with _explained(self):
            info = api.repo_info(
                self.name, revision=self.revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
            )
        files = {file.rfilename: file for file in info.siblings or () if _is_harmless(file.rfilename)}
        return Listing(info.sha or "", files)

    def fetch(self, names: Iterable[str], folder: Path | None, offline: bool = False) -> Path:
        """Puts the files into `folder` or into the cache, unless they are there; returns the folder."""
        from huggingface_hub import snapshot_download

        with _explained(self):
            return Path(
                snapshot_download(
                    self.name,
                    revision=self.revision,
                    endpoint=self.address,
                    token=self.token,
                    local_dir=folder,
                    local_files_only=offline,
                    allow_patterns=[glob.escape(name) for name in names],
                    max_workers=WORKERS,
                    library_name="chatglm",
                    library_version=__version__,
                )
            )


def download(
    name: str,
    revision: str | None = None,
    folder: str | Path | None = None,
    mirror: str | None = None,
    token: str | None = None,
    include: Sequence[str] = (),
    weights: bool = True,
) -> Path:
    """Fetches the checkpoint `name` (owner/model) from the Hub; returns the folder that holds it.

    The files go to the Hub's cache, or to `folder`; those that are there already are not fetched again, and
    where the Hub cannot be reached, they do. `mirror` is the address of another Hub, `token` one of its access
    tokens. `include` are patterns of further files ("*.md"); Python files never come. Without `weights`
    only what is small is fetched, and nothing is checked.

    Raises OSError or ValueError with one sentence for what the Hub refuses, for too little disk space, and
    for a checkpoint that is not whole or not one of ChatGLM.
    """
    _check_arguments(name, mirror, token)
    folder = Path(folder).expanduser() if folder is not None else None
    if folder is not None:
        _check_folder(folder)
    repository = Repository(name, revision, mirror, token)
    try:
        listing = repository.list_files()
    except HubError:
        found = _at_hand(repository, folder)
        if found is None:
            raise
        included(include, [path.relative_to(found).as_posix() for path in found.rglob("*")])
    else:
        found = _fetch(repository, listing, folder, include, weights)
    if weights:
        read_checkpoint(found)
    return found


def _fetch(
    repository: Repository, listing: Listing, folder: Path | None, include: Sequence[str], weights: bool
) -> Path:
    small = [name for name in SMALL_FILES if name in listing.files]
    if "config.json" not in small:
        raise HubError(
            f"{repository.name} has no config.json on {repository.address}, so it is no checkpoint that can "
            "be loaded; choose another repository."
        )
    large = [*(weight_names(listing.files) if weights else ()), *included(include, listing.files)]
    _check_shadows(folder, large)
    _check_space(repository, listing, folder, {*small, *large})
    target = repository.fetch(small, folder)
    _check_sizes(repository, listing, target, small)
    read_config(target)  # before gigabytes are fetched: is it a ChatGLM at all?
    if large:
        target = repository.fetch(large, folder)
        _check_sizes(repository, listing, target, large)
    return target


def weight_names(names: Iterable[str]) -> list[str]:
    """Which of the files of a repository are its weights: one file, or an index and its shards."""
    names = list(names)
    first = next((name for name in WEIGHT_FILES if name in names), None)
    if first is None:
        return []  # read_checkpoint says so in the end
    stem, _, suffix = first.removesuffix(".index.json").rpartition(".")
    shards = [name for name in names if "/" not in name and fnmatchcase(name, f"{stem}-*.{suffix}")]
    return [first, *(shards if first.endswith(".json") else ())]


def included(patterns: Sequence[str], names: Iterable[str]) -> list[str]:
    """The names that one of the patterns matches; ValueError for a pattern that matches none."""
    names = list(names)
    found = {pattern: [name for name in names if fnmatchcase(name, pattern)] for pattern in patterns}
    for pattern, matches in found.items():
        if not matches:
            raise ValueError(
                f"No file matches {pattern!r} (Python files are never fetched); there are "
                f"{', '.join(sorted(names)[:20])}."
            )
    return sorted({name for matches in found.values() for name in matches})


def _is_harmless(name: str) -> bool:
    path = PurePosixPath(name)
    inside = not path.is_absolute() and ".." not in path.parts and "\\" not in name and ":" not in name
    return inside and not path.suffix.lower().startswith(".py")


def _check_arguments(name: str, mirror: str | None, token: str | None) -> None:
    if not HUB_NAME.fullmatch(name):
        raise ValueError(_no_name(name))
    if mirror is not None:
        address = urlsplit(mirror)
        if address.scheme not in ("http", "https") or not address.netloc:
            raise ValueError(
                f"The mirror {mirror!r} is no address; write it whole, such as https://huggingface.co."
            )
    if token is not None and not re.fullmatch(r"[!-~]+", token):  # it would end up in a message of httpx
        raise ValueError(
            "The token is empty or has characters that tokens do not have; copy it again from the settings "
            "page of the Hub."
        )


def _no_name(name: str) -> str:
    return f"{name!r} is no name on the Hub; write owner/model, for instance zai-org/chatglm2-6b."


def _check_folder(folder: Path) -> None:
    """Raises OSError where files that have nothing to do with a checkpoint could be overwritten."""
    if folder.exists() and not folder.is_dir():
        raise OSError(f"{folder} is a file; name a folder that the checkpoint can be put into.")
    known = [folder / "config.json", folder / ".cache" / "huggingface"]  # the second is left by a download
    if folder.is_dir() and any(folder.iterdir()) and not any(path.exists() for path in known):
        raise OSError(f"{folder} is not empty and holds no checkpoint; name a new folder, or an empty one.")


def _check_shadows(folder: Path | None, names: Sequence[str]) -> None:
    """Raises OSError for weights in `folder` that would be loaded in place of those that are fetched."""
    wanted = next((name for name in WEIGHT_FILES if name in names), WEIGHT_FILES[0])
    for other in WEIGHT_FILES[: WEIGHT_FILES.index(wanted)]:
        if folder is not None and (folder / other).exists():
            raise OSError(
                f"{folder} holds {other} of another checkpoint, which would be loaded in place of {wanted}; "
                "remove it, or name a new folder."
            )


def _check_space(repository: Repository, listing: Listing, folder: Path | None, names: Sequence[str]) -> None:
    missing = [name for name in names if not _is_here(repository, listing, folder, name)]
    needed = sum(listing.files[name].size or 0 for name in missing)
    target = (folder or repository.cache).absolute()
    free = shutil.disk_usage(next(path for path in (target, *target.parents) if path.exists())).free
    if needed > free:
        raise OSError(
            f"{repository.name} needs {needed:,} bytes more in {target}, but only {free:,} are free there; make "
            "room, or put it elsewhere with --to (HF_HOME moves the whole cache)."
        )


def _is_here(repository: Repository, listing: Listing, folder: Path | None, name: str) -> bool:
    file = listing.files[name]
    if folder is not None:
        path = folder / name
        return path.is_file() and path.stat().st_size == file.size
    # The cache keeps each content once, under its hash, and links to it from every commit that has it.
    content = file.lfs.sha256 if file.lfs else file.blob_id
    places = [repository.cache / "snapshots" / listing.commit / name]
    places += [repository.cache / "blobs" / content] if content else []
    return any(path.is_file() for path in places)


def _check_sizes(repository: Repository, listing: Listing, folder: Path, names: Sequence[str]) -> None:
    """Raises OSError, removing the file, for one of another size than listed: it would never be fetched again."""
    for name in names:
        path, size = folder / name, listing.files[name].size
        if size is None or not path.is_file() or path.stat().st_size == size:
            continue
        kind = "a git-lfs pointer" if is_lfs_pointer(path) else "a file"
        found = path.stat().st_size
        path.resolve().unlink()  # in the cache a link leads to the content
        path.unlink(missing_ok=True)
        raise OSError(
            f"{repository.address} gave {kind} of {found:,} bytes for {name}, which has {size:,}; it was removed, "
            "so try again, or with another address (--mirror, HF_ENDPOINT)."
        )


def _at_hand(repository: Repository, folder: Path | None) -> Path | None:
    """The copy that is there without the Hub; None if there is none."""
    if folder is not None:
        return folder if (folder / "config.json").is_file() else None
    try:
        return repository.fetch(["config.json"], None, offline=True)
    except HubError:
        return None


@contextmanager
def _explained(repository: Repository) -> Iterator[None]:
    """Turns what huggingface_hub raises into one sentence with the way out."""
    # HTTPError is that of httpx or httpx2, whichever this release of huggingface_hub is built on.
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except (OSError, HTTPError, ValueError, TypeError, KeyError, AssertionError, RuntimeError) as error:
        raise HubError(_explanation(repository, error)) from error


def _explanation(repository: Repository, error: BaseException) -> str:
    from huggingface_hub import errors

    while isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__
    name, address = repository.name, repository.address
    if isinstance(error, errors.HFValidationError):
        return _no_name(name)
    if isinstance(error, errors.HfHubHTTPError):
        return _refusal(repository, error)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return (
            f"{name} is no folder here, is not in the cache, and HF_HUB_OFFLINE keeps it from being fetched; "
            "unset that variable, or give the folder of a copy."
        )
    if isinstance(error, errors.HTTPError):
        return (
            f"{name} is no folder here, is not whole in the cache, and {address} cannot be reached or broke off "
            f"({type(error).__name__}); try again, which keeps the files that are whole, or name a mirror (--mirror, "
            "HF_ENDPOINT)."
        )
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
        return (
            f"The disk was full before {name} was there; make room, or put it elsewhere with --to or HF_HOME."
        )
    if isinstance(error, OSError) and error.filename:
        return (
            f"{error.filename} cannot be written ({error.strerror}); put the checkpoint elsewhere with --to or "
            "HF_HOME."
        )
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"{name} could not be fetched from {address} ({first.rstrip('.')}); try again, or check the address "
        "(--mirror, HF_ENDPOINT)."
    )


def _refusal(repository: Repository, error: Exception) -> str:
    from huggingface_hub import errors

    name, address = repository.name, repository.address
    status = error.response.status_code  # type: ignore[attr-defined]
    if isinstance(error, errors.GatedRepoError):
        return f"{name} is gated: ask for access on {address}/{name}, then log in with `hf auth login` or set HF_TOKEN."
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f"{name} has no revision {repository.revision!r} on {address}; its branches and tags stand on "
            f"{address}/{name}/tree/main."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"There is neither a folder {name} here nor a public model of that name on {address}; check the "
            "spelling, or log in with `hf auth login` if the model is private."
        )
    if status == 401:
        return (
            f"{address} does not know the token; log in with `hf auth login`, set HF_TOKEN to a valid one, or "
            "leave it out if the model is public."
        )
    if status == 403:
        return (
            f"The token may not read {name} on {address}; give it access to the contents of that repository."
        )
    return f"{address} answered {status} instead of {name}; try later, or another address (--mirror, HF_ENDPOINT)."
