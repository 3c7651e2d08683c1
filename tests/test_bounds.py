"""The model of bytes and instructions, against numbers worked out by hand and the data of the simulator's GPUs."""

from __future__ import annotations

import math

import pytest
import torch

from qgnn.accel.gpu import find_gpu
from qgnn.perf import bounds
from qgnn.perf.gpu_scene import SIZES, Sizes
from qgnn.perf.static.compiler import Compiled
from qgnn.perf.static.machine_code import Loop

H200 = next(gpu for gpu in bounds.gpus() if gpu.name == "h200")
REDDIT = SIZES["reddit-size"]


def row(kernel: str, reads: str, bits: float, *loops: tuple[int, int, int]) -> Compiled:
    """A compiled kernel whose inner loops have so many instructions, so many of them on integers, and read so many bits."""
    found = tuple(Loop(i, 128, read, integer, 0, 0, 0) for i, integer, read in loops)
    return Compiled("", "case", "sm_90", kernel, reads=reads, element_bits=bits, loops=found)


@pytest.mark.parametrize(("reads", "ms"), [("fp32", 12.35), ("fp16", 6.22), ("8", 3.16), ("4", 1.63)])
def test_ceilings_of_reddit_on_an_h200(reads, ms):
    # E (F b + 4) + N (F b + 4) bytes at 4.8 TB/s, E = 114,615,892, N = 232,965, F = 128: FP32 59.262e9 bytes, 12.346 ms; FP16 29.861e9, 6.221;
    # INT8 15.160e9, 3.158; INT4 7.810e9, 1.627.
    bound = bounds.predict(bounds.aggregation(REDDIT, 128, reads), REDDIT, H200, [])
    assert round(bound.ms, 2) == ms
    assert bound.limit == "bytes"
    assert bound.instruction_ms is None


def test_short_rows_are_read_in_sectors():
    sizes = Sizes(1000, 50_000, 300, 16, 2)
    # 16 features: 16 bytes of 8 bits, 8 of 4 bits, of which 32 are read
    eight, four = (bounds.aggregation(sizes, 16, reads) for reads in ("8", "4"))
    assert eight.bytes == 50_000 * (32 + 4) + 1000 * (16 + 4)
    assert eight.bytes - four.bytes == 1000 * (eight.row - four.row)


def test_instructions_of_the_fastest_loop_bound_what_bytes_do_not():
    kernel = bounds.aggregation(REDDIT, 128, "8")
    rows = [
        row("_aggregate_packed_kernel", "8", 8, (640, 0, 512), (320, 64, 512)),
        row("_aggregate_packed_kernel", "4", 4, (1, 0, 512)),
        row("_aggregate_sum_kernel", "8", 8, (1, 0, 512)),
    ]
    # 320 instructions for 64 elements at 128 a clock: E F 320 / 64 / 128 clocks, on 132 multiprocessors at 1.98 GHz
    bound = bounds.predict(kernel, REDDIT, H200, rows)
    expected = 1e3 * 114_615_892 * 128 * 5 / 128 / (132 * 1.98e9)
    assert bound.instruction_ms == pytest.approx(expected)
    assert bound.ms == max(bound.byte_ms, expected)
    assert (
        bounds.predict(kernel, REDDIT, H200, [row("_aggregate_packed_kernel", "8", 8, (6400, 0, 512))]).limit
        == "instructions"
    )
    # Integers start at half the rate: 320 of them take as long as 640 of any kind.
    slow = bounds.predict(kernel, REDDIT, H200, [row("_aggregate_packed_kernel", "8", 8, (320, 320, 512))])
    assert slow.instruction_ms == pytest.approx(2 * expected)


def test_a_product_is_bound_by_tensor_cores_when_its_rows_are_long():
    sizes = Sizes(1_000_000, 2_000_000, 300, 8192, 2)
    bound = bounds.predict(bounds.product(sizes, 8192, "4"), sizes, H200, [])
    assert bound.product_ms == pytest.approx(1e3 * 2 * 1e6 * 8192 * 128 / 1979e12)
    assert bound.byte_ms == pytest.approx(1e3 * (1e6 * (4096 + 4 + 512) + 128 * 8192) / 4.8e12)
    assert bound.limit == "tensor cores"


def test_cached_share_is_that_of_the_degree_law():
    # Sources as gpu_scene draws them: rank N u^k for uniform u. The share below the n-th rank is estimated from 10^6 draws: a deviation of 0.5e-3,
    # here allowed eight times.
    k = math.log(REDDIT.nodes) / math.log(REDDIT.edges / REDDIT.largest)
    ranks = REDDIT.nodes * torch.rand(1_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** k
    kept = 50e6 / 512
    assert bounds.cached_share(REDDIT, 512, 50e6) == pytest.approx(float((ranks < kept).double().mean()), abs=4e-3)
    assert bounds.cached_share(REDDIT, 64, 50e6) == 1


def test_gpus_agree_with_the_simulators():
    for name in ("h200", "h100-sxm", "a100-80gb"):
        ours, theirs = next(gpu for gpu in bounds.gpus() if gpu.name == name), find_gpu(name)
        assert ours.bandwidth == theirs.bandwidth
        # FP32: a multiply-add is two operations, of 128 a clock and multiprocessor, 64 on an A100
        lanes = 64 if ours.target == "sm_80" else 128
        assert 2 * lanes * ours.sms * ours.clock == pytest.approx(theirs.flops, rel=2e-3)
    assert all(gpu.source for gpu in bounds.gpus())


def test_the_table_has_every_graph_and_the_gpus_that_were_compiled_for():
    lines = bounds.table([row("_aggregate_packed_kernel", "8", 8, (320, 64, 512))]).splitlines()
    assert "h200" in lines[0]
    assert "h100-sxm" in lines[0]
    assert "b200" not in lines[0]
    for name in SIZES:
        assert any(line.startswith(f"| {name} | 128 | aggregate int8 | ") for line in lines)
    assert any(line.startswith("| reddit-size | 602 | matmul int4 | ") for line in lines)
    assert all(line.count("|") == lines[0].count("|") for line in lines)
