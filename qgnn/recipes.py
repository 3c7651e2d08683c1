"""Settings of training: one recipe per model, scheme and data set family, with the reason for each choice."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from .quant import Scheme

if TYPE_CHECKING:
    from .data import Dataset


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        epochs: of quantized training; of FP32 training for "fp32".
        warmup: epochs in FP32 before the quantizers start.
        hidden, dropout, input_dropout: of the model; the dropout of the features is ``input_dropout``.
        normalize_features: divide each row of the features by its sum.
        lr, weight_decay, weight_decay_rest: Adam on the weights; the decay of the first layer, and of the others.
        lr_bits, lr_step, lr_weight_step, lr_operand_step: learning rates of widths, and of the logarithms of the steps of features,
        weights and operands.
        quantized_lr, quantized_dropout: learning rate of the weights, and ``dropout``, once the quantizers have started.
        initial_bits: mean of the widths at the start.
        bits_share: share of the quantized epochs in which widths learn; then they are fixed, and steps and weights settle.
        smallest_bits: lower limit of the learned widths.
        distill: weight of the cross entropy of all nodes against the predictions of the warmed-up FP32 model, which are computed once.
        penalty: factor of the memory penalty (A2Q eq. 6), on the excess over ``target_bits`` in KB.
        target_bits: mean width at which the penalty starts.
        bits_limit: epochs with a larger mean width are never the best.
        overrides: fields of the scheme that this recipe sets.
    """

    epochs: int = 200
    warmup: int = 0
    hidden: int = 16
    dropout: float = 0.5
    input_dropout: float = 0.5
    normalize_features: bool = True
    lr: float = 0.01
    weight_decay: float = 5e-4
    weight_decay_rest: float = 0.0
    lr_bits: float = 0.0
    lr_step: float = 0.0
    lr_weight_step: float = 0.0
    lr_operand_step: float = 0.0
    quantized_lr: float = 0.01
    quantized_dropout: float = 0.5
    initial_bits: float = 4.0
    bits_share: float = 1.0
    smallest_bits: float = 0.0
    distill: float = 0.0
    penalty: float = 0.0
    target_bits: float = 0.0
    bits_limit: float = 8.0
    overrides: dict[str, Any] = field(default_factory=dict)

    def changed(self, epochs: int | None, hidden: int | None) -> Recipe:
        """The recipe with other sizes; fewer epochs shorten the warm-up in proportion."""
        recipe = self
        if epochs is not None:
            if epochs < 1:
                raise ValueError(f"epochs must be at least 1, got {epochs}")
            recipe = replace(recipe, epochs=epochs, warmup=min(recipe.warmup, recipe.warmup * epochs // recipe.epochs))
        if hidden is not None:
            if hidden < 1:
                raise ValueError(f"hidden must be at least 1, got {hidden}")
            recipe = replace(recipe, hidden=hidden)
        return recipe

    def scheme(self, scheme: Scheme) -> Scheme:
        """The scheme with this recipe's fields; what the name of the scheme says explicitly stays."""
        return replace(scheme, **self.overrides)


_FP32 = Recipe(epochs=200, hidden=32, dropout=0.5, input_dropout=0.8, weight_decay=1e-3)
_QUANTIZED = replace(_FP32, epochs=100, warmup=150, quantized_lr=0.005, quantized_dropout=0.0, distill=10.0)
_A2Q = replace(
    _QUANTIZED, lr_bits=0.02, lr_step=0.02, lr_weight_step=0.01, lr_operand_step=0.01, initial_bits=1.75, smallest_bits=1.0, bits_share=0.3,
    penalty=30.0, target_bits=1.6, bits_limit=1.75,
)  # fmt: skip

_DIGITS: dict[str, Any] = {"hidden": 32, "input_dropout": 0.2, "dropout": 0.3, "normalize_features": False}

RECIPES: dict[tuple[str, str, str], Recipe] = {
    ("gcn", "fp32", "citation"): _FP32,
    ("gcn", "a2q", "citation"): _A2Q,
    ("gcn", "qat", "citation"): _QUANTIZED,
    ("gcn", "dq", "citation"): _QUANTIZED,
    ("gcn", "fp32", "digits"): replace(_FP32, **_DIGITS),
    ("gcn", "a2q", "digits"): replace(_A2Q, **_DIGITS, initial_bits=2.0, target_bits=1.9, bits_limit=2.25),
    ("gcn", "qat", "digits"): replace(_QUANTIZED, **_DIGITS),
    ("gcn", "dq", "digits"): replace(_QUANTIZED, **_DIGITS),
}
"""By (model, name or method of the scheme, data set or its family)."""


def recipe_for(model: str, scheme: Scheme, dataset: Dataset) -> Recipe:
    """The recipe of a data set, else of its family, else of the citation networks; of the scheme's name, else of its method."""
    for place in (dataset.name, dataset.family, "citation"):
        for name in (scheme.name, scheme.method):
            if (model, name, place) in RECIPES:
                return RECIPES[model, name, place]
    raise ValueError(f"there is no model {model!r}; choose one of {', '.join(sorted({m for m, _, _ in RECIPES}))}")
