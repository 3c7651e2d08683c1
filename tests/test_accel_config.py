"""qgnn.accel: configurations and their files, workloads and theirs, and one clear error for everything that is wrong."""

import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qgnn import accel

INDPTR, INDICES = np.array([0, 2, 2, 3]), np.array([1, 2, 0])
LAYER: dict[str, Any] = {"f_in": 3, "f_out": 4, "bits": 4}


def workload(indptr: Any = INDPTR, indices: Any = INDICES, **layer: Any) -> accel.Workload:
    return accel.Workload(indptr, indices, [accel.Layer(**LAYER | layer)])


def mixed() -> accel.Workload:
    layers = [
        accel.Layer(5, 4, np.array([1, 0, 8]), binary_input=True, name="first"),
        accel.Layer(4, 6, None, "gat", heads=3),
        accel.Layer(6, 2, np.array([2, 3, 32], np.int8), kind="gin", nns_groups=1000),
    ]
    return accel.Workload(INDPTR.astype(np.int32), INDICES, layers, name="three nodes")


# Configurations


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        *(
            (key, value, "from 1 on")
            for key in ("pes", "macs", "agg_serial")
            for value in (0, -1, 1.5, "four", None, True)
        ),
        *((key, -1, "from 0 on") for key in ("input_buffer", "output_buffer", "edge_buffer", "weight_buffer")),
        *((key, -1, "from 0 on") for key in ("fill_cycles", "requantize_cycles", "search_cycles")),
        *((key, 0.5, "integer") for key in ("input_buffer", "fill_cycles", "real_input_bits", "index_bits")),
        *((key, value, "0") for key in ("clock_hz", "hbm_gbs") for value in (0, 0.0, "0", -1.0, float("inf"), "nan")),
        *((key, -0.1, "from 0 on") for key in ("int_mac_pj", "int_add_pj", "float_multiply_pj", "hbm_pj")),
        *((key, "-1", "from 0 on") for key in ("sram_read_pj", "sram_write_pj", "sram_leakage_w")),
        *(("real_input_bits", value, "1 to 32|from 1 on") for value in (0, 33)),
        *(("index_bits", value, "log2") for value in (0, -1, "ln", None)),
        ("sync", "lock", '"lockstep", "async", "ideal"'),
        ("order", "degrees", '"degree", "bits", "none"'),
        ("first_layer", "8", '"binary", "as_learned", "4"'),
        ("spill", "", '"excess", "whole"'),
        ("overlap", 1, "true or false"),
        ("overlap", "maybe", "true or false"),
        ("profile", "cacti", '"paper-table", "cacti45-hp", "cacti45-lop"'),
    ],
)
def test_values_that_are_not_allowed(key: str, value: Any, allowed: str) -> None:
    """The sentence names the key, what is allowed, and the value."""
    with pytest.raises(ValueError, match=rf"^{key} must be .*({allowed}).*got ") as caught:
        accel.load_config(**{key: value})
    assert "\n" not in str(caught.value)


def test_unknown_keys() -> None:
    with pytest.raises(ValueError, match=r"unknown key pe in .*pes, macs"):
        accel.load_config(pe=4)
    with pytest.raises(ValueError, match=r"no configuration 'cacti'.*paper-table, cacti45-hp, cacti45-lop"):
        accel.load_config("cacti")


def test_configurations_are_values() -> None:
    config = accel.load_config(pes=8)
    assert config == accel.Config(pes=8) and hash(config) == hash(accel.Config(pes=8))
    with pytest.raises(FrozenInstanceError):
        config.pes = 9


@pytest.mark.parametrize(
    ("name", "read", "write", "leakage"),
    [("paper-table", 5 / 32, 5 / 32, 0.0), ("cacti45-hp", 0.256, 0.412, 4.4), ("cacti45-lop", 0.171, 0.175, 0.24)],
)
def test_profiles(name: str, read: float, write: float, leakage: float) -> None:
    assert accel.load_config(name) == accel.load_config(profile=name) == accel.Config(profile=name)
    assert accel.load_config(name).sram[:3] == (read, write, leakage)
    assert accel.load_config(name, sram_write_pj="2").sram[:3] == (read, 2.0, leakage)
    assert accel.load_config(name, sram_read_pj=0, sram_leakage_w=0.0).sram[:3] == (0, write, 0)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("pes", "64", 64),
        ("clock_hz", "5e8", 5e8),
        ("overlap", "false", False),
        ("overlap", "True", True),
        ("order", "bits", "bits"),
        ("first_layer", "4", "4"),
        ("first_layer", 4, "4"),
        ("index_bits", "16", 16),
        ("index_bits", "log2", "log2"),
        ("sram_leakage_w", "0.5", 0.5),
        ("profile", "cacti45-lop", "cacti45-lop"),
    ],
)
def test_texts_of_a_command_line(key: str, text: str, value: Any) -> None:
    got = accel.load_config(**{key: text}).to_dict()[key]
    assert got == value and type(got) is type(value)


def test_scalars_of_numpy() -> None:
    """As the items of an array are, which the sizes of a layer may be, too."""
    config = accel.load_config(
        pes=np.int64(64),
        index_bits=np.uint8(16),
        hbm_gbs=np.float32(0.5),
        overlap=np.bool_(False),
        order=np.str_("bits"),
    )
    assert config == accel.Config(pes=64, index_bits=16, hbm_gbs=0.5, overlap=False, order="bits")
    assert {type(value) for value in config.to_dict().values()} == {int, float, str, bool, type(None)}
    assert accel.simulate(workload(f_in=np.int32(3), heads=np.int8(1)), config) == accel.simulate(workload(), config)
    with pytest.raises(ValueError, match="pes must be an integer from 1 on, got 0"):
        accel.load_config(pes=np.int64(0))


def test_every_key_has_a_unit_and_a_source() -> None:
    config = accel.load_config("cacti45-hp", sram_read_pj=0.5)
    rows = config.describe()
    assert [row[0] for row in rows] == list(config.to_dict()) == [entry.name for entry in fields(accel.Config)]
    units = {key: unit for key, _value, unit, _source in rows}
    texts = {"sync", "order", "first_layer", "spill", "overlap", "profile"}
    assert {key for key, unit in units.items() if not unit} == texts
    assert (units["clock_hz"], units["hbm_gbs"], units["hbm_pj"]) == ("Hz", "1e9 bytes/s", "pJ/bit")
    assert all(source for *_, source in rows)
    values = {key: value for key, value, *_ in rows}
    assert (values["sram_read_pj"], values["sram_write_pj"], values["sram_leakage_w"]) == (0.5, 0.412, 4.4)


# TOML


TOML = """
[small]
pes = 16
macs = 4
profile = "cacti45-lop"
index_bits = "log2"
overlap = false

[paper-table]
clock_hz = 500_000_000
"""


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    file = tmp_path / "accelerators.toml"
    file.write_text(TOML)
    return file


def test_named_tables_with_overrides(toml: Path) -> None:
    expected = accel.Config(pes=16, macs=4, profile="cacti45-lop", index_bits="log2", overlap=False)
    assert accel.load_config("small", file=toml) == accel.load_config("small", file=str(toml)) == expected
    changed = accel.load_config("small", file=toml, macs="5", profile="cacti45-hp", overlap="true")
    assert changed == accel.Config(pes=16, macs=5, profile="cacti45-hp", index_bits="log2")
    assert accel.load_config("paper-table", file=toml).clock_hz == 5e8  # the file's comes before the built-in one
    assert accel.load_config("cacti45-hp", file=toml) == accel.load_config("cacti45-hp")


def test_the_only_table_needs_no_name(toml: Path) -> None:
    with pytest.raises(ValueError, match=r"has the tables small, paper-table: name one"):
        accel.load_config(file=toml)
    toml.write_text("[mine]\npes = 3")
    assert accel.load_config(file=toml, macs=2) == accel.Config(pes=3, macs=2)
    toml.write_text("")
    with pytest.raises(ValueError, match=re.escape(str(toml))):
        accel.load_config(file=toml)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a]\npes = ", "cannot be read as TOML"),
        ("[a]\npes = 1\npes = 2", "cannot be read as TOML"),
        ("pes = 4\n[a]", "pes stands outside a table"),
        ("[a]\npe = 4", "unknown key pe in table a of .*pes, macs"),
        ("[a.b]\npes = 4", "unknown key b in table a"),
        ("[a]\npes = -4", "pes must be an integer from 1 on, got -4"),
        ("[a]\npes = 4.0", "pes must be an integer from 1 on, got 4.0"),
        ("[a]\nhbm_gbs = 0", "hbm_gbs must be"),
        ("[a]\nclock_hz = nan", "clock_hz must be a finite number"),
        ("[a]\norder = 3", 'order must be one of "degree", "bits", "none", got 3'),
        ("[a]\noverlap = 'true'", "overlap must be true or false"),
        ("[b]\npes = 4", "no configuration 'a'; there are b, paper-table"),
    ],
)
def test_toml_errors(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        accel.load_config("a", file=file)


def test_toml_files_that_cannot_be_read(tmp_path: Path) -> None:
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    for file in (binary, tmp_path, tmp_path / "missing.toml"):
        with pytest.raises(ValueError, match=re.escape(str(file))):
            accel.load_config("a", file=file)


# Layers and workloads


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"f_in": 0}, "f_in of a layer must be an integer from 1 on, got 0"),
        ({"f_in": -3}, "f_in .* got -3"),
        ({"f_out": 2.5}, "f_out .* got 2.5"),
        ({"f_out": None}, "f_out .* got None"),
        ({"kind": "transformer"}, "kind of a layer must be one of gcn, gin, sage, gat, linear, got 'transformer'"),
        ({"kind": "gat", "heads": 3}, "heads"),
        ({"kind": "gat", "heads": 0}, "heads of a layer must be an integer from 1 on, got 0"),
        ({"kind": "gcn", "heads": 2}, "heads belong to a layer of kind gat"),
        ({"nns_groups": -1}, "nns_groups .* from 0 on, got -1"),
        ({"binary_input": "no"}, "binary_input of a layer must be true or false, got 'no'"),
        ({"bits": -1}, "bits of layer 0 must be 0 to 32, got -1"),
        ({"bits": 33}, "0 to 32, got 33"),
        ({"bits": 2**40}, "0 to 32, got 1099511627776"),
        ({"bits": 4.0}, "bits of layer 0 must be integers, got float64"),
        ({"bits": True}, "bits of layer 0 must be integers, got bool"),
        ({"bits": "4"}, "bits of layer 0 must be integers"),
        ({"bits": np.array([4.0, 4.0, 4.0])}, "must be integers, got float64; round the learned widths"),
        ({"bits": np.array([4, -4, 4])}, "0 to 32, got -4"),
        ({"bits": np.array([4, 4, 300])}, "0 to 32, got 300"),
        ({"bits": np.array([4, 4])}, "one for each of 3 nodes, got shape .2"),
        ({"bits": np.full((3, 1), 4)}, "one for each of 3 nodes, got shape .3, 1"),
    ],
)
def test_layers_that_are_wrong(layer: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        workload(**layer)


@pytest.mark.parametrize(
    ("indptr", "indices", "message"),
    [
        ([0, 2, 1, 3], INDICES, "indptr must not fall, but does after node 1"),
        (np.array([0, 2, 1, 3], np.uint8), INDICES, "indptr must not fall"),  # unsigned: a difference would wrap round
        ([0, -1, 2, 3], INDICES, "indptr must not fall"),
        ([1, 2, 3, 3], INDICES, "indptr must go from 0 to the number of indices, 3, got 1 to 3"),
        ([0, 1, 2], INDICES, "number of indices, 3, got 0 to 2"),
        ([0], [], "at least one node"),
        ([], [], "at least one node"),
        ([0.0, 2.0, 2.0, 3.0], INDICES, "indptr must be integers"),
        ([[0, 2, 2, 3]], INDICES, "indptr must be integers of one dimension"),
        (INDPTR, [1, 3, 0], "indices must be 0 to 2, got 3"),
        (INDPTR, [1, -1, 0], "indices must be 0 to 2, got -1"),
        (INDPTR, [1.0, 2.0, 0.0], "indices must be integers"),
        (INDPTR, np.array(["1", "2", "0"]), "indices must be integers"),
    ],
)
def test_graphs_that_are_wrong(indptr: Any, indices: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        workload(indptr, indices)


def test_layers_there_must_be() -> None:
    with pytest.raises(ValueError, match="needs a layer"):
        accel.Workload(INDPTR, INDICES, [])
    with pytest.raises(ValueError, match="Layer"):
        accel.Workload(INDPTR, INDICES, [{"f_in": 3}])
    with pytest.raises(ValueError, match="got a single one; put it in brackets"):
        accel.Workload(INDPTR, INDICES, accel.Layer(**LAYER))


def test_layers_of_an_iterator() -> None:
    layers = [accel.Layer(**LAYER), accel.Layer(4, 2, [1, 2, 3])]
    once = accel.Workload(INDPTR, INDICES, iter(layers))
    assert once.fingerprint() == accel.Workload(INDPTR, INDICES, layers).fingerprint()
    assert len(once.layers) == 2


def test_workload_of_lists() -> None:
    lists = accel.Workload(INDPTR.tolist(), INDICES.tolist(), [accel.Layer(3, 4, 4)])
    assert (lists.num_nodes, lists.num_edges, lists.degrees.tolist()) == (3, 3, [2, 0, 1])
    assert lists.fingerprint() == workload().fingerprint()
    bits = lists.layers[0].bits
    assert isinstance(bits, np.ndarray) and bits.dtype == np.uint8 and bits.tolist() == [4, 4, 4]
    assert workload([0, 0, 0], []).num_edges == 0


def test_fingerprints() -> None:
    base = mixed().fingerprint()
    assert base == mixed().fingerprint() and len(set(base.values())) == 2
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in base.values())
    assert workload().fingerprint()["graph"] == base["graph"]  # int32 and int64
    assert workload([0, 1, 2, 3]).fingerprint()["graph"] != base["graph"]
    assert workload(indices=[1, 0, 0]).fingerprint()["graph"] != base["graph"]
    others: list[dict[str, Any]] = [{}, {"bits": [4, 4, 5]}, {"bits": None}, {"f_in": 4}, {"kind": "gin"}]
    others += [{"nns_groups": 1}, {"binary_input": True}, {"kind": "gat", "heads": 2}]
    digests = [workload(**layer).fingerprint()["bits"] for layer in others]
    assert len(set(digests)) == len(others)


def test_a_flag_of_numpy() -> None:
    """As ``(x == 1).all()`` gives it."""
    flagged = workload(binary_input=np.bool_(True))
    assert flagged.fingerprint() == workload(binary_input=True).fingerprint()


# Files


def test_save_and_load(tmp_path: Path) -> None:
    first = mixed()
    first.save(tmp_path / "w.npz")
    again = accel.Workload.load(str(tmp_path / "w.npz"))
    assert again.name == "three nodes" and again.fingerprint() == first.fingerprint()
    assert again.indptr.dtype == np.int32 and again.indptr.tolist() == INDPTR.tolist()
    assert again.indices.tolist() == INDICES.tolist()
    assert [layer.name for layer in again.layers] == ["first", "", ""]
    assert [layer.nns_groups for layer in again.layers] == [0, 0, 1000]
    assert again.layers[1].bits is None
    assert accel.simulate(again) == accel.simulate(first)
    with np.load(tmp_path / "w.npz", allow_pickle=False) as file:  # no object arrays
        assert all(file[key].dtype != object for key in file.files)


def test_files_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"saved as \.npz"):
        mixed().save(tmp_path / "w.pt")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "none" / "w.npz"))):
        mixed().save(tmp_path / "none" / "w.npz")


def refused(file: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(str(file))) as caught:
        accel.Workload.load(file)
    assert "\n" not in str(caught.value) and "pickle" not in str(caught.value)


def test_files_that_are_no_workload(tmp_path: Path) -> None:
    refused(tmp_path / "missing.npz")
    refused(tmp_path)
    for name, content in {"empty": b"", "text": b"indptr, indices", "zip": b"PK\x03\x04" + bytes(50)}.items():
        (tmp_path / f"{name}.npz").write_bytes(content)
        refused(tmp_path / f"{name}.npz")
    np.save(tmp_path / "array.npy", INDPTR)
    refused(tmp_path / "array.npy")
    np.savez(tmp_path / "other.npz", indptr=INDPTR, indices=INDICES)
    refused(tmp_path / "other.npz")


def test_truncated_and_flipped_files(tmp_path: Path) -> None:
    file = tmp_path / "w.npz"
    mixed().save(file)
    raw = file.read_bytes()
    file.write_bytes(raw[: len(raw) // 2])
    refused(file)
    place = raw.index(INDICES.tobytes())  # in the data of an array: its checksum tells
    file.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
    refused(file)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("header", "{"),
        ("header", "[]"),
        ("header", '{"format": 99}'),
        ("header", '{"format": 1}'),
        ("header", '{"format": 1, "name": "", "layers": [{"f_in": 3}]}'),
        ("header", "kind"),
        ("indptr", [0, None, 3, 3]),
        ("indptr", [3, 2, 2, 0]),
        ("indices", [0.0, 1.0, 2.0]),
        ("bits_0", None),
        ("bits_0", [1, 2]),
        ("bits_0", [1, 2, 99]),
    ],
)
def test_damaged_contents(tmp_path: Path, key: str, value: Any) -> None:
    file = tmp_path / "w.npz"
    mixed().save(file)
    with np.load(file) as opened:
        arrays = {name: opened[name] for name in opened.files}
    if value is None:
        del arrays[key]
    elif value == "kind":
        arrays["header"] = np.array(str(arrays["header"]).replace('"gcn"', '"transformer"'))
    else:
        arrays[key] = np.array(value)
    np.savez(file, **arrays)
    refused(file)


def test_baseline_widths() -> None:
    assert [layer.bits is None for layer in accel.baseline(mixed()).layers] == [False, True, False]
    for bits in (-1, 33, 2.5):
        with pytest.raises(ValueError, match="bits of layer 0 must be"):
            accel.baseline(mixed(), bits=bits)


# Import


def test_import_loads_neither_torch_nor_triton() -> None:
    heavy = "{'torch', 'triton', 'numba', 'torch_geometric', 'pandas', 'matplotlib'}"
    code = f"import sys, qgnn.accel as a; a.simulate; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
