"""Where features come from: tensors, NumPy arrays and memory maps, Parquet and Arrow files, read a block of rows at a time."""

from __future__ import annotations

import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..files import need

BLOCK = 1 << 22
"""Elements of a block: 16 MB in float32."""

FeatureSource = Tensor | NDArray[Any] | str | os.PathLike[str]
"""What features are read from. A path ends in ``.npy``, ``.parquet``, ``.arrow`` or ``.feather``; the columns of a table are the features, or it has
one column of lists."""


class Source(ABC):
    """A matrix ``[rows, features]`` that can be read more than once.

    Attributes:
        name: for messages.
    """

    def __init__(self, name: str, rows: int, features: int) -> None:
        if features < 1:
            raise ValueError(f"{name} has no features; leave it out")
        self.name, self.rows, self.features = name, rows, features

    @property
    def block_rows(self) -> int:
        return max(1, BLOCK // self.features)

    @abstractmethod
    def blocks(self) -> Iterator[Tensor]:
        """Its rows in their order, float32 ``[n, features]`` on the CPU, at most :attr:`block_rows` at a time; a block is the caller's own."""


def source_of(given: FeatureSource | Source, name: str) -> Source:
    """The source behind ``given``.

    Raises:
        TypeError, ValueError: it is no matrix of numbers, or a file that cannot be read; the sentence says which.
    """
    if isinstance(given, Source):
        return given
    if isinstance(given, Tensor | np.ndarray):
        return _Array(given, name)
    path = Path(given)
    if not path.is_file():
        raise ValueError(f"there is no file {path}, which {name} is to be read from")
    if path.suffix == ".npy":
        return _Array(np.load(path, mmap_mode="r"), str(path))
    if path.suffix == ".parquet":
        return _Parquet(path)
    if path.suffix in (".arrow", ".feather"):
        return _Arrow(path)
    raise ValueError(f"{path} is no file that features are read from: .npy, .parquet, .arrow or .feather")


class _Array(Source):
    def __init__(self, given: Tensor | NDArray[Any], name: str) -> None:
        if len(given.shape) != 2:
            raise ValueError(f"{name} must be a matrix [nodes, features], got shape {tuple(given.shape)}")
        if isinstance(given, np.ndarray) and given.dtype.kind not in "fiub":
            raise TypeError(f"{name} must hold real numbers, got {given.dtype}")
        super().__init__(name, *given.shape)
        self.given = given

    def blocks(self) -> Iterator[Tensor]:
        for first in range(0, self.rows, self.block_rows):
            part = self.given[first : first + self.block_rows]
            if isinstance(part, Tensor):
                yield part.detach().to("cpu", torch.float32, copy=True)
            else:
                yield torch.from_numpy(np.array(part, dtype=np.float32, order="C"))
                _forget(part)


def _forget(array: NDArray[Any]) -> None:
    """Gives back the memory of the pages of a file that were read through a memory map; the system has them in its cache still."""
    base: Any = array
    while isinstance(base, np.ndarray):
        mode, base = getattr(base, "mode", ""), base.base
        # not of a copy-on-write map, whose changes would be lost
        if isinstance(base, mmap.mmap) and mode != "c" and hasattr(mmap, "MADV_DONTNEED"):
            base.madvise(mmap.MADV_DONTNEED)


class _Table(Source):
    """A table of Arrow: record batches in their order."""

    def __init__(self, path: Path, rows: int, schema: Any) -> None:
        import pyarrow

        self.path, kinds = path, schema.types
        lists = (pyarrow.types.is_list, pyarrow.types.is_large_list, pyarrow.types.is_fixed_size_list)
        self.listed = len(kinds) == 1 and any(is_list(kinds[0]) for is_list in lists)
        for column in schema:
            kind = column.type.value_type if self.listed else column.type
            if not (pyarrow.types.is_floating(kind) or pyarrow.types.is_integer(kind)):
                raise ValueError(
                    f"column {column.name!r} of {path} is {column.type}; features are columns of numbers, or one column of lists of numbers"
                )
        super().__init__(str(path), rows, self._list_size(kinds[0]) if self.listed else len(kinds))

    def _list_size(self, kind: Any) -> int:
        if hasattr(kind, "list_size"):
            return int(kind.list_size)
        return next((len(batch.column(0)[0]) for batch in self.batches(1) if batch.num_rows), 0)

    @abstractmethod
    def batches(self, rows: int) -> Iterator[Any]:
        """Record batches, of ``rows`` rows where the file can be read so."""

    def blocks(self) -> Iterator[Tensor]:
        first = 0
        for batch in self.batches(self.block_rows):
            for start in range(0, batch.num_rows, self.block_rows):
                part = batch.slice(start, self.block_rows)
                yield torch.from_numpy(self._matrix(part, first))
                first += part.num_rows

    def _matrix(self, batch: Any, first: int) -> NDArray[np.float32]:
        if not self.listed:
            # a value that is missing becomes NaN, which is refused with its row like any other
            columns = [column.to_numpy(zero_copy_only=False) for column in batch.columns]
            return np.stack(columns, axis=1, dtype=np.float32, casting="unsafe")
        column = batch.column(0)
        lengths = column.value_lengths().to_numpy(zero_copy_only=False)
        wrong = np.flatnonzero(lengths != self.features)  # that of a missing list is NaN
        if wrong.size:
            raise ValueError(
                f"row {first + int(wrong[0])} of {self.path} has {lengths[wrong[0]]} features, others {self.features}"
            )
        values = column.flatten().to_numpy(zero_copy_only=False)
        return np.array(values, dtype=np.float32).reshape(-1, self.features)


class _Parquet(_Table):
    def __init__(self, path: Path) -> None:
        need(str(path), "pyarrow", "pyarrow")
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile

        try:
            # Pages are read as they are wanted, not all of a row group, which may be as large as the file.
            self.file = ParquetFile(path, buffer_size=1 << 16, pre_buffer=False)
        except (ArrowInvalid, OSError) as error:
            raise ValueError(f"{path} is damaged or no Parquet file: {error}") from None
        super().__init__(path, self.file.metadata.num_rows, self.file.schema_arrow)

    def batches(self, rows: int) -> Iterator[Any]:
        return self.file.iter_batches(rows)


class _Arrow(_Table):
    def __init__(self, path: Path) -> None:
        need(str(path), "pyarrow", "pyarrow")
        from pyarrow import ArrowInvalid, OSFile, ipc

        try:
            self.file = ipc.open_file(OSFile(str(path)))  # mapped, all that was read would stay in memory
        except (ArrowInvalid, OSError) as error:
            raise ValueError(f"{path} is damaged or no Arrow file: {error}") from None
        rows = sum(self.file.get_batch(i).num_rows for i in range(self.file.num_record_batches))
        super().__init__(path, rows, self.file.schema)

    def batches(self, rows: int) -> Iterator[Any]:
        return map(self.file.get_batch, range(self.file.num_record_batches))
