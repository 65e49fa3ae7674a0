"""From the name a user gives (one of our models, a folder, a Hub name) to a folder here."""

from __future__ import annotations

from pathlib import Path

from chatglm.tools.download import HUB_NAME, download

OURS = {name: Path(__file__).parent / "models" / name for name in ("demo", "demo-v1")}
MODEL_HELP = "a folder, a Hub name (owner/model), demo or demo-v1 (default: demo)"


def find_checkpoint(name: str | Path, revision: str | None = None) -> Path:
    """Returns the folder of `name`, downloading it to the usual cache of the Hub if need be.

    `name` is "demo" or "demo-v1", a local folder, or a Hub name such as "owner/model".
    Raises OSError or ValueError with one sentence when there is no such model or it cannot be had.
    """
    return local_folder(name) or download(str(name), revision=revision)


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
