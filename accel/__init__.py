"""Simulator of the A²Q bit-serial accelerator, imported as ``qgnn.accel``: numpy only, no torch, nothing of qgnn but its version.

``simulate(Workload(indptr, indices, [Layer(1433, 64, bits)]), load_config("paper-table"))`` -> cycles, operations, traffic and energy of every layer.
"""

from .config import PROFILES, Config, load_config
from .gpu import Gpu, GpuEnergy, find_gpu, gpus, model_fp32
from .memory import MemoryReport
from .report import comparison
from .simulator import LayerResult, Result, simulate
from .trace import write_trace
from .workload import Layer, Workload, baseline

__all__ = [
    "Config",
    "Gpu",
    "GpuEnergy",
    "Layer",
    "LayerResult",
    "MemoryReport",
    "PROFILES",
    "Result",
    "Workload",
    "baseline",
    "comparison",
    "find_gpu",
    "gpus",
    "load_config",
    "model_fp32",
    "simulate",
    "write_trace",
]
