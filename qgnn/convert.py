"""From a PyG model to a trainable quantized one."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch_geometric.nn as pyg
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .nn import GATConv, GCNConv, GINConv, Linear, SAGEConv
from .nn.activation import ReLU
from .nn.conv import check_message_passing, check_reduction
from .quant import Scheme, parse
from .quant.saved import attach, packs_maps

_log = logging.getLogger(__name__)

Nodes = int | Mapping[str, int] | None
Rows = int | tuple[int, int] | None

_NORMS = (nn.BatchNorm1d, pyg.BatchNorm)
"""Layers with parameters that compute in float between quantized ones until freezing folds them into these."""

_WHOLE = (
    pyg.MessagePassing,
    pyg.HeteroDictLinear,
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)
"""Modules that compute with the weights of the layers inside them, without calling these."""

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)
"""Where torch keeps what users registered on a module's forward and backward pass."""

_MESSAGE_HOOKS = ("_propagate", "_message", "_aggregate", "_edge_update")
"""How the names of PyG's own hooks start."""

_SKIPPED = "skipped"


@dataclass(frozen=True)
class ConvertReport:
    """What :func:`convert` did.

    Attributes:
        quantized: names of the layers that were replaced, as in ``named_modules``; a model that is a layer has the name "".
        float: the modules with parameters or messages that compute in float as before, and why.
    """

    quantized: list[str]
    float: dict[str, str]


def convert(
    model: nn.Module,
    scheme: str | Scheme,
    *,
    skip: Iterable[str | type[nn.Module]] = (),
    num_nodes: Nodes = None,
) -> nn.Module:
    """A copy of ``model`` whose layers train on quantized values.

    PyG's GCNConv, GATConv, GINConv, SAGEConv and Linear and torch's Linear are replaced by those of :mod:`qgnn.nn`, which extend them: with their
    weights, hooks, device, dtype, mode and names in the state dict; a layer or weight that is used twice still is one. Batch normalisation and
    everything without parameters (activations, dropout, pooling, plain Python forward code) stays. What cannot be quantized stays in float as it
    is, is listed in the copy's ``convert_report`` (:class:`ConvertReport`) and named in one warning of the log.

    Args:
        model: a module made of these layers, such as PyG's models, before or after ``to_hetero``; it is not changed. Layers of lazy sizes (-1)
            must have seen their input.
        scheme: a scheme name (:mod:`qgnn.quant.scheme`).
        skip: names of modules ("convs.0"), or their types, that stay in float with everything inside them.
        num_nodes: nodes of the graph, or, of a heterogeneous model, of every node type; needed by "a2q", which learns a step and a width per node.

    Raises:
        ValueError: an unknown scheme, "a2q" without ``num_nodes``, a name in ``skip`` that the model does not have, or a layer whose sizes are not
            known yet.
    """
    parsed = parse(scheme)
    per_node = parsed.method == "a2q" and not parsed.groups
    if per_node and num_nodes is None:
        raise ValueError('scheme "a2q" learns a step and a width per node: pass num_nodes')
    conversion = _Conversion(parsed, num_nodes if per_node else None, _skipped(model, skip))
    conversion.visit(model, "")
    result: nn.Module = copy.deepcopy(model, conversion.copies)
    conversion.take_over_hooks()
    if packs_maps(parsed):
        attach(result)
    copied = dict(result.named_modules(remove_duplicate=False))
    for name, part in model.named_modules():  # from the outside in
        if name in copied:
            for inner in copied[name].modules():
                inner.training = part.training
    result.__dict__["convert_report"] = ConvertReport(conversion.quantized, conversion.in_float)
    unasked = [f"{name or 'the model'} ({why})" for name, why in conversion.in_float.items() if why != _SKIPPED]
    if unasked:
        _log.warning("these parts compute in float: %s", ", ".join(unasked))
    return result


def _skipped(model: nn.Module, skip: Iterable[str | type[nn.Module]]) -> set[nn.Module]:
    """The modules that ``skip`` names."""
    entries = [skip] if isinstance(skip, str | type) else list(skip)
    named = dict(model.named_modules(remove_duplicate=False))
    names = [entry for entry in entries if isinstance(entry, str)]
    unknown = [repr(name) for name in names if name not in named]
    if unknown:
        raise ValueError(
            f"skip: there is no module {', '.join(unknown)} in the model; model.named_modules() lists them"
        )
    kinds = tuple(entry for entry in entries if isinstance(entry, type))
    return {named[name] for name in names} | {m for m in named.values() if isinstance(m, kinds)}


def _below(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


class _Conversion:
    """Walks through a model and makes the counterparts of its layers. ``copies`` is the memo of the deep copy to come: a layer's counterpart stands
    there as its copy, so whatever refers to the layer will refer to the counterpart."""

    def __init__(self, scheme: Scheme, num_nodes: Nodes, skipped: set[nn.Module]) -> None:
        self.scheme, self.num_nodes, self.skipped = scheme, num_nodes, skipped
        self.copies: dict[int, Any] = {}
        self._replaced: list[tuple[nn.Module, nn.Module]] = []
        self.quantized: list[str] = []
        self.in_float: dict[str, str] = {}
        self._seen: set[nn.Module] = set()

    def visit(self, module: nn.Module, name: str) -> None:
        """Makes the counterpart of ``module``, or those of the layers inside it."""
        if module in self._seen:
            return
        self._seen.add(module)
        kind = type(module).__name__
        if module in self.skipped:
            self.in_float[name] = _SKIPPED
        elif type(module) in _MAKERS or isinstance(module, nn.LazyLinear):
            if any(is_lazy(p) for p in module.parameters()):
                raise ValueError(f"{module} has not seen its input yet: run the model once before convert")
            rows = _rows(name, self.num_nodes)
            try:
                self._replace(module, name, rows)
            except ValueError as error:
                self.in_float[name] = f"{kind}: {error}"
        elif isinstance(module, _WHOLE) or (isinstance(module, pyg.JumpingKnowledge) and module.lstm is not None):
            self.in_float[name] = f"{kind} has no quantized counterpart"
        elif type(module) is nn.ReLU and packs_maps(self.scheme):
            self.copies[id(module)] = new = ReLU()
            self._replaced.append((module, new))
        else:
            if next(module.parameters(recurse=False), None) is not None and not isinstance(module, _NORMS):
                self.in_float[name] = f"the parameters of {kind} have no quantized counterpart"
            for child, inner in module.named_children():
                self.visit(inner, _below(name, child))

    def _replace(self, layer: nn.Module, name: str, rows: Rows) -> None:
        if isinstance(layer, pyg.MessagePassing):
            _check_messages(layer)
        if isinstance(layer, pyg.GINConv):
            if not isinstance(layer.nn, nn.Module):
                raise ValueError("its nn is no module")
            self.visit(layer.nn, _below(name, "nn"))
        new = _MAKERS[type(layer)](self, layer, rows)
        self._take_over(new, layer)
        self.copies[id(layer)] = new
        self._replaced.append((layer, new))
        self.quantized.append(name)
        for part in ("lin_edge", "res"):
            if isinstance(layer, pyg.GATConv) and getattr(layer, part) is not None:
                self.in_float[_below(name, part)] = (
                    "edge features and residuals of GATConv have no quantized counterpart"
                )

    def _take_over(self, new: nn.Module, layer: nn.Module) -> None:
        """Gives ``new`` the parameters, buffers, device and type of ``layer``."""
        own, given = _tensors(new), _tensors(layer)
        if own.keys() != given.keys():
            raise ValueError(f"it has other parameters than usual: {', '.join(sorted(own.keys() ^ given.keys()))}")
        first = next(layer.parameters())
        new.to(first.device, first.dtype)
        for key, tensor in given.items():
            owner, _, leaf = key.rpartition(".")
            setattr(new.get_submodule(owner), leaf, copy.deepcopy(tensor, self.copies))

    def take_over_hooks(self) -> None:
        """Gives every counterpart its layer's hooks. Last of all: a hook may hold the model, whose copy is complete only now."""
        for layer, new in self._replaced:
            for hooks in _HOOKS:
                new.__dict__[hooks] = copy.deepcopy(layer.__dict__[hooks], self.copies)

    def linear(self, layer: Any, rows: Rows) -> nn.Module:
        """Of PyG's and torch's Linear."""
        torchs = type(layer) is nn.Linear
        sizes = (layer.in_features, layer.out_features) if torchs else (layer.in_channels, layer.out_channels)
        rows = rows[1] if isinstance(rows, tuple) else rows
        return Linear(*sizes, layer.bias is not None, scheme=self.scheme, num_nodes=rows)

    def gcn(self, layer: Any, rows: Rows) -> nn.Module:
        """Of PyG's GCNConv."""
        rows = rows[1] if isinstance(rows, tuple) else rows
        return GCNConv(
            layer.lin.in_channels, layer.out_channels, layer.improved, layer.cached, layer.add_self_loops, layer.normalize, layer.bias is not None,
            aggr=check_reduction(layer.aggr_module), scheme=self.scheme, num_nodes=rows,
        )  # fmt: skip

    def gat(self, layer: Any, rows: Rows) -> nn.Module:
        """Of PyG's GATConv."""
        shared = layer.lin is not None
        return GATConv(
            layer.lin.in_channels if shared else (layer.lin_src.in_channels, layer.lin_dst.in_channels), layer.out_channels, layer.heads,
            layer.concat, layer.negative_slope, layer.dropout, layer.add_self_loops, layer.edge_dim, layer.fill_value, layer.bias is not None,
            layer.res is not None, aggr=check_reduction(layer.aggr_module), scheme=self.scheme, num_nodes=rows,
        )  # fmt: skip

    def gin(self, layer: Any, rows: Rows) -> nn.Module:
        """Of PyG's GINConv."""
        del rows  # its network has them
        inner, trained = copy.deepcopy(layer.nn, self.copies), isinstance(layer.eps, nn.Parameter)
        reduce = check_reduction(layer.aggr_module)
        return GINConv(inner, layer.initial_eps, trained, aggr=reduce, scheme=self.scheme)

    def sage(self, layer: Any, rows: Rows) -> nn.Module:
        """Of PyG's SAGEConv."""
        source = layer.lin_l.in_channels
        target = layer.lin_r.in_channels if layer.root_weight else source
        return SAGEConv(
            (source, target), layer.out_channels, check_reduction(layer.aggr_module), layer.normalize, layer.root_weight, layer.project,
            layer.lin_l.bias is not None, scheme=self.scheme, num_nodes=rows,
        )  # fmt: skip


_MAKERS: dict[type, Callable[[_Conversion, Any, Rows], nn.Module]] = {
    **dict.fromkeys((pyg.GCNConv, GCNConv), _Conversion.gcn),
    **dict.fromkeys((pyg.GATConv, GATConv), _Conversion.gat),
    **dict.fromkeys((pyg.GINConv, GINConv), _Conversion.gin),
    **dict.fromkeys((pyg.SAGEConv, SAGEConv), _Conversion.sage),
    **dict.fromkeys((pyg.Linear, nn.Linear, Linear), _Conversion.linear),
}
"""By exact type: a subclass may compute something else."""


def _check_messages(layer: Any) -> None:
    """Raises ValueError where PyG's layer does something with its messages that a quantized one, which makes none, does not."""
    check_message_passing({"flow": layer.flow, "node_dim": layer.node_dim})
    check_reduction(layer.aggr_module)
    if any(vars(layer)[key] for key in vars(layer) if key.startswith(_MESSAGE_HOOKS) and key.endswith("_hooks")):
        raise ValueError("it has hooks on its messages")


def _tensors(layer: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, without those of quantizers."""
    both = (*layer.named_parameters(remove_duplicate=False), *layer.named_buffers(remove_duplicate=False))
    return {name: tensor for name, tensor in both if not any(part.endswith("quantizer") for part in name.split("."))}


def _rows(name: str, num_nodes: Nodes) -> Rows:
    """The nodes that the layer called ``name`` reads, or sources and destinations. In a heterogeneous model a part of the name is the layer's node
    type, or its edge type: ``user__to__item`` by PyG's to_hetero, ``<user___to___item>`` in its HeteroConv."""
    parts = [re.split("_{2,3}", part.strip("<>")) for part in reversed(name.split("."))]
    if isinstance(num_nodes, Mapping):
        for types in parts:
            if types[0] in num_nodes and types[-1] in num_nodes:
                counts = num_nodes[types[0]], num_nodes[types[-1]]
                return counts if len(types) > 1 else counts[0]
    elif num_nodes is None or all(len(types) < 3 for types in parts):
        return num_nodes
    raise ValueError(
        f'"a2q" learns a step and a width per node, and {name} is a layer for some types of nodes: '
        'pass num_nodes={type: nodes, ...} for all of them, or use "a2q-nns" or "int8"'
    )
