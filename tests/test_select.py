"""Rows of a packed matrix by their index: every backend against whole matrices, and the limits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qgnn import QTensor, ops
from qgnn.kernels.backend import use_backend
from qgnn.kernels.select import select_codes, select_rows


def matrix(rows: int, features: int, bits: torch.Tensor | float, signed: bool = True, seed: int = 0) -> QTensor:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=draw)
    step = torch.rand(rows, generator=draw) * 0.1 + 0.01
    return QTensor.quantize(x if signed else x.abs(), step, bits, signed=signed)


def mixed(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 9, (rows,), generator=torch.Generator().manual_seed(seed)).float()


MATRICES = {
    "int8": lambda: matrix(40, 21, 8.0),
    "int4, rows of 16 bytes and more": lambda: matrix(40, 70, 4.0),
    "int2": lambda: matrix(40, 13, 2.0),
    "uint1": lambda: matrix(40, 19, 1.0, signed=False),
    "uint3": lambda: matrix(40, 9, 3.0, signed=False),
    "no storage": lambda: matrix(40, 9, 1.0),
    "mixed": lambda: matrix(40, 37, mixed(40)),
    "mixed, unsigned": lambda: matrix(40, 300, mixed(40, 1), signed=False),
    "one column": lambda: matrix(40, 1, mixed(40)),
    "one row": lambda: matrix(1, 5, 8.0),
}


def same(found: QTensor, q: QTensor, index: torch.Tensor) -> None:
    assert found.codes().equal(q.codes()[index])
    assert found.step.equal(q.step[index])
    assert found.bits.equal(q.bits[index])
    assert found.dequantize().equal(q.dequantize()[index])


@pytest.mark.parametrize("name", MATRICES)
def test_rows_and_codes_are_those_of_the_whole_matrix(name, backend):
    with use_backend("reference"):
        q = MATRICES[name]()
        values = q.dequantize()
    rows = q.shape[0]
    index = torch.randint(0, rows, (67,), generator=torch.Generator().manual_seed(2))
    q, place = q.to(backend), index.to(backend)
    assert ops.select_rows(q, place).cpu().equal(values[index])  # one product of two floats: bitwise
    found = ops.select_codes(q, place).to("cpu")
    with use_backend("reference"):
        same(found, q.to("cpu"), index)


@given(rows=st.integers(1, 60), features=st.integers(1, 150), picked=st.integers(0, 90), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_numba_equals_the_reference_to_the_bit(rows, features, picked, seed):
    q = matrix(rows, features, mixed(rows, seed), signed=bool(seed % 2), seed=seed)
    index = torch.randint(0, rows, (picked,), generator=torch.Generator().manual_seed(seed))
    with use_backend("reference"):
        values, codes = ops.select_rows(q, index), ops.select_codes(q, index)
    assert ops.select_rows(q, index).equal(values)
    assert ops.select_codes(q, index).data.equal(codes.data)  # with the padding behind rows and buckets


def test_many_rows_run_on_several_threads_with_the_same_result(threads):
    q = matrix(3000, 64, mixed(3000))
    index = torch.randint(0, 3000, (5000,), generator=torch.Generator().manual_seed(0))
    threads(1)
    values, codes = ops.select_rows(q, index), ops.select_codes(q, index).data
    threads(2)
    assert ops.select_rows(q, index).equal(values)
    assert ops.select_codes(q, index).data.equal(codes)


def test_nothing_is_asked_for(backend):
    for q in (matrix(5, 9, 8.0), matrix(5, 9, mixed(5)), matrix(0, 9, 8.0)):
        index = torch.zeros(0, dtype=torch.int64, device=backend)
        assert ops.select_rows(q.to(backend), index).shape == (0, 9)
        assert ops.select_codes(q.to(backend), index).shape == (0, 9)


def test_an_index_that_is_not_contiguous(backend):
    q = matrix(20, 9, mixed(20)).to(backend)
    index = torch.arange(20, device=backend)[::3]
    assert ops.select_rows(q, index).equal(ops.select_rows(q, index.contiguous()))
    same(ops.select_codes(q, index).to("cpu"), q.to("cpu"), index.cpu())


def test_operations_are_registered_as_torch_wants_it():
    q, index = matrix(12, 21, mixed(12)), torch.tensor([3, 3, 11, 0])
    arguments = (q.data, q.step, q.pos, list(q.counts), index, q.features, q.signed)
    torch.library.opcheck(select_rows, arguments)
    out = ops.select_codes(q, index)
    torch.library.opcheck(select_codes, (*arguments[:1], *arguments[2:6], out.pos, list(out.counts)))


@pytest.mark.parametrize(("index", "named"), [([0, 5], "5"), ([-1, 2], "-1")])
def test_an_index_that_is_no_row_is_named(index, named):
    for select in (ops.select_rows, ops.select_codes):
        with pytest.raises(ValueError, match=rf"index: {named} is outside 0\.\.4"):
            select(matrix(5, 3, 8.0), torch.tensor(index))


def test_what_cannot_be_selected_from_is_refused():
    columns = QTensor.quantize(torch.rand(4, 3), 0.1, 4.0, axis="col")
    with pytest.raises(TypeError, match="step per row"):
        ops.select_rows(columns, torch.tensor([0]))
    with pytest.raises(TypeError, match="int64"):
        ops.select_codes(matrix(4, 3, 8.0), torch.tensor([0], dtype=torch.int32))
