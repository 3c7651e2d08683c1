"""Data sets by name: published ones, scikit-learn's digits as one graph or as many, and synthetic graphs of any size.

=========================  ===========  ======================================================================================================
name                       family       what it is; the split is the published one unless another is named
=========================  ===========  ======================================================================================================
Cora, CiteSeer, PubMed     citation     PyG's Planetoid, public split
ogbn-arxiv                 ogb          edges in both directions; needs the package ogb: ``pip install qgnn[datasets]``
ogbn-mag                   ogb          papers and their citations, in both directions, without the other kinds of nodes
ogbl-collab                ogb          link prediction, Hits@50; needs the package ogb
Reddit, Reddit2, Flickr    inductive    one label a node; Reddit2 is GraphSAINT's sparser Reddit, which A2Q's table 7 counts
Yelp, AmazonProducts       inductive    many labels a node
MNIST, CIFAR10             superpixels  Dwivedi et al.'s graphs; mean intensity or colour, and position: 3 and 5 features
digits-superpixels         superpixels  the digits as graphs of 36 SLIC segments; mean intensity and position; split 1000/297/500, stratified
ZINC                       molecules    12,000 molecules; the number of the atom type, 0 to 27; constrained solubility
QM9                        molecules    11 features, 19 properties in PyG's units, not standardised; random 80/10/10 %
PCBA                       molecules    MoleculeNet's 128 assays, NaN where not measured; 9 features; needs rdkit; random 80/10/10 %
MUTAG, IMDB-BINARY, ...    tu           any of PyG's TUDataset by its name; 10 folds
digits                     digits       1,797 images, 64 pixels in [0, 1]; symmetric 8-nearest-neighbour graph; split 200/500/1097
powerlaw:N,E               synthetic    N nodes, exactly E edges; degrees follow a power law with exponent 2.5
regular:N,D                synthetic    N nodes with D edges in from random nodes
rmat:SCALE,EDGEFACTOR      synthetic    2^SCALE nodes, EDGEFACTOR * 2^SCALE edges; Graph500's R-MAT
=========================  ===========  ======================================================================================================

Features are as published: row normalisation and the like belong to a recipe. A linear layer without bias on one-hot features is an embedding.
TUDatasets have node labels, one-hot, or, without labels, one-hot in-degrees (a standardised one, where they reach 1,000, as in REDDIT-BINARY).
The same name always gives the same data. The digits and the synthetic graphs need no files; for the others see :func:`load`.
"""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .published import READERS, Dataset, Family, GraphDataset, Split, Task, packed

__all__ = ["NAMES", "Dataset", "Family", "GraphDataset", "Split", "Task", "UnknownDataset", "load"]

_EMBEDDED = ("digits", "digits-superpixels", "powerlaw:N,E", "regular:N,D", "rmat:SCALE,EDGEFACTOR")

NAMES = (*READERS, *_EMBEDDED)
"""What :func:`load` accepts; N, E, D, SCALE and EDGEFACTOR stand for whole numbers."""

_PUBLISHED = {name.lower(): name for name in READERS}
_SEED = 0
_SYNTHETIC_FEATURES, _SYNTHETIC_CLASSES = 128, 10
_NODE_LIMIT = 2**31


class UnknownDataset(ValueError):
    """A name that is none of :data:`NAMES`, or sizes that make no sense: nothing to download."""


def load(name: str, root: str | os.PathLike[str] | None = None) -> Dataset | GraphDataset:
    """Loads a data set by name; the case of letters does not matter.

    Args:
        name: one of :data:`NAMES`, such as ``"Cora"`` or ``"powerlaw:10000,150000"``.
        root: folder of the data sets in PyG's and OGB's layout (``ROOT/Cora/raw``, ``ROOT/ogbn_arxiv/raw``), for those that are read from files; by
            default the environment variable ``QGNN_DATA``, else ``./data``. Files that are missing are downloaded there. What PyG and OGB
            process is kept there too, if it may be written to; for Planetoid and TUDataset, which are parsed in seconds, nothing is.

    Raises:
        UnknownDataset: a ValueError: unknown name, or sizes that make no sense.
        ValueError: a package that is not installed, or files that are missing and cannot be
            downloaded, or are damaged; the sentence names the folder and the files.
    """
    key = name.strip().lower()
    if key in _PUBLISHED:
        folder = Path(root or os.environ.get("QGNN_DATA") or "data").expanduser()
        return READERS[_PUBLISHED[key]](_PUBLISHED[key], folder)
    if key == "digits":
        return _digits()
    if key == "digits-superpixels":
        return _digits_superpixels()
    kind, colon, sizes = key.partition(":")
    if kind in _SYNTHETIC and colon:
        return _SYNTHETIC[kind](sizes)
    if kind in _SYNTHETIC:
        raise UnknownDataset(f"{name!r} lacks its sizes; {_SYNTAX[kind]}")
    choice = [spelling for spelling in READERS if READERS[spelling] is not READERS["MUTAG"]]
    raise UnknownDataset(
        f"there is no data set {name!r}; choose one of {', '.join([*choice, *_EMBEDDED])}, or a TUDataset such as MUTAG"
    )


def _dataset(
    name: str, family: Family, classes: int, x: Tensor, edges: Tensor, y: Tensor, masks: list[Tensor]
) -> Dataset:
    from torch_geometric.data import Data

    train, val, test = masks
    data = Data(x=x, edge_index=edges, y=y, train_mask=train, val_mask=val, test_mask=test)
    return Dataset(name, data, classes, family)


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


def _digits_superpixels() -> GraphDataset:
    """Images enlarged to 16 x 16 pixels, in 6 x 6 segments with compactness 0.25, each linked from its 8 nearest; ``x`` is the mean intensity, y and
    x. After 40 epochs a GIN with 3 layers of 64 has a test accuracy of 68 to 85 % (3 seeds), with 5 x 5 segments of 66 to 74 %."""
    from sklearn.datasets import load_digits

    from .superpixels import enlarge, neighbour_graphs, slic

    pixels, labels = load_digits(return_X_y=True)
    x, edges, nodes = neighbour_graphs(slic(enlarge(pixels.reshape(-1, 8, 8) / 16, 2), grid=6)[1])
    sizes = torch.from_numpy(nodes)
    graphs = packed(
        torch.from_numpy(x), torch.from_numpy(edges), torch.from_numpy(labels.astype(np.int64)), sizes, 8 * sizes
    )
    # Images of a digit in random order, and those that come equally far in their digit's order side by side: any piece has all digits in proportion.
    order = np.random.default_rng(_SEED).permutation(labels.size)
    depth = np.empty(labels.size)
    for digit in range(10):
        members = order[labels[order] == digit]
        depth[members] = np.arange(members.size) / members.size
    train, val, test = np.split(np.argsort(depth, kind="stable"), [1000, 1297])
    split = Split(*(torch.from_numpy(part) for part in (train, val, test)))
    return GraphDataset("digits-superpixels", graphs, 3, 10, "superpixels", "graph", (split,))


def _masks(role: NDArray[np.int64]) -> list[Tensor]:
    return [torch.from_numpy(role == part) for part in range(3)]


# Synthetic graphs


def _powerlaw_edges(generator: np.random.Generator, nodes: int, edges: int) -> NDArray[np.int64]:
    """Both ends of every edge are drawn on their own; the node of rank r has a chance in proportion to r^(-2/3), so degrees have a tail with
    exponent 1 + 3/2 = 2.5. With u uniform in [0, 1), r = N u^3 has just that distribution."""
    return np.minimum((nodes * generator.random((2, edges)) ** 3).astype(np.int64), nodes - 1)


def _regular_edges(generator: np.random.Generator, nodes: int, edges: int) -> NDArray[np.int64]:
    """Every node is the end of equally many edges."""
    return np.stack([generator.integers(0, nodes, edges), np.repeat(np.arange(nodes), edges // nodes)])


def _rmat_edges(generator: np.random.Generator, scale: int, edges: int) -> NDArray[np.int64]:
    """R-MAT with Graph500's probabilities a, b, c, d = 0.57, 0.19, 0.19, 0.05: each level picks one quadrant of the adjacency matrix."""
    ends = np.zeros((2, edges), np.int64)
    for _ in range(scale):
        u = generator.random(edges)
        ends[0] = 2 * ends[0] + (u >= 0.76)
        ends[1] = 2 * ends[1] + ((u >= 0.57) & (u < 0.76) | (u >= 0.95))
    return ends


_EDGES = {"powerlaw": _powerlaw_edges, "regular": _regular_edges, "rmat": _rmat_edges}
_SYNTAX = {
    "powerlaw": "write powerlaw:N,E with whole numbers, N nodes (10 or more) and E edges, such as powerlaw:10000,150000",
    "regular": "write regular:N,D with whole numbers, N nodes (10 or more) and D edges into each, such as regular:10000,16",
    "rmat": "write rmat:SCALE,EDGEFACTOR with whole numbers, for 2^SCALE nodes (SCALE 4 to 30) and EDGEFACTOR edges a node, such as rmat:16,16",
}


def _synthetic(kind: str, sizes: str) -> Dataset:
    """Directed; duplicate edges and self loops are kept, as Graph500 does, which is how the number of edges is exact. Nodes are numbered at
    random, so degree says nothing about place in memory. Features are normal, labels uniform and the split 60/20/20 %: made for time and
    memory, accuracies mean nothing."""
    match = re.fullmatch(r"(\d+),(\d+)", sizes.replace(" ", ""))
    if match is None:
        raise UnknownDataset(f"{f'{kind}:{sizes}'!r} is not understood; {_SYNTAX[kind]}")
    first, second = int(match[1]), int(match[2])
    if not 4 <= first <= 30 if kind == "rmat" else first < 10:
        raise UnknownDataset(f"{first} is out of range in {f'{kind}:{sizes}'!r}; {_SYNTAX[kind]}")
    nodes = 2**first if kind == "rmat" else first
    edges = second if kind == "powerlaw" else second * nodes
    if nodes >= _NODE_LIMIT:
        raise ValueError(f"a graph has fewer than 2^31 nodes, {kind}:{sizes} asks for {nodes}")
    generator = np.random.default_rng(_SEED)
    try:
        ends = _EDGES[kind](generator, first, edges)
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
