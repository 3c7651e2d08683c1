"""What quantizers do beside quantizing: the values at the tails, from which ranges follow, and the search for the nearest group.

Each candidate's result is compared with the others' before it is timed: they are exact, so they have to be equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..kernels.nearest import fake_quantize_nearest, group_table, nearest_group
from ..kernels.percentile import tails
from ..kernels.quantize import fake_quantize, largest_code
from .kernels import Row
from .timing import paired

TAILS = tuple((n, fraction) for n in (86_656, 1_000_000, 10_000_000) for fraction in (0.001, 0.01))
"""Values and the fraction of them clipped at each end; the first is Cora's hidden map of 32 features."""

NEAREST = ((50_000, 64, 1000), (3_000, 145, 1000))
"""Rows, features and groups: about a batch of 128 graphs of REDDIT-BINARY (430 nodes each on average), and one of ZINC (23)."""


def order_statistics(n: int, fraction: float, device: str, rounds: int) -> Iterator[Row]:
    """The values that a percentile range needs, ``(k + 1)``-th smallest and largest, of normally distributed ones."""
    k = int(n * fraction)
    x = torch.randn(n, generator=torch.Generator().manual_seed(0)).to(device)
    candidates: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "torch-kthvalue": lambda: (x.kthvalue(k + 1).values, x.kthvalue(n - k).values),
        "torch-topk": lambda: (
            x.topk(k + 1, largest=False, sorted=False).values.amax(),
            x.topk(k + 1, sorted=False).values.amin(),
        ),
        "qgnn-tails": lambda: tails(x, k),
    }
    expected = torch.stack(candidates["torch-kthvalue"]())
    for name, run in candidates.items():
        if not torch.equal(torch.stack(run()), expected):
            raise RuntimeError(f"{name} differs from torch.kthvalue; its time would mean nothing")
    for name, timing in paired(candidates, rounds, device=device).items():
        yield Row("tails", f"{n} k={k}", name, timing)


def nearest(n: int, features: int, groups: int, device: str, rounds: int) -> Iterator[Row]:
    """The overhead of A2Q's Nearest Neighbor Strategy: fake quantization with known steps, with the groups found by separate operations, and with
    the search fused in. The table of the groups is made anew each time, as in training."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(n, features, generator=generator) * torch.rand(n, 1, generator=generator).exp()).to(device)
    step = (torch.rand(groups, generator=generator) * 0.3 + 0.01).to(device)
    bits = torch.randint(1, 9, (groups,), generator=generator).to(torch.uint8).to(device)
    q_max = step * largest_code(bits, True)

    def separate() -> Tensor:
        group = nearest_group(x.abs().amax(1), *group_table(q_max))
        return fake_quantize(x, step[group], bits[group], True, True, False)[0]

    group = nearest_group(x.abs().amax(1), *group_table(q_max))
    row_step, row_bits = step[group], bits[group]
    candidates: dict[str, Callable[[], Tensor]] = {
        "qgnn-fake-quantize": lambda: fake_quantize(x, row_step, row_bits, True, True, False)[0],
        "qgnn-separate": separate,
        "qgnn-nearest": lambda: fake_quantize_nearest(x, *group_table(q_max), step, bits, True)[0],
    }
    expected = candidates["qgnn-fake-quantize"]()
    for name, run in candidates.items():
        if not torch.equal(run(), expected):
            raise RuntimeError(f"{name} differs from fake_quantize with the same groups; its time would mean nothing")
    for name, timing in paired(candidates, rounds, device=device).items():
        yield Row("fake_quantize_nearest", f"[{n},{features}] m={groups}", name, timing)
