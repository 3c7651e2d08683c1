"""Cells trained by Ray: on the cluster that RAY_ADDRESS names, else by processes that Ray starts here."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Generator
from typing import Any

from .store import Cell
from .workers import Failure, Outcome, Setup, outcome

_OBJECTS = 100 * 2**20
"""Bytes of the store that Ray shares among its processes here; a record has a few KB, and the store at least 75 MB."""


def outcomes(
    waiting: deque[Cell], jobs: int, setup: Setup, progress: Callable[[float], None]
) -> Generator[tuple[Cell, Outcome]]:
    """As :func:`.workers.outcomes`, by Ray; the cells under way do not count in part. On a cluster, data sets and the folder of the runs have to lie
    on a file system that all its machines see under the same paths."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report to its makers
    logging.getLogger("ray").setLevel(logging.ERROR)
    here: dict[str, Any] = {"num_cpus": jobs * setup.threads, "object_store_memory": _OBJECTS}
    address = os.environ.get("RAY_ADDRESS", "local")
    ray.init(
        address=address,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.CRITICAL,
        **(here if address == "local" else {}),
    )
    try:
        gpus = 1 if setup.device == "cuda" else 0
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
