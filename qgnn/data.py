"""Data sets at node level: citation networks, scikit-learn's digits as a graph, and synthetic graphs of any size.

========================  ==========  ===================================================================================================
name                      family      what it is
========================  ==========  ===================================================================================================
Cora, CiteSeer, PubMed    citation    PyG's Planetoid with the public split; read from ``ROOT/NAME/raw``, downloaded there by PyG if missing
digits                    digits      1,797 images, 64 pixels in [0, 1]; symmetric 8-nearest-neighbour graph; needs no download
powerlaw:N,E              synthetic   N nodes, exactly E edges; degrees follow a power law with exponent 2.5
rmat:SCALE,EDGEFACTOR     synthetic   2^SCALE nodes, EDGEFACTOR * 2^SCALE edges; Graph500's R-MAT
========================  ==========  ===================================================================================================

Features are as published: row normalisation and the like belong to a recipe. The same name always gives the same data.
"""

from __future__ import annotations

import os
import re
import stat
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from torch_geometric.data import Data

Family = Literal["citation", "digits", "synthetic"]

NAMES = ("Cora", "CiteSeer", "PubMed", "digits", "powerlaw:N,E", "rmat:SCALE,EDGEFACTOR")
"""What :func:`load` accepts; N, E, SCALE and EDGEFACTOR stand for whole numbers."""

_PLANETOID = {name.lower(): name for name in ("Cora", "CiteSeer", "PubMed")}
_PLANETOID_FILES = ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index")
_SEED = 0
_SYNTHETIC_FEATURES, _SYNTHETIC_CLASSES = 128, 10
_NODE_LIMIT = 2**31


@dataclass(frozen=True, eq=False)
class Dataset:
    """One graph with node labels.

    Attributes:
        name: the name it was loaded by, in its usual spelling.
        data: ``x`` float32 ``[N, F]``, ``edge_index`` int64 ``[2, E]`` (source, target), ``y`` int64 ``[N]``, and the bool masks
            ``train_mask``, ``val_mask``, ``test_mask`` ``[N]``, which do not overlap.
        num_classes: labels are ``0 .. num_classes - 1``.
        family: data sets of one family share their recipes.
    """

    name: str
    data: Data
    num_classes: int
    family: Family


def load(name: str, root: str | os.PathLike[str] | None = None) -> Dataset:
    """Loads a data set by name; the case of letters does not matter.

    Args:
        name: one of :data:`NAMES`, such as ``"Cora"`` or ``"powerlaw:10000,150000"``.
        root: folder of the data sets in PyG's layout, for those that are read from files; by default the environment variable
            ``QGNN_DATA``, else ``./data``. Nothing is written there unless files are missing and have to be downloaded.

    Raises:
        ValueError: unknown name, sizes that make no sense, or files that are missing and cannot be downloaded, or are damaged; the
            sentence names the folder and the files.
    """
    key = name.strip().lower()
    if key in _PLANETOID:
        return _citation(_PLANETOID[key], Path(root or os.environ.get("QGNN_DATA") or "data").expanduser())
    if key == "digits":
        return _digits()
    kind, colon, sizes = key.partition(":")
    if kind in _SYNTHETIC and colon:
        return _SYNTHETIC[kind](sizes)
    if kind in _SYNTHETIC:
        raise ValueError(f"{name!r} lacks its sizes; {_SYNTAX[kind]}")
    raise ValueError(f"there is no data set {name!r}; choose one of {', '.join(NAMES)}")


def _dataset(
    name: str, family: Family, classes: int, x: Tensor, edges: Tensor, y: Tensor, masks: list[Tensor]
) -> Dataset:
    from torch_geometric.data import Data

    train, val, test = masks
    data = Data(x=x, edge_index=edges, y=y, train_mask=train, val_mask=val, test_mask=test)
    return Dataset(name, data, classes, family)


# Citation networks


def _writable(folder: Path) -> bool:
    """Whether files may be put there. A folder without write bits is meant to stay as it is, also for a superuser, whom no bit stops."""
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    return bool(existing.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH)) and os.access(existing, os.W_OK)


def _download(name: str, root: Path, wanted: str) -> None:
    from torch_geometric.datasets import Planetoid

    if not _writable(root / name / "raw"):
        raise ValueError(
            f"{wanted}, and that folder cannot be written to; put them there, or name another with --data-root or QGNN_DATA"
        )
    try:
        Planetoid(str(root), name)
    except Exception as error:  # whatever PyG's download libraries raise
        raise ValueError(
            f"{wanted}, and downloading them failed ({type(error).__name__}: {error}); put them there by hand"
        ) from error


def _citation(name: str, root: Path) -> Dataset:
    from torch_geometric.io import read_planetoid_data

    folder = root / name / "raw"
    files = [f"ind.{name.lower()}.{part}" for part in _PLANETOID_FILES]
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        _download(name, root, f"{name} wants the files {', '.join(missing)} in {folder}")
    # The raw files are parsed each time, which takes half a second, so the folder may be read-only and nothing can be out of date.
    try:
        with warnings.catch_warnings():  # PyG adds a filter that would stay
            data = read_planetoid_data(str(folder), name)
    except Exception as error:  # a damaged file raises whatever the parser stumbles over
        raise ValueError(
            f"the files {', '.join(files)} in {folder} cannot be read ({type(error).__name__}: {error}); delete them and "
            "load the data set again"
        ) from error
    return Dataset(name, data, int(data.y.max()) + 1, "citation")


# Digits


def _digits(neighbours: int = 8, train: int = 20, val: int = 50) -> Dataset:
    """Each image is linked with its nearest neighbours and with those it is a neighbour of. ``train`` and ``val`` images of every digit are
    drawn for training and validation (200 and 500 in all); the other 1,097 are for testing."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    # Squared distances of whole pixel values are exact, and of equals the lower index comes first: the same graph everywhere. In
    # scikit-learn's kneighbors_graph, rounding decides, which differs with the number of threads.
    squares = (pixels * pixels).sum(1)
    distance = squares[:, None] + squares - 2 * pixels @ pixels.T
    np.fill_diagonal(distance, np.inf)
    near = np.zeros(distance.shape, bool)
    np.put_along_axis(near, distance.argsort(axis=1, kind="stable")[:, :neighbours], True, axis=1)
    target, source = (near | near.T).nonzero()
    role = np.full(labels.size, 2)
    generator = np.random.default_rng(_SEED)
    for digit in range(10):
        members = generator.permutation(np.flatnonzero(labels == digit))
        role[members[:train]], role[members[train : train + val]] = 0, 1
    edges = torch.from_numpy(np.stack([source, target]).astype(np.int64))
    return _dataset(
        "digits",
        "digits",
        10,
        torch.from_numpy((pixels / 16).astype(np.float32)),
        edges,
        torch.from_numpy(labels.astype(np.int64)),
        _masks(role),
    )


def _masks(role: NDArray[np.int64]) -> list[Tensor]:
    return [torch.from_numpy(role == part) for part in range(3)]


# Synthetic graphs


def _powerlaw_edges(generator: np.random.Generator, nodes: int, edges: int) -> NDArray[np.int64]:
    """Both ends of every edge are drawn on their own; the node of rank r has a chance in proportion to r^(-2/3), so degrees have a tail with
    exponent 1 + 3/2 = 2.5. With u uniform in [0, 1), r = N u^3 has just that distribution."""
    return np.minimum((nodes * generator.random((2, edges)) ** 3).astype(np.int64), nodes - 1)


def _rmat_edges(generator: np.random.Generator, scale: int, edges: int) -> NDArray[np.int64]:
    """R-MAT with Graph500's probabilities a, b, c, d = 0.57, 0.19, 0.19, 0.05: each level picks one quadrant of the adjacency matrix."""
    ends = np.zeros((2, edges), np.int64)
    for _ in range(scale):
        u = generator.random(edges)
        ends[0] = 2 * ends[0] + (u >= 0.76)
        ends[1] = 2 * ends[1] + ((u >= 0.57) & (u < 0.76) | (u >= 0.95))
    return ends


_SYNTAX = {
    "powerlaw": "write powerlaw:N,E with whole numbers, N nodes (10 or more) and E edges, such as powerlaw:10000,150000",
    "rmat": "write rmat:SCALE,EDGEFACTOR with whole numbers, for 2^SCALE nodes (SCALE 4 to 30) and EDGEFACTOR edges a node, such as rmat:16,16",
}


def _synthetic(kind: str, sizes: str) -> Dataset:
    """Directed; duplicate edges and self loops are kept, as Graph500 does, which is how the number of edges is exact. Nodes are numbered at
    random, so degree says nothing about place in memory. Features are normal, labels uniform and the split 60/20/20 %: made for time and
    memory, accuracies mean nothing."""
    match = re.fullmatch(r"(\d+),(\d+)", sizes.replace(" ", ""))
    if match is None:
        raise ValueError(f"{f'{kind}:{sizes}'!r} is not understood; {_SYNTAX[kind]}")
    first, second = int(match[1]), int(match[2])
    if first < 10 if kind == "powerlaw" else not 4 <= first <= 30:
        raise ValueError(f"{first} is out of range in {f'{kind}:{sizes}'!r}; {_SYNTAX[kind]}")
    nodes, edges = (first, second) if kind == "powerlaw" else (2**first, second * 2**first)
    if nodes >= _NODE_LIMIT:
        raise ValueError(f"a graph has fewer than 2^31 nodes, {kind}:{sizes} asks for {nodes}")
    generator = np.random.default_rng(_SEED)
    try:
        ends = _powerlaw_edges(generator, nodes, edges) if kind == "powerlaw" else _rmat_edges(generator, first, edges)
        ends = generator.permutation(nodes)[ends]
        x = generator.standard_normal((nodes, _SYNTHETIC_FEATURES), np.float32)
    except (MemoryError, ValueError) as error:  # NumPy's ValueError: more elements than an array may have
        raise ValueError(
            f"{kind}:{sizes}, {nodes:,} nodes and {edges:,} edges, does not fit into memory ({error})"
        ) from error
    y = generator.integers(0, _SYNTHETIC_CLASSES, nodes)
    role = np.digitize(generator.permutation(nodes) / nodes, [0.6, 0.8]).astype(np.int64)
    return _dataset(
        f"{kind}:{first},{second}",
        "synthetic",
        _SYNTHETIC_CLASSES,
        torch.from_numpy(x),
        torch.from_numpy(ends),
        torch.from_numpy(y),
        _masks(role),
    )


_SYNTHETIC = {kind: partial(_synthetic, kind) for kind in _SYNTAX}
