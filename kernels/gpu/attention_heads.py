"""What the Triton kernels of graph attention share: tiles over heads and channels, the score of an edge, and the online softmax."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .segments import _load_slot


def head_tile(heads: int, channels: int) -> dict[str, int]:
    """Sizes of a tile ``[rows or edges, heads, channels]``: the 2048 elements of :func:`.segments.float_tile`, and half of that where a thread loads
    single channels: compiled for sm_90, the forward kernel of 8 heads of 7 then takes 96 registers, and 184 with 2048."""
    vector = math.gcd(channels, 16)
    elements = 2048 if vector >= 4 else 1024
    block_c = min(triton.next_power_of_2(max(channels, 1)), 128)
    block_h = min(triton.next_power_of_2(max(heads, 1)), 128 // block_c)
    return {
        "H": heads, "C_VECTORS": channels // vector, "VECTOR": vector,
        "BLOCK_R": min(32, elements // (block_h * block_c)), "BLOCK_E": min(128, elements // (block_h * block_c)),
        "BLOCK_H": block_h, "BLOCK_C": block_c,
    }  # fmt: skip


def head_blocks(tile: dict[str, int]) -> int:
    """Blocks of heads times blocks of channels, which run fastest; one of these even without channels: heads have their softmax all the same."""
    channels = tile["C_VECTORS"] * tile["VECTOR"]
    return triton.cdiv(tile["H"], tile["BLOCK_H"]) * max(triton.cdiv(channels, tile["BLOCK_C"]), 1)


@triton.jit
def _heads_of_program(H, C, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr):
    """Heads, their mask, channels, their mask, and the number of the block of channels, of a program on grid axis 1."""
    c_blocks = tl.maximum(tl.cdiv(C, BLOCK_C), 1)
    i_c = tl.program_id(1) % c_blocks
    o_h = (tl.program_id(1) // c_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    return o_h, o_h < H, o_c, o_c < C, i_c


@triton.jit
def _of_heads(p_values, b_row, m_row, o_h, m_h, H):
    """float32 ``[R, H]`` of the rows ``b_row`` (of nodes or edges)."""
    o_tile = b_row.to(tl.int64)[:, None] * H + o_h[None, :]
    return tl.load(p_values + o_tile, mask=m_row[:, None] & m_h[None, :], other=0).to(tl.float32)


@triton.jit
def _of_channels(p_x, b_row, m_row, o_h, m_h, o_c, m_c, H, C):
    """float32 ``[R, H, C]`` of the rows ``b_row``."""
    o_tile = (b_row.to(tl.int64)[:, None] * H + o_h[None, :])[:, :, None] * C + o_c[None, None, :]
    m_tile = (m_row[:, None] & m_h[None, :])[:, :, None] & m_c[None, None, :]
    return tl.load(p_x + o_tile, mask=m_tile, other=0).to(tl.float32)


@triton.jit
def _raw_scores(p_src, p_edge_score, b_dst, b_source, b_edge, m_edge, o_h, m_h, H):
    """``[E, H]``: ``src + dst + edge_score``, or ``edge_score`` alone where ``p_src`` is None."""
    if p_src is None:
        return _of_heads(p_edge_score, b_edge, m_edge, o_h, m_h, H)
    else:
        b_raw = _of_heads(p_src, b_source, m_edge, o_h, m_h, H) + b_dst
        if p_edge_score is not None:
            b_raw += _of_heads(p_edge_score, b_edge, m_edge, o_h, m_h, H)
        return b_raw


LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
"""The maximum of no edge. Finite, so that scores of -inf are below it and weigh exp(-inf - LOWEST) = 0."""


@triton.jit
def _no_edges(LANES: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr):
    """Maximum, sum of exponentials, and weighted sum of each lane at the start."""
    b_tops = tl.full((LANES, BLOCK_H), LOWEST, tl.float32)
    return b_tops, tl.zeros((LANES, BLOCK_H), tl.float32), tl.zeros((LANES, BLOCK_H, BLOCK_C), tl.float32)


@triton.jit
def _fold_scores(b_top, b_total, b_raw, m_edge, negative_slope):
    """Takes one more score into the maximum and sum of each lane ``[E, H]``; also what to multiply the sums so far by, and the weight of the edge."""
    b_score = tl.where(b_raw > 0, b_raw, negative_slope * b_raw)
    b_score = tl.where(m_edge[:, None], b_score, -float("inf"))
    b_new = tl.where(b_score > b_top, b_score, b_top)  # NaN stays out of the maximum, and goes into the sum
    b_keep, b_p = tl.exp(b_top - b_new), tl.exp(b_score - b_new)
    return b_new, b_total * b_keep + b_p, b_keep, b_p


@triton.jit
def _merge_lanes(b_top, b_total, b_acc):
    """One lane, ``[1, H]`` and ``[1, H, C]``."""
    b_new = tl.max(b_top, axis=0)[None, :]
    b_keep = tl.exp(b_top - b_new)
    b_acc = tl.sum(b_acc * b_keep[:, :, None], axis=0)[None, :, :]
    return b_new, tl.sum(b_total * b_keep, axis=0)[None, :], b_acc


@triton.jit
def _float_slot(p_slots, i_slot, o_f, m_f, F):
    return _load_slot(p_slots, i_slot, o_f, m_f, F).to(tl.float32, bitcast=True)


@triton.jit
def _merge_slots(p_top_slots, p_total_slots, p_slots, i_first, i_end, b_acc, o_h, m_h, o_f, m_f, H, F):
    """One lane again, in the order of the slots; ``b_acc`` gives the shape of the sum, which stays 0 without ``p_slots``."""
    b_top = tl.full((1, o_h.shape[0]), LOWEST, tl.float32)
    b_total = tl.zeros_like(b_top)
    b_sum = tl.zeros_like(b_acc)
    for i_slot in range(i_first, i_end):
        b_other = _float_slot(p_top_slots, i_slot, o_h, m_h, H)
        b_new = tl.maximum(b_top, b_other)
        b_keep, b_factor = tl.exp(b_top - b_new), tl.exp(b_other - b_new)
        b_total = b_total * b_keep + _float_slot(p_total_slots, i_slot, o_h, m_h, H) * b_factor
        if p_slots is not None:
            b_sum = b_sum * b_keep[:, :, None] + _float_slot(p_slots, i_slot, o_f, m_f, F) * b_factor[:, :, None]
        b_top = b_new
    return b_top, b_total, b_sum
