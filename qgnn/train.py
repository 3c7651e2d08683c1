"""Training: FP32 warm-up, quantized training, best validation epoch, checkpoints that resume exactly. :mod:`qgnn.tasks` says what for."""

from __future__ import annotations

import copy
import logging
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch_geometric.data import Data

from . import models, quant
from .data import Dataset, GraphDataset
from .freeze import freeze
from .integer import IntegerModel
from .memory import SavedTensors
from .quant.a2q import learned_layers
from .quant.components import FLOAT
from .recipes import Recipe, recipe_for
from .tasks import NodeTask, Scores, Task, prepare, task_of, training_features

__all__ = ["Run", "Trainer", "TrainingError", "build", "parameter_groups", "prepare", "train", "training_features"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

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
        task: the data it was trained on, as training saw them, and how it is measured.
        frozen: the integer model, bound to the graph or to test graphs; None for schemes without integers: "fp32", "fp16", "bi", "msfp13", and
            "fixed-8/weights=fp32".
        curve: for every epoch ``epoch``, ``phase``, the metric ``val`` and ``test``, the validation ``loss``, and ``bits``, the width in use: the
            mean of learned ones, else the scheme's, which a schedule changes; None where nothing is quantized.
    """

    record: dict[str, Any]
    model: nn.Module
    task: Task
    frozen: IntegerModel | None
    curve: list[dict[str, Any]]

    @property
    def data(self) -> Data:
        """The one graph of a node or link task, with the recipe's feature normalisation applied.

        Raises:
            ValueError: the task has many graphs.
        """
        if not isinstance(self.task, NodeTask):
            raise ValueError("a run on many graphs has no single data; they are in run.task")
        return self.task.data


@dataclass
class _Best:
    key: tuple[float, float, float] | None = None
    epoch: int = -1
    val: float = 0.0
    test: float = 0.0
    state: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Progress:
    """What a checkpoint holds besides model and optimizer."""

    epoch: int = 0
    best: _Best = field(default_factory=_Best)
    warm: _Best = field(default_factory=_Best)
    test_best: float = -math.inf  # times the objective's sign
    curve: list[dict[str, Any]] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    peak_memory_bytes: int = 0


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
        kind = name.rsplit(".", 1)[-1]
        kinds.setdefault(kind if kind in rates else "weights", []).append(parameter)
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
    """One training of ``model`` for a task, epoch by epoch, with a :class:`qgnn.recipes.Recipe`.

    The model computes in float32 for ``recipe.warmup`` epochs; then its quantizers start from the best of these weights, and train for
    ``recipe.epochs`` epochs. The best epoch is that of the best validation metric, the lowest validation loss among equals, among the quantized
    epochs whose average width is within ``recipe.bits_limit``; if there is none, that of the smallest average width.

    A schedule sets the width of every quantized epoch. The width that the model is left with is that of the best epoch.

    A checkpoint continues a training of the same recipe and ``identity`` (data set, scheme, seed, …) only.

    Attributes:
        trained: what a training step calls: the model, or what is wrapped around it.
    """

    def __init__(self, model: nn.Module, task: Task, recipe: Recipe, identity: Mapping[str, Any] | None = None) -> None:
        self.model, self.task, self.recipe = model, task, recipe
        self.trained = model
        self.identity = {**(identity or {}), "recipe": asdict(recipe)}
        quantizers = (m for m in model.modules() if isinstance(m, quant.Quantizer))
        self.scheme = next((q.scheme for q in quantizers), quant.SCHEMES["fp32"])
        self.warmup, self.total = recipe.warmup, recipe.warmup + recipe.epochs
        self.optimizer = torch.optim.Adam(parameter_groups(model, recipe, recipe.warmup_lr))
        self.device = next(model.parameters()).device
        self.progress = _Progress()
        self.teacher: Tensor | None = None
        quant.set_enabled(model, False)

    def run(
        self,
        checkpoint: Path | None = None,
        progress: Callable[[int, int], None] | None = None,
        watch: Callable[[list[dict[str, Any]]], None] | None = None,
    ) -> None:
        """Trains to the end, from ``checkpoint`` where that exists; calls ``progress(epoch, total)`` and ``watch(curve)`` after every epoch."""
        if checkpoint is not None and checkpoint.exists():
            self._resume(checkpoint)
        written = time.monotonic()
        while self.progress.epoch < self.total:
            self._epoch(self.progress.epoch)
            self.progress.epoch += 1
            if progress is not None:
                progress(self.progress.epoch, self.total)
            if watch is not None:
                watch(self.progress.curve)
            if checkpoint is not None and (self.due(written) or self.progress.epoch == self.total):
                self._write(checkpoint)
                written = time.monotonic()
        best = self.progress.best
        self.model.load_state_dict(best.state)
        self._set_width(best.epoch)
        self.model.eval()

    def due(self, written: float) -> bool:
        """Whether to write a checkpoint: ``written`` is when, by ``time.monotonic``, the last one was."""
        return time.monotonic() - written > CHECKPOINT_SECONDS

    def _epoch(self, epoch: int) -> None:
        self._set_width(epoch)
        if epoch == self.warmup:
            self.end_warmup()
        self._set_rates(epoch)
        # SDQ's widths are measured in the last epoch of each; of ADQ's, the last one needs most.
        measured = epoch == self.total - 1 or (epoch >= self.warmup and self.bits(epoch + 1) != self.bits(epoch))
        steps, started = 0, time.perf_counter()
        for batch in self.task.batches():
            if measured:
                peak = self._measured_step(epoch, batch)
                self.progress.peak_memory_bytes = max(self.progress.peak_memory_bytes, peak)
            else:
                self.step(epoch, batch)
            steps += 1
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the last optimizer step is still running
        if epoch >= self.warmup and not measured:
            self.progress.step_ms.append((time.perf_counter() - started) * 1e3 / max(steps, 1))
        self._evaluate(epoch)

    def bits(self, epoch: int) -> int | None:
        """The scheme's width in an epoch, which follows from the curve of the epochs before; None where nothing is quantized, or widths are
        learned."""
        scheme, recipe = self.scheme, self.recipe
        if epoch < self.warmup or scheme.method in ("fp32", "a2q"):
            return None
        if scheme.schedule is None:
            return scheme.bits
        losses = [row["loss"] for row in self.progress.curve[self.warmup : epoch]]
        return scheme.schedule.width(epoch - self.warmup, recipe.epochs, losses, recipe.patience)

    def _set_width(self, epoch: int) -> None:
        bits = self.bits(epoch)
        if self.scheme.schedule is not None and bits is not None:
            quant.set_width(self.model, bits)

    def _set_rates(self, epoch: int) -> None:
        recipe = self.recipe
        if epoch == self.warmup + round(recipe.bits_share * recipe.epochs):
            for group in self.optimizer.param_groups:
                group["lr"] = 0.0 if group["kind"] == "bits" else group["lr"]
        done = epoch if epoch < self.warmup else epoch - self.warmup
        if recipe.halve_every and done and done % recipe.halve_every == 0:
            for group in self.optimizer.param_groups:
                group["lr"] /= 2

    def _measured_step(self, epoch: int, batch: Any) -> int:
        """A training step; returns the allocator's peak on a GPU, and on a CPU the bytes that are kept for backward."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.step(epoch, batch)
            return torch.cuda.max_memory_allocated(self.device)
        with SavedTensors(self.model) as kept:
            self.step(epoch, batch)
        return kept.peak

    def step(self, epoch: int, batch: Any) -> None:
        """One training step on a batch of the task: forward, backward, optimizer.

        Raises:
            TrainingError: the loss is not finite.
        """
        self.model.train()
        loss = self.loss(epoch, batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.reduce()
        self._check_finite(loss, epoch, batch)
        self.optimizer.step()
        with torch.no_grad():
            for layer in learned_layers(self.model):
                layer.bits.clamp_(0, 8)

    def reduce(self) -> None:
        """Called when the gradients are there, for what many processes do with them."""

    def loss(self, epoch: int, batch: Any) -> Tensor:
        """The task's loss of a batch; in the second phase with the memory penalty."""
        recipe = self.recipe
        loss = self.task.loss(self.trained, batch, self.teacher, recipe.distill)
        if epoch >= self.warmup and recipe.penalty:
            target = quant.learned_kb(self.model, recipe.target_bits)
            if target:
                loss = loss + recipe.penalty * quant.memory_penalty(self.model, target, "relu")
        return loss

    def end_warmup(self) -> None:
        """Restores the best warm-up weights, keeps their predictions as the teacher's, starts a new optimizer, switches the quantizers on,
        and lets them take their steps and ranges from training data."""
        if self.progress.warm.key is not None:
            self.model.load_state_dict(self.progress.warm.state)
            if self.recipe.distill:
                self.teacher = self._evaluated(self.task.teach)
        quant.start_values(self.model, self.recipe.initial_bits, self.recipe.initial_step)
        self._begin_main()
        self._evaluated(self.task.start)

    def _begin_main(self) -> None:
        quant.set_enabled(self.model, True)
        if isinstance(getattr(self.model, "dropout", None), float):
            self.model.dropout = self.recipe.dropout  # type: ignore[assignment]  # mypy takes what a Module holds for Tensor | Module
        self.optimizer = torch.optim.Adam(parameter_groups(self.model, self.recipe, self.recipe.lr))

    @torch.no_grad()
    def _evaluated(self, use: Callable[[nn.Module], _T]) -> _T:
        self.model.eval()
        return use(self.model)

    def _evaluate(self, epoch: int) -> None:
        progress, sign = self.progress, self.task.objective.sign
        scores = self.evaluate()
        width = quant.average_width(self.model)
        excess = max(width - self.recipe.bits_limit, 0.0)
        score = sign * scores.val
        key = (-excess, -math.inf if math.isnan(score) else score, -scores.loss)
        warming = epoch < self.warmup
        best = progress.warm if warming else progress.best
        phase = "FP32" if warming else "quantized"
        row = {"epoch": epoch, "phase": phase, **asdict(scores), "bits": width or self.bits(epoch)}
        progress.curve.append(row)
        if not (warming or excess):
            progress.test_best = max(progress.test_best, sign * scores.test)
        if best.key is None or key > best.key:
            best.key, best.epoch, best.val, best.test = key, epoch, scores.val, scores.test
            best.state = copy.deepcopy(self.model.state_dict())

    def evaluate(self) -> Scores:
        """The scores of the model as it is; :func:`qgnn.quant.average_width` then counts the widths that this pass used.

        Fixed-point ranges of training are of values that dropout scales up. The model keeps those of training data without dropout instead.
        """
        quant.reset_usage(self.model)
        if self.scheme.method == "fixed":
            for part in self.model.modules():
                if isinstance(part, quant.Quantizer):
                    for limit in part.buffers():
                        limit.fill_(torch.nan)  # the next pass sets it
            self._evaluated(self.task.start)
        return self._evaluated(self.task.evaluate)

    def _check_finite(self, loss: Tensor, epoch: int, batch: Any) -> None:
        if bool(torch.isfinite(loss)):
            return
        value = float(loss.detach())
        phase = f"warm-up epoch {epoch}" if epoch < self.warmup else f"epoch {epoch - self.warmup}"
        parameters = list(self.model.named_parameters())
        suspects = (
            [("the features", self.task.features(batch))]
            + [(f"parameter {name}", p) for name, p in parameters]
            + [(f"the gradient of {name}", p.grad) for name, p in parameters]
        )
        for name, tensor in suspects:
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise TrainingError(
                    f"the loss is {value} in {phase}; it began in {name}; lower the learning rates or look at the data"
                )
        raise TrainingError(f"the loss is {value} in {phase}; it began in the output; lower the learning rates")

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "identity": self.identity,
            "model": self.model.state_dict(),
            "warm": self.progress.epoch > self.warmup,
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
            "teacher": self.teacher,
            "rng": torch.get_rng_state(),
            "rng_gpu": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def _write(self, path: Path) -> None:
        self.write_state(path, self.state())

    @staticmethod
    def write_state(path: Path, state: dict[str, Any]) -> None:
        """Writes a checkpoint, which appears complete or not at all."""
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
        if not isinstance(state, dict) or state.get("identity") != self.identity:
            raise ValueError(f"checkpoint {path} belongs to other settings; delete it or choose another folder")
        self.load_state(state)
        _log.info("resumed %s after epoch %d", path, self.progress.epoch)

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from what :meth:`state` gave."""
        self.model.load_state_dict(state["model"])
        if state["warm"]:
            self._begin_main()
        self.optimizer.load_state_dict(state["optimizer"])
        self.teacher = None if state["teacher"] is None else state["teacher"].to(self.device)
        progress = state["progress"]
        self.progress = _Progress(**{**progress, "best": _best(progress["best"]), "warm": _best(progress["warm"])})
        torch.set_rng_state(state["rng"])
        if state["rng_gpu"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng_gpu"], self.device)


def _best(state: dict[str, Any]) -> _Best:
    return _Best(**{**state, "key": None if state["key"] is None else tuple(state["key"])})


def train(
    dataset: Dataset | GraphDataset,
    model: str,
    scheme: str,
    seed: int,
    *,
    fold: int = 0,
    recipe: Recipe | None = None,
    device: str = "cpu",
    checkpoint: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    watch: Callable[[list[dict[str, Any]]], None] | None = None,
) -> Run:
    """Trains one model, and freezes it unless its scheme has no integers.

    Args:
        dataset: from :func:`qgnn.data.load`.
        model: "gcn", "gat", "gin" or "sage".
        scheme: a scheme name (:mod:`qgnn.quant.scheme`).
        seed: of weights, batches, dropout and masks; the same seed gives the same run on the same machine.
        fold: which split of a data set that has several (10-fold cross-validation).
        recipe: the settings; by default those of the scheme and the data set's family (:func:`qgnn.recipes.recipe_for`).
        device: "cpu" or "cuda".
        checkpoint: file to resume from and to write to.
        progress: called with (epochs done, epochs in all).
        watch: called after every epoch with the curve so far (:attr:`Run.curve`); what it raises ends the training.

    Raises:
        ValueError: an unknown model or scheme, a fold that does not exist, settings that do not fit the task, or a checkpoint of other settings.
        TrainingError: the loss became NaN or infinite; the sentence names the epoch and the tensor.
    """
    parsed, recipe = settings(dataset, model, scheme, recipe, device)
    task = task_of(dataset, recipe, fold, device)
    torch.manual_seed(seed)
    network = build(parsed, dataset, recipe, model).to(device)
    trainer = Trainer(network, task, recipe, identity_of(dataset, model, parsed, seed, fold))
    trainer.run(checkpoint, progress, watch)
    return finished(trainer, dataset)


def settings(
    dataset: Dataset | GraphDataset, model: str, scheme: str, recipe: Recipe | None, device: str
) -> tuple[quant.Scheme, Recipe]:
    """Scheme and recipe of a training.

    Raises:
        ValueError: they do not fit together, or the device is not there.
    """
    parsed = quant.parse(scheme)
    recipe = recipe or recipe_for(model, parsed, dataset)
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, but torch sees no GPU here; qgnn info shows what there is")
    return parsed, recipe


def identity_of(
    dataset: Dataset | GraphDataset, model: str, scheme: quant.Scheme, seed: int, fold: int
) -> dict[str, Any]:
    """What a checkpoint has to agree with, besides the recipe."""
    return {"dataset": dataset.name, "model": model, "scheme": scheme.name, "seed": seed, "fold": fold}


def finished(trainer: Trainer, dataset: Dataset | GraphDataset) -> Run:
    """The run of a training that has ended; freezes its model unless the scheme has no integers."""
    task, network = trainer.task, trainer.model
    identity = {name: value for name, value in trainer.identity.items() if name != "recipe"}
    record = {**identity, "task": dataset.task, **_record(trainer)}
    frozen = freeze(network, task.example()) if _has_integers(trainer.scheme) else None
    record |= _integer_record(frozen, task)
    return Run(record, network, task, frozen, trainer.progress.curve)


def _has_integers(scheme: quant.Scheme) -> bool:
    """Whether all that the kernels read is integers, and nothing else is rounded, as the integer model has it."""
    if scheme.method == "fixed":
        parts = scheme.components or quant.Components()
        read = (parts.weights, parts.inputs, parts.messages, parts.attention)
        return FLOAT not in read and parts.aggregation == parts.update == FLOAT
    return scheme.method in ("qat", "dq", "a2q")


@torch.no_grad()
def _integer_record(frozen: IntegerModel | None, task: Task) -> dict[str, float | None]:
    names = ("integer_test_acc", "integer_mismatches", "integer_ties", "integer_max_relative")
    if frozen is None or frozen.report is None:
        return dict.fromkeys(names)
    report = frozen.report
    values = (task.evaluate_frozen(frozen).test, report.mismatched_predictions, report.ties, report.max_relative)
    return dict(zip(names, values, strict=True))


def build(scheme: quant.Scheme, dataset: Dataset | GraphDataset, recipe: Recipe, model: str = "gcn") -> nn.Module:
    """An untrained model of a recipe's sizes for a data set; for links, its outputs are embeddings of the hidden size."""
    if isinstance(dataset, GraphDataset):
        features, nodes = dataset.num_features, None
    else:
        assert isinstance(dataset.data.x, Tensor)
        nodes, features = dataset.data.x.shape
    return models.build(
        model,
        features,
        recipe.hidden if dataset.task == "link" else dataset.num_classes,
        task=dataset.task,
        family=dataset.family,
        recipe=recipe,
        scheme=scheme,
        num_nodes=nodes,
    )


def _record(trainer: Trainer) -> dict[str, Any]:
    best, progress, objective = trainer.progress.best, trainer.progress, trainer.task.objective
    trainer.evaluate()  # the widths that are used by the best epoch's model
    maps = quant.feature_maps(trainer.model, trainer.task.nodes)
    bits = [row["bits"] for row in progress.curve[trainer.warmup :]]
    known = trainer.scheme.method not in ("fp32", "a2q")
    return {
        "metric": objective.metric,
        "best_epoch": best.epoch - trainer.warmup,
        "val_acc": best.val,
        "test_acc": best.test,
        "test_acc_best_over_epochs": objective.sign * max(progress.test_best, objective.sign * best.test),
        **asdict(quant.averages(maps)),
        "widths": [[width, len(list(epochs))] for width, epochs in groupby(bits)] if known else None,
        "packed_bytes": sum(m.packed_bytes() for m in maps),
        "fp32_bytes": sum(4 * m.dim * m.nodes for m in maps),
        "train_step_ms": statistics.median(progress.step_ms) if progress.step_ms else 0.0,
        "peak_memory_bytes": progress.peak_memory_bytes,
        "recipe": asdict(trainer.recipe),
    }
