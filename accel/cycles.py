"""Cycles of the array (A2Q section A.7.5): closed forms over the phases, vectorised."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .config import Sync
from .workload import Layer

Integers = npt.NDArray[np.integer[Any]]


def ceil_div(a: int, b: int) -> int:
    """ceil(a / b) of integers."""
    return -(-a // b)


def width_order(bits: Integers) -> npt.NDArray[np.int64]:
    """The rows by width, descending; ties by index. ``bits``: uint8 ``[N]``."""
    return np.argsort(np.uint8(255) - bits, kind="stable")  # 8 bits are sorted by counting


def in_phases(work: Integers, pes: int, sync: Sync) -> int:
    """Cycles of rows that take ``work`` cycles each, in their order, on ``pes`` PEs.

    "lockstep": the sum over phases of ``pes`` consecutive rows of the longest; "async": row r runs on PE r mod ``pes``, and the PE that has most to
    do decides. "ideal" is no matter of rows: :func:`ideal`.
    """
    if not work.size:
        return 0
    pes = min(pes, work.size)
    if sync == "lockstep":
        return int(np.maximum.reduceat(work, np.arange(0, work.size, pes)).sum(dtype=np.int64))
    padded = np.zeros(ceil_div(work.size, pes) * pes, np.int64)
    padded[: work.size] = work
    return int(padded.reshape(-1, pes).sum(0).max())


def ideal(useful: int, pes: int, macs: int) -> int:
    """Cycles where no MAC is ever idle; ``useful``: cycles of a MAC."""
    return ceil_div(useful, pes * macs)


def update(layer: Layer, bits: Integers, order: Integers | None, pes: int, macs: int, sync: Sync = "lockstep") -> int:
    """U1: ``F_out ceil(F_in / M)`` times the sum over phases of the widest row, ``bits`` ``[N]``."""
    if sync == "ideal":
        return ideal(update_work(layer, bits), pes, macs)
    rows = in_phases(bits if order is None else bits[order], pes, sync)
    return layer.f_out * ceil_div(layer.f_in, macs) * rows


def update_work(layer: Layer, bits: Integers) -> int:
    """Cycles in which the MACs of the update do something: ``sum(b) F_in F_out``."""
    return int(bits.sum(dtype=np.int64)) * layer.f_in * layer.f_out


def attention(layer: Layer, nodes: int, pes: int, macs: int, serial: int) -> int:
    """Cycles of the two products of every head with its attention vectors; 0 without attention."""
    if layer.kind != "gat":
        return 0
    return ceil_div(nodes, pes) * 2 * layer.heads * ceil_div(layer.f_out // layer.heads, macs) * serial


def aggregation(layer: Layer, degrees: Integers, pes: int, macs: int, serial: int, sync: Sync = "lockstep") -> int:
    """A1: ``C s`` times the sum over phases of the longest row, in groups of ``macs`` entries.

    Args:
        degrees: of the rows that are not empty, in their order.
    """
    if sync == "ideal":
        return ideal(aggregation_work(layer, int(degrees.sum(dtype=np.int64)), serial), pes, macs)
    return layer.columns * serial * in_phases(-(-degrees // macs), pes, sync)


def aggregation_work(layer: Layer, edges: int, serial: int) -> int:
    """Cycles in which the MACs of the aggregation do something: ``E C s``."""
    return edges * layer.columns * serial


def update_phases(layer: Layer, nodes: int, pes: int) -> int:
    """Phases of the update: ``pes`` rows times one column of W."""
    return layer.f_out * ceil_div(nodes, pes)


def aggregation_phases(layer: Layer, rows: int, pes: int) -> int:
    """Phases of the aggregation of ``rows`` rows that are not empty: ``pes`` of them times one column."""
    return layer.columns * ceil_div(rows, pes)


def utilisation(work: int, cycles: int, pes: int, macs: int) -> float:
    """Part of the MAC cycles that do something; 0 where there are no cycles."""
    return work / (cycles * pes * macs) if cycles else 0.0
