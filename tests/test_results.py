"""JSON lines that survive crashes, and their summary."""

import json
import logging
import math
import os
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qgnn.results import append, read, summary


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out" / "results.jsonl"


def record(seed: int, scheme: str = "a2q", **more: object) -> dict[str, object]:
    return {"dataset": "Cora", "model": "gcn", "scheme": scheme, "seed": seed, **more}


def test_records_come_back_in_order_one_a_line(path: Path) -> None:
    records = [record(seed, note="two\nlines, ±") for seed in range(3)]
    for r in records:
        append(path, r)
    assert read(path) == records
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == records


def test_a_missing_file_holds_no_records(path: Path) -> None:
    assert read(path) == []


@pytest.mark.parametrize("kept", [1, 20, -1])
def test_a_line_cut_off_by_a_crash_costs_only_itself(path: Path, kept: int, caplog: pytest.LogCaptureFixture) -> None:
    append(path, record(0))
    whole = path.stat().st_size
    append(path, record(1))
    second = path.stat().st_size - whole
    os.truncate(path, whole + (second - 2 if kept == -1 else kept))
    with caplog.at_level(logging.WARNING):
        assert read(path) == [record(0)]
    assert f"{path}, line 2" in caplog.text
    append(path, record(2))
    assert read(path) == [record(0), record(2)]


def test_a_line_that_lost_only_its_newline_is_kept(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    append(path, record(0))
    os.truncate(path, path.stat().st_size - 1)
    assert read(path) == [record(0)]
    append(path, record(1))
    assert read(path) == [record(0), record(1)]
    assert caplog.text == ""


@pytest.mark.parametrize("line", [b"[1, 2]\n", b"7\n", b"\xff\xfe\x00\n", b"\0\0\0\0"])
def test_foreign_lines_are_left_out(path: Path, line: bytes) -> None:
    append(path, record(0))
    with path.open("ab") as file:
        file.write(line)
    append(path, record(1))
    assert read(path) == [record(0), record(1)]


def test_a_record_is_one_write_and_synchronised(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    write, fsync = os.write, os.fsync
    monkeypatch.setattr(os, "write", lambda file, line: (calls.append("write"), write(file, line))[1])
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), fsync(file))[1])
    append(path, record(0, text="x" * 100_000))
    assert calls == ["write", "fsync"]


def test_a_write_that_falls_short_raises(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append(path, record(0))
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, line: write(file, line[:10]))
        with pytest.raises(OSError, match="disk full"):
            append(path, record(1))
    append(path, record(2))
    assert read(path) == [record(0), record(2)]


def test_several_writers_do_not_mix_lines(path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: append(path, record(seed, text="x" * 5000)), range(100)))
    assert sorted(r["seed"] for r in read(path)) == list(range(100))


def test_nan_and_infinity_become_null(path: Path) -> None:
    append(path, record(0, test_acc=math.nan, compression=math.inf, average_bits=2.5))
    assert read(path) == [record(0, test_acc=None, compression=None, average_bits=2.5)]


def test_summary_is_mean_and_sample_deviation() -> None:
    accuracies = [80.1, 81.3, 79.7]
    records = [record(seed, test_acc=value, average_bits=2) for seed, value in enumerate(accuracies)]
    table = summary([record(0, "fp32", test_acc=82.0, peak_memory_bytes=None), *records])
    assert table["scheme"].tolist() == ["fp32", "a2q"]
    assert table["seeds"].tolist() == [1, 3]
    fp32, a2q = table.to_dict("records")
    assert a2q["test_acc"] == pytest.approx(statistics.mean(accuracies))
    assert a2q["test_acc_sd"] == pytest.approx(statistics.stdev(accuracies))
    assert (a2q["average_bits"], a2q["average_bits_sd"]) == (2.0, 0.0)
    assert fp32["test_acc"] == 82.0
    assert math.isnan(fp32["test_acc_sd"])
    assert math.isnan(fp32["peak_memory_bytes"])


def test_summary_is_over_seeds_and_folds_and_names_the_metric() -> None:
    errors = [0.4, 0.5, 0.9, 0.8]
    records = [
        record(seed, metric="mae", fold=fold, test_acc=errors[2 * seed + fold])
        for seed in range(2)
        for fold in range(2)
    ]
    (row,) = summary(records).to_dict("records")
    assert (row["metric"], row["seeds"], row["runs"]) == ("mae", 2, 4)
    assert row["test_acc"] == pytest.approx(statistics.mean(errors))
    assert row["test_acc_sd"] == pytest.approx(statistics.stdev(errors))
    (old,) = summary([record(0, test_acc=80.0)]).to_dict("records")
    assert (old["metric"], old["runs"]) == ("accuracy", 1), "records of version 0.1.0 have neither metric nor fold"


def test_summary_of_nothing_is_empty() -> None:
    assert len(summary([])) == 0
