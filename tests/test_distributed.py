"""Training by two processes on this machine, against one; killed, broken off and gone on with."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from qgnn import data, train
from qgnn.distributed.group import processes
from tests import distributed_worker as worker

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SECONDS = 120
"""After which a job is killed: nothing hangs."""


def started(*command, **streams):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "QGNN_DATA": os.environ.get("QGNN_DATA", "")}
    return subprocess.Popen(
        [*TORCHRUN, *map(str, command)], env=environment, start_new_session=True, text=True, **streams
    )


def finished(process):
    """Output and errors of a job, whose end is awaited."""
    try:
        return process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


@pytest.fixture(scope="module")
def folder(tmp_path_factory, citation_root):
    folder = tmp_path_factory.mktemp("jobs")
    # Half of a training by one process, which two go on with.
    cora = data.load("Cora", citation_root)
    recipe = worker.recipe_of(cora, "gcn a2q", 10)
    with pytest.MonkeyPatch.context() as patch, suppress(worker.Stopped):
        patch.setattr(train, "CHECKPOINT_SECONDS", 0.0)
        train.train(
            cora, "gcn", "a2q", 0, recipe=recipe, checkpoint=folder / "one" / "run.pt", progress=worker.interrupted(5)
        )
    return folder


@pytest.fixture(scope="module")
def found(folder):
    """What two processes have found."""
    job = started(worker.__file__, folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _, errors = finished(job)
    assert job.returncode == 0, errors
    return torch.load(folder / "found.pt")


def alone(name, citation_root):
    cora = data.load("Cora", citation_root)
    return train.train(cora, *name.split(), 0, recipe=worker.recipe_of(cora, name))


def losses(curve):
    return torch.tensor([row["loss"] for row in curve], dtype=torch.float64)


@pytest.mark.parametrize("name", worker.PARTITIONED)
def test_parts_train_as_one_process(name, found, citation_root):
    """The same dropout, teacher, steps and widths; sums of floats in another order. Once values are quantized, a tie may be rounded otherwise, and
    the loss differs by the share of a few codes: epochs before are compared closely."""
    one, two = alone(name, citation_root), found[name]
    close = len(one.curve) if name.endswith("fp32") else 2
    assert (losses(one.curve) - losses(two["curve"]))[:close].abs().max() < 1e-5
    assert (losses(one.curve) - losses(two["curve"])).abs().max() < 5e-3
    assert [row["bits"] for row in one.curve[:2]] == [row["bits"] for row in two["curve"][:2]]
    assert two["state"].keys() == one.model.state_dict().keys()
    if name.endswith("fp32"):
        for key, value in one.model.state_dict().items():
            torch.testing.assert_close(two["state"][key], value, rtol=0, atol=1e-5)
        assert two["record"]["test_acc"] == one.record["test_acc"]
    assert two["record"]["fp32_bytes"] == one.record["fp32_bytes"]
    assert abs(two["record"]["average_bits_all"] - one.record["average_bits_all"]) < 0.01


def test_bytes_on_the_wire(found):
    """Codes are 1/4 and 1/8 of the floats, but for the last group of 8 codes of a message; steps are 4 bytes for each row."""
    floats, epochs = found["gcn fp32"]["record"], len(found["gcn fp32"]["curve"])
    assert floats["partition"] in ("metis", "bandwidth") and floats["processes"] == 2 and floats["halo"] == "fp32"
    for way in ("forward", "backward"):
        whole = floats[f"sent_{way}_codes_bytes"]
        # A row of the hidden map has 32 features, one of the outputs 7; as many of the one travel as of the other.
        rows = 2 * whole // (4 * (32 + 7))
        assert whole % (4 * (32 + 7)) == 0 and floats[f"sent_{way}_steps_bytes"] == 0
        for width, share in (("int8", 4), ("int4", 8)):
            record = found[width]["record"]
            # 2 processes send 2 messages each an epoch and pass, of which there are a training step, an evaluation, and 3 more at the warm-up's end
            messages = 2 * 2 * (2 * epochs + 3)
            assert 0 <= record[f"sent_{way}_codes_bytes"] - whole / share <= 8 * messages
            assert record[f"sent_{way}_steps_bytes"] == 4 * rows
            assert record["sent_reduced_bytes"] == floats["sent_reduced_bytes"]


def test_refusals(found):
    said = found["refused"]
    expected = (
        "is not trained with --parallel partition",
        "set a fanout",
        "set fanout to 0",
        "leave it out",
        "sum or mean",
    )
    assert len(said) == 6
    for sentence, part in zip(said, (expected[0], *expected), strict=True):
        assert part in sentence


def test_one_process_goes_on_where_two_stopped(found, folder, citation_root):
    """And two where one did: both end as one process that was not disturbed."""
    cora = data.load("Cora", citation_root)
    recipe = worker.recipe_of(cora, "gcn a2q", 10)
    undisturbed = train.train(cora, "gcn", "a2q", 0, recipe=recipe)
    after = train.train(cora, "gcn", "a2q", 0, recipe=recipe, checkpoint=folder / "two" / "run.pt")
    for curve in (after.curve, found["went on"]["curve"]):
        assert len(curve) == len(undisturbed.curve)
        assert (losses(curve) - losses(undisturbed.curve))[: recipe.warmup].abs().max() < 1e-5
        assert (losses(curve) - losses(undisturbed.curve)).abs().max() < 5e-3


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_killed_worker(found, tmp_path, citation_root):
    """SIGKILL in the middle of training: the job ends by itself, says so once, and goes on to the very result of an undisturbed one."""
    command = [
        "-m",
        "qgnn",
        "train",
        "--dataset",
        "Cora",
        "--data-root",
        citation_root,
        "--scheme",
        "fp32",
        "--halo",
        "int8",
        "--out",
        tmp_path,
    ]
    command += ["--epochs", worker.RECOVERED_EPOCHS, "--set", "attention_dropout=0.0", "--json", "-"]
    job = started(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until = time.monotonic() + SECONDS
    while not list(tmp_path.glob("checkpoints/*.pt")):
        assert time.monotonic() < until and job.poll() is None
        time.sleep(0.02)
    os.kill(children(job.pid)[1], signal.SIGKILL)
    out, errors = finished(job)
    assert job.returncode != 0 and not out
    told = [line for line in errors.splitlines() if line.startswith("qgnn:")]
    assert len(told) == 1 and "has lost another one" in told[0] and "goes on from the last checkpoint" in told[0]
    again = started(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, errors = finished(again)
    assert again.returncode == 0, errors
    record, undisturbed = json.loads(out), found["undisturbed"]["record"]
    for name in ("best_epoch", "val_acc", "test_acc", "test_acc_best_over_epochs"):
        assert record[name] == undisturbed[name], name


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a number of processes, got 'two'"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"),
    ],
)
def test_started_without_torchrun(environment, sentence, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=sentence):
        processes()


def test_options_of_many_processes_need_them(capfd):
    from qgnn.cli import main

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["qgnn", "train", "--dataset", "digits", "--halo", "int8"])
        main()
    assert ended.value.code == 2
    assert "--halo are for several processes: torchrun --nproc-per-node 2 -m qgnn train" in capfd.readouterr().err
