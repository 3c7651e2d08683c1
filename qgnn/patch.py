"""PyTorch Geometric's operations on our kernels: ``with qgnn.patch_pyg(): ...`` around code that stays as it is.

PyG's functions, and ``propagate`` of every convolution, which PyG generates for each class when its first layer is made, call ours while the patch
lasts (:mod:`.detour`), for classes that are made later too. What cannot run on our kernels (:mod:`.pyg_ops`) with PyG's semantics runs PyG's own
code, and the reason is counted (:meth:`PatchPyG.report`).
"""

from __future__ import annotations

import inspect
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch_geometric.edge_index
import torch_geometric.typing
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch_geometric import EdgeIndex, Index
from torch_geometric.nn import MessagePassing, aggr, conv
from torch_geometric.utils import scatter, segment, softmax, spmm

from .detour import Unsupported, clear_counts, counted, original, put_back, require, take_hold
from .pyg_ops import Aggregate, Operation, Reduce, Softmax, compressed, directed, graph_of, graphs, grouped, segmented

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)

SMALLEST = {
    "scatter": (4, 2**16),
    "segment": (8, 2**17),
    "softmax": (4, 2**16),
    "spmm": (1, 2**19),
    "EdgeIndex.matmul": (4, 2**19),
    "MessagePassing.propagate": (4, 2**15),
}
"""Features, and elements (edges times features), below which PyG's own code is the faster one on a CPU (processor time of one thread of Zen 5, graphs
of 1,500, 10,556 and 100,000 edges, forward and backward). ``spmm`` without a gradient, one call of torch's own kernel, takes 8 times as many."""


def _check_tensors(*tensors: Tensor) -> None:
    """Plain dense tensors on one device, in eager mode."""
    for tensor in tensors:
        require(type(tensor) in (Tensor, torch.nn.Parameter), "not a plain tensor")
    device = tensors[0].device
    require(device.type in ("cpu", "cuda"), f"device {device.type}")
    require(all(t.layout == torch.strided and t.device == device for t in tensors), "layout or device")
    require(torch._C._get_tracing_state() is None, "torch.jit.trace")
    require(not torch._C._are_functorch_transforms_active(), "torch.func transform")
    require(forward_ad._current_level < 0, "forward-mode gradients")
    require(not torch._C._len_torch_dispatch_stack(), "torch_dispatch mode")
    require(device.type == "cpu" or not torch.cuda.is_current_stream_capturing(), "CUDA graph capture")


def _check_types(x: Tensor, *others: Tensor | None, integers: bool = False) -> None:
    require(x.dtype in FLOATS or (integers and x.dtype in INTEGERS), f"{x.dtype}")
    require(all(o is None or o.dtype == x.dtype for o in others), "mixed dtypes")
    require(x.numel() > 0, "empty")


def _check_size(name: str, x: Any, edges: int | None = None) -> None:
    """Asked first, of anything, since a small call has no time to lose: ``x`` has a row for each edge, unless their number is given."""
    if type(x) is Tensor and not x.is_cuda:
        elements = x.numel() if edges is None else edges * x.size(-1) if x.dim() else 0
        require(elements >= SMALLEST[name][1], "small")


def _check_width(name: str, x: Tensor, features: int) -> None:
    require(x.is_cuda or features >= SMALLEST[name][0], "small")


def _check_no_autocast(x: Tensor) -> None:
    """For functions that autocast would run in another type."""
    require(not torch.is_autocast_enabled(x.device.type), "autocast")


def _dimension(x: Tensor, dim: int) -> int:
    require(-x.dim() <= dim < x.dim(), "dim")
    return dim % x.dim()


def _by_rows(operation: Operation, x: Tensor, dim: int) -> Tensor:
    """The operation on ``x``, whose dimension ``dim`` it takes as rows."""
    if dim == 0 and x.dim() == 2:
        return operation(x)
    moved = x.movedim(dim, 0)
    out = operation(moved.reshape(moved.size(0), -1))
    return out.view(out.size(0), *moved.shape[1:]).movedim(0, dim).contiguous()


def _scatter(src: Tensor, index: Tensor, dim: int, dim_size: int | None, reduce: str) -> Tensor:
    _check_size("scatter", src)
    index = index.as_tensor() if isinstance(index, Index) else index
    _check_tensors(src, index)
    reduce = {"add": "sum", "amin": "min", "amax": "max"}.get(reduce, reduce)
    require(reduce in ("sum", "mean", "min", "max", "mul"), f"reduce={reduce!r}")
    _check_types(src, integers=reduce != "mean")
    require(index.dtype == torch.int64 and index.dim() == 1, "index")
    dim = _dimension(src, dim)
    require(index.numel() == src.size(dim), "index of another length")
    if src.is_cuda and torch_geometric.typing.WITH_TORCH_SCATTER:  # which gives it to one of them
        _check_no_ties(reduce, src)
    _check_width("scatter", src, src.numel() // index.numel())
    size = int(index.max()) + 1 if dim_size is None else dim_size
    return _by_rows(Reduce("scatter", graph_of(grouped, (size,), index), reduce), src, dim)


def _segment(src: Tensor, ptr: Tensor, reduce: str) -> Tensor:
    _check_size("segment", src)
    _check_tensors(src, ptr)
    require(reduce in ("sum", "mean", "min", "max"), f"reduce={reduce!r}")
    require(not torch_geometric.typing.WITH_TORCH_SCATTER or reduce in ("sum", "mean"), "torch-scatter's segments")
    _check_types(src)
    _check_no_ties(reduce, src)
    require(ptr.dtype in INTEGERS and ptr.dim() == 1, "ptr")
    _check_width("segment", src, src.numel() // src.size(0))
    return _by_rows(Reduce("segment", graph_of(segmented, (src.size(0),), ptr), reduce), src, 0)


def _softmax(src: Tensor, index: Tensor | None, ptr: Tensor | None, num_nodes: int | None, dim: int) -> Tensor:
    _check_size("softmax", src)
    index = index.as_tensor() if isinstance(index, Index) else index
    structure = index if ptr is None else ptr
    if structure is None:
        raise Unsupported("no index")
    _check_tensors(src, structure)
    _check_types(src)
    _check_not_double_on_gpu(src)
    _check_no_autocast(src)
    require(structure.dtype == torch.int64 and structure.dim() == 1, "index or ptr")
    dim = _dimension(src, dim)
    _check_width("softmax", src, src.numel() // src.size(dim))
    if ptr is not None:
        require(dim == 0, "ptr along another dim")
        graph = graph_of(segmented, (src.size(0),), ptr)
    else:
        require(structure.numel() == src.size(dim), "index of another length")
        size = int(structure.max()) + 1 if num_nodes is None else num_nodes
        graph = graph_of(grouped, (size,), structure)
    # A group of nothing but -inf is NaN in PyG and 0 in our kernel; looking for it on a GPU would wait for the device.
    require(src.is_cuda or bool(src.detach().amin() > -torch.inf), "scores of -inf or NaN")
    return _by_rows(Softmax(graph), src, dim)


def _given(tensor: Tensor | None) -> tuple[Tensor, ...]:
    return () if tensor is None else (tensor,)


def _check_not_double_on_gpu(x: Tensor) -> None:
    require(x.dtype != torch.float64 or not x.is_cuda, "float64 on a GPU")


def _check_no_ties(reduce: str, *operands: Tensor) -> None:
    """For functions that share the gradient of a minimum or maximum among equals in a way of their own."""
    differentiable = torch.is_grad_enabled() and any(operand.requires_grad for operand in operands)
    require(reduce not in ("min", "max") or not differentiable, "gradient of ties")


def _check_aggregate(x: Tensor, weight: Tensor | None, reduce: str) -> None:
    _check_types(x, weight)
    _check_not_double_on_gpu(x)
    require(x.dim() == 2, "features of other than 2 dimensions")
    _check_no_ties(reduce, x, *_given(weight))


def _spmm(src: Any, other: Tensor, reduce: str) -> Tensor:
    reduce = "sum" if reduce == "add" else reduce
    require(reduce in ("sum", "mean", "min", "max"), f"reduce={reduce!r}")
    if isinstance(src, EdgeIndex):
        raise Unsupported("EdgeIndex, counted as EdgeIndex.matmul")
    require(isinstance(src, Tensor) and src.layout == torch.sparse_csr, f"{getattr(src, 'layout', 'SparseTensor')}")
    require(src.dim() == 2 and src.dense_dim() == 0, "batches or dense values")
    require(not src.requires_grad, "gradient of the matrix")
    _check_size("spmm", other, src._nnz() if other.requires_grad else src._nnz() // 8)
    _check_tensors(other, src.crow_indices(), src.col_indices(), src.values())
    _check_no_autocast(other)
    _check_aggregate(other, src.values(), reduce)
    require(other.size(0) == src.size(1), "sizes that do not fit")
    require(reduce in ("sum", "mean") or not other.is_cuda, "minimum or maximum on a GPU")
    _check_width("spmm", other, other.size(1))
    graph = graph_of(compressed, (src.size(1),), src.crow_indices(), src.col_indices())
    return Aggregate("spmm", graph, reduce, ordered=True)(other, src.values())


def _matmul(input: EdgeIndex, other: Tensor, value: Tensor | None, reduce: str, transpose: bool) -> Tensor:
    reduce = {"add": "sum", "amin": "min", "amax": "max"}.get(reduce, reduce)
    require(reduce in ("sum", "mean", "min", "max"), f"reduce={reduce!r}")
    require(type(input) is EdgeIndex, "not a plain EdgeIndex")
    require(input.is_sorted_by_col if transpose else input.is_sorted_by_row, "not sorted")
    edges = input.as_tensor()
    _check_size("EdgeIndex.matmul", other, edges.size(1))
    _check_tensors(other, edges, *_given(value))
    _check_no_autocast(other)
    _check_aggregate(other, value, reduce)
    nodes, sources = input.get_sparse_size()[:: -1 if transpose else 1]
    require(other.size(0) == sources and (value is None or value.shape == edges.shape[1:]), "sizes that do not fit")
    _check_width("EdgeIndex.matmul", other, other.size(1))
    graph = graph_of(directed, (int(transpose), sources, nodes), edges)
    return Aggregate("EdgeIndex.matmul", graph, reduce, ordered=True)(other, *_given(value))


_PLAIN_MESSAGES = [kind.message for kind in (MessagePassing, conv.GINConv, conv.SAGEConv, conv.SignedConv)]
"""``x_j``."""
_WEIGHTED_MESSAGES = [
    kind.message
    for kind in (
        conv.GCNConv,
        conv.GraphConv,
        conv.APPNP,
        conv.GCN2Conv,
        conv.LGConv,
        conv.SGConv,
        conv.SSGConv,
        conv.TAGConv,
    )
]
"""``x_j``, or ``edge_weight.view(-1, 1) * x_j`` if there are weights."""
_ALWAYS_WEIGHTED = [conv.SGConv.message, conv.SSGConv.message]
"""Those of them that fail without weights."""
_REDUCTIONS = {
    aggr.SumAggregation: "sum",
    aggr.MeanAggregation: "mean",
    aggr.MinAggregation: "min",
    aggr.MaxAggregation: "max",
}
_HOOKS = [f"_{step}_forward_{place}hooks" for step in ("propagate", "message", "aggregate") for place in ("", "pre_")]
_STEPS = {"message", "aggregate", "update", "_collect", "_index_select"}


def _propagate(layer: MessagePassing, edge_index: Tensor, arguments: dict[str, Any]) -> Tensor:
    """``x_j`` or ``edge_weight * x_j``, aggregated, without the messages ``[E, F]``, where the layer does nothing else with them."""
    x: Any = arguments.get("x")
    source = x[0] if isinstance(x, tuple | list) else x
    if type(edge_index) is Tensor and edge_index.dim() == 2:
        _check_size("MessagePassing.propagate", source, edge_index.size(1))
    kind = type(layer)
    require(kind.message in _PLAIN_MESSAGES + _WEIGHTED_MESSAGES, "a message of its own")
    require(kind.aggregate is MessagePassing.aggregate and kind.update is MessagePassing.update, "steps of its own")
    require(
        kind._index_select is MessagePassing._index_select and not _STEPS & layer.__dict__.keys(), "steps of its own"
    )
    require(not layer.explain and not any(getattr(layer, hooks) for hooks in _HOOKS), "explanation or hooks")
    module = layer.aggr_module
    require(type(module) in _REDUCTIONS, "aggregation")
    require(not (module._forward_hooks or module._forward_pre_hooks or _has_any_global_hook()), "explanation or hooks")
    require(layer.node_dim in (-2, 0), "node_dim")
    weight: Any = arguments.get("edge_weight") if kind.message in _WEIGHTED_MESSAGES else None
    require(weight is not None or kind.message not in _ALWAYS_WEIGHTED, "edge_weight")
    given = arguments["size"] or (None, None)
    target = int(layer.flow == "source_to_target")
    pair = x if isinstance(x, tuple | list) else (x, None) if target else (None, x)
    _check_tensors(source, edge_index, *_given(weight))
    _check_aggregate(source, weight, _REDUCTIONS[type(module)])
    require(edge_index.dtype in INTEGERS and edge_index.dim() == 2 and edge_index.size(0) == 2, "edge_index")
    require(weight is None or weight.shape == edge_index.shape[1:], "edge_weight")
    sizes = [_size_of(part, size) for part, size in zip(pair, given, strict=True)]
    nodes: Any = sizes[target] if sizes[target] is not None else sizes[1 - target]
    _check_width("MessagePassing.propagate", source, source.size(1))
    graph = graph_of(directed, (target, source.size(0), nodes), edge_index)
    return Aggregate("MessagePassing.propagate", graph, _REDUCTIONS[type(module)])(source, *_given(weight))


def _size_of(x: Any, given: int | None) -> int | None:
    if not isinstance(x, Tensor):
        return given
    require(x.dim() == 2 and given in (None, x.size(0)), "sizes that do not fit")
    return x.size(0)


def _take_hold_of_layer(kind: Any) -> None:
    """Of the ``propagate`` that PyG generated for a class of layers."""
    function: Any = kind.__dict__.get("_jinja_propagate")
    if not isinstance(function, types.FunctionType) or not function.__module__.endswith("_propagate"):
        return
    names = list(inspect.signature(function).parameters)[2:]

    def handler(layer: MessagePassing, edge_index: Any, *arguments: Any) -> Tensor:
        return _propagate(layer, edge_index, dict(zip(names, arguments, strict=True)))

    take_hold("MessagePassing.propagate", function, handler)


def _set_templates(layer: MessagePassing, raise_on_error: bool) -> None:
    """PyG generates ``propagate`` for the class of a layer, and we take hold of it."""
    original(MessagePassing._set_jittable_templates)(layer, raise_on_error)
    patch_pyg.extend(type(layer))


def _subclasses(kind: Any) -> Iterator[Any]:
    for below in kind.__subclasses__():
        yield below
        yield from _subclasses(below)


def _take_hold_of_all() -> None:
    take_hold("scatter", scatter, _scatter)
    take_hold("segment", segment, _segment)
    take_hold("softmax", softmax, _softmax)
    take_hold("spmm", spmm, _spmm)
    take_hold("EdgeIndex.matmul", torch_geometric.edge_index._spmm, _matmul)
    take_hold(None, MessagePassing._set_jittable_templates, _set_templates)
    for kind in (MessagePassing, *_subclasses(MessagePassing)):
        _take_hold_of_layer(kind)


def _release_all() -> None:
    put_back()
    graphs.clear()


class Patch:
    """PyG's functions on our kernels until :meth:`restore` is called, or the ``with`` block is left."""

    def __init__(self, leave: Callable[[], None]) -> None:
        self._leave: Callable[[], None] | None = leave

    def restore(self) -> None:
        """Ends it; a second call does nothing."""
        leave, self._leave = self._leave, None
        if leave is not None:
            leave()

    def __enter__(self) -> Patch:
        if self._leave is None:
            raise RuntimeError("this patch has ended; call qgnn.patch_pyg() again")
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()


class PatchPyG:
    """``qgnn.patch_pyg``."""

    def __init__(self) -> None:
        self._depth, self._lock = 0, threading.Lock()

    def __call__(self) -> Patch:
        """Runs PyG's ``utils.scatter``, ``utils.segment``, ``utils.softmax``, ``utils.spmm``, ``EdgeIndex.matmul`` and the aggregation of its message
        passing on our kernels, forward and backward, for the whole process.

        Either ``with qgnn.patch_pyg(): ...``, or ``patch = qgnn.patch_pyg()`` and ``patch.restore()``. It may be nested; when the last one ends, PyG
        is as it was. What is not supported runs PyG's own code, see :meth:`report`.
        """
        with self._lock:
            if self._depth == 0:
                clear_counts()
                try:
                    _take_hold_of_all()
                except BaseException:
                    _release_all()
                    raise
            self._depth += 1
        return Patch(self._leave)

    def extend(self, kind: Any) -> None:
        """For a class of layers that PyG made ready in the meantime."""
        with self._lock:
            if self._depth:
                _take_hold_of_layer(kind)

    def _leave(self) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                _release_all()

    def report(self) -> dict[str, dict[str, Any]]:
        """Calls since the outermost activation: ``{"scatter": {"kernels": 12, "pyg": {"empty": 3}}, ...}``, how many ran on our kernels, and how many
        on PyG's own code for which reason. A function inside another counts too. What ``torch.compile`` traces runs PyG's code and is counted once,
        when it is traced; a backward that is itself differentiated is counted as "double backward"."""
        return counted()


patch_pyg = PatchPyG()
