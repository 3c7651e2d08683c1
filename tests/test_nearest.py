import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from qgnn import ops
from qgnn.kernels import nearest, packing
from qgnn.kernels.quantize import (
    codes_reference,
    derivatives_reference,
    fake_quantize,
    fake_quantize_backward,
    largest_code,
)

from .assertions import assert_bitwise, assert_sum

SHAPES = [(0, 5), (4, 0), (5, 1), (9, 16), (70, 33), (11, 64), (6, 130), (3, 600)]
both_signs = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


def problem(n, f, m, signed, device="cpu", dtype=torch.float32, seed=0):
    """Rows of very different size, among them zeros, infinities, NaN and ones half-way between two groups; groups of all widths, some equal."""
    generator = torch.Generator().manual_seed(seed)
    step = (torch.randint(1, 40, (m,), generator=generator) / 64).to(torch.float32)
    bits = torch.randint(0, 9, (m,), generator=generator).to(torch.uint8)
    q_max = step * largest_code(bits, signed)
    x = torch.randn(n, f, generator=generator) * torch.rand(n, 1, generator=generator).mul(8).exp() / 50
    a, b = (q_max[torch.randint(m, (n,), generator=generator)] for _ in range(2))
    if f:
        for kind, value in enumerate(
            [(a + b) / 2, a, torch.zeros(n), torch.full((n,), 3e4), torch.full((n,), torch.inf)]
        ):
            rows = torch.arange(n)[kind::7]
            x[rows] = x[rows].clamp(-value[rows, None], value[rows, None])
            x[rows, rows % f] = value[rows]
        x[5::14, 0] = torch.nan
    return x.to(dtype).to(device), step.to(device), bits.to(device), q_max.to(device)


def brute_force(absmax, q_max):
    """Algorithm 1 by its words: the N x m table of distances, in float64; argmin takes the first on ties."""
    return torch.argmin((absmax.double().unsqueeze(1) - q_max.double()).abs(), dim=1)


def test_worked_example():
    bounds, order = nearest.group_table(torch.tensor([4.0, 1.0, 2.0, 1.0]))
    assert_bitwise(bounds, torch.tensor([1.0, 1.5, 2.9999998]))
    assert order.tolist() == [1, 1, 2, 0]


def test_hand_computed(backend):
    absmax = torch.tensor([0.0, 1.5, 1.6, 3.0, 2.9, 100.0, torch.inf, torch.nan], device=backend)
    q_max = torch.tensor([4.0, 1.0, 2.0, 1.0], device=backend)
    assert ops.nearest_group(absmax, q_max).tolist() == [1, 1, 2, 0, 2, 0, 0, 1]


@pytest.mark.parametrize("m", [1, 2, 3, 8, 9, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_nearest_group_by_its_words(backend, m, dtype):
    # Steps in 64ths: many groups are equal, many rows lie half-way, and all distances are exact.
    x, _, _, q_max = problem(700, 2, m, True, backend, dtype)
    absmax = x.nan_to_num(posinf=3e4).abs().amax(1)
    assert_bitwise(ops.nearest_group(absmax, q_max), brute_force(absmax, q_max))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(0, 2.0**20, width=32), max_size=30),
    st.lists(st.floats(0, 2.0**20, width=32), min_size=1, max_size=30),
)
def test_any_values(absmax, q_max):
    """Any floats, subnormal ones too; rows that equal a group, lie half-way between two, or beside it."""
    q = torch.tensor(q_max)
    middle = (q[:, None] + q).flatten() / 2
    beside = [torch.nextafter(middle, torch.full_like(middle, end)) for end in (0.0, torch.inf)]
    f = torch.cat([torch.tensor(absmax), q, middle, *beside])
    for reference in (True, False):
        table = nearest.group_table(q)
        group = (nearest.nearest_group_reference if reference else nearest.nearest_group)(f, *table)
        difference = f.double().unsqueeze(1) - q.double()
        distance = difference.abs()
        best = distance.amin(1)
        # float64 rounds a distance once (2^-53 of it, 2^20 at most), and the middle of two groups once.
        assert ((distance.gather(1, group.unsqueeze(1)).squeeze(1) - best) <= 2.0**-31).all()
        # Where nothing was rounded, ties are ties: rounding, of a middle too, loses bits of the smaller number.
        exact = (distance.float() == distance) & (difference + q == f.unsqueeze(1)) & (f.unsqueeze(1) - difference == q)
        exact = exact.all(1)
        assert_bitwise(group[exact], brute_force(f, q)[exact])


def test_neighbours_in_the_last_place(backend):
    """Groups one unit of least precision apart have no float between them; the middle rounds to one of them."""
    q = torch.tensor([1.0 + k * 2.0**-23 for k in range(9)], device=backend)
    for order in (torch.arange(9), torch.arange(8, -1, -1)):
        assert_bitwise(ops.nearest_group(q, q[order.to(backend)]), torch.argsort(order).to(backend))


def test_a_group_that_is_nan_is_never_near(backend):
    absmax = torch.tensor([0.0, 3.0, torch.inf, torch.nan], device=backend)
    q_max = torch.tensor([torch.nan, 5.0, torch.nan, 1.0], device=backend)
    assert ops.nearest_group(absmax, q_max).tolist()[:2] == [3, 1]


@pytest.mark.parametrize("q_max", [[1.0, torch.inf], [torch.inf, 1.0], [torch.inf, 1.0, torch.inf]], ids=str)
def test_infinity_belongs_to_the_largest_group(backend, q_max):
    absmax = torch.tensor([3.0, torch.finfo(torch.float32).max, torch.inf], device=backend)
    finite, infinite = q_max.index(1.0), q_max.index(torch.inf)
    assert ops.nearest_group(absmax, torch.tensor(q_max, device=backend)).tolist() == [finite, finite, infinite]


@both_signs
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fake_quantize_nearest(backend, shape, signed):
    x, step, bits, q_max = problem(*shape, 37, signed, backend)
    check_fused(x, step, bits, q_max, signed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [1, 1000])
def test_half_precision(backend, dtype, m):
    check_fused(*problem(40, 33, m, True, backend, dtype), True)


def check_fused(x, step, bits, q_max, signed):
    table = nearest.group_table(q_max)
    actual = nearest.fake_quantize_nearest(x, *table, step, bits, signed)
    expected = nearest.fake_quantize_nearest_reference(x, *table, step, bits, signed)
    for a, e, what in zip(actual, expected, ("values", "clip bits", "groups"), strict=True):
        assert_bitwise(a, e, what)
    # and the composition of the two operations it fuses
    absmax = x.float().abs().amax(1) if x.size(1) else torch.zeros(x.size(0), device=x.device)
    group = nearest.nearest_group(absmax, *table)
    out, clip, *_ = fake_quantize(x, step[group], bits[group], True, signed, False)
    assert_bitwise(actual[2], group, "groups")
    assert_bitwise(actual[0], out, "values")
    assert_bitwise(actual[1], clip, "clip bits")


def check_packed(x, step, bits, q_max, signed, container):
    """Finite rows: the group search, and the codes of each row in the one container, whose bits above are dropped."""
    x, (bounds, order) = x.nan_to_num(nan=0.5, posinf=3e4, neginf=-3e4), nearest.group_table(q_max)
    data, row_step, group = nearest.quantize_nearest(x, bounds, order, step, bits, signed, container)
    expected = nearest.fake_quantize_nearest_reference(x, bounds, order, step, bits, signed)[2]
    assert_bitwise(group, expected, "group")
    assert_bitwise(row_step, step[expected], "row_step")
    codes, _ = codes_reference(x, step[expected], bits[expected], True, signed)
    counts = packing.uniform_counts(x.size(0), container)
    assert_bitwise(data, packing.pack_reference(codes, None, counts), "data")
    reference = nearest.quantize_nearest_reference(x, bounds, order, step, bits, signed, container)
    for a, b in zip((data, row_step, group), reference, strict=True):
        assert_bitwise(a, b, "reference")


@both_signs
@pytest.mark.parametrize("container", [0, 1, 2, 4, 8])
def test_quantize_nearest(backend, signed, container):
    for n, f in SHAPES if container == 4 else [(9, 16), (70, 33), (3, 600)]:
        check_packed(*problem(n, f, 5, signed, backend), signed, container)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_quantize_nearest_in_half_precision(backend, dtype):
    check_packed(*problem(9, 33, 1000, True, backend, dtype), True, 8)


def test_nan_stays_nan(backend):
    x = torch.tensor([[torch.nan, 7.0], [-torch.nan, -0.1], [torch.inf, 1.0]], device=backend)
    out, group = ops.fake_quantize_nearest(
        x, torch.tensor([1.0, 0.25], device=backend), torch.tensor([4.0, 2.0], device=backend)
    )
    assert group.tolist() == [1, 1, 0]
    assert_bitwise(out, torch.tensor([[torch.nan, 0.25], [torch.nan, 0.0], [7.0, 1.0]]))


def test_non_contiguous(backend):
    x, step, bits, q_max = problem(24, 34, 20, True, backend)
    check_fused(x[::2, 1::3], step[::2], bits[::2], q_max[::2], True)
    check_fused(x.t(), step, bits, q_max, True)
    absmax = x.nan_to_num(posinf=3e4).abs().amax(1)
    assert_bitwise(ops.nearest_group(absmax[::3], q_max[::2]), brute_force(absmax[::3], q_max[::2]))


def test_threads_and_runs_agree(threads):
    x, step, bits, q_max = problem(5000, 65, 100, True)
    table = nearest.group_table(q_max)
    expected = nearest.fake_quantize_nearest_reference(x, *table, step, bits, True)
    for count in (1, 2, 2):
        threads(count)
        for a, e in zip(nearest.fake_quantize_nearest(x, *table, step, bits, True), expected, strict=True):
            assert_bitwise(a, e)
        check_packed(x, step, bits, q_max, True, 8)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(0, 140), st.integers(0, 40), st.integers(1, 70), st.booleans(), st.integers(0, 2**16))
def test_any_shape(n, f, m, signed, seed):
    check_fused(*problem(n, f, m, signed, seed=seed), signed)
    check_packed(*problem(n, f, m, signed, seed=seed), signed, (1, 2, 4, 8)[seed % 4])


@pytest.mark.parametrize(("n", "m"), [(0, 3), (1, 1), (700, 1), (700, 40), (2500, 3)])
def test_group_sums(backend, n, m):
    generator = torch.Generator().manual_seed(0)
    group = torch.randint(m, (n,), generator=generator).to(backend)
    a, b = (torch.randn(n, generator=generator).to(backend) for _ in range(2))
    actual = nearest.group_sums(group, a, b, m)
    for values, result in zip((a, b), actual, strict=True):
        by_hand = torch.stack([values[group == j].double().sum() for j in range(m)])
        magnitude = torch.stack([values[group == j].abs().sum() for j in range(m)])
        assert_sum(result, by_hand.float(), magnitude, n)
    for first, second in zip(actual, nearest.group_sums(group, a, b, m), strict=True):
        assert_bitwise(first, second)


def test_group_sums_whatever_the_default_dtype(backend, float64_by_default):
    group, a = torch.tensor([1, 0, 1], device=backend), torch.tensor([1, 2, 4], dtype=torch.float32, device=backend)
    for result in nearest.group_sums(group, a, a, 2):
        assert_bitwise(result, torch.tensor([2, 5], dtype=torch.float32))


@both_signs
def test_gradients_whatever_the_default_dtype(backend, signed, float64_by_default):
    for rows in (9, 0):
        x = torch.ones(rows, 3, dtype=torch.float32, device=backend)
        given = (x, x[:, 0], torch.full((rows,), 4, dtype=torch.uint8, device=backend), True, signed)
        gradients = fake_quantize_backward(x, *given)[1:] + fake_quantize(*given, True)[2:]
        gradients += fake_quantize(*given, False)[2:]
        assert {g.dtype for g in gradients} == {torch.float32}


def composition(x, step, bits, group, signed):
    """The quantizer by A2Q's formulas, in plain autograd: the gradients of eq. 10 are what its pieces have."""
    s = step[group].unsqueeze(1)
    b = bits[group].unsqueeze(1)
    exponent = torch.round(b.detach()).clamp(0, 8) - (1 if signed else 0) + (b - b.detach())
    # Q and its slope 2^(b-1) ln2; below 0 bits of magnitude the paper's max(0, .) keeps the value and not the slope
    q = torch.exp2(exponent) - 1
    q = q - q.detach() + q.detach().clamp_min(0)
    sign = torch.sign(x) if signed else (x > 0).to(x.dtype)
    level = torch.floor(x.abs().detach() / s.detach() + 0.5)
    inside = s * (x / s + (sign * level - x / s).detach())
    clipped = (x.abs() >= s * q).detach() if signed else ((x.abs() >= s * q) | (x < 0)).detach()
    return torch.where(clipped, sign.detach() * s * q, inside)


@both_signs
@pytest.mark.parametrize("ste", ["clip", "pass"])
def test_groups_gather_the_global_gradients(signed, ste):
    """In float64, against autograd: a sum of 33 terms and of the rows of a group differs by rounding alone, 1e-12 of its magnitude."""
    x, step, bits, _ = problem(60, 33, 6, signed)
    x, step = x.double().nan_to_num(posinf=1e4).requires_grad_(), step.double().requires_grad_()
    bits = (bits.double() + 0.3).requires_grad_()
    upstream = torch.randn(60, 33, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out, group = ops.fake_quantize_nearest(x, step, bits, signed=signed, ste=ste)
    expected = composition(x, step, bits, group, signed)
    assert torch.allclose(out, expected, rtol=1e-12, atol=0)
    gradients = torch.autograd.grad(out, [x, step, bits], upstream)
    wanted = torch.autograd.grad(expected, [x, step, bits], upstream)
    assert torch.allclose(gradients[0], wanted[0] if ste == "clip" else upstream, rtol=1e-12, atol=0)
    for actual, expect in zip(gradients[1:], wanted[1:], strict=True):
        assert torch.allclose(actual, expect, rtol=1e-12, atol=1e-12 * float(expect.abs().max()))
    assert gradients[1].count_nonzero() > 1


@both_signs
def test_gradients_on_every_backend(backend, signed):
    x, step, bits, _ = problem(60, 33, 6, signed, backend)
    x = x.nan_to_num(posinf=1e4)
    leaves = [t.requires_grad_() for t in (x.clone(), step.clone(), bits.float())]
    upstream = torch.randn(60, 33, generator=torch.Generator().manual_seed(1)).to(backend)
    out, group = ops.fake_quantize_nearest(*leaves, signed=signed)
    assert not group.requires_grad
    runs = [torch.autograd.grad(out, leaves, upstream, retain_graph=True) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert_bitwise(first, second)
    rows = step[group], bits[group], True, signed
    assert_bitwise(runs[0][0], fake_quantize_backward(upstream, x, *rows)[0])
    codes, clipped = codes_reference(x, *rows)
    for actual, d in zip(runs[0][1:], derivatives_reference(x, codes, clipped, *rows), strict=True):
        terms = upstream * d
        sums, magnitude = (torch.zeros(6, dtype=torch.float64, device=backend) for _ in range(2))
        sums.index_add_(0, group, terms.double().sum(1))
        magnitude.index_add_(0, group, terms.abs().double().sum(1))
        assert_sum(actual, sums.float(), magnitude, x.numel())


@pytest.mark.parametrize("ste", ["clip", "pass"])
def test_groups_that_do_not_learn_keep_no_x(backend, ste):
    x, step, bits, _ = problem(30, 40, 4, True, backend)
    x = x.nan_to_num(posinf=1e4).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        out, _ = ops.fake_quantize_nearest(x, step, bits.float(), ste=ste)
    assert sum(saved) == (30 * 5 if ste == "clip" else 0)
    (actual,) = torch.autograd.grad(out.sum(), x)
    learning = ops.fake_quantize_nearest(x, step.requires_grad_(), bits.float(), ste=ste)[0]
    assert_bitwise(actual, torch.autograd.grad(learning.sum(), x)[0])


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_table_of_rows_times_groups(backend):
    n, f, m = 300, 3, 1000
    x, step, bits, q_max = problem(n, f, m, True, backend)
    with Largest() as seen:
        out, _ = ops.fake_quantize_nearest(x, step.requires_grad_(), bits.float().requires_grad_())
        out.nan_to_num().sum().backward()
        ops.nearest_group(x.abs().amax(1), q_max)
    assert 0 < seen.elements <= max(n * f, 1024)  # 1,023 bounds


def test_many_rows_times_many_groups_fit():
    # A table would have 4e10 distances: 160 GB.
    generator = torch.Generator().manual_seed(0)
    absmax, q_max = torch.rand(200_000, generator=generator), torch.rand(200_000, generator=generator)
    group = ops.nearest_group(absmax, q_max)
    distance = (absmax - q_max[group]).abs()
    some = torch.arange(0, 200_000, 10_007)
    assert_bitwise(group[some], brute_force(absmax[some], q_max))
    # 200,000 uniform groups are 5e-6 apart on average; a gap of 1e-4 has probability 200,000 * exp(-20)
    assert float(distance.max()) < 1e-4


ERRORS = [
    ({"x": torch.ones(3)}, ValueError, "x must be 2-D"),
    ({"x": torch.ones(3, 2, dtype=torch.int32)}, TypeError, "x must be a floating-point tensor"),
    ({"step": torch.ones(3)}, ValueError, r"step and bits must both be \[m\]"),
    ({"step": torch.ones(0), "bits": torch.ones(0)}, ValueError, "at least one group"),
    ({"step": torch.ones(2, device="meta")}, ValueError, "step is on meta"),
    ({"step": 1.0}, TypeError, "step must be a floating-point tensor"),
    ({"ste": "none"}, ValueError, "ste must be one of"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_errors(change, error, message):
    given_ = {"x": torch.ones(3, 2), "step": torch.ones(2), "bits": torch.full((2,), 4.0), **change}
    with pytest.raises(error, match=message):
        ops.fake_quantize_nearest(**given_)


@pytest.mark.parametrize(
    ("absmax", "q_max", "error", "message"),
    [
        (torch.ones(3, 1), torch.ones(2), ValueError, "absmax must be 1-D"),
        (torch.ones(3), torch.ones(0), ValueError, "at least one group"),
        (torch.ones(3), torch.ones(2, dtype=torch.int64), TypeError, "q_max must be a floating-point tensor"),
        (torch.ones(3), torch.ones(2, device="meta"), ValueError, "q_max is on meta"),
    ],
)
def test_search_errors(absmax, q_max, error, message):
    with pytest.raises(error, match=message):
        ops.nearest_group(absmax, q_max)


def test_debug_names_the_first_bad_value(monkeypatch):
    monkeypatch.setenv("QGNN_DEBUG", "1")
    with pytest.raises(ValueError, match=r"step\[1\] is -1"):
        ops.fake_quantize_nearest(torch.ones(2, 2), torch.tensor([1.0, -1.0]), torch.full((2,), 4.0))


def every_op(device):
    x, step, bits, q_max = problem(6, 9, 5, True, device)
    x = x.nan_to_num(posinf=9.0)
    table = nearest.group_table(q_max)
    group = nearest.nearest_group_reference(x.abs().amax(1), *table)
    return [
        (nearest.nearest_group, (x.abs().amax(1), *table)),
        (nearest.fake_quantize_nearest, (x, *table, step, bits, True)),
        (nearest.quantize_nearest, (x, *table, step, bits, True, 8)),
        (nearest.group_sums, (group, x[:, 0], x[:, 1], 5)),
    ]


def test_opcheck(backend):
    for op, arguments in every_op(backend):
        torch.library.opcheck(op, arguments)


def test_compiles_whole():
    for op, arguments in every_op("cpu"):
        actual = torch.compile(lambda *a, op=op: op(*a), backend="aot_eager", fullgraph=True)(*arguments)
        expected = op(*arguments)
        for a, b in zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (actual, expected)), strict=True):
            assert_bitwise(a, b)
