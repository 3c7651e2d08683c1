import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qgnn.kernels import packing

from .assertions import assert_bitwise

WIDTHS = torch.tensor([2, 0, 3, 2], dtype=torch.uint8)
CODES = torch.tensor([[1, 2, 3, 0, 1, 2], [0] * 6, [7, 0, 1, 2, 3, 4], [3, 3, 3, 3, 0, 1]], dtype=torch.int32)


def test_worked_example():
    counts, pos = packing.bucket_rows(packing.containers_of(WIDTHS, signed=False))
    assert counts == [0, 1, 2, 0, 1]
    assert pos.tolist() == [1, 3, 0, 2]
    data = packing.pack_reference(CODES, pos, counts)
    expected = [0x07, 0x21, 0x43] + [0] * 13 + [0x39, 0x09, 0xFF, 0x04] + [0] * 12
    assert data.tolist() == expected
    assert_bitwise(packing.unpack_reference(data, pos, counts, 6, signed=False), CODES)


def test_container_table():
    assert [packing.container_of(b, signed=False) for b in range(9)] == [0, 1, 2, 4, 4, 8, 8, 8, 8]
    assert [packing.container_of(b, signed=True) for b in range(9)] == [0, 0, 2, 4, 4, 8, 8, 8, 8]
    with pytest.raises(ValueError, match="0 to 8 bits, got 9"):
        packing.container_of(9, signed=True)


@pytest.mark.parametrize(
    ("container", "features", "size"),
    [(8, 15, 15), (8, 16, 16), (8, 17, 32), (4, 31, 16), (4, 29, 15), (2, 1, 1), (1, 130, 32), (0, 9, 0), (4, 0, 0)],
)
def test_row_bytes(container, features, size):
    assert packing.row_bytes(container, features) == size


def test_signed_codes_are_twos_complement():
    data = packing.pack_reference(torch.tensor([[-1, 1, -7, 7]]), None, packing.uniform_counts(1, 4))
    assert data[:2].tolist() == [0x1F, 0x79]
    assert packing.unpack_reference(data, None, packing.uniform_counts(1, 4), 4, True).tolist() == [[-1, 1, -7, 7]]


def test_flags():
    flags = torch.tensor([[True, False, True, True, False, False, False, True, True]])
    bits = packing.pack_bits_reference(flags)
    assert bits.tolist() == [[0b10001101, 1]]
    assert_bitwise(packing.unpack_bits_reference(bits, 9), flags)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_nothing_to_pack(shape):
    flags = torch.zeros(shape, dtype=torch.bool)
    assert_bitwise(packing.unpack_bits_reference(packing.pack_bits_reference(flags), shape[1]), flags)
    counts, pos = packing.bucket_rows(torch.full((shape[0],), 4))
    data = packing.pack_reference(torch.zeros(shape, dtype=torch.int32), pos, counts)
    assert packing.unpack_reference(data, pos, counts, shape[1], True).shape == shape


def test_large_buffers_are_addressed_in_64_bits():
    starts = packing.bucket_starts([40_000_000, 0, 0, 0, 0], 128)
    assert starts[1] == 40_000_000 * 128 > 2**32


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 8), max_size=12), st.integers(0, 40), st.booleans(), st.randoms(use_true_random=False))
def test_round_trip(widths, features, signed, random):
    containers = packing.containers_of(torch.tensor(widths, dtype=torch.uint8), signed)
    counts, pos = packing.bucket_rows(containers)
    low = [-(1 << (b - 1)) if signed and b > 1 else 0 for b in widths]
    high = [((1 << (b - 1)) - 1 if b > 1 else 0) if signed else (1 << b) - 1 for b in widths]
    codes = [[random.randint(lo, hi) for _ in range(features)] for lo, hi in zip(low, high, strict=True)]
    codes = torch.tensor(codes, dtype=torch.int32).view(len(widths), features)
    data = packing.pack_reference(codes, pos, counts)
    assert data.numel() % packing.ALIGN == 0
    assert_bitwise(packing.unpack_reference(data, pos, counts, features, signed), codes)


def test_addresses_beyond_31_bits():
    """Rows that no test could allocate: 3 million of 1,024 codes of 8 bits, then 3 million of 4 bits."""
    from qgnn.kernels.cpu.common import buckets_of, place

    counts, features = [3_000_000, 3_000_000, 0, 0, 0], 1024
    starts = packing.bucket_starts(counts, features)
    assert starts[1] == 3_000_000 * 1024 > 2**31
    buckets, everywhere = buckets_of(counts, features), np.empty(0, np.int32)
    assert place(buckets, everywhere, 2_999_999) == (8, 2_999_999 * 1024, 1024)
    assert place(buckets, everywhere, 5_999_999) == (4, 3_000_000 * 1024 + 2_999_999 * 512, 512)
    assert starts[-1] == 3_000_000 * (1024 + 512)


def test_tight_worked_example():
    codes = torch.tensor([[7, 0, 1, 2, 3, 4, 5, 6, 5]], dtype=torch.uint8)
    data = packing.pack_tight_reference(codes, 3)
    assert data.tolist() == [[0x47, 0x34, 0xD6, 0x05, 0, 0]]
    assert_bitwise(packing.unpack_tight_reference(data, 3, 9), codes)


def test_code_range():
    assert [packing.code_range(b, True) for b in (1, 2, 8)] == [(-1, 0), (-2, 1), (-128, 127)]
    assert [packing.code_range(b, False) for b in (1, 2, 8)] == [(0, 1), (0, 3), (0, 255)]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("features", [0, 1, 7, 8, 9, 31, 64, 130])
def test_tight_round_trip(bits, features):
    """The reference against Python's integers, and Numba's functions against the reference."""
    from qgnn.kernels.cpu.tight import pack_tight_row, unpack_tight_row

    generator = torch.Generator().manual_seed(features)
    codes = torch.randint(0, 1 << bits, (3, features), generator=generator).to(torch.uint8)
    data = packing.pack_tight_reference(codes, bits)
    assert data.shape == (3, packing.tight_bytes(features, bits)) == (3, -(-features // 8) * bits)
    for row, packed in zip(codes.tolist(), data, strict=True):
        # a row's groups in a row make one number: 8 codes of k bits fill k bytes
        number = sum(code << j * bits for j, code in enumerate(row))
        assert int.from_bytes(bytes(packed.tolist()), "little") == number
    assert_bitwise(packing.unpack_tight_reference(data, bits, features), codes)
    for i in range(3):
        row = np.zeros(-(-features // 8) * 8, np.uint8)
        row[:features] = codes[i].numpy()
        packed = np.full(tuple(data.shape), 0x5A, np.uint8)
        pack_tight_row(row, bits, packed, i)
        assert_bitwise(torch.from_numpy(packed[i]), data[i])
        assert (np.delete(packed, i, 0) == 0x5A).all()
        unpack_tight_row(packed, i, bits, row)
        assert_bitwise(torch.from_numpy(row[:features]), codes[i])
        assert not row[features:].any()
