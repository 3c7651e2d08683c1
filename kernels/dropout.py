"""Dropout, alone or of a ReLU, in one pass that also leaves the bits that backward needs.

Element ``e`` of a contiguous tensor, counted in order, has a word of 32 bits (:mod:`.random`), and is dropped where that is below ``p * 2^32``,
rounded: the chance is p to within 2^-33. torch's own dropout draws other numbers, at the same chance.

- value = 0 where dropped, whatever was there, and elsewhere ``x / (1 - p)``, or of a ReLU ``max(x, 0) / (1 - p)``, as a product with the inverse;
  what is not dropped stays NaN.
- bit ``e % 8`` of byte ``e // 8`` is set where the gradient is 0: where ``e`` is dropped, or, of a ReLU, where its value is not above 0. Behind the
  last element, bits are 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import implementation, operation
from .packing import pack_bits_reference, unpack_bits_reference
from .quantize import compute_dtype
from .random import threshold, words_reference


def _dropped(x: Tensor, p: float, seed: Tensor) -> Tensor:
    return (words_reference(int(seed), x.numel(), x.device) < threshold(p)).view(x.shape)


def dropout_reference(x: Tensor, p: float, seed: Tensor | None, relu: bool) -> tuple[Tensor, Tensor]:
    v = torch.relu(x) if relu else x
    dropped = torch.zeros_like(v, dtype=torch.bool) if seed is None else _dropped(x, p, seed)
    out = (v.to(compute_dtype(x)) * (1 / (1 - p))).masked_fill_(dropped, 0).to(x.dtype)
    return out, pack_bits_reference((~(out > 0) if relu else dropped).view(1, -1)).view(-1)


@operation("qgnn::dropout")
def dropout(x: Tensor, p: float, seed: Tensor | None, relu: bool) -> tuple[Tensor, Tensor]:
    """Dropout of ``x`` with the chance ``p``, 0 to below 1, or with ``relu`` of ``max(x, 0)``.

    ``seed`` is an integer tensor of one element on the CPU, 0 to 2^32 - 1, or None where nothing is dropped. Returns the values, shaped like ``x``,
    and the bits, uint8 ``[ceil(elements / 8)]``.
    """
    return implementation("dropout", "dropout", dropout_reference, x)(x, p, seed, relu)


@dropout.register_fake
def _(x: Tensor, p: float, seed: Tensor | None, relu: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)


def dropout_backward_reference(grad: Tensor, bits: Tensor, p: float) -> Tensor:
    flags = unpack_bits_reference(bits.view(1, -1), grad.numel()).view(grad.shape)
    scaled = grad.to(compute_dtype(grad)) * (1 / (1 - p))
    return scaled.masked_fill_(flags, 0).to(grad.dtype)


@operation("qgnn::dropout_backward")
def dropout_backward(grad: Tensor, bits: Tensor, p: float) -> Tensor:
    """``grad / (1 - p)``, zero where :func:`dropout` has set a bit. Of what has been dropped without a ReLU, this is the value again."""
    return implementation("dropout", "dropout_backward", dropout_backward_reference, grad)(grad, bits, p)


@dropout_backward.register_fake
def _(grad: Tensor, bits: Tensor, p: float) -> Tensor:
    return grad.new_empty(grad.shape)
