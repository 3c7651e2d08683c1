"""What machine code has to be like, and why. A rule that a kernel breaks fails the tests, unless :data:`EXCEPTIONS` says why it may."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

from .compiler import Compiled

PARKED_BYTES = 8
"""Stack that is no spill: ptxas parks up to two registers, around the subroutine for the rare cases of an IEEE division above all, while
most of the 255 are free. On sm_90 no case needs it with Triton 3.9; with 3.6 aggregate_rows_mixed_bytes_7, aggregate_sum_fp16 and quantize_binary
do."""


@dataclass(frozen=True)
class Rule:
    """One demand.

    Attributes:
        name: as tables show it.
        reason: why it costs time to break it.
        applies: whether a kernel has to keep it.
        broken: what is wrong with a kernel, in words; "" where nothing is.
    """

    name: str
    reason: str
    applies: Callable[[Compiled], bool]
    broken: Callable[[Compiled], str]


def _spilled(row: Compiled) -> str:
    return f"{row.stack_bytes} bytes of stack" if row.stack_bytes > PARKED_BYTES else ""


def _narrow_loads(row: Compiled) -> str:
    if not row.loops:
        return f"loads {row.load_bits} bits at most" if row.load_bits < 128 else ""
    widths = [loop.load_bits for loop in row.loops if loop.load_bits < 128 and loop.load_bits]
    return f"inner loops load {widths} bits at most" if widths else ""


def _without_matrix(row: Compiled) -> str:
    without = sum(not loop.matrix for loop in row.loops)
    return f"{without} of {len(row.loops)} inner loops without" if without or not row.loops else ""


def _converted(row: Compiled) -> str:
    return f"{row.conversions} conversions" if row.conversions else ""


def _byte_accesses(row: Compiled) -> str:
    count = sum(loop.byte_accesses for loop in row.loops)
    return f"{count} accesses to single bytes of shared memory" if count else ""


RULES = (
    Rule(
        "no spills",
        "a register on the stack is read through memory, in the loop that has none to spare",
        lambda row: True,
        _spilled,
    ),
    Rule(
        "128-bit loads",
        "a load instruction of less takes as long to issue as one of 16 bytes, and these kernels are bound by loads or by the issue of instructions",
        lambda row: row.aligned and row.kernel != "_matmul_transposed_kernel",
        _narrow_loads,
    ),
    Rule(
        "integer matrix",
        "IMMA, wgmma and tcgen05 on int8 do twice the operations of their FP16 kin, and 16 times those of dp4a",
        lambda row: row.kernel == "_matmul_packed_kernel",
        _without_matrix,
    ),
    Rule(
        "no conversions",
        "I2F is issued at an eighth of the rate of an addition: at Reddit's size with 128 features that alone takes longer than the memory does. "
        "Codes are added as integers and converted once, behind the loop; where each has a factor, their bits are put into floats",
        lambda row: row.kernel in ("_aggregate_packed_kernel", "_aggregate_rows_kernel", "_gat_packed_kernel"),
        _converted,
    ),
    Rule(
        "weights [out, in]",
        "matrix instructions on bytes read both operands along the contracted dimension; weights stored [in, out] have to be turned byte by byte",
        lambda row: row.kernel == "_matmul_packed_kernel",
        _byte_accesses,
    ),
)

EXCEPTIONS: dict[tuple[str, str, str], str] = {
    ("no spills", "matmul_packed_4_columns_64_128_128_4_*", "sm_100"): (
        "4 warps are for Hopper, whose wgmma they fill; a B200 is given 8, and takes 4 only where autotuning measured that they are faster"
    ),
    ("128-bit loads", "aggregate_rows_mixed_*", "*"): (
        "a thread holds the sums of 64 codes, of 32 where 64 threads are a warp, which at 1 bit (2 bits) are less than 16 bytes: more sums would not "
        "fit into its registers"
    ),
    ("128-bit loads", "matmul_packed_*", "gfx942"): (
        "of 8 warps, 512 threads, each loads 8 bytes of a tile of 64 or 32 bytes a row, which 4 bits and less have; an MI300X is given 4 warps"
    ),
    ("128-bit loads", "gat_packed_4_*", "*"): (
        "a thread takes 16 codes of a tile (8 where 64 threads are a warp), those of a head of 16 channels, half of what 16 bytes hold; each costs "
        "about 10 instructions, with the weight of its head: the loads are not what takes the time"
    ),
    ("128-bit loads", "attention_scores_4", "sm_*"): "as above, once for each node",
    ("128-bit loads", "gat_packed_8_*", "gfx942"): "a tile has 8 codes for each of 256 threads, as above",
}
"""Why a kernel may break a rule, by name of the rule, case and target (with ``*``). Tables list them, and one that is not needed fails the tests."""


def exception(rule: Rule, row: Compiled) -> str:
    """The reason why ``row`` may break ``rule``; "" where it may not."""
    found = [
        reason
        for (name, case, target), reason in EXCEPTIONS.items()
        if name == rule.name and fnmatch(row.case, case) and fnmatch(row.target, target)
    ]
    return found[0] if found else ""


def verdict(rule: Rule, row: Compiled) -> str:
    """ "" where the rule does not apply, "ok", "exception" or "BROKEN"."""
    if row.error or not rule.applies(row):
        return ""
    if not rule.broken(row):
        return "ok"
    return "exception" if exception(rule, row) else "BROKEN"


def violations(rows: Sequence[Compiled]) -> list[str]:
    """What does not compile or breaks a rule without an exception, a line each."""
    lines = [f"{row.case} on {row.target} does not compile: {row.error}" for row in rows if row.error]
    for rule in RULES:
        lines += [
            f"{row.case} on {row.target} breaks {rule.name!r}: {rule.broken(row)}; {rule.reason}"
            for row in rows
            if verdict(rule, row) == "BROKEN"
        ]
    return lines


def idle_exceptions(rows: Sequence[Compiled]) -> list[tuple[str, str, str]]:
    """Exceptions that no row of a complete run needs."""
    used = {
        key
        for key in EXCEPTIONS
        for rule in RULES
        for row in rows
        if rule.name == key[0]
        and fnmatch(row.case, key[1])
        and fnmatch(row.target, key[2])
        and verdict(rule, row) == "exception"
    }
    return sorted(EXCEPTIONS.keys() - used)
