"""What the suite "gpu" has to show, as data, and the table that compares it with measured rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Value = str | int | float | None
Record = Mapping[str, Value]
Runs = Mapping[tuple[str, str], Sequence[Record]]


@dataclass(frozen=True)
class Target:
    """A figure of one run.

    Attributes:
        operation, shape: of the rows.
        candidate: whose figure it is.
        over: the fastest of these that ran is what it is compared with.
        least: what the ratio has to be.
        kind: "time": theirs over ours; "memory": the same of the peak; "bound": share of the bound; "runs": it only has to.
    """

    operation: str
    shape: str
    candidate: str
    over: tuple[str, ...] = ()
    least: float = 0.0
    kind: Literal["time", "memory", "bound", "runs"] = "time"

    def __str__(self) -> str:
        what = f"{self.operation}, {self.shape}: {self.candidate}"
        if self.kind == "runs":
            return f"{what} runs"
        if self.kind == "bound":
            return f"{what}, share of the bound"
        saved = "times less memory than" if self.kind == "memory" else "over"
        return f"{what} {saved} {' or '.join(self.over)}"

    def found(self, run: Sequence[Record]) -> float | None:
        """The figure; 0 where the candidate has none because it failed, None where there is nothing to compare with."""
        rows = {str(row["candidate"]): row for row in run}
        ours = rows.get(self.candidate)
        if ours is None:
            return None
        if ours["status"] != "ok":
            return 0.0
        if self.kind == "runs":
            return 1.0
        if self.kind == "bound":
            return float(ours["bound"]) if ours["bound"] else None
        column = "peak_bytes" if self.kind == "memory" else "ms_50"
        theirs = [float(value) for name in self.over if name in rows and (value := rows[name][column])]
        return min(theirs) / float(ours[column] or 1) if theirs and ours[column] else None


_AGGREGATE = "reddit-size F=128"
_PRODUCT = "reddit-size [232965,602]x[602,128]"
_GCN, _SMALL_GCN = "reddit-size gcn 602->128->41", "cora-size gcn 1433->128->7"
_STEP = "arxiv-size gcn a2q hidden 128"

TARGETS = (
    Target("aggregate", _AGGREGATE, "qgnn-fp32", ("torch-csr-fp32",), 1.2),
    Target("aggregate", _AGGREGATE, "qgnn-int8", ("torch-csr-fp32",), 3.5),
    Target("aggregate", _AGGREGATE, "qgnn-int4", ("torch-csr-fp32",), 6.0),
    Target("aggregate", "reddit-size F=256", "qgnn-mixed-2", ("torch-csr-fp32",), 8.0),
    Target("aggregate", _AGGREGATE, "qgnn-int8", ("torch-csr-fp16",), 1.7),
    Target("aggregate", _AGGREGATE, "qgnn-int8", ("pyg-scatter-fp32",), 10.0),
    *(Target("aggregate", _AGGREGATE, f"qgnn-{name}", least=0.7, kind="bound") for name in ("fp32", "int8", "int4")),
    Target("matmul", _PRODUCT, "qgnn-int8", ("torch-int-mm",), 0.9),
    Target("matmul", _PRODUCT, "qgnn-int4", ("qgnn-int8",), 1.0),
    Target("matmul", _PRODUCT, "qgnn-mixed-1-to-4", ("qgnn-int8",), 1.0),
    Target("matmul-quantize", _PRODUCT, "qgnn-int8", ("torch-int-mm",), 2.0),
    Target("model", _GCN, "qgnn-int8", ("torch-csr-fp32", "pyg-adjacency-fp32", "pyg-scatter-fp32"), 4.0),
    Target("model", _GCN, "qgnn-int8", ("torch-csr-fp16",), 2.0),
    Target("model", _SMALL_GCN, "qgnn-int8-graph", ("pyg-scatter-fp32",), 5.0),
    Target("train-step", _STEP, "qgnn", ("pyg-fp32",), 1.0),
    Target("train-step", _STEP, "qgnn", ("pyg-fp32",), 1 / 0.6, "memory"),
    Target("train-step", "reddit-size gat a2q", "qgnn", kind="runs"),
)
"""Ratios of one run, our time in the denominator."""

TWICE = "two calls gave different bits"
"""Reason of a row of ours whose second result was another."""


def compared(runs: Runs) -> str:
    """A Markdown table: each target, what was found, and "met" or by how much it is short. Empty where no row has a target."""
    if not any((target.operation, target.shape) in runs for target in TARGETS):
        return ""
    lines = ["| target | wanted | found | |", "| --- | ---: | ---: | --- |"]
    lines += [f"| {target} | {' | '.join(_verdict(target, runs))} |" for target in TARGETS]
    ours = list(_ours(runs))
    differing = sum(TWICE in str(row["reason"]) for row in ours)
    compared = sum(row["status"] == "ok" for row in ours) + differing
    lines.append(
        f"| two calls of ours give equal bits | {compared} | {compared - differing} | {_word(not differing)} |"
    )
    return "\n".join(lines)


def _ours(runs: Runs) -> Iterator[Record]:
    return (row for run in runs.values() for row in run if str(row["candidate"]).startswith("qgnn"))


def _verdict(target: Target, runs: Runs) -> tuple[str, str, str]:
    wanted = f"{target.least:.3g}" if target.least else ""
    found = target.found(runs.get((target.operation, target.shape), ()))
    if found is None:
        return wanted, "", "not measured"
    if target.kind == "runs":
        return wanted, "", _word(found > 0)
    if found >= target.least:
        return wanted, f"{found:.2f}", "met"
    return wanted, f"{found:.2f}", f"short by {target.least / found:.2f} x" if found else "failed"


def _word(met: bool) -> str:
    return "met" if met else "failed"
