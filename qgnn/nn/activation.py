"""ReLU that keeps one bit an element."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..quant import Scheme, parse
from ..quant.saved import packs_maps


class ReLU(nn.ReLU):
    """torch's, which keeps its result for backward. Where that is the next layer's input, and kept anyway, this costs no memory; but not where the
    layer keeps codes."""

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Tensor) and input.requires_grad and torch.is_grad_enabled():
            rows = input.flatten(0, -2) if input.dim() > 1 else input.view(1, -1)
            return ops.relu_dropout(rows, 0.0, True).view(input.shape)
        return super().forward(input)


def relu(scheme: str | Scheme) -> nn.ReLU:
    """The ReLU between layers of a scheme: where these keep codes, the one that keeps bits."""
    return ReLU() if packs_maps(parse(scheme)) else nn.ReLU()
