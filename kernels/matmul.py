"""Packed integer matrix product (A2Q eq. 2; NUMERICS 7): X ``[N, K]`` with rows of mixed widths times W ``[K, M]`` with one container.

W is stored transposed, ``[M, K]`` packed rows (the contracted dimension is contiguous), signed. ``acc = sum_k (x_code - x_zero) * w_code`` in int32;
the caller has checked that it cannot overflow. The epilogue, in float32 and in this order, without fused multiply-add:

    v = float(acc) * row_scale[i] * col_scale[j];  v = v + bias[j];  v = max(v, 0)   (each factor only if given)

and then either ``v`` itself, or its codes with the column steps ``out_step`` and widths ``out_bits`` (:mod:`.quantize`, signed), packed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .backend import implementation
from .packing import bucket_starts, pack_reference, uniform_counts, unpack_reference
from .quantize import codes_reference

MATMUL_OUTPUTS = ("acc", "float", "packed")


def epilogue_reference(
    acc: Tensor, row_scale: Tensor | None, col_scale: Tensor | None, bias: Tensor | None, relu: bool
) -> Tensor:
    """The float part that the packed matmul and the packed aggregations share; float32."""
    v = acc.to(torch.float32)
    if row_scale is not None:
        v = v * row_scale.unsqueeze(1)
    if col_scale is not None:
        v = v * col_scale
    if bias is not None:
        v = v + bias
    return torch.clamp_min(v, 0) if relu else v


def matmul_packed_reference(
    x: Tensor, x_pos: Tensor | None, x_counts: Sequence[int], x_signed: bool, x_zero: int, w: Tensor, w_container: int, features: int, columns: int,
    output: str, row_scale: Tensor | None, col_scale: Tensor | None, bias: Tensor | None, relu: bool,
    out_step: Tensor | None, out_bits: Tensor | None,
    out_container: int,
) -> Tensor:  # fmt: skip
    x_codes = unpack_reference(x, x_pos, x_counts, features, x_signed) - x_zero
    w_codes = unpack_reference(w, None, uniform_counts(columns, w_container), features, True)
    acc = (x_codes.double() @ w_codes.double().t()).to(torch.int32)  # exact: |acc| < 2^31 < 2^53
    if output == "acc":
        return acc
    v = epilogue_reference(acc, row_scale, col_scale, bias, relu)
    if out_step is None or out_bits is None:
        return v
    codes, _ = codes_reference(v, out_step, out_bits, False, True)
    return pack_reference(codes, None, uniform_counts(codes.size(0), out_container))


@torch.library.custom_op("qgnn::matmul_packed", mutates_args=())
def matmul_packed(
    x: Tensor, x_pos: Tensor | None, x_counts: Sequence[int], x_signed: bool, x_zero: int, w: Tensor, w_container: int, features: int, columns: int,
    output: str, row_scale: Tensor | None, col_scale: Tensor | None, bias: Tensor | None, relu: bool,
    out_step: Tensor | None, out_bits: Tensor | None,
    out_container: int,
) -> Tensor:  # fmt: skip
    """``x``, ``x_pos``, ``x_counts``: packed rows ``[N, K]`` (:mod:`.packing`), ``K = features``; ``w``: packed ``[M, K]`` in
    ``w_container`` (4 or 8), ``M = columns``. ``output``: ``"acc"`` int32 ``[N, M]``, ``"float"`` float32 ``[N, M]``, or
    ``"packed"`` codes ``[N, M]`` in ``out_container``."""
    return implementation("matmul", "matmul_packed", matmul_packed_reference, x)(
        x, x_pos, x_counts, x_signed, x_zero, w, w_container, features, columns, output, row_scale, col_scale, bias, relu, out_step,
        out_bits, out_container
    )  # fmt: skip


@matmul_packed.register_fake
def _(
    x: Tensor, x_pos: Tensor | None, x_counts: Sequence[int], x_signed: bool, x_zero: int, w: Tensor, w_container: int, features: int, columns: int,
    output: str, row_scale: Tensor | None, col_scale: Tensor | None, bias: Tensor | None, relu: bool,
    out_step: Tensor | None, out_bits: Tensor | None,
    out_container: int,
) -> Tensor:  # fmt: skip
    n = sum(x_counts)
    if output == "packed":
        return x.new_empty(bucket_starts(uniform_counts(n, out_container), columns)[-1])
    return x.new_empty((n, columns), dtype=torch.int32 if output == "acc" else torch.float32)


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


@torch.library.custom_op("qgnn::matmul_transposed", mutates_args=())
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
