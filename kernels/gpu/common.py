"""What the Triton kernels share: the quantizer, the bit layouts of :mod:`..packing`, and what to compile ahead of time.

A kernel that reads or writes packed rows takes the arguments of :func:`layout_arguments` by name: the first place of
each bucket, its start, the stride of its rows, and ``CONTAINER``, the one container of all rows or ``None``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl

from ..packing import CONTAINERS, bucket_starts, row_bytes

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _cast(b_x, p_out):
    """float32 -> the type that ``p_out`` points to, rounded half to even."""
    if INTERPRETED and p_out.dtype.element_ty == tl.bfloat16:
        # Triton's interpreter cuts the lower half off. What it cuts here is 0. NaN stays as it is.
        b_bits = b_x.to(tl.int32, bitcast=True)
        b_even = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) & -65536
        b_x = tl.where(b_x == b_x, b_even, b_bits).to(tl.float32, bitcast=True)
    return b_x.to(p_out.dtype.element_ty)


@triton.jit
def _largest_code(b_bits, SIGNED: tl.constexpr):
    """``Q`` (A2Q eq. 1), int32: ``max(0, 2^(b-1) - 1)`` for signed codes, ``2^b - 1`` for unsigned ones."""
    if SIGNED:
        b_exponent = tl.maximum(b_bits.to(tl.int32) - 1, 0)
    else:
        b_exponent = b_bits.to(tl.int32)
    return (1 << b_exponent) - 1


@triton.jit
def _codes(b_x, b_step, b_q, SIGNED: tl.constexpr):
    """``sign(x) * min(floor(|x| / step + 0.5), Q)`` (A2Q eq. 1), int32; unsigned codes of negative values are 0.

    x and step are float32."""
    b_level = tl.floor(tl.div_rn(tl.abs(b_x), b_step) + 0.5)
    # Cut to Q before the cast: the quotient may exceed int32. Not tl.minimum: NaN must become an integer, here Q.
    b_largest = b_q.to(tl.float32)
    b_code = tl.where(b_level < b_largest, b_level, b_largest).to(tl.int32)
    if SIGNED:
        return tl.where(b_x < 0, -b_code, b_code)
    else:
        return tl.where(b_x < 0, 0, b_code)


@triton.jit
def _clipped(b_x, b_step, b_q, SIGNED: tl.constexpr):
    """``|x| >= step * Q`` (A2Q eq. 10); for unsigned codes also ``x < 0``."""
    b_clipped = tl.abs(b_x) >= b_step * b_q.to(tl.float32)
    if SIGNED:
        return b_clipped
    else:
        return b_clipped | (b_x < 0)


@triton.jit
def _extended(b_code, CONTAINER: tl.constexpr, SIGNED: tl.constexpr):
    """The number that the lowest ``CONTAINER`` bits of an int32 stand for; the bits above are ignored."""
    b_low = b_code & ((1 << CONTAINER) - 1)
    if SIGNED:
        return (b_low ^ (1 << (CONTAINER - 1))) - (1 << (CONTAINER - 1))
    else:
        return b_low


@triton.jit
def _unpack(b_bytes, CONTAINER: tl.constexpr, SIGNED: tl.constexpr):
    """uint8 ``[R, B]`` -> int32 ``[R, B * 8 / CONTAINER]``; the codes of a byte stay in the registers of one thread."""
    b_word = b_bytes.to(tl.int32)
    if CONTAINER == 8:
        return _extended(b_word, 8, SIGNED)
    elif CONTAINER == 4:
        return tl.interleave(_extended(b_word, 4, SIGNED), _extended(b_word >> 4, 4, SIGNED))
    elif CONTAINER == 2:
        b_even = tl.interleave(_extended(b_word, 2, SIGNED), _extended(b_word >> 4, 2, SIGNED))
        b_odd = tl.interleave(_extended(b_word >> 2, 2, SIGNED), _extended(b_word >> 6, 2, SIGNED))
        return tl.interleave(b_even, b_odd)
    else:
        tl.static_assert(CONTAINER == 1, "a container that is stored has 1, 2, 4 or 8 bits")
        b_even = tl.interleave(
            tl.interleave(_extended(b_word, 1, SIGNED), _extended(b_word >> 4, 1, SIGNED)),
            tl.interleave(_extended(b_word >> 2, 1, SIGNED), _extended(b_word >> 6, 1, SIGNED)),
        )
        b_odd = tl.interleave(
            tl.interleave(_extended(b_word >> 1, 1, SIGNED), _extended(b_word >> 5, 1, SIGNED)),
            tl.interleave(_extended(b_word >> 3, 1, SIGNED), _extended(b_word >> 7, 1, SIGNED)),
        )
        return tl.interleave(b_even, b_odd)


@triton.jit
def _pack(b_codes, CONTAINER: tl.constexpr):
    """int32 ``[R, F]`` -> uint8 ``[R, F * CONTAINER / 8]``; bits above the container are dropped."""
    LANES: tl.constexpr = 8 // CONTAINER
    b_low = b_codes & ((1 << CONTAINER) - 1)
    if LANES == 1:
        return b_low.to(tl.uint8)
    else:
        # [R, F / LANES, LANES]
        b_lanes = tl.reshape(b_low, (b_codes.shape[0], b_codes.shape[1] // LANES, LANES))
        b_shifts = (tl.arange(0, LANES) * CONTAINER)[None, None, :]
        return tl.sum(b_lanes << b_shifts, axis=2).to(tl.uint8)


@triton.jit
def _places(p_pos, b_rows, m_rows):
    """Place in bucket order of each row; ``p_pos`` is None where a row's place is its index."""
    if p_pos is None:
        return b_rows
    else:
        return tl.load(p_pos + b_rows, mask=m_rows, other=0)


@triton.jit
def _row_address(
    b_pos, first_4, first_2, first_1, first_0, start_4, start_2, start_1, stride_8, stride_4, stride_2, stride_1,
    CONTAINER: tl.constexpr,
):  # fmt: skip
    """Container (int32) and first byte (int64) of the rows at the places ``b_pos``; 0 and 0 for a row without bytes."""
    b_place = b_pos.to(tl.int64)
    b_zero = b_pos.to(tl.int32) * 0
    if CONTAINER == 8:
        return b_zero + 8, b_place * stride_8
    elif CONTAINER == 4:
        return b_zero + 4, b_place * stride_4
    elif CONTAINER == 2:
        return b_zero + 2, b_place * stride_2
    elif CONTAINER == 1:
        return b_zero + 1, b_place * stride_1
    elif CONTAINER == 0:
        return b_zero, b_place * 0
    else:
        b_container = tl.where(b_pos < first_1, 2, tl.where(b_pos < first_0, 1, 0))
        b_container = tl.where(b_pos < first_4, 8, tl.where(b_pos < first_2, 4, b_container))
        b_narrow = tl.where(b_pos < first_0, start_1 + (b_place - first_1) * stride_1, 0)
        b_narrow = tl.where(b_pos < first_1, start_2 + (b_place - first_2) * stride_2, b_narrow)
        b_wide = tl.where(b_pos < first_4, b_place * stride_8, start_4 + (b_place - first_4) * stride_4)
        return b_container, tl.where(b_pos < first_2, b_wide, b_narrow)


@triton.jit
def _store_bucket(p_data, b_codes, b_pos, m_rows, i_f, first, end, start, stride, CONTAINER: tl.constexpr):
    """Packs a tile and stores its rows at the places ``first`` to ``end``, ``stride`` bytes each, the zeros behind a row included.

    The address is computed for one bucket at a time: merged with others, the compiler would not see that 16 divides it."""
    b_bytes = _pack(b_codes, CONTAINER)
    o_b = i_f * b_bytes.shape[1] + tl.arange(0, b_bytes.shape[1])
    b_address = start + (b_pos - first).to(tl.int64) * stride
    m = (m_rows & (b_pos >= first) & (b_pos < end))[:, None] & (o_b < stride)[None, :]
    tl.store(p_data + b_address[:, None] + o_b[None, :], b_bytes, mask=m)


@triton.jit
def _store_codes(
    p_data, p_pos, b_codes, b_rows, m_rows, i_f, first_4, first_2, first_1, first_0, start_4, start_2, start_1,
    stride_8, stride_4, stride_2, stride_1, CONTAINER: tl.constexpr,
):  # fmt: skip
    """Packs a tile of codes into its rows' own containers: int32 ``[R, F]``, 0 beyond the last feature, F a power of two of at
    least 8, and ``i_f`` the tile's number along the features. Tiles that cover all features cover the padding of the rows."""
    b_pos = _places(p_pos, b_rows, m_rows)
    if CONTAINER == 8:
        _store_bucket(p_data, b_codes, b_pos, m_rows, i_f, 0, first_4, 0, stride_8, 8)
    elif CONTAINER == 4:
        _store_bucket(p_data, b_codes, b_pos, m_rows, i_f, 0, first_2, 0, stride_4, 4)
    elif CONTAINER == 2:
        _store_bucket(p_data, b_codes, b_pos, m_rows, i_f, 0, first_1, 0, stride_2, 2)
    elif CONTAINER == 1:
        _store_bucket(p_data, b_codes, b_pos, m_rows, i_f, 0, first_0, 0, stride_1, 1)
    elif CONTAINER is None:
        # The rows in each bucket, a byte for each: one reduction tells which containers this tile has to be packed for.
        tl.static_assert(b_codes.shape[0] <= 128, "a tile's rows are counted in bytes")
        b_narrow = tl.where(b_pos < first_1, 1 << 16, tl.where(b_pos < first_0, 1 << 24, 0))
        b_one = tl.where(b_pos < first_4, 1, tl.where(b_pos < first_2, 1 << 8, b_narrow))
        n_rows = tl.sum(tl.where(m_rows, b_one, 0), axis=0)
        if (n_rows & 255) != 0:
            _store_bucket(p_data, b_codes, b_pos, m_rows, i_f, 0, first_4, 0, stride_8, 8)
        if ((n_rows >> 8) & 255) != 0:
            _store_bucket(p_data, b_codes, b_pos, m_rows, i_f, first_4, first_2, start_4, stride_4, 4)
        if ((n_rows >> 16) & 255) != 0:
            _store_bucket(p_data, b_codes, b_pos, m_rows, i_f, first_2, first_1, start_2, stride_2, 2)
        if (n_rows >> 24) != 0:
            _store_bucket(p_data, b_codes, b_pos, m_rows, i_f, first_1, first_0, start_1, stride_1, 1)


@triton.jit
def _load_codes(p_data, b_container, b_address, m, o_f, SIGNED: tl.constexpr):
    """Codes (int32 ``[R, F]``) of the features ``o_f`` of packed rows, a byte load for each: where the result is as wide as
    the codes are narrow, these loads hit the L1 cache and cost less than joining and laying out unpacked bytes anew."""
    b_bit = o_f[None, :] * b_container[:, None]
    p_byte = p_data + b_address[:, None] + (b_bit >> 3)
    b_byte = tl.load(p_byte, mask=m & (b_container > 0)[:, None], other=0).to(tl.int32)
    b_code = (b_byte >> (b_bit & 7)) & ((1 << b_container) - 1)[:, None]
    if SIGNED:
        b_half = (1 << tl.maximum(b_container - 1, 0))[:, None]
        return (b_code ^ b_half) - b_half
    else:
        return b_code


LAYOUT_FIRSTS = ["first_4", "first_2", "first_1", "first_0"]
"""For ``triton.jit(do_not_specialize=LAYOUT_FIRSTS)``: they change with every training step, and nothing needs their
divisibility."""

OUT_FIRSTS = [f"out_{name}" for name in LAYOUT_FIRSTS]
"""The same of the rows that a kernel writes, where it also reads packed rows or could."""

LAYOUT_SIGNATURE = {
    **dict.fromkeys(LAYOUT_FIRSTS, "i32"),
    **dict.fromkeys(["start_4", "start_2", "start_1"], "i32:16"),
    **dict.fromkeys(["stride_8", "stride_4", "stride_2", "stride_1"], "i32:16"),
}
"""The layout's arguments in the signature of a :class:`CompileCase`, where rows have 16 bytes or more."""

OUT_SIGNATURE = {f"out_{name}": kind for name, kind in LAYOUT_SIGNATURE.items()}
"""Likewise of the rows that a kernel writes."""


def layout_arguments(counts: Sequence[int], features: int, prefix: str = "") -> dict[str, int | None]:
    """The arguments by which a kernel finds packed rows (:func:`..packing.bucket_starts`); ``prefix`` is put before their names.

    Worked example, ``counts = (0, 1, 2, 0, 1)`` of 6 codes: first_4, first_2, first_1, first_0 = 0, 1, 3, 3;
    start_4, start_2, start_1 = 0, 16, 32; stride_8, stride_4, stride_2, stride_1 = 6, 3, 2, 1; CONTAINER = None.
    """
    arguments: dict[str, int | None] = {f"{prefix.upper()}CONTAINER": uniform_container(counts)}
    starts, first = bucket_starts(counts, features), 0
    for container, count, start in zip(CONTAINERS, counts, starts, strict=False):
        if container != 8:
            arguments[f"{prefix}first_{container}"] = first
        if container not in (0, 8):
            arguments[f"{prefix}start_{container}"] = start
        if container:
            arguments[f"{prefix}stride_{container}"] = row_bytes(container, features)
        first += count
    return arguments


MAX_GRID = (2**31 - 1, 2**16 - 1, 2**16 - 1)
"""Programs along each axis of a grid, CUDA's limits."""


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current GPU, whatever holds the tensors; inside, that is ``device``."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """``kernel[grid](**arguments)`` on the GPU that holds the tensors among the arguments."""
    if any(size > most for size, most in zip(grid, MAX_GRID, strict=False)):
        raise ValueError(
            f"the tensors are too large for one launch: a grid of {grid}, and a GPU takes {MAX_GRID}; split the features"
        )
    device = next(argument.device for argument in arguments.values() if isinstance(argument, torch.Tensor))
    with on_device(device):
        kernel[grid](**arguments)


TILE = 1024
"""Elements of a tile, 8 a thread. Compiled for sm_90, quantize of mixed rows with local gradients takes 106 registers; with 2048
elements it takes 143, so that half as many warps are resident."""

EXACT = {"num_warps": 4, "enable_fp_fusion": False}
"""Launch options of what must agree with the reference to the bit: no fused multiply-add."""


def tile_blocks(features: int) -> dict[str, int]:
    """Rows and features of a tile; packing wants a power of two of features, and the bytes of 8 clip bits."""
    block = min(max(triton.next_power_of_2(features), 8), 256)
    return {"BLOCK_R": TILE // block, "BLOCK_F": block}


def check_dtype(name: str, x: torch.Tensor) -> None:
    """Raises for what no kernel takes, float64 above all."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(
            f"{name} is {x.dtype}; the Triton kernels take float16, bfloat16 and float32: convert it, or use backend 'reference'"
        )


def empty_packed(counts: Sequence[int], features: int, device: torch.device) -> torch.Tensor:
    """A buffer for :func:`_store_codes`, which writes the zeros behind a row, but not those between two buckets."""
    size = bucket_starts(counts, features)[-1]
    rows = sum(count * row_bytes(c, features) for c, count in zip(CONTAINERS, counts, strict=True))
    return (torch.empty if rows == size else torch.zeros)(size, dtype=torch.uint8, device=device)


def uniform_container(counts: Sequence[int]) -> int | None:
    """The container that all rows have, or None if they differ."""
    return next((c for c, count in zip(CONTAINERS, counts, strict=True) if count == sum(counts)), None)


@dataclass(frozen=True)
class CompileCase:
    """A kernel as it is compiled without a GPU (:mod:`qgnn.perf.static`); kernel files list theirs: ``COMPILE_CASES``.

    ``signature`` names every argument that is not a constexpr, with Triton's type: ``"*fp32"`` a pointer (taken to be
    aligned to 16 bytes), ``"i32"`` an integer, ``"i32:16"`` one that is divisible by 16. ``constexprs`` holds the
    others: capitals, blocks, and each optional pointer that is None. ``options`` are those of the launch
    (``num_warps``, ``enable_fp_fusion``). Example:

    ``CompileCase("mixed", _kernel, {"p_out": "*fp32", "N": "i32", **LAYOUT_SIGNATURE}, {"BLOCK_F": 128})``
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, Any] = field(default_factory=lambda: {"num_warps": 4})
