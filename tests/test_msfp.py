"""Microsoft floating point: values, packed bytes, stochastic rounding, and that every backend has the same bits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qgnn import ops, use_backend
from qgnn.kernels.cpu import msfp as numba_kernels
from qgnn.kernels.msfp import (
    BLOCK,
    msfp,
    msfp_pack,
    msfp_pack_reference,
    msfp_reference,
    msfp_unpack,
    msfp_unpack_reference,
)
from qgnn.kernels.random import NEAREST

from .assertions import assert_bitwise

MANTISSAS = range(3, 8)
SHAPES = [(0, 5), (4, 0), (5, 1), (7, 33), (6, 64), (3, 130)]


def problem(n, f, device="cpu", dtype=torch.float32):
    """Blocks of ordinary size, of zeros, of subnormals, of tiny and of huge values; neighbours far apart, ties, and values just below 2."""
    generator = torch.Generator().manual_seed(n * 1000 + f)
    x = torch.randn(n, f, generator=generator)
    tie = (torch.randint(-40, 40, (n, f), generator=generator) + 0.5) / 16
    kinds = [x * 1e-4, tie, torch.zeros(n, f), torch.sign(x) * 1.9999]
    kind = torch.randint(0, 8, (n, f), generator=generator)
    for index, values in enumerate(kinds):
        x = torch.where(kind == index, values, x)
    info = torch.finfo(dtype)
    smallest = info.tiny * info.eps
    sizes = [1.0, 1.0, 0.0, 8 * smallest, 3 * info.tiny, info.max / 8]
    choice = torch.randint(0, len(sizes), (n, -(-f // BLOCK)), generator=generator)
    scale = torch.tensor(sizes, dtype=torch.float64)[choice].repeat_interleave(BLOCK, 1)[:, :f]
    x = (x.clamp(-7, 7).double() * scale).to(dtype)
    if dtype == torch.bfloat16:  # Triton's interpreter reads its subnormals wrong: 0x0040, 2^-127, as 0
        x = torch.where(x.abs() < info.tiny, 0.0, x)
    return x.to(device)


def by_definition(x, m):
    """NUMERICS 6 for one value after the other, in Python's floats, which are exact here."""
    rows = []
    for row in x.tolist():
        out = []
        for first in range(0, len(row), BLOCK):
            block = row[first : first + BLOCK]
            top = max(map(abs, block))
            if top < 2.0**-126:  # zeros and subnormals
                out += [0.0] * len(block)
                continue
            unit = 2.0 ** (math.frexp(top)[1] - m)  # frexp's mantissa is below 1: its exponent is E - 126
            out += [math.copysign(min(round(abs(v) / unit), 2**m - 1) * unit, v) for v in block]
        rows.append(out)
    return torch.tensor(rows, dtype=torch.float64).float()


def test_hand_computed():
    # The example of the module's docstring, and a block with the unit 1: of the ties, 0.5 goes to 0 and 1.5 to 2; 7.75 is cut to 7.
    x = torch.zeros(1, 20)
    x[0, :4] = torch.tensor([1.0, 0.3, -0.1, 1.9])
    x[0, 16:] = torch.tensor([4.0, 0.5, -1.5, 7.75])
    values = msfp_reference(x, 3, NEAREST)
    assert values[0, :4].tolist() == [1.0, 0.25, 0.0, 1.75]
    assert values[0, 4:16].tolist() == [0.0] * 12
    assert values[0, 16:].tolist() == [4.0, 0.0, -2.0, 7.0]
    mantissas, exponents = msfp_pack_reference(x, 3, NEAREST)
    assert exponents.tolist() == [[127, 129]]
    assert bytes(mantissas[0].tolist()).hex(" ") == "14 78 00 00 00 00 00 00 04 7a 00 00 00 00 00 00"


@pytest.mark.parametrize("m", MANTISSAS)
def test_reference_follows_the_definition(m):
    x = problem(40, 77)
    assert_bitwise(msfp_reference(x, m, NEAREST), by_definition(x, m))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_reference(backend, shape, dtype):
    x = problem(*shape, backend, dtype)
    for m in MANTISSAS:
        for seed in (NEAREST, m, 2**32 - m):
            assert_bitwise(msfp(x, m, seed), msfp_reference(x, m, seed), "values")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packing(backend, shape, dtype):
    x = problem(*shape, backend, dtype)
    for m in MANTISSAS:
        seed = NEAREST if m % 2 else m
        mantissas, exponents = msfp_pack(x, m, seed)
        expected = msfp_pack_reference(x, m, seed)
        assert_bitwise(mantissas, expected[0], "codes")
        assert_bitwise(exponents, expected[1], "exponents")
        values = msfp_unpack(mantissas, exponents, m, x.size(1))
        assert_bitwise(values, msfp_unpack_reference(mantissas, exponents, m, x.size(1)), "unpacked")
        assert_bitwise(values, msfp(x.float(), m, seed), "unpacked, and the values at once")


def test_float64_is_rounded_to_float32_first():
    x = problem(5, 40).double() * (1 + 2.0**-30)
    x[0, 0] = 1e300
    expected = msfp_reference(x.float(), 4, NEAREST).double()
    assert expected[0, 0] == math.inf
    with use_backend("reference"):
        assert_bitwise(msfp(x, 4, NEAREST), expected)
    with use_backend("cpu"):
        assert_bitwise(msfp(x, 4, NEAREST), expected)
        for packed, wanted in zip(msfp_pack(x, 4, 3), msfp_pack(x.float(), 4, 3), strict=True):
            assert_bitwise(packed, wanted)
    with use_backend("triton"), pytest.raises(TypeError, match="use backend 'reference'"):
        msfp(x, 4, NEAREST)


@pytest.mark.parametrize("shape", [(12, 70), (32, 5)], ids=str)
def test_non_contiguous(backend, shape):
    x = problem(*shape, backend)
    x = x.t() if shape[1] == 5 else x[::2, 1::3]
    mantissas, exponents = msfp_pack(x, 5, 1)
    expected = msfp_pack_reference(x, 5, 1)
    assert_bitwise(msfp(x, 5, 1), msfp_reference(x.contiguous(), 5, 1))
    assert_bitwise(mantissas, expected[0])
    assert_bitwise(exponents, expected[1])
    apart = [torch.stack([t, t], 2)[:, :, 0] for t in (mantissas, exponents)]
    assert_bitwise(msfp_unpack(*apart, 5, x.size(1)), msfp(x, 5, 1))


# The interpreter's NumPy warns of 0 * inf, which is what makes the NaN here.
@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning")
def test_infinity_and_nan(backend):
    x = problem(6, 45, backend) + 1.0
    rest = x.clone()
    for place, value in (((1, 3), math.nan), ((2, 20), math.inf), ((3, 44), -math.inf), ((3, 40), math.nan)):
        x[place], rest[place] = value, 0.0
    for seed in (NEAREST, 9):
        finite = torch.isfinite(x)
        assert_bitwise(msfp(x, 4, seed), torch.where(finite, msfp_reference(rest, 4, seed), x))
        packed = msfp_pack(x, 4, seed)
        for actual, expected in zip(packed, msfp_pack_reference(x, 4, seed), strict=True):
            assert_bitwise(actual, expected)
        values = msfp_unpack(*packed, 4, 45)
        assert_bitwise(values, msfp_unpack_reference(*packed, 4, 45))
        touched = torch.zeros(6, 3, dtype=torch.bool, device=backend)
        touched[1, 0] = touched[2, 1] = touched[3, 2] = True
        spread = touched.repeat_interleave(BLOCK, 1)[:, :45]
        assert not torch.isfinite(values[spread]).any()
        assert_bitwise(values[~spread], msfp(x, 4, seed)[~spread])


@pytest.mark.parametrize(("bits", "density"), [(16, 3.8), (15, 4.3), (14, 4.9), (13, 5.8), (12, 7.1)])
def test_memory_density_is_that_of_rouhani(bits, density):
    # The published table (Rouhani et al. 2020), to its one decimal, from the bytes that are there: 32 bits to n - 8 and 8 / 16 of an exponent.
    x = problem(8, 128)
    packed = msfp_pack(x, bits - 9, NEAREST)
    assert round(x.nbytes / sum(part.nbytes for part in packed), 1) == density


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    features=st.integers(1, 50),
    m=st.integers(3, 7),
    exponent=st.integers(-100, 100),
    seed=st.integers(-1, 2**32 - 1),
)
def test_error_and_idempotence(rows, features, m, exponent, seed):
    generator = torch.Generator().manual_seed(rows * 64 + features)
    x = torch.randn(rows, features, generator=generator) * torch.exp2(
        torch.randn(rows, features, generator=generator) * 4
    )
    with use_backend("cpu"):
        values = msfp(x, m, seed)
        # A power of two moves the exponents, nothing else.
        assert_bitwise(msfp(x * 2.0**exponent, m, seed), values * 2.0**exponent)
        # The largest value of a block keeps its exponent, so the block keeps its unit, and all of its values are whole numbers of it.
        assert_bitwise(msfp(values, m, NEAREST), values)
        assert_bitwise(msfp(values, m, 11), values)
    blocks = torch.nn.functional.pad(x, (0, -features % BLOCK)).view(rows, -1, BLOCK)
    unit = torch.exp2(torch.floor(torch.log2(blocks.abs().amax(2).double())) + 1 - m).repeat_interleave(BLOCK, 1)
    error, unit = (values.double() - x.double()).abs(), unit[:, :features]
    largest = (2**m - 1) * unit
    # Half a unit to the nearest, and less than one stochastically or where a value is cut to the largest, 2^m units being the next exponent.
    assert (error <= torch.where((x.abs() > largest) | (seed >= 0), 1.0, 0.5) * unit).all()
    assert (values.abs() <= largest).all()


@pytest.mark.parametrize("m", [3, 7])
@pytest.mark.parametrize("fraction", [0.0, 2.0**-6, 0.25, 0.5, 0.9])
def test_stochastic_rounding_is_unbiased(m, fraction):
    # Each of n values of (5 + fraction) units becomes 5 or 6; the chance of 6 is within 2^-24 of the fraction. By Hoeffding's inequality the mean
    # of n independent ones is more than t off with a chance of at most 2 exp(-2 n t^2): 1e-9 for t = sqrt(ln(2e9) / 2 n), here 0.0063.
    rows = 1 << 14
    x = torch.full((rows, BLOCK + 1), (5 + fraction) * 2.0 ** (1 - m))
    x[:, 1::2] *= -1
    x[:, 0] = x[:, BLOCK] = 1.5  # E = 127
    kept = x[:, 1:BLOCK]
    n = kept.numel()
    with use_backend("cpu"):
        units = msfp(x, m, 2024)[:, 1:BLOCK] * torch.sign(kept) * 2.0 ** (m - 1)
    assert set(units.unique().tolist()) == ({5.0, 6.0} if fraction else {5.0})
    assert abs(float((units - 5).double().mean()) - fraction) < math.sqrt(math.log(2e9) / (2 * n)) + 2.0**-24


def test_seed_decides(backend):
    x = problem(8, 40, backend)
    first, again, other = (msfp(x, 3, seed) for seed in (1, 1, 2))
    assert_bitwise(first, again)
    assert (first != other).any()
    assert (first != msfp(x, 3, NEAREST)).any()


def test_threads_agree(threads):
    x = problem(2100, 65)
    expected = msfp_reference(x, 4, 3), *msfp_pack_reference(x, 4, 3)
    for count in (1, 2):
        threads(count)
        mantissas, exponents = msfp_pack(x, 4, 3)
        actual = msfp(x, 4, 3), mantissas, exponents
        for a, e in zip(actual, expected, strict=True):
            assert_bitwise(a, e)
        assert_bitwise(msfp_unpack(mantissas, exponents, 4, 65), expected[0])


def test_a_schedule_compiles_nothing():
    kernels = (numba_kernels._msfp, numba_kernels._msfp_pack, numba_kernels._msfp_unpack)
    compiled = []
    with use_backend("cpu"):
        for m, seed in ((7, NEAREST), (3, 2**32 - 1), (5, 0)):
            x = problem(4, 20 + m)
            msfp(x, m, seed)
            msfp_unpack(*msfp_pack(x, m, seed), m, x.size(1))
            compiled.append([len(kernel.signatures) for kernel in kernels])
    assert compiled[0] == compiled[1] == compiled[2]


def test_opcheck(backend):
    x = problem(6, 19, backend)
    torch.library.opcheck(msfp, (x, 4, NEAREST))
    torch.library.opcheck(msfp_pack, (x, 4, 5))
    torch.library.opcheck(msfp_unpack, (*msfp_pack(x, 4, 5), 4, 19))


def test_compiles_whole():
    x = problem(6, 19)
    compiled = torch.compile(lambda x: msfp_unpack(*msfp_pack(x, 6, 1), 6, 19), backend="aot_eager", fullgraph=True)
    assert_bitwise(compiled(x), msfp(x, 6, 1))


def test_gradient_passes_and_nothing_is_kept(backend):
    x = problem(5, 21, backend).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = ops.msfp(x, 4, seed=3)
    assert not kept
    assert_bitwise(out, msfp_reference(x.detach(), 4, 3))
    upstream = torch.randn(5, 21, device=backend)
    assert_bitwise(torch.autograd.grad(out, x, upstream)[0], upstream)


def test_refusals(monkeypatch):
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match="3 to 7 mantissa bits, got 8"):
        ops.msfp(x, 8)
    with pytest.raises(ValueError, match="MSFP block has 16 values, got 32; leave it out"):
        ops.msfp(x, 4, 32)
    with pytest.raises(ValueError, match="0 to 2\\^32 - 1; got -1"):
        ops.msfp(x, 4, seed=-1)
    with pytest.raises(ValueError, match="2-D"):
        ops.msfp(x[0], 4)
    with pytest.raises(TypeError, match="floating-point"):
        ops.msfp(x.int(), 4)
    x[1, 2] = math.nan
    assert ops.msfp(x, 4)[1, 2].isnan()
    monkeypatch.setenv("QGNN_DEBUG", "1")
    with pytest.raises(ValueError, match=r"x\[1, 2\]"):
        ops.msfp(x, 4)
