"""The public operations: checked, differentiable where it makes sense, on the backend of :func:`qgnn.use_backend`."""

from __future__ import annotations

import os
from typing import Literal

import torch
from torch import Tensor

from . import autograd
from .graph import Graph
from .kernels.aggregate import REDUCTIONS, aggregate_packed, aggregate_rows
from .kernels.matmul import matmul_packed
from .qtensor import Axis, QTensor, check_parameters, check_values

__all__ = ["aggregate", "fake_quantize", "fake_quantize_affine", "matmul", "quantized_linear", "relu_dropout"]

_INT32_LIMIT = 2**31


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _debug() -> bool:
    return os.environ.get("QGNN_DEBUG") == "1"


def _along(bits: Tensor | float, steps: Tensor) -> Tensor:
    """The real widths, which take a gradient, as a vector like ``steps``."""
    real = bits if isinstance(bits, Tensor) else torch.tensor(float(bits), device=steps.device)
    return real.reshape(-1).expand(steps.shape)


def fake_quantize(
    x: Tensor,
    step: Tensor | float,
    bits: Tensor | float,
    *,
    axis: Axis = "row",
    signed: bool = True,
    gradient: Literal["global", "local"] = "global",
    ste: Literal["clip", "pass"] = "clip",
) -> Tensor:
    """Quantizes and dequantizes ``x`` with learnable steps and widths (A2Q eq. 1; NUMERICS 1 and 2).

    Args:
        x: ``[N, F]``, float16, bfloat16 or float32; float64 on a CPU.
        step: positive steps, ``[N]`` for axis "row", ``[F]`` for axis "col", or a number.
        bits: real widths, shaped like ``step``; rounded half to even and clamped to 0..8.
        axis: which axis the steps run along.
        signed: False for non-negative ``x``: all ``2^b - 1`` codes are then positive.
        gradient: "global" gives step and width the gradient of the loss (eq. 3, 4), "local" that of the quantization error (eq. 7, 8), which does
            not depend on the upstream gradient.
        ste: gradient of x, "clip": zero where x was clipped (eq. 10); "pass": unchanged everywhere.

    Returns:
        ``step * code``, ``[N, F]`` in the dtype of ``x``. NaN stays NaN.

    Raises:
        TypeError, ValueError: wrong shapes, dtypes or devices; with ``QGNN_DEBUG=1`` also NaN, infinity or a step that is not positive.
    """
    _check_choice("gradient", gradient, ("global", "local"))
    _check_choice("ste", ste, ("clip", "pass"))
    steps, widths = check_parameters(x, step, bits, axis)
    if _debug():
        check_values(x, steps)
    return autograd.FakeQuantize.apply(
        x, steps, _along(bits, steps), widths, axis == "row", signed, gradient == "local", ste == "clip"
    )


def fake_quantize_affine(
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    *,
    protect: Tensor | None = None,
    ste: Literal["clip", "pass"] = "clip",
) -> Tensor:
    """Quantizes and dequantizes ``x`` with one affine quantizer (Degree-Quant app. A.3; NUMERICS 5).

    Args:
        x: ``[N, F]`` floats.
        scale, zero: tensors of one element, float32 and int32: ``value = scale * (code - zero)``, codes 0 to ``2^bits - 1``.
        bits: 2 to 8.
        protect: bool ``[N]``: rows that pass unquantized (Degree-Quant's protective mask).
        ste: gradient of x, "clip": zero outside the range; "pass": unchanged.

    Raises:
        TypeError, ValueError: wrong shapes, dtypes or devices.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() != 2:
        raise ValueError("x must be a 2-D floating-point tensor [nodes, features]")
    if not 2 <= bits <= 8:
        raise ValueError(f"an affine quantizer has 2 to 8 bits, got {bits}")
    for name, value in (("scale", scale), ("zero", zero)):
        if not isinstance(value, Tensor) or value.numel() != 1 or value.device != x.device:
            raise ValueError(f"{name} must be a tensor of one element on {x.device}")
    if protect is not None and (protect.dtype != torch.bool or protect.shape != (x.size(0),)):
        raise ValueError(f"protect must be bool of shape [{x.size(0)}], got {protect.dtype} {tuple(protect.shape)}")
    return autograd.FakeQuantizeAffine.apply(x, scale.float(), zero.to(torch.int32), bits, protect, ste == "clip")


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    step: Tensor | float,
    bits: Tensor | float,
    *,
    signed: bool = True,
    ste: Literal["clip", "pass"] = "clip",
) -> Tensor:
    """``fake_quantize(x, step, bits, gradient="local") @ weight``, keeping packed codes and clip bits for backward, not ``x`` (NUMERICS 2).

    Args:
        x: ``[N, K]`` float32.
        weight: ``[K, M]``, already quantized.
        step, bits: ``[N]``, per node, or a number.

    Returns:
        ``[N, M]``.
    """
    _check_choice("ste", ste, ("clip", "pass"))
    steps, widths = check_parameters(x, step, bits, "row")
    if x.dtype not in (torch.float32, torch.float64) or weight.dtype != x.dtype:
        raise TypeError(f"x and weight must be float32, got {x.dtype} and {weight.dtype}")
    if weight.dim() != 2 or weight.size(0) != x.size(1):
        raise ValueError(f"weight must be [{x.size(1)}, M] for x {tuple(x.shape)}, got {tuple(weight.shape)}")
    if _debug():
        check_values(x, steps)
    return autograd.QuantizedLinear.apply(x, steps, _along(bits, steps), widths, weight, signed, ste == "clip")


def relu_dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """``torch.nn.functional.dropout(relu(x), p, training)``, keeping one bit per element for backward.

    Args:
        x: ``[N, F]`` floats.
        p: chance that an element is set to zero, below 1.
        training: without it, the plain ReLU.
    """
    if not 0 <= p < 1:
        raise ValueError(f"p must be in [0, 1), got {p}")
    return autograd.ReluDropout.apply(x, p) if training else torch.relu(x)


def aggregate(
    g: Graph,
    x: Tensor | QTensor,
    edge_weight: Tensor | None = None,
    reduce: Literal["sum", "mean", "max", "min"] = "sum",
) -> Tensor:
    """Aggregates the features of the sources of every node: ``out[i] = reduce over edges e = (j, i) of edge_weight[e] * x[j]``.

    Args:
        g: the graph; ``N`` destinations, ``M`` sources.
        x: ``[M, F]``; a float tensor (differentiable), or a QTensor: with steps per column the codes are summed in int32, exactly; with steps per
            row in float32, in a fixed order.
        edge_weight: ``[E]`` in the caller's order of edges, differentiable for float ``x``; self loops that ``g.add_self_loops()`` added weigh 1.
        reduce: empty rows give 0. "max" and "min" take float ``x`` only.

    Returns:
        ``[N, F]`` in the dtype of ``x`` (float32 for a QTensor). Two runs give the same bits.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit, or a sum that int32 could not hold.
    """
    _check_choice("reduce", reduce, REDUCTIONS)
    if not isinstance(g, Graph):
        raise TypeError(
            f"g must be a qgnn.Graph, got {type(g).__name__}; make one with Graph.from_edge_index(edge_index, num_nodes)"
        )
    if isinstance(x, Tensor) and x.layout != torch.strided:
        raise TypeError(f"x must be a dense tensor, got {x.layout}")
    if not isinstance(x, Tensor | QTensor):
        raise TypeError(f"x must be a torch.Tensor or a QTensor, got {type(x).__name__}")
    features = x.shape[1] if len(x.shape) == 2 else -1
    if len(x.shape) != 2 or x.shape[0] != g.num_sources:
        raise ValueError(f"x must be [{g.num_sources}, F] for {g}, got shape {tuple(x.shape)}")
    if x.device != g.device:
        raise ValueError(f"x is on {x.device} and the graph on {g.device}; move one with .to()")
    if edge_weight is not None:
        edge_weight = g.edge_values(edge_weight)
    if isinstance(x, QTensor):
        return _aggregate_quantized(g, x, edge_weight, reduce, features)
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor or a QTensor, got {x.dtype}")
    return aggregate_csr(g, x, edge_weight, reduce)


def aggregate_csr(g: Graph, x: Tensor, weight: Tensor | None, reduce: str = "sum") -> Tensor:
    """:func:`aggregate` for layers: float ``x`` that is known to fit, and ``weight`` ``[E]`` already in CSR order."""
    return autograd.Aggregate.apply(x, weight, g, reduce)


def _aggregate_quantized(g: Graph, x: QTensor, weight: Tensor | None, reduce: str, features: int) -> Tensor:
    if reduce in ("max", "min"):
        raise ValueError(f'reduce="{reduce}" takes a float tensor; pass x.dequantize()')
    if x.zero:
        raise ValueError(
            "the aggregation takes symmetric codes, and this QTensor has a zero point; pass x.dequantize()"
        )
    row_scale = 1 / g.in_degree.clamp_min(1).float() if reduce == "mean" else None
    if x.axis == "row":
        w = None if weight is None else weight.float()
        return aggregate_rows(
            g.indptr,
            g.indices,
            list(g.schedule),
            x.data,
            x.pos,
            list(x.counts),
            features,
            x.signed,
            x.step,
            w,
            row_scale,
            None,
            False,
        )
    if weight is not None:
        raise ValueError(
            "edge weights need steps per row: the integer sum of codes has no weights; quantize with axis='row'"
        )
    check_headroom(g, 8 if not x.signed else 7)
    return aggregate_packed(
        g.indptr, g.indices, list(g.schedule), x.data, x.container, g.num_sources, features, x.signed, "float", row_scale, x.step, None, False,
        None, None, None, [0] * 5, False,
    )  # fmt: skip


def check_headroom(g: Graph, magnitude_bits: int = 7) -> None:
    """Raises ValueError if codes below ``2^magnitude_bits`` could overflow an int32 sum over the largest in-degree of ``g`` (NUMERICS 7)."""
    if (g.max_degree << magnitude_bits) >= _INT32_LIMIT:
        raise ValueError(
            f"a node has {g.max_degree} in-edges: int32 sums of {magnitude_bits + 1}-bit codes could overflow; split the node"
        )


class IntegerProduct(Tensor):
    """The float32 result ``[N, M]`` of :func:`matmul`. Operations on it give plain tensors."""

    # torch's own way to keep a subclass out of results; its stub types it as a function, not a method
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    operands: tuple[QTensor, QTensor]

    @property
    def acc(self) -> Tensor:
        """The int32 accumulators ``[N, M]`` behind it, computed when asked for."""
        return _product(*self.operands, None, "acc")


def matmul(xq: QTensor, wq: QTensor, bias: Tensor | None = None) -> IntegerProduct:
    """Integer matrix product of packed codes, scaled once at the end (A2Q eq. 2).

    Args:
        xq: ``[N, K]``, steps per row, any mix of widths, signed or not, with or without a zero point.
        wq: ``[K, M]``, steps per column, signed.
        bias: float32 ``[M]``.

    Returns:
        float32 ``[N, M]``; its ``.acc`` gives the int32 sums of products of codes.

    Raises:
        ValueError: shapes, axes or devices that do not fit, or ``K`` so large that int32 could overflow.
    """
    if not (isinstance(xq, QTensor) and isinstance(wq, QTensor)):
        raise TypeError(
            f"matmul takes two QTensors, got {type(xq).__name__} and {type(wq).__name__}; see QTensor.quantize"
        )
    if xq.shape[1] != wq.shape[0]:
        raise ValueError(
            f"x {tuple(xq.shape)} and w {tuple(wq.shape)} do not fit: x needs as many columns as w has rows"
        )
    if xq.axis != "row" or wq.axis != "col" or not wq.signed or wq.zero:
        raise ValueError('x needs axis="row"; w needs axis="col", signed=True and no zero point')
    if xq.device != wq.device:
        raise ValueError(f"x is on {xq.device} and w on {wq.device}; move one with .to()")
    if bias is not None and bias.shape != (wq.shape[1],):
        raise ValueError(f"bias must be [{wq.shape[1]}], got {tuple(bias.shape)}")
    check_product_headroom(xq.features)
    out = _product(xq, wq, bias, "float").as_subclass(IntegerProduct)
    out.operands = (xq, wq)
    return out


def _product(x: QTensor, w: QTensor, bias: Tensor | None, output: str) -> Tensor:
    columns, container = w.columns
    return matmul_packed(
        x.data, x.pos, list(x.counts), x.signed, x.zero, columns, container, x.features, w.features, output, x.step, w.step, bias, False,
        None, None, 0
    )  # fmt: skip


def check_product_headroom(features: int) -> None:
    """Raises ValueError if ``features`` products of 8-bit codes could overflow int32: ``features * 255 * 128 < 2^31``."""
    if features * 255 * 128 >= _INT32_LIMIT:
        raise ValueError(
            f"{features} products of 8-bit codes could overflow int32; split the features into blocks of at most 65,793"
        )
