"""A folder for the Hub: weights, tokenizer and code that load anywhere, with a model card and the licences."""

from __future__ import annotations

import shutil
from importlib import metadata
from pathlib import Path

from chatglm.find import OURS
from chatglm.hub import configuration_chatglm
from chatglm.tools.card import model_card
from chatglm.tools.convert import plain
from chatglm.weights.parts import Parts, check_apart, read_parts, write_parts
from chatglm.weights.write import check_destination, complete_folder, total_bytes

LICENSES = ("LICENSE", "MODEL_LICENSE")
APACHE = "apache-2.0"


def export(
    source: str | Path,
    dest: str | Path,
    *,
    license: str | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    name: str | None = None,
    progress: bool = True,
) -> Path:
    """Writes `source` as a folder that `AutoModel.from_pretrained(dest, trust_remote_code=True)` loads.

    Args:
        source: a folder, one file of weights in a folder, a Hub name, "demo" or "demo-v1".
        dest: the folder to write; it appears complete or not at all.
        license: the Hub's name for the licence of the weights; default is Apache-2.0 for our models and
            "other", which points to MODEL_LICENSE, for all else.
        overwrite: replaces a checkpoint that is in `dest`.
        revision: of a Hub name.
        name: what the model card calls the model; default is the name of the folder.

    Returns `dest`. Raises OSError and ValueError as `convert` does.
    """
    dest = Path(dest).expanduser()
    check_destination(dest, overwrite)
    check_apart(source, dest)
    parts = plain(read_parts(source, revision))
    license = license or (APACHE if source in OURS else "other")
    with complete_folder(dest, overwrite, total_bytes(parts.state)) as folder:
        write_parts(parts, folder, progress)
        _write_papers(parts, folder, name or dest.name, license)
    return dest


def push(source: str | Path, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
    """Uploads an exported folder to the Hub; returns the address of the repository.

    Raises OSError with one sentence if the Hub refuses or cannot be reached.
    """
    # Imported here because most exports stay on this machine.
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi(token=token)
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=source, commit_message="Add the model")
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no name for a repository: {error}") from None
    except HfHubHTTPError as error:
        reason = str(error).splitlines()[0]
        raise OSError(
            f"The Hub did not take {repo_id} ({reason}); log in with `hf auth login` with a token that may "
            "write there."
        ) from None
    except OSError as error:
        raise OSError(f"The Hub cannot be reached ({error}); the folder is {source}.") from None
    return str(address)


def _write_papers(parts: Parts, folder: Path, name: str, license: str) -> None:
    (folder / "README.md").write_text(model_card(parts, name, license), encoding="utf-8")
    for paper in LICENSES:
        shutil.copyfile(_paper(paper), folder / paper)


def _paper(name: str) -> Path:
    """A licence file: beside the code in a checkout, in the metadata of an installed package."""
    beside = Path(configuration_chatglm.__file__).with_name(name)
    if beside.is_file():
        return beside
    for file in metadata.files("chatglm") or ():
        if file.name == name:
            return Path(str(file.locate()))
    raise OSError(f"This installation of chatglm has lost its file {name}; install the package again.")
