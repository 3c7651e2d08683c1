"""Which implementation runs an operation: Triton on a GPU, Numba on a CPU, plain torch on request."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._library.custom_ops import CustomOpDef  # torch.library.custom_op returns it, and exports no name for it

BACKENDS = ("triton", "cpu", "reference")
_chosen: ContextVar[str | None] = ContextVar("qgnn_backend", default=None)


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} does not exist; choose one of {', '.join(BACKENDS)}")
    return name


PLAIN = frozenset((type(None), bool, int, float, str, list, tuple))
"""Types of arguments that hold no gradient."""


class Operation(CustomOpDef):
    """A custom op that calls its function at once where nothing wants to see the operation: no compiler, no dispatch mode (fake tensors, tracing),
    no transform, no profiler, no gradient. The dispatcher takes 20 µs a call with twenty arguments, as long as the work on a small graph."""

    function: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not kwargs and _unseen(args):
            return self.function(*args)
        dispatch: Callable[..., Any] = super().__call__
        return dispatch(*args, **kwargs)


def _unseen(args: tuple[Any, ...]) -> bool:
    """Whether nothing wants to see an operation on ``args``."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._profiler_enabled()
    ):
        return False
    recorded = torch.is_grad_enabled()
    for a in args:
        kind = type(a)
        if kind is Tensor or kind is nn.Parameter:
            if recorded and a.requires_grad:
                return False
        elif kind not in PLAIN:  # another subclass of Tensor may have its own way with operations
            return False
    return True


def operation(name: str) -> Callable[[Callable[..., Any]], Operation]:
    """``torch.library.custom_op(name, mutates_args=())`` as an :class:`Operation`."""

    def register(function: Callable[..., Any]) -> Operation:
        op = cast(Operation, torch.library.custom_op(name, mutates_args=())(function))
        op.__class__ = Operation
        op.function = function
        return op

    return register


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


@cache
def _module(room: str, operation: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{room}.{operation}")


def implementation(operation: str, function: str, reference: Callable[..., Any], tensor: Tensor) -> Callable[..., Any]:
    """The function that runs ``operation`` (a file name in ``gpu/`` and ``cpu/``) on the device of ``tensor``."""
    device = "cpu" if tensor.is_cpu else tensor.device.type
    name = current_backend(device)
    if name == "reference":
        return reference
    if name == "cpu":
        if device != "cpu":
            raise ValueError(f"backend 'cpu' takes CPU tensors, got one on {device}; move it or use backend 'triton'")
        return getattr(_module("cpu", operation), function)
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "backend 'triton' takes tensors on a GPU; on a CPU set TRITON_INTERPRET=1 before qgnn is imported, or use backend 'cpu'"
        )
    return getattr(_module("gpu", operation), function)
