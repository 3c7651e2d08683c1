import pytest
import torch

from qgnn.kernels.affine import fake_quantize_affine, fake_quantize_affine_reference

from .assertions import assert_bitwise


def problem(n, f, device, dtype=torch.float32):
    """Values inside and outside the range, zeros, ties at half steps, huge ones and NaN."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, f, generator=generator)
    tie = (torch.randint(-12, 12, (n, f), generator=generator) + 0.5) * 0.125
    kind = torch.randint(0, 6, (n, f), generator=generator)
    for index, values in enumerate([tie, torch.zeros(n, f), torch.full((n, f), -3e4), torch.full((n, f), torch.nan)]):
        x = torch.where(kind == index, values, x)
    protect = torch.rand(n, generator=generator) < 0.4
    scale, zero = torch.tensor([0.125], device=device), torch.tensor([5], dtype=torch.int32, device=device)
    return x.to(dtype).to(device), scale, zero, protect.to(device)


def test_hand_computed():
    # scale 1/2, zero 1, 2 bits: codes 0..3 stand for -0.5 .. 1; 0.25 and 0.75 are ties, which go to the even code
    x = torch.tensor([[0.25, 0.75, -0.5, 1.3, -0.8, 0.0]] * 2)
    scale, zero = torch.tensor([0.5]), torch.tensor([1], dtype=torch.int32)
    out, outside = fake_quantize_affine_reference(x, scale, zero, 2, torch.tensor([False, True]))
    assert out[0].tolist() == [0.0, 1.0, -0.5, 1.0, -0.5, 0.0]
    assert_bitwise(out[1], x[1])
    assert outside.tolist() == [[0b011000], [0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (5, 1), (7, 33), (6, 64), (3, 130)], ids=str)
def test_agrees_with_the_reference(backend, shape, dtype):
    x, scale, zero, protect = problem(*shape, backend, dtype)
    for bits, mask in ((4, None), (4, protect), (8, protect), (2, None)):
        actual = fake_quantize_affine(x, scale, zero, bits, mask)
        expected = fake_quantize_affine_reference(x, scale, zero, bits, mask)
        assert_bitwise(actual[0], expected[0], "values")
        assert_bitwise(actual[1], expected[1], "bits outside the range")


def test_non_contiguous(backend):
    x, scale, zero, protect = problem(12, 34, backend)
    x, protect = x[::2, 1::3], protect[::2]
    actual = fake_quantize_affine(x, scale, zero, 4, protect)
    expected = fake_quantize_affine_reference(x, scale, zero, 4, protect)
    assert_bitwise(actual[0], expected[0])
    assert_bitwise(actual[1], expected[1])


def test_threads_agree(threads):
    x, scale, zero, protect = problem(4000, 65, "cpu")
    expected = fake_quantize_affine_reference(x, scale, zero, 4, protect)
    for count in (1, 2):
        threads(count)
        actual = fake_quantize_affine(x, scale, zero, 4, protect)
        assert_bitwise(actual[0], expected[0])
        assert_bitwise(actual[1], expected[1])


def test_opcheck(backend):
    x, scale, zero, protect = problem(6, 9, backend)
    torch.library.opcheck(fake_quantize_affine, (x.nan_to_num(), scale, zero, 4, protect))
    torch.library.opcheck(fake_quantize_affine, (x.nan_to_num(), scale, zero, 4, None))


def test_compiles_whole():
    x, scale, zero, protect = problem(6, 9, "cpu")
    compiled = torch.compile(lambda *a: fake_quantize_affine(*a, 4, protect), backend="aot_eager", fullgraph=True)
    assert_bitwise(compiled(x, scale, zero)[0], fake_quantize_affine(x, scale, zero, 4, protect)[0])
