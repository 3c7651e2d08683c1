"""What a training step needs in memory: what autograd keeps for backward, by layer and kind, and the allocator's peak.

A tensor is kept by the layer whose forward pass is running when autograd saves it. Its kind is told apart so:

- ``"graph"``: integers, which are indices; and floats without a gradient, one a row, which are PyG's weights of edges.
- ``"mask"``: booleans; floats without a gradient that hold 0 and one other value, as torch's dropout keeps its mask on a CPU; bytes in rows, which
  are bits, except in a layer of quantized training: its ranges hold the whole batch, so that it has no clip bits.
- ``"weight copy"``: floats that are computed of one weight and have its shape, or its transpose's; bytes that are as many as the codes of a weight in
  containers of 8 bits.
- ``"feature map"``: all other bytes, which are codes; the values of sparse features; all other floats of two or more dimensions, of nodes or edges.
- ``"other"``: the rest: scales, steps, statistics.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .features import SparseFeatures
from .kernels.packing import bucket_starts, uniform_counts
from .quant import saved

Kind = Literal["feature map", "mask", "weight copy", "graph", "other"]
KINDS: tuple[Kind, ...] = ("feature map", "mask", "weight copy", "graph", "other")


class SavedTensors:
    """Measures, inside the ``with`` block, the bytes that autograd keeps for backward: each storage once, from when it is saved to when it is let go.

    Args:
        model: whose layers they are kept by; without one, all are of the layer "".
        owned: tensors that are there anyway and do not count, such as parameters, graphs and data; by default all that are there at the start.

    Attributes:
        peak: the most bytes that were kept at one time.
        parts: by (layer, kind), the bytes that were kept then.
    """

    def __init__(self, model: nn.Module | None = None, owned: Iterable[Tensor] | None = None) -> None:
        self.peak, self.parts = 0, Counter[tuple[str, Kind]]()
        self._model = model
        # Held, so that no address is given out again while it is known.
        self._owned = {_address(t): t for t in (_all_tensors() if owned is None else owned)}
        self._live: dict[int, list[Any]] = {}
        self._bytes, self._now = 0, Counter[tuple[str, Kind]]()
        self._running: list[tuple[str, nn.Module | None]] = [("", model)]
        self._sparse: set[int] = set()
        self._handles: list[RemovableHandle] = []
        self._weights = {id(p): p.shape for p in model.parameters() if p.dim() == 2} if model is not None else {}
        self._codes = {
            bucket_starts(uniform_counts(rows, 8), n)[-1]
            for m, k in self._weights.values()
            for rows, n in ((m, k), (k, m))
        }
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda kept: kept.tensor)

    def __enter__(self) -> SavedTensors:
        for name, module in self._model.named_modules() if self._model is not None else ():
            self._handles.append(module.register_forward_pre_hook(self._enters(name)))
            self._handles.append(module.register_forward_hook(self._leaves, always_call=True))
        saved.watchers.append(self._keep)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
        saved.watchers.remove(self._keep)
        for handle in self._handles:
            handle.remove()

    def by_kind(self) -> dict[Kind, int]:
        """Bytes of each kind at the peak."""
        return {kind: sum(size for (_, other), size in self.parts.items() if other == kind) for kind in KINDS}

    def _enters(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._running.append((name, module))
            self._sparse |= {_address(x.values) for x in inputs if isinstance(x, SparseFeatures)}

        return hook

    def _leaves(self, module: nn.Module, inputs: object, output: object) -> None:
        self._running.pop()

    def _keep(self, tensor: Tensor, kind: Kind | None = None) -> _Kept:
        address = _address(tensor)
        if address not in self._owned:
            if address not in self._live:
                size, part = tensor.untyped_storage().nbytes(), (self._running[-1][0], kind or self._kind(tensor))
                self._live[address] = [0, size, part]
                self._bytes += size
                self._now[part] += size
                if self._bytes > self.peak:
                    self.peak, self.parts = self._bytes, self._now.copy()
            self._live[address][0] += 1
        return _Kept(self, tensor, address)

    def _release(self, address: int) -> None:
        held = self._live.get(address)
        if held is None:
            return
        held[0] -= 1
        if not held[0]:
            _, size, part = self._live.pop(address)
            self._bytes -= size
            self._now[part] -= size

    def _kind(self, tensor: Tensor) -> Kind:
        shape, constant = tuple(tensor.shape), not tensor.requires_grad
        if tensor.dtype == torch.bool:
            return "mask"
        if tensor.dtype == torch.uint8:
            if tensor.untyped_storage().nbytes() in self._codes:
                return "weight copy"
            return "mask" if tensor.dim() == 2 and not self._trains_quantized() else "feature map"
        if not tensor.is_floating_point():
            return "graph"
        if _address(tensor) in self._sparse:
            return "feature map"
        if shape in self._shapes_behind(tensor):
            return "weight copy"
        if tensor.dim() < 2:
            return "other"
        if constant and shape[1:] == (1,):
            return "graph"
        return "mask" if constant and _two_valued(tensor) else "feature map"

    def _shapes_behind(self, tensor: Tensor) -> list[tuple[int, ...]]:
        """The shape of the weight that ``tensor`` is computed of, and its transpose's; nothing where there are several weights."""
        found, seen, waiting = set[int](), set[Any](), [tensor.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            found |= {id(getattr(node, "variable", None))} & self._weights.keys()
            waiting += [child for child, _ in node.next_functions]
        shapes = [self._weights[weight] for weight in found]
        return [tuple(shapes[0]), tuple(reversed(shapes[0]))] if len(shapes) == 1 else []

    def _trains_quantized(self) -> bool:
        """Whether the innermost running module is a layer of quantized training."""
        scheme = getattr(self._running[-1][1], "scheme", None)
        return getattr(scheme, "components", None) is not None


class _Kept:
    """A saved tensor; its end is that of the tensor. Without its node, which may be the one that keeps it: that circle would never be freed."""

    def __init__(self, owner: SavedTensors, tensor: Tensor, address: int) -> None:
        self.owner, self.tensor, self.address = owner, tensor.detach(), address

    def __del__(self) -> None:
        self.owner._release(self.address)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _all_tensors() -> list[Tensor]:
    strided = (t for t in gc.get_objects() if issubclass(type(t), Tensor) and t.layout == torch.strided)
    return [t for t in strided if t.device.type != "meta" and type(t) in (Tensor, nn.Parameter)]


def _two_valued(tensor: Tensor) -> bool:
    top = tensor.detach().amax() if tensor.numel() else tensor.new_zeros(())
    return bool(((tensor == 0) | (tensor == top)).all())


def allocated_peak(step: Callable[[], object], device: torch.device) -> int:
    """The most bytes that ``step`` had allocated at one time, beyond what was there before: on a GPU by the counters of torch's allocator, on a CPU
    by the profiler's record of every allocation of torch's."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None, "the block has ended"
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
