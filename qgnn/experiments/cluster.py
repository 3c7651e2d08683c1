"""Cells trained by Ray: on the cluster that RAY_ADDRESS names, else by processes that Ray starts here."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator
from typing import Any

from .store import Cell
from .workers import Failure, Outcome, Setup, outcome

_OBJECTS = 100 * 2**20
"""Bytes of the store that Ray shares among its processes here; a record has a few KB, and the store at least 75 MB."""

ANSWERS = 30.0
"""Seconds within which a cluster has to answer. Ray itself tries for two minutes, and then ends the process."""


def outcomes(
    waiting: deque[Cell], jobs: int, setup: Setup, progress: Callable[[float], None]
) -> Generator[tuple[Cell, Outcome]]:
    """As :func:`.workers.outcomes`, by Ray; the cells under way do not count in part. On a cluster, data sets and the folder of the runs have to lie
    on a file system that all its machines see under the same paths.

    Raises:
        ValueError: the cluster that RAY_ADDRESS names does not answer within :data:`ANSWERS` seconds.
    """
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report to its makers
    logging.getLogger("ray").setLevel(logging.ERROR)
    here: dict[str, Any] = {"num_cpus": jobs * setup.threads, "object_store_memory": _OBJECTS}
    address = os.environ.get("RAY_ADDRESS", "local")
    if address != "local":
        _check(address)
    ray.init(
        address=address,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.CRITICAL,
        **(here if address == "local" else {}),
    )
    try:
        gpus = 1 if setup.device == "cuda" else 0
        # On a GPU, Ray gives every training a process of its own, so that a CUDA error costs no other one.
        train = ray.remote(max_retries=0, num_cpus=setup.threads, num_gpus=gpus)(outcome)
        busy: dict[Any, Cell] = {}
        ended = 0
        while waiting or busy:
            while waiting and len(busy) < jobs:
                cell = waiting.popleft()
                busy[train.remote(cell, setup)] = cell
            (reference,), _ = ray.wait(list(busy))
            ended += 1
            yield busy.pop(reference), _result(reference)
            progress(ended)
    finally:
        ray.shutdown()


def _check(address: str) -> None:
    """Connects from another process, which can be ended; raises ValueError where that fails."""
    code = "import sys, ray; ray.init(sys.argv[1], include_dashboard=False, log_to_driver=False)"
    try:
        done = subprocess.run([sys.executable, "-c", code, address], capture_output=True, text=True, timeout=ANSWERS)
    except subprocess.TimeoutExpired:
        reason = f"nothing answered within {ANSWERS:g} seconds"
    else:
        if done.returncode == 0:
            return
        reason = done.stderr.strip().rpartition("\n")[2]
    raise ValueError(
        f"Ray cannot be reached at RAY_ADDRESS={address} ({reason}); start it there, or unset RAY_ADDRESS to have it started here"
    )


def _result(reference: Any) -> Outcome:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.OutOfMemoryError as error:
        return Failure("out of memory", _first_line(error))
    except ray.exceptions.RayError as error:
        return Failure("crashed", _first_line(error))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
