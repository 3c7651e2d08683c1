"""``python tests/plain``: the GPU tests, from a plain source tree and with the packages that there are; what ``make gpu`` runs first.

Files run side by side, as they compile more than they compute. One that imports a package which is not installed is left out, and named. Exit code 1
if a test failed or the time was over.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import PathFinder
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SECONDS = 140
WORKERS = 8
NO_TESTS = 5
OPTIONAL = ("numba", "pandas", "safetensors", "scipy", "sklearn", "typer")
"""What `pip install` brings and the GPU's own path does without."""


def environment() -> dict[str, str]:
    """With what stands in for hypothesis, where there is none."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    if PathFinder.find_spec("hypothesis", [path for path in sys.path if Path(path).resolve() != HERE]) is None:
        paths.append(str(HERE))
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def tested(file: Path, variables: dict[str, str], end: float) -> bool:
    """Runs one file, prints what it said, and returns whether it is fine."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", "-m", "gpu", str(file)]
    try:
        limit = max(0.0, end - time.monotonic())
        done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        print(f"{file.name}: not done within {SECONDS} s", flush=True)
        return False
    absent = re.search(rf"^E +ModuleNotFoundError: No module named '({'|'.join(OPTIONAL)})", done.stdout, re.MULTILINE)
    if absent and done.returncode == 2:
        print(f"{file.name}: left out, {absent[1]} is not installed", flush=True)
        return True
    if done.returncode != NO_TESTS:
        print(f"{file.name}:\n{done.stdout[-4000:]}{done.stderr[-1000:]}", flush=True)
    return done.returncode in (0, NO_TESTS)


def main() -> int:
    """Runs the files that have GPU tests."""
    files = sorted(
        f for f in (ROOT / "tests").glob("test_*.py") if re.search(r"mark\.gpu|backend", f.read_text("utf-8"))
    )
    variables, end = environment(), time.monotonic() + SECONDS
    with ThreadPoolExecutor(WORKERS) as pool:
        fine = list(pool.map(lambda file: tested(file, variables, end), files))
    return int(not all(fine))


if __name__ == "__main__":
    sys.exit(main())
