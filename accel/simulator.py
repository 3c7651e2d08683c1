"""The simulator: one call from a workload and a configuration to cycles, operations, traffic and energy, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from . import cycles
from .config import Config
from .energy import PARTS, energy
from .memory import WEIGHT_BITS, MemoryReport, Operations, Traffic, index_bits, operations, report, traffic
from .workload import Layer, Workload


@dataclass(frozen=True)
class LayerResult:
    """One layer, or the sum of all; cycles, operations and bits are exact integers.

    Attributes:
        name, kind, f_in, f_out: of the layer; of the sum "total", "", and the sizes in which the first layer begins and the last one ends.
        average_bits: mean width charged for its rows.
        update_cycles: of the product X W, with those of attention, ``attention_cycles``, and the constants of every phase; aggregation_cycles:
            likewise.
        update_utilisation, aggregation_utilisation: useful MAC cycles over those of the product X W, without attention and constants, and of the
            sums; 0 where there are none.
        int_macs, aggregation_adds, float_multiplies, nns_comparisons: operations.
        dram_read_bits, dram_write_bits, sram_read_bits, sram_write_bits: traffic; ``traffic`` splits it by operand.
        memory_cycles: of the HBM; compute_cycles: update and aggregation.
        total_cycles: how long it takes; stall_cycles: the part of it that waits for the HBM; serial_cycles: without any overlap.
        energy_pj: pJ by part: integer, float, sram_dynamic, sram_leakage, hbm.
    """

    name: str
    kind: str
    f_in: int
    f_out: int
    average_bits: float
    update_cycles: int
    aggregation_cycles: int
    attention_cycles: int
    update_utilisation: float
    aggregation_utilisation: float
    int_macs: int
    aggregation_adds: int
    float_multiplies: int
    nns_comparisons: int
    dram_read_bits: int
    dram_write_bits: int
    sram_read_bits: int
    sram_write_bits: int
    traffic: Traffic
    memory_cycles: int
    compute_cycles: int
    stall_cycles: int
    total_cycles: int
    serial_cycles: int
    energy_pj: dict[str, float]


@dataclass(frozen=True)
class Result:
    """What :func:`simulate` found.

    Attributes:
        config: the accelerator; name, nodes, edges: the workload.
        layers: one record a layer; total: their sums (``average_bits`` by dimension, as ``memory`` has it).
        memory: of the feature maps.
        notes: what a reader of the numbers must know.
    """

    config: Config
    name: str
    nodes: int
    edges: int
    layers: list[LayerResult]
    total: LayerResult
    memory: MemoryReport
    notes: list[str]

    @property
    def seconds(self) -> float:
        """Time of one inference at the configured clock."""
        return self.total.total_cycles / self.config.clock_hz

    @property
    def joules(self) -> float:
        """Energy of one inference."""
        return sum(self.total.energy_pj.values()) * 1e-12


@dataclass(frozen=True)
class _Work:
    """Useful MAC cycles, and the cycles that they are a part of."""

    update: int
    update_cycles: int
    aggregation: int
    aggregation_cycles: int


def charged_bits(layer: Layer, nodes: int, config: Config) -> npt.NDArray[np.uint8]:
    """The width that is charged for each row of a layer's input, uint8 ``[nodes]``."""
    fixed = None
    if layer.binary_input and config.first_layer != "as_learned":
        fixed = 1 if config.first_layer == "binary" else 4
    elif layer.bits is None:
        fixed = config.real_input_bits
    return np.asarray(layer.bits, np.uint8) if fixed is None else np.full(nodes, fixed, np.uint8)


def simulate(workload: Workload, config: Config | None = None) -> Result:
    """Runs a workload on an accelerator, by default the paper's.

    Cost: a sort of the nodes for each layer under "bits", one a graph otherwise, and a few passes over nodes; edges are counted, not walked.

    Raises:
        ValueError: the workload has bad sizes, as its classes say.
    """
    config = Config() if config is None else config
    if not isinstance(config, Config):
        raise TypeError(f"config must be an accel.Config, as accel.load_config gives one, got {config!r}")
    nodes, edges, layers = workload.num_nodes, workload.num_edges, workload.layers
    widths = [charged_bits(layer, nodes, config) for layer in layers]
    sums: list[int] = [int(bits.sum(dtype=np.int64)) for bits in widths]
    following: list[int | None] = [*sums[1:], None]
    results, work = [], []
    for index, (layer, bits) in enumerate(zip(layers, widths, strict=True)):
        moved = traffic(layer, sums[index], following[index], nodes, edges, index == 0, config)
        result, useful = _layer(workload, layer, bits, moved, config)
        results.append(result)
        work.append(useful)
    memory = report(layers, sums, nodes)
    total = _total(results, work, memory, config)
    return Result(config, workload.name, nodes, edges, results, total, memory, _notes(workload, config))


def aggregated_degrees(workload: Workload, config: Config) -> npt.NDArray[np.int64]:
    """Lengths of the rows that are not empty, in the order in which the aggregation takes them."""
    degrees = workload.degrees if config.order == "none" else workload.degrees[workload.degree_order]
    return degrees[degrees > 0]


def update_order(workload: Workload, bits: npt.NDArray[np.uint8], config: Config) -> npt.NDArray[np.int64] | None:
    """The order in which the update takes the rows; None: as they come."""
    if config.order == "degree":
        return workload.degree_order
    return cycles.width_order(bits) if config.order == "bits" else None


def _layer(
    workload: Workload, layer: Layer, bits: npt.NDArray[np.uint8], moved: Traffic, config: Config
) -> tuple[LayerResult, _Work]:
    nodes, edges, pes, macs = workload.num_nodes, workload.num_edges, config.pes, config.macs
    degrees = aggregated_degrees(workload, config)
    update = cycles.update(layer, bits, update_order(workload, bits, config), pes, macs, config.sync)
    aggregation = cycles.aggregation(layer, degrees, pes, macs, config.agg_serial, config.sync)
    work = _Work(
        cycles.update_work(layer, bits),
        update,
        cycles.aggregation_work(layer, edges, config.agg_serial),
        aggregation,
    )
    attention = cycles.attention(layer, nodes, pes, macs, config.agg_serial)
    each = config.fill_cycles + config.requantize_cycles
    searched = config.search_cycles if layer.nns_groups else 0
    update += attention + (each + searched) * cycles.update_phases(layer, nodes, pes)
    aggregation += each * cycles.aggregation_phases(layer, degrees.size, pes)
    counted = operations(layer, nodes, edges)
    bits_moved = {f"{direction}_bits": sum(operands.values()) for direction, operands in moved.items()}
    dram = bits_moved["dram_read_bits"] + bits_moved["dram_write_bits"]
    memory_cycles = _memory_cycles(dram, config)
    compute = update + aggregation
    total = max(compute, memory_cycles) if config.overlap else compute + memory_cycles
    spent = energy(counted, dram, bits_moved["sram_read_bits"], bits_moved["sram_write_bits"], total, config)
    result = LayerResult(
        name=layer.name,
        kind=layer.kind,
        f_in=layer.f_in,
        f_out=layer.f_out,
        average_bits=float(bits.mean()),
        update_cycles=update,
        aggregation_cycles=aggregation,
        attention_cycles=attention,
        update_utilisation=_utilisation([work], "update", config),
        aggregation_utilisation=_utilisation([work], "aggregation", config),
        **counted._asdict(),
        **bits_moved,
        traffic=moved,
        memory_cycles=memory_cycles,
        compute_cycles=compute,
        stall_cycles=total - compute,
        total_cycles=total,
        serial_cycles=compute + memory_cycles,
        energy_pj=spent,
    )
    return result, work


def _memory_cycles(bits: int, config: Config) -> int:
    """Cycles of the HBM, rounded up; in fractions, as a float would lose whole cycles of a large graph."""
    # of their decimals: the float 0.3 is a little less than what was written
    cycles_a_bit = Fraction(str(config.clock_hz)) / (Fraction(str(config.hbm_gbs)) * 8 * 10**9)
    return -(-bits * cycles_a_bit.numerator // cycles_a_bit.denominator)


def _utilisation(work: Sequence[_Work], phase: str, config: Config) -> float:
    useful, spent = (sum(getattr(of, key) for of in work) for key in (phase, f"{phase}_cycles"))
    return cycles.utilisation(useful, spent, config.pes, config.macs)


_SUMMED = (
    "update_cycles", "aggregation_cycles", "attention_cycles", *Operations._fields, "dram_read_bits", "dram_write_bits", "sram_read_bits",
    "sram_write_bits", "memory_cycles", "compute_cycles", "stall_cycles", "total_cycles", "serial_cycles",
)  # fmt: skip


def _total(results: Sequence[LayerResult], work: Sequence[_Work], memory: MemoryReport, config: Config) -> LayerResult:
    moved: Traffic = {}
    for result in results:
        for direction, operands in result.traffic.items():
            into = moved.setdefault(direction, {})
            for operand, bits in operands.items():
                into[operand] = into.get(operand, 0) + bits
    sums: dict[str, Any] = {key: sum(getattr(result, key) for result in results) for key in _SUMMED}
    return LayerResult(
        name="total",
        kind="",
        f_in=results[0].f_in,
        f_out=results[-1].f_out,
        average_bits=memory.average_bits_by_dimension,
        traffic=moved,
        energy_pj={part: sum(result.energy_pj[part] for result in results) for part in PARTS},
        update_utilisation=_utilisation(work, "update", config),
        aggregation_utilisation=_utilisation(work, "aggregation", config),
        **sums,
    )


def _notes(workload: Workload, config: Config) -> list[str]:
    notes = []
    for index, layer in enumerate(workload.layers):
        name = layer.name or f"layer {index}"
        if layer.bits is None and (not layer.binary_input or config.first_layer == "as_learned"):
            values = "0/1" if layer.binary_input else "real-valued"
            notes.append(
                f"{name}: its {values} input was left unquantized, and {config.real_input_bits} bits are charged (real_input_bits)"
            )
        elif layer.binary_input:
            charged = {"binary": "1 bit is", "as_learned": "the widths given are", "4": "4 bits are"}[
                config.first_layer
            ]
            notes.append(f"{name}: its input holds zeros and ones, and {charged} charged (first_layer)")
        weight = WEIGHT_BITS * layer.f_in * layer.f_out
        if weight > 8 * config.weight_buffer:
            notes.append(
                f"{name}: weights of {weight / 8:,.0f} bytes pass through a buffer of {config.weight_buffer:,}, once"
            )
    nodes, edges = workload.num_nodes, workload.num_edges
    width = index_bits(config, nodes)
    graph = width * (nodes + 1 + edges)
    if graph > 8 * config.edge_buffer and any(layer.columns for layer in workload.layers):
        notes.append(
            f"the graph's {graph / 8:,.0f} bytes pass through a buffer of {config.edge_buffer:,}, once a layer"
        )
    if max(nodes - 1, edges) >= 2**width:
        notes.append(
            f"row pointers to {edges:,} entries do not fit {width} bits (index_bits): their traffic is a lower bound"
        )
    return notes
