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
        hidden, dropout: of the model.
        normalize_features: divide each row of the features by its sum.
        lr, weight_decay, weight_decay_rest: Adam on the weights; the decay of the first layer, and of the others.
        lr_bits, lr_step, lr_weight_step, lr_operand_step: learning rates of widths, and of the logarithms of the steps of features, weights and operands.
        initial_bits: widths start uniformly within 0.5 of it, so that they round to two neighbouring widths in the wanted mean.
        smallest_bits: lower limit of the learned widths.
        penalty: factor of the memory penalty (A2Q eq. 6), on the excess over ``target_bits`` in KB.
        target_bits: mean width at which the penalty starts.
        bits_limit: epochs with a larger mean width are never the best.
        overrides: fields of the scheme that this recipe sets.
    """

    epochs: int = 200
    warmup: int = 0
    hidden: int = 16
    dropout: float = 0.5
    normalize_features: bool = True
    lr: float = 0.01
    weight_decay: float = 5e-4
    weight_decay_rest: float = 0.0
    lr_bits: float = 0.0
    lr_step: float = 0.0
    lr_weight_step: float = 0.0
    lr_operand_step: float = 0.0
    initial_bits: float = 4.0
    smallest_bits: float = 0.0
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


_CITATION = Recipe()
_A2Q = replace(
    _CITATION, epochs=200, warmup=100, hidden=32, lr_bits=0.02, lr_step=0.02, lr_weight_step=0.01, lr_operand_step=0.01, initial_bits=1.7, smallest_bits=1.0,
    penalty=30.0, target_bits=1.65, bits_limit=1.75,
)  # fmt: skip
_QAT = replace(_CITATION, warmup=100)

RECIPES: dict[tuple[str, str, str], Recipe] = {
    ("gcn", "fp32", "Cora"): _CITATION,
    ("gcn", "a2q", "Cora"): _A2Q,
    ("gcn", "a2q", "CiteSeer"): replace(_A2Q, initial_bits=1.8, target_bits=1.8, bits_limit=1.9),
    ("gcn", "qat", "Cora"): _QAT,
    ("gcn", "dq", "Cora"): _QAT,
}
"""By (model, method or scheme, data set or family)."""


def recipe_for(model: str, scheme: Scheme, dataset: Dataset) -> Recipe:
    """The recipe of a data set, else of its family, else of the citation networks; of the scheme's name, else of its method."""
    for place in (dataset.name, dataset.family, "Cora"):
        for name in (scheme.name, scheme.method):
            if (model, name, place) in RECIPES:
                return RECIPES[model, name, place]
    raise ValueError(f"there is no recipe for {model} with {scheme.name}")
