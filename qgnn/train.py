"""Training of node-level models on one graph: FP32 warm-up, quantized training, best validation epoch, checkpoints that resume exactly."""

from __future__ import annotations

import copy
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import quant
from .features import SparseFeatures
from .freeze import freeze
from .integer import IntegerModel
from .models import GCN
from .qtensor import rounded_bits
from .quant.a2q import A2QQuantizer, learned_layers, memory_penalty
from .quant.base import is_row_binary
from .recipes import Recipe, recipe_for

if TYPE_CHECKING:
    from torch_geometric.data import Data

    from .data import Dataset

_log = logging.getLogger(__name__)

SPARSE_BELOW = 0.1
"""Share of nonzeros below which features are multiplied as a sparse matrix."""

CHECKPOINT_SECONDS = 10.0
"""A checkpoint is written when this much time has passed since the last one."""


class TrainingError(RuntimeError):
    """Training cannot go on: the loss is not finite. The sentence names the epoch and the tensor where it began."""


@dataclass
class Run:
    """A finished training.

    Attributes:
        record: one JSON record (:mod:`qgnn.results` lists its fields).
        model: the fake-quantized model with the weights of the best epoch, in eval mode.
        data: the data it was trained on, with the recipe's feature normalisation applied.
        frozen: the integer model, bound to that data; None for "fp32".
    """

    record: dict[str, Any]
    model: nn.Module
    data: Data
    frozen: IntegerModel | None


@dataclass
class _Best:
    key: tuple[float, float, float] | None = None
    epoch: int = -1
    val_acc: float = 0.0
    test_acc: float = 0.0
    state: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Progress:
    """What a checkpoint holds besides model and optimizer."""

    epoch: int = 0
    best: _Best = field(default_factory=_Best)
    warm: _Best = field(default_factory=_Best)
    test_acc_best_over_epochs: float = 0.0
    step_ms: list[float] = field(default_factory=list)
    peak_memory_bytes: int = 0


def prepare(dataset: Dataset, recipe: Recipe) -> Data:
    """The data of a data set with the recipe's feature normalisation: each row divided by its sum."""
    if not recipe.normalize_features:
        return dataset.data
    data = copy.copy(dataset.data)
    assert isinstance(data.x, Tensor)
    data.x = data.x / data.x.sum(1, keepdim=True).clamp_min(1e-12)
    return data


def training_features(x: Tensor | None) -> Tensor | SparseFeatures:
    """Features as training multiplies them: sparse where few are nonzero and 1 bit represents them exactly, so that nothing has to quantize them."""
    assert isinstance(x, Tensor)
    sparse = int(x.count_nonzero()) < SPARSE_BELOW * x.numel() and is_row_binary(x)
    return SparseFeatures.from_dense(x) if sparse else x


def parameter_groups(model: nn.Module, recipe: Recipe, lr: float) -> list[dict[str, Any]]:
    """Parameters by kind, each with its learning rate: weights and biases, widths, and steps of features, weights and operands."""
    rates = {
        "bits": recipe.lr_bits,
        "log_step": recipe.lr_step,
        "log_weight_step": recipe.lr_weight_step,
        "log_operand_step": recipe.lr_operand_step,
    }
    kinds: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        kind = name.rsplit(".", 1)[-1] if ".quantizer." in f".{name}" else "weights"
        kinds.setdefault(kind, []).append(parameter)
    return [
        {
            "kind": kind,
            "params": params,
            "lr": rates.get(kind, lr),
            "weight_decay": 0.0 if kind in rates else recipe.weight_decay,
        }
        for kind, params in kinds.items()
    ]


class Trainer:
    """One training of ``model`` on ``data``, epoch by epoch, with a :class:`qgnn.recipes.Recipe`.

    ``data`` has ``x``, ``edge_index``, ``y`` and the masks of a split. The model computes in float32 for ``recipe.warmup`` epochs; then its
    quantizers start from the best of these weights, and train for ``recipe.epochs`` epochs. The best epoch is that of the highest validation
    accuracy, the lowest validation loss among equals, among the quantized epochs whose average width is within ``recipe.bits_limit``; if there is
    none, that of the smallest average width.
    """

    def __init__(self, model: nn.Module, data: Data, recipe: Recipe) -> None:
        self.model, self.data, self.recipe = model, data, recipe
        self.warmup, self.total = recipe.warmup, recipe.warmup + recipe.epochs
        self.optimizer = torch.optim.Adam(parameter_groups(model, recipe, recipe.warmup_lr))
        self.x = training_features(data.x)
        self.progress = _Progress()
        self.teacher: Tensor | None = None
        quant.set_enabled(model, False)

    def run(self, checkpoint: Path | None = None, progress: Callable[[int, int], None] | None = None) -> None:
        """Trains to the end, from ``checkpoint`` where that exists; calls ``progress(epoch, total)`` after every epoch."""
        if checkpoint is not None and checkpoint.exists():
            self._resume(checkpoint)
        written = time.monotonic()
        while self.progress.epoch < self.total:
            self._epoch(self.progress.epoch)
            self.progress.epoch += 1
            if progress is not None:
                progress(self.progress.epoch, self.total)
            if checkpoint is not None and (
                time.monotonic() - written > CHECKPOINT_SECONDS or self.progress.epoch == self.total
            ):
                self._write(checkpoint)
                written = time.monotonic()
        best = self.progress.best
        self.model.load_state_dict(best.state)
        self.model.eval()

    def _epoch(self, epoch: int) -> None:
        if epoch == self.warmup:
            self.end_warmup()
        started = time.perf_counter()
        if epoch == self.total - 1:
            self.progress.peak_memory_bytes = self._measured_step(epoch)
        else:
            self.step(epoch)
            if epoch >= self.warmup:
                self.progress.step_ms.append((time.perf_counter() - started) * 1e3)
        self._evaluate(epoch)

    def _measured_step(self, epoch: int) -> int:
        """A training step; returns the allocator's peak on a GPU, and on a CPU the bytes that are kept for backward."""
        if self.x.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.x.device)
            self.step(epoch)
            return torch.cuda.max_memory_allocated(self.x.device)
        with _SavedBytes(self.model) as kept:
            self.step(epoch)
        return kept.bytes

    def step(self, epoch: int) -> None:
        """One training step: forward, backward, optimizer.

        Raises:
            TrainingError: the loss is not finite.
        """
        if epoch == self.warmup + round(self.recipe.bits_share * self.recipe.epochs):
            for group in self.optimizer.param_groups:
                group["lr"] = 0.0 if group["kind"] == "bits" else group["lr"]
        self.model.train()
        loss = self._loss(epoch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._check_finite(loss, epoch)
        self.optimizer.step()
        with torch.no_grad():
            for layer in learned_layers(self.model):
                layer.bits.clamp_(0, 8)

    def _loss(self, epoch: int) -> Tensor:
        recipe, data = self.recipe, self.data
        out = self.model(self.x, data.edge_index)
        loss = F.cross_entropy(out[data.train_mask], data.y[data.train_mask])
        if self.teacher is not None:
            loss = loss + recipe.distill * F.cross_entropy(out, self.teacher)
        if epoch >= self.warmup and recipe.penalty:
            layers = list(learned_layers(self.model))
            if layers:
                target = recipe.target_bits * sum(q.in_channels * q.bits.numel() for q in layers) / (8 * 1024)
                loss = loss + recipe.penalty * memory_penalty(self.model, target, "relu")
        return loss

    def end_warmup(self) -> None:
        """Restores the best warm-up weights, keeps their predictions as the teacher's, starts a new optimizer, switches the quantizers on,
        and lets them take their steps and ranges from the whole graph."""
        if self.progress.warm.key is not None:
            self.model.load_state_dict(self.progress.warm.state)
            if self.recipe.distill:
                self.teacher = F.softmax(self._forward_eval(), 1)
        for module in self.model.modules():
            if isinstance(module, A2QQuantizer):
                module.initial_bits = self.recipe.initial_bits
        self._begin_main()
        self._forward_eval()

    def _begin_main(self) -> None:
        quant.set_enabled(self.model, True)
        if isinstance(self.model, GCN):
            self.model.dropout = self.recipe.dropout
        self.optimizer = torch.optim.Adam(parameter_groups(self.model, self.recipe, self.recipe.lr))

    @torch.no_grad()
    def _forward_eval(self) -> Tensor:
        self.model.eval()
        return self.model(self.x, self.data.edge_index)

    def _evaluate(self, epoch: int) -> None:
        data, progress = self.data, self.progress
        out = self._forward_eval()
        right = (out.argmax(1) == data.y).double()
        val_acc, test_acc = (float(right[mask].mean()) * 100 for mask in (data.val_mask, data.test_mask))
        loss = float(F.cross_entropy(out[data.val_mask], data.y[data.val_mask]))
        excess = max(self.average_bits() - self.recipe.bits_limit, 0.0) if epoch >= self.warmup else 0.0
        key = (-excess, val_acc, -loss)
        best = progress.warm if epoch < self.warmup else progress.best
        if epoch >= self.warmup and not excess:
            progress.test_acc_best_over_epochs = max(progress.test_acc_best_over_epochs, test_acc)
        if best.key is None or key > best.key:
            best.key, best.epoch, best.val_acc, best.test_acc = key, epoch, val_acc, test_acc
            best.state = copy.deepcopy(self.model.state_dict())

    def average_bits(self) -> float:
        """Mean over the layers with learned widths of the mean width over the nodes; 0 without such layers."""
        widths = [float(rounded_bits(q.bits).float().mean()) for q in learned_layers(self.model)]
        return statistics.fmean(widths) if widths else 0.0

    def _check_finite(self, loss: Tensor, epoch: int) -> None:
        if bool(torch.isfinite(loss)):
            return
        value = float(loss.detach())
        phase = f"warm-up epoch {epoch}" if epoch < self.warmup else f"epoch {epoch - self.warmup}"
        values = self.x if isinstance(self.x, Tensor) else self.x.values
        parameters = list(self.model.named_parameters())
        suspects = (
            [("the features", values)]
            + [(f"parameter {name}", p) for name, p in parameters]
            + [(f"the gradient of {name}", p.grad) for name, p in parameters]
        )
        for name, tensor in suspects:
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise TrainingError(
                    f"the loss is {value} in {phase}; it began in {name}; lower the learning rates or look at the data"
                )
        raise TrainingError(f"the loss is {value} in {phase}; it began in the output; lower the learning rates")

    def _write(self, path: Path) -> None:
        state = {
            "recipe": asdict(self.recipe),
            "model": self.model.state_dict(),
            "warm": self.progress.epoch > self.warmup,
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
            "teacher": self.teacher,
            "rng": torch.get_rng_state(),
            "rng_gpu": torch.cuda.get_rng_state(self.x.device) if self.x.device.type == "cuda" else None,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
        os.close(handle)
        try:
            torch.save(state, temporary)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)

    def _resume(self, path: Path) -> None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged file provokes in the reader
            raise ValueError(
                f"checkpoint {path} cannot be read, it is damaged or of another program; delete it to start over"
            ) from error
        if not isinstance(state, dict) or state.get("recipe") != asdict(self.recipe):
            raise ValueError(f"checkpoint {path} belongs to other settings; delete it or choose another folder")
        self.model.load_state_dict(state["model"])
        if state["warm"]:
            self._begin_main()
        self.optimizer.load_state_dict(state["optimizer"])
        self.teacher = None if state["teacher"] is None else state["teacher"].to(self.x.device)
        progress = state["progress"]
        self.progress = _Progress(**{**progress, "best": _best(progress["best"]), "warm": _best(progress["warm"])})
        torch.set_rng_state(state["rng"])
        if state["rng_gpu"] is not None and self.x.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng_gpu"], self.x.device)
        _log.info("resumed %s after epoch %d", path, self.progress.epoch)


def _best(state: dict[str, Any]) -> _Best:
    return _Best(**{**state, "key": None if state["key"] is None else tuple(state["key"])})


class _SavedBytes:
    """Bytes that autograd keeps for backward inside the ``with`` block, each storage once, parameters not counted."""

    def __init__(self, model: nn.Module) -> None:
        self._known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.bytes = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._known.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor

    def __enter__(self) -> _SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)


def train(
    dataset: Dataset,
    model: str,
    scheme: str,
    seed: int,
    *,
    recipe: Recipe | None = None,
    device: str = "cpu",
    checkpoint: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Run:
    """Trains one model and freezes it.

    Args:
        dataset: from :func:`qgnn.data.load`.
        model: "gcn".
        scheme: a scheme name (:mod:`qgnn.quant.scheme`).
        seed: of weights, dropout and masks; the same seed gives the same run on the same machine.
        recipe: the settings; by default those of the scheme and the data set's family (:func:`qgnn.recipes.recipe_for`).
        device: "cpu" or "cuda".
        checkpoint: file to resume from and to write to.
        progress: called with (epochs done, epochs in all).

    Raises:
        ValueError: an unknown model or scheme, or a checkpoint of other settings.
        TrainingError: the loss became NaN or infinite; the sentence names the epoch and the tensor.
    """
    parsed = quant.parse(scheme)
    recipe = recipe or recipe_for(model, parsed, dataset)
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, but torch sees no GPU here; qgnn info shows what there is")
    data = copy.copy(prepare(dataset, recipe)).to(device)
    torch.manual_seed(seed)
    network = build(parsed, dataset, recipe).to(device)
    trainer = Trainer(network, data, recipe)
    trainer.run(checkpoint, progress)
    record = _record(trainer, dataset, model, parsed, seed)
    frozen = None if parsed.method == "fp32" else freeze(network, data)
    return Run({**record, **_integer_record(frozen, data)}, network, data, frozen)


@torch.no_grad()
def _integer_record(frozen: IntegerModel | None, data: Data) -> dict[str, float | None]:
    names = ("integer_test_acc", "integer_mismatches", "integer_ties", "integer_max_relative")
    if frozen is None or frozen.report is None:
        return dict.fromkeys(names)
    right = (frozen().argmax(1) == data.y).double()
    report = frozen.report
    values = (
        float(right[data.test_mask].mean()) * 100,
        report.mismatched_predictions,
        report.ties,
        report.max_relative,
    )
    return dict(zip(names, values, strict=True))


def build(scheme: quant.Scheme, dataset: Dataset, recipe: Recipe) -> nn.Module:
    """An untrained GCN of a recipe's sizes for a data set."""
    x = dataset.data.x
    assert isinstance(x, Tensor)
    return GCN(
        x.size(1),
        recipe.hidden,
        dataset.num_classes,
        dropout=recipe.warmup_dropout,
        input_dropout=recipe.input_dropout,
        scheme=scheme,
        num_nodes=x.size(0),
    )


def _record(trainer: Trainer, dataset: Dataset, model: str, scheme: quant.Scheme, seed: int) -> dict[str, Any]:
    best, progress, nodes = trainer.progress.best, trainer.progress, trainer.x.size(0)
    maps = quant.feature_maps(trainer.model, nodes)
    averages = quant.averages(maps)
    return {
        "dataset": dataset.name,
        "model": model,
        "scheme": scheme.name,
        "seed": seed,
        "best_epoch": best.epoch - trainer.warmup,
        "val_acc": best.val_acc,
        "test_acc": best.test_acc,
        "test_acc_best_over_epochs": max(progress.test_acc_best_over_epochs, best.test_acc),
        **asdict(averages),
        "packed_bytes": sum(m.packed_bytes() for m in maps),
        "fp32_bytes": sum(4 * m.dim * m.nodes for m in maps),
        "train_step_ms": statistics.median(progress.step_ms) if progress.step_ms else 0.0,
        "peak_memory_bytes": progress.peak_memory_bytes,
        "recipe": asdict(trainer.recipe),
    }
