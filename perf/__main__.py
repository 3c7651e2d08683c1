"""``python -m qgnn.perf``: the benchmarks, from a plain source tree too; ``qgnn bench`` is the same with a progress bar."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import gpu, table
from .registry import SUITES, run, select


def main(arguments: list[str] | None = None) -> int:
    """Runs a suite. Exit code 1 if a result was wrong, 2 for bad input, 130 when interrupted."""
    import torch

    parser = argparse.ArgumentParser(
        prog="python -m qgnn.perf",
        description="Times our kernels, layers and models in turns with their peers, each checked before.",
        epilog="example: python -m qgnn.perf --suite cpu --graphs Cora --rounds 3 --out rows.csv",
    )
    parser.add_argument("--suite", choices=(*SUITES, "all"), default="all")
    parser.add_argument("--graphs", default="", help="data sets instead of the suite's, separated by spaces")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, metavar="FILE", help="CSV file that rows are added to as they come")
    parser.add_argument(
        "--small", action="store_true", help="suite gpu: tiny, on a CPU; so it is where there is no GPU"
    )
    parser.add_argument("--tests", action="store_true", help="only print the test files that have to pass before")
    chosen = parser.parse_args(arguments)
    if chosen.tests:
        print(*dict.fromkeys(row.tests for row in select(chosen.suite)))
        return 0
    wrong = False
    try:
        if chosen.rounds < 1:
            raise ValueError(f"--rounds {chosen.rounds} is less than 1")
        if chosen.suite == "static":
            from .static import report

            text, kept = report()
            print(text)
            return int(not kept)
        small = chosen.small or not torch.cuda.is_available()
        if chosen.suite == "gpu":
            measured, out = gpu.run(small), chosen.out if small else chosen.out or gpu.results()
        else:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            measured, out = run(chosen.suite, chosen.graphs.split(), chosen.rounds, device), chosen.out
        if out is not None:
            table.check_file(out)
        for records in measured:
            if out is not None:
                table.append(out, records)
            wrong |= any(gpu.amiss(line, small and chosen.suite == "gpu") for line in records)
            for line in records:
                print(table.line(line), flush=True)
        if chosen.suite == "gpu" and out is not None:
            out.with_suffix(".md").write_text(table.document(table.read(out)) + "\n", encoding="utf-8")
    except ValueError as error:
        print(f"qgnn.perf: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("qgnn.perf: interrupted; finished rows were kept", file=sys.stderr)
        return 130
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
