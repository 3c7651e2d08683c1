"""Layers and whole models of PyG: as they are, on torch's CSR, and ours, converted and frozen to integers.

A frozen model takes float features, so its time includes packing them; the candidates named "bound" run on features that were packed before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.nn import GAT, GCN, GIN, GraphSAGE

from ..convert import convert
from ..freeze import freeze
from .bench import UNIT, Candidate, Case, Run, WrongResult, check_messages, close_in_norm
from .peers import compiled, on_csr
from .scene import Scene, scene

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "gcn": GCN,
    "gat": partial(GAT, heads=8),
    "gin": GIN,
    "sage": GraphSAGE,
}
WIDTH = 128
"""Features of the layers, and of the models between their two layers."""


TIES = 0.35
"""How far an integer model may be from the fake-quantized one, of how far that is from FP32. Rounding decides ties otherwise, and ties are not rare:
steps follow from ranges, and these from values that are multiples of earlier steps. A code that a tie decides moves by a step, energy ``s^2``, where
quantization makes ``s^2 / 12`` of every value: if that are 1 % of the codes, ``sqrt(12 * 0.01)`` of the norm of the latter."""


def layers(name: str, device: str) -> Iterator[Case]:
    """One convolution of 128 features to 128 on random features."""
    at = scene(name, device)
    x = at.features(WIDTH)
    for kind in NETWORKS:
        yield Case(f"{at.name} {kind} {WIDTH}->{WIDTH}", _candidates(at, x, kind, (WIDTH, WIDTH, 1)))


def models(name: str, device: str) -> Iterator[Case]:
    """Two layers with a ReLU between them, on the data set's own features."""
    at = scene(name, device)
    width = at.x.size(1)
    for kind in NETWORKS:
        shape = f"{at.name} {kind} {width}->{WIDTH}->{at.classes}"
        yield Case(shape, _candidates(at, at.x, kind, (width, WIDTH, 2, at.classes)))


@cache
def _network(kind: str, sizes: tuple[int, ...], device: str) -> nn.Module:
    """PyG's model, with the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NETWORKS[kind](*sizes).to(device).eval().requires_grad_(False)


@cache
def _compiled(kind: str, sizes: tuple[int, ...], device: str) -> Any:
    return compiled(copy.deepcopy(_network(kind, sizes, device)))


def _candidates(at: Scene, x: Tensor, kind: str, sizes: tuple[int, ...]) -> list[Candidate]:
    """What runs PyG's model of a kind and of these sizes.

    FP32 sums of ``n`` terms are off by about ``sqrt(n) u`` of the result, ``u = 2^-24``, rounding errors being independent; ``n u`` is allowed, ``n``
    the largest degree and the terms of all products together. The reference is the CSR model in FP64. An integer model is compared with the
    fake-quantized one it was frozen from (:data:`TIES`).
    """
    network = _network(kind, sizes, at.device)
    terms = at.graph.max_degree + 1 + sum(p.size(-1) for p in network.parameters())

    @cache
    def reference() -> Tensor:
        return on_csr(copy.deepcopy(network).double(), at)(x.double(), at.edge_index)

    def pyg(module: Callable[[], Any]) -> Callable[[], Run]:
        def build() -> Run:
            check_messages(at.graph.num_edges, max(sizes[0], WIDTH), at.device)
            return partial(module(), x, at.edge_index)

        return build

    @cache
    def frozen(scheme: str) -> tuple[nn.Module, Any]:
        converted = convert(network, scheme, num_nodes=at.nodes)
        converted.train()(x, at.graph)  # ranges follow the data of a forward pass
        converted.eval()
        return converted, freeze(converted, Data(x=x, edge_index=at.edge_index))

    def accept_integers(scheme: str, result: Tensor) -> None:
        fake_quantized = frozen(scheme)[0](x, at.graph).double()
        error, noise = (result - fake_quantized).norm(), (fake_quantized - reference()).norm()
        if not error <= TIES * noise:
            raise WrongResult(
                f"off the fake-quantized model by {float(error / noise):.2f} of what quantization changed"
            )

    def integers(scheme: str, bound: bool) -> Callable[[], Run]:
        return lambda: frozen(scheme)[1] if bound else partial(frozen(scheme)[1], x, at.graph)

    fp32: dict[str, Callable[[], Run]] = {
        "torch-csr-fp32": lambda: partial(on_csr(network, at), x, at.edge_index),
        "pyg-scatter-fp32": pyg(lambda: network),
        "pyg-compiled-fp32": pyg(lambda: _compiled(kind, sizes, at.device)),
        "qgnn-fp32": lambda: partial(convert(network, "fp32"), x, at.graph),
    }
    accept = close_in_norm(reference, terms * UNIT)
    found = [Candidate(name, _without_gradients(build), accept) for name, build in fp32.items()]
    for scheme in ("int8", "int4"):
        same = partial(accept_integers, scheme)
        for name, bound in ((f"qgnn-{scheme}", False), (f"qgnn-{scheme}-bound", True)):
            found.append(Candidate(name, _without_gradients(integers(scheme, bound)), same))
    return found


def _without_gradients(build: Callable[[], Run]) -> Callable[[], Run]:
    """Builds and runs as inference does."""

    def built() -> Run:
        with torch.no_grad():
            return torch.no_grad()(build())

    return built
