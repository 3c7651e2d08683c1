"""Linear layer with PyG's signature."""

from __future__ import annotations

import math

import torch
import torch_geometric.nn as pyg
from torch import Tensor, nn

from ..features import SparseFeatures
from ..quant import FeatureMap, LayerQuantizer, Scheme, layer_quantizer, parse
from ..quant.base import finished
from ..quant.saved import packs

INITIALIZERS = ("glorot", "uniform", "kaiming_uniform", "zeros")


def _initialize(tensor: Tensor, name: str | None, fan_in: int, default: str) -> None:
    name = name or default
    bound = {
        "glorot": math.sqrt(6.0 / max(sum(tensor.shape[-2:]), 1)),
        "uniform": 1.0 / math.sqrt(max(fan_in, 1)),
        "kaiming_uniform": math.sqrt(6.0 / ((1 + 5) * max(fan_in, 1))),
        "zeros": 0.0,
    }
    if name not in bound:
        raise ValueError(f"initializer must be one of {INITIALIZERS}, got {name!r}")
    nn.init.uniform_(tensor, -bound[name], bound[name])


def check_channels(in_channels: int, out_channels: int) -> None:
    """Raises ValueError unless both sizes are known."""
    if in_channels < 1 or out_channels < 1:
        raise ValueError(
            f"in_channels and out_channels must be at least 1, got {in_channels} and {out_channels}; lazy sizes (-1) cannot be quantized"
        )


def product(
    quantizer: LayerQuantizer | None,
    x: Tensor | SparseFeatures,
    weight: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """:meth:`qgnn.quant.LayerQuantizer.project`, also where nothing is quantized."""
    if quantizer is None:
        return finished(x @ weight.t(), scale, bias)
    return quantizer.project(x, weight, scale, bias)


class Linear(pyg.Linear, nn.Linear):
    """``x @ weight.T + bias`` with quantized input and weight.

    Args:
        in_channels, out_channels: sizes; PyG's lazy ``-1`` is not supported.
        bias: whether to add a learned bias.
        weight_initializer, bias_initializer: "glorot", "uniform", "kaiming_uniform", "zeros" or None (kaiming_uniform and uniform), as in PyG.
        scheme: a scheme name (:mod:`qgnn.quant.scheme`).
        num_nodes: rows of the input; needed by "a2q".

    Shapes: ``[N, in_channels]`` -> ``[N, out_channels]``, or any leading sizes in place of ``N``. State-dict keys ``weight`` ``[out, in]`` and
    ``bias``, as PyG's; those of the quantizer start with ``quantizer.``.
    """

    __deepcopy__ = None  # PyG 2.6 has one, which would make a Linear of PyG's; the usual way copies everything

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bias: bool = True,
        weight_initializer: str | None = None,
        bias_initializer: str | None = None,
        *,
        scheme: str | Scheme = "fp32",
        num_nodes: int | None = None,
    ) -> None:
        nn.Module.__init__(self)
        check_channels(in_channels, out_channels)
        self.in_channels = self.in_features = in_channels
        self.out_channels = self.out_features = out_channels
        self.weight_initializer, self.bias_initializer = weight_initializer, bias_initializer
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_channels)) if bias else None)
        self.scheme = parse(scheme)
        self.quantizer = layer_quantizer(self.scheme, in_channels, out_channels, num_nodes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _initialize(self.weight, self.weight_initializer, self.in_channels, "kaiming_uniform")
        if self.bias is not None:
            _initialize(self.bias, self.bias_initializer, self.in_channels, "uniform")

    @packs
    def forward(self, x: Tensor | SparseFeatures) -> Tensor:
        return self.product(x, self.bias)

    def product(self, x: Tensor | SparseFeatures, bias: Tensor | None = None) -> Tensor:
        """``x @ weight.T + bias``; a convolution that adds its bias after its sum leaves it out."""
        if isinstance(x, Tensor) and x.dim() != 2:
            return self.product(x.reshape(-1, x.size(-1)), bias).view(*x.shape[:-1], self.out_channels)
        return product(self.quantizer, x, self.weight, bias=bias)

    def feature_maps(self, name: str, nodes: int) -> list[FeatureMap]:
        """The maps of this layer, for :func:`qgnn.quant.feature_maps`."""
        if self.quantizer is None:
            return [FeatureMap(f"{name}.input", self.in_channels, nodes, 32, "input", False)]
        return [self.quantizer.feature_map(name, nodes)]

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, bias={self.bias is not None}, scheme={self.scheme.name!r}"
