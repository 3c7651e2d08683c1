"""Settings of training: one recipe per model, scheme and data set family, with the reason for each choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from .quant import Scheme

if TYPE_CHECKING:
    from .data import Dataset, GraphDataset


_SETTINGS: dict[str, type] = {"int": int, "float": float, "str": str}
_CHOICES = {"aggr": ("", "sum", "mean", "max"), "activation": ("relu", "elu")}


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: ``warmup`` epochs in FP32, then ``epochs`` from the best of these weights with a new optimizer; then the
    quantizers of a quantized scheme are on. Without a warm-up they are on from the first epoch.

    Attributes:
        warmup, epochs: lengths of the two phases.
        hidden: features of the hidden map.
        normalize_features: divide each row of the features by the sum of its magnitudes.
        input_dropout: dropout of the features.
        warmup_dropout, dropout: dropout of the hidden map in the two phases.
        warmup_lr, lr: Adam's learning rate of the weights in the two phases.
        weight_decay: L2 penalty of weights and biases.
        lr_bits, lr_step, lr_weight_step, lr_operand_step: learning rates of widths, and of the logarithms of the steps of features, weights and
            operands.
        distill: weight of the loss of all nodes or training graphs against the predictions of the best warm-up weights, which are made once;
            without a warm-up there are none, and no such loss.
        initial_bits: mean of the widths at the start.
        bits_share: share of the second phase in which widths learn; then they are fixed, and steps and weights settle.
        penalty: factor of the memory penalty (A2Q eq. 6), which squares the excess over ``target_bits``, in KB.
        target_bits: mean width at which the penalty starts.
        bits_limit: epochs with a larger mean width are not the best, unless all have one.
        initial_step: mean of the steps at the start, which are then drawn at random as in A2Q's paper; 0 takes them from data.
        layers: number of convolutions.
        heads, attention_dropout, activation: of GAT; ``hidden`` is the width of one head, the activation "relu" or "elu".
        skip: 1 adds what a layer reads to what the next one reads (A2Q table 14).
        aggr: how GIN and GraphSAGE combine neighbours, "sum", "mean" or "max"; "" is the layer's own (A2Q table 15).
        batch: graphs, links, or, with ``fanout``, training nodes in a step; 0 takes all.
        fanout: neighbours that are sampled for each node, layer by layer; 0 computes on the whole graph.
        feature_bits: 1 to 8 keeps the features in a :class:`qgnn.QuantizedFeatureStore` of that width; needs a ``fanout``. 0 keeps them in float32.
        halve_every: epochs after which every learning rate is halved; 0 never does.
        patience: epochs without a better validation loss after which ADQ adds a bit.
    """

    warmup: int
    epochs: int
    hidden: int
    normalize_features: bool
    input_dropout: float
    warmup_dropout: float
    dropout: float
    warmup_lr: float
    lr: float
    weight_decay: float
    lr_bits: float = 0.0
    lr_step: float = 0.0
    lr_weight_step: float = 0.0
    lr_operand_step: float = 0.0
    distill: float = 0.0
    initial_bits: float = 4.0
    bits_share: float = 1.0
    penalty: float = 0.0
    target_bits: float = 0.0
    bits_limit: float = 8.0
    initial_step: float = 0.0
    layers: int = 2
    heads: int = 8
    attention_dropout: float = 0.0
    activation: str = "relu"
    skip: int = 0
    aggr: str = ""
    batch: int = 0
    fanout: int = 0
    feature_bits: int = 0
    halve_every: int = 0
    patience: int = 10

    def changed(
        self, epochs: int | None = None, hidden: int | None = None, settings: Mapping[str, str] | None = None
    ) -> Recipe:
        """The recipe with other sizes and, by name, other values of any field. Fewer epochs shorten the warm-up in proportion.

        Raises:
            ValueError: a size below 1, an unknown name, or a value that does not fit.
        """
        recipe = self
        kinds: dict[str, type] = {f.name: _SETTINGS[str(f.type)] for f in fields(Recipe) if f.type in _SETTINGS}
        for name, text in (settings or {}).items():
            if name not in kinds:
                raise ValueError(f"a recipe has no setting {name!r}; there are {', '.join(kinds)}")
            try:
                recipe = replace(recipe, **{name: kinds[name](text)})
            except ValueError:
                raise ValueError(f"{name} must be a number ({kinds[name].__name__}), got {text!r}") from None
        for name, choices in _CHOICES.items():
            if getattr(recipe, name) not in choices:
                known = ", ".join(filter(None, choices))
                raise ValueError(f"{name} must be one of {known}, got {getattr(recipe, name)!r}")
        if epochs is not None:
            recipe = replace(
                recipe, epochs=epochs, warmup=min(recipe.warmup, recipe.warmup * epochs // max(recipe.epochs, 1))
            )
        if hidden is not None:
            recipe = replace(recipe, hidden=hidden)
        for name in (name for name, kind in kinds.items() if kind is not str):
            smallest = 1 if name in ("epochs", "hidden", "layers", "heads", "patience") else 0
            if not getattr(recipe, name) >= smallest:
                raise ValueError(f"{name} must be at least {smallest}, got {getattr(recipe, name)}")
        return recipe


# How they were chosen, and what each choice is worth in validation accuracy (Cora, seeds 0..9), is in docs/accuracy.md under "Choices".
# - Strong dropout of the bag of words: 82.5 with 0.8, 81.4 with 0.5 (fp32).
# - Two phases: quantizers that start from trained FP32 tensors need no search of initial steps.
# - The distillation term keeps the weights near what the warm-up learned from 140 labels: 81.9 with it, 80.8 without (a2q). FP32 gets the same two
#   phases, so that rows compare quantization and nothing else.
_FP32 = Recipe(
    warmup=150, epochs=100, hidden=32, normalize_features=True, input_dropout=0.8, warmup_dropout=0.5, dropout=0.0, warmup_lr=0.01, lr=0.005,
    weight_decay=1e-3, distill=10.0,
)  # fmt: skip
# - Hidden dropout is low once steps learn, since they fit the values that dropout scales up: 79.8 with 0.5, 81.9 with 0.2, 82.0 with 0 (a2q;
#   0.2 is for CiteSeer, and saves bits).
# - Eq. 5 counts real widths, and rounded ones gather above them; so the target lies below the limit and widths stop learning at 30 %.
# - 1.65 bits at the start lets the 1.75 of the paper's table be the limit on Cora; CiteSeer's is 1.90.
_A2Q = replace(
    _FP32, dropout=0.2, lr=0.01, lr_bits=0.02, lr_step=0.02, lr_weight_step=0.01, lr_operand_step=0.01,
    initial_bits=1.65, bits_share=0.3, penalty=30.0,
    target_bits=1.5, bits_limit=1.75,
)  # fmt: skip
# GAT: the paper's 8 heads of 8 features, and its dropout of what a layer reads and of attention (0.6). GIN: a GCN's settings.
# - ReLU, whose outputs need no sign bit: at 2 bits 82.0 against 78.0 with ELU (a2q, Cora, validation, seeds 100 to 102).
# - GAT keeps some dropout in the second phase; its hidden map has 64 features, so that 2 bits are needed where a GCN's 32 do with 1.5.
_GAT: dict[str, Any] = {"hidden": 8, "warmup_dropout": 0.6, "dropout": 0.3, "attention_dropout": 0.6}
# - Pixels are real values in [0, 1]: no row normalisation, less dropout, and more bits, because the input is quantized too.
_DIGITS: dict[str, Any] = {"input_dropout": 0.2, "warmup_dropout": 0.3, "normalize_features": False}

RECIPES: dict[tuple[str, str, str], Recipe] = {
    ("gcn", "fp32", "citation"): _FP32,
    ("gcn", "a2q", "citation"): _A2Q,
    ("gcn", "a2q", "CiteSeer"): replace(_A2Q, initial_bits=1.75, target_bits=1.6, bits_limit=1.9),
    ("gat", "fp32", "citation"): replace(_FP32, **_GAT),
    ("gat", "a2q", "citation"): replace(_A2Q, **_GAT, initial_bits=2.0, target_bits=1.9, bits_limit=2.0),
    ("gin", "fp32", "citation"): _FP32,
    ("gin", "a2q", "citation"): replace(_A2Q, initial_bits=2.2, target_bits=2.0, bits_limit=2.35),
    ("sage", "fp32", "citation"): _FP32,
    ("sage", "a2q", "citation"): replace(_A2Q, initial_bits=2.2, target_bits=2.0, bits_limit=2.35),
    ("gcn", "fp32", "digits"): replace(_FP32, **_DIGITS),
    ("gcn", "a2q", "digits"): replace(_A2Q, **_DIGITS, initial_bits=2.0, target_bits=1.9, bits_limit=2.25),
}
"""By (model, method of the scheme, data set or its family). What has no row takes that of "fp32", but for "a2q", whose widths and steps learn."""

# Whole graphs, and graphs too large for one step. Degree-Quant's table 5 gives the sizes of superpixels and molecules; 128 graphs a batch are the
# papers'.
# - No dropout of one-hot or image features: there are few of them, and each counts.
# - The distillation term is weaker than on citation networks: labels are many, and one graph's prediction says little about another's.
# - A memory penalty counts the nodes of a batch, so that its factor is that of node level; widths learn in the first half. They start below the limit
#   of 3.95 bits: from 4.0, with a target of 3.4, one fold of MUTAG had an epoch within a limit of 3.9 only before it had learned (validation 83.5 on
#   average, 92.0 from 3.5).
# - TU data sets have a few hundred small graphs: 3 layers of 32, and more FP32 epochs than quantized ones, which cost three times as much (MUTAG,
#   one thread, 5 layers of 64, 32 graphs: 14 ms of CPU time a step in FP32, 39 with dq-int4, 44 with a2q-nns). REDDIT-BINARY's sizes are
#   Degree-Quant's.
_GRAPHS = Recipe(
    warmup=60, epochs=30, hidden=32, normalize_features=False, input_dropout=0.0, warmup_dropout=0.5, dropout=0.2, warmup_lr=0.01, lr=0.005,
    weight_decay=0.0, distill=1.0, layers=3, batch=128,
)  # fmt: skip
_NNS: dict[str, Any] = {
    "lr_bits": 0.02, "lr_step": 0.02, "lr_weight_step": 0.01, "lr_operand_step": 0.01, "initial_bits": 3.5, "bits_share": 0.5, "penalty": 30.0,
    "target_bits": 3.3, "bits_limit": 3.95,
}  # fmt: skip
_DWIVEDI = replace(
    _GRAPHS, warmup=100, epochs=100, warmup_dropout=0.0, dropout=0.0, warmup_lr=1e-3, lr=5e-4, halve_every=25, layers=4
)
_LARGE = replace(_GRAPHS, warmup=200, epochs=100, hidden=256, warmup_lr=0.01, lr=0.005, layers=3, batch=0)
_SAGE = replace(_GRAPHS, warmup=10, epochs=10, hidden=256, layers=2, batch=1024, fanout=10)

_MANY: dict[tuple[str, str], Recipe] = {
    ("gin", "tu"): _GRAPHS,
    ("gin", "MUTAG"): replace(_GRAPHS, batch=32),
    ("gin", "REDDIT-BINARY"): replace(_GRAPHS, hidden=64, layers=5),
    ("gcn", "superpixels"): replace(_DWIVEDI, hidden=146),
    ("gat", "superpixels"): replace(_DWIVEDI, hidden=19, activation="elu"),
    ("gin", "superpixels"): replace(_DWIVEDI, hidden=110),
    ("gcn", "molecules"): replace(_DWIVEDI, hidden=145),
    ("gat", "molecules"): replace(_DWIVEDI, hidden=18, activation="elu"),
    ("gin", "molecules"): replace(_DWIVEDI, hidden=110),
    ("gcn", "ogb"): _LARGE,
    ("gin", "ogb"): _LARGE,
    ("gcn", "ogbl-collab"): replace(_LARGE, batch=65536),
    ("sage", "inductive"): _SAGE,
}
RECIPES.update({(model, "fp32", place): recipe for (model, place), recipe in _MANY.items()})
RECIPES.update({(model, "a2q", place): replace(recipe, **_NNS) for (model, place), recipe in _MANY.items()})

# Quantized training ("fixed" and "msfp"): both passes are quantized from the first epoch, so that no FP32 model is trained before, and none teaches.
# Everything else is the FP32 recipe's first phase, for as many epochs as both phases have, so that FP32 runs the same with --set.
# Validation accuracy of GCN (Cora, CiteSeer; seeds 100 to 102): fp32 81.5 and 73.0 with these settings, fixed-8 81.8 and 73.0, msfp13 81.7 and 73.0.
# - Hidden dropout stays: on Cora fixed-8 has 81.4 without it, fp32 81.5.
# - TU data sets: 18 validation graphs pick an epoch well only if accuracy has settled by then. MUTAG's validation and test accuracy over the last
#   third of the epochs (seed 100, 10 folds): fp32 80.7 and fixed-8 80.1 without halving, 84.7 and 83.4 with it.
RECIPES.update(
    {
        (model, method, place): replace(
            recipe, warmup=0, epochs=recipe.warmup + recipe.epochs, dropout=recipe.warmup_dropout, lr=recipe.warmup_lr, distill=0.0,
            halve_every=20 if place in ("tu", "MUTAG") else recipe.halve_every,
        )
        for (model, scheme, place), recipe in list(RECIPES.items())
        for method in ("fixed", "msfp")
        if scheme == "fp32"
    }
)  # fmt: skip


def recipe_for(model: str, scheme: Scheme, dataset: Dataset | GraphDataset) -> Recipe:
    """The recipe of a data set, else of its family; of one graph, else of the citation networks.

    Raises:
        ValueError: there is no such model for the data set.
    """
    places = [dataset.name, dataset.family] + ["citation"] * (not dataset.task.startswith("graph"))
    methods = ["a2q"] if scheme.method == "a2q" else [scheme.method, "fp32"]
    for method in methods:
        for place in places:
            if (model, method, place) in RECIPES:
                recipe = RECIPES[model, method, place]
                # Steps fit the values that dropout scales up, 5 times with 0.8: at 1 bit the features of evaluation would be below half a step.
                return replace(recipe, input_dropout=0.0) if scheme.learn_input else recipe
    known = sorted({m for m, _, place in RECIPES if place in places})
    raise ValueError(f"there is no model {model!r} for {dataset.name}; choose one of {', '.join(known)}")
