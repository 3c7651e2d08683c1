"""Reports, plots and traces of the simulator: golden files, totals, and every line of a small trace recomputed with loops."""

import csv
import json
import subprocess
import sys
import tracemalloc
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from qgnn.accel import plots, report
from qgnn.accel.config import Config, load_config
from qgnn.accel.simulator import charged_bits, simulate
from qgnn.accel.trace import write_trace
from qgnn.accel.workload import Layer, Workload, baseline

from . import golden

KINDS = ("gcn", "gin", "sage", "gat", "linear")
TEXTS = ("report.json", "report.md", "layers.csv", "comparison.csv", "trace.csv")


def document(**overrides: Any) -> dict[str, Any]:
    """The golden workload's report under other choices."""
    workload, config = golden.workload(), load_config(**overrides)
    return report.to_dict(simulate(workload, config), workload, report.comparison(workload, config))


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# Golden files


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    golden.make(folder)
    return folder


@pytest.mark.parametrize("name", TEXTS)
def test_report_is_the_golden_one(name: str, made: Path) -> None:
    # Byte for byte: counts are integers, and energies and means follow from them by single IEEE operations in a fixed order.
    assert (made / name).read_text(encoding="utf-8") == (golden.FOLDER / name).read_text(encoding="utf-8")


def test_golden_workload_is_read_as_it_is_made() -> None:
    assert Workload.load(golden.FOLDER / "workload.npz").fingerprint() == golden.workload().fingerprint()


def test_golden_files_show_every_case() -> None:
    found = json.loads((golden.FOLDER / "report.json").read_text(encoding="utf-8"))
    assert {layer["kind"] for layer in found["layers"]} == set(KINDS)
    assert {layer["stall_cycles"] > 0 for layer in found["layers"]} == {True, False}
    moved = found["total"]["traffic"]
    assert moved["dram_read"]["operand"] > 0, "nothing spills"
    assert found["total"]["attention_cycles"] > 0
    assert found["total"]["nns_comparisons"] > 0
    assert len(found["notes"]) == 4


# Data


def test_manifest_names_every_choice() -> None:
    config = load_config("cacti45-lop", pes=8, hbm_gbs="128", sram_read_pj=0.5)
    workload = golden.workload()
    manifest = report.to_dict(simulate(workload, config), workload)["manifest"]
    choices = {choice["key"]: choice for choice in manifest["configuration"]}
    assert list(choices) == [entry.name for entry in fields(Config)]
    for key, value in config.to_dict().items():
        resolved = {"sram_write_pj": 0.175, "sram_leakage_w": 0.24}.get(key, value)
        assert choices[key]["value"] == resolved
        assert choices[key]["source"]
    assert {key: manifest["sha256"][key] for key in ("graph", "bits")} == workload.fingerprint()


def test_hash_of_the_configuration_is_that_of_its_values() -> None:
    def digest(**overrides: Any) -> str:
        workload, config = golden.workload(), load_config(**overrides)
        return str(report.to_dict(simulate(workload, config), workload)["manifest"]["sha256"]["configuration"])

    own = digest()
    assert digest(hbm_gbs=256) == digest(hbm_gbs="256.0") == own
    assert digest(sram_leakage_w=0.0) == own, "the profile's own value is no other choice"
    others = [digest(pes=128), digest(overlap=False), digest(index_bits="log2"), digest(int_add_pj=0.031)]
    assert len({own, *others}) == 5


def test_document_is_json_and_holds_the_result() -> None:
    workload, config = golden.workload(), golden.config()
    result = simulate(workload, config)
    found = json.loads(report.dumps(report.to_dict(result, workload)))
    assert "comparison" not in found
    assert found["layers"] == [asdict(layer) for layer in result.layers]
    assert found["total"] == asdict(result.total)
    assert found["memory"] == asdict(result.memory)
    assert found["seconds"] == result.seconds == result.total.total_cycles / 1e9
    assert found["workload"] == {"name": "golden", "nodes": 20, "edges": 57, "layers": 5}


def test_ratios_without_a_denominator_are_null() -> None:
    workload = Workload(np.zeros(4, int), np.zeros(0, int), [Layer(3, 2, 0, "linear")])
    found = report.to_dict(simulate(workload), workload, report.comparison(workload))
    assert found["memory"]["ratio_without_steps"] is None  # no features at all
    # A width of 0 leaves nothing to compute: INT4 takes cycles, the workload none.
    assert found["comparison"]["rows"][0]["compute_speedup"] == {"INT4": None, "INT8": None}
    assert "| – |" in " ".join(report.markdown(found).split())
    assert json.loads(report.dumps(found)) == found


# Comparison


def test_comparison_has_every_order_under_both_accountings() -> None:
    workload, config = golden.workload(), golden.config()
    found = report.comparison(workload, config, baselines=(4, 8, 2))
    widths = {"given": workload, **{f"INT{bits}": baseline(workload, bits) for bits in (4, 8, 2)}}
    assert found["baselines"] == ["INT4", "INT8", "INT2"]
    assert found["configured"] == {"first_layer": "binary", "order": "degree"}
    rows = {(row["first_layer"], row["order"], row["widths"]): row for row in found["rows"]}
    accountings, orders = ("binary", "as_learned"), ("degree", "bits", "none")
    assert list(rows) == [(a, o, w) for a in accountings for o in orders for w in widths]
    for (first_layer, order, name), row in rows.items():
        chosen = replace(config, first_layer=first_layer, order=order)
        total = simulate(widths[name], chosen).total
        for key in ("update_cycles", "aggregation_cycles", "stall_cycles", "total_cycles", "energy_pj"):
            assert row[key] == getattr(total, key)
        for base in found["baselines"]:
            other = simulate(widths[base], chosen).total
            assert row["speedup"][base] == other.total_cycles / total.total_cycles
            assert row["compute_speedup"][base] == other.compute_cycles / total.compute_cycles
            assert row["energy_ratio"][base] == sum(other.energy_pj.values()) / sum(total.energy_pj.values())
    assert all(rows[a, o, n]["speedup"][n] == 1 for a in accountings for o in orders for n in found["baselines"])


def test_speedups_by_hand() -> None:
    # 512 rows in two phases, half of them 1 bit and half 3: sorted by bits 3 + 1 = 4 cycles a column, else 3 + 3; INT4 takes 4 + 4, INT8 8 + 8.
    bits = np.tile([1, 3], 256)
    workload = Workload(np.zeros(513, int), np.zeros(0, int), [Layer(16, 5, bits, "linear", binary_input=True)])
    speedups = {
        (row["first_layer"], row["order"]): row["compute_speedup"]
        for row in report.comparison(workload)["rows"]
        if row["widths"] == "given"
    }
    as_given = {order: {"INT4": 8 / c, "INT8": 16 / c} for order, c in (("degree", 6), ("bits", 4), ("none", 6))}
    same = {"INT4": 1, "INT8": 1}  # the binary input is charged 1 bit on both sides
    assert speedups == {("binary", order): same for order in as_given} | {
        ("as_learned", order): ratios for order, ratios in as_given.items()
    }


def test_configured_accounting_is_compared_too() -> None:
    found = report.comparison(golden.workload(), Config(first_layer="4"), baselines=())
    assert list(dict.fromkeys(row["first_layer"] for row in found["rows"])) == ["binary", "as_learned", "4"]
    assert {row["widths"] for row in found["rows"]} == {"given"}
    assert all(row["speedup"] == {} for row in found["rows"])


# Files


def test_written_files_are_the_same_everywhere(tmp_path: Path) -> None:
    first, second = (report.write(tmp_path / place, document()) for place in ("a", "b/c"))
    assert [path.name for path in first] == [path.name for path in second]
    assert len(first) == 10
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(path.name for path in first)
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def test_columns_of_the_layers_sum_to_the_totals(tmp_path: Path) -> None:
    found = document(input_buffer=32)
    report.write(tmp_path, found, plots=False)
    assert not list(tmp_path.glob("*.svg"))
    lines, total = rows_of(tmp_path / "layers.csv"), report.flat(found["total"])
    assert [line["name"] for line in lines] == [layer["name"] for layer in found["layers"]]
    summed = [key for key, value in total.items() if isinstance(value, int) and key not in ("f_in", "f_out")]
    assert {"update_cycles", "stall_cycles", "traffic_sram_read_graph", "traffic_dram_write_operand"} <= set(summed)
    for key in summed:
        assert sum(int(line[key]) for line in lines) == total[key], key
    for part in found["total"]["energy_pj"]:
        energies = [float(line[f"energy_pj_{part}"]) for line in lines]
        assert sum(energies) == total[f"energy_pj_{part}"]  # printed in full, added in the same order


def test_comparison_as_csv(tmp_path: Path) -> None:
    found = document()
    report.write(tmp_path, found, plots=False)
    lines = rows_of(tmp_path / "comparison.csv")
    assert [float(line["speedup_INT4"]) for line in lines] == [
        row["speedup"]["INT4"] for row in found["comparison"]["rows"]
    ]
    assert {"energy_pj_sram_leakage", "energy_ratio_INT8", "update_utilisation"} <= set(lines[0])


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        report.write(tmp_path / "file/out", document(), plots=False)


# Markdown


def test_markdown_tables_are_aligned_and_complete() -> None:
    found = document()
    text = report.markdown(found)
    blocks = [block.split("\n") for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) == 10
    for block in blocks:
        assert len({len(line) for line in block}) == 1
        assert len({line.count("|") for line in block}) == 1
    for note in found["notes"]:
        assert f"- {note}\n" in text
    total = f"{found['total']['total_cycles']:,}"
    assert any(line.startswith("| total ") and f" {total} |" in line for line in blocks[0])
    assert "## Comparison" in text
    workload = golden.workload()
    assert "## Comparison" not in report.markdown(report.to_dict(simulate(workload), workload))


def test_names_do_not_break_tables() -> None:
    workload = Workload(np.zeros(2, int), np.zeros(0, int), [Layer(1, 1, 1, "linear", name="a|b")])
    text = report.markdown(report.to_dict(simulate(workload), workload))
    assert "| 0 a\\|b | linear |" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234.5, "1234 s"), (2.5, "2.5 s"), (0.00123, "1.23 ms"), (4e-6, "4 µs"), (7.5e-9, "7.5 ns"), (0.0, "0 ps")],
)
def test_prefixes(value: float, text: str) -> None:
    assert report._si(value, "s") == text


# Plots


def test_plots_are_svg_and_need_a_comparison_for_some() -> None:
    found = document()
    drawn = plots.svgs(found)
    layers = ["cycles.svg", "energy.svg", "utilisation.svg"]
    assert list(drawn) == [*layers, "speedup.svg", "order_cycles.svg", "compared_energy.svg"]
    texts = {name: "".join(ElementTree.fromstring(svg).itertext()) for name, svg in drawn.items()}
    assert all(layer["name"] in texts["cycles.svg"] for layer in found["layers"])
    assert "over INT4" in texts["speedup.svg"]
    assert "bits as given" in texts["order_cycles.svg"]
    assert list(plots.svgs({key: value for key, value in found.items() if key != "comparison"})) == layers


def test_orders_are_drawn_without_baselines() -> None:
    found = {"layers": [], "comparison": report.comparison(golden.workload(), baselines=())}
    assert "speedup.svg" not in plots.svgs(found)


def test_bars_stack_to_the_totals() -> None:
    found, figure = document(hbm_gbs=1), Figure()
    plots._cycles(found["layers"], figure)
    (axes,) = figure.axes
    heights = np.array([[bar.get_height() for bar in bars] for bars in axes.containers])
    # update (attention apart), attention, aggregation and stalls: integers far below 2^53, so the sums are exact
    assert heights.shape == (4, 5)
    assert heights.sum(0).tolist() == [layer["total_cycles"] for layer in found["layers"]]
    tops = np.array([[bar.get_y() for bar in bars] for bars in axes.containers])
    assert (tops[1:] == np.cumsum(heights, 0)[:-1]).all()
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > heights.sum(0).max(), "the tallest bar meets the frame"


def test_report_loads_matplotlib_for_plots_only() -> None:
    code = "import sys, qgnn.accel.report, qgnn.accel.plots, qgnn.accel.trace; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# Trace


def stages(workload: Workload, layer: Layer, config: Config) -> list[tuple[str, int, list[int], Any, Any]]:
    """Of every stage in its order: name, columns, rows in their order, and cycles and useful work of a group of rows."""
    nodes, macs, serial = workload.num_nodes, config.macs, config.agg_serial
    degrees = [int(d) for d in np.diff(workload.indptr)]
    bits = [int(b) for b in charged_bits(layer, nodes, config)]
    by_degree = sorted(range(nodes), key=lambda i: (-degrees[i], i))
    by_bits = sorted(range(nodes), key=lambda i: (-bits[i], i))
    rows = {"degree": by_degree, "bits": by_bits, "none": list(range(nodes))}[config.order]
    filled = [i for i in (range(nodes) if config.order == "none" else by_degree) if degrees[i]]
    constants = config.fill_cycles + config.requantize_cycles
    searched = constants + (config.search_cycles if layer.nns_groups else 0)
    channels = layer.f_out // layer.heads
    update = (
        *("update", layer.f_out, rows),
        lambda group: max(bits[i] for i in group) * -(-layer.f_in // macs) + searched,
        lambda group: sum(bits[i] for i in group) * layer.f_in,
    )
    attention = (
        *("attention", 2 * layer.heads, rows),
        lambda group: -(-channels // macs) * serial,
        lambda group: len(group) * channels * serial,
    )
    aggregation = (
        *("aggregation", layer.columns, filled),
        lambda group: max(-(-degrees[i] // macs) for i in group) * serial + constants,
        lambda group: sum(degrees[i] for i in group) * serial,
    )
    return {
        "gcn": [update, aggregation],
        "gat": [update, attention, aggregation],
        "linear": [update],
        "gin": [aggregation, update],
        "sage": [aggregation, update],
    }[layer.kind]


def loops(workload: Workload, config: Config) -> list[list[Any]]:
    """The lines of a trace, written from the definitions."""
    lines: list[list[Any]] = []
    start = 0
    for number, layer in enumerate(workload.layers):
        for stage, columns, rows, cycles, useful in stages(workload, layer, config):
            groups = [rows[first : first + config.pes] for first in range(0, len(rows), config.pes)]
            for column in range(columns):
                for index, group in enumerate(groups):
                    lines.append([number, stage, column, index, len(group), cycles(group), start, useful(group)])
                    start += cycles(group)
    return lines


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    nodes = draw(st.integers(1, 14))
    degrees = draw(st.lists(st.integers(0, 9), min_size=nodes, max_size=nodes))
    indptr = np.concatenate(([0], np.cumsum(degrees, dtype=int)))
    layers = []
    for kind in draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=3)):
        heads = draw(st.integers(1, 3)) if kind == "gat" else 1
        bits = draw(st.lists(st.integers(0, 8), min_size=nodes, max_size=nodes))
        layers.append(
            Layer(
                draw(st.integers(1, 9)),
                heads * draw(st.integers(1, 4)),
                None if draw(st.integers(0, 4)) == 0 else np.array(bits),
                kind,
                heads,
                draw(st.sampled_from((0, 7))),
                draw(st.booleans()),
            )
        )
    return Workload(indptr, np.zeros(indptr[-1], int), layers)


configs = st.builds(
    Config,
    pes=st.integers(1, 6),
    macs=st.integers(1, 5),
    order=st.sampled_from(("degree", "bits", "none")),
    agg_serial=st.sampled_from((1, 4)),
    first_layer=st.sampled_from(("binary", "as_learned", "4")),
    fill_cycles=st.integers(0, 2),
    requantize_cycles=st.integers(0, 2),
    search_cycles=st.integers(0, 2),
)


@settings(max_examples=60, deadline=None)
@given(workloads(), configs)
def test_trace_is_the_simulation_phase_by_phase(tmp_path_factory, workload: Workload, config: Config) -> None:
    path = tmp_path_factory.mktemp("trace") / "trace.csv"
    count = write_trace(workload, config, path)
    with path.open(encoding="utf-8", newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["layer", "stage", "column", "group", "rows", "cycles", "start", "useful"]
    assert lines == [[str(cell) for cell in line] for line in loops(workload, config)]
    assert count == len(lines)
    sums: dict[tuple[int, str], int] = {}
    for number, stage, _, _, _, cycles, _, _ in lines:
        sums[int(number), stage] = sums.get((int(number), stage), 0) + int(cycles)
    result = simulate(workload, config)
    for number, layer in enumerate(result.layers):
        attention = sums.get((number, "attention"), 0)
        assert attention == layer.attention_cycles
        assert sums.get((number, "update"), 0) + attention == layer.update_cycles
        assert sums.get((number, "aggregation"), 0) == layer.aggregation_cycles
    assert sum(sums.values()) == result.total.compute_cycles


@pytest.mark.parametrize("sync", ["async", "ideal"])
def test_a_trace_needs_phases(sync: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f'a trace needs sync "lockstep", got "{sync}"'):
        write_trace(golden.workload(), load_config(sync=sync), tmp_path / "trace.csv")
    assert not (tmp_path / "trace.csv").exists()


def test_trace_is_not_held_in_memory(tmp_path: Path) -> None:
    nodes, columns = 50, 1000
    workload = Workload(np.zeros(nodes + 1, int), np.zeros(0, int), [Layer(8, columns, 4, "linear")])
    tracemalloc.start()
    count = write_trace(workload, Config(pes=1), tmp_path / "trace.csv")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == nodes * columns
    assert (
        tmp_path / "trace.csv"
    ).stat().st_size > 5 * peak  # one column is 1/1000 of it; the file's buffer is a few KB
