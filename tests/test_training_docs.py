"""What docs/training.md and docs/sweep.md show runs: the commands in their order, shorter, on the embedded data."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qgnn import cli, quant
from qgnn.experiments.grid import load_grid

ROOT = Path(__file__).resolve().parent.parent
TRAINING = (ROOT / "docs/training.md").read_text(encoding="utf-8")
SWEEP = (ROOT / "docs/sweep.md").read_text(encoding="utf-8")


def commands(page: str) -> list[list[str]]:
    return [shlex.split(line)[1:] for line in re.findall(r"^(qgnn .*?)(?: +#.*)?$", page, re.MULTILINE)]


@pytest.mark.parametrize("arguments", commands(TRAINING), ids=" ".join)
def test_commands_on_training_run(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if arguments[0] == "train":
        arguments = [*arguments, "--epochs", "4"]
    if arguments[0] == "reproduce":
        row = '{ id = "cora-fixed-8", dataset = "digits", model = "gcn", scheme = "fixed-8", ram = 1.0, recipe = { hidden = 16 } }'
        Path("small.toml").write_text(f'title = "small"\nsource = "docs"\nkind = "memory"\nrows = [{row}]\n')
        arguments = ["reproduce", "small.toml", *arguments[2:]]
        arguments[arguments.index("--rows") + 1] = "cora-fixed-8"
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.stderr


def test_every_scheme_that_is_shown_parses() -> None:
    table = TRAINING[TRAINING.index("| name | |") :].split("\n\n")[0]
    names = re.findall(r"`([^`]+)`", " ".join(line.split("|")[1] for line in table.splitlines()[2:]))
    assert len(names) > 12
    assert all(quant.parse(name).name == name for name in names)


@pytest.mark.parametrize("text", re.findall(r"^```toml\n(.*?)^```$", SWEEP, re.MULTILINE | re.DOTALL))
def test_the_files_on_sweeps_are_read(text: str, tmp_path: Path) -> None:
    file = tmp_path / "grid.toml"
    file.write_text(text)
    assert load_grid(file).schemes
