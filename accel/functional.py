"""The array bit by bit: real outputs, cycle by cycle (A2Q figure 20, sections 4.1 and A.7.5).

A MAC has a register of partial sums, and a 4-bit weight at its parallel input. In each cycle one bit of its feature comes in, the lowest first: it
gates the weight (an AND), which, shifted left by the place of the bit, is added to the register. The top bit of a signed code weighs
``-2^(b-1)`` (two's complement), so its cycle subtracts. A product with a feature of b bits takes b cycles, whatever the weight is.

Worked example: feature -3 in 3 bits, ``101``, times weight 5.

=====  ===  ==========  ========
cycle  bit  added       register
=====  ===  ==========  ========
0      1    5 << 0      5
1      0    0           5
2      1    -(5 << 2)   -15
=====  ===  ==========  ========

A PE is a row of M MACs and an adder tree. It computes one inner product: M elements in each *beat*, the partial sums staying in the MACs from beat to
beat; the tree then adds the M registers. The array is P PEs in lock step: a *phase* is one inner product on each, and its beats take as long as
the widest row that takes part; a PE with a narrower row waits. Loads of the operands and the passage through the tree overlap with other phases:
what they cost beyond that is ``fill_cycles`` of the configuration.

Numpy does the work of all MACs of a cycle at once; cycles, beats and phases are loops. The counts equal the closed forms of :mod:`.cycles`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .config import MAX_BITS
from .cycles import ceil_div
from .workload import Layer, Workload

Int64 = npt.NDArray[np.int64]


class Run(NamedTuple):
    """What the array computed, and how long it took.

    Attributes:
        out: int64 ``[N, columns]``, in the order of the nodes.
        phase_cycles: int64 ``[groups, columns]``: cycles of the phase of each group of P rows and each column.
    """

    out: Int64
    phase_cycles: Int64

    @property
    def cycles(self) -> int:
        """Cycles of all phases, which run one after the other."""
        return int(self.phase_cycles.sum())


def serial_input(codes: Int64, widths: Int64, low: int, size: int) -> Int64:
    """What one cycle brings: bits ``low`` to ``low + size - 1`` of each code, 0 past its width. Where they end with the top bit of a negative code,
    the arithmetic shift makes them negative: -1 for a single bit."""
    below = codes >> low & (1 << size) - 1
    return np.where(low + size < widths, below, np.where(low < widths, codes >> low, 0))


def adder_tree(partial_sums: Int64) -> Int64:
    """Sums of the rows, ``[P, M]`` to ``[P]``, pair by pair; on a level of odd length the last one passes through."""
    while partial_sums.shape[1] > 1:
        pairs = partial_sums[:, : partial_sums.shape[1] // 2 * 2]
        rest = partial_sums[:, pairs.shape[1] :]
        partial_sums = np.concatenate([pairs[:, ::2] + pairs[:, 1::2], rest], axis=1)
    return partial_sums[:, 0]


class Array:
    """``pes`` PEs of ``macs`` MACs.

    Attributes:
        partial_sums: the registers of the MACs, int64 ``[P, M]``.
        cycles: those since the phase began.
    """

    def __init__(self, pes: int, macs: int) -> None:
        _positive(pes=pes, macs=macs)
        self.partial_sums = np.zeros((pes, macs), np.int64)
        self.cycles = 0

    def start(self) -> None:
        """Begins a phase: clears the registers."""
        self.partial_sums[:] = 0
        self.cycles = 0

    def cycle(self, inputs: Int64, weights: npt.NDArray[Any], shift: int) -> None:
        """One cycle. ``inputs``: of the MACs that have work, ``[<= P, <= M]``; ``weights``: likewise, or one row for all PEs. A single bit times the
        weight is the AND gate, and a subtraction where the bit is -1."""
        rows, lanes = inputs.shape
        self.partial_sums[:rows, :lanes] += inputs * weights << shift
        self.cycles += 1

    def beat(self, features: Int64, widths: Int64, weights: npt.NDArray[Any], cycles: int, size: int = 1) -> None:
        """``features`` (``[<= P, <= M]``, codes of ``widths`` bits) times ``weights``, ``size`` bits in each of ``cycles`` cycles."""
        for cycle in range(cycles):
            low = cycle * size
            self.cycle(serial_input(features, widths, low, size), weights, low)

    def inner_products(self) -> Int64:
        """The outputs of the adder trees, ``[P]``."""
        return adder_tree(self.partial_sums)


def update(
    x: npt.ArrayLike,
    weight: npt.ArrayLike,
    bits: npt.ArrayLike,
    *,
    pes: int = 256,
    macs: int = 16,
    signed: bool = True,
    order: npt.ArrayLike | None = None,
) -> Run:
    """``x @ weight``. A phase is P consecutive rows of ``order`` times one column of the weight, which is broadcast to all PEs.

    Args:
        x: codes ``[N, F_in]``; those of row i have ``bits[i]`` bits.
        weight: codes ``[F_in, F_out]``, 4 bits in A2Q, up to 8 here: they are parallel, so that cycles do not depend on them.
        bits: ``[N]``, or one width for all rows, 0 to 32. A row of 0 bits reads as 0; a phase of nothing else takes no cycles.
        pes, macs: P and M.
        signed: codes of x are two's complement.
        order: a permutation of the rows. By default they come as they are.

    Raises:
        ValueError: shapes that do not fit, codes that their width does not hold, no permutation, an empty array.
    """
    array = Array(pes, macs)
    x, weight, bits = _integers("x", x, 2), _integers("weight", weight, 2), _integers("bits", bits, None)
    if x.shape[1] != weight.shape[0]:
        raise ValueError(f"x {list(x.shape)} times weight {list(weight.shape)}: columns of x must be rows of weight")
    if bits.ndim and bits.shape != x.shape[:1]:
        raise ValueError(f"bits must be one integer, or one for each row of x {list(x.shape)}, got {list(bits.shape)}")
    widths = _widths("bits", np.broadcast_to(bits.reshape(-1, 1), (x.shape[0], 1)))
    _check_codes("x", x, widths, signed)
    _check_codes("weight", weight, np.array(8), True)
    groups = list(_groups(_permutation(order, x.shape[0]), pes))
    run = _empty_run(x.shape[0], weight.shape[1], len(groups))
    for group, rows in enumerate(groups):
        features, row_widths = x[rows], widths[rows]
        widest = int(row_widths.max())
        for column in range(weight.shape[1]):
            array.start()
            for first in range(0, x.shape[1], macs):
                lanes = slice(first, first + macs)
                array.beat(features[:, lanes], row_widths, weight[lanes, column], widest)
            run.out[rows, column] = array.inner_products()[: rows.size]
            run.phase_cycles[group, column] = array.cycles
    return run


def aggregate(
    indptr: npt.ArrayLike,
    indices: npt.ArrayLike,
    b: npt.ArrayLike,
    *,
    width: int = 4,
    pes: int = 256,
    macs: int = 16,
    serial: int = 4,
    signed: bool = True,
    order: npt.ArrayLike | None = None,
) -> Run:
    """``A @ b``, A the 0/1 matrix of a CSR. A phase is P consecutive rows of ``order`` that are not empty, times one column of b. In a beat a PE
    takes M entries of its row: the codes at their columns come in serially, and A's ones are the MACs' weights, so that there are only additions.

    Args:
        indptr, indices: ``[N + 1]`` and ``[E]``; an entry that is given twice counts twice.
        b: codes ``[N, C]``.
        width: bits of these codes, 0 to 32.
        pes, macs: P and M.
        serial: cycles of a beat. ``width`` of them: bit by bit; 1: plain additions of whole codes; in general ``ceil(width / serial)`` bits a cycle.
        signed: the codes are two's complement.
        order: a permutation of all rows; empty ones are dropped from it. By default they come as they are.

    Raises:
        ValueError: no CSR, shapes that do not fit, codes that their width does not hold, no permutation, an empty array, no cycles.
    """
    array = Array(pes, macs)
    _positive(serial=serial)
    b, widths = _integers("b", b, 2), _widths("width", _integers("width", width, 0))
    graph = Workload(np.asarray(indptr), np.asarray(indices), [Layer(1, 1, width)])  # checks the CSR
    if b.shape[0] != graph.num_nodes:
        raise ValueError(f"b must have a row for each of {graph.num_nodes} nodes of indptr, got {list(b.shape)}")
    _check_codes("b", b, widths, signed)
    rows_in_order = _permutation(order, graph.num_nodes)
    groups = list(_groups(rows_in_order[graph.degrees[rows_in_order] > 0], pes))
    run = _empty_run(graph.num_nodes, b.shape[1], len(groups))
    for group, rows in enumerate(groups):
        first, end = graph.indptr[rows, None].astype(np.int64), graph.indptr[rows + 1, None].astype(np.int64)
        beats = ceil_div(int((end - first).max()), macs)
        for column in range(b.shape[1]):
            array.start()
            for beat in range(beats):
                entries = first + np.arange(beat * macs, (beat + 1) * macs)
                sources = graph.indices[np.minimum(entries, end - 1)]
                array.beat(b[sources, column], widths, entries < end, serial, ceil_div(width, serial))
            run.out[rows, column] = array.inner_products()[: rows.size]
            run.phase_cycles[group, column] = array.cycles
    return run


def _groups(rows: Int64, pes: int) -> Iterator[Int64]:
    """The rows of each phase, at most ``pes``."""
    for first in range(0, rows.size, pes):
        yield rows[first : first + pes]


def _empty_run(nodes: int, columns: int, groups: int) -> Run:
    """Rows that no phase computes are 0: A has no entries there."""
    return Run(np.zeros((nodes, columns), np.int64), np.zeros((groups, columns), np.int64))


def _positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name} must be an integer from 1 on, got {value!r}")


def _integers(name: str, values: npt.ArrayLike, ndim: int | None) -> Int64:
    """As int64, of ``ndim`` dimensions; None: any number."""
    array = np.asarray(values)
    if not np.can_cast(array.dtype, np.int64):
        raise ValueError(f"{name} must be integers that int64 holds, got {array.dtype}; pass codes, not values")
    if ndim is not None and array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {list(array.shape)}")
    return array.astype(np.int64)


def _widths(name: str, widths: Int64) -> Int64:
    wrong = widths[(widths < 0) | (widths > MAX_BITS)]
    if wrong.size:
        raise ValueError(f"{name} must be 0 to {MAX_BITS}, got {wrong.flat[0]}")
    return widths


def _permutation(order: npt.ArrayLike | None, nodes: int) -> Int64:
    if order is None:
        return np.arange(nodes)
    rows = _integers("order", order, 1)
    if rows.size != nodes or not np.array_equal(np.sort(rows), np.arange(nodes)):
        raise ValueError(f"order must hold each row from 0 to {nodes - 1} once")
    return rows


def _check_codes(name: str, codes: Int64, widths: Int64, signed: bool) -> None:
    """``widths``: of every code, or of every row. 0 bits hold nothing but 0."""
    widths = np.broadcast_to(widths, codes.shape)
    low = np.where(widths > 0, -(1 << widths) // 2, 0) if signed else np.zeros_like(codes)
    high = low + (1 << widths) - 1
    wrong = np.argwhere((codes < low) | (codes > high))
    if wrong.size:
        at = tuple(wrong[0].tolist())
        raise ValueError(
            f"{name}{list(at)} is {codes[at]}, but {widths[at]} {'signed' if signed else 'unsigned'} bits hold {low[at]} to {high[at]}: "
            "clip the codes or widen them"
        )
