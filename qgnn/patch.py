"""PyTorch Geometric's operations on our kernels: ``with qgnn.patch_pyg(): ...`` around code that stays as it is.

How it takes hold. ``from torch_geometric.utils import scatter`` hands out the function object, and PyG's own modules and everybody else's hold it
under names of their own, so replacing an attribute of a module would miss nearly all of them. The function objects therefore stay what they are
and get another ``__code__``: one line that calls :func:`_call`. Every alias sees it, whenever it was imported, and restoring is putting the identical
code object back. The line has PyG's parameters and claims the file and the line of PyG's definition, so ``inspect.getsource``, and with it
``torch.jit.script``, still reads PyG's source; code that was scripted is never touched. ``propagate`` of a convolution, which PyG generates for each
class when its first layer is made, is treated likewise, for classes that are made later too. The change is one of the process: all threads see it.

What cannot run on our kernels with PyG's semantics runs PyG's own code, and the reason is counted (:meth:`PatchPyG.report`).

Graphs in CSR form are kept by content. A tensor is looked up among the latest ones and compared: on a CPU every value, every time, so that no change
goes unseen, not even one through ``.data`` or a NumPy view; on a GPU, where that waits for the device, an unchanged ``_version`` of the same tensor
is enough.
"""

from __future__ import annotations

import inspect
import threading
import types
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch_geometric.edge_index
import torch_geometric.typing
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch_geometric import EdgeIndex, Index
from torch_geometric.nn import MessagePassing, aggr, conv
from torch_geometric.utils import scatter, segment, softmax, spmm

from .graph import Graph
from .kernels.aggregate import aggregate_reference, edge_dot_reference
from .kernels.attention import edge_softmax_backward_reference, edge_softmax_reference
from .kernels.backend import implementation
from .kernels.quantize import compute_dtype
from .kernels.scatter import (
    group_reference,
    segment_gather_reference,
    segment_mul_backward_reference,
    segment_reduce_reference,
)

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)
GRAPHS = 16
"""Graphs that are kept."""

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

# The kernels without torch.library, whose dispatch of a call costs more than the work of a small one. What it is there for, tracing and
# transforms, goes to PyG's own code here.
_aggregate = partial(implementation, "aggregate", "aggregate", aggregate_reference)
_edge_dot = partial(implementation, "aggregate", "edge_dot", edge_dot_reference)
_edge_softmax = partial(implementation, "attention", "edge_softmax", edge_softmax_reference)
_edge_softmax_backward = partial(implementation, "attention", "edge_softmax_backward", edge_softmax_backward_reference)
_group = partial(implementation, "scatter", "group", group_reference)
_segment_gather = partial(implementation, "scatter", "segment_gather", segment_gather_reference)
_segment_mul_backward = partial(implementation, "scatter", "segment_mul_backward", segment_mul_backward_reference)
_segment_reduce = partial(implementation, "scatter", "segment_reduce", segment_reduce_reference)


class _Unsupported(Exception):
    """Why a call goes to PyG's own code."""


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise _Unsupported(reason)


# Graphs by content


class _Known(NamedTuple):
    key: tuple[Any, ...]
    owners: tuple[Any, ...]
    copies: tuple[Tensor, ...]
    graph: Graph | None


def _owner(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for the same tensor, or the same view of it, as long as torch counted no change."""
    if tensor.is_inference():  # it has no version
        return (object(),)
    whole = tensor if tensor._base is None else tensor._base
    return weakref.ref(whole), tensor._version, tensor.data_ptr(), tensor.stride()


def _same_content(tensor: Tensor, copy: Tensor) -> bool:
    if tensor.device.type == "cpu":  # 5 times as fast as torch.equal (int64, 84 KB and 37 MB)
        return np.array_equal(tensor.numpy(), copy.numpy())
    return torch.equal(tensor, copy)


class _Graphs:
    """The latest graphs; None for what is no graph, an index out of range."""

    def __init__(self) -> None:
        self._latest: deque[_Known] = deque(maxlen=GRAPHS)
        self._lock = threading.Lock()

    def clear(self) -> None:
        self._latest.clear()

    def get(self, build: Callable[..., Graph | None], sizes: tuple[int, ...], *tensors: Tensor) -> Graph | None:
        """``build(*tensors, *sizes)``, or what it gave for equal arguments."""
        key = (build, sizes, *((t.shape, t.dtype, t.device) for t in tensors))
        owners = tuple(_owner(t) for t in tensors) if tensors[0].is_cuda else ()
        with self._lock:
            for known in reversed(self._latest):
                if known.key == key and (
                    (owners and known.owners == owners)
                    or all(_same_content(t, c) for t, c in zip(tensors, known.copies, strict=True))
                ):
                    return known.graph
            known = _Known(key, owners, tuple(t.clone() for t in tensors), build(*tensors, *sizes))
            self._latest.append(known)
            return known.graph


_graphs = _Graphs()


def _in_range(index: Tensor, size: int) -> bool:
    low, high = torch.stack(torch.aminmax(index)).tolist() if index.numel() else (0, -1)
    return low >= 0 and high < size


def _grouped(index: Tensor, size: int) -> Graph | None:
    """The members of ``size`` groups: a graph from ``E`` elements to the groups that ``index`` ``[E]`` names."""
    if not _in_range(index, size):
        return None
    indptr, indices = _group(index)(index.contiguous(), size)
    return Graph(indptr, indices, indices.long(), index.numel())


def _segmented(ptr: Tensor, edges: int) -> Graph | None:
    return _compressed(ptr, torch.arange(edges, device=ptr.device), edges)


def _compressed(ptr: Tensor, indices: Tensor, sources: int) -> Graph | None:
    try:
        return Graph.from_csr(ptr, indices, sources)
    except ValueError:
        return None


def _directed(edge_index: Tensor, target: int, sources: int, nodes: int) -> Graph | None:
    """The graph of ``edge_index`` ``[2, E]``, whose row ``target`` holds the destinations."""
    source, destination = edge_index[1 - target], edge_index[target]
    if not (_in_range(source, sources) and _in_range(destination, nodes)):
        return None
    indptr, perm = _group(destination)(destination.contiguous(), nodes)
    return Graph(indptr, source[perm.long()].to(torch.int32), perm.long(), sources)


def _graph_of(build: Callable[..., Graph | None], sizes: tuple[int, ...], *tensors: Tensor) -> Graph:
    graph = _graphs.get(build, sizes, *tensors)
    if graph is None:
        raise _Unsupported("index out of range")
    return graph


# The operations, on operands that are known to fit


class _Operation:
    """One differentiable call: ``forward`` on kernels, its ``backward`` on kernels, and ``pyg``, the same in PyG's own operations, which are run
    again where the backward is itself to be differentiated."""

    name: str

    def forward(self, operands: tuple[Tensor, ...], needs: Sequence[bool]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """The result, and what backward needs: the operands, None for those it does not, and more."""
        raise NotImplementedError

    def backward(self, kept: tuple[Tensor, ...], grad: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
        """The gradients of the operands."""
        raise NotImplementedError

    def pyg(self, *operands: Tensor) -> Tensor:
        """The result, in PyG's operations."""
        raise NotImplementedError

    def __call__(self, *operands: Tensor) -> Tensor:
        if torch.is_grad_enabled() and any(operand.requires_grad for operand in operands):
            return _differentiable(self, *operands)
        return self.forward(operands, [False] * len(operands))[0]


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operation: _Operation, *operands: Tensor) -> Tensor:
        out, kept = operation.forward(operands, ctx.needs_input_grad[1:])
        ctx.operation, ctx.like = operation, [(o.shape, o.dtype) for o in operands]
        ctx.save_for_backward(*kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        operation, needs = ctx.operation, ctx.needs_input_grad[1:]
        if not torch.is_grad_enabled():
            return None, *operation.backward(ctx.saved_tensors, grad.contiguous(), needs)
        _count(operation.name, "double backward")
        # An operand that was not kept is one that the operation is linear in: its gradient does not depend on it.
        operands = [
            kept if kept is not None else grad.new_zeros(shape, dtype=dtype).requires_grad_()
            for kept, (shape, dtype) in zip(ctx.saved_tensors, ctx.like, strict=False)
        ]
        wanted = [operand for operand, needed in zip(operands, needs, strict=True) if needed]
        found = iter(torch.autograd.grad(operation.pyg(*operands), wanted, grad, create_graph=True))
        return None, *(next(found) if needed else None for needed in needs)


_differentiable: Callable[..., Tensor] = _Differentiable.apply


@dataclass
class _Reduce(_Operation):
    """The rows of ``x`` ``[E, K]`` reduced in the groups of ``graph``, as ``scatter`` or ``segment`` (``name``) does it."""

    name: str
    graph: Graph
    reduce: str

    def forward(self, operands: tuple[Tensor, ...], needs: Sequence[bool]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        (x,) = operands
        out = _reduced(x.contiguous(), self.graph, self.reduce)
        if self.reduce in ("sum", "mean"):
            return out, (None,)
        if self.name == "segment":
            out = torch.where(out.isinf(), 0, out)  # as PyG, which takes infinity for an empty segment
        return out, (x, out)

    def backward(self, kept: tuple[Tensor, ...], grad: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
        if self.reduce == "mul":
            indptr, indices = self.graph.indptr, self.graph.indices
            return (_segment_mul_backward(grad)(indptr, indices, grad, kept[0].contiguous()),)
        if self.reduce == "mean":
            grad = _divided(grad, self.graph)
        if self.reduce in ("sum", "mean"):
            return (_spread(grad, self.graph),)
        x, out = kept
        taken = x == _spread(out, self.graph)
        # Equals share the gradient, and torch counts the zero that PyG starts from among them.
        ties = _reduced(taken.to(x.dtype), self.graph, "sum") + (out == 0)
        return (taken * _spread(grad / ties, self.graph),)

    def pyg(self, *operands: Tensor) -> Tensor:
        if self.name == "segment":
            return _original("segment")(*operands, self.graph.indptr.long(), self.reduce)
        return _original("scatter")(*operands, _index(self.graph), 0, self.graph.num_nodes, self.reduce)


@dataclass
class _Softmax(_Operation):
    """Softmax of ``x`` ``[E, H]`` in the groups of ``graph``."""

    graph: Graph
    name = "softmax"

    def forward(self, operands: tuple[Tensor, ...], needs: Sequence[bool]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        (x,) = operands
        structure = self.graph.indptr, self.graph.rows, list(self.graph.schedule)
        alpha = _edge_softmax(x)(*structure, x.index_select(0, self.graph.perm))
        return _unordered(alpha, self.graph), (x, alpha)

    def backward(self, kept: tuple[Tensor, ...], grad: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
        structure = self.graph.indptr, self.graph.rows, list(self.graph.schedule)
        grad = grad.index_select(0, self.graph.perm)
        return (_unordered(_edge_softmax_backward(grad)(*structure, kept[1], grad), self.graph),)

    def pyg(self, *operands: Tensor) -> Tensor:
        return _original("softmax")(*operands, _index(self.graph), None, self.graph.num_nodes, 0)


@dataclass
class _Aggregate(_Operation):
    """``weight[e] * x[j]`` reduced over the edges e = (j, i) of every node i; operands ``x`` ``[M, F]`` and, or not, ``weight`` ``[E]``.
    ``ordered``: the weights are in CSR order."""

    name: str
    graph: Graph
    reduce: str
    ordered: bool = False

    def forward(self, operands: tuple[Tensor, ...], needs: Sequence[bool]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        x, g, weight = operands[0].contiguous(), self.graph, None
        if len(operands) == 2:
            weight = operands[1] if self.ordered else operands[1].index_select(0, g.perm)
        out, _ = _aggregate(x)(g.indptr, g.indices, list(g.schedule), x, weight, self.reduce)
        return out, (operands[0] if any(needs[1:]) else None, *operands[1:])

    def backward(self, kept: tuple[Tensor, ...], grad: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
        g = self.graph
        if self.reduce == "mean":
            grad = _divided(grad, g)
        gradients: list[Tensor | None] = [None] * len(kept)
        if needs[0]:
            indptr, indices, edges, schedule = g.transposed
            weight = None
            if len(kept) == 2:
                places = edges.long() if self.ordered else g.perm[edges.long()]
                weight = kept[1].index_select(0, places)
            gradients[0], _ = _aggregate(grad)(indptr, indices, list(schedule), grad, weight, "sum")
        if any(needs[1:]):
            dot = _edge_dot(grad)(g.rows, g.indices, kept[0].contiguous(), grad, None).to(kept[1].dtype)
            gradients[1] = dot if self.ordered else _unordered(dot, g)
        return tuple(gradients)

    def pyg(self, *operands: Tensor) -> Tensor:
        g = self.graph
        messages = operands[0].index_select(0, g.indices.long())
        if len(operands) == 2:
            messages = messages * operands[1].index_select(0, g.perm).unsqueeze(1)
        return _original("scatter")(messages, g.rows.long(), 0, g.num_nodes, self.reduce)


def _unordered(values: Tensor, graph: Graph) -> Tensor:
    """Values in CSR order, in the caller's."""
    return torch.empty_like(values).index_copy_(0, graph.perm, values)


def _index(graph: Graph) -> Tensor:
    """The destination of each of the caller's edges, int64."""
    if "index" not in graph.notes:
        graph.notes["index"] = _unordered(graph.rows, graph).long()
    return graph.notes["index"]


def _spread(rows: Tensor, graph: Graph) -> Tensor:
    """Its group's row for each member. torch reads rows faster than our kernel writes them out of order, until they no longer fit a cache: 0.7 and
    1.3 ms for 100,000 rows of 16 floats, 30 and 13 for 1.2 million (one thread of Zen 5)."""
    if rows.is_cuda or graph.num_edges * rows.size(1) > 2**23:
        return _segment_gather(rows)(graph.indptr, graph.indices, rows)
    return rows.index_select(0, _index(graph))


def _reduced(x: Tensor, graph: Graph, reduce: str) -> Tensor:
    """The groups' rows, reduced. On a CPU the aggregation, given the schedule that the graph keeps, is the segment reduction of floats."""
    if x.is_cuda or reduce == "mul" or not x.is_floating_point():
        return _segment_reduce(x)(graph.indptr, graph.indices, x, reduce)[0]
    return _aggregate(x)(graph.indptr, graph.indices, list(graph.schedule), x, None, reduce)[0]


def _divided(grad: Tensor, graph: Graph) -> Tensor:
    """The gradient of a mean's sum, in float32: float16 counts only to 65,504."""
    key = ("count", compute_dtype(grad))
    if key not in graph.notes:
        graph.notes[key] = graph.in_degree.clamp_min(1).unsqueeze(1).to(key[1])
    return (grad / graph.notes[key]).to(grad.dtype)


# PyG's functions: which calls the operations take


def _check_tensors(*tensors: Tensor) -> None:
    """Plain dense tensors on one device, in eager mode."""
    for tensor in tensors:
        _require(type(tensor) in (Tensor, torch.nn.Parameter), "not a plain tensor")
    device = tensors[0].device
    _require(device.type in ("cpu", "cuda"), f"device {device.type}")
    _require(all(t.layout == torch.strided and t.device == device for t in tensors), "layout or device")
    _require(torch._C._get_tracing_state() is None, "torch.jit.trace")
    _require(not torch._C._are_functorch_transforms_active(), "torch.func transform")
    _require(forward_ad._current_level < 0, "forward-mode gradients")
    _require(not torch._C._len_torch_dispatch_stack(), "torch_dispatch mode")
    _require(device.type == "cpu" or not torch.cuda.is_current_stream_capturing(), "CUDA graph capture")


def _check_types(x: Tensor, *others: Tensor | None, integers: bool = False) -> None:
    _require(x.dtype in FLOATS or (integers and x.dtype in INTEGERS), f"{x.dtype}")
    _require(all(o is None or o.dtype == x.dtype for o in others), "mixed dtypes")
    _require(x.numel() > 0, "empty")


def _check_size(name: str, x: Any, edges: int | None = None) -> None:
    """Asked first, of anything, since a small call has no time to lose: ``x`` has a row for each edge, unless their number is given."""
    if type(x) is Tensor and not x.is_cuda:
        elements = x.numel() if edges is None else edges * x.size(-1) if x.dim() else 0
        _require(elements >= SMALLEST[name][1], "small")


def _check_width(name: str, x: Tensor, features: int) -> None:
    _require(x.is_cuda or features >= SMALLEST[name][0], "small")


def _check_no_autocast(x: Tensor) -> None:
    """For functions that autocast would run in another type."""
    _require(not torch.is_autocast_enabled(x.device.type), "autocast")


def _dimension(x: Tensor, dim: int) -> int:
    _require(-x.dim() <= dim < x.dim(), "dim")
    return dim % x.dim()


def _by_rows(operation: _Operation, x: Tensor, dim: int) -> Tensor:
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
    _require(reduce in ("sum", "mean", "min", "max", "mul"), f"reduce={reduce!r}")
    _check_types(src, integers=reduce != "mean")
    _require(index.dtype == torch.int64 and index.dim() == 1, "index")
    dim = _dimension(src, dim)
    _require(index.numel() == src.size(dim), "index of another length")
    if src.is_cuda and torch_geometric.typing.WITH_TORCH_SCATTER:  # which gives it to one of them
        _check_no_ties(reduce, src)
    _check_width("scatter", src, src.numel() // index.numel())
    size = int(index.max()) + 1 if dim_size is None else dim_size
    return _by_rows(_Reduce("scatter", _graph_of(_grouped, (size,), index), reduce), src, dim)


def _segment(src: Tensor, ptr: Tensor, reduce: str) -> Tensor:
    _check_size("segment", src)
    _check_tensors(src, ptr)
    _require(reduce in ("sum", "mean", "min", "max"), f"reduce={reduce!r}")
    _require(not torch_geometric.typing.WITH_TORCH_SCATTER or reduce in ("sum", "mean"), "torch-scatter's segments")
    _check_types(src)
    _check_no_ties(reduce, src)
    _require(ptr.dtype in INTEGERS and ptr.dim() == 1, "ptr")
    _check_width("segment", src, src.numel() // src.size(0))
    return _by_rows(_Reduce("segment", _graph_of(_segmented, (src.size(0),), ptr), reduce), src, 0)


def _softmax(src: Tensor, index: Tensor | None, ptr: Tensor | None, num_nodes: int | None, dim: int) -> Tensor:
    _check_size("softmax", src)
    index = index.as_tensor() if isinstance(index, Index) else index
    structure = index if ptr is None else ptr
    if structure is None:
        raise _Unsupported("no index")
    _check_tensors(src, structure)
    _check_types(src)
    _check_not_double_on_gpu(src)
    _check_no_autocast(src)
    _require(structure.dtype == torch.int64 and structure.dim() == 1, "index or ptr")
    dim = _dimension(src, dim)
    _check_width("softmax", src, src.numel() // src.size(dim))
    if ptr is not None:
        _require(dim == 0, "ptr along another dim")
        graph = _graph_of(_segmented, (src.size(0),), ptr)
    else:
        _require(structure.numel() == src.size(dim), "index of another length")
        size = int(structure.max()) + 1 if num_nodes is None else num_nodes
        graph = _graph_of(_grouped, (size,), structure)
    # A group of nothing but -inf is NaN in PyG and 0 in our kernel; looking for it on a GPU would wait for the device.
    _require(src.is_cuda or bool(src.detach().amin() > -torch.inf), "scores of -inf or NaN")
    return _by_rows(_Softmax(graph), src, dim)


def _given(tensor: Tensor | None) -> tuple[Tensor, ...]:
    return () if tensor is None else (tensor,)


def _check_not_double_on_gpu(x: Tensor) -> None:
    _require(x.dtype != torch.float64 or not x.is_cuda, "float64 on a GPU")


def _check_no_ties(reduce: str, *operands: Tensor) -> None:
    """For functions that share the gradient of a minimum or maximum among equals in a way of their own."""
    differentiable = torch.is_grad_enabled() and any(operand.requires_grad for operand in operands)
    _require(reduce not in ("min", "max") or not differentiable, "gradient of ties")


def _check_aggregate(x: Tensor, weight: Tensor | None, reduce: str) -> None:
    _check_types(x, weight)
    _check_not_double_on_gpu(x)
    _require(x.dim() == 2, "features of other than 2 dimensions")
    _check_no_ties(reduce, x, *_given(weight))


def _spmm(src: Any, other: Tensor, reduce: str) -> Tensor:
    reduce = "sum" if reduce == "add" else reduce
    _require(reduce in ("sum", "mean", "min", "max"), f"reduce={reduce!r}")
    if isinstance(src, EdgeIndex):
        raise _Unsupported("EdgeIndex, counted as EdgeIndex.matmul")
    _require(isinstance(src, Tensor) and src.layout == torch.sparse_csr, f"{getattr(src, 'layout', 'SparseTensor')}")
    _require(src.dim() == 2 and src.dense_dim() == 0, "batches or dense values")
    _require(not src.requires_grad, "gradient of the matrix")
    _check_size("spmm", other, src._nnz() if other.requires_grad else src._nnz() // 8)
    _check_tensors(other, src.crow_indices(), src.col_indices(), src.values())
    _check_no_autocast(other)
    _check_aggregate(other, src.values(), reduce)
    _require(other.size(0) == src.size(1), "sizes that do not fit")
    _require(reduce in ("sum", "mean") or not other.is_cuda, "minimum or maximum on a GPU")
    _check_width("spmm", other, other.size(1))
    graph = _graph_of(_compressed, (src.size(1),), src.crow_indices(), src.col_indices())
    return _Aggregate("spmm", graph, reduce, ordered=True)(other, src.values())


def _matmul(input: EdgeIndex, other: Tensor, value: Tensor | None, reduce: str, transpose: bool) -> Tensor:
    reduce = {"add": "sum", "amin": "min", "amax": "max"}.get(reduce, reduce)
    _require(reduce in ("sum", "mean", "min", "max"), f"reduce={reduce!r}")
    _require(type(input) is EdgeIndex, "not a plain EdgeIndex")
    _require(input.is_sorted_by_col if transpose else input.is_sorted_by_row, "not sorted")
    edges = input.as_tensor()
    _check_size("EdgeIndex.matmul", other, edges.size(1))
    _check_tensors(other, edges, *_given(value))
    _check_no_autocast(other)
    _check_aggregate(other, value, reduce)
    nodes, sources = input.get_sparse_size()[:: -1 if transpose else 1]
    _require(other.size(0) == sources and (value is None or value.shape == edges.shape[1:]), "sizes that do not fit")
    _check_width("EdgeIndex.matmul", other, other.size(1))
    graph = _graph_of(_directed, (int(transpose), sources, nodes), edges)
    return _Aggregate("EdgeIndex.matmul", graph, reduce, ordered=True)(other, *_given(value))


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
    _require(kind.message in _PLAIN_MESSAGES + _WEIGHTED_MESSAGES, "a message of its own")
    _require(kind.aggregate is MessagePassing.aggregate and kind.update is MessagePassing.update, "steps of its own")
    _require(
        kind._index_select is MessagePassing._index_select and not _STEPS & layer.__dict__.keys(), "steps of its own"
    )
    _require(not layer.explain and not any(getattr(layer, hooks) for hooks in _HOOKS), "explanation or hooks")
    module = layer.aggr_module
    _require(type(module) in _REDUCTIONS, "aggregation")
    _require(not (module._forward_hooks or module._forward_pre_hooks or _has_any_global_hook()), "explanation or hooks")
    _require(layer.node_dim in (-2, 0), "node_dim")
    weight: Any = arguments.get("edge_weight") if kind.message in _WEIGHTED_MESSAGES else None
    given = arguments["size"] or (None, None)
    target = int(layer.flow == "source_to_target")
    pair = x if isinstance(x, tuple | list) else (x, None) if target else (None, x)
    _check_tensors(source, edge_index, *_given(weight))
    _check_aggregate(source, weight, _REDUCTIONS[type(module)])
    _require(edge_index.dtype in INTEGERS and edge_index.dim() == 2 and edge_index.size(0) == 2, "edge_index")
    _require(weight is None or weight.shape == edge_index.shape[1:], "edge_weight")
    sizes = [_size_of(part, size) for part, size in zip(pair, given, strict=True)]
    nodes: Any = sizes[target] if sizes[target] is not None else sizes[1 - target]
    _check_width("MessagePassing.propagate", source, source.size(1))
    graph = _graph_of(_directed, (target, source.size(0), nodes), edge_index)
    return _Aggregate("MessagePassing.propagate", graph, _REDUCTIONS[type(module)])(source, *_given(weight))


def _size_of(x: Any, given: int | None) -> int | None:
    if not isinstance(x, Tensor):
        return given
    _require(x.dim() == 2 and given in (None, x.size(0)), "sizes that do not fit")
    return x.size(0)


# Taking hold of PyG's functions


class _Held(NamedTuple):
    """A function that calls :func:`_call` while ``ours`` is its code."""

    name: str | None  # in the report
    function: Any
    pygs: types.CodeType
    ours: types.CodeType
    original: Callable[..., Any]
    handler: Callable[..., Any]


_held: dict[str, _Held] = {}
_counts: Counter[tuple[str, str]] = Counter()
_counting = threading.Lock()
_KERNELS = "kernels"


def _count(name: str, where: str) -> None:
    with _counting:
        _counts[name, where] += 1


def _counted_once(name: str) -> bool:
    _count(name, "torch.compile or torch.export")
    return True


# so it is run, once, while a graph is traced
_count_traced: Callable[[str], bool] = torch.compiler.assume_constant_result(_counted_once)


def _original(name: str) -> Callable[..., Any]:
    """PyG's own function of that name in the report."""
    return next(held.original for held in _held.values() if held.name == name)


def _call(key: str, *arguments: Any) -> Any:
    """What a function that was taken hold of does instead."""
    name, *_, original, handler = _held[key]
    if name is None:
        return handler(*arguments)
    if torch.compiler.is_compiling():
        _count_traced(name)
        return original(*arguments)
    try:
        out = handler(*arguments)
    except _Unsupported as unsupported:
        _count(name, str(unsupported))
        return original(*arguments)
    _count(name, _KERNELS)
    return out


def _take_hold(name: str | None, function: Any, handler: Callable[..., Any]) -> None:
    key = f"{function.__module__}.{function.__qualname__}"
    held = _held.get(key)
    if held is None or held.function is not function or function.__code__ not in (held.pygs, held.ours):
        ours, original = _line(function, key), _copy(function)
        held = _held[key] = _Held(name, function, function.__code__, ours, original, handler)
    function.__code__ = held.ours


def _line(function: Any, key: str) -> types.CodeType:
    """The code that calls :func:`_call` with the function's own parameters."""
    names = ", ".join(inspect.signature(function).parameters)
    text = f"def {function.__name__}({names}): from {__name__} import _call; return _call({key!r}, {names})"
    constants = compile(text, function.__code__.co_filename, "exec").co_consts
    code = next(constant for constant in constants if isinstance(constant, types.CodeType))
    return code.replace(co_firstlineno=function.__code__.co_firstlineno)


def _copy(function: Any) -> Callable[..., Any]:
    return types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)


def _take_hold_of_layer(kind: Any) -> None:
    """Of the ``propagate`` that PyG generated for a class of layers."""
    function: Any = kind.__dict__.get("_jinja_propagate")
    if not isinstance(function, types.FunctionType) or not function.__module__.endswith("_propagate"):
        return
    names = list(inspect.signature(function).parameters)[2:]

    def handler(layer: MessagePassing, edge_index: Any, *arguments: Any) -> Tensor:
        return _propagate(layer, edge_index, dict(zip(names, arguments, strict=True)))

    _take_hold("MessagePassing.propagate", function, handler)


def _set_templates(layer: MessagePassing, raise_on_error: bool) -> None:
    """PyG generates ``propagate`` for the class of a layer, and we take hold of it."""
    _held[_TEMPLATES].original(layer, raise_on_error)
    patch_pyg.extend(type(layer))


_TEMPLATES = "torch_geometric.nn.conv.message_passing.MessagePassing._set_jittable_templates"


def _subclasses(kind: Any) -> Iterator[Any]:
    for below in kind.__subclasses__():
        yield below
        yield from _subclasses(below)


def _take_hold_of_all() -> None:
    _take_hold("scatter", scatter, _scatter)
    _take_hold("segment", segment, _segment)
    _take_hold("softmax", softmax, _softmax)
    _take_hold("spmm", spmm, _spmm)
    _take_hold("EdgeIndex.matmul", torch_geometric.edge_index._spmm, _matmul)
    _take_hold(None, MessagePassing._set_jittable_templates, _set_templates)
    for kind in (MessagePassing, *_subclasses(MessagePassing)):
        _take_hold_of_layer(kind)


def _put_back() -> None:
    for held in _held.values():
        held.function.__code__ = held.pygs
    _graphs.clear()


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
                _counts.clear()
                _take_hold_of_all()
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
                _put_back()

    def report(self) -> dict[str, dict[str, Any]]:
        """Calls since the outermost activation: ``{"scatter": {"kernels": 12, "pyg": {"empty": 3}}, ...}``, how many ran on our kernels, and how many
        on PyG's own code for which reason. A function inside another counts too. What ``torch.compile`` traces runs PyG's code and is counted once,
        when it is traced; a backward that is itself differentiated is counted as "double backward"."""
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


patch_pyg = PatchPyG()
