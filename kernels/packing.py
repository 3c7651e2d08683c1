"""The one statement of the bit layouts: how integer codes lie in bytes.

A *container* is the number of bits that one code occupies in storage: 0, 1, 2, 4 or 8. A code of width ``b`` goes into the smallest container
that holds it (3 bits -> 4, 5 to 7 bits -> 8). Codes are two's complement when signed and plain binary when unsigned. A signed code of 1 bit is
always 0 (NUMERICS 1), so it needs no storage and its container is 0.

Within a row, code ``k`` of a ``c``-bit container starts at bit ``k * c``; bit 0 is the lowest bit of byte 0 (little endian). Rows start on byte
boundaries. A row of 16 bytes or more is padded to a multiple of 16, so that every row starts on a 16-byte boundary and is read by 128-bit
loads; a shorter row is not padded.

Rows of different widths share one buffer. They are grouped into buckets by container, in the order 8, 4, 2, 1, 0; within a bucket the rows keep
their order. Each bucket starts on a 16-byte boundary. So the address of a row follows from its place ``pos`` in bucket order and from five
numbers, the rows in each bucket; nothing is stored per element or per edge.

Worked example: 4 rows of 6 unsigned codes, widths 2, 0, 3, 2.

======  =====  ===================  =========  ===  =======================
row     width  codes                container  pos  bytes (offset: hex)
======  =====  ===================  =========  ===  =======================
0       2      1 2 3 0 1 2          2          1    16: 39 09
1       0      (reads as 0)         0          3    none
2       3      7 0 1 2 3 4          4          0    0: 07 21 43
3       2      3 3 3 3 0 1          2          2    18: FF 04
======  =====  ===================  =========  ===  =======================

``counts = (0, 1, 2, 0, 1)``. Row 0: codes 1, 2, 3, 0 make the byte ``1 | 2 << 2 | 3 << 4 | 0 << 6 = 0x39``; codes 1, 2 make ``0x09``. The
buffer has 32 bytes: 3 in the bucket of 4-bit containers, padded to 16, and 2 * 2 in that of 2-bit containers, padded to 16.

What is only kept, and not computed with, lies *tight*, at its own width ``k`` of 1 to 8 bits: uint8 ``[N, ceil(F / 8) * k]``. Eight neighbouring
codes of a row, plain binary, make a group of ``k`` bytes, a little-endian number whose bits ``j k`` to ``(j + 1) k`` are code ``j``; behind the
last code of a row, its group is filled up with zeros. Rows are not padded further.

Worked example, 3 bits: the codes 7 0 1 2 3 4 5 6 make ``7 + 1 * 2^6 + 2 * 2^9 + 3 * 2^12 + 4 * 2^15 + 5 * 2^18 + 6 * 2^21 = 0xD63447``, the bytes
47 34 D6; a ninth code 5 makes a second group, 05 00 00.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CONTAINERS = (8, 4, 2, 1, 0)
"""Containers in the order of their buckets."""

ALIGN = 16
"""Bytes of the widest load of a GPU thread; buckets, and rows at least this long, start at multiples of it."""


def row_bytes(container: int, features: int) -> int:
    """Bytes between the starts of two rows of ``features`` codes in one bucket."""
    size = (container * features + 7) // 8
    return size if size < ALIGN else -(-size // ALIGN) * ALIGN


def bucket_starts(counts: Sequence[int], features: int) -> list[int]:
    """Byte offsets of the five buckets, then the size of the whole buffer: six numbers."""
    starts = [0]
    for container, count in zip(CONTAINERS, counts, strict=True):
        size = count * row_bytes(container, features)
        starts.append(starts[-1] + -(-size // ALIGN) * ALIGN)
    return starts


def empty_output(x: Tensor, output: str, rows: int, columns: int, counts: Sequence[int]) -> Tensor:
    """Uninitialised memory for the result of an integer operation (:mod:`.matmul`), on the device of ``x``: int32 sums for ``"acc"``, float32 for
    ``"float"``, a packed buffer for ``"rows"`` and ``"columns"``."""
    if output in ("rows", "columns"):
        return x.new_empty(bucket_starts(counts, columns)[-1], dtype=torch.uint8)
    return x.new_empty((rows, columns), dtype=torch.int32 if output == "acc" else torch.float32)


def container_of(width: int, signed: bool) -> int:
    """Container of one code of ``width`` bits (0 to 8)."""
    if not 0 <= width <= 8:
        raise ValueError(f"a code has 0 to 8 bits, got {width}")
    if width <= (1 if signed else 0):
        return 0
    return next(c for c in (1, 2, 4, 8) if c >= width)


def code_range(bits: int, signed: bool) -> tuple[int, int]:
    """The least and the largest code of ``bits`` bits."""
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)


def containers_of(widths: Tensor, signed: bool) -> Tensor:
    """Container of every width; uint8, the shape of ``widths``."""
    table = torch.tensor([container_of(b, signed) for b in range(9)], dtype=torch.uint8, device=widths.device)
    return table[widths.long()]


def uniform_counts(rows: int, container: int) -> list[int]:
    """``counts`` of a buffer whose rows all have one container."""
    return [rows if c == container else 0 for c in CONTAINERS]


def bucket_rows(containers: Tensor) -> tuple[list[int], Tensor | None]:
    """Groups rows by container.

    Returns ``counts`` (rows in each bucket) and ``pos`` (int32 ``[N]``, the place of each row in bucket order), or ``None`` for ``pos`` when
    all rows have one container, where a row's place is its index.
    """
    order = torch.tensor([CONTAINERS.index(c) if c in CONTAINERS else 0 for c in range(9)], device=containers.device)
    bucket = order[containers.long()]
    counts = torch.bincount(bucket, minlength=len(CONTAINERS)).tolist()
    if max(counts, default=0) == containers.numel():
        return counts, None
    pos = torch.empty_like(bucket, dtype=torch.int32)
    pos[torch.argsort(bucket, stable=True)] = torch.arange(
        containers.numel(), dtype=torch.int32, device=containers.device
    )
    return counts, pos


def rows_of(pos: Tensor) -> Tensor:
    """The inverse of ``pos``: the row that stands at each place of the bucket order; int32 ``[N]``."""
    rows = torch.empty_like(pos)
    rows[pos.long()] = torch.arange(pos.numel(), dtype=pos.dtype, device=pos.device)
    return rows


def pack_reference(codes: Tensor, pos: Tensor | None, counts: Sequence[int]) -> Tensor:
    """Packs integer codes ``[N, F]`` into a uint8 buffer. Bits above the container are dropped (two's complement)."""
    features = codes.size(1)
    starts = bucket_starts(counts, features)
    data = torch.zeros(starts[-1], dtype=torch.uint8, device=codes.device)
    ordered = codes if pos is None else codes[rows_of(pos).long()]
    first = 0
    for container, count, start in zip(CONTAINERS, counts, starts, strict=False):
        if container and count and features:
            stride, lanes = row_bytes(container, features), 8 // container
            wide = torch.zeros(count, stride * lanes, dtype=torch.int32, device=codes.device)
            wide[:, :features] = ordered[first : first + count].to(torch.int32) & ((1 << container) - 1)
            shifts = torch.arange(lanes, dtype=torch.int32, device=codes.device) * container
            packed = (wide.view(count, stride, lanes) << shifts).sum(-1)
            data[start : start + count * stride] = packed.to(torch.uint8).view(-1)
        first += count
    return data


def unpack_reference(data: Tensor, pos: Tensor | None, counts: Sequence[int], features: int, signed: bool) -> Tensor:
    """The inverse of :func:`pack_reference`: int32 codes ``[N, F]``; rows without storage are 0."""
    n = sum(counts)
    ordered = torch.zeros(n, features, dtype=torch.int32, device=data.device)
    first = 0
    for container, count, start in zip(CONTAINERS, counts, bucket_starts(counts, features), strict=False):
        if container and count and features:
            stride, lanes = row_bytes(container, features), 8 // container
            raw = data[start : start + count * stride].view(count, stride, 1).to(torch.int32)
            shifts = torch.arange(lanes, dtype=torch.int32, device=data.device) * container
            codes = ((raw >> shifts) & ((1 << container) - 1)).view(count, stride * lanes)[:, :features]
            if signed:
                half = 1 << (container - 1)
                codes = (codes ^ half) - half
            ordered[first : first + count] = codes
        first += count
    return ordered if pos is None else ordered[pos.long()]


def pack_bits_reference(flags: Tensor) -> Tensor:
    """Packs booleans ``[N, F]`` into uint8 ``[N, ceil(F / 8)]``; flag ``k`` is bit ``k % 8`` of byte ``k // 8``."""
    n, features = flags.shape
    padded = torch.zeros(n, -(-features // 8) * 8, dtype=torch.uint8, device=flags.device)
    padded[:, :features] = flags
    shifts = torch.arange(8, dtype=torch.uint8, device=flags.device)
    return (padded.view(n, -(-features // 8), 8) << shifts).sum(-1, dtype=torch.uint8)


def unpack_bits_reference(bits: Tensor, features: int) -> Tensor:
    """The inverse of :func:`pack_bits_reference`: bool ``[N, F]``."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits.unsqueeze(-1) >> shifts) & 1).flatten(1)[:, :features].bool()


def tight_bytes(features: int, bits: int) -> int:
    """Bytes of a row of ``features`` codes in the tight layout."""
    return (features + 7) // 8 * bits


def pack_tight_reference(codes: Tensor, bits: int) -> Tensor:
    """Packs codes (uint8 ``[N, F]``, below ``2^bits``) into the tight layout: uint8 ``[N, tight_bytes]``."""
    n, features = codes.shape
    groups = (features + 7) // 8
    lanes = torch.arange(8, device=codes.device)
    padded = torch.zeros(n, groups * 8, dtype=torch.int64, device=codes.device)
    padded[:, :features] = codes
    words = (padded.view(n, groups, 8) << lanes * bits).sum(-1)
    return (words.unsqueeze(-1) >> 8 * lanes[:bits]).to(torch.uint8).view(n, groups * bits)


def unpack_tight_reference(data: Tensor, bits: int, features: int) -> Tensor:
    """The inverse of :func:`pack_tight_reference`: uint8 ``[N, features]``."""
    n, groups = data.size(0), (features + 7) // 8
    lanes = torch.arange(8, device=data.device)
    words = (data.view(n, groups, bits).long() << 8 * lanes[:bits]).sum(-1)
    codes = (words.unsqueeze(-1) >> lanes * bits) & ((1 << bits) - 1)
    return codes.view(n, groups * 8)[:, :features].to(torch.uint8)
