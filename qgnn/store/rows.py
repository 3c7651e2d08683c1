"""Quantization of a matrix that is never held in float32: the layout first, then the rows, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.packing import (
    CONTAINERS,
    bucket_rows,
    bucket_starts,
    container_of,
    containers_of,
    row_bytes,
    uniform_counts,
)
from ..kernels.quantize import largest_code, quantize
from ..qtensor import QTensor
from .sources import Source

Widths = int | Tensor
"""Bits of every row: one number, or uint8 ``[N]``."""

Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]

Write = Callable[[str, int, Tensor], None]
"""Takes the name of a tensor of :meth:`Layout.shapes`, the place of a byte in it, and what is written from there on."""


@dataclass(frozen=True, eq=False)
class Layout:
    """What is known of a packed matrix before its values are.

    Attributes:
        rows, features, signed: as :class:`qgnn.QTensor` has them.
        bits: width of all rows, or uint8 ``[rows]``.
        counts, pos: rows in each container, and their places (:mod:`qgnn.kernels.packing`).
    """

    rows: int
    features: int
    signed: bool
    bits: Widths
    counts: tuple[int, ...]
    pos: Tensor | None

    @classmethod
    def of(cls, rows: int, features: int, signed: bool, bits: Widths) -> Layout:
        """The layout of rows of these widths."""
        if isinstance(bits, int):
            counts, pos = uniform_counts(rows, container_of(bits, signed)), None
        else:
            counts, pos = bucket_rows(containers_of(bits, signed))
        return cls(rows, features, signed, bits, tuple(counts), pos)

    def shapes(self) -> Shapes:
        """The tensors that hold the matrix: codes and steps; for rows of several widths, these; of several containers, the places."""
        shapes: Shapes = {
            "codes": (torch.uint8, (bucket_starts(self.counts, self.features)[-1],)),
            "step": (torch.float32, (self.rows,)),
        }
        if isinstance(self.bits, Tensor):
            shapes["bits"] = (torch.uint8, (self.rows,))
        if self.pos is not None:
            shapes["pos"] = (torch.int32, (self.rows,))
        return shapes

    def matrix(self, tensors: dict[str, Tensor]) -> QTensor:
        """The matrix that these tensors hold."""
        bits = tensors["bits"] if "bits" in tensors else torch.tensor([self.bits], dtype=torch.uint8).expand(self.rows)
        return QTensor(
            tensors["codes"], tensors["step"], bits, "row", self.signed, self.features, self.counts, tensors.get("pos")
        )


def layout_of(source: Source, bits: Widths, signed: bool | None) -> Layout:
    """The layout of a source. Without ``signed``, its values say whether codes have a sign: a pass over them, up to the first negative one.

    Raises:
        ValueError: a width that no code has, or widths that are not one for each row.
    """
    if signed is None:
        signed = any(bool((block < 0).any()) for block in source.blocks())
    least = 2 if signed else 1
    if isinstance(bits, Tensor):
        if bits.shape != (source.rows,) or bits.is_floating_point():
            raise ValueError(
                f"bits must be a number, or integers, one for each of the {source.rows} rows of {source.name}, got {bits.dtype} {list(bits.shape)}"
            )
        bad = ((bits < least) | (bits > 8)).nonzero()
        if bad.numel():
            raise ValueError(
                f"row {int(bad[0])} of {source.name} is to have {int(bits[bad[0]])} bits; {_choice(signed)}"
            )
        bits = bits.to("cpu", torch.uint8).clone()
    elif not least <= bits <= 8:
        raise ValueError(f"{source.name} is to have {bits} bits; {_choice(signed)}")
    return Layout.of(source.rows, source.features, signed, bits)


def _choice(signed: bool) -> str:
    return "values with a sign have 2 to 8, as a sign and no magnitude is nothing" if signed else "a code has 1 to 8"


def quantize_rows(source: Source, layout: Layout, write: Write) -> None:
    """Quantizes ``source`` a block at a time, each row with the step ``max |x| / Q`` (NUMERICS 1), and writes what :meth:`Layout.shapes` lists.

    Raises:
        ValueError: a value that is NaN or infinite, or negative without a sign; its row is named.
    """
    for name, tensor in (("bits", layout.bits), ("pos", layout.pos)):
        if isinstance(tensor, Tensor):
            write(name, 0, tensor)
    starts, filled, first = bucket_starts(layout.counts, layout.features), [0] * len(CONTAINERS), 0
    for x in source.blocks():
        n = x.size(0)
        if first + n > layout.rows or x.size(1) != layout.features:
            raise ValueError(f"{source.name} has changed while it was read; build the store again")
        bits = layout.bits
        widths = bits[first : first + n] if isinstance(bits, Tensor) else torch.full((n,), bits, dtype=torch.uint8)
        part = Layout.of(n, layout.features, layout.signed, widths)
        step = _steps(x, widths, layout.signed, f"row {{}} of {source.name}", first)
        data, *_ = quantize(x, step, widths, True, layout.signed, part.pos, list(part.counts), False)
        write("step", 4 * first, step)
        for bucket, (begin, codes) in enumerate(_buckets(data, part)):
            write("codes", starts[bucket] + begin * filled[bucket], codes)
            filled[bucket] += part.counts[bucket]
        first += n
    if first != layout.rows:
        raise ValueError(f"{source.name} has changed while it was read; build the store again")


def _buckets(data: Tensor, part: Layout) -> Iterator[tuple[int, Tensor]]:
    """Bytes of a row, and all rows, of each container. The rows of a block follow those of the block before, bucket by bucket."""
    starts = bucket_starts(part.counts, part.features)
    for container, count, start in zip(CONTAINERS, part.counts, starts, strict=False):
        stride = row_bytes(container, part.features)
        yield stride, data[start : start + count * stride]


def _steps(x: Tensor, widths: Tensor, signed: bool, row: str, first: int) -> Tensor:
    """``max |x| / Q``, float32 ``[n]``; of a row of zeros the least step there is. ``row`` names a row in a message."""
    low, high = torch.aminmax(x, dim=1)
    largest = torch.maximum(high, -low)
    bad = (~torch.isfinite(largest)).nonzero()
    if bad.numel():
        i = int(bad[0])
        value = float(x[i][~torch.isfinite(x[i])][0])
        raise ValueError(f"{row.format(first + i)} holds {value}; quantization needs finite values")
    if not signed and bool((low < 0).any()):
        i = int((low < 0).nonzero()[0])
        raise ValueError(f"{row.format(first + i)} holds {float(low[i])}; pass signed=True, or leave signed out")
    return (largest / largest_code(widths, signed)).clamp_min(torch.finfo(torch.float32).tiny)
