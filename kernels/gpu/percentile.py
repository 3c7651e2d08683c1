"""Triton kernels of :mod:`qgnn.kernels.percentile`: 8 bits at a time, a launch each, then one for the result. What a launch finds in the histograms
of those before it, each of its programs works out for itself, so that nothing returns to the host."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import EXACT, CompileCase, check_dtype, launch

LEVELS = tl.constexpr(4)
DIGITS = tl.constexpr(256)
NEGATIVE_INFINITY = tl.constexpr(0x007FFFFF)
"""Its image before it is subtracted from all of them: NaN of either sign is then above infinity."""


@triton.jit
def _image(b_x):
    """Unsigned integer that is ordered like the float32, NaN above all."""
    b_bits = b_x.to(tl.uint32, bitcast=True)
    return tl.where(b_bits >> 31 != 0, b_bits ^ 0xFFFFFFFF, b_bits ^ 0x80000000) - NEGATIVE_INFINITY


@triton.jit
def _histogram_of(p_counts, i_end, LEVEL: tl.constexpr):
    """Both ends share the histogram of the first digit."""
    return p_counts + (0 if LEVEL == 0 else 2 * LEVEL - 1 + i_end) * DIGITS


@triton.jit
def _find(p_counts, i_end, rank, LEVEL: tl.constexpr):
    """The first ``LEVEL`` digits of the image that has this rank; scalar."""
    prefix = tl.full((), 0, tl.uint32)
    for i_level in tl.static_range(LEVEL):
        b_count = tl.load(_histogram_of(p_counts, i_end, i_level) + tl.arange(0, DIGITS))
        b_up_to = tl.cumsum(b_count, axis=0)
        digit = tl.sum((b_up_to <= rank).to(tl.int32), axis=0)
        rank -= tl.sum(tl.where(b_up_to <= rank, b_count, 0), axis=0)
        prefix = prefix * DIGITS + digit.to(tl.uint32)
    return prefix


@triton.jit(do_not_specialize=["k"])
def _tails_count_kernel(
    p_counts,  # [2 * LEVELS - 1, DIGITS]
    p_x,  # [N]
    N, k,
    LEVEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Histograms of digit LEVEL of the values that share the digits before it with the value of rank k, and of rank N - 1 - k."""
    low = _find(p_counts, 0, k, LEVEL)
    high = _find(p_counts, 1, N - 1 - k, LEVEL)
    b_low = tl.zeros((DIGITS,), tl.int32)
    b_high = tl.zeros((DIGITS,), tl.int32)
    o_x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    for _ in range(tl.program_id(0), tl.cdiv(N, BLOCK), tl.num_programs(0)):
        b_image = _image(tl.load(p_x + o_x, mask=o_x < N, other=0.0))
        b_digit = ((b_image >> (24 - 8 * LEVEL)) & 255).to(tl.int32)
        if LEVEL == 0:
            b_low += tl.histogram(b_digit, DIGITS, mask=o_x < N)
        else:
            b_before = b_image >> (32 - 8 * LEVEL)
            b_low += tl.histogram(b_digit, DIGITS, mask=(o_x < N) & (b_before == low))
            b_high += tl.histogram(b_digit, DIGITS, mask=(o_x < N) & (b_before == high))
        o_x += tl.num_programs(0) * BLOCK
    # Integers: the order in which programs add does not show.
    o_d = tl.arange(0, DIGITS)
    tl.atomic_add(_histogram_of(p_counts, 0, LEVEL) + o_d, b_low, mask=b_low > 0, sem="relaxed")
    if LEVEL > 0:
        tl.atomic_add(_histogram_of(p_counts, 1, LEVEL) + o_d, b_high, mask=b_high > 0, sem="relaxed")


@triton.jit(do_not_specialize=["N", "k"])
def _tails_result_kernel(
    p_low,  # [1]
    p_high,  # [1]
    p_counts,  # [2 * LEVELS - 1, DIGITS]
    N, k,
):  # fmt: skip
    """The values of the ranks k and N - 1 - k."""
    low = _find(p_counts, 0, k, LEVELS) + NEGATIVE_INFINITY
    high = _find(p_counts, 1, N - 1 - k, LEVELS) + NEGATIVE_INFINITY
    low = tl.where(low >> 31 != 0, low ^ 0x80000000, low ^ 0xFFFFFFFF)
    high = tl.where(high >> 31 != 0, high ^ 0x80000000, high ^ 0xFFFFFFFF)
    tl.store(p_low, low.to(tl.float32, bitcast=True))
    tl.store(p_high, high.to(tl.float32, bitcast=True))


BLOCK = 2048
"""Values of a tile, 16 a thread: compiled for sm_90 the kernel takes 48 registers, so that 10 programs share a multiprocessor."""

PROGRAMS = 512
"""Most programs of a launch, about four on each of an H100's 132 multiprocessors: each repeats the search in the histograms before it."""


def tails(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """:func:`qgnn.kernels.percentile.tails`."""
    check_dtype("x", x)
    x = x.contiguous()
    counts = torch.zeros(2 * LEVELS.value - 1, DIGITS.value, dtype=torch.int32, device=x.device)
    low, high = (torch.empty((), dtype=x.dtype, device=x.device) for _ in range(2))
    for level in range(LEVELS.value):
        launch(
            _tails_count_kernel, (min(triton.cdiv(x.numel(), BLOCK), PROGRAMS),),
            p_counts=counts, p_x=x, N=x.numel(), k=k, LEVEL=level, BLOCK=BLOCK, **EXACT,
        )  # fmt: skip
    launch(_tails_result_kernel, (1,), p_low=low, p_high=high, p_counts=counts, N=x.numel(), k=k, **EXACT)
    return low, high


_SIGNATURE = {"p_counts": "*i32", "p_x": "*fp32", "N": "i32:16", "k": "i32"}

COMPILE_CASES = [
    CompileCase("tails, first digit", _tails_count_kernel, _SIGNATURE, {"LEVEL": 0, "BLOCK": BLOCK}, EXACT),
    CompileCase("tails, last digit", _tails_count_kernel, _SIGNATURE, {"LEVEL": 3, "BLOCK": BLOCK}, EXACT),
    CompileCase(
        "tails, result",
        _tails_result_kernel,
        {"p_low": "*fp32", "p_high": "*fp32", "p_counts": "*i32", "N": "i32", "k": "i32"},
        {},
        EXACT,
    ),
]
