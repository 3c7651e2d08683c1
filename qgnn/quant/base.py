"""What a layer asks of its quantizer, and what freezing reads from it."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..features import SparseFeatures
from ..graph import Graph
from ..kernels.msfp import BLOCK
from ..kernels.packing import bucket_rows, bucket_starts, container_of, containers_of, uniform_counts
from ..qtensor import QTensor
from .scheme import Scheme


@dataclass(frozen=True)
class FeatureMap:
    """One feature map that the kernels read: the input of a layer, or the operand of its aggregation.

    Attributes:
        name: the layer and the role, "convs.1.input".
        dim, nodes: its shape is ``[nodes, dim]``.
        bits: width of every node, or one number for all; of MSFP, a fraction, since 16 values share the 8 bits of an exponent.
        role: "input" or "operand".
        quantized: False for a map kept at 32 bits, or exact at 1 bit because its values are 0 and one constant per row.
        learned: True when the widths are learned.
        signed: whether the codes have a sign.
    """

    name: str
    dim: int
    nodes: int
    bits: Tensor | float
    role: str
    quantized: bool
    learned: bool = False
    signed: bool = False

    def packed_bytes(self) -> int:
        """Bytes of the packed codes (:mod:`qgnn.kernels.packing`); of the floats of a map at 32 or 16 bits."""
        if isinstance(self.bits, Tensor):
            counts, _ = bucket_rows(containers_of(self.bits, self.signed))
        elif self.bits in (16, 32):
            return int(self.bits) // 8 * self.dim * self.nodes
        elif self.bits % 1:
            return self.nodes * -(-self.dim // BLOCK) * round(BLOCK * self.bits / 8)
        else:
            counts = uniform_counts(self.nodes, container_of(int(self.bits), self.signed))
        return bucket_starts(counts, self.dim)[-1]

    def mean_bits(self) -> float:
        """Mean width over the nodes."""
        return float(self.bits.float().mean()) if isinstance(self.bits, Tensor) else float(self.bits)


@dataclass(frozen=True)
class InputCodes:
    """How the integer model turns a layer's float input into codes: ``value = step * code``.

    Attributes:
        step: float32 ``[N]``, or one element for all nodes.
        bits: uint8, shaped like ``step``.
        signed: whether the codes have a sign.
    """

    step: Tensor
    bits: Tensor
    signed: bool


def is_row_binary(x: Tensor | SparseFeatures) -> bool:
    """Whether every row of ``x`` holds only 0 and one positive constant, so that 1 bit a value and a step per row represent it exactly.

    Some row has to hold its constant twice: rows of a single value say nothing, as those of a map of one feature.
    """
    if isinstance(x, SparseFeatures):
        constants = x.row_constants()
        return constants is not None and bool((constants >= 0).all()) and int(x.graph.max_degree) > 1
    return _holds_constants(x) and bool(((x > 0).sum(1) > 1).any())


def checks_values(x: Tensor) -> bool:
    """Whether values may be looked at: a GPU would be waited for, and compiled code interrupted."""
    return not torch.compiler.is_compiling() and (x.device.type == "cpu" or os.environ.get("QGNN_DEBUG") == "1")


def _holds_constants(x: Tensor) -> bool:
    top = x.amax(1, keepdim=True) if x.size(1) else x.new_zeros(x.size(0), 1)
    return bool(((x == 0) | (x == top)).all()) and bool((top >= 0).all())


def row_binary_codes(x: Tensor) -> InputCodes:
    """The exact 1-bit representation of a row-binary ``x``.

    Raises:
        ValueError: ``x`` is not row-binary; the first bad row is named.
    """
    top = x.amax(1)
    bad = ~((x == 0) | (x == top.unsqueeze(1))).all(1) | (top < 0)
    if bool(bad.any()):
        raise ValueError(
            f"row {int(bad.nonzero()[0, 0])} of the input has several nonzero values, but the model was trained on rows of 0 and one constant; "
            "train it on inputs like these"
        )
    step = torch.where(top > 0, top, torch.ones_like(top)).float()
    return InputCodes(step, torch.ones(x.size(0), dtype=torch.uint8, device=x.device), False)


class Scheduled(nn.Module):
    """``width`` is the number of bits in use, which a schedule changes (:func:`qgnn.quant.set_width`). The state dict holds it where it is not the
    scheme's own, so that a model is loaded as it was left; loading one without it sets the scheme's own."""

    def __init__(self, scheme: Scheme) -> None:
        super().__init__()
        self.scheme, self.width = scheme, scheme.bits

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.width != self.scheme.bits:
            destination[f"{prefix}width"] = torch.tensor(self.width)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        # state_dict is load_state_dict's own copy, in which what is left over counts as unexpected
        self.width = int(state_dict.pop(f"{prefix}width", self.scheme.bits))
        super()._load_from_state_dict(state_dict, prefix, *more)


class Quantizer(Scheduled):
    """What every quantizer has. While ``enabled`` is False it passes its values on in float32 (warm-up).

    ``protect`` (bool ``[N]`` or None) is Degree-Quant's mask of the current forward pass, ``in_degree`` (``[N]`` or None) the graph's, and ``nodes``
    (int64 ``[N]`` or None) says which nodes of a whole graph those of a sampled one are: a convolution hands them out with
    :func:`qgnn.quant.begin`.
    """

    def __init__(self, scheme: Scheme) -> None:
        super().__init__(scheme)
        self.enabled = True
        self.protect: Tensor | None = None
        self.in_degree: Tensor | None = None
        self.nodes: Tensor | None = None


def finished(out: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """``scale[i] * out[i] + bias``, for the ``[N]`` and ``[M]`` that are given."""
    out = out if scale is None else out * scale.to(out.dtype).unsqueeze(1)
    return out if bias is None else out + bias


def summed(graph: Graph, operand: Tensor, weight: Tensor | None, reduce: str, own: Tensor | None) -> Tensor:
    """The reduction of ``operand`` over the in-edges of every node, and ``own`` times the node's own row."""
    out = ops.aggregate_csr(graph, operand, weight, reduce)
    return out if own is None else out + own * operand


class ColumnQuantizer(Quantizer, ABC):
    """Quantizes a matrix with one step a column: the operand of an aggregation, whose integers are then summed without a factor per edge; with
    ``parameters``, attention vectors, whose rows are no nodes that a mask could protect."""

    def __init__(self, channels: int, scheme: Scheme, parameters: bool) -> None:
        super().__init__(scheme)
        self.channels, self.parameters_only = channels, parameters

    @abstractmethod
    def forward(self, h: Tensor) -> Tensor:
        """The quantized ``h`` ``[N, channels]``."""

    def aggregate(
        self,
        graph: Graph,
        h: Tensor,
        weight: Tensor | None = None,
        reduce: str = "sum",
        *,
        scale: Tensor | None = None,
        own: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """``scale[i] * (reduce_j weight_ij q(h)_j + own * q(h)_i) + bias``, for those that are given: ``weight`` ``[E]`` in CSR order, ``scale``
        ``[N]``, ``own`` one number, ``bias`` ``[channels]``."""
        return finished(summed(graph, self(h), weight, reduce, own), scale, bias)

    def attended(self, out: Tensor) -> Tensor:
        """The result of an attention over quantized values, for a scheme that quantizes its gradient."""
        return out

    def scores(self, scores: Tensor) -> Tensor:
        """What a node brings along of the scores ``[N, heads]``, for a scheme that quantizes it."""
        return scores

    def update(self, out: Tensor) -> Tensor:
        """The output of the layer, for a scheme that quantizes it."""
        return out

    @abstractmethod
    def codes(self) -> tuple[Tensor, Tensor]:
        """Step (float32) and width (uint8) of every column, ``[channels]``."""

    def feature_map(self, name: str, nodes: int) -> FeatureMap:
        """The map of the operand, for the bookkeeping of NUMERICS 3."""
        bits = self.operand_bits()
        return FeatureMap(f"{name}.operand", self.channels, nodes, bits, "operand", bits != 32, signed=True)

    def operand_bits(self) -> float:
        """Width of the operand (32 while it is not quantized)."""
        return self.width if self.enabled else 32


class LayerQuantizer(Quantizer, ABC):
    """Quantizes the two factors of a linear layer: its input and its weight.

    ``kind`` says how the input is represented: "new" before the first batch; "binary" when its rows hold 0 and one constant and 1 bit is exact (not
    in a scheme with ``learn_input``), "unsigned" or "signed" otherwise. It is found from the first batch, and stored with the state dict.
    """

    def __init__(self, in_channels: int, out_channels: int, scheme: Scheme) -> None:
        super().__init__(scheme)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kind = "new"

    def get_extra_state(self) -> dict[str, object]:
        return {"kind": self.kind}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.kind = state["kind"]

    def see_input(self, x: Tensor | SparseFeatures) -> bool:
        """Finds ``kind`` from the first batch; returns whether this was it.

        Raises:
            ValueError: the kind is "binary" and ``x`` is not. On a GPU this is seen under ``QGNN_DEBUG=1`` only, and at freezing.
        """
        if self.kind != "new":
            if self.kind == "binary" and isinstance(x, Tensor) and checks_values(x) and not _holds_constants(x):
                raise ValueError(
                    "the input of this layer had rows of 0 and one constant at first, so it is not quantized, and now it has others; "
                    "convert the model anew for such data"
                )
            return False
        if not self.scheme.learn_input and is_row_binary(x):
            self.kind = "binary"
        elif isinstance(x, SparseFeatures):
            raise ValueError(
                "sparse features are quantized only where every row holds 0 and one constant; pass a dense x"
            )
        else:
            self.kind = "signed" if bool((x < 0).any()) else "unsigned"
        return True

    @abstractmethod
    def linear(self, x: Tensor | SparseFeatures, weight: Tensor) -> Tensor:
        """``x @ weight.T`` on quantized values: ``x`` ``[N, in]``, ``weight`` ``[out, in]``."""

    def project(
        self,
        x: Tensor | SparseFeatures,
        weight: Tensor,
        scale: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """``scale[i] * linear(x, weight)[i] + bias``, for those that are given, ``[N]`` and ``[out]``."""
        return finished(self.linear(x, weight), scale, bias)

    @abstractmethod
    def input_codes(self, x: Tensor | None) -> InputCodes:
        """How the integer model codes the input. ``x``, an example, is needed for a "binary" one only."""

    @abstractmethod
    def weight_codes(self, weight: Tensor) -> QTensor:
        """The weight ``[out, in]`` as codes with a step per output (axis "row")."""

    @abstractmethod
    def input_bits(self) -> Tensor | float:
        """Width of the input, per node or one number (32 while it is not quantized)."""

    def feature_map(self, name: str, nodes: int) -> FeatureMap:
        """The map of the input, for the bookkeeping of NUMERICS 3."""
        bits, binary = self.input_bits(), self.kind == "binary"
        learned = isinstance(bits, Tensor) and not binary
        in_float = not isinstance(bits, Tensor) and bits == 32
        nodes = bits.numel() if isinstance(bits, Tensor) and not binary else nodes
        return FeatureMap(
            f"{name}.input",
            self.in_channels,
            nodes,
            1 if binary else bits,
            "input",
            not (in_float or binary),
            learned,
            self.kind == "signed" and learned,
        )
