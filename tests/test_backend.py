import os
import subprocess
import sys

import pytest
import torch

from qgnn.kernels import backend as backends
from qgnn.kernels.quantize import mask_clipped, mask_clipped_reference

GRAD, CLIP = torch.ones(1, 8), torch.tensor([[0b101]], dtype=torch.uint8)


def test_default_follows_the_device(monkeypatch):
    monkeypatch.delenv("QGNN_BACKEND", raising=False)
    assert backends.current_backend("cpu") == "cpu"
    assert backends.current_backend("cuda") == "triton"


def test_environment_and_context(monkeypatch):
    monkeypatch.setenv("QGNN_BACKEND", "reference")
    assert backends.current_backend("cpu") == "reference"
    with backends.use_backend("cpu"):
        assert backends.current_backend("cuda") == "cpu"
        with backends.use_backend("triton"):
            assert backends.current_backend("cpu") == "triton"
        assert backends.current_backend("cpu") == "cpu"
    assert backends.current_backend("cpu") == "reference"


def test_unknown_backend(monkeypatch):
    refusal = pytest.raises(ValueError, match="'cuda' does not exist; choose one of triton, cpu, reference")
    with refusal, backends.use_backend("cuda"):
        pass
    monkeypatch.setenv("QGNN_BACKEND", "numba")
    with pytest.raises(ValueError, match="'numba' does not exist"):
        backends.current_backend("cpu")


def test_no_silent_fallback(monkeypatch):
    with backends.use_backend("reference"):
        mask_clipped(
            GRAD, CLIP
        )  # the first call of an operation makes torch import Triton, which reads the variable then
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with backends.use_backend("triton"), pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        mask_clipped(GRAD, CLIP)
    with backends.use_backend("cpu"), pytest.raises(ValueError, match="move it or use backend 'triton'"):
        backends.implementation("quantize", "mask_clipped", mask_clipped_reference, torch.empty(1, device="meta"))


def test_each_backend_runs_its_own(backend):
    expected = [[0.0, 1, 0, 1, 1, 1, 1, 1]]
    assert mask_clipped(GRAD.to(backend), CLIP.to(backend)).tolist() == expected
    with backends.use_backend("reference"):
        assert mask_clipped(GRAD.to(backend), CLIP.to(backend)).tolist() == expected


def test_importing_the_operations_loads_no_backend():
    script = (
        "import sys; from qgnn.kernels import aggregate, matmul, quantize, affine; "
        "print([m for m in ('triton', 'numba', 'torch_geometric') if m in sys.modules])"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
    assert done.stdout.strip() == "[]"


def test_a_launch_takes_the_gpu_of_its_tensors(monkeypatch):
    common = pytest.importorskip("qgnn.kernels.gpu.common")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    guard = common.on_device(torch.device("cuda", 1))
    assert isinstance(guard, torch.cuda.device)
    assert guard.idx == 1
    for device in (torch.device("cuda", 0), torch.device("cpu")):
        assert not isinstance(common.on_device(device), torch.cuda.device)


def test_a_launch_beyond_the_largest_grid_is_refused():
    common = pytest.importorskip("qgnn.kernels.gpu.common")
    with pytest.raises(ValueError, match="split the features"):
        common.launch(None, (1, 2**16), p_x=torch.empty(0))
