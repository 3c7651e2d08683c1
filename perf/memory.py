"""Memory of a training step, scheme by scheme, beside FP32 and plain emulation: the table of ``qgnn memory``, as Bqain's of peak RAM."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import quant
from ..data import Dataset, GraphDataset, UnknownDataset, load
from ..experiments.compare import aligned
from ..experiments.table import Row, Table
from ..memory import KINDS, SavedTensors, allocated_peak
from ..quant import Scheme
from ..quant.components import FLOAT, NAMES
from ..recipes import Recipe, recipe_for
from ..tasks import GraphBatch, NodeTask, Task, task_of
from ..trace import write_whole
from ..train import Trainer, build
from .emulation import emulate, pyg_network

PRINTED: dict[str, dict[str, float]] = {
    "Cora": {"fp32": 17.56, "fixed": 210.6, "msfp": 169.808},
    "PubMed": {"fp32": 57.54, "fixed": 536.64, "msfp": 438.31},
    "MUTAG": {"fp32": 7.73, "fixed": 11.9, "msfp": 10.11},
}
"""Peak RAM in MB of Bqain's GCN, which emulates: by data set and number format; one figure for all widths."""


@dataclass(frozen=True)
class Step:
    """What a training step of one program keeps and allocates, in bytes.

    Attributes:
        layers: what is kept at the peak, by layer and kind (:mod:`qgnn.memory`).
        kept: the sum.
        allocated: the allocator's peak; inputs, parameters and graphs are there before and do not count.
    """

    layers: dict[str, dict[str, int]]
    kept: int
    allocated: int

    def kind(self, kind: str) -> int:
        """Bytes of one kind in all layers."""
        return sum(kinds.get(kind, 0) for kinds in self.layers.values())


def measured(network: nn.Module, loss: Callable[[], Tensor]) -> Step:
    """The step ``loss().backward()``, which has run once before: then ranges, graphs and kernels are there."""
    network.zero_grad(set_to_none=True)
    with SavedTensors(network) as saved:
        loss().backward()
    network.zero_grad(set_to_none=True)
    allocated = allocated_peak(lambda: loss().backward(), next(network.parameters()).device)
    layers: dict[str, dict[str, int]] = {}
    for (layer, kind), size in sorted(saved.parts.items()):
        if size:
            layers.setdefault(layer, {})[kind] = size
    return Step(layers, saved.peak, allocated)


class Bench:
    """Training steps of a model at the same sizes, on the same data, with the same draws of chance.

    Args:
        hidden: width of the hidden layers; by default the recipe's.

    Raises:
        ValueError: the data set has no such model.
    """

    def __init__(self, dataset: Dataset | GraphDataset, model: str, hidden: int | None, device: str) -> None:
        self.dataset, self.model, self.hidden, self.device = dataset, model, hidden, device

    def recipe(self, scheme: Scheme) -> Recipe:
        """The scheme's; of FP32 that of quantized training, so that both have the same dropout."""
        own = quant.parse("fixed-8") if scheme.method == "fp32" else scheme
        return recipe_for(self.model, own, self.dataset).changed(hidden=self.hidden)

    def _task(self, recipe: Recipe) -> tuple[Task, Any]:
        torch.manual_seed(0)
        task = task_of(self.dataset, recipe, device=self.device)
        return task, next(iter(task.batches()))

    def ours(self, scheme: Scheme) -> Step:
        """Our layers; of a schedule, the largest width, which needs most."""
        recipe = self.recipe(scheme)
        task, batch = self._task(recipe)
        network = build(scheme, self.dataset, recipe, self.model).to(self.device)
        trainer = Trainer(network, task, recipe)
        trainer.end_warmup()
        if scheme.schedule is not None:
            quant.set_width(network, max(scheme.schedule.widths))
        trainer.step(trainer.warmup, batch)
        return measured(network, lambda: trainer.loss(trainer.warmup, batch))

    def pyg(self, scheme: Scheme) -> Step:
        """PyG's layers, in FP32 or emulating a scheme."""
        recipe = self.recipe(scheme)
        task, batch = self._task(recipe)
        x = task.data.x if isinstance(task, NodeTask) else task.features(batch)
        assert isinstance(x, Tensor)
        network = pyg_network(self.model, self.dataset.task, x.size(1), self.dataset.num_classes, recipe)
        network = (network if scheme.method == "fp32" else emulate(network, scheme)).to(self.device).train()
        loss = _loss(network, task, batch)
        loss().backward()
        return measured(network, loss)


def _loss(network: nn.Module, task: Task, batch: Any) -> Callable[[], Tensor]:
    """The task's loss, with features and edges as PyG reads them."""
    if isinstance(task, NodeTask):
        data = task.data
        return lambda: F.cross_entropy(network(data.x, data.edge_index)[data.train_mask], data.y[data.train_mask])
    assert isinstance(batch, GraphBatch)
    x, graph, place, graphs = batch.inputs
    edge_index = torch.stack([graph.indices, graph.rows]).long()
    return lambda: task.objective.loss(network(x, edge_index, place, graphs), batch.y)


def rows(
    dataset: Dataset | GraphDataset, model: str, schemes: list[Scheme], hidden: int | None, device: str
) -> Iterator[dict[str, Any]]:
    """A record for each scheme, flat but for ``layers``: bytes by kind, all that is kept, the allocator's peak; the same of PyG's layers, in FP32 or
    emulating (``pyg_...``, None where nothing corresponds); ratios to our FP32 (``..._ratio``), to PyG's, and to emulation; Bqain's figure in MB."""
    bench = Bench(dataset, model, hidden, device)
    fp32 = quant.parse("fp32")
    ours, theirs = bench.ours(fp32), _counterpart(bench, fp32)
    emulated: dict[tuple[object, ...], Step | None] = {}
    for scheme in schemes:
        step = ours if scheme == fp32 else bench.ours(scheme)
        emulates = scheme.components is not None and scheme.method in ("fixed", "msfp")
        other = theirs if scheme == fp32 else None
        if emulates and theirs is not None:
            key = _emulation(scheme)
            if key not in emulated:
                emulated[key] = _counterpart(bench, scheme)
            other = emulated[key]
        maps = step.kind("feature map")
        yield {
            "dataset": dataset.name,
            "model": model,
            "scheme": scheme.name,
            "hidden": bench.recipe(scheme).hidden,
            "device": device,
            **{f"{kind.replace(' ', '_')}_bytes": step.kind(kind) for kind in KINDS},
            "saved_bytes": step.kept,
            "allocated_bytes": step.allocated,
            "feature_map_ratio": _ratio(maps, ours.kind("feature map")),
            "saved_ratio": _ratio(step.kept, ours.kept),
            "allocated_ratio": _ratio(step.allocated, ours.allocated),
            "pyg_feature_map_bytes": None if other is None else other.kind("feature map"),
            "pyg_saved_bytes": None if other is None else other.kept,
            "pyg_allocated_bytes": None if other is None else other.allocated,
            "pyg_fp32_saved_ratio": None if theirs is None else _ratio(step.kept, theirs.kept),
            "emulation_saved_ratio": None if other is None or not emulates else _ratio(step.kept, other.kept),
            "emulation_fp32_ratio": None
            if other is None or theirs is None or not emulates
            else _ratio(other.kept, theirs.kept),
            "printed_mb": None if scheme.saved else PRINTED.get(dataset.name, {}).get(scheme.method),
            "layers": step.layers,
        }


def _emulation(scheme: Scheme) -> tuple[object, ...]:
    """What an emulation's memory depends on: the format, and which components are in float32, but no width."""
    assert scheme.components is not None, "as the caller looked"
    return scheme.method, *(scheme.components.at(name, scheme.bits) == FLOAT for name in NAMES)


def _counterpart(bench: Bench, scheme: Scheme) -> Step | None:
    try:
        return bench.pyg(scheme)
    except ValueError:
        return None


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


# The table qt-ram of `qgnn reproduce`

_HEADER = (
    *("row", "scheme", "printed, MB", "printed / FP32", "kept, MB", "kept / FP32", "allocated, MB"),
    *("PyG: kept, MB", "PyG: allocated, MB", "emulated / PyG's FP32", "state"),
)


def reproduce(table: Table, selected: Sequence[Row], root: Path | None, device: str, out: Path) -> list[dict[str, Any]]:
    """Measures the rows of a table of kind "memory", and writes ``out/TABLE.md`` and ``out/TABLE.csv``.

    Returns:
        The entries of :func:`rows`, with the printed figure and its ratio to the printed one of FP32.

    Raises:
        ValueError: a row's data set, scheme, model or setting does not exist; the sentence names the row.
    """
    entries: list[dict[str, Any]] = []
    for row in selected:
        entry = {"row": row.id, "dataset": row.dataset, "model": row.model, "scheme": row.scheme, "printed_mb": row.ram}
        fp32 = next((r.ram for r in table.rows if (r.dataset, r.scheme) == (row.dataset, "fp32")), None)
        entry["printed_ratio"] = row.ram / fp32 if row.ram and fp32 else None
        if row.scheme is None:
            entries.append({**entry, "state": "printed only"})
            continue
        try:
            if set(row.recipe) - {"hidden"}:
                raise ValueError("where memory is measured, recipe takes hidden only")
            hidden = int(row.recipe["hidden"]) if row.recipe else None
            scheme = quant.parse(row.scheme)
            try:
                dataset = load(row.dataset, root)
            except UnknownDataset:
                raise
            except (ValueError, OSError) as error:
                entries.append({**entry, "state": "data missing", "missing": f"data missing: {error}"})
                continue
            (found,) = rows(dataset, row.model, [scheme], hidden, device)
        except ValueError as error:
            raise ValueError(f"table {table.name}, row {row.id}: {error}") from error
        entries.append({**found, **entry, "state": "done"})
    names = list(dict.fromkeys(name for entry in entries for name in entry if name not in ("layers", "missing")))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(entries)
    write_whole(out / f"{table.name}.csv", text.getvalue())
    write_whole(out / f"{table.name}.md", markdown(table, selected, entries))
    return entries


def markdown(table: Table, selected: Sequence[Row], entries: Sequence[dict[str, Any]]) -> str:
    """The table as Markdown."""

    def text(entry: dict[str, Any], name: str, form: str, unit: float = 1) -> str:
        return "" if entry.get(name) is None else f"{entry[name] / unit:{form}}"

    shown = [
        (
            *(entry["row"], entry["scheme"] or "", text(entry, "printed_mb", "g"), text(entry, "printed_ratio", ".2f")),
            *(text(entry, "saved_bytes", ".3f", 1e6), text(entry, "saved_ratio", ".2f")),
            *(text(entry, f"{name}_bytes", ".3f", 1e6) for name in ("allocated", "pyg_saved", "pyg_allocated")),
            *(text(entry, "emulation_fp32_ratio", ".2f"), entry["state"]),
        )
        for entry in entries
    ]
    remarks = [*(row.note for row in selected if row.note), *(e["missing"] for e in entries if "missing" in e)]
    notes = "".join(f"- {' '.join(remark.split())}\n" for remark in dict.fromkeys(remarks))
    return (
        f"# {table.title}\n\nPrinted: {table.source}.\nOurs: what a training step keeps for backward, and the allocator's peak; beside it PyG's "
        "layers, which emulate the scheme.\n\n"
        + "\n".join(aligned([_HEADER, *shown], left=2))
        + "\n"
        + (f"\n{notes}" if notes else "")
    )
