"""Quantized graph neural networks: trained on fake-quantized values, run on packed integers.

Attributes are loaded on first use (PEP 562), so ``import qgnn`` loads neither torch nor Triton, Numba or PyTorch Geometric.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "Graph",
    "QTensor",
    "QuantizedFeatureStore",
    "__version__",
    "accel",
    "calibrate",
    "convert",
    "data",
    "export_workload",
    "freeze",
    "kernels",
    "load",
    "nn",
    "ops",
    "patch_pyg",
    "quant",
    "save",
    "train",
    "use_backend",
]

_MODULES = ("accel", "data", "kernels", "nn", "ops", "quant", "train")
_DEFINED_IN = {
    "Graph": "graph",
    "QTensor": "qtensor",
    "QuantizedFeatureStore": "store",
    "calibrate": "calibrate",
    "convert": "convert",
    "export_workload": "export",
    "freeze": "freeze",
    "load": "serialize",
    "patch_pyg": "patch",
    "save": "serialize",
    "use_backend": "kernels.backend",
}

if TYPE_CHECKING:
    from qgnn import accel, data, kernels, nn, ops, quant, train
    from qgnn.calibrate import calibrate
    from qgnn.convert import convert
    from qgnn.export import export_workload
    from qgnn.freeze import freeze
    from qgnn.graph import Graph
    from qgnn.kernels.backend import use_backend
    from qgnn.patch import patch_pyg
    from qgnn.qtensor import QTensor
    from qgnn.serialize import load, save
    from qgnn.store import QuantizedFeatureStore
else:

    def __getattr__(name):
        if name in _MODULES:
            return importlib.import_module(f"{__name__}.{name}")
        if name in _DEFINED_IN:
            value = getattr(importlib.import_module(f"{__name__}.{_DEFINED_IN[name]}"), name)
            globals()[name] = value
            return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps ``qgnn.convert`` and ``qgnn.freeze`` functions: Python sets a package's attribute to each module it imports."""

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, ModuleType) and _DEFINED_IN.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
