"""Post-training quantization: ranges and steps of a converted model from data, without training."""

from __future__ import annotations

import copy
import inspect
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch_geometric.data import HeteroData
from torch_geometric.data.data import BaseData

from .features import SparseFeatures
from .kernels.percentile import tails
from .kernels.quantize import largest_code
from .quant import LayerQuantizer, LearnedColumns, QATQuantizer, Quantizer, RangeColumns, RangeQuantizer, Scheme
from .quant.a2q import LearnedQuantizer, steps_by_error
from .quant.base import is_row_binary

Method = Literal["percentile", "minmax", "mse"]

_log = logging.getLogger(__name__)

SAMPLE = 2**20
"""Values that are kept of every map for percentiles and errors; where there are more, a random sample."""


def calibrate(model: nn.Module, loader: Any, *, method: Method = "percentile") -> nn.Module:
    """Sets the ranges of a converted model from data, so that it computes on quantized values without having been trained on them.

    The batches run through the model in evaluation, in float; then every input, operand and weight of the "int8", "int4", "dq-" and "nqat-"
    schemes gets the range of the values that it had:

    - "percentile": without the scheme's share of the values at each end (0.1 % at 8 bits, 1 % at 4).
    - "minmax": from the smallest to the largest.
    - "mse": the range with the least squared error over these values.

    The layers of "a2q" and "a2q-nns" start from the first batch as they do in training, and take no ``method``.

    Args:
        model: what :func:`qgnn.convert` made; it is changed in place. What was calibrated or trained before is replaced.
        loader: a PyG DataLoader or NeighborLoader, a Data or HeteroData alone, or any iterable of these, or of tuples or dictionaries of arguments.
            Of a Data the arguments of ``model.forward`` are taken by name (``x``, ``edge_index``, ``edge_weight``, ``batch``, ``x_dict``, ...),
            or it is itself the only argument.

    Returns:
        ``model``. When an error or an interruption ends the call, the model is as it was before.

    Raises:
        ValueError: an unknown method, a model without quantized layers or with float baselines, a loader without batches, a Data without an argument
            that ``forward`` needs, NaN or infinity.
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")
    quantizers = {name: part for name, part in model.named_modules() if isinstance(part, Quantizer)}
    if not quantizers:
        raise ValueError("the model has no quantized layer: pass what qgnn.convert(model, scheme) made")
    for name, quantizer in quantizers.items():
        if not isinstance(quantizer, QATQuantizer | RangeColumns | LearnedQuantizer | LearnedColumns):
            raise ValueError(
                f"{name}: scheme {quantizer.scheme.name} is a float baseline, which has no ranges to calibrate"
            )
    modes = [(part, part.training) for part in model.modules()]
    before = [(quantizer, copy.deepcopy(quantizer.state_dict())) for quantizer in quantizers.values()]
    try:
        model.eval()
        with torch.no_grad(), _watching(quantizers) as watches:
            batches = 0
            for batch in [loader] if isinstance(loader, BaseData) else loader:
                _call(model, batch)
                batches += 1
        if not batches:
            raise ValueError("the loader has no batches; calibration needs data")
        for watch in watches:
            watch.finish(method)
    except BaseException:
        for quantizer, state in before:
            quantizer.load_state_dict(state)
        raise
    finally:
        for part, mode in modes:
            part.training = mode
    _log.info("calibrated %d quantizers on %d batches (%s)", len(quantizers), batches, method)
    return model


def _call(model: nn.Module, batch: Any) -> None:
    """Runs the model on a batch."""
    if isinstance(batch, Mapping) and not isinstance(batch, BaseData):
        model(**batch)
    elif isinstance(batch, tuple | list):
        model(*batch)
    elif isinstance(batch, BaseData):
        device = next(model.parameters()).device
        args, kwargs = _arguments(model, copy.copy(batch).to(device))
        model(*args, **kwargs)
    else:
        raise ValueError(f"a batch must be PyG data, or a tuple or dictionary of arguments, got {type(batch).__name__}")


def _arguments(model: nn.Module, data: BaseData) -> tuple[list[Any], dict[str, Any]]:
    """What ``model.forward`` takes of ``data``."""
    parameters = [
        p
        for p in inspect.signature(model.forward).parameters.values()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    needed = [p.name for p in parameters if p.default is p.empty]
    found = {p.name: value for p in parameters if (value := _attribute(data, p.name)) is not None}
    if len(needed) == 1 and (needed[0] == "batch" or needed[0] not in found):
        return [data], {}
    missing = [name for name in needed if name not in found]
    if missing or not found:
        wanted = ", ".join(missing) or "arguments without names"
        raise ValueError(f"forward needs {wanted}, which the data does not have; pass tuples of arguments instead")
    return [], found


def _attribute(data: BaseData, name: str) -> Tensor | dict[Any, Tensor] | None:
    """The tensor of that name, or those of all types of a HeteroData by type; None where there is none."""
    if not isinstance(data, HeteroData):
        return data[name] if name in data and isinstance(data[name], Tensor) else None
    values = data.collect(name.removesuffix("_dict"), allow_empty=True)
    return {key: value for key, value in values.items() if isinstance(value, Tensor)} or None


class _Values:
    """The extremes and a sample of the values that one range is for."""

    def __init__(self, name: str) -> None:
        self.name, self.low, self.high, self.share = name, math.inf, -math.inf, 1.0
        self.sample = torch.empty(0)
        self.generator: torch.Generator | None = None

    def add(self, x: Tensor) -> None:
        if not x.numel():
            return
        flat = x.detach().reshape(-1).float()
        low, high = (float(extreme) for extreme in torch.aminmax(flat))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"{self.name} has NaN or infinity; calibrate on clean data")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.sample = torch.cat([self.sample.to(flat.device), self._drawn(flat, self.share)])
        while self.sample.numel() > SAMPLE:
            self.share /= 2
            self.sample = self._drawn(self.sample, 0.5)

    def _drawn(self, values: Tensor, share: float) -> Tensor:
        """That share of the values, drawn at random, as every k-th might be a column of a map. The same ones in every run."""
        if share == 1:
            return values
        if self.generator is None:
            self.generator = torch.Generator(values.device).manual_seed(0)
        return values[torch.rand(values.numel(), generator=self.generator, device=values.device) < share]

    def range(self, scheme: Scheme, signed: bool, method: Method) -> tuple[float, float]:
        """Lowest and highest value to represent."""
        if method == "mse":
            bits = torch.tensor([float(scheme.bits)], device=self.sample.device)
            step = steps_by_error(self.sample.unsqueeze(0), bits, signed)
            high = float(step * largest_code(bits, signed))
            return -high if signed else 0.0, high
        if method == "percentile":
            low, high = (float(tail) for tail in tails(self.sample, int(self.sample.numel() * scheme.percentile)))
            if max(-low, high) > 0:  # else nearly all values are 0, and the others would be, too
                return low, high
        return self.low, self.high


class _Watch:
    """Stands in for a quantizer while batches run through the model."""

    def __init__(self, quantizer: Quantizer, name: str) -> None:
        self.quantizer, self.name = quantizer, name
        self.given, self.weight = _Values(f"the input of {name}"), _Values(f"the weight of {name}")
        self.kinds: set[str] = set()
        if isinstance(quantizer, LearnedQuantizer):
            quantizer.kind = "new"
        if isinstance(quantizer, LearnedColumns):
            quantizer.ready = False
        self.method = "linear" if isinstance(quantizer, LayerQuantizer) else "forward"
        self.original = getattr(quantizer, self.method)
        quantizer.__dict__[self.method] = self.linear if isinstance(quantizer, LayerQuantizer) else self.columns

    def linear(self, x: Tensor | SparseFeatures, weight: Tensor) -> Tensor:
        """In place of a layer's product."""
        self.given.add(x if isinstance(x, Tensor) else x.values)
        self.weight.add(weight)
        if isinstance(self.quantizer, LearnedQuantizer):
            return self.original(x, weight)
        if is_row_binary(x):
            self.kinds.add("binary")
        elif isinstance(x, Tensor):
            self.kinds.add("signed" if bool((x < 0).any()) else "unsigned")
        return x @ weight.t()

    def columns(self, h: Tensor) -> Tensor:
        """In place of the quantization of an operand or of attention vectors."""
        self.given.add(h)
        return self.original(h) if isinstance(self.quantizer, LearnedColumns) else h

    def release(self) -> None:
        """Puts the quantizer's own method back."""
        del self.quantizer.__dict__[self.method]

    def finish(self, method: Method) -> None:
        """Sets the ranges."""
        if not self.given.sample.numel():
            _log.warning("no batch reached %s; its range is as before", self.name)
        elif isinstance(self.quantizer, RangeColumns):
            _set(self.quantizer.message, self.given, method)
        elif isinstance(self.quantizer, QATQuantizer):
            self.quantizer.set_extra_state({"kind": self._kind()})
            _set(self.quantizer.input, self.given, method)
            _set(self.quantizer.weight, self.weight, method)

    def _kind(self) -> str:
        """The kind that all batches had, else the one that represents them all."""
        return self.kinds.pop() if len(self.kinds) == 1 else "signed" if "signed" in self.kinds else "unsigned"


def _set(quantizer: RangeQuantizer, values: _Values, method: Method) -> None:
    low, high = values.range(quantizer.scheme, quantizer.symmetric, method)
    quantizer.low.fill_(low)
    quantizer.high.fill_(high)


@contextmanager
def _watching(quantizers: dict[str, Quantizer]) -> Iterator[list[_Watch]]:
    """While it lasts, quantizers with ranges note the values that they are given and pass them on in float, and learned ones start anew."""
    watches = [_Watch(quantizer, name) for name, quantizer in quantizers.items()]
    try:
        yield watches
    finally:
        for watch in watches:
            watch.release()
