"""The page of a folder of runs: what it shows, that it stands alone, and the traces it is drawn from."""

import copy
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch_geometric.data import Data
from typer.testing import CliRunner, Result

from qgnn import cli
from qgnn.data import load
from qgnn.graph import Graph
from qgnn.nn import GINConv, Linear
from qgnn.qtensor import rounded_bits
from qgnn.quant import parse, reset_usage
from qgnn.quant.a2q import learned_layers
from qgnn.quant.nns import GroupQuantizer
from qgnn.recipes import recipe_for
from qgnn.report import CURVE_POINTS, page, summaries
from qgnn.results import read
from qgnn.trace import collect_trace, read_traces, write_trace
from qgnn.train import Run, train

SECTIONS = (
    *("Summary", "Printed in the papers, and ours", "Accuracy against bits", "Learned width against in-degree"),
    *("Aggregated magnitude against in-degree", "Training curves", "Frozen models", "All runs"),
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def command(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(cli.app, list(arguments))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.stderr
    return result


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of fp32 and of a2q, three quantized epochs each, and a table of a paper."""
    out = tmp_path_factory.mktemp("runs")
    for scheme in ("fp32", "a2q"):
        command("train", "--dataset", "digits", "--scheme", scheme, "--epochs", "3", "--seeds", "2", "--out", str(out))
    (out / "a2q-1.csv").write_text("row,printed,printed_sd,test_acc\ngcn-cora-a2q,80.9,0.6,81.25\n", encoding="utf-8")
    return out


@pytest.fixture(scope="module")
def text(runs: Path) -> str:
    return page(runs)


@pytest.fixture
def folder(runs: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(runs, tmp_path / "copy"))


@pytest.fixture(scope="module")
def trained() -> Run:
    dataset = load("digits")
    recipe = recipe_for("gcn", parse("a2q"), dataset).changed(3, None, {})
    return train(dataset, "gcn", "a2q", 0, recipe=recipe)


class _Page(HTMLParser):
    """Texts and numbers of plots by the heading they stand under; fails on tags that do not match."""

    VOID = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.plots: dict[str, int] = {}
        self.heading = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "svg":
            self.plots[self.heading] = self.plots.get(self.heading, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["h2"]:
            self.heading = data
        if data.strip() and self.open[-1] != "style":
            self.texts.setdefault(self.heading, []).append(data.strip())


# The page


def test_page_shows_every_section_with_its_plots_and_numbers(runs: Path, text: str) -> None:
    shown = _Page(text)
    assert tuple(shown.texts)[1:] == SECTIONS
    # 1 data set; 2 layers that learn widths; 2 schemes x 2 convolutions; 2 schemes
    assert shown.plots == dict(zip(SECTIONS[2:6], (1, 2, 4, 2), strict=True))
    first, second = (r["test_acc"] for r in read(runs / "results.jsonl") if r["scheme"] == "a2q")
    summary = shown.texts["Summary"]
    assert summary[summary.index("digits gcn a2q") + 1 :][:2] == ["accuracy, %", "2"]
    assert f"{(first + second) / 2:.2f} ± {abs(first - second) / 2**0.5:.2f}" in summary
    assert shown.texts["Printed in the papers, and ours"][-3:] == ["gcn-cora-a2q", "80.9 ± 0.6", "81.25"]
    assert {"gcn fp32", "gcn a2q", "average bits"} <= set(shown.texts["Accuracy against bits"])
    assert {"epoch", "loss", "bits"} <= set(shown.texts["Training curves"])
    assert "4 runs" in shown.texts["All runs"]
    models = shown.texts["Frozen models"]
    assert models[1] == "2 models"
    assert sum(text.endswith(".safetensors") for text in models) == 2


def test_page_is_one_small_file_that_loads_nothing(text: str) -> None:
    assert not re.search(r"https?:|//|\bsrc=|@import|<(script|link|img|iframe|object|embed)\b", text)
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', text))
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert "default-src 'none'" in text
    assert len(text) < 300_000, "nine plots; a folder of a whole table of a paper has ten times as many"


def test_long_training_does_not_make_a_large_plot(folder: Path, text: str) -> None:
    for path in (folder / "traces").iterdir():
        trace = json.loads(path.read_text(encoding="utf-8"))
        row = trace["curve"][-1]
        trace["curve"] = [{**row, "epoch": epoch, "val": 50 + epoch % 7} for epoch in range(20 * CURVE_POINTS)]
        write_trace(path, trace)
    # 2 plots of 4 lines and 3 bands, which go there and back, of 150 points of at most 24 bytes
    assert len(page(folder)) - len(text) < 2 * (4 + 2 * 3) * CURVE_POINTS * 24


def test_runs_of_other_settings_are_kept_apart(folder: Path) -> None:
    command("train", "--dataset", "digits", "--scheme", "fp32", "--epochs", "3", "--hidden", "8", "--out", str(folder))
    rows = {row["run"]: row["seeds"] for row in summaries(folder)}
    usual = read(folder / "results.jsonl")[0]["recipe"]["hidden"]
    assert rows == {f"digits gcn fp32 hidden={usual}": 2, "digits gcn a2q": 2, "digits gcn fp32 hidden=8": 1}


def test_missing_pieces_say_which_command_gives_them(folder: Path) -> None:
    for name in ("traces", "models"):
        shutil.rmtree(folder / name)
    (folder / "a2q-1.csv").unlink()
    shown = _Page(page(folder))
    assert shown.plots == {"Accuracy against bits": 1}
    for section in (*SECTIONS[3:7], SECTIONS[1]):
        (sentence,) = shown.texts[section][1:]
        assert re.search(r"qgnn (train|reproduce) .*--out DIR", sentence), section


def test_damaged_files_cost_no_more_than_themselves(folder: Path, text: str) -> None:
    whole = _Page(text)
    good = json.loads((folder / "results.jsonl").read_text(encoding="utf-8").splitlines()[0])
    changes: list[dict[str, Any]] = [{"test_acc": "high"}, {"model": None}, {"metric": []}, {"seed": [0]}]
    bad = [{"dataset": "digits"}, *({**good, **change} for change in changes)]
    with (folder / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write("".join(f"{json.dumps(record)}\n" for record in bad) + json.dumps(good)[:50])
    one = next((folder / "traces").iterdir())
    trace = json.loads(one.read_text(encoding="utf-8"))
    for name, content in {
        "no-json": "{",
        "a-list": "[]",
        "no-curve": json.dumps({**trace, "curve": None}),
        "rows": json.dumps({**trace, "curve": [1, 2]}),
        "words": json.dumps({**trace, "widths": [{"bits": "many"}]}),
        "stranger": json.dumps({**trace, "record": {"dataset": "unknown"}}),
    }.items():
        (folder / "traces" / f"{name}.json").write_text(content, encoding="utf-8")
    (folder / "models" / "cut.safetensors").write_bytes(b"\x08")
    (folder / "empty.csv").touch()
    shown = _Page(page(folder))
    assert "Left out: 5 damaged records, 2 damaged traces." in shown.texts[""]
    assert shown.plots == whole.plots
    assert shown.texts["Summary"] == whole.texts["Summary"]
    assert "cannot be read" in shown.texts["Frozen models"]
    assert "empty.csv cannot be read; qgnn reproduce writes it anew." in shown.texts["Printed in the papers, and ours"]


def test_texts_are_escaped_and_are_no_formulas(folder: Path) -> None:
    name, model = '<script>alert("&")</script>', "$x_1$"
    for path in (folder / "results.jsonl", *(folder / "traces").iterdir()):
        content = path.read_text(encoding="utf-8").replace('"digits"', json.dumps(name))
        path.write_text(content.replace('"gcn"', json.dumps(model)), encoding="utf-8")
    (folder / "x.csv").write_text("<b>,<i>\n<u>,&amp;\n", encoding="utf-8")
    text = page(folder)
    assert "<script" not in text
    shown = _Page(text)
    assert f"{name} {model} a2q" in shown.texts["Summary"]
    assert f"{model} a2q" in shown.texts["Accuracy against bits"]
    assert shown.texts["Printed in the papers, and ours"][-4:] == ["<b>", "<i>", "<u>", "&amp;"]


def test_page_opens_in_a_browser(text: str, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    path = tmp_path / "page.html"
    path.write_text(text, encoding="utf-8")
    switches = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom")
    done = subprocess.run([browser, *switches, path.as_uri()], capture_output=True, text=True, timeout=60, check=True)
    shown = _Page(done.stdout)
    assert tuple(shown.texts)[1:] == SECTIONS
    assert sum(shown.plots.values()) == 9
    assert "Refused to" not in done.stderr, "the page keeps to its own policy"


# The command


def test_command_writes_the_page_and_its_table(folder: Path, tmp_path: Path) -> None:
    result = command("report", str(folder))
    written = folder / "report.html"
    assert result.stdout.split() == ["wrote", str(written)]
    assert result.stderr == "", "no progress bar where there is no terminal"
    target = tmp_path / "other.html"
    target.write_text("earlier", encoding="utf-8")
    table = command("report", str(folder), "--out", str(target), "--json", "-")
    assert target.read_text(encoding="utf-8") == written.read_text(encoding="utf-8")
    rows = [json.loads(line) for line in table.stdout.splitlines()]
    assert [(row["run"], row["seeds"]) for row in rows] == [("digits gcn fp32", 2), ("digits gcn a2q", 2)]
    assert [p.name for p in folder.iterdir() if p.suffix == ".tmp"] == []


def test_command_helps_with_an_example() -> None:
    text = command("report", "--help").stdout
    assert "Example: qgnn report " in text
    assert "--json" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["no/such/folder"], "there is no folder no/such/folder; qgnn train --out DIR fills one"),
        (["empty"], "empty has no results.jsonl with a finished run; qgnn train --out empty writes it"),
        (["copy", "--out", "no/such/page.html"], "the folder does not exist; make it first"),
        (["copy", "--out", "empty"], "--out empty is a folder; name a file"),
        (["copy", "--json", "no/such/table.json"], "the folder does not exist; make it first"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], says: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    result = command("report", *arguments, code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("qgnn: ")
    assert result.stderr.count("\n") == 1
    assert says in result.stderr
    assert not list(folder.glob("*.html*"))


# Traces


def test_trace_counts_every_node_once_and_keeps_the_model_as_it_was(trained: Run) -> None:
    before = copy.deepcopy(trained.model.state_dict())
    trace = collect_trace(trained)
    after = trained.model.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items() if isinstance(v, torch.Tensor))
    degree = Graph.from_data(trained.data).in_degree.double()
    quantizers = list(learned_layers(trained.model))
    layers = {row["layer"]: [r for r in trace["widths"] if r["layer"] == row["layer"]] for row in trace["widths"]}
    assert list(layers) == ["convs.0", "convs.1"]
    for quantizer, rows in zip(quantizers, layers.values(), strict=True):
        widths = rounded_bits(quantizer.bits)
        assert [row["bits"] for row in rows] == sorted(set(widths.tolist()))
        for row in rows:
            mine = widths == row["bits"]
            assert row["nodes"] == int(mine.sum())
            assert row["in_degree"] == pytest.approx(float(degree[mine].mean()), rel=1e-12)


def test_trace_has_the_output_of_a_convolution_by_in_degree(trained: Run) -> None:
    rows = [row for row in collect_trace(trained)["aggregated"] if row["layer"] == "convs.1"]
    degree = Graph.from_data(trained.data).in_degree
    with torch.no_grad():
        out = trained.model(trained.data.x, trained.data.edge_index).abs().double()
    assert sum(row["nodes"] for row in rows) == degree.numel()
    for row in rows:
        assert row["high"] == 2 * row["low"] - 1
        group = out[(degree >= row["low"]) & (degree <= row["high"])]
        assert row["nodes"] == len(group)
        # sums of fewer than 1e5 float64 in another order
        assert row["mean"] == pytest.approx(float(group.mean()), rel=1e-10)
        assert row["deviation"] == pytest.approx(float(group.std(correction=0)), rel=1e-6)


def test_trace_has_the_training_curve(trained: Run) -> None:
    curve = collect_trace(trained)["curve"]
    recipe, record = trained.record["recipe"], trained.record
    assert [row["epoch"] for row in curve] == list(range(recipe["warmup"] + recipe["epochs"]))
    best = curve[recipe["warmup"] + record["best_epoch"]]
    assert (best["val"], best["test"]) == (record["val_acc"], record["test_acc"])
    assert all(row["loss"] > 0 for row in curve)
    assert curve[0]["bits"] is None, "nothing is quantized in the warm-up"
    assert 0 < curve[-1]["bits"] <= 8


def _run(model: nn.Module, data: Data) -> Any:
    """What collect_trace asks of a run, without a training."""
    task = SimpleNamespace(evaluate=lambda network: network(data.x, data.edge_index))
    return SimpleNamespace(model=model, record={}, curve=[], task=task)


def _star() -> Data:
    """Nodes 1 to 5 point at node 0, and node 0 at node 1: in-degrees 5, 1, 0, 0, 0, 0."""
    edges = torch.tensor([[1, 2, 3, 4, 5, 0], [0, 0, 0, 0, 0, 1]])
    return Data(x=torch.arange(1.0, 13.0).view(6, 2), edge_index=edges)


@pytest.mark.parametrize("width", [1, 3])
def test_trace_has_what_the_update_function_of_gin_reads(width: int) -> None:
    """Also where the first product runs before the sum, because it makes the map narrower; then it is what follows that product."""
    data = _star()
    linear = Linear(2, width)
    conv = GINConv(nn.Sequential(linear, nn.ReLU()))
    rows = collect_trace(_run(conv, data))["aggregated"]
    summed = data.x.clone().index_add_(0, data.edge_index[1], data.x[data.edge_index[0]])
    with torch.no_grad():
        values = (linear(summed) if width == 1 else summed).abs()
    groups = {(0, 0): values[2:], (1, 1): values[1:2], (4, 7): values[:1]}
    assert [(row["low"], row["high"]) for row in rows] == list(groups)
    for row, group in zip(rows, groups.values(), strict=True):
        assert row["nodes"] == len(group)
        # float32 sums of a dozen products in another order: each within 12 roundings of 2^-24 of terms below 100
        assert row["mean"] == pytest.approx(float(group.mean()), abs=12 * 2**-24 * 100)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("sequential", [True, False])
def test_trace_of_a_gin_with_ranges(width: int, sequential: bool) -> None:
    """Not the values that a quantizer inside the update function sees."""
    data = _star()
    linear = Linear(2, width, scheme="dq-int8")
    conv = GINConv(nn.Sequential(linear, nn.ReLU()) if sequential else linear, scheme="dq-int8")
    rows = collect_trace(_run(conv, data))["aggregated"]
    assert [(row["low"], row["nodes"]) for row in rows] == [(0, 4), (1, 1), (4, 1)]


def test_trace_has_the_widths_that_groups_give_to_nodes() -> None:
    data = _star()
    conv = GINConv(nn.Sequential(Linear(2, 3, scheme="a2q-nns"), nn.ReLU()), scheme="a2q-nns")
    conv.eval()
    reset_usage(conv)
    conv(data.x, data.edge_index)
    (quantizer,) = (m for m in conv.modules() if isinstance(m, GroupQuantizer))
    usage = quantizer.usage.clone()
    rows = collect_trace(_run(conv, data))["widths"]
    assert sum(row["nodes"] for row in rows) == 6
    assert sum(row["nodes"] * row["in_degree"] for row in rows) == pytest.approx(6)
    widths = rounded_bits(quantizer.bits).repeat_interleave(usage)
    assert {row["bits"]: row["nodes"] for row in rows} == {b: int((widths == b).sum()) for b in set(widths.tolist())}
    assert torch.equal(quantizer.usage, usage), "counting goes on in a copy"


def test_traces_are_written_whole_and_read_back(tmp_path: Path) -> None:
    trace = {"record": {"seed": 0}, "curve": [{"loss": float("nan"), "val": 1.5}], "widths": [], "aggregated": []}
    write_trace(tmp_path / "new" / "a.json", trace)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.json"]
    (found,) = read_traces(tmp_path / "new")
    assert found == {**trace, "curve": [{"loss": None, "val": 1.5}]}
    assert read_traces(tmp_path / "nowhere") == []
