"""Triton kernels of :mod:`qgnn.kernels.dropout`; the numbers, the formulas and the bits are stated there."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..random import threshold
from .common import EXACT, TILE, CompileCase, _cast, _pack, _unpack, check_dtype, launch
from .random import _words, seed_arguments


@triton.jit(do_not_specialize=["size", "least", "seed"])
def _dropout_fwd_kernel(
    p_out,  # [size]
    p_bits,  # [ceil(size / 8)]
    p_x,  # [size]
    size, factor, least, seed,
    STOCHASTIC: tl.constexpr, RELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """value = factor * x, or factor * max(x, 0), and 0 where the element's word is below ``least``; a bit where the gradient is 0."""
    # [BLOCK / 8, 8], a byte of bits a row; int64: features can have more elements than int32 counts
    o_byte = tl.program_id(0).to(tl.int64) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    o_x = o_byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    m = o_x < size
    b_x = tl.load(p_x + o_x, mask=m, other=0.0).to(tl.float32)
    if RELU:
        b_x = tl.where(b_x <= 0, 0.0, b_x)
    b_dropped = o_x < 0
    if STOCHASTIC:
        b_first, b_second = _words(seed, o_byte[:, None] * 4 + tl.arange(0, 4)[None, :])
        b_dropped = tl.interleave(b_first, b_second) < least.to(tl.uint32, bitcast=True)
    b_value = tl.where(b_dropped, 0.0, b_x * factor)
    if RELU:
        b_dropped = (b_value > 0) == 0
    tl.store(p_out + o_x, _cast(b_value, p_out), mask=m)
    tl.store(p_bits + o_byte[:, None], _pack((b_dropped & m).to(tl.int32), 1), mask=(o_byte * 8 < size)[:, None])


@triton.jit(do_not_specialize=["size"])
def _dropout_bwd_kernel(
    p_dx,  # [size]
    p_grad,  # [size]
    p_bits,  # [ceil(size / 8)]
    size, factor,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """factor * grad, and 0 where the bit is set."""
    o_byte = tl.program_id(0).to(tl.int64) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    # [BLOCK / 8, 8]
    o_x = o_byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    b_grad = tl.load(p_grad + o_x, mask=o_x < size, other=0.0).to(tl.float32)
    b_flags = _unpack(tl.load(p_bits + o_byte[:, None], mask=(o_byte * 8 < size)[:, None], other=0), 1, False)
    tl.store(p_dx + o_x, _cast(tl.where(b_flags != 0, 0.0, b_grad * factor), p_dx), mask=o_x < size)


def dropout(x: Tensor, p: float, seed: Tensor | None, relu: bool) -> tuple[Tensor, Tensor]:
    """:func:`qgnn.kernels.dropout.dropout` in one pass over ``x``."""
    check_dtype("x", x)
    size = x.numel()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    bits = torch.empty((size + 7) // 8, dtype=torch.uint8, device=x.device)
    if size:
        least = threshold(p)
        launch(
            _dropout_fwd_kernel, (triton.cdiv(size, TILE),),
            p_out=out, p_bits=bits, p_x=x.contiguous(), size=size, factor=1 / (1 - p),
            least=least - (1 << 32) if least >= 1 << 31 else least, **seed_arguments(-1 if seed is None else int(seed)),
            RELU=relu, BLOCK=TILE, **EXACT,
        )  # fmt: skip
    return out, bits


def dropout_backward(grad: Tensor, bits: Tensor, p: float) -> Tensor:
    """:func:`qgnn.kernels.dropout.dropout_backward` in one pass over ``grad``."""
    check_dtype("grad", grad)
    out = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    if size := grad.numel():
        launch(
            _dropout_bwd_kernel, (triton.cdiv(size, TILE),),
            p_dx=out, p_grad=grad.contiguous(), p_bits=bits, size=size, factor=1 / (1 - p), BLOCK=TILE, **EXACT,
        )  # fmt: skip
    return out


_FWD = {
    "p_out": "*fp32",
    "p_bits": "*u8",
    "p_x": "*fp32",
    "size": "i32",
    "factor": "fp32",
    "least": "i32",
    "seed": "i32",
}
_BWD = {"p_dx": "*fp32", "p_grad": "*fp32", "p_bits": "*u8", "size": "i32", "factor": "fp32"}
_CASES: list[tuple[str, Any, dict[str, str], dict[str, Any]]] = [
    ("dropout of a ReLU", _dropout_fwd_kernel, _FWD, {"STOCHASTIC": True, "RELU": True, "BLOCK": TILE}),
    ("dropout, bf16, many elements", _dropout_fwd_kernel,
     {**_FWD, "p_out": "*bf16", "p_x": "*bf16", "size": "i64"}, {"STOCHASTIC": True, "RELU": False, "BLOCK": TILE}),
    ("ReLU", _dropout_fwd_kernel, _FWD, {"STOCHASTIC": False, "RELU": True, "BLOCK": TILE}),
    ("dropout_backward", _dropout_bwd_kernel, _BWD, {"BLOCK": TILE}),
]  # fmt: skip

COMPILE_CASES = [CompileCase(*case, EXACT) for case in _CASES]
