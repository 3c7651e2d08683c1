"""Triton packed integer matrix product and the weight gradient (contract: :mod:`..matmul`).

One launch multiplies the rows of all widths: a program takes ``BLOCK_N`` places of one bucket, so that its branch on the container is a scalar one,
and writes the rows that stand there. Codes narrower than 8 bits are taken out of their bytes in registers, four bytes an instruction, plane by plane
against weights that are laid out for it (:mod:`.planes`). What does not fit int8 or would need a subtraction for each code is moved out of the
product through the column sums of W: narrow signed codes are multiplied as ``c + 2^(b - 1)``, unsigned codes of 8 bits as ``c - 128``, and the zero
point not at all.

[232965, 602] x [602, 128] with float32 results moves 141.6 MB of INT8 rows (71 MB of INT4, each row padded) and 119.3 MB of results: 54 us (40 us) at
4.8 TB/s. Its 36.3 G multiplications and additions are 18 us of the 1,979 TOPS of an H100. A step of the inner loop (64 rows, 128 columns, 128 codes)
takes on sm_90, with four warps, 97 instructions a warp at INT8 and 123 at INT4, together 7.1 and 9.0 million of the 90 million that 132
multiprocessors issue in 100 us at 1.7 GHz: memory is the limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..packing import empty_output, row_bytes, rows_of
from . import tuning
from .common import (
    EXACT,
    INTERPRETED,
    LAYOUT_FIRSTS,
    LAYOUT_SIGNATURE,
    OUT_FIRSTS,
    CompileCase,
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
from .planes import _plane_bytes, _planes_start, planes_of
from .rows import _row_codes
from .segments import dense, kept

_FUSED = {"num_warps": 4, "enable_fp_fusion": True}
"""Launch options of the float product, which agrees with nothing to the bit."""


@tl.core.builtin
def _on_nvidia(_semantic: Any = None) -> tl.constexpr:
    """Whether the kernel is compiled for an NVIDIA GPU, which may be another than the one that is there."""
    return tl.constexpr(_semantic.builder.options.backend_name == "cuda")


@triton.constexpr_function
def _four_codes(shift: int, mask: int, flip: int) -> str:
    """PTX: ``((x >> shift) & mask) ^ flip`` of four bytes at a time. Compiled from bytes, the same is about 4 instructions for each of them."""
    four = 0x01010101
    return f"shr.b32 $0, $1, {shift}; lop3.b32 $0, $0, {mask * four}, {flip * four}, 0x6A;"


@triton.jit
def _plane(b_bytes, p: tl.constexpr, CONTAINER: tl.constexpr, SIGNED: tl.constexpr):
    """uint8 ``[R, B]`` -> int8 ``[R, B]``: code ``p`` of every byte, its highest bit flipped where it is narrow and signed, or wide and unsigned."""
    MASK: tl.constexpr = (1 << CONTAINER) - 1
    FLIP: tl.constexpr = 0 if (CONTAINER == 8) == SIGNED else 1 << (CONTAINER - 1)
    NVIDIA: tl.constexpr = False if INTERPRETED else _on_nvidia()
    if CONTAINER == 8 and SIGNED:
        return b_bytes.to(tl.int8, bitcast=True)
    elif NVIDIA:
        return tl.inline_asm_elementwise(_four_codes(p * CONTAINER, MASK, FLIP), "=r,r", [b_bytes], tl.int8, True, 4)
    else:
        return (((b_bytes >> (p * CONTAINER)) & MASK) ^ FLIP).to(tl.int8, bitcast=True)


@triton.jit
def _bucket_tile(
    p_x, p_w, p_sum, i_tile, first, end, start, stride, o_m, m_m, M, K, stride_w, start_w, x_zero, CONTAINER: tl.constexpr, X_SIGNED: tl.constexpr,
    HAS_ZERO: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``acc`` ``[BLOCK_N, BLOCK_M]`` of tile ``i_tile`` of the bucket of the places ``first`` to ``end``; the places, and which of them exist."""
    b_local = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    b_place = first + b_local
    b_acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    # What the flipped bit adds to each code.
    HALF: tl.constexpr = 1 << CONTAINER >> 1
    BIAS: tl.constexpr = (0 if X_SIGNED else -HALF) if CONTAINER == 8 else (HALF if X_SIGNED else 0)
    if CONTAINER > 0:
        LANES: tl.constexpr = 8 // CONTAINER
        BLOCK_B: tl.constexpr = BLOCK_K // LANES if BLOCK_K // LANES > 32 else 32
        # Rows and columns that do not exist read others that do, and are not stored. Behind the end of a row W is 0.
        p_rows = p_x + start + tl.minimum(b_local, end - first - 1).to(tl.int64)[:, None] * stride
        p_cols = p_w + start_w + tl.minimum(o_m, M - 1).to(tl.int64)[:, None] * stride_w
        size = _plane_bytes(K, LANES)
        for i_b in tl.range(0, stride, BLOCK_B, num_stages=2 if CONTAINER == 1 else None):
            # [N, B], and below [M, B]; the 8 planes of 1 bit in 3 stages would take 100 KiB, which sm_86 and sm_89 do not have
            o_b = i_b + tl.arange(0, BLOCK_B)
            b_bytes = tl.load(p_rows + o_b[None, :], mask=(o_b < stride)[None, :], other=0)
            for p in tl.static_range(LANES):
                b_w = tl.load(p_cols + (p * size + o_b)[None, :])
                b_acc = tl.dot(_plane(b_bytes, p, CONTAINER, X_SIGNED), tl.trans(b_w), b_acc, out_dtype=tl.int32)
    if HAS_ZERO or (CONTAINER > 0 and BIAS != 0):
        b_acc -= ((x_zero + BIAS) * tl.load(p_sum + o_m, mask=m_m, other=0))[None, :]
    return b_acc, b_place, b_place < end


@triton.jit
def _mixed_tile(
    p_x, p_w, p_sum, i_tile, N, M, K, stride_w, x_zero, o_m, m_m, first_4, first_2, first_1, first_0, start_4, start_2, start_1,
    stride_8, stride_4, stride_2, stride_1, X_SIGNED: tl.constexpr, HAS_ZERO: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """:func:`_bucket_tile` where the rows differ: first come the tiles of the 8-bit rows, then those of the 4-bit rows, and so on."""
    i_4 = tl.cdiv(first_4, BLOCK_N)
    i_2 = i_4 + tl.cdiv(first_2 - first_4, BLOCK_N)
    i_1 = i_2 + tl.cdiv(first_1 - first_2, BLOCK_N)
    i_0 = i_1 + tl.cdiv(first_0 - first_1, BLOCK_N)
    if i_tile < i_4:
        b_acc, b_place, m_n = _bucket_tile(
            p_x, p_w, p_sum, i_tile, 0, first_4, 0, stride_8, o_m, m_m, M, K, stride_w, _planes_start(K, 1), x_zero,
            8, X_SIGNED, HAS_ZERO, BLOCK_N, BLOCK_M, BLOCK_K,
        )  # fmt: skip
    elif i_tile < i_2:
        b_acc, b_place, m_n = _bucket_tile(
            p_x, p_w, p_sum, i_tile - i_4, first_4, first_2, start_4, stride_4, o_m, m_m, M, K, stride_w, _planes_start(K, 2), x_zero,
            4, X_SIGNED, HAS_ZERO, BLOCK_N, BLOCK_M, BLOCK_K,
        )  # fmt: skip
    elif i_tile < i_1:
        b_acc, b_place, m_n = _bucket_tile(
            p_x, p_w, p_sum, i_tile - i_2, first_2, first_1, start_2, stride_2, o_m, m_m, M, K, stride_w, _planes_start(K, 4), x_zero,
            2, X_SIGNED, HAS_ZERO, BLOCK_N, BLOCK_M, BLOCK_K,
        )  # fmt: skip
    elif i_tile < i_0:
        b_acc, b_place, m_n = _bucket_tile(
            p_x, p_w, p_sum, i_tile - i_1, first_1, first_0, start_1, stride_1, o_m, m_m, M, K, stride_w, _planes_start(K, 8), x_zero,
            1, X_SIGNED, HAS_ZERO, BLOCK_N, BLOCK_M, BLOCK_K,
        )  # fmt: skip
    else:
        b_acc, b_place, m_n = _bucket_tile(
            p_x, p_w, p_sum, i_tile - i_0, first_0, N, 0, 0, o_m, m_m, M, K, stride_w, 0, x_zero,
            0, X_SIGNED, HAS_ZERO, BLOCK_N, BLOCK_M, BLOCK_K,
        )  # fmt: skip
    return b_acc, b_place, m_n


@triton.jit(do_not_specialize=["N", "size", "x_zero", *LAYOUT_FIRSTS, *OUT_FIRSTS])
def _matmul_packed_kernel(
    p_out,  # int32 or float32 [N, M], or packed rows
    p_x,  # packed [N, K]
    p_w, p_sum,  # int8 planes [M, stride_w], int32 [M]
    p_rows,  # [N], the row at each place; None: its own index
    p_row_scale, p_col_scale, p_bias, p_addend, p_post_scale, p_post_shift,  # [N], [M], [M], [N, M], [M], [M]
    p_step, p_bits, p_pos,  # [N] or [M], [N] or [M], [N], of the packed output
    N, M, K, size, blocks, x_zero, stride_x, stride_w,
    first_4, first_2, first_1, first_0, start_4, start_2, start_1, stride_8, stride_4, stride_2, stride_1,
    out_first_4, out_first_2, out_first_1, out_first_0, out_start_4, out_start_2, out_start_1, out_stride_8, out_stride_4, out_stride_2, out_stride_1,
    CONTAINER: tl.constexpr, X_SIGNED: tl.constexpr, HAS_ZERO: tl.constexpr, OUTPUT: tl.constexpr,
    OUT_CONTAINER: tl.constexpr, OUT_SIGNED: tl.constexpr, TAILS: tl.constexpr, RELU: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = epilogue(sum_k (x[i, k] - x_zero) * w[j, k]) (A2Q eq. 2)."""
    # Blocks of columns are neighbours, so that they read their rows of X at about the same time.
    i_m = tl.program_id(0) % blocks
    i_tile = tl.program_id(0) // blocks
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M
    if TAILS:
        if tl.program_id(0) == 0:
            _clear_tails(
                p_out, size, out_first_4, out_first_2, out_first_1, out_first_0, out_start_4, out_start_2, out_start_1,
                out_stride_8, out_stride_4, out_stride_2, out_stride_1,
            )  # fmt: skip
    if CONTAINER is None:
        b_acc, b_place, m_n = _mixed_tile(
            p_x, p_w, p_sum, i_tile, N, M, K, stride_w, x_zero, o_m, m_m, first_4, first_2, first_1, first_0, start_4, start_2, start_1,
            stride_8, stride_4, stride_2, stride_1, X_SIGNED, HAS_ZERO, BLOCK_N, BLOCK_M, BLOCK_K,
        )  # fmt: skip
    else:
        b_acc, b_place, m_n = _bucket_tile(
            p_x, p_w, p_sum, i_tile, 0, N, 0, stride_x, o_m, m_m, M, K, stride_w, 0, x_zero,
            CONTAINER, X_SIGNED, HAS_ZERO, BLOCK_N, BLOCK_M, BLOCK_K,
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
    n = sum(x_counts)
    out = empty_output(x, output, n, columns, out_counts)
    if not out.numel():
        return out
    layout = layout_arguments(x_counts, features)
    container = layout["CONTAINER"]
    covered = padded_features(out_counts, columns) if output in ("rows", "columns") else columns
    planes, sums = kept(w, planes_of(container, w_container, columns, features))

    def run(use: dict[str, int]) -> None:
        # With 128 columns the addend's tile does not fit beside the others: compiled for sm_90 with 4 warps, 288 bytes are spilled.
        block_m = min(max(triton.next_power_of_2(columns), 16), use["BLOCK_M"] if addend is None else 64)
        block_k = min(max(triton.next_power_of_2(features), 32), use["BLOCK_K"])
        tiles = sum(triton.cdiv(count, use["BLOCK_N"]) for count in x_counts)
        blocks = triton.cdiv(covered, block_m)
        launch(
            _matmul_packed_kernel, (tiles * blocks,),
            p_x=x, p_w=planes, p_sum=sums, p_rows=None if x_pos is None else kept(x_pos, rows_of), p_row_scale=dense(row_scale),
            p_col_scale=dense(col_scale), p_bias=dense(bias), p_addend=dense(addend), p_post_scale=dense(post_scale), p_post_shift=dense(post_shift),
            N=n, M=columns, K=features, blocks=blocks, x_zero=x_zero, stride_x=row_bytes(container, features) if container else 0,
            stride_w=planes.size(1), **layout, X_SIGNED=x_signed, HAS_ZERO=x_zero != 0,
            **output_arguments(out, output, out_counts, columns, out_step, out_bits, out_pos, out_signed), RELU=relu,
            **{**EXACT, **use, "BLOCK_M": block_m, "BLOCK_K": block_k},
        )  # fmt: skip

    tuning.run("matmul_packed", x.device, columns, container or 0, run)
    return out


def matmul_transposed(
    x: Tensor, pos: Tensor | None, counts: Sequence[int], signed: bool, zero: int, features: int, scale: Tensor, grad: Tensor
) -> Tensor:  # fmt: skip
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
    name: str, container: int | None, output: str, out: str, short: bool = False, use: dict[str, int] | None = None, **changed: object
) -> CompileCase:  # fmt: skip
    """``short``: rows of fewer than 16 bytes, which nothing is known to divide. ``changed``: constants, and the types of pointers that most layers
    do not have. ``use``: blocks and options of a configuration."""
    constexprs: dict[str, object] = {
        "CONTAINER": container, "X_SIGNED": True, "HAS_ZERO": False, "OUTPUT": output, "OUT_CONTAINER": 4,
        "OUT_SIGNED": True, "TAILS": False, "RELU": False, "BLOCK_N": 64, "BLOCK_M": 128, "BLOCK_K": 128, **PLAIN, "p_pos": None,
        **(use or {}), **changed,
    }  # fmt: skip
    signature = {
        **OUTPUT_SIGNATURE, "p_out": out, "p_x": "*u8", "p_w": "*i8", "p_sum": "*i32", "p_rows": "*i32",
        **dict.fromkeys(["N", "blocks", "x_zero"], "i32"),
        **dict.fromkeys(["M", "K", "stride_x", "stride_w"], "i32:16"), **LAYOUT_SIGNATURE,
    }  # fmt: skip
    del signature["p_self_scale"], constexprs["p_self_scale"]
    if short:
        signature |= dict.fromkeys(["K", "stride_8", "stride_4", "stride_2", "stride_1"], "i32")
    constexprs = {name: value for name, value in constexprs.items() if not str(value).startswith("*")}
    signature = {name: kind for name, kind in signature.items() if name not in constexprs}
    options: dict[str, object] = {"num_warps": 8, "num_stages": 3}
    options |= {option: constexprs.pop(option) for option in list(options) if option in constexprs}
    return CompileCase(name, _matmul_packed_kernel, signature, constexprs, {**EXACT, **options})


_TRANSPOSED = {
    **dict.fromkeys(["p_out", "p_scale", "p_grad"], "*fp32"), "p_x": "*u8", "p_pos": "*i32",
    **dict.fromkeys(["N", "chunk", "zero"], "i32"), "K": "i32:16", "M": "i32:16", **LAYOUT_SIGNATURE,
}  # fmt: skip
_BLOCKS = {"SIGNED": True, "BLOCK_N": 32, "BLOCK_K": 64, "BLOCK_M": 64}
COMPILE_CASES = [
    *(
        _case(f"matmul_packed_4_columns_{'_'.join(map(str, use.values()))}", 4, "columns", "*u8", use=use)
        for use in tuning.shipped("matmul_packed")
    ),
    _case("matmul_packed_mixed_columns", None, "columns", "*u8"),
    _case("matmul_packed_mixed_columns_4_warps", None, "columns", "*u8", num_warps=4),
    _case("matmul_packed_8_acc", 8, "acc", "*i32"),
    _case("matmul_packed_8_float", 8, "float", "*fp32"),
    _case("matmul_packed_4_unsigned_zero", 4, "float", "*fp32", X_SIGNED=False, HAS_ZERO=True),
    _case("matmul_packed_4_narrow", 4, "columns", "*u8", BLOCK_M=16),
    _case("matmul_packed_4_short_rows", 4, "float", "*fp32", short=True, BLOCK_K=32),
    _case("matmul_packed_8_rows", 8, "rows", "*u8", OUT_CONTAINER=8, p_rows=None, RELU=True),
    _case("matmul_packed_2_mixed_rows", 2, "rows", "*u8", OUT_CONTAINER=None, p_pos="*i32", OUT_SIGNED=False, RELU=True),
    _case(
        "matmul_packed_4_whole_epilogue_rows", 4, "rows", "*u8", OUT_CONTAINER=None, RELU=True, BLOCK_M=64, num_warps=4,
        p_addend="*fp32", p_post_scale="*fp32", p_post_shift="*fp32", p_pos="*i32",
    ),
    CompileCase("matmul_transposed_mixed", _matmul_transposed_kernel, _TRANSPOSED, {**_BLOCKS, "CONTAINER": None}, _FUSED),
    CompileCase(
        "matmul_transposed_8", _matmul_transposed_kernel, {k: v for k, v in _TRANSPOSED.items() if k != "p_pos"},
        {**_BLOCKS, "p_pos": None, "CONTAINER": 8}, _FUSED,
    ),
]  # fmt: skip
