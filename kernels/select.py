"""Rows of a packed matrix by their index: as values, or as codes for the integer kernels. What a feature store answers a mini-batch with.

Symbols: ``data``, ``pos``, ``counts`` hold the packed rows of ``[N, F]`` (:mod:`.packing`); ``index`` is int64 ``[R]``, each in 0..N-1, repeats
allowed; ``step`` is float32 ``[N]``, the step of each row.

- rows: ``value[r, k] = step[index[r]] * code[index[r], k]``, unpacked and multiplied in one pass.
- codes: the bytes of row ``index[r]``, copied to the place of row ``r`` in a packed matrix of ``R`` rows.

``data``, ``step`` and ``pos`` lie where ``index`` does, or in pinned memory of the host, which a GPU reads itself. Shapes and devices are checked
by :mod:`qgnn.ops`, which states the errors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .backend import implementation, operation
from .packing import CONTAINERS, bucket_starts, row_bytes, uniform_counts, unpack_reference


def _pieces(data: Tensor, pos: Tensor | None, counts: Sequence[int], index: Tensor, features: int) -> list[Tensor]:
    """The bytes of the wanted rows of every bucket, and which of ``index`` they are: alternately ``[n, row_bytes]`` and ``[n]``."""
    place = index if pos is None else pos[index].long()
    pieces, first = [], 0
    for container, count, start in zip(CONTAINERS, counts, bucket_starts(counts, features), strict=False):
        stride = row_bytes(container, features)
        wanted = ((place >= first) & (place < first + count)).nonzero().view(-1)
        rows = data[start : start + count * stride].view(count, stride)
        pieces += [rows[place[wanted] - first], wanted]
        first += count
    return pieces


def select_rows_reference(
    data: Tensor,
    step: Tensor,
    pos: Tensor | None,
    counts: Sequence[int],
    index: Tensor,
    features: int,
    signed: bool,
) -> Tensor:
    codes = torch.zeros(index.numel(), features, dtype=torch.int32, device=index.device)
    pieces = _pieces(data, pos, counts, index, features)
    for container, rows, wanted in zip(CONTAINERS, pieces[::2], pieces[1::2], strict=True):
        layout = uniform_counts(wanted.numel(), container)
        codes[wanted] = unpack_reference(rows.reshape(-1), None, layout, features, signed)
    return step[index].unsqueeze(1) * codes


@operation("qgnn::select_rows")
def select_rows(
    data: Tensor,
    step: Tensor,
    pos: Tensor | None,
    counts: Sequence[int],
    index: Tensor,
    features: int,
    signed: bool,
) -> Tensor:
    """The values of the rows ``index``, float32 ``[R, F]``."""
    return implementation("select", "select_rows", select_rows_reference, index)(
        data, step, pos, counts, index, features, signed
    )


@select_rows.register_fake
def _(
    data: Tensor,
    step: Tensor,
    pos: Tensor | None,
    counts: Sequence[int],
    index: Tensor,
    features: int,
    signed: bool,
) -> Tensor:
    return index.new_empty((index.numel(), features), dtype=torch.float32)


def select_codes_reference(
    data: Tensor,
    pos: Tensor | None,
    counts: Sequence[int],
    index: Tensor,
    features: int,
    out_pos: Tensor | None,
    out_counts: Sequence[int],
) -> Tensor:
    starts, first = bucket_starts(out_counts, features), 0
    out = torch.zeros(starts[-1], dtype=torch.uint8, device=index.device)
    pieces = _pieces(data, pos, counts, index, features)
    for container, count, start, rows, wanted in zip(
        CONTAINERS, out_counts, starts, pieces[::2], pieces[1::2], strict=False
    ):
        stride = row_bytes(container, features)
        place = wanted if out_pos is None else out_pos[wanted].long()
        out[start : start + count * stride].view(count, stride)[place - first] = rows
        first += count
    return out


@operation("qgnn::select_codes")
def select_codes(
    data: Tensor,
    pos: Tensor | None,
    counts: Sequence[int],
    index: Tensor,
    features: int,
    out_pos: Tensor | None,
    out_counts: Sequence[int],
) -> Tensor:
    """The packed rows ``index``, uint8, as a matrix whose layout is ``out_pos`` and ``out_counts``, those of the same widths."""
    return implementation("select", "select_codes", select_codes_reference, index)(
        data, pos, counts, index, features, out_pos, out_counts
    )


@select_codes.register_fake
def _(
    data: Tensor,
    pos: Tensor | None,
    counts: Sequence[int],
    index: Tensor,
    features: int,
    out_pos: Tensor | None,
    out_counts: Sequence[int],
) -> Tensor:
    return index.new_empty(bucket_starts(out_counts, features)[-1], dtype=torch.uint8)
