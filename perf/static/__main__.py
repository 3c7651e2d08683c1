"""``python -m qgnn.perf.static``."""

from __future__ import annotations

import argparse
import json
import os
import sys

from .compiler import TARGETS
from .rules import idle_exceptions
from .table import compile_report, record, rules_table, table


def main(arguments: list[str] | None = None) -> int:
    """The command line. Exit code 1 if a kernel does not compile or breaks a rule, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m qgnn.perf.static",
        description="Compiles every Triton kernel without a GPU, and checks the machine code by the rules of qgnn.perf.static.rules.",
        epilog="example: python -m qgnn.perf.static --target sm_90 --file quantize --json",
    )
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="default: all of them")
    parser.add_argument("--file", action="append", help="kernel file, such as quantize; default: all of them")
    parser.add_argument(
        "--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="JSON instead of tables")
    chosen = parser.parse_args(arguments)
    try:
        rows, wrong = compile_report(chosen.target or (), chosen.file or (), chosen.workers)
    except ValueError as error:
        parser.error(str(error))
    if chosen.json:
        idle = idle_exceptions(rows) if not (chosen.target or chosen.file) else []
        json.dump(
            {"rows": [record(row) for row in rows], "wrong": wrong, "idle_exceptions": idle}, sys.stdout, indent=1
        )
        print()
    else:
        print("\n\n".join([table(rows), rules_table(rows), *wrong]))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
