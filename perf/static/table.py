"""The static table as text, and the report of ``qgnn bench --suite static``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from .compiler import TARGETS, Compiled, compile_all, kernel_files, untried_configurations
from .rules import EXCEPTIONS, RULES, verdict, violations

COLUMNS = (
    "case",
    "target",
    "reads",
    "regs",
    "stack",
    "shared",
    "load",
    "matrix",
    "I2F",
    "per element",
    "warps",
    "rules",
)


def check_compiler() -> None:
    """Raises where the kernels are the interpreter's."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET=1 replaces the compiler by the interpreter; unset it")


def compile_report(
    targets: Sequence[str] = (), files: Sequence[str] = (), workers: int = 2
) -> tuple[list[Compiled], list[str]]:
    """The rows of ``targets`` and ``files``, of all where none are named, and what is wrong with them, a line each.

    Raises:
        ValueError: there is no such target or file, or TRITON_INTERPRET is set.
    """
    check_compiler()
    known = kernel_files()
    for what, names, listed in (("target", targets, TARGETS), ("kernel file", files, known)):
        if unknown := sorted(set(names) - set(listed)):
            raise ValueError(f"no {what} {', '.join(unknown)}; there are {', '.join(listed)}")
    rows = compile_all(targets or list(TARGETS), files or known, workers)
    untried = [] if files else [f"no compile case has the configuration {each}" for each in untried_configurations()]
    return rows, violations(rows) + untried


def report(targets: Sequence[str] = (), files: Sequence[str] = (), workers: int = 2) -> tuple[str, bool]:
    """The static table, the rules, and the predicted bounds, as Markdown; and whether everything compiles and keeps the rules.

    Without Triton's cache that took 500 s of processor time, which ``workers`` processes share, on a busy machine. Raises as :func:`compile_report`.
    """
    from .. import bounds

    rows, wrong = compile_report(targets, files, workers)
    parts = [
        "## Machine code", table(rows), "## Rules", rules_table(rows),
        "## Predicted bounds\n\nLeast times by bytes, instructions of the inner loop, and tensor cores; predictions, not measurements.",
        bounds.table(rows), "## Broken rules" if wrong else "All rules are kept.", *(f"- {line}" for line in wrong),
    ]  # fmt: skip
    return "\n\n".join(parts), not wrong


def table(rows: Sequence[Compiled]) -> str:
    """One line a kernel and target. "warps": resident ones, and their share of the most; "per element": instructions in the inner loops, of the
    fastest and of the slowest; "rules": how many of those that apply are kept."""
    lines = [f"| {' | '.join(COLUMNS)} |", "| --- | --- | --- |" + " ---: |" * (len(COLUMNS) - 3)]
    return "\n".join(lines + [f"| {' | '.join(_cells(row))} |" for row in rows])


def _cells(row: Compiled) -> tuple[str, ...]:
    if row.error:
        return (row.case, row.target, row.error, *[""] * (len(COLUMNS) - 3))
    found = [each for rule in RULES if (each := verdict(rule, row))]
    each_loop = row.per_element and (min(row.per_element), max(row.per_element))
    ends = list(dict.fromkeys(f"{each:.2f}" for each in each_loop))
    return (
        *(row.case, row.target, row.reads, str(row.registers), str(row.stack_bytes), str(row.shared_bytes), str(row.load_bits)),
        *(str(row.matrix or ""), str(row.conversions or ""), " to ".join(ends), f"{row.warps} ({row.occupancy:.0%})"),
        f"{sum(each != 'BROKEN' for each in found)}/{len(found)}",
    )  # fmt: skip


def rules_table(rows: Sequence[Compiled]) -> str:
    """One line a rule: its reason, how many rows keep it, which break it; below it the exceptions with their reasons."""
    lines = ["| rule | reason | ok | exceptions | broken |", "| --- | --- | ---: | ---: | ---: |"]
    for rule in RULES:
        found = [verdict(rule, row) for row in rows]
        counts = (str(found.count(word)) for word in ("ok", "exception", "BROKEN"))
        lines.append(f"| {rule.name} | {rule.reason} | {' | '.join(counts)} |")
    lines += [
        f"\nException of {name!r}: {case} on {target}: {reason}." for (name, case, target), reason in EXCEPTIONS.items()
    ]
    return "\n".join(lines)


def record(row: Compiled) -> dict[str, Any]:
    """A row as JSON has it, with what is computed from it."""
    verdicts = {rule.name: verdict(rule, row) for rule in RULES}
    computed = {"occupancy": row.occupancy, "matrix": row.matrix, "conversions": row.conversions}
    return asdict(row) | computed | {"per_element": row.per_element, "rules": verdicts}
