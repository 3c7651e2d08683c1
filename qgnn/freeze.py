"""From a trained quantized model to packed integers."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from .fusion import fuse, run
from .graph import Graph
from .integer import FreezeReport, IntegerModel, LayerReport
from .kernels.packing import uniform_counts, unpack_reference
from .lowering import Lowered, lower
from .parts import Codec, Operand, Packed, Product
from .quant import ColumnQuantizer, LayerQuantizer, QATQuantizer

if TYPE_CHECKING:
    from torch_geometric.data import Data

_log = logging.getLogger(__name__)

_TIE = 1e-4
"""Codes that differ where the value lies this near, relative to the largest of its row or column, to the border of two codes: NUMERICS 7 grants float
rounding as much in the logits."""


def freeze(model: nn.Module, data: Data | HeteroData | None = None, *, cuda_graph: bool = False) -> IntegerModel:
    """The integer model of a trained quantized model: two kernel launches a GCN layer, on packed codes.

    The forward code is followed once, with :mod:`torch.fx`. GCNConv, GATConv, GINConv, SAGEConv and Linear of :mod:`qgnn.nn` run on integers;
    degree normalisation, batch normalisation (A2Q eq. 18), ReLU, skip connections and the codes of the next layer are written by the kernel
    before them; the rest, such as pooling, stays in float. Layers that integers cannot run are listed in ``frozen.report``, and in a warning.

    Args:
        model: what :func:`qgnn.convert` made, trained or calibrated. It is not changed.
        data: PyG data with an attribute for every argument of ``model.forward`` (``x``, ``edge_index``, ``batch``, ...). They stay bound, so that
            ``frozen()`` runs on them, and the report compares both models on them. Without data there is no report of differences; the model then
            takes what ``forward`` has no default for.
        cuda_graph: records the launches on the bound data as one CUDA graph, which ``frozen()`` replays.

    Returns:
        The integer model; its arguments are those of ``model.forward`` that were found.

    Raises:
        ValueError: a layer that has seen no data, forward code that depends on values, NaN or infinity, data without an argument.
    """
    names, inputs = _inputs(model, data)
    followed = copy.deepcopy(model).eval()
    lowered = lower(followed, names)
    names, inputs = _used(lowered, model, names, inputs)
    if data is None:
        if cuda_graph:
            raise ValueError("a CUDA graph is of the data that are bound: pass data, or call bind and capture later")
        fuse(lowered, {})
        return _built(lowered)
    with torch.no_grad(), _calls(followed) as calls:
        reference = followed(**dict(zip(names, inputs, strict=True)))
    with torch.no_grad():
        _, shapes = run(lowered, inputs)
        _check_followed(lower(followed, names, whole=True), inputs, reference)
    fuse(lowered, shapes)
    frozen = _built(lowered).bind(*inputs)
    frozen.report = _report(frozen, lowered, calls, inputs, reference)
    if cuda_graph:
        frozen.capture()
    return frozen


def _inputs(model: nn.Module, data: Any) -> tuple[list[str], list[Any]]:
    """Names and values of the arguments of ``model.forward`` that the data hold."""
    names, inputs = [], []
    parameters = inspect.signature(model.forward).parameters
    for name, parameter in parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        value = _value(data, name)
        required = parameter.default is parameter.empty
        if not required and not isinstance(value, Tensor | Graph | dict):
            continue
        if value is None and required and len(parameters) == 1:
            value = data  # `forward(self, data)`
        if data is not None and value is None and required:
            raise ValueError(f"freeze needs data with {name}, which the model's forward takes")
        if value is not None or (data is None and required):
            names.append(name)
            inputs.append(value)
    return names, inputs


def _check_followed(followed: Lowered, inputs: list[Any], reference: Any) -> None:
    """Raises ValueError unless a program computes what the model does: Python code can do what torch.fx does not see."""
    for a, b in zip(_tensors(run(followed, inputs)[0]), _tensors(reference), strict=True):
        if not torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()) if b.numel() else 0.0):
            raise ValueError(
                "freeze followed the forward code, and what it saw computes something else: the code must not change values in place "
                "(h += 1), nor keep a state"
            )


def _used(lowered: Lowered, model: nn.Module, names: list[str], inputs: list[Any]) -> tuple[list[str], list[Any]]:
    """The arguments without those that have a default and that nothing reads, which the program loses too."""
    parameters = inspect.signature(model.forward).parameters
    given = dict(zip(names, inputs, strict=True))
    for node in list(lowered.program.nodes):
        name = str(node.target)
        if node.op == "placeholder" and not node.users and parameters[name].default is not inspect.Parameter.empty:
            lowered.program.erase_node(node)
            del given[name]
    return list(given), list(given.values())


def _value(data: Any, name: str) -> Any:
    """The argument of a name; of heterogeneous data, which hold one value a type, the dict of these."""
    if data is None:
        return None
    if isinstance(data, HeteroData):
        return getattr(data, name if name.endswith("_dict") else f"{name}_dict", None) or None
    value = getattr(data, name, None)
    return None if callable(value) else value


def _built(lowered: Lowered) -> IntegerModel:
    for name, reason in lowered.floats.items():
        _log.warning("layer %s stays in float: %s", name, reason)
    return IntegerModel(lowered.program, lowered.parts, lowered.kinds, lowered.floats)


@contextmanager
def _calls(model: nn.Module) -> Iterator[dict[nn.Module, list[Tensor]]]:
    """Collects what every quantizer of rows and of columns is given, call by call, while the context is open."""
    given: dict[nn.Module, list[Tensor]] = {}
    hooks = []

    def keep(quantizer: nn.Module, x: Any) -> None:
        given.setdefault(quantizer, []).append(x if isinstance(x, Tensor) else x.to_dense())

    def listening(quantizer: LayerQuantizer) -> Any:
        linear = quantizer.linear

        def call(x: Any, weight: Tensor) -> Tensor:
            keep(quantizer, x)
            return linear(x, weight)

        return call

    layers = [m for m in model.modules() if isinstance(m, LayerQuantizer)]
    for quantizer in layers:
        object.__setattr__(quantizer, "linear", listening(quantizer))
    for module in model.modules():
        if isinstance(module, ColumnQuantizer):
            hooks.append(module.register_forward_pre_hook(lambda module, args: keep(module, args[0])))
    try:
        yield given
    finally:
        for quantizer in layers:
            object.__delattr__(quantizer, "linear")
        for hook in hooks:
            hook.remove()


@dataclass
class _Map:
    """A packed map of a frozen model: the codes, and those of the fake-quantized model's values."""

    part: Codec | Operand
    codes: Tensor
    expected: Tensor
    step: Tensor
    bits: Tensor
    values: Tensor
    code_bytes: int

    @property
    def differing(self) -> Tensor:
        """Which codes differ."""
        return self.codes != self.expected

    def ties(self) -> int:
        """Codes that differ because the value lies at the border of two, or the largest of its row at that of two groups."""
        if not self.codes.numel():
            return 0
        scaled = (self.values / self.step).abs()
        border = (scaled - scaled.floor() - 0.5).abs()
        largest = scaled.amax(0 if isinstance(self.part, Operand) else 1, keepdim=True)
        near = border <= _TIE * largest.clamp_min(1)
        if isinstance(self.part, Codec) and self.part.spec.coding == "group":
            size = self.values.abs().amax(1, keepdim=True)
            bounds = self.part.bounds
            place = torch.bucketize(size, bounds)
            beside = (
                torch.stack([bounds[(place + k).clamp(0, bounds.numel() - 1)] for k in (-1, 0)])
                if len(bounds)
                else size + 1
            )
            near = near | ((beside - size).abs() <= _TIE * size).any(0)
        return int((self.differing & near).sum())

    def max_difference(self) -> float:
        """Largest difference of a value."""
        return float(((self.codes - self.expected) * self.step).abs().max()) if self.codes.numel() else 0.0

    def step_bytes(self) -> int:
        """Bytes of steps, widths and places of rows; those of an operand's columns belong to its weight."""
        if isinstance(self.part, Operand):
            return 0
        return sum(map(_bytes, (self.step, self.bits))) + (0 if self.part.pos is None else _bytes(self.part.pos))


def _map(part: Codec | Operand, out: Packed | Tensor, values: Tensor, quantizer: nn.Module) -> _Map:
    """``out`` is what the part packed, ``values`` what the fake-quantized model gave to the quantizer that the part does the work of."""
    nodes, features = values.shape
    if isinstance(part, Operand):
        counts, pos, signed, step, bits = uniform_counts(nodes, part.container), None, True, part.step, part.bits
        data, wanted = out, part(values)
    else:
        counts, pos = part.layout(nodes)
        plain = Codec(replace(part.spec, normalize=False), part.step, part.bits)
        packed = plain(values)
        signed, step, bits = part.spec.signed, packed.scale.unsqueeze(1), plain.widths(values)
        data, wanted = out[0], packed.data
    assert isinstance(data, Tensor), "packed bytes"
    codes, expected = (unpack_reference(d, pos, counts, features, signed) for d in (data, wanted))
    if isinstance(quantizer, QATQuantizer) and quantizer.kind == "unsigned":  # it rounds half to even (NUMERICS 5)
        expected = torch.round(quantizer.input(values) / step).to(expected.dtype)
    return _Map(part, codes, expected, step, bits, values, _bytes(data))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _maps(
    frozen: IntegerModel, lowered: Lowered, calls: dict[nn.Module, list[Tensor]], inputs: list[Any]
) -> dict[str, list[_Map]]:
    """The packed maps of every layer."""
    with frozen.recording() as outputs:
        frozen(*inputs)
    packed: dict[nn.Module, Packed | Tensor] = {}
    for name, part in frozen.parts.items():
        for out in outputs[name]:
            packed[next(iter(getattr(part, "following", [])), part)] = out
    maps: dict[str, list[_Map]] = {name: [] for name in frozen.kinds}
    for name, (quantizer, number) in lowered.origins.items():
        part = frozen.parts[name]
        assert isinstance(part, Codec | Operand), "as it has an origin"
        maps[part.layer].append(_map(part, packed[part], calls[quantizer][number].float(), quantizer))
    return maps


def _layer_report(frozen: IntegerModel, name: str, launches: int, maps: list[_Map]) -> LayerReport:
    products = [p for p in frozen.parts.values() if isinstance(p, Product) and p.layer == name]
    rows = [m for m in maps if isinstance(m.part, Codec)]
    operands = [m for m in maps if isinstance(m.part, Operand)]
    ties, differing = sum(m.ties() for m in maps), [sum(int(m.differing.sum()) for m in ms) for ms in (rows, operands)]
    return LayerReport(
        name=name,
        kind=frozen.kinds[name],
        reason=frozen.floats.get(name, ""),
        coding=", ".join(m.part.spec.coding for m in rows if isinstance(m.part, Codec)),
        average_bits=_mean([m.bits.float().mean().item() for m in rows if m.bits.numel()]),
        launches=launches,
        code_bytes=sum(m.code_bytes for m in rows),
        input_fp32_bytes=sum(4 * m.codes.numel() for m in rows),
        step_bytes=sum(m.step_bytes() for m in rows),
        operand_bytes=sum(m.code_bytes for m in operands),
        operand_fp32_bytes=sum(4 * m.codes.numel() for m in operands),
        weight_bytes=sum(_bytes(p.weight) for p in products),
        weight_step_bytes=sum(_bytes(p.column_scale) for p in products),
        weight_fp32_bytes=sum(4 * p.codec_in[0].spec.features * p.out_channels for p in products),
        max_difference=max((m.max_difference() for m in maps), default=0.0),
        differing_codes=differing[0],
        differing_operand_codes=differing[1],
        ties=ties,
        inherited=sum(differing) - ties,
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _report(
    frozen: IntegerModel, lowered: Lowered, calls: dict[nn.Module, list[Tensor]], inputs: list[Any], reference: Any
) -> FreezeReport:
    with torch.no_grad():
        maps, launches = _maps(frozen, lowered, calls, inputs), frozen.launches()
    layers = [_layer_report(frozen, name, launches[name], maps[name]) for name in frozen.kinds]
    pairs = list(zip(_tensors(frozen()), _tensors(reference), strict=True))
    difference = max((float((a - b).abs().max()) for a, b in pairs if a.numel()), default=0.0)
    largest = max((float(b.abs().max()) for _, b in pairs if b.numel()), default=0.0)
    return FreezeReport(
        layers=layers,
        max_difference=difference,
        max_relative=difference / largest if largest else 0.0,
        mismatched_predictions=sum(int((a.argmax(-1) != b.argmax(-1)).sum()) for a, b in pairs if a.numel()),
        ties=sum(r.ties for r in layers),
        inherited=sum(r.inherited for r in layers),
        packed_bytes=sum(r.code_bytes + r.operand_bytes for r in layers),
        fp32_bytes=sum(r.input_fp32_bytes + r.operand_fp32_bytes for r in layers),
    )


def _tensors(out: Any) -> list[Tensor]:
    """The floating-point results of a model, one or several."""
    if isinstance(out, dict):
        return [t for value in out.values() for t in _tensors(value)]
    if isinstance(out, tuple | list):
        return [t for value in out for t in _tensors(value)]
    return [out] if isinstance(out, Tensor) and out.is_floating_point() else []
