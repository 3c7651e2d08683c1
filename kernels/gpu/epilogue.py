"""What the packed product, aggregation and attention do to a tile before they store it, and how they store it (contract: :mod:`..matmul`)."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..packing import ALIGN, CONTAINERS, row_bytes
from .common import OUT_SIGNATURE, _codes, _largest_code, _store_codes, layout_arguments
from .segments import dense


@triton.jit
def _epilogue(
    b_acc, b_own, p_row_scale, p_self_scale, p_col_scale, p_bias, p_addend, p_post_scale, p_post_shift, b_row, m_row, o_f, m_f, F,
    RELU: tl.constexpr,
):  # fmt: skip
    """float32 ``[R, F]``, in the order of the contract and without fused multiply-add (``enable_fp_fusion=False``); ``b_own`` holds the rows' own
    codes where there is a ``p_self_scale``."""
    b_v = b_acc.to(tl.float32)
    if p_row_scale is not None:
        b_v *= tl.load(p_row_scale + b_row, mask=m_row, other=0)[:, None]
    if p_self_scale is not None:
        b_v += tl.load(p_self_scale) * b_own.to(tl.float32)
    if p_col_scale is not None:
        b_v *= tl.load(p_col_scale + o_f, mask=m_f, other=0)[None, :]
    if p_bias is not None:
        b_v += tl.load(p_bias + o_f, mask=m_f, other=0)[None, :]
    if p_addend is not None:
        b_v += tl.load(
            p_addend + b_row.to(tl.int64)[:, None] * F + o_f[None, :], mask=m_row[:, None] & m_f[None, :], other=0
        )
    if RELU:
        b_v = tl.where(b_v < 0, 0.0, b_v)  # NaN stays
    if p_post_scale is not None:
        b_v *= tl.load(p_post_scale + o_f, mask=m_f, other=0)[None, :]
    if p_post_shift is not None:
        b_v += tl.load(p_post_shift + o_f, mask=m_f, other=0)[None, :]
    return b_v


@triton.jit
def _store_output(
    p_out, p_step, p_bits, p_pos, b_v, b_row, m_row, i_f, o_f, m_f, F,
    first_4, first_2, first_1, first_0, start_4, start_2, start_1, stride_8, stride_4, stride_2, stride_1,
    OUTPUT: tl.constexpr, OUT_CONTAINER: tl.constexpr, OUT_SIGNED: tl.constexpr,
):  # fmt: skip
    """Stores the epilogue's result ``[R, F]``, block ``i_f`` of the features, as it is or quantized by row or by column and packed."""
    if OUTPUT == "float":
        tl.store(p_out + b_row.to(tl.int64)[:, None] * F + o_f[None, :], b_v, mask=m_row[:, None] & m_f[None, :])
    else:
        if OUTPUT == "rows":
            b_step = tl.load(p_step + b_row, mask=m_row, other=1)[:, None]
            b_q = _largest_code(tl.load(p_bits + b_row, mask=m_row, other=0), OUT_SIGNED)[:, None]
        else:
            b_step = tl.load(p_step + o_f, mask=m_f, other=1)[None, :]
            b_q = _largest_code(tl.load(p_bits + o_f, mask=m_f, other=0), OUT_SIGNED)[None, :]
        b_codes = tl.where(m_f[None, :], _codes(b_v, b_step, b_q, OUT_SIGNED), 0)
        _store_codes(
            p_out, p_pos, b_codes, b_row, m_row, i_f, first_4, first_2, first_1, first_0, start_4, start_2, start_1,
            stride_8, stride_4, stride_2, stride_1, OUT_CONTAINER,
        )  # fmt: skip


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


EPILOGUE_OPERANDS = ["row_scale", "self_scale", "col_scale", "bias", "addend", "post_scale", "post_shift"]


def output_arguments(
    out: Tensor, output: str, counts: Sequence[int], features: int, step: Tensor | None, bits: Tensor | None, pos: Tensor | None, signed: bool
) -> dict[str, Tensor | int | bool | str | None]:  # fmt: skip
    """The arguments of :func:`_store_output` and :func:`_clear_tails`."""
    counts = counts if output in ("rows", "columns") else [0] * 5
    return {
        "p_out": out, "p_step": dense(step), "p_bits": dense(bits), "p_pos": pos, "size": out.numel(),
        **layout_arguments(counts, features, "out_"), "OUTPUT": output, "OUT_SIGNED": signed, "TAILS": has_tails(counts, features),
    }  # fmt: skip


OUTPUT_SIGNATURE = {
    **dict.fromkeys([f"p_{name}" for name in EPILOGUE_OPERANDS], "*fp32"),
    "p_step": "*fp32", "p_bits": "*u8", "p_pos": "*i32", "size": "i32", **OUT_SIGNATURE,
}  # fmt: skip
"""Their types, and those of the epilogue's operands, in a :class:`.common.CompileCase`."""

PLAIN = dict.fromkeys(["p_self_scale", "p_addend", "p_post_scale", "p_post_shift"])
"""The operands that most layers do not have, in a case's constants."""
