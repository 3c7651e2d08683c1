"""A model of one process made one of many: its classes are exchanged for those that reduce what has to be common, and reach over the part's edge.

Parameters and names stay, so that a state dict is that of one process, but for what a part has of A2Q's steps and widths (:class:`.nodes.Nodes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import ops
from ..features import SparseFeatures
from ..graph import Graph
from ..kernels.random import drawn_word, philox_reference, threshold
from ..models import ACTIVATIONS, _NodeModel
from ..nn import GATConv, GCNConv, GINConv, SAGEConv
from ..qtensor import rounded_bits
from ..quant import A2QQuantizer, ColumnQuantizer, LearnedColumns, QATQuantizer, RangeColumns, RangeQuantizer, Scheme
from ..quant.a2q import steps_from_max
from ..quant.base import LayerQuantizer, finished
from . import group
from .halo import Exchange, HaloRows, HaloSum
from .partition import PartitionedGraph

KINDS = ("binary", "unsigned", "signed")
"""What a layer's input can be (:class:`qgnn.quant.base.LayerQuantizer`), from the most special to the most general."""


class CommonKind(LayerQuantizer):
    """Its input is of the most general kind that a process sees. Rows that say nothing (:func:`qgnn.quant.base.is_row_binary`) count as unsigned."""

    def see_input(self, x: Tensor | SparseFeatures) -> bool:
        first = super().see_input(x)
        if first:
            mine = torch.tensor(KINDS.index(self.kind), device=x.device)
            self.kind = KINDS[int(group.all_max(mine))]
        return first


class CommonRange(RangeQuantizer):
    """Its range is that of the values of all processes, exactly, percentiles included."""

    @torch.no_grad()
    def observe(self, x: Tensor, protect: Tensor | None = None) -> None:
        seen = x if protect is None else x.masked_fill(protect.unsqueeze(1), 0)
        super().observe(torch.stack(common_tails(seen.detach().reshape(-1).float(), self.scheme.percentile)))


def common_tails(x: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    """The values at both tails of what all processes have, after ``percentile`` of it is clipped at each end. The ``k + 1`` least of all are among
    the ``k + 1`` least of each."""
    total = int(group.all_sum(torch.tensor(x.numel(), device=x.device)))
    k = int(total * percentile)
    counts = [k + 1] * group.size()
    ends = []
    for largest in (False, True):
        found = x.topk(min(k + 1, x.numel()), largest=largest).values
        padded = x.new_full((k + 1,), -torch.inf if largest else torch.inf)
        padded[: found.numel()] = found
        ends.append(group.all_rows(padded, counts).topk(k + 1, largest=largest).values[-1])
    return ends[0], ends[1]


class CommonNorm(nn.BatchNorm1d):
    """Its mean and variance are those of the rows of all processes. (torch's SyncBatchNorm runs on GPUs only.)"""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.momentum is None:
            return super().forward(x)
        sums = torch.cat([x.sum(0), x.new_tensor([x.size(0)])])
        total = group.AllSum.apply(sums)
        count = total[-1].detach()
        mean = total[:-1] / count
        variance = group.AllSum.apply((x - mean).square().sum(0)) / count
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * count / (count - 1).clamp_min(1), self.momentum)
        out = (x - mean) * (variance + self.eps).rsqrt()
        return out if self.weight is None else out * self.weight + self.bias


class OwnNodes(A2QQuantizer):
    """Steps and widths of the part's nodes. Widths start, and are averaged, over the whole graph.

    Attributes:
        counts: nodes of every part.
    """

    counts: list[int]

    @torch.no_grad()
    def _start_input(self, x: Tensor) -> None:
        # As one process does it, which looks at the rows' largest magnitudes and in-degrees alone.
        top = group.all_rows(x.abs().amax(1, keepdim=True), self.counts)
        whole = A2QQuantizer(self.in_channels, self.out_channels, self.scheme, top.size(0)).to(x.device)
        whole.initial_bits, whole.initial_step, whole.kind = self.initial_bits, self.initial_step, self.kind
        if self.in_degree is not None:
            whole.in_degree = group.all_rows(self.in_degree, self.counts)
        whole._start_input(top)
        first = sum(self.counts[: group.rank()])
        for mine, all_of_them in ((self.bits, whole.bits), (self.log_step, whole.log_step)):
            mine.copy_(all_of_them[first : first + mine.numel()])

    def width_sum(self) -> tuple[Tensor, int]:
        mine = self.bits.sum()
        # The gradient is that of the part's own widths: of the whole sum, each process has its share.
        return mine + (group.all_sum(mine) - mine.detach()), sum(self.counts)

    def input_bits(self) -> Tensor | int:
        return group.all_rows(rounded_bits(self.bits), self.counts) if self.enabled else 32


class CommonColumns(LearnedColumns):
    """Its steps start from the columns of all processes (:func:`qgnn.quant.a2q.steps_by_error`)."""

    @torch.no_grad()
    def _start(self, h: Tensor) -> None:
        columns, widths = h.t().contiguous(), rounded_bits(self.bits.expand(self.channels)).float()
        full = steps_from_max(group.all_max(columns.abs().amax(1)).unsqueeze(1), widths, True)
        steps = torch.stack([full * (k / 40) for k in range(1, 41)])
        errors = [(ops.fake_quantize(columns, step, widths) - columns).square().sum(1) for step in steps]
        best = group.all_sum(torch.stack(errors)).argmin(0)
        self.log_operand_step.copy_(steps.gather(0, best.unsqueeze(0))[0].log())
        self.ready = True


class HaloColumns(ColumnQuantizer):
    """The operand of an aggregation over a part's graph: rows of other processes are summed, too. Where the operand has codes that fit the wire,
    these travel, exactly; a protected row of Degree-Quant has none."""

    exchange: Exchange

    def known_step(self) -> Tensor | None:
        """The steps of the operand's columns, if its codes can be sent as they are."""
        exchange = self.exchange
        codes = self.enabled and self.protect is None and self.scheme.method in ("qat", "dq", "a2q")
        if not codes or exchange.width == "fp32":
            return None
        step, bits = self.codes()
        return step if int(bits.max()) <= {"int8": 8, "int4": 4}[exchange.width] else None

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
        assert isinstance(graph, PartitionedGraph) and weight is None, "as the task has it"
        operand = self(h)
        out = HaloSum.apply(operand, self.known_step(), graph, self.exchange)
        if reduce == "mean":
            out = out * graph.inv_degree.unsqueeze(1)
        return finished(out if own is None else out + own * operand, scale, bias)


class FloatColumns(ColumnQuantizer):
    """The operand of a scheme that does not quantize it."""

    def forward(self, h: Tensor) -> Tensor:
        return h

    def codes(self) -> tuple[Tensor, Tensor]:
        raise ValueError(f"scheme {self.scheme.name!r} has no integer codes to freeze")


class HaloAttention(GATConv):
    """Attention over all in-edges of the part's nodes. Rows of the halo are needed before the scores, so that nothing is left to do meanwhile."""

    exchange: Exchange

    def forward(self, x: Any, edge_index: Any, *args: Any, **kwargs: Any) -> Any:
        return super().forward(x, edge_index.attended, *args, **kwargs)

    def _operand(self, h: Tensor) -> Tensor:
        operand = super()._operand(h)
        columns = self.operand_quantizer
        step = columns.known_step() if isinstance(columns, HaloColumns) else None
        return HaloRows.apply(operand, step, self.exchange)

    def _scores(self, h: Tensor, vector: Tensor, quantizer: ColumnQuantizer | None) -> Tensor:
        own = h[: self.exchange.plan.inner.numel()] if vector is self.att_dst else h
        return super()._scores(own, vector, quantizer)


class OwnChance(nn.Module):
    """A convolution that draws for its nodes or edges, of which each process has others: from a generator of its own, so that the processes' common
    one stays common."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return super().forward(*args, **kwargs)
        seed = int(drawn_word())
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed * group.size() + group.rank())
            return super().forward(*args, **kwargs)


class HaloModel(_NodeModel):
    """Its dropout drops what one process would: by the number of a node in the whole graph.

    Attributes:
        rows: numbers of the part's nodes, int64 ``[n]``.
    """

    rows: Tensor

    def activate(self, h: Tensor) -> Tensor:
        h = ACTIVATIONS[self.activation](h)
        if not (self.training and self.dropout):
            return h
        places = self.rows.unsqueeze(1) * h.size(1) + torch.arange(h.size(1), device=h.device)
        return h * kept(places, self.dropout)


def kept(places: Tensor, p: float) -> Tensor:
    """The factors of dropout, 0 or ``1 / (1 - p)``, of elements with these places in a whole tensor, drawn as :mod:`qgnn.kernels.dropout` does."""
    words = philox_reference(int(drawn_word()), places >> 1)
    word = torch.where(places % 2 == 0, words[0], words[1])
    return torch.where(word < threshold(p), 0.0, 1 / (1 - p))


def _become(module: nn.Module, *kinds: type[nn.Module]) -> None:
    """Makes ``module`` one of ``kinds``, which come before its class."""
    bases = tuple(kind for kind in kinds if not issubclass(type(module), kind))
    module.__class__ = type("".join(kind.__name__ for kind in (*bases, type(module))), (*bases, type(module)), {})


def share_ranges(model: nn.Module) -> None:
    """Makes what follows the data common to all processes: ranges, kinds of inputs, statistics of BatchNorm."""
    for part in list(model.modules()):
        if isinstance(part, nn.BatchNorm1d):
            _become(part, CommonNorm)
        elif isinstance(part, QATQuantizer):
            _become(part, CommonKind)
            _become(part.input, CommonRange)
        elif isinstance(part, RangeColumns) and not part.parameters_only:
            _become(part.message, CommonRange)
        elif isinstance(part, LayerQuantizer):
            _become(part, CommonKind)


def reach_over(model: nn.Module, graph: PartitionedGraph, exchange: Exchange) -> None:
    """Makes ``model``, built for the whole graph, one for a part of it."""
    assert isinstance(model, _NodeModel)
    share_ranges(model)
    _become(model, HaloModel)
    model.rows, model.input_dropout = graph.plan.inner, 0.0  # the task drops features
    for conv in model.convs:
        assert isinstance(conv, GCNConv | GINConv | SAGEConv | GATConv)
        scheme = conv.scheme
        if conv.operand_quantizer is None:
            conv.operand_quantizer = FloatColumns(_channels(conv), scheme, False)
        columns: Any = conv.operand_quantizer
        _become(columns, *((HaloColumns, CommonColumns) if isinstance(columns, LearnedColumns) else (HaloColumns,)))
        columns.exchange = exchange
        if isinstance(conv, GATConv):
            _become(conv, HaloAttention)
            conv.exchange = exchange
        if scheme.method == "dq" or (isinstance(conv, GATConv) and conv.dropout):
            _become(conv, OwnChance)
    for part in model.modules():
        if isinstance(part, A2QQuantizer):
            part.bits, part.log_step = (
                nn.Parameter(whole.detach()[graph.plan.inner], whole.requires_grad)
                for whole in (part.bits, part.log_step)
            )
            _become(part, OwnNodes)
            cast(OwnNodes, part).counts = graph.plan.counts


def _channels(conv: GCNConv | GINConv | SAGEConv | GATConv) -> int:
    """Columns of what a convolution sums."""
    if isinstance(conv, GINConv | SAGEConv):
        return conv.operand_channels
    return int(conv.heads * conv.out_channels if isinstance(conv, GATConv) else conv.out_channels)


def check_scheme(scheme: Scheme, partition: bool) -> None:
    """Raises ValueError for a scheme that many processes would train otherwise than one."""
    reason = ""
    if scheme.sample < 1:
        reason = "its ranges are of a random sample"
    elif not partition:
        reason = "its steps are of the nodes of one graph" if scheme.method == "a2q" and not scheme.groups else ""
    elif scheme.components is not None or scheme.method == "binary":
        reason = "it has ranges or means of whole maps, and a process sees a part of them"
    elif scheme.saved is not None:
        reason = "it packs what backward keeps of a whole graph"
    elif scheme.groups:
        reason = "its groups are learned from batches"
    if reason:
        raise ValueError(
            f"scheme {scheme.name!r} is not trained with --parallel {'partition' if partition else 'data'}: {reason}; choose fp32, fp16, int8, int4, "
            f"dq-int8, dq-int4 or {'a2q' if partition else 'a2q-nns'}, or one process"
        )


def local_gradients(model: nn.Module) -> Sequence[nn.Parameter]:
    """Steps whose gradient is a mean over nodes (NUMERICS 2, local), not a sum."""
    return [
        part.log_operand_step
        for part in model.modules()
        if isinstance(part, LearnedColumns) and part.gradient == "local" and not part.parameters_only
    ]
