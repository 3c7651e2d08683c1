"""Rows on the wire: float32, or codes of 8 or 4 bits with a step for each row, rounded stochastically, or with steps that the receiver knows."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..kernels.fixed_point import fixed_point_pack, fixed_point_unpack
from ..kernels.packing import code_range, tight_bytes
from ..kernels.random import NEAREST

Width = Literal["fp32", "int8", "int4"]
WIDTHS: tuple[str, ...] = get_args(Width)


def bits_of(width: Width) -> int:
    """Bits of an element."""
    return {"fp32": 32, "int8": 8, "int4": 4}[width]


@dataclass
class Traffic:
    """Bytes that a process has sent: codes (or floats) and their steps, of rows on the way forward and of gradients on the way back. What gloo or
    NCCL and TCP add is not part of it; the all-reduced gradients of weights are, as ``reduced``: the bytes of the vector, once a step."""

    forward_codes: int = 0
    forward_steps: int = 0
    backward_codes: int = 0
    backward_steps: int = 0
    reduced: int = 0

    def count(self, way: Literal["forward", "backward"], codes: int, steps: int) -> None:
        """Adds a message."""
        if way == "forward":
            self.forward_codes, self.forward_steps = self.forward_codes + codes, self.forward_steps + steps
        else:
            self.backward_codes, self.backward_steps = self.backward_codes + codes, self.backward_steps + steps

    def vector(self) -> Tensor:
        """The counts, int64."""
        return torch.tensor(list(asdict(self).values()))


def message_bytes(rows: int, features: int, width: Width, known: bool = False) -> tuple[int, int]:
    """Bytes of codes and of steps of a message of ``rows`` rows; ``known``: the receiver knows the steps."""
    if width == "fp32":
        return 4 * rows * features, 0
    return tight_bytes(rows * features, bits_of(width)), 0 if known else 4 * rows


def encode(rows: Tensor, width: Width, step: Tensor | None, seed: int) -> Tensor:
    """The bytes of ``rows`` ``[R, F]`` float32: uint8, steps first.

    Args:
        step: ``[F]``, steps whose whole multiples the rows are: their codes travel as they are. None: each row gets the step that takes its largest
            magnitude to the largest code, and ``seed`` rounds (:mod:`qgnn.kernels.random`); half to even with ``NEAREST``.
    """
    if width == "fp32" or not rows.numel():
        return rows.contiguous().reshape(-1).view(torch.uint8)
    bits = bits_of(width)
    one, zero = rows.new_ones(1), rows.new_zeros(1)
    if step is not None:
        return fixed_point_pack((rows / step).view(1, -1), one, zero, bits, True, NEAREST).view(-1)
    top = rows.abs().amax(1)
    # A row of zeros, or of less than a normal number, is sent as zeros; NaN and infinity stay in the step, and reach every value.
    steps = torch.where(top < torch.finfo(torch.float32).tiny * 256, 1.0, top / code_range(bits, True)[1])
    codes = fixed_point_pack((rows / steps.unsqueeze(1)).view(1, -1), one, zero, bits, True, seed)
    return torch.cat([steps.view(torch.uint8), codes.view(-1)])


def decode(data: Tensor, rows: int, features: int, width: Width, step: Tensor | None) -> Tensor:
    """What :func:`encode` was given, as the codes have it; float32 ``[rows, features]``."""
    if width == "fp32" or not rows * features:
        return data.clone().view(torch.float32).view(rows, features)
    one, zero = torch.ones(1, device=data.device), torch.zeros(1, device=data.device)
    start = 0 if step is not None else 4 * rows
    codes = fixed_point_unpack(data[start:].view(1, -1), one, zero, bits_of(width), True, rows * features)
    steps = data[:start].clone().view(torch.float32).unsqueeze(1) if step is None else step
    return codes.view(rows, features) * steps
