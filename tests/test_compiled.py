"""Every Triton kernel through the real compiler, which needs no GPU: it compiles for each target, does not spill, and reads rows by
128-bit loads. The compiler runs in a process of its own: where TRITON_INTERPRET is set, the kernels are the interpreter's."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton runs on Linux only")

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@cache
def static(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "qgnn.perf.static", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def rows(target: str) -> list[dict[str, object]]:
    # One process for all targets, and as many workers as there are cores: most of the time is the compiler's.
    finished = static("--json")
    assert finished.stdout, finished.stderr
    return [row for row in json.loads(finished.stdout) if row["target"] == target]


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles(target):
    assert rows(target)
    assert not [f"{row['file']}: {row['case']}: {row['error']}" for row in rows(target) if row["error"]]


def test_every_kernel_has_a_case():
    folder = Path(__file__).parents[1] / "kernels" / "gpu"
    written = {
        name for file in folder.glob("*.py") for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.M)
    }
    assert written == {row["kernel"] for row in rows("sm_90")}


@pytest.mark.parametrize("target", TARGETS)
def test_no_kernel_spills(target):
    assert not [f"{row['file']}: {row['case']}: {row['stack_bytes']} B" for row in rows(target) if row["spills"]]


@pytest.mark.parametrize("target", TARGETS[:3])
def test_quantizers_read_16_bytes_at_once(target):
    kernels = ("_fake_quantize_nearest_kernel", "_tails_count_kernel", "_fixed_point_kernel")
    read = [row for row in rows(target) if row["file"] in ("quantize", "affine") or row["kernel"] in kernels]
    assert read
    assert not [f"{row['case']}: {row['load_bits']} bits" for row in read if row["load_bits"] != 128]


WITHOUT_HUBS = """
import torch
from qgnn.kernels.gpu import aggregate, aggregate_extreme, aggregate_packed, attention_packed
from qgnn.kernels.gpu.common import CompileCase
from qgnn.kernels.schedule import build_schedule
from qgnn.perf.static import compile_kernel

TYPES = {torch.float32: "*fp32", torch.int32: "*i32", torch.uint8: "*u8"}

def launch(kernel, grid, num_warps, enable_fp_fusion, **arguments):
    fixed = {p.name for p in kernel.params if p.is_constexpr} | {name for name, value in arguments.items() if value is None}
    kinds = {name: TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32" for name, value in arguments.items()}
    signature = {name: kind for name, kind in kinds.items() if name not in fixed}
    options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}
    case = CompileCase(kernel.__name__, kernel, signature, {name: arguments[name] for name in fixed}, options)
    compile_kernel(case, "sm_90")
    print(kernel.__name__)

for module in (aggregate, aggregate_extreme, aggregate_packed, attention_packed):
    module.launch = launch
indptr, indices, x = torch.tensor([0, 2, 3], dtype=torch.int32), torch.zeros(3, dtype=torch.int32), torch.ones(2, 16)
graph = indptr, indices, build_schedule(indptr)
aggregate.aggregate(*graph, x, None, "sum")
aggregate.aggregate(*graph, x, None, "max")
aggregate.aggregate_packed(*graph, torch.zeros(32, dtype=torch.uint8), 8, 2, 16, True, "acc", *[None] * 5, False, *[None] * 5, (), True)
codes = torch.zeros(32, dtype=torch.uint8), 8, 2, 2, 8, x[:, :2], x[:, 2:4]
attention_packed.gat_packed(*graph, *codes, 0.2, "float", *[None] * 3, False, *[None] * 5, (), True)
"""


def test_a_graph_without_hubs_compiles():
    # The branch of the hubs is compiled all the same; the interpreter never enters it.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    finished = subprocess.run(
        [sys.executable, "-c", WITHOUT_HUBS], env=environment, capture_output=True, text=True, check=False
    )
    names = ["_aggregate_sum_kernel", "_aggregate_extreme_kernel", "_aggregate_packed_kernel", "_gat_packed_kernel"]
    assert finished.stdout.split() == names, finished.stderr


def test_unknown_file_is_an_error():
    finished = static("--file", "nonexistent")
    assert finished.returncode == 2
    assert "no kernel file nonexistent" in finished.stderr


def test_refuses_the_interpreter():
    command = [sys.executable, "-m", "qgnn.perf.static", "--file", "quantize"]
    finished = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 2
    assert "unset it" in finished.stderr
