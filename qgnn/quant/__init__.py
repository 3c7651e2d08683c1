"""Quantizers: A2Q, Degree-Quant, QAT and the float baselines, and the bookkeeping of widths."""

from torch import nn

from ..graph import Graph
from .a2q import A2QQuantizer, LearnedColumns, average_width, learned_kb, memory_kb, memory_penalty, start_values
from .base import ColumnQuantizer, FeatureMap, InputCodes, LayerQuantizer, Quantizer, Scheduled
from .baselines import BinaryQuantizer, HalfColumns, HalfQuantizer
from .bookkeeping import Averages, averages, feature_maps
from .components import Components
from .degree_quant import batched_graph, protection_probability, protective_mask
from .nns import GroupQuantizer, reset_usage
from .qat import QATQuantizer, RangeColumns, RangeQuantizer
from .schedules import ADQ, SDQ
from .scheme import SCHEMES, Scheme, parse, widths_of
from .training import FixedColumns, FixedQuantizer, MsfpColumns, MsfpQuantizer

__all__ = [
    "ADQ",
    "SCHEMES",
    "SDQ",
    "A2QQuantizer",
    "Averages",
    "BinaryQuantizer",
    "ColumnQuantizer",
    "Components",
    "FeatureMap",
    "FixedColumns",
    "FixedQuantizer",
    "GroupQuantizer",
    "HalfColumns",
    "HalfQuantizer",
    "InputCodes",
    "LayerQuantizer",
    "LearnedColumns",
    "MsfpColumns",
    "MsfpQuantizer",
    "QATQuantizer",
    "Quantizer",
    "RangeColumns",
    "RangeQuantizer",
    "Scheme",
    "average_width",
    "averages",
    "batched_graph",
    "begin",
    "column_quantizer",
    "feature_maps",
    "layer_quantizer",
    "learned_kb",
    "memory_kb",
    "memory_penalty",
    "parse",
    "protection_probability",
    "protective_mask",
    "reset_usage",
    "set_enabled",
    "set_width",
    "start_values",
    "widths_of",
]


def layer_quantizer(
    scheme: Scheme, in_channels: int, out_channels: int, num_nodes: int | None
) -> LayerQuantizer | None:
    """The quantizer of a linear layer's input and weight; None for "fp32".

    Raises:
        ValueError: "a2q" without ``num_nodes``.
    """
    if scheme.method == "fp32":
        return None
    if scheme.method == "half":
        return HalfQuantizer(in_channels, out_channels, scheme)
    if scheme.method == "binary":
        return BinaryQuantizer(in_channels, out_channels, scheme)
    if scheme.method == "fixed":
        return FixedQuantizer(in_channels, out_channels, scheme)
    if scheme.method == "msfp":
        return MsfpQuantizer(in_channels, out_channels, scheme)
    if scheme.method in ("qat", "dq"):
        return QATQuantizer(in_channels, out_channels, scheme)
    if scheme.groups:
        return GroupQuantizer(in_channels, out_channels, scheme)
    if num_nodes is None:
        raise ValueError(
            'scheme "a2q" learns a step and a width per node: pass num_nodes, or use "a2q-nns" for many graphs'
        )
    return A2QQuantizer(in_channels, out_channels, scheme, num_nodes)


def column_quantizer(scheme: Scheme, channels: int, *, parameters: bool = False) -> ColumnQuantizer | None:
    """The quantizer of the operand of an aggregation, or, with ``parameters``, of attention vectors; None where they stay in float32."""
    if scheme.method in ("fp32", "binary"):
        return None
    if scheme.method == "half":
        return HalfColumns(channels, scheme, parameters)
    if scheme.method == "fixed":
        return FixedColumns(channels, scheme, parameters)
    if scheme.method == "msfp":
        return MsfpColumns(channels, scheme, parameters)
    if scheme.method in ("qat", "dq"):
        return RangeColumns(channels, scheme, parameters)
    return LearnedColumns(channels, scheme, parameters)


def begin(layer: nn.Module, graph: Graph) -> None:
    """Called by a convolution at the start of its forward pass: hands its quantizers the graph's in-degrees and Degree-Quant's mask of the pass.

    In training a mask is drawn anew for every layer and step; in evaluation nothing is protected (DQ algorithm 1).
    """
    scheme = getattr(layer, "scheme", None)
    if isinstance(scheme, Scheme) and scheme.components is not None:
        return  # quantized training has neither masks nor widths by degree
    parts = [m for m in layer.modules() if isinstance(m, Quantizer)]
    if not parts:
        return
    scheme = parts[0].scheme
    draws = scheme.method == "dq" and layer.training and any(part.enabled for part in parts)
    mask = protective_mask(scheme, graph) if draws else None
    for part in parts:
        part.protect = None if isinstance(part, ColumnQuantizer) and part.parameters_only else mask
        part.in_degree = graph.in_degree if scheme.manual else None
        part.nodes = graph.notes.get("nodes")  # of a sampled graph (qgnn.sampler.block)


def set_enabled(model: nn.Module, enabled: bool) -> None:
    """Switches the quantization of every layer on or off (FP32 warm-up). Ranges and steps start from the first batch after switching on."""
    for module in model.modules():
        if isinstance(module, Quantizer):
            module.enabled = enabled


def set_width(model: nn.Module, width: int) -> None:
    """Sets the width of every quantizer, as a schedule does between epochs; the widths that a scheme's components have of their own stay.

    Raises:
        ValueError: a width that the scheme does not have, or a scheme whose widths are learned or fixed.
    """
    for module in model.modules():
        if not isinstance(module, Scheduled):
            continue
        scheme = module.scheme
        if scheme.method not in ("fixed", "msfp", "qat", "dq"):
            raise ValueError(f"the widths of scheme {scheme.name!r} cannot be set: use fixed point, msfp, int or dq")
        allowed = widths_of(scheme.method)
        if width not in allowed:
            raise ValueError(f"scheme {scheme.name!r} has widths of {allowed[0]} to {allowed[-1]}, got {width}")
        module.width = width
