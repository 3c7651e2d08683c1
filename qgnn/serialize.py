"""Saving and loading frozen models: one safetensors file, its program as JSON in the header. Nothing is unpickled, and only functions that
:data:`FUNCTIONS` and :data:`METHODS` list are run."""

from __future__ import annotations

import base64
import builtins
import hashlib
import json
import math
import operator
import os
import uuid
import zlib
from collections.abc import Callable
from keyword import iskeyword
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, fx, nn

from .integer import IntegerModel
from .kernels.packing import bucket_starts, uniform_counts
from .parts import (
    Affine,
    Attention,
    Codec,
    CodecSpec,
    Coding,
    Constant,
    Finisher,
    Norm,
    Operand,
    Part,
    Product,
    Sum,
    graph_of,
    graphs_of,
    pool,
)

FORMAT = "qgnn-integer-model"
VERSION = 2

_LONGEST_HEADER, _LONGEST_REPETITION = 2**26, 2**24
"""Bytes and elements: what a small file may grow to."""

_NAMES = {
    torch: "abs add amax amin arange argmax cat chunk clamp clamp_min cos div einsum exp flatten gather index_select log log_softmax matmul max mean "
    "min mul neg norm pow relu reshape rsqrt sigmoid sin softmax split sqrt square squeeze stack sub sum tanh topk transpose unsqueeze where zeros "
    "zeros_like ones ones_like",
    F: "elu embedding gelu hardtanh layer_norm leaky_relu linear log_softmax logsigmoid normalize pad prelu relu relu6 selu sigmoid silu softmax "
    "softplus tanh",
    operator: "add and_ eq floordiv ge getitem gt iadd imul invert isub le lt matmul mod mul ne neg or_ pow sub truediv",
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "graph": graph_of, "graphs": graphs_of, "pool": pool, "getattr": builtins.getattr,
    **{f"{module.__name__}.{name}": getattr(module, name) for module, names in _NAMES.items() for name in names.split()},
}  # fmt: skip
"""What may stand between the parts of a saved model, by the names in its file. ``getattr`` reads public attributes."""

METHODS = frozenset(
    name
    for line in (
        "abs add amax amin argmax bool chunk clamp clamp_min contiguous dim div exp expand flatten float get index_select int log log_softmax",
        "long masked_fill matmul max mean min mul neg new_ones new_zeros norm numel permute pow relu relu_ repeat reshape rsqrt sigmoid size",
        "softmax split sqrt square squeeze sub sum t tanh to transpose type_as unbind unsqueeze view",
    )
    for name in line.split()
)
_TYPES = {
    str(t): t
    for t in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64, torch.bool)
}
_FUNCTION_NAMES = {function: name for name, function in reversed(FUNCTIONS.items())}


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a frozen model: packed weights, steps, widths and biases. Bound data is not part of it. The file appears whole or not at all.

    Raises:
        TypeError: ``model`` is not frozen; ``torch.save(model.state_dict())`` keeps a trainable one.
        ValueError: something in it that stays in float has no place in the format; it is named.
    """
    if not isinstance(model, IntegerModel):
        raise TypeError(
            f"save takes a frozen model, got {type(model).__name__}; call qgnn.freeze first, or keep model.state_dict()"
        )
    description = {
        "format": FORMAT,
        "version": VERSION,
        "kinds": model.kinds,
        "floats": model.floats,
        "parts": {name: _described(name, part, model) for name, part in model.parts.items()},
        "program": [_written(node) for node in model.program.nodes],
    }
    tensors, repeated = _compacted({name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()})
    description["repeated"] = repeated
    target = Path(path)
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        # not save_file, whose files only their owner may read
        text = _json({**description, "sha256": _digest(description, tensors)})
        temporary.write_bytes(to_bytes(tensors, metadata={"qgnn": pack_header(text)}))
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> IntegerModel:
    """Reads a frozen model. It has no data bound: call it with its arguments, or ``bind`` them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of another program or of another version, or its tensors do not fit its description.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no model file {os.fspath(path)}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open has keys() but is no mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{os.fspath(path)} is damaged or no qgnn model: {error}") from None
    try:
        description = _description(metadata)
        if description.pop("sha256", None) != _digest(description, tensors):
            raise ValueError("its checksum is wrong, so it is damaged; copy or save it again")
        return _built(description, _expanded(tensors, description["repeated"]))
    except (
        ArithmeticError, AssertionError, AttributeError, LookupError, NameError, RuntimeError, SyntaxError, TypeError, ValueError
    ) as error:  # fmt: skip
        message = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{os.fspath(path)} is not a qgnn model that this version reads: {message}") from None


def pack_header(text: str) -> str:
    """The description as it stands in a file: small models would otherwise be mostly description."""
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def unpack_header(packed: str) -> str:
    """What :func:`pack_header` packed.

    Raises:
        ValueError: it is damaged, or larger than any program is.
    """
    unpacking = zlib.decompressobj()
    try:
        text = unpacking.decompress(base64.b64decode(packed, validate=True), _LONGEST_HEADER)
    except (zlib.error, ValueError):
        raise ValueError("its header describes no frozen model") from None
    if unpacking.unconsumed_tail:
        raise ValueError(f"its header is longer than {_LONGEST_HEADER} bytes")
    return text.decode()


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _digest(description: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the description and of every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(_json(description).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _compacted(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Tensors of one value, as the steps of a scheme with one range are, as that value, and the shapes that they have."""
    repeated = {
        name: list(t.shape)
        for name, t in tensors.items()
        if 1 < t.numel() <= _LONGEST_REPETITION and bool((t == t.reshape(-1)[0]).all())
    }
    return {name: t.reshape(-1)[:1].clone() if name in repeated else t for name, t in tensors.items()}, repeated


def _expanded(tensors: dict[str, Tensor], repeated: dict[str, list[int]]) -> dict[str, Tensor]:
    """What :func:`_compacted` took apart."""
    if not set(repeated) <= set(tensors):
        raise ValueError(f"it repeats the values of tensors that it lacks, {sorted(set(repeated) - set(tensors))}")
    for name, shape in repeated.items():
        size = math.prod(n if type(n) is int and n >= 0 else _LONGEST_REPETITION + 1 for n in shape)
        if tensors[name].numel() != 1 or size > _LONGEST_REPETITION:
            raise ValueError(f"it repeats {name}, {tuple(tensors[name].shape)}, to the shape {shape!r}")
    return {name: t.expand(repeated[name]) if name in repeated else t for name, t in tensors.items()}


# -- writing -----------------------------------------------------------------------------------------------------------------------------------


def _name_of(part: Part, model: IntegerModel) -> str:
    return next(name for name, other in model.parts.items() if other is part)


def _described(name: str, part: nn.Module, model: IntegerModel) -> dict[str, Any]:
    """A part without its tensors."""
    entry: dict[str, Any] = {"type": type(part).__name__, "layer": getattr(part, "layer", "")}
    if isinstance(part, Finisher):
        entry |= {"relu": part.relu, "following": [_name_of(p, model) for p in part.following]}
    if isinstance(part, Codec):
        spec = part.spec
        return entry | {
            "coding": spec.coding,
            "features": spec.features,
            "signed": spec.signed,
            "normalize": spec.normalize,
        }
    if isinstance(part, Product):
        return entry | {"codec": _name_of(part.codec_in[0], model), "container": part.container}
    if isinstance(part, Sum):
        return entry | {"operand": _name_of(part.operand[0], model), "norm": part.norm}
    if isinstance(part, Attention):
        operand = _name_of(part.operand[0], model)
        return entry | {"operand": operand, "heads": part.heads, "negative_slope": part.negative_slope}
    if isinstance(part, Operand | Affine | Constant):
        return entry
    raise ValueError(
        f"save cannot write {name} ({type(part).__name__}), which stays in float; keep this model with torch.save(model, path)"
    )


def _written(node: fx.Node) -> list[Any]:
    """One step of the program: name, operation, target, and what it is given."""
    target: Any = node.target
    if node.op == "call_function":
        if target not in _FUNCTION_NAMES:
            name = getattr(target, "__name__", target)
            raise ValueError(f"save cannot write {name}, which the model calls; it writes {', '.join(FUNCTIONS)}")
        target = _FUNCTION_NAMES[target]
    elif node.op == "call_method" and target not in METHODS:
        raise ValueError(
            f"save cannot write the method {target}, which the model calls; it writes {', '.join(sorted(METHODS))}"
        )
    return [node.name, node.op, target, _value(node.args), _value(node.kwargs)]


def _value(value: Any) -> Any:
    """An argument as JSON."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple | list):
        return [type(value).__name__ != "list", *map(_value, value)]
    if isinstance(value, slice):
        return {"slice": [_value(part) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.dtype) and str(value) in _TYPES:
        return {"dtype": str(value)}
    if isinstance(value, dict):
        return {"dict": {key: _value(item) for key, item in value.items()}}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if value is Ellipsis:
        return {"ellipsis": True}
    raise ValueError(f"save cannot write the argument {value!r}")


# -- reading -----------------------------------------------------------------------------------------------------------------------------------


def _description(metadata: dict[str, str]) -> dict[str, Any]:
    if "qgnn" not in metadata:
        raise ValueError("it was not written by qgnn.save")
    description = json.loads(unpack_header(metadata["qgnn"]))
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError("its header describes no frozen model")
    if description.get("version") != VERSION:
        raise ValueError(f"it has format version {description.get('version')}, this is version {VERSION}")
    return description


def _is_name(text: object) -> bool:
    """Whether torch.fx may write ``text`` into the Python code that it makes of a program: it writes names as they are."""
    return isinstance(text, str) and text.isidentifier() and not iskeyword(text) and text != "self"


def _built(description: dict[str, Any], tensors: dict[str, Tensor]) -> IntegerModel:
    parts: dict[str, nn.Module] = {}
    entries = description["parts"]
    if not all(map(_is_name, entries)):
        raise ValueError(f"its parts are called {sorted(entries)}, which are no names")
    for name in sorted(entries, key=lambda n: _ORDER.index(entries[n]["type"]) if entries[n]["type"] in _ORDER else 0):
        prefix = f"parts.{name}."
        own = {key[len(prefix) :]: tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
        parts[name] = _part(name, entries[name], own, parts)
    if tensors:
        raise ValueError(f"unknown tensors {', '.join(sorted(tensors))}")
    for name, entry in entries.items():
        part = parts[name]
        if isinstance(part, Finisher):
            _follow(name, part, entry, parts)
    ordered = {name: parts[name] for name in entries}
    program = _program(description["program"], ordered)
    kinds, floats = description["kinds"], description["floats"]
    if not all(isinstance(k, str) for names in (kinds, floats) for k in (*names, *names.values())):
        raise ValueError("kinds and floats are not names")
    if not {p.layer for p in ordered.values() if isinstance(p, Codec | Operand | Finisher)} <= set(kinds):
        raise ValueError("kinds has not all layers")
    return IntegerModel(program, ordered, kinds, floats)


_ORDER = ("Codec", "Operand", "Product", "Sum", "Attention", "Affine", "Constant")
"""Types of parts; those that others are made with come first."""


def _taken(entry: dict[str, Any], name: str, types: dict[str, Any]) -> list[Any]:
    """The fields of an entry, which has these and no others."""
    common = {"type", "layer"} | ({"relu", "following"} if entry["type"] in ("Product", "Sum", "Attention") else set())
    if set(entry) != common | set(types):
        raise ValueError(f"part {name} is described by {sorted(entry)}")
    for key, kind in {"layer": str, **types}.items():
        value = entry[key]
        fits = value in get_args(kind) if get_args(kind) else type(value) is kind
        if not fits:
            raise ValueError(f"part {name} has {key} {value!r}")
    return [entry[key] for key in types]


def _reference(parts: dict[str, nn.Module], name: str, other: Any, kind: type[nn.Module]) -> Any:
    if not isinstance(other, str) or not isinstance(parts.get(other), kind):
        raise ValueError(f"part {name} refers to {other!r}, which is no {kind.__name__}")
    return parts[other]


def _part(name: str, entry: dict[str, Any], tensors: dict[str, Tensor], parts: dict[str, nn.Module]) -> Part:
    kind, layer = entry["type"], entry["layer"]
    part: Part
    if kind == "Codec":
        types = {"coding": Coding, "features": int, "signed": bool, "normalize": bool}
        coding, features, signed, normalize = _taken(entry, name, types)
        _positive(name, features=features)
        rows = tensors["step"].numel() if coding in ("node", "group") and "step" in tensors else 1
        vectors: _Wanted = {"step": (torch.float32, (rows,)), "bits": (torch.uint8, (rows,))}
        _fit(name, tensors, {} if coding == "binary" else vectors)
        if coding == "group" and not rows:
            raise ValueError(f"part {name} has no groups")
        return Codec(CodecSpec(layer, coding, features, signed, normalize), tensors.get("step"), tensors.get("bits"))
    if kind == "Operand":
        _taken(entry, name, {})
        columns = tensors["step"].numel() if "step" in tensors else 0
        _positive(name, columns=columns)
        _fit(name, tensors, {"step": (torch.float32, (columns,)), "bits": (torch.uint8, (columns,))})
        return Operand(layer, tensors["step"], tensors["bits"])
    if kind == "Product":
        codec_name, container = _taken(entry, name, {"codec": str, "container": int})
        codec: Codec = _reference(parts, name, codec_name, Codec)
        if container not in (4, 8):
            raise ValueError(f"part {name} has a container of {container} bits")
        out = _columns(name, tensors)
        size = bucket_starts(uniform_counts(out, container), codec.spec.features)[-1]
        _fit(name, tensors, {"weight": (torch.uint8, (size,))} | _finishing(tensors, out))
        part = Product(layer, codec, tensors["weight"], container, tensors["column_scale"], tensors.get("bias"))
    elif kind in ("Sum", "Attention"):
        part = _neighbours(name, entry, tensors, parts)
    elif kind == "Affine":
        _taken(entry, name, {})
        size = tensors["scale"].numel() if "scale" in tensors else 0
        _fit(name, tensors, dict.fromkeys(("scale", "shift"), (torch.float32, (size,))))
        return Affine(layer, tensors["scale"], tensors["shift"])
    elif kind == "Constant":
        _taken(entry, name, {})
        if set(tensors) != {"value"}:
            raise ValueError(f"part {name} needs one tensor, the file has {sorted(tensors)}")
        return Constant(layer, tensors["value"])
    else:
        raise ValueError(f"part {name} is of an unknown type {kind!r}")
    part.keep(**{key: tensors.get(key) for key in ("post_scale", "post_shift")})
    return part


def _neighbours(
    name: str, entry: dict[str, Any], tensors: dict[str, Tensor], parts: dict[str, nn.Module]
) -> Sum | Attention:
    types: dict[str, Any] = {"operand": str} | (
        {"norm": Norm} if entry["type"] == "Sum" else {"heads": int, "negative_slope": float}
    )
    operand_name, *settings = _taken(entry, name, types)
    operand: Operand = _reference(parts, name, operand_name, Operand)
    out = _columns(name, tensors)
    if operand.step.numel() != out:
        raise ValueError(f"part {name} has {out} columns, its operand {operand.step.numel()}")
    wanted = _finishing(tensors, out)
    made: Sum | Attention
    if entry["type"] == "Sum":
        own: _Wanted = {"self_scale": (torch.float32, (1,))} if "self_scale" in tensors else {}
        _fit(name, tensors, wanted | own)
        made = Sum(entry["layer"], operand, settings[0], tensors.get("bias"), tensors.get("self_scale"))
    else:
        heads, slope = settings
        if heads < 1 or out % heads:
            raise ValueError(f"part {name} has {out} columns for {heads} heads")
        _fit(name, tensors, wanted | {"vectors": (torch.float32, (2, out))})
        made = Attention(entry["layer"], operand, heads, slope, tensors["vectors"], tensors.get("bias"))
    made.keep(column_scale=tensors["column_scale"])
    return made


def _columns(name: str, tensors: dict[str, Tensor]) -> int:
    columns = tensors["column_scale"].numel() if "column_scale" in tensors else 0
    _positive(name, columns=columns)
    return columns


def _positive(name: str, **sizes: int) -> None:
    for key, size in sizes.items():
        if size < 1:
            raise ValueError(f"part {name} has {key} {size}")


_Wanted = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def _finishing(tensors: dict[str, Tensor], out: int) -> _Wanted:
    present = [key for key in ("bias", "post_scale", "post_shift") if key in tensors]
    return dict.fromkeys(("column_scale", *present), (torch.float32, (out,)))


def _fit(name: str, tensors: dict[str, Tensor], wanted: _Wanted) -> None:
    """Raises ValueError unless a part's tensors are those wanted, with values that are possible."""
    found = {key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()}
    if found != wanted:
        raise ValueError(f"part {name} needs tensors {wanted}, the file has {found}")
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"part {name}: {key} has values that are not finite")
        if key == "step" and not bool((tensor > 0).all()):
            raise ValueError(f"part {name}: step has values that are not positive")
        if key == "bits" and tensor.numel() and int(tensor.max()) > 8:
            raise ValueError(f"part {name}: bits has widths above 8")


def _follow(name: str, part: Finisher, entry: dict[str, Any], parts: dict[str, nn.Module]) -> None:
    """What reads the result of a part."""
    relu, following = entry["relu"], entry["following"]
    if type(relu) is not bool or not isinstance(following, list) or len(following) > 1:
        raise ValueError(f"part {name} has relu {relu!r} and following {following!r}")
    part.relu = relu
    if (part.post_scale is None) != (part.post_shift is None):
        raise ValueError(f"part {name} has one of post_scale and post_shift")
    for other in following:
        kind = Operand if isinstance(part, Product) and isinstance(parts.get(other), Operand) else Codec
        reader = _reference(parts, name, other, kind)
        width = reader.spec.features if isinstance(reader, Codec) else reader.step.numel()
        if width != part.out_channels or (isinstance(reader, Codec) and not reader.fuses):
            raise ValueError(f"part {name} gives {part.out_channels} columns, {other} reads {width} others")
        part.following.append(reader)


def _program(entries: list[list[Any]], parts: dict[str, nn.Module]) -> fx.Graph:
    program = fx.Graph()
    nodes: dict[str, fx.Node] = {}

    def read(value: Any) -> Any:
        if isinstance(value, list) and value:
            made = [read(item) for item in value[1:]]
            return tuple(made) if value[0] else made
        if not isinstance(value, dict):
            return value
        (kind, content), *rest = value.items()
        if rest or kind not in ("node", "slice", "dtype", "dict", "ellipsis"):
            raise ValueError(f"an argument is {value!r}")
        if kind == "node":
            return nodes[content]
        if kind == "slice":
            return slice(*map(read, content))
        if kind == "dict":
            return {key: read(item) for key, item in content.items()}
        return _TYPES[content] if kind == "dtype" else Ellipsis

    for name, op, target, *given in entries:
        if name in nodes or not _is_name(name):
            raise ValueError(f"two steps are called {name}, or it is no name")
        args, kwargs = map(read, given)
        if not isinstance(args, tuple) or not isinstance(kwargs, dict) or not all(map(_is_name, kwargs)):
            raise ValueError(f"step {name} is given {given!r}")
        known = {"call_module": target in parts, "call_method": target in METHODS, "call_function": target in FUNCTIONS}
        known |= {"placeholder": _is_name(target), "output": True}
        if not known.get(op):
            raise ValueError(f"step {name} is an unknown {op} {target!r}")
        if target == "getattr" and op == "call_function" and (not _is_name(args[1]) or args[1].startswith("_")):
            raise ValueError(f"step {name} reads the attribute {args[1]!r}")
        target = FUNCTIONS[target] if op == "call_function" else target
        nodes[name] = program.create_node(op, target, args, kwargs, name)
    if [node.op for node in program.nodes].count("output") != 1:
        raise ValueError("a program has one output")
    program.lint()
    return program
