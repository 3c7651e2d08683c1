"""From a trained quantized model to packed integers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .graph import Graph
from .integer import FreezeReport, InputCoding, IntegerLayer, IntegerModel, LayerReport, LayerSpec
from .kernels.packing import bucket_starts, container_of, uniform_counts, unpack_reference
from .nn import GATConv, GCNConv, GINConv, Linear, SAGEConv
from .qtensor import QTensor, check_values
from .quant import LayerQuantizer

if TYPE_CHECKING:
    from torch_geometric.data import Data

_RELU: tuple[Callable[..., Any], ...] = (torch.relu, F.relu, Tensor.relu, torch.relu_, F.relu_, Tensor.relu_)
_IDENTITY: tuple[Callable[..., Any], ...] = (F.dropout, torch.dropout, Tensor.contiguous, Tensor.float)
_TAIL: dict[Callable[..., Any], str] = {
    F.log_softmax: "log_softmax", torch.log_softmax: "log_softmax", Tensor.log_softmax: "log_softmax",
    F.softmax: "softmax", torch.softmax: "softmax", Tensor.softmax: "softmax",
}  # fmt: skip


@dataclass(frozen=True)
class _Affine:
    """``x * scale + shift``, ``[F]`` each: a batch normalisation in evaluation."""

    scale: Tensor
    shift: Tensor

    @classmethod
    def of_batch_norm(
        cls, input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None, bias: Tensor | None = None,
        training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
    ) -> _Affine:  # fmt: skip
        """From the arguments of :func:`torch.nn.functional.batch_norm`."""
        del input, momentum
        if training or running_mean is None or running_var is None:
            raise ValueError(
                "freeze folds batch normalisation with running statistics, in eval mode; this one has none"
            )
        scale = (running_var + eps).rsqrt() * (1 if weight is None else weight)
        return cls(scale, (0 if bias is None else bias) - running_mean * scale)


class _Recorder(TorchFunctionMode):
    """Follows one tensor through a forward pass: layers by hooks, functions by interception. So plain Python forward code needs no tracing."""

    def __init__(self, layers: dict[nn.Module, str], edges: Tensor | Graph) -> None:
        super().__init__()
        self.edges = edges
        self.layers = layers
        self.steps: list[str | _Affine | GCNConv | Linear] = []
        self.inputs: dict[nn.Module, Tensor] = {}
        self.operands: dict[nn.Module, Tensor] = {}
        self.current: Tensor | None = None
        self.inside = 0

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = (*args, *(kwargs or {}).values())
        followed = isinstance(out, Tensor) or func is Tensor.__setitem__
        if self.inside or not followed or not any(a is self.current for a in given):
            return out
        if func in _IDENTITY:
            if func in (F.dropout, torch.dropout) and self.current is not None and not torch.equal(out, self.current):
                raise ValueError("freeze needs the model in eval mode; a dropout changed its input")
        elif func in _RELU:
            self.steps.append("relu")
        elif func is F.batch_norm:
            self.steps.append(_Affine.of_batch_norm(*args, **(kwargs or {})))
        elif func in _TAIL:
            dim = (kwargs or {}).get("dim", args[1] if len(args) > 1 else None)
            if dim not in (-1, 1, None):
                raise ValueError(f"freeze takes {_TAIL[func]} over the classes, dim=-1, got dim={dim}")
            self.steps.append(_TAIL[func])
        else:
            raise ValueError(
                f"freeze cannot run {getattr(func, '__name__', func)} on integers; it takes chains of GCNConv, Linear, BatchNorm, ReLU and dropout"
            )
        self.current = out
        return out

    def enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(layer, GCNConv | Linear), "only these have hooks"
        if self.inside == 0:
            name = self.layers[layer]
            given: dict[str, Any] = dict(zip(("x", "edge_index", "edge_weight"), args, strict=False)) | kwargs
            x: Tensor = given["x"]
            if x is not self.current:
                raise ValueError(
                    f"layer {name} does not take the output of the layer before it; freeze takes chains, without skip connections"
                )
            if given.get("edge_weight") is not None:
                raise ValueError(f"layer {name} uses edge weights; integer sums have none")
            if isinstance(layer, GCNConv) and not self._same_edges(given["edge_index"]):
                raise ValueError(
                    f"layer {name} uses other edges than the model was given; freeze takes one graph for all layers"
                )
            if layer in self.inputs:
                raise ValueError(f"layer {name} is used twice; freeze takes chains")
            if layer.quantizer is not None and layer.quantizer.kind == "new":
                raise ValueError(f"layer {name} has seen no data, so it has no steps yet; train the model first")
            self.inputs[layer] = x
            self.steps.append(layer)
        self.inside += 1

    def _same_edges(self, edges: Tensor | Graph) -> bool:
        return edges is self.edges or (
            isinstance(edges, Tensor) and isinstance(self.edges, Tensor) and torch.equal(edges, self.edges)
        )

    def leave(self, layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        if self.inside == 1:
            if isinstance(layer, GCNConv) and layer.quantizer is not None:
                self.operands[layer] = _operand_codes(layer, self.inputs[layer], self.edges)
            self.current = out
        self.inside -= 1


def _operand_codes(layer: GCNConv, x: Tensor, edges: Tensor | Graph) -> Tensor:
    """Codes of the operand of the aggregation in the fake-quantized model, ``[N, out]``."""
    assert layer.quantizer is not None and layer.operand_quantizer is not None
    _, factor, _ = layer.propagation(edges, x.size(0))
    h = layer.quantizer.linear(x, layer.lin.weight)
    operand = layer.operand_quantizer(h if factor is None else h * factor.unsqueeze(1))
    return torch.round(operand / layer.operand_quantizer.codes()[0])


def _check_layers(model: nn.Module) -> None:
    """Raises ValueError for a layer or a scheme without integers."""
    for name, module in model.named_modules():
        if isinstance(module, GATConv | GINConv | SAGEConv):
            raise ValueError(
                f"{name or 'the model'} is a {type(module).__name__}; freeze takes chains of GCNConv and Linear"
            )
        if isinstance(module, LayerQuantizer):
            scheme = module.scheme
            if scheme.method in ("half", "binary"):
                raise ValueError(f"scheme {scheme.name} is a float baseline: it has no integer codes to freeze")
            if scheme.groups:
                raise ValueError(
                    f"scheme {scheme.name} chooses steps as values come: freeze takes steps that are fixed, as a2q's"
                )


def _record(model: nn.Module, x: Tensor, edge_index: Tensor | Graph) -> tuple[_Recorder, Tensor]:
    layers: dict[nn.Module, str] = {
        m: name or "model" for name, m in model.named_modules() if isinstance(m, GCNConv | Linear)
    }
    recorder = _Recorder(layers, edge_index)
    hooks = [m.register_forward_pre_hook(recorder.enter, with_kwargs=True) for m in layers] + [
        m.register_forward_hook(recorder.leave) for m in layers
    ]
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), recorder:
            recorder.current = x
            out = model(x, edge_index)
    finally:
        for module, training in modes.items():
            module.training = training
        for hook in hooks:
            hook.remove()
    if out is not recorder.current:
        raise ValueError(
            "the model's output is not that of its last layer; freeze takes chains of GCNConv, Linear, ReLU and dropout"
        )
    return recorder, out


def _frozen_layer(layer: GCNConv | Linear, name: str, x: Tensor, norm: _Affine | None, relu: bool) -> IntegerLayer:
    quantizer = layer.quantizer
    if quantizer is None or not quantizer.enabled:
        raise ValueError(
            f"layer {name} is not quantized; convert the model with a scheme other than fp32 and train it first"
        )
    weight = quantizer.weight_codes((layer.lin.weight if isinstance(layer, GCNConv) else layer.weight).detach())
    codes = quantizer.input_codes(x)
    coding: InputCoding = (
        "binary" if quantizer.kind == "binary" else "node" if isinstance(quantizer.input_bits(), Tensor) else "tensor"
    )
    tensors = {"weight": weight.data, "weight_step": weight.step.contiguous()}
    if coding != "binary":
        tensors |= {"input_step": codes.step.contiguous(), "input_bits": codes.bits.contiguous()}
    if layer.bias is not None:
        tensors["bias"] = layer.bias.detach().float().clone()
    if norm is not None:
        tensors["norm_scale"] = norm.scale.detach().float().clone()
        tensors["bias"] = (norm.shift + norm.scale * tensors.get("bias", 0)).detach().float()
    for part in ("bias", "norm_scale"):
        bad = ~torch.isfinite(tensors[part]) if part in tensors else torch.zeros(0, dtype=torch.bool)
        if bool(bad.any()):
            raise ValueError(f"layer {name}: {part}[{int(bad.nonzero()[0, 0])}] is not finite")
    operand_container, normalize, add_self_loops = 8, False, False
    if isinstance(layer, GCNConv):
        assert layer.operand_quantizer is not None, "as the layer has a quantizer"
        step, bits = layer.operand_quantizer.codes()
        tensors |= {"operand_step": step.contiguous(), "operand_bits": bits.contiguous()}
        operand_container, normalize, add_self_loops = (
            container_of(int(bits.max()), True),
            layer.normalize,
            layer.add_self_loops,
        )
    spec = LayerSpec(
        name, "gcn" if isinstance(layer, GCNConv) else "linear", layer.in_channels, layer.out_channels, weight.container, operand_container, coding,
        codes.signed, relu, normalize, add_self_loops,
    )  # fmt: skip
    return IntegerLayer(spec, tensors)


def freeze(model: nn.Module, data: Data) -> IntegerModel:
    """The integer model of a trained quantized model: at most two kernel launches per GCN layer, on packed codes.

    Args:
        model: what :func:`qgnn.convert` made, trained; its ``forward(x, edge_index)`` is a chain of GCNConv, Linear, BatchNorm (folded into the
            layer before it, A2Q eq. 18), ReLU and dropout, and may end in a softmax. It is not changed.
        data: PyG data with ``x`` and ``edge_index``; they stay bound, so that ``frozen()`` runs on them. Steps and widths per node belong to them.

    Returns:
        The integer model; ``frozen.report`` compares it with the fake-quantized model on ``data``.

    Raises:
        ValueError: a layer that is not quantized or has seen no data, a function that integers cannot run, edge weights, skip connections,
        NaN or infinity.
    """
    x, edge_index = getattr(data, "x", None), getattr(data, "edge_index", None)
    if not isinstance(x, Tensor) or not isinstance(edge_index, Tensor | Graph):
        raise ValueError("freeze needs data with x and edge_index")
    if getattr(data, "edge_weight", None) is not None:
        raise ValueError("data has edge weights; integer sums have none")
    check_values(x, torch.ones(1, device=x.device))
    _check_layers(model)
    recorder, reference = _record(model, x, edge_index)
    layers: list[IntegerLayer] = []
    tail: list[str] = []
    steps = list(recorder.steps)
    while steps:
        step = steps.pop(0)
        if isinstance(step, _Affine):
            raise ValueError(
                "the model applies batch normalisation before its first layer or after a ReLU; integers take layer, BatchNorm, ReLU in this order"
            )
        if isinstance(step, str):
            if not layers:
                raise ValueError(f"the model applies {step} before its first layer; apply it to the data instead")
            if step == "relu":
                raise ValueError(
                    "the model applies a function between a layer and its ReLU; freeze takes layer, BatchNorm, ReLU, dropout in this order"
                )
            tail.append(step)
            continue
        if tail:
            raise ValueError(f"the model applies {tail[0]} between layers; integers run only BatchNorm and ReLU there")
        norm = steps.pop(0) if steps and isinstance(steps[0], _Affine) else None
        relu = bool(steps) and steps[0] == "relu"
        if relu:
            steps.pop(0)
        assert norm is None or isinstance(norm, _Affine)
        layers.append(_frozen_layer(step, recorder.layers[step], recorder.inputs[step], norm, relu))
    if not layers:
        raise ValueError("the model has no GCNConv or Linear of qgnn; convert it first")
    frozen = IntegerModel(layers, tail).bind(x, edge_index)
    frozen.report = _report(frozen, recorder, reference)
    return frozen


@torch.no_grad()
def _report(frozen: IntegerModel, recorder: _Recorder, reference: Tensor) -> FreezeReport:
    states, out = frozen.trace(), frozen()
    records = []
    for layer, launches, state, (origin, x) in zip(
        frozen.chain, frozen.launches(), states, recorder.inputs.items(), strict=False
    ):
        assert isinstance(state, QTensor) and frozen.bound is not None
        place = layer.place(frozen.bound.graph)
        expected = layer.pack_input(x, place.rows)
        nodes, spec = state.shape[0], layer.spec
        operand, differing_operand = 0, 0
        if spec.kind == "gcn":
            counts = uniform_counts(nodes, spec.operand_container)
            operand = bucket_starts(counts, spec.out_channels)[-1]
            codes = unpack_reference(
                layer.operand(state, layer.scale(state, place)), None, counts, spec.out_channels, True
            )
            differing_operand = int((codes != recorder.operands[origin]).sum())
        records.append(
            LayerReport(
                name=spec.name,
                kind=spec.kind,
                average_bits=float(state.bits.float().mean()) if nodes else 0.0,
                launches=launches,
                code_bytes=state.code_nbytes,
                input_fp32_bytes=4 * nodes * spec.in_channels,
                step_bytes=state.nbytes - state.code_nbytes,
                operand_bytes=operand,
                operand_fp32_bytes=4 * nodes * spec.out_channels if spec.kind == "gcn" else 0,
                weight_bytes=layer.weight.numel(),
                weight_step_bytes=4 * layer.weight_step.numel(),
                weight_fp32_bytes=4 * spec.in_channels * spec.out_channels,
                differing_codes=int((state.codes() != expected.codes()).sum()),
                differing_operand_codes=differing_operand,
            )
        )
    difference = float((out - reference).abs().max()) if out.numel() else 0.0
    largest = float(reference.abs().max()) if out.numel() else 0.0
    return FreezeReport(
        layers=records,
        max_difference=difference,
        max_relative=difference / largest if largest else 0.0,
        mismatched_predictions=int((out.argmax(-1) != reference.argmax(-1)).sum()),
        ties=sum(r.differing_codes + r.differing_operand_codes for r in records),
        packed_bytes=sum(r.code_bytes + r.operand_bytes for r in records),
        fp32_bytes=sum(r.input_fp32_bytes + r.operand_fp32_bytes for r in records),
    )
