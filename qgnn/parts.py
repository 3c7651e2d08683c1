"""The parts of a frozen model: what runs on packed integers (NUMERICS 7; A2Q proofs 2 and 3).

Four kinds of parts do the work, each one kernel launch: a :class:`Codec` turns a float map into packed rows, a :class:`Product` multiplies packed
rows by a packed weight, a :class:`Sum` adds the packed rows of neighbours, and :class:`Attention` weighs them. An :class:`Operand` packs a float
map for a Sum. A Product, a Sum and an Attention finish their rows themselves: degree normalisation, bias, batch normalisation, a summand, ReLU,
and the codes that the next part reads. So a GCN layer is two launches. What integers cannot do stands between the parts in float.
"""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from . import ops
from .graph import Graph, TracedGraph, traced_graph
from .kernels.aggregate import aggregate_packed
from .kernels.attention import attention_scores, gat_packed
from .kernels.binary import quantize_binary
from .kernels.matmul import matmul_packed
from .kernels.nearest import group_table, nearest_group, quantize_nearest
from .kernels.packing import bucket_rows, container_of, containers_of, uniform_counts
from .kernels.quantize import largest_code, quantize
from .qtensor import check_finite
from .quant.base import row_binary_codes

Coding = Literal["binary", "node", "tensor", "group"]
Pooling = Literal["sum", "mean", "max"]
LayerGraph = Graph | TracedGraph


class Packed(NamedTuple):
    """Packed rows, uint8, and float32 ``[N]``: the step of each row, times the factor ``D^-1/2`` where the layer that reads it normalises."""

    data: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Place:
    """Where and how the rows of a map are packed: step and width of each, rows in each container, the place of each (None: as they come), and the
    scale of :class:`Packed`."""

    step: Tensor
    bits: Tensor
    counts: list[int]
    pos: Tensor | None
    scale: Tensor


def rows_of(value: Tensor | Packed) -> int:
    """Rows of a float or packed map."""
    return value.scale.size(0) if isinstance(value, Packed) else value.size(0)


def graph_of(
    edges: Tensor | Graph, source: Tensor | Packed, target: Tensor | Packed | None, add_self_loops: bool
) -> LayerGraph:
    """The graph that a layer sums over, for an ``edge_index`` and the maps of its sources and, if it is bipartite, its destinations."""
    sources = rows_of(source)
    nodes = sources if target is None else rows_of(target)
    if torch.compiler.is_compiling() and isinstance(edges, Tensor):
        return traced_graph(edges, sources, nodes, add_self_loops)
    base = Graph.of(edges, sources if target is None else (sources, nodes))
    if base.num_nodes != nodes:
        raise ValueError(
            f"the graph has {base.num_nodes} destinations and their map {nodes} rows; build it for both sizes"
        )
    return base.with_self_loops if add_self_loops else base


@torch.library.custom_op("qgnn::pool_nodes", mutates_args=())
def pool_nodes(x: Tensor, batch: Tensor, reduce: str) -> Tensor:
    """:func:`pool` as one operation, for torch.compile and torch.export, to which the number of graphs is unknown."""
    return ops.scatter(x, batch, 0, graphs_of(batch), cast(Pooling, reduce))


@pool_nodes.register_fake
def _(x: Tensor, batch: Tensor, reduce: str) -> Tensor:
    return x.new_empty((torch.library.get_ctx().new_dynamic_size(), x.shape[1]))


def graphs_of(batch: Tensor) -> int | None:
    """The number of graphs, the largest in ``batch`` ``[N]`` plus one; None while torch compiles or exports, when no value is known."""
    if torch.compiler.is_compiling():
        return None
    return int(batch.max()) + 1 if batch.numel() else 0


def pool(x: Tensor, batch: Tensor | None, size: int | None, reduce: Pooling) -> Tensor:
    """Reduces the rows of ``x`` ``[N, F]`` graph by graph -> ``[G, F]``, differentiable. ``batch`` ``[N]``: the graph of every node, None where
    all are of one; ``size``: the number of graphs, by default :func:`graphs_of`."""
    graph = x.new_zeros(x.size(0), dtype=torch.int64) if batch is None else batch
    if batch is None:
        return ops.scatter(x, graph, 0, 1, reduce)
    if size is None and torch.compiler.is_compiling():
        return pool_nodes(x, graph, reduce)
    return ops.scatter(x, graph, 0, graphs_of(graph) if size is None else size, reduce)


class Part(nn.Module):
    """One step of a frozen model, of ``launches`` kernels. ``layer`` names the layer that it was frozen from."""

    launches = 1

    def __init__(self, layer: str) -> None:
        super().__init__()
        self.layer = layer

    def keep(self, **tensors: Tensor | None) -> None:
        """Registers buffers."""
        for name, tensor in tensors.items():
            self.register_buffer(name, None if tensor is None else tensor.detach().contiguous().clone())


@dataclass(frozen=True)
class CodecSpec:
    """Everything about a :class:`Codec` that is no tensor.

    Attributes:
        layer: the layer that reads the codes.
        coding: "binary", rows of 0 and one constant, in 1 bit with that constant as step; "node", a step and width per node (A2Q); "tensor", one
            step for all; "group", that of the nearest group (A2Q algorithm 1).
        features: columns.
        signed: whether codes have a sign.
        normalize: whether the layer multiplies its rows by ``D^-1/2``.
    """

    layer: str
    coding: Coding
    features: int
    signed: bool
    normalize: bool


class Codec(Part):
    """Turns a float map ``[N, features]`` into the packed rows that a :class:`Product` reads.

    Buffers: ``step`` (float32) and ``bits`` (uint8), ``[N]`` for "node", of one element for "tensor", ``[groups]`` for "group"; none for "binary".
    """

    step: Tensor | None
    bits: Tensor | None
    pos: Tensor | None
    bounds: Tensor
    order: Tensor

    def __init__(self, spec: CodecSpec, step: Tensor | None = None, bits: Tensor | None = None) -> None:
        super().__init__(spec.layer)
        self.spec = spec
        self.keep(step=step, bits=bits)
        self.counts: list[int] = []
        self.container = 1
        pos = None
        if self.step is not None and self.bits is not None and spec.coding == "node":
            self.counts, pos = bucket_rows(containers_of(self.bits, spec.signed))
        elif self.step is not None and self.bits is not None:
            # groups share a container: which of them the nodes of a graph take is known only when it comes
            self.container = container_of(int(self.bits.max()), spec.signed)
            if spec.coding == "group":
                bounds, order = group_table(self.step * largest_code(self.bits, spec.signed))
                self.register_buffer("bounds", bounds, persistent=False)
                self.register_buffer("order", order, persistent=False)
        self.register_buffer("pos", pos, persistent=False)
        # the steps of groups are known when values are, and multiplied then
        self.launches = 2 if spec.coding == "group" and spec.normalize else 1
        self._known: tuple[weakref.ref[Graph] | None, Place] | None = None

    @property
    def remembered(self) -> object:
        """What :meth:`place` remembers."""
        return self._known

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None}

    @property
    def fuses(self) -> bool:
        """Whether the part before can write these codes: their steps are known before the values are."""
        return self.spec.coding in ("node", "tensor")

    def place(self, nodes: int, graph: LayerGraph | None) -> Place:
        """Where the rows of a map of ``nodes`` nodes lie, remembered for the last graph.

        Raises:
            ValueError: there are steps for another number of nodes.
        """
        assert self.step is not None and self.bits is not None, "as it fuses"
        if torch.compiler.is_compiling():
            return self._place(nodes, graph)
        known = self._known  # once: another thread may replace it
        if known is not None:
            owner, place = known
            same = graph is None if owner is None else owner() is graph
            if same and place.step.size(0) == nodes and place.step.device == self.step.device:
                return place
        place = self._place(nodes, graph)
        self._known = (weakref.ref(graph) if isinstance(graph, Graph) else None, place)
        return place

    def _place(self, nodes: int, graph: LayerGraph | None) -> Place:
        assert self.step is not None and self.bits is not None, "as it fuses"
        if self.spec.coding == "node":
            if self.step.numel() != nodes:
                raise ValueError(
                    f"layer {self.layer} has steps for {self.step.numel()} nodes, the graph has {nodes}: node-level A2Q is tied to its graph"
                )
            step, bits, counts = self.step, self.bits, self.counts
        else:
            step, bits = self.step.expand(nodes).contiguous(), self.bits.expand(nodes).contiguous()
            counts = uniform_counts(nodes, self.container)
        return Place(step, bits, counts, self.pos, self._scale(step, graph))

    def _scale(self, step: Tensor, graph: LayerGraph | None) -> Tensor:
        if not self.spec.normalize:
            return step
        assert graph is not None, "as its layer has one"
        return step * graph.inv_sqrt_degree

    def layout(self, nodes: int) -> tuple[list[int], Tensor | None]:
        """Rows of a map in each container, and their places."""
        return (self.counts, self.pos) if self.spec.coding == "node" else (uniform_counts(nodes, self.container), None)

    def widths(self, x: Tensor) -> Tensor:
        """Widths of the rows of ``x``, uint8 ``[N]``."""
        if self.bits is None or self.step is None:
            return torch.ones(x.size(0), dtype=torch.uint8, device=x.device)
        if self.spec.coding != "group":
            return self.bits.expand(x.size(0))
        largest = x.abs().amax(1) if x.size(1) else x.new_zeros(x.size(0))
        return self.bits[nearest_group(largest, self.bounds, self.order)]

    def forward(self, x: Tensor, graph: LayerGraph | None = None) -> Packed:
        """``x`` ``[N, features]``; ``graph``, that of the layer, where it normalises.

        Raises:
            ValueError: ``x`` has another shape; a "binary" layer gets rows of several nonzero values; NaN or infinity (on a GPU under
                ``QGNN_DEBUG=1`` only).
        """
        spec = self.spec
        if not isinstance(x, Tensor) or x.dim() != 2 or x.size(1) != spec.features:
            shape = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x of layer {self.layer} must be a tensor [N, {spec.features}], got {shape}")
        x = x.detach().float()
        if spec.coding == "binary":
            return self._binary(x, graph)
        if not torch.compiler.is_compiling() and (x.device.type == "cpu" or os.environ.get("QGNN_DEBUG") == "1"):
            check_finite(x)
        assert self.step is not None and self.bits is not None, "as it is not binary"
        if spec.coding == "group":
            data, step, _ = quantize_nearest(
                x, self.bounds, self.order, self.step, self.bits, spec.signed, self.container
            )
            return Packed(data, self._scale(step, graph))
        place = self.place(x.size(0), graph)
        data, *_ = quantize(x, place.step, place.bits, True, spec.signed, place.pos, place.counts, False)
        return Packed(data, place.scale)

    def _binary(self, x: Tensor, graph: LayerGraph | None) -> Packed:
        data, step, valid = quantize_binary(x)
        if torch.compiler.is_compiling():
            torch._assert_async(
                valid.all(), f"layer {self.layer} was trained on rows of 0 and one constant, and got others"
            )
        elif not bool(valid.all()):
            check_finite(x)
            row_binary_codes(x)  # names the row
        return Packed(data, self._scale(step, graph))


class Operand(Part):
    """Packs a float map with a step per column, for a :class:`Sum`. Buffers: ``step`` (float32) and ``bits`` (uint8), ``[F]``."""

    step: Tensor
    bits: Tensor

    def __init__(self, layer: str, step: Tensor, bits: Tensor) -> None:
        super().__init__(layer)
        self.keep(step=step, bits=bits)
        self.container = container_of(int(self.bits.max()), True)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[N, F]`` -> packed rows, signed, in one container."""
        if x.dim() != 2 or x.size(1) != self.step.numel():
            raise ValueError(f"x of layer {self.layer} must be a tensor [N, {self.step.numel()}], got {list(x.shape)}")
        if not torch.compiler.is_compiling() and (x.device.type == "cpu" or os.environ.get("QGNN_DEBUG") == "1"):
            check_finite(x)
        counts = uniform_counts(x.size(0), self.container)
        data, *_ = quantize(x.detach().float(), self.step, self.bits, False, True, None, counts, False)
        return data


class Finisher(Part):
    """A part that finishes its rows itself, in this order: column factor, bias, summand, ReLU, factor and shift of a batch normalisation after it;
    then the codes of the part that reads them, if ``following`` holds one.

    Buffers, float32 ``[F]``: ``column_scale``, and ``bias``, ``post_scale``, ``post_shift`` or None.
    """

    column_scale: Tensor
    bias: Tensor | None
    post_scale: Tensor | None
    post_shift: Tensor | None

    def __init__(self, layer: str, column_scale: Tensor, bias: Tensor | None) -> None:
        super().__init__(layer)
        self.keep(column_scale=column_scale.float(), bias=None if bias is None else bias.float())
        self.keep(post_scale=None, post_shift=None)
        self.relu = False
        self.following: list[Codec | Operand] = []  # a list, as it is registered where it belongs

    @property
    def out_channels(self) -> int:
        """Columns of the result."""
        return self.column_scale.numel()

    @property
    def codec(self) -> Codec | None:
        """The codec that it does the work of."""
        return next((c for c in self.following if isinstance(c, Codec)), None)

    def absorb_affine(self, scale: Tensor, shift: Tensor, summand: bool) -> None:
        """Takes over ``x * scale + shift``, a batch normalisation of the result (A2Q eq. 18); before a ReLU without a summand it is part of the
        column factor and the bias."""
        if self.post_scale is not None and self.post_shift is not None:
            self.keep(post_scale=self.post_scale * scale, post_shift=self.post_shift * scale + shift)
        elif self.relu or summand:
            self.keep(post_scale=scale, post_shift=shift)
        else:
            bias = shift if self.bias is None else self.bias * scale + shift
            self.keep(column_scale=self.column_scale * scale, bias=bias)

    def _after(self) -> tuple[bool, Tensor | None, Tensor | None]:
        return self.relu, self.post_scale, self.post_shift

    def _summand(self, addend: Tensor | None, nodes: int) -> Tensor | None:
        """``addend``, of the shape that kernels read without looking."""
        if addend is not None and addend.shape != (nodes, self.out_channels):
            raise ValueError(
                f"what layer {self.layer} is added to must be [{nodes}, {self.out_channels}], got {list(addend.shape)}"
            )
        return None if addend is None else addend.float()

    def _rows(self, nodes: int, graph: LayerGraph | None) -> tuple[str, Place | None]:
        codec = self.codec
        return ("float", None) if codec is None else ("rows", codec.place(nodes, graph))

    def _result(self, out: Tensor, place: Place | None) -> Tensor | Packed:
        return out if place is None else Packed(out, place.scale)


def _codes(
    place: Place | None, codec: Codec | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[int], bool]:
    if place is None or codec is None:
        return None, None, None, [0] * 5, False
    return place.step, place.bits, place.pos, place.counts, codec.spec.signed


class Product(Finisher):
    """Packed rows times a packed weight.

    Buffers: ``weight`` uint8, packed ``[out, in]`` in ``container`` (4 or 8) bits; those of :class:`Finisher`.
    """

    weight: Tensor

    def __init__(
        self, layer: str, codec: Codec, weight: Tensor, container: int, weight_step: Tensor, bias: Tensor | None
    ) -> None:
        super().__init__(layer, weight_step, bias)
        self.keep(weight=weight)
        self.codec_in: tuple[Codec, ...] = (codec,)  # registered where it belongs
        self.container = container
        ops.check_product_headroom(codec.spec.features)

    def forward(self, x: Packed, addend: Tensor | None = None, following: LayerGraph | None = None) -> Tensor | Packed:
        """Float32 ``[N, out]``, or what follows: :class:`Packed` rows, or the packed operand of a sum. ``addend`` ``[N, out]`` is added before
        ReLU; ``following`` is the graph of the layer that reads the rows, where it normalises."""
        codec, nodes = self.codec_in[0], rows_of(x)
        counts, pos = codec.layout(nodes)
        common = (
            x.data, pos, counts, codec.spec.signed, 0, self.weight, self.container, codec.spec.features,
            self.out_channels,
        )  # fmt: skip
        relu, post_scale, post_shift = self._after()
        finish = (x.scale, self.column_scale, self.bias, self._summand(addend, nodes), relu, post_scale, post_shift)
        operand = next((o for o in self.following if isinstance(o, Operand)), None)
        if operand is not None:
            packed = uniform_counts(nodes, operand.container)
            return matmul_packed(*common, "columns", *finish, operand.step, operand.bits, None, packed, True)
        output, place = self._rows(nodes, following)
        return self._result(matmul_packed(*common, output, *finish, *_codes(place, self.codec)), place)


Norm = Literal["none", "gcn", "mean"]


class Sum(Finisher):
    """The sum of the packed rows of every node's neighbours, in int32: exact, in any order.

    Buffers: ``self_scale``, ``[1]`` or None: what a node's own row is added with; those of :class:`Finisher`.

    Args:
        operand: what packs the rows.
        norm: factor of the sum of a node: "gcn" ``D^-1/2``, "mean" one over the in-degree.
    """

    self_scale: Tensor | None

    def __init__(
        self, layer: str, operand: Operand, norm: Norm, bias: Tensor | None, self_scale: Tensor | None = None
    ) -> None:
        super().__init__(layer, operand.step, bias)
        self.keep(self_scale=None if self_scale is None else self_scale.float().reshape(1))
        self.operand: tuple[Operand, ...] = (operand,)  # registered where it belongs
        self.norm = norm

    def forward(
        self, x: Tensor, graph: LayerGraph, addend: Tensor | None = None, following: LayerGraph | None = None
    ) -> Tensor | Packed:
        """``x``, what the :class:`Operand` packed -> float32 ``[N, F]``, or the rows that follow, whose layer has the graph ``following``.

        Raises:
            ValueError: a sum could overflow int32.
        """
        operand = self.operand[0]
        if isinstance(graph, Graph):
            ops.check_headroom(graph, operand.container - 1)
        factor = {"none": None, "gcn": "inv_sqrt_degree", "mean": "inv_degree"}[self.norm]
        output, place = self._rows(graph.num_nodes, following)
        relu, post_scale, post_shift = self._after()
        out = aggregate_packed(
            graph.indptr, graph.indices, list(graph.schedule), x, operand.container, graph.num_sources,
            self.out_channels, True, output, None if factor is None else getattr(graph, factor), self.self_scale,
            self.column_scale, self.bias, self._summand(addend, graph.num_nodes), relu, post_scale, post_shift,
            *_codes(place, self.codec),
        )  # fmt: skip
        return self._result(out, place)


class Attention(Finisher):
    """Graph attention over packed rows: scores from the codes, softmax and weighted sum in float32 (DQ app. A.1), two launches.

    Buffers: ``vectors`` float32 ``[2, heads * channels]``, attention vectors of source and target times the steps; those of :class:`Finisher`.
    """

    launches = 2
    vectors: Tensor

    def __init__(
        self, layer: str, operand: Operand, heads: int, negative_slope: float, vectors: Tensor, bias: Tensor | None
    ) -> None:
        super().__init__(layer, operand.step, bias)
        self.keep(vectors=vectors.float())
        self.operand: tuple[Operand, ...] = (operand,)  # registered where it belongs
        self.heads, self.negative_slope = heads, float(negative_slope)

    def forward(
        self,
        x: Tensor,
        graph: LayerGraph,
        addend: Tensor | None = None,
        following: LayerGraph | None = None,
        target: Tensor | None = None,
    ) -> Tensor | Packed:
        """``x``, the packed rows of the sources, ``target``, those of the destinations where they are others -> float32 ``[N, heads * channels]``, or
        the rows that follow."""
        operand, heads = self.operand[0], self.heads
        channels = self.out_channels // heads
        scores = attention_scores(x, operand.container, graph.num_sources, heads, channels, self.vectors)
        ends = (
            scores
            if target is None
            else attention_scores(target, operand.container, graph.num_nodes, heads, channels, self.vectors)
        )
        output, place = self._rows(graph.num_nodes, following)
        relu, post_scale, post_shift = self._after()
        out = gat_packed(
            graph.indptr, graph.indices, list(graph.schedule), x, operand.container, graph.num_sources, heads, channels,
            scores[:, :heads], ends[:, heads:], self.negative_slope, output, self.column_scale, self.bias,
            self._summand(addend, graph.num_nodes), relu,
            post_scale, post_shift, *_codes(place, self.codec),
        )  # fmt: skip
        return self._result(out, place)


class Affine(Part):
    """``x * scale + shift``: a batch normalisation that no part could take over. Buffers: float32 ``[F]``."""

    scale: Tensor
    shift: Tensor

    def __init__(self, layer: str, scale: Tensor, shift: Tensor) -> None:
        super().__init__(layer)
        self.keep(scale=scale.float(), shift=shift.float())

    def forward(self, x: Tensor) -> Tensor:
        """``[N, F]`` -> ``[N, F]``."""
        if x.dim() != 2:
            raise ValueError(f"batch normalisation {self.layer} gets {list(x.shape)}; freeze takes maps [N, F]")
        return x * self.scale + self.shift


class Constant(Part):
    """A parameter that float code between the parts reads. Buffer: ``value``."""

    value: Tensor

    def __init__(self, layer: str, value: Tensor) -> None:
        super().__init__(layer)
        self.keep(value=value)

    def forward(self) -> Tensor:
        """The tensor."""
        return self.value
