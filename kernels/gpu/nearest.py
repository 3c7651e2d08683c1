"""Triton kernels of :mod:`qgnn.kernels.nearest`; symbols, shapes and formulas are stated there."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..packing import bucket_starts, row_bytes, uniform_counts
from .common import (
    EXACT,
    CompileCase,
    _cast,
    _clipped,
    _codes,
    _largest_code,
    _pack,
    _store_bucket,
    check_dtype,
    launch,
    tile_blocks,
)
from .epilogue import _clear, padded_features


@triton.jit
def _groups(p_bounds, p_order, b_f, LEVELS: tl.constexpr):
    """``order[number of bounds below f]``, int64; NaN is above none. There are ``2^LEVELS - 1`` bounds."""
    b_place = tl.zeros((b_f.shape[0],), tl.int32)
    for i_level in tl.static_range(LEVELS):
        b_bound = tl.load(p_bounds + b_place + ((1 << (LEVELS - 1 - i_level)) - 1))
        b_place += tl.where(b_f > b_bound, 1 << (LEVELS - 1 - i_level), 0)
    return tl.load(p_order + b_place)


@triton.jit(do_not_specialize=["N"])
def _nearest_group_kernel(
    p_group,  # [N]
    p_absmax,  # [N]
    p_bounds,  # [2^LEVELS - 1]
    p_order,  # [m]
    N,
    LEVELS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """group = argmin_j |absmax - q_max_j| (A2Q algorithm 1)."""
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    b_f = tl.load(p_absmax + o_r, mask=o_r < N, other=0.0)
    tl.store(p_group + o_r, _groups(p_bounds, p_order, b_f, LEVELS), mask=o_r < N)


@triton.jit
def _load_tile(p_x, o_r, i_tile, N, F, BLOCK_F: tl.constexpr):
    """float32 ``[R, BLOCK_F]``; 0 beyond the last row and feature."""
    o_f = i_tile * BLOCK_F + tl.arange(0, BLOCK_F)
    m = (o_r < N)[:, None] & (o_f < F)[None, :]
    return tl.load(p_x + o_r[:, None] * F + o_f[None, :], mask=m, other=0.0).to(tl.float32)


@triton.jit
def _tile_and_groups(
    p_group, p_x, p_bounds, p_order, o_r, N, F, TILES: tl.constexpr, LEVELS: tl.constexpr, BLOCK_F: tl.constexpr
):
    """The first tile of the rows ``o_r``, and their groups, which it stores: argmin_j |max_k |x_k| - q_max_j| (A2Q algorithm 1)."""
    b_x = _load_tile(p_x, o_r, 0, N, F, BLOCK_F)
    # Magnitudes are ordered like the integers of their bits, NaN above all of them.
    b_top = b_x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    for i_tile in range(1, TILES):
        b_next = _load_tile(p_x, o_r, i_tile, N, F, BLOCK_F)
        b_top = tl.maximum(b_top, b_next.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    # [BLOCK_R]
    b_group = _groups(p_bounds, p_order, tl.max(b_top, axis=1).to(tl.float32, bitcast=True), LEVELS)
    tl.store(p_group + o_r, b_group, mask=o_r < N)
    return b_x, b_group


@triton.jit(do_not_specialize=["N"])
def _fake_quantize_nearest_kernel(
    p_value,  # [N, F]
    p_clip,  # [N, ceil(F / 8)]
    p_group,  # [N]
    p_x,  # [N, F]
    p_bounds,  # [2^LEVELS - 1]
    p_order,  # [m]
    p_step,  # [m]
    p_bits,  # [m]
    N, F,
    SIGNED: tl.constexpr, TILES: tl.constexpr, LEVELS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """value = step_group * code, clipped = |x| >= step_group * Q (A2Q algorithm 1, eq. 1 and 10)."""
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    b_x, b_group = _tile_and_groups(p_group, p_x, p_bounds, p_order, o_r, N, F, TILES, LEVELS, BLOCK_F)
    # [BLOCK_R, 1]
    b_step = tl.load(p_step + b_group)[:, None]
    b_q = _largest_code(tl.load(p_bits + b_group), SIGNED)[:, None]
    for i_tile in range(TILES):
        if TILES > 1:  # a longer row is read again, from the cache
            b_x = _load_tile(p_x, o_r, i_tile, N, F, BLOCK_F)
        o_f = i_tile * BLOCK_F + tl.arange(0, BLOCK_F)
        m = (o_r < N)[:, None] & (o_f < F)[None, :]
        b_value = b_step * _codes(b_x, b_step, b_q, SIGNED).to(tl.float32)
        b_value = _cast(tl.where(b_x != b_x, b_x, b_value), p_value)
        tl.store(p_value + o_r[:, None] * F + o_f[None, :], b_value, mask=m)
        b_clipped = _clipped(b_x, b_step, b_q, SIGNED) & m
        # [BLOCK_R, BLOCK_F / 8]
        o_c = i_tile * (BLOCK_F // 8) + tl.arange(0, BLOCK_F // 8)
        p_bytes = p_clip + o_r[:, None] * ((F + 7) // 8) + o_c[None, :]
        tl.store(p_bytes, _pack(b_clipped.to(tl.int32), 1), mask=(o_r < N)[:, None] & (o_c * 8 < F)[None, :])


@triton.jit(do_not_specialize=["N", "size"])
def _quantize_nearest_kernel(
    p_data,  # packed [N, F]
    p_row_step, p_group,  # [N]
    p_x,  # [N, F]
    p_bounds,  # [2^LEVELS - 1]
    p_order, p_step, p_bits,  # [m]
    N, F, size, stride,
    SIGNED: tl.constexpr, CONTAINER: tl.constexpr, TILES: tl.constexpr, PACKED_TILES: tl.constexpr, TAIL: tl.constexpr, LEVELS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """The packed codes of x with step_group, and step_group (A2Q algorithm 1, eq. 1)."""
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    b_x, b_group = _tile_and_groups(p_group, p_x, p_bounds, p_order, o_r, N, F, TILES, LEVELS, BLOCK_F)
    b_row_step = tl.load(p_step + b_group)
    tl.store(p_row_step + o_r, b_row_step, mask=o_r < N)
    if TAIL:
        if tl.program_id(0) == 0:
            _clear(p_data, tl.cast(N, tl.int64) * stride, size)
    if CONTAINER > 0:
        b_q = _largest_code(tl.load(p_bits + b_group), SIGNED)[:, None]
        for i_tile in range(PACKED_TILES):
            if PACKED_TILES > 1:
                b_x = _load_tile(p_x, o_r, i_tile, N, F, BLOCK_F)
            b_codes = _codes(b_x, b_row_step[:, None], b_q, SIGNED)
            _store_bucket(p_data, b_codes, o_r, o_r < N, i_tile, 0, N, 0, stride, CONTAINER)


@triton.jit
def _group_sums_kernel(
    p_sum_a,  # [m]
    p_sum_b,
    p_a,  # [N]
    p_b,
    p_rows,  # [N], sorted by group
    p_starts,  # [m + 1]
    BLOCK_R: tl.constexpr,
):
    """sum_a = sum of a over the rows of this program's group, likewise b (A2Q algorithm 1)."""
    i_group = tl.program_id(0)
    first, end = tl.load(p_starts + i_group), tl.load(p_starts + i_group + 1)
    b_sum_a = tl.zeros((BLOCK_R,), tl.float32)
    b_sum_b = tl.zeros((BLOCK_R,), tl.float32)
    for i_first in range(first, end, BLOCK_R):
        o_r = i_first + tl.arange(0, BLOCK_R)
        b_row = tl.load(p_rows + o_r, mask=o_r < end, other=0)
        b_sum_a += tl.load(p_a + b_row, mask=o_r < end, other=0.0)
        b_sum_b += tl.load(p_b + b_row, mask=o_r < end, other=0.0)
    tl.store(p_sum_a + i_group, tl.sum(b_sum_a, axis=0))
    tl.store(p_sum_b + i_group, tl.sum(b_sum_b, axis=0))


BLOCK_R = 1024
"""Rows of a tile where there is one value a row: 8 a thread."""


def nearest_group(absmax: Tensor, bounds: Tensor, order: Tensor) -> Tensor:
    """:func:`qgnn.kernels.nearest.nearest_group`."""
    check_dtype("absmax", absmax)
    group = torch.empty(absmax.shape, dtype=torch.int64, device=absmax.device)
    if group.numel():
        launch(
            _nearest_group_kernel, (triton.cdiv(group.numel(), BLOCK_R),),
            p_group=group, p_absmax=absmax.contiguous(), p_bounds=bounds, p_order=order,
            N=group.numel(), LEVELS=_levels(order), BLOCK_R=BLOCK_R, **EXACT,
        )  # fmt: skip
    return group


def _levels(order: Tensor) -> int:
    return (order.numel() - 1).bit_length()


def fake_quantize_nearest(
    x: Tensor, bounds: Tensor, order: Tensor, step: Tensor, bits: Tensor, signed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`qgnn.kernels.nearest.fake_quantize_nearest` in one pass over ``x``."""
    check_dtype("x", x)
    n, features = x.shape
    value = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    clip = torch.empty(n, (features + 7) // 8, dtype=torch.uint8, device=x.device)
    group = torch.empty(n, dtype=torch.int64, device=x.device)
    if n:
        blocks = tile_blocks(features)
        launch(
            _fake_quantize_nearest_kernel, (triton.cdiv(n, blocks["BLOCK_R"]),),
            p_value=value, p_clip=clip, p_group=group, p_x=x.contiguous(), p_bounds=bounds, p_order=order,
            p_step=step.contiguous(), p_bits=bits.contiguous(), N=n, F=features,
            SIGNED=signed, TILES=triton.cdiv(features, blocks["BLOCK_F"]), LEVELS=_levels(order), **blocks, **EXACT,
        )  # fmt: skip
    return value, clip, group


def quantize_nearest(
    x: Tensor, bounds: Tensor, order: Tensor, step: Tensor, bits: Tensor, signed: bool, container: int
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`qgnn.kernels.nearest.quantize_nearest` in one pass over ``x``."""
    check_dtype("x", x)
    n, features = x.shape
    counts = uniform_counts(n, container)
    data = torch.empty(bucket_starts(counts, features)[-1], dtype=torch.uint8, device=x.device)
    row_step = torch.empty(n, dtype=torch.float32, device=x.device)
    group = torch.empty(n, dtype=torch.int64, device=x.device)
    if n:
        blocks, stride = tile_blocks(features), row_bytes(container, features)
        launch(
            _quantize_nearest_kernel, (triton.cdiv(n, blocks["BLOCK_R"]),),
            p_data=data, p_row_step=row_step, p_group=group, p_x=x.contiguous(), p_bounds=bounds, p_order=order, p_step=step.contiguous(),
            p_bits=bits.contiguous(), N=n, F=features, size=data.numel(), stride=stride, SIGNED=signed, CONTAINER=container,
            TILES=triton.cdiv(features, blocks["BLOCK_F"]), PACKED_TILES=triton.cdiv(padded_features(counts, features), blocks["BLOCK_F"]),
            TAIL=data.numel() > n * stride, LEVELS=_levels(order), **blocks, **EXACT,
        )  # fmt: skip
    return data, row_step, group


def group_sums(group: Tensor, a: Tensor, b: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """:func:`qgnn.kernels.nearest.group_sums`: the rows are sorted by group, and no atomic adds floats."""
    check_dtype("a", a)
    ordered, rows = torch.sort(group.int(), stable=True)  # half the radix passes of int64
    starts = torch.searchsorted(ordered, torch.arange(groups + 1, dtype=torch.int32, device=group.device))
    sum_a, sum_b = (torch.empty(groups, dtype=torch.float32, device=a.device) for _ in range(2))
    launch(
        _group_sums_kernel, (groups,),
        p_sum_a=sum_a, p_sum_b=sum_b, p_a=a.contiguous(), p_b=b.contiguous(), p_rows=rows, p_starts=starts,
        BLOCK_R=BLOCK_R, **EXACT,
    )  # fmt: skip
    return sum_a, sum_b


_TABLE = {"p_bounds": "*fp32", "p_order": "*i64"}
_ROWS = {
    "p_group": "*i64", **_TABLE, "p_step": "*fp32", "p_bits": "*u8", "N": "i32", "F": "i32:16", "size": "i32", "stride": "i32:16",
}  # fmt: skip
_FAKE = {"p_clip": "*u8", "p_group": "*i64", **_TABLE, "p_step": "*fp32", "p_bits": "*u8", "N": "i32", "F": "i32:16"}
_GROUPS = {"SIGNED": True, "LEVELS": 10}

# m = 1000 groups. x is [N, 128], but for the long rows, which loop over blocks of features.
COMPILE_CASES = [
    CompileCase(
        "nearest_group",
        _nearest_group_kernel,
        {"p_group": "*i64", "p_absmax": "*fp32", **_TABLE, "N": "i32"},
        {"LEVELS": 10, "BLOCK_R": BLOCK_R},
        EXACT,
    ),
    CompileCase(
        "fake_quantize_nearest",
        _fake_quantize_nearest_kernel,
        {"p_value": "*fp32", "p_x": "*fp32", **_FAKE},
        {**_GROUPS, "TILES": 1, **tile_blocks(128)},
        EXACT,
    ),
    CompileCase(
        "fake_quantize_nearest, long unsigned rows, bf16",
        _fake_quantize_nearest_kernel,
        {"p_value": "*bf16", "p_x": "*bf16", **_FAKE},
        {**_GROUPS, "SIGNED": False, "TILES": 4, **tile_blocks(1024)},
        EXACT,
    ),
    CompileCase(
        "quantize_nearest",
        _quantize_nearest_kernel,
        {"p_data": "*u8", "p_row_step": "*fp32", "p_x": "*fp32", **_ROWS},
        {**_GROUPS, "CONTAINER": 4, "TILES": 1, "PACKED_TILES": 1, "TAIL": False, **tile_blocks(128)},
        EXACT,
    ),
    CompileCase(
        "quantize_nearest, long unsigned rows, bf16",
        _quantize_nearest_kernel,
        {"p_data": "*u8", "p_row_step": "*fp32", "p_x": "*bf16", **_ROWS},
        {**_GROUPS, "SIGNED": False, "CONTAINER": 8, "TILES": 4, "PACKED_TILES": 4, "TAIL": False, **tile_blocks(1024)},
        EXACT,
    ),
    CompileCase(
        "group_sums",
        _group_sums_kernel,
        {**dict.fromkeys(["p_sum_a", "p_sum_b", "p_a", "p_b"], "*fp32"), "p_rows": "*i64", "p_starts": "*i64"},
        {"BLOCK_R": BLOCK_R},
        EXACT,
    ),
]
