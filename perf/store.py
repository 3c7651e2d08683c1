"""The feature store against FP32: bytes, memory of building it, gathers, batches per second, accuracy with sampled neighbours.

``python -m qgnn.perf.store bytes|gather|batches|accuracy [--help]``. Ratios are medians of paired runs, store over FP32. A cold file has none of its
pages in the system's cache (``posix_fadvise(DONTNEED)`` before every run).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

FEATURES = 128


def peak(source: str, target: str, bits: int) -> dict[str, int]:
    """Bytes by which the peak of this process exceeds what it held before it built a store from a file: a file, and one in memory above its own
    size."""
    from qgnn import QuantizedFeatureStore

    # what is compiled and imported on first use is not the store's
    QuantizedFeatureStore.build({"x": torch.randn(2, FEATURES)}, target, bits=bits)
    before = held("VmRSS")
    QuantizedFeatureStore.build({"x": source}, target, bits=bits)
    in_file = held("VmHWM") - before
    store = QuantizedFeatureStore(bits=bits)
    store[None, "x", None] = np.load(source, mmap_mode="r")
    return {"file": in_file, "memory": max(held("VmHWM") - before - store.nbytes, 0)}


def held(field: str) -> int:
    """Bytes of this process's memory, mapped files included: ``VmRSS`` now, ``VmHWM`` at most so far. Not ``ru_maxrss``, which begins with the peak
    of the process that started this one."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def matrix(folder: Path, rows: int) -> Path:
    """Normal values ``[rows, 128]``, float32, as a NumPy file."""
    path, generator = folder / "x.npy", np.random.default_rng(0)
    out = np.lib.format.open_memmap(path, "w+", np.float32, (rows, FEATURES))
    for first in range(0, rows, 1 << 16):
        out[first : first + (1 << 16)] = generator.standard_normal((min(1 << 16, rows - first), FEATURES), np.float32)
    out.flush()
    return path


def sizes(folder: Path, rows: int) -> None:
    """Bytes of the files, and peak memory of building them, at 8 and 4 bits."""
    source = matrix(folder, rows)
    for bits in (8, 4):
        command = [sys.executable, "-m", "qgnn.perf.store", "peak", str(source), str(folder / "s"), str(bits)]
        started = time.perf_counter()
        measured = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        share = (folder / "s").stat().st_size / (4 * FEATURES * rows)
        print(
            f"int{bits}: {share:.2%} of FP32; building took {measured['file'] / 1e6:.0f} MB (file) and "
            f"{measured['memory'] / 1e6:.0f} MB above the store (memory), {time.perf_counter() - started:.0f} s for both"
        )


def cool(path: Path) -> None:
    """Drops a file from the system's cache."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def paired(
    ours: Callable[[], object], theirs: Callable[[], object], runs: int, before: Callable[[], object]
) -> tuple[float, float, float]:
    """Median times in ms, and the median ratio of the pairs."""
    times: list[tuple[float, float]] = []
    for _ in range(runs):
        pair = []
        for run in (ours, theirs):
            before()
            started = time.perf_counter()
            run()
            pair.append((time.perf_counter() - started) * 1e3)
        times.append((pair[0], pair[1]))
    first, second = (statistics.median(column) for column in zip(*times, strict=True))
    return first, second, statistics.median(a / b for a, b in times)


def gathers(folder: Path, rows: int, picked: int, runs: int) -> None:
    """Random rows out of the mapped store, as float32, and out of the mapped matrix."""
    source = matrix(folder, rows)
    index = torch.from_numpy(np.random.default_rng(1).integers(0, rows, picked))
    for bits in (8, 4):
        _gather(source, folder / "s", bits, index, runs)


def _gather(source: Path, path: Path, bits: int, index: torch.Tensor, runs: int) -> None:
    """A cold run maps its file anew: pages that are mapped stay in the cache."""
    from qgnn import QuantizedFeatureStore

    QuantizedFeatureStore.build({"x": source}, path, bits=bits)

    def ours() -> object:
        return QuantizedFeatureStore.open(path, verify=False)[None, "x", index]

    def theirs() -> object:
        return torch.from_numpy(np.load(source, mmap_mode="r")[index.numpy()])

    def cool_both() -> None:
        cool(path)
        cool(source)

    warm = _warm(source, path, index, runs)  # whose maps are gone by now
    cold = paired(ours, theirs, max(3, runs // 4), cool_both)
    for name, (a, b, ratio) in (("warm", warm), ("cold", cold)):
        print(f"int{bits}, {name}: {a:.1f} ms, FP32 {b:.1f} ms, ratio {ratio:.2f}", flush=True)


def _warm(source: Path, path: Path, index: torch.Tensor, runs: int) -> tuple[float, float, float]:
    from qgnn import QuantizedFeatureStore

    store, mapped = QuantizedFeatureStore.open(path, verify=False), np.load(source, mmap_mode="r")

    def ours() -> object:
        return store[None, "x", index]

    def theirs() -> object:
        return torch.from_numpy(mapped[index.numpy()])

    ours(), theirs()  # into the cache, and compiled
    return paired(ours, theirs, runs, lambda: None)


def batches(nodes: int, edges: int, runs: int) -> None:
    """Training steps of a GraphSAGE a second: our layers, sampler and store, against PyG's layers on FP32 features with the same sampler (PyG's own
    needs pyg-lib)."""
    import torch_geometric.nn as pyg
    from torch import nn
    from torch_geometric.data import Data
    from torch_geometric.loader import NodeLoader

    from qgnn import QuantizedFeatureStore, data, models
    from qgnn.sampler import NeighborSampler, block

    dataset = data.load(f"powerlaw:{nodes},{edges}")
    assert isinstance(dataset, data.Dataset)
    graph = dataset.data
    edge_index = Data(edge_index=graph.edge_index, num_nodes=nodes)
    store = QuantizedFeatureStore()
    store[None, "x", None], store[None, "y", None] = graph.x, graph.y
    seeds = torch.arange(min(nodes, 8 * 1024))

    def epoch(source: Any, model: nn.Module, ours: bool) -> Callable[[], None]:
        optimizer = torch.optim.Adam(model.parameters())
        loader = NodeLoader(source, NeighborSampler(edge_index, [10, 10]), seeds, batch_size=1024)

        def run() -> None:
            for batch in loader:
                out = model(batch.x, block(batch) if ours else batch.edge_index)[: batch.batch_size]
                optimizer.zero_grad()
                nn.functional.cross_entropy(out, batch.y[: batch.batch_size]).backward()
                optimizer.step()

        return run

    ours = epoch((store, edge_index), models.GraphSAGE(FEATURES, 128, 10, dropout=0.5, input_dropout=0.0), True)
    theirs = epoch(
        Data(x=graph.x, y=graph.y, edge_index=graph.edge_index), pyg.GraphSAGE(FEATURES, 128, 2, 10, dropout=0.5), False
    )
    ours(), theirs()
    a, b, ratio = paired(ours, theirs, runs, lambda: None)
    steps = -(-seeds.numel() // 1024)
    print(f"{1e3 * steps / a:.2f} batches a second, PyG {1e3 * steps / b:.2f}; time ratio {ratio:.2f}")


def accuracy(datasets: list[str], seeds: int, epochs: int | None) -> None:
    """Test accuracy of GraphSAGE with sampled neighbours, FP32 features and the store's: means, mean differences of the seeds and their standard
    error."""
    from dataclasses import replace

    from qgnn import data, quant
    from qgnn.recipes import recipe_for
    from qgnn.train import train

    for name in datasets:
        dataset = data.load(name)
        recipe = replace(recipe_for("sage", quant.parse("fp32"), dataset).changed(epochs), fanout=10, batch=64)
        found: dict[int, list[float]] = {0: [], 8: [], 4: []}
        for seed in range(seeds):
            for bits, scores in found.items():
                run = train(dataset, "sage", "fp32", seed, recipe=replace(recipe, feature_bits=bits))
                scores.append(run.record["test_acc"])
            print(f"{name}, seed {seed}:", *(f"{bits or 'FP32'} {s[-1]:.2f}" for bits, s in found.items()), flush=True)
        for bits, scores in found.items():
            off = [score - exact for score, exact in zip(scores, found[0], strict=True)]
            error = statistics.stdev(off) / seeds**0.5 if seeds > 1 else 0.0
            print(
                f"{name}, {bits or 'FP32'}: {statistics.fmean(scores):.2f}, {statistics.fmean(off):+.2f} ± {error:.2f} points"
            )


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("bytes", "gather"):
        command = commands.add_parser(name)
        command.add_argument("--rows", type=int, default=4_000_000)
        command.add_argument(
            "--folder", default=None, help="where files of 2 GB may lie; by default the temporary folder"
        )
    commands.choices["gather"].add_argument("--picked", type=int, default=100_000)
    commands.choices["gather"].add_argument("--runs", type=int, default=20)
    speed = commands.add_parser("batches")
    speed.add_argument("--nodes", type=int, default=100_000)
    speed.add_argument("--edges", type=int, default=1_500_000)
    speed.add_argument("--runs", type=int, default=10)
    score = commands.add_parser("accuracy")
    score.add_argument("--data", nargs="+", default=["Cora", "digits"])
    score.add_argument("--seeds", type=int, default=10)
    score.add_argument("--epochs", type=int, help="by default the recipe's; fewer shorten its warm-up in proportion")
    inner = commands.add_parser("peak", help="used by bytes, in a process of its own")
    for argument in ("source", "target"):
        inner.add_argument(argument)
    inner.add_argument("bits", type=int)
    given = parser.parse_args()
    if given.command == "peak":
        print(json.dumps(peak(given.source, given.target, given.bits)))
    elif given.command == "batches":
        batches(given.nodes, given.edges, given.runs)
    elif given.command == "accuracy":
        accuracy(given.data, given.seeds, given.epochs)
    else:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            if given.command == "bytes":
                sizes(Path(folder), given.rows)
            else:
                gathers(Path(folder), given.rows, given.picked, given.runs)


if __name__ == "__main__":
    main()
