"""The bit-serial accelerator counted step by step: the independent implementation that qgnn.accel is compared with.

It shares nothing with the package. A count is what a loop over phases, PEs, blocks of lanes, entries of the CSR or
elements of a map adds up to; a spill is what finds no place while the buffer is filled; fractions are exact.
A graph is two lists of integers (CSR), a layer a dict of :class:`qgnn.accel.Layer`'s arguments with ``bits`` an int, a
list or None, a configuration a dict of what differs from :data:`DEFAULTS`.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import Any

DEFAULTS: dict[str, Any] = {
    "pes": 256,
    "macs": 16,
    "input_buffer": 2 * 1024 * 1024,
    "output_buffer": 2 * 1024 * 1024,
    "edge_buffer": 256 * 1024,
    "weight_buffer": 256 * 1024,
    "clock_hz": 1e9,
    "hbm_gbs": 256.0,
    "sync": "lockstep",
    "order": "degree",
    "agg_serial": 4,
    "first_layer": "binary",
    "real_input_bits": 8,
    "index_bits": 32,
    "spill": "excess",
    "overlap": True,
    "fill_cycles": 0,
    "requantize_cycles": 0,
    "search_cycles": 0,
    "profile": "paper-table",
    "sram_read_pj": None,
    "sram_write_pj": None,
    "sram_leakage_w": None,
    "int_mac_pj": 0.23,
    "int_add_pj": 0.03,
    "float_multiply_pj": 3.7,
    "hbm_pj": 7.0,
}
LAYER: dict[str, Any] = {"kind": "gcn", "heads": 1, "nns_groups": 0, "binary_input": False, "name": ""}
SRAM = {  # pJ/bit read, pJ/bit write, W
    "paper-table": (5 / 32, 5 / 32, 0.0),
    "cacti45-hp": (0.256, 0.412, 4.4),
    "cacti45-lop": (0.171, 0.175, 0.24),
}
CODE, FLOAT = 4, 32  # bits of a weight or of an element of B, and of a step size or an element of the last output


def chunks(items: list[int], size: int) -> Iterator[list[int]]:
    while items:
        yield items[:size]
        items = items[size:]


def blocks(length: int, lanes: int) -> list[int]:
    """Lanes in use in each beat of a vector of ``length`` elements."""
    return [len(block) for block in chunks(list(range(length)), lanes)]


def ceil_log2(count: int) -> int:
    """Halvings that leave one of ``count``."""
    steps = 0
    while count > 1:
        count = (count + 1) // 2
        steps += 1
    return steps


def round_up(value: Fraction) -> int:
    whole = value.numerator // value.denominator
    return whole if whole == value else whole + 1


def row_lengths(indptr: list[int]) -> list[int]:
    return [end - start for start, end in pairwise(indptr)]


def arranged(order: str, degrees: list[int], widths: list[int]) -> list[int]:
    """Nodes in the order of the array's rows: always the largest that is left, and of equals the first."""
    if order == "none":
        return list(range(len(degrees)))
    keys = {"degree": degrees, "bits": widths}[order]
    rows: list[int] = []
    for key in sorted(set(keys), reverse=True):
        rows += [node for node in range(len(keys)) if keys[node] == key]
    return rows


@dataclass
class Stage:
    """What one stage of a layer, the update or the aggregation, adds up to."""

    pes: int
    phases: int = 0
    lockstep: int = 0
    useful: int = 0  # lane cycles that compute something
    operations: int = 0
    busy: list[int] = field(default_factory=list)  # cycles per PE, when none waits for another
    read: Counter[str] = field(default_factory=Counter)  # SRAM bits by operand

    def __post_init__(self) -> None:
        self.busy = [0] * self.pes

    def cycles(self, sync: str, macs: int) -> int:
        if sync == "async":
            return max(self.busy)
        if sync == "ideal":
            return round_up(Fraction(self.useful, self.pes * macs))
        return self.lockstep

    def utilisation(self, sync: str, macs: int) -> Fraction:
        cycles = self.cycles(sync, macs)
        return Fraction(self.useful, cycles * self.pes * macs) if cycles else Fraction(0)


def update(rows: list[int], widths: list[int], f_in: int, f_out: int, config: dict[str, Any]) -> Stage:
    """B = X W: a phase is P rows of X times one column of W, M features a beat; a beat takes one cycle per bit."""
    stage = Stage(config["pes"])
    for _column in range(f_out):
        for phase in chunks(rows, config["pes"]):
            stage.phases += 1
            for lanes in blocks(f_in, config["macs"]):
                slowest = bits = 0
                for pe, row in enumerate(phase):
                    width = widths[row]
                    slowest = width if width > slowest else slowest
                    stage.busy[pe] += width
                    bits += lanes * width
                    stage.operations += lanes
                stage.lockstep += slowest
                stage.useful += bits  # a lane reads a bit a cycle
                stage.read["features"] += bits
                stage.read["weights"] += config["macs"] * CODE  # broadcast; padding lanes are read too
    return stage


def aggregation(rows: list[int], indptr: list[int], columns: int, index: int, config: dict[str, Any]) -> Stage:
    """X' = A B: a phase is P non-empty rows of A times one column of B, M entries a beat."""
    stage = Stage(config["pes"])
    present = [row for row in rows if indptr[row] < indptr[row + 1]]
    for _column in range(columns):
        for phase in chunks(present, config["pes"]):
            stage.phases += 1
            slowest = 0
            for pe, row in enumerate(phase):
                cycles = 0
                for lanes in blocks(indptr[row + 1] - indptr[row], config["macs"]):
                    cycles += config["agg_serial"]
                    stage.useful += lanes * config["agg_serial"]
                    stage.operations += lanes
                    stage.read["operand"] += lanes * CODE
                    stage.read["graph"] += lanes * index
                stage.busy[pe] += cycles
                slowest = max(slowest, cycles)
            stage.lockstep += slowest
    return stage


def attention(nodes: int, f_out: int, heads: int, config: dict[str, Any]) -> int:
    """Cycles of both scores, source and target, of every head."""
    cycles = 0
    for _phase in chunks(list(range(nodes)), config["pes"]):
        for _side in ("source", "target"):
            for _head in range(heads):
                for _beat in blocks(f_out // heads, config["macs"]):
                    cycles += config["agg_serial"]
    return cycles


def spilled(elements: Iterable[int], config: dict[str, Any]) -> int:
    """Bits that leave for DRAM when elements of these widths fill the input buffer."""
    room = config["input_buffer"] * 8
    kept = excess = 0
    for width in elements:
        fits = min(width, room)
        room -= fits
        kept += fits
        excess += width - fits
    return kept + excess if excess and config["spill"] == "whole" else excess


def feature_map(widths: list[int], features: int) -> Iterator[int]:
    """Width of every element of a map whose rows have these widths."""
    for width in widths:
        for _feature in range(features):
            yield width


def charged(layer: dict[str, Any], nodes: int, config: dict[str, Any]) -> list[int]:
    """Bits that each row of the layer's input is charged."""
    if layer["binary_input"] and config["first_layer"] == "binary":
        return [1] * nodes
    if layer["binary_input"] and config["first_layer"] == "4":
        return [4] * nodes
    bits = config["real_input_bits"] if layer["bits"] is None else layer["bits"]
    return [bits] * nodes if isinstance(bits, int) else list(bits)


def operations(
    layer: dict[str, Any], nodes: int, edges: int, columns: int, stages: tuple[Stage, Stage]
) -> dict[str, int]:
    macs, adds, floats, comparisons = stages[0].operations, stages[1].operations, 0, 0
    for _node in range(nodes):
        floats += layer["f_out"] + columns
        if layer["nns_groups"]:
            floats += layer["f_in"]
            comparisons += layer["f_in"] + ceil_log2(layer["nns_groups"])
        if layer["kind"] == "gat":
            macs += 2 * layer["f_out"]
    if layer["kind"] == "gat":
        macs, adds = macs + adds, 0
        for _entry in range(edges):
            floats += 3 * layer["heads"]
    return {
        "int_macs": macs,
        "aggregation_adds": adds,
        "float_multiplies": floats,
        "nns_comparisons": comparisons,
    }


def traffic(
    layer: dict[str, Any],
    widths: list[int],
    following: list[int] | None,
    edges: int,
    columns: int,
    stages: tuple[Stage, Stage],
    index: int,
    config: dict[str, Any],
) -> dict[str, Counter[str]]:
    """Bits by memory, direction and operand; ``following``: widths of the next layer's input, None after the last."""
    nodes = len(widths)
    read: Counter[str] = Counter()
    write: Counter[str] = Counter()
    for _row in range(layer["f_in"]):
        for _column in range(layer["f_out"]):
            read["weights"] += CODE
    for _step in [*range(layer["f_out"]), *range(nodes)]:
        read["steps"] += FLOAT
    if columns:
        for _entry in [*range(nodes + 1), *range(edges)]:
            read["graph"] += index
    if layer["first"]:
        read["features"] += sum(feature_map(widths, layer["f_in"]))
    else:
        read["features"] += spilled(feature_map(widths, layer["f_in"]), config)
    product = [CODE] * nodes
    read["operand"] += spilled(feature_map(product, columns), config)
    write["operand"] += spilled(feature_map(product, columns), config)
    if following is None:
        output = sum(feature_map([FLOAT] * nodes, layer["f_out"]))
        write["output"] += output
    else:
        output = sum(feature_map(following, layer["f_out"]))
        write["output"] += spilled(feature_map(following, layer["f_out"]), config)
    filled = read.copy()  # all that DRAM delivers is written to SRAM first
    filled["operand"] += sum(feature_map(product, columns))
    filled["output"] += output
    return {"dram_read": read, "dram_write": write, "sram_read": stages[0].read + stages[1].read, "sram_write": filled}


def energy(record: dict[str, Any], config: dict[str, Any]) -> dict[str, Fraction]:
    """pJ, exactly, of the constants as floats hold them."""
    named = ("sram_read_pj", "sram_write_pj", "sram_leakage_w")
    profile = SRAM[config["profile"]]
    reading, writing, leaking = (
        Fraction(given if (given := config[key]) is not None else usual)
        for key, usual in zip(named, profile, strict=True)
    )
    seconds = Fraction(record["total_cycles"]) / Fraction(config["clock_hz"])
    return {
        "integer": Fraction(config["int_mac_pj"]) * record["int_macs"]
        + Fraction(config["int_add_pj"]) * record["aggregation_adds"],
        "float": Fraction(config["float_multiply_pj"]) * record["float_multiplies"],
        "sram_dynamic": reading * record["sram_read_bits"] + writing * record["sram_write_bits"],
        "sram_leakage": leaking * seconds * 10**12,
        "hbm": Fraction(config["hbm_pj"]) * (record["dram_read_bits"] + record["dram_write_bits"]),
    }


def run_layer(
    indptr: list[int],
    layer: dict[str, Any],
    widths: list[int],
    following: list[int] | None,
    config: dict[str, Any],
) -> dict[str, Any]:
    nodes, edges, macs, sync = len(indptr) - 1, indptr[-1], config["macs"], config["sync"]
    columns = {"gcn": layer["f_out"], "gat": layer["f_out"], "linear": 0}.get(layer["kind"], layer["f_in"])
    degrees = row_lengths(indptr)
    index = ceil_log2(nodes) if config["index_bits"] == "log2" else config["index_bits"]
    product = update(arranged(config["order"], degrees, widths), widths, layer["f_in"], layer["f_out"], config)
    rows = arranged("none" if config["order"] == "none" else "degree", degrees, widths)
    gather = aggregation(rows, indptr, columns, index, config)
    stages = (product, gather)

    constant = config["fill_cycles"] + config["requantize_cycles"]
    search = config["search_cycles"] if layer["nns_groups"] else 0
    scores = attention(nodes, layer["f_out"], layer["heads"], config) if layer["kind"] == "gat" else 0
    record: dict[str, Any] = {
        "update_cycles": product.cycles(sync, macs) + scores + (constant + search) * product.phases,
        "aggregation_cycles": gather.cycles(sync, macs) + constant * gather.phases,
        "attention_cycles": scores,
        "update_utilisation": product.utilisation(sync, macs),
        "aggregation_utilisation": gather.utilisation(sync, macs),
        "average_bits": Fraction(sum(widths), nodes),
        **operations(layer, nodes, edges, columns, stages),
    }
    record["traffic"] = traffic(layer, widths, following, edges, columns, stages, index, config)
    for direction, bits in record["traffic"].items():
        record[f"{direction}_bits"] = sum(bits.values())
    dram = record["dram_read_bits"] + record["dram_write_bits"]
    per_second = Fraction(str(config["hbm_gbs"])) * 8 * 10**9  # of the decimals that were written: 0.3 is 3/10
    record["memory_cycles"] = round_up(dram / per_second * Fraction(str(config["clock_hz"])))
    record["compute_cycles"] = record["update_cycles"] + record["aggregation_cycles"]
    record["serial_cycles"] = record["compute_cycles"] + record["memory_cycles"]
    record["total_cycles"] = (
        max(record["compute_cycles"], record["memory_cycles"]) if config["overlap"] else record["serial_cycles"]
    )
    record["stall_cycles"] = record["total_cycles"] - record["compute_cycles"]
    record["energy_pj"] = energy(record, config)
    record["work"] = {
        "update": (product.useful, product.cycles(sync, macs)),
        "aggregation": (gather.useful, gather.cycles(sync, macs)),
    }
    return record


def memory(layers: list[dict[str, Any]], widths: list[list[int]]) -> dict[str, Fraction | None]:
    """Equations 19 and 20 of A2Q, and both averages; None where nothing is left to divide by."""
    codes = steps = floats = elements = 0
    for layer, bits in zip(layers, widths, strict=True):
        for width in bits:
            steps += FLOAT
            for _feature in range(layer["f_in"]):
                codes += width
                floats += FLOAT
                elements += 1
    return {
        "eq19_bits": Fraction(codes + steps),
        "ratio": Fraction(floats, codes + steps),
        "ratio_without_steps": Fraction(floats, codes) if codes else None,
        "eq20": Fraction(steps, codes) if codes else None,
        "average_bits_by_dimension": Fraction(codes, elements),
        "average_bits_by_layer": sum((Fraction(sum(bits), len(bits)) for bits in widths), Fraction()) / len(widths),
    }


ADDED = (
    *("update_cycles", "aggregation_cycles", "attention_cycles", "memory_cycles", "compute_cycles", "serial_cycles"),
    *("total_cycles", "stall_cycles", "int_macs", "aggregation_adds", "float_multiplies", "nns_comparisons"),
    *("dram_read_bits", "dram_write_bits", "sram_read_bits", "sram_write_bits"),
)
"""Integers of a layer that the total adds up."""


def total(records: list[dict[str, Any]], config: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {key: sum(record[key] for record in records) for key in ADDED}
    for stage in ("update", "aggregation"):
        useful = sum(record["work"][stage][0] for record in records)
        cycles = sum(record["work"][stage][1] for record in records)
        lanes = config["pes"] * config["macs"]
        result[f"{stage}_utilisation"] = Fraction(useful, cycles * lanes) if cycles else Fraction(0)
    result["energy_pj"] = {
        part: sum(record["energy_pj"][part] for record in records) for part in records[0]["energy_pj"]
    }
    result["traffic"] = {
        direction: sum((record["traffic"][direction] for record in records), Counter())
        for direction in records[0]["traffic"]
    }
    return result


def simulate(indptr: list[int], layers: list[dict[str, Any]], config: dict[str, Any]) -> dict[str, Any]:
    """Per layer and in total, the fields of :class:`qgnn.accel.Result` under their names."""
    config = {**DEFAULTS, **config}
    layers = [{**LAYER, **layer, "first": number == 0} for number, layer in enumerate(layers)]
    widths = [charged(layer, len(indptr) - 1, config) for layer in layers]
    records = [
        run_layer(indptr, layer, bits, following, config)
        for layer, bits, following in zip(layers, widths, [*widths[1:], None], strict=True)
    ]
    return {"layers": records, "total": total(records, config), "memory": memory(layers, widths)}
