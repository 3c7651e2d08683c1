"""Codes of packed rows in any order, whose containers may differ from row to row (bit layouts: :mod:`..packing`)."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import _load_codes, _places, _row_address


@triton.jit
def _row_codes(
    p_x, p_pos, b_row, m_row, o_f, m_f, first_4, first_2, first_1, first_0, start_4, start_2, start_1,
    stride_8, stride_4, stride_2, stride_1, SIGNED: tl.constexpr, CONTAINER: tl.constexpr,
):  # fmt: skip
    """int32 codes ``[R, F]`` of the rows ``b_row``, 0 where masked."""
    b_container, b_address = _row_address(
        _places(p_pos, b_row, m_row), first_4, first_2, first_1, first_0, start_4, start_2, start_1,
        stride_8, stride_4, stride_2, stride_1, CONTAINER,
    )  # fmt: skip
    return _load_codes(p_x, b_container, b_address, m_row[:, None] & m_f[None, :], o_f, SIGNED)
