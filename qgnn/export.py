"""From a quantized model to what the accelerator's simulator runs: the layers of a frozen program, with the widths that its kernels read."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch_geometric.data import Batch, Data, HeteroData

from . import data as datasets
from . import serialize
from .accel import Layer, Workload
from .accel.workload import Kind
from .calibrate import calibrate
from .data import Dataset, GraphDataset
from .freeze import freeze
from .graph import Graph
from .integer import IntegerModel
from .models import GRAPH_MODELS, NODE_MODELS
from .parts import Attention, Codec, Operand, Product, Sum
from .quant import parse
from .quant.base import is_row_binary
from .recipes import recipe_for
from .tasks import prepare
from .train import build

_log = logging.getLogger(__name__)

ARCHITECTURES = tuple(dict.fromkeys((*NODE_MODELS, *GRAPH_MODELS)))
"""Models that :func:`architecture_workload` knows."""


def export_workload(model: nn.Module, data: Data, *, name: str = "") -> Workload:
    """The workload of a trained or frozen model on its data, for :func:`qgnn.accel.simulate`.

    Every product of packed rows and a packed weight is a layer, named as in :class:`qgnn.integer.FreezeReport`, in the order in which they run:

    - ``bits`` are the widths of the rows that the kernels read: learned ones, with the nearest neighbour strategy those of the groups that the nodes
      take on these data, one for all, or 1 where rows hold 0 and one constant; these are ``binary_input`` at any width.
    - ``kind`` is the order of the work: "gcn" for a sum after the product, also of a GIN or SAGE whose product runs first; "gin" and "sage" for a sum
      before it; "gat"; "linear" for a product alone, such as SAGE's of a node's own row.

    The CSR is that of the :class:`qgnn.Graph` which the kernels read, self loops included; on a CPU the arrays share its memory. Skip connections,
    batch normalisation and activations are no layers. Products of other rows than the nodes, as after pooling, are left out, and a warning names
    them.

    Args:
        model: what :func:`qgnn.convert` made, trained or calibrated, which is frozen on the data and not changed; or a frozen model.
        data: PyG data with an attribute for every argument of the model.
        name: of the workload, in reports.

    Raises:
        ValueError: several kinds of nodes; layers that stay in float; layers over different graphs; a sum without a product, or a product with two;
            what :func:`qgnn.freeze` raises.
    """
    if isinstance(data, HeteroData):
        raise ValueError(
            "the accelerator has one graph of one kind of nodes, and HeteroData have several; export a homogeneous model"
        )
    frozen = model if isinstance(model, IntegerModel) else freeze(model, data)
    if frozen.floats:
        reasons = "; ".join(f"{layer}: {reason}" for layer, reason in frozen.floats.items())
        raise ValueError(f"the accelerator runs integers only, and layers stay in float: {reasons}")
    with torch.no_grad(), _watched(frozen) as seen:
        frozen(*arguments(frozen, data))
    graph = _one_graph(seen.graphs)
    nodes = next(iter(seen.rows.values())).widths.numel() if graph is None else graph.num_nodes
    products = [product for product, rows in seen.rows.items() if rows.widths.numel() == nodes]
    others = [product.layer for product in seen.rows if product not in products]
    if others:
        _log.warning("left out, as their rows are not the nodes of the graph: %s", ", ".join(others))
    sums = _sums(frozen, products)
    layers = [_layer(product, seen.rows[product], *sums.get(product, ("linear", 1))) for product in products]
    indptr = torch.zeros(nodes + 1, dtype=torch.int32) if graph is None else graph.indptr
    indices = torch.zeros(0, dtype=torch.int32) if graph is None else graph.indices
    return Workload(indptr.cpu().numpy(), indices.cpu().numpy(), layers, name)


def architecture_workload(model: str, loaded: Dataset | GraphDataset, bits: int, hidden: int | None = None) -> Workload:
    """The workload of the model that :func:`qgnn.train.train` would train on a data set, with one width for all nodes; nothing is trained. Many
    graphs are one, side by side.

    Args:
        model: one of :data:`ARCHITECTURES`.
        bits: width of every layer's input; the first layer's are marked as ``binary_input`` where they hold 0 and one constant in every row.
        hidden: features of the hidden maps; by default the recipe's.

    Raises:
        ValueError: there is no such model for the data set, or a layer of it stays in float; a width or size that is not allowed.
    """
    scheme = parse("int4")  # of which sizes do not depend
    recipe = recipe_for(model, scheme, loaded).changed(hidden=hidden)
    data = _whole(loaded, model)
    assert isinstance(data.x, Tensor) and isinstance(data.edge_index, Tensor)
    stand_in = _stand_in(data.x)
    with torch.random.fork_rng(devices=[]):
        network = build(scheme, loaded, recipe, model)
    small = export_workload(calibrate(network, stand_in), stand_in)
    graph = Graph.from_edge_index(data.edge_index, data.x.size(0))
    if small.num_edges > stand_in.num_edges:
        graph = graph.with_self_loops
    layers = [replace(layer, bits=bits) for layer in small.layers]
    return Workload(graph.indptr.numpy(), graph.indices.numpy(), layers, f"{loaded.name} {model} uniform:{bits}")


def workload_from(
    model: str,
    dataset: str | None,
    data_root: str | os.PathLike[str] | None = None,
    bits: str | None = None,
    hidden: int | None = None,
) -> Workload:
    """The workload of a command line: of a model file on a data set, or of an architecture with one width for all nodes.

    Args:
        model: a file that :func:`qgnn.save` wrote, or one of :data:`ARCHITECTURES`.
        dataset, data_root: as in :func:`qgnn.data.load`. Many graphs are one, side by side.
        bits: "uniform:4" and the like, for an architecture; None for a file, which has its widths.
        hidden: as in :func:`architecture_workload`; None for a file.

    Raises:
        ValueError: one of these is missing, or too many; the file is damaged, or made for other data; what :func:`export_workload` and
            :func:`architecture_workload` raise.
    """
    if dataset is None:
        raise ValueError(f"the model {model} needs data: name a data set, such as Cora")
    if model in ARCHITECTURES:
        match = re.fullmatch(r"uniform:([1-9]\d*)", bits or "")
        if match is None:
            raise ValueError(
                f"the architecture {model} needs widths, such as uniform:4 for 4 bits in every node, got {bits!r}"
            )
        return architecture_workload(model, datasets.load(dataset, data_root), int(match[1]), hidden)
    if not Path(model).is_file():
        raise ValueError(f"{model} is no model file, nor one of the architectures {', '.join(ARCHITECTURES)}")
    if bits is not None or hidden is not None:
        raise ValueError(f"the file {model} has widths and sizes of its own; leave bits and hidden out")
    frozen = serialize.load(model)
    loaded = datasets.load(dataset, data_root)
    return export_workload(frozen, whole(frozen, loaded), name=f"{loaded.name} {Path(model).stem}")


def whole(model: IntegerModel, loaded: Dataset | GraphDataset) -> Data:
    """All of a data set, as the training of a frozen model read it; many graphs are one, side by side."""
    return _whole(loaded, next((kind for kind in model.kinds.values() if kind in ARCHITECTURES), "gcn"))


def _whole(loaded: Dataset | GraphDataset, model: str) -> Data:
    """All of a data set, with the features that training reads: of one graph normalised as the recipe has it; no recipe normalises those of many."""
    if isinstance(loaded, GraphDataset):
        return Batch.from_data_list(list(loaded.graphs))
    return prepare(loaded, recipe_for(model, parse("a2q"), loaded))


def _stand_in(x: Tensor) -> Data:
    """A path of a few nodes, in place of a data set whose layers are asked for: with row-binary features where ``x`` has such."""
    nodes, features = 8, x.size(1)
    values = torch.arange(nodes * features).reshape(nodes, features) / (nodes * features)
    path = torch.arange(nodes - 1)
    return Data(
        x=torch.ones(nodes, features) if is_row_binary(x) else values,
        edge_index=torch.stack([path, path + 1]),
        batch=torch.zeros(nodes, dtype=torch.int64),
    )


class _Rows(NamedTuple):
    """What a product reads: widths of the rows, uint8 ``[N]``, and whether each holds 0 and one constant."""

    widths: Tensor
    binary: bool


@dataclass
class _Seen:
    """What the parts of a frozen model read, in the order in which they ran: the rows of every product, and layer and graph of every sum."""

    rows: dict[Product, _Rows] = field(default_factory=dict)
    graphs: list[tuple[str, Graph]] = field(default_factory=list)


@contextmanager
def _watched(model: IntegerModel) -> Iterator[_Seen]:
    """Notes what the parts read, while the context is open."""
    seen = _Seen()
    coded: dict[Codec, _Rows] = {}

    def note(part: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if isinstance(part, Codec):
            x = args[0].detach().float()
            # by value: a scheme may have learned widths for such rows all the same
            coded[part] = _Rows(part.widths(x), part.spec.coding == "binary" or is_row_binary(x))
        elif isinstance(part, Product):
            codec = part.codec_in[0]
            # codes that the part before wrote are of no groups, so that any map with as many rows tells their widths
            seen.rows[part] = coded.get(codec) or _Rows(codec.widths(args[0].scale.unsqueeze(1)), False)
        elif isinstance(part, Sum | Attention):
            seen.graphs.append((part.layer, args[1]))

    hooks = [part.register_forward_hook(note) for part in model.parts.values()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def arguments(model: IntegerModel, data: Data) -> list[Any]:
    """What a frozen model takes of ``data``, or ``data`` itself where its forward code takes that.

    Raises:
        ValueError: the data do not have it.
    """
    values = [getattr(data, name, None) for name in model.inputs]
    if len(values) == 1 and values[0] is None:
        return [data]
    missing = [name for name, value in zip(model.inputs, values, strict=True) if value is None]
    if missing:
        raise ValueError(f"the model takes {', '.join(missing)}, which the data do not have")
    return values


def _one_graph(graphs: list[tuple[str, Graph]]) -> Graph | None:
    """The graph that all layers sum over; None where none does."""
    for layer, graph in graphs:
        if graph.num_sources != graph.num_nodes:
            raise ValueError(f"the accelerator sums over one set of nodes; layer {layer} has sources and destinations")
        first, same = graphs[0]
        if not (graph is same or (torch.equal(graph.indptr, same.indptr) and torch.equal(graph.indices, same.indices))):
            raise ValueError(
                f"the accelerator has one graph; layers {first} and {layer} sum over different edges (self loops count)"
            )
    return graphs[0][1] if graphs else None


def _sums(model: IntegerModel, products: list[Product]) -> dict[Product, tuple[Kind, int]]:
    """Kind and number of heads of the products that a sum belongs to.

    Raises:
        ValueError: a sum belongs to none of ``products``, or two to one.
    """
    found: dict[Product, tuple[Kind, int]] = {}
    for node in model.program.nodes:
        part = _part(model, node)
        if not isinstance(part, Sum | Attention):
            continue
        product, kind = _summed(model, node, part.layer), "gcn"
        if product is None:
            product, kind = _reader(model, node, part.out_channels), model.kinds[part.layer]
        if product not in products or product in found:
            raise ValueError(
                f"the accelerator sums neighbours before or after a product of the nodes, once for each; layer {part.layer} does not"
            )
        found[product] = ("gat", part.heads) if isinstance(part, Attention) else (cast(Kind, kind), 1)
    return found


def _part(model: IntegerModel, node: Any) -> nn.Module | None:
    """The part that a step calls."""
    return model.part(str(node.target)) if isinstance(node, fx.Node) and node.op == "call_module" else None


def _summed(model: IntegerModel, node: fx.Node, layer: str) -> Product | None:
    """The product of a layer which its sum at ``node`` reads; None where the layer sums first."""
    source: Any = node.args[0]
    if isinstance(_part(model, source), Operand):
        source = source.args[0]
    part = _part(model, source)
    if isinstance(part, Product) and not part.relu and f"{part.layer}.".startswith(f"{layer}."):
        return part
    return None


def _reader(model: IntegerModel, node: fx.Node, columns: int) -> Product | None:
    """The first product that reads the ``columns`` of the sum at ``node``, past what is neither a product nor a sum."""
    reading = {node}
    for step in model.program.nodes:
        if not reading.intersection(step.all_input_nodes):
            continue
        part = _part(model, step)
        if isinstance(part, Product) and step.args[0] in reading:  # else it reads a summand
            return part if part.codec_in[0].spec.features == columns else None
        if not isinstance(part, Operand | Sum | Attention):
            reading.add(step)
    return None


def _layer(product: Product, rows: _Rows, kind: Kind, heads: int) -> Layer:
    codec = product.codec_in[0]
    return Layer(
        codec.spec.features,
        product.out_channels,
        rows.widths.cpu().numpy(),
        kind,
        heads=heads,
        nns_groups=codec.bits.numel() if codec.bits is not None and codec.spec.coding == "group" else 0,
        binary_input=rows.binary,
        name=product.layer,
    )
