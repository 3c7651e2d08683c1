"""Random numbers of an element's place and a seed, the same on every backend: nothing is stored, and no order of work shows.

The generator is Philox-2x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011). Its key is the seed, 32 bits; its counter
is half the linear index of the element in its tensor, 64 bits, the lower word first. One round maps the words ``(a, b)`` of the counter to
``(high(M a) ^ key ^ b, low(M a))``, where ``M a`` is the 64-bit product; the key grows by W from one round to the next. After ten rounds the upper 24
bits of a word, the first where that index is even and else the second, are the uniform number: ``u = (a >> 8) / 2^24``, in [0, 1).

Stochastic rounding takes v up with the chance of its fraction: ``floor(v) + (u < v - floor(v))``. Both differences are exact in floats but for a
negative v within 2^-24 of 0, so whole numbers stay, which ``floor(v + u)``, whose sum rounds, does not promise. As u has 24 bits, the chance is the
fraction rounded up to a multiple of 2^-24: the expectation lies less than 2^-24 above v.
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIER = 0xD256D193
"""M."""

KEY_STEP = 0x9E3779B9
"""W, the golden ratio's bits."""

ROUNDS = 10

NEAREST = -1
"""The seed that asks for rounding to the nearest whole number, half to even."""

WORD = (1 << 32) - 1


def drawn_word() -> Tensor:
    """A seed of torch's generator on the CPU, so that no GPU is waited for and ``torch.manual_seed`` fixes it; int64, of no dimension."""
    return torch.randint(WORD + 1, (), device="cpu")


def drawn_seed() -> int:
    """:func:`drawn_word` as a number."""
    return int(drawn_word())


def philox_reference(seed: int, counter: Tensor) -> tuple[Tensor, Tensor]:
    """Both words of the generator, int64 in ``0 .. 2^32 - 1``, for every 64-bit ``counter`` (int64, any shape)."""
    first, second = counter & WORD, (counter >> 32) & WORD
    for i in range(ROUNDS):
        product = first * MULTIPLIER  # 64 bits; the sign is one of them
        first, second = ((product >> 32) & WORD) ^ ((seed + i * KEY_STEP) & WORD) ^ second, product & WORD
    return first, second


def threshold(p: float) -> int:
    """The least word of an element that dropout with the chance ``p`` keeps."""
    return min(round(p * (WORD + 1)), WORD)


def words_reference(seed: int, elements: int, device: torch.device | None = None) -> Tensor:
    """The word (int64) of each of so many elements: both of every counter, one after the other."""
    pairs = torch.arange((elements + 1) // 2, device=device)
    return torch.stack(philox_reference(seed, pairs), 1).flatten()[:elements]


def uniform_reference(seed: int, shape: tuple[int, ...] | torch.Size, device: torch.device | None = None) -> Tensor:
    """float32 in [0, 1), multiples of 2^-24, for every element of a contiguous tensor of this shape; ``seed`` 0 to 2^32 - 1."""
    words = words_reference(seed, torch.Size(shape).numel(), device)
    return (words >> 8).to(torch.float32).view(shape) * 2.0**-24


def round_reference(v: Tensor, seed: int) -> Tensor:
    """Whole numbers in the dtype of ``v``: half to even for :data:`NEAREST`, else stochastically. NaN and infinity stay."""
    if seed == NEAREST:
        return torch.round(v)
    down = torch.floor(v)
    return down + (uniform_reference(seed, v.shape, v.device) < v - down)
