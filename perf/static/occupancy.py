"""How many warps can be resident, from what a kernel takes of a multiprocessor (AMD: compute unit)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor has.

    Attributes:
        warps, blocks: most that are resident.
        registers: of 32 bits, by scheduler.
        schedulers: which share the warps, each with registers of its own.
        register_unit: registers of a warp are handed out in multiples of this.
        shared: bytes of shared memory.
        shared_unit: bytes; a block's are handed out in multiples of this.
        shared_reserved: bytes that the system takes of every block's.
        threads: of a warp.
    """

    warps: int
    blocks: int
    shared: int
    registers: int = 16384
    schedulers: int = 4
    register_unit: int = 256
    shared_unit: int = 128
    shared_reserved: int = 1024
    threads: int = 32


KB = 1024
TENSOR_COLUMNS = 512
"""Of a multiprocessor of sm_100 (PTX ISA, "Tensor Memory")."""
LIMITS = {
    "sm_80": Limits(64, 32, 164 * KB),
    "sm_86": Limits(48, 16, 100 * KB),
    "sm_89": Limits(48, 24, 100 * KB),
    "sm_90": Limits(64, 32, 228 * KB),
    "sm_100": Limits(64, 32, 228 * KB),
    "gfx942": Limits(32, 32, 64 * KB, 512 * 64, 4, 8 * 64, 512, 0, 64),
}
"""sm_*: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; units of allocation: cuda_occupancy.h of the CUDA toolkit.
gfx942: LLVM's "User Guide for AMDGPU Backend" (512 vector registers a lane in units of 8, VGPRs and AGPRs together) and AMD's CDNA 3 ISA
reference (4 SIMDs of 8 waves, 64 KB of LDS)."""


def resident_warps(target: str, registers: int, shared: int, warps: int, tensor_columns: int = 0) -> int:
    """Warps of blocks of ``warps`` warps that are resident at once, when a thread takes ``registers``, and a block ``shared`` bytes and
    ``tensor_columns`` of the tensor memory (sm_100).

    Worked example, sm_90, 128 registers, no shared memory, 4 warps: a warp takes 4096 registers, a scheduler has room for 4, so 16 are resident.
    """
    limits = LIMITS[target]
    by_warp = -(-registers * limits.threads // limits.register_unit) * limits.register_unit
    room = limits.registers // by_warp * limits.schedulers if by_warp else limits.warps
    blocks = min(limits.blocks, min(room, limits.warps) // warps)
    if taken := -(-(shared + limits.shared_reserved) // limits.shared_unit) * limits.shared_unit:
        blocks = min(blocks, limits.shared // taken)
    if tensor_columns:
        blocks = min(blocks, TENSOR_COLUMNS // tensor_columns)
    return blocks * warps
