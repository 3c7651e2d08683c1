"""Scheme names: "fp32", "int8", "int4-clip-momentum", "dq-int4", "a2q"."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

Method = Literal["fp32", "qat", "dq", "a2q"]


@dataclass(frozen=True)
class Scheme:
    """How a model is quantized.

    Attributes:
        name: the name it was parsed from.
        method: "fp32"; "qat", plain quantization-aware training; "dq", Degree-Quant; "a2q", A2Q with steps and widths per node.
        bits: width of everything (qat, dq), or of weights and aggregation operands (a2q, whose features learn their own).
        observer: how ranges follow the data (NUMERICS 5): "minmax" running extremes, "momentum" moving average.
        percentile: fraction of the values clipped at each end of a range; 0 takes the extremes.
        sample: fraction of the values that percentiles look at.
        ste: gradient outside a range, "clip" (zero) or "pass" (unchanged; "ste" in Degree-Quant's tables).
        p_min, p_max: Degree-Quant's probabilities of protection.
        noise: probability that an element of a weight is not quantized in a training step (nQAT); 0 in the other schemes.
    """

    name: str
    method: Method
    bits: int = 32
    observer: Literal["minmax", "momentum"] = "momentum"
    percentile: float = 0.0
    sample: float = 1.0
    ste: Literal["clip", "pass"] = "clip"
    p_min: float = 0.0
    p_max: float = 0.0
    noise: float = 0.0


SCHEMES = {
    "fp32": Scheme("fp32", "fp32"),
    "int8": Scheme("int8", "qat", 8, percentile=0.001),
    "int4": Scheme("int4", "qat", 4, percentile=0.01),
    "nqat-int8": Scheme("nqat-int8", "qat", 8, percentile=0.001, noise=0.5),
    "nqat-int4": Scheme("nqat-int4", "qat", 4, percentile=0.01, noise=0.5),
    "dq-int8": Scheme("dq-int8", "dq", 8, percentile=0.001, p_max=0.1),
    "dq-int4": Scheme("dq-int4", "dq", 4, percentile=0.01, p_max=0.1),
    "a2q": Scheme("a2q", "a2q", 4),
}
"""Named schemes. Ranges: the 0.1 % of Degree-Quant's paper at 8 bits, the 1 % of its released code at 4; docs/accuracy.md compares the variants.
int8 and int4 take suffixes for the variants of Degree-Quant's table 1: -clip or -ste, -minmax or -momentum, -extremes or -percentile."""

_SUFFIXES: dict[str, dict[str, Any]] = {
    "clip": {"ste": "clip"},
    "ste": {"ste": "pass"},
    "minmax": {"observer": "minmax"},
    "momentum": {"observer": "momentum"},
    "extremes": {"percentile": 0.0},
    "percentile": {},
}


def parse(name: str | Scheme) -> Scheme:
    """The scheme of a name.

    Raises:
        ValueError: there is no such scheme; the sentence lists what there is.
    """
    if isinstance(name, Scheme):
        return name
    if name in SCHEMES:
        return SCHEMES[name]
    base, *suffixes = name.split("-")
    scheme = SCHEMES.get(base)
    if scheme is None or scheme.method != "qat" or not all(s in _SUFFIXES for s in suffixes):
        raise ValueError(
            f"there is no scheme {name!r}; choose one of {', '.join(SCHEMES)}, or int8/int4 with suffixes {', '.join('-' + s for s in _SUFFIXES)}"
        )
    for pair in (("clip", "ste"), ("minmax", "momentum"), ("extremes", "percentile")):
        if sum(suffixes.count(suffix) for suffix in pair) > 1:
            raise ValueError(f"scheme {name!r} says -{pair[0]} or -{pair[1]} more than once")
    for suffix in suffixes:
        scheme = replace(scheme, **_SUFFIXES[suffix])
    return replace(scheme, name=name)
