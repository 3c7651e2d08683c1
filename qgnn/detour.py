"""Functions of another package that call ours for a while, wherever they were imported.

``from torch_geometric.utils import scatter`` hands out the function object, and PyG's own modules and everybody else's hold it under names of their
own, so replacing an attribute of a module would miss nearly all of them. The function objects therefore stay what they are and get another
``__code__``: one line that calls :func:`_call`. Every alias sees it, whenever it was imported, and restoring is putting the identical code object
back. The line has the function's parameters and claims the file and the line of its definition, so ``inspect.getsource``, and with it
``torch.jit.script``, still reads the original source; code that was scripted is never touched. The change is one of the process: all threads see it.
"""

from __future__ import annotations

import inspect
import threading
import types
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Unsupported(Exception):
    """Why a call goes to the original code."""


def require(condition: bool, reason: str) -> None:
    """Raises :class:`Unsupported` unless the condition holds."""
    if not condition:
        raise Unsupported(reason)


class _Held(NamedTuple):
    """A function that calls :func:`_call` while ``ours`` is its code."""

    name: str | None  # in the report; None for one that is not counted
    function: Any
    theirs: types.CodeType
    ours: types.CodeType
    original: Callable[..., Any]
    handler: Callable[..., Any]


# By the identity of the function, which cannot be another's since it is kept: classes of one name have propagate functions of one name.
_held: dict[int, _Held] = {}
_counts: Counter[tuple[str, str]] = Counter()
_counting = threading.Lock()
_KERNELS = "kernels"


def take_hold(name: str | None, function: Any, handler: Callable[..., Any]) -> None:
    """From now on ``function`` does what ``handler`` does, and what it did itself where that raises :class:`Unsupported`."""
    held = _held.get(id(function))
    if held is None or function.__code__ not in (held.theirs, held.ours):
        held = _Held(name, function, function.__code__, _line(function), _copy(function), handler)
        _held[id(function)] = held
    function.__code__ = held.ours


def put_back() -> None:
    """All functions are what they were."""
    for held in list(_held.values()):
        held.function.__code__ = held.theirs


def original(function: Any) -> Callable[..., Any]:
    """What a function that was taken hold of does by itself."""
    return _held[id(function)].original


def count(name: str, where: str) -> None:
    """One call more of the function ``name`` that ran on the original code for the reason ``where``."""
    with _counting:
        _counts[name, where] += 1


def clear_counts() -> None:
    """All counts are 0."""
    with _counting:
        _counts.clear()


def counted() -> dict[str, dict[str, Any]]:
    """``{"scatter": {"kernels": 12, "pyg": {"empty": 3}}, ...}``: calls by function and by where they ran."""
    with _counting:
        counts = dict(_counts)
    report: dict[str, dict[str, Any]] = {}
    for (name, where), calls in counts.items():
        of_function = report.setdefault(name, {"kernels": 0, "pyg": {}})
        if where == _KERNELS:
            of_function["kernels"] = calls
        else:
            of_function["pyg"][where] = calls
    return report


def _counted_once(name: str) -> bool:
    count(name, "torch.compile or torch.export")
    return True


# so it is run, once, while a graph is traced
_count_traced: Callable[[str], bool] = torch.compiler.assume_constant_result(_counted_once)


def _call(key: int, *arguments: Any) -> Any:
    """What a function that was taken hold of does instead."""
    name, *_, theirs, handler = _held[key]
    if name is None:
        return handler(*arguments)
    if torch.compiler.is_compiling():
        _count_traced(name)
        return theirs(*arguments)
    try:
        out = handler(*arguments)
    except Unsupported as unsupported:
        count(name, str(unsupported))
        return theirs(*arguments)
    count(name, _KERNELS)
    return out


def _line(function: Any) -> types.CodeType:
    """The code that calls :func:`_call` with the function's own parameters."""
    names = ", ".join(inspect.signature(function).parameters)
    text = f"def {function.__name__}({names}): from {__name__} import _call; return _call({id(function)}, {names})"
    constants = compile(text, function.__code__.co_filename, "exec").co_consts
    code = next(constant for constant in constants if isinstance(constant, types.CodeType))
    return code.replace(co_firstlineno=function.__code__.co_firstlineno)


def _copy(function: Any) -> Callable[..., Any]:
    return types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
