"""Scheme names: "fp32", "int8", "int4-clip-momentum", "dq-int4", "a2q", "a2q-nns", "a2q-steps"; of quantized training "fixed-8", "msfp12",
"fixed-8/grad=6", "sdq:8,6,4,4", "adq:12,16/over=msfp"."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from .components import FLOAT, NAMES, Components
from .schedules import ADQ, SDQ, Schedule

Method = Literal["fp32", "half", "qat", "dq", "a2q", "binary", "fixed", "msfp"]
Saved = Literal["int8", "int4", "int2"]
_SAVED: dict[str, Saved] = {"int8": "int8", "int4": "int4", "int2": "int2"}


@dataclass(frozen=True)
class Scheme:
    """How a model is quantized.

    Attributes:
        name: the name it was parsed from.
        method: "fp32"; "half", 16-bit floats; "qat", plain quantization-aware training; "dq", Degree-Quant; "a2q", A2Q; "binary", Bi-GCN;
            "fixed" and "msfp", both passes of training in fixed point or Microsoft floating point (NUMERICS 6).
        bits: width of everything (qat, dq, half, binary), or of weights and aggregation operands (a2q, whose features learn their own); of the
            components without a width of their own (fixed, msfp, where it is the ``n`` of MSFP-n). A schedule starts there.
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
        components: the widths of quantized training; None in the methods that quantize the forward pass alone.
        schedule: how the width changes while training runs; None keeps ``bits``.
        rounding: of gradients in quantized training. Stochastic in fixed point: to the nearest, what is small beside the largest of a tensor is lost
            in every step, and training drifts (docs/training.md has the losses). MSFP's blocks have exponents of their own.
        saved: how a model of method "fp32" packs the activations that it keeps for backward; None keeps them as they are.
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
    components: Components | None = None
    schedule: Schedule | None = None
    rounding: Literal["nearest", "stochastic"] = "nearest"
    saved: Saved | None = None


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
    **{
        f"fixed-{k}": Scheme(f"fixed-{k}", "fixed", k, components=Components(), rounding="stochastic")
        for k in range(2, 9)
    },
    **{f"msfp{n}": Scheme(f"msfp{n}", "msfp", n, components=Components()) for n in range(12, 17)},
}
"""Named schemes. Ranges: the 0.1 % of Degree-Quant's paper at 8 bits, the 1 % of its released code at 4; docs/accuracy.md compares the variants.
The names with int8 and int4 take suffixes for the variants of Degree-Quant's tables 1 and 9: -clip or -ste, -minmax or -momentum, -extremes or
-percentile. a2q and a2q-nns take those of A2Q's ablations: -fixed (nothing learns), -steps or -bits (only these learn), -global (gradient);
a2q -manual (widths by in-degree) and -input (learned widths of a 0/1 input), and a2q-nns -m400 for 400 groups.

Those of quantized training take options after slashes: a component's width or "fp32" ("/gradients=6", "/weights=fp32"; "/grad=" is short for
gradients), and "/rounding=nearest" or "/rounding=stochastic" of the gradients. "sdq:8,6,4,4" and "adq:4,8" are schedules (:mod:`.schedules`), of
fixed point, or "/over=msfp", "/over=int" (QAT) or "/over=dq". "fp32/saved=int4" packs what backward keeps of an FP32 model."""

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
    head, *options = name.split("/")
    scheme = _scheduled(name, head, options) if head.startswith(("sdq:", "adq:")) else _plain(head)
    keys = [_key(option) for option in options]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"scheme {name!r} says /{key}= more than once")
    for option in options:
        scheme = _with_option(name, scheme, option)
    return scheme if scheme.name == name else replace(scheme, name=name)


def _plain(name: str) -> Scheme:
    """The scheme of a name without options."""
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
            f"a2q {', '.join('-' + s for s in _NODE_LEVEL)}, a2q-nns -mGROUPS; of schedules sdq:8,6,4,4 or adq:4,8; or of options "
            "after a slash fixed-8/grad=6"
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


_OVER = {"fixed": "fixed-8", "msfp": "msfp16", "int": "int8", "dq": "dq-int8"}
"""What a schedule runs over, and the scheme that it changes the width of."""


def widths_of(method: Method) -> range:
    """The widths that a component of a scheme can have."""
    return range(12, 17) if method == "msfp" else range(2, 9)


def _scheduled(name: str, head: str, options: list[str]) -> Scheme:
    """The scheme of a schedule; takes "over=" out of the options."""
    over = [option for option in options if option.startswith("over=")]
    for option in over:
        options.remove(option)
    base = _OVER.get(over[-1][len("over=") :]) if over else "fixed-8"
    if base is None or len(over) > 1:
        raise ValueError(f"scheme {name!r} runs over {', '.join(over)}; choose one of {', '.join(_OVER)}")
    scheme, kind, words = SCHEMES[base], head[:3], head[4:].split(",")
    allowed = widths_of(scheme.method)
    widths = tuple(int(word) if word.isdecimal() else 0 for word in words)
    if not all(width in allowed for width in widths):
        raise ValueError(
            f"the widths of scheme {name!r} must be {allowed[0]} to {allowed[-1]}, with commas between them"
        )
    if kind == "sdq":
        return replace(scheme, bits=widths[0], schedule=SDQ(widths))
    if len(widths) != 2 or widths[0] > widths[1]:
        raise ValueError(
            f"scheme {name!r}: adq goes up from one width to another, as in adq:{allowed[0]},{allowed[-1]}"
        )
    return replace(scheme, bits=widths[0], schedule=ADQ((widths[0], widths[1])))


def _key(option: str) -> str:
    """What an option is about."""
    key = option.partition("=")[0]
    return "gradients" if key == "grad" else key


def _with_option(name: str, scheme: Scheme, option: str) -> Scheme:
    """The scheme with one option of its name."""
    key, value = _key(option), option.partition("=")[2]
    if scheme.method == "fp32" and key == "saved" and value in _SAVED:
        return replace(scheme, saved=_SAVED[value])
    if scheme.components is not None and key == "rounding" and value in ("nearest", "stochastic"):
        return replace(scheme, rounding="stochastic" if value == "stochastic" else "nearest")
    if scheme.components is not None and key in NAMES:
        allowed = widths_of(scheme.method)
        width = FLOAT if value == "fp32" else int(value) if value.isdecimal() else 0
        if width == FLOAT or width in allowed:
            return replace(scheme, components=replace(scheme.components, **{key: width}))
    if scheme.components is not None:
        allowed = widths_of(scheme.method)
        known = f"{', '.join(f'/{n}=' for n in NAMES)} with {allowed[0]} to {allowed[-1]} or fp32, or /rounding= with nearest or stochastic"
    else:
        known = f"/saved= with {', '.join(_SAVED)}" if scheme.method == "fp32" else "none"
    raise ValueError(f"scheme {name!r} has no option /{option}; its options are {known}")
