"""Activation compression (EXACT: Liu et al., ICLR 2022): what backward keeps of float feature maps is packed, and the forward pass stays as it is.

A map ``[N, F]`` is kept in fixed point, each row in its own range and rounded stochastically (:mod:`qgnn.kernels.fixed_point`), so that the gradient
of a product is unbiased. "fp32/saved=int4" says the width; a model in quantized training packs what its layers have not packed at the width of their
inputs, the mantissa and sign of MSFP. Exact stay parameters, the data that a model is given, and what has fewer than :data:`LEAST_COLUMNS` columns:
attention scores, statistics, scales.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, TypeVar, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..features import SparseFeatures
from ..kernels.dropout import dropout_backward
from ..kernels.fixed_point import fixed_point_pack, fixed_point_unpack
from ..kernels.random import drawn_seed
from ..kernels.ranges import range_parameters
from .base import Quantizer
from .components import FLOAT
from .scheme import Scheme

LEAST_COLUMNS = 16
"""At 16 columns the two floats of a row's range are as many bytes as its codes of 4 bits."""

watchers: list[Callable[..., object]] = []
"""Called with what is kept in place of a tensor, and its kind (:mod:`qgnn.memory`): torch calls the innermost hooks only. What they return lives as
long as that."""

_Forward = TypeVar("_Forward", bound=Callable[..., Any])


class _Kept:
    """A tensor as it is. Without its node, which may be the one that keeps it: that circle would never be freed."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor.detach(), tensor._version
        self.watched = [watch(tensor) for watch in watchers]

    def restored(self) -> Tensor:
        """The tensor.

        Raises:
            RuntimeError: it has been changed in place. torch looks for that only where there are no hooks.
        """
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.tensor.shape)} that the gradient needs was changed in place after the forward pass; "
                "change a copy of it"
            )
        return self.tensor


class _Packed:
    """A map in fixed point."""

    def __init__(self, x: Tensor, bits: int) -> None:
        self.shape, self.bits = x.shape, bits
        rows = x.detach().flatten(1).contiguous()
        low, high = rows.aminmax(dim=1)
        self.scale, self.offset = range_parameters(low, high, bits, False)
        self.data = fixed_point_pack(rows, self.scale, self.offset, bits, False, drawn_seed())
        self.watched = [
            watch(part, "feature map") for watch in watchers for part in (self.data, self.scale, self.offset)
        ]

    def restored(self) -> Tensor:
        features = self.shape[1:].numel()
        return fixed_point_unpack(self.data, self.scale, self.offset, self.bits, False, features).view(self.shape)


class _Dropped:
    """The values of sparse features after dropout: a bit for each, and the values before, ``whole``, which are the data's."""

    def __init__(self, whole: Tensor, bits: Tensor, p: float) -> None:
        self.whole, self.bits, self.p = whole, bits, p
        self.watched = [watch(bits, "mask") for watch in watchers]

    def restored(self) -> Tensor:
        return dropout_backward(self.whole, self.bits, self.p)


def packs_maps(scheme: Scheme) -> bool:
    """Whether models of a scheme pack float maps."""
    return scheme.saved is not None or scheme.components is not None


def saved_bits(module: nn.Module) -> int | None:
    """The width that ``module`` packs float maps at; None where it does not."""
    for part in module.modules():
        scheme = getattr(part, "scheme", None)
        if not isinstance(scheme, Scheme):
            continue
        if scheme.saved is not None:
            return int(scheme.saved.removeprefix("int"))
        if scheme.components is not None and isinstance(part, Quantizer):
            width = scheme.components.at("inputs", part.width) if part.enabled else FLOAT
            return None if width == FLOAT else width - 8 if scheme.method == "msfp" else width
    return None


class _Packing:
    """Decides for each tensor that autograd keeps for a module, which is called with ``inputs``, how it is kept."""

    def __init__(self, module: nn.Module, bits: int, inputs: tuple[Any, ...]) -> None:
        self.bits = bits
        given = (t for t in _tensors(inputs) if not t.requires_grad and t.layout == torch.strided)
        self.exact = {_storage(t) for t in given}
        self.parameters = module.parameters
        self.shapes: set[torch.Size] | None = None
        self.dropped: dict[StorageWeakRef, tuple[Tensor, Tensor, float]] = {}
        # The references see to it that no storage's number is given out again.
        self.found: WeakValueDictionary[tuple[Any, ...], _Packed] = WeakValueDictionary()

    def note(self, inputs: tuple[Any, ...]) -> None:
        """What a layer is called with: features after dropout."""
        for x in inputs:
            if isinstance(x, SparseFeatures) and x.whole is not None and x.dropped is not None:
                self.dropped[_storage(x.values)] = x.whole, x.dropped, x.p

    def pack(self, x: Tensor) -> _Kept | _Packed | _Dropped:
        if x.layout != torch.strided or x.dtype != torch.float32:
            return _Kept(x)
        storage = _storage(x)
        if storage in self.dropped and x.shape == self.dropped[storage][0].shape:
            return _Dropped(*self.dropped[storage])
        wide = x.dim() > 1 and x.numel() > 0 and x.shape[1:].numel() >= LEAST_COLUMNS
        if not wide or storage in self.exact or self._is_weight(x):
            return _Kept(x)
        key = (storage, x.storage_offset(), x.shape, x.stride(), x._version)
        packed = self.found.get(key)
        if packed is None:
            packed = self.found[key] = _Packed(x, self.bits)
        return packed

    def _is_weight(self, x: Tensor) -> bool:
        """Whether ``x`` is a parameter, or as large as one and so maybe made of it."""
        whole = x if x._base is None else x._base
        if self.shapes is None:  # most steps of quantized training never ask
            self.shapes = {p.shape for p in self.parameters()}
        return (whole.is_leaf and whole.requires_grad) or x.shape in self.shapes


def _tensors(given: object) -> Iterator[Tensor]:
    """Those that a module is called with: also in pairs, dictionaries and PyG's Data."""
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, list | tuple):
        for part in given:
            yield from _tensors(part)
    elif isinstance(given, Mapping):
        yield from _tensors(list(given.values()))
    elif callable(to_dict := getattr(given, "to_dict", None)):
        yield from _tensors(to_dict())


def _storage(tensor: Tensor) -> StorageWeakRef:
    """Equal for tensors of one storage, whose number is not given out again while this lives."""
    return StorageWeakRef(tensor.untyped_storage())


class _Running(threading.local):
    """The packing of the outermost running module of each thread; torch's hooks, too, are a thread's own."""

    packing: _Packing | None = None


_running = _Running()


@contextmanager
def packing(module: nn.Module, inputs: tuple[Any, ...]) -> Iterator[None]:
    """Packs, inside the ``with`` block, what autograd keeps for ``module``, which is called with ``inputs``."""
    outer = _running.packing
    bits = saved_bits(module) if outer is None and torch.is_grad_enabled() else None
    if bits is None:
        if outer is not None:
            outer.note(inputs)
        yield
        return
    own = _Packing(module, bits, inputs)
    own.note(inputs)
    _running.packing = own
    try:
        with torch.autograd.graph.saved_tensors_hooks(own.pack, lambda kept: kept.restored()):
            yield
    finally:
        _running.packing = None


def packs(forward: _Forward) -> _Forward:
    """A module's ``forward`` that packs what is kept of it. Compiled code decides itself what it keeps, and packs nothing."""

    @wraps(forward)
    def packed(self: nn.Module, *inputs: Any, **named: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(self, *inputs, **named)
        with packing(self, (*inputs, *named.values())):
            return forward(self, *inputs, **named)

    return cast(_Forward, packed)  # it has the signature of forward


class _Hooks:
    """:func:`packing` around the calls of a module of another's class."""

    def __init__(self) -> None:
        self.open: list[ExitStack] = []

    def enter(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        self.open.append(ExitStack())
        self.open[-1].enter_context(packing(module, (*inputs, *named.values())))

    def leave(self, module: nn.Module, inputs: object, output: object) -> None:
        if self.open and not torch.compiler.is_compiling():
            self.open.pop().close()


def attach(model: nn.Module) -> None:
    """Lets ``model`` pack what is kept of it and of what stands between its layers."""
    hooks = _Hooks()
    model.register_forward_pre_hook(hooks.enter, with_kwargs=True)
    model.register_forward_hook(hooks.leave, always_call=True)
