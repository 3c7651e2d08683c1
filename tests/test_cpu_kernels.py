"""What the CPU backend does beyond the contract: threads, narrow sums, blocks of columns, remembered plans and memory."""

import gc

import numba
import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from qgnn import Graph, ops
from qgnn.kernels import packing
from qgnn.kernels.aggregate import aggregate, aggregate_packed, aggregate_packed_reference
from qgnn.kernels.backend import use_backend
from qgnn.kernels.cpu import aggregate_packed as cpu_packed
from qgnn.kernels.cpu import common, memory, narrow, product
from qgnn.kernels.cpu import matmul as cpu_matmul
from qgnn.kernels.cpu.plan import plan_of
from qgnn.kernels.matmul import matmul_packed, matmul_packed_reference
from qgnn.kernels.schedule import build_schedule

from .assertions import assert_bitwise


@pytest.fixture(autouse=True)
def on_cpu():
    with use_backend("cpu"):
        yield


@pytest.fixture
def many_threads(monkeypatch, threads):
    """Runs small work on as many threads as asked for; more than the machine has share those there are."""

    def use(count):
        monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", count)
        threads(count)

    monkeypatch.setattr(common, "SERIAL_WORK", 0)
    return use


def graph(degrees, sources, seed=0, dtype=torch.int32, **schedule):
    indptr = torch.zeros(len(degrees) + 1, dtype=dtype)
    indptr[1:] = torch.tensor(degrees).cumsum(0)
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, sources, (int(indptr[-1]),), generator=generator, dtype=torch.int32)
    return indptr, indices, list(build_schedule(indptr, **schedule))


def packed(rows, features, container, seed=0):
    codes = torch.randint(0, 256, (rows, features), generator=torch.Generator().manual_seed(seed))
    return packing.pack_reference(codes, None, packing.uniform_counts(rows, container))


def sums(structure, x, container, sources, features, signed=True):
    return (*structure, x, container, sources, features, signed, "acc", *[None] * 5, False, *[None] * 5, [0] * 5, True)


def quantized(structure, x, container, n, features):
    """An aggregation with every step of the epilogue, to rows of all widths."""
    generator = torch.Generator().manual_seed(1)
    row_scale, step = torch.rand(2, n, generator=generator) + 0.05
    col_scale, bias, post_scale, post_shift = torch.randn(4, features, generator=generator)
    addend, bits = torch.randn(n, features, generator=generator), (torch.arange(n) % 9).to(torch.uint8)
    counts, pos = packing.bucket_rows(packing.containers_of(bits, True))
    return (
        *structure, x, container, n, features, True, "rows", row_scale, torch.tensor([0.5]), col_scale, bias, addend, True, post_scale, post_shift,
        step, bits, pos, counts, True,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("container", [4, 8])
def test_threads_give_the_same_bits(many_threads, container, dtype):
    """Hubs at both ends, rows of all lengths between, fewer rows than threads would like in one graph."""
    for degrees in ([300, *range(60), 0, 0, 500], [7, 0, 90]):
        n, f = len(degrees), 70
        structure = graph(degrees, n, dtype=dtype, narrow=4, chunk=32)
        arguments = quantized(structure, packed(n, f, container), container, n, f)
        x = torch.randn(n, f, generator=torch.Generator().manual_seed(2))
        floats = []
        for count in (1, 2, 3):
            many_threads(count)
            assert_bitwise(aggregate_packed(*arguments), aggregate_packed_reference(*arguments), f"{count} threads")
            floats.append(aggregate(*structure, x, None, "mean")[0])
        assert_bitwise(floats[1], floats[0])
        assert_bitwise(floats[2], floats[0])


def product_arguments(n, k, m, output="columns"):
    generator = torch.Generator().manual_seed(3)
    bits = (torch.arange(n) % 9).to(torch.uint8)
    counts, pos = packing.bucket_rows(packing.containers_of(bits, False))
    x = packing.pack_reference(torch.randint(0, 256, (n, k), generator=generator), pos, counts)
    row_scale, scales = torch.rand(n, generator=generator), torch.rand(2, m, generator=generator) + 0.5
    epilogue = (row_scale, scales[0], None, torch.randn(n, m, generator=generator), True, None, None)
    out = (scales[1], torch.full((m,), 4, dtype=torch.uint8), None, packing.uniform_counts(n, 4), True)
    if output != "columns":
        out = (None, None, None, [0] * 5, True)
    return x, pos, counts, False, 5, packed(m, k, 8), 8, k, m, output, *epilogue, *out


def test_threads_multiply_alike(many_threads):
    """Row counts that do not fill the last tile."""
    for n in (1, 3, 30, 101):
        arguments = product_arguments(n, 37, 75)
        for count in (1, 2, 3):
            many_threads(count)
            assert_bitwise(matmul_packed(*arguments), matmul_packed_reference(*arguments), f"{n} rows, {count} threads")


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("container", "reach"), [(8, 257), (4, 17), (2, 85), (1, 255)])
def test_narrow_sums_are_widened_in_time(container, reach, signed):
    """All codes at an end, as many edges as the narrow sums hold, one fewer and one more, and several times as many."""
    degrees = [0, 1, reach - 1, reach, reach + 1, 2 * reach, 2 * reach + 1, 5 * reach + 3]
    structure = graph(degrees, 1, sort=False)
    for byte in (
        0x00,
        0xFF,
        {8: 0x80, 4: 0x88, 2: 0xAA, 1: 0xFF}[container],
        {8: 0x7F, 4: 0x77, 2: 0x55, 1: 0}[container],
    ):
        x = torch.full((16,), byte, dtype=torch.uint8)
        code = int(packing.unpack_reference(x, None, packing.uniform_counts(1, container), 16, signed)[0, 0])
        acc = aggregate_packed(*sums(structure, x, container, 1, 16, signed))
        assert acc.tolist() == [[code * degree] * 16 for degree in degrees]


@pytest.mark.parametrize("container", [1, 2, 4, 8])
def test_every_number_of_columns(container):
    structure = graph([3, 0, 40, 1], 5)
    for f in range(1, 201):
        arguments = sums(structure, packed(5, f, container, f), container, 5, f)
        assert_bitwise(aggregate_packed(*arguments), aggregate_packed_reference(*arguments), f"{f} columns")


@pytest.mark.parametrize("output", ["acc", "float"])
def test_writing_past_the_caches(monkeypatch, output):
    """Rows that are aligned for it, and rows that are not."""
    structure = graph([3, 0, 40, 1, 8], 5)
    for module in (cpu_packed, cpu_matmul):
        monkeypatch.setattr(module, "PAST_CACHE_BYTES", 0)
    monkeypatch.setattr(narrow, "CACHED_BYTES", 0)
    for f in (16, 64, 100, 128, 192, 200):
        arguments = (*sums(structure, packed(5, f, 8), 8, 5, f)[:8], output, *sums(structure, None, 8, 5, f)[9:])
        assert_bitwise(aggregate_packed(*arguments), aggregate_packed_reference(*arguments), f"{f} columns")
        arguments = product_arguments(9, 20, f, output)
        assert_bitwise(matmul_packed(*arguments), matmul_packed_reference(*arguments), f"product, {f} columns")


def test_without_byte_products():
    """The product for processors without VNNI, at the ends of both ranges: the same sums."""
    multiply = product.make_multiply_rows(False)

    @numba.njit
    def run(tile, weights, sums, offsets, acc):
        multiply(tile, weights, sums, offsets, acc)

    generator = torch.Generator().manual_seed(0)
    for k, m in ((1, 1), (7, 16), (130, 70)):
        x = torch.randint(0, 256, (product.TILE, k), generator=generator, dtype=torch.uint8)
        w = torch.randint(-128, 128, (m, k), generator=generator, dtype=torch.int8)
        x[0], w[0] = 255, -128
        data = packing.pack_reference(w, None, packing.uniform_counts(m, 8))
        weights, totals = product.laid_weights(data, 8, m, k)
        tile = np.zeros((product.TILE, 4 * weights.shape[0]), np.uint8)
        tile[:, :k] = x.numpy()
        acc, offsets = np.empty((product.TILE, weights.shape[1]), np.int32), np.arange(product.TILE, dtype=np.int32)
        run(tile, weights, totals, offsets, acc)
        expected = (x.long() - torch.from_numpy(offsets).long().unsqueeze(1)) @ w.long().t()
        assert acc[:, :m].tolist() == expected.tolist()


def finished(structure, x, container, n, features, signed, absent=()):
    """An aggregation to float with every step of the epilogue but for those that are ``absent``."""
    generator = torch.Generator().manual_seed(features)
    col_scale, bias, post_scale, post_shift = torch.randn(4, features, generator=generator)
    steps = [
        torch.rand(n, generator=generator), torch.tensor([0.5]), col_scale, bias, torch.randn(n, features, generator=generator), True, post_scale,
        post_shift,
    ]  # fmt: skip
    for place in absent:
        steps[place] = False if place == 5 else None
    return *structure, x, container, n, features, signed, "float", *steps, None, None, None, [0] * 5, True


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("container", [1, 2, 4, 8])
def test_small_graphs(many_threads, container, signed):
    """Blocks of all widths and last blocks of all lengths, as long rows as 16 bits hold the sums of, at the ends of the codes, on one thread and two;
    without each step of the epilogue, and without all but the column factor."""
    structure = graph([3, 0, narrow.REACH, 1, 40, 7], 6)
    for f in (*range(1, 18), 31, 64, 100, 137, 256, 300):
        x = packed(6, f, container, f) if f % 3 else torch.full_like(packed(6, f, container), 255)
        arguments = finished(structure, x, container, 6, f, signed)
        expected = aggregate_packed_reference(*arguments)
        for count in (1, 2):
            many_threads(count)
            assert_bitwise(aggregate_packed(*arguments), expected, f"{f} columns, {count} threads")
    for absent in (*[(place,) for place in range(8)], (0, 1, 3, 4, 5, 6, 7), tuple(range(8))):
        arguments = finished(structure, packed(6, 20, container), container, 6, 20, signed, absent)
        assert_bitwise(aggregate_packed(*arguments), aggregate_packed_reference(*arguments), f"without {absent}")


@pytest.mark.parametrize("weighted", [True, False])
def test_small_graphs_give_the_bits_of_large_ones(monkeypatch, many_threads, weighted):
    structure = graph([3, 0, narrow.REACH, 1, 40, 7], 6)
    edges = structure[1].numel()
    weight = torch.rand(edges, generator=torch.Generator().manual_seed(0)) if weighted else None
    for f in (1, 7, 16, 33, 130, 300):
        x = torch.randn(6, f, generator=torch.Generator().manual_seed(f))
        for reduce in ("sum", "mean"):
            results = []
            for count, limit in ((1, narrow.CACHED_BYTES), (2, narrow.CACHED_BYTES), (1, 0)):
                many_threads(count)
                with monkeypatch.context() as patch:
                    patch.setattr(narrow, "CACHED_BYTES", limit)
                    results.append(aggregate(*structure, x, weight, reduce)[0])
            assert_bitwise(results[1], results[0])
            assert_bitwise(results[2], results[0])


def test_which_graphs_are_small():
    """A row too long for sums of 16 bits, and a table too large for a cache, go the other way."""
    for longest, small in ((narrow.REACH, True), (narrow.REACH + 1, False)):
        plan = plan_of(*graph([2, longest], 4))
        assert narrow.fits(plan, 4 * 16, 16) is small
        assert not narrow.fits(plan, narrow.CACHED_BYTES, 16)


def test_changes_in_place_are_seen():
    """What is remembered of a graph and of weights is that of their present content."""
    indptr, indices, schedule = graph([5, 0, 3, 70, 2], 5, narrow=1, chunk=4)
    x = packed(5, 20, 8)
    first = aggregate_packed(*sums((indptr, indices, schedule), x, 8, 5, 20))
    other = graph([70, 3, 5, 1, 1], 5, 1, narrow=1, chunk=4)
    for tensor, changed in zip((indptr, indices, *schedule), (*other[:2], *other[2]), strict=True):
        tensor.resize_(changed.shape).copy_(changed)
    arguments = sums((indptr, indices, schedule), x, 8, 5, 20)
    second = aggregate_packed(*arguments)
    assert_bitwise(second, aggregate_packed_reference(*arguments))
    assert not torch.equal(first, second)
    arguments = product_arguments(9, 12, 6)
    before = matmul_packed(*arguments)
    arguments[5].bitwise_xor_(0x55)
    assert_bitwise(matmul_packed(*arguments), matmul_packed_reference(*arguments))
    assert not torch.equal(before, matmul_packed(*arguments))


def test_memory_of_large_results_is_used_again(monkeypatch):
    monkeypatch.setattr(memory, "_idle", {})
    shape = (memory.LARGE_BYTES // 4, 1)
    first = memory.empty(shape, torch.float32)
    second = memory.empty(shape, torch.float32)
    place = first.data_ptr()
    assert place % 64 == 0 and second.data_ptr() != place
    part = first[5:].numpy()
    del first
    gc.collect()
    assert memory.empty(shape, torch.float32).data_ptr() != place, "a view still reads it"
    del part
    gc.collect()
    assert memory.empty(shape, torch.int32).data_ptr() == place
    monkeypatch.setattr(memory, "IDLE_BYTES", 2 * memory.LARGE_BYTES + 1000)
    results = [memory.empty(shape, torch.float32) for _ in range(4)]
    del results
    gc.collect()
    assert len(memory._idle) == 2


def test_operations_are_seen_where_something_looks():
    """The function behind an operation is called at once, but a dispatch mode sees the operation."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    arguments = sums(graph([2, 1], 2), packed(2, 8, 8), 8, 2, 8)
    plain = aggregate_packed(*arguments)
    with Watch():
        assert_bitwise(aggregate_packed(*arguments), plain)
    assert "qgnn.aggregate_packed.default" in seen
    with torch.profiler.profile() as profile:
        aggregate_packed(*arguments)
    assert any(event.key == "qgnn::aggregate_packed" for event in profile.key_averages())


def test_a_forward_gradient_is_not_lost():
    """Without a gradient backwards the kernel is called without a Function; forwards there is none, and that is said."""
    g = Graph.from_edge_index(torch.tensor([[0, 1], [1, 0]]), 2)
    x = torch.ones(2, 3)
    assert ops.aggregate(g, x).grad_fn is None
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        ops.aggregate(g, forward_ad.make_dual(x, x))
