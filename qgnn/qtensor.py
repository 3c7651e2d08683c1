"""QTensor: packed integer codes with their steps and widths."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from .kernels.packing import (
    bucket_rows,
    container_of,
    containers_of,
    pack_reference,
    rows_of,
    uniform_counts,
    unpack_reference,
)
from .kernels.quantize import dequantize, quantize

Axis = Literal["row", "col"]


def _check_matrix(name: str, x: object) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}; convert it with .float()")
    if x.dim() != 2:
        raise ValueError(f"{name} must be 2-D [nodes, features], got shape {tuple(x.shape)}")
    return x


def check_parameters(x: Tensor, step: Tensor | float, bits: Tensor | float, axis: str) -> tuple[Tensor, Tensor]:
    """Step (float32) and width (uint8, ``[b] = clamp(round_half_even(b), 0, 8)``) as vectors along ``axis`` of ``x``.

    Raises:
        ValueError, TypeError: ``x``, ``step`` or ``bits`` has a shape, dtype or device that does not fit; the sentence says what does.
    """
    _check_matrix("x", x)
    if axis not in ("row", "col"):
        raise ValueError(f'axis must be "row" (a step per node) or "col" (a step per column), got {axis!r}')
    length = x.size(0) if axis == "row" else x.size(1)
    vectors = []
    for name, value in (("step", step), ("bits", bits)):
        v = value if isinstance(value, Tensor) else torch.tensor(float(value), device=x.device)
        if v.device != x.device:
            raise ValueError(f"{name} is on {v.device} and x on {x.device}; move one")
        if v.numel() == 1:
            v = v.reshape(1).expand(length)
        if v.shape != (length,):
            raise ValueError(
                f'{name} must be a number or have shape [{length}] for axis="{axis}" of x {tuple(x.shape)}, got {tuple(v.shape)}'
            )
        vectors.append(v)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return vectors[0].to(dtype), rounded_bits(vectors[1])


def rounded_bits(bits: Tensor) -> Tensor:
    """``[b]`` of NUMERICS: rounded half to even and clamped to 0..8; uint8."""
    return torch.round(bits.detach().float()).clamp(0, 8).to(torch.uint8)


def check_finite(x: Tensor) -> None:
    """Raises ValueError for the first NaN or infinity in ``x``, which show in its extremes: one pass, no mask. Waits for the device."""
    if x.numel() and not all(map(math.isfinite, torch.stack(torch.aminmax(x.detach())).tolist())):
        place = tuple((~torch.isfinite(x)).nonzero()[0].tolist())
        raise ValueError(f"x{list(place)} is {float(x[place])}; quantization needs finite values")


def check_values(x: Tensor, step: Tensor) -> None:
    """:func:`check_finite`, and raises ValueError for the first step that is not positive and finite."""
    check_finite(x)
    bad = ~(torch.isfinite(step) & (step > 0))
    if bool(bad.any()):
        i = int(bad.nonzero()[0, 0])
        raise ValueError(f"step[{i}] is {float(step[i])}; steps must be positive and finite")


@dataclass(frozen=True, eq=False)
class QTensor:
    """A matrix ``[N, F]`` of integer codes, packed (:mod:`qgnn.kernels.packing`), with value ``step * (code - zero)``.

    Attributes:
        data: uint8, the packed codes.
        step: float32 ``[N]`` (axis "row") or ``[F]`` (axis "col").
        bits: uint8, the width of every row or column, shaped like ``step``.
        axis, signed: which axis the steps run along; whether the codes have a sign.
        features: ``F``.
        counts: rows in each container (8, 4, 2, 1, 0 bits).
        pos: int32 ``[N]``, the place of each row in container order, or None when all rows have one container.
        zero: zero point of an affine quantizer, 0 for a symmetric one.
    """

    data: Tensor
    step: Tensor
    bits: Tensor
    axis: Axis
    signed: bool
    features: int
    counts: tuple[int, ...]
    pos: Tensor | None = None
    zero: int = 0

    @classmethod
    def quantize(
        cls, x: Tensor, step: Tensor | float, bits: Tensor | float, axis: Axis = "row", signed: bool = True
    ) -> QTensor:
        """Quantizes ``x`` ``[N, F]`` (A2Q eq. 1; NUMERICS 1).

        Args:
            x: float16, bfloat16 or float32.
            step: step sizes, ``[N]`` for axis "row", ``[F]`` for axis "col", or one number.
            bits: widths in 0..8 (real ones are rounded), shaped like ``step``.
            axis: "row" (features: a step per node) or "col" (weights and aggregation operands: a step per column).
            signed: False for values known to be non-negative, which then need no sign bit.

        Raises:
            TypeError, ValueError: wrong shapes, dtypes or devices; NaN or infinity in ``x``; a step that is not positive (the first is named);
                a negative value in ``x`` with ``signed=False``.
        """
        x = x.float() if isinstance(x, Tensor) and x.dtype == torch.float64 else x
        steps, widths = check_parameters(x, step, bits, axis)
        check_values(x, steps)
        if not bool(torch.isfinite(torch.as_tensor(bits)).all()):
            raise ValueError("bits has values that are not finite; widths are 0 to 8")
        if not signed and bool((x < 0).any()):
            place = (x < 0).nonzero()[0].tolist()
            raise ValueError(f"x{place} is negative; pass signed=True")
        counts, pos = storage_of(widths, axis, signed, x.size(0))
        data, *_ = quantize(x, steps, widths, axis == "row", signed, pos, counts, False)
        # A copy: the tensor must not change when the caller's steps do.
        return cls(data, steps.detach().clone(), widths, axis, signed, x.size(1), tuple(counts), pos)

    @cached_property
    def shape(self) -> torch.Size:
        return torch.Size((sum(self.counts), self.features))

    @property
    def device(self) -> torch.device:
        return self.data.device

    @cached_property
    def rows(self) -> Tensor | None:
        """Inverse of ``pos``: the row at each place of the container order."""
        return None if self.pos is None else rows_of(self.pos)

    @cached_property
    def columns(self) -> tuple[Tensor, int]:
        """The columns as packed rows ``[F, N]``, so that a product reads the contracted dimension in one piece, and their container (4 or 8)."""
        widest = int(self.bits.max()) if self.bits.numel() else 0
        container = 4 if widest <= 4 else 8
        return pack_reference(self.codes().t(), None, uniform_counts(self.features, container)), container

    @cached_property
    def container(self) -> int:
        """The one container of all rows.

        Raises:
            ValueError: the rows have several.
        """
        if self.pos is not None:
            raise ValueError(
                "this QTensor has rows of several containers; the operation needs one (quantize with one width for all)"
            )
        used = [c for c, count in zip((8, 4, 2, 1, 0), self.counts, strict=True) if count]
        return used[0] if used else 8

    def codes(self) -> Tensor:
        """The integer codes, int32 ``[N, F]``."""
        return unpack_reference(self.data, self.pos, self.counts, self.features, self.signed)

    def dequantize(self) -> Tensor:
        """``step * (code - zero)``, float32 ``[N, F]``."""
        return dequantize(
            self.data, self.step, self.axis == "row", self.signed, self.zero, self.pos, list(self.counts), self.features
        )

    @property
    def code_nbytes(self) -> int:
        """Bytes allocated for the packed codes alone."""
        return _allocated(self.data)

    @property
    def nbytes(self) -> int:
        """Bytes really allocated: codes, steps, widths and places."""
        return sum(_allocated(t) for t in (self.data, self.step, self.bits, self.pos) if t is not None)

    def to(self, device: torch.device | str) -> QTensor:
        """The same tensor on another device."""
        pos = None if self.pos is None else self.pos.to(device)
        return replace(self, data=self.data.to(device), step=self.step.to(device), bits=self.bits.to(device), pos=pos)

    def __repr__(self) -> str:
        widths = sorted(set(self.bits.tolist()))
        return f"QTensor(shape={tuple(self.shape)}, bits={widths}, axis={self.axis!r}, signed={self.signed}, nbytes={self.nbytes})"


def _allocated(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def storage_of(bits: Tensor, axis: str, signed: bool, rows: int) -> tuple[list[int], Tensor | None]:
    """``counts`` and ``pos`` of the packed rows: by row for axis "row"; one container, that of the widest column, for axis "col"."""
    if axis == "row":
        return bucket_rows(containers_of(bits, signed))
    widest = int(bits.max()) if bits.numel() else 0
    return uniform_counts(rows, container_of(widest, signed)), None
