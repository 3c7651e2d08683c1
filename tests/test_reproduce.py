"""Tables of the papers, the engine that runs them, and that no crash repeats or loses a finished training."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch_geometric.data import Data
from typer.testing import CliRunner, Result

from qgnn import cli, data, quant, results, train
from qgnn.experiments import compare, reproduce, store, table, workers
from qgnn.recipes import RECIPES

COUNTS = {
    **{"a2q-1": 18, "a2q-2": 18, "a2q-3": 7, "a2q-8": 6, "a2q-9": 8, "a2q-10": 8, "a2q-11": 7, "a2q-12": 6},
    **{"a2q-13": 10, "a2q-14": 16, "a2q-15": 6, "a2q-16": 18, "dq-1": 72, "dq-2": 120, "dq-3": 8, "dq-9": 27, "tu": 12},
    **{"qt-ram": 30, "qt-density": 15, "qt-accuracy": 63},
}
PRINTED = [
    ("a2q-1", "gcn-cora-a2q", (80.9, 0.6), 1.70, 18.6),
    ("a2q-1", "gat-pubmed-dq", (70.6, 12.5), 4, 8),
    ("a2q-2", "gcn-zinc-a2q", (0.492, 0.056), 3.68, 8.68),
    ("a2q-2", "gat-cifar10-a2q", (64.7, 2.8), 3.73, 8.57),
    ("a2q-3", "gin-cora-no-lr-s", (56.1, 4.9), 3.85, None),
    ("a2q-8", "gin-arxiv-a2q", (65.2, 0.4), 3.82, 8.4),
    ("a2q-9", "gcn-collab-a2q", (44.9, 1.5), 2.5, 12.7),
    ("a2q-10", "sage-cora-lpgnas", (74.3, 0.1), 12, 1),
    ("a2q-11", "gin-reddit-binary-m800", (92.0, 2.2), 4, None),
    ("a2q-12", "gin-zinc-a2q", (0.380, 0.022), 4, 8),
    ("a2q-13", "gin-cora-3-a2q", (54.5, 12.6), 3.3, None),
    ("a2q-14", "gcn-cora-6-skip-a2q", (80.4, 0.7), 2.98, None),
    ("a2q-15", "gin-cora-max-a2q", (78.6, 0.5), 1.97, 16.2),
    ("a2q-16", "gat-citeseer-bi", (20.6, 2.6), 1, 32),
    ("dq-1", "gcn-cora-int4-ste-momentum", (49.4, 8.8), 4, None),
    ("dq-1", "gin-zinc-int4-clip-minmax", (1.669, 0.10), 4, None),
    ("dq-2", "gat-cifar10-dq8", (67.7, 0.5), 8, None),
    ("dq-2", "gin-citeseer-nqat4", (34.6, 3.8), 4, None),
    ("dq-3", "gin-reddit-binary-dq4", (81.3, 4.4), 4, None),
    ("dq-9", "gin-zinc-nqat4-percentile", (0.771, 0.058), 4, None),
]
FAMILIES = {
    **dict.fromkeys(("Cora", "CiteSeer", "PubMed"), ("citation", "node")),
    **dict.fromkeys(("ogbn-arxiv", "ogbn-mag"), ("ogb", "node")),
    "ogbl-collab": ("ogb", "link"),
    **dict.fromkeys(("Reddit", "Flickr"), ("inductive", "node")),
    **dict.fromkeys(("MNIST", "CIFAR10"), ("superpixels", "graph")),
    "ZINC": ("molecules", "graph-regression"),
    **dict.fromkeys(("REDDIT-BINARY", "IMDB-BINARY", "PROTEINS", "MUTAG"), ("tu", "graph")),
}
ROWS = [(name, row) for name in COUNTS for row in table.load(name).rows]

SMALL = "recipe = { epochs = 6, warmup = 4, hidden = 8 }"
TINY = f"""
title = "Tiny"
source = "nobody"
rows = [
  {{ id = "fp32", dataset = "digits", model = "gcn", scheme = "fp32", printed = [90, 1.5], bits = 32, compression = 1, {SMALL} }},
  {{ id = "dq", dataset = "digits", model = "gcn", scheme = "dq-int4", printed = [80.0, 2.0], bits = 4, {SMALL} }},
  {{ id = "a2q", dataset = "digits", model = "gcn", scheme = "a2q", {SMALL} }},
  {{ id = "again", dataset = "digits", model = "gcn", scheme = "fp32", {SMALL} }},
  {{ id = "search", dataset = "digits", model = "gcn", printed = [70.0, 1.0], note = "a search" }},
  {{ id = "pubmed", dataset = "PubMed", model = "gcn", scheme = "a2q", printed = [78.8, 0.4], bits = 2.12 }},
]
"""
RUNS = 6
"""Trainings of the tiny table at two seeds: the rows "fp32" and "again" share theirs."""


# Tables


@pytest.mark.parametrize("name", COUNTS)
def test_every_table_is_complete(name: str) -> None:
    found = table.load(name)
    assert len(found.rows) == COUNTS[name]
    assert found.title and found.source
    accuracies = name.startswith(("a2q", "dq"))
    assert not accuracies or all(row.printed and row.bits for row in found.rows)


def test_these_are_all_tables() -> None:
    assert set(table.NAMES) == set(COUNTS)
    folder = Path(table.__file__).parent / "tables"
    assert {path.name for path in folder.iterdir()} == {f"{name}.toml" for name in COUNTS}


@pytest.mark.parametrize(("name", "row", "printed", "bits", "compression"), PRINTED)
def test_printed_numbers(
    name: str, row: str, printed: tuple[float, float], bits: float, compression: float | None
) -> None:
    (found,) = table.load(name).select([row])
    assert (found.printed, found.bits, found.compression) == (printed, bits, compression)


@pytest.mark.parametrize(("name", "row"), [pytest.param(n, r, id=f"{n}-{r.id}") for n, r in ROWS if r.scheme])
def test_every_row_can_be_resolved(name: str, row: table.Row) -> None:
    """Against stand-ins of the data sets: the scheme, the model and every setting exist, and the scheme suits the kind of data set."""
    assert row.dataset in data.NAMES
    family, task = FAMILIES[row.dataset]
    folds = 10 if family == "tu" else 1
    if task.startswith("graph"):
        none = torch.empty(0, dtype=torch.int64)
        splits = (data.Split(none, none, none),) * folds
        dataset = data.GraphDataset(row.dataset, (), 1, 2, family, task, splits)
    else:
        dataset = data.Dataset(row.dataset, Data(), 2, family, task)
    cells = reproduce.cells(row, dataset, seeds=2)
    assert len({cell.key for cell in cells}) == len(cells) == 2 * folds
    assert all(getattr(cells[0].recipe, name) == value for name, value in row.recipe.items())
    scheme = quant.parse(cells[0].scheme)
    sampled = row.model == "sage" and family == "inductive"
    if scheme.method == "a2q":
        assert bool(scheme.groups) == (task.startswith("graph") or sampled), "groups are for nodes not seen in training"
    regression = task == "graph-regression"
    assert row.metric == ("mae" if regression else "hits@50" if task == "link" else "accuracy")


ENTRY = 'id = "x", dataset = "digits", model = "gcn"'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rows = [", "is no TOML"),
        ("title = 'x'", "has no rows"),
        (f"columns = 3\nrows = [{{ {ENTRY}, scheme = 'fp32' }}]", "unknown fields columns"),
        ("rows = [{ id = 'x', dataset = 'digits', scheme = 'fp32' }]", "row x: model missing"),
        (f"rows = [{{ {ENTRY}, scheme = 'fp32', acc = 3 }}]", "row x: unknown fields acc"),
        (f"rows = [{{ {ENTRY}, scheme = 'fp32', printed = 81.5 }}]", "printed is [value, deviation]"),
        (f"rows = [{{ {ENTRY}, scheme = 'fp32', bits = '4' }}]", "row x: names are strings"),
        (f"rows = [{{ {ENTRY}, scheme = 'fp32', metric = 'loss' }}]", "metric is 'loss'; choose one of accuracy"),
        (f"rows = [{{ {ENTRY}, scheme = 'fp32', recipe = 3 }}]", "recipe takes settings"),
        (f"rows = [{{ {ENTRY} }}]", "a note has to say why"),
        (f"rows = [{{ {ENTRY}, scheme = 'fp32' }}, {{ {ENTRY}, scheme = 'a2q' }}]", "more than one row x"),
    ],
)
def test_a_table_that_is_none_says_where(text: str, says: str) -> None:
    with pytest.raises(ValueError, match="table mine") as caught:
        table.parse("mine", text)
    assert says in str(caught.value)


# The numbers beside the printed ones


def record(value: float, **more: object) -> dict[str, Any]:
    measured = {"test_acc": value, "test_acc_best_over_epochs": value + 1, "average_bits": 2.0, "compression": 16.0}
    return {"dataset": "D", "model": "gin", "scheme": "fp32", **measured, **more}


def planned(splits: int, metric: str = "accuracy", **more: Any) -> reproduce.Plan:
    row = table.Row("r", "D", "gin", "fp32", metric, printed=(0.45, 0.01) if metric == "mae" else (81.5, 0.7), **more)
    cells = [
        store.Cell("D", "gin", "fp32", RECIPES["gcn", "fp32", "digits"], seed, fold)
        for seed in range(2)
        for fold in range(splits)
    ]
    return reproduce.Plan(row, tuple(cells), splits)


def shown(plan: reproduce.Plan, finished: dict[store.Key, dict[str, Any]]) -> list[str]:
    """The last row of the table in Markdown."""
    text = compare.markdown(table.Table("t", "T", "S", (plan.row,)), [plan], [compare.compare(plan, finished)])
    return [cell.strip() for cell in text.split("|\n")[-2].strip("|").split("|")]


def test_mean_and_deviation_are_over_seeds_and_folds() -> None:
    plan = planned(splits=3)
    values = [80.0, 81.5, 79.0, 83.0, 82.0, 80.5]
    finished = {cell.key: record(value) for cell, value in zip(plan.cells, values, strict=True)}
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    ours = [f"{mean:.2f} ± {deviation:.2f}", f"{mean + 1:.2f} ± {deviation:.2f}"]
    rest = ["", "2.00 ± 0.00", "", "16.0 ± 0.0", "2 x 3 folds"]
    assert shown(plan, finished) == ["r", "fp32", "81.5 ± 0.7", *ours, *rest]


def test_what_is_partly_done_says_how_far() -> None:
    one, folded = planned(splits=1, bits=4, compression=8), planned(splits=3)
    ours = ["81.00", "82.00", "4", "2.00", "8", "16.0"]
    assert shown(one, {one.cells[1].key: record(81.0)})[3:] == [*ours, "1 of 2"]
    assert shown(folded, {cell.key: record(81.0) for cell in folded.cells[:4]})[-1] == "4 of 6 runs"
    one.failed.append("the loss is nan")
    assert shown(one, {})[3] == "failed"


def test_errors_have_three_digits() -> None:
    plan = planned(splits=1, metric="mae")
    assert shown(plan, {cell.key: record(0.4567) for cell in plan.cells})[2:4] == ["0.450 ± 0.010", "0.457 ± 0.000"]


# The engine


@pytest.fixture(autouse=True)
def nothing_to_download(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """PubMed is missing, and its folder not to be written to, so that nothing is downloaded."""
    root = tmp_path_factory.mktemp("data")
    root.chmod(0o555)
    monkeypatch.setenv("QGNN_DATA", str(root))


def arguments(folder: Path, *more: str, seeds: int = 2) -> list[str]:
    path = folder / "tiny.toml"
    path.write_text(TINY, encoding="utf-8")
    return ["reproduce", str(path), "--seeds", str(seeds), "--out", str(folder / "out"), *more]


def invoke(*command: str, code: int = 0) -> Result:
    result = CliRunner().invoke(cli.app, list(command))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.stderr
    return result


def no_data_path(text: str) -> str:
    """The text without the folder of the data sets, which every test has its own of."""
    return text.replace(os.environ["QGNN_DATA"], "ROOT")


class Undisturbed(NamedTuple):
    """The tiny table, run once from beginning to end."""

    folder: Path
    stdout: str
    files: dict[str, str]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder, root = tmp_path_factory.mktemp("undisturbed"), tmp_path_factory.mktemp("data")
    root.chmod(0o555)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QGNN_DATA", str(root))
        stdout = invoke(*arguments(folder, "--jobs", "2")).stdout
        return Undisturbed(folder, no_data_path(stdout), tables(folder))


def tables(folder: Path) -> dict[str, str]:
    """What was written beside the records."""
    names = ("tiny.md", "tiny.csv")
    return {name: no_data_path((folder / "out" / name).read_text(encoding="utf-8")) for name in names}


def test_a_table_from_beginning_to_end(undisturbed: Undisturbed) -> None:
    folder = undisturbed.folder
    records = results.read(folder / "out/results.jsonl")
    assert len(records) == RUNS
    by_scheme = {scheme: [r for r in records if r["scheme"] == scheme] for scheme in ("fp32", "dq-int4", "a2q")}
    assert all(sorted(r["seed"] for r in found) == [0, 1] for found in by_scheme.values())
    rows = {row["row"]: row for row in csv.DictReader(undisturbed.files["tiny.csv"].splitlines())}
    assert list(rows) == ["fp32", "dq", "a2q", "again", "search", "pubmed"]
    for row, scheme in (("fp32", "fp32"), ("dq", "dq-int4"), ("a2q", "a2q"), ("again", "fp32")):
        for name in ("test_acc", "test_acc_best_over_epochs", "average_bits", "compression"):
            mean = statistics.mean(r[name] for r in by_scheme[scheme])
            assert float(rows[row][name]) == pytest.approx(mean, rel=1e-5), "six digits are written"
        assert (rows[row]["state"], rows[row]["runs"]) == ("done", "2")
    assert rows["fp32"]["average_bits"] == "32" and float(rows["a2q"]["average_bits"]) < 4
    assert (rows["dq"]["printed"], rows["dq"]["printed_bits"]) == ("80", "4")
    assert [rows[row]["state"] for row in ("search", "pubmed")] == ["printed only", "data missing"]
    text = undisturbed.files["tiny.md"]
    assert "\n- search: a search\n- pubmed: data missing: PubMed wants the files ind.pubmed.x" in text
    assert "ROOT/PubMed/raw" in text, "the folder to put them in"
    assert undisturbed.stdout == text, "the table is printed, too"
    assert not list((folder / "out/checkpoints").iterdir())
    assert {path.suffix for path in (folder / "out/models").iterdir()} == {".safetensors"}
    assert len(list((folder / "out/traces").iterdir())) == RUNS, "what qgnn report plots"


def test_a_finished_table_is_not_run_again(undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = undisturbed.folder
    before = (folder / "out/results.jsonl").read_bytes()
    monkeypatch.setattr(
        reproduce, "outcomes", lambda cells, *_: iter([(c, workers.Failure("failed", "repeated")) for c in cells])
    )
    result = invoke(*arguments(folder, "--rows", "a*", "--json", "-"))
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(row["row"], row["state"]) for row in rows] == [("a2q", "done"), ("again", "done")]
    assert (folder / "out/results.jsonl").read_bytes() == before


def test_train_and_reproduce_share_their_runs(undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = undisturbed.folder
    monkeypatch.setattr(train, "train", lambda *_, **__: pytest.fail("repeated"))
    same = [part for pair in ("epochs=6", "warmup=4", "hidden=8") for part in ("--set", pair)]
    command = ["train", "--dataset", "digits", "--scheme", "dq-int4", "--seeds", "2", *same, "--json", "-"]
    result = invoke(*command, "--out", str(folder / "out"))
    assert [json.loads(line)["seed"] for line in result.stdout.splitlines()] == [0, 1]


def test_a_half_trained_cell_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0.0)
    digits, kept = data.load("digits"), store.Store(tmp_path)
    cell = reproduce.cells(table.parse("tiny", TINY).rows[2], digits, seeds=1)[0]

    def stop(epoch: int, total: int) -> None:
        if epoch == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.run(cell, digits, kept, progress=stop)
    epochs: list[int] = []
    resumed = store.run(cell, digits, kept, progress=lambda epoch, total: epochs.append(epoch))
    assert epochs == [7, 8, 9, 10], "epoch 7 was interrupted before it was written"
    whole = store.run(cell, digits, None)
    assert resumed.record["test_acc"] == whole.record["test_acc"]
    assert resumed.record["average_bits"] == whole.record["average_bits"]
    (tmp_path / "checkpoints" / f"{cell.stem}.ptabc.tmp").touch()
    kept.keep(cell, resumed.record)
    assert kept.finished().keys() == {cell.key}
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_training_that_crashes_or_fails_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process is killed at once. The one in its place does the other trainings, of which one fails."""
    crashed: list[int | None] = []
    start = workers._start

    def start_and_kill(*given: Any) -> None:
        start(*given)
        if not crashed:
            (process,) = active_children()
            crashed.append(process.pid)
            process.kill()

    monkeypatch.setattr(workers, "_start", start_and_kill)
    command = arguments(tmp_path, "--rows", "fp32,dq,a2q", seeds=1)
    path = tmp_path / "tiny.toml"
    other = f"bits = 4, {SMALL[:-2]}"
    path.write_text(TINY.replace(other, f"{other}, lr = 1e30"), encoding="utf-8")
    result = invoke(*command, code=1)
    assert "\n- failed: digits gcn fp32, seed 0: its process ended with signal SIGKILL" in result.stdout
    assert "\n- failed: digits gcn dq-int4, seed 0: the loss is nan" in result.stdout
    assert [r["scheme"] for r in results.read(tmp_path / "out/results.jsonl")] == ["a2q"]
    assert not active_children()


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def interrupted(*_: object) -> None:
        started.extend(active_children())
        raise KeyboardInterrupt

    monkeypatch.setattr(workers, "_receive", interrupted)
    monkeypatch.setattr(workers.connection, "wait", lambda links: links)
    result = invoke(*arguments(tmp_path, "--rows", "fp32", "--jobs", "2"), code=130)
    assert result.stderr == f"qgnn: interrupted; the same command again resumes, from {tmp_path / 'out'}\n"
    assert len(started) == 2 and not active_children()


def test_a_folder_takes_one_command_at_a_time(tmp_path: Path) -> None:
    with store.Store(tmp_path / "out").alone():
        result = invoke(*arguments(tmp_path), code=2)
    assert result.stderr.startswith("qgnn: another qgnn train, reproduce or sweep is running in")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"dq-int4"', '"dq-int5"', "table tiny, row dq: there is no scheme 'dq-int5'"),
        ('"gcn", scheme = "dq', '"mlp", scheme = "dq', "table tiny, row dq: there is no model 'mlp'"),
        ('"PubMed"', '"PubMud"', "table tiny, row pubmed: there is no data set 'PubMud'"),
        ("hidden", "hiden", "table tiny, row fp32: a recipe has no setting 'hiden'"),
    ],
)
def test_what_does_not_exist_is_one_line_that_names_the_row(old: str, new: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY.replace(old, new), encoding="utf-8")
    result = invoke("reproduce", str(path), "--out", str(tmp_path / "out"), code=2)
    assert result.stderr.startswith(f"qgnn: {says}") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["a2q-4"], "there is no table 'a2q-4'; choose one of a2q-1"),
        (["no/such.toml"], "the table no/such.toml cannot be read"),
        (["a2q-1", "--rows", "gcn-*,gcn-cara"], "table a2q-1 has no row 'gcn-cara'; there are gcn-cora-fp32"),
        (["a2q-1", "--json", "no/such/folder/f"], "the folder does not exist"),
    ],
)
def test_bad_input_is_one_line(more: list[str], says: str, tmp_path: Path) -> None:
    result = invoke("reproduce", *more, "--out", str(tmp_path), code=2)
    assert says in result.stderr and result.stderr.count("\n") == 1


def test_records_from_before_a_setting_existed_are_found(tmp_path: Path) -> None:
    """A recipe that gained a setting since, at its default, is the same recipe; at another value it is another."""
    recipe = RECIPES["gcn", "fp32", "digits"]
    cell = store.Cell("digits", "gcn", "fp32", recipe, 0)
    older = {k: v for k, v in vars(recipe).items() if k not in ("layers", "halve_every")}
    place = store.Store(tmp_path)
    results.append(place.results, {"dataset": "digits", "model": "gcn", "scheme": "fp32", "seed": 0, "recipe": older})
    assert set(place.finished()) == {cell.key}
    assert replace(cell, recipe=replace(recipe, layers=3)).key not in place.finished()


# Interruptions

DYING = """
import os, signal
from qgnn import results
from qgnn.cli import main

append = results.append

def append_and_die(path, record):
    append(path, record)
    os.kill(os.getpid(), signal.SIGKILL)

results.append = append_and_die
main()
"""
"""The command, which is killed right after it has written a record."""


class Killed:
    """``qgnn reproduce`` in processes of their own, each killed before it is done."""

    def __init__(self, folder: Path) -> None:
        self.command = arguments(folder)
        self.path = folder / "out/results.jsonl"
        self.kept: list[dict[str, Any]] = []

    def start(self, program: str, kill: Callable[[subprocess.Popen[str]], None] | None = None) -> None:
        """Runs ``program`` until it is killed; checks that nothing finished is lost, and that no process stays behind."""
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen([sys.executable, "-c", program, *self.command], start_new_session=True, **pipes)
        try:
            if kill is not None:
                kill(process)
            error = process.communicate(timeout=120)[1]
            assert process.returncode == -signal.SIGKILL, error
            wait(lambda: not alive(process.pid), "its processes end with it")
        finally:
            if alive(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
        found = results.read(self.path)
        assert found[: len(self.kept)] == self.kept
        self.kept = found

    def after_a_record(self, delay: float) -> Callable[[subprocess.Popen[str]], None]:
        """Kills ``delay`` seconds after the next record."""
        before = self._lines()

        def kill(process: subprocess.Popen[str]) -> None:
            wait(lambda: self._lines() > before or process.poll() is not None, "the next record")
            time.sleep(delay)
            process.kill()

        return kill

    def cut(self) -> None:
        """Takes a part of the last line away, as if it had been killed while it wrote that. The checkpoint is there still, as it would be then."""
        os.truncate(self.path, self.path.stat().st_size - 100)
        self.kept = self.kept[:-1]

    def _lines(self) -> int:
        return self.path.read_bytes().count(b"\n")


def wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def alive(group: int) -> bool:
    """Whether a process of the group is left; one that nobody has waited for yet does not count."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, found = path.read_text(encoding="utf-8").rpartition(") ")[2].split()[:3]
        except OSError:  # it ended meanwhile
            continue
        if int(found) == group and state != "Z":
            return True
    return False


def test_no_kill_repeats_or_loses_a_finished_training(undisturbed: Undisturbed, tmp_path: Path) -> None:
    runs = Killed(tmp_path)
    whole = "from qgnn.cli import main; main()"
    moments = random.Random(0)
    runs.start(whole, kill=lambda process: (time.sleep(moments.uniform(0, 1)), process.kill()))
    assert runs.kept == []
    runs.start(DYING)
    assert len(runs.kept) == 1
    runs.cut()
    runs.start(whole, kill=runs.after_a_record(delay=moments.uniform(0, 0.2)))
    assert 1 <= len(runs.kept) < RUNS
    invoke(*runs.command)
    found = results.read(runs.path)
    assert found[: len(runs.kept)] == runs.kept
    keys = [(r["scheme"], r["seed"]) for r in found]
    assert sorted(keys) == sorted((scheme, seed) for scheme in ("a2q", "dq-int4", "fp32") for seed in (0, 1))
    assert tables(tmp_path) == undisturbed.files
    assert not list((tmp_path / "out/checkpoints").iterdir())
