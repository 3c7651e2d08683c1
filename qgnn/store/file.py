"""Files of a feature store: safetensors, written as values come and read as memory maps, with a checksum for every tensor.

``__metadata__`` of the header has two texts: ``qgnn``, a description in JSON (format, version, what each matrix is, the SHA-256 of the bytes of every
tensor), and ``sha256``, that of this description. The header is filled up with blanks, so that tensors begin at a multiple of 64 bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .rows import Shapes

FORMAT = "qgnn-feature-store"
VERSION = 1

ALIGN = 64
CHUNK = 1 << 23
"""Bytes that are read at once for a checksum."""

_DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
}  # fmt: skip


class StoreWriter:
    """A file whose tensors are written piece by piece. As a context manager: it appears under its name at the end of the ``with`` block, complete and
    on the disk, or, after an error, not at all."""

    def __init__(self, path: str | os.PathLike[str], description: dict[str, Any], shapes: Shapes) -> None:
        self.target = Path(path)
        self.description = {"format": FORMAT, "version": VERSION, **description}
        # Packed rows first, whose sizes are multiples of 16, then by size of an element: all are aligned.
        order = sorted(shapes, key=lambda name: (not name.endswith("codes"), -shapes[name][0].itemsize))
        self.entries: dict[str, dict[str, Any]] = {}
        end = 0
        for name in order:
            dtype, shape = shapes[name]
            if dtype not in _DTYPES:
                raise ValueError(f"a store cannot hold {dtype}; convert it")
            start, end = end, end + math.prod(shape) * dtype.itemsize
            self.entries[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        self.first = len(self._header(dict.fromkeys(order, "0" * 64)))
        self.size = self.first + end

    def _header(self, checksums: dict[str, str]) -> bytes:
        text = json.dumps({**self.description, "sha256": checksums})
        metadata = {"qgnn": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
        header = json.dumps({"__metadata__": metadata, **self.entries}).encode()
        header += b" " * (-(8 + len(header)) % ALIGN)
        return len(header).to_bytes(8, "little") + header

    def __enter__(self) -> StoreWriter:
        self.temporary = self.target.with_name(f".{self.target.name}.{uuid.uuid4().hex}.tmp")
        self.file = os.open(self.temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        os.truncate(self.file, self.size)
        return self

    def write(self, name: str, first: int, values: Tensor) -> None:
        """Writes ``values`` from byte ``first`` of a tensor on."""
        rest = values.contiguous().reshape(-1).view(torch.uint8).numpy().data
        place = self.first + self.entries[name]["data_offsets"][0] + first
        while rest:
            written = os.pwrite(self.file, rest, place)
            rest, place = rest[written:], place + written

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                places = {
                    name: (self.first + e["data_offsets"][0], self.first + e["data_offsets"][1])
                    for name, e in self.entries.items()
                }
                header = self._header(_checksums(self.file, places))
                os.pwrite(self.file, header, 0)
                os.fsync(self.file)
                os.replace(self.temporary, self.target)
                folder = os.open(self.target.absolute().parent, os.O_RDONLY)
                os.fsync(folder)  # the name
                os.close(folder)
        finally:
            os.close(self.file)
            self.temporary.unlink(missing_ok=True)


def _checksums(file: int, places: dict[str, tuple[int, int]]) -> dict[str, str]:
    """SHA-256 of the bytes at each place. Read, not mapped: pages of a map count as memory of the process."""
    checksums = {}
    for name, (start, end) in places.items():
        digest = hashlib.sha256()
        for place in range(start, end, CHUNK):
            digest.update(os.pread(file, min(CHUNK, end - place), place))
        checksums[name] = digest.hexdigest()
    return checksums


def read_store(path: str | os.PathLike[str], verify: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description of a file and its tensors, which are memory maps: nothing of them is read yet, unless they are verified.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, cut off, no store, of another version, or (with ``verify``) a checksum is wrong.
    """
    name = os.fspath(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no feature store {name}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open has keys() but is no mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{name} is damaged, cut off or no feature store: {error}; copy or build it again") from None
    text = metadata.get("qgnn", "")
    try:
        description = json.loads(text)
    except ValueError:
        description = None
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(f"{name} is no feature store; QuantizedFeatureStore.build makes one")
    if description.get("version") != VERSION:
        raise ValueError(
            f"{name} has format version {description.get('version')} and this is version {VERSION}; build it again"
        )
    if hashlib.sha256(text.encode()).hexdigest() != metadata.get("sha256"):
        raise ValueError(f"the checksum of the header of {name} is wrong, so it is damaged; copy or build it again")
    if verify:
        verify_store(path, description["sha256"])
    return description, tensors


def verify_store(path: str | os.PathLike[str], expected: dict[str, str]) -> None:
    """Reads the whole file and compares the checksums of its tensors.

    Raises:
        ValueError: one is wrong.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        places = {
            name: tuple(8 + length + end for end in header[name]["data_offsets"])
            for name in header
            if name != "__metadata__"
        }
        found = _checksums(file.fileno(), places)
    wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    if wrong:
        raise ValueError(
            f"the checksum of {', '.join(wrong)} in {os.fspath(path)} is wrong, so it is damaged; copy or build it again"
        )
