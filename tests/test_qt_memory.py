"""What a training step is measured to need, plain emulation, ``qgnn memory``, and densities."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from torch import Tensor, nn
from typer.testing import CliRunner

from qgnn import cli, quant
from qgnn.data import Dataset, GraphDataset, load
from qgnn.experiments import compare, densities, table
from qgnn.experiments.reproduce import Plan
from qgnn.kernels.fixed_point import fixed_point as fused_fixed_point
from qgnn.kernels.msfp import msfp as fused_msfp
from qgnn.kernels.random import NEAREST
from qgnn.kernels.ranges import range_parameters
from qgnn.memory import SavedTensors, allocated_peak
from qgnn.perf import memory
from qgnn.perf.emulation import emulate, fixed_point, msfp

CPU = torch.device("cpu")
MODELS = ("gcn", "gat", "gin")
RAM = {"fp32": 10.0, "fixed-8": 25.0}
"""Figures of a table that was never printed."""


# Measuring


def test_the_peak_is_that_of_what_is_kept_at_one_time() -> None:
    x = torch.ones(1000, 10, requires_grad=True)
    with SavedTensors(owned=[x]) as found:
        x.exp().sum().backward()  # keeps its result, 40,000 bytes, and lets it go
        both = x.exp() + x.tanh()
        both.sum().backward()
        x.exp().sum().backward()
    assert found.peak == 80_000
    assert found.by_kind()["feature map"] == 80_000


def test_a_storage_counts_once_and_what_was_there_does_not() -> None:
    x, weight = torch.ones(100, 8), torch.ones(8, 4, requires_grad=True)
    with SavedTensors() as found:
        x @ weight
        h = x * 2
        out = (h @ weight) + (h[:, :] @ weight)
    assert found.peak == h.nbytes
    out.sum().backward()


class Example(nn.Module):
    """One part of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.conv = nn.Linear(32, 32), pyg.GCNConv(32, 32)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        h = F.dropout(F.relu(self.lin(x)), 0.5)
        h = self.conv(h, edge_index)
        quantized = self.lin.weight + (self.lin.weight.round() - self.lin.weight).detach()
        out: Tensor = (h @ quantized.t()) * (h > 0)
        return out


def test_layers_and_kinds() -> None:
    torch.manual_seed(0)
    n, x, edge_index = 500, torch.randn(500, 32), torch.randint(0, 500, (2, 2000))
    model = Example()
    with SavedTensors(model) as found:
        out = model(x, edge_index)
    loops = n - int((edge_index[0] == edge_index[1]).sum())
    edges = 2000 + loops + int((edge_index[0] == edge_index[1]).sum())
    expected = {
        ("", "feature map"): 2 * 4 * n * 32,  # the result of the ReLU, and h
        ("", "mask"): 4 * n * 32 + n * 32,  # dropout's, in floats, and h > 0
        ("", "weight copy"): 4 * 32 * 32,
        ("conv.lin", "feature map"): 4 * n * 32,  # what dropout left
    }
    assert {part: found.parts[part] for part in expected} == expected
    assert found.parts["conv", "graph"] >= 4 * edges + 8 * 2 * 2000  # weights and ends of the edges
    out.sum().backward()


def test_the_allocators_peak_on_a_cpu() -> None:
    def step() -> None:
        torch.ones(1_000_000)
        first = torch.ones(500_000)
        torch.ones(250_000) + first[:250_000]

    # 4 MB are let go before 2 + 1 + 1 MB are there together; small tensors of the operations come on top
    assert 4_000_000 <= allocated_peak(step, CPU) < 4_010_000


# Emulation


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_emulated_fixed_point_has_the_values_of_the_kernel(bits: int) -> None:
    torch.manual_seed(1)
    x = torch.randn(40, 33)
    scale, offset = (p.reshape(1) for p in range_parameters(*x.aminmax(), bits, True))
    theirs, ours = fixed_point(x, bits), fused_fixed_point(x, scale, offset, bits, True, NEAREST)
    # The parameters are rounded otherwise: an ulp of the quotient, up to 2^8, may turn a tie. None lies that near here.
    assert torch.allclose(theirs, ours, rtol=0, atol=float(scale) * 2**-12)
    assert theirs.unique().numel() <= 2**bits


@pytest.mark.parametrize("bits", [3, 7])
def test_emulated_msfp_has_the_values_of_the_kernel(bits: int) -> None:
    torch.manual_seed(2)
    x = torch.randn(40, 37) * torch.logspace(-20, 20, 40).unsqueeze(1)
    x[3] = 0
    assert torch.equal(msfp(x, bits), fused_msfp(x, bits, NEAREST))


@pytest.mark.parametrize("name", ["fixed-4", "msfp12"])
def test_emulation_quantizes_both_passes(name: str) -> None:
    torch.manual_seed(3)
    scheme, x, grad = quant.parse(name), torch.randn(64, 16), torch.randn(64, 8)
    layer = nn.Linear(16, 8, bias=False)
    weight = layer.weight.detach().clone()

    def q(value: Tensor) -> Tensor:
        return fixed_point(value, 4) if scheme.method == "fixed" else msfp(value, 3)

    emulated = emulate(nn.Sequential(layer), scheme)
    x.requires_grad_()
    out = emulated(x)
    out.backward(grad)
    assert torch.equal(out, F.linear(q(x), q(weight)))
    inside = x.grad != 0  # the clamp stops the gradient of what rounds beyond the last code
    assert inside.float().mean() > 0.9
    assert torch.allclose(x.grad, (q(grad) @ q(weight)) * inside, atol=1e-6)
    (given,) = (p.grad for p in emulated.parameters())
    assert torch.allclose(given, (q(grad).t() @ q(x)) * (given != 0), atol=1e-5)
    assert (given != 0).float().mean() > 0.9


def test_emulation_takes_fixed_point_and_msfp_only() -> None:
    with pytest.raises(ValueError, match="not emulated"):
        emulate(pyg.GCNConv(4, 4), quant.parse("int8"))


# Rows


@pytest.fixture(scope="module")
def digits() -> Dataset | GraphDataset:
    return load("digits")


@pytest.mark.parametrize("model", MODELS)
def test_every_scheme_keeps_less_than_fp32_and_than_emulation(digits: Dataset, model: str) -> None:
    names = ("fp32", "fixed-8", "fixed-4", "msfp16")
    found = {row["scheme"]: row for row in memory.rows(digits, model, [quant.parse(n) for n in names], 16, "cpu")}
    assert all(row["saved_ratio"] <= 1 for row in found.values())
    assert found["fixed-8"]["feature_map_ratio"] <= 0.6
    assert found["fixed-4"]["feature_map_ratio"] <= 0.45
    assert found["fixed-8"]["emulation_saved_ratio"] < 0.5 < 1 < found["fixed-8"]["emulation_fp32_ratio"]
    for row in found.values():
        kinds = [sum(kept.values()) for kept in row["layers"].values()]
        assert sum(kinds) == row["saved_bytes"] <= row["allocated_bytes"]


def test_a_schedule_is_measured_at_its_largest_width(digits: Dataset) -> None:
    schemes = [quant.parse(name) for name in ("fixed-8", "adq:4,8", "sdq:8,4", "fixed-4")]
    eight, adq, sdq, four = (row["saved_bytes"] for row in memory.rows(digits, "gcn", schemes, 16, "cpu"))
    assert four < adq == sdq == eight


def test_activation_compression_on_citeseer(citation_root: Path) -> None:
    schemes = [quant.parse(name) for name in ("fp32", "fp32/saved=int4")]
    _, row = memory.rows(load("CiteSeer", citation_root), "gcn", schemes, 128, "cpu")
    assert row["feature_map_ratio"] <= 0.25


# The command line


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, list(arguments))


def test_memory_prints_a_row_for_each_scheme(tmp_path: Path) -> None:
    target = tmp_path / "rows.jsonl"
    schemes = ("--scheme", "fp32,sdq:8,4", "--scheme", "fixed-4")
    result = run("memory", "--dataset", "digits", "--hidden", "16", "--layers", *schemes, "--json", str(target))
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["scheme"] for row in rows] == ["fp32", "sdq:8,4", "fixed-4"]
    assert {row["hidden"] for row in rows} == {16}
    for words in ("feature", "emulated", "sdq:8,4: bytes kept by each layer", "convs.1"):
        assert words in result.output


def test_names_of_schemes_are_printed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    name = "fixed-8/messages=4/weights=4/gradients=6"
    result = run("memory", "--dataset", "digits", "--hidden", "16", "--scheme", name)
    assert result.exit_code == 0, result.output
    sizes = result.output.partition("The same, as ratios")[0].splitlines()
    start = next(i for i, line in enumerate(sizes) if "──" in line) + 1
    assert "".join(line.split()[0] for line in sizes[start:] if line.strip()) == name


@pytest.mark.parametrize(
    ("option", "says"), [(("--scheme", "fixed-9"), "no scheme"), (("--model", "mlp"), "no model 'mlp'")]
)
def test_bad_input_of_memory_is_one_line(option: tuple[str, str], says: str) -> None:
    result = run("memory", "--dataset", "digits", *option)
    assert result.exit_code == 2
    assert says in result.output and result.output.count("\n") == 1


def test_a_table_of_memory_is_measured_and_not_trained(tmp_path: Path) -> None:
    file = tmp_path / "ram.toml"
    rows = [f'{{ id = "{s}", dataset = "digits", model = "gcn", scheme = "{s}", ram = {m} }}' for s, m in RAM.items()]
    file.write_text(f'title = "RAM"\nsource = "none"\nkind = "memory"\nrows = [{", ".join(rows)}]\n')
    result = run("reproduce", str(file), "--out", str(tmp_path / "out"), "--json", "-")
    assert result.exit_code == 0, result.output
    fp32, fixed = (json.loads(line) for line in result.stdout.splitlines())
    assert (fp32["printed_ratio"], fixed["printed_ratio"]) == (1, 2.5)
    assert fixed["saved_bytes"] < fp32["saved_bytes"]
    text = (tmp_path / "out" / "ram.md").read_text()
    assert "| fixed-8 | fixed-8 |" in text and "2.50" in text
    assert (tmp_path / "out" / "ram.csv").read_text().count("\n") == 3


def test_rows_of_memory_that_are_not_measured_say_why(tmp_path: Path) -> None:
    file, out = tmp_path / "ram.toml", tmp_path / "out"

    def reproduced(rows: str) -> Any:
        file.write_text(f'title = "RAM"\nsource = "none"\nkind = "memory"\nrows = [{rows}]\n')
        return run("reproduce", str(file), "--out", str(out), "--data-root", str(tmp_path))

    printed = '{ id = "a", dataset = "digits", model = "gcn", ram = 1.5, note = "unknown sizes" }'
    missing = '{ id = "b", dataset = "Cora", model = "gcn", scheme = "fp32" }'
    result = reproduced(f"{printed}, {missing}")
    assert result.exit_code == 0, result.output
    text = (out / "ram.md").read_text()
    assert "printed only |\n" in text and "data missing |\n" in text
    assert "- unknown sizes\n- data missing: " in text
    result = reproduced('{ id = "c", dataset = "digits", model = "gcn", scheme = "fp32", recipe = { layers = 3 } }')
    assert result.exit_code == 2
    assert "table ram, row c: where memory is measured, recipe takes hidden only" in result.output


@pytest.mark.parametrize(
    ("row", "ram"), [("cora-fp32", 17.56), ("cora-fixed-2", 210.6), ("pubmed-msfp16", 438.31), ("mutag-fixed-8", 11.9)]
)
def test_bqains_figures(row: str, ram: float) -> None:
    (found,) = table.load("qt-ram").select([row])
    assert found.ram == ram
    assert found.scheme is not None
    assert memory.PRINTED[found.dataset][quant.parse(found.scheme).method] == ram


# Densities


@pytest.mark.parametrize(
    ("name", "memory_density", "arithmetic_density"),
    [
        ("fp32", 1.0, 1.0),
        ("fp16", 2.0, 1.8),
        ("msfp16", 3.8, 8.8),
        ("msfp13", 5.8, 18.3),
        ("msfp12", 7.1, 31.9),
        ("fixed-8", 4.0, 7.7),
        ("fixed-4", 8.0, 20.9),
    ],
)
def test_published_densities(name: str, memory_density: float, arithmetic_density: float) -> None:
    scheme = quant.parse(name)
    assert densities.printed(scheme, "memory") == memory_density
    assert densities.arithmetic(scheme, [(scheme.bits, 10)]) == arithmetic_density
    measured = densities.memory(scheme, [(scheme.bits, 10)], 64)
    assert measured == pytest.approx(memory_density, abs=0.05)  # what the table rounds to


def test_densities_of_schedules_are_weighted_by_epochs() -> None:
    scheme = quant.parse("sdq:8,4,4")
    assert densities.arithmetic(scheme, [(8, 10), (4, 30)]) == pytest.approx((7.7 + 3 * 20.9) / 4)
    assert densities.memory(scheme, [(8, 10), (4, 30)], 64) == pytest.approx((4 + 3 * 8) / 4, rel=1e-3)
    assert densities.printed(scheme, "arithmetic") is None
    assert densities.arithmetic(scheme, [(8, 10), (6, 1)]) is None, "6 bits are not in the table"


@pytest.mark.parametrize("name", ["fixed-6", "fixed-8/grad=6", "a2q", "int8"])
def test_what_the_table_does_not_have_has_no_arithmetic_density(name: str) -> None:
    scheme = quant.parse(name)
    assert densities.arithmetic(scheme, [(scheme.bits, 1)]) is None


@pytest.mark.parametrize(("own", "shown"), [((1.5, 2.5), (1.5, 2.5)), (None, (4.0, 7.7))])
def test_a_rows_own_densities_are_printed_before_the_published_ones(
    own: tuple[float, float] | None, shown: tuple[float, float], tmp_path: Path
) -> None:
    row = table.Row("a", "digits", "gcn", "fixed-8", densities=own)
    (entry,) = compare.write(table.Table("t", "t", "s", (row,), "density"), [Plan(row)], {}, tmp_path)
    assert (entry["printed_memory_density"], entry["printed_arithmetic_density"]) == shown


def test_densities_of_a_record() -> None:
    record = {"scheme": "adq:4,8", "widths": [[4, 5], [8, 5]], "recipe": {"hidden": 32}}
    found = densities.of_record(record)
    assert found["arithmetic_density"] == pytest.approx((20.9 + 7.7) / 2)
    assert found["memory_density"] == pytest.approx(6, rel=1e-3)
    assert densities.of_record({**record, "scheme": "fp32", "widths": None}) == {
        "memory_density": 1,
        "arithmetic_density": 1,
    }
