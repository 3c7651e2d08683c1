"""Average widths and compression of a model's feature maps (NUMERICS 3; A2Q eq. 19 and 20)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .base import FeatureMap


def feature_maps(model: nn.Module, nodes: int, name: str = "") -> list[FeatureMap]:
    """Every feature map that the model's kernels read: the input of each layer and the operand of each aggregation. Not the output. ``name`` is
    put before the names of the layers."""
    listed = getattr(model, "feature_maps", None)
    if listed is not None:
        return list(listed(name or "model", nodes))
    children = ((f"{name}.{child}" if name else child, inner) for child, inner in model.named_children())
    return [m for place, inner in children for m in feature_maps(inner, nodes, place)]


@dataclass(frozen=True)
class Averages:
    """Widths of a model.

    Attributes:
        average_bits: over the quantized inputs of layers, the mean over layers of the mean over nodes: what the papers' tables list.
        average_bits_dim: over the same maps, every element counted once: ``sum_l F_l sum_i b_i / (N sum_l F_l)``.
        average_bits_all: over every feature map, operands of aggregations at their width, unquantized maps at 32 and 0/1 maps at 1.
        compression: 32 over ``average_bits_dim``, steps not counted.
        compression_with_steps: the same with the 32-bit step of every node counted (A2Q eq. 19).
    """

    average_bits: float
    average_bits_dim: float
    average_bits_all: float
    compression: float
    compression_with_steps: float


def averages(maps: list[FeatureMap]) -> Averages:
    """Averages of a list of feature maps; 32 bits and compression 1 where nothing is quantized."""
    inputs = [m for m in maps if m.role == "input" and m.quantized]
    everything = _by_element(maps)
    if not inputs:
        return Averages(32.0, 32.0, everything, 1.0, 1.0)
    by_element = _by_element(inputs)
    elements = sum(m.dim * m.nodes for m in inputs)
    steps = sum(32 * m.nodes if isinstance(m.bits, Tensor) else 32 for m in inputs)
    bits = by_element * elements
    return Averages(
        average_bits=sum(m.mean_bits() for m in inputs) / len(inputs),
        average_bits_dim=by_element,
        average_bits_all=everything,
        compression=32 * elements / max(bits, 1.0),
        compression_with_steps=32 * elements / (bits + steps),
    )


def _by_element(maps: list[FeatureMap]) -> float:
    elements = sum(m.dim * m.nodes for m in maps)
    return sum(m.dim * m.nodes * m.mean_bits() for m in maps) / max(elements, 1)
