"""What is asked of Ray: a place for the copies of a model, here or on a cluster of machines, and their end."""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import shutil
import socket
import tempfile
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from chatglm.engine.replica import Replica

# Read by Ray before it starts anything. Behind Ray's ports anybody's code would be run: the token keeps others out, and
# the last one, which is Ray's name for "this machine is no cluster", makes it listen on loopback.
LOCAL_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
OBJECT_STORE_BYTES = 100_000_000  # messages are far too small to be put there
HEALTH_SECONDS = 5.0  # between two looks at a copy
REACH_SECONDS = 10.0  # for an answer from the address of a cluster


@dataclass(frozen=True)
class Scale:
    """How many copies of a model there are, and where.

    With `most` above `least`, Ray adds a copy while those there have more requests than they answer at once, and takes
    one away when they have been idle for long.
    """

    least: int = 1
    most: int = 1
    address: str | None = None  # of a Ray cluster; None: this machine alone, until the server ends
    threads: int | None = None  # of the processor, for each copy; None: one for every core that it has


class Cluster:
    """Ray, started for this process alone or found at an address.

    Raises OSError if Ray is not installed or cannot be reached.
    """

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self._name = f"chatglm-{secrets.token_hex(4)}"
        self._ray = import_ray(local=scale.address is None)
        # Ray's own folder, /tmp/ray, is everybody's.
        self._folder = tempfile.mkdtemp(prefix="chatglm-") if scale.address is None else None
        self._closed, self._lock = threading.Event(), threading.Lock()
        ready: Future[None] = Future()
        threading.Thread(target=self._live, args=(ready,), name="chatglm-ray", daemon=True).start()
        try:
            ready.result()
        except (OSError, RuntimeError, ValueError) as error:
            self.close()
            where = f"at {scale.address!r}" if scale.address else "on this machine"
            raise OSError(
                f"Ray cannot be reached {where} ({_first_line(error)}); give --ray-address as `ray status` has it."
            ) from None
        atexit.register(self.close)

    def _live(self, ready: Future[None]) -> None:
        """Ray's life, in a thread that lasts as long: on Linux what a thread has started ends with it."""
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self._folder is not None:
            options |= {"num_cpus": _cores(), "include_dashboard": False, "_temp_dir": self._folder}
            options |= {"object_store_memory": OBJECT_STORE_BYTES}
        try:
            check_reachable(self.scale.address)  # Ray itself tries for minutes
            self._ray.init(address=self.scale.address, **options)
        except Exception as error:
            ready.set_exception(error)
            return
        ready.set_result(None)
        self._closed.wait()

    def resources_of_one(self, device: str) -> dict[str, float]:
        """What Ray keeps for each copy: a card where there are any, or its share of the processor.

        Raises ValueError if there is not enough for `scale.least` copies.
        """
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        cards = sum(node.get("GPU", 0) for node in nodes)
        cores = min(node.get("CPU", 0) for node in nodes)
        if cards and not device.startswith("cpu"):
            return self._enough({"num_gpus": 1, "num_cpus": 1}, cards, "card")
        if self.scale.address is None:  # they share this machine; on a cluster each has one
            cores = cores // self.scale.most or cores / self.scale.most
        room = sum(node.get("CPU", 0) // cores for node in nodes) if cores else 0
        return self._enough({"num_cpus": cores}, room, "machine")

    def _enough(self, resources: dict[str, float], room: float, what: str) -> dict[str, float]:
        if room < self.scale.least:
            raise ValueError(
                f"{self.scale.least} replicas need a {what} each, but Ray has {room:g}; give fewer --replicas, or add "
                "machines to the cluster."
            )
        return resources

    def deploy(self, arguments: tuple[Any, ...], resources: dict[str, float], max_batch: int) -> Any:
        """Starts the copies and waits until one is ready; returns Ray's handle to them.

        Raises OSError with what Ray says if they cannot be started.
        """
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        serve.start(http_options=serve.HTTPOptions(location="NoServer"))  # requests come in at our own server
        least, most = self.scale.least, self.scale.most
        count: dict[str, Any] = {"num_replicas": least}
        if most > least:
            bounds = {
                "min_replicas": least,
                "max_replicas": most,
                "target_ongoing_requests": max_batch,
            }
            count = {"autoscaling_config": bounds}
        deployment = serve.deployment(
            Replica,
            name="replica",
            max_ongoing_requests=max_batch,
            ray_actor_options=resources,
            health_check_period_s=HEALTH_SECONDS,
            **count,
        )
        try:
            return serve.run(deployment.bind(*arguments), name=self._name, route_prefix=None)
        except RuntimeError:
            status = serve.status().applications[self._name].deployments["replica"].message
            raise OSError(f"Ray could not start the model: {status.strip()}") from None

    def close(self) -> None:
        """Ends what was started; a cluster that was there before stays."""
        with self._lock:
            if self._closed.is_set():
                return
            if self.scale.address is not None and self._ray.is_initialized():
                from ray import serve

                serve.delete(self._name)
            self._ray.shutdown()
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)
            self._closed.set()
            atexit.unregister(self.close)


def check_reachable(address: str | None) -> None:
    """Raises OSError if nobody listens at HOST:PORT; names such as "auto" are Ray's to look up."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=REACH_SECONDS).close()


def import_ray(local: bool) -> ModuleType:
    """Ray with Ray Serve, told to keep to itself if it is for this machine alone; OSError if it is not installed."""
    if local:
        token = os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)
        os.environ.update(LOCAL_ENVIRONMENT, RAY_AUTH_TOKEN=token)
    try:
        import ray
        import ray.serve
    except ImportError as error:
        raise OSError(
            f"Replicas need Ray Serve, of which {error.name} is not installed; install chatglm with its extra 'ray'."
        ) from None
    return ray


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
