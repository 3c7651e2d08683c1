"""Synthetic graphs with the numbers of nodes and edges of published ones, and their degree laws; drawn on the device, where 10^8 edges take seconds.

Both ends of an edge are drawn on their own, the node of rank ``r`` with a chance in proportion to ``r^(1/k - 1)``: ``r = N u^k`` for uniform ``u``.
The first node then has ``E N^(-1/k)`` edges on average, and ``k`` is such that this is the largest degree that is wanted. Places in memory are
random, so that degree says nothing about them, and multiple edges happen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch_geometric.data import Data

from ..data import Dataset
from ..graph import Graph
from .scene import Scene


@dataclass(frozen=True)
class Sizes:
    """Nodes, edges (both directions), about the largest in-degree, columns of features and the share of them that is not zero, and classes."""

    nodes: int
    edges: int
    largest: int
    features: int
    classes: int
    density: float = 1.0


# Cora's were counted in its files. Those of the others are from memory: no file of them was at hand. Their largest degrees only shape the law.
SIZES = {
    "reddit-size": Sizes(232_965, 114_615_892, 21_657, 602, 41),
    "products-size": Sizes(2_449_029, 123_718_280, 17_481, 100, 47),
    "arxiv-size": Sizes(169_343, 2_332_486, 13_161, 128, 40),
    "cora-size": Sizes(2_708, 10_556, 168, 1433, 7, 0.0127),
}
TINY = Sizes(10, 30, 6, 8, 3)
"""What stands for all of them where there is no GPU: for correctness alone. The interpreter takes its time by programs and instructions."""


@lru_cache(maxsize=1)
def gpu_scene(name: str, device: str) -> Scene:
    """The scene of one of :data:`SIZES`, on a CPU of a tiny graph, whose name says so; the last one is kept, the one before makes room."""
    sizes = SIZES[name] if device == "cuda" else TINY
    generator = torch.Generator(device).manual_seed(0)

    def ends() -> Tensor:
        k = math.log(sizes.nodes) / math.log(sizes.edges / sizes.largest)
        uniform = torch.rand(sizes.edges, generator=generator, device=device)
        return uniform.pow_(k).mul_(sizes.nodes).to(torch.int32).clamp_max_(sizes.nodes - 1)

    place = torch.randperm(sizes.nodes, generator=generator, device=device).to(torch.int32)
    # CSR needs the degrees of the destinations only: sources are drawn edge by edge, whatever the order
    degree = torch.bincount(place[ends()], minlength=sizes.nodes)
    indptr = torch.zeros(sizes.nodes + 1, dtype=torch.int64, device=device)
    torch.cumsum(degree, 0, out=indptr[1:])
    graph = Graph.from_csr(indptr, place[ends()])
    x = torch.randn(sizes.nodes, sizes.features, generator=generator, device=device)
    if sizes.density < 1:
        x = (torch.rand(x.shape, generator=generator, device=device) < sizes.density).float()
    return Scene(name if device == "cuda" else f"{name}, tiny", graph, x, sizes.classes)


def gpu_dataset(name: str, device: str) -> Dataset:
    """The same as a data set with random labels, all for training."""
    at = gpu_scene(name, device)
    generator = torch.Generator(device).manual_seed(1)
    y = torch.randint(at.classes, (at.nodes,), generator=generator, device=device)
    all_of_them = torch.ones(at.nodes, dtype=torch.bool, device=device)
    masks = dict.fromkeys(("train_mask", "val_mask", "test_mask"), all_of_them)
    return Dataset(at.name, Data(x=at.x, edge_index=at.edge_index, y=y, **masks), at.classes, "synthetic")
