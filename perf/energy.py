"""Energy of an inference on a GPU beside the accelerator's (A2Q figure 22): measured by NVML where there is a GPU, else modelled.

Measured are PyG's FP32 layers of the workload's sizes, and the integer model itself. Both run as Python launches them, without CUDA graphs.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch_geometric.nn import GATConv, GCNConv, GINConv, SAGEConv

from ..accel.config import Config
from ..accel.gpu import Gpu, GpuEnergy, find_gpu, model_fp32
from ..accel.simulator import simulate
from ..accel.workload import Layer, Workload
from ..data import load
from ..experiments.store import Cell, Store
from ..export import arguments, whole, workload_from
from ..recipes import Recipe
from ..serialize import load as load_model
from .meter import Call, Counter, Measured, Meter

Record = dict[str, Any]


def fp32_call(workload: Workload, x: Tensor) -> Call:
    """PyG's FP32 layers of a workload's sizes on its graph, with random weights, on the device of ``x`` ``[N, F]``: those that
    :func:`qgnn.accel.gpu.fp32_kernels` counts. A layer reads the one before it, or, where sizes differ, a random map."""
    device = x.device
    destinations = np.repeat(np.arange(workload.num_nodes), workload.degrees)
    edges = torch.from_numpy(np.stack([np.asarray(workload.indices, np.int64), destinations])).to(device)
    steps: list[tuple[nn.Module, Tensor | None]] = []
    width = x.size(1)
    for layer in workload.layers:
        module = _pyg(layer).to(device).eval().requires_grad_(False)
        given = None if layer.f_in == width else torch.randn(workload.num_nodes, layer.f_in, device=device)
        steps.append((module, given))
        width = layer.f_out

    @torch.no_grad()
    def call() -> Tensor:
        h = x
        for index, (module, given) in enumerate(steps):
            h = torch.relu(h) if index else h
            read = h if given is None else given
            h = module(read) if isinstance(module, nn.Linear) else module(read, edges)
        return h

    return call


def _pyg(layer: Layer) -> nn.Module:
    sizes = layer.f_in, layer.f_out
    if layer.kind == "gcn":
        return GCNConv(*sizes, cached=True, add_self_loops=False)  # the CSR has the loops
    if layer.kind == "gat":
        return GATConv(layer.f_in, layer.f_out // layer.heads, layer.heads, add_self_loops=False)
    if layer.kind == "gin":
        return GINConv(nn.Linear(*sizes))
    return SAGEConv(*sizes, root_weight=False) if layer.kind == "sage" else nn.Linear(*sizes)


# Comparing


@dataclass(frozen=True)
class Models:
    """Integer models of one data set, architecture and scheme: a row of the comparison. ``paths``: one file a run."""

    dataset: str
    model: str
    scheme: str
    paths: tuple[Path, ...]

    def __str__(self) -> str:
        return " ".join(filter(None, (self.dataset, self.model, self.scheme)))


def saved(path: Path, dataset: str) -> Models:
    """A single file that :func:`qgnn.save` wrote.

    Raises:
        ValueError: there is no such file.
    """
    if not path.is_file():
        raise ValueError(f"there is no model file {path}; qgnn train --out DIR leaves some in DIR/models")
    return Models(dataset, path.stem, "", (path,))


def trained(folder: Path) -> list[Models]:
    """The integer models that ``qgnn train --out`` left in a folder or in folders of it. Runs of different recipes make different rows.

    Raises:
        ValueError: there is none.
    """
    found: dict[tuple[object, ...], list[Path]] = {}
    for results in sorted(folder.rglob("results.jsonl")):
        store = Store(results.parent)
        for key, record in store.finished().items():
            *names, _, _ = key
            recipe = Recipe(**record["recipe"])
            cell = Cell(
                record["dataset"], record["model"], record["scheme"], recipe, record["seed"], record.get("fold", 0)
            )
            path = store.models / f"{cell.stem}.safetensors"
            if path.is_file():  # schemes such as fp32 have none
                found.setdefault(tuple(names), []).append(path)
    if not found:
        raise ValueError(f"there is no integer model in {folder}; qgnn train --scheme a2q --out {folder} leaves one")
    return [Models(str(d), str(m), str(s), tuple(paths)) for (d, m, s, _), paths in found.items()]


def chosen(name: str | None) -> Gpu | Meter:
    """A GPU to model, where one is named or none is here (then A2Q's), else the meter of the one that is here.

    Raises:
        ValueError: there is no such GPU, or its counter cannot be read.
    """
    if name is None and torch.cuda.is_available():
        return Meter(Counter())
    return find_gpu() if name is None else find_gpu(name)


def compare(
    models: Models,
    config: Config,
    gpu: Gpu | Meter,
    data_root: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Record:
    """A row: energy and time of an inference on the accelerator, mean over the models, and on a GPU, of the first of them.

    Fields: ``dataset``, ``model``, ``scheme``, ``runs``; ``accelerator_joules``, its parts, ``accelerator_seconds``; ``gpu``, ``gpu_mode``
    ("measured" or "modelled"), ``gpu_joules`` with ``gpu_low_joules`` and ``gpu_high_joules`` (bounds of the model; extremes of the trials),
    ``gpu_seconds``; ``ratio``, ``ratio_low``, ``ratio_high``: GPU over accelerator. Measured only: ``gpu_net_joules``, net of idle,
    ``gpu_idle_w``, and as ``gpu_integer_...`` those of the integer model.

    Raises:
        ValueError: a model and its data set do not fit, or do not fit into the GPU's memory.
    """
    show = progress or (lambda *_: None)
    results = []
    workload: Workload | None = None
    for done, path in enumerate(models.paths, 1):
        loaded = workload_from(str(path), models.dataset, data_root, None, None)
        results.append(simulate(loaded, config))
        workload = workload or loaded
        show(f"{models}: accelerator", done, len(models.paths))
    assert workload is not None, "at least one path"
    parts = {
        f"accelerator_{part}_joules": statistics.mean(r.total.energy_pj[part] for r in results) * 1e-12
        for part in results[0].total.energy_pj
    }
    record: Record = {"dataset": models.dataset, "model": models.model, "scheme": models.scheme, "runs": len(results)}
    record |= {"accelerator_joules": sum(parts.values()), **parts}
    record["accelerator_seconds"] = statistics.mean(r.seconds for r in results)
    if isinstance(gpu, Gpu):
        record |= {"gpu": gpu.name, "gpu_mode": "modelled", "gpu_source": gpu.source}
        record |= _side("gpu", model_fp32(workload, gpu))
    else:
        record |= {"gpu": gpu.counter.name, "gpu_mode": "measured", "gpu_source": "NVML's energy counter"}
        record |= _measured(models, workload, gpu, data_root, show)
    for end in ("", "_low", "_high"):
        record[f"ratio{end}"] = record[f"gpu{end}_joules"] / record["accelerator_joules"]
    return record


def _side(name: str, energy: GpuEnergy | Measured) -> Record:
    fields = ("joules", "low_joules", "high_joules", "seconds")
    return {f"{name}_{field}": getattr(energy, field) for field in fields}


def _measured(
    models: Models,
    workload: Workload,
    meter: Meter,
    data_root: Path | None,
    show: Callable[[str, int, int], None],
) -> Record:
    record: Record = {}
    try:
        frozen = load_model(models.paths[0]).to(meter.device)
        data = whole(frozen, load(models.dataset, data_root)).to(meter.device)
        bound = frozen.bind(*arguments(frozen, data))
        for name, call in (("gpu", fp32_call(workload, data.x.float())), ("gpu_integer", bound)):
            measured = meter.measure(call, partial(show, f"{models}: {name}"))
            record |= {**_side(name, measured), f"{name}_net_joules": measured.net_joules}
            record[f"{name}_idle_w"] = statistics.median(t.idle_w for t in measured.trials)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{models} does not fit into the memory of {meter.counter.name}; name a GPU with --gpu, and its energy is modelled"
        ) from error
    return record


# Writing


def write(records: Sequence[Record], folder: Path) -> list[Path]:
    """Writes ``energy.csv``, the rows, and ``energy.svg``, A2Q's figure 22 of them; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    table, figure = folder / "energy.csv", folder / "energy.svg"
    columns = list(dict.fromkeys(column for record in records for column in record))
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(records)
    _plot(records, figure)
    return [table, figure]


def _plot(records: Sequence[Record], path: Path) -> None:
    """Bars of the energy ratio with its bounds, on a logarithmic axis."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    ratio, low, high = ([record[f"ratio{end}"] for record in records] for end in ("", "_low", "_high"))
    errors = np.abs(np.array([low, high]) - np.array(ratio))
    names = [f"{r['dataset']}\n{r['model']} {r['scheme']}" for r in records]
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "qgnn", "text.parse_math": False, "font.size": 9}):
        figure = Figure(figsize=(max(4.0, 1.2 * len(records) + 1.5), 3.4), layout="constrained")
        axes = figure.add_subplot()
        bars = axes.bar(range(len(records)), ratio, yerr=errors, capsize=4, color="#7fb77e")
        axes.bar_label(bars, [f"{value:.3g}" for value in ratio], padding=2)
        axes.set_xticks(range(len(records)), names)
        axes.set(yscale="log", ylabel="energy of the GPU / of the accelerator")
        axes.set_ylim(min(1.0, *low), 2 * max(high))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_title(", ".join(dict.fromkeys(f"{r['gpu']}, FP32, {r['gpu_mode']}" for r in records)), fontsize=9)
        figure.savefig(path, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
