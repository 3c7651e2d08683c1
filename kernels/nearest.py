"""A2Q's Nearest Neighbor Strategy: each row takes the step and width of the group whose largest value is nearest to its own (A2Q
algorithm 1; NUMERICS 4).

Symbols: ``x`` is ``[N, F]``; ``m`` groups have ``step`` (float32) and ``bits`` (uint8, 0 to 8), both ``[m]``; ``q_max_j = step_j * Q_j`` with ``Q``
of :mod:`.quantize`; ``f_i = max_k |x_ik|``; ``group_i = argmin_j |f_i - q_max_j|``, the smallest ``j`` on ties.

No table of ``N x m`` distances: :func:`group_table` sorts ``q_max`` once and divides the line half-way between neighbours. Its ``bounds``
``[2^L - 1]``, ``2^L >= m``, ascend and are filled up with infinity, and ``order`` ``[m]`` says whose the stretches between them are:
``group_i = order[number of bounds below f_i]``, ``L`` comparisons a row and no arithmetic, so that every backend finds the same group.

Worked example, ``q_max = [4, 1, 2, 1]``. Sorted: 1, 1, 2, 4, of the groups 1, 1, 2, 0 (of equal ones the smallest index). Half-way lie 1, 1.5
and 3; a row of 3 is as near to 2 as to 4, and 4 belongs to the smaller index, so its stretch starts just below 3:
``bounds = [1, 1.5, 2.9999998]``, ``order = [1, 1, 2, 0]``.

Shapes and dtypes are checked by :mod:`qgnn.ops`, which states the errors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .backend import implementation, operation
from .packing import bucket_starts, pack_reference, uniform_counts
from .quantize import codes_reference, compute_dtype, fake_quantize_reference


def group_table(q_max: Tensor) -> tuple[Tensor, Tensor]:
    """``bounds`` (dtype of ``q_max``: float32 or float64) and ``order`` (int64). ``q_max`` ``[m]``, ``m`` at least 1, in any order.

    Distances are compared in float64. A ``q_max`` that is NaN counts as infinite: no finite row is near to it."""
    values, order = torch.sort(q_max.nan_to_num(nan=math.inf, posinf=math.inf), stable=True)
    order = order[torch.searchsorted(values, values)]
    middle = (values[:-1].double() + values[1:].double()) / 2
    bounds = middle.to(values.dtype)
    # A bound is the largest value of the lower stretch. On a tie, which only a representable middle can be, the index decides. Beside a
    # finite group, an infinite one has infinity alone.
    tie_goes_up = (bounds == middle) & ((order[1:] < order[:-1]) | middle.isinf())
    below = torch.nextafter(bounds, torch.full_like(bounds, -math.inf))
    bounds = torch.where((bounds > middle) | tie_goes_up, below, bounds)
    length = 2 ** (q_max.numel() - 1).bit_length() - 1
    return torch.nn.functional.pad(bounds, (0, length - bounds.numel()), value=math.inf), order


def nearest_group_reference(absmax: Tensor, bounds: Tensor, order: Tensor) -> Tensor:
    return order[torch.bucketize(absmax, bounds).masked_fill(absmax.isnan(), 0)]


@operation("qgnn::nearest_group")
def nearest_group(absmax: Tensor, bounds: Tensor, order: Tensor) -> Tensor:
    """``group`` (int64 ``[N]``) of rows whose largest magnitudes are ``absmax`` ``[N]``, in the dtype of ``bounds``.

    Infinity belongs to the largest ``q_max``, NaN to the smallest."""
    return implementation("nearest", "nearest_group", nearest_group_reference, absmax)(absmax, bounds, order)


@nearest_group.register_fake
def _(absmax: Tensor, bounds: Tensor, order: Tensor) -> Tensor:
    return order.new_empty(absmax.shape)


def _row_groups_reference(x: Tensor, bounds: Tensor, order: Tensor) -> Tensor:
    wide = x.to(compute_dtype(x))
    absmax = wide.abs().amax(1) if x.size(1) else wide.new_zeros(x.size(0))
    return nearest_group_reference(absmax, bounds, order)


def fake_quantize_nearest_reference(
    x: Tensor, bounds: Tensor, order: Tensor, step: Tensor, bits: Tensor, signed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    group = _row_groups_reference(x, bounds, order)
    out, clip, *_ = fake_quantize_reference(x, step[group], bits[group], True, signed, False)
    return out, clip, group


@operation("qgnn::fake_quantize_nearest")
def fake_quantize_nearest(
    x: Tensor, bounds: Tensor, order: Tensor, step: Tensor, bits: Tensor, signed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Group search and :func:`.quantize.fake_quantize` in one pass over ``x``.

    Returns ``step * code`` in the dtype of ``x`` (NaN stays NaN), the clip bits (uint8 ``[N, ceil(F / 8)]``) and ``group`` (int64 ``[N]``). A row
    with a NaN belongs to the smallest ``q_max``."""
    return implementation("nearest", "fake_quantize_nearest", fake_quantize_nearest_reference, x)(
        x, bounds, order, step, bits, signed
    )


@fake_quantize_nearest.register_fake
def _(
    x: Tensor, bounds: Tensor, order: Tensor, step: Tensor, bits: Tensor, signed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n, f = x.shape
    return x.new_empty((n, f)), x.new_empty((n, (f + 7) // 8), dtype=torch.uint8), order.new_empty(n)


def quantize_nearest_reference(
    x: Tensor, bounds: Tensor, order: Tensor, step: Tensor, bits: Tensor, signed: bool, container: int
) -> tuple[Tensor, Tensor, Tensor]:
    group = _row_groups_reference(x, bounds, order)
    codes, _ = codes_reference(x, step[group], bits[group], True, signed)
    return pack_reference(codes, None, uniform_counts(x.size(0), container)), step[group], group


@operation("qgnn::quantize_nearest")
def quantize_nearest(
    x: Tensor, bounds: Tensor, order: Tensor, step: Tensor, bits: Tensor, signed: bool, container: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Group search and packing in one pass over ``x``, whose values are finite, for inference on rows never seen before.

    Every row takes the same ``container``, wide enough for all groups, so that where a row lies does not depend on its group. Returns the codes
    (uint8, ``uniform_counts(N, container)`` of :mod:`.packing`), the rows' steps (float32 ``[N]``) and ``group`` (int64 ``[N]``)."""
    return implementation("nearest", "quantize_nearest", quantize_nearest_reference, x)(
        x, bounds, order, step, bits, signed, container
    )


@quantize_nearest.register_fake
def _(
    x: Tensor, bounds: Tensor, order: Tensor, step: Tensor, bits: Tensor, signed: bool, container: int
) -> tuple[Tensor, Tensor, Tensor]:
    n, f = x.shape
    data = x.new_empty(bucket_starts(uniform_counts(n, container), f)[-1], dtype=torch.uint8)
    return data, step.new_empty(n), order.new_empty(n)


def group_sums_reference(group: Tensor, a: Tensor, b: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    return a.new_zeros(groups).index_add(0, group, a), b.new_zeros(groups).index_add(0, group, b)


@operation("qgnn::group_sums")
def group_sums(group: Tensor, a: Tensor, b: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Sums of ``a`` and of ``b`` (float32 or float64 ``[N]``) over the rows of each group, ``[groups]``: what a group learns from the nodes that
    used it. Groups that nobody used get 0. Two runs give the same bits."""
    return implementation("nearest", "group_sums", group_sums_reference, a)(group, a, b, groups)


@group_sums.register_fake
def _(group: Tensor, a: Tensor, b: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    return a.new_empty(groups), b.new_empty(groups)
