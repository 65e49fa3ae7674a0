"""Many clients at once, a third of whom hang up early: every answer is the one it would be alone.

CHATGLM_LOAD_SECONDS=120 makes it last two minutes.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator

import pytest

pytest.importorskip("httpx", reason="the clients need httpx")
pytest.importorskip("uvicorn", reason="the server needs its extra: pip install '.[server]'")

from live_server import LiveServer, live_server
from server_load import put_under_load

from chatglm.server.settings import Settings

SECONDS = float(os.environ.get("CHATGLM_LOAD_SECONDS", "10"))
BATCH, QUEUE = 8, 12  # fewer places than clients, so that some are refused


@pytest.fixture
def server() -> Iterator[LiveServer]:
    with live_server(Settings(max_batch=BATCH, max_queue=QUEUE)) as running:
        yield running


@pytest.mark.slow
def test_no_answer_is_lost_or_mixed_up_and_the_memory_stays_flat(server: LiveServer) -> None:
    load = put_under_load(server, clients=32, seconds=SECONDS, places=BATCH + QUEUE)
    assert load.outcomes["refused"] > 0  # the queue was full at times
    quarter = len(load.memory) // 4
    early, late = (
        statistics.median(part) for part in (load.memory[quarter : 2 * quarter], load.memory[-quarter:])
    )
    assert late - early < 20e6, f"{early / 1e6:.0f} -> {late / 1e6:.0f} MB"
    print(dict(load.outcomes), f"{early / 1e6:.0f} MB, {late / 1e6:.0f} MB")
