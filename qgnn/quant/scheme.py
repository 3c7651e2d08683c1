"""Scheme names: "fp32", "int8", "int4-clip-momentum", "dq-int4", "a2q", "a2q-nns", "a2q-steps"."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

Method = Literal["fp32", "half", "qat", "dq", "a2q", "binary"]


@dataclass(frozen=True)
class Scheme:
    """How a model is quantized.

    Attributes:
        name: the name it was parsed from.
        method: "fp32"; "half", 16-bit floats; "qat", plain quantization-aware training; "dq", Degree-Quant; "a2q", A2Q; "binary", Bi-GCN.
        bits: width of everything (qat, dq, half, binary), or of weights and aggregation operands (a2q, whose features learn their own).
        observer: how ranges follow the data (NUMERICS 5): "minmax" running extremes, "momentum" moving average.
        percentile: fraction of the values clipped at each end of a range; 0 takes the extremes.
        sample: fraction of the values that percentiles look at.
        ste: gradient outside a range, "clip" (zero) or "pass" (unchanged; "ste" in Degree-Quant's tables).
        p_min, p_max: Degree-Quant's probabilities of protection.
        noise: probability that an element of a weight is not quantized in a training step (nQAT); 0 in the other schemes.
        groups: A2Q with the nearest neighbour strategy: number of (step, width) pairs; 0 gives every node its own (node level).
        gradient: of A2Q's feature steps and widths: "local", of the quantization error (eq. 7, 8); "global", of the loss (eq. 3, 4).
        learn_steps, learn_bits: whether A2Q's steps and widths learn; the ablations of its table 3 switch them off.
        manual: widths are not learned but assigned by in-degree (A2Q figure 5).
        learn_input: a 0/1 input gets learned steps and widths as any other map, where the paper leaves it unquantized (app. A.6) and we code it
            exactly in 1 bit. The speedups of its table 1 follow only if this map, too, is charged fewer bits than the 4 of the baseline.
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
    groups: int = 0
    gradient: Literal["local", "global"] = "local"
    learn_steps: bool = True
    learn_bits: bool = True
    manual: bool = False
    learn_input: bool = False


SCHEMES = {
    "fp32": Scheme("fp32", "fp32"),
    "fp16": Scheme("fp16", "half", 16),
    "int8": Scheme("int8", "qat", 8, percentile=0.001),
    "int4": Scheme("int4", "qat", 4, percentile=0.01),
    "nqat-int8": Scheme("nqat-int8", "qat", 8, percentile=0.001, noise=0.5),
    "nqat-int4": Scheme("nqat-int4", "qat", 4, percentile=0.01, noise=0.5),
    "dq-int8": Scheme("dq-int8", "dq", 8, percentile=0.001, p_max=0.1),
    "dq-int4": Scheme("dq-int4", "dq", 4, percentile=0.01, p_max=0.1),
    "a2q": Scheme("a2q", "a2q", 4),
    "a2q-nns": Scheme("a2q-nns", "a2q", 4, groups=1000, gradient="global"),
    "bi": Scheme("bi", "binary", 1),
}
"""Named schemes. Ranges: the 0.1 % of Degree-Quant's paper at 8 bits, the 1 % of its released code at 4; docs/accuracy.md compares the variants.
The names with int8 and int4 take suffixes for the variants of Degree-Quant's tables 1 and 9: -clip or -ste, -minmax or -momentum, -extremes or
-percentile. a2q and a2q-nns take those of A2Q's ablations: -fixed (nothing learns), -steps or -bits (only these learn), -global (gradient);
a2q -manual (widths by in-degree) and -input (learned widths of a 0/1 input), and a2q-nns -m400 for 400 groups."""

_RANGES: dict[str, dict[str, Any]] = {
    "clip": {"ste": "clip"},
    "ste": {"ste": "pass"},
    "minmax": {"observer": "minmax"},
    "momentum": {"observer": "momentum"},
    "extremes": {"percentile": 0.0},
    "percentile": {},
}
_ABLATIONS: dict[str, dict[str, Any]] = {
    "fixed": {"learn_steps": False, "learn_bits": False},
    "steps": {"learn_bits": False},
    "bits": {"learn_steps": False},
    "global": {"gradient": "global"},
}
_NODE_LEVEL: dict[str, dict[str, Any]] = {
    "manual": {"learn_bits": False, "manual": True},
    "input": {"learn_input": True},
}
_EXCLUSIVE = (
    ("clip", "ste"),
    ("minmax", "momentum"),
    ("extremes", "percentile"),
    ("fixed", "steps", "bits", "manual"),
    ("global",),
    ("input",),
    ("mGROUPS",),
)


def parse(name: str | Scheme) -> Scheme:
    """The scheme of a name.

    Raises:
        ValueError: there is no such scheme; the sentence lists what there is.
    """
    if isinstance(name, Scheme):
        return name
    if name in SCHEMES:
        return SCHEMES[name]
    base = max((s for s in SCHEMES if name.startswith(f"{s}-")), key=len, default="")
    suffixes = name[len(base) + 1 :].split("-")
    scheme = SCHEMES.get(base, SCHEMES["fp32"])
    a2q = _ABLATIONS if scheme.groups else _ABLATIONS | _NODE_LEVEL
    known = {"qat": _RANGES, "dq": _RANGES, "a2q": a2q}.get(scheme.method, {})
    changes = [_groups(s) if scheme.groups and s not in known else known.get(s) for s in suffixes]
    if not base or None in changes:
        raise ValueError(
            f"there is no scheme {name!r}; choose one of {', '.join(SCHEMES)}; those with int8 or int4 take the suffixes "
            f"{', '.join('-' + s for s in _RANGES)}, a2q and a2q-nns {', '.join('-' + s for s in _ABLATIONS)}, "
            f"a2q {', '.join('-' + s for s in _NODE_LEVEL)}, a2q-nns -mGROUPS"
        )
    kinds = ["mGROUPS" if _groups(s) else s for s in suffixes]
    for choices in _EXCLUSIVE:
        if sum(map(kinds.count, choices)) > 1:
            raise ValueError(f"scheme {name!r} says {' or '.join('-' + c for c in choices)} more than once")
    for change in changes:
        scheme = replace(scheme, **(change or {}))
    return replace(scheme, name=name)


def _groups(suffix: str) -> dict[str, int] | None:
    match = re.fullmatch(r"m([1-9]\d*)", suffix)
    return {"groups": int(match[1])} if match else None
