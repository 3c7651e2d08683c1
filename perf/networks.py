"""Layers and whole models of PyG: as they are, on torch's CSR, and ours, converted and frozen to integers.

A frozen model takes float features, so its time includes packing them; the candidates named "bound" run on features that were packed before,
those named "graph" so, too, and as one CUDA graph. On a GPU the inputs take turns, so that no call finds them in the cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.nn import GAT, GCN, GIN, GraphSAGE

from ..convert import convert
from ..freeze import freeze
from .bench import HALF_UNIT, UNIT, Candidate, Case, Run, WrongResult, check_messages, close_in_norm
from .peers import compiled, on_adjacency, on_csr
from .scene import Scene, copies, scene, turns

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


PATHS = ("torch-csr-fp32", "pyg-scatter-fp32", "pyg-compiled-fp32", "qgnn-fp32")
INTEGERS = ("qgnn-int8", "qgnn-int8-bound", "qgnn-int4", "qgnn-int4-bound")


def layers(name: str, device: str) -> Iterator[Case]:
    """One convolution of 128 features to 128 on random features."""
    at = scene(name, device)
    for kind in NETWORKS:
        yield layer(at, kind, (*PATHS, *INTEGERS))


def layer(at: Scene, kind: str, names: Sequence[str], width: int = WIDTH) -> Case:
    """A convolution of as many features to as many by some of the paths."""
    return Case(
        f"{at.name} {kind} {width}->{width}", candidates(at, at.features(width), kind, (width, width, 1), names)
    )


def models(name: str, device: str) -> Iterator[Case]:
    """Two layers with a ReLU between them, on the data set's own features."""
    at = scene(name, device)
    for kind in NETWORKS:
        yield model(at, kind, (*PATHS, *INTEGERS))


def model(
    at: Scene,
    kind: str,
    names: Sequence[str],
    width: int = WIDTH,
    energy: bool = False,
    compiler: Callable[[nn.Module], Any] | None = None,
) -> Case:
    """A model of two layers with so many features between them, by some of the paths."""
    given = at.x.size(1)
    shape = f"{at.name} {kind} {given}->{width}->{at.classes}"
    return Case(shape, candidates(at, at.x, kind, (given, width, 2, at.classes), names, compiler), energy=energy)


@cache
def _network(kind: str, sizes: tuple[int, ...], device: str) -> nn.Module:
    """PyG's model, with the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NETWORKS[kind](*sizes).to(device).eval().requires_grad_(False)


@cache
def _compiled(kind: str, sizes: tuple[int, ...], device: str, compiler: Callable[[nn.Module], Any]) -> Any:
    return compiler(copy.deepcopy(_network(kind, sizes, device)))


def candidates(
    at: Scene,
    x: Tensor,
    kind: str,
    sizes: tuple[int, ...],
    names: Sequence[str],
    compiler: Callable[[nn.Module], Any] | None = None,
) -> list[Candidate]:
    """What runs PyG's model of a kind and of these sizes, by the paths that are named; ``compiler``: what makes the compiled one, instead of
    :func:`.peers.compiled`.

    FP32 sums of ``n`` terms are off by about ``sqrt(n) u`` of the result, ``u = 2^-24``, rounding errors being independent; ``n u`` is allowed, ``n``
    the largest degree and the terms of all products together. The reference is the CSR model in FP64. FP16 rounds weights, the adjacency's values
    and every layer's maps, each by at most ``2^-11``: eight such roundings of the norm are allowed. An integer model is compared with the
    fake-quantized one it was frozen from (:data:`TIES`).
    """
    network = _network(kind, sizes, at.device)
    terms = at.graph.max_degree + 1 + sum(p.size(-1) for p in network.parameters())
    inputs = copies(x, at.device)

    @cache
    def reference() -> Tensor:
        return on_csr(copy.deepcopy(network).double(), at)(x.double(), at.edge_index)

    def on_edges(module: Callable[[], Any]) -> Callable[[], Run]:
        def build() -> Run:
            # a GCN and a GAT multiply before they sum
            check_messages(at.graph.num_edges, sizes[1] if kind in ("gcn", "gat") else max(sizes[:2]), at.device)
            return turns(partial(_swapped, module(), at.edge_index), inputs)

        return build

    def half() -> Run:
        module = on_csr(copy.deepcopy(network).to(at.half), at)
        return turns(partial(_swapped, module, at.edge_index), [value.to(at.half) for value in inputs])

    @cache
    def frozen(scheme: str) -> tuple[nn.Module, Any]:
        converted = convert(network, scheme, num_nodes=at.nodes)
        converted.train()(x, at.graph)  # ranges follow the data of a forward pass
        converted.eval()
        return converted, freeze(converted, Data(x=x, edge_index=at.graph))

    @cache
    def fake_quantized(scheme: str) -> Tensor:
        with torch.no_grad():
            return frozen(scheme)[0](x, at.graph).double()

    def accept_integers(scheme: str, result: Tensor) -> None:
        wanted = fake_quantized(scheme)
        error, noise = (result - wanted).norm(), (wanted - reference()).norm()
        if not error <= TIES * noise:
            raise WrongResult(
                f"off the fake-quantized model by {float(error / noise):.2f} of what quantization changed"
            )

    def bound(scheme: str, captured: bool) -> Run:
        """Runs as many models in turns as there are inputs, each on its own."""
        integers = frozen(scheme)[1]
        several = [integers, *(copy.deepcopy(integers).bind(value, at.graph) for value in inputs[1:])]
        if captured and at.device == "cuda":
            several = [one.capture() for one in several]
        return turns(lambda one: one(), several)

    def packing(scheme: str) -> Run:
        return turns(partial(_swapped, frozen(scheme)[1], at.graph), inputs)

    ways: dict[str, Callable[[], Run]] = {
        "torch-csr-fp32": lambda: turns(partial(_swapped, on_csr(network, at), at.edge_index), inputs),
        "torch-csr-fp16": half,
        "pyg-scatter-fp32": on_edges(lambda: network),
        "pyg-compiled-fp32": on_edges(lambda: _compiled(kind, sizes, at.device, compiler or compiled)),
        "pyg-adjacency-fp32": lambda: turns(on_adjacency(network, at), inputs),
        "qgnn-fp32": lambda: turns(partial(_swapped, convert(network, "fp32"), at.graph), inputs),
    }
    gates = dict.fromkeys(ways, close_in_norm(reference, terms * UNIT))
    gates["torch-csr-fp16"] = close_in_norm(reference, 8 * HALF_UNIT)
    for scheme in ("int8", "int4"):
        integers: dict[str, Callable[[], Run]] = {
            f"qgnn-{scheme}": partial(packing, scheme),
            f"qgnn-{scheme}-bound": partial(bound, scheme, False),
            f"qgnn-{scheme}-graph": partial(bound, scheme, True),
        }
        ways |= integers
        gates |= dict.fromkeys(integers, partial(accept_integers, scheme))
    return [Candidate(name, _without_gradients(ways[name]), gates[name]) for name in names]


def _swapped(module: Any, edges: Any, x: Tensor) -> Any:
    return module(x, edges)


def _without_gradients(build: Callable[[], Run]) -> Callable[[], Run]:
    """Builds and runs as inference does."""

    def built() -> Run:
        with torch.no_grad():
            return torch.no_grad()(build())

    return built
