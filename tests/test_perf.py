"""Benchmarks: pairing and ratios, that every suite runs to its end on small inputs and checks what it times, and the file of results."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

from qgnn import cli
from qgnn.perf import bench, kernels, networks, quantized_step, quantizers, registry, table, timing, train_step
from qgnn.perf.__main__ import main
from qgnn.perf.bench import Candidate, Case, ready
from qgnn.perf.peers import on_csr
from qgnn.perf.scene import Scene
from qgnn.perf.timing import LEAST_ROUNDS, paired

ROOT = Path(__file__).resolve().parent.parent
RESULTS = sorted((ROOT / "perf/results").glob("*.csv"))
GRAPH = "powerlaw:300,2000"
SMALL: dict[str, tuple[Any, ...]] = {
    "matmul": ((50, 20, 24),),
    "tails": ((500, 0.01),),
    "fake_quantize_nearest": ((50, 20, 24),),
    "inference": ((2, 430, 995),),
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small shapes, one model and scheme, and nothing compiled."""
    rows = tuple(dataclasses.replace(r, shapes=SMALL.get(r.operation, (GRAPH,))) for r in registry.REGISTRY)
    monkeypatch.setattr(registry, "REGISTRY", rows)
    monkeypatch.setattr(quantized_step, "MODELS", ("gcn",))
    monkeypatch.setattr(quantized_step, "SCHEMES", ("fixed-8",))
    monkeypatch.setattr(quantized_step, "HIDDEN", 16)
    monkeypatch.setattr(train_step, "MODELS", ("gcn",))
    monkeypatch.setattr(train_step, "SCHEMES", ("a2q",))
    for module in (kernels, networks):
        monkeypatch.setattr(module, "compiled", lambda network: network)


def measured(suite: str) -> list[dict[str, table.Value]]:
    return [record for case in registry.run(suite, (), 2, "cpu") for record in case]


def command(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(cli.app, ["bench", *arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.stderr
    return result


# Timing


class Clock:
    """Time passes only where a candidate says so, so that a busy machine changes nothing."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.calls: list[str] = []

    def candidates(self, **seconds: float) -> dict[str, Callable[[], None]]:
        def run(name: str) -> None:
            self.calls.append(name)
            self.seconds += seconds[name]

        return {name: partial(run, name) for name in seconds}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: fake.seconds))
    return fake


def test_ratio_is_baseline_over_candidate_and_runs_take_turns(clock: Clock) -> None:
    timings = paired(clock.candidates(slow=0.03, fast=0.005), rounds=3, warmup=1)
    assert clock.calls == ["slow", "fast"] * 4
    assert timings["slow"].ratio == (1.0, 1.0, 1.0)
    assert timings["fast"].ms == pytest.approx((5, 5, 5))
    assert timings["fast"].ratio == pytest.approx((6, 6, 6))


def test_a_turn_of_something_quick_is_several_calls(clock: Clock) -> None:
    found = paired(clock.candidates(quick=3e-4), rounds=2, warmup=1)["quick"]
    assert len(clock.calls) == 1 + 2 * 3, "3 x 0.3 ms come nearest to a turn of 1 ms"
    assert found.rounds == 2
    assert found.ms == pytest.approx((0.3, 0.3, 0.3)), "the time of one call"


def test_whoever_has_spent_the_budget_sits_out(clock: Clock) -> None:
    timings = paired(clock.candidates(base=0.002, slow=0.02), rounds=8, warmup=0, budget=0.03)
    assert (clock.calls.count("base"), clock.calls.count("slow")) == (8, LEAST_ROUNDS)
    assert (timings["base"].rounds, timings["slow"].rounds) == (8, LEAST_ROUNDS)
    assert timings["slow"].ratio == pytest.approx((0.1, 0.1, 0.1))
    paired(clock.candidates(first=0.02, second=0.002), rounds=8, warmup=0, budget=0.03)
    assert clock.calls.count("second") == LEAST_ROUNDS, "without the baseline there are no ratios"


# What is measured


def test_every_benchmark_names_its_tests_and_its_cases() -> None:
    assert len({row.operation for row in registry.REGISTRY}) == len(registry.REGISTRY)
    for row in registry.REGISTRY:
        assert (ROOT / row.tests).is_file()
        assert callable(registry.cases_of(row))
        assert row.inputs and row.baseline and row.gate


def test_every_suite_runs_and_every_candidate_is_checked() -> None:
    records = measured("all")
    keys = [tuple(record[name] for name in table.KEY) for record in records]
    assert len(set(keys)) == len(keys)
    assert all(tuple(record) == table.COLUMNS for record in records)
    assert {record["operation"] for record in records} == {row.operation for row in registry.REGISTRY}
    refused = [record for record in records if record["status"] != "ok"]
    assert all(record["candidate"] == "torch-scatter-fp32" for record in refused), [r["reason"] for r in refused]
    assert all("pip install" in str(record["reason"]) for record in refused), "not installed, and it says what to do"
    for record in records:
        if record["status"] == "ok":
            assert record["rounds"] == 2 and float(record["ms_50"] or 0) > 0 and float(record["ratio_50"] or 0) > 0
    fp32 = {"torch-csr-fp32", "pyg-scatter-fp32", "pyg-compiled-fp32", "qgnn-fp32"}
    integers = {"qgnn-int8", "qgnn-int4"}
    frozen = integers | {"qgnn-int8-bound", "qgnn-int4-bound"}
    peers = {"pyg-edge-index-fp32", "scipy-csr-fp32", "torch-scatter-fp32"}
    for operation, shapes, candidates in (
        ("aggregate", 3, fp32 | integers | peers | {"qgnn-int2"}),
        ("matmul", 1, integers | {"torch-fp32", "torch-int-mm", "qgnn-mixed-1-to-4"}),
        ("layer", 4, fp32 | frozen),
        ("model", 4, fp32 | frozen),
        ("tails", 1, {"torch-kthvalue", "torch-topk", "qgnn-tails"}),
        ("fake_quantize_nearest", 1, {"qgnn-fake-quantize", "qgnn-separate", "qgnn-nearest"}),
        ("inference", 1, {"qgnn-by-in-degree", "qgnn-nns"}),
        ("train-step", 1, {"pyg-fp32", "qgnn"}),
        ("quantized-step", 1, {"qgnn-fp32", "pyg-fp32", "pyg-emulated", "qgnn"}),
    ):
        found = {(record["shape"], record["candidate"]) for record in records if record["operation"] == operation}
        assert {candidate for _, candidate in found} == candidates
        assert len(found) == shapes * len(candidates)


@pytest.mark.parametrize("kind", list(networks.NETWORKS))
def test_csr_peers_compute_what_pyg_does(kind: str) -> None:
    """In FP64, but for the factors of the CSR matrices, which are made in FP32: three roundings in each of two layers, at most ``6 * 2^-24`` of
    values that are of the order of 1."""
    at = Scene.load(GRAPH, "cpu")
    x = at.features(16).double()
    network = networks.NETWORKS[kind](16, 32, 2, 5).double().eval()
    torch.testing.assert_close(on_csr(network, at)(x, at.edge_index), network(x, at.edge_index), rtol=1e-6, atol=1e-6)


def _case(**runs: Callable[[], Any]) -> Case:
    accept = bench.equal_to(lambda: torch.ones(3))
    return Case("shape", [ready(name, run, accept) for name, run in runs.items()])


def test_failing_candidates_are_rows_and_the_others_go_on() -> None:
    def raises(error: Exception) -> Callable[[], Any]:
        def run() -> None:
            raise error

        return run

    case = _case(
        good=lambda: torch.ones(3),
        wrong=lambda: torch.zeros(3),
        large=raises(bench.DoesNotFit("too\nlarge")),
        memory=raises(MemoryError("no more")),
        broken=raises(RuntimeError("why")),
    )
    rows = {row.candidate: row for row in bench.measure("test", case, bench.Limits(2), "cpu")}
    assert rows["good"].status == "ok" and rows["good"].timing is not None
    assert {name: (row.status, row.reason) for name, row in rows.items() if name != "good"} == {
        "wrong": ("wrong", "differs from the reference, which it must equal to the bit"),
        "large": ("does not fit", "too large"),
        "memory": ("does not fit", "MemoryError: no more"),
        "broken": ("failed", "RuntimeError: why"),
    }


def test_without_a_baseline_there_are_no_ratios() -> None:
    broken = Candidate("base", lambda: lambda: torch.zeros(3), bench.equal_to(lambda: torch.ones(3)))
    other = ready("other", lambda: torch.ones(3), bench.equal_to(lambda: torch.ones(3)))
    base, rest = bench.measure("test", Case("shape", [broken, other]), bench.Limits(2), "cpu")
    assert (base.status, rest.status) == ("wrong", "ok")
    assert rest.timing is not None and rest.timing.ratio is None and rest.timing.ms[1] > 0


def test_bound_models_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU there are as many as there are copies of the features, each bound to its own."""
    monkeypatch.setattr(networks, "copies", lambda x, device: [x, x.clone(), x.clone()])
    case = networks.model(Scene.load(GRAPH, "cpu"), "gcn", ("torch-csr-fp32", "qgnn-int8-bound"), width=16)
    rows = bench.measure("model", case, bench.Limits(2), "cpu")
    assert [(row.status, row.reason) for row in rows] == [("ok", "")] * 2
    run = case.candidates[1].build()
    first, *others = (run() for _ in range(3))
    assert all(torch.equal(first, other) for other in others)


def test_messages_that_do_not_fit_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "message_limit", lambda device: 2000 * 128 * 4 - 1)
    status = {(r["operation"], r["shape"], r["candidate"]): r["status"] for r in measured("cpu")}
    assert status["aggregate", f"{GRAPH} F=64", "pyg-scatter-fp32"] == "ok"
    assert status["aggregate", f"{GRAPH} F=128", "pyg-scatter-fp32"] == "does not fit"
    assert status["layer", f"{GRAPH} gcn 128->128", "pyg-scatter-fp32"] == "does not fit"
    assert status["layer", f"{GRAPH} gcn 128->128", "torch-csr-fp32"] == "ok"


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    aggregate, matmul, tails = kernels.ops.aggregate, kernels.ops.matmul, quantizers.tails
    monkeypatch.setattr(kernels.ops, "aggregate", lambda graph, x: aggregate(graph, x) * (1 + 1e-3))
    monkeypatch.setattr(kernels.ops, "matmul", lambda x, w: matmul(x, w).acc + 1)
    monkeypatch.setattr(quantizers, "tails", lambda x, k: tails(x, k + 1))
    monkeypatch.setattr(quantizers, "fake_quantize_nearest", lambda x, *_: (x,))
    wrong = {
        (r["operation"], r["candidate"])
        for s in ("kernels", "quantizers")
        for r in measured(s)
        if r["status"] == "wrong"
    }
    sums = ("qgnn-fp32", "qgnn-int8", "qgnn-int4", "qgnn-int2")
    products = ("qgnn-int8", "qgnn-int4", "qgnn-mixed-1-to-4")
    assert wrong == {
        *(("aggregate", name) for name in sums),
        *(("matmul", name) for name in products),
        ("tails", "qgnn-tails"),
        ("fake_quantize_nearest", "qgnn-nearest"),
    }


def test_an_integer_model_of_other_weights_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(model: nn.Module, data: Any) -> Callable[..., torch.Tensor]:
        return lambda *_: model(data.x, data.edge_index) * 2

    monkeypatch.setattr(networks, "freeze", other)
    found = {r["status"] for r in measured("cpu") if r["operation"] == "layer" and "int" in str(r["candidate"])}
    assert found == {"wrong"}


# The suite "gpu"


def gpu_row(operation: str, shape: str, candidate: str, ms: float, **more: table.Value) -> dict[str, table.Value]:
    """Made by hand: no GPU measured it."""
    found: dict[str, table.Value] = dict.fromkeys(table.COLUMNS, "")
    found |= {"operation": operation, "shape": shape, "candidate": candidate, "baseline": "torch-csr-fp32"}
    found |= {"status": "ok", "ms_20": ms, "ms_50": ms, "ms_80": ms, "date": "2026-01-01", "device": "made by hand"}
    return found | {f"ratio_{q}": 40 / ms for q in (20, 50, 80)} | more


BY_HAND = [
    gpu_row("machine", "4 GB", "copy", 1.0, bytes=4e9, baseline="copy"),
    gpu_row("machine", "n", "int8-product", 1.0, operations=1e12, baseline="int8-product"),
    gpu_row("aggregate", "reddit-size F=128", "torch-csr-fp32", 40.0),
    gpu_row("aggregate", "reddit-size F=128", "qgnn-fp32", 20.0, bytes=6e10, operations=1.5e10, bound=0.75),
    gpu_row("aggregate", "reddit-size F=128", "qgnn-int8", 20.0, bytes=1.5e10, operations=1.5e10),
]


def test_targets_are_met_short_or_not_measured() -> None:
    shown = table.tables(BY_HAND)["targets"].splitlines()
    assert "| aggregate, reddit-size F=128: qgnn-fp32 over torch-csr-fp32 | 1.2 | 2.00 | met |" in shown
    assert "| aggregate, reddit-size F=128: qgnn-int8 over torch-csr-fp32 | 3.5 | 2.00 | short by 1.75 x |" in shown
    assert "| aggregate, reddit-size F=128: qgnn-int4 over torch-csr-fp32 | 6 |  | not measured |" in shown
    assert "| aggregate, reddit-size F=128: qgnn-fp32, share of the bound | 0.7 | 0.75 | met |" in shown
    assert shown[-1] == "| two calls of ours give equal bits | 2 | 2 | met |"


def test_plots_are_made_of_rows_alone(tmp_path: Path) -> None:
    results = tmp_path / "rows.csv"
    table.append(results, BY_HAND)
    command("plot", str(results), "--out", str(tmp_path / "plots"))
    roofline = (tmp_path / "plots/roofline.svg").read_text()
    assert "copy 4 TB/s, int8 product 1e+03 TOP/s" in roofline and "made by hand" in roofline
    assert "reddit-size F=128: qgnn-int8" in (tmp_path / "plots/speedup-aggregate.svg").read_text()
    table.append(tmp_path / "none.csv", [record("torch-csr-fp32", 1, status="failed", ms_50=None)])
    assert "nothing to plot" in command("plot", str(tmp_path / "none.csv"), code=2).stderr


# The file and its tables


def test_interrupting_keeps_finished_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cases(shape: Any, device: str) -> Iterator[Case]:
        yield _case(good=lambda: torch.ones(3))
        raise KeyboardInterrupt

    monkeypatch.setattr(registry, "cases_of", lambda row: cases)
    out = tmp_path / "rows.csv"
    result = command("--suite", "train-step", "--out", str(out), code=130)
    assert result.stderr == "qgnn: interrupted; finished rows are kept\n"
    assert [line["candidate"] for line in table.read(out)] == ["good"]
    assert main(["--suite", "train-step", "--out", str(out)]) == 130
    assert len(table.read(out)) == 2


def test_a_shape_that_cannot_be_had_is_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QGNN_DATA", str(tmp_path))
    rows = tuple(dataclasses.replace(r, shapes=("MUTAG-of-mine", *r.shapes)) for r in registry.REGISTRY)
    monkeypatch.setattr(registry, "REGISTRY", [row for row in rows if row.operation == "train-step"])
    first, *rest = measured("train-step")
    assert first["status"] == "failed" and "there is no data set 'MUTAG-of-mine'" in str(first["reason"])
    assert [record["status"] for record in rest] == ["ok", "ok"]


def test_rows_go_to_the_file_to_json_and_to_the_reader(tmp_path: Path) -> None:
    out, records = tmp_path / "rows.csv", tmp_path / "rows.jsonl"
    arguments = ("--suite", "quantizers", "--rounds", "2", "--out", str(out))
    shown = command(*arguments, "--json", str(records)).stdout
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    assert len(lines) == len(shown.splitlines()) == len(table.read(out)) == 6
    assert all(isinstance(line["ms_50"], float) and line["candidate"] in shown for line in lines)
    assert main(list(arguments)) == 0
    assert len(table.read(out)) == 12, "rows are only ever added"


def test_wrong_results_are_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizers, "tails", lambda x, k: (x[0], x[1]))
    assert "wrong: differs" in command("--suite", "quantizers", "--rounds", "2", code=1).stdout
    assert main(["--suite", "quantizers", "--rounds", "2"]) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--suite", "gpus"], "there is no suite 'gpus'; choose one of cpu, kernels"),
        (["--graphs", "Corra"], "there is no data set 'Corra'"),
        (["--graphs", "digits-superpixels"], "has many graphs"),
        (["--rounds", "0"], "--rounds"),
        (["--out", "no/such/rows.csv"], "name a file in a folder that exists"),
        (["--out", "other.csv"], "is no file of results"),
        (["--table", "other.csv"], "is no file of results"),
        (["--table", "none.csv"], "cannot be read"),
        (["--into", "other.csv"], "--into goes with --table"),
    ],
)
def test_bad_input_is_exit_code_2(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other.csv").write_text("a,b\n1,2\n")
    # usage errors, raised before anything is loaded, are printed by main()
    assert says in command(*arguments, code=2).stderr


def record(candidate: str, ratio: float, **more: table.Value) -> dict[str, table.Value]:
    found: dict[str, table.Value] = dict.fromkeys(table.COLUMNS)
    found |= {"operation": "aggregate", "shape": "Cora F=128", "candidate": candidate, "baseline": "torch-csr-fp32"}
    found |= {"status": "ok", "ms_50": 12.34, "date": "2026-01-01", "device": "chip"}
    return found | {f"ratio_{q}": ratio + q / 1000 for q in (20, 50, 80)} | more


def test_tables_show_the_newest_run_and_what_failed() -> None:
    records = [
        record("torch-csr-fp32", 1),
        record("qgnn-int2", 9),
        record("torch-csr-fp32", 1, ms_50=5.678, date="2026-01-02"),
        record("qgnn-int8", 4, date="2026-01-02"),
        record("scipy-csr-fp32", 0, date="2026-01-02", status="does not fit", ratio_50=None),
        record("torch-csr-fp32", 1, shape="Cora F=16"),
    ]
    assert table.tables(records) == {
        "summary": "|  | torch-csr-fp32 | qgnn-int8 |\n| --- | ---: | ---: |\n| aggregate, Cora F=128 | 5.68 ms | 4.05 |",
        "aggregate": "|  | torch-csr-fp32 | qgnn-int8 | scipy-csr-fp32 |\n| --- | ---: | ---: | ---: |\n"
        "| Cora F=128 | 5.68 ms | 4.05 (4.02–4.08) | does not fit |\n| Cora F=16 | 12.3 ms |  |  |",
    }


def test_tables_are_put_between_markers(tmp_path: Path) -> None:
    results, page = tmp_path / "rows.csv", tmp_path / "page.md"
    table.append(results, [record("torch-csr-fp32", 1)])
    page.write_text("before\n<!-- table: summary -->\nold\n<!-- end of table -->\nafter\n")
    command("--table", str(results), "--into", str(page))
    made = table.tables(table.read(results))["summary"]
    assert page.read_text() == f"before\n<!-- table: summary -->\n{made}\n<!-- end of table -->\nafter\n"
    assert f"### summary\n{made}\n" in command("--table", str(results)).stdout
    page.write_text("<!-- table: all -->\n<!-- end of table -->\n")
    command("--table", str(results), "--into", str(page))
    assert page.read_text() == f"<!-- table: all -->\n{table.document(table.read(results))}\n<!-- end of table -->\n"
    page.write_text("<!-- table: matmul -->\n<!-- end of table -->\n")
    assert "there is no table 'matmul'" in command("--table", str(results), "--into", str(page), code=2).stderr
    page.write_text("no markers\n")
    assert "nothing is marked" in command("--table", str(results), "--into", str(page), code=2).stderr


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_committed_results_have_unique_keys(path: Path) -> None:
    keys = [tuple(line[name] for name in table.KEY) for line in table.read(path)]
    assert len(set(keys)) == len(keys) > 0


@pytest.mark.parametrize("page", ["README.md", "docs/performance.md"])
def test_published_tables_are_those_of_the_committed_results(page: str) -> None:
    """They are made by ``qgnn bench --table FILE --into PAGE``, of the file that the page names."""
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(r"perf/results/[\w-]+\.csv", text))
    assert len(named) == 1
    assert table.refreshed(text, table.read(ROOT / named.pop())) == text


def test_runs_from_a_plain_tree() -> None:
    """``make gpu``: torch, Triton, PyG and NumPy are there, the rest may not be."""
    missing = ("typer", "rich", "pandas", "numba", "sklearn", "scipy", "safetensors", "matplotlib")
    code = (
        f"import sys; sys.modules |= dict.fromkeys({missing}); from qgnn.perf.__main__ import main; "
        "sys.exit(main(['--suite', 'train-step', '--graphs', 'powerlaw:30,100', '--rounds', '1']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "numba" in done.stdout, "the rows say what is missing"
