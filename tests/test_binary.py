import pytest
import torch

from qgnn.kernels import packing
from qgnn.kernels.binary import quantize_binary, quantize_binary_reference
from qgnn.parts import Codec, CodecSpec

from .assertions import assert_bitwise


def features(n, f):
    """Rows of 0 and a constant of their own; the first, if there is one, is zero."""
    generator = torch.Generator().manual_seed(f)
    held = torch.rand(n, f, generator=generator) < 0.3
    held[:1] = False
    return torch.where(held, torch.rand(n, 1, generator=generator) + 0.1, torch.tensor(0.0))


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (5, 1), (9, 16), (7, 33), (5, 130), (3, 600)], ids=str)
def test_rows_of_one_constant(backend, shape):
    x = features(*shape).to(backend)
    actual, expected = quantize_binary(x), quantize_binary_reference(x)
    for a, e, what in zip(actual, expected, ("codes", "steps", "valid rows"), strict=True):
        assert_bitwise(a, e, what)
    data, step, valid = actual
    assert valid.all()
    codes = packing.unpack_reference(data, None, packing.uniform_counts(shape[0], 1), shape[1], False)
    assert_bitwise(step.unsqueeze(1) * codes, x, "values")


def test_other_rows(backend):
    nan, inf = float("nan"), float("inf")
    x = torch.zeros(10, 70)
    for i, (first, last) in enumerate(
        [(1, 2), (2, 1), (-1, 0), (-1, 1), (nan, 0), (nan, nan), (-nan, 1), (inf, 0), (-inf, inf)]
    ):
        x[i, 3], x[i, 69] = first, last
    x[9, 5] = -0.0
    assert quantize_binary(x.to(backend))[2].tolist() == [False] * 9 + [True]


def test_non_contiguous(backend):
    x = features(8, 99).to(backend)[::2, 1::3]
    for a, e in zip(quantize_binary(x), quantize_binary_reference(x), strict=True):
        assert_bitwise(a, e)


def test_threads_and_runs_agree(threads):
    x, results = features(3000, 65), []
    for count in (1, 2, 2):
        threads(count)
        results.append(quantize_binary(x))
    for result in results:
        for a, e in zip(result, quantize_binary_reference(x), strict=True):
            assert_bitwise(a, e)


def test_opcheck(backend):
    torch.library.opcheck(quantize_binary, (features(6, 20).to(backend),))


def test_codec_names_what_does_not_fit():
    codec, x = Codec(CodecSpec("first", "binary", 9, False, False)), features(6, 9)
    x[4, 7] = float("inf")
    with pytest.raises(ValueError, match=r"x\[4, 7\] is inf; quantization needs finite values"):
        codec(x)
    x[4] = torch.arange(9)
    with pytest.raises(ValueError, match=r"row 4 of the input has several nonzero values"):
        codec(x)
