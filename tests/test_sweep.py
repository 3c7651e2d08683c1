"""Grids of experiments: what a file asks for, that nothing finished is lost or repeated, Ray, searches, and what is shown of the results."""

from __future__ import annotations

import importlib
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import asdict, fields, replace
from itertools import product
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet
import pytest
import torch
from typer.testing import CliRunner, Result

from qgnn import cli, data, environment, quant, results
from qgnn.experiments import cluster, grid, parquet, search, sweep, view, workers
from qgnn.experiments.store import Cell, Pruned
from qgnn.recipes import RECIPES, Recipe
from qgnn.train import TrainingError

GRID = """
datasets = ["digits"]
models = ["gcn", "gin"]
schemes = ["fp32", "dq-int4"]
seeds = 2
recipe = { epochs = 3, warmup = 1, hidden = [4, 8] }
exclude = [{ model = "gin", scheme = "dq-*" }, { model = "gin", hidden = 4 }]
"""
RUNS = 10
"""Trainings of the grid: GCN with 2 schemes, 2 widths and 2 seeds, GIN with one of the schemes and widths."""

SEARCH = """
datasets = ["digits"]
models = ["gcn"]
schemes = ["dq-int4"]
seeds = [100, 101]
recipe = { epochs = 5, warmup = 1, hidden = 4 }

[search]
trials = 8
first = 1
reduction = 2

[search.space]
lr = { low = 1e-4, high = 0.1, log = true }
layers = { low = 1, high = 2 }
warmup_lr = [0.001, 0.01]
"""


def invoke(*command: str, code: int = 0) -> Result:
    result = CliRunner().invoke(cli.app, list(command))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.stderr + result.stdout
    return result


def arguments(folder: Path, *more: str, text: str = GRID) -> list[str]:
    path = folder / "tiny.toml"
    path.write_text(text, encoding="utf-8")
    return ["sweep", str(path), "--out", str(folder / "out"), *more]


def inline(waiting: deque[Cell], jobs: int, setup: workers.Setup, progress: Callable[[float], None]) -> Any:
    """An engine that trains in this process."""
    ended = 0
    while waiting:
        ended += 1
        cell = waiting.popleft()
        yield cell, workers.outcome(cell, setup)
        progress(ended)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "_outcomes", lambda engine: inline)


def attempts(folder: Path) -> list[tuple[str, int, str, int]]:
    rows = parquet.read(folder / "out").to_pylist()
    return sorted((row["scheme"], row["seed"], row["status"], row["attempt"]) for row in rows)


# Grids


def test_a_grid_is_every_combination_but_the_excluded_ones() -> None:
    groups = grid.groups(grid.parse("tiny", GRID))
    assert sum(len(g.cells) for g in groups) == RUNS
    found = {(c.model, c.scheme, c.recipe.hidden) for g in groups for c in g.cells}
    assert found == {("gcn", s, h) for s in ("fp32", "dq-int4") for h in (4, 8)} | {("gin", "fp32", 8)}
    assert all([c.seed for c in g.cells] == [0, 1] and g.larger for g in groups)
    assert all((c.recipe.epochs, c.recipe.warmup) == (3, 1) for g in groups for c in g.cells)


def test_seeds_may_be_named_and_what_comes_to_the_same_is_trained_once() -> None:
    text = GRID.replace("seeds = 2", "seeds = [101, 100, 101]").replace("[4, 8]", '[8, "8"]').partition("exclude")[0]
    groups = grid.groups(grid.parse("tiny", text))
    assert [[c.seed for c in g.cells] for g in groups] == [[101, 100]] * 4


def test_every_fold_of_a_data_set_that_has_some(monkeypatch: pytest.MonkeyPatch) -> None:
    none = torch.empty(0, dtype=torch.int64)
    folded = data.GraphDataset("MUTAG", (), 7, 2, "tu", "graph", (data.Split(none, none, none),) * 10)
    monkeypatch.setattr(grid, "load", lambda name, root: folded if name == "MUTAG" else data.load(name, root))
    text = 'datasets = ["MUTAG", "digits"]\nmodels = ["gin"]\nschemes = ["fp32"]\nseeds = 2\n'
    every, some = (grid.groups(grid.parse("tiny", text + more)) for more in ("", "folds = 3"))
    assert [[(c.seed, c.fold) for c in g.cells] for g in every] == [
        [(s, f) for s in (0, 1) for f in range(10)],
        [(0, 0), (1, 0)],
    ]
    assert [len(g.cells) for g in some] == [6, 2]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("datasets", "dataset", "grid tiny has unknown fields dataset"),
        ('["digits"]', '"digits"', "datasets is a list of names"),
        ('"gcn", "gin"', "", "models is a list of names"),
        ("seeds = 2", "seeds = 0", "seeds is a number from 1"),
        ("seeds = 2", "seeds = []", "seeds is a number from 1"),
        ("seeds = 2", "seeds = [true]", "seeds is a number from 1"),
        ("seeds = 2", "folds = true", "folds is a number from 1"),
        ("hidden = [4, 8]", "hidden = []", "hidden under recipe is a number"),
        ("hidden = [4, 8]", "hiden = 4", "an [[exclude]] has some of the fields dataset, epochs, hiden, model, scheme, warmup"),
        ("recipe = {", "recipe = 4 # {", "recipe is one table, [recipe]"),
        ("exclude = [", 'exclude = { model = "gin" } # [', "exclude is a list of tables, each under [[exclude]]"),
        ('"dq-*"', '"a2q*"', "nothing matches the exclusion {'model': ('gin',), 'scheme': ('a2q*',)}"),
        ("hidden = 4 }]", 'hidden = 4 }, { dataset = "*" }]', "the exclusions leave nothing to train"),
        ('"fp32"', '"fp31"', "grid tiny, digits gcn fp31 3 1 4: there is no scheme 'fp31'"),
        ('"digits"', '"digit"', "there is no data set 'digit'"),
        ("hidden = [4, 8]", "hidden = [4, 8], lr = -1", "lr must be at least 0"),
        ("seeds = 2", "seeds = 2 2", "grid tiny is no TOML"),
        ("seeds = 2", "search = { trials = 2 }", "[search] needs first, a number from 1"),
        ("seeds = 2", "search = { trials = 2, first = 2 }", "[search] needs [search.space]"),
        ("seeds = 2", "search = { tries = 2 }", "[search] is a table with trials, first, space"),
        ("seeds = 2", "search = { trials = 2, first = 2, space = { lr = { low = 0, high = 1, log = true } } }", "lr under [search.space]"),
    ],
)  # fmt: skip
def test_a_grid_that_is_none_says_where(old: str, new: str, says: str, tmp_path: Path) -> None:
    assert old in GRID
    result = invoke(*arguments(tmp_path, text=GRID.replace(old, new, 1)), code=2)
    assert says in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    result = invoke("sweep", str(tmp_path / "none.toml"), code=2)
    assert result.stderr.startswith("qgnn: the grid ") and result.stderr.count("\n") == 1


# From beginning to end


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The grid, trained in one go."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "_outcomes", lambda engine: inline)
        result = invoke(*arguments(folder))
    assert result.stdout == view.markdown(view.means(view.runs(folder / "out")))
    return folder


def table(folder: Path) -> pd.DataFrame:
    return view.means(view.runs(folder / "out"))


def test_every_run_is_a_row_with_all_that_it_depends_on(undisturbed: Path) -> None:
    (file,) = (undisturbed / "out/runs").iterdir()
    assert pyarrow.parquet.read_schema(file).equals(parquet.SCHEMA)
    assert not list((undisturbed / "out/checkpoints").iterdir())
    rows = pyarrow.parquet.read_table(file).to_pylist()
    assert len(rows) == RUNS
    for row in rows:
        record = json.loads(row["record"])
        assert (row["status"], row["attempt"], row["reason"], row["trial"]) == ("done", 1, None, None)
        assert {name: row[name] for name in parquet.SETTINGS} == record["recipe"]
        for name in ("dataset", "model", "scheme", "seed", "fold", "task", "metric", *results.MEASURES):
            assert row[name] == record[name], name
        assert json.loads(row["scheme_fields"]) == json.loads(json.dumps(asdict(quant.parse(row["scheme"]))))
        assert (row["method"], row["bits"]) == (("fp32", 32) if row["scheme"] == "fp32" else ("dq", 4))
        assert json.loads(row["environment"])["versions"] == environment.machine()["versions"]


def test_columns_are_unlike_each_other_and_hold_recipes_exactly() -> None:
    assert len(set(parquet.SCHEMA.names)) == len(parquet.SCHEMA.names)
    kinds = {f.name: str(f.type) for f in fields(Recipe)}
    for recipe in RECIPES.values():
        found = {name: type(value).__name__ for name, value in asdict(recipe).items()}
        assert found == kinds, "an int where the column is of floats would come back as another recipe"


def test_results_are_not_repeated_and_not_mixed_up(undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted((undisturbed / "out/runs").iterdir())
    refused = invoke(*arguments(undisturbed), code=2)
    assert f"holds {RUNS} results; add --resume to go on there, or choose another --out" in refused.stderr

    def nothing(waiting: deque[Cell], *_: Any) -> Generator[Any]:
        assert not waiting
        yield from ()

    monkeypatch.setattr(sweep, "_outcomes", lambda engine: nothing)
    resumed = invoke(*arguments(undisturbed, "--resume", "--json", "-"))
    rows = [json.loads(line) for line in resumed.stdout.splitlines()]
    assert [(r["model"], r["scheme"], r["hidden"], r["runs"]) for r in rows] == [
        *(("gcn", s, h, 2) for s in ("dq-int4", "fp32") for h in (4, 8)),
        ("gin", "fp32", 8, 2),
    ]
    assert sorted((undisturbed / "out/runs").iterdir()) == before


def test_a_grid_that_grows_trains_what_is_new(tmp_path: Path, in_this_process: None) -> None:
    small = GRID.replace("seeds = 2", "seeds = 1").replace('"gcn", "gin"', '"gcn"').partition("exclude")[0]
    invoke(*arguments(tmp_path, text=small.replace("[4, 8]", "4").replace(', "dq-int4"', "")))
    shown: list[tuple[float, int]] = []
    ledger = parquet.Ledger(parquet.ParquetFolder(tmp_path / "out"))
    whole = sweep.Whole(grid.groups(grid.parse("tiny", small)), ledger)
    sweep.train(whole, ledger, progress=lambda done, total: shown.append((done, total)))
    assert shown == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [a[2:] for a in attempts(tmp_path)] == [("done", 1)] * 4


# What goes wrong


def test_a_killed_training_is_recorded_and_tried_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process is killed at once; the one in its place does everything, the lost training last."""
    killed: list[int | None] = []
    start = workers._start

    def start_and_kill(*given: Any) -> None:
        start(*given)
        if not killed:
            (process,) = active_children()
            killed.append(process.pid)
            process.kill()

    monkeypatch.setattr(workers, "_start", start_and_kill)
    text = GRID.replace('"gcn", "gin"', '"gcn"').replace("[4, 8]", "4").replace("seeds = 2", "seeds = 1")
    invoke(*arguments(tmp_path, text=text.partition("exclude")[0]))
    assert attempts(tmp_path) == [("dq-int4", 0, "done", 1), ("fp32", 0, "done", 2), ("fp32", 0, "killed", 1)]
    (reason,) = {row["reason"] for row in parquet.read(tmp_path / "out").to_pylist()} - {None}
    assert reason.startswith("its process ended with signal SIGKILL")
    assert list(table(tmp_path)["runs"]) == [1, 1], "the attempt that failed does not show"
    assert not active_children()


def test_what_fails_twice_is_given_up_until_the_next_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails = {("fp32", 1): "killed", ("dq-int4", 0): "diverged", ("dq-int4", 1): "failed"}

    def broken(waiting: deque[Cell], jobs: int, setup: workers.Setup, progress: Any) -> Any:
        for cell, outcome in inline(waiting, jobs, setup, progress):
            status: Any = fails.get((cell.scheme, cell.seed))
            yield cell, outcome if status is None else workers.Failure(status, f"it {status}")

    monkeypatch.setattr(sweep, "_outcomes", lambda engine: broken)
    text = GRID.replace('"gcn", "gin"', '"gcn"').replace("[4, 8]", "4").partition("exclude")[0]
    result = invoke(*arguments(tmp_path, text=text), code=1)
    first = [("dq-int4", 0, "diverged", 1), ("dq-int4", 1, "failed", 1), ("fp32", 0, "done", 1)]
    first += [("fp32", 1, "killed", 1), ("fp32", 1, "killed", 2)]
    assert attempts(tmp_path) == first
    assert "\nno result: digits gcn fp32, seed 1, fold 0: killed: it killed\n" in result.stdout
    fails.clear()
    invoke(*arguments(tmp_path, "--resume", text=text), code=1)
    assert attempts(tmp_path) == sorted([*first, ("dq-int4", 1, "done", 2), ("fp32", 1, "done", 3)])
    assert dict(zip(table(tmp_path)["scheme"], table(tmp_path)["not_done"], strict=True)) == {"dq-int4": 1, "fp32": 0}
    changed = invoke(*arguments(tmp_path, "--resume", text=text.replace(', "dq-int4"', "")))
    assert "no result" not in changed.stdout, "the grid no longer asks for what diverged"
    assert changed.stdout == view.markdown(table(tmp_path)), "the table is of the whole folder"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (TrainingError("the loss is nan"), "diverged"),
        (Pruned("after 3 epochs"), "pruned"),
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), "out of memory"),
        (ValueError("no such fold"), "failed"),
        (KeyError("x"), "failed"),
        (torch.AcceleratorError("an illegal memory access was encountered"), "crashed"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"), "crashed"),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), "crashed"),
    ],
)
def test_what_ends_a_training_has_a_name(
    error: Exception, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: Any) -> None:
        raise error

    monkeypatch.setattr(workers, "run", run)
    setup = workers.Setup(parquet.ParquetFolder(tmp_path), None, "cpu", torch.get_num_threads())
    found = workers.outcome(Cell("digits", "gcn", "fp32", RECIPES["gcn", "fp32", "digits"], 0), setup)
    assert isinstance(found, workers.Failure) and found.status == status and found.reason


BROKEN_GPU = """
import os
from dataclasses import dataclass
from pathlib import Path

@dataclass(frozen=True)
class Trial:
    marks: Path
    number = 0

    def watch(self, curve):
        (self.marks / str(os.getpid())).touch()
        if len(list(self.marks.iterdir())) == 1:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\\nwith more lines")
"""
"""A trial that fails in every training of the first process that has one."""


def test_a_gpu_error_ends_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    (tmp_path / "broken_gpu.py").write_text(BROKEN_GPU, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)  # which processes that are spawned take over
    trial = importlib.import_module("broken_gpu").Trial(marks)
    text = (
        GRID.replace('"gcn", "gin"', '"gcn"').replace("[4, 8]", "4").replace(', "dq-int4"', "").partition("exclude")[0]
    )
    ledger = parquet.Ledger(parquet.ParquetFolder(tmp_path / "out"))
    whole = sweep.Whole(grid.groups(grid.parse("tiny", text)), ledger)
    whole._missing = [replace(cell, trial=trial) for cell in whole._missing]
    sweep.train(whole, ledger)
    assert attempts(tmp_path) == [("fp32", 0, "crashed", 1), ("fp32", 0, "done", 2), ("fp32", 1, "done", 1)]
    (reason,) = {row["reason"] for row in parquet.read(tmp_path / "out").to_pylist()} - {None}
    assert reason == "CUDA error: an illegal memory access was encountered"
    assert len(list(marks.iterdir())) == 2 and not active_children()


def test_no_kill_loses_or_repeats_a_training(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command, with processes of its own, is killed after its first results; what goes on trains in this one."""
    command = [sys.executable, "-c", "from qgnn.cli import main; main()", *arguments(tmp_path, "--resume")]
    runs, moments = tmp_path / "out/runs", random.Random(0)
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 100
        while not list(runs.glob("*.parquet")) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.wait(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    kept = parquet.read(tmp_path / "out").to_pylist()
    assert 1 <= len(kept) < RUNS and len(list(runs.glob("*.parquet"))) == len(kept)
    (runs / "half.tmp").write_bytes(b"PAR1")
    monkeypatch.setattr(sweep, "_outcomes", lambda engine: inline)
    invoke(*arguments(tmp_path, "--resume"))
    found = parquet.read(tmp_path / "out").to_pylist()
    assert all(row in found for row in kept), "times of a step and all"
    pd.testing.assert_frame_equal(table(tmp_path), table(undisturbed), check_exact=True)
    assert set(view.runs(tmp_path / "out")["attempt"]) == {1}


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> Generator[Any]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(sweep, "_outcomes", lambda engine: interrupted)
    command = arguments(tmp_path)
    result = invoke(*command, code=130)
    assert result.stderr == f"qgnn: interrupted; the same command with --resume goes on, in {tmp_path / 'out'}\n"
    again = invoke(*command, "--resume", code=130)
    assert "; the same command goes on, in " in again.stderr


def test_rows_that_a_crash_left_twice_count_once(undisturbed: Path, tmp_path: Path) -> None:
    folder = parquet.ParquetFolder(tmp_path / "out")
    for name in ("one", "two"):
        folder._write(name, parquet.read(undisturbed / "out"), {})
    pd.testing.assert_frame_equal(table(tmp_path), table(undisturbed), check_exact=True)
    (folder.out / "runs/.half.parquet.tmp").write_bytes(b"PAR1")
    assert len(pd.read_parquet(folder.out / "runs")) == 2 * RUNS, "other readers skip what is half-written"
    folder.merge()
    assert len(list((tmp_path / "out/runs").iterdir())) == 1
    assert parquet.read(folder.out).num_rows == RUNS
    pd.testing.assert_frame_equal(table(tmp_path), table(undisturbed), check_exact=True)


def test_rows_from_before_a_setting_existed_are_found(undisturbed: Path, tmp_path: Path) -> None:
    folder = parquet.ParquetFolder(tmp_path / "out")
    folder._write("older", parquet.read(undisturbed / "out").drop_columns(["layers", "skip"]), {})
    pd.testing.assert_frame_equal(table(tmp_path), table(undisturbed), check_exact=True)
    whole = sweep.Whole(grid.groups(grid.parse("tiny", GRID)), parquet.Ledger(folder))
    assert (whole.settled, whole.total, whole.start(1)) == (RUNS, RUNS, [])


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = parquet.ParquetFolder(tmp_path)

    def full(table: Any, file: Any, **_: Any) -> None:
        file.write(b"PAR1")
        raise OSError("No space left on device")

    monkeypatch.setattr(pyarrow.parquet, "write_table", full)
    with pytest.raises(OSError, match="No space"):
        folder._write("x", parquet.SCHEMA.empty_table(), {})
    assert not list((tmp_path / "runs").iterdir())


def test_rows_that_are_merged_while_they_are_read_are_found(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, files = parquet.ParquetFolder(tmp_path / "out"), parquet._files
    for name in ("one", "two"):
        folder._write(name, parquet.read(undisturbed / "out"), {})

    def then_merged(out: Path) -> list[Path]:
        found = files(out)
        monkeypatch.setattr(parquet, "_files", files)
        folder.merge()
        return found

    monkeypatch.setattr(parquet, "_files", then_merged)
    assert parquet.read(tmp_path / "out").num_rows == RUNS


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    folder = parquet.ParquetFolder(tmp_path / "out")
    (folder.out / "runs/x.parquet").write_bytes(b"PAR1")
    result = invoke("results", str(folder.out), code=2)
    assert "x.parquet" in result.stderr and "delete the file" in result.stderr


@pytest.mark.parametrize(
    ("absent", "more", "text", "says"),
    [
        ("pyarrow", [], GRID, "parameter sweeps need pyarrow: pip install pyarrow"),
        ("ray", ["--engine", "ray"], GRID, "parameter sweeps need ray: pip install ray"),
        ("optuna", [], SEARCH, "parameter sweeps need optuna: pip install optuna"),
    ],
)
def test_what_is_not_installed_is_one_line(
    absent: str, more: list[str], text: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = environment.importlib.util.find_spec
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None if name == absent else there(name))
    assert invoke(*arguments(tmp_path, *more, text=text), code=2).stderr == f"qgnn: {says}\n"


# Ray


def test_ray_trains_the_same_and_a_crash_is_tried_once_more(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray is started for real. One of its processes kills itself."""

    def fatal_once(cell: Cell, setup: workers.Setup) -> workers.Outcome:
        import os

        from qgnn.experiments.workers import outcome

        mark = setup.store.out / "died"
        if cell.scheme == "dq-int4" and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), 9)
        return outcome(cell, setup)

    fatal_once.__module__ = "__main__"  # so that it is sent whole, not by name
    monkeypatch.setattr(cluster, "outcome", fatal_once)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    part = (
        GRID.replace("seeds = 2", "seeds = 1")
        .replace('"gcn", "gin"', '"gcn"')
        .replace("[4, 8]", "8")
        .partition("exclude")[0]
    )
    invoke(*arguments(tmp_path, "--engine", "ray", text=part))
    rows, whole = (view.runs(folder / "out") for folder in (tmp_path, undisturbed))
    names = [*view.RUN, *view.MEANS]
    whole = whole[(whole["model"] == "gcn") & (whole["hidden"] == 8) & (whole["seed"] == 0)]
    pd.testing.assert_frame_equal(rows[names], whole[names].reset_index(drop=True), check_exact=True)
    (crash,) = (row for row in parquet.read(tmp_path / "out").to_pylist() if row["status"] != "done")
    assert (crash["status"], crash["attempt"], crash["scheme"]) == ("crashed", 1, "dq-int4")
    assert "WorkerCrashedError" in crash["reason"]


def test_a_cluster_that_does_not_answer_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something listens at the address, and says nothing: Ray alone would try for two minutes, and then end the process."""
    monkeypatch.setattr(cluster, "ANSWERS", 3.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        start = time.monotonic()
        result = invoke(*arguments(tmp_path, "--engine", "ray"), code=2)
    assert time.monotonic() - start < 30
    assert result.stderr == (
        f"qgnn: Ray cannot be reached at RAY_ADDRESS={address} (nothing answered within 3 seconds); start it there, or unset RAY_ADDRESS to "
        "have it started here\n"
    )
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    monkeypatch.setattr(cluster, "ANSWERS", 60.0)
    assert (
        "Ray cannot be reached at RAY_ADDRESS=nonsense ("
        in invoke(*arguments(tmp_path, "--engine", "ray"), code=2).stderr
    )


# Searches


def trials(folder: Path) -> list[tuple[Any, ...]]:
    """Number, state, value and parameters of all trials, from the SQLite file."""
    import optuna

    ((name, *_),) = [(s.study_name,) for s in optuna.get_all_study_summaries(f"sqlite:///{folder / 'out/search.db'}")]
    study = optuna.load_study(study_name=name, storage=f"sqlite:///{folder / 'out/search.db'}")
    return [(t.number, t.state.name, t.value, t.params, t.intermediate_values) for t in study.trials]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("searched")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "_outcomes", lambda engine: inline)
        result = invoke(*arguments(folder, text=SEARCH))
    (best,) = [line for line in result.stdout.splitlines() if "best validation metric" in line]
    done = [trial for trial in trials(folder) if trial[1] == "COMPLETE"]
    value, params = max((value, params) for _, _, value, params, _ in done)
    assert f"{value:.6g} with " in best and all(f"{name} = {v}" in best for name, v in params.items())
    return folder


def test_a_search_prunes_and_finds(searched: Path) -> None:
    found = trials(searched)
    rows = view.runs(searched / "out")
    assert [t[0] for t in found] == list(range(8)) and {t[1] for t in found} == {"COMPLETE", "PRUNED"}
    for number, state, value, params, seen in found:
        own = rows[rows["trial"] == number]
        assert all((own[name] == v).all() for name, v in params.items())
        if state == "PRUNED":
            assert list(own["status"]) == ["pruned"] and list(own["seed"]) == [100], "the other seed is spared"
            assert value == seen[max(seen)] and set(seen) <= {1, 2, 4}
        else:
            assert list(own["status"]) == ["done", "done"] and sorted(own["seed"]) == [100, 101]
            assert value == pytest.approx(own["val_acc"].mean(), rel=1e-12)
            assert set(seen) == {1, 2, 4}, "the rungs of 5 epochs"
    assert all(1e-4 <= p["lr"] <= 0.1 and p["layers"] in (1, 2) for _, _, _, p, _ in found)
    ledger = parquet.Ledger(parquet.ParquetFolder(searched / "out"))
    asked = grid.parse("tiny", SEARCH)
    pd.testing.assert_frame_equal(view.among(rows, sweep.plan(asked, grid.groups(asked), ledger).keys()), rows)


def test_an_interrupted_search_goes_on_as_if_nothing_had_been(
    searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is interrupted between an end and its record, between a record and the end of its trial, and while a trial is proposed."""

    def resumed(owner: Any, name: str, times: int) -> None:
        original, calls = getattr(owner, name), [0]

        def interrupting(*given: Any, **named: Any) -> Any:
            calls[0] += 1
            if calls[0] == times:
                raise KeyboardInterrupt
            return original(*given, **named)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, interrupting)
            invoke(*arguments(tmp_path, "--resume", text=SEARCH), code=130)

    monkeypatch.setattr(sweep, "_outcomes", lambda engine: inline)
    resumed(parquet.Ledger, "note", 2)
    resumed(search.Searcher, "_end", 2)
    resumed(search.Interval, "suggest", 4)
    invoke(*arguments(tmp_path, "--resume", text=SEARCH))
    assert trials(tmp_path) == trials(searched)
    pd.testing.assert_frame_equal(table(tmp_path), table(searched), check_exact=True)
    invoke(*arguments(tmp_path, "--resume", text=SEARCH.replace("trials = 8", "trials = 9")))
    assert [t[:4] for t in trials(tmp_path)[:8]] == [t[:4] for t in trials(searched)] and len(trials(tmp_path)) == 9


def test_trials_with_the_same_settings_are_one_training(tmp_path: Path, in_this_process: None) -> None:
    """Of processes side by side, both would write the same checkpoint."""
    text = SEARCH.partition("lr = {")[0].replace("trials = 8", "trials = 5") + "hidden = [4, 6]\n"
    invoke(*arguments(tmp_path, "--jobs", "4", text=text))
    assert [t[0] for t in trials(tmp_path)] == list(range(5)) and {t[1] for t in trials(tmp_path)} <= {
        "COMPLETE",
        "PRUNED",
    }
    rows = parquet.read(tmp_path / "out").to_pylist()
    assert len({(row["hidden"], row["seed"]) for row in rows}) == len(rows) and {row["attempt"] for row in rows} == {1}


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("lr = {", "rate = {", "a recipe has no setting 'rate'"),
        ("first = 1", 'first = 1\nstorage = "nosuch://x"', "the storage of the search cannot be opened"),
    ],
)
def test_a_search_that_cannot_be_is_one_line(old: str, new: str, says: str, tmp_path: Path) -> None:
    result = invoke(*arguments(tmp_path, text=SEARCH.replace(old, new, 1)), code=2)
    assert says in result.stderr and result.stderr.count("\n") == 1


# Results


def frame() -> pd.DataFrame:
    names = ["dataset", "model", "scheme", "seed", "test_acc", "status", "trial", "metric"]
    axes = product(("Cora", "MUTAG"), ("a2q", "fp32"), (0, 1))
    rows = [(d, "gcn", s, n, n + 10.0 * len(s), "done", math.nan, "accuracy") for d, s, n in axes]
    return pd.DataFrame(rows, columns=names)


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ("dataset == 'Cora'", lambda r: r.dataset == "Cora"),
        ("test_acc <= 31 and not seed != 1", lambda r: r.test_acc <= 31 and r.seed == 1),
        ("(seed < 1 or test_acc > 40) and scheme in ['a2q', 'x']", lambda r: r.scheme == "a2q" and r.seed < 1),
        ("scheme not in ('fp32',) or dataset != 'MUTAG'", lambda r: r.scheme != "fp32" or r.dataset != "MUTAG"),
        ("test_acc >= -1e3", lambda r: True),
    ],
)
def test_conditions(condition: str, holds: Callable[[Any], bool]) -> None:
    whole = frame()
    assert list(view.where(whole, condition).index) == [i for i, r in enumerate(whole.itertuples()) if holds(r)]


@pytest.mark.parametrize(
    "condition",
    [
        "__import__('os').system('true')",
        "seed == __import__('os').system('true')",
        "seed.__class__ == 1",
        "@frame == 1",
        "seed == (lambda: 1)()",
        "[x for x in (1,)] == 1",
        "seed == f'{seed}'",
        "seed == test_acc",
        "1 == 1",
        "seed",
        "seed < 'x'",
        "seed in 'x'",
        "seed == [0, 1]",
        "0 < seed < 2",
        "",
        "seed ==",
        "not " * 20_000 + "seed == 1",
        "(" * 20_000,
    ],
)
def test_a_condition_runs_no_code(condition: str) -> None:
    with pytest.raises(ValueError, match="is no condition"):
        view.where(frame(), condition)


def test_a_condition_on_nothing_says_so() -> None:
    with pytest.raises(ValueError, match="there is no column 'sed'; there are dataset, model"):
        view.where(frame(), "sed == 1")
    with pytest.raises(ValueError, match="no run matches"):
        view.where(frame(), "seed == 7")


def test_a_pivot_is_the_mean() -> None:
    found = view.pivot(frame(), "scheme,dataset+model,test_acc")
    assert found.to_dict("list") == {"scheme": ["a2q", "fp32"], "Cora gcn": [30.5, 40.5], "MUTAG gcn": [30.5, 40.5]}


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ("scheme,test_acc", "takes ROWS,COLUMNS,VALUE"),
        ("scheme,dataset,scheme", "averages numbers, and scheme is none"),
        ("scheme,scheme,test_acc", "names scheme more than once"),
        ("scheme,datasets,test_acc", "there is no column 'datasets'"),
    ],
)
def test_a_pivot_that_is_none_says_so(shape: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        view.pivot(frame(), shape)


def test_what_is_exported_is_what_was_asked_for(undisturbed: Path, tmp_path: Path) -> None:
    out, condition = str(undisturbed / "out"), "scheme == 'dq-int4' and hidden > 4"
    readers = {"csv": pd.read_csv, "parquet": pd.read_parquet, "json": pd.read_json}
    for suffix, read in readers.items():
        path = tmp_path / f"x.{suffix}"
        invoke("results", out, "--where", condition, "--export", str(path))
        found = read(path)
        assert list(found.columns) == parquet.SCHEMA.names
        assert list(found["seed"]) == [0, 1] and set(found["hidden"]) == {8}
        assert list(found["test_acc"]) == [r["test_acc"] for r in map(json.loads, found["record"])]
    path = tmp_path / "x.md"
    result = invoke("results", out, "--pivot", "scheme,model+hidden,test_acc", "--export", str(path), "--json", "-")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [list(row) for row in rows] == [["scheme", "gcn 4", "gcn 8", "gin 8"]] * 2
    assert path.read_text(encoding="utf-8").startswith("| scheme  |   gcn 4 |   gcn 8 |   gin 8 |\n")
    assert rows[0]["gin 8"] is None, "no such run"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--export", "x.xlsx"], "has to end with .csv, .parquet, .json or .md"),
        (["--export", "no/such/x.csv"], "the folder does not exist"),
        (["--where", "sed == 1"], "there is no column 'sed'"),
        (["--pivot", "scheme"], "--pivot takes"),
    ],
)
def test_bad_input_is_one_line(more: list[str], says: str, undisturbed: Path) -> None:
    result = invoke("results", str(undisturbed / "out"), *more, code=2)
    assert says in result.stderr and result.stderr.count("\n") == 1


def test_a_folder_without_results_is_one_line(tmp_path: Path) -> None:
    assert "holds no results; qgnn sweep FILE --out" in invoke("results", str(tmp_path), code=2).stderr


def test_means_tell_settings_apart() -> None:
    ours = frame().assign(val_acc=1.0, test_acc_best_over_epochs=1.0, average_bits=4.0, compression=8.0)
    ours = ours.assign(**asdict(replace(RECIPES["gcn", "fp32", "digits"], lr=0.5)))
    ours.loc[ours["scheme"] == "fp32", "lr"] = 0.25
    assert "lr" not in view.means(ours).columns, "it is one for each scheme"
    ours.loc[ours["seed"] == 1, "lr"] = 0.125
    ours.loc[0, "status"] = "killed"
    found = view.means(ours)
    assert list(found["lr"]) == [0.5, 0.125, 0.25, 0.125] * 2
    assert list(found["runs"]) == [0] + [1] * 7 and list(found["not_done"]) == [1] + [0] * 7
