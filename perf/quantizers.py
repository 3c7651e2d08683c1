"""What quantizers do beside quantizing: the values at the tails, from which ranges follow, and the search for the nearest group.

Each candidate's result is compared with the others' before it is timed: they are exact, so they have to be equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..kernels.nearest import fake_quantize_nearest, group_table, nearest_group
from ..kernels.percentile import tails
from ..kernels.quantize import fake_quantize, fake_quantize_reference, largest_code
from .bench import Case, equal_to, ready


def order_statistics(shape: tuple[int, float], device: str) -> Iterator[Case]:
    """The values that a percentile range needs, ``(k + 1)``-th smallest and largest, of normally distributed ones."""
    n, fraction = shape
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
    accept = equal_to(lambda: x.sort().values[[k, n - 1 - k]])
    yield Case(f"{n} k={k}", [ready(name, run, accept) for name, run in candidates.items()])


def nearest(shape: tuple[int, int, int], device: str) -> Iterator[Case]:
    """The overhead of A2Q's Nearest Neighbor Strategy: fake quantization with known steps, with the groups found by separate operations, and with
    the search fused in. The table of the groups is made anew each time, as in training. They must
    equal the plain torch reference."""
    n, features, groups = shape
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
    accept = equal_to(lambda: fake_quantize_reference(x, row_step, row_bits, True, True, False)[0])
    yield Case(
        f"[{n},{features}] m={groups}",
        [ready(name, run, accept) for name, run in candidates.items()],
    )
