"""Densities: how many values fit into the memory, and how many multipliers onto the area, of one in FP32.

Memory density is measured, by packing. Arithmetic density is the published table's (densities.toml): a width that is not in it has none, and
nothing is interpolated. Those of a schedule are means, weighted by the epochs at each width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.resources import files
from statistics import fmean
from typing import Any

import torch

from ..kernels.fixed_point import fixed_point_pack
from ..kernels.msfp import msfp_pack
from ..kernels.random import NEAREST
from ..quant import Scheme, parse
from .table import toml

ROWS = 1024
"""Of the map that is packed to be measured: its one scale is then 4 of its bytes."""

Widths = Sequence[tuple[int, int]]
"""Widths and, for each, the epochs that were trained with it."""


@lru_cache(maxsize=1)
def published() -> dict[str, Any]:
    """The table: ``source``, and ``memory`` and ``arithmetic`` density by number format."""
    return toml("densities.toml", files(__package__).joinpath("densities.toml").read_text(encoding="utf-8"))


def printed(scheme: Scheme, kind: str) -> float | None:
    """The published density, ``kind`` "memory" or "arithmetic", of a scheme of one width; None where the table has none."""
    return None if scheme.schedule is not None else _published(scheme, scheme.bits, kind)


def arithmetic(scheme: Scheme, widths: Widths) -> float | None:
    """The arithmetic density of a training; None where a width is not in the table, or the components have several."""
    return _mean(widths, lambda width: _published(scheme, width, "arithmetic"))


def memory(scheme: Scheme, widths: Widths, features: int) -> float | None:
    """The memory density of maps of so many features; None for schemes that are not of quantized training."""
    return _mean(widths, lambda width: _measured(scheme, width, features))


def of_record(record: dict[str, Any]) -> dict[str, float | None]:
    """Both densities of a finished run (:mod:`qgnn.results`), for maps of its recipe's hidden width."""
    scheme = parse(record["scheme"])
    widths = [(width, epochs) for width, epochs in record.get("widths") or [(scheme.bits, 1)]]
    return {
        "memory_density": memory(scheme, widths, record["recipe"]["hidden"]),
        "arithmetic_density": arithmetic(scheme, widths),
    }


def _mean(widths: Widths, density: Callable[[int], float | None]) -> float | None:
    found = [density(width) for width, _ in widths]
    known = [value for value in found if value is not None]
    return fmean(known, [epochs for _, epochs in widths]) if len(known) == len(found) else None


def _published(scheme: Scheme, width: int, kind: str) -> float | None:
    parts = scheme.components
    if (
        parts is not None
        and len({parts.at(name, width) for name in ("weights", "inputs", "messages", "gradients")}) > 1
    ):
        return None
    names = {"fp32": "fp32", "half": "fp16", "fixed": f"int{width}", "msfp": f"msfp{width}"}
    density: float | None = published()[kind].get(names.get(scheme.method, ""))
    return density


def _measured(scheme: Scheme, width: int, features: int) -> float | None:
    if scheme.method in ("fp32", "half"):
        return 32 / width
    if scheme.components is None:
        return None
    bits = scheme.components.at("inputs", width)
    return 4 * ROWS * features / _packed_bytes(scheme.method, bits, features)


@lru_cache
def _packed_bytes(method: str, bits: int, features: int) -> int:
    x = torch.zeros(ROWS, features)
    if bits == 32:
        return x.nbytes
    if method == "msfp":
        return sum(part.nbytes for part in msfp_pack(x, bits - 9, NEAREST))
    scale = torch.ones(1)
    return fixed_point_pack(x, scale, scale.new_zeros(1), bits, True, NEAREST).nbytes + scale.nbytes
