"""What docs/accelerator.md shows runs, and its table of keys is that of the code."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qgnn import accel, cli

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/accelerator.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^(qgnn .*?)(?: +#.*)?$", PAGE, re.MULTILINE)


def block(language: str) -> str:
    return "".join(re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))


def test_the_table_lists_every_key_with_its_default_and_unit() -> None:
    shown = {}
    table = PAGE[PAGE.index("| key | default | unit | |") :].split("\n\n")[0]
    for line in table.splitlines()[2:]:
        names, defaults, units = (cell.strip() for cell in line.split("|")[1:4])
        keys = re.findall(r"`(\w+)`", names)
        of_each = units.split(", ") if ", " in units else [units] * len(keys)
        shown |= dict(zip(keys, zip(defaults.split(", "), of_each, strict=True), strict=True))
    values = accel.Config().to_dict()
    assert shown == {key: (str(values[key]), unit) for key, _, unit, _ in accel.Config().describe()}


def test_the_program_runs(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block("python"), "docs/accelerator.md", "exec"), {})
    assert float(capsys.readouterr().out.rsplit(":", 1)[1]) > 0.9


def test_the_configuration_loads(tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text(block("toml"))
    config = accel.load_config("small", file=file)
    assert (config.pes, config.order, config.sram.leakage_w) == (64, "bits", 4.4)


def test_the_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, as each uses what the one before left; shorter, and with the name of the file that is there."""
    monkeypatch.chdir(tmp_path)
    seen = set()
    for command in dict.fromkeys(COMMANDS):
        arguments = shlex.split(command)[1:]
        seen.add(arguments[0])
        if arguments[0] == "train":
            arguments += ["--epochs", "3", "--set", "warmup=3"]
        (model,) = map(str, Path("out/digits/models").glob("*.safetensors")) if "NAME" in command else [""]
        arguments = [a if "NAME" not in a else model for a in arguments]
        result = CliRunner().invoke(cli.app, arguments)
        assert result.exit_code == 0, (command, result.stderr)
    assert seen == {"train", "simulate", "energy"}
    assert Path("out/accel/report.json").is_file() and Path("out/sweep/sweep.csv").is_file()
