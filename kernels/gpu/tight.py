"""Triton functions of the tight layout of :mod:`qgnn.kernels.packing`; ``bits`` is a run-time argument."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tight_bytes(F, bits):
    """Bytes of a row of F codes: worked out here, as an argument whose divisibility changes with the width would compile a kernel anew."""
    return (F + 7) // 8 * bits


@triton.jit
def _store_tight(p_data, b_codes, bits, o_r, m_r, i_f, stride):
    """Packs a tile of codes (int32 ``[R, F]``, below ``2^bits``, 0 beyond the last feature; F a power of two of at least 8; ``i_f`` the tile's
    number along the features) into rows ``o_r`` of ``stride`` bytes."""
    GROUPS: tl.constexpr = b_codes.shape[1] // 8
    o_lane = tl.arange(0, 8)[None, None, :]
    # [R, GROUPS, 8]
    b_lanes = tl.reshape(b_codes, (b_codes.shape[0], GROUPS, 8)).to(tl.int64)
    b_words = tl.sum(b_lanes << (o_lane * bits).to(tl.int64), axis=2)
    b_bytes = (b_words[:, :, None] >> (8 * o_lane).to(tl.int64)).to(tl.uint8)
    o_byte = (i_f * GROUPS + tl.arange(0, GROUPS))[None, :, None] * bits + o_lane
    m = m_r[:, None, None] & (o_byte < stride) & (o_lane < bits)
    tl.store(p_data + o_r.to(tl.int64)[:, None, None] * stride + o_byte, b_bytes, mask=m)


@triton.jit
def _load_tight(p_data, o_r, o_f, m, bits, stride):
    """Codes (int32 ``[R, F]``) of the features ``o_f`` of the rows ``o_r`` of ``stride`` bytes, two byte loads for each: neighbours share them, so
    they hit the L1 cache."""
    o_bit = (o_f & 7) * bits
    o_byte = (o_f >> 3) * bits + (o_bit >> 3)
    p_byte = p_data + o_r.to(tl.int64)[:, None] * stride + o_byte[None, :]
    b_low = tl.load(p_byte, mask=m, other=0).to(tl.int32)
    # A code that ends in its first byte has no second one, and behind the last code of a buffer there is none.
    b_high = tl.load(p_byte + 1, mask=m & ((o_bit & 7) + bits > 8)[None, :], other=0).to(tl.int32)
    return ((b_low | b_high << 8) >> (o_bit & 7)[None, :]) & ((1 << bits) - 1)
