import pytest
import torch

from qgnn import ops
from qgnn.kernels import fixed_point as kernels
from qgnn.kernels import packing
from qgnn.kernels.backend import current_backend
from qgnn.kernels.random import NEAREST
from qgnn.kernels.ranges import range_parameters

from .assertions import EPSILON, assert_bitwise

SHAPES = [(0, 5), (4, 0), (5, 1), (7, 33), (6, 64), (3, 130)]
both_signs = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
both_scales = pytest.mark.parametrize("row", [False, True], ids=["tensor", "row"])
both_roundings = pytest.mark.parametrize("seed", [NEAREST, 2**31 + 7], ids=["nearest", "stochastic"])


def problem(n, f, bits, signed, row, device, dtype=torch.float32):
    """Values inside and outside the range, ties, codes' own values, huge ones, infinities and NaN; their scale and offset."""
    generator = torch.Generator().manual_seed(bits)
    count = n if row and n else 1
    scale = 2.0 ** torch.randint(-4, 0, (count,), generator=generator)
    if row:
        scale = scale * (1 + torch.rand(count, generator=generator))
    lo, hi = packing.code_range(bits, signed)
    offset = torch.rand(count, generator=generator) * (hi - lo) / 4 - (hi + lo) / 2
    x = torch.randn(n, f, generator=generator) * (hi - lo) * 0.4 * scale[:, None]
    whole = torch.randint(lo - 2, hi + 3, (n, f), generator=generator)
    on, tie = ((code + offset[:, None]) * scale[:, None] for code in (whole, whole + 0.5))
    kind = torch.randint(0, 10, (n, f), generator=generator)
    special = [on, tie, torch.zeros(n, f), *(torch.full((n, f), float(v)) for v in ("-3e4", "nan", "inf"))]
    for index, values in enumerate(special):
        x = torch.where(kind == index, values, x)
    return x.to(dtype).to(device), scale.to(device), offset.to(device)


def agree(x, scale, offset, bits, signed, seed):
    """All six operations with their references."""
    quantizer, features = (scale, offset, bits, signed), x.size(1)
    for name in ("fixed_point", "fixed_point_codes", "fixed_point_pack"):
        expected = getattr(kernels, f"{name}_reference")(x, *quantizer, seed)
        assert_bitwise(getattr(kernels, name)(x, *quantizer, seed), expected, name)
    tight = kernels.fixed_point_pack_reference(x, *quantizer, seed)
    expected = kernels.fixed_point_unpack_reference(tight, *quantizer, features)
    assert_bitwise(kernels.fixed_point_unpack(tight, *quantizer, features), expected, "unpacked")
    data = kernels.fixed_point_codes_reference(x, *quantizer, seed)
    assert_bitwise(kernels.tighten(data, x.size(0), features, bits, signed), tight, "tightened")
    assert_bitwise(kernels.loosen(tight, bits, signed, features), data, "loosened")


def test_hand_computed():
    # -0.5 .. 1 in 2 bits: c = 1/2, and d = 1 or -1; 0.25 and 0.75 are ties, which go to the even code
    x = torch.tensor([[-0.5, -3.0, 0.25, 0.3, 0.75, 1.0, 2.0, float("nan")]])
    low, high = torch.tensor([-0.5]), torch.tensor([1.0])
    for signed, offset, codes in ((True, 1, [-2, -2, 0, 0, 0, 1, 1, -2]), (False, -1, [0, 0, 2, 2, 2, 3, 3, 0])):
        quantizer = *range_parameters(low, high, 2, signed), 2, signed
        assert [t.item() for t in quantizer[:2]] == [0.5, offset]
        assert kernels.codes_reference(x, *quantizer, NEAREST).tolist() == [codes]
        expected = torch.tensor([[-0.5, -0.5, 0.5, 0.5, 0.5, 1.0, 1.0, float("nan")]])
        assert_bitwise(kernels.fixed_point_reference(x, *quantizer, NEAREST), expected)
        assert kernels.fixed_point_pack_reference(x, *quantizer, NEAREST).tolist() == [[0b10100000, 0b00111110]]


@pytest.mark.parametrize("bits", range(2, 9))
@both_signs
@both_roundings
def test_agrees_with_the_reference(backend, bits, signed, seed):
    agree(*problem(5, 19, bits, signed, bits % 2 == 0, backend), bits, signed, seed)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@both_scales
def test_shapes(backend, shape, row):
    for bits, seed in ((3, NEAREST), (8, 5)):
        agree(*problem(*shape, bits, True, row, backend), bits, True, seed)


@both_roundings
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(backend, dtype, seed):
    x, scale, offset = problem(5, 21, 6, True, True, backend, dtype)
    if dtype == torch.float64 and current_backend(x.device.type) == "triton":
        with pytest.raises(TypeError, match="float64; the Triton kernels take"):
            kernels.fixed_point(x, scale, offset, 6, True, seed)
    else:
        agree(x, scale, offset, 6, True, seed)


@both_roundings
def test_non_contiguous(backend, seed):
    x, scale, offset = problem(12, 34, 5, False, True, backend)
    agree(x[::2, 1::3], scale[::2], offset[::2], 5, False, seed)
    # one scale for all rows and an offset for each, and the other way round
    agree(x.t()[:5], scale[:1], offset[:5], 5, False, seed)
    agree(x.t()[:5], scale[:5], offset[:1], 5, False, seed)


def test_container_rows_are_what_integer_operations_read(backend):
    x, scale, offset = problem(6, 33, 5, True, False, backend)
    data = kernels.fixed_point_codes(x, scale, offset, 5, True, NEAREST)
    codes = packing.unpack_reference(data, None, packing.uniform_counts(6, 8), 33, True)
    assert_bitwise(codes, kernels.codes_reference(x, scale, offset, 5, True, NEAREST))
    assert codes.min() == -16 and codes.max() == 15


@both_roundings
def test_threads_agree(threads, seed):
    x, scale, offset = problem(4000, 65, 3, True, True, "cpu")
    for count in (1, 2):
        threads(count)
        agree(x, scale, offset, 3, True, seed)


def test_seeds(backend):
    x, scale, offset = problem(5, 24, 8, True, False, backend)
    first, again, other = (kernels.fixed_point(x, scale, offset, 8, True, seed) for seed in (3, 3, 4))
    assert_bitwise(first, again)
    assert not torch.equal(first.nan_to_num(), other.nan_to_num())


def bound(trials):
    """Hoeffding: the mean of independent errors of expectation 0 that lie within a width of 1 is beyond ``t`` with a chance of at most
    ``2 exp(-2 trials t^2)``, which is 1e-9 here. The generator's 24 bits and the rounding of ``x / c - d`` (below 8) add less than 2^-20."""
    return (21.5 / (2 * trials)) ** 0.5 + 2.0**-20


@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.5, 0.9])
def test_stochastic_rounding_is_unbiased_over_elements(fraction):
    for down in (3, -4):
        x, (c, d) = torch.full((512, 128), down + fraction), torch.tensor([[1.0], [0.0]])
        steps = kernels.fixed_point(x, c, d, 4, True, seed=11)
        assert steps.unique().tolist() == [down, down + 1]
        assert abs(steps.double().mean().item() - x[0, 0].item()) < bound(x.numel())


def test_stochastic_rounding_is_unbiased_over_seeds():
    generator = torch.Generator().manual_seed(0)
    x, c, d = torch.rand(4, 16, generator=generator) * 3 - 1, torch.tensor([0.5]), torch.tensor([0.25])
    seeds = 2000
    mean = sum(kernels.fixed_point(x, c, d, 4, True, seed).double() for seed in range(seeds)) / seeds
    assert (mean - x).abs().max() < 0.5 * bound(seeds)  # in steps of c


def test_whole_numbers_of_steps_stay():
    codes = torch.arange(-128, 128.0).repeat(64, 1)
    for seed in (NEAREST, *range(20)):
        value = kernels.fixed_point(codes * 0.25, torch.tensor([0.25]), torch.tensor([0.0]), 8, True, seed)
        assert_bitwise(value, codes * 0.25)


@pytest.mark.parametrize("bits", [2, 5, 8])
@both_signs
def test_range(bits, signed):
    low, high = torch.tensor([-0.3, 0.2, -7.0, 1e38, -3e38]), torch.tensor([1.7, 0.9, -2.0, 2e38, 3e38])
    x = torch.stack([low, high], 1)
    parameters = range_parameters(low, high, bits, signed)
    codes = kernels.codes_reference(x, *parameters, bits, signed, NEAREST)
    assert codes.tolist() == [list(packing.code_range(bits, signed))] * 5
    value = kernels.fixed_point_reference(x, *parameters, bits, signed, NEAREST)
    # c, the sum and the product round once each, relative to the value; d, relative to |c d| <= |low| + (high - low): with S the largest, 5 S, and
    # one more for terms of second order
    largest = torch.maximum(x.abs().amax(1).double(), high.double() - low.double())[:, None]
    assert ((value.double() - x.double()).abs() <= 6 * EPSILON[torch.float32] * largest).all()


@both_signs
@pytest.mark.parametrize("value", [0.0, -3.7, 1e-40, 2.5e30])
def test_constant_tensors_are_exact(backend, value, signed):
    x = torch.full((3, 9), value, device=backend)
    for seed in (None, 4):
        assert_bitwise(ops.fixed_point(x, 3, signed=signed, seed=seed), x)


@both_scales
def test_straight_through_gradient(backend, row):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 21, generator=generator).to(backend).requires_grad_()
    grad = torch.randn(6, 21, generator=generator).to(backend)
    low, high = (
        (torch.linspace(-1, -0.5, 6), torch.linspace(0.5, 1, 6)) if row else (torch.tensor(-0.7), torch.tensor(0.8))
    )
    low, high = low.to(backend), high.to(backend)
    out = ops.fixed_point(x, 4, low, high)
    out.backward(grad)
    first, last = low.reshape(-1, 1), high.reshape(-1, 1)
    inside = (x >= first) & (x <= last)
    assert inside.any() and not inside.all()
    assert_bitwise(x.grad, torch.where(inside, grad, 0))
    # half a step, and the roundings: of the value 6 * 2 units as in test_range, which is 180 units of a step of at least 1 / 15; of x / c - d, both
    # terms and c below 16, 48 units
    step = (last - first) / 15
    assert ((out - x.clamp(first, last)).abs() <= step * (0.5 + 228 * EPSILON[torch.float32])).all()


def test_own_range_keeps_nothing(backend):
    x = torch.randn(6, 21, generator=torch.Generator().manual_seed(0)).to(backend).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = ops.fixed_point(x, 4, seed=7)
        assert not kept
        ops.fixed_point(x, 4, -1.0, 1.0)
    assert [(t.dtype, tuple(t.shape)) for t in kept] == [(torch.uint8, (6, 3))]
    out.backward(torch.ones_like(out))
    assert_bitwise(x.grad, torch.ones_like(x))
    assert out.unique().numel() <= 16


def test_nothing_to_quantize(backend):
    for shape in ((0, 4), (3, 0)):
        assert ops.fixed_point(torch.zeros(shape, device=backend), 4).shape == shape


def test_errors():
    x = torch.zeros(3, 4)
    for message, error, arguments in (
        ("x must be a floating-point tensor, got torch.int64", TypeError, (x.long(), 4)),
        ("x must be 2-D", ValueError, (x[0], 4)),
        ("2 to 8 bits, got 9", ValueError, (x, 9)),
        ("give low and high, or neither", ValueError, (x, 4, 0.0)),
        ("low must not lie above high; swap them", ValueError, (x, 4, 1.0, 0.0)),
        (r"high must have one element or be \[3\], one a row, got \(4,\)", ValueError, (x, 4, 0.0, torch.ones(4))),
        ("low must be a floating-point tensor on cpu, got torch.int64", ValueError, (x, 4, torch.zeros(1).long(), 1.0)),
    ):
        with pytest.raises(error, match=message):
            ops.fixed_point(*arguments)
    with pytest.raises(ValueError, match=r"0 to 2\^32 - 1; got -1"):
        ops.fixed_point(x, 4, seed=-1)


def every_op(device):
    x, scale, offset = problem(6, 9, 3, True, True, device)
    x, quantizer = x.nan_to_num(0.0, 2.0), (scale, offset, 3, True)
    tight = kernels.fixed_point_pack_reference(x, *quantizer, NEAREST)
    data = kernels.fixed_point_codes_reference(x, *quantizer, NEAREST)
    return [
        (kernels.fixed_point, (x, *quantizer, 5)),
        (kernels.fixed_point_codes, (x, *quantizer, NEAREST)),
        (kernels.fixed_point_pack, (x, *quantizer, NEAREST)),
        (kernels.fixed_point_unpack, (tight, *quantizer, 9)),
        (kernels.tighten, (data, 6, 9, 3, True)),
        (kernels.loosen, (tight, 3, True, 9)),
    ]


def test_opcheck(backend):
    for op, arguments in every_op(backend):
        torch.library.opcheck(op, arguments)


def test_compiles_whole():
    for op, arguments in every_op("cpu"):
        compiled = torch.compile(lambda *a, op=op: op(*a), backend="aot_eager", fullgraph=True)
        assert_bitwise(compiled(*arguments), op(*arguments))


def test_debug_names_what_is_not_finite(monkeypatch):
    x = torch.tensor([[0.0, float("inf")]])
    assert ops.fixed_point(x, 4).isnan().all()
    monkeypatch.setenv("QGNN_DEBUG", "1")
    with pytest.raises(ValueError, match=r"x\[0, 1\]"):
        ops.fixed_point(x, 4)


def test_width_and_seed_compile_nothing():
    from qgnn.kernels.cpu import fixed_point as cpu

    x, scale, offset = problem(6, 9, 4, True, False, "cpu")
    agree(x, scale, offset, 4, True, NEAREST)
    loops = (cpu._values, cpu._bytes, cpu._unpack, cpu._tighten, cpu._loosen)
    compiled = [len(loop.signatures) for loop in loops]
    for bits, signed, seed in ((2, False, NEAREST), (7, True, 3), (8, False, 2**32 - 1)):
        agree(x, scale, offset, bits, signed, seed)
    assert [len(loop.signatures) for loop in loops] == compiled


@pytest.mark.parametrize("shape", [*SHAPES, (19, 6), (70, 128), (129, 75)], ids=str)
@both_roundings
def test_own_range(backend, shape, seed):
    for bits, scaled in ((8, False), (8, True), (4, True)):
        x, _, _ = problem(*shape, bits, True, False, backend)
        factor = torch.rand(shape[0], generator=torch.Generator().manual_seed(3)).to(backend) if scaled else None
        empty = torch.arange(shape[0], device=x.device).unsqueeze(1) % 3 == 1  # rows of zeros, which draw nothing
        for values in (x.nan_to_num(1, 1), x.masked_fill(x.isinf(), 1), torch.zeros_like(x)):
            values = values.masked_fill(empty, 0)
            data, scale = kernels.own_range_codes(values, factor, bits, seed)
            expected, expected_scale = kernels.own_range_codes_reference(values, factor, bits, seed)
            assert_bitwise(scale, expected_scale, "scale")
            assert_bitwise(data, expected, "codes")
            turned = kernels.transpose_codes_reference(data, *shape)
            assert_bitwise(kernels.transpose_codes(data, *shape), turned, "transposed")
            assert_bitwise(kernels.transpose_codes(turned, shape[1], shape[0]), data, "turned back")


@both_roundings
def test_own_range_with_threads(threads, seed):
    x, factor = torch.randn(4100, 65), torch.rand(4100)
    infinite = x[:9].masked_fill(x[:9] < -2, -torch.inf)
    for result, wanted in zip(
        *(f(infinite, None, 8, seed) for f in (kernels.own_range_codes, kernels.own_range_codes_reference)), strict=True
    ):
        assert_bitwise(result, wanted)
    expected = kernels.own_range_codes_reference(x, factor, 7, seed)
    for count in (1, 2):
        threads(count)
        for result, wanted in zip(kernels.own_range_codes(x, factor, 7, seed), expected, strict=True):
            assert_bitwise(result, wanted)
        turned = kernels.transpose_codes(expected[0], 4100, 65)
        assert_bitwise(turned, kernels.transpose_codes_reference(expected[0], 4100, 65))


@pytest.mark.parametrize("shape", [(170, 6), (171, 6), (1025, 1), (3000, 15), (40_000, 6)], ids=str)
@both_roundings
def test_codes_of_narrow_maps(threads, shape, seed):
    """Whose rows the CPU joins, but for the last ones, and for those that draw."""
    x, scale, offset = problem(*shape, 8, True, False, "cpu")
    expected = kernels.fixed_point_codes_reference(x, scale, offset, 8, True, seed)
    for count in (1, 2):
        threads(count)
        assert_bitwise(kernels.fixed_point_codes(x, scale, offset, 8, True, seed), expected)


def test_own_range_opcheck(backend):
    x, factor = torch.randn(5, 19, device=backend), torch.rand(5, device=backend)
    for given in (None, factor):
        torch.library.opcheck(kernels.own_range_codes, (x, given, 6, NEAREST))
    torch.library.opcheck(kernels.transpose_codes, (kernels.own_range_codes(x, None, 6, NEAREST)[0], 5, 19))
