"""Triton gather-aggregate over CSR in float32, and its gradients (contract: :mod:`..aggregate`; one launch: :mod:`.segments`)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aggregate_packed import aggregate_packed
from .common import LAYOUT_FIRSTS, LAYOUT_SIGNATURE, CompileCase, _extended, _places, _row_address, layout_arguments
from .segments import _last_to_arrive, _load_slot, _narrow_rows, _segment, _store_slot, _sum_of_slots, workspace

__all__ = ["aggregate", "aggregate_arg_backward", "aggregate_packed", "aggregate_rows", "edge_dot"]

LOWEST = tl.constexpr(-(2**31))
"""Below the key of every float: no edge yet."""


@triton.jit
def _mixed_rows(
    p_x, p_pos, p_step, b_source, m_edge, o_f, m_f, first_4, first_2, first_1, first_0, start_4, start_2, start_1,
    stride_8, stride_4, stride_2, stride_1, SIGNED: tl.constexpr, CONTAINER: tl.constexpr,
):  # fmt: skip
    """``step * code`` of packed rows whose containers differ, ``[E, F]`` float32. Neighbouring codes share a byte, which the L1 cache serves."""
    b_container, b_start = _row_address(
        _places(p_pos, b_source, m_edge), first_4, first_2, first_1, first_0, start_4, start_2, start_1,
        stride_8, stride_4, stride_2, stride_1, CONTAINER,
    )  # fmt: skip
    b_step = tl.load(p_step + b_source, mask=m_edge, other=0)
    # [E, F]
    b_bit = o_f[None, :] * b_container[:, None]
    m_x = (m_edge & (b_container > 0))[:, None] & m_f[None, :]
    b_byte = tl.load(p_x + b_start[:, None] + (b_bit >> 3), mask=m_x, other=0).to(tl.int32)
    # The code moves to the top of the int32 and back, which drops its neighbours and extends its sign.
    b_top = b_byte << (32 - b_container[:, None] - (b_bit & 7))
    b_shift = tl.where(b_container > 0, 32 - b_container, 31)[:, None]
    if SIGNED:
        b_code = b_top >> b_shift
    else:
        b_code = (b_top.to(tl.uint32, bitcast=True) >> b_shift.to(tl.uint32)).to(tl.int32)
    return b_step[:, None] * b_code.to(tl.float32)
