"""Operations, bits of the feature maps (A2Q eq. 19 and 20), and traffic of the on-chip memories and the HBM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .config import Config
from .cycles import ceil_div
from .workload import Layer

WEIGHT_BITS = 4
OPERAND_BITS = 4
"""Weights and the operand B of an aggregation have 4 bits (A2Q section A.6)."""
FLOAT_BITS = 32

Traffic = dict[str, dict[str, int]]
"""Bits by direction ("dram_read", "dram_write", "sram_read", "sram_write") and operand: weights, steps (of features and weights), graph, features
(the layer's input), operand (of its aggregation), output."""


class Operations(NamedTuple):
    """Operations of one layer."""

    int_macs: int
    aggregation_adds: int
    float_multiplies: int
    nns_comparisons: int


def operations(layer: Layer, nodes: int, edges: int) -> Operations:
    """What a layer computes; attention weighs its neighbours, and so multiplies where the others add."""
    columns, attention = layer.columns, layer.kind == "gat"
    strategy = layer.nns_groups > 0
    macs = nodes * layer.f_in * layer.f_out
    multiplies = nodes * layer.f_out + nodes * columns + strategy * nodes * layer.f_in
    if attention:
        macs += 2 * nodes * layer.f_out + edges * columns
        multiplies += 3 * edges * layer.heads
    search = layer.f_in + (layer.nns_groups - 1).bit_length()  # the row's maximum, then bisection: ceil(log2 m)
    return Operations(macs, 0 if attention else edges * columns, multiplies, nodes * search if strategy else 0)


@dataclass(frozen=True)
class MemoryReport:
    """Memory of the feature maps.

    Attributes:
        eq19_bits: features and a 32-bit step for every node and layer (A2Q eq. 19).
        ratio, ratio_without_steps: the maps at FP32 over that, and over the features alone.
        eq20: the steps over the features (A2Q eq. 20).
        average_bits_by_dimension: mean width over all values; average_bits_by_layer: mean over the layers of their means over the nodes, which is
            what the paper's tables list.
    """

    eq19_bits: int
    ratio: float
    ratio_without_steps: float
    eq20: float
    average_bits_by_dimension: float
    average_bits_by_layer: float


def report(layers: Sequence[Layer], sums: Sequence[int], nodes: int) -> MemoryReport:
    """``sums``: the sum of the widths of each layer's rows."""
    features = sum(layer.f_in * total for layer, total in zip(layers, sums, strict=True))
    values = nodes * sum(layer.f_in for layer in layers)
    steps = FLOAT_BITS * nodes * len(layers)
    return MemoryReport(
        eq19_bits=features + steps,
        ratio=FLOAT_BITS * values / (features + steps),
        ratio_without_steps=FLOAT_BITS * values / features if features else math.inf,
        eq20=steps / features if features else math.inf,
        average_bits_by_dimension=features / values,
        average_bits_by_layer=sum(sums) / nodes / len(layers),
    )


def index_bits(config: Config, nodes: int) -> int:
    """Bits of a row pointer or column id."""
    return (nodes - 1).bit_length() if config.index_bits == "log2" else int(config.index_bits)


def spilled(bits: int, config: Config) -> int:
    """Bits of a map that go to the HBM and come back: of its input buffer, as the buffers are swapped between layers."""
    held = 8 * config.input_buffer
    if bits <= held:
        return 0
    return bits - held if config.spill == "excess" else bits


def traffic(
    layer: Layer, total: int, following: int | None, nodes: int, edges: int, first: bool, config: Config
) -> Traffic:
    """Bits that a layer moves.

    Args:
        total: the sum of the widths of its rows; following: that of the next layer's, None after the last layer, whose output is FP32.
        first: its input lies in the HBM.
    """
    index = index_bits(config, nodes)
    features, operand = layer.f_in * total, OPERAND_BITS * nodes * layer.columns
    output = FLOAT_BITS * nodes * layer.f_out if following is None else layer.f_out * following
    broadcast = ceil_div(nodes, config.pes) * layer.f_out * ceil_div(layer.f_in, config.macs) * config.macs
    read = {
        "weights": WEIGHT_BITS * layer.f_in * layer.f_out,
        "steps": FLOAT_BITS * (layer.f_out + nodes),
        "graph": index * (nodes + 1 + edges) if layer.columns else 0,
        "features": features if first else spilled(features, config),
        "operand": spilled(operand, config),
    }
    return {
        "dram_read": read,
        "dram_write": {
            "operand": spilled(operand, config),
            "output": output if following is None else spilled(output, config),
        },
        "sram_read": {
            "features": layer.f_out * features,
            "weights": WEIGHT_BITS * broadcast,
            "operand": OPERAND_BITS * edges * layer.columns,
            "graph": index * edges * layer.columns,
        },
        "sram_write": {**read, "operand": read["operand"] + operand, "output": output},
    }
