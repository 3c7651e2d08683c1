"""The processes that torchrun started: joining them, what they reduce and gather, and what is said when one is lost."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch lists it at run time only

_T = TypeVar("_T")

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others, which may be waiting for the first to cut a large graph. One that died is noticed at once."""

_SIGNS = ("gloo", "NCCL", "Connection", "connect", "Timed out", "timed out", "ProcessGroup", "peer")
"""What torch's sentences about a lost peer have in common: it raises a plain RuntimeError."""


class WorkerLost(RuntimeError):
    """Another process of the job has ended, or answers no more."""


def processes() -> int:
    """Processes of the job that torchrun started; 1 without torchrun.

    Raises:
        ValueError: the environment says that there are several, but not which one this is.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    size = int(text) if text.isdecimal() else 0
    if size < 1:
        raise ValueError(f"WORLD_SIZE must be a number of processes, got {text!r}; start with torchrun, which sets it")
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if size > 1 and missing:
        raise ValueError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set; start with torchrun, which sets it"
        )
    return size


@contextmanager
def joined(device: str = "cpu", timeout: timedelta = TIMEOUT) -> Iterator[None]:
    """Joins the processes of the job: gloo on a CPU, NCCL on GPUs, of which a process takes the one of its local rank.

    Raises:
        WorkerLost: in the block, in place of what torch raises, where another process is gone.
    """
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timeout)
        yield
    except WorkerLost:
        raise
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _SIGNS):
            raise
        raise WorkerLost(
            f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} has lost another one ({str(error).splitlines()[0]}); the same command "
            "again goes on from the last checkpoint, where --out names a folder"
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def speaks(error: BaseException) -> bool:
    """Whether this process tells the user of an error: it is the first that has it, and a lost process is told of only where nothing else was.
    torchrun's own store keeps count; without it, everyone speaks."""
    place = f"qgnn/said/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '')}"
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))
        said = store.add(place, 1)
        alike = store.add(f"{place}/{hashlib.sha256(str(error).encode()).hexdigest()}", 1)
    except (KeyError, ValueError, RuntimeError):
        return True
    return (said if isinstance(error, WorkerLost) else alike) == 1


def rank() -> int:
    """Number of this process."""
    return dist.get_rank()


def size() -> int:
    """Number of processes."""
    return dist.get_world_size()


def _device() -> torch.device:
    """Where the backend's tensors lie."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def same(value: _T) -> _T:
    """What the first process has; the value itself where there is no other."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=_device())
    return box[0]


def every(value: _T) -> list[_T]:
    """What each process has."""
    found: list[Any] = [None] * size()
    dist.all_gather_object(found, value)
    return found


def check_same(what: str, value: Any) -> None:
    """Raises ValueError in every process, unless all have the same value."""
    found = every(value)
    if any(other != found[0] for other in found):
        raise ValueError(f"the processes do not agree on {what}: {found}; start all with the same command and files")


def all_sum(x: Tensor) -> Tensor:
    """Sum over the processes, element by element; without a gradient. Reductions run in a fixed order: two runs give the same bits."""
    total = x.detach().clone()
    dist.all_reduce(total)
    return total


def all_max(x: Tensor) -> Tensor:
    """Largest over the processes, element by element; without a gradient."""
    most = x.detach().clone()
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most


def all_rows(x: Tensor, counts: list[int]) -> Tensor:
    """The rows of all processes, one after the other; ``counts`` says how many each has."""
    padded = x.new_zeros((max(counts), *x.shape[1:]))
    padded[: x.size(0)] = x.detach()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


class AllSum(torch.autograd.Function):
    """:func:`all_sum` with the gradient of what all processes make of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_sum(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return all_sum(grad.contiguous())
