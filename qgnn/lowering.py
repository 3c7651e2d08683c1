"""From the forward code of a model to the program of a frozen one: followed with :mod:`torch.fx`, its layers taken apart into
:mod:`qgnn.parts`."""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from torch import Tensor, fx, nn
from torch.fx.node import Argument
from torch.fx.proxy import TraceError
from torch_geometric import utils

from .nn import GATConv, GCNConv, GINConv, Linear, SAGEConv
from .nn.conv import leading_linear
from .parts import (
    Affine,
    Attention,
    Codec,
    CodecSpec,
    Constant,
    Norm,
    Operand,
    Product,
    Sum,
    graph_of,
    graphs_of,
    pool,
)
from .qtensor import rounded_bits
from .quant import ColumnQuantizer, GroupQuantizer, LayerQuantizer, batched_graph

_LAYERS = (GATConv, GCNConv, GINConv, Linear, SAGEConv)
_KINDS = {GATConv: "gat", GCNConv: "gcn", GINConv: "gin", Linear: "linear", SAGEConv: "sage"}
_POOLS = {pyg.global_add_pool: "sum", pyg.global_mean_pool: "mean", pyg.global_max_pool: "max"}
_AGGREGATIONS = {pyg.SumAggregation: "sum", pyg.MeanAggregation: "mean", pyg.MaxAggregation: "max"}
_OPAQUE = (
    *_POOLS, pool, batched_graph, utils.scatter, utils.segment, utils.softmax, utils.spmm, utils.degree, utils.add_self_loops,
    utils.add_remaining_self_loops, utils.remove_self_loops, utils.to_dense_batch,
)  # fmt: skip
"""PyG's functions whose code asks for sizes and types, which are not known while it is followed: each is one step."""


def _one_step(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which becomes one step of a program where what it gets is followed."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        proxy = next((a for a in (*args, *kwargs.values()) if isinstance(a, fx.Proxy)), None)
        if proxy is None:
            return function(*args, **kwargs)
        return proxy.tracer.create_proxy("call_function", function, args, kwargs)

    return call


RELU: tuple[Any, ...] = (torch.relu, F.relu, torch.relu_, F.relu_, "relu", "relu_")
ADD: tuple[Any, ...] = (operator.add, torch.add, "add")
ADD_TO: tuple[Any, ...] = (operator.iadd, "add_")
"""Sums in place, of the first argument."""
_UPDATES = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow, operator.imatmul)
_DROPOUT = (F.dropout, torch.dropout, F.alpha_dropout, F.feature_alpha_dropout, F.dropout1d, F.dropout2d)
_ELEMENTWISE: tuple[Any, ...] = (
    *RELU, *_DROPOUT, F.elu, F.gelu, F.leaky_relu, F.silu, F.normalize, torch.tanh, torch.sigmoid, "tanh", "sigmoid", "float", "contiguous"
)  # fmt: skip
"""Functions whose result has the rows of their first argument."""


@dataclass
class Lowered:
    """A program and what it consists of (:class:`qgnn.integer.IntegerModel`).

    ``origins`` says whose work a :class:`Codec` or an :class:`Operand` does, by the part's name: the quantizer, and the how manieth call of it;
    ``rows``, for a value, an earlier one that has the same rows.
    """

    program: fx.Graph
    parts: dict[str, nn.Module] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    floats: dict[str, str] = field(default_factory=dict)
    origins: dict[str, tuple[nn.Module, int]] = field(default_factory=dict)
    rows: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def add(self, part: nn.Module, words: Sequence[str]) -> str:
        """Adds a part, and gives it a name."""
        base = "_".join(filter(None, words))
        name, number = base, 1
        while name in self.parts:
            name, number = f"{base}_{number}", number + 1
        self.parts[name] = part
        return name

    def root(self, node: fx.Node) -> fx.Node:
        """The earliest value that has the rows of this one, as far as that is known."""
        while node in self.rows:
            node = self.rows[node]
        return node


def lower(model: nn.Module, inputs: Sequence[str], *, whole: bool = False) -> Lowered:
    """Follows ``model``, in evaluation, which gets ``inputs`` by their names. Nothing is taken over yet: see :mod:`qgnn.fusion`. With ``whole``,
    layers are not taken apart: the program then computes what the model does, if its code could be followed.

    Raises:
        ValueError: a layer is not ready to be frozen, or the forward code asks for values.
    """
    # `self.pool = global_mean_pool` would escape torch.fx, which looks for functions among globals.
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if any(value is function for function in _OPAQUE):
                setattr(module, name, _one_step(value))
    tracer = _Lowering(inputs, whole)
    with _pyg_aggregations():
        try:
            tracer.lowered.program = tracer.trace(model)
        except (TraceError, TypeError) as error:
            if isinstance(error, TypeError) and "Proxy" not in str(error):
                raise
            raise ValueError(
                f"freeze follows the forward code once for all inputs, and that of {'.'.join(tracer.inside[-1:]) or 'the model'} depends on "
                f"values or sizes: {error}; use torch functions in place of Python's if, for and len over tensors"
            ) from None
    lowered = tracer.lowered
    _tidy(lowered, model)
    if not whole and not any(isinstance(part, Codec | Operand) for part in lowered.parts.values()):
        _refuse(lowered)
    return lowered


def _refuse(lowered: Lowered) -> None:
    if not lowered.kinds:
        raise ValueError("the model has no layer of qgnn that runs; convert it first")
    name, reason = next(iter(lowered.floats.items()))
    raise ValueError(
        f"nothing in this model runs on integers; layer {name}: {reason}; convert the model, with another scheme than fp32"
    )


@contextlib.contextmanager
def _pyg_aggregations() -> Any:
    """PyG's Aggregation checks shapes before it is called; while code is followed there are none."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return nn.Module.__call__(self, *args, **kwargs)

    with patch.object(pyg.Aggregation, "__call__", call):
        yield


class _Lowering(fx.Tracer):
    """Follows a model and writes parts in place of its layers."""

    def __init__(self, inputs: Sequence[str], whole: bool) -> None:
        super().__init__(autowrap_functions=_OPAQUE)
        self._autowrap_search += [pyg, pyg.pool, utils]
        self.inputs, self.whole = inputs, whole
        self.lowered = Lowered(fx.Graph())
        self.graphs: dict[tuple[Any, ...], fx.Proxy] = {}
        self.calls: dict[nn.Module, int] = {}
        self.inside: list[str] = []

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        given = {name: self.create_proxy("placeholder", name, (), {}) for name in self.inputs}
        if isinstance(self.root, _LAYERS) and not self.whole:
            return lambda root: self._layer(root, (), given), [self.root]
        return lambda root: root_fn(root, **given), [self.root]

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **others: Any) -> fx.Proxy:
        proxy = super().create_proxy(kind, target, args, kwargs, *more, **others)
        if kind in ("call_function", "call_method"):
            ends = [self._root(a) for a in args if isinstance(a, fx.Proxy)]
            same = target in (*ADD, *ADD_TO) and len(ends) == 2 and ends[0] is ends[1]
            if same or (ends and target in _ELEMENTWISE):
                self.lowered.rows[proxy.node] = ends[0]
        return proxy

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        return attr_val  # parameters are read, not followed

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if isinstance(m, _LAYERS) and self.whole:
            return self._step(m, self.path_of_module(m), "whole", args, kwargs)
        if isinstance(m, _LAYERS):
            return self._layer(m, args, kwargs)
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            return self._batch_norm(m, args[0] if args else kwargs["input"])
        if isinstance(m, pyg.BatchNorm):
            return self._batch_norm(m.module, args[0] if args else kwargs["x"])
        if type(m) in _AGGREGATIONS and set(kwargs) <= {"x", "index"}:
            given = dict(zip(("x", "index"), args, strict=False)) | kwargs
            pooled = (given["x"], given.get("index"), None, _AGGREGATIONS[type(m)])
            return self.create_proxy("call_function", pool, pooled, {})
        if _is_opaque(m):
            name = self.path_of_module(m)
            if isinstance(m, pyg.MessagePassing) or next(m.parameters(), None) is not None:
                self._float(name, f"{type(m).__name__} is no layer of qgnn")
            return self._step(m, name, "float", args, kwargs)
        if next(m.parameters(recurse=False), None) is not None:
            self._float(self.path_of_module(m), f"{type(m).__name__} is no layer of qgnn")
        self.inside.append(self.path_of_module(m))
        out = forward(*args, **kwargs)
        self.inside.pop()
        return out

    # -- steps of the program ---------------------------------------------------------------------------------------------------------------

    def _step(
        self, part: nn.Module, layer: str, role: str, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Adds a part, and a step that calls it."""
        name = self.lowered.add(part, [*layer.split("."), role])
        given = {key: value for key, value in (kwargs or {}).items() if value is not None}
        return self.create_proxy("call_module", name, args, given)

    def _origin(self, proxy: Any, quantizer: nn.Module) -> None:
        count = self.calls.get(quantizer, 0)
        self.calls[quantizer] = count + 1
        self.lowered.origins[str(proxy.node.target)] = (quantizer, count)

    def _float(self, name: str, reason: str) -> None:
        self.lowered.kinds[name] = "float"
        self.lowered.floats[name] = reason

    def _root(self, value: Any) -> fx.Node:
        return self.lowered.root(value.node)

    def _like(self, value: Any, source: Any) -> Any:
        """``value``, known to have the rows of ``source``."""
        self.lowered.rows[value.node] = self._root(source)
        return value

    def _graph(self, edges: Any, source: Any, target: Any, loops: bool) -> Any:
        """The graph of a layer; the layers that sum over the same edges share it."""
        ends = (self._root(source), None if target is None else self._root(target))
        key = (edges.node, ends, loops)
        if key not in self.graphs:
            maps = tuple(None if end is None else fx.Proxy(end, self) for end in ends)
            self.graphs[key] = self.create_proxy("call_function", graph_of, (edges, *maps, loops), {})
        return self.graphs[key]

    # -- layers ------------------------------------------------------------------------------------------------------------------------------

    def _layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = self.path_of_module(layer) or "model"
        given = inspect.signature(type(layer).forward).bind(layer, *args, **kwargs).arguments
        reason = _why_float(layer, name, given)
        if reason:
            self._float(name, reason)
            return self._step(layer, name, "float", args, kwargs)
        self.lowered.kinds[name] = _KINDS[type(layer)]
        x = given["x"]
        if isinstance(layer, Linear):
            return self._like(self._product(layer, name, x, layer.bias), x)
        source, target = x if isinstance(x, tuple | list) else (x, None)
        edges = given["edge_index"]
        loops = isinstance(layer, GCNConv | GATConv) and layer.add_self_loops
        # destinations without features are numbered by `size`, or are as many as the sources
        bipartite = isinstance(x, tuple | list) and target is not source
        graph = self._graph(edges, source, target if bipartite else None, loops)
        ends = target if bipartite else source
        if isinstance(layer, GCNConv):
            out = self._gcn(layer, name, source, graph)
        elif isinstance(layer, GATConv):
            out = self._gat(layer, name, source, ends, graph)
        elif isinstance(layer, GINConv):
            out = self._gin(layer, name, source, ends, graph)
        else:
            assert isinstance(layer, SAGEConv), "the last of the layers"
            out = self._sage(layer, name, source, ends, graph)
        return out if ends is None else self._like(out, ends)

    def _codec(self, quantizer: LayerQuantizer, name: str, x: Any, graph: Any = None) -> tuple[Codec, Any]:
        codec = _codec_of(quantizer, name, graph is not None)
        packed = self._step(codec, name, "codec", (x,) if graph is None else (x, graph))
        self._origin(packed, quantizer)
        return codec, self._like(packed, x)

    def _product(
        self, linear: Linear | GCNConv, name: str, x: Any, bias: Tensor | None, *, graph: Any = None, addend: Any = None
    ) -> Any:
        quantizer, weight = linear.quantizer, linear.lin.weight if isinstance(linear, GCNConv) else linear.weight
        assert quantizer is not None, "as its layer is quantized"
        codec, packed = self._codec(quantizer, name, x, graph)
        codes = quantizer.weight_codes(weight.detach())
        part = Product(name, codec, codes.data, codes.container, codes.step, bias)
        return self._like(self._step(part, name, "product", (packed,), {"addend": addend}), x)

    def _operand(self, quantizer: nn.Module | None, name: str, x: Any) -> tuple[Operand, Any]:
        assert isinstance(quantizer, ColumnQuantizer), "as its layer is quantized"
        operand = Operand(name, *quantizer.codes())
        packed = self._step(operand, name, "operand", (x,))
        self._origin(packed, quantizer)
        return operand, self._like(packed, x)

    def _sum(
        self, name: str, operand: Operand, packed: Any, graph: Any, norm: Norm, bias: Tensor | None, *,
        self_scale: Tensor | None = None, addend: Any = None,
    ) -> Any:  # fmt: skip
        return self._step(Sum(name, operand, norm, bias, self_scale), name, "sum", (packed, graph), {"addend": addend})

    def _gcn(self, layer: GCNConv, name: str, x: Any, graph: Any) -> Any:
        scaled = graph if layer.normalize else None
        operand, packed = self._operand(
            layer.operand_quantizer, name, self._product(layer, name, x, None, graph=scaled)
        )
        return self._sum(name, operand, packed, graph, "gcn" if layer.normalize else "none", layer.bias)

    def _gin(self, layer: GINConv, name: str, x: Any, target: Any, graph: Any) -> Any:
        linear = leading_linear(layer.nn) if layer.first else None
        within = f"{name}.nn" if linear is layer.nn else f"{name}.nn.{_child_name(layer.nn, linear)}"

        def given(h: Any) -> Any:
            """What a node's map is before the sum."""
            if linear is None:
                return h
            self.lowered.kinds[within] = "linear"
            return self._product(linear, within, h, None)

        own = 1 + layer.eps.detach()
        bias = None if linear is None else linear.bias
        norm: Norm = "mean" if layer.reduce == "mean" else "none"
        operand, packed = self._operand(layer.operand_quantizer, name, given(x))
        if target is x:
            out = self._sum(name, operand, packed, graph, norm, bias, self_scale=own)
        else:
            addend = None if target is None else given(target) * float(own)
            out = self._sum(name, operand, packed, graph, norm, bias, addend=addend)
        if target is not None:
            out = self._like(out, target)
        if linear is None:
            return layer.nn(out)
        for part in list(layer.nn)[1:] if isinstance(layer.nn, nn.Sequential) else []:
            out = part(out)
        return out

    def _sage(self, layer: SAGEConv, name: str, x: Any, target: Any, graph: Any) -> Any:
        norm: Norm = "mean" if layer.reduce == "mean" else "none"
        own = None
        if layer.root_weight and target is not None:
            own = self._linear_of(layer.lin_r, f"{name}.lin_r", target)
        if layer.project:
            x = torch.relu(self._linear_of(layer.lin, f"{name}.lin", x))
        left = f"{name}.lin_l"
        self.lowered.kinds[left] = "linear"
        if layer.first:
            product = self._product(layer.lin_l, left, x, None)
            operand, packed = self._operand(layer.operand_quantizer, name, product)
            out = self._sum(name, operand, packed, graph, norm, layer.lin_l.bias, addend=own)
        else:
            operand, packed = self._operand(layer.operand_quantizer, name, x)
            summed = self._sum(name, operand, packed, graph, norm, None)
            out = self._product(layer.lin_l, left, summed, layer.lin_l.bias, addend=own)
        return F.normalize(out, p=2.0, dim=-1) if layer.normalize else out

    def _linear_of(self, linear: Linear, name: str, x: Any) -> Any:
        self.lowered.kinds[name] = "linear"
        return self._product(linear, name, x, linear.bias)

    def _gat(self, layer: GATConv, name: str, x: Any, target: Any, graph: Any) -> Any:
        to_source, to_target = (layer.lin or layer.lin_src), (layer.lin or layer.lin_dst)
        assert to_source is not None and to_target is not None, "lin, or lin_src and lin_dst"
        prefix = "lin" if layer.lin is not None else "lin_src"
        operand, packed = self._operand(
            layer.operand_quantizer, name, self._linear_of(to_source, f"{name}.{prefix}", x)
        )
        ends = None
        if target is not None and (target is not x or to_target is not to_source):
            _, ends = self._operand(
                layer.operand_quantizer, name, self._linear_of(to_target, f"{name}.lin_dst", target)
            )
        vectors = torch.stack([_attention_vector(layer.att_src, layer.src_quantizer, operand),
                               _attention_vector(layer.att_dst, layer.dst_quantizer, operand)])  # fmt: skip
        if target is None:
            vectors[1] = 0
        addend = None
        if layer.res is not None and target is not None:
            self._float(f"{name}.res", "the residual of a GATConv stays in float")
            addend = F.linear(target, layer.res.weight)
        part = Attention(
            name, operand, layer.heads, layer.negative_slope, vectors, layer.bias if layer.concat else None
        )
        own = {"addend": addend if layer.concat else None, "target": ends}
        out = self._step(part, name, "attention", (packed, graph), own)
        if layer.concat:
            return out
        out = out.view(-1, layer.heads, layer.out_channels).mean(1)
        out = out if addend is None else out + addend
        return out if layer.bias is None else out + layer.bias

    def _batch_norm(self, norm: Any, x: Any) -> Any:
        name = self.path_of_module(norm)
        if norm.running_mean is None or norm.running_var is None:
            self._float(name, "a batch normalisation without running statistics")
            return self._step(norm, name, "float", (x,))
        scale = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
        shift = (0 if norm.bias is None else norm.bias) - norm.running_mean * scale
        _check_finite(name, scale=scale, shift=shift)
        return self._like(self._step(Affine(name, scale, shift), name, "affine", (x,)), x)


def _child_name(parent: nn.Module, child: nn.Module | None) -> str:
    return next((name for name, module in parent.named_children() if module is child), "")


def _is_opaque(m: nn.Module) -> bool:
    """Modules whose code cannot be followed: one step each, in float."""
    if isinstance(m, pyg.MessagePassing | pyg.Aggregation | nn.RNNBase | nn.RNNCellBase | nn.MultiheadAttention):
        return True
    return type(m).__module__.startswith("torch_geometric.nn.norm")


def _why_float(layer: nn.Module, name: str, given: dict[str, Any]) -> str:
    """Why a layer of qgnn runs in float; "" if it does not have to.

    Raises:
        ValueError: it is quantized, but has no codes.
    """
    quantizers = [m for m in layer.modules() if isinstance(m, LayerQuantizer)]
    if isinstance(layer, GINConv):
        if layer.operand_quantizer is None:
            return "it is not quantized"
        linear = leading_linear(layer.nn) if layer.first else None
        if linear is not None and linear.quantizer is None:
            return "the first layer of its nn is not quantized"
        quantizers = [] if linear is None or linear.quantizer is None else [linear.quantizer]
    elif not quantizers:
        return "it is not quantized"
    for quantizer in quantizers:
        if quantizer.scheme.method in ("half", "binary"):
            raise ValueError(
                f"layer {name}: scheme {quantizer.scheme.name} is a float baseline: it has no integer codes to freeze"
            )
        if not quantizer.enabled:
            raise ValueError(f"layer {name} is not quantized: its quantizers are off; see qgnn.quant.set_enabled")
        if quantizer.kind == "new":
            raise ValueError(
                f"layer {name} has seen no data, so it has no steps yet; train or calibrate the model first"
            )
    if given.get("edge_weight") is not None:
        return "it uses edge weights; integer sums have none"
    if given.get("edge_attr") is not None and layer.lin_edge is not None:
        return "it uses edge features"
    if given.get("return_attention_weights") is not None:
        return "it returns attention weights"
    if given.get("size") is not None:
        return "it is given a size"
    if getattr(layer, "reduce", "sum") not in ("sum", "mean"):
        return f"{layer.aggr} is no sum"
    return ""


def _codec_of(quantizer: LayerQuantizer, name: str, normalize: bool) -> Codec:
    if quantizer.kind == "binary":
        return Codec(CodecSpec(name, "binary", quantizer.in_channels, False, normalize))
    signed = quantizer.kind == "signed"
    if isinstance(quantizer, GroupQuantizer):
        spec = CodecSpec(name, "group", quantizer.in_channels, signed, normalize)
        return Codec(spec, quantizer.log_step.detach().exp(), rounded_bits(quantizer.bits))
    codes = quantizer.input_codes(None)
    coding = "node" if isinstance(quantizer.input_bits(), Tensor) else "tensor"
    return Codec(
        CodecSpec(name, "node" if coding == "node" else "tensor", quantizer.in_channels, codes.signed, normalize),
        codes.step, codes.bits,
    )  # fmt: skip


def _attention_vector(vector: Tensor, quantizer: nn.Module | None, operand: Operand) -> Tensor:
    """``[heads * channels]``: what a code counts in a score."""
    given = vector.detach()[0]
    quantized = given if quantizer is None else quantizer.forward(given.t()).t()
    return operand.step * quantized.reshape(-1)


def _check_finite(name: str, **tensors: Tensor | None) -> None:
    for part, tensor in tensors.items():
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            place = int((~torch.isfinite(tensor)).nonzero()[0, 0])
            raise ValueError(f"layer {name}: {part}[{place}] is not finite")


def _tidy(lowered: Lowered, model: nn.Module) -> None:
    """Writes constants and pools, and leaves out what evaluation does."""
    program = lowered.program
    for node in list(program.nodes):
        if node.op == "get_attr":
            part = Constant(str(node.target), _attribute(model, str(node.target)))
            node.op, node.target = "call_module", lowered.add(part, ["constant", *str(node.target).split(".")])
        elif node.target in _DROPOUT:
            if _argument(node, 2, "training", node.kwargs.get("train", True)):
                raise ValueError(
                    "freeze needs a model whose dropout follows its mode; here one is always on: pass training=self.training"
                )
            node.replace_all_uses_with(node.args[0])
            program.erase_node(node)
        elif node.target is batched_graph:  # it notes what Degree-Quant's training needs
            node.replace_all_uses_with(_argument(node, 1, "edge_index", None))
            program.erase_node(node)
        elif node.op == "call_function" and (node.target in _POOLS or node.target is pool):
            reduce = _POOLS.get(node.target) or _argument(node, 3, "reduce", None)
            batch, size = _argument(node, 1, "batch", None), _argument(node, 2, "size", None)
            if size is None and batch is not None:
                with program.inserting_before(node):
                    size = program.call_function(graphs_of, (batch,))
            node.args, node.kwargs, node.target = (_argument(node, 0, "x", None), batch, size, reduce), {}, pool
        elif _in_place(node):
            _check_in_place(node)
    program.eliminate_dead_code(_has_effects)
    unused = set(lowered.parts) - {str(n.target) for n in program.nodes if n.op == "call_module"}
    for name in unused:
        del lowered.parts[name]


def _has_effects(node: fx.Node) -> bool:
    """Whether a step must stay though nothing reads its result."""
    return node.op in ("placeholder", "output")


def _in_place(node: fx.Node) -> bool:
    """Whether a step changes its first argument."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if (name.endswith("_") and not name.endswith("__")) or node.target is operator.setitem or node.target in _UPDATES:
        return True
    if callable(node.target):
        with contextlib.suppress(TypeError, ValueError):  # a builtin without a signature
            return bool(inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments.get("inplace"))
    return bool(node.kwargs.get("inplace"))


def _check_in_place(node: fx.Node) -> None:
    """Raises ValueError unless the value that a step changes is read by this step only, which is the same as a new value."""
    changed = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
    alone = isinstance(changed, fx.Node) and changed.op != "placeholder" and len(changed.users) == 1 and node.users
    if not alone:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
        raise ValueError(
            f"the forward code changes a value in place, with {name}, that it reads elsewhere or was given; freeze reorders steps: "
            "write it as x = f(x), without inplace"
        )


def _attribute(model: nn.Module, target: str) -> Tensor:
    value: Any = model
    for name in target.split("."):
        value = getattr(value, name)
    return value


def _argument(node: fx.Node, place: int, name: str, default: Argument) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)
