import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qgnn.kernels.percentile import LARGEST, tails, tails_reference
from qgnn.quant.qat import value_range

from .assertions import assert_bitwise

NAN, INF = float("nan"), float("inf")


def values(kind, n, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, generator=generator)
    if kind == "relu":
        x = x.relu()
    elif kind == "equal":
        x = torch.full((n,), -1.5)
    elif kind == "any bits":  # subnormals, infinities and NaN of both signs among them
        x = torch.randint(-(2**31), 2**31, (n,), generator=generator).to(torch.int32).view(torch.float32)
        x[torch.arange(n)[::3]] = torch.tensor([-INF, INF, -NAN, NAN, 0.0, -0.0])[torch.arange(n)[::3] % 6]
    elif kind == "last bits":  # only the last digit of the search tells them apart
        x = (torch.randint(0, 99, (n,), generator=generator).to(torch.int32) + 0x3F800000).view(torch.float32)
    return x.to(device)


def check(x, k):
    low, high = tails(x, k)
    expected = tails_reference(x, k)
    assert_bitwise(low, expected[0], "low")
    assert_bitwise(high, expected[1], "high")


def test_hand_computed(backend):
    x = torch.tensor([31.0, -12.0, 38.0, 15.0, -33.0], device=backend)
    assert [tuple(map(float, tails(x, k))) for k in range(5)] == [(-33, 38), (-12, 31), (15, 15), (31, -12), (38, -33)]


@pytest.mark.parametrize("kind", ["normal", "relu", "equal", "any bits", "last bits"])
@pytest.mark.parametrize("n", [1, 2, 255, 2100])
def test_agrees_with_sorting(backend, kind, n):
    x = values(kind, n, backend)
    for k in sorted({0, n // 100, n - 1}):
        check(x, k)


def test_programs_that_take_several_tiles(backend, monkeypatch):
    monkeypatch.setattr("qgnn.kernels.gpu.percentile.PROGRAMS", 2)
    monkeypatch.setattr("qgnn.kernels.gpu.percentile.BLOCK", 256)
    check(values("relu", 1300, backend), 13)


def test_nan_is_above_infinity(backend):
    x = torch.tensor([NAN, 1.0, -NAN, INF, -INF], device=backend)
    # torch's negative NaN has its sign bit set: read as an integer it would come first
    x[2] = torch.tensor(-0x400000, dtype=torch.int32).view(torch.float32)
    low, high = zip(*(tails(x, k) for k in range(5)), strict=True)
    assert_bitwise(torch.stack(low), torch.tensor([-INF, 1.0, INF, NAN, NAN]))
    assert_bitwise(torch.stack(high), torch.tensor([NAN, NAN, INF, 1.0, -INF]))


def test_not_contiguous(backend):
    x = values("normal", 3000, backend)
    check(x[::3], 7)
    check(x.view(30, 100).t()[3], 7)


def test_whatever_the_default_dtype(backend, float64_by_default):
    check(values("normal", 300, backend).float(), 7)


def test_the_last_tile_fits_int32():
    gpu = pytest.importorskip("qgnn.kernels.gpu.percentile")
    assert LARGEST + gpu.BLOCK - 1 < 2**31


def test_zeros_keep_their_order(backend):
    """-0 is below 0: the same bits from every backend, where sorting leaves it open."""
    x = torch.tensor([0.0, -0.0, 0.0, -0.0], device=backend)
    signs = [[bool(torch.signbit(v)) for v in tails(x, k)] for k in range(4)]
    assert signs == [[True, False], [True, False], [False, True], [False, True]]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data(), st.lists(st.floats(width=32), min_size=1, max_size=200))
def test_any_values(data, items):
    check(torch.tensor(items), data.draw(st.integers(0, len(items) - 1)))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.data(), st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40))
def test_any_bits(data, items):
    x = torch.frombuffer(bytearray(struct.pack(f"{len(items)}I", *items)), dtype=torch.float32)
    check(x, data.draw(st.integers(0, len(items) - 1)))


@pytest.mark.parametrize("kind", ["normal", "relu", "equal", "any bits"])
def test_threads_agree(threads, kind):
    x = values(kind, 300_001)
    for count in (1, 2):
        threads(count)
        for k in (0, 3000, 150_000):
            check(x, k)


@pytest.mark.parametrize(
    ("x", "k", "error", "message"),
    [
        (torch.ones(3, dtype=torch.float64), 0, TypeError, "x must be float32"),
        (torch.ones(3, 1), 0, ValueError, "x must be 1-D"),
        (torch.ones(3), 3, ValueError, r"k must be in 0 \.\. 2"),
        (torch.ones(3), -1, ValueError, r"k must be in 0 \.\. 2"),
        (torch.ones(0), 0, ValueError, "for 0 values"),
    ],
)
def test_errors(x, k, error, message):
    with pytest.raises(error, match=message):
        tails(x, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_value_range_clips_both_tails(backend, dtype):
    x = values("normal", 4000).view(40, 100).to(dtype).to(backend)
    ordered = x.flatten().sort().values
    low, high = value_range(x.requires_grad_(), 0.01, 1.0)
    assert low.shape == high.shape == () and not low.requires_grad
    assert_bitwise(low.float(), ordered[40].float())
    assert_bitwise(high.float(), ordered[-41].float())
    assert [float(v) for v in value_range(x, 0.0, 1.0)] == [float(ordered[0]), float(ordered[-1])]


def test_value_range_of_a_sample():
    """Of a tenth of the values 0 .. 9999, half clipped at each end: close to the median, and drawn anew each time."""
    x = torch.arange(10_000).float()
    torch.manual_seed(0)
    lows = {float(value_range(x, 0.5, 0.1)[0]) for _ in range(5)}
    # the median of 1,000 uniform draws deviates by 10000 / (2 sqrt(1000)) = 158; six of these, five times: chance 1e-8
    assert len(lows) > 1 and all(abs(low - 5000) < 950 for low in lows)


def test_opcheck(backend):
    torch.library.opcheck(tails, (values("normal", 50, backend), 3))


def test_compiles_whole():
    x = values("normal", 50)
    actual = torch.compile(lambda x: tails(x, 3), backend="aot_eager", fullgraph=True)(x)
    for a, b in zip(actual, tails(x, 3), strict=True):
        assert_bitwise(a, b)
