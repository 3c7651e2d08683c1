"""Compiles every Triton kernel ahead of time, without a GPU, and reports what the compiler made of it.

Each file of ``qgnn.kernels.gpu`` lists its kernels, with the types and block sizes they are launched with, in
``COMPILE_CASES``. What is reported for each of them and each target: registers a thread, bytes of stack (0 is wanted:
what does not fit into registers is spilled there), bytes of shared memory, and the widest global load in bits (128 is
wanted where rows are read).

Run it as ``python -m qgnn.perf.static``, and see ``--help``. TRITON_INTERPRET must not be set: the interpreter replaces
the compiler.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
"""Backend, architecture and threads a warp, as Triton's ``GPUTarget`` wants them."""


PARKED_BYTES = 8
"""Stack that is no spill: ptxas parks up to two registers, around the subroutine for the rare cases of an IEEE division above all, while
most of the 255 are free. No case needs it with Triton 3.9; three of 156 do with 3.6: aggregate_packed_4_packed on sm_90 (80 registers),
aggregate_packed_1_float on sm_100 (128), matmul_packed_mixed_x8_float on sm_80 (168)."""


@dataclass(frozen=True)
class Compiled:
    """One kernel on one target. ``error`` is the compiler's last line if it failed, and the numbers are then 0."""

    file: str
    case: str
    target: str
    kernel: str
    registers: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0
    load_bits: int = 0
    seconds: float = 0.0
    error: str = ""

    @property
    def spills(self) -> bool:
        """Whether registers lie on the stack for want of more."""
        return self.stack_bytes > PARKED_BYTES


def kernel_files() -> list[str]:
    """Names of the files of ``qgnn.kernels.gpu`` that list compile cases."""
    gpu = importlib.import_module("qgnn.kernels.gpu")
    names = [module.name for module in pkgutil.iter_modules(gpu.__path__)]
    return [name for name in names if hasattr(importlib.import_module(f"{gpu.__name__}.{name}"), "COMPILE_CASES")]


def cases(file: str) -> dict[str, Any]:
    """The compile cases of one kernel file by name."""
    listed = importlib.import_module(f"qgnn.kernels.gpu.{file}").COMPILE_CASES
    found = {case.name: case for case in listed}
    if len(found) != len(listed):
        raise ValueError(f"two compile cases of kernels/gpu/{file}.py have the same name")
    return found


def compile_kernel(case: Any, target: str) -> Any:
    """Triton's compiled kernel for a :class:`qgnn.kernels.gpu.common.CompileCase`; ``.asm`` holds every stage."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    missing = set(names) ^ (set(case.signature) | set(case.constexprs))
    if missing:
        raise ValueError(
            f"compile case {case.name!r} lacks arguments, or has some that the kernel does not: {sorted(missing)}"
        )
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") or signature[name].endswith(":16")]
    source = ASTSource(
        fn=case.kernel,
        signature={name: kind.removesuffix(":16") for name, kind in signature.items()},
        constexprs={(names.index(name),): value for name, value in case.constexprs.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=dict(case.options))


def _nvidia_numbers(asm: dict[str, Any]) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(asm["cubin"])
        usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump printed no resource usage: {usage!r}")
    loads = re.findall(r"\bld\.global(?:\.(?!v\d)[a-zA-Z]\w*(?:::\w+)*)*?(?:\.v(\d))?\.[bsuf](\d+)\b", asm["ptx"])
    bits = [int(lanes or 1) * int(size) for lanes, size in loads]
    bits += [
        8 * int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global.*?\], (0x[0-9a-f]+|\d+)", asm["ptx"])
    ]
    return {"registers": int(found[1]), "stack_bytes": int(found[2]), "load_bits": max(bits, default=0)}


AMD_LOAD_BITS = {"ubyte": 8, "sbyte": 8, "ushort": 16, "sshort": 16, "short": 16, "dword": 32}


def _amd_numbers(asm: dict[str, Any]) -> dict[str, int]:
    text = asm["amdgcn"]

    def metadata(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s*(\d+)", text, re.MULTILINE)
        if found is None:
            raise ValueError(f"the assembly states no .{name}")
        return int(found[1])

    loads = re.findall(
        r"\b(?:global|buffer)_load_(?:(ubyte|sbyte|ushort|sshort|short|dword)(?:_d16\w*)?(?:x(\d))?)\b", text
    )
    bits = [AMD_LOAD_BITS[kind] * int(lanes or 1) for kind, lanes in loads]
    return {
        "registers": metadata("vgpr_count"),
        "stack_bytes": metadata("private_segment_fixed_size"),
        "load_bits": max(bits, default=0),
    }


def compiled(file: str, name: str, target: str) -> Compiled:
    """Compiles one case for one target and reads the numbers off its assembly."""
    began, case = time.perf_counter(), cases(file)[name]
    function = case.kernel.__name__
    try:
        kernel = compile_kernel(case, target)
        numbers = _amd_numbers(kernel.asm) if target.startswith("gfx") else _nvidia_numbers(kernel.asm)
    except Exception as error:  # a row that failed is reported as a row
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        return Compiled(file, name, target, function, error=f"{type(error).__name__}: {lines[-1]}")
    return Compiled(
        file,
        name,
        target,
        function,
        registers=numbers["registers"],
        stack_bytes=numbers["stack_bytes"],
        shared_bytes=kernel.metadata.shared,
        load_bits=numbers["load_bits"],
        seconds=round(time.perf_counter() - began, 2),
    )


def compile_all(targets: list[str], files: list[str], workers: int) -> list[Compiled]:
    """Every case of ``files`` on every target, in that order."""
    jobs = [(file, name, target) for file in files for name in cases(file) for target in targets]
    if workers == 1:
        return [compiled(*job) for job in jobs]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(compiled, *zip(*jobs, strict=True)))


def main(arguments: list[str] | None = None) -> int:
    """The command line. Exit code 1 if a kernel does not compile or spills, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m qgnn.perf.static",
        description="Compiles every Triton kernel without a GPU; reports registers, stack (spills) and the widest load.",
        epilog="example: python -m qgnn.perf.static --target sm_90 --file quantize --json",
    )
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="default: all of them")
    parser.add_argument("--file", action="append", help="kernel file, such as quantize; default: all of them")
    parser.add_argument(
        "--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a table")
    chosen = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the compiler by the interpreter; unset it")
    known = kernel_files()
    unknown = sorted(set(chosen.file or ()) - set(known))
    if unknown:
        parser.error(f"no kernel file {', '.join(unknown)}; there are {', '.join(known)}")
    rows = compile_all(chosen.target or list(TARGETS), chosen.file or known, chosen.workers)
    if chosen.json:
        json.dump([dataclasses.asdict(row) | {"spills": row.spills} for row in rows], sys.stdout, indent=1)
        print()
    else:
        print(f"{'file':<16} {'case':<44} {'target':<7} {'regs':>4} {'stack':>5} {'shared':>6} {'load':>4} {'s':>5}")
        for row in rows:
            print(
                f"{row.file:<16} {row.case:<44} {row.target:<7} {row.registers:>4} {row.stack_bytes:>5} "
                f"{row.shared_bytes:>6} {row.load_bits:>4} {row.seconds:>5.1f} {row.error}"
            )
    return int(any(row.error or row.spills for row in rows))


if __name__ == "__main__":
    sys.exit(main())
