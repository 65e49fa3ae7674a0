"""Writing a checkpoint: weights in shards of safetensors, and a folder that is there whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from chatglm.hub.quantization import give_back
from chatglm.weights.tensors import State

SHARD_SIZE = 1 << 30  # bytes; what is held in memory at a time, or the largest tensor if that is more
INDEX = "model.safetensors.index.json"
SPARE = 16 << 20  # bytes that are kept for what a checkpoint has beside its weights, about three times that


def total_bytes(state: State) -> int:
    """The size of all tensors together."""
    return sum(tensor.nbytes for tensor in state.values())


def split_into_shards(state: State, shard_size: int = SHARD_SIZE) -> list[State]:
    """The tensors in their order, cut where a shard would become larger than `shard_size` bytes."""
    shards: list[State] = [{}]
    for name, tensor in state.items():
        if shards[-1] and total_bytes(shards[-1]) + tensor.nbytes > shard_size:
            shards.append({})
        shards[-1][name] = tensor
    return shards


def write_state(state: State, folder: Path, shard_size: int = SHARD_SIZE, progress: bool = True) -> None:
    """Writes model.safetensors, or several numbered files and their index, into `folder`.

    One shard at a time is in memory. A progress bar counts the bytes.
    """
    shards = split_into_shards(state, shard_size)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    with tqdm(total=total_bytes(state), unit="B", unit_scale=True, disable=not progress) as bar:
        for name, shard in zip(names, shards, strict=True):
            _write_shard(shard, folder / name, bar)
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": total_bytes(state)}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(shard: State, path: Path, bar: tqdm) -> None:
    tensors = {}
    for name, tensor in shard.items():
        tensors[name] = tensor.load()
        found = (tensors[name].dtype, tuple(tensors[name].shape))
        assert found == (tensor.dtype, tensor.shape), (name, found)
        bar.update(tensor.nbytes)
    with _io_errors_as_oserror():
        save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)  # some releases make files that only their owner reads
    for tensor in tensors.values():
        give_back(tensor)  # else the pages of the source files that were read would stay


@contextmanager
def _io_errors_as_oserror() -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error)) from None


@contextmanager
def complete_folder(dest: Path, overwrite: bool, needed: int) -> Iterator[Path]:
    """Gives an empty folder beside `dest` to write into; it takes the place of `dest` in the end.

    If the block is left by an error, or the process dies, `dest` is as it was. What a process that
    died had written is removed by the next one. `needed` bytes must be free on the disk.

    Raises OSError if `dest` exists, without `overwrite`, or the disk is too small or becomes full.
    """
    check_destination(dest, overwrite)
    dest.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(dest)
    free = shutil.disk_usage(dest.parent).free
    if needed + SPARE > free:
        raise OSError(
            f"{dest} will have {needed:,} bytes of weights, and {SPARE:,} are to stay free for the files beside them, "
            f"but only {free:,} are free there; make room or choose another disk."
        )
    partial = dest.with_name(f".{dest.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        _put_in_place(partial, dest)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(
                f"The disk of {dest} became full; nothing is left there of what was begun. Make room for "
                f"{needed + SPARE:,} bytes or choose another disk."
            ) from None
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_destination(dest: Path, overwrite: bool) -> None:
    """Raises OSError if something is at `dest` that must not be replaced."""
    if dest.is_symlink() or (dest.exists() and not dest.is_dir()):
        raise OSError(f"{dest} is no folder; choose another destination.")
    if not dest.exists():
        return
    if not overwrite and any(dest.iterdir()):
        raise OSError(f"{dest} exists; choose another destination, or --overwrite to replace it.")
    if any(dest.iterdir()) and not (dest / "config.json").is_file():
        raise OSError(
            f"{dest} holds other things than a checkpoint (no config.json), so it is not replaced; choose "
            "another destination."
        )


def _remove_leftovers(dest: Path) -> None:
    for path in dest.parent.glob(f".{dest.name}.partial-*"):
        owner = path.name.rpartition("-")[2]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(path, ignore_errors=True)


def _put_in_place(partial: Path, dest: Path) -> None:
    for path in partial.iterdir():  # on the disk before the name is
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if not dest.exists():
        partial.rename(dest)
        return
    old = dest.with_name(f".{dest.name}.partial-{os.getpid()}-old")
    dest.rename(old)
    try:
        partial.rename(dest)
    except OSError:
        old.rename(dest)
        raise
    shutil.rmtree(old)
