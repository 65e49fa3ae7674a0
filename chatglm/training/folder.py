"""The folder that a run writes: what may be there before, how it begins and goes on, how the result gets in."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chatglm.training.processes import number_of_processes
from chatglm.training.rows import Data
from chatglm.training.settings import Options, read_yaml, to_yaml

DATA_FILE = "data.txt"  # what tells of the rows of the run
PARTIAL = ".partial-"  # how folders begin that are moved into place, or removed, when they are whole


def check_output(settings: Options, resume: bool, overwrite: bool) -> Path:
    """The folder of the run; raises OSError if the run must not write there."""
    output = Path(settings.output).expanduser()
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise OSError(f"{output} is no folder; choose another output.")
    filled = output.is_dir() and any(output.iterdir())
    ours = (output / settings.file).is_file()
    if resume and not ours:
        raise OSError(f"{output} holds no run to resume (no {settings.file}); leave out --resume.")
    if filled and not resume and not overwrite:
        raise OSError(
            f"{output} exists and is not empty; choose another output, --resume the run in it, or --overwrite it."
        )
    if filled and overwrite and not ours:
        raise OSError(
            f"{output} holds other things than a run of chatglm {settings.command} (no {settings.file}), so it is not "
            "replaced; choose another output."
        )
    return output


def check_same_run(output: Path, settings: Options) -> None:
    """Raises ValueError if the run in `output` was asked for something else."""
    before = type(settings)(**read_yaml(output / settings.file, type(settings)))
    for name in before.chosen() | settings.chosen():
        old, new = getattr(before, name), getattr(settings, name)
        if old != new and name != "output":
            raise ValueError(
                f"{name} is {new!r}, but the run in {output} was begun with {old!r}; resume with the same settings, or "
                "choose another output."
            )


def check_same_data(output: Path, data: dict[str, Data]) -> None:
    """Raises ValueError if the run in `output` learned from other rows."""
    if (output / DATA_FILE).read_text(encoding="utf-8") != _data_report(data):
        raise ValueError(
            f"The data are not those that the run in {output} was begun with ({output / DATA_FILE} tells of them); "
            "restore them, or choose another output."
        )


def begin(output: Path, settings: Options, data: dict[str, Data]) -> None:
    """Makes the folder, with what tells of the run in it; a run that dies before leaves what was there, or nothing."""
    from chatglm.weights.write import complete_folder

    if output.is_dir() and any(output.iterdir()):
        old = output.rename(output.with_name(f".{output.name}.partial-{os.getpid()}"))
        shutil.rmtree(old)  # if this is cut off, complete_folder removes the rest another time
    with complete_folder(output, overwrite=False, needed=0) as folder:
        (folder / DATA_FILE).write_text(_data_report(data), encoding="utf-8")
        (folder / settings.file).write_text(to_yaml(settings), encoding="utf-8")


def go_on(output: Path) -> Path | None:
    """The checkpoint to go on after, if there is one; removes what a run that was killed left half-written.

    Raises ValueError if another number of processes made it.
    """
    from chatglm.training.trainer import check_processes, last_checkpoint

    for half_written in output.glob(f"{PARTIAL}*"):
        shutil.rmtree(half_written)
    checkpoint = last_checkpoint(output)
    if checkpoint:
        check_processes(checkpoint, number_of_processes())
    return checkpoint


@contextmanager
def result(output: Path) -> Iterator[Path]:
    """A folder whose files are moved into `output` when the block is over, README.md last: it tells they are whole."""
    with tempfile.TemporaryDirectory(dir=output, prefix=PARTIAL) as name:
        folder = Path(name)
        yield folder
        for path in sorted(folder.iterdir(), key=lambda path: path.name == "README.md"):
            os.replace(path, output / path.name)


def _data_report(data: dict[str, Data]) -> str:
    from chatglm.training.report import data_lines

    return data_lines(data, places=None) + "\n"
