"""Exit codes, streams, files and resuming of the command line, on real runs of a few epochs."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import qgnn
from qgnn import cli, environment

QUICK = ["train", "--dataset", "digits", "--scheme", "fp32", "--epochs", "2"]
FIELDS = {
    *("dataset", "model", "scheme", "seed", "best_epoch", "val_acc", "test_acc", "test_acc_best_over_epochs"),
    *("average_bits", "average_bits_dim", "average_bits_all", "compression", "packed_bytes", "fp32_bytes"),
    *("train_step_ms", "peak_memory_bytes"),
}


def run(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(cli.app, list(arguments))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.stderr
    return result


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def one_line(result: Result) -> str:
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("qgnn: ")
    return result.stderr


@pytest.mark.parametrize("command", ["train", "info", "simulate", "energy"])
def test_help_shows_an_example(command: str) -> None:
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", run(command, "--help").stdout).split())
    assert f"Example: qgnn {command} --" in text
    assert "--json" in text


def test_help_loads_no_heavy_library() -> None:
    code = "import sys, qgnn.cli; print({'torch', 'pandas', 'numpy', 'torch_geometric'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"


def test_json_on_stdout_is_one_record_a_seed_and_nothing_else() -> None:
    result = run(*QUICK, "--seeds", "2", "--json", "-")
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [r["seed"] for r in found] == [0, 1]
    assert all(r.keys() >= FIELDS for r in found)
    assert {(r["dataset"], r["model"], r["scheme"]) for r in found} == {("digits", "gcn", "fp32")}
    assert all(0 <= r["test_acc"] <= r["test_acc_best_over_epochs"] <= 100 for r in found)
    assert "best over epochs (the papers' protocol)" in result.stderr, "the table makes way"


def test_table_has_mean_and_deviation_over_seeds(tmp_path: Path) -> None:
    result = run(*QUICK, "--seeds", "2", "--json", str(tmp_path / "r.jsonl"))
    first, second = (r["test_acc"] for r in records(tmp_path / "r.jsonl"))
    mean, deviation = (first + second) / 2, abs(first - second) / 2**0.5
    assert re.search(rf"test accuracy, % +│ +{mean:.2f} ± {deviation:.2f}", result.stdout)
    assert result.stderr == "", "no progress bar where there is no terminal"


def test_json_file_is_replaced_only_by_a_run_that_gets_going(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text("earlier\n", encoding="utf-8")
    run("train", "--dataset", "nonsense", "--json", str(path), code=2)
    assert path.read_text(encoding="utf-8") == "earlier\n"
    run(*QUICK, "--json", str(path))
    assert [r["seed"] for r in records(path)] == [0]


def test_finished_seeds_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import qgnn.train

    trained = []
    real = qgnn.train.train

    def counted(dataset: object, model: str, scheme: str, seed: int, **more: Any) -> object:
        trained.append((scheme, seed, more["recipe"].epochs, more["recipe"].hidden))
        return real(dataset, model, scheme, seed, **more)

    monkeypatch.setattr(qgnn.train, "train", counted)
    keep = ["--out", str(tmp_path / "new" / "folder")]
    run(*QUICK, "--seeds", "1", *keep)
    second = run(*QUICK, "--seeds", "2", *keep, "--json", "-")
    assert [s for _, s, *_ in trained] == [0, 1], "seed 0 was done"
    assert [json.loads(line)["seed"] for line in second.stdout.splitlines()] == [0, 1], "and is reported all the same"
    run(*QUICK, "--seeds", "1", "--hidden", "8", *keep)
    run(*QUICK[:-1], "3", "--seeds", "1", *keep)
    kept = records(tmp_path / "new" / "folder" / "results.jsonl")
    usual = kept[0]["recipe"]["hidden"]
    assert trained[2:] == [("fp32", 0, 2, 8), ("fp32", 0, 3, usual)], "other settings are other runs"
    expected = [(0, 2, usual), (1, 2, usual), (0, 2, 8), (0, 3, usual)]
    assert [(r["seed"], r["recipe"]["epochs"], r["recipe"]["hidden"]) for r in kept] == expected


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (["--dataset", "Corra"], "there is no data set 'Corra'; choose one of Cora"),
        (["--dataset", "powerlaw:1"], "powerlaw:10000,150000"),
        (["--scheme", "int3"], "there is no scheme 'int3'; choose one of fp32"),
        (["--model", "transformer"], "transformer"),
        (["--json", "no/such/folder/f.jsonl"], "the folder does not exist"),
        (["--out", "file/below"], "the folder cannot be made"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    changed: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert says in one_line(run(*QUICK, *changed, code=2))


def test_missing_data_is_one_line_that_names_folder_and_files(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        line = one_line(run("train", "--dataset", "PubMed", "--data-root", str(tmp_path), code=2))
    finally:
        tmp_path.chmod(0o755)
    assert str(tmp_path / "PubMed" / "raw") in line
    assert "ind.pubmed.allx" in line


@pytest.mark.parametrize(
    "arguments", [["train"], [*QUICK, "--seeds", "0"], [*QUICK, "--epochs", "x"], ["train", "--bogus"], ["bogus"]]
)
def test_usage_errors_have_exit_code_2(arguments: list[str]) -> None:
    assert run(*arguments, code=2).stdout == ""


def test_run_that_fails_is_one_line_and_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    import qgnn.train

    def fail(*_: object, **__: object) -> None:
        raise qgnn.train.TrainingError("the loss became NaN\nat epoch 3")

    monkeypatch.setattr(qgnn.train, "train", fail)
    assert one_line(run(*QUICK, code=1)) == "qgnn: the loss became NaN at epoch 3\n"


def test_interrupted_run_exits_130_and_resumes(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    arguments = [*QUICK, "--out", str(tmp_path)]
    command = [sys.executable, "-c", "from qgnn.cli import main; main()", *arguments, "--seeds", "100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(1200):
            if results.exists() or process.poll() is not None:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert re.fullmatch(r"qgnn: interrupted at seed \d+; the same command again resumes there, from .*\n", stderr)
    before = records(results)
    assert [r["seed"] for r in before] == list(range(len(before)))
    run(*arguments, "--seeds", str(len(before) + 1))
    after = records(results)
    assert after[: len(before)] == before
    assert [r["seed"] for r in after[len(before) :]] == [len(before)]


# info


def test_info_reports_what_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QGNN_BACKEND", "reference")
    report = json.loads(run("info", "--json", "-").stdout)
    assert report["versions"]["torch"] == environment.version("torch")
    assert report["environment"]["QGNN_BACKEND"] == "reference"
    backends = {b["name"]: b["available"] for b in report["backends"]}
    assert set(backends) == {"triton", "cpu", "reference"}
    assert backends["cpu"]
    assert backends["reference"]
    path = tmp_path / "info.json"
    text = run("info", "--json", str(path)).stdout
    assert json.loads(path.read_text(encoding="utf-8")) == report
    for part in (report["versions"]["torch"], "Backends that run here", "Optional features", "QGNN_DATA"):
        assert part in text


def test_info_reports_triton_as_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def triton() -> dict[str, Any]:
        return next(b for b in environment.report()["backends"] if b["name"] == "triton")

    def pretend(gpus: list[dict[str, Any]], cuda: str | None) -> None:
        monkeypatch.setattr(environment, "_gpus", lambda: gpus)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", None)

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    pretend([], None)
    assert not triton()["available"]
    assert "built for CPUs only" in triton()["note"]
    pretend([], "13.0")
    assert "no GPU" in triton()["note"]
    turing = {"name": "Old", "capability": (7, 5), "memory_bytes": 2**34}
    pretend([turing], "13.0")
    assert "Old is too old" in triton()["note"]
    pretend([{**turing, "capability": (9, 0)}], "13.0")
    assert triton()["available"]
    pretend([], None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton()["available"]
    assert "interpreter" in triton()["note"]


def test_info_names_the_command_that_installs_what_is_missing() -> None:
    feature = environment.Feature("x", "y", {"a-thing": "module_that_is_not_there", "numpy": "numpy"}, "--option ")
    assert feature.missing == ["a-thing"]
    assert feature.install == "pip install --option a-thing"
    assert environment.Feature("x", "y", {"numpy": "numpy"}).install is None


def test_info_knows_the_extras_and_the_documented_variables() -> None:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    root = Path(__file__).resolve().parent.parent
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {k: {re.split("[<>=]", one)[0] for one in v} for k, v in project["optional-dependencies"].items()}
    extras = {k: v for k, v in named.items() if k != "dev"}
    assert {f.extra: set(f.modules) for f in environment.FEATURES} == extras
    documented = re.findall(
        r"^\| `([A-Z_]+)` \|", (root / "docs/environment.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert set(documented) == set(environment.VARIABLES)


def test_entry_point_is_main(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from qgnn.cli import main; main()", "info", "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=dict(os.environ), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["versions"]["python"] == sys.version.split()[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train"], "Missing option '--dataset'"),
        (["train", "--dataset", "digits", "--seeds", "0"], "--seeds"),
        (["train", "--dataset", "digits", "--device", "tpu"], "--device"),
        (["train", "--dataset", "digits", "--set", "lr=-1"], "lr must be at least 0"),
        (["train", "--dataset", "digits", "--set", "lr"], "--set takes KEY=VALUE"),
        (["nothing"], "nothing"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(
    arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["qgnn", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("qgnn: ") and error.count("\n") == 1 and says in error


def test_a_folder_takes_one_train_at_a_time(tmp_path: Path) -> None:
    import fcntl

    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another qgnn train, reproduce or sweep is running in" in one_line(
            run(*QUICK, "--out", str(tmp_path), code=2)
        )
    run(*QUICK, "--out", str(tmp_path))


def test_the_integer_model_is_reported_and_kept(tmp_path: Path) -> None:
    quick = [
        "train",
        "--dataset",
        "digits",
        "--scheme",
        "a2q",
        "--epochs",
        "2",
        "--hidden",
        "8",
        "--out",
        str(tmp_path),
    ]
    result = run(*quick)
    assert "integer model of seed 0" in result.stdout and "convs.1: steps of the weight" in result.stdout
    (record,) = records(tmp_path / "results.jsonl")
    assert record["integer_mismatches"] <= record["integer_ties"]
    (path,) = (tmp_path / "models").iterdir()
    data = qgnn.data.load("digits").data
    out = qgnn.load(path)(data.x, data.edge_index)
    right = (out.argmax(1) == data.y)[data.test_mask].double().mean()
    assert float(right) * 100 == pytest.approx(record["integer_test_acc"])


def test_every_fold_is_trained_and_none_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    import qgnn.data

    whole = qgnn.data.load("digits-superpixels")
    assert isinstance(whole, qgnn.data.GraphDataset)
    order = torch.arange(30)
    folds = tuple(qgnn.data.Split(o[:20], o[20:25], o[25:]) for o in (order, order.roll(10), order.roll(20)))
    monkeypatch.setattr(qgnn.data, "load", lambda *_: dataclasses.replace(whole, splits=folds))
    quick = ["train", "--dataset", "any", "--model", "gin", "--scheme", "int8", "--epochs", "1", "--hidden", "4"]
    run(*quick, "--folds", "1", "--out", str(tmp_path))
    result = run(*quick, "--seeds", "2", "--out", str(tmp_path))
    found = records(tmp_path / "results.jsonl")
    assert [(r["seed"], r["fold"]) for r in found] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    mean = sum(r["test_acc"] for r in found) / 6
    assert re.search(rf"test accuracy, % +│ +{mean:.2f} ± ", result.stdout)
    assert re.search(r"runs: seeds x folds +│ +6 ", result.stdout)
    assert "asks for more folds than digits-superpixels has, 3" in one_line(run(*quick, "--folds", "4", code=2))
