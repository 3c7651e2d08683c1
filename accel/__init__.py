"""Simulator of the A²Q bit-serial accelerator, imported as ``qgnn.accel``: numpy only, no torch, nothing of qgnn.

``simulate(Workload(indptr, indices, [Layer(1433, 64, bits)]), load_config("paper-table"))`` -> cycles, operations, traffic and energy of every layer.
"""

from .config import PROFILES, Config, load_config
from .memory import MemoryReport
from .simulator import LayerResult, Result, simulate
from .workload import Layer, Workload, baseline

__all__ = [
    "Config",
    "Layer",
    "LayerResult",
    "MemoryReport",
    "PROFILES",
    "Result",
    "Workload",
    "baseline",
    "load_config",
    "simulate",
]
