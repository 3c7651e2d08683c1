"""Assertions of the operation tests: integers to the bit, floats within a bound that is derived."""

import torch
from torch import Tensor

EPSILON = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Largest relative error of one rounding."""


def assert_bitwise(actual: Tensor, expected: Tensor, what: str = "result") -> None:
    """Same shape, dtype and bits. NaN equals NaN, and the two zeros are equal."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    different = actual != expected
    if actual.is_floating_point():
        different &= ~(actual.isnan() & expected.isnan())
    if different.any():
        first = tuple(different.nonzero()[0].tolist())
        count, total = int(different.sum()), different.numel()
        raise AssertionError(
            f"{what}: {count} of {total} differ, first at {first}: {actual[first]}, expected {expected[first]}"
        )


def assert_sum(actual: Tensor, expected: Tensor, magnitude: Tensor, terms: int, what: str = "sum") -> None:
    """Two sums of the same terms, taken in different orders.

    Each of the ``terms`` additions, and the few operations that make a term, rounds once, relative to a partial sum
    that is at most ``magnitude``, the sum of the absolute terms. So each result is within ``(terms + 4) * eps *
    magnitude`` of the exact one (Higham, Accuracy and Stability of Numerical Algorithms, eq. 4.4), and the two are
    within twice that. Storing in half precision rounds each once more.
    """
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    computed = torch.float64 if actual.dtype == torch.float64 else torch.float32
    bound = 2 * (terms + 4) * EPSILON[computed] * magnitude.double().cpu()
    if actual.dtype != computed:
        bound = bound + 2 * EPSILON[actual.dtype] * expected.double().abs().cpu() + torch.finfo(actual.dtype).tiny
    error = (actual.double().cpu() - expected.double().cpu()).abs()
    bad = ~(error <= bound + 1e-37)  # the negation also catches NaN
    if bad.any():
        first = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.numel()} beyond rounding, first at {first}: {actual[first]}, "
            f"expected {expected[first]} within {bound[first]:.3g}"
        )
