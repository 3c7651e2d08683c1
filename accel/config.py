"""The accelerator's configuration: every size, choice and constant with its unit and source; built-in profiles and TOML files of named tables."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

import numpy as np

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Sync = Literal["lockstep", "async", "ideal"]
Order = Literal["degree", "bits", "none"]
FirstLayer = Literal["binary", "as_learned", "4"]
Spill = Literal["excess", "whole"]

MAX_BITS = 32
"""The widest row that a layer may have: FP32 is not read bit by bit."""


class Sram(NamedTuple):
    """Energy of the on-chip memories: pJ for a bit that is read or written, and leakage of all of them in W."""

    read_pj: float
    write_pj: float
    leakage_w: float
    source: str


PROFILES = {
    "paper-table": Sram(5 / 32, 5 / 32, 0.0, "A2Q figure 21: 5 pJ for 32 bits of a 32 KB SRAM; it gives no leakage"),
    "cacti45-hp": Sram(
        0.256, 0.412, 4.4, "CACTI at 45 nm, high performance: 2 MB as 8 banks of 256 KB x 512 bits; its leakage"
    ),
    "cacti45-lop": Sram(
        0.171, 0.175, 0.24, "CACTI at 45 nm, low operating power: 2 MB as 8 banks of 256 KB x 512 bits; its leakage"
    ),
}
"""Energy of the memories by name of the profile."""

_ARRAY = "A2Q section A.7.5"
_CHOICE = "open in A2Q: a choice of this simulator"
_TABLE = "A2Q figure 21 (45 nm)"


def _about(unit: str, source: str) -> dict[str, str]:
    return {"unit": unit, "source": source}


@dataclass(frozen=True)
class Config:
    """One accelerator.

    Attributes:
        pes, macs: the array: processing elements, and MACs in each.
        input_buffer, output_buffer, edge_buffer, weight_buffer: bytes.
        clock_hz: turns cycles into seconds; hbm_gbs: bandwidth of the HBM in 1e9 bytes/s.
        sync: "lockstep", a phase lasts as long as its slowest row; "async", the PEs do not wait for each other, row r of the order runs on PE
            r mod ``pes``; "ideal", no MAC is ever idle.
        order: order of the rows in the update: by in-degree or by width (descending, ties by index), or none. The aggregation keeps the degree
            order under "bits".
        agg_serial: cycles of one beat of an aggregation: the 4 bits of B, or 1 where the array adds only.
        first_layer: width of a 0/1 input in a layer marked ``binary_input``: "binary" 1 bit, "as_learned" the width given, "4".
        real_input_bits: width charged for a real-valued input left unquantized.
        index_bits: bits of a row pointer or column id of the CSR; "log2": ceil(log2 N).
        spill: what goes to the HBM and back of a map that its buffer cannot hold: the "excess", or the "whole" map.
        overlap: loading runs beside computing.
        fill_cycles, requantize_cycles, search_cycles: cycles added to every phase: filling the pipeline, quantizing the results, and, in the
            update of a layer with the nearest neighbour strategy, the search.
        profile: energy of the SRAM, a name in :data:`PROFILES`; sram_read_pj, sram_write_pj, sram_leakage_w replace its values.
        int_mac_pj, int_add_pj, float_multiply_pj: of one operation; hbm_pj: of one bit.

    Raises:
        ValueError: a value that is not allowed; the key is named.
    """

    pes: int = field(default=256, metadata=_about("PEs", _ARRAY))
    macs: int = field(default=16, metadata=_about("MACs a PE", _ARRAY))
    input_buffer: int = field(default=2 * 2**20, metadata=_about("bytes", _ARRAY))
    output_buffer: int = field(default=2 * 2**20, metadata=_about("bytes", _ARRAY))
    edge_buffer: int = field(default=256 * 2**10, metadata=_about("bytes", _ARRAY))
    weight_buffer: int = field(default=256 * 2**10, metadata=_about("bytes", _ARRAY))
    clock_hz: float = field(default=1e9, metadata=_about("Hz", _CHOICE))
    hbm_gbs: float = field(default=256.0, metadata=_about("1e9 bytes/s", _CHOICE))
    sync: Sync = field(default="lockstep", metadata=_about("", _CHOICE))
    order: Order = field(default="degree", metadata=_about("", _ARRAY))
    agg_serial: int = field(default=4, metadata=_about("cycles a beat", _CHOICE))
    first_layer: FirstLayer = field(default="binary", metadata=_about("", _CHOICE))
    real_input_bits: int = field(default=8, metadata=_about("bits", _CHOICE))
    index_bits: int | Literal["log2"] = field(default=32, metadata=_about("bits", _CHOICE))
    spill: Spill = field(default="excess", metadata=_about("", _CHOICE))
    overlap: bool = field(default=True, metadata=_about("", _CHOICE))
    fill_cycles: int = field(default=0, metadata=_about("cycles a phase", _CHOICE))
    requantize_cycles: int = field(default=0, metadata=_about("cycles a phase", _CHOICE))
    search_cycles: int = field(default=0, metadata=_about("cycles a phase", _CHOICE))
    profile: str = field(default="paper-table", metadata=_about("", _CHOICE))
    sram_read_pj: float | None = field(default=None, metadata=_about("pJ/bit", "given, instead of the profile's"))
    sram_write_pj: float | None = field(default=None, metadata=_about("pJ/bit", "given, instead of the profile's"))
    sram_leakage_w: float | None = field(default=None, metadata=_about("W", "given, instead of the profile's"))
    int_mac_pj: float = field(
        default=0.23, metadata=_about("pJ", f"{_TABLE}: an 8-bit multiplication, 0.2, and an 8-bit addition, 0.03")
    )
    int_add_pj: float = field(default=0.03, metadata=_about("pJ", f"{_TABLE}: an 8-bit addition"))
    float_multiply_pj: float = field(default=3.7, metadata=_about("pJ", f"{_TABLE}: a 32-bit multiplication"))
    hbm_pj: float = field(default=7.0, metadata=_about("pJ/bit", "A2Q section A.7.6, of O'Connor 2014: HBM 1.0"))

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, np.generic):  # such as the items of an array that is swept
                object.__setattr__(self, entry.name, value.item())
        if str(self.first_layer) == "4":  # 4, as one writes it in TOML and Python
            object.__setattr__(self, "first_layer", "4")
        for key in ("pes", "macs", "agg_serial", "real_input_bits"):
            self._number(key, int, least=1)
        for key in ("input_buffer", "output_buffer", "edge_buffer", "weight_buffer"):
            self._number(key, int)
        for key in ("fill_cycles", "requantize_cycles", "search_cycles"):
            self._number(key, int)
        for key in ("clock_hz", "hbm_gbs"):
            self._number(key, float)
            if getattr(self, key) == 0:
                raise ValueError(f"{key} must be above 0, got 0")
        for key in ("int_mac_pj", "int_add_pj", "float_multiply_pj", "hbm_pj"):
            self._number(key, float)
        for key in ("sram_read_pj", "sram_write_pj", "sram_leakage_w"):
            if getattr(self, key) is not None:
                self._number(key, float)
        if self.real_input_bits > MAX_BITS:
            raise ValueError(f"real_input_bits must be 1 to {MAX_BITS}, got {self.real_input_bits}")
        if self.index_bits != "log2":
            self._number("index_bits", int, least=1, also=' or "log2"')
        for key, allowed in _CHOICES.items():
            if getattr(self, key) not in allowed:
                texts = ", ".join(f'"{text}"' for text in allowed)
                raise ValueError(f"{key} must be one of {texts}, got {getattr(self, key)!r}")
        if not isinstance(self.overlap, bool):
            raise ValueError(f"overlap must be true or false, got {self.overlap!r}")

    def _number(self, key: str, kind: type, least: int = 0, also: str = "") -> None:
        value = getattr(self, key)
        allowed = int if kind is int else (int, float)
        good = isinstance(value, allowed) and not isinstance(value, bool) and least <= value < math.inf
        if not good:
            name = "an integer" if kind is int else "a finite number"
            raise ValueError(f"{key} must be {name} from {least} on{also}, got {value!r}")

    @property
    def sram(self) -> Sram:
        """Energy of the SRAM: the profile's, with the values that were given."""
        base = PROFILES[self.profile]
        given = (self.sram_read_pj, self.sram_write_pj, self.sram_leakage_w)
        read, write, leakage = (b if g is None else g for b, g in zip(base[:3], given, strict=True))
        return Sram(read, write, leakage, base.source)

    def to_dict(self) -> dict[str, Any]:
        """The value of every key."""
        return asdict(self)

    def describe(self) -> list[tuple[str, Any, str, str]]:
        """Every key with its value, unit and source; those of the SRAM as they are used."""
        sram = self.sram
        used = {"sram_read_pj": sram.read_pj, "sram_write_pj": sram.write_pj, "sram_leakage_w": sram.leakage_w}
        rows = []
        for entry in fields(self):
            value, source = getattr(self, entry.name), entry.metadata["source"]
            if entry.name in used and value is None:
                value, source = used[entry.name], sram.source
            rows.append((entry.name, value, entry.metadata["unit"], source))
        return rows


_CHOICES: dict[str, tuple[str, ...]] = {
    "sync": get_args(Sync),
    "order": get_args(Order),
    "first_layer": get_args(FirstLayer),
    "spill": get_args(Spill),
    "profile": tuple(PROFILES),
}
_TYPES = get_type_hints(Config)


def load_config(name: str | None = None, /, *, file: str | Path | None = None, **overrides: Any) -> Config:
    """The configuration of a name.

    Args:
        name: a table of ``file``, or a built-in profile, :data:`PROFILES`. By default the only table of ``file``, or "paper-table" without one.
        file: a TOML file whose tables are named configurations; each holds the keys that differ from the defaults, ``profile`` too.
        overrides: keys of :class:`Config`; a text, as a command line has it, is converted to the type of its key.

    Raises:
        ValueError: an unknown name or key, a value that is not allowed, a file that is no such file.
    """
    tables = {} if file is None else _tables(Path(file))
    if name is None and file is not None and len(tables) != 1:
        raise ValueError(f"{file} has the tables {', '.join(tables)}: name one" if tables else f"{file} holds no table")
    name = next(iter(tables), "paper-table") if name is None else name
    if name in tables:
        values = dict(tables[name])
    elif name in PROFILES:
        values = {"profile": name}
    else:
        raise ValueError(f"there is no configuration {name!r}; there are {', '.join([*tables, *PROFILES])}")
    check_keys(values, f"table {name} of {file}")
    check_keys(overrides, "the configuration")
    return Config(**values | {key: _converted(key, value) for key, value in overrides.items()})


def _tables(file: Path) -> dict[str, dict[str, Any]]:
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{file} cannot be read as TOML: {error}") from error
    bare = [key for key, value in content.items() if not isinstance(value, dict)]
    if bare:
        raise ValueError(f"{file}: {bare[0]} stands outside a table; put it under a name, such as [small]")
    return content


def check_keys(values: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for a key that no configuration has."""
    unknown = [key for key in values if key not in _TYPES]
    if unknown:
        raise ValueError(f"unknown key {unknown[0]} in {where}; the keys are {', '.join(_TYPES)}")


def _converted(key: str, value: Any) -> Any:
    """A text of the command line as the type of its key; everything else as it is."""
    kind = _TYPES[key]
    if not isinstance(value, str) or key in _CHOICES or value == "log2":
        return value
    if kind is bool:
        return {"true": True, "false": False}.get(value.lower(), value)
    number = int if kind is int or key == "index_bits" else float
    try:
        return number(value)
    except ValueError:
        return value  # Config says what is allowed
