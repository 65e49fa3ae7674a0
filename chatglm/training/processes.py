"""Several processes that make one run, as `accelerate launch` starts them: they fail together, and the first writes.

One process alone needs none of this; the functions do nothing more then, and torch is not imported for them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

Result = TypeVar("Result")


def number_of_processes() -> int:
    """How many processes make this run, on all machines."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def is_main() -> bool:
    """Whether this is the process that writes and speaks."""
    return number_of_processes() == 1 or os.environ.get("RANK", "0") == "0"


def is_sharded() -> bool:
    """Whether the launcher was told to share the weights out, by FSDP or DeepSpeed, instead of copying them."""
    return any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED"))


@contextmanager
def together() -> Iterator[None]:
    """All processes leave this block, or none: OSError, ValueError or MemoryError in one of them ends them all.

    The main process raises the first error; the others end without a word.
    """
    if number_of_processes() == 1:
        yield
        return
    error = None
    try:
        yield
    except (OSError, ValueError, MemoryError) as found:
        error = found
    errors = [found for found in _gather(error) if found is not None]
    if errors:
        raise errors[0] if is_main() else SystemExit(1)


def on_main(function: Callable[[], Result]) -> Result:
    """What `function` returns in the main process, in every process; none goes on before."""
    result: Any = None
    with together():
        if is_main():
            result = function()
    return result if number_of_processes() == 1 else _gather(result)[0]


def wait_for_all() -> None:
    """No process goes on before all are here."""
    if number_of_processes() > 1:
        _gather(None)


def leave() -> None:
    """Ends this process, if there are several, when the run is over and all are here.

    At once, without what Python does at its end: there gloo's threads abort a process now and then ("terminate called
    without an active exception", seen with torch 2.13 after FSDP had read a checkpoint).
    """
    if number_of_processes() > 1:
        wait_for_all()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _gather(own: Any) -> list[Any]:
    """The objects of all processes, the main one's first."""
    import torch
    import torch.distributed as dist

    if (
        not dist.is_initialized()
    ):  # what comes later, Trainer or DeepSpeed, takes the connection that there is
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found
