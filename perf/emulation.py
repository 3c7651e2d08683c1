"""Quantized training as it is usually emulated, on PyG's layers: the baseline of memory and time.

Bqain's study emulated fixed point and MSFP by torch's own operations, which autograd records one by one: it keeps a float copy of a map for the
clamp, the quantized map for the product, and, with blocks, the exponents that are repeated for every element; PyG's messages are quantized where PyG
makes them, one for each edge. The widths change nothing about it. The values are those of NUMERICS 6, in both passes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..quant import Scheme
from ..quant.components import FLOAT
from ..recipes import Recipe
from .train_step import PyGModel, pyg_layers

BLOCK = 16
"""Elements of an MSFP block."""

Quantize = Callable[[Tensor], Tensor]


def straight_through(values: Tensor) -> Tensor:
    """``values`` rounded half to even, with the gradient of ``values``."""
    return values + (values.round() - values).detach()


def fixed_point(x: Tensor, bits: int) -> Tensor:
    """``c (clamp(round(x / c - d)) + d)`` with the range of ``x``, of any shape."""
    low, high = x.detach().aminmax()
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    width = torch.where(high > low, high - low, torch.ones_like(low))
    c, d = width / (most - least), (low * most - high * least) / width
    return c * (straight_through(x / c - d).clamp(least, most) + d)


def msfp(x: Tensor, mantissa_bits: int) -> Tensor:
    """Blocks of 16 along the last dimension, each with the exponent of its largest magnitude."""
    features = x.size(-1)
    blocks = F.pad(x, (0, -features % BLOCK)).unflatten(-1, (-1, BLOCK))
    top = blocks.detach().abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    step = torch.exp2(torch.frexp(top).exponent - mantissa_bits).repeat_interleave(BLOCK, -1)
    most = 2**mantissa_bits - 1
    values = straight_through(blocks / step).clamp(-most, most) * step
    return values.flatten(-2)[..., :features]


def quantizer(scheme: Scheme, component: str) -> Quantize:
    """How a component of a scheme is quantized.

    Raises:
        ValueError: the scheme is none of fixed point or MSFP.
    """
    if scheme.components is None or scheme.method not in ("fixed", "msfp"):
        raise ValueError(f"scheme {scheme.name!r} is not emulated: choose fixed point or msfp")
    width = scheme.components.at(component, scheme.bits)
    if width == FLOAT:
        return lambda x: x
    if scheme.method == "msfp":
        return partial(msfp, mantissa_bits=width - 9)
    return partial(fixed_point, bits=width)


class _Parameter(nn.Module):
    """A parameter's quantizer."""

    def __init__(self, quantize: Quantize) -> None:
        super().__init__()
        self.quantize = quantize

    def forward(self, parameter: Tensor) -> Tensor:
        return self.quantize(parameter)


def emulate(network: nn.Module, scheme: Scheme) -> nn.Module:
    """Lets the layers of a PyG network quantize their weights, inputs, messages, attention vectors and gradients; changes ``network``."""
    parts = {name: quantizer(scheme, name) for name in ("weights", "inputs", "messages", "attention", "gradients")}

    def back(output: Tensor) -> Tensor:
        if output.requires_grad:
            output.register_hook(parts["gradients"])
        return output

    for module in list(network.modules()):
        if isinstance(module, pyg.Linear | nn.Linear):
            parametrize.register_parametrization(module, "weight", _Parameter(parts["weights"]), unsafe=True)
            module.register_forward_pre_hook(lambda module, inputs: (parts["inputs"](inputs[0]), *inputs[1:]))
            module.register_forward_hook(lambda module, inputs, output: back(output))
        elif isinstance(module, pyg.MessagePassing):
            module.register_message_forward_hook(lambda module, inputs, output: parts["messages"](output))
            module.register_forward_hook(lambda module, inputs, output: back(output))
            for name in ("att_src", "att_dst"):
                if isinstance(module, pyg.GATConv):
                    parametrize.register_parametrization(module, name, _Parameter(parts["attention"]), unsafe=True)
    return network


class PooledGIN(nn.Module):
    """The counterpart of :class:`qgnn.models.PooledGIN`, made of PyG's layers and torch's."""

    def __init__(self, in_channels: int, hidden: int, out_channels: int, num_layers: int, dropout: float) -> None:
        super().__init__()

        def conv(size: int) -> pyg.GINConv:
            inner = (nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
            return pyg.GINConv(nn.Sequential(*inner, nn.BatchNorm1d(hidden)), train_eps=True)

        self.convs = nn.ModuleList(conv(size) for size in [in_channels, *[hidden] * (num_layers - 1)])
        self.lin1, self.lin2, self.dropout = nn.Linear(hidden, hidden), nn.Linear(hidden, out_channels), dropout

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor, num_graphs: int) -> Tensor:
        for conv in self.convs:
            x = conv(x, edge_index)
        h = F.relu(self.lin1(pyg.global_mean_pool(x, batch, num_graphs)))
        out: Tensor = self.lin2(F.dropout(h, self.dropout, self.training))
        return out


def pyg_network(model: str, task: str, in_channels: int, out_channels: int, recipe: Recipe) -> nn.Module:
    """PyG's counterpart of :func:`qgnn.models.build` for one graph, and for GIN on the graphs of TU.

    Raises:
        ValueError: there is none.
    """
    if task.startswith("node"):
        convs = pyg_layers(model, in_channels, out_channels, recipe)
        return PyGModel(convs, recipe.input_dropout, recipe.dropout)
    if model != "gin" or task != "graph":
        raise ValueError(f"there is no PyG counterpart of {model!r} for task {task!r} here; take gin")
    return PooledGIN(in_channels, recipe.hidden, out_channels, recipe.layers, recipe.dropout)
