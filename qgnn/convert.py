"""From a PyG model to a trainable quantized one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch_geometric.nn as pyg
from torch import nn

from .nn import GATConv, GCNConv, GINConv, Linear, SAGEConv
from .quant import Scheme, parse

Rows = int | None
_QUANTIZED = (GATConv, GCNConv, GINConv, Linear, SAGEConv)
_FLOAT = (nn.BatchNorm1d, pyg.BatchNorm)
"""Layers with parameters that compute in float between quantized ones."""


def convert(model: nn.Module, scheme: str | Scheme, num_nodes: int | None = None) -> nn.Module:
    """A copy of ``model`` whose layers train on quantized values.

    PyG's GCNConv, GATConv, GINConv, SAGEConv and Linear and torch's Linear are replaced by those of :mod:`qgnn.nn`, with their weights; batch
    normalisation and everything without parameters (activations, dropout, plain Python forward code) stays.

    Args:
        model: a module made of these layers; it is not changed.
        scheme: a scheme name (:mod:`qgnn.quant.scheme`).
        num_nodes: nodes of the graph; needed by "a2q", which learns a step and a width per node.

    Raises:
        ValueError: an unknown scheme, "a2q" without ``num_nodes``, a layer whose sizes are not known yet or whose arguments have no quantized
            counterpart, or layers with parameters that cannot be quantized; these are named.
    """
    parsed = parse(scheme)
    if parsed.method == "a2q" and not parsed.groups and num_nodes is None:
        raise ValueError('scheme "a2q" learns a step and a width per node: pass num_nodes')
    result = _converted(copy.deepcopy(model), parsed, num_nodes)
    refused = _left_in_float(result, "")
    if refused:
        raise ValueError(
            f"cannot quantize {', '.join(refused)}; GCNConv, GATConv, GINConv, SAGEConv and Linear are supported, with BatchNorm between them"
        )
    return result


def _converted(module: nn.Module, scheme: Scheme, rows: Rows) -> nn.Module:
    """The quantized counterpart of a layer; any other module with its children converted."""
    for kinds, make in _COUNTERPARTS.items():
        if isinstance(module, kinds):
            return _with_state(make(module, scheme, rows), module)
    for name, child in module.named_children():
        setattr(module, name, _converted(child, scheme, rows))
    return module


def _known(layer: Any, *sizes: int) -> None:
    if min(sizes) < 1:
        raise ValueError(f"{layer} has not seen its input yet: run the model once before convert")


def _reduction(layer: nn.Module, default: str) -> str:
    """PyG's aggregation of a layer, where the direction is the usual one."""
    if getattr(layer, "flow", "source_to_target") != "source_to_target":
        raise ValueError(f"{layer} has another aggregation or flow than one from source to target")
    aggr = getattr(layer, "aggr", default)
    if not isinstance(aggr, str):
        raise ValueError(f"{layer} has an aggregation without integers behind it: use add, mean, max or min")
    return aggr


def _sum_only(layer: nn.Module) -> None:
    if _reduction(layer, "add") not in ("add", "sum"):
        raise ValueError(f"{layer} has another aggregation or flow than a sum from source to target")


def _linear(layer: Any, scheme: Scheme, rows: Rows) -> nn.Module:
    in_channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    out_channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    _known(layer, in_channels)
    return Linear(in_channels, out_channels, layer.bias is not None, scheme=scheme, num_nodes=rows)


def _gcn(layer: Any, scheme: Scheme, rows: Rows) -> nn.Module:
    in_channels = layer.lin.in_channels  # PyG's lazy layers learn theirs here only
    _known(layer, in_channels)
    _sum_only(layer)
    return GCNConv(
        in_channels, layer.out_channels, bool(layer.improved), bool(layer.cached), bool(layer.add_self_loops), bool(layer.normalize),
        layer.bias is not None, scheme=scheme, num_nodes=rows,
    )  # fmt: skip


def _gat(layer: Any, scheme: Scheme, rows: Rows) -> nn.Module:
    shared = getattr(layer, "lin", None)
    pair = (layer.lin_src.in_channels, layer.lin_dst.in_channels) if shared is None else (shared.in_channels,) * 2
    _known(layer, *pair)
    _sum_only(layer)
    return GATConv(
        pair if shared is None else shared.in_channels, layer.out_channels, layer.heads, layer.concat, layer.negative_slope, layer.dropout,
        layer.add_self_loops, layer.edge_dim, layer.fill_value, layer.bias is not None, getattr(layer, "res", None) is not None,
        scheme=scheme, num_nodes=rows,
    )  # fmt: skip


def _gin(layer: Any, scheme: Scheme, rows: Rows) -> nn.Module:
    inner = _converted(layer.nn, scheme, rows)
    trained = isinstance(layer.eps, nn.Parameter)
    return GINConv(inner, layer.initial_eps, trained, aggr=_reduction(layer, "add"), scheme=scheme)


def _sage(layer: Any, scheme: Scheme, rows: Rows) -> nn.Module:
    target = layer.lin_r.in_channels if layer.root_weight else layer.lin_l.in_channels
    _known(layer, layer.lin_l.in_channels, target)
    return SAGEConv(
        (layer.lin_l.in_channels, target), layer.out_channels, _reduction(layer, "mean"), layer.normalize, layer.root_weight, layer.project,
        layer.lin_l.bias is not None, scheme=scheme, num_nodes=rows,
    )  # fmt: skip


_COUNTERPARTS: dict[tuple[type, ...], Callable[[Any, Scheme, Rows], nn.Module]] = {
    (pyg.GCNConv, GCNConv): _gcn,
    (pyg.GATConv, GATConv): _gat,
    (pyg.GINConv, GINConv): _gin,
    (pyg.SAGEConv, SAGEConv): _sage,
    (pyg.Linear, nn.Linear, Linear): _linear,
}


def _of_quantizer(key: str) -> bool:
    return any(part.endswith("quantizer") for part in key.split("."))


def _with_state(new: nn.Module, layer: nn.Module) -> nn.Module:
    """``new`` with the parameters, device, type and mode of ``layer``."""
    first = next(layer.parameters())
    new.to(first.device, first.dtype).train(layer.training)
    missing, unexpected = new.load_state_dict(
        {k: v for k, v in layer.state_dict().items() if not _of_quantizer(k)}, strict=False
    )
    if unexpected or any(not _of_quantizer(k) for k in missing):
        raise ValueError(f"{layer} has other parameters than PyG's: {unexpected or missing}")
    for name, parameter in layer.named_parameters():
        if not _of_quantizer(name):
            new.get_parameter(name).requires_grad_(parameter.requires_grad)
    return new


def _left_in_float(module: nn.Module, name: str) -> list[str]:
    if isinstance(module, (*_QUANTIZED, *_FLOAT)):
        return []
    if next(module.parameters(recurse=False), None) is not None or isinstance(module, pyg.MessagePassing):
        return [f"{name or 'the model'} ({type(module).__name__})"]
    return [
        n
        for child, inner in module.named_children()
        for n in _left_in_float(inner, f"{name}.{child}" if name else child)
    ]
