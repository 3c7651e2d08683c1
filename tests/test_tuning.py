import json
import subprocess
import sys

import pytest
import torch
from triton.runtime.errors import OutOfResources

from qgnn.kernels.gpu import tuning

CPU = torch.device("cpu")
GPU = "NVIDIA Imagined 9000"
FAKE = {
    "_fake": [
        {"where": {"width": [4, 2], "features": [128]}, "use": {"num_warps": 8}},
        {"where": {"degree": [4]}, "use": {"UNROLL": 1}},
        {"use": {"UNROLL": 4, "num_warps": 4}},
    ]
}


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU that is not there, with a kernel and a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("QGNN_AUTOTUNE", raising=False)
    monkeypatch.setattr(tuning, "DEFAULTS", FAKE)
    monkeypatch.setattr(tuning, "ALTERNATIVES", {"_fake": [{"UNROLL": 8}]})
    monkeypatch.setattr(tuning, "gpu_name", lambda device: GPU)
    tuning._chosen.cache_clear()
    yield GPU
    tuning._chosen.cache_clear()


def chosen(features=64, width=8, degree=0.0):
    return tuning.configuration("_fake", CPU, features, width, degree)


def test_first_row_that_accepts_counts(gpu):
    assert chosen() == {"UNROLL": 4, "num_warps": 4}
    assert chosen(width=4) == {"UNROLL": 4, "num_warps": 4}
    assert chosen(65, 4) == chosen(128, 2) == {"UNROLL": 4, "num_warps": 8}
    assert chosen(degree=513) == {"UNROLL": 1, "num_warps": 4}
    assert chosen(100, 4, 1e9) == {"UNROLL": 4, "num_warps": 8}


def test_buckets():
    features = [tuning._buckets(n, 8, 0)["features"] for n in (0, 1, 2, 3, 4, 5, 602, 1024, 1025)]
    assert features == [1, 1, 2, 4, 4, 8, 1024, 1024, 2048]
    degrees = [tuning._buckets(1, 8, d)["degree"] for d in (0, 4, 4.5, 16, 17, 64, 65, 512, 513, 1e9)]
    assert degrees == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_a_result_is_the_callers_own(gpu):
    chosen()["num_warps"] = 1
    assert chosen()["num_warps"] == 4


def test_unknown_kernel():
    with pytest.raises(ValueError, match="list it in DEFAULTS"):
        tuning.configuration("unheard-of", CPU, 1, 8)


def test_files_by_the_names_that_drivers_give(monkeypatch):
    monkeypatch.setattr(
        tuning, "tables", lambda: dict.fromkeys(["nvidia-a100", "nvidia-h200", "nvidia-a100-80gb", "amd-mi300x"])
    )
    assert tuning.table_of("NVIDIA H200") == "nvidia-h200"
    assert tuning.table_of("NVIDIA A100-SXM4-40GB") == "nvidia-a100"
    assert tuning.table_of("NVIDIA A100-SXM4-80GB") == "nvidia-a100-80gb"
    assert tuning.table_of("AMD Instinct MI300X") == "amd-mi300x"
    assert tuning.table_of("NVIDIA GH200 480GB") is None
    assert tuning.table_of(GPU) is None


def test_a_listed_gpu_changes_the_default(gpu, monkeypatch):
    table = {"source": "", "kernels": {"_fake": [{"where": {"width": [8]}, "use": {"num_warps": 2}}]}}
    monkeypatch.setattr(tuning, "tables", lambda: {"nvidia-imagined": table})
    assert chosen() == {"UNROLL": 4, "num_warps": 2}
    assert chosen(width=32) == {"UNROLL": 4, "num_warps": 4}
    assert {"UNROLL": 4, "num_warps": 2} in tuning.shipped("_fake")


def test_what_is_shipped():
    """A file says where its numbers come from, names kernels that there are, and options that those have, and changes something."""
    assert tuning.tables()
    for table in tuning.tables().values():
        assert "nothing measured" in table["source"]
        for kernel, rows in table["kernels"].items():
            default = tuning.DEFAULTS[kernel][-1]["use"]
            assert rows and all(
                row["use"].keys() <= default.keys() and not row["use"].items() <= default.items() for row in rows
            )
    for kernel, rows in tuning.DEFAULTS.items():
        assert "where" not in rows[-1]
        assert tuning.shipped(kernel)[0] == rows[-1]["use"]
        assert len(tuning.ALTERNATIVES.get(kernel, [])) <= 8


def times(table):
    """A run that notes what it is given, and a measure that looks the milliseconds up."""
    given = []
    return given.append, lambda call: (call(), table(given[-1]))[1]


def test_the_fastest_is_kept(gpu):
    run, measure = times(lambda use: 1.0 if use["UNROLL"] == 8 else 2.0)
    assert tuning.autotune("_fake", CPU, 100, 8, run, 20, measure) == {"UNROLL": 8, "num_warps": 4}
    assert chosen(128, 8, 64) == {"UNROLL": 8, "num_warps": 4}  # of the same bucket
    assert chosen(128, 8, 65) == chosen(129, 8, 20) == {"UNROLL": 4, "num_warps": 4}
    file = tuning.cache_file("_fake", gpu, 128, 8, 33)
    assert json.loads(file.read_text())["milliseconds"] == 1.0
    assert [path.name for path in file.parent.iterdir()] == [file.name]  # no temporary file is left


def test_what_does_not_fit_is_left_out(gpu):
    def measure(call):
        raise OutOfResources(2, 1, "shared memory")

    with pytest.raises(ValueError, match="no configuration of _fake fits"):
        tuning.autotune("_fake", CPU, 64, 8, lambda use: None, measure=measure)
    assert not tuning.cache_file("_fake", gpu, 64, 8).exists()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"use": {"num_warps": 64}}', '{"use": {"UNROLL": 4}}', '{"use": 3}', "\udcff"]
)
def test_a_file_that_cannot_be_used_is_named(gpu, text, recwarn):
    file = tuning.cache_file("_fake", gpu, 64, 8)
    file.parent.mkdir(parents=True)
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert chosen() == chosen() == {"UNROLL": 4, "num_warps": 4}
    assert len(recwarn) == 1 and str(file) in str(recwarn[0].message)


def test_a_launch_measures_once_and_on_request(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    given, measured = [], []

    def autotune(kernel, device, features, width, run, degree):
        measured.append((kernel, features, width, degree))
        tuning._keep(tuning.cache_file(kernel, gpu, features, width, degree), {"use": {"UNROLL": 8, "num_warps": 4}})
        tuning._chosen.cache_clear()

    monkeypatch.setattr(tuning, "autotune", autotune)
    tuning.run("_fake", CPU, 64, 8, given.append)
    assert not measured
    monkeypatch.setenv("QGNN_AUTOTUNE", "1")
    tuning.run("_fake", CPU, 64, 8, given.append)
    tuning.run("_fake", CPU, 33, 8, given.append)
    assert measured == [("_fake", 64, 8, 0)]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    tuning.run("_fake", CPU, 65, 8, given.append)
    assert len(measured) == 1
    assert [use["UNROLL"] for use in given] == [4, 8, 8, 4]


def test_two_processes_write_one_file(tmp_path):
    """Whoever reads sees one of the two results, whole."""
    file = tmp_path / "result.json"
    program = (
        "import sys; from pathlib import Path; from qgnn.kernels.gpu import tuning\n"
        "for _ in range(100): tuning._keep(Path(sys.argv[1]), {'use': [int(sys.argv[2])] * 2000})"
    )
    writers = [subprocess.Popen([sys.executable, "-c", program, str(file), str(i)]) for i in (1, 2)]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if file.exists():
            use = json.loads(file.read_text())["use"]
            assert len(use) == 2000 and len(set(use)) == 1
            seen.add(use[0])
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen <= {1, 2}
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
