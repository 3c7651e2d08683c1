"""Processes that train cells. One that crashes, or whose GPU has failed, loses the cell it was at; all end with the process that started them."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Literal

import torch

from ..data import load
from ..train import TrainingError
from .store import Cell, Folder, Pruned, run

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """Why a cell has no record: it "diverged" (the loss is not finite), was "pruned" by its search, ran "out of memory", its process was "killed" or
    "crashed" (as a GPU does for all that its process still asks of it), or it "failed" with another error; and a sentence with the details."""

    status: Literal["diverged", "pruned", "out of memory", "killed", "crashed", "failed"]
    reason: str


Outcome = dict[str, Any] | Failure


@dataclass(frozen=True)
class Setup:
    """What every process is told: where the runs are kept, the folder of the data sets, the device, and how many threads torch may use."""

    store: Folder
    root: Path | None
    device: str
    threads: int


@dataclass
class _Worker:
    process: SpawnProcess
    link: Connection
    cell: Cell
    share: float = 0.0  # of the cell's epochs that are done


def outcomes(
    waiting: deque[Cell], jobs: int, setup: Setup, progress: Callable[[float], None]
) -> Generator[tuple[Cell, Outcome]]:
    """Trains the cells in ``jobs`` processes; yields each, when it ends, with its record or with why it has none.

    Args:
        waiting: the cells; those that are added when one has ended are trained, too.
        progress: called with the number of cells done; those under way count in part.
    """
    busy, ended = dict[Connection, _Worker](), 0
    try:
        while waiting and len(busy) < jobs:
            _start(waiting.popleft(), setup, busy)
        while busy:
            for link in connection.wait(list(busy)):
                worker = busy[link]  # type: ignore[index]  # wait() also takes sockets, which none of these is
                message = _receive(worker)
                if isinstance(message, float):
                    worker.share = message
                else:
                    worker.share, ended = 0.0, ended + 1
                    yield worker.cell, message
                    _next(worker, message, waiting, busy)
                    while waiting and len(busy) < jobs:
                        _start(waiting.popleft(), setup, busy)
                progress(ended + sum(w.share for w in busy.values()))
    finally:
        for worker in busy.values():
            worker.process.kill()
            worker.process.join()


def _start(cell: Cell, setup: Setup, busy: dict[Connection, _Worker]) -> None:
    context = get_context("spawn")  # fork would copy torch's and Numba's thread pools in an unusable state
    link, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, setup), daemon=True)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()  # inherits the mask: Ctrl-C reaches the whole group, and this process decides what ends
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    theirs.close()  # so that the link ends when the process does
    busy[link] = _Worker(process, link, cell)
    _send(busy[link])


def _send(worker: _Worker) -> None:
    with suppress(BrokenPipeError):  # it has crashed, which the next message tells
        worker.link.send(worker.cell)


def _receive(worker: _Worker) -> float | Outcome:
    """The next message: a share of the epochs, a record, or a failure."""
    try:
        return worker.link.recv()
    except (EOFError, OSError):
        worker.process.join()
        code = worker.process.exitcode or 0
        if code == -signal.SIGKILL:
            return Failure("killed", "its process ended with signal SIGKILL (which mostly means that memory ran out)")
        reason = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return Failure("crashed", f"its process ended with {reason}")


def _next(worker: _Worker, message: Outcome, waiting: deque[Cell], busy: dict[Connection, _Worker]) -> None:
    """Gives a worker the next cell; sends it home if there is none, or if it has crashed."""
    if isinstance(message, Failure) and message.status == "crashed":
        worker.process.kill()  # it may still be there, with a GPU that answers nothing but errors
        worker.process.join()
    if waiting and worker.process.is_alive():
        worker.cell = waiting.popleft()
        _send(worker)
        return
    del busy[worker.link]
    worker.link.close()
    worker.process.join()


# In the process

_loaded = lru_cache(maxsize=1)(load)  # cells come row by row, so the next one mostly has the same data


def _work(link: Connection, setup: Setup) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError):  # raised when there is no more to do
        while True:
            cell = link.recv()
            link.send(outcome(cell, setup, lambda n, total: link.send(n / total)))


def outcome(cell: Cell, setup: Setup, progress: Callable[[int, int], None] | None = None) -> Outcome:
    """Trains a cell in this process."""
    torch.set_num_threads(setup.threads)
    try:
        return run(cell, _loaded(cell.dataset, setup.root), setup.store, setup.device, progress).record
    except TrainingError as error:
        return Failure("diverged", str(error))
    except Pruned as error:
        return Failure("pruned", str(error))
    except (MemoryError, torch.OutOfMemoryError) as error:
        return Failure("out of memory", str(error) or type(error).__name__)
    except (ValueError, OSError) as error:
        return Failure("failed", str(error))
    except Exception as error:  # an error of ours costs one cell, too
        if _is_gpu_error(error):
            return Failure("crashed", str(error).partition("\n")[0])
        if "can't allocate memory" in str(error):  # torch's allocator on a CPU has no class of its own for it
            return Failure("out of memory", str(error))
        _log.exception("%s", cell)
        return Failure("failed", f"{type(error).__name__}: {error}")


def _is_gpu_error(error: Exception) -> bool:
    """Whether something failed on a GPU, which may then give the same error to all that the process still asks of it."""
    return isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error) or "Triton Error [" in str(error)


def _end_with_parent() -> None:
    """Ends this process at once when the one that started it is gone, killed or not."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
