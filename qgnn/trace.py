"""Traces: what the plots of a report need of a run, one small JSON file each.

A trace holds

- ``record``: the run's record (:mod:`qgnn.results`);
- ``curve``: one entry an epoch: ``epoch``, ``phase``, ``loss``, ``val``, ``test``, ``bits``;
- ``widths``: for every layer with learned widths and every width in use, ``layer``, ``bits``, ``nodes`` and ``in_degree``, the mean over these
  nodes (A2Q figures 4 and 10);
- ``aggregated``: for every convolution and group of in-degrees, ``layer``, ``low`` and ``high``, the degrees of the group, ``nodes``, and ``mean``
  and ``deviation`` of the magnitudes of all their values after the aggregation (A2Q figure 1, Degree-Quant figure 3).
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from . import ops
from .graph import Graph
from .qtensor import rounded_bits
from .quant.a2q import learned_layers
from .quant.nns import GroupQuantizer

if TYPE_CHECKING:
    from .train import Run

_log = logging.getLogger(__name__)

Rows = list[dict[str, Any]]


def collect_trace(run: Run) -> dict[str, Any]:
    """The trace of a finished run: one pass of its model over what the run was evaluated on.

    In-degrees are those of the edges that a convolution is given, without the self loops that it adds. The values after an aggregation are what the
    update function of a layer reads where it has one of its own (``nn``, as GIN), else the output of the layer.
    """
    model = copy.deepcopy(run.model).eval()  # what follows, and what evaluation counts, goes with it
    collector = _Collector()
    learned = set(learned_layers(model))
    for name, module in model.named_modules():
        for quantizer in learned.intersection(module.children()):
            collector.watch_input(name, quantizer)
        if type(module).__name__.endswith("Conv"):
            collector.watch_convolution(name, module)
    with torch.no_grad():
        run.task.evaluate(model)
    return {"record": run.record, "curve": run.curve, **collector.rows()}


class _Collector:
    """Sums of in-degrees by layer and width, and of magnitudes by layer and group of in-degrees, over all batches of an evaluation."""

    def __init__(self) -> None:
        self.degree = np.zeros(0, dtype=np.int64)  # of the graph that the current convolution works on
        self.widths: dict[tuple[str, int], NDArray[np.float64]] = {}  # nodes, sum of in-degrees
        self.magnitudes: dict[tuple[str, int], NDArray[np.float64]] = {}  # nodes, values, their sum, sum of squares

    def watch_input(self, name: str, quantizer: Any) -> None:
        """Notes the widths of the nodes whenever ``quantizer`` quantizes a layer's input."""
        linear = quantizer.linear

        def watched(x: Any, weight: Tensor) -> Tensor:
            self._note_widths(name, quantizer, x)
            return linear(x, weight)

        quantizer.linear = watched

    def watch_convolution(self, name: str, conv: nn.Module) -> None:
        """Notes the magnitudes after the aggregation: the input of the first module in ``conv.nn`` that runs, else the output."""
        waiting = False

        def before(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            nonlocal waiting
            x, edges = inputs[:2]
            self.degree, waiting = Graph.of(edges, x.size(0)).in_degree.cpu().numpy(), True

        def note(values: Tensor) -> None:
            nonlocal waiting
            if waiting:
                self._note_magnitudes(name, values)
            waiting = False

        conv.register_forward_pre_hook(before)
        update = getattr(conv, "nn", None)
        layers = update.named_modules() if isinstance(update, nn.Module) else ()
        for module in (module for name, module in layers if "quantizer" not in name):
            module.register_forward_pre_hook(lambda _, inputs: note(inputs[0]))
        conv.register_forward_hook(lambda _, inputs, out: note(out))

    def _note_widths(self, name: str, quantizer: Any, x: Any) -> None:
        bits = rounded_bits(quantizer.bits)
        if isinstance(quantizer, GroupQuantizer):
            step, signed = quantizer.log_step.exp(), quantizer.kind == "signed"
            bits = bits[ops.fake_quantize_nearest(x, step, quantizer.bits, signed=signed, ste=quantizer.scheme.ste)[1]]
        widths = bits.cpu().numpy()
        if widths.size != self.degree.size:
            return  # a layer behind the pooling, whose rows are graphs
        for width in np.unique(widths):
            mine = self.degree[widths == width]
            _add(self.widths, (name, int(width)), mine.size, mine.sum())

    def _note_magnitudes(self, name: str, values: Tensor) -> None:
        magnitudes = values.abs().double().cpu().numpy()
        low = np.where(self.degree > 0, 2 ** np.log2(np.maximum(self.degree, 1)).astype(np.int64), 0)
        for first in np.unique(low):
            group = magnitudes[low == first]
            _add(self.magnitudes, (name, int(first)), len(group), group.size, group.sum(), np.square(group).sum())

    def rows(self) -> dict[str, Rows]:
        """The sums as ``widths`` and ``aggregated`` of a trace."""
        widths: Rows = [
            {"layer": layer, "bits": bits, "nodes": int(nodes), "in_degree": float(degrees / nodes)}
            for (layer, bits), (nodes, degrees) in sorted(self.widths.items())
        ]
        aggregated: Rows = []
        for (layer, low), (nodes, count, total, squares) in sorted(self.magnitudes.items()):
            mean = total / count
            row = {"layer": layer, "low": low, "high": max(2 * low - 1, 0), "nodes": int(nodes), "mean": float(mean)}
            aggregated.append({**row, "deviation": float(np.sqrt(max(squares / count - mean**2, 0.0)))})
        return {"widths": widths, "aggregated": aggregated}


def _add(sums: dict[tuple[str, int], NDArray[np.float64]], key: tuple[str, int], *values: float) -> None:
    sums[key] = sums.get(key, np.zeros(len(values))) + values


def _finite(value: Any) -> Any:
    """The value with NaN and infinity, which JSON does not have, as null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_whole(path: Path, text: str) -> None:
    """Writes a file that appears whole or not at all. Missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_trace(path: Path, trace: dict[str, Any]) -> None:
    """Writes a trace, usually ``DIR/traces/NAME.json``."""
    write_whole(path, json.dumps(_finite(trace), allow_nan=False))


def read_traces(folder: Path) -> list[dict[str, Any]]:
    """The traces in ``folder``, in the order of their names. A file that is no trace is left out with a warning in the log."""
    traces = []
    for path in sorted(folder.glob("*.json")):
        try:
            trace = json.loads(path.read_bytes())
        except (OSError, ValueError):
            trace = None
        parts = ("curve", "widths", "aggregated")
        if (
            isinstance(trace, dict)
            and isinstance(trace.get("record"), dict)
            and all(isinstance(trace.get(p), list) for p in parts)
        ):
            traces.append(trace)
        else:
            _log.warning("%s is not a trace; it is left out", path)
    return traces
