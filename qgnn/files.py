"""Reading data sets through the classes of PyTorch Geometric (PyG) and others, which download and process files: from a root that may be
read-only, with their output kept apart, and in one sentence what failed."""

from __future__ import annotations

import importlib.util
import os
import stat
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch_geometric.data import InMemoryDataset

T = TypeVar("T")


def writable(folder: Path) -> bool:
    """Whether files may be put there. A folder without write bits is meant to stay as it is, also for a superuser, whom no bit stops."""
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    return bool(existing.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH)) and os.access(existing, os.W_OK)


@contextmanager
def explained(what: str, cure: str) -> Iterator[None]:
    """One sentence for whatever PyG, OGB and what they call may raise; what they print goes to stderr, and no warning filter of theirs stays."""
    try:
        with warnings.catch_warnings(), redirect_stdout(sys.stderr):
            # Of OGB with pandas 3; nobody writes there.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            yield
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{what} ({type(error).__name__}: {reason}); {cure}") from error


def read_files(
    name: str,
    folder: Path,
    files: Sequence[str],
    origin: str,
    read: Callable[[], T],
    download: Callable[[], object] | None = None,
) -> T:
    """What ``read`` makes of ``files`` in ``folder``; missing ones are fetched from ``origin`` by ``download``, else by ``read``."""
    missing = [file for file in files if not (folder / file).exists()]
    wanted = f"{name} wants the files {', '.join(missing)} in {folder}, from {origin}"
    if missing and not writable(folder):
        raise ValueError(
            f"{wanted}, and that folder cannot be written to; put them there, or name another with --data-root or QGNN_DATA"
        )
    if missing:
        with explained(f"{wanted}, and downloading them failed", "put them there by hand"):
            (download or read)()
    cure = "delete the folder 'processed' beside it, if there is one, else the files, and load the data set again"
    with explained(f"the files {', '.join(files)} in {folder} cannot be read", cure):
        return read()


def opened(base: Any, folder: Path, *variants: Mapping[str, Any]) -> list[InMemoryDataset]:
    """PyG's class ``base``, once for each set of arguments; its processed files go below ``folder``, or are gone again if that is read-only."""
    with ExitStack() as stack:
        if not writable(folder) and not any(folder.glob("**/processed")):
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="qgnn-"))
            base = type(base.__name__, (base,), {"processed_dir": scratch})
        return [base(**arguments) for arguments in variants]


def need(name: str, module: str, install: str) -> None:
    """Raises a ``ValueError`` with the command that installs ``module`` if that is not there."""
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"{name} is read with {module}, which is not installed: pip install {install}")
