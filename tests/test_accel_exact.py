"""qgnn.accel against tests/literal.py, which counts step by step: integers to the integer; and the identities of the closed forms."""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgnn import accel

from . import literal

ROUNDING = 2.0**-53
"""Largest relative error of one rounding of a float64."""

Integers = npt.NDArray[np.integer[Any]]
Spec = dict[str, Any]  # a layer as literal.py takes it


def build(indptr: list[int], indices: list[int], layers: list[Spec]) -> accel.Workload:
    """``bits`` that are a list become an array."""
    return accel.Workload(
        np.array(indptr),
        np.array(indices, dtype=np.int32),
        [accel.Layer(**layer | {"bits": as_bits(layer["bits"])}) for layer in layers],
    )


def as_bits(bits: int | list[int] | None) -> int | Integers | None:
    return np.array(bits, dtype=np.uint8) if isinstance(bits, list) else bits


def assert_close(actual: float, exact: Fraction | int, roundings: int, what: str) -> None:
    """A result of positive terms: each rounding is relative to a part of the result, so their errors add up at most."""
    bound = Fraction(1.01 * roundings * ROUNDING) * exact  # 1.01: products of the errors
    assert abs(Fraction(actual) - exact) <= bound, f"{what}: {actual}, expected {float(exact)}"


def assert_record(actual: accel.LayerResult, expected: dict[str, Any], layers: int, what: str) -> None:
    for key in literal.ADDED:
        value = getattr(actual, key)
        assert isinstance(value, int), f"{what} {key}: {type(value)}"  # a numpy integer would overflow, or break JSON
        assert value == expected[key], f"{what} {key}: {value}, expected {expected[key]}"
    for direction, bits in expected["traffic"].items():
        got = {operand: count for operand, count in actual.traffic[direction].items() if count}
        assert got == {operand: count for operand, count in bits.items() if count}, f"{what} traffic {direction}"
    for key in ("update_utilisation", "aggregation_utilisation"):
        assert_close(getattr(actual, key), expected[key], 1, f"{what} {key}")  # a quotient of integers
    assert actual.energy_pj.keys() == expected["energy_pj"].keys(), what
    for part, energy in expected["energy_pj"].items():
        # Leakage is rounded most: cycles and clock become floats, and four factors are multiplied. The total adds the layers up.
        assert_close(actual.energy_pj[part], energy, 5 + layers, f"{what} energy {part}")


def assert_equals_the_loops(
    indptr: list[int], indices: list[int], layers: list[Spec], config: dict[str, Any]
) -> accel.Result:
    result = accel.simulate(build(indptr, indices, layers), accel.load_config(**config))
    expected = literal.simulate(indptr, layers, config)
    assert (result.nodes, result.edges) == (len(indptr) - 1, len(indices))
    assert len(result.layers) == len(layers)
    for number, (actual, record) in enumerate(zip(result.layers, expected["layers"], strict=True)):
        assert_record(actual, record, len(layers), f"layer {number}")
        # a sum of integers, exact in float64, and a division
        assert_close(actual.average_bits, record["average_bits"], 1, f"layer {number} average_bits")
        given = {**literal.LAYER, **layers[number]}
        assert (actual.kind, actual.f_in, actual.f_out) == (given["kind"], given["f_in"], given["f_out"])
    assert_record(result.total, expected["total"], len(layers), "total")
    assert result.total.average_bits == result.memory.average_bits_by_dimension
    for key, value in expected["memory"].items():
        actual_value = getattr(result.memory, key)
        if value is None:
            assert actual_value == math.inf, f"{key}: {actual_value}"  # no bits left: the ratio has no bound
        else:
            # a division for each layer, their sum, and a division
            assert_close(actual_value, value, len(layers) + 2, key)
    clock = config.get("clock_hz", literal.DEFAULTS["clock_hz"])
    assert_close(result.seconds, Fraction(expected["total"]["total_cycles"]) / Fraction(clock), 2, "seconds")
    return result


# Random cases


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """With empty rows, hubs, and edges that are listed twice."""
    nodes = draw(st.sampled_from((7, 12, 5, 3, 2, 1, 9)))
    degrees = draw(st.lists(st.integers(0, 3) | st.integers(0, 20), min_size=nodes, max_size=nodes))
    count = sum(degrees)
    indices = draw(st.lists(st.integers(0, nodes - 1), min_size=count, max_size=count))
    return [0, *np.cumsum(degrees).tolist()], indices


@st.composite
def layers_of(draw: st.DrawFn, nodes: int) -> Spec:
    kind = draw(st.sampled_from(("gcn", "gin", "sage", "gat", "linear")))
    heads = draw(st.integers(1, 3)) if kind == "gat" else 1
    rows = st.lists(st.integers(0, 9), min_size=nodes, max_size=nodes)
    widths = {"rows": rows, "uniform": st.integers(0, 8), "real-valued": st.none()}
    return {
        "kind": kind,
        "heads": heads,
        "f_in": draw(st.integers(1, 11)),
        "f_out": heads * draw(st.integers(1, 9 // heads)),
        "bits": draw(widths[draw(st.sampled_from(("rows", "rows", "rows", "uniform", "real-valued")))]),
        "nns_groups": draw(st.sampled_from((0, 1, 2, 5, 64, 1000))),
        "binary_input": draw(st.sampled_from((False, False, True))),
    }


CYCLES = st.sampled_from((0, 1, 3))
PJ = st.sampled_from((0.0, 0.1, 5 / 32, 12.75))
# Every choice is drawn in every case: what hypothesis may leave out, it mostly does.
CONFIGS = st.fixed_dictionaries(
    {
        "pes": st.sampled_from((2, 3, 1, 4, 5, 7, 256)),
        "macs": st.sampled_from((3, 2, 1, 4, 5, 16)),
        "input_buffer": st.sampled_from((0, 1, 3, 7, 13, 20, 35, 60, 2**21)),
        "hbm_gbs": st.sampled_from((256.0, 4.0, 0.5, 0.3)),
        "sync": st.sampled_from(("lockstep", "lockstep", "async", "ideal")),
        "order": st.sampled_from(("degree", "bits", "none")),
        "agg_serial": st.sampled_from((4, 1, 3)),
        "first_layer": st.sampled_from(("binary", "as_learned", "4")),
        "real_input_bits": st.sampled_from((4, 8, 16, 32)),
        "index_bits": st.sampled_from((16, 32, "log2")),
        "spill": st.sampled_from(("excess", "whole")),
        "overlap": st.booleans(),
        "fill_cycles": CYCLES,
        "requantize_cycles": CYCLES,
        "search_cycles": CYCLES,
        "profile": st.sampled_from(("paper-table", "cacti45-hp", "cacti45-lop")),
    },
    optional={
        "output_buffer": st.integers(0, 60),
        "edge_buffer": st.integers(0, 60),
        "weight_buffer": st.integers(0, 60),
        "clock_hz": st.sampled_from((1.0, 3e8, 1.7e9)),
        "sram_read_pj": PJ,
        "sram_write_pj": PJ,
        "sram_leakage_w": PJ,
        "int_mac_pj": PJ,
        "int_add_pj": PJ,
        "float_multiply_pj": PJ,
        "hbm_pj": PJ,
    },
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(data=st.data(), graph=graphs(), config=CONFIGS)
def test_random_cases_equal_the_loops(
    data: st.DataObject, graph: tuple[list[int], list[int]], config: dict[str, Any]
) -> None:
    indptr, indices = graph
    layers = data.draw(st.lists(layers_of(len(indptr) - 1), min_size=1, max_size=3))
    assert_equals_the_loops(indptr, indices, layers, config)


INDPTR, INDICES = [0, 2, 2, 9, 10, 30, 31], [1, 2, *range(6), 2, 0, *([0, 1, 2, 3, 5] * 4), 5]
LAYERS: list[Spec] = [
    {"f_in": 11, "f_out": 6, "bits": [1, 5, 0, 3, 2, 8], "binary_input": True},
    {"f_in": 6, "f_out": 8, "bits": [4, 2, 6, 3, 5, 1], "kind": "gat", "heads": 2, "nns_groups": 5},
    {"f_in": 8, "f_out": 9, "bits": None, "kind": "gin"},
    {"f_in": 9, "f_out": 5, "bits": [7, 7, 1, 3, 2, 4], "kind": "sage", "nns_groups": 3},
    {"f_in": 5, "f_out": 3, "bits": [2, 3, 1, 3, 2, 1], "kind": "linear"},
]
ARRAY: dict[str, Any] = {"pes": 2, "macs": 3, "input_buffer": 13, "hbm_gbs": 0.5}
CHANGES: list[tuple[str, Any]] = [
    *(("pes", value) for value in (1, 3, 5, 6, 7)),
    *(("macs", value) for value in (1, 4, 5, 16)),
    *(("input_buffer", value) for value in (0, 1, 17, 1000)),
    *(("order", value) for value in ("bits", "none")),
    *(("sync", value) for value in ("async", "ideal")),
    *(("agg_serial", value) for value in (1, 3)),
    *(("first_layer", value) for value in ("as_learned", "4")),
    *(("real_input_bits", value) for value in (4, 16, 32)),
    *(("index_bits", value) for value in (16, "log2")),
    *(("hbm_gbs", value) for value in (256.0, 0.02)),
    *(("profile", value) for value in ("cacti45-hp", "cacti45-lop")),
    ("clock_hz", 3e8),
    ("spill", "whole"),
    ("overlap", False),
    ("fill_cycles", 2),
    ("requantize_cycles", 3),
    ("search_cycles", 5),
    ("sram_read_pj", 0.5),
    ("sram_write_pj", 0.5),
    ("sram_leakage_w", 0.5),
    ("int_mac_pj", 0.5),
    ("int_add_pj", 0.5),
    ("float_multiply_pj", 0.5),
    ("hbm_pj", 0.5),
]


@pytest.mark.parametrize(("key", "value"), CHANGES)
def test_each_key_has_its_effect(key: str, value: Any) -> None:
    """A key that nothing reads would leave the totals as they are, in the loops and in the simulator."""
    changed = assert_equals_the_loops(INDPTR, INDICES, LAYERS, ARRAY | {key: value}).total
    usual = accel.simulate(build(INDPTR, INDICES, LAYERS), accel.load_config(**ARRAY)).total
    assert changed != usual


def test_default_configuration() -> None:
    """The values of the specification's table, with nothing given."""
    assert accel.load_config().to_dict() == literal.DEFAULTS
    implicit = accel.simulate(build(INDPTR, INDICES, LAYERS))
    assert implicit.config == accel.load_config("paper-table") == accel.Config()
    assert_equals_the_loops(INDPTR, INDICES, LAYERS, {})


# Real graphs


Real = Callable[[str], tuple[list[int], list[int], int]]  # indptr, indices, number of features


def csr(edges: Integers, nodes: int) -> tuple[list[int], list[int]]:
    """With a self loop for every node; rows are targets; ``edges`` int64 ``[2, E]``, source and target."""
    source, target = (np.concatenate([end, np.arange(nodes)]) for end in edges)
    indptr = np.concatenate([[0], np.cumsum(np.bincount(target, minlength=nodes))])
    return indptr.tolist(), source[np.argsort(target, kind="stable")].tolist()


@pytest.fixture(scope="module")
def real(citation_root: Path) -> Real:
    """CSR with self loops, and number of features, of a real graph."""
    from qgnn.data import Dataset, load

    def read(name: str) -> tuple[list[int], list[int], int]:
        dataset = load(name, citation_root)
        assert isinstance(dataset, Dataset)
        nodes, features = dataset.data.x.shape
        return *csr(dataset.data.edge_index.numpy(), nodes), features

    return read


def learned(indptr: list[int], seed: int) -> list[int]:
    """Widths 1 to 8, wider where more neighbours are, as A2Q learns them, with some noise."""
    degrees = np.diff(indptr)
    noise = np.random.default_rng(seed).integers(-1, 2, degrees.size)
    return np.clip(1 + np.log2(degrees).astype(int) + noise, 1, 8).tolist()


@pytest.mark.parametrize(
    ("hidden", "config"),
    [
        (16, {"first_layer": "as_learned", "order": "bits"}),
        (3, {"pes": 37, "macs": 11, "input_buffer": 1000, "agg_serial": 1, "hbm_gbs": 1.0, "index_bits": "log2"}),
    ],
    ids=["paper", "odd"],
)
def test_cora_gcn(real: Real, hidden: int, config: dict[str, Any]) -> None:
    indptr, indices, features = real("Cora")
    layers: list[Spec] = [
        {"f_in": features, "f_out": hidden, "bits": learned(indptr, 0), "binary_input": True},
        {"f_in": hidden, "f_out": 7, "bits": learned(indptr, 1)},
    ]
    result = assert_equals_the_loops(indptr, indices, layers, config)
    assert (result.nodes, result.edges) == (2708, 10556 + 2708)


def test_citeseer_of_every_kind(real: Real) -> None:
    indptr, indices, _ = real("CiteSeer")
    layers: list[Spec] = [
        {"f_in": 37, "f_out": 12, "bits": None, "kind": "sage"},
        {"f_in": 12, "f_out": 18, "bits": learned(indptr, 0), "kind": "gat", "heads": 3},
        {"f_in": 18, "f_out": 9, "bits": learned(indptr, 1), "kind": "gin", "nns_groups": 1000},
        {"f_in": 9, "f_out": 6, "bits": learned(indptr, 2), "kind": "linear"},
    ]
    config = {"pes": 100, "macs": 7, "input_buffer": 5000, "sync": "async", "order": "none", "fill_cycles": 3}
    assert_equals_the_loops(indptr, indices, layers, config)


@pytest.mark.parametrize(("name", "classes", "percent"), [("Cora", 7, 96.6), ("CiteSeer", 6, 99.0)])
def test_share_of_the_first_update(real: Real, name: str, classes: int, percent: float) -> None:
    """Of all cycles of A2Q's GCN (16 hidden units) at 4 bits: why its speedups hang on what a binary input is charged."""
    indptr, indices, features = real(name)
    layers: list[Spec] = [{"f_in": features, "f_out": 16, "bits": 4}, {"f_in": 16, "f_out": classes, "bits": 4}]
    result = accel.simulate(build(indptr, indices, layers))
    assert round(100 * result.layers[0].update_cycles / result.total.compute_cycles, 1) == percent


# Closed forms and identities


def product_of(bits: Sequence[int], f_in: int, f_out: int, config: dict[str, Any]) -> accel.LayerResult:
    """A layer without aggregation, on a graph without edges."""
    layer: Spec = {"f_in": f_in, "f_out": f_out, "bits": list(bits), "kind": "linear"}
    return accel.simulate(build([0] * (len(bits) + 1), [], [layer]), accel.load_config(**config)).layers[0]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(*(st.integers(1, most) for most in (600, 50, 50, 16, 300, 20)), st.sampled_from(("degree", "bits", "none")))
def test_uniform_widths_in_closed_form(
    nodes: int, f_in: int, f_out: int, bits: int, pes: int, macs: int, order: str
) -> None:
    actual = product_of([bits] * nodes, f_in, f_out, {"pes": pes, "macs": macs, "order": order})
    assert actual.update_cycles == f_out * math.ceil(f_in / macs) * math.ceil(nodes / pes) * bits


def test_numbers_by_hand() -> None:
    """Cora's first layer at 4 bits: 2,708 nodes are 11 phases of 256 rows, 1,433 features 90 beats of 16 lanes. Every node has 17
    neighbours: 2 beats of 4 cycles."""
    nodes, degree = 2708, 17
    indptr = list(range(0, nodes * degree + 1, degree))
    layers: list[Spec] = [{"f_in": 1433, "f_out": 16, "bits": 4}]
    layer = accel.simulate(build(indptr, [0] * (nodes * degree), layers)).layers[0]
    assert layer.update_cycles == 63_360  # 16 columns * 90 * 11 * 4
    assert layer.aggregation_cycles == 1_408  # 16 columns * 11 * 2 * 4
    assert layer.int_macs == 62_089_024  # 2,708 * 1,433 * 16
    assert layer.aggregation_adds == 736_576  # 2,708 * 17 * 16
    assert layer.float_multiplies == 86_656  # 2 * 2,708 * 16
    # weights, step sizes, CSR, input, as first layer
    assert layer.dram_read_bits == 91_712 + 87_168 + 1_559_840 + 15_522_256
    assert layer.dram_write_bits == 1_386_496  # FP32, as last layer; B, 173,312 bits, stays in the buffer
    assert layer.sram_read_bits == 248_356_096 + 1_013_760 + 26_516_736  # input, weights, CSR and B
    assert layer.sram_write_bits == 17_260_976 + 173_312 + 1_386_496  # what DRAM delivered, B, output
    assert layer.memory_cycles == 9_106  # 18,647,472 bits at 2,048 a cycle
    assert layer.total_cycles == layer.compute_cycles == 64_768


@settings(max_examples=20, deadline=None, derandomize=True)
@given(bits=st.lists(st.integers(0, 8), min_size=1, max_size=6), pes=st.integers(1, 4))
def test_no_order_needs_fewer_cycles_than_that_by_bits(bits: list[int], pes: int) -> None:
    def cycles(widths: Sequence[int], order: str) -> int:
        return product_of(widths, 4, 3, {"pes": pes, "macs": 3, "order": order}).update_cycles

    assert cycles(bits, "bits") == min(cycles(order, "none") for order in set(permutations(bits)))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    graph=graphs(),
    data=st.data(),
    order=st.sampled_from(("degree", "bits", "none")),
    sync=st.sampled_from(("lockstep", "async", "ideal")),
    pes=st.integers(1, 5),
)
def test_cycles_grow_with_every_width(
    graph: tuple[list[int], list[int]], data: st.DataObject, order: str, sync: str, pes: int
) -> None:
    nodes = len(graph[0]) - 1
    narrow = data.draw(st.lists(st.integers(0, 8), min_size=nodes, max_size=nodes))
    node = data.draw(st.integers(0, nodes - 1))
    wide = [width + (row == node) for row, width in enumerate(narrow)]
    config = accel.load_config(pes=pes, macs=2, order=order, sync=sync)
    before, after = (
        accel.simulate(build(*graph, [{"f_in": 5, "f_out": 3, "bits": bits}]), config).layers[0]
        for bits in (narrow, wide)
    )
    assert before.update_cycles <= after.update_cycles
    assert before.aggregation_cycles == after.aggregation_cycles


@settings(max_examples=100, deadline=None, derandomize=True)
@given(graph=graphs(), data=st.data(), config=CONFIGS)
def test_sorted_by_bits_the_labels_of_the_nodes_do_not_matter(
    graph: tuple[list[int], list[int]], data: st.DataObject, config: dict[str, Any]
) -> None:
    indptr, indices = graph
    nodes = len(indptr) - 1
    layers = data.draw(st.lists(layers_of(nodes), min_size=1, max_size=2))
    old = data.draw(st.permutations(range(nodes)))  # of every new label
    new = np.argsort(old)
    rows = [new[indices[indptr[node] : indptr[node + 1]]].tolist() for node in old]
    relabelled = build(
        [0, *np.cumsum([len(row) for row in rows]).tolist()],
        [source for row in rows for source in row],
        [layer | {"bits": relabel(layer["bits"], old)} for layer in layers],
    )
    settled = accel.load_config(**config | {"order": "bits"})
    assert accel.simulate(relabelled, settled) == accel.simulate(build(indptr, indices, layers), settled)


def relabel(bits: int | list[int] | None, old: Sequence[int]) -> int | list[int] | None:
    return [bits[node] for node in old] if isinstance(bits, list) else bits


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    bits=st.lists(st.integers(0, 2), min_size=1, max_size=8),
    f_in=st.integers(1, 8),
    pes=st.integers(1, 4),
    macs=st.integers(1, 4),
)
def test_full_utilisation(bits: list[int], f_in: int, pes: int, macs: int) -> None:
    """Exactly where every MAC has work in every cycle: the phases are full, and each has one width, of which those of 0 bits take no time. Within
    one phase, that is P | N, M | F_in and equal widths."""
    phases = [bits[start : start + pes] for start in range(0, len(bits), pes)]
    busy = [phase for phase in phases if max(phase)]
    full = f_in % macs == 0 and all(len(phase) == pes and len(set(phase)) == 1 for phase in busy)
    actual = product_of(bits, f_in, 3, {"pes": pes, "macs": macs, "order": "none"}).update_utilisation
    assert (actual == 1) == (full and bool(busy))
    assert 0 <= actual <= 1 and (actual == 0) == (not busy)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(*(st.integers(1, most) for most in (3, 3, 8, 5, 5)))
def test_uniform_widths_on_full_phases_use_every_mac(phases: int, beats: int, bits: int, pes: int, macs: int) -> None:
    actual = product_of([bits] * (phases * pes), beats * macs, 2, {"pes": pes, "macs": macs})
    assert actual.update_utilisation == 1


@settings(max_examples=60, deadline=None, derandomize=True)
@given(graph=graphs(), data=st.data(), config=CONFIGS)
def test_less_waiting_takes_no_longer(
    graph: tuple[list[int], list[int]], data: st.DataObject, config: dict[str, Any]
) -> None:
    layers = data.draw(st.lists(layers_of(len(graph[0]) - 1), min_size=1, max_size=2))
    workload = build(*graph, layers)
    ideal, free, lockstep = (
        accel.simulate(workload, accel.load_config(**config | {"sync": sync})).total
        for sync in ("ideal", "async", "lockstep")
    )
    assert ideal.update_cycles <= free.update_cycles <= lockstep.update_cycles
    assert ideal.aggregation_cycles <= free.aggregation_cycles <= lockstep.aggregation_cycles


# Corners


def test_nothing_to_compute() -> None:
    """No bits and no edges: no cycles, no utilisation, and ratios without a bound."""
    layers: list[Spec] = [{"f_in": 3, "f_out": 2, "bits": [0, 0]}]
    result = assert_equals_the_loops([0, 0, 0], [], layers, {})
    assert result.total.compute_cycles == result.total.update_utilisation == 0
    assert result.memory.ratio == 3  # 32 bits of 3 features against a step size: finite


def test_counts_beyond_64_bits() -> None:
    nodes, wide = 3, 2**33
    layers: list[Spec] = [{"f_in": wide, "f_out": wide, "bits": 32, "nns_groups": 7}]
    result = accel.simulate(build([0, 1, 2, 3], [0, 1, 2], layers), accel.load_config(pes=2, macs=2))
    layer = result.total
    assert layer.int_macs == nodes * wide**2
    assert layer.update_cycles == wide * (wide // 2) * 2 * 32
    assert layer.update_utilisation == 3 / 4
    assert layer.dram_read_bits == 4 * wide**2 + 32 * (wide + 3) + 32 * (4 + 3) + wide * 32 * 3 + 4 * 3 * wide - 2**24
    assert layer.sram_read_bits == wide**2 * 96 + 2 * wide * (wide // 2) * 2 * 4 + 36 * 3 * wide
    assert layer.nns_comparisons == nodes * (wide + 3)


@pytest.mark.parametrize("sync", ["lockstep", "async", "ideal"])
def test_an_array_larger_than_any_graph(sync: str) -> None:
    """Costs no memory, and one phase."""
    config = accel.load_config(pes=2**40, macs=2**40, sync=sync)
    total = accel.simulate(build(INDPTR, INDICES, [{"f_in": 5, "f_out": 3, "bits": [1, 5, 0, 3, 2, 8]}]), config).total
    assert (total.update_cycles, total.aggregation_cycles) == ((1, 1) if sync == "ideal" else (3 * 8, 3 * 4))


def test_bandwidths_are_the_decimals_that_were_written() -> None:
    """208 bits of weights, step sizes and input, 32 of the output: 240 / 2.4 are 100 cycles, not 101."""
    workload = build([0, 0], [], [{"f_in": 4, "f_out": 1, "bits": 32, "kind": "linear"}])
    layer = accel.simulate(workload, accel.load_config(hbm_gbs=0.3)).total
    assert (layer.dram_read_bits, layer.dram_write_bits, layer.memory_cycles) == (208, 32, 100)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32, np.uint32, np.int64, np.uint64])
def test_integers_of_any_type(dtype: type[np.integer[Any]]) -> None:
    layers = [
        accel.Layer(**layer | {"bits": np.array(bits, dtype) if isinstance(bits := layer["bits"], list) else bits})
        for layer in LAYERS
    ]
    typed = accel.Workload(np.array(INDPTR, dtype), np.array(INDICES, dtype), layers)
    config = accel.load_config(**ARRAY)
    assert accel.simulate(typed, config) == accel.simulate(build(INDPTR, INDICES, LAYERS), config)
    assert typed.fingerprint() == build(INDPTR, INDICES, LAYERS).fingerprint()


def test_the_workload_is_left_alone() -> None:
    workload = build(INDPTR, INDICES, LAYERS)
    before = workload.fingerprint()
    for order in ("degree", "bits", "none"):
        accel.simulate(workload, accel.load_config(order=order))
    assert workload.fingerprint() == before
    assert workload.indptr.tolist() == INDPTR and workload.indices.tolist() == INDICES


# The baseline of speedups


def test_baseline_has_one_width_on_the_same_array() -> None:
    ours = build(INDPTR, INDICES, LAYERS)
    uniform = accel.baseline(ours)
    expected = [layer | {"bits": None if layer["bits"] is None else 4, "nns_groups": 0} for layer in LAYERS]
    for config in ({}, {"first_layer": "as_learned"}, {"first_layer": "4"}):
        settled = accel.load_config(**ARRAY | config)
        assert accel.simulate(uniform, settled) == accel.simulate(build(INDPTR, INDICES, expected), settled)
    assert accel.simulate(uniform).layers[0].average_bits == 1  # a bit of a binary input in both, by default
    assert accel.simulate(uniform, accel.load_config(first_layer="as_learned")).layers[0].average_bits == 4
    eight = accel.simulate(accel.baseline(ours, bits=8), accel.load_config(first_layer="as_learned"))
    assert [layer.average_bits for layer in eight.layers] == [8] * 5


def test_notes_name_what_a_reader_must_know() -> None:
    notes = accel.simulate(
        build(INDPTR, INDICES, LAYERS), accel.load_config(real_input_bits=16, weight_buffer=20)
    ).notes
    assert any("real-valued" in note and "16" in note and "layer 2" in note for note in notes), notes
    assert any("weight" in note for note in notes), notes
    unquantized = build(INDPTR, INDICES, [{"f_in": 5, "f_out": 1, "bits": None, "binary_input": True}])
    for first_layer, charged in (("binary", "1 bit is"), ("4", "4 bits are"), ("as_learned", "8 bits are")):
        (note,) = accel.simulate(unquantized, accel.load_config(first_layer=first_layer)).notes
        assert f"{charged} charged" in note
    plain = build(INDPTR, INDICES, [{"f_in": 5, "f_out": 1, "bits": 4}])
    assert accel.simulate(plain).notes == []
    for key, enough in (("weight_buffer", 3), ("edge_buffer", 152)):  # bytes: 5 weights; 38 integers of the CSR
        sizes: list[dict[str, Any]] = [{key: enough - 1}, {key: enough}]
        assert [len(accel.simulate(plain, accel.load_config(**size)).notes) for size in sizes] == [1, 0]
