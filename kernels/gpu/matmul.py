"""Triton packed integer matrix product and the weight gradient (contract: :mod:`..matmul`).

One launch multiplies the rows of all widths: a program takes ``BLOCK_N`` places of one bucket, so that its branch on the container is a scalar one,
and writes the rows that stand there. Codes are unpacked to int8 in registers. What does not fit int8 or would need a subtraction for each code is
moved out of the product through the column sums of W: unsigned codes of 8 bits are multiplied as ``c - 128``, and the zero point not at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..packing import empty_output, row_bytes, rows_of
from .common import (
    EXACT,
    LAYOUT_FIRSTS,
    LAYOUT_SIGNATURE,
    OUT_FIRSTS,
    CompileCase,
    _unpack,
    launch,
    layout_arguments,
)
from .epilogue import (
    OUTPUT_SIGNATURE,
    PLAIN,
    _clear_tails,
    _epilogue,
    _store_output,
    output_arguments,
    padded_features,
)
from .rows import _row_codes
from .segments import dense, kept

BLOCK_N = 64
BLOCK_K = 64
"""Rows and contracted codes of one step: a warp group's wgmma takes 64 rows."""


_FUSED = {"num_warps": 4, "enable_fp_fusion": True}
"""Launch options of the float product, which agrees with nothing to the bit."""


@triton.jit
def _int8(b_bytes, CONTAINER: tl.constexpr, SIGNED: tl.constexpr):
    """uint8 ``[R, B]`` -> int8 codes ``[R, B * 8 / CONTAINER]``; unsigned codes of 8 bits less 128."""
    if CONTAINER == 8:
        if SIGNED:
            return b_bytes.to(tl.int8, bitcast=True)
        else:
            return (b_bytes ^ 128).to(tl.int8, bitcast=True)
    else:
        return _unpack(b_bytes, CONTAINER, SIGNED).to(tl.int8)


@triton.jit
def _bucket_tile(
    p_x, p_w, i_tile, first, end, start, stride, o_m, m_m, K, stride_w, x_zero, CONTAINER: tl.constexpr, X_SIGNED: tl.constexpr,
    HAS_ZERO: tl.constexpr, W_CONTAINER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``acc`` ``[BLOCK_N, BLOCK_M]`` of tile ``i_tile`` of the bucket of the places ``first`` to ``end``; the places, and which of them exist."""
    FLIPPED: tl.constexpr = CONTAINER == 8 and not X_SIGNED
    b_local = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    b_place = first + b_local
    m_n = b_place < end
    p_rows = p_x + start + b_local.to(tl.int64)[:, None] * stride
    p_cols = p_w + o_m.to(tl.int64)[:, None] * stride_w
    b_acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    b_sum = tl.zeros((BLOCK_M,), tl.int32)
    if CONTAINER > 0 or HAS_ZERO:
        for i_k in range(0, K, BLOCK_K):
            # [M, K]; the padding of a row is 0, so neither operand needs a mask at K
            o_w = i_k * W_CONTAINER // 8 + tl.arange(0, BLOCK_K * W_CONTAINER // 8)
            b_w = _int8(
                tl.load(p_cols + o_w[None, :], mask=m_m[:, None] & (o_w < stride_w)[None, :], other=0),
                W_CONTAINER,
                True,
            )
            if CONTAINER > 0:
                o_x = i_k * CONTAINER // 8 + tl.arange(0, BLOCK_K * CONTAINER // 8)
                b_x = _int8(
                    tl.load(p_rows + o_x[None, :], mask=m_n[:, None] & (o_x < stride)[None, :], other=0),
                    CONTAINER,
                    X_SIGNED,
                )
                b_acc = tl.dot(b_x, tl.trans(b_w), b_acc, out_dtype=tl.int32)
            if HAS_ZERO or FLIPPED:
                b_sum += tl.sum(b_w.to(tl.int32), axis=1)
    if FLIPPED:
        b_acc += 128 * b_sum[None, :]
    if HAS_ZERO:
        b_acc -= x_zero * b_sum[None, :]
    return b_acc, b_place, m_n


@triton.jit
def _mixed_tile(
    p_x, p_w, N, K, stride_w, x_zero, o_m, m_m, first_4, first_2, first_1, first_0, start_4, start_2, start_1, stride_8, stride_4, stride_2, stride_1,
    X_SIGNED: tl.constexpr, HAS_ZERO: tl.constexpr, W_CONTAINER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """:func:`_bucket_tile` where the rows differ: first come the tiles of the 8-bit rows, then those of the 4-bit rows, and so on."""
    i_tile = tl.program_id(0)
    i_4 = tl.cdiv(first_4, BLOCK_N)
    i_2 = i_4 + tl.cdiv(first_2 - first_4, BLOCK_N)
    i_1 = i_2 + tl.cdiv(first_1 - first_2, BLOCK_N)
    i_0 = i_1 + tl.cdiv(first_0 - first_1, BLOCK_N)
    if i_tile < i_4:
        b_acc, b_place, m_n = _bucket_tile(
            p_x, p_w, i_tile, 0, first_4, 0, stride_8, o_m, m_m, K, stride_w, x_zero,
            8, X_SIGNED, HAS_ZERO, W_CONTAINER, BLOCK_N, BLOCK_M, BLOCK_K,
        )  # fmt: skip
    elif i_tile < i_2:
        b_acc, b_place, m_n = _bucket_tile(
            p_x, p_w, i_tile - i_4, first_4, first_2, start_4, stride_4, o_m, m_m, K, stride_w, x_zero,
            4, X_SIGNED, HAS_ZERO, W_CONTAINER, BLOCK_N, BLOCK_M, BLOCK_K,
        )  # fmt: skip
    elif i_tile < i_1:
        b_acc, b_place, m_n = _bucket_tile(
            p_x, p_w, i_tile - i_2, first_2, first_1, start_2, stride_2, o_m, m_m, K, stride_w, x_zero,
            2, X_SIGNED, HAS_ZERO, W_CONTAINER, BLOCK_N, BLOCK_M, BLOCK_K,
        )  # fmt: skip
    elif i_tile < i_0:
        b_acc, b_place, m_n = _bucket_tile(
            p_x, p_w, i_tile - i_1, first_1, first_0, start_1, stride_1, o_m, m_m, K, stride_w, x_zero,
            1, X_SIGNED, HAS_ZERO, W_CONTAINER, BLOCK_N, BLOCK_M, BLOCK_K,
        )  # fmt: skip
    else:
        b_acc, b_place, m_n = _bucket_tile(
            p_x, p_w, i_tile - i_0, first_0, N, 0, 0, o_m, m_m, K, stride_w, x_zero,
            0, X_SIGNED, HAS_ZERO, W_CONTAINER, BLOCK_N, BLOCK_M, BLOCK_K,
        )  # fmt: skip
    return b_acc, b_place, m_n


@triton.jit(do_not_specialize=["N", "size", "x_zero", *LAYOUT_FIRSTS, *OUT_FIRSTS])
def _matmul_packed_kernel(
    p_out,  # int32 or float32 [N, M], or packed rows
    p_x, p_w,  # packed [N, K] and [M, K]
    p_rows,  # [N], the row at each place; None: its own index
    p_row_scale, p_col_scale, p_bias, p_addend, p_post_scale, p_post_shift,  # [N], [M], [M], [N, M], [M], [M]
    p_step, p_bits, p_pos,  # [N] or [M], [N] or [M], [N], of the packed output
    N, M, K, size, x_zero, stride_x, stride_w,
    first_4, first_2, first_1, first_0, start_4, start_2, start_1, stride_8, stride_4, stride_2, stride_1,
    out_first_4, out_first_2, out_first_1, out_first_0, out_start_4, out_start_2, out_start_1, out_stride_8, out_stride_4, out_stride_2, out_stride_1,
    CONTAINER: tl.constexpr, X_SIGNED: tl.constexpr, HAS_ZERO: tl.constexpr, W_CONTAINER: tl.constexpr, OUTPUT: tl.constexpr,
    OUT_CONTAINER: tl.constexpr, OUT_SIGNED: tl.constexpr, TAILS: tl.constexpr, RELU: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = epilogue(sum_k (x[i, k] - x_zero) * w[j, k]) (A2Q eq. 2)."""
    i_m = tl.program_id(1)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M
    if TAILS:
        if (tl.program_id(0) == 0) & (i_m == 0):
            _clear_tails(
                p_out, size, out_first_4, out_first_2, out_first_1, out_first_0, out_start_4, out_start_2, out_start_1,
                out_stride_8, out_stride_4, out_stride_2, out_stride_1,
            )  # fmt: skip
    if CONTAINER is None:
        b_acc, b_place, m_n = _mixed_tile(
            p_x, p_w, N, K, stride_w, x_zero, o_m, m_m, first_4, first_2, first_1, first_0, start_4, start_2, start_1,
            stride_8, stride_4, stride_2, stride_1, X_SIGNED, HAS_ZERO, W_CONTAINER, BLOCK_N, BLOCK_M, BLOCK_K,
        )  # fmt: skip
    else:
        b_acc, b_place, m_n = _bucket_tile(
            p_x, p_w, tl.program_id(0), 0, N, 0, stride_x, o_m, m_m, K, stride_w, x_zero,
            CONTAINER, X_SIGNED, HAS_ZERO, W_CONTAINER, BLOCK_N, BLOCK_M, BLOCK_K,
        )  # fmt: skip
    b_row = b_place.to(tl.int64)
    if p_rows is not None:
        b_row = tl.load(p_rows + b_place, mask=m_n, other=0).to(tl.int64)
    if OUTPUT == "acc":
        tl.store(p_out + b_row[:, None] * M + o_m[None, :], b_acc, mask=m_n[:, None] & m_m[None, :])
    else:
        b_v = _epilogue(
            b_acc, b_acc, p_row_scale, None, p_col_scale, p_bias, p_addend, p_post_scale, p_post_shift, b_row, m_n, o_m, m_m, M, RELU
        )  # fmt: skip
        _store_output(
            p_out, p_step, p_bits, p_pos, b_v, b_row, m_n, i_m, o_m, m_m, M,
            out_first_4, out_first_2, out_first_1, out_first_0, out_start_4, out_start_2, out_start_1,
            out_stride_8, out_stride_4, out_stride_2, out_stride_1, OUTPUT, OUT_CONTAINER, OUT_SIGNED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["N", "chunk", "zero", *LAYOUT_FIRSTS])
def _matmul_transposed_kernel(
    p_out,  # [splits, K, M]
    p_x,  # packed [N, K]
    p_pos,  # [N]
    p_scale, p_grad,  # [N], [N, M]
    N, K, M, chunk, zero,
    first_4, first_2, first_1, first_0, start_4, start_2, start_1, stride_8, stride_4, stride_2, stride_1,
    SIGNED: tl.constexpr, CONTAINER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """out[s] = sum over the rows i of part s of (scale[i] * (x[i] - zero))^T grad[i]."""
    o_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_split = tl.program_id(2)
    m_k, m_m = o_k < K, o_m < M
    b_acc = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    for i_n in range(i_split * chunk, tl.minimum((i_split + 1) * chunk, N), BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        # [N, K]
        b_code = _row_codes(
            p_x, p_pos, o_n, m_n, o_k, m_k, first_4, first_2, first_1, first_0, start_4, start_2, start_1,
            stride_8, stride_4, stride_2, stride_1, SIGNED, CONTAINER,
        )  # fmt: skip
        b_x = tl.load(p_scale + o_n, mask=m_n, other=0)[:, None] * (b_code - zero).to(tl.float32)
        # [N, M]
        b_grad = tl.load(
            p_grad + o_n.to(tl.int64)[:, None] * M + o_m[None, :], mask=m_n[:, None] & m_m[None, :], other=0
        )
        b_acc = tl.dot(tl.trans(b_x), b_grad, b_acc, input_precision="ieee")
    p_part = p_out + i_split.to(tl.int64) * K * M + o_k.to(tl.int64)[:, None] * M + o_m[None, :]
    tl.store(p_part, b_acc, mask=m_k[:, None] & m_m[None, :])


def matmul_packed(
    x: Tensor, x_pos: Tensor | None, x_counts: Sequence[int], x_signed: bool, x_zero: int, w: Tensor, w_container: int, features: int, columns: int,
    output: str, row_scale: Tensor | None, col_scale: Tensor | None, bias: Tensor | None, addend: Tensor | None, relu: bool,
    post_scale: Tensor | None, post_shift: Tensor | None,
    out_step: Tensor | None, out_bits: Tensor | None, out_pos: Tensor | None, out_counts: Sequence[int], out_signed: bool,
) -> Tensor:  # fmt: skip
    if w_container not in (4, 8):
        raise ValueError(
            f"the Triton matmul takes weights in containers of 4 or 8 bits, got {w_container}; pack them in one of these"
        )
    n = sum(x_counts)
    out = empty_output(x, output, n, columns, out_counts)
    if not out.numel():
        return out
    layout = layout_arguments(x_counts, features)
    container = layout["CONTAINER"]
    # With 128 columns the addend's tile does not fit beside the others: compiled for sm_90, 168 bytes are spilled.
    block_m = min(max(triton.next_power_of_2(columns), 16), 128 if addend is None else 64)
    block_k = min(max(triton.next_power_of_2(features), 32), BLOCK_K)
    tiles = sum(triton.cdiv(count, BLOCK_N) for count in x_counts)
    covered = padded_features(out_counts, columns) if output in ("rows", "columns") else columns
    launch(
        _matmul_packed_kernel, (tiles, triton.cdiv(covered, block_m)),
        p_x=x, p_w=w, p_rows=None if x_pos is None else kept(x_pos, rows_of), p_row_scale=dense(row_scale), p_col_scale=dense(col_scale),
        p_bias=dense(bias), p_addend=dense(addend), p_post_scale=dense(post_scale), p_post_shift=dense(post_shift), N=n, M=columns, K=features,
        x_zero=x_zero, stride_x=row_bytes(container, features) if container else 0, stride_w=row_bytes(w_container, features), **layout,
        X_SIGNED=x_signed, HAS_ZERO=x_zero != 0, W_CONTAINER=w_container,
        **output_arguments(out, output, out_counts, columns, out_step, out_bits, out_pos, out_signed),
        RELU=relu, BLOCK_N=BLOCK_N, BLOCK_M=block_m, BLOCK_K=block_k, **EXACT,
    )  # fmt: skip
    return out


def matmul_transposed(
    x: Tensor,
    pos: Tensor | None,
    counts: Sequence[int],
    signed: bool,
    zero: int,
    features: int,
    scale: Tensor,
    grad: Tensor,
) -> Tensor:
    n, columns, grad = sum(counts), grad.size(1), grad.contiguous()
    if not n or not features or not columns:
        return grad.new_zeros(features, columns)
    block_k, block_m = (min(max(triton.next_power_of_2(size), 16), 64) for size in (features, columns))
    tiles = triton.cdiv(features, block_k) * triton.cdiv(columns, block_m)
    # Enough parts to fill a large GPU twice, and rows enough in each to be worth a part. Neither depends on the device, so the result does not.
    splits = max(1, min(triton.cdiv(264, tiles), n // 256))
    chunk = triton.cdiv(triton.cdiv(n, splits), 32) * 32
    splits = triton.cdiv(n, chunk)
    parts = grad.new_empty(splits, features, columns)
    launch(
        _matmul_transposed_kernel, (triton.cdiv(features, block_k), triton.cdiv(columns, block_m), splits),
        p_out=parts, p_x=x, p_pos=pos, p_scale=scale.contiguous(), p_grad=grad, N=n, K=features, M=columns, chunk=chunk, zero=zero,
        **layout_arguments(counts, features), SIGNED=signed, BLOCK_N=32, BLOCK_K=block_k, BLOCK_M=block_m, **_FUSED,
    )  # fmt: skip
    return parts[0] if splits == 1 else parts.sum(0)


def _case(
    name: str, container: int | None, w_container: int, output: str, out: str, short: bool = False, **changed: object
) -> CompileCase:
    """``short``: rows of fewer than 16 bytes, which nothing is known to divide. ``changed``: constants, and the types of pointers that most layers
    do not have."""
    constexprs: dict[str, object] = {
        "CONTAINER": container, "X_SIGNED": True, "HAS_ZERO": False, "W_CONTAINER": w_container, "OUTPUT": output, "OUT_CONTAINER": 4,
        "OUT_SIGNED": True, "TAILS": False, "RELU": False, "BLOCK_N": BLOCK_N, "BLOCK_M": 128, "BLOCK_K": BLOCK_K, **PLAIN, "p_pos": None, **changed,
    }  # fmt: skip
    signature = {
        **OUTPUT_SIGNATURE, "p_out": out, "p_x": "*u8", "p_w": "*u8", "p_rows": "*i32", **dict.fromkeys(["N", "x_zero"], "i32"),
        **dict.fromkeys(["M", "K", "stride_x", "stride_w"], "i32:16"), **LAYOUT_SIGNATURE,
    }  # fmt: skip
    del signature["p_self_scale"], constexprs["p_self_scale"]
    if short:
        signature |= dict.fromkeys(["K", "stride_w", "stride_8", "stride_4", "stride_2", "stride_1"], "i32")
    constexprs = {name: value for name, value in constexprs.items() if not str(value).startswith("*")}
    signature = {name: kind for name, kind in signature.items() if name not in constexprs}
    return CompileCase(name, _matmul_packed_kernel, signature, constexprs, EXACT)


_TRANSPOSED = {
    **dict.fromkeys(["p_out", "p_scale", "p_grad"], "*fp32"), "p_x": "*u8", "p_pos": "*i32",
    **dict.fromkeys(["N", "chunk", "zero"], "i32"), "K": "i32:16", "M": "i32:16", **LAYOUT_SIGNATURE,
}  # fmt: skip
_BLOCKS = {"SIGNED": True, "BLOCK_N": 32, "BLOCK_K": 64, "BLOCK_M": 64}
COMPILE_CASES = [
    _case("matmul_packed_8x8_acc", 8, 8, "acc", "*i32"),
    _case("matmul_packed_8x4_float", 8, 4, "float", "*fp32"),
    _case("matmul_packed_4x4_columns", 4, 4, "columns", "*u8", p_rows=None),
    _case("matmul_packed_mixed_x4_columns", None, 4, "columns", "*u8"),
    _case("matmul_packed_mixed_x8_float", None, 8, "float", "*fp32"),
    _case("matmul_packed_mixed_unsigned_zero", None, 4, "float", "*fp32", X_SIGNED=False, HAS_ZERO=True),
    _case("matmul_packed_narrow", None, 4, "columns", "*u8", BLOCK_M=16),
    _case("matmul_packed_short_rows", None, 4, "float", "*fp32", short=True, BLOCK_K=32),
    _case("matmul_packed_8x8_rows", 8, 8, "rows", "*u8", OUT_CONTAINER=8, p_rows=None, RELU=True),
    _case("matmul_packed_mixed_x4_mixed_rows", None, 4, "rows", "*u8", OUT_CONTAINER=None, p_pos="*i32", OUT_SIGNED=False, RELU=True),
    _case(
        "matmul_packed_mixed_x8_whole_epilogue_rows", None, 8, "rows", "*u8", OUT_CONTAINER=None, RELU=True, BLOCK_M=64,
        p_addend="*fp32", p_post_scale="*fp32", p_post_shift="*fp32", p_pos="*i32",
    ),
    CompileCase("matmul_transposed_mixed", _matmul_transposed_kernel, _TRANSPOSED, {**_BLOCKS, "CONTAINER": None}, _FUSED),
    CompileCase(
        "matmul_transposed_8", _matmul_transposed_kernel, {k: v for k, v in _TRANSPOSED.items() if k != "p_pos"},
        {**_BLOCKS, "p_pos": None, "CONTAINER": 8}, _FUSED,
    ),
]  # fmt: skip
