"""Every Triton kernel through the real compiler, which needs no GPU, on every target: it compiles and keeps the rules of :mod:`qgnn.perf.static`.
The compiler runs in a process of its own: where TRITON_INTERPRET is set, the kernels are the interpreter's."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton runs on Linux only")

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx942")
TESTS = Path(__file__).parent


def compiler(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False, timeout=1200
    )


def static(*arguments: str) -> subprocess.CompletedProcess[str]:
    return compiler("-m", "qgnn.perf.static", *arguments)


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one run over all kernels and targets found; processes of pytest-xdist share the run of the first that comes."""
    import fcntl

    folder, run = tmp_path_factory.getbasetemp(), os.environ.get("PYTEST_XDIST_TESTRUNUID")
    file = folder.parent / f"static-{run}.json" if run else folder / "static.json"
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            finished = static("--json")
            assert finished.stdout, finished.stderr
            file.write_text(finished.stdout)
    return json.loads(file.read_text())


def test_every_kernel_has_a_case_on_every_target(found):
    written = {
        name
        for file in (TESTS.parent / "kernels" / "gpu").glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.M)
    }
    assert {(row["kernel"], row["target"]) for row in found["rows"]} == {(k, t) for k in written for t in TARGETS}


def test_everything_compiles_and_keeps_the_rules(found):
    # Configurations that no case has are listed there as well.
    assert not found["wrong"]


def test_every_rule_applies_to_kernels_of_every_target(found):
    for rule in found["rows"][0]["rules"]:
        assert {row["target"] for row in found["rows"] if row["rules"][rule] == "ok"} == set(TARGETS), rule


def test_no_exception_is_idle(found):
    assert found["idle_exceptions"] == []


@pytest.mark.parametrize("target", TARGETS[:5])
def test_quantizers_read_16_bytes_at_once(found, target):
    # They have no inner loop, which the rule of 128-bit loads reads.
    kernels = ("_fake_quantize_nearest_kernel", "_tails_count_kernel", "_fixed_point_kernel")
    rows = [row for row in found["rows"] if row["target"] == target]
    read = [row for row in rows if row["file"] in ("quantize", "affine") or row["kernel"] in kernels]
    assert read
    assert not [f"{row['case']}: {row['load_bits']} bits" for row in read if row["load_bits"] != 128]


def test_numbers_of_the_inner_loops(found):
    rows = {(row["kernel"], row["reads"], row["target"]): row for row in found["rows"]}
    for target in TARGETS:
        eight, four = (rows["_aggregate_packed_kernel", reads, target] for reads in ("8", "4"))
        # One addition does for two codes of 8 bits or four of 4, so narrower rows take fewer instructions an element; a float takes at least its own.
        assert 0 < min(four["per_element"]) < min(eight["per_element"]) < 4
        assert min(rows["_aggregate_sum_kernel", "fp32", target]["per_element"]) > 1
        assert rows["_matmul_packed_kernel", "8", target]["matrix"] > 0
        assert 0 < eight["occupancy"] <= 1


def test_mixed_rows_are_read_16_bytes_at_once_but_the_narrowest(found):
    # The rule has an exception for these cases, which would also hide wider rows that are read in pieces.
    rows = [row for row in found["rows"] if row["case"].startswith("aggregate_rows_mixed") and row["aligned"]]
    for row in rows:
        narrow = 2 if row["target"] == "gfx942" else 1
        loads = sorted(loop["load_bits"] for loop in row["loops"])
        assert loads[narrow:] == [128] * (4 - narrow), (row["case"], row["target"])
    assert {row["target"] for row in rows} == set(TARGETS)


SAME_PTX = """
from qgnn.perf.static.compiler import SAME_PTX, cases, compile_kernel, renamed_ptx
names = ["fake_quantize_affine, bf16", "aggregate_sum_fp16", "aggregate_packed_4_rows_uniform", "gat_packed_8_float", "matmul_packed_4_unsigned_zero"]
def code(ptx):  # without debug information: the compiler's cache also holds what another checkout, at another path, compiled
    return [line for line in ptx.partition(".section")[0].splitlines() if not line.lstrip().startswith((".file", ".loc"))]
for file, name in zip(["affine", "aggregate", "aggregate_packed", "attention_packed", "matmul"], names, strict=True):
    for target, source in SAME_PTX.items():
        of_source, of_target = (compile_kernel(cases(file)[name], each).asm["ptx"] for each in (source, target))
        assert code(of_source) != code(of_target) == code(renamed_ptx(of_source, source, target)), name
        print(target, name)
"""


def test_targets_that_share_their_ptx_have_the_same(found):
    # After the run above, whose results the compiler keeps.
    finished = compiler("-c", SAME_PTX)
    assert len(finished.stdout.splitlines()) == 5, finished.stderr


def test_ptx_is_renamed_once():
    from qgnn.perf.static.compiler import renamed_ptx

    assert (
        renamed_ptx(".version 8.8\n.target sm_86\n.x sm_86", "sm_86", "sm_89")
        == ".version 8.8\n.target sm_89\n.x sm_86"
    )
    with pytest.raises(ValueError, match="does not have one line"):
        renamed_ptx(".target sm_90a\n", "sm_86", "sm_89")


def test_each_rule_notices_the_kernel_that_breaks_it():
    finished = compiler(str(TESTS / "breaking_kernels.py"), "sm_80")
    assert finished.returncode == 0, finished.stderr
    said = json.loads(finished.stdout)
    assert not said["errors"]
    broken = {rule: [case for case, what in cases.items() if what] for rule, cases in said["said"].items()}
    sums = [case for case in said["said"]["no spills"] if case.startswith("sum")]
    assert broken == {
        "no spills": ["sum, few registers on sm_80"],
        "128-bit loads": ["sum, unknown stride on sm_80"],
        "integer matrix": [*sums, "product, fp16 on sm_80"],
        "no conversions": ["sum, as floats on sm_80"],
        "weights [out, in]": ["product, [in, out] on sm_80"],
    }


SASS = """
.text._sum_kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/               @P0 BRA `(.L_x_2) ;
.L_x_0:
        /*0020*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_1:
        /*0030*/              @!P1 LDG.E R8, desc[UR4][R4.64] ;
        /*0040*/               @P1 LDG.E.128 R4, desc[UR4][R12.64] ;
        /*0050*/                   I2FP.F32.S32 R9, R8 ;
        /*0060*/                   LOP3.LUT R3, R4, 0xff, RZ, 0xc0, !PT ;
        /*0070*/                   LDS.U8 R7, [R6] ;
        /*0080*/              @!P2 BRA `(.L_x_1) ;
        /*0090*/                   BRA.U !UP0, `(.L_x_0) ;
.L_x_2:
        /*00a0*/                   LDG.E.STRONG.GPU R0, desc[UR4][R2.64] ;
        /*00b0*/              @!P1 BRA `(.L_x_2) ;
        /*00c0*/                   EXIT ;
.L_x_3:
        /*00d0*/                   LDG.E.128 R4, desc[UR4][R12.64] ;
        /*00e0*/                   BRA `(.L_x_3);
"""


def test_inner_loops_of_a_listing():
    from qgnn.perf.static import machine_code

    # The outer loop, the one that waits for other programs, and what is never reached are none.
    loop = machine_code.Loop(
        instructions=6, load_bits=128, row_bits=128, integer=1, matrix=0, conversions=1, byte_accesses=1
    )
    assert machine_code.SASS.loops(SASS) == (loop,)
    assert machine_code.SASS.load_bits_of(SASS) == 128


def test_a_loop_that_waits_is_part_of_the_loop_around_it():
    from qgnn.perf.static.machine_code import inner_loops

    graph = [[1], [2], [2, 1, 3], []]
    assert inner_loops(graph, {2}) == [{2}]
    assert inner_loops(graph, {1}) == [{1, 2}]
    assert inner_loops(graph, {0, 3}) == []


@pytest.mark.parametrize(
    ("target", "registers", "shared", "num_warps", "tensor_columns", "warps"),
    [
        ("sm_90", 32, 0, 4, 0, 64),  # every one of them
        ("sm_90", 128, 0, 4, 0, 16),  # 16,384 registers a scheduler, 128 * 32 a warp
        ("sm_90", 129, 0, 4, 0, 12),  # 129 * 32 registers are handed out as 4,352
        ("sm_90", 32, 47 * 1024, 4, 0, 16),  # 228 KB, 48 KB a block
        ("sm_86", 32, 0, 1, 0, 16),  # 16 blocks
        ("sm_100", 32, 0, 4, 256, 8),  # two blocks with half of the tensor memory each
        ("gfx942", 128, 0, 4, 0, 16),  # 512 registers a lane and SIMD
        ("gfx942", 64, 32 * 1024, 4, 0, 8),  # 64 KB of LDS
    ],
)
def test_occupancy(target, registers, shared, num_warps, tensor_columns, warps):
    from qgnn.perf.static.occupancy import resident_warps

    assert resident_warps(target, registers, shared, num_warps, tensor_columns) == warps


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
    finished = compiler("-c", WITHOUT_HUBS)
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
