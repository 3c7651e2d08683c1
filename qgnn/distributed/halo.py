"""The exchange of a part's boundary: rows on the way forward, and on the way back their gradients, while the inner nodes are worked on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..graph import Graph
from ..kernels.aggregate import aggregate
from ..kernels.random import NEAREST
from .partition import PartitionedGraph, Plan
from .wire import Traffic, Width, decode, encode, message_bytes


@dataclass
class Pending:
    """Rows on their way. ``sent`` is kept until they are there: the backend reads it."""

    work: Any
    sent: Tensor
    received: Tensor
    counts: list[int]
    features: int
    width: Width
    step: Tensor | None

    def rows(self) -> Tensor:
        """The rows that have come, float32 ``[R, F]``; waits for them."""
        self.work.wait()
        sizes = [sum(message_bytes(n, self.features, self.width, self.step is not None)) for n in self.counts]
        parts = zip(self.received.split(sizes), self.counts, strict=True)
        return torch.cat([decode(data, n, self.features, self.width, self.step) for data, n in parts])


class Exchange:
    """How a process exchanges rows with its neighbours, at one width.

    Training rounds stochastically, with numbers that follow from the seed, the epoch, the message and the process, so that a run that goes on from a
    checkpoint draws the same; evaluation rounds to the nearest.

    Attributes:
        traffic: bytes sent so far.
    """

    def __init__(self, plan: Plan, width: Width, seed: int) -> None:
        self.plan, self.width, self.seed = plan, width, seed
        self.traffic = Traffic()
        self.epoch = self.messages = 0
        self.training = True

    def begin(self, epoch: int) -> None:
        """Starts the random numbers of an epoch."""
        self.epoch, self.messages = epoch, 0

    def _round(self) -> int:
        self.messages += 1
        if not self.training or self.width == "fp32":
            return NEAREST
        entropy = [self.seed, self.epoch, self.messages, self.plan.rank]
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

    def start(self, x: Tensor, step: Tensor | None = None) -> Pending:
        """Sends the rows of ``x`` ``[n, F]`` that others need, and asks for the halo's ``[h, F]``; ``step`` as :func:`.wire.encode` takes it."""
        plan = self.plan
        return self._send("forward", x.index_select(0, plan.send), plan.send_counts, plan.halo_counts, step)

    def start_back(self, grad: Tensor) -> Pending:
        """Sends the gradients of the halo's rows ``[h, F]`` to their owners, and asks for those of the rows that were sent."""
        return self._send("backward", grad, self.plan.halo_counts, self.plan.send_counts, None)

    def _send(
        self,
        way: Literal["forward", "backward"],
        rows: Tensor,
        counts: list[int],
        expected: list[int],
        step: Tensor | None,
    ) -> Pending:
        features, seed = rows.size(1), self._round()
        parts = [encode(part, self.width, step, seed) for part in rows.split(counts)]
        sizes = [message_bytes(n, features, self.width, step is not None) for n in expected]
        sent = torch.cat(parts)
        received = torch.zeros(sum(map(sum, sizes)), dtype=torch.uint8, device=rows.device)
        bytes_in, bytes_out = [sum(size) for size in sizes], [part.numel() for part in parts]
        work = dist.all_to_all_single(received, sent, bytes_in, bytes_out, async_op=True)
        steps = 0 if step is not None or self.width == "fp32" else 4 * sum(counts)
        self.traffic.count(way, sent.numel() - steps, steps)
        return Pending(work, sent, received, expected, features, self.width, step)


def _sum(graph: Graph, x: Tensor) -> Tensor:
    return aggregate(graph.indptr, graph.indices, list(graph.schedule), x, None, "sum")[0]


def _sum_transposed(graph: Graph, x: Tensor) -> Tensor:
    indptr, indices, _, schedule = graph.transposed
    return aggregate(indptr, indices, list(schedule), x, None, "sum")[0]


class HaloSum(torch.autograd.Function):
    """The sum over the in-edges of every inner node of ``x`` ``[n, F]`` and of the others' rows. The sum over the inner edges runs while the halo is
    on its way; in backward, the gradients of the halo leave first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor | None, graph: PartitionedGraph, exchange: Exchange) -> Tensor:
        ctx.graph, ctx.exchange = graph, exchange
        x = x.contiguous()
        pending = exchange.start(x, step)
        out = _sum(graph, x)
        return out + _sum(graph.halo, pending.rows())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        graph: PartitionedGraph = ctx.graph
        grad = grad.contiguous()
        pending = ctx.exchange.start_back(_sum_transposed(graph.halo, grad))
        grad_x = _sum_transposed(graph, grad)
        return grad_x + _sum(graph.plan.senders, pending.rows()), None, None, None


class HaloRows(torch.autograd.Function):
    """``x`` ``[n, F]`` and below it the halo's rows ``[h, F]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor | None, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        x = x.contiguous()
        return torch.cat([x, exchange.start(x, step).rows()])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan = ctx.exchange.plan
        own, halo = grad.split([plan.inner.numel(), plan.halo.numel()])
        back = ctx.exchange.start_back(halo.contiguous()).rows()
        return own + _sum(plan.senders, back), None, None
