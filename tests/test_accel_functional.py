"""The bit-serial model against numpy's integer products, and its cycles against the closed forms of the simulator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from qgnn import data
from qgnn.accel import cycles
from qgnn.accel.functional import Array, adder_tree, aggregate, update
from qgnn.accel.workload import Layer, Workload

Int64 = npt.NDArray[np.int64]
CASES, BLOCKS = 1000, 10


def literal_cycles(work: Int64, order: Int64, pes: int) -> int:
    """The sum over phases of ``pes`` consecutive rows of the most work of a row."""
    rows = [int(work[i]) for i in order]
    return sum(max(rows[first : first + pes]) for first in range(0, len(rows), pes))


def random_codes(rng: np.random.Generator, widths: Int64, columns: int, signed: bool) -> Int64:
    """Codes over the whole range of each row's width, ``[N, columns]``."""
    high = (1 << widths) - 1
    shift = np.where(widths > 0, 1 << np.maximum(widths - 1, 0), 0) if signed else np.zeros_like(widths)
    return rng.integers(0, high[:, None], (widths.size, columns), endpoint=True) - shift[:, None]


def random_csr(rng: np.random.Generator, nodes: int) -> tuple[Int64, Int64]:
    """Most rows short, some empty, one in two graphs with a hub."""
    degrees = rng.integers(0, 5, nodes) * rng.integers(0, 2, nodes)
    if rng.integers(2):
        degrees[rng.integers(nodes)] = rng.integers(nodes, 4 * nodes + 1)
    indptr = np.concatenate([[0], np.cumsum(degrees)])
    return indptr, rng.integers(0, nodes, indptr[-1])


def dense(indptr: Int64, indices: Int64) -> Int64:
    matrix = np.zeros((indptr.size - 1,) * 2, np.int64)
    np.add.at(matrix, (np.repeat(np.arange(indptr.size - 1), np.diff(indptr)), indices), 1)
    return matrix


@pytest.mark.parametrize("block", range(BLOCKS))
def test_update_is_the_integer_product(block: int) -> None:
    for case in range(block, CASES, BLOCKS):
        rng = np.random.default_rng(case)
        widest, signed = case % 8 + 1, bool(case // 8 % 2)
        nodes, f_in, f_out, pes, macs = (int(rng.integers(1, most + 1)) for most in (24, 20, 4, 9, 7))
        widths = rng.integers(0, widest, nodes, endpoint=True)
        x, weight = random_codes(rng, widths, f_in, signed), rng.integers(-8, 8, (f_in, f_out))
        order = rng.permutation(nodes)
        run = update(x, weight, widths, pes=pes, macs=macs, signed=signed, order=order)
        assert np.array_equal(run.out, x @ weight), case
        assert run.cycles == f_out * -(-f_in // macs) * literal_cycles(widths, order, pes), case
        assert run.cycles == cycles.update(Layer(f_in, f_out, widths), widths, order, pes, macs), case


@pytest.mark.parametrize("block", range(BLOCKS))
def test_aggregate_is_the_integer_product(block: int) -> None:
    for case in range(block, CASES, BLOCKS):
        rng = np.random.default_rng(case)
        width, signed = case % 8 + 1, bool(case // 8 % 2)
        nodes, columns, pes, macs = (int(rng.integers(1, most + 1)) for most in (24, 4, 9, 7))
        serial = (width, 1, 4)[case // 16 % 3]
        indptr, indices = random_csr(rng, nodes)
        b = random_codes(rng, np.full(nodes, width), columns, signed)
        order = rng.permutation(nodes)
        run = aggregate(indptr, indices, b, width=width, pes=pes, macs=macs, serial=serial, signed=signed, order=order)
        assert np.array_equal(run.out, dense(indptr, indices) @ b), case
        degrees = np.diff(indptr)
        filled = order[degrees[order] > 0]
        assert run.cycles == columns * serial * literal_cycles(-(-degrees // macs), filled, pes), case
        layer = Layer(1, columns, width)
        assert run.cycles == cycles.aggregation(layer, degrees[filled], pes, macs, serial), case


def test_the_worked_example() -> None:
    array, registers = Array(1, 1), []
    for plane in range(3):
        array.start()
        array.beat(np.array([[-3]]), np.array([[3]]), np.array([5]), plane + 1)
        registers.append(int(array.inner_products()[0]))
    assert registers == [5, 5, -15]


@pytest.mark.parametrize("macs", [1, 2, 3, 5, 16, 17])
def test_the_adder_tree_adds_every_register(macs: int) -> None:
    sums = 3 ** np.arange(macs) * np.array([[1], [-2]])
    assert adder_tree(sums).tolist() == sums.sum(1).tolist()


def test_a_phase_takes_as_long_as_its_widest_row() -> None:
    # 5 rows on 2 PEs: phases of widths (1, 3), (0, 0), (8); 5 features on 2 MACs: 3 beats each.
    run = update(np.zeros((5, 5), np.int8), np.ones((5, 2), np.int8), [1, 3, 0, 0, 8], pes=2, macs=2)
    assert run.phase_cycles.tolist() == [[9, 9], [0, 0], [24, 24]]
    # Rows of 5, 0, 1, 2 entries on 2 PEs of 2 MACs, the empty one dropped: phases of 3 beats and of 1, 4 cycles each.
    run = aggregate([0, 5, 5, 6, 8], [0, 1, 2, 3, 0, 1, 2, 3], np.ones((4, 1), np.int8), pes=2, macs=2)
    assert run.phase_cycles.tolist() == [[12], [4]] and run.out[:, 0].tolist() == [5, 0, 1, 2]


def test_plain_additions_take_one_cycle_a_beat() -> None:
    b = np.array([[-8], [7]])
    runs = [aggregate([0, 2, 3], [0, 1, 1], b, pes=1, macs=1, serial=serial) for serial in (1, 2, 3, 4, 7)]
    assert [run.cycles for run in runs] == [3, 6, 9, 12, 21]
    assert all(run.out[:, 0].tolist() == [-1, 7] for run in runs)


@pytest.mark.parametrize("dtype", [np.bool_, np.int8, np.uint8, np.int32])
def test_any_integers_are_codes(dtype: type[np.generic]) -> None:
    x = np.array([[1, 0, 1], [0, 1, 1]], dtype)
    assert update(x, [[7], [-8], [1]], 1, signed=False).out.tolist() == [[8], [-7]]
    assert aggregate([0, 1, 2], [1, 0], x, width=1, signed=False).out.tolist() == x[::-1].astype(int).tolist()


@pytest.mark.parametrize("bits", [31, 32])
def test_the_widest_codes(bits: int) -> None:
    x = np.array([[-(2 ** (bits - 1)), 2 ** (bits - 1) - 1]])
    run = update(x, [[-128], [127]], bits)
    assert run.out.item() == 2 ** (bits - 1) * 255 - 127 and run.cycles == bits


def test_nothing_to_do() -> None:
    run = update(np.zeros((3, 4), np.int8), np.ones((4, 2), np.int8), 0)
    assert run.cycles == 0 and not run.out.any() and run.out.shape == (3, 2)
    run = aggregate([0, 0, 0], [], np.ones((2, 3), np.int8))
    assert run.cycles == 0 and not run.out.any() and run.out.shape == (2, 3)


X, WEIGHT = np.array([[1, 2, 3], [0, 1, 0]]), np.array([[1], [2], [3]])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": X.astype(np.float32)}, "x must be integers .* float32"),
        ({"x": X.astype(np.uint64)}, "x must be integers .* uint64"),
        ({"x": X[0]}, r"x must have 2 dimensions, got shape \[3\]"),
        ({"weight": WEIGHT[:2]}, r"x \[2, 3\] times weight \[2, 1\]"),
        ({"bits": [3, 3, 3]}, r"bits must be one integer, or one for each row of x \[2, 3\], got \[3\]"),
        ({"bits": [3, 33]}, "bits must be 0 to 32, got 33"),
        ({"bits": [3, -1]}, "bits must be 0 to 32, got -1"),
        ({"bits": [2, 2]}, r"x\[0, 1\] is 2, but 2 signed bits hold -2 to 1: clip"),
        ({"bits": [3, 1]}, r"x\[1, 1\] is 1, but 1 signed bits hold -1 to 0"),
        ({"bits": [3, 0]}, r"x\[1, 1\] is 1, but 0 signed bits hold 0 to 0"),
        ({"bits": [1, 1], "signed": False}, r"x\[0, 1\] is 2, but 1 unsigned bits hold 0 to 1"),
        ({"x": -X, "signed": False}, r"x\[0, 0\] is -1, but 3 unsigned bits hold 0 to 7"),
        ({"x": -2 * X}, r"x\[0, 2\] is -6, but 3 signed bits hold -4 to 3"),
        ({"weight": WEIGHT * 64}, r"weight\[1, 0\] is 128, but 8 signed bits hold -128 to 127"),
        ({"pes": 0}, "pes must be an integer from 1 on, got 0"),
        ({"macs": -16}, "macs must be an integer from 1 on, got -16"),
        ({"macs": 1.5}, r"macs must be an integer from 1 on, got 1\.5"),
        ({"order": [0, 0]}, "order must hold each row from 0 to 1 once"),
        ({"order": [0]}, "order must hold each row from 0 to 1 once"),
    ],
)
def test_update_refuses(changed: dict[str, object], message: str) -> None:
    arguments = {"x": X, "weight": WEIGHT, "bits": 3, **changed}
    with pytest.raises(ValueError, match=message):
        update(**arguments)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"indptr": [0, 2, 1, 3]}, "indptr must not fall"),
        ({"indptr": [0, 1, 2]}, "indptr must go from 0 to the number of indices, 3, got 0 to 2"),
        ({"indices": [0, 1, 3]}, "indices must be 0 to 2, got 3"),
        ({"b": X}, r"b must have a row for each of 3 nodes of indptr, got \[2, 3\]"),
        ({"b": WEIGHT[:, 0]}, "b must have 2 dimensions"),
        ({"b": WEIGHT / 2}, "b must be integers"),
        ({"width": 2}, r"b\[1, 0\] is 2, but 2 signed bits hold -2 to 1"),
        ({"width": -1}, "width must be 0 to 32, got -1"),
        ({"serial": 0}, "serial must be an integer from 1 on, got 0"),
        ({"pes": True}, "pes must be an integer from 1 on, got True"),
        ({"order": [2, 1, 3]}, "order must hold each row from 0 to 2 once"),
    ],
)
def test_aggregate_refuses(changed: dict[str, object], message: str) -> None:
    arguments = {"indptr": [0, 1, 1, 3], "indices": [2, 0, 1], "b": WEIGHT, **changed}
    with pytest.raises(ValueError, match=message):
        aggregate(**arguments)


def test_a_layer_of_cora(citation_root: Path) -> None:
    """GCN's first layer on the paper's array: 0/1 words in one bit; its product, requantized to 4 bits, aggregated in order of degree."""
    cora = data.load("Cora", citation_root).data
    x = cora.x.numpy() != 0
    source, target = cora.edge_index.numpy()
    indptr = np.concatenate([[0], np.cumsum(np.bincount(target, minlength=len(x)))])
    weight = np.random.default_rng(0).integers(-8, 8, (x.shape[1], 4))
    workload = Workload(indptr, source[np.argsort(target, kind="stable")], [Layer(x.shape[1], 4, 1)])
    (layer,) = workload.layers

    run = update(x, weight, 1, signed=False, order=workload.degree_order)
    assert np.array_equal(run.out, x.astype(np.int64) @ weight)
    assert run.cycles == cycles.update(layer, np.ones(len(x), np.uint8), None, 256, 16) == 4 * 90 * 11

    b = np.clip(run.out // 8, -8, 7)
    sums = aggregate(workload.indptr, workload.indices, b, order=workload.degree_order)
    expected = np.zeros_like(b)
    np.add.at(expected, target, b[source])
    assert np.array_equal(sums.out, expected)
    filled = workload.degrees[workload.degree_order]
    assert sums.cycles == cycles.aggregation(layer, filled[filled > 0], 256, 16, 4)
