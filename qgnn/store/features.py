"""The feature store of PyG (``torch_geometric.data.FeatureStore``), on packed rows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch_geometric.data import FeatureStore, TensorAttr

from .. import ops
from ..kernels.packing import CONTAINERS
from ..qtensor import QTensor
from .file import StoreWriter, read_store
from .rows import Layout, Shapes, Widths, Write, layout_of, quantize_rows
from .sources import FeatureSource, Source, source_of

Group = str | tuple[str, str, str] | None
Key = tuple[Group, str]
Index = Tensor | slice | int


class QuantizedFeatureStore(FeatureStore):
    """Node features at 1 to 8 bits, for PyG's ``NodeLoader``, ``NeighborLoader`` and ``LinkNeighborLoader``: pass ``(store, graph_store)`` as their
    data. Batches hold float32 values, made of the codes of the rows they ask for; :meth:`get_codes` leaves them packed.

    Matrices of floats are quantized, each row with the step ``max |x| / Q``, where ``Q`` is ``2^(b-1) - 1``, or ``2^b - 1`` if no value of the matrix
    is negative. A value is off by half a step at most: ``max |x| / 254`` at 8 bits (/ 510 without a sign), and what rounding adds, below
    ``step * 2^-14``. Rows of 0 and one positive constant are exact at 1 bit. Integers, booleans and vectors (labels, masks) are kept as they are.

    A row takes ``F`` codes (:mod:`qgnn.kernels.packing`) and a step of 4 bytes, with widths of its own a byte more, and 4 where containers differ:
    128 features 132 bytes at 8 bits and 68 at 4, of 512 in FP32.

    Args:
        bits: 1 to 8, or integers ``[N]``, a width for each node.
        signed: whether codes have a sign; None looks for negative values first.
        pin: whether tensors lie in pinned memory, which kernels on a GPU read without a copy of the whole.

    Example::

        store = QuantizedFeatureStore.build({"x": "features.npy", "y": labels}, "features.qgnn")
        loader = NodeLoader((store, graph), NeighborSampler(graph, [10, 10]), train_nodes, batch_size=1024)
    """

    def __init__(self, bits: Widths = 8, signed: bool | None = None, pin: bool = False) -> None:
        super().__init__()
        if pin and not torch.cuda.is_available():
            raise ValueError("pinned memory is for a GPU, and torch sees none here; leave pin out")
        self._bits, self._signed, self._pin = bits, signed, pin
        self._path: Path | None = None
        self._tensors: dict[Key, QTensor | Tensor] = {}

    @classmethod
    def build(
        cls,
        features: Mapping[str | tuple[Group, str], FeatureSource],
        path: str | os.PathLike[str],
        *,
        bits: Widths | Mapping[str | tuple[Group, str], Widths] = 8,
        signed: bool | None = None,
    ) -> QuantizedFeatureStore:
        """Writes a file, block by block, and opens it: neither the floats nor the codes are ever in memory as a whole.

        Args:
            features: what to hold, by name (``"x"``) or by group and name (``("paper", "x")``): a tensor, a NumPy array or memory map, or the path
                of a ``.npy``, Parquet or Arrow file.
            path: of the file. It appears when it is complete.
            bits: of all matrices, or by the keys of ``features`` (8 for those left out).
            signed: as in the class.

        Raises:
            TypeError, ValueError: something that is no matrix of finite numbers, or a width that no code has.
        """
        keys = {key if isinstance(key, tuple) else (None, key): key for key in features}
        entries: list[dict[str, Any]] = []
        shapes: Shapes = {}
        work: list[tuple[Source, Layout] | Tensor] = []
        for (group, name), given in ((key, features[keys[key]]) for key in keys):
            place = {"group": group, "name": name}
            exact = _kept(given)
            if exact is not None:
                work.append(exact)
                own: Shapes = {"values": (exact.dtype, tuple(exact.shape))}
            else:
                source = source_of(given, name)
                widths = bits.get(keys[group, name], 8) if isinstance(bits, Mapping) else bits
                layout = layout_of(source, widths, signed)
                work.append((source, layout))
                own, place = layout.shapes(), place | _described(layout)
            shapes |= {f"{len(entries)}.{part}": shape for part, shape in own.items()}
            entries.append(place)
        with StoreWriter(path, {"tensors": entries}, shapes) as file:
            for number, item in enumerate(work):
                if isinstance(item, Tensor):
                    file.write(f"{number}.values", 0, item)
                else:
                    quantize_rows(*item, _under(number, file))
        return cls.open(path, verify=False)

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify: bool = True) -> QuantizedFeatureStore:
        """A store whose tensors are memory maps of a file. It cannot be changed.

        Args:
            path: of a file that :meth:`build` or :meth:`save` wrote.
            verify: read the whole file first and compare its checksums. Without it only the header is checked, sizes included, and the file is
                read as rows are asked for: for files that were verified where they lie.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, cut off, of another version, or no store.
        """
        store = cls()
        store._path = Path(path).absolute()
        description, tensors = read_store(path, verify)
        try:
            store._tensors = dict(
                _restored(entry, number, tensors) for number, entry in enumerate(description["tensors"])
            )
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)} does not hold what its header says: {error}; build it again") from None
        return store

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the store as a file for :meth:`open`, which appears when it is complete."""
        entries: list[dict[str, Any]] = []
        contents: dict[str, Tensor] = {}
        for number, ((group, name), tensor) in enumerate(self._tensors.items()):
            entry, parts = {"group": group, "name": name}, _parts(tensor)
            if isinstance(tensor, QTensor):
                layout = _layout(tensor)
                entry, parts = entry | _described(layout), {part: parts[part] for part in layout.shapes()}
            entries.append(entry)
            contents |= {f"{number}.{part}": values for part, values in parts.items()}
        shapes = {name: (values.dtype, tuple(values.shape)) for name, values in contents.items()}
        with StoreWriter(path, {"tensors": entries}, shapes) as file:
            for name, values in contents.items():
                file.write(name, 0, values.cpu())

    @property
    def path(self) -> Path | None:
        """The file behind the store; None for one in memory."""
        return self._path

    @property
    def nbytes(self) -> int:
        """Bytes of all that it holds."""
        parts = [part for tensor in self._tensors.values() for part in _parts(tensor).values()]
        # one width for all rows is kept once
        return sum(p.element_size() * (p.numel() if any(p.stride()) else 1) for p in parts)

    def get_codes(self, *args: Any, **kwargs: Any) -> QTensor:
        """As ``get_tensor``, but the rows stay packed, for the kernels that compute with integers; without an index, all of them, not copied.

        Raises:
            KeyError: there is no such matrix.
            ValueError: it is kept as it is.
        """
        attr = self._tensor_attr_cls.cast(*args, **kwargs)
        tensor = self._found(attr)
        if not isinstance(tensor, QTensor):
            raise ValueError(f"{attr.attr_name!r} is kept as it is and has no codes; get_tensor gives it")
        if not attr.is_set("index") or attr.index is None:
            return tensor
        return ops.select_codes(tensor, _rows(attr.index, tensor.shape[0]))

    # What PyG's FeatureStore asks for. It adds the public methods around them.

    def _put_tensor(self, tensor: Tensor | NDArray[Any] | QTensor | Source, attr: TensorAttr) -> bool:
        self._check_writable()
        if attr.index is not None:
            raise ValueError(
                "the store takes a tensor as a whole, with the index None: steps and places are of all rows"
            )
        self._tensors[attr.group_name, attr.attr_name] = self._stored(tensor, attr.attr_name)
        return True

    def _stored(self, tensor: Tensor | NDArray[Any] | QTensor | Source, name: str) -> QTensor | Tensor:
        if isinstance(tensor, QTensor):
            if tensor.axis != "row" or tensor.zero:
                raise ValueError(f"{name} has a step per column or a zero point; the store holds rows with a step each")
            return tensor
        exact = _kept(tensor)
        if exact is not None:
            return exact.pin_memory() if self._pin else exact
        source = source_of(tensor, name)
        layout = layout_of(source, self._bits, self._signed)
        # zeros: the gaps between buckets
        tensors = {
            part: torch.zeros(shape, dtype=dtype, pin_memory=self._pin)
            for part, (dtype, shape) in layout.shapes().items()
        }

        def write(part: str, first: int, values: Tensor) -> None:
            raw = values.contiguous().view(torch.uint8)
            tensors[part].view(torch.uint8)[first : first + raw.numel()].copy_(raw)

        quantize_rows(source, layout, write)
        return layout.matrix(tensors)

    def _get_tensor(self, attr: TensorAttr) -> Tensor:
        tensor = self._found(attr)
        if attr.index is None:
            return tensor.dequantize() if isinstance(tensor, QTensor) else tensor
        index = _rows(attr.index, tensor.shape[0])
        out = (
            ops.select_rows(tensor, index)
            if isinstance(tensor, QTensor)
            else tensor[index.to(tensor.device)].to(index.device)
        )
        return out[0] if isinstance(attr.index, int) else out

    def _remove_tensor(self, attr: TensorAttr) -> bool:
        self._check_writable()
        return self._tensors.pop((attr.group_name, attr.attr_name), None) is not None

    def _get_tensor_size(self, attr: TensorAttr) -> tuple[int, ...] | None:
        tensor = self._tensors.get((attr.group_name, attr.attr_name))
        return None if tensor is None else tuple(tensor.shape)

    def get_all_tensor_attrs(self) -> list[TensorAttr]:
        return [self._tensor_attr_cls(group, name) for group, name in self._tensors]

    def _found(self, attr: TensorAttr) -> QTensor | Tensor:
        key = attr.group_name, attr.attr_name
        if key not in self._tensors:
            raise KeyError(f"the store has no tensor {key}; it has {', '.join(map(str, self._tensors)) or 'none'}")
        return self._tensors[key]

    def _check_writable(self) -> None:
        if self._path is not None:
            raise ValueError(f"the store is the file {self._path}, which stays as it is; build another one")

    def __getstate__(self) -> dict[str, Any]:
        # Of a file, a worker process opens its own map.
        return self.__dict__ if self._path is None else {"_path": self._path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(
            state if state["_path"] is None else type(self).open(state["_path"], verify=False).__dict__
        )

    def __repr__(self) -> str:
        place = "memory" if self._path is None else f"file={str(self._path)!r}"
        names = ", ".join(f"{name}{list(t.shape)}" for (_, name), t in self._tensors.items())
        return f"QuantizedFeatureStore({names}, {place}, nbytes={self.nbytes})"


def _kept(given: object) -> Tensor | None:
    """What is kept as it is, as a tensor: integers, booleans, and anything that is no matrix."""
    if isinstance(given, np.ndarray) and (given.ndim != 2 or given.dtype.kind not in "f"):
        return torch.from_numpy(np.array(given))
    if isinstance(given, Tensor) and (given.dim() != 2 or not given.is_floating_point()):
        return given.detach().cpu()
    return None


def _rows(index: Index, rows: int) -> Tensor:
    """The rows that an index of PyG names, int64."""
    if isinstance(index, int):
        return torch.tensor([range(rows)[index]])
    if isinstance(index, slice):
        return torch.arange(*index.indices(rows))
    if not isinstance(index, Tensor):
        raise TypeError(f"an index is a tensor, a slice or a number, got {type(index).__name__}")
    return index.nonzero().view(-1) if index.dtype == torch.bool else index.long()


def _described(layout: Layout) -> dict[str, Any]:
    """A layout as JSON; what is a tensor in it is one in the file."""
    bits = layout.bits if isinstance(layout.bits, int) else None
    return {
        "rows": layout.rows,
        "features": layout.features,
        "signed": layout.signed,
        "bits": bits,
        "counts": list(layout.counts),
    }


def _parts(tensor: QTensor | Tensor) -> dict[str, Tensor]:
    """The tensors that hold a tensor of the store, as :meth:`Layout.shapes` names them; ``values`` is one that is kept as it is."""
    if not isinstance(tensor, QTensor):
        return {"values": tensor}
    parts = {"codes": tensor.data, "step": tensor.step, "bits": tensor.bits}
    return parts if tensor.pos is None else parts | {"pos": tensor.pos}


def _under(number: int, file: StoreWriter) -> Write:
    """Writes the parts of tensor ``number`` of a file."""
    return lambda part, first, values: file.write(f"{number}.{part}", first, values)


def _layout(q: QTensor) -> Layout:
    """The layout of a matrix; one width for all rows is a number."""
    ends = q.bits.aminmax() if q.bits.numel() else None
    bits: Widths = int(ends.min) if ends is not None and bool(ends.min == ends.max) and q.pos is None else q.bits
    rows, features = q.shape
    return Layout(rows, features, q.signed, bits, q.counts, q.pos)


def _restored(entry: dict[str, Any], number: int, tensors: dict[str, Tensor]) -> tuple[Key, QTensor | Tensor]:
    """A tensor of the store, by its key, from an entry of the header and the tensors of the file.

    Raises:
        LookupError, TypeError, ValueError: they do not fit.
    """
    group = tuple(entry["group"]) if isinstance(entry["group"], list) else entry["group"]
    key = group, str(entry["name"])
    own = {name.partition(".")[2]: t for name, t in tensors.items() if name.partition(".")[0] == str(number)}
    if "features" not in entry:
        return key, own["values"]
    counts = tuple(entry["counts"])
    if len(counts) != len(CONTAINERS) or min(counts) < 0 or sum(counts) != entry["rows"]:
        raise ValueError(f"{key[1]} has rows {counts} in its containers")
    bits = own["bits"] if entry["bits"] is None else int(entry["bits"])
    layout = Layout(entry["rows"], entry["features"], bool(entry["signed"]), bits, counts, own.get("pos"))
    for part, (dtype, shape) in layout.shapes().items():
        if own[part].dtype != dtype or tuple(own[part].shape) != shape:
            raise ValueError(
                f"{part} of {key[1]} is {own[part].dtype} {list(own[part].shape)}, not {dtype} {list(shape)}"
            )
    if layout.pos is not None and not 0 <= int(layout.pos.min()) <= int(layout.pos.max()) < layout.rows:
        raise ValueError(f"{key[1]} has rows outside its {layout.rows}")
    return key, layout.matrix(own)
