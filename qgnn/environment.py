"""What this machine and this installation can do: the report of ``qgnn info``, and what an issue needs."""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from . import __version__

LIBRARIES = (
    "torch",
    "triton",
    "numba",
    "torch-geometric",
    "numpy",
    "pandas",
    "scikit-learn",
    "safetensors",
    "matplotlib",
    "typer",
    "rich",
)

VARIABLES = (
    "QGNN_DATA",
    "QGNN_BACKEND",
    "QGNN_DEBUG",
    "QGNN_AUTOTUNE",
    "QGNN_REQUIRE_DATA",
    "TRITON_INTERPRET",
    "TRITON_DEFAULT_FP_FUSION",
    "NUMBA_NUM_THREADS",
    "NUMBA_CACHE_DIR",
    "XDG_CACHE_HOME",
    "RAY_ADDRESS",
    "RAY_USAGE_STATS_ENABLED",
    "KINETO_LOG_LEVEL",
    "OMP_NUM_THREADS",
)
"""Environment variables that change what runs; docs/environment.md says how."""

_OLDEST_GPU = (8, 0)  # Triton's compiler aborts on int8 products for compute capability 7.5


@dataclass(frozen=True)
class Feature:
    """What an optional feature needs: one extra of pyproject.toml, as distributions and the modules they provide."""

    extra: str
    purpose: str
    modules: dict[str, str]
    options: str = ""

    @property
    def missing(self) -> list[str]:
        """The distributions that are not installed."""
        return [name for name, module in self.modules.items() if importlib.util.find_spec(module) is None]

    @property
    def install(self) -> str | None:
        """The command that installs what is missing; None where nothing is."""
        return f"pip install {self.options}{' '.join(self.missing)}" if self.missing else None


FEATURES = (
    Feature("peers", "torch-scatter as a peer", {"torch-scatter": "torch_scatter"}, "--no-build-isolation "),
    Feature("datasets", "OGB, molecules", {"ogb": "ogb", "rdkit": "rdkit"}),
    Feature("energy", "energy on NVIDIA GPUs", {"nvidia-ml-py": "pynvml"}),
    Feature("sweep", "parameter sweeps", {"optuna": "optuna", "pyarrow": "pyarrow", "ray": "ray"}),
    Feature("scale", "graph partitions", {"pymetis": "pymetis"}),
)


def version(distribution: str) -> str | None:
    """Installed version of a distribution, None if it is not there."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _gpus() -> list[dict[str, Any]]:
    import torch

    found = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        capability = (properties.major, properties.minor)
        found.append({"name": properties.name, "capability": capability, "memory_bytes": properties.total_memory})
    return found


def _triton_lacks(gpus: list[dict[str, Any]]) -> str:
    """Why Triton kernels cannot run on a GPU here; empty if they can."""
    import torch

    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (Linux: pip install triton)"
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built for CPUs only"
    if not gpus:
        return "torch finds no GPU"
    if torch.version.cuda is not None and max(gpu["capability"] for gpu in gpus) < _OLDEST_GPU:
        return f"{gpus[0]['name']} is too old, the kernels need compute capability 8.0"
    return ""


def _backends(gpus: list[dict[str, Any]]) -> list[dict[str, Any]]:
    lacks = _triton_lacks(gpus)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
    if interpreted:
        triton = {"available": True, "note": "in Triton's interpreter, slowly, since TRITON_INTERPRET=1"}
    elif lacks:
        triton = {"available": False, "note": f"{lacks}; on a CPU: TRITON_INTERPRET=1, slow"}
    else:
        triton = {"available": True, "note": "default for tensors on a GPU"}
    numba = importlib.util.find_spec("numba") is not None
    cpu_note = "Numba; default for tensors on a CPU" if numba else "numba is not installed (pip install numba)"
    return [
        {"name": "triton", **triton},
        {"name": "cpu", "available": numba, "note": cpu_note},
        {"name": "reference", "available": True, "note": "plain torch, on request; slow"},
    ]


def _numba_threads() -> int | None:
    if importlib.util.find_spec("numba") is None:
        return None
    import numba

    return int(numba.config.NUMBA_NUM_THREADS)


def require(extra: str, *distributions: str) -> None:
    """Says how to install what an optional feature needs; all that its extra has, by default.

    Raises:
        ValueError: something of it is not installed.
    """
    feature = next(feature for feature in FEATURES if feature.extra == extra)
    if missing := [name for name in feature.missing if name in (distributions or feature.modules)]:
        raise ValueError(f"{feature.purpose} need {', '.join(missing)}: pip install {' '.join(missing)}")


def machine() -> dict[str, Any]:
    """Versions and devices, as JSON can hold them."""
    import torch

    return {
        "versions": {
            "qgnn": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in LIBRARIES},
            "cuda of torch": torch.version.cuda,
        },
        "devices": {
            "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
            "processors": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "numba_threads": _numba_threads(),
            "gpus": _gpus(),
        },
    }


def report() -> dict[str, Any]:
    """:func:`machine`, backends, environment variables and optional features, as JSON can hold them."""
    found = machine()
    return {
        **found,
        "backends": _backends(found["devices"]["gpus"]),
        "environment": {name: os.environ.get(name) for name in VARIABLES},
        "optional": [
            {"extra": f.extra, "purpose": f.purpose, "missing": f.missing, "install": f.install} for f in FEATURES
        ],
    }
