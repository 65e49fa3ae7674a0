"""From the name a user gives (one of our models, a folder, a Hub name) to a folder here."""

from __future__ import annotations

import re
from pathlib import Path

OURS = {name: Path(__file__).parent / "models" / name for name in ("demo", "demo-v1")}
MODEL_HELP = "a folder, a Hub name (owner/model), demo or demo-v1 (default: demo)"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# What is fetched of a repository. Python files are not among it: only our own code runs.
SMALL_FILES = ["*.json", "*.model"]
WEIGHTS = ["*.safetensors", "*.bin"]  # the first kind that the repository has


def find_checkpoint(name: str | Path, revision: str | None = None) -> Path:
    """Returns the folder of `name`, downloading it to the usual cache of the Hub if need be.

    `name` is "demo" or "demo-v1", a local folder, or a Hub name such as "owner/model".
    Raises OSError with one sentence when there is no such model or it cannot be reached.
    """
    return local_folder(name) or download(str(name), revision)


def local_folder(name: str | Path) -> Path | None:
    """Returns the folder of one of our models or the folder itself; None for a Hub name."""
    if name in OURS:
        return OURS[str(name)]
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not HUB_NAME.fullmatch(str(name)):
        raise OSError(
            f"There is no folder {str(name)!r}; give a folder, a Hub name (owner/model) or one of "
            f"the models that ship with chatglm ({', '.join(OURS)})."
        )
    return None


def download(name: str, revision: str | None = None, weights: bool = True) -> Path:
    """Returns the cache's folder of a Hub name; without `weights` only what is small is fetched."""
    # Imported here because few names need the Hub.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=SMALL_FILES))
        for kind in WEIGHTS if weights else ():
            snapshot_download(name, revision=revision, allow_patterns=kind)
            if any(folder.glob(kind)):
                break
    except RevisionNotFoundError:
        raise OSError(f"{name} has no revision {revision!r} on the Hub.") from None
    except RepositoryNotFoundError:
        raise OSError(
            f"There is neither a folder {name} here nor a public model of that name on the Hub; "
            "check the spelling, or log in with `hf auth login` if the model is private."
        ) from None
    except OSError as error:
        raise OSError(
            f"{name} is no folder here, is not in the cache, and the Hub cannot be reached; "
            "connect to the network or give the folder of a copy."
        ) from error
    return folder
