"""Energy of a layer on the accelerator, pJ by part (A2Q section A.7.6)."""

from __future__ import annotations

from .config import Config
from .memory import Operations

PARTS = ("integer", "float", "sram_dynamic", "sram_leakage", "hbm")


def energy(
    operations: Operations, dram_bits: int, sram_read_bits: int, sram_write_bits: int, cycles: int, config: Config
) -> dict[str, float]:
    """pJ of each of :data:`PARTS`; ``dram_bits``: read and written; ``cycles``: how long the memories leak."""
    sram = config.sram
    return {
        "integer": config.int_mac_pj * operations.int_macs + config.int_add_pj * operations.aggregation_adds,
        "float": config.float_multiply_pj * operations.float_multiplies,
        "sram_dynamic": sram.read_pj * sram_read_bits + sram.write_pj * sram_write_bits,
        "sram_leakage": sram.leakage_w * 1e12 * cycles / config.clock_hz,
        "hbm": config.hbm_pj * dram_bits,
    }
