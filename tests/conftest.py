"""Backends under test, and uninitialised memory that shows."""

import os
from pathlib import Path

import pytest
import torch

# Read by Triton when the kernels are decorated, so it comes before any of qgnn is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

SENTINEL = 0x5A
"""Byte that uninitialised integers are filled with: never a plausible code, offset or count when four of them make an
int32."""


@pytest.fixture(params=["cpu", pytest.param("triton", marks=pytest.mark.gpu)])
def backend(request):
    """Runs the test under each backend; yields the device its tensors go to. Triton runs in its interpreter where there
    is no GPU."""
    from qgnn.kernels.backend import use_backend

    with use_backend(request.param):
        yield "cuda" if request.param == "triton" and torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Floats from ``empty`` are NaN and integers a sentinel, so that an element which a kernel forgets is seen."""

    def poisoned(function):
        def call(*args, **kwargs):
            tensor = function(*args, **kwargs)
            # not under torch.compile and opcheck, whose tensors hold no data
            real = type(tensor) is torch.Tensor and tensor.device.type in ("cpu", "cuda")
            if real and not torch.compiler.is_compiling():
                if tensor.is_floating_point():
                    tensor.detach().fill_(float("nan"))
                elif tensor.dtype == torch.bool:
                    tensor.fill_(True)
                else:
                    tensor.fill_(int.from_bytes(bytes([SENTINEL]) * tensor.element_size(), "little"))
            return tensor

        return call

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def float64_by_default():
    """torch makes float64 where no dtype is asked for."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def threads():
    """Sets the number of torch threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def citation_root():
    """The folder with Cora and CiteSeer: QGNN_DATA, else the data that lies beside a checkout."""
    from qgnn.published import _PLANETOID_FILES

    folder = Path(os.environ.get("QGNN_DATA") or Path(__file__).parent / "../../shared/data").resolve()
    wanted = [
        folder / name / "raw" / f"ind.{name.lower()}.{part}"
        for name in ("Cora", "CiteSeer")
        for part in _PLANETOID_FILES
    ]
    missing = [str(path.relative_to(folder)) for path in wanted if not path.is_file()]
    if missing:
        message = f"wants {', '.join(missing)} in {folder}; set QGNN_DATA"
        if os.environ.get("QGNN_REQUIRE_DATA") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return folder
