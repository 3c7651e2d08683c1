"""Packed integer matrix product (A2Q eq. 2; NUMERICS 7): X ``[N, K]`` with rows of mixed widths times W ``[K, M]`` with one container.

W is stored transposed, ``[M, K]`` packed rows (the contracted dimension is contiguous), signed. ``acc = sum_k (x_code - x_zero) * w_code`` in int32;
the caller has checked that it cannot overflow.

The epilogue, which the packed product, the packed aggregation (:mod:`.aggregate`) and the packed attention (:mod:`.attention`) share, is float32, in
this order, without fused multiply-add, and each step only if its operand is given (``row_scale`` ``[N]``; ``col_scale``, ``bias``, ``post_scale``,
``post_shift`` ``[M]``; ``addend`` ``[N, M]``):

    v = float(acc);  v = v * row_scale[i];  v = v + self_scale * code[i, j]  (aggregation only);  v = v * col_scale[j];  v = v + bias[j];
    v = v + addend[i, j];  v = max(v, 0) if relu;  v = v * post_scale[j];  v = v + post_shift[j]

``output`` says what becomes of it: ``"acc"`` the int32 sums themselves, without an epilogue; ``"float"`` v; ``"rows"`` and ``"columns"`` the codes of
v (:mod:`.quantize`) with a step ``out_step`` (float32) and a width ``out_bits`` (uint8) per row or per column, packed where ``out_pos`` and
``out_counts`` say (:mod:`.packing`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .backend import implementation, operation
from .packing import empty_output, pack_reference, uniform_counts, unpack_reference
from .quantize import codes_reference


def epilogue_reference(
    acc: Tensor, row_scale: Tensor | None = None, own: Tensor | None = None, col_scale: Tensor | None = None, bias: Tensor | None = None,
    addend: Tensor | None = None, relu: bool = False, post_scale: Tensor | None = None, post_shift: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """v of the module's docstring, float32; ``own`` is ``self_scale * code`` ``[N, M]``."""
    v = acc.to(torch.float32)
    if row_scale is not None:
        v = v * row_scale.unsqueeze(1)
    if own is not None:
        v = v + own
    if col_scale is not None:
        v = v * col_scale
    for term in (bias, addend):
        if term is not None:
            v = v + term
    if relu:
        v = torch.clamp_min(v, 0)
    if post_scale is not None:
        v = v * post_scale
    return v if post_shift is None else v + post_shift


def output_reference(
    v: Tensor, output: str, out_step: Tensor | None, out_bits: Tensor | None, out_pos: Tensor | None, out_counts: Sequence[int], out_signed: bool
) -> Tensor:  # fmt: skip
    """What ``output`` (not ``"acc"``) makes of the epilogue's result."""
    if output == "float":
        return v
    assert out_step is not None and out_bits is not None
    codes, _ = codes_reference(v, out_step, out_bits, output == "rows", out_signed)
    return pack_reference(codes, out_pos, out_counts)


def matmul_packed_reference(
    x: Tensor, x_pos: Tensor | None, x_counts: Sequence[int], x_signed: bool, x_zero: int, w: Tensor, w_container: int, features: int, columns: int,
    output: str, row_scale: Tensor | None, col_scale: Tensor | None, bias: Tensor | None, addend: Tensor | None, relu: bool,
    post_scale: Tensor | None, post_shift: Tensor | None,
    out_step: Tensor | None, out_bits: Tensor | None, out_pos: Tensor | None, out_counts: Sequence[int], out_signed: bool,
) -> Tensor:  # fmt: skip
    x_codes = unpack_reference(x, x_pos, x_counts, features, x_signed) - x_zero
    w_codes = unpack_reference(w, None, uniform_counts(columns, w_container), features, True)
    acc = (x_codes.double() @ w_codes.double().t()).to(torch.int32)  # exact: |acc| < 2^31 < 2^53
    if output == "acc":
        return acc
    v = epilogue_reference(acc, row_scale, None, col_scale, bias, addend, relu, post_scale, post_shift)
    return output_reference(v, output, out_step, out_bits, out_pos, out_counts, out_signed)


@operation("qgnn::matmul_packed")
def matmul_packed(
    x: Tensor, x_pos: Tensor | None, x_counts: Sequence[int], x_signed: bool, x_zero: int, w: Tensor, w_container: int, features: int, columns: int,
    output: str, row_scale: Tensor | None, col_scale: Tensor | None, bias: Tensor | None, addend: Tensor | None, relu: bool,
    post_scale: Tensor | None, post_shift: Tensor | None,
    out_step: Tensor | None, out_bits: Tensor | None, out_pos: Tensor | None, out_counts: Sequence[int], out_signed: bool,
) -> Tensor:  # fmt: skip
    """``x``, ``x_pos``, ``x_counts``: packed rows ``[N, K]`` (:mod:`.packing`), ``K = features``; ``w``: packed ``[M, K]`` in
    ``w_container`` (4 or 8), ``M = columns``. ``output``: ``"acc"`` int32 ``[N, M]``, ``"float"`` float32 ``[N, M]``, ``"rows"``, or ``"columns"``:
    all rows in one container and signed (``out_pos`` None, ``out_counts = uniform_counts(N, container)``)."""
    return implementation("matmul", "matmul_packed", matmul_packed_reference, x)(
        x, x_pos, x_counts, x_signed, x_zero, w, w_container, features, columns, output, row_scale, col_scale, bias, addend, relu, post_scale,
        post_shift, out_step, out_bits, out_pos, out_counts, out_signed,
    )  # fmt: skip


@matmul_packed.register_fake
def _(
    x: Tensor, x_pos: Tensor | None, x_counts: Sequence[int], x_signed: bool, x_zero: int, w: Tensor, w_container: int, features: int, columns: int,
    output: str, row_scale: Tensor | None, col_scale: Tensor | None, bias: Tensor | None, addend: Tensor | None, relu: bool,
    post_scale: Tensor | None, post_shift: Tensor | None,
    out_step: Tensor | None, out_bits: Tensor | None, out_pos: Tensor | None, out_counts: Sequence[int], out_signed: bool,
) -> Tensor:  # fmt: skip
    return empty_output(x, output, sum(x_counts), columns, out_counts)


def matmul_transposed_reference(
    x: Tensor,
    pos: Tensor | None,
    counts: Sequence[int],
    signed: bool,
    zero: int,
    features: int,
    scale: Tensor,
    grad: Tensor,
) -> Tensor:
    codes = unpack_reference(x, pos, counts, features, signed) - zero
    return (scale.unsqueeze(1) * codes).t() @ grad


@operation("qgnn::matmul_transposed")
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
    """The weight gradient of training, ``(scale * (code - zero))^T @ grad``: packed rows ``[N, K]`` with a factor per row, float32
    ``grad`` ``[N, M]`` -> float32 ``[K, M]``. X is unpacked tile by tile, never whole."""
    return implementation("matmul", "matmul_transposed", matmul_transposed_reference, x)(
        x, pos, counts, signed, zero, features, scale, grad
    )


@matmul_transposed.register_fake
def _(
    x: Tensor,
    pos: Tensor | None,
    counts: Sequence[int],
    signed: bool,
    zero: int,
    features: int,
    scale: Tensor,
    grad: Tensor,
) -> Tensor:
    return grad.new_empty((features, grad.shape[1]))
