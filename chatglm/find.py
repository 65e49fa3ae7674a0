"""From the name a user gives (one of our models, a folder, a Hub name) to a folder here."""

from __future__ import annotations

import shlex
from pathlib import Path

from chatglm.tools.download import HUB_NAME, download

OURS = {name: Path(__file__).parent / "models" / name for name in ("demo", "demo-v1")}
MODEL_HELP = "a folder, a Hub name (owner/model), demo or demo-v1 (default: demo)"


def find_checkpoint(name: str | Path, revision: str | None = None) -> Path:
    """Returns the folder of `name`, downloading it to the usual cache of the Hub if need be.

    `name` is "demo" or "demo-v1", a local folder, or a Hub name such as "owner/model".
    Raises OSError or ValueError with one sentence when there is no such model or it cannot be had.
    """
    return local_folder(name, revision) or download(str(name), revision=revision)


def local_folder(name: str | Path, revision: str | None = None) -> Path | None:
    """Returns the folder of one of our models or the folder itself; None for a Hub name.

    Raises OSError for what is none of them, and ValueError for a `revision` of what is not on the Hub.
    """
    choices = f"give a folder, a Hub name (owner/model) or one of the models that ship with chatglm ({', '.join(OURS)})"
    if not str(name):  # which would be the current folder
        raise OSError(f"The name of the model is empty; {choices}.")
    folder = OURS.get(name, Path(name).expanduser())
    if folder.is_file():
        raise OSError(f"{str(name)!r} is a file; give the folder that holds config.json.")
    if not folder.is_dir():
        if HUB_NAME.fullmatch(str(name)):
            return None
        raise OSError(f"There is no folder {str(name)!r}; {choices}.")
    if revision is not None:
        raise ValueError(
            f"The revision {revision!r} is for a Hub name, but {str(name)!r} is a model that lies here; leave it out."
        )
    return folder


def as_typed(folder: Path) -> str:
    """How a folder is named in a command of a shell, also one that is called like a model of ours."""
    return shlex.quote(f"./{folder}" if str(folder) in OURS else str(folder))
