"""save and load: the same bits come back, and a damaged or foreign file is one clear error."""

from __future__ import annotations

import io
import json
import re
from dataclasses import fields

import pytest
import torch
import torch_geometric.nn as pyg
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch_geometric.data import Data

import qgnn
from qgnn import serialize
from qgnn.integer import LayerSpec

SCHEMES = ("int8", "dq-int4", "a2q")


def sealed(tensors, path, text):
    """Writes a model file with any content and the checksum that belongs to it."""
    try:
        described = json.loads(text)
        if isinstance(described, dict):
            described.pop("sha256", None)
            text = json.dumps({**described, "sha256": serialize._digest(described, tensors)})
    except (ValueError, RecursionError):
        pass  # no JSON: that is the test
    save_file(tensors, path, metadata={"qgnn": text})


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = pyg.GCNConv(20, 9), nn.Linear(9, 3, bias=False)

    def forward(self, x, edge_index):
        return self.head(self.conv(x, edge_index).relu()).log_softmax(-1)


def frozen_model(scheme: str = "a2q", model: nn.Module | None = None) -> tuple[nn.Module, Data]:
    torch.manual_seed(0)
    data = Data(x=torch.randn(12, 20), edge_index=torch.randint(0, 12, (2, 40)))
    model = qgnn.convert(model or pyg.GCN(20, 9, 2, 3), scheme, num_nodes=12)
    with torch.no_grad():
        model(data.x, data.edge_index)
    return qgnn.freeze(model, data), data


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved A2Q model: its path, its tensors and its header."""
    path = tmp_path_factory.mktemp("models") / "model.safetensors"
    with qgnn.use_backend("reference"):
        qgnn.save(frozen_model()[0], path)
    with safe_open(path, framework="pt") as file:
        return path, {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["qgnn"])  # noqa: SIM118


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("make", [lambda: pyg.GCN(20, 9, 2, 3), Mixed])
def test_round_trip(tmp_path, scheme, make):
    frozen, data = frozen_model(scheme, make())
    path = tmp_path / "model.safetensors"
    qgnn.save(frozen, path)
    loaded = qgnn.load(path)
    assert loaded.bound is None
    assert [layer.spec for layer in loaded.chain] == [layer.spec for layer in frozen.chain]
    assert loaded.tail == frozen.tail
    assert list(loaded.state_dict()) == list(frozen.state_dict())
    for name, value in frozen.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(loaded(data.x, data.edge_index), frozen())
    assert torch.equal(loaded.bind(data.x, data.edge_index)(), frozen())
    again = tmp_path / "again.safetensors"
    qgnn.save(loaded, str(again))
    assert again.read_bytes() == path.read_bytes()


def test_binary_input_round_trip(tmp_path):
    torch.manual_seed(1)
    data = Data(x=(torch.rand(12, 20) > 0.5).float(), edge_index=torch.randint(0, 12, (2, 40)))
    model = qgnn.convert(pyg.GCN(20, 9, 2, 3), "a2q", num_nodes=12)
    model(data.x, data.edge_index)
    frozen = qgnn.freeze(model, data)
    qgnn.save(frozen, tmp_path / "model")
    assert torch.equal(qgnn.load(tmp_path / "model")(data.x, data.edge_index), frozen())


def test_the_file_holds_little_more_than_the_packed_tensors(saved):
    path, tensors, description = saved
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    assert path.stat().st_size < size + 4096
    assert (description["format"], description["version"]) == ("qgnn-integer-model", 1)


def refused(path) -> str:
    """The one sentence with which a file is refused; it names the file."""
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        qgnn.load(path)
    assert error.value.__cause__ is None
    assert "\n" not in str(error.value).split(" needs tensors ")[0]
    return str(error.value)


@pytest.mark.parametrize("kept", [0, 3, 8, 100, -1])
def test_truncated_files(saved, tmp_path, kept):
    path = tmp_path / "short.safetensors"
    path.write_bytes(saved[0].read_bytes()[:kept])
    assert "is damaged or no qgnn model" in refused(path)


def test_other_files(saved, tmp_path):
    path = tmp_path / "other"
    for content in (b"not a model at all", b"\xff" * 64, b"PK\x03\x04" + b"\0" * 60):
        path.write_bytes(content)
        assert "is damaged or no qgnn model" in refused(path)
    save_file({"weight": torch.ones(3)}, path)
    assert "it was not written by qgnn.save" in refused(path)
    save_file({"weight": torch.ones(3)}, path, metadata={"format": "pt"})
    assert "it was not written by qgnn.save" in refused(path)
    with pytest.raises(FileNotFoundError, match=r"there is no model file .*missing"):
        qgnn.load(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=r"there is no model file"):
        qgnn.load(tmp_path)


class Opened:
    """Shows whether it was unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("a file was unpickled",))


def test_nothing_is_unpickled(tmp_path):
    path = tmp_path / "model.pt"
    for legacy in (True, False):
        torch.save(Opened(), path, _use_new_zipfile_serialization=not legacy)
        assert "is damaged or no qgnn model" in refused(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{", "is not a qgnn model that this version reads"),
        ("[" * 100_000, "is not a qgnn model that this version reads"),
        ("[]", "its header describes no frozen model"),
        ("{}", "its header describes no frozen model"),
        ('{"format": "qgnn-integer-model"}', "it has format version None, this is version 1"),
        ('{"format": "qgnn-integer-model", "version": 2}', "it has format version 2, this is version 1"),
        ('{"format": "qgnn-integer-model", "version": 1}', "is not a qgnn model that this version reads"),
        ('{"format": "qgnn-integer-model", "version": 1, "layers": 5, "tail": []}', "is not a qgnn model"),
        ('{"format": "qgnn-integer-model", "version": 1, "layers": [5], "tail": []}', "is not a qgnn model"),
        ('{"format": "qgnn-integer-model", "version": 1, "layers": [{}], "tail": []}', "layer 0 is described by"),
        ('{"format": "qgnn-integer-model", "version": 1, "layers": [], "tail": []}', "unknown tensors layers.0.bias"),
    ],
)
def test_headers_of_other_kinds(saved, tmp_path, header, message):
    path = tmp_path / "model"
    sealed(saved[1], path, header)
    assert message in refused(path)


WRONG = {
    "name": 5, "kind": "gat", "in_channels": 21, "out_channels": -9, "weight_container": 2, "operand_container": 16, "coding": "other",
    "signed": "no", "relu": 1, "normalize": None, "add_self_loops": [],
}  # fmt: skip


@pytest.mark.parametrize("name", [f.name for f in fields(LayerSpec)])
def test_tampered_descriptions(saved, tmp_path, name):
    description = json.loads(json.dumps(saved[2]))
    for value in (WRONG[name], {}, 2.5):
        description["layers"][0][name] = value
        path = tmp_path / "model"
        sealed(saved[1], path, json.dumps(description))
        assert "is not a qgnn model that this version reads: layer " in refused(path)
    del description["layers"][0][name]
    sealed(saved[1], path, json.dumps(description))
    assert "layer 0 is described by" in refused(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(tail=["exec"]), "unknown functions ['exec']"),
        (lambda d: d.update(tail=7), "is not a qgnn model"),
        (lambda d: d.update(tail=[["softmax"]]), "is not a qgnn model"),
        (lambda d: d.pop("tail"), "is not a qgnn model"),
        (lambda d: d["layers"].pop(), "unknown tensors layers.1.bias"),
        (lambda d: d["layers"].append(d["layers"][1]), "layer 2 takes 9 features, the one before gives 3"),
        (lambda d: d["layers"].reverse(), "layer convs.1 needs tensors"),
        (lambda d: d["layers"][0].update(extra=1), "layer 0 is described by"),
        (lambda d: d["layers"][0].update(coding="binary"), "needs tensors"),
        (lambda d: d["layers"][0].update(coding="tensor"), "needs tensors"),
        (lambda d: d["layers"][0].update(kind="linear"), "needs tensors"),
    ],
)
def test_tampered_layers(saved, tmp_path, change, message):
    description = json.loads(json.dumps(saved[2]))
    change(description)
    path = tmp_path / "model"
    sealed(saved[1], path, json.dumps(description))
    assert message in refused(path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("layers.0.weight", lambda t: t[:-1], "layer convs.0 needs tensors"),
        ("layers.0.weight", lambda t: t.view(1, -1), "needs tensors"),
        ("layers.0.weight", lambda t: t.to(torch.int8), "needs tensors"),
        (
            "layers.0.weight_step",
            lambda t: -t,
            "layer convs.0: weight_step has values that are not positive and finite",
        ),
        ("layers.0.weight_step", lambda t: t.double(), "needs tensors"),
        ("layers.0.operand_step", lambda t: t * 0, "operand_step has values that are not positive and finite"),
        (
            "layers.1.input_step",
            lambda t: t * float("nan"),
            "layer convs.1: input_step has values that are not positive",
        ),
        ("layers.1.input_step", lambda t: t[:-1], "needs tensors"),
        ("layers.1.input_step", lambda t: t / 0, "input_step has values that are not positive and finite"),
        ("layers.1.input_bits", lambda t: t + 9, "input_bits has widths above 8"),
        ("layers.1.operand_bits", lambda t: t + 4, "operand_bits has widths above 4"),
        ("layers.1.bias", lambda t: t.half(), "needs tensors"),
        ("layers.1.bias", lambda t: t * float("inf"), "layer convs.1: bias has values that are not finite"),
        ("layers.0.input_step", None, "needs tensors"),
        ("layers.0.weight", None, "needs tensors"),
        ("layers.2.weight", lambda t: torch.ones(3), "unknown tensors layers.2.weight"),
        ("layers.0.other", lambda t: torch.ones(3), "needs tensors"),
    ],
)
def test_tampered_tensors(saved, tmp_path, name, change, message):
    tensors = dict(saved[1])
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors.get(name)).contiguous()
    path = tmp_path / "model"
    sealed(tensors, path, json.dumps(saved[2]))
    assert message in refused(path)


def test_only_frozen_models_are_saved(tmp_path):
    with pytest.raises(
        TypeError, match=r"save takes a frozen model, got GCN; call qgnn.freeze first, or keep model.state_dict\(\)"
    ):
        qgnn.save(pyg.GCN(2, 2, 1, 2), tmp_path / "model")
    with pytest.raises(TypeError, match=r"save takes a frozen model, got dict"):
        qgnn.save({}, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch):
    frozen, _ = frozen_model()
    path = tmp_path / "model"
    qgnn.save(frozen, path)
    before = path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]

    written = []

    def interrupted(self, content):
        with self.open("wb") as file:
            written.append(file.write(content[: len(content) // 2]))
        raise KeyboardInterrupt

    monkeypatch.setattr(type(path), "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        qgnn.save(frozen, path)
    assert written
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_saved_file_has_the_rights_of_any_new_file(tmp_path):
    qgnn.save(frozen_model()[0], tmp_path / "model")
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_trainable_models_keep_their_state_dict_without_pickle_tricks():
    model = qgnn.convert(pyg.GCN(20, 9, 2, 3), "a2q", num_nodes=12)
    model(torch.randn(12, 20), torch.randint(0, 12, (2, 40)))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = qgnn.convert(pyg.GCN(20, 9, 2, 3), "a2q", num_nodes=12)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.convs[1].quantizer.kind == "unsigned"


def test_every_flipped_bit_is_seen(saved):
    """A file whose bits changed on the way is refused, wherever they are, or holds the same model (bits of padding in the header)."""
    path, tensors, _ = saved
    whole = bytearray(path.read_bytes())
    for place in range(0, len(whole), max(1, len(whole) // 150)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            state = qgnn.load(path).state_dict()
        except ValueError:
            continue
        assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())
