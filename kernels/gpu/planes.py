"""Weights as the packed matmul (:mod:`.matmul`) multiplies them: int8, in the order in which codes are taken out of the bytes of X.

A byte of X holds ``L = 8 / c`` codes of ``c`` bits. Taking code ``p`` out of every byte of a row is a shift and a mask, and gives the codes ``p``,
``L + p``, ``2 L + p``, …: plane ``p``. Laying the codes of a byte out side by side would instead move bytes between threads. A sum has no order, so
the product multiplies plane by plane, and the weights are laid out to fit, for each container that rows of X have.

Worked example, the weights ``w0 … w5`` of one column and X of 4 bits: plane 0 holds ``w0 w2 w4``, plane 1 ``w1 w3 w5``, each followed by zeros to a
multiple of 128 bytes; so no load of W, and no product behind the end of a row of X, needs a mask. Where rows of X differ, the one plane for 8 bits
comes first, then the 2 for 4 bits, the 4 for 2 bits and the 8 for 1 bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..packing import row_bytes
from .common import CompileCase, _load_codes, launch

PLANE = 128
"""A plane is padded to a multiple of so many bytes: the most that the product contracts in one step."""

BLOCK_M = 16
"""Columns of W that one program lays out."""


@triton.jit
def _plane_bytes(K, LANES):
    """Bytes of a plane, for rows of X with ``LANES`` codes in a byte."""
    return tl.cdiv(K, LANES * 128) * 128


@triton.jit
def _planes_start(K, LANES: tl.constexpr):
    """First byte of the planes for ``LANES`` codes in a byte, where W has the planes for all containers."""
    start = 0
    if LANES > 1:
        start += _plane_bytes(K, 1)
    if LANES > 2:
        start += 2 * _plane_bytes(K, 2)
    if LANES > 4:
        start += 4 * _plane_bytes(K, 4)
    return start


@triton.jit
def _planes_kernel(
    p_planes,  # int8 [M, stride_planes]
    p_sum,  # int32 [M]
    p_w,  # packed [M, K]
    M, K, stride_w, stride_planes, LANES: tl.constexpr, W_CONTAINER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """planes[j, plane, b] = w[j, b * L + p]; sum[j] = sum_k w[j, k]. ``LANES`` is 0 where X has all containers."""
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M
    i_plane = tl.program_id(1)
    lanes, start = LANES, 0
    if LANES == 0:  # planes L - 1 to 2 L - 2 are those of L codes in a byte
        lanes = tl.where(i_plane < 1, 1, tl.where(i_plane < 3, 2, tl.where(i_plane < 7, 4, 8)))
        start = tl.where(
            i_plane < 3, _planes_start(K, 2), tl.where(i_plane < 7, _planes_start(K, 4), _planes_start(K, 8))
        )
        start = tl.where(i_plane < 1, 0, start)
        i_plane -= lanes - 1
    b_container = tl.full((BLOCK_M,), W_CONTAINER, tl.int32)
    p_plane = p_planes + o_m * stride_planes + start + i_plane * _plane_bytes(K, lanes)
    for i_b in range(0, _plane_bytes(K, lanes), BLOCK_B):
        o_b = i_b + tl.arange(0, BLOCK_B)
        o_k = o_b * lanes + i_plane
        # [M, B]
        m_code = m_m[:, None] & (o_k < K)[None, :]
        b_code = tl.where(m_code, _load_codes(p_w, b_container, o_m * stride_w, m_code, o_k, True), 0)
        tl.store(p_plane[:, None] + o_b[None, :], b_code.to(tl.int8), mask=m_m[:, None])
    if tl.program_id(1) == 0:
        b_sum = tl.zeros((BLOCK_M, BLOCK_B), tl.int32)
        for i_k in range(0, K, BLOCK_B):
            o_k = i_k + tl.arange(0, BLOCK_B)
            m_code = m_m[:, None] & (o_k < K)[None, :]
            b_sum += tl.where(m_code, _load_codes(p_w, b_container, o_m * stride_w, m_code, o_k, True), 0)
        tl.store(p_sum + o_m, tl.sum(b_sum, axis=1), mask=m_m)


@cache
def planes_of(
    container: int | None, w_container: int, columns: int, features: int
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Gives, of packed weights, the planes for rows of X in ``container`` (None: in all), int8 ``[M, bytes]``, and the sums of the columns, int32
    ``[M]``. One function for the same arguments, as :func:`.segments.kept` wants."""
    containers = (8, 4, 2, 1) if container is None else (container or 8,)
    size = sum(8 // c * triton.cdiv(features * c, 8 * PLANE) * PLANE for c in containers)

    def planes(w: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.empty(columns, size, dtype=torch.int8, device=w.device)
        total = torch.empty(columns, dtype=torch.int32, device=w.device)
        launch(
            _planes_kernel, (triton.cdiv(columns, BLOCK_M), sum(8 // c for c in containers)),
            p_planes=out, p_sum=total, p_w=w, M=columns, K=features, stride_w=row_bytes(w_container, features), stride_planes=size,
            LANES=0 if container is None else 8 // (container or 8), W_CONTAINER=w_container, BLOCK_M=BLOCK_M, BLOCK_B=PLANE, num_warps=4,
        )  # fmt: skip
        return out, total

    return planes


COMPILE_CASES = [
    CompileCase(
        "planes_4_mixed", _planes_kernel,
        {"p_planes": "*i8", "p_sum": "*i32", "p_w": "*u8", **dict.fromkeys(["M", "K", "stride_w", "stride_planes"], "i32:16")},
        {"LANES": 0, "W_CONTAINER": 4, "BLOCK_M": BLOCK_M, "BLOCK_B": PLANE},
    )
]  # fmt: skip
