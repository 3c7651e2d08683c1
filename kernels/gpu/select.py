"""Triton kernels of :mod:`qgnn.kernels.select`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..packing import row_bytes
from .common import (
    EXACT,
    LAYOUT_FIRSTS,
    LAYOUT_SIGNATURE,
    OUT_FIRSTS,
    OUT_SIGNATURE,
    TILE,
    CompileCase,
    _load_codes,
    _places,
    _row_address,
    empty_packed,
    launch,
    layout_arguments,
    tile_blocks,
)


@triton.jit(do_not_specialize=["R", *LAYOUT_FIRSTS])
def _select_rows_kernel(
    p_value,  # [R, F]
    p_data,  # [bytes]
    p_step,  # [N]
    p_pos,  # [N] or None
    p_index,  # [R] int64
    R, F,
    first_4, first_2, first_1, first_0, start_4, start_2, start_1, stride_8, stride_4, stride_2, stride_1,
    SIGNED: tl.constexpr, CONTAINER: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """value[r] = step[index[r]] * code[index[r]] (NUMERICS 1)."""
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    m_r = o_r < R
    # [BLOCK_R, BLOCK_F]
    m = m_r[:, None] & (o_f < F)[None, :]
    b_index = tl.load(p_index + o_r, mask=m_r, other=0)
    b_container, b_address = _row_address(
        _places(p_pos, b_index, m_r), first_4, first_2, first_1, first_0, start_4, start_2, start_1,
        stride_8, stride_4, stride_2, stride_1, CONTAINER,
    )  # fmt: skip
    b_code = _load_codes(p_data, b_container, b_address, m, o_f, SIGNED)
    b_step = tl.load(p_step + b_index, mask=m_r, other=0.0)[:, None]
    tl.store(p_value + o_r.to(tl.int64)[:, None] * F + o_f[None, :], b_step * b_code.to(tl.float32), mask=m)


@triton.jit(do_not_specialize=["R", *LAYOUT_FIRSTS, *OUT_FIRSTS])
def _select_codes_kernel(
    p_out,  # [bytes]
    p_data,  # [bytes]
    p_pos,  # [N] or None
    p_index,  # [R] int64
    p_out_pos,  # [R] or None
    R,
    first_4, first_2, first_1, first_0, start_4, start_2, start_1, stride_8, stride_4, stride_2, stride_1,
    out_first_4, out_first_2, out_first_1, out_first_0, out_start_4, out_start_2, out_start_1,
    out_stride_8, out_stride_4, out_stride_2, out_stride_1,
    CONTAINER: tl.constexpr, OUT_CONTAINER: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Copies row index[r] to row r of the result."""
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    m_r = o_r < R
    b_index = tl.load(p_index + o_r, mask=m_r, other=0)
    b_container, b_from = _row_address(
        _places(p_pos, b_index, m_r), first_4, first_2, first_1, first_0, start_4, start_2, start_1,
        stride_8, stride_4, stride_2, stride_1, CONTAINER,
    )  # fmt: skip
    _, b_to = _row_address(
        _places(p_out_pos, o_r, m_r), out_first_4, out_first_2, out_first_1, out_first_0, out_start_4, out_start_2,
        out_start_1, out_stride_8, out_stride_4, out_stride_2, out_stride_1, OUT_CONTAINER,
    )  # fmt: skip
    b_narrow = tl.where(b_container == 2, stride_2, tl.where(b_container == 1, stride_1, 0))
    b_stride = tl.where(b_container == 8, stride_8, tl.where(b_container == 4, stride_4, b_narrow))
    # [BLOCK_R, BLOCK_B]
    m = m_r[:, None] & (o_b[None, :] < b_stride[:, None])
    b_bytes = tl.load(p_data + b_from[:, None] + o_b[None, :], mask=m, other=0)
    tl.store(p_out + b_to[:, None] + o_b[None, :], b_bytes, mask=m)


def select_rows(
    data: Tensor, step: Tensor, pos: Tensor | None, counts: Sequence[int], index: Tensor, features: int, signed: bool
) -> Tensor:  # fmt: skip
    """:func:`qgnn.kernels.select.select_rows`."""
    value = torch.empty(index.numel(), features, dtype=torch.float32, device=index.device)
    if value.numel():
        blocks = tile_blocks(features)
        grid = (triton.cdiv(index.numel(), blocks["BLOCK_R"]), triton.cdiv(features, blocks["BLOCK_F"]))
        launch(
            _select_rows_kernel, grid,
            p_value=value, p_data=data, p_step=step.contiguous(), p_pos=pos, p_index=index.contiguous(), R=index.numel(),
            F=features, SIGNED=signed, **layout_arguments(counts, features), **blocks, **EXACT,
        )  # fmt: skip
    return value


def select_codes(
    data: Tensor, pos: Tensor | None, counts: Sequence[int], index: Tensor, features: int, out_pos: Tensor | None,
    out_counts: Sequence[int],
) -> Tensor:  # fmt: skip
    """:func:`qgnn.kernels.select.select_codes`."""
    out = empty_packed(out_counts, features, index.device)
    layout, out_layout = layout_arguments(counts, features), layout_arguments(out_counts, features, "out_")
    container = layout["CONTAINER"]
    widest = row_bytes(8 if container is None else container, features)
    if out.numel() and widest:
        blocks = _copy_blocks(widest)
        grid = (triton.cdiv(index.numel(), blocks["BLOCK_R"]), triton.cdiv(widest, blocks["BLOCK_B"]))
        launch(
            _select_codes_kernel, grid,
            p_out=out, p_data=data, p_pos=pos, p_index=index.contiguous(), p_out_pos=out_pos, R=index.numel(), **layout,
            **out_layout, **blocks, **EXACT,
        )  # fmt: skip
    return out


def _copy_blocks(size: int) -> dict[str, int]:
    """Rows and bytes of a tile that copies rows of ``size`` bytes: 16 bytes a thread are one load."""
    block = min(max(triton.next_power_of_2(size), 16), 512)
    return {"BLOCK_R": 2 * TILE // block, "BLOCK_B": block}


_INDEX = {"p_index": "*i64", "R": "i32"}
_READ: dict[str, str] = {"p_data": "*u8", **_INDEX, **LAYOUT_SIGNATURE}
_CASES: list[tuple[str, Any, dict[str, str], dict[str, Any]]] = [
    ("select_rows, mixed rows", _select_rows_kernel,
     {"p_value": "*fp32", "p_step": "*fp32", "p_pos": "*i32", "F": "i32:16", **_READ},
     {"SIGNED": True, "CONTAINER": None, **tile_blocks(128)}),
    ("select_rows, int8", _select_rows_kernel, {"p_value": "*fp32", "p_step": "*fp32", "F": "i32:16", **_READ},
     {"SIGNED": True, "CONTAINER": 8, "p_pos": None, **tile_blocks(128)}),
    ("select_codes, mixed rows", _select_codes_kernel,
     {"p_out": "*u8", "p_pos": "*i32", "p_out_pos": "*i32", **_READ, **OUT_SIGNATURE},
     {"CONTAINER": None, "OUT_CONTAINER": None, **_copy_blocks(128)}),
    ("select_codes, int8", _select_codes_kernel, {"p_out": "*u8", **_READ, **OUT_SIGNATURE},
     {"CONTAINER": 8, "OUT_CONTAINER": 8, "p_pos": None, "p_out_pos": None, **_copy_blocks(128)}),
]  # fmt: skip

COMPILE_CASES = [CompileCase(*case, EXACT) for case in _CASES]
