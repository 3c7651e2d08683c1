"""Compiles the cases that the kernel files list (``COMPILE_CASES``) for a GPU that need not be there, and reads the machine code."""

from __future__ import annotations

import importlib
import multiprocessing
import pkgutil
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .machine_code import AMDGCN, SASS, Loop
from .occupancy import LIMITS, resident_warps

TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_86": ("cuda", 86, 32),
    "sm_89": ("cuda", 89, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
"""Backend, architecture and threads a warp, as Triton's ``GPUTarget`` wants them."""

SAME_PTX = {"sm_89": "sm_86"}
"""Targets that are not compiled on their own: for every case Triton made the PTX of the other but for the line that names the target (3.9; some cases
are compared in each run of the tests), and so that is assembled. It saves a sixth of the time."""

FLOAT_BITS = {"*fp32": 32, "*fp16": 16, "*bf16": 16}


@dataclass(frozen=True)
class Compiled:
    """One kernel on one target. ``error`` is the compiler's last line if it failed, and the numbers are then 0.

    Attributes:
        reads: what ``x`` holds: "fp32", "bf16", the bits of a container ("mixed" where rows differ); "" without x.
        aligned: whether 16 bytes divide every row of ``x``, packed.
        element_bits: bits that the inner loop reads for one element of ``x``: its own, and in a product its share of the tile of the weights. 0 where
            rows differ, or without x.
        registers, stack_bytes: of a thread; the stack holds what does not fit into registers.
        shared_bytes, num_warps: of a block.
        load_bits: the widest load from global memory.
        warps: resident in a multiprocessor, by registers, shared memory and threads.
        loops: the inner ones that read global memory or multiply matrices.
    """

    file: str
    case: str
    target: str
    kernel: str
    reads: str = ""
    aligned: bool = False
    element_bits: float = 0.0
    registers: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0
    num_warps: int = 0
    load_bits: int = 0
    warps: int = 0
    loops: tuple[Loop, ...] = ()
    seconds: float = 0.0
    error: str = ""

    @property
    def occupancy(self) -> float:
        return self.warps / LIMITS[self.target].warps

    @property
    def matrix(self) -> int:
        """Integer matrix instructions in the inner loops."""
        return sum(loop.matrix for loop in self.loops)

    @property
    def conversions(self) -> int:
        """From integer to float, in the inner loops."""
        return sum(loop.conversions for loop in self.loops)

    @property
    def per_element(self) -> tuple[float, ...]:
        """Instructions that a thread issues per element that it reads, of each inner loop; empty where an element's bits are not known."""
        if not self.element_bits:
            return ()
        return tuple(loop.instructions * self.element_bits / loop.row_bits for loop in self.loops if loop.row_bits)


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


def untried_configurations() -> list[str]:
    """Configurations that a launch can take (``tuning.shipped``) and no compile case has."""
    tuning = importlib.import_module("qgnn.kernels.gpu.tuning")
    listed = [case for file in kernel_files() for case in cases(file).values()]

    def tried(kernel: str, use: dict[str, int]) -> bool:
        named = (case for case in listed if case.kernel.__name__ == f"_{kernel}_kernel")
        return any(use.items() <= {"num_stages": 3, **case.constexprs, **case.options}.items() for case in named)

    return [
        f"{kernel}: {use}" for kernel in tuning.DEFAULTS for use in tuning.shipped(kernel) if not tried(kernel, use)
    ]


def compile_kernel(case: Any, target: str) -> Any:
    """Triton's compiled kernel for a :class:`qgnn.kernels.gpu.common.CompileCase`; ``.asm`` holds every stage.

    Triton's cache answers where it can: its key is the source with all it calls, types, constants, options, target and the compiler's own files.
    """
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


def _operand(case: Any) -> dict[str, Any]:
    """``reads``, ``aligned`` and ``element_bits`` of :class:`Compiled`, from the types and constants of a case."""
    kind, fixed = case.signature.get("p_x", ""), case.constexprs
    if kind in FLOAT_BITS:
        return {"reads": kind[1:], "element_bits": FLOAT_BITS[kind]}
    if not kind or "CONTAINER" not in fixed:
        return {}
    container = fixed["CONTAINER"]
    reads, bits = ("mixed", 0.0) if container is None else (str(container), float(container))
    if bits and "p_w" in case.signature:  # int8, whatever the container of x
        bits += 8 * fixed["BLOCK_M"] / fixed["BLOCK_N"]
    names = [f"stride_{each}" for each in ("x", *((8, 4, 2, 1) if container is None else (container,)))]
    aligned = all(case.signature.get(name) != "i32" for name in names) and fixed.get("VECTOR") != 1
    aligned &= all(fixed.get(name.upper(), 16) % 16 == 0 for name in names)
    if "STRIDE" in fixed:  # in units of p_x
        aligned = fixed["STRIDE"] * (4 if kind == "*i32" else 1) % 16 == 0
    return {"reads": reads, "aligned": aligned, "element_bits": bits}


def renamed_ptx(ptx: str, source: str, target: str) -> str:
    """PTX for the target ``source`` as that of another.

    Raises:
        ValueError: it does not name its target once.
    """
    if ptx.count(f".target {source}\n") != 1:
        raise ValueError(f"the PTX does not have one line '.target {source}'")
    return ptx.replace(f".target {source}\n", f".target {target}\n")


def _assembled(ptx: str, case: Any, target: str) -> bytes:
    """The cubin that Triton makes of PTX."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    backend = make_backend(GPUTarget(*TARGETS[target]))
    return backend.make_cubin(ptx, {}, backend.parse_options(dict(case.options)), TARGETS[target][1])


def _nvidia_numbers(cubin_bytes: bytes) -> dict[str, Any]:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(cubin_bytes)

        def printed(tool: str, *options: str) -> str:
            return subprocess.run([tools / tool, *options, cubin], capture_output=True, text=True, check=True).stdout

        usage, listing = printed("cuobjdump", "-res-usage"), printed("nvdisasm", "-c", "-ndf")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump printed no resource usage: {usage!r}")
    numbers = {"registers": int(found[1]), "stack_bytes": int(found[2])}
    return numbers | {"load_bits": SASS.load_bits_of(listing), "loops": SASS.loops(listing)}


def _amd_numbers(listing: str) -> dict[str, Any]:
    def metadata(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s*(\d+)", listing, re.MULTILINE)
        if found is None:
            raise ValueError(f"the assembly states no .{name}")
        return int(found[1])

    numbers = {"registers": metadata("vgpr_count"), "stack_bytes": metadata("private_segment_fixed_size")}
    return numbers | {"load_bits": AMDGCN.load_bits_of(listing), "loops": AMDGCN.loops(listing)}


def compiled_case(file: str, case: Any, target: str) -> Compiled:
    """Compiles a case for a target and reads the numbers off its machine code."""
    began, name = time.perf_counter(), case.kernel.__name__
    try:
        source = SAME_PTX.get(target, target)
        kernel = compile_kernel(case, source)
        if target.startswith("gfx"):
            numbers = _amd_numbers(kernel.asm["amdgcn"])
        elif source == target:
            numbers = _nvidia_numbers(kernel.asm["cubin"])
        else:
            numbers = _nvidia_numbers(_assembled(renamed_ptx(kernel.asm["ptx"], source, target), case, target))
    except Exception as error:  # a row that failed is reported as a row
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        return Compiled(file, case.name, target, name, error=f"{type(error).__name__}: {lines[-1]}")
    shared, num_warps = kernel.metadata.shared, kernel.metadata.num_warps
    tensor_columns = getattr(kernel.metadata, "tmem_size", 0) or 0
    return Compiled(
        file,
        case.name,
        target,
        name,
        **_operand(case),
        **numbers,
        shared_bytes=shared,
        num_warps=num_warps,
        warps=resident_warps(target, numbers["registers"], shared, num_warps, tensor_columns),
        seconds=round(time.perf_counter() - began, 2),
    )


def _compiled(file: str, name: str, targets: Sequence[str]) -> list[Compiled]:
    return [compiled_case(file, cases(file)[name], target) for target in targets]


def compile_all(targets: Sequence[str], files: Sequence[str], workers: int) -> list[Compiled]:
    """Every case of ``files`` on every target, in that order, by so many processes."""
    jobs = [(file, name, targets) for file in files for name in cases(file)]
    if workers == 1:
        found = [_compiled(*job) for job in jobs]
    else:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            found = list(pool.map(_compiled, *zip(*jobs, strict=True)))
    return [row for rows in found for row in rows]
