"""Saving and loading frozen models: one safetensors file, its layout as JSON in the header. Nothing is unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from .integer import TAIL_FUNCTIONS, IntegerLayer, IntegerModel, LayerSpec
from .kernels.packing import bucket_starts, uniform_counts

FORMAT = "qgnn-integer-model"
VERSION = 1


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a frozen model: packed weights, steps, widths and biases. Bound data is not part of it. The file appears whole or not at all.

    Raises:
        TypeError: ``model`` is not frozen; ``torch.save(model.state_dict())`` keeps a trainable one.
    """
    if not isinstance(model, IntegerModel):
        raise TypeError(
            f"save takes a frozen model, got {type(model).__name__}; call qgnn.freeze first, or keep model.state_dict()"
        )
    description = {
        "format": FORMAT,
        "version": VERSION,
        "layers": [asdict(layer.spec) for layer in model.chain],
        "tail": model.tail,
    }
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    target = Path(path)
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        # not save_file, whose files only their owner may read
        text = json.dumps({**description, "sha256": _digest(description, tensors)})
        temporary.write_bytes(to_bytes(tensors, metadata={"qgnn": text}))
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> IntegerModel:
    """Reads a frozen model. It has no data bound: call it with ``x`` and ``edge_index``, or ``bind`` them.

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
        return _built(description, tensors)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)} is not a qgnn model that this version reads: {error}") from None


def _digest(description: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the description and of every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(json.dumps(description).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _description(metadata: dict[str, str]) -> dict[str, Any]:
    if "qgnn" not in metadata:
        raise ValueError("it was not written by qgnn.save")
    description = json.loads(metadata["qgnn"])
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError("its header describes no frozen model")
    if description.get("version") != VERSION:
        raise ValueError(f"it has format version {description.get('version')}, this is version {VERSION}")
    return description


def _built(description: dict[str, Any], tensors: dict[str, Tensor]) -> IntegerModel:
    layers: list[IntegerLayer] = []
    for i, entry in enumerate(description["layers"]):
        if set(entry) != {f.name for f in fields(LayerSpec)}:
            raise ValueError(f"layer {i} is described by {sorted(entry)}")
        for name, hint in get_type_hints(LayerSpec).items():
            if entry[name] not in get_args(hint) if get_args(hint) else type(entry[name]) is not hint:
                raise ValueError(f"layer {i} has {name} {entry[name]!r}")
        if layers and entry["in_channels"] != layers[-1].spec.out_channels:
            raise ValueError(
                f"layer {i} takes {entry['in_channels']} features, the one before gives {layers[-1].spec.out_channels}"
            )
        prefix = f"layers.{i}."
        own = {name[len(prefix) :]: tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
        layers.append(_layer(LayerSpec(**entry), own))
    if tensors:
        raise ValueError(f"unknown tensors {', '.join(sorted(tensors))}")
    if not layers:
        raise ValueError("it has no layers")
    if not all(t in TAIL_FUNCTIONS for t in description["tail"]):
        raise ValueError(f"unknown functions {description['tail']}")
    return IntegerModel(layers, list(description["tail"]))


def _layer(spec: LayerSpec, tensors: dict[str, Tensor]) -> IntegerLayer:
    if spec.weight_container not in (4, 8) or spec.operand_container not in (4, 8):
        raise ValueError(
            f"layer {spec.name} has containers of {spec.weight_container} and {spec.operand_container} bits"
        )
    if min(spec.in_channels, spec.out_channels) < 1:
        raise ValueError(f"layer {spec.name} has sizes {spec.in_channels}, {spec.out_channels}")
    out = (spec.out_channels,)
    packed = bucket_starts(uniform_counts(spec.out_channels, spec.weight_container), spec.in_channels)[-1]
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "weight": (torch.uint8, (packed,)),
        "weight_step": (torch.float32, out),
    }
    if spec.kind == "gcn":
        wanted |= {"operand_step": (torch.float32, out), "operand_bits": (torch.uint8, out)}
    if spec.coding != "binary":
        nodes = tensors["input_step"].numel() if spec.coding == "node" and "input_step" in tensors else 1
        wanted |= {"input_step": (torch.float32, (nodes,)), "input_bits": (torch.uint8, (nodes,))}
    for name in ("bias", "norm_scale"):
        if name in tensors:
            wanted[name] = (torch.float32, out)
    found = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    if found != wanted:
        raise ValueError(f"layer {spec.name} needs tensors {wanted}, the file has {found}")
    for name in ("weight_step", "operand_step", "input_step"):
        if name in tensors and not bool((torch.isfinite(tensors[name]) & (tensors[name] > 0)).all()):
            raise ValueError(f"layer {spec.name}: {name} has values that are not positive and finite")
    for name in ("bias", "norm_scale"):
        if name in tensors and not bool(torch.isfinite(tensors[name]).all()):
            raise ValueError(f"layer {spec.name}: {name} has values that are not finite")
    for name, limit in (("operand_bits", spec.operand_container), ("input_bits", 8)):
        if name in tensors and tensors[name].numel() and int(tensors[name].max()) > limit:
            raise ValueError(f"layer {spec.name}: {name} has widths above {limit}")
    return IntegerLayer(spec, tensors)
