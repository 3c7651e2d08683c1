"""The parts of a layer that quantized training has a width for (Bqain's "components")."""

from __future__ import annotations

from dataclasses import dataclass, fields

from .. import autograd_training

FLOAT = autograd_training.FLOAT
"""The width of what is not quantized."""


@dataclass(frozen=True)
class Components:
    """Widths of the parts of a layer in training: bits for fixed point (2 to 8), ``n`` for MSFP-n (12 to 16), :data:`FLOAT` for float32; None is the
    width of the scheme, which a schedule changes while training runs.

    Attributes:
        weights, inputs: the two factors of a product.
        messages: what an aggregation reads.
        aggregation: the result of an aggregation, before what the layer does next.
        update: the output of a layer. It and the result of an aggregation are in float32 by default, since the next layer quantizes what it reads.
        attention: GAT's attention vectors and the parts of the scores that nodes bring along.
        gradients: what backward gets for the result of a product or of an aggregation.
    """

    weights: int | None = None
    inputs: int | None = None
    messages: int | None = None
    aggregation: int | None = FLOAT
    update: int | None = FLOAT
    attention: int | None = None
    gradients: int | None = None

    def at(self, name: str, width: int) -> int:
        """The width of the component ``name`` where the scheme's is ``width``."""
        own: int | None = getattr(self, name)
        return width if own is None else own


NAMES = tuple(f.name for f in fields(Components))
