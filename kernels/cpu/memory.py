"""Memory for large results.

The system hands out memory a page at a time, at the first touch, zeroed. A result of 87 MB, two threads of Zen 4: written for
the first time 33 ms in pages of 4 KiB, and 11 to give them back; 6 ms in huge pages; 3.5 ms once the memory is there.
So large results lie in huge pages (NumPy asks for them), and their memory is kept for the next result of the same size.
"""

from __future__ import annotations

import math
import weakref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LARGE_BYTES = 1 << 22
"""Bytes of a large result: below, memory comes from heaps that keep what they have."""

IDLE_BYTES = 1 << 29
"""Bytes kept for later, at most; the memory that has waited longest goes back to the system first."""

ALIGN = 64

_idle: dict[int, NDArray[np.uint8]] = {}
"""By identity, in the order of their return. Every single operation on it is atomic: blocks come back whenever the
collector runs, also in the middle of these functions."""


def _take(size: int) -> NDArray[np.uint8]:
    for place, block in reversed(list(_idle.items())):  # the newest may still lie in a cache
        if block.nbytes == size and _idle.pop(place, None) is not None:
            return block
    return np.empty(size, np.uint8)


def _give_back(block: NDArray[np.uint8]) -> None:
    _idle[id(block)] = block
    waiting = list(_idle.items())
    excess = sum(b.nbytes for _, b in waiting) - IDLE_BYTES
    for place, oldest in waiting:
        if excess <= 0:
            break
        _idle.pop(place, None)
        excess -= oldest.nbytes


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised, as ``torch.empty``, aligned to 64 bytes."""
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE_BYTES:
        return torch.empty(shape, dtype=dtype)
    block = _take(size + ALIGN)
    first = -block.ctypes.data % ALIGN
    view = block[first : first + size]
    weakref.finalize(view, _give_back, block).atexit = False  # the tensor holds the view for as long as it lives
    return torch.from_numpy(view).view(dtype).view(shape)
