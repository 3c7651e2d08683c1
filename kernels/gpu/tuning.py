"""Block sizes and launch options of the Triton kernels: which a launch takes, and how they are measured on request.

A launcher asks :func:`configuration`, by the sizes that matter, each put into a bucket: features rounded up to a power of two, the width of a
container in bits (32 for floats, 0 where rows differ), and the bin of the average degree. What answers, the first that knows:

1. what :func:`autotune` measured on this GPU, with these versions of triton and driver, kept under the user's cache directory;
2. ``tuned/GPU.json``, for a GPU that wants something else than the others; its ``source`` says where its numbers come from;
3. :data:`DEFAULTS`, for every GPU that is not listed, for the CPU and for the interpreter.

2 and 3 have the same form: per kernel a list of rows, and the first row counts whose ``where`` accepts every bucket it names. Worked example:
``[{"where": {"width": [4, 2]}, "use": {"num_warps": 8}}, {"use": {"num_warps": 4}}]`` is 8 warps for 4 and 2 bits, and 4 for all others.

A configuration changes speed only. Kernels of integers give the same bits under each. In kernels of floats the blocks and the warps that an order of
additions depends on are no part of it.
"""

from __future__ import annotations

import json
import math
import os
import re
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.testing
from triton.runtime.errors import OutOfResources

from .common import on_device

DEGREE_BINS = (4, 16, 64, 512)
"""Largest average degree of the bins 0 to 3; bin 4 is what lies above."""

DEFAULTS: dict[str, list[dict[str, Any]]] = {
    "matmul_packed": [{"use": {"BLOCK_N": 64, "BLOCK_M": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3}}],
    "aggregate_packed": [{"use": {"UNROLL": 4, "num_warps": 1}}],
}
"""Configurations for any GPU. Every kernel that is looked up stands here, and its last row has no ``where``. A block is the most that a launcher
takes: it takes less where the tensor has less."""

ALTERNATIVES: dict[str, list[dict[str, int]]] = {"matmul_packed": [{"BLOCK_N": 128, "BLOCK_M": 64}]}
"""What :func:`autotune` tries beside the defaults and the files, as changes to the default: at most 8 for a kernel."""


def _buckets(features: int, width: int, degree: float) -> dict[str, int]:
    return {
        "features": 1 << max(features - 1, 0).bit_length(),
        "width": width,
        "degree": sum(degree > most for most in DEGREE_BINS),
    }


def _first(rows: Sequence[Mapping[str, Any]], buckets: Mapping[str, int]) -> dict[str, int]:
    """What the first row uses that accepts the buckets; nothing where none does."""
    for row in rows:
        if all(buckets[name] in accepted for name, accepted in row.get("where", {}).items()):
            return dict(row["use"])
    return {}


@cache
def tables() -> dict[str, dict[str, Any]]:
    """The files of ``tuned/`` by GPU: ``{"nvidia-h200": {"source": ..., "kernels": {kernel: rows}}}``."""
    files = sorted((Path(__file__).parent / "tuned").glob("*.json"))
    return {file.stem: json.loads(file.read_text("utf-8")) for file in files}


def normalised(name: str) -> str:
    """A GPU's name as files are called: ``"NVIDIA A100-SXM4-80GB"`` is ``"nvidia-a100-sxm4-80gb"``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def table_of(gpu: str) -> str | None:
    """The file for a GPU: the one with the most words, all of which its name has. ``nvidia-a100`` is for every A100, ``amd-mi300x`` for
    ``"AMD Instinct MI300X"``."""
    words = set(normalised(gpu).split("-"))
    return max((name for name in tables() if words.issuperset(name.split("-"))), key=len, default=None)


@cache
def gpu_name(device: torch.device) -> str:
    """The name that the driver gives a GPU; ``""`` for a CPU, which is the interpreter's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


@cache
def _driver() -> str:
    """Version of the GPU's kernel module, ``"unknown"`` where it does not say."""
    for file in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        if Path(file).is_file() and (found := re.search(r"\d+(\.\d+)+", Path(file).read_text("utf-8"))):
            return found[0]
    return "unknown"


def cache_file(kernel: str, gpu: str, features: int, width: int, degree: float = 0) -> Path:
    """Where :func:`autotune` keeps a result: a file for each bucket, so that two processes never write different things to one."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    versions = f"triton-{triton.__version__}-driver-{_driver()}"
    buckets = "-".join(f"{name}-{value}" for name, value in _buckets(features, width, degree).items())
    return root / "qgnn" / "tuned" / normalised(gpu) / versions / f"{kernel}-{buckets}.json"


def shipped(kernel: str) -> list[dict[str, int]]:
    """Every configuration that a launch of ``kernel`` can take, the default first: what the static checks compile and autotuning tries."""
    rows = DEFAULTS[kernel] + [row for table in tables().values() for row in table["kernels"].get(kernel, [])]
    default = DEFAULTS[kernel][-1]["use"]
    found = [default, *({**default, **row} for row in [*(r["use"] for r in rows), *ALTERNATIVES.get(kernel, [])])]
    return [use for i, use in enumerate(found) if use not in found[:i]]


def _kept(kernel: str, gpu: str, features: int, width: int, degree: float) -> dict[str, int]:
    """What was measured here before; a file that cannot be used is named in a warning, and read as nothing."""
    file = cache_file(kernel, gpu, features, width, degree)
    try:
        use = json.loads(file.read_text("utf-8"))["use"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        use, why = None, f"{type(error).__name__}: {error}"
    else:
        why = f"{use} is no configuration of {kernel}"
    if use in shipped(kernel):
        return dict(use)
    warnings.warn(f"{file} is not used ({why}); remove it, or measure again with QGNN_AUTOTUNE=1", stacklevel=2)
    return {}


@cache
def _chosen(kernel: str, gpu: str, features: int, width: int, bin_degree: float) -> dict[str, int]:
    """:func:`configuration` of a bucket."""
    if kernel not in DEFAULTS:
        raise ValueError(f"no configuration of kernel {kernel!r}; list it in DEFAULTS, which has {sorted(DEFAULTS)}")
    buckets = _buckets(features, width, bin_degree)
    default = {**DEFAULTS[kernel][-1]["use"], **_first(DEFAULTS[kernel], buckets)}
    if not gpu:
        return default
    if kept := _kept(kernel, gpu, features, width, bin_degree):
        return kept
    table = table_of(gpu)
    return {**default, **_first(tables()[table]["kernels"].get(kernel, []), buckets)} if table else default


def configuration(kernel: str, device: torch.device, features: int, width: int, degree: float = 0) -> dict[str, int]:
    """Block sizes and launch options of ``kernel`` on ``device``, by name as the launch takes them.

    ``features``: of a row. ``width``: bits of a container, 32 for floats, 0 where rows differ. ``degree``: average edges of a row, 0 where there
    are no edges.

    Raises:
        ValueError: the kernel is not in :data:`DEFAULTS`.
    """
    buckets = _buckets(features, width, degree)
    bound = (*DEGREE_BINS, math.inf)[buckets["degree"]]
    return dict(_chosen(kernel, gpu_name(device), buckets["features"], width, bound))


def _median_ms(run: Callable[[], Any]) -> float:
    return float(triton.testing.do_bench(run, return_mode="median"))


def autotune(
    kernel: str, device: torch.device, features: int, width: int, run: Callable[[dict[str, int]], Any], degree: float = 0,
    measure: Callable[[Callable[[], Any]], float] = _median_ms,
) -> dict[str, int]:  # fmt: skip
    """Measures each configuration of ``kernel`` and keeps the fastest for this GPU (:func:`cache_file`), which it returns.

    ``run`` launches the kernel under a configuration, as often as it is called and with the same result. ``measure`` gives milliseconds of a call.
    What needs more shared memory or registers than the GPU has is left out.

    Raises:
        ValueError: no configuration fits the GPU.
    """
    times: list[tuple[float, dict[str, int]]] = []
    with on_device(device):
        for use in shipped(kernel):
            try:
                times.append((measure(partial(run, use)), use))
            except OutOfResources:
                continue
    if not times:
        raise ValueError(
            f"no configuration of {kernel} fits {gpu_name(device) or device}; add a smaller one to DEFAULTS"
        )
    fastest, use = min(times, key=lambda entry: entry[0])
    _keep(
        cache_file(kernel, gpu_name(device), features, width, degree),
        {"use": use, "milliseconds": fastest, "measured": len(times)},
    )
    _chosen.cache_clear()
    return dict(use)


def _keep(file: Path, result: Mapping[str, Any]) -> None:
    """Writes a file that others see whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_text(json.dumps(result, indent=1), "utf-8")
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def run(
    kernel: str, device: torch.device, features: int, width: int, launch: Callable[[dict[str, int]], Any], degree: float = 0
) -> None:  # fmt: skip
    """``launch(configuration(...))``. Under ``QGNN_AUTOTUNE=1``, the first launch in a bucket on a GPU measures the configurations before, unless
    that was done on an earlier day, or a CUDA graph is being captured."""
    if (
        os.environ.get("QGNN_AUTOTUNE") == "1"
        and (gpu := gpu_name(device))
        and not torch.cuda.is_current_stream_capturing()
    ):
        if not cache_file(kernel, gpu, features, width, degree).exists():
            autotune(kernel, device, features, width, launch, degree)
    launch(configuration(kernel, device, features, width, degree))
