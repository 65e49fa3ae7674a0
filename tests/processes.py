"""Programs that tests start and interrupt."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable


def _obey() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


# For `preexec_fn`: what a shell runs in the background ignores SIGINT, and so does all that it starts.
OBEY_CTRL_C: Callable[[], None] | None = None if os.name == "nt" else _obey
