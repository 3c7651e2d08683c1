"""save and load: the same bits come back, and a damaged or foreign file is one clear error."""

from __future__ import annotations

import io
import json
import re

import pytest
import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch_geometric.data import Data

import qgnn
from qgnn import serialize

SCHEMES = ("int8", "dq-int4", "a2q", "a2q-nns-m20")


def sealed(tensors, path, text):
    """Writes a model file with any content and the checksum that belongs to it."""
    try:
        described = json.loads(text)
        if isinstance(described, dict):
            described.pop("sha256", None)
            text = json.dumps({**described, "sha256": serialize._digest(described, tensors)})
    except (ValueError, RecursionError):
        pass  # no JSON: that is the test
    save_file(tensors, path, metadata={"qgnn": serialize.pack_header(text)})


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
        header = json.loads(serialize.unpack_header(file.metadata()["qgnn"]))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
        return path, tensors, header


class Float(nn.Module):
    """Float functions, parameters and methods between and after layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = pyg.GCNConv(20, 9), nn.LayerNorm(9), nn.Linear(9, 3)
        self.scale = nn.Parameter(torch.rand(9))

    def forward(self, x, edge_index):
        h = F.leaky_relu(self.norm(self.conv(x, edge_index)), 0.1)
        h = torch.cat([h[:, :4], (h * self.scale)[:, 4:].view(x.shape[0], -1)], dim=-1)
        return self.head(F.elu(h)).softmax(dim=-1)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "make",
    [
        lambda: pyg.GCN(20, 9, 2, 3), lambda: pyg.GAT(20, 8, 2, 3, heads=2), lambda: pyg.GIN(20, 9, 2, 3, norm="batch_norm"),
        lambda: pyg.GraphSAGE(20, 9, 3, 3, jk="max"), Mixed, Float,
    ],
)  # fmt: skip
def test_round_trip(tmp_path, scheme, make):
    frozen, data = frozen_model(scheme, make())
    path = tmp_path / "model.safetensors"
    qgnn.save(frozen, path)
    loaded = qgnn.load(path)
    assert loaded.bound is None
    assert loaded.inputs == frozen.inputs
    assert loaded.launches() == frozen.launches()
    assert list(loaded.state_dict()) == list(frozen.state_dict())
    for name, value in frozen.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(loaded(data.x, data.edge_index), frozen())
    assert torch.equal(loaded.bind(data.x, data.edge_index)(), frozen())
    again = tmp_path / "again.safetensors"
    qgnn.save(loaded, str(again))
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda h: torch.fft.fft(h).real, "save cannot write fft_fft, which the model calls"),
        (lambda h: h.cumsum(0), "save cannot write the method cumsum, which the model calls"),
        (lambda h: h.masked_fill(h > 1j.imag, 0).sum(0, dtype=torch.complex64).real, r"save cannot write the argument torch.complex64"),
    ],
)  # fmt: skip
def test_what_the_format_has_no_place_for(tmp_path, function, message):
    class Other(Mixed):
        def forward(self, x, edge_index):
            return self.head(function(self.conv(x, edge_index)).relu())

    model = qgnn.convert(Other(), "int8")
    data = Data(x=torch.randn(12, 20), edge_index=torch.randint(0, 12, (2, 40)))
    with torch.no_grad():
        model.head(model.conv(data.x, data.edge_index))
    frozen = qgnn.freeze(model)
    with pytest.raises(ValueError, match=message):
        qgnn.save(frozen, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [pyg.GCN, pyg.GIN, pyg.GraphSAGE, pyg.GAT])
def test_files_of_4_bits_are_a_sixth_of_fp32(tmp_path, kind):
    """At Cora's size, with 16 hidden features; the state dict of PyG's model counts 4 bytes a parameter."""
    torch.manual_seed(2)
    data = Data(x=(torch.rand(30, 1433) > 0.9).float(), edge_index=torch.randint(0, 30, (2, 90)))
    plain = kind(1433, 16, 2, 7)
    model = qgnn.convert(plain, "int4")
    with torch.no_grad():
        model(data.x, data.edge_index)
    qgnn.save(qgnn.freeze(model, data), tmp_path / "model")
    state = sum(4 * t.numel() for t in plain.state_dict().values())
    assert (tmp_path / "model").stat().st_size <= state / 6


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
    assert (description["format"], description["version"]) == ("qgnn-integer-model", 2)


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


V2 = '"format": "qgnn-integer-model", "version": 2, "kinds": {}, "floats": {}, "repeated": {}'


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{", "is not a qgnn model that this version reads"),
        ("[" * 100_000, "is not a qgnn model that this version reads"),
        ("[]", "its header describes no frozen model"),
        ("{}", "its header describes no frozen model"),
        ('{"format": "qgnn-integer-model"}', "it has format version None, this is version 2"),
        ('{"format": "qgnn-integer-model", "version": 1}', "it has format version 1, this is version 2"),
        ('{"format": "qgnn-integer-model", "version": 2}', "is not a qgnn model that this version reads"),
        (f'{{{V2}, "parts": 5, "program": []}}', "is not a qgnn model"),
        (f'{{{V2}, "parts": {{"a": 5}}, "program": []}}', "is not a qgnn model"),
        (f'{{{V2}, "parts": {{"a": {{"type": "exec", "layer": ""}}}}, "program": []}}', "part a is of an unknown type 'exec'"),
        (f'{{{V2}, "parts": {{}}, "program": []}}', "unknown tensors parts.convs_0_codec.bits"),
    ],
)  # fmt: skip
def test_headers_of_other_kinds(saved, tmp_path, header, message):
    path = tmp_path / "model"
    sealed(saved[1], path, header)
    assert message in refused(path)


def test_headers_that_are_not_packed(saved, tmp_path):
    path = tmp_path / "model"
    for text in ("not base64 \u00e9", "bm90IHppcHBlZA==", ""):
        save_file(saved[1], path, metadata={"qgnn": text})
        assert "its header describes no frozen model" in refused(path) or "this version reads" in refused(path)
    save_file(saved[1], path, metadata={"qgnn": serialize.pack_header(" " * (2**26 + 1))})
    assert "its header is longer than" in refused(path)


WRONG = {
    "type": "exec", "layer": 5, "coding": "other", "features": -9, "signed": "no", "normalize": None, "relu": 1, "following": 7,
    "codec": "convs_0_sum", "container": 2, "operand": "convs_0_codec", "norm": "max",
}  # fmt: skip


@pytest.mark.parametrize("part", ["convs_0_codec", "convs_0_product", "convs_0_operand", "convs_1_sum"])
def test_tampered_descriptions(saved, tmp_path, part):
    path = tmp_path / "model"
    for name in saved[2]["parts"][part]:
        for value in (WRONG[name], {}, 2.5):
            description = json.loads(json.dumps(saved[2]))
            description["parts"][part][name] = value
            sealed(saved[1], path, json.dumps(description))
            assert "is not a qgnn model that this version reads: " in refused(path)
        del description["parts"][part][name]
        sealed(saved[1], path, json.dumps(description))
        assert "is not a qgnn model that this version reads: " in refused(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("kinds"), "is not a qgnn model"),
        (lambda d: d.update(floats={"a": 1}), "kinds and floats are not names"),
        (lambda d: d["parts"].pop("convs_1_sum"), "unknown tensors parts.convs_1_sum.bias"),
        (lambda d: d["parts"]["convs_0_sum"].update(extra=1), "part convs_0_sum is described by"),
        (lambda d: d["parts"]["convs_0_codec"].update(coding="binary"), "needs tensors"),
        (lambda d: d["parts"]["convs_0_sum"].update(following=["convs_0_codec"]), "reads 20 others"),
        (lambda d: d["parts"]["convs_0_sum"].update(operand="convs_1_operand"), "has 9 columns, its operand 3"),
        (lambda d: d["repeated"].update({"parts.convs_0_codec.step": [12]}), "repeats parts.convs_0_codec.step"),
        (lambda d: d["repeated"].update({"parts.convs_0_codec.bits": [2**40]}), "repeats parts.convs_0_codec.bits"),
        (lambda d: d["repeated"].update({"other": [9]}), "it repeats the values of tensors that it lacks"),
        (lambda d: d["program"].clear(), "a program has one output"),
        (lambda d: d["program"].append(d["program"][0]), "two steps are called x"),
        (lambda d: d["program"].append(["a b", "placeholder", "x", [True], {"dict": {}}]), "two steps are called a b, or it is no name"),
        (lambda d: d["program"].insert(0, ["a", "call_function", "os.system", [True], {"dict": {}}]), "unknown call_function 'os.system'"),
        (lambda d: d["program"].insert(0, ["a", "call_method", "apply_", [True], {"dict": {}}]), "unknown call_method 'apply_'"),
        (lambda d: d["program"].insert(0, ["a", "call_module", "b", [True], {"dict": {}}]), "unknown call_module 'b'"),
        (lambda d: d["program"].insert(0, ["a", "get_attr", "b", [True], {"dict": {}}]), "unknown get_attr 'b'"),
        (lambda d: d["program"].insert(0, ["a", "placeholder", "import os", [True], {"dict": {}}]), "unknown placeholder 'import os'"),
        (
            lambda d: d["program"].insert(1, ["a", "call_function", "getattr", [True, {"node": "x"}, "__class__"], {"dict": {}}]),
            "reads the attribute '__class__'",
        ),
        (lambda d: d["program"].insert(0, ["a", "call_method", "view", [True, {"node": "z"}], {"dict": {}}]), "this version reads: 'z'"),
        (lambda d: d["program"].insert(0, ["a", "call_method", "view", [True, {"other": 1}], {"dict": {}}]), "an argument is {'other': 1}"),
        (lambda d: d["program"].insert(0, ["a"]), "is not a qgnn model"),
    ],
)  # fmt: skip
def test_tampered_programs(saved, tmp_path, change, message):
    description = json.loads(json.dumps(saved[2]))
    change(description)
    path = tmp_path / "model"
    sealed(saved[1], path, json.dumps(description))
    assert message in refused(path)


@pytest.mark.parametrize("place", ["keyword", "part", "step"])
def test_a_file_runs_no_code(saved, tmp_path, place):
    """torch.fx writes a program as Python, names as they are."""
    path, proof = tmp_path / "model", tmp_path / "proof"
    description = json.loads(json.dumps(saved[2]))
    code = f"input = open({str(proof)!r}, 'w') and None, b"
    program = description["program"]
    if place == "keyword":
        program.insert(1, ["a", "call_function", "torch.relu", [True], {"dict": {code: 1}}])
    elif place == "part":
        name = f'x") or open({str(proof)!r}, "w") or ("'
        description["parts"][name] = description["parts"]["convs_0_operand"]
        program.insert(1, ["a", "call_module", name, [True, {"node": "x"}], {"dict": {}}])
    else:
        program.insert(1, [code, "call_function", "torch.relu", [True, {"node": "x"}], {"dict": {}}])
    sealed(saved[1], path, json.dumps(description))
    assert refused(path)
    assert not proof.exists()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("convs_0_product.weight", lambda t: t[:-1], "part convs_0_product needs tensors"),
        ("convs_0_product.weight", lambda t: t.view(1, -1), "needs tensors"),
        ("convs_0_product.weight", lambda t: t.to(torch.int8), "needs tensors"),
        ("convs_0_product.column_scale", lambda t: t / 0, "column_scale has values that are not finite"),
        ("convs_0_product.column_scale", lambda t: t.double(), "needs tensors"),
        ("convs_0_operand.step", lambda t: t * 0, "part convs_0_operand: step has values that are not positive"),
        ("convs_1_codec.step", lambda t: t * float("nan"), "part convs_1_codec: step has values that are not finite"),
        ("convs_1_codec.step", lambda t: t[:-1], "needs tensors"),
        ("convs_1_codec.bits", lambda t: t + 9, "bits has widths above 8"),
        ("convs_1_sum.bias", lambda t: torch.zeros(3).half(), "needs tensors"),
        ("convs_1_sum.other", lambda t: torch.ones(3), "needs tensors"),
        ("convs_0_codec.step", None, "needs tensors"),
        ("convs_0_product.weight", None, "needs tensors"),
        ("other.weight", lambda t: torch.ones(3), "unknown tensors parts.other.weight"),
    ],
)
def test_tampered_tensors(saved, tmp_path, name, change, message):
    tensors, description = dict(saved[1]), json.loads(json.dumps(saved[2]))
    name = f"parts.{name}"
    description["repeated"].pop(name, None)
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors.get(name)).contiguous()
    path = tmp_path / "model"
    sealed(tensors, path, json.dumps(description))
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
