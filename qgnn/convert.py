"""From a PyG model to a trainable quantized one."""

from __future__ import annotations

import copy

import torch_geometric.nn as pyg
from torch import nn

from .nn import GCNConv, Linear
from .quant import Scheme, parse


def convert(model: nn.Module, scheme: str | Scheme, num_nodes: int | None = None) -> nn.Module:
    """A copy of ``model`` whose layers train on quantized values.

    PyG's GCNConv and Linear and torch's Linear are replaced by those of :mod:`qgnn.nn`, with their weights; everything without parameters
    (activations, dropout, plain Python forward code) stays.

    Args:
        model: a module made of GCNConv and Linear; it is not changed.
        scheme: "fp32", "int8", "int4", "dq-int8", "dq-int4", "a2q" (:mod:`qgnn.quant.scheme`).
        num_nodes: nodes of the graph; needed by "a2q", which learns a step and a width per node.

    Raises:
        ValueError: an unknown scheme, "a2q" without ``num_nodes``, a layer whose sizes are not known yet, or layers with parameters that cannot
            be quantized; these are named.
    """
    parsed = parse(scheme)
    if parsed.method == "a2q" and num_nodes is None:
        raise ValueError('scheme "a2q" learns a step and a width per node: pass num_nodes')
    result = copy.deepcopy(model)
    replaced = _converted(result, parsed, num_nodes)
    if replaced is not None:
        return replaced
    _convert_children(result, parsed, num_nodes)
    refused = _left_in_float(result, "")
    if refused:
        raise ValueError(f"cannot quantize {', '.join(refused)}; GCNConv and Linear are supported")
    return result


def _convert_children(module: nn.Module, scheme: Scheme, num_nodes: int | None) -> None:
    for name, child in module.named_children():
        new = _converted(child, scheme, num_nodes)
        if new is None:
            _convert_children(child, scheme, num_nodes)
        else:
            setattr(module, name, new)


def _converted(layer: nn.Module, scheme: Scheme, num_nodes: int | None) -> nn.Module | None:
    new: nn.Module
    if isinstance(layer, pyg.GCNConv | GCNConv):
        in_channels = layer.lin.in_channels  # PyG's lazy layers learn theirs here only
        if in_channels < 1:
            raise ValueError(f"{layer} has not seen its input yet: run the model once before convert")
        if (
            getattr(layer, "aggr", "add") not in ("add", "sum")
            or getattr(layer, "flow", "source_to_target") != "source_to_target"
        ):
            raise ValueError(f"{layer} has another aggregation or flow than a GCN's sum from source to target")
        new = GCNConv(
            in_channels, layer.out_channels, bool(layer.improved), bool(layer.cached), bool(layer.add_self_loops), bool(layer.normalize),
            layer.bias is not None, scheme=scheme, num_nodes=num_nodes,
        )  # fmt: skip
    elif isinstance(layer, pyg.Linear | nn.Linear | Linear):
        in_channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
        out_channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        if in_channels < 1:
            raise ValueError(f"{layer} has not seen its input yet: run the model once before convert")
        new = Linear(in_channels, out_channels, layer.bias is not None, scheme=scheme, num_nodes=num_nodes)
    else:
        return None
    first = next(layer.parameters())
    new.to(first.device, first.dtype).train(layer.training)
    missing, unexpected = new.load_state_dict(
        {k: v for k, v in layer.state_dict().items() if not k.startswith("quantizer.")}, strict=False
    )
    if unexpected or any(not k.startswith("quantizer.") for k in missing):
        raise ValueError(f"{layer} has other parameters than PyG's: {unexpected or missing}")
    for name, parameter in layer.named_parameters():
        if not name.startswith("quantizer."):
            new.get_parameter(name).requires_grad_(parameter.requires_grad)
    return new


def _left_in_float(module: nn.Module, name: str) -> list[str]:
    if isinstance(module, GCNConv | Linear):
        return []
    if next(module.parameters(recurse=False), None) is not None or isinstance(module, pyg.MessagePassing):
        return [f"{name or 'the model'} ({type(module).__name__})"]
    return [
        n
        for child, inner in module.named_children()
        for n in _left_in_float(inner, f"{name}.{child}" if name else child)
    ]
