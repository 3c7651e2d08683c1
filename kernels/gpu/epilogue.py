"""What the packed matmul and the packed aggregation do to an int32 tile before they store it (contract: :mod:`..matmul`)."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from ..packing import ALIGN, CONTAINERS, row_bytes


@triton.jit
def _epilogue(b_acc, p_row_scale, p_col_scale, p_bias, b_row, m_row, o_f, m_f, RELU: tl.constexpr):
    """``relu(float(acc) * row_scale * col_scale + bias)`` ``[R, F]``, in this order and without fused multiply-add (``enable_fp_fusion=False``)."""
    b_v = b_acc.to(tl.float32)
    if p_row_scale is not None:
        b_v *= tl.load(p_row_scale + b_row, mask=m_row, other=0)[:, None]
    if p_col_scale is not None:
        b_v *= tl.load(p_col_scale + o_f, mask=m_f, other=0)[None, :]
    if p_bias is not None:
        b_v += tl.load(p_bias + o_f, mask=m_f, other=0)[None, :]
    if RELU:
        b_v = tl.where(b_v < 0, 0.0, b_v)  # NaN stays
    return b_v


@triton.jit
def _clear(p_out, i_from, i_to):
    o_b = i_from + tl.arange(0, 16)
    tl.store(p_out + o_b, tl.zeros((16,), tl.uint8), mask=o_b < i_to)


@triton.jit
def _clear_tails(
    p_out, size, first_4, first_2, first_1, first_0, start_4, start_2, start_1, stride_8, stride_4, stride_2, stride_1
):
    """Zeros the bytes between the last row of each bucket and the next bucket, fewer than 16 each."""
    _clear(p_out, tl.cast(first_4, tl.int64) * stride_8, start_4)
    _clear(p_out, start_4 + tl.cast(first_2 - first_4, tl.int64) * stride_4, start_2)
    _clear(p_out, start_2 + tl.cast(first_1 - first_2, tl.int64) * stride_2, start_1)
    _clear(p_out, start_1 + tl.cast(first_0 - first_1, tl.int64) * stride_1, size)


def has_tails(counts: Sequence[int], features: int) -> bool:
    """Whether a bucket can end in padding: where rows are shorter than 16 bytes."""
    return any(
        count and container and row_bytes(container, features) < ALIGN
        for container, count in zip(CONTAINERS, counts, strict=True)
    )


def padded_features(counts: Sequence[int], features: int) -> int:
    """Features including those that the padding of the rows stands for: what the blocks must cover so that every byte is written."""
    lanes = [row_bytes(c, features) * 8 // c for c, count in zip(CONTAINERS, counts, strict=True) if c and count]
    return max([features, *lanes])
