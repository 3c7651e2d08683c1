"""The frozen model: GCN and linear layers that run on packed integers, two kernel launches a GCN layer (NUMERICS 7; A2Q proofs 2 and 3)."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from . import ops
from .graph import Graph
from .kernels.aggregate import aggregate_packed
from .kernels.matmul import matmul_packed
from .kernels.packing import bucket_rows, container_of, containers_of, uniform_counts
from .qtensor import QTensor
from .quant.base import row_binary_codes

TAIL_FUNCTIONS = {"log_softmax": lambda x: torch.log_softmax(x, -1), "softmax": lambda x: torch.softmax(x, -1)}
"""Float functions that may follow the last layer, over the last dimension."""


InputCoding = Literal["binary", "node", "tensor"]


@dataclass(frozen=True)
class LayerSpec:
    """Everything about an integer layer that is not a tensor.

    Attributes:
        name: of the layer it was frozen from.
        kind: "gcn" or "linear".
        in_channels, out_channels: sizes.
        weight_container, operand_container: bits of one code of the weight and of the operand of the aggregation, 4 or 8.
        coding: of the input: "binary", rows of 0 and one constant, in 1 bit with that constant as step; "node", a step and width per node (A2Q);
            "tensor", one step for all.
        signed: whether the codes of the input have a sign.
        relu: applied to the output.
        normalize, add_self_loops: of the graph convolution.
    """

    name: str
    kind: Literal["gcn", "linear"]
    in_channels: int
    out_channels: int
    weight_container: int
    operand_container: int
    coding: InputCoding
    signed: bool
    relu: bool
    normalize: bool
    add_self_loops: bool


@dataclass(frozen=True)
class _Rows:
    """The codes that a layer's input gets on one graph: a step and width per node, and where the rows lie."""

    step: Tensor
    bits: Tensor
    counts: list[int]
    pos: Tensor | None


@dataclass(frozen=True)
class _Place:
    """A layer on one graph: its factor ``D^-1/2``, the rows of its input and the product of their steps with the factor (both None for "binary").
    It does not hold the graph, which it would keep alive in :meth:`IntegerModel.places`."""

    factor: Tensor | None
    rows: _Rows | None
    scale: Tensor | None


class IntegerLayer(nn.Module):
    """One frozen layer.

    Buffers: ``weight`` (packed ``[out, in]``), ``weight_step`` ``[out]``, ``bias`` ``[out]`` or None, ``norm_scale`` ``[out]``, the factor of a
    folded batch normalisation, or None, ``operand_step``, ``operand_bits`` ``[out]`` (GCN only), and ``input_step``, ``input_bits``, ``[N]`` or
    of one element (not for a binary input).
    """

    weight: Tensor
    weight_step: Tensor
    bias: Tensor | None
    norm_scale: Tensor | None
    operand_step: Tensor | None
    operand_bits: Tensor | None
    input_step: Tensor | None
    input_bits: Tensor | None

    def __init__(self, spec: LayerSpec, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.spec = spec
        for name in (
            "weight", "weight_step", "bias", "norm_scale", "operand_step", "operand_bits", "input_step", "input_bits"
        ):  # fmt: skip
            self.register_buffer(name, tensors.get(name))

    def graph(self, base: Graph) -> Graph:
        """The graph that the layer sums over."""
        return base.with_self_loops if self.spec.add_self_loops else base

    def place(self, base: Graph) -> _Place:
        """What the layer needs to know of a graph, computed once.

        Raises:
            ValueError: the layer has steps for another number of nodes, or a sum could overflow int32.
        """
        spec = self.spec
        graph = self.graph(base)
        ops.check_product_headroom(spec.in_channels)
        if spec.kind == "gcn":
            ops.check_headroom(graph, spec.operand_container - 1)
        factor, rows = graph.inv_sqrt_degree if spec.normalize else None, self._rows(graph.num_nodes)
        return _Place(factor, rows, None if rows is None else rows.step if factor is None else rows.step * factor)

    def _rows(self, nodes: int) -> _Rows | None:
        if self.input_step is None or self.input_bits is None:
            return None
        if self.spec.coding == "node" and self.input_step.numel() != nodes:
            raise ValueError(
                f"layer {self.spec.name} has steps for {self.input_step.numel()} nodes, the graph has {nodes}: node-level A2Q is tied to its graph"
            )
        step, bits = self.input_step.expand(nodes).contiguous(), self.input_bits.expand(nodes).contiguous()
        counts, pos = (
            bucket_rows(containers_of(bits, self.spec.signed))
            if self.spec.coding == "node"
            else (self._uniform(nodes), None)
        )
        return _Rows(step, bits, counts, pos)

    def _uniform(self, nodes: int) -> list[int]:
        assert self.input_bits is not None
        return uniform_counts(nodes, container_of(int(self.input_bits), self.spec.signed))

    def pack_input(self, x: Tensor, rows: _Rows | None) -> QTensor:
        """Codes of a float input ``[N, in]``.

        Raises:
            ValueError: ``x`` has another shape; a binary layer gets rows of several nonzero values; NaN or infinity.
        """
        if not isinstance(x, Tensor) or x.dim() != 2 or x.size(1) != self.spec.in_channels:
            shape = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x of layer {self.spec.name} must be a tensor [N, {self.spec.in_channels}], got {shape}")
        x = x.float()
        if rows is None:
            codes = row_binary_codes(x)
            return QTensor.quantize(x, codes.step, codes.bits.float(), signed=False)
        return QTensor.quantize(
            x if self.spec.signed else x.clamp_min(0), rows.step, rows.bits.float(), signed=self.spec.signed
        )

    @property
    def fuses(self) -> bool:
        """Whether the layer before can write this layer's codes in its epilogue."""
        return self.spec.coding != "binary"

    def scale(self, x: QTensor, place: _Place) -> Tensor:
        """The factor of every row of the product: the step of the input, times ``D^-1/2`` where the layer normalises."""
        if place.scale is not None:
            return place.scale
        return x.step if place.factor is None else x.step * place.factor

    def run(
        self, x: QTensor, scale: Tensor, base: Graph, place: _Place, following: tuple[IntegerLayer, _Place] | None
    ) -> QTensor | Tensor:
        """Runs the layer. With ``following``, the next layer and its place, the output is that layer's packed input; else float32 ``[N, out]``."""
        spec = self.spec
        if spec.kind == "linear":
            return self._product(x, "float", scale, self._columns(self.weight_step), self.bias, spec.relu)
        assert self.operand_step is not None, "a GCN layer has one"
        operand = self.operand(x, scale)
        graph, nodes = self.graph(base), base.num_nodes
        rows = following[1].rows if following is not None else None
        out = aggregate_packed(
            graph.indptr, graph.indices, list(graph.schedule), operand, spec.operand_container, nodes, spec.out_channels, True,
            "float" if rows is None else "packed", place.factor, self._columns(self.operand_step), self.bias, spec.relu,
            None if rows is None else rows.step, None if rows is None else rows.bits, None if rows is None else rows.pos,
            [0] * 5 if rows is None else rows.counts, following is not None and following[0].spec.signed,
        )  # fmt: skip
        if rows is None or following is None:
            return out
        return QTensor(
            out, rows.step, rows.bits, "row", following[0].spec.signed, spec.out_channels, tuple(rows.counts), rows.pos
        )

    def operand(self, x: QTensor, scale: Tensor) -> Tensor:
        """The packed operand of the aggregation: ``D^-1/2 X W``, ``[N, out]`` in ``operand_container``."""
        return self._product(x, "packed", scale, self.weight_step, None, False)

    def _columns(self, step: Tensor) -> Tensor:
        """The factor of every output column: the step of its codes, times that of a batch normalisation (A2Q eq. 18)."""
        return step if self.norm_scale is None else step * self.norm_scale

    def _product(
        self, x: QTensor, output: str, scale: Tensor, columns: Tensor, bias: Tensor | None, relu: bool
    ) -> Tensor:
        spec = self.spec
        return matmul_packed(
            x.data, x.pos, list(x.counts), x.signed, x.zero, self.weight, spec.weight_container, spec.in_channels, spec.out_channels, output, scale,
            columns, bias, relu, self.operand_step, self.operand_bits, spec.operand_container,
        )  # fmt: skip


@dataclass(frozen=True)
class LayerReport:
    """One frozen layer, in bytes.

    Attributes:
        name, kind: of the layer.
        average_bits: mean width of its input over the nodes.
        launches: kernel launches on bound input.
        code_bytes: packed codes of its input; input_fp32_bytes: the same map in FP32.
        step_bytes: steps, widths and places of the input's rows.
        operand_bytes, operand_fp32_bytes: codes of the operand of the aggregation (0 for a linear layer).
        weight_bytes: packed weight; weight_step_bytes: its steps; weight_fp32_bytes: the weight in FP32.
        differing_codes, differing_operand_codes: codes of the input, and of the operand of the aggregation, that differ from the fake-quantized
            model's, because float rounding decided a tie otherwise, here or in an earlier layer.
    """

    name: str
    kind: str
    average_bits: float
    launches: int
    code_bytes: int
    input_fp32_bytes: int
    step_bytes: int
    operand_bytes: int
    operand_fp32_bytes: int
    weight_bytes: int
    weight_step_bytes: int
    weight_fp32_bytes: int
    differing_codes: int
    differing_operand_codes: int


@dataclass(frozen=True)
class FreezeReport:
    """What freezing did, and how far the integer model is from the fake-quantized one.

    Attributes:
        layers: one record a layer.
        max_difference: largest |integer - fake-quantized| logit; max_relative: the same over the largest |logit|.
        mismatched_predictions: nodes whose largest logit is another.
        ties: codes that differ, over all layers.
        packed_bytes, fp32_bytes: codes of every feature map (inputs and operands), and the same maps in FP32.
    """

    layers: list[LayerReport]
    max_difference: float
    max_relative: float
    mismatched_predictions: int
    ties: int
    packed_bytes: int
    fp32_bytes: int


@dataclass(frozen=True)
class Bound:
    """A frozen model's data: the packed input, the first layer's factor of every row, and the graph."""

    x: QTensor
    scale: Tensor
    graph: Graph


class IntegerModel(nn.Module):
    """A frozen chain of integer layers.

    ``model(x, edge_index)`` packs ``x`` and runs; ``model.bind(x, edge_index)`` packs once, and ``model()`` then runs on what was bound:
    two kernel launches a GCN layer. Results are the same to the bit in every run and for every schedule.
    """

    def __init__(self, layers: list[IntegerLayer], tail: list[str]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.tail = tail
        self.bound: Bound | None = None
        self.report: FreezeReport | None = None
        self._places: weakref.WeakKeyDictionary[Graph, list[_Place]] = weakref.WeakKeyDictionary()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IntegerModel:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves Module._apply untyped
        self._places.clear()
        device = self.chain[0].weight.device
        if self.bound is not None and self.bound.x.device != device:
            self.bound = Bound(self.bound.x.to(device), self.bound.scale.to(device), self.bound.graph.to(device))
        return self

    @property
    def chain(self) -> list[IntegerLayer]:
        """The layers in the order in which they run."""
        return [layer for layer in self.layers if isinstance(layer, IntegerLayer)]

    def places(self, graph: Graph) -> list[_Place]:
        """Every layer's view of a graph, remembered as long as the graph lives."""
        if graph not in self._places:
            self._places[graph] = [layer.place(graph) for layer in self.chain]
        return self._places[graph]

    def bind(self, x: Tensor, edge_index: Tensor | Graph) -> IntegerModel:
        """Packs the input ``[N, in]`` once and keeps it with the graph; returns the model."""
        graph = Graph.of(edge_index, x.size(0))
        layer, place = self.chain[0], self.places(graph)[0]
        packed = layer.pack_input(x, place.rows)
        self.bound = Bound(packed, layer.scale(packed, place), graph)
        return self

    def forward(self, x: Tensor | None = None, edge_index: Tensor | Graph | None = None) -> Tensor:
        """Logits, float32 ``[N, out]``, of ``x`` and ``edge_index``, or of what was bound.

        Raises:
            ValueError: nothing is bound and nothing is given, or only one of ``x`` and ``edge_index``; ``x`` does not fit.
        """
        out = self.trace(x, edge_index)[-1]
        assert isinstance(out, Tensor)
        for name in self.tail:
            out = TAIL_FUNCTIONS[name](out)
        return out

    def trace(self, x: Tensor | None = None, edge_index: Tensor | Graph | None = None) -> list[QTensor | Tensor]:
        """The packed input of every layer, then the output of the last: what :meth:`forward` computes on the way."""
        layers = self.chain
        if (x is None) != (edge_index is None):
            raise ValueError("pass both x and edge_index, or neither to run on what was bound")
        if x is None or edge_index is None:
            if self.bound is None:
                raise ValueError(
                    "the model has no data bound: pass x and edge_index, or call bind(x, edge_index) first"
                )
            state: QTensor | Tensor = self.bound.x
            graph = self.bound.graph
            places = self.places(graph)
        else:
            graph = Graph.of(edge_index, x.size(0))
            places = self.places(graph)
            state = layers[0].pack_input(x, places[0].rows)
        states: list[QTensor | Tensor] = []
        for i, (layer, place) in enumerate(zip(layers, places, strict=True)):
            if isinstance(state, Tensor):
                state = layer.pack_input(state, place.rows)
            states.append(state)
            bound = self.bound if self.bound is not None and state is self.bound.x else None
            scale = layer.scale(state, place) if bound is None else bound.scale
            following = (layers[i + 1], places[i + 1]) if i + 1 < len(layers) and layers[i + 1].fuses else None
            state = layer.run(state, scale, graph, place, following)
        return [*states, state]

    def launches(self) -> list[int]:
        """Kernel launches of every layer on a bound input; hubs add one to clear their counters."""
        layers = self.chain
        counts = []
        for layer, following in zip(layers, [*layers[1:], None], strict=True):
            unfused = following is not None and (not following.fuses or layer.spec.kind == "linear")
            counts.append((2 if layer.spec.kind == "gcn" else 1) + int(unfused))
        return counts
