"""What runs on the accelerator: a graph in CSR, and the dimensions, kind and widths of every layer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from .config import MAX_BITS

Kind = Literal["gcn", "gin", "sage", "gat", "linear"]
Widths = int | npt.NDArray[np.integer[Any]] | None

_FORMAT = 1
_SCALARS = ("f_in", "f_out", "kind", "heads", "nns_groups", "binary_input", "name")


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer: a product ``X W``, and, unless it is linear, an aggregation over the graph.

    Attributes:
        f_in, f_out: columns of X and of X W.
        bits: width of each row of X: an integer for all, or ``[N]``, 0 to 32; a row of 0 bits is not stored and reads as 0. None: a real-valued
            input that was left unquantized. With the nearest neighbour strategy: the width of the group that each row took.
        kind: "gcn" and "gat" multiply first, so that f_out columns are aggregated; "gin" and "sage" aggregate the f_in columns first; "linear"
            does not aggregate.
        heads: of the attention, "gat" only.
        nns_groups: groups of the nearest neighbour strategy; 0 where there is none.
        binary_input: X holds zeros and ones; ``first_layer`` of the configuration says what is charged for it.
        name: for reports.

    Raises:
        ValueError: a value that is not allowed.
    """

    f_in: int
    f_out: int
    bits: Widths
    kind: Kind = "gcn"
    heads: int = 1
    nns_groups: int = 0
    binary_input: bool = False
    name: str = ""

    def __post_init__(self) -> None:
        for key, least in (("f_in", 1), ("f_out", 1), ("heads", 1), ("nns_groups", 0)):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
                raise ValueError(f"{key} of a layer must be an integer from {least} on, got {value!r}")
            object.__setattr__(self, key, int(value))
        if not isinstance(self.binary_input, bool | np.bool_):
            raise ValueError(f"binary_input of a layer must be true or false, got {self.binary_input!r}")
        object.__setattr__(self, "binary_input", bool(self.binary_input))
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind of a layer must be one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        if self.heads > 1 and self.kind != "gat":
            raise ValueError(f"heads belong to a layer of kind gat, got {self.heads} in one of kind {self.kind}")
        if self.f_out % self.heads:
            raise ValueError(
                f"f_out of a gat layer must be heads times channels, got {self.f_out} and {self.heads} heads"
            )

    @property
    def columns(self) -> int:
        """Columns of the aggregation."""
        return {"gcn": self.f_out, "gat": self.f_out, "gin": self.f_in, "sage": self.f_in, "linear": 0}[self.kind]

    def _placed(self, nodes: int, index: int) -> Layer:
        """With ``bits`` as uint8 ``[nodes]``."""
        if self.bits is None:
            return self
        where, bits = f"bits of layer {index}", np.asarray(self.bits)
        if bits.dtype.kind not in "iu":
            raise ValueError(f"{where} must be integers, got {bits.dtype}; round the learned widths first")
        if bits.ndim and bits.shape != (nodes,):
            raise ValueError(f"{where} must be one integer, or one for each of {nodes} nodes, got shape {bits.shape}")
        low, high = int(bits.min()), int(bits.max())
        if low < 0 or high > MAX_BITS:
            raise ValueError(f"{where} must be 0 to {MAX_BITS}, got {low if low < 0 else high}")
        return replace(self, bits=np.ascontiguousarray(np.broadcast_to(bits.astype(np.uint8), (nodes,))))


@dataclass(frozen=True, eq=False)
class Workload:
    """A graph and the layers that run on it, in their order.

    Attributes:
        indptr, indices: the CSR, row i holding the sources of node i, self loops included where layers add them. Arrays are kept as they are.
        layers: one or more; kept as a tuple, their ``bits`` as uint8 ``[N]``.
        name: for reports.

    Raises:
        ValueError: no CSR, or widths that do not fit it.
    """

    indptr: npt.NDArray[np.integer[Any]]
    indices: npt.NDArray[np.integer[Any]]
    layers: Sequence[Layer] = field(default=())
    name: str = ""

    def __post_init__(self) -> None:
        for key in ("indptr", "indices"):
            value = np.asarray(getattr(self, key))
            if value.ndim != 1 or (value.dtype.kind not in "iu" and value.size):
                raise ValueError(f"{key} must be integers of one dimension, got {value.dtype} of shape {value.shape}")
            object.__setattr__(self, key, value)
        self._check_csr()
        if isinstance(self.layers, Layer):
            raise ValueError("layers must be a list of accel.Layer, got a single one; put it in brackets")
        layers = tuple(self.layers)  # an iterator can be read once
        if not layers:
            raise ValueError("a workload needs a layer at least")
        if not all(isinstance(layer, Layer) for layer in layers):
            raise ValueError("layers must be of accel.Layer")
        placed = tuple(layer._placed(self.num_nodes, index) for index, layer in enumerate(layers))
        object.__setattr__(self, "layers", placed)

    def _check_csr(self) -> None:
        indptr, indices, nodes = self.indptr, self.indices, self.num_nodes
        if nodes < 1:
            raise ValueError(f"indptr must hold N + 1 row pointers of at least one node, got {indptr.size} values")
        if int(indptr[0]) != 0 or int(indptr[-1]) != indices.size:
            raise ValueError(
                f"indptr must go from 0 to the number of indices, {indices.size}, got {int(indptr[0])} to {int(indptr[-1])}"
            )
        falls = np.flatnonzero(indptr[1:] < indptr[:-1])
        if falls.size:
            raise ValueError(f"indptr must not fall, but does after node {int(falls[0])}")
        if indices.size:
            low, high = int(indices.min()), int(indices.max())
            if low < 0 or high >= nodes:
                raise ValueError(f"indices must be 0 to {nodes - 1}, got {low if low < 0 else high}")

    @property
    def num_nodes(self) -> int:
        """Rows of the CSR."""
        return self.indptr.size - 1

    @property
    def num_edges(self) -> int:
        """Entries of the CSR."""
        return self.indices.size

    @cached_property
    def degrees(self) -> npt.NDArray[np.int64]:
        """Entries of each row."""
        indptr = self.indptr.astype(np.int64, copy=False)
        return indptr[1:] - indptr[:-1]

    @cached_property
    def degree_order(self) -> npt.NDArray[np.int64]:
        """The rows by length, descending; ties by index."""
        return np.argsort(-self.degrees, kind="stable")

    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of the graph, and of the layers with their widths; equal for every integer type of the CSR."""
        graph, layers = hashlib.sha256(), hashlib.sha256()
        for array in (self.indptr, self.indices):
            graph.update(str(array.size).encode())
            for start in range(0, array.size, 2**20):  # chunks, so that no copy of a large graph is made
                graph.update(array[start : start + 2**20].astype("<i8", copy=False).tobytes())
        for layer in self.layers:
            layers.update(json.dumps([getattr(layer, key) for key in _SCALARS]).encode())
            layers.update(b"unquantized" if layer.bits is None else np.asarray(layer.bits).tobytes())
        return {"graph": graph.hexdigest(), "bits": layers.hexdigest()}

    def save(self, path: str | Path) -> None:
        """Writes the workload as ``.npz``.

        Raises:
            ValueError: the file cannot be written, or is no ``.npz``.
        """
        header = {
            "format": _FORMAT,
            "name": self.name,
            "layers": [
                {key: getattr(layer, key) for key in _SCALARS} | {"quantized": layer.bits is not None}
                for layer in self.layers
            ],
        }
        arrays: dict[str, Any] = {
            "header": np.array(json.dumps(header)),
            "indptr": self.indptr,
            "indices": self.indices,
        }
        arrays |= {f"bits_{i}": layer.bits for i, layer in enumerate(self.layers) if layer.bits is not None}
        target = Path(path)
        if target.suffix != ".npz":
            raise ValueError(f"a workload is saved as .npz, got {target}")
        try:
            np.savez(target, **arrays)
        except OSError as error:
            raise ValueError(f"{target} cannot be written: {error.strerror}") from error

    @staticmethod
    def load(path: str | Path) -> Workload:
        """What :meth:`save` wrote.

        Raises:
            ValueError: there is no such file, or it is no workload.
        """
        try:
            # opened here, as numpy leaves a damaged file open
            with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
                arrays = dict(file)
            header = json.loads(str(arrays["header"]))
            version = header["format"]
            read = [{k: entry[k] for k in (*_SCALARS, "quantized")} for entry in header["layers"]]
            bits = [arrays[f"bits_{i}"] if entry.pop("quantized") else None for i, entry in enumerate(read)]
            indptr, indices, name = arrays["indptr"], arrays["indices"], header["name"]
        except FileNotFoundError as error:
            raise ValueError(f"there is no file {path}") from error
        except Exception as error:  # whatever a damaged file provokes in zipfile, numpy and json
            raise ValueError(f"{path} is no workload that Workload.save wrote, or is damaged") from error
        if version != _FORMAT:
            raise ValueError(f"{path} has format {version}, this version reads {_FORMAT}")
        try:
            layers = [Layer(bits=widths, **entry) for widths, entry in zip(bits, read, strict=True)]
            return Workload(indptr, indices, layers, name)
        except ValueError as error:
            raise ValueError(f"{path} holds no valid workload: {error}") from error


def baseline(workload: Workload, bits: int = 4) -> Workload:
    """The same layers on the same graph with one width for all rows, as Degree-Quant's: 4 bits is the baseline of A2Q's speedups. No nearest
    neighbour strategy; a real-valued input stays unquantized.

    Raises:
        ValueError: a width out of range.
    """
    layers = [replace(layer, bits=None if layer.bits is None else bits, nns_groups=0) for layer in workload.layers]
    return replace(workload, layers=layers)
