"""Triton kernel of :mod:`qgnn.kernels.binary`; shapes are stated there."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..packing import uniform_counts
from .common import (
    EXACT,
    LAYOUT_FIRSTS,
    LAYOUT_SIGNATURE,
    CompileCase,
    _store_codes,
    check_dtype,
    empty_packed,
    launch,
    layout_arguments,
    tile_blocks,
)


@triton.jit(do_not_specialize=["N", *LAYOUT_FIRSTS])
def _quantize_binary_kernel(
    p_data,  # [bytes]
    p_step,  # [N]
    p_valid,  # [N]
    p_x,  # [N, F]
    N, F, steps,
    first_4, first_2, first_1, first_0, start_4, start_2, start_1, stride_8, stride_4, stride_2, stride_1,
    CONTAINER: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """code = (x == step), step = max(x) or 1, valid = whether every x is 0 or that, and finite. The second look at a row finds it in a cache."""
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < N
    # Whole tiles go round the loops and are reduced once: Triton 3.6 fails to compile the reduction inside.
    b_tops = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    for i_f in range(steps):
        o_f = i_f * BLOCK_F + tl.arange(0, BLOCK_F)
        # [BLOCK_R, BLOCK_F]
        b_x = tl.load(
            p_x + o_r.to(tl.int64)[:, None] * F + o_f[None, :], mask=m_r[:, None] & (o_f < F)[None, :], other=0.0
        )
        b_tops = tl.maximum(b_tops, b_x)
    # [BLOCK_R]
    b_top = tl.max(b_tops, axis=1)
    b_step = tl.where(b_top > 0, b_top, 1.0)
    b_others = tl.zeros((BLOCK_R, BLOCK_F), tl.int32)
    for i_f in range(steps):
        o_f = i_f * BLOCK_F + tl.arange(0, BLOCK_F)
        b_x = tl.load(
            p_x + o_r.to(tl.int64)[:, None] * F + o_f[None, :], mask=m_r[:, None] & (o_f < F)[None, :], other=0.0
        )
        b_code = (b_x == b_step[:, None]).to(tl.int32)
        b_others |= (b_x != 0).to(tl.int32) - b_code
        _store_codes(
            p_data, None, b_code, o_r, m_r, i_f, first_4, first_2, first_1, first_0, start_4, start_2, start_1,
            stride_8, stride_4, stride_2, stride_1, CONTAINER,
        )  # fmt: skip
    tl.store(p_step + o_r, b_step, mask=m_r)
    tl.store(p_valid + o_r, (tl.max(b_others, axis=1) == 0) & (b_top < float("inf")), mask=m_r)


def quantize_binary(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`qgnn.kernels.binary.quantize_binary`."""
    check_dtype("x", x)
    n, features = x.shape
    counts = uniform_counts(n, 1)
    data = empty_packed(counts, features, x.device)
    step = torch.ones(n, dtype=torch.float32, device=x.device)
    valid = torch.ones(n, dtype=torch.bool, device=x.device)
    if x.numel():
        blocks = tile_blocks(features)
        launch(
            _quantize_binary_kernel, (triton.cdiv(n, blocks["BLOCK_R"]),),
            p_data=data, p_step=step, p_valid=valid, p_x=x.contiguous(), N=n, F=features,
            steps=triton.cdiv(features, blocks["BLOCK_F"]), **layout_arguments(counts, features), **blocks, **EXACT,
        )  # fmt: skip
    return data, step, valid


COMPILE_CASES = [
    CompileCase(
        "quantize_binary, long rows",
        _quantize_binary_kernel,
        {"p_data": "*u8", "p_step": "*fp32", "p_valid": "*i1", "p_x": "*fp32", "N": "i32", "F": "i32:16", "steps": "i32", **LAYOUT_SIGNATURE},
        {"CONTAINER": 1, **tile_blocks(1024)},
        EXACT,
    )
]  # fmt: skip
