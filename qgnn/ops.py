"""The public operations: checked, differentiable where it makes sense, on the backend of :func:`qgnn.use_backend`."""

from __future__ import annotations

import math
import os
from typing import Literal

import torch
from torch import Tensor

from . import autograd
from .graph import Graph
from .kernels import nearest
from .kernels.aggregate import REDUCTIONS, aggregate_packed, aggregate_rows
from .kernels.aggregate import aggregate as aggregate_values
from .kernels.matmul import matmul_packed
from .kernels.msfp import BLOCK as MSFP_BLOCK
from .kernels.quantize import compute_dtype
from .kernels.random import NEAREST
from .kernels.scatter import REDUCTIONS as SEGMENT_REDUCTIONS
from .kernels.scatter import group
from .kernels.select import select_codes as copy_codes
from .kernels.select import select_rows as read_rows
from .qtensor import Axis, QTensor, check_finite, check_parameters, check_values, rounded_bits, storage_of

__all__ = [
    "aggregate",
    "edge_softmax",
    "fake_quantize",
    "fake_quantize_affine",
    "fake_quantize_nearest",
    "fixed_point",
    "gat_aggregate",
    "gather_csr",
    "matmul",
    "msfp",
    "nearest_group",
    "quantized_linear",
    "relu_dropout",
    "scatter",
    "segment_csr",
    "select_codes",
    "select_rows",
]

_INT32_LIMIT = 2**31


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_graph(g: Graph) -> None:
    if not isinstance(g, Graph):
        raise TypeError(
            f"g must be a qgnn.Graph, got {type(g).__name__}; make one with Graph.from_edge_index(edge_index, num_nodes)"
        )


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


def _rounding(seed: int | None) -> int:
    """The seed as the kernels take it."""
    if seed is not None and not 0 <= seed < 2**32:
        raise ValueError(f"a seed is None, for rounding to the nearest, or 0 to 2^32 - 1; got {seed}")
    return NEAREST if seed is None else seed


def fixed_point(
    x: Tensor,
    bits: int,
    low: Tensor | float | None = None,
    high: Tensor | float | None = None,
    *,
    signed: bool = True,
    seed: int | None = None,
) -> Tensor:
    """Quantizes and dequantizes ``x`` in fixed point (Bqain; NUMERICS 6): ``2^bits`` values, evenly spaced from ``low`` to ``high``.

    Args:
        x: ``[N, F]``, float16, bfloat16 or float32; float64 on a CPU.
        bits: 2 to 8.
        low, high: the range, numbers or float tensors of one element or ``[N]``, one a row; without them, the least and the largest value of ``x``.
        signed: codes from ``-2^(bits-1)`` on, instead of from 0: it shows in integers, and in floats by rounding only.
        seed: 0 to ``2^32 - 1`` rounds stochastically, so that the expectation of the result is ``x``; the same seed gives the same bits on every
            backend. None rounds to the nearest value, ties to the even code.

    Returns:
        The nearest values, ``[N, F]`` in the dtype of ``x``. NaN stays NaN, and makes all of them NaN where the range is its own; so does infinity.
        The gradient of x is unchanged, but zero outside a range that is given; the range gets none.

    Raises:
        TypeError, ValueError: wrong shapes, dtypes or devices, or ``low`` above ``high`` (on a GPU with ``QGNN_DEBUG=1``); with it also
            NaN or infinity.
    """
    _check_floats("x", x, "2-D [nodes, features]")
    if not 2 <= bits <= 8:
        raise ValueError(f"fixed point has 2 to 8 bits, got {bits}")
    if (low is None) != (high is None):
        raise ValueError("give low and high, or neither for the range of x")
    if _debug():
        check_finite(x)
    if low is None or high is None:
        values = x.detach().to(compute_dtype(x))
        ends = values.aminmax() if x.numel() else (values.new_zeros(()),) * 2
        first, last = (end.reshape(1) for end in ends)
    else:
        first, last = _range_end("low", low, x), _range_end("high", high, x)
        if (x.is_cpu or _debug()) and bool((first > last).any()):
            raise ValueError("low must not lie above high; swap them")
    return autograd.FixedPoint.apply(x, first, last, bits, signed, _rounding(seed), low is not None)


def _range_end(name: str, value: Tensor | float, x: Tensor) -> Tensor:
    """``[1]`` or ``[N]``, float32."""
    if not isinstance(value, Tensor):
        return torch.full((1,), float(value), dtype=torch.float32, device=x.device)
    if value.device != x.device or not value.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor on {x.device}, got {value.dtype} on {value.device}")
    if value.numel() != 1 and value.shape != (x.size(0),):
        raise ValueError(f"{name} must have one element or be [{x.size(0)}], one a row, got {tuple(value.shape)}")
    return value.detach().float().reshape(-1)


def msfp(x: Tensor, mantissa_bits: int, block: int = 16, *, seed: int | None = None) -> Tensor:
    """Rounds ``x`` to Microsoft floating point: blocks of neighbours in a row share an exponent (Rouhani et al. 2020; NUMERICS 6).

    Args:
        x: ``[N, F]``, float16, bfloat16 or float32; float64 on a CPU. The blocks lie along the features: for a product, along the contracted axis.
        mantissa_bits: ``n - 9`` for MSFP-n, 3 to 7.
        block: 16, the only length there is; the last block of a row may be shorter.
        seed: None rounds half to even; 0 to 2^32 - 1 rounds stochastically, the same in every run and on every device.

    Returns:
        ``[N, F]`` in the dtype of ``x``. A magnitude that rounds past the largest mantissa of its block gets the largest. Infinity and NaN stay, and
        the rest of their block is rounded as if they were not there. The gradient of ``x`` passes unchanged.

    Raises:
        TypeError, ValueError: wrong shapes, dtypes or numbers; with ``QGNN_DEBUG=1`` also NaN or infinity.
    """
    _check_floats("x", x, "2-D [nodes, features]")
    if not 3 <= mantissa_bits <= 7:
        raise ValueError(f"MSFP12 to MSFP16 have 3 to 7 mantissa bits, got {mantissa_bits}")
    if block != MSFP_BLOCK:
        raise ValueError(f"an MSFP block has {MSFP_BLOCK} values, got {block}; leave it out")
    if _debug():
        check_finite(x)
    return autograd.Msfp.apply(x, mantissa_bits, _rounding(seed))


def nearest_group(absmax: Tensor, q_max: Tensor) -> Tensor:
    """The group whose largest value is nearest to each node's largest magnitude (A2Q algorithm 1; NUMERICS 4), in ``O(N log m)``.

    Args:
        absmax: ``[N]``, largest magnitudes ``max_k |x_ik|``.
        q_max: ``[m]``, largest values ``step_j * Q_j`` of the groups, in any order; at least one.

    Returns:
        ``argmin_j |absmax_i - q_max_j|``, the smallest ``j`` on ties; int64 ``[N]``. Infinity belongs to the largest ``q_max``, NaN to the smallest;
        a ``q_max`` that is NaN counts as infinite.

    Raises:
        TypeError, ValueError: wrong shapes, dtypes or devices.
    """
    _check_floats("absmax", absmax, "1-D [nodes]")
    _check_floats("q_max", q_max, "1-D [groups]")
    _check_groups(absmax, "absmax", q_max=q_max)
    dtype = compute_dtype(absmax)
    return nearest.nearest_group(absmax.detach().to(dtype), *nearest.group_table(q_max.detach().to(dtype)))


def fake_quantize_nearest(
    x: Tensor,
    step: Tensor,
    bits: Tensor,
    *,
    signed: bool = True,
    ste: Literal["clip", "pass"] = "clip",
) -> tuple[Tensor, Tensor]:
    """:func:`fake_quantize` of every node with the nearest of ``m`` groups of a step and a width (A2Q algorithm 1; NUMERICS 4).

    The group of a node is that of :func:`nearest_group` for ``q_max = step * Q``, ``Q`` the largest code of the rounded width. One pass over ``x``.

    Args:
        x: ``[N, F]``, float16, bfloat16 or float32; float64 on a CPU.
        step: positive steps, ``[m]``.
        bits: real widths, ``[m]``; rounded half to even and clamped to 0..8.
        signed: False for non-negative ``x``: all ``2^b - 1`` codes are then positive.
        ste: gradient of x, "clip": zero where x was clipped (eq. 10); "pass": unchanged everywhere.

    Returns:
        ``step * code``, ``[N, F]`` in the dtype of ``x`` (NaN stays NaN), and the group of every node, int64 ``[N]``. A group's step and width
        get the gradient of the loss, summed over the nodes that used it (eq. 3, 4); two runs give the same bits.

    Raises:
        TypeError, ValueError: wrong shapes, dtypes or devices; with ``QGNN_DEBUG=1`` also NaN, infinity or a step that is not positive.
    """
    _check_choice("ste", ste, ("clip", "pass"))
    _check_floats("x", x, "2-D [nodes, features]")
    _check_floats("step", step, "1-D [groups]")
    _check_floats("bits", bits, "1-D [groups]")
    _check_groups(x, "x", step=step, bits=bits)
    if _debug():
        check_values(x, step)
    steps = step.to(compute_dtype(x))
    out, group = autograd.FakeQuantizeNearest.apply(x, steps, bits, rounded_bits(bits), signed, ste == "clip")
    return out, group


def _check_floats(name: str, value: Tensor, shape: str) -> None:
    """``shape`` starts with the number of dimensions."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {kind}")
    if value.dim() != int(shape[0]):
        raise ValueError(f"{name} must be {shape}, got shape {tuple(value.shape)}")


def _check_groups(x: Tensor, x_name: str, **vectors: Tensor) -> None:
    for name, vector in vectors.items():
        if vector.device != x.device:
            raise ValueError(f"{name} is on {vector.device} and {x_name} on {x.device}; move one")
    lengths = {vector.numel() for vector in vectors.values()}
    if len(lengths) != 1:
        shapes = " and ".join(str(list(vector.shape)) for vector in vectors.values())
        raise ValueError(f"{' and '.join(vectors)} must both be [m], got {shapes}")
    if lengths == {0}:
        raise ValueError(f"{' and '.join(vectors)} must hold at least one group")


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
    """``torch.nn.functional.dropout(relu(x), p, training)`` in one pass, keeping one bit per element for backward.

    ``torch.manual_seed`` fixes what is dropped; it is the same on every backend, and not what torch's own dropout drops.

    Args:
        x: floats.
        p: chance that an element is set to zero, below 1.
        training: without it, the plain ReLU.
    """
    if not 0 <= p < 1:
        raise ValueError(f"p must be in [0, 1), got {p}")
    return autograd.Dropout.apply(x, p, True)[0] if training else torch.relu(x)


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
    _check_graph(g)
    if isinstance(x, Tensor) and x.layout != torch.strided:
        raise TypeError(f"x must be a dense tensor, got {x.layout}")
    if not isinstance(x, Tensor | QTensor):
        raise TypeError(f"x must be a torch.Tensor or a QTensor, got {type(x).__name__}")
    shape = x.shape
    if len(shape) != 2 or shape[0] != g.num_sources:
        raise ValueError(f"x must be [{g.num_sources}, F] for {g}, got shape {tuple(shape)}")
    if x.device != g.device:
        raise ValueError(f"x is on {x.device} and the graph on {g.device}; move one with .to()")
    if edge_weight is not None:
        edge_weight = g.edge_values(edge_weight)
    if isinstance(x, QTensor):
        return _aggregate_quantized(g, x, edge_weight, reduce, shape[1])
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor or a QTensor, got {x.dtype}")
    return aggregate_csr(g, x, edge_weight, reduce)


def aggregate_csr(g: Graph, x: Tensor, weight: Tensor | None, reduce: str = "sum") -> Tensor:
    """:func:`aggregate` for layers: float ``x`` that is known to fit, and ``weight`` ``[E]`` already in CSR order."""
    if autograd.records(x) or (weight is not None and autograd.records(weight)):
        return autograd.Aggregate.apply(x, weight, g, reduce)
    return aggregate_values(g.indptr, g.indices, list(g.schedule), x, weight, reduce)[0]


def _check_heads(name: str, value: Tensor, g: Graph, shape: tuple[int, ...], letters: str) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.layout != torch.strided:
        raise TypeError(
            f"{name} must be a dense floating-point tensor, got {getattr(value, 'dtype', type(value).__name__)}"
        )
    if value.shape != shape:
        raise ValueError(f"{name} must be {letters} = {list(shape)} for {g}, got {tuple(value.shape)}")
    if value.device != g.device:
        raise ValueError(f"{name} is on {value.device} and the graph on {g.device}; move one with .to()")


def edge_softmax(g: Graph, scores: Tensor) -> Tensor:
    """Softmax of the scores of the edges that end at the same node, for each head.

    Args:
        g: the graph. A self loop that ``g.add_self_loops()`` added has score 0; one that it removed gets 0.
        scores: ``[E]`` or ``[E, H]`` in the caller's order of edges, float16, bfloat16, float32; float64 on a CPU. -inf takes an edge out.

    Returns:
        ``alpha``, shaped, ordered and typed like ``scores``; computed in float32. Two runs give the same bits.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit.
    """
    _check_graph(g)
    heads = tuple(scores.shape[1:2]) if isinstance(scores, Tensor) else ()
    ordered = g.edge_values(scores, 0.0, trailing=heads, name="scores")
    alpha = autograd.EdgeSoftmax.apply(ordered if heads else ordered.unsqueeze(1), g)
    out = alpha.new_zeros(g.given_edges + g.num_nodes, alpha.size(1)).index_copy(0, g.perm, alpha)
    return out[: g.given_edges].reshape(scores.shape)


def gat_aggregate(
    g: Graph,
    x: Tensor,
    src: Tensor,
    dst: Tensor,
    negative_slope: float = 0.2,
    *,
    edge_score: Tensor | None = None,
    dropout_scale: Tensor | None = None,
) -> Tensor:
    """Graph attention (Velickovic et al., eq. 3 and 4) and its aggregation in one operation, for every head: for each edge ``e = (j, i)``
    ``alpha[e] = softmax over the in-edges of i of leaky_relu(src[j] + dst[i] + edge_score[e])``, and
    ``out[i] = sum over the in-edges of i of alpha[e] * dropout_scale[e] * x[j]``.

    Differentiable in x, src, dst and edge_score. Neither direction makes a tensor of ``E * H * C`` elements, nor keeps one of ``E * H``.

    Args:
        g: the graph; ``N`` destinations, ``M`` sources.
        x: ``[M, H, C]``, float16, bfloat16, float32; float64 on a CPU.
        src, dst: ``[M, H]`` and ``[N, H]``, the two halves of the score; any of these dtypes, computed in float32 (float64 for float64 ``x``).
        negative_slope: of the leaky ReLU.
        edge_score: ``[E, H]`` in the caller's order of edges; self loops that ``g.add_self_loops()`` added get 0.
        dropout_scale: ``[E, H]``, likewise ordered: 0 for an edge that attention dropout drops, else ``1 / (1 - p)``; added self loops get 1. Takes
            no gradient.

    Returns:
        ``[N, H, C]`` in the dtype of ``x``; nodes without in-edges get 0. Two runs give the same bits.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit, or a ``dropout_scale`` that requires a gradient.
    """
    _check_graph(g)
    heads, channels = x.shape[1:] if isinstance(x, Tensor) and x.dim() == 3 else (0, 0)
    _check_heads("x", x, g, (g.num_sources, heads, channels), "[M, H, C]")
    _check_heads("src", src, g, (g.num_sources, heads), "[M, H]")
    _check_heads("dst", dst, g, (g.num_nodes, heads), "[N, H]")
    if edge_score is not None:
        edge_score = g.edge_values(edge_score, 0.0, trailing=(heads,), name="edge_score")
    if dropout_scale is not None:
        if dropout_scale.requires_grad:
            raise ValueError("dropout_scale takes no gradient; pass dropout_scale.detach()")
        dropout_scale = g.edge_values(dropout_scale, trailing=(heads,), name="dropout_scale")
    return gat_aggregate_csr(g, x, src, dst, edge_score, dropout_scale, negative_slope)


def gat_aggregate_csr(
    g: Graph,
    x: Tensor,
    src: Tensor,
    dst: Tensor,
    edge_score: Tensor | None,
    dropout_scale: Tensor | None,
    negative_slope: float,
) -> Tensor:
    """:func:`gat_aggregate` for layers: operands that are known to fit, edge tensors already in CSR order, of all edges of ``g``."""
    return autograd.GatAggregate.apply(x, src, dst, edge_score, dropout_scale, g, negative_slope)


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
        g.indptr, g.indices, list(g.schedule), x.data, x.container, g.num_sources, features, x.signed, "float", row_scale, None, x.step,
        None, None, False, None, None, None, None, None, [0] * 5, False,
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
        x.data, x.pos, list(x.counts), x.signed, x.zero, columns, container, x.features, w.features, output, x.step, w.step, bias, None,
        False, None, None, None, None, None, [0] * 5, False,
    )  # fmt: skip


def check_product_headroom(features: int) -> None:
    """Raises ValueError if ``features`` products of 8-bit codes could overflow int32: ``features * 255 * 128 < 2^31``."""
    if features * 255 * 128 >= _INT32_LIMIT:
        raise ValueError(
            f"{features} products of 8-bit codes could overflow int32; split the features into blocks of at most 65,793"
        )


SEGMENT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64)


def scatter(
    src: Tensor,
    index: Tensor,
    dim: int = -1,
    dim_size: int | None = None,
    reduce: Literal["sum", "add", "mean", "max", "min", "mul"] = "sum",
) -> Tensor:
    """Reduces the elements of ``src`` that have the same ``index`` along ``dim`` (torch-scatter's ``scatter``), in a fixed order.

    Args:
        src: float16, bfloat16, float32, float64 (differentiable), int32 or int64.
        index: int32 or int64: one-dimensional, along ``dim``; or with ``src``'s leading dimensions, or all of them, each of its size or 1.
            One index for whole rows is fast, rising along ``dim=0`` above all; one for every element is not.
        dim_size: size of the result along ``dim``; by default the largest index plus one, for which a GPU is synchronised.
        reduce: the result of nothing is 0, for "mul" 1. "mean" of integers rounds down. "max" and "min" are NaN where one is among them, and give
            the gradient to the first of equals; "mul" gives each factor the product of the others.

    Returns:
        As ``src``, with ``dim_size`` elements along ``dim``. Two runs give the same bits, whatever the number of threads.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit, or an index out of range; that is looked for on a CPU, and on a GPU
            with ``QGNN_DEBUG=1`` or without ``dim_size``: elsewhere it would synchronise, and such an index is undefined behaviour.
    """
    kind = _segment_arguments(src, "index", index, reduce, SEGMENT_REDUCTIONS)
    if not -src.dim() <= dim < src.dim():
        raise ValueError(f"dim must be in {-src.dim()}..{src.dim() - 1} for src {tuple(src.shape)}, got {dim}")
    dim %= src.dim()
    size = _groups(index, dim_size)
    if not src.numel():  # the sum of nothing, so that autograd knows where the result comes from
        shape = [size if d == dim else n for d, n in enumerate(src.shape)]
        return src.new_full(shape, int(kind == "mul")) + src.sum()
    before = dim + 1 if index.dim() == 1 else index.dim()
    try:
        index = index[(..., *[None] * (src.dim() - before))].expand(src.shape)
    except RuntimeError:
        raise ValueError(
            f"index {tuple(index.shape)} does not fit src {tuple(src.shape)} along dim {dim}; give one index for each of its "
            f"{src.size(dim)} places, or one for each element"
        ) from None
    # Rows are what an index is constant over: the dimensions after the one that is reduced, which moves to where that is so.
    varying = [d for d in range(src.dim()) if d != dim and src.size(d) > 1 and index.stride(d)]
    place = 0 if not varying else dim if max(varying) < dim else src.dim() - 1
    src, index = src.movedim(dim, place), index.movedim(dim, place)
    blocks, row = src.shape[:place], src.shape[place + 1 :]
    for _ in row:
        index = index.select(-1, 0)
    if place:
        index = index + size * torch.arange(math.prod(blocks), device=index.device).view(*blocks, 1)
    index = index.flatten()
    rows = src.reshape(_counted(index.numel()), -1)
    indptr, indices = group(index, math.prod(blocks) * size)
    out = _segment_reduce(rows, indptr, indices, kind, "floor")
    return out.view(*blocks, size, *row).movedim(place, dim).contiguous()


def segment_csr(src: Tensor, indptr: Tensor, reduce: Literal["sum", "add", "mean", "max", "min"] = "sum") -> Tensor:
    """Reduces consecutive elements of ``src`` (torch-scatter's ``segment_csr``), in a fixed order.

    Args:
        src: as for :func:`scatter`.
        indptr: int32 or int64 ``[..., N + 1]``: segment ``i`` is ``indptr[..., i]`` to ``indptr[..., i + 1]`` along the dimension of ``src`` that is
            ``indptr``'s last. The dimensions before it are ``src``'s or 1. Elements outside all segments are left out.
        reduce: as for :func:`scatter`, but "mean" of integers rounds towards zero, as torch-scatter does.

    Returns:
        As ``src``, with ``N`` elements along that dimension; empty segments are 0. Two runs give the same bits, whatever the number of threads.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit, or an ``indptr`` that falls or leaves ``src``; on a GPU that is looked for
            with ``QGNN_DEBUG=1`` only, since it would synchronise.
    """
    kind = _segment_arguments(src, "indptr", indptr, reduce, SEGMENT_REDUCTIONS[:-1])
    dim, segments = indptr.dim() - 1, indptr.size(-1) - 1
    blocks, edges, row = src.shape[:dim], src.size(dim), src.shape[dim + 1 :]
    pointers, gaps = _pointers(indptr, blocks, edges)
    indices = torch.arange(_counted(math.prod(blocks) * edges), dtype=torch.int32, device=src.device)
    out = _segment_reduce(src.reshape(indices.numel(), math.prod(row)), pointers, indices, kind, "trunc")
    if gaps:
        out = out.view(math.prod(blocks), segments + 2, math.prod(row))[:, 1:-1]
    return out.reshape(*blocks, segments, *row)


def gather_csr(src: Tensor, indptr: Tensor) -> Tensor:
    """Repeats element ``i`` of ``src`` for ``indptr[..., i]`` to ``indptr[..., i + 1]`` (torch-scatter's ``gather_csr``): what :func:`segment_csr`
    reduced is spread again.

    Args:
        src: as for :func:`scatter`, with ``N`` elements along the dimension that is ``indptr``'s last.
        indptr: int32 or int64 ``[..., N + 1]``. Its largest entry is the size of the result, for which a GPU is synchronised.

    Returns:
        As ``src``, with ``indptr[..., -1]`` elements along that dimension; 0 where no segment is.

    Raises:
        TypeError, ValueError: as :func:`segment_csr`.
    """
    _segment_arguments(src, "indptr", indptr, "sum", ("sum",))
    dim, segments = indptr.dim() - 1, indptr.size(-1) - 1
    blocks, row = src.shape[:dim], src.shape[dim + 1 :]
    if src.size(dim) != segments:
        raise ValueError(
            f"src {tuple(src.shape)} must have {segments} elements along dim {dim}, one for each segment of indptr"
        )
    edges = int(indptr[..., -1].max()) if indptr.numel() else 0
    pointers, gaps = _pointers(indptr, blocks, edges)
    x = src.reshape(math.prod(blocks), segments, math.prod(row))
    if gaps:
        x = torch.nn.functional.pad(x, (0, 0, 1, 1))
    indices = torch.arange(_counted(math.prod(blocks) * edges), dtype=torch.int32, device=src.device)
    return autograd.SegmentGather.apply(x.flatten(0, 1), pointers, indices).view(*blocks, edges, *row)


def select_rows(x: QTensor, index: Tensor) -> Tensor:
    """``x.dequantize()[index]`` in one pass over the wanted rows.

    Args:
        x: ``[N, F]``, symmetric and with a step per row. It lies where ``index`` does, or in pinned memory of the host while ``index`` is on a GPU.
        index: int64 ``[R]``, each in 0..N-1; repeats are allowed.

    Returns:
        float32 ``[R, F]``, on the device of ``index``.

    Raises:
        TypeError, ValueError: wrong shapes, dtypes or devices, or (on a GPU with ``QGNN_DEBUG=1``) an index that is no row.
    """
    _check_selection(x, index)
    return read_rows(x.data, x.step, x.pos, list(x.counts), index, x.features, x.signed)


def select_codes(x: QTensor, index: Tensor) -> QTensor:
    """The rows ``index`` of ``x``, still packed, each with its step and width: what integer kernels, files and messages take.

    Arguments and errors are those of :func:`select_rows`.
    """
    _check_selection(x, index)
    # An index of the device of what it picks from: pinned vectors are picked on the host.
    near = index.to(x.device)
    step, bits = x.step[near].to(index.device), x.bits[near].to(index.device)
    if x.pos is None:
        counts, pos = [index.numel() if count else 0 for count in x.counts], None
    else:
        counts, pos = storage_of(bits, "row", x.signed, index.numel())
    data = copy_codes(x.data, x.pos, list(x.counts), index, x.features, pos, counts)
    return QTensor(data, step, bits, "row", x.signed, x.features, tuple(counts), pos)


def _check_selection(x: QTensor, index: Tensor) -> None:
    if not isinstance(x, QTensor) or x.axis != "row" or x.zero:
        raise TypeError('x must be a QTensor with a step per row (axis="row") and without a zero point')
    if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.dim() != 1:
        raise TypeError("index must be an int64 tensor [R]")
    if x.device != index.device and not (x.device.type == "cpu" and x.data.is_pinned()):
        raise ValueError(f"index is on {index.device} and x on {x.device}; move one, or pin the memory of x")
    if index.numel() and _readable(index):
        low, high = torch.stack(torch.aminmax(index)).tolist()
        if low < 0 or high >= x.shape[0]:
            raise ValueError(f"index: {low if low < 0 else high} is outside 0..{x.shape[0] - 1}; mend the index")


def _segment_arguments(src: Tensor, name: str, index: Tensor, reduce: str, choices: tuple[str, ...]) -> str:
    """The reduction by its own name, after the checks that all segment operations share."""
    reduce = "sum" if reduce == "add" else reduce
    _check_choice("reduce", reduce, choices)
    if not isinstance(src, Tensor) or src.dtype not in SEGMENT_DTYPES:
        kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in SEGMENT_DTYPES)
        raise TypeError(f"src must be a tensor of {kinds}, got {getattr(src, 'dtype', type(src).__name__)}")
    if not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be an int32 or int64 tensor, got {getattr(index, 'dtype', type(index).__name__)}")
    if index.device != src.device:
        raise ValueError(f"src is on {src.device} and {name} on {index.device}; move one with .to()")
    if not 1 <= index.dim() <= src.dim():
        raise ValueError(
            f"{name} {tuple(index.shape)} must have 1 to {src.dim()} dimensions for src {tuple(src.shape)}"
        )
    return reduce


def _readable(tensor: Tensor) -> bool:
    """Whether to look at values: on a GPU that waits for all that was launched before."""
    return tensor.device.type == "cpu" or _debug()


def _counted(rows: int) -> int:
    """The rows, after the check that int32 counts them; kernels count a little beyond the last one."""
    if rows >= _INT32_LIMIT - 2**14:
        raise ValueError(f"src has {rows} rows that are grouped, and int32 has to count them; split it")
    return rows


def _groups(index: Tensor, dim_size: int | None) -> int:
    """The number of groups, after a look at the values where that is free or asked for."""
    if dim_size is not None and dim_size < 0:
        raise ValueError(f"dim_size must be positive or 0, got {dim_size}")
    if not index.numel() or not (dim_size is None or _readable(index)):
        return dim_size or 0
    low, high = torch.stack(torch.aminmax(index)).tolist()
    size = int(high) + 1 if dim_size is None else dim_size
    if low < 0 or high >= size:
        raise ValueError(
            f"index: {low if low < 0 else high} is outside 0..{size - 1}; pass a larger dim_size or mend the index"
        )
    return size


def _pointers(indptr: Tensor, blocks: tuple[int, ...], edges: int) -> tuple[Tensor, bool]:
    """The bounds of all segments in all ``blocks`` of ``edges`` rows each, from 0 to the last row, and whether there are gaps between them: then each
    block has two segments more, what lies before its first and after its last. On a GPU, where looking would synchronise, gaps are assumed."""
    if not indptr.size(-1):
        raise ValueError("indptr has no elements along its last dimension; even no segments take one, a 0")
    try:
        indptr = indptr.expand(*blocks, indptr.size(-1))
    except RuntimeError:
        raise ValueError(f"indptr {tuple(indptr.shape)} does not fit src, which starts with {tuple(blocks)}") from None
    if indptr.numel() and _readable(indptr):
        if bool((indptr < 0).any() | (indptr > edges).any()):
            raise ValueError(f"indptr leaves 0..{edges}, the elements of src along dim {len(blocks)}")
        if bool((indptr[..., 1:] < indptr[..., :-1]).any()):
            raise ValueError("indptr must not fall; sort the segments")
    if indptr.device.type == "cpu" and not blocks and int(indptr[0]) == 0 and int(indptr[-1]) == edges:
        return indptr, False
    start = edges * torch.arange(math.prod(blocks), device=indptr.device).unsqueeze(1)
    bounds = torch.cat([start, start + indptr.reshape(start.size(0), indptr.size(-1))], 1).flatten()
    return torch.cat([bounds, bounds.new_full((1,), edges * start.size(0))]), True


def _segment_reduce(x: Tensor, indptr: Tensor, indices: Tensor, reduce: str, rounding: str) -> Tensor:
    if reduce != "mean" or x.is_floating_point():
        return autograd.SegmentReduce.apply(x, indptr, indices, reduce)
    count = (indptr[1:] - indptr[:-1]).clamp_min(1).to(x.dtype).unsqueeze(1)
    return torch.div(autograd.SegmentReduce.apply(x, indptr, indices, "sum"), count, rounding_mode=rounding)
