"""Which implementation runs an operation: Triton on a GPU, Numba on a CPU, plain torch on request."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

BACKENDS = ("triton", "cpu", "reference")
_chosen: ContextVar[str | None] = ContextVar("qgnn_backend", default=None)


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} does not exist; choose one of {', '.join(BACKENDS)}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every operation inside the ``with`` block on one backend: ``"triton"``, ``"cpu"`` (Numba) or ``"reference"`` (plain torch)."""
    token = _chosen.set(_checked(name))
    try:
        yield
    finally:
        _chosen.reset(token)


def current_backend(device_type: str) -> str:
    """The backend for tensors on ``device_type``: the one chosen by :func:`use_backend`, else ``QGNN_BACKEND``, else by the device."""
    name = _chosen.get() or os.environ.get("QGNN_BACKEND") or ("cpu" if device_type == "cpu" else "triton")
    return _checked(name)


def implementation(operation: str, function: str, reference: Callable[..., Any], tensor: Tensor) -> Callable[..., Any]:
    """The function that runs ``operation`` (a file name in ``gpu/`` and ``cpu/``) on the device of ``tensor``."""
    device = tensor.device.type
    name = current_backend(device)
    if name == "reference":
        return reference
    if name == "cpu":
        if device != "cpu":
            raise ValueError(f"backend 'cpu' takes CPU tensors, got one on {device}; move it or use backend 'triton'")
        return getattr(importlib.import_module(f"{__package__}.cpu.{operation}"), function)
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "backend 'triton' takes tensors on a GPU; on a CPU set TRITON_INTERPRET=1 before qgnn is imported, or use backend 'cpu'"
        )
    return getattr(importlib.import_module(f"{__package__}.gpu.{operation}"), function)
