"""Quantizers: A2Q, Degree-Quant and its QAT baselines, and the bookkeeping of widths."""

from torch import nn

from .a2q import A2QQuantizer, memory_kb, memory_penalty
from .base import FeatureMap, InputCodes, LayerQuantizer
from .bookkeeping import Averages, averages, feature_maps
from .degree_quant import DegreeQuantQuantizer, protection_probability
from .qat import QATQuantizer, RangeQuantizer
from .scheme import SCHEMES, Scheme, parse

__all__ = [
    "SCHEMES",
    "A2QQuantizer",
    "Averages",
    "DegreeQuantQuantizer",
    "FeatureMap",
    "InputCodes",
    "LayerQuantizer",
    "QATQuantizer",
    "RangeQuantizer",
    "Scheme",
    "averages",
    "feature_maps",
    "layer_quantizer",
    "memory_kb",
    "memory_penalty",
    "parse",
    "protection_probability",
    "set_enabled",
]


def layer_quantizer(
    scheme: Scheme, in_channels: int, out_channels: int, num_nodes: int | None
) -> LayerQuantizer | None:
    """The quantizer of one layer; None for "fp32".

    Raises:
        ValueError: "a2q" without ``num_nodes``.
    """
    if scheme.method == "fp32":
        return None
    if scheme.method == "qat":
        return QATQuantizer(in_channels, out_channels, scheme)
    if scheme.method == "dq":
        return DegreeQuantQuantizer(in_channels, out_channels, scheme)
    if num_nodes is None:
        raise ValueError('scheme "a2q" learns a step and a width per node: pass num_nodes')
    return A2QQuantizer(in_channels, out_channels, scheme, num_nodes)


def set_enabled(model: nn.Module, enabled: bool) -> None:
    """Switches the quantization of every layer on or off (FP32 warm-up). Ranges and steps start from the first batch after switching on."""
    for module in model.modules():
        if isinstance(module, LayerQuantizer):
            module.enabled = enabled
