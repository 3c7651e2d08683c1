"""Machine code as a graph of basic blocks, and what its inner loops hold.

Two listings are read: NVIDIA's SASS as ``nvdisasm -c`` prints it, and LLVM's assembly for AMD. A loop is a natural loop: the blocks that reach a
back edge, a branch to a block that every path to the branch leads through, without passing that block. So neither cold blocks that a compiler puts
behind a kernel nor its padding are taken for loops. A loop is looked at if it reads global memory or multiplies matrices, and is an inner one if it
has no other such loop in it; what waits for a barrier in it, a loop to itself, counts once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Instruction(NamedTuple):
    """``opcode``: with its suffixes; ``operands``: the rest; ``guarded``: executed under a predicate."""

    opcode: str
    operands: str
    guarded: bool = False


@dataclass(frozen=True)
class Loop:
    """An inner loop. Numbers are those of one thread and one pass.

    Attributes:
        instructions: issued in it, if every branch inside falls through.
        load_bits: the widest load from global memory.
        row_bits: what its loads of that width read; in a loop with matrix instructions, what all loads read.
        integer: instructions of those that NVIDIA's GPUs start at half the rate of others; not counted for AMD's.
        matrix: instructions of tensor or matrix cores on integers.
        conversions: from integer to float.
        byte_accesses: accesses to shared memory that move single bytes.
    """

    instructions: int
    load_bits: int
    row_bits: int
    integer: int
    matrix: int
    conversions: int
    byte_accesses: int


@dataclass(frozen=True)
class Isa:
    """How to read a listing. Each function is asked for an instruction.

    Attributes:
        parse: the lines of a listing -> labels (strings) and instructions.
        target: the label that it may go on at, "" where it only goes on behind itself.
        falls: whether what stands behind it can come next.
        load_bits: bits that it loads from global memory; 0 for other instructions, and for loads that wait for other programs of the launch.
        integer, matrix, conversion, byte_access: regular expressions that the opcodes of :class:`Loop`'s counts start with.
    """

    parse: Callable[[str], Iterator[str | Instruction]]
    target: Callable[[Instruction], str]
    falls: Callable[[Instruction], bool]
    load_bits: Callable[[Instruction], int]
    integer: str
    matrix: str
    conversion: str
    byte_access: str

    def loops(self, listing: str) -> tuple[Loop, ...]:
        """The inner loops of a kernel, in the order of the code."""
        blocks, successors = self._blocks(listing)
        wanted = {
            index
            for index, block in enumerate(blocks)
            if any(self.load_bits(instruction) or re.match(self.matrix, instruction.opcode) for instruction in block)
        }
        return tuple(
            self._loop([instruction for block in sorted(body) for instruction in blocks[block]])
            for body in inner_loops(successors, wanted)
        )

    def load_bits_of(self, listing: str) -> int:
        """The widest load from global memory anywhere in a kernel."""
        return max((self.load_bits(i) for i in self.parse(listing) if isinstance(i, Instruction)), default=0)

    def _blocks(self, listing: str) -> tuple[list[list[Instruction]], list[list[int]]]:
        """Basic blocks, and the blocks that may follow each."""
        blocks: list[list[Instruction]] = [[]]
        labels: dict[str, int] = {}
        for item in self.parse(listing):
            if isinstance(item, str):
                if blocks[-1]:
                    blocks.append([])
                labels[item] = len(blocks) - 1
            else:
                blocks[-1].append(item)
                if self.target(item) or not self.falls(item):
                    blocks.append([])
        successors: list[list[int]] = []
        for index, block in enumerate(blocks):
            last = block[-1] if block else Instruction("", "")
            follow = [labels[self.target(last)]] if self.target(last) in labels else []
            if self.falls(last) and index + 1 < len(blocks):
                follow.append(index + 1)
            successors.append(follow)
        return blocks, successors

    def _loop(self, body: Sequence[Instruction]) -> Loop:
        def count(pattern: str) -> int:
            return sum(bool(re.match(pattern, instruction.opcode)) for instruction in body)

        loads, matrix = [bits for instruction in body if (bits := self.load_bits(instruction))], count(self.matrix)
        widest = max(loads, default=0)
        row_bits = sum(bits for bits in loads if matrix or bits == widest)
        return Loop(
            instructions=len(body),
            load_bits=widest,
            row_bits=row_bits,
            integer=count(self.integer),
            matrix=matrix,
            conversions=count(self.conversion),
            byte_accesses=count(self.byte_access),
        )


def inner_loops(successors: Sequence[Sequence[int]], wanted: set[int]) -> list[set[int]]:
    """The natural loops of a graph, whose entry is 0, that have a wanted block and no other such loop in them, by their blocks.

    Worked example: ``[[1], [2], [2, 1, 3], []]`` has the loops {1, 2} and {2}. If 2 is wanted, {2} is the inner one; if 1 is, {1, 2}.
    """
    order, predecessors = _reached(successors)
    dominators = _dominators(order, predecessors)
    bodies: dict[int, set[int]] = {}
    for block in order:
        for header in successors[block]:
            if dominators[block] >> header & 1:
                body = bodies.setdefault(header, {header})
                stack = [block]
                while stack:
                    inside = stack.pop()
                    if inside not in body:
                        body.add(inside)
                        stack += predecessors[inside]
    bodies = {header: body for header, body in bodies.items() if body & wanted}
    return [body for header, body in sorted(bodies.items()) if not (body - {header}) & bodies.keys()]


def _reached(successors: Sequence[Sequence[int]]) -> tuple[list[int], dict[int, list[int]]]:
    """The blocks that can be reached from 0, the nearest first, and what comes before each."""
    predecessors: dict[int, list[int]] = {0: []}
    order = [0]
    for block in order:  # which grows
        for follow in successors[block]:
            if follow not in predecessors:
                order.append(follow)
            predecessors.setdefault(follow, []).append(block)
    return order, predecessors


def _dominators(order: Sequence[int], predecessors: Mapping[int, Sequence[int]]) -> dict[int, int]:
    """For each block the blocks that every path to it leads through, as bits of an integer."""
    everything = (1 << (max(order) + 1)) - 1
    dominators = dict.fromkeys(order, everything) | {0: 1}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            common = everything
            for before in predecessors[block]:
                common &= dominators[before]
            common |= 1 << block
            changed |= common != dominators[block]
            dominators[block] = common
    return dominators


def _parse_sass(listing: str) -> Iterator[str | Instruction]:
    for line in listing.splitlines():
        if found := re.match(r"([.$][\w.$]+|\w[\w$]*):", line):
            yield found[1]
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+\{?\s*(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", line):
            yield Instruction(found[2], found[3].strip(), bool(found[1]))


def _sass_target(instruction: Instruction) -> str:
    if not re.match(r"(BRA|JMP|CALL)\b", instruction.opcode):
        return ""
    found = re.search(r"`\(([^)]+)\)", instruction.operands)
    return found[1] if found else ""


def _sass_falls(instruction: Instruction) -> bool:
    if instruction.guarded or not re.match(r"(BRA|JMP|EXIT|RET)\b", instruction.opcode):
        return True
    # "BRA.U UP0, `(.L_x_0)" and "BRA P1, `(.L_x_0)" carry their condition as an operand.
    return instruction.opcode.startswith(("BRA", "JMP")) and not instruction.operands.startswith("`")


def _sass_load_bits(instruction: Instruction) -> int:
    """Of ``LDG.E.128`` and of the asynchronous copies ``LDGSTS.E.BYPASS.128``. ``LDG.E.STRONG.GPU`` reads what other programs just wrote."""
    parts = instruction.opcode.split(".")
    if parts[0] not in ("LDG", "LDGSTS") or "STRONG" in parts:
        return 0
    widths = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
    return next((widths[part] for part in parts if part in widths), 32)


SASS = Isa(
    _parse_sass,
    _sass_target,
    _sass_falls,
    _sass_load_bits,
    # IMAD is not among them: it goes to the pipe of the multiply-adds
    integer=r"(IADD3?|VIADD|VIADDMNMX|LOP3?|SHF|SHL|SHR|PRMT|ISETP|IMNMX|VIMNMX3?|SEL|LEA|BFE|BFI|IABS|IDP)\b",
    # Ampere and Ada; Hopper's wgmma; Blackwell's tcgen05 kind::i8
    matrix=r"IMMA\.\d+\.[SU]8|IGMMA\.\w+\.[SU]8|UTCIMMA",
    conversion=r"I2FP?\b",
    byte_access=r"(LDS|STS)\.[US]8\b",
)


def _parse_amd(listing: str) -> Iterator[str | Instruction]:
    for line in listing.split(".Lfunc_end0:")[0].splitlines():
        line = line.split(";")[0].rstrip()
        if found := re.match(r"([.\w$]+):", line):
            yield found[1]
        elif found := re.match(r"\s+([a-z]\w+)\s*(.*)", line):
            yield Instruction(found[1], found[2])


def _amd_load_bits(instruction: Instruction) -> int:
    """Of ``global_load_dwordx4`` and its like; ``nt`` and ``sc1`` ask past the caches for what other programs just wrote."""
    found = re.match(r"(?:global|buffer|flat)_load_(?:(u|s)(byte|short)|(short)|dword(?:x(\d))?)", instruction.opcode)
    if found is None or re.search(r"\b(nt|sc[01])\b", instruction.operands):
        return 0
    if found[2] or found[3]:
        return {"byte": 8, "short": 16}[found[2] or found[3]]
    return 32 * int(found[4] or 1)


AMDGCN = Isa(
    _parse_amd,
    lambda i: i.operands.split(",")[-1].strip() if re.match(r"s_c?branch", i.opcode) else "",
    lambda i: i.opcode not in ("s_branch", "s_endpgm", "s_setpc_b64"),
    _amd_load_bits,
    integer=r"(?!)",
    matrix=r"v_mfma_i32_\w*i8",
    conversion=r"v_cvt_f\d+_(i|u)",
    byte_access=r"ds_(read|write)_[bui]8",
)
