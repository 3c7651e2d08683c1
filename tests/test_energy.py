"""Energy of a GPU: the kernel list against what PyG launches, the model's formula, the protocol against a counter that is known, the command."""

import csv
import ctypes
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from qgnn import cli
from qgnn.accel.config import Config
from qgnn.accel.energy import PARTS
from qgnn.accel.gpu import LAUNCH_SECONDS, Gpu, Kernel, find_gpu, fp32_kernels, gpus, model_fp32
from qgnn.accel.simulator import simulate
from qgnn.accel.workload import Layer, Workload
from qgnn.perf import energy
from qgnn.perf.meter import TURN_SECONDS, Counter, Measured, Meter, Trial

INDPTR, INDICES = np.array([0, 3, 3, 4, 8, 9]), np.array([0, 1, 4, 2, 0, 1, 2, 3, 4])


def workload(*layers: Layer) -> Workload:
    return Workload(INDPTR, INDICES, layers)


# The kernels


class Launches(TorchDispatchMode):
    """Bytes of every operation that computes: its tensors, each once; what an in-place operation changes is read and written."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.is_view or function._schema.name in ("aten::_to_copy", "aten::detach"):
            return out
        read = [a for a in args if isinstance(a, torch.Tensor)]
        if function is torch.ops.aten.index_select.default:  # the rows that it takes, not all there are
            read = [out, args[2]]
        elif function._schema.name in ("aten::new_zeros", "aten::new_ones"):
            read = []
        self.bytes.append(sum(map(_bytes, [*read, out])))
        return out


def _bytes(tensor: torch.Tensor) -> int:
    """An expanded dimension is in memory once."""
    stored = [n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return math.prod(stored) * tensor.element_size()


@pytest.mark.parametrize(
    "layers",
    [
        (Layer(7, 6, 4), Layer(6, 3, 4)),
        (Layer(7, 6, 4, kind="gat", heads=3), Layer(6, 2, 4, kind="gat")),
        (Layer(7, 6, 4, kind="gin"), Layer(6, 5, 4, kind="linear")),
        (Layer(7, 6, 4, kind="sage"), Layer(7, 6, 4, kind="linear"), Layer(6, 6, 4, kind="sage")),
    ],
    ids=["gcn", "gat", "gin", "sage"],
)
def test_the_kernels_are_those_that_pyg_launches(layers: tuple[Layer, ...]) -> None:
    work = workload(*layers)
    call = energy.fp32_call(work, torch.randn(5, 7))
    call()  # GCN's edge weights are cached
    with Launches() as seen:
        out = call()
    assert seen.bytes == [kernel.bytes for kernel in fp32_kernels(work)]
    assert out.shape == (5, layers[-1].f_out)


def test_operations_of_a_gcn_layer() -> None:
    """N = 5, E = 9, 7 -> 6: the product's 2 N F_in F_out, weights and sums of E F_out each, a bias of N F_out; nothing else computes."""
    assert [k.flops for k in fp32_kernels(workload(Layer(7, 6, 4)))] == [2 * 5 * 7 * 6, 0, 9 * 6, 0, 9 * 6, 5 * 6]


def test_gpus_are_those_of_the_specification() -> None:
    constants = {name: (g.flops, g.bandwidth, g.tdp_w, g.idle_w) for name, g in gpus().items()}
    assert constants == {
        "2080ti": (13.45e12, 616e9, 250, 15),
        "a100-80gb": (19.5e12, 2039e9, 400, 50),
        "h100-sxm": (66.9e12, 3350e9, 700, 70),
        "h200": (66.9e12, 4800e9, 700, 75),
    }
    assert all("idle power assumed" in g.source for g in gpus().values())
    assert find_gpu().name == "2080ti"
    with pytest.raises(ValueError, match="there is no GPU 'titan'; choose one of 2080ti, "):
        find_gpu("titan")


def test_the_model_is_the_formula() -> None:
    """A linear layer of 5 x 7 by 7 x 6 with a bias: 4 (35 + 42 + 30 + 6) bytes and 2 * 5 * 7 * 6 + 5 * 6 operations in one kernel."""
    gpu = Gpu("toy", flops=1e6, bandwidth=4e6, tdp_w=100, idle_w=20, source="")
    found = model_fp32(workload(Layer(7, 6, 4, kind="linear")), gpu)
    assert found.kernels == (Kernel("layer 0", "product", 450, 452),)
    busy = max(450 / 1e6, 452 / 4e6)
    t = busy + 5e-6
    assert LAUNCH_SECONDS == 5e-6
    assert found.seconds == pytest.approx(t)
    assert found.joules == pytest.approx(t * (20 + 80 * busy / t))
    assert (found.low_joules, found.high_joules) == (pytest.approx(20 * t), pytest.approx(100 * t))
    slow = Gpu("toy", flops=1e12, bandwidth=1e3, tdp_w=100, idle_w=20, source="")
    assert slow.bandwidth * (model_fp32(workload(Layer(7, 6, 4, kind="linear")), slow).seconds - 5e-6) == pytest.approx(
        452
    )


@pytest.mark.parametrize("name", gpus())
def test_the_estimate_lies_within_its_bounds(name: str) -> None:
    found = model_fp32(workload(Layer(1433, 16, 4), Layer(16, 7, 4)), gpus()[name])
    assert found.low_joules < found.joules < found.high_joules


# The protocol


class FakeGpu:
    """Draws ``idle`` W at rest and ``busy`` W in calls, which take ``seconds``. Its counter is renewed every ``update`` s. Time passes when it
    is told to, so nothing waits."""

    name = "fake"

    def __init__(self, seconds: float, update: float, idle: float = 60.0, busy: float = 300.0) -> None:
        self.seconds, self.update, self.idle, self.busy = seconds, update, idle, busy
        self.now = self.shown_at = 0.0
        self.total = self.shown = 5e6
        self.pending, self.calls = 0, 0
        self.wrap = 2**64

    def pass_time(self, seconds: float, watts: float) -> None:
        """In steps that end where the counter is renewed."""
        while seconds > 0:
            step = min(seconds, self.shown_at + self.update - self.now)
            self.now, self.total, seconds = self.now + step, self.total + 1e3 * watts * step, seconds - step
            if self.now >= self.shown_at + self.update * (1 - 1e-9):
                self.shown, self.shown_at = self.total, self.now

    def sleep(self, seconds: float) -> None:
        self.pass_time(seconds, self.idle)

    def call(self) -> None:
        self.pending += 1
        self.calls += 1

    def synchronize(self) -> None:
        self.pass_time(self.pending * self.seconds, self.busy)
        self.pending = 0

    def millijoules(self) -> int:
        return int(self.shown) % self.wrap

    def meter(self, device: str = "cpu") -> Meter:
        return Meter(self, device, self.synchronize, lambda: self.now, self.sleep)


@pytest.mark.parametrize("update", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("seconds", [2e-5, 1.7e-3, 0.3])
def test_gross_net_and_idle(seconds: float, update: float) -> None:
    """A value is at most as old as a turn or an update when it is seen, so that the window of 5 s is off by the smaller of the two, with the 1 mJ of
    rounding far below; the idle window is one of 2 s."""
    gpu = FakeGpu(seconds, update)
    progress: list[tuple[int, int]] = []
    found = gpu.meter().measure(gpu.call, lambda done, total: progress.append((done, total)))
    age = min(max(TURN_SECONDS, seconds), update)
    assert found.seconds == pytest.approx(seconds, rel=1e-6)
    assert found.joules == pytest.approx(300 * seconds, rel=age / 5 + 1e-5)
    idle = [t.idle_w for t in found.trials]
    assert idle == pytest.approx([60] * 5, rel=min(TURN_SECONDS, update) / 2 + 1e-4)
    assert found.net_joules == pytest.approx(240 * seconds, rel=1.25 * age / 5 + 60 / 240 * TURN_SECONDS / 2 + 1e-3)
    assert found.low_joules <= found.joules <= found.high_joules
    assert progress == [(n, 5) for n in range(1, 6)]
    assert (
        gpu.calls * seconds >= 5 * 5.0 + 7 * 10 * seconds - 1e-6
    )  # 5 trials of 5 s, 10 calls to warm up before each, and 20 at first


def test_the_median_of_the_trials() -> None:
    trials = tuple(Trial(s, j, 10.0) for s, j in ((1, 50), (1, 30), (2, 40), (1, 90), (1, 31)))
    found = Measured(trials)
    assert (found.seconds, found.joules, found.low_joules, found.high_joules) == (1, 40, 30, 90)
    assert found.net_joules == 21  # of 40, 20, 20, 80, 21: in each trial net of its own idle energy


@pytest.mark.parametrize("after", [150, 900, 4000])
def test_a_counter_that_wraps_in_a_window_is_read_anew(after: int) -> None:
    """In J: within the first idle window, the first busy one, the third one."""
    gpu = FakeGpu(1e-3, 0.05)
    gpu.wrap = 5_000_000 + 1000 * after
    found = gpu.meter().measure(gpu.call)
    assert gpu.total > gpu.wrap, "it did wrap"
    assert found.high_joules == pytest.approx(0.3, rel=TURN_SECONDS / 5 + 1e-5)
    assert found.low_joules == pytest.approx(0.3, rel=TURN_SECONDS / 5 + 1e-5)


def test_a_counter_that_does_not_work_is_said() -> None:
    still = FakeGpu(1e-3, update=math.inf)
    with pytest.raises(ValueError, match="of fake stands still; name a GPU with --gpu"):
        still.meter().measure(still.call)
    back = FakeGpu(1e-3, 0.05)
    back.millijoules = lambda: 10**12 - int(back.shown)  # this one counts down
    with pytest.raises(ValueError, match="runs backwards"):
        back.meter().measure(back.call)


class FakeNvml:
    """As much of pynvml as is used."""

    class NVMLError(Exception):
        pass

    def __init__(self, **fails: str) -> None:
        self.fails = fails

    def _call(self, name: str, value: object) -> object:
        if name in self.fails:
            raise self.NVMLError(self.fails[name])
        return value

    def nvmlInit(self) -> object:
        return self._call("init", None)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> object:
        return self._call("handle", uuid)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: object) -> object:
        assert handle == "GPU-12-34", "the one that torch computes on"
        return self._call("energy", 77)


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="A GPU", uuid="12-34"))


def test_the_counter_is_that_of_torchs_gpu(a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    meter = energy.chosen(None)
    assert isinstance(meter, Meter) and meter.device == "cuda"
    assert (meter.counter.name, meter.counter.millijoules()) == ("A GPU", 77)
    assert energy.chosen("h200") == gpus()["h200"], "one that is named is modelled"


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("init", "Driver Not Loaded"),
        ("handle", "Not Found"),
        ("energy", "Insufficient Permissions"),
        ("energy", "Not Supported"),
    ],
)
def test_a_counter_that_may_not_be_read_is_said(
    a_gpu: None, monkeypatch: pytest.MonkeyPatch, where: str, why: str
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(**{where: why}))
    with pytest.raises(ValueError, match=rf"of A GPU cannot be read \({why}\): it takes a Volta or newer.* --gpu"):
        energy.chosen(None)


class FakeLibrary:
    """The driver's library, without pynvml: every call answers with a code, and gives through pointers."""

    def __init__(self, **fails: int) -> None:
        self.fails = fails
        self.nvmlErrorString = lambda code: {15: b"GPU is lost"}[code]

    def nvmlInit_v2(self) -> int:
        return self.fails.get("init", 0)

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:
        assert uuid == b"GPU-12-34", "the one that torch computes on"
        handle._obj.value = 5
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: ctypes.c_void_p, millijoules: Any) -> int:
        assert handle.value == 5
        millijoules._obj.value = 2**40
        return self.fails.get("energy", 0)


def _absent(name: str) -> Any:
    raise OSError(f"{name} is not there")


def test_without_pynvml_the_drivers_library_is_asked(a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeLibrary())
    assert Counter().millijoules() == 2**40, "64 bits"
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeLibrary(energy=15))
    with pytest.raises(ValueError, match=r"of A GPU cannot be read \(GPU is lost\)"):
        Counter()


def test_the_missing_library_is_named(a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(ctypes, "CDLL", _absent)
    with pytest.raises(ValueError, match="pip install nvidia-ml-py; or name a GPU with --gpu"):
        energy.chosen(None)


def test_without_a_gpu_the_papers_is_modelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert energy.chosen(None) == gpus()["2080ti"]


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of a GCN, and an FP32 run, which has no integer model, in a folder of the folder."""
    out = tmp_path_factory.mktemp("runs")
    for scheme, seeds in (("a2q", "2"), ("fp32", "1")):
        quick = ["train", "--dataset", "digits", "--scheme", scheme, "--seeds", seeds, "--epochs", "1", "--hidden", "8"]
        assert CliRunner().invoke(cli.app, [*quick, "--out", str(out / "digits")]).exit_code == 0
    return out


def run(*args: str) -> SimpleNamespace:
    result = CliRunner().invoke(cli.app, ["energy", *args])
    return SimpleNamespace(code=result.exit_code, out=result.stdout, error=result.stderr)


def test_a_row_that_cannot_be_made_costs_that_row_only(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (good,) = energy.trained(folder)
    (tmp_path / "damaged").write_bytes(b"no model")
    bad = energy.Models("digits", "gat", "a2q", (tmp_path / "damaged",))
    monkeypatch.setattr(energy, "trained", lambda _: [bad, good])
    found = run("--runs", "anything", "--gpu", "h200", "--json", str(tmp_path / "j"))
    (row,) = [json.loads(line) for line in (tmp_path / "j").read_text().splitlines()]
    assert row["model"] == "gcn" and "digits gcn a2q" in found.out
    assert found.code == 1 and found.error.startswith("qgnn: left out: digits gat a2q: ")


def test_figure_22_of_a_folder(folder: Path, tmp_path: Path) -> None:
    found = run(
        "--runs", str(folder), "--gpu", "a100-80gb", "--out", str(tmp_path / "e"), "--json", str(tmp_path / "j")
    )
    assert found.code == 0, found.error
    (row,) = [json.loads(line) for line in (tmp_path / "j").read_text().splitlines()]
    assert (row["dataset"], row["model"], row["scheme"], row["runs"]) == ("digits", "gcn", "a2q", 2)

    works = [
        energy.workload_from(str(path), "digits", None, None, None)
        for path in sorted((folder / "digits/models").iterdir())
    ]
    joules = [simulate(work, Config()).joules for work in works]
    assert row["accelerator_joules"] == pytest.approx(sum(joules) / 2, rel=1e-12)
    assert sum(row[f"accelerator_{part}_joules"] for part in PARTS) == pytest.approx(row["accelerator_joules"])
    gpu = model_fp32(works[0], gpus()["a100-80gb"])
    assert (row["gpu"], row["gpu_mode"], row["gpu_seconds"]) == ("a100-80gb", "modelled", gpu.seconds)
    for end in ("", "_low", "_high"):
        assert row[f"ratio{end}"] == pytest.approx(
            getattr(gpu, f"{end[1:]}{'_' * bool(end)}joules") / row["accelerator_joules"]
        )

    (line,) = csv.DictReader((tmp_path / "e/energy.csv").read_text().splitlines())
    assert float(line["ratio"]) == row["ratio"]
    figure = (tmp_path / "e/energy.svg").read_text()
    assert "a100-80gb, FP32, modelled" in figure and "gcn a2q" in figure and f"{row['ratio']:.3g}" in figure


def test_one_model_under_another_configuration(folder: Path, tmp_path: Path) -> None:
    model = str(next((folder / "digits/models").iterdir()))
    options = ["--model", model, "--dataset", "digits", "--gpu", "2080ti", "--json", "-"]
    (plain, half) = (json.loads(run(*options, *more).out) for more in ([], ["--set", "hbm_pj=3.5"]))
    assert half["accelerator_hbm_joules"] == pytest.approx(plain["accelerator_hbm_joules"] / 2)
    assert half["ratio"] > plain["ratio"]


def test_measured_rows_have_both_programs(folder: Path) -> None:
    """Both programs run, on the CPU; on the fake clock a call takes 0.3 s at 300 W, and 60 W of these flow at rest too."""
    gpu = FakeGpu(0.3, 0.02)
    gpu.synchronize = lambda: gpu.pass_time(0.3, 300)  # it does not see the calls
    (models,) = energy.trained(folder)
    row = energy.compare(models, Config(), gpu.meter())
    assert (row["gpu"], row["gpu_mode"], row["runs"]) == ("fake", "measured", 2)
    for side in ("gpu", "gpu_integer"):
        assert row[f"{side}_seconds"] == pytest.approx(0.3)
        assert row[f"{side}_joules"] == pytest.approx(90, rel=0.02 / 5)  # the counter's age, of 5 s
        assert row[f"{side}_net_joules"] == pytest.approx(72, rel=0.02)
    assert row["ratio"] == row["gpu_joules"] / row["accelerator_joules"]
    parts, beside = cli.simulate._energy_tables([row])
    assert (parts.row_count, beside.row_count) == (1, 2)
    assert "net of\nidle" in [column.header for column in beside.columns]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "pass --model FILE and --dataset D, or --runs DIR"),
        (["--model", "m.safetensors"], "pass --model FILE and --dataset D, or --runs DIR"),
        (["--model", "gcn", "--dataset", "digits"], "there is no model file gcn; qgnn train --out DIR leaves some"),
        (["--runs", "nowhere"], "there is no integer model in nowhere; qgnn train --scheme a2q --out nowhere"),
    ],
)
def test_bad_input_is_one_line(options: list[str], says: str) -> None:
    found = run(*options)
    assert found.code == 2 and found.error.startswith("qgnn: ") and found.error.count("\n") == 1 and says in found.error
