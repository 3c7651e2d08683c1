"""What README.md shows runs, and its table tells the truth about the backends."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qgnn import cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
(EXAMPLE,) = [text for language, text in BLOCKS if language == "python"]
SHELL = "".join(text for language, text in BLOCKS if not language)
COMMANDS = re.findall(r"^(qgnn .*?)(?: +#.*)?$", SHELL, re.MULTILINE)


def test_example_has_at_most_15_lines() -> None:
    assert sum(bool(line.strip()) for line in EXAMPLE.splitlines()) <= 15


def test_example_trains_and_freezes() -> None:
    import torch

    short = EXAMPLE.replace("range(200)", "range(40)")
    assert short != EXAMPLE
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(short, "README.md", "exec"), names)
    data, frozen = names["data"], names["frozen"]
    right = frozen().argmax(1) == data.y
    assert float(right[data.test_mask].float().mean()) > 0.8
    assert frozen.report.max_relative <= 1e-4
    assert frozen.report.packed_bytes < frozen.report.fp32_bytes / 4


def test_commands_are_shown() -> None:
    shown = "train reproduce report simulate energy memory sweep results info"
    assert {command.split()[1] for command in COMMANDS} == set(shown.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As shown, but for the size: 30 epochs, one seed, and the embedded data instead of a download."""
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(command)[1:]
    if arguments[0] == "reproduce":
        row = '{ id = "gcn-cora-a2q", dataset = "digits", model = "gcn", scheme = "a2q", recipe = { epochs = 5, warmup = 5 } }'
        Path("small.toml").write_text(f'title = "small"\nsource = "README"\nrows = [{row}]\n')
        arguments[1], arguments[arguments.index("--seeds") + 1] = "small.toml", "1"
    if arguments[0] == "report":
        trained = ["train", "--dataset", "digits", "--epochs", "2", "--out", arguments[1]]
        assert CliRunner().invoke(cli.app, trained).exit_code == 0
    if arguments[0] == "energy":
        trained = ["train", "--dataset", "digits", "--epochs", "2", "--out", "out/digits"]
        assert CliRunner().invoke(cli.app, trained).exit_code == 0
        arguments[-1] = str(next(Path("out/digits/models").iterdir()))
    if arguments[0] in ("sweep", "results"):
        grid = (
            'datasets = ["digits"]\nmodels = ["gcn"]\nschemes = ["int8"]\nseeds = 1\n[recipe]\nwarmup = 1\nepochs = 1\n'
        )
        Path("grid.toml").write_text(grid)
    if arguments[0] == "results":
        assert CliRunner().invoke(cli.app, ["sweep", "grid.toml", "--out", arguments[1]]).exit_code == 0
    if arguments[0] == "train":
        arguments[arguments.index("--dataset") + 1] = "digits"
        arguments[arguments.index("--seeds") + 1] = "1"
        arguments += ["--epochs", "30"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.stderr


def test_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    shown = re.findall(r"^make (\w+)", SHELL, re.MULTILINE)
    assert set(shown) == {"demo", "test"}
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in shown)


def test_demo_runs(tmp_path: Path) -> None:
    """What `make demo` starts, as it is: in a process of its own, since it sets threads."""
    done = subprocess.run([sys.executable, ROOT / "examples/demo.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/demo_bits.png").is_file()
    for scheme in ("fp32", "dq-int8", "dq-int4", "a2q"):
        assert re.search(rf"^ *{scheme} ", done.stdout, re.MULTILINE)


def test_links_lead_somewhere() -> None:
    assert all((ROOT / target).is_file() for target in re.findall(r"\]\(([^)]+)\)", README))


@pytest.mark.parametrize(
    ("file", "functions"),
    [
        ("quantize", ["quantize", "dequantize", "fake_quantize", "fake_quantize_backward", "mask_clipped"]),
        ("affine", ["fake_quantize_affine"]),
        ("aggregate", ["aggregate", "aggregate_arg_backward", "edge_dot", "aggregate_packed", "aggregate_rows"]),
        ("matmul", ["matmul_packed", "matmul_transposed"]),
        (
            "attention",
            [
                "edge_softmax",
                "edge_softmax_backward",
                "gat_aggregate",
                "gat_backward",
                "attention_scores",
                "gat_packed",
            ],
        ),
        ("nearest", ["nearest_group", "fake_quantize_nearest", "group_sums", "quantize_nearest"]),
        ("scatter", ["segment_reduce", "segment_mul_backward", "segment_gather"]),
        ("percentile", ["tails"]),
        (
            "fixed_point",
            ["fixed_point", "fixed_point_codes", "fixed_point_pack", "fixed_point_unpack", "tighten", "loosen"],
        ),
        ("msfp", ["msfp", "msfp_pack", "msfp_unpack"]),
    ],
)
def test_every_operation_of_the_table_has_its_backends(file: str, functions: list[str]) -> None:
    for room, suffix in (("cpu.", ""), ("gpu.", ""), ("", "_reference")):
        module = importlib.import_module(f"qgnn.kernels.{room}{file}")
        assert all(callable(getattr(module, f"{name}{suffix}", None)) for name in functions), module.__name__


def test_the_page_on_integers_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/integers.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    exec(compile("".join(blocks), "docs/integers.md", "exec"), names)
    report = names["frozen"].report
    assert [layer.launches for layer in report.layers if layer.kind == "sage"] == [1, 1]
    assert sum(layer.launches for layer in report.layers) == 3 + 5
    assert all((ROOT / "docs" / target).is_file() for target in re.findall(r"\]\(([^)#]+)\)", page))
