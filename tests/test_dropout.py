import math

import pytest
import torch

from qgnn.kernels import dropout as kernels
from qgnn.kernels.backend import current_backend
from qgnn.kernels.random import philox_reference, threshold

from .assertions import assert_bitwise

SHAPES = [(0,), (1,), (7,), (16,), (5, 33), (40, 26), (3, 700)]
seeds = pytest.mark.parametrize("seed", [None, 5, 2**31 + 7], ids=str)
both = pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])


def problem(shape, device, dtype=torch.float32):
    """Both signs, zeros, infinities and NaN."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    x = torch.randn(shape, generator=generator)
    kind = torch.randint(0, 12, shape, generator=generator)
    for index, value in enumerate((0.0, -0.0, math.nan, math.inf, -math.inf)):
        x = torch.where(kind == index, value, x)
    return x.to(dtype).to(device)


def agree(x, p, seed, relu):
    word = None if seed is None else torch.tensor(seed)
    values, bits = kernels.dropout(x, p, word, relu)
    expected, expected_bits = kernels.dropout_reference(x, p, word, relu)
    assert_bitwise(values, expected, "values")
    assert_bitwise(bits, expected_bits, "bits")
    assert bits.numel() == -(-x.numel() // 8)
    grad = problem(x.shape, x.device, x.dtype).flip(0)
    assert_bitwise(kernels.dropout_backward(grad, bits, p), kernels.dropout_backward_reference(grad, bits, p), "grad")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@seeds
@both
def test_agrees_with_the_reference(backend, shape, seed, relu):
    agree(problem(shape, backend), 0.0 if seed is None else 0.3, seed, relu)


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(backend, dtype, relu):
    x = problem((5, 21), backend, dtype)
    if dtype == torch.float64 and current_backend(x.device.type) == "triton":
        with pytest.raises(TypeError, match="float64; the Triton kernels take"):
            kernels.dropout(x, 0.4, torch.tensor(3), relu)
    else:
        agree(x, 0.4, 3, relu)


def test_non_contiguous(backend):
    agree(problem((12, 34), backend)[::2, 1::3], 0.6, 9, True)


@both
def test_threads_agree(threads, relu):
    x = problem((4000, 65), "cpu")
    for count in (1, 2):
        threads(count)
        agree(x, 0.5, 11, relu)


def test_hand_computed(backend):
    """Elements 2 c and 2 c + 1 have the first and the second word of counter c, and p = 1/4 drops words below 2^30."""
    words = torch.stack(philox_reference(6, torch.arange(5)), 1).flatten()[:9]
    kept = (words >= 2**30).tolist()
    assert 0 < sum(kept) < 9
    x = torch.tensor([3.0, -3.0, 0.0, 6.0, 6.0, -6.0, 9.0, 9.0, 9.0], device=backend)
    for relu in (False, True):
        values, bits = kernels.dropout(x, 0.25, torch.tensor(6), relu)
        expected = [4 * v / 3 if k and (v > 0 or not relu) else 0.0 for v, k in zip(x.tolist(), kept, strict=True)]
        assert values.tolist() == pytest.approx(expected, rel=1e-6)
        flags = [not k or (relu and v <= 0) for v, k in zip(x.tolist(), kept, strict=True)]
        assert bits.tolist() == [sum(f << e for e, f in enumerate(flags[:8])), int(flags[8])]


@pytest.mark.parametrize("p", [0.01, 0.5, 0.8])
def test_as_many_are_dropped_as_the_chance_says(p):
    """Hoeffding: of n independent elements, the share of those dropped is beyond t of its expectation with a chance of at most 2 exp(-2 n t^2), 1e-9
    here; the chance itself is p to within 2^-33."""
    n = 1 << 20
    for seed in (0, 2**32 - 1):
        values, _ = kernels.dropout(torch.ones(n), p, torch.tensor(seed), False)
        assert abs((values == 0).double().mean().item() - p) < math.sqrt(21.5 / (2 * n)) + 2.0**-33
        assert values.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)], rel=1e-6)
    assert not torch.equal(*(kernels.dropout(torch.ones(99), p, torch.tensor(s), False)[0] for s in (1, 10)))


def test_a_chance_near_1_drops_nearly_all():
    assert threshold(1 - 2.0**-40) == 2**32 - 1
    assert not kernels.dropout(torch.ones(4096), 1 - 2.0**-40, torch.tensor(1), False)[0].any()


def test_opcheck(backend):
    x = torch.rand(5, 19, device=backend)
    for seed in (None, torch.tensor(4)):
        torch.library.opcheck(kernels.dropout, (x, 0.0 if seed is None else 0.5, seed, True))
    _, bits = kernels.dropout(x, 0.5, torch.tensor(4), True)
    torch.library.opcheck(kernels.dropout_backward, (x, bits, 0.5))
