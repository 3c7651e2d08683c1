"""``qgnn simulate`` and :mod:`qgnn.accel.sweep`: what is printed and written is what the simulator counts."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from qgnn import accel, cli
from qgnn.accel import sweep as sweeps
from qgnn.accel.report import comparison, to_dict
from qgnn.accel.simulator import simulate


def graph(nodes: int, seed: int = 0) -> accel.Workload:
    """Two layers, the first with a binary input, on a graph with empty rows and a hub."""
    rng = np.random.default_rng(seed)
    degrees = rng.integers(0, 6, nodes)
    degrees[3] = nodes // 2
    indptr = np.concatenate([[0], degrees.cumsum()])
    layers = [
        accel.Layer(70, 24, rng.integers(1, 6, nodes), binary_input=True, name="first"),
        accel.Layer(24, 5, rng.integers(0, 9, nodes), name="second"),
    ]
    return accel.Workload(indptr, rng.integers(0, nodes, indptr[-1]), layers, "small")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A workload file; the test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    graph(600).save(tmp_path / "small.npz")
    return "small.npz"


def run(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(cli.app, ["simulate", *arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.stderr
    return result


def one_line(result: Result) -> str:
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("qgnn: ")
    return result.stderr


def rows_of(path: str | Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def cells(text: str, *names: str) -> list[str]:
    """The other cells of the one row of a table that begins with ``names``."""
    begin = " +│ ".join(map(re.escape, names))
    (found,) = re.findall(rf"^│ {begin} +│(.*)│$", text, re.MULTILINE)
    return [cell.strip() for cell in found.split("│")]


# One configuration


def test_tables_are_what_the_simulator_counts(file: str) -> None:
    shown = run("--workload", file, "--set", "pes=32", "--set", "hbm_gbs=4")
    assert shown.stderr == "", "no progress bar where there is no terminal"
    config = accel.load_config(pes=32, hbm_gbs=4.0)
    result = simulate(accel.Workload.load(file), config)
    assert result.total.stall_cycles > 0
    counts = {
        "nodes": 600,
        "edges": result.edges,
        "cycles": result.total.total_cycles,
        "  update": result.total.update_cycles,
        "  aggregation": result.total.aggregation_cycles,
        "  stalls: waiting for the HBM": result.total.stall_cycles,
        "cycles without overlap of loading and computing": result.total.serial_cycles,
    }
    for label, count in counts.items():
        assert cells(shown.stdout, label) == [f"{count:,}"]
    assert cells(shown.stdout, "energy, µJ") == [f"{result.joules * 1e6:,.2f}"]
    for layer in result.layers:
        counted = (layer.update_cycles, layer.aggregation_cycles, layer.stall_cycles, layer.total_cycles)
        sizes = [str(layer.f_in), str(layer.f_out), f"{layer.average_bits:.2f}"]
        assert cells(shown.stdout, layer.name, "gcn") == [*sizes, *(f"{count:,}" for count in counted)]
    assert "note: first: its input holds zeros and ones, and 1 bit is charged (first_layer)" in shown.stdout


@pytest.mark.parametrize("name", ["[/x]", "conv[0]"])
def test_brackets_in_names_are_no_markup(file: str, name: str) -> None:
    accel.Workload([0, 1], [0], [accel.Layer(3, 2, 2, name=name)], name).save(file)
    shown = run("--workload", file).stdout
    assert shown.startswith(f"{name} on the accelerator")
    assert cells(shown, name, "gcn")[:2] == ["3", "2"]


def test_comparison_has_both_accountings_and_all_orders(file: str) -> None:
    text = run("--workload", file, "--baseline", "int4,int2").stdout
    workload = accel.Workload.load(file)
    for first, order in product(("binary", "as_learned"), ("degree", "bits", "none")):
        config = accel.Config(first_layer=first, order=order)
        ours, *uniform = (
            simulate(load, config) for load in (workload, accel.baseline(workload, 4), accel.baseline(workload, 2))
        )
        speedups = [f"{other.total.total_cycles / ours.total.total_cycles:.2f}" for other in uniform]
        energies = [f"{other.joules / ours.joules:.2f}" for other in uniform]
        shown = cells(text, first.replace("_", " "), order)
        assert shown == [f"{ours.total.total_cycles:,}", *speedups, *energies]


def test_no_baseline_leaves_the_orders(file: str) -> None:
    text = run("--workload", file, "--baseline", "").stdout
    cycles = simulate(accel.Workload.load(file), accel.Config(order="bits")).total.total_cycles
    assert cells(text, "binary", "bits") == [f"{cycles:,}"]


def test_json_on_stdout_is_the_report_and_nothing_else(file: str) -> None:
    shown = run("--workload", file, "--order", "bits", "--json", "-")
    workload, config = accel.Workload.load(file), accel.Config(order="bits")
    expected = to_dict(simulate(workload, config), workload, comparison(workload, config))
    assert json.loads(shown.stdout) == expected
    assert "speedup over uniform widths" in shown.stderr, "the tables make way"


def test_files_are_written_and_named(file: str, tmp_path: Path) -> None:
    shown = run("--workload", file, "--out", "new/folder", "--trace", "phases.csv", "--json", "r.json").stdout
    document = json.loads(Path("r.json").read_text(encoding="utf-8"))
    assert json.loads(Path("new/folder/report.json").read_text(encoding="utf-8")) == document
    assert {"report.md", "layers.csv"} < {path.name for path in Path("new/folder").iterdir()}
    for path in ("phases.csv", *(str(path) for path in Path("new/folder").iterdir())):
        assert f"wrote {path}\n" in shown
    assert sum(int(row["cycles"]) for row in rows_of("phases.csv")) == document["total"]["compute_cycles"]


def test_accelerator_comes_from_file_profile_and_settings(file: str) -> None:
    Path("chips.toml").write_text('[tiny]\npes = 8\norder = "none"\nprofile = "cacti45-hp"\n', encoding="utf-8")
    shown = run("--workload", file, "--config", "chips.toml", "--profile", "tiny", "--set", "macs=4", "--json", "-")
    report = json.loads(shown.stdout)
    chosen = {row["key"]: row["value"] for row in report["manifest"]["configuration"]}
    assert [chosen[key] for key in ("pes", "macs", "order", "profile")] == [8, 4, "none", "cacti45-hp"]
    config = accel.Config(pes=8, macs=4, order="none", profile="cacti45-hp")
    assert report["total"]["update_cycles"] == simulate(accel.Workload.load(file), config).total.update_cycles


def test_architecture_on_a_data_set(tmp_path: Path) -> None:
    shown = run("--dataset", "digits", "--model", "gcn", "--bits", "uniform:3", "--hidden", "24", "--json", "-")
    report = json.loads(shown.stdout)
    assert report["workload"]["nodes"] == 1797
    assert [(layer["f_in"], layer["f_out"]) for layer in report["layers"]] == [(64, 24), (24, 10)]
    first = report["layers"][0]  # eq. of uniform widths: F_out ceil(F_in / 16) ceil(N / 256) b
    assert first["update_cycles"] == 24 * 4 * 8 * 3


def test_saved_model_runs_on_its_data_set(tmp_path: Path) -> None:
    import qgnn
    from qgnn.data import load
    from qgnn.quant.scheme import parse
    from qgnn.recipes import recipe_for
    from qgnn.train import build

    data = load("digits", None)
    scheme = parse("int8")
    model = build(scheme, data, recipe_for("gcn", scheme, data))
    frozen = qgnn.freeze(qgnn.calibrate(model, data.data), data.data)
    path = tmp_path / "model.safetensors"
    qgnn.save(frozen, path)
    report = json.loads(run("--model", str(path), "--dataset", "digits", "--json", "-").stdout)
    assert [layer["average_bits"] for layer in report["layers"]] == [8.0, 8.0]
    assert one_line(run("--model", str(path), code=2)).count("--dataset")


def test_a_workload_needs_no_torch(file: str) -> None:
    """Neither a report with all its files nor a sweep loads torch, nor what loads it."""
    code = (
        "import sys; from qgnn import cli\n"
        "for more in (['--out', 'out', '--trace', 't.csv', '--json', 'r.json'], ['--sweep', 'order=bits,none']):\n"
        f"    cli.app(['simulate', '--workload', '{file}', *more], standalone_mode=False)\n"
        "print({'torch', 'torch_geometric', 'triton', 'numba'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "set()"


# Sweeps


def test_sweep_has_a_row_for_every_combination_in_order(file: str) -> None:
    shown = run("--workload", file, "--sweep", "order=degree,bits", "--sweep", "pes=16,64", "--set", "macs=8")
    assert shown.stderr == ""
    assert "wrote sweep.csv: 4 rows" in shown.stdout
    workload = accel.Workload.load(file)
    found = rows_of("sweep.csv")
    assert list(found[0])[:2] == ["order", "pes"], "what was swept comes first"
    assert [(row["order"], row["pes"]) for row in found] == [
        *(("degree", "16"), ("degree", "64"), ("bits", "16"), ("bits", "64"))
    ]
    for row in found:
        config = accel.load_config(order=row["order"], pes=row["pes"], macs=8)
        ours, int4 = simulate(workload, config), simulate(accel.baseline(workload, 4), config)
        total = ours.total
        assert (int(row["total_cycles"]), int(row["update_cycles"])) == (total.total_cycles, total.update_cycles)
        assert int(row["traffic_dram_read_weights"]) == total.traffic["dram_read"]["weights"]
        # Exact: a CSV holds the shortest text that reads as the same float.
        assert float(row["energy_pj_hbm"]) == total.energy_pj["hbm"]
        assert float(row["int4_speedup"]) == int4.total.total_cycles / total.total_cycles
        assert float(row["int4_energy_ratio"]) == pytest.approx(
            int4.joules / ours.joules, rel=1e-12
        )  # a factor of 1e12
        assert {key: row[key] for key in ("macs", "sync", "workload")} == {
            "macs": "8",
            "sync": "lockstep",
            "workload": "small",
        }
    fewest = min(found, key=lambda row: int(row["total_cycles"]))
    assert cells(shown.stdout, fewest["order"], fewest["pes"])[0] == f"{int(fewest['total_cycles']):,}"


def test_rows_do_not_depend_on_the_threads() -> None:
    axes = {"pes": list(range(1, 40)), "first_layer": ["binary", "as_learned"]}
    one, four = (list(sweeps.sweep(graph(300), accel.Config(), axes, jobs=jobs)) for jobs in (1, 4))
    assert len(one) == 78
    assert one == four


def test_sweep_goes_to_out_and_to_json(file: str) -> None:
    lines = run("--workload", file, "--sweep", "hbm_gbs=1,2,4", "--out", "new", "--json", "-").stdout.splitlines()
    assert [json.loads(line)["hbm_gbs"] for line in lines] == [1.0, 2.0, 4.0]
    assert [row["hbm_gbs"] for row in rows_of("new/sweep.csv")] == ["1.0", "2.0", "4.0"]
    assert [path.name for path in Path("new").iterdir()] == ["sweep.csv"]


def test_progress_counts_rows() -> None:
    seen: list[tuple[int, int]] = []
    rows = sweeps.sweep(graph(50), accel.Config(), {"pes": [1, 2, 3]}, (), lambda *at: seen.append(at))
    assert [row["pes"] for row in rows] == [1, 2, 3]
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_rows_stand_in_the_file_when_they_are_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep that is stopped, or killed, keeps them, and begins no further one."""
    begun = []

    def counted(*arguments: Any) -> accel.Result:
        begun.append(arguments)
        return simulate(*arguments)

    monkeypatch.setattr(sweeps, "simulate", counted)
    rows = sweeps.sweep(graph(200), accel.Config(), {"pes": list(range(1, 2001))}, (), jobs=1)
    saved: Iterator[sweeps.Row] = sweeps.save(rows, tmp_path / "s.csv")
    for count in (1, 2, 3):
        next(saved)
        assert [row["pes"] for row in rows_of(tmp_path / "s.csv")] == [str(n) for n in range(1, count + 1)]
    saved.close()
    rows.close()
    stopped = len(begun)
    assert stopped < 2000
    time.sleep(0.1)
    assert len(begun) == stopped


def test_interrupted_sweep_keeps_what_is_finished(tmp_path: Path) -> None:
    graph(100_000).save(tmp_path / "w.npz")
    values = ",".join(str(n) for n in range(1, 4000))  # a minute at least
    code = "from qgnn.cli import main; main()"
    command = [sys.executable, "-c", code, "simulate", "--workload", "w.npz", "--sweep", f"clock_hz={values}"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        table = tmp_path / "sweep.csv"
        deadline = time.monotonic() + 60
        while (not table.exists() or table.read_text(encoding="utf-8").count("\n") < 5) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
    kept = rows_of(table)
    assert process.returncode == 130, said
    assert [float(row["clock_hz"]) for row in kept] == [float(n) for n in range(1, len(kept) + 1)]
    assert 4 <= len(kept) < 3999
    assert said == "qgnn: interrupted; finished rows are in sweep.csv\n"


def test_a_hundred_configurations_of_a_graph_like_cora_take_seconds() -> None:
    """Issue: less than 10 s. Measured: 0.25 s on one core."""
    axes = {"order": ["degree", "bits"], "pes": [32, 64, 128, 256, 512], "hbm_gbs": list(range(10, 20))}
    workload = graph(2708)
    start = time.perf_counter()
    assert len(list(sweeps.sweep(workload, accel.Config(), axes))) == 100
    assert time.perf_counter() - start < 10


# Bad input


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "name what runs: --workload FILE"),
        (["--dataset", "digits"], "--model gcn --bits uniform:4"),
        (["--model", "gcn", "--bits", "uniform:4"], "--dataset D"),
        (["--workload", "small.npz", "--bits", "uniform:4", "--hidden", "3"], "leave out --bits, --hidden"),
        (["--workload", "none.npz"], "there is no file none.npz"),
        (["--workload", "other.npz"], "other.npz is no workload"),
        (["--workload", "small.npz", "--set", "pes=0"], "pes must be an integer from 1 on, got 0"),
        (["--workload", "small.npz", "--set", "hbm_gbs=0"], "hbm_gbs must be above 0"),
        (["--workload", "small.npz", "--set", "pes"], "--set takes KEY=VALUE"),
        (["--workload", "small.npz", "--set", "speed=3"], "unknown key speed"),
        (["--workload", "small.npz", "--profile", "fast"], "there is no configuration 'fast'"),
        (["--workload", "small.npz", "--config", "none.toml", "--profile", "a"], "none.toml cannot be read"),
        (["--workload", "small.npz", "--config", "text"], "text cannot be read as TOML"),
        (["--workload", "small.npz", "--order", "bits", "--set", "order=none"], "contradict each other"),
        (["--workload", "small.npz", "--baseline", "int4,fp32"], "--baseline takes int1 to int32"),
        (["--workload", "small.npz", "--baseline", "int0"], "--baseline takes int1 to int32"),
        (["--workload", "small.npz", "--sweep", "pes"], "--sweep takes KEY=A,B,C, got 'pes'"),
        (["--workload", "small.npz", "--sweep", "pes=1,,2"], "--sweep takes KEY=A,B,C"),
        (["--workload", "small.npz", "--sweep", "pes=1,0"], "pes must be an integer from 1 on, got 0"),
        (["--workload", "small.npz", "--sweep", "speed=1,2"], "unknown key speed"),
        (["--workload", "small.npz", "--sweep", "pes=1", "--sweep", "pes=2"], "pes is given twice"),
        (["--workload", "small.npz", "--order", "bits", "--sweep", "order=none"], "order is given twice"),
        (["--workload", "small.npz", "--sweep", "pes=1,2", "--trace", "t.csv"], "leave out --sweep"),
        (["--workload", "small.npz", "--trace", "no/such/t.csv"], "the folder does not exist"),
        (["--workload", "small.npz", "--set", "sync=ideal", "--trace", "t.csv"], "lockstep"),
        (["--workload", "small.npz", "--json", "no/such/r.json"], "the folder does not exist"),
        (["--workload", "small.npz", "--out", "text/below"], "the folder cannot be made"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(file: str, arguments: list[str], says: str) -> None:
    Path("text").write_text("text", encoding="utf-8")
    np.savez("other.npz", indptr=[0])
    assert says in one_line(run(*arguments, code=2))
    assert {path.name for path in Path().iterdir()} == {file, "text", "other.npz"}, "nothing was written"


def test_help_shows_an_example_and_where_the_sweep_goes() -> None:
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", run("--help").stdout).split())
    assert "Example: qgnn simulate --" in text
    assert "sweep.csv" in text
    assert "--json" in text
