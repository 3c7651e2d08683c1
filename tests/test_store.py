"""The quantized feature store: what it keeps of its values, where they come from, its file, and PyG on top."""

import json
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import feather, parquet
from torch_geometric.data import Data, HeteroData
from torch_geometric.loader import LinkNeighborLoader, NeighborLoader, NodeLoader
from torch_geometric.loader.utils import filter_custom_hetero_store

from qgnn import QTensor, QuantizedFeatureStore, ops
from qgnn.sampler import NeighborSampler
from qgnn.store import sources

N, F = 500, 24


def matrix(rows: int = N, features: int = F, seed: int = 0) -> torch.Tensor:
    """Rows of magnitudes from 1e-3 to 1e3; one of zeros."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=draw) * 10 ** (6 * torch.rand(rows, 1, generator=draw) - 3)
    x[3] = 0
    return x


def widths() -> torch.Tensor:
    return torch.randint(2, 9, (N,), generator=torch.Generator().manual_seed(1))


def filled(x: torch.Tensor, **settings: object) -> QuantizedFeatureStore:
    store = QuantizedFeatureStore(**settings)
    store[None, "x", None] = x
    return store


@pytest.fixture
def small_blocks(monkeypatch):
    """Seven rows a block, so that every matrix here takes many."""
    monkeypatch.setattr(sources, "BLOCK", 7 * F)


# Values


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, "mixed"])
@pytest.mark.parametrize("negative", [True, False])
def test_values_are_off_by_half_a_step_at_most(bits, negative, small_blocks):
    if bits == 1 and negative:
        with pytest.raises(ValueError, match="2 to 8"):
            filled(matrix(), bits=1)
        return
    x = matrix() if negative else matrix().abs()
    b = widths() if bits == "mixed" else torch.full((N,), bits)
    store = filled(x, bits=b if bits == "mixed" else bits)
    largest = 2.0 ** (b - 1) - 1 if negative else 2.0**b - 1
    step = x.double().abs().amax(1) / largest
    # Half a step, and four roundings of numbers up to Q steps, each below 2^-24 Q <= 2^-16 of a step: the bound that the class states.
    bound = step * (0.5 + 2.0**-14)
    error = (store[None, "x", None].double() - x).abs().amax(1)
    assert bool((error <= bound).all())
    assert float((error / step.clamp_min(1e-30)).max()) > 0.4, "a bound of half a step is what this width gives"
    assert not error[3]


def test_rows_of_zero_and_one_constant_are_exact_at_one_bit():
    x = (torch.rand(N, F) < 0.3) * torch.rand(N, 1)
    assert filled(x, bits=1)[None, "x", None].equal(x)


def test_codes_are_those_of_qtensor(small_blocks):
    x = matrix()
    for bits in (8, 4, widths()):
        q = filled(x, bits=bits).get_codes(None, "x")
        expected = QTensor.quantize(x, q.step, bits.float() if isinstance(bits, torch.Tensor) else bits)
        assert q.data.equal(expected.data)
        assert q.bits.equal(expected.bits)
        assert q.counts == expected.counts


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_named_with_its_row(value, small_blocks, tmp_path):
    x = matrix()
    x[123, 5] = value
    for build in (lambda: filled(x), lambda: QuantizedFeatureStore.build({"x": x}, tmp_path / "s")):
        with pytest.raises(ValueError, match=rf"row 123 of x holds {value}"):
            build()
    assert not list(tmp_path.iterdir()), "nothing is left of a file that was not finished"


def test_a_negative_value_without_a_sign_is_named(small_blocks):
    x = matrix().abs()
    x[77, 1] = -0.5
    with pytest.raises(ValueError, match=r"row 77 of x holds -0\.5; pass signed=True"):
        filled(x, signed=False)


def test_widths_that_no_code_has_are_named():
    with pytest.raises(ValueError, match=r"x is to have 9 bits"):
        filled(matrix(), bits=9)
    wrong = widths()
    wrong[9] = 1
    with pytest.raises(ValueError, match=r"row 9 of x is to have 1 bits"):
        filled(matrix(), bits=wrong)
    with pytest.raises(ValueError, match=r"one for each of the 500 rows"):
        filled(matrix(), bits=torch.tensor([8, 4]))


@pytest.mark.parametrize(("bits", "share"), [(8, 132 / 512), (4, 68 / 512), (2, 36 / 512)])
def test_bytes_are_codes_and_a_step(bits, share):
    store = filled(torch.randn(1000, 128), bits=bits)
    assert store.nbytes == round(share * 4 * 128 * 1000) + 1  # the width, once


# Sources


@pytest.mark.parametrize("kind", ["tensor", "half", "array", "npy", "map", "columns", "lists", "fixed", "feather"])
def test_every_source_gives_the_same_store(kind, small_blocks, tmp_path):
    x = matrix()
    if kind == "half":
        x = matrix().half().float()
    array = x.numpy()
    np.save(tmp_path / "x.npy", array)
    table = pyarrow.table({f"f{k}": array[:, k] for k in range(F)})
    flat = pyarrow.array(array.reshape(-1))
    fixed = pyarrow.table({"x": pyarrow.FixedSizeListArray.from_arrays(flat, F)})
    lists = pyarrow.table({"x": pyarrow.array(list(array))})
    given = {
        "tensor": lambda: x,
        "half": lambda: x.half(),
        "array": lambda: np.asfortranarray(array),
        "npy": lambda: tmp_path / "x.npy",
        "map": lambda: np.load(tmp_path / "x.npy", mmap_mode="r"),
        "columns": lambda: written(parquet.write_table, table, tmp_path / "x.parquet", row_group_size=90),
        "lists": lambda: written(parquet.write_table, lists, tmp_path / "x.parquet", row_group_size=90),
        "fixed": lambda: written(parquet.write_table, fixed, tmp_path / "x.parquet", row_group_size=90),
        "feather": lambda: written(feather.write_feather, fixed, tmp_path / "x.arrow", chunksize=90),
    }[kind]()
    store = QuantizedFeatureStore.build({"x": given}, tmp_path / "s.qgnn", bits=widths())
    expected = filled(x, bits=widths()).get_codes(None, "x")
    found = store.get_codes(None, "x")
    assert found.data.equal(expected.data)
    assert found.step.equal(expected.step)


def written(write: object, table: pyarrow.Table, path: Path, **settings: object) -> Path:
    write(table, path, **settings)
    return path


def test_a_changed_copy_on_write_map_keeps_its_changes(tmp_path, small_blocks):
    np.save(tmp_path / "x.npy", matrix().numpy())
    x = np.load(tmp_path / "x.npy", mmap_mode="c")
    x[5] = 7
    store = filled(x)
    assert store[None, "x", 5].equal(torch.full((F,), store[None, "x", 5][0].item()))
    assert float(x[5, 0]) == 7


def test_what_cannot_be_read_is_named(tmp_path, small_blocks):
    def build(path: object) -> None:
        QuantizedFeatureStore.build({"x": path}, tmp_path / "s")

    ragged = pyarrow.array([[1.0, 2.0], [3.0, 4.0], [5.0]])
    missing = pyarrow.array([[1.0, 2.0], None])
    cases = {
        "a.parquet": (pyarrow.table({"x": ragged}), r"row 2 of .* has 1\.?0? features, others 2"),
        "b.parquet": (pyarrow.table({"x": missing}), r"row 1 of .* has nan features, others 2"),
        "c.parquet": (pyarrow.table({"x": ["text"]}), r"column 'x' of .* is string"),
        "d.parquet": (pyarrow.table({"x": [1.0, None]}), r"row 1 of .* holds nan"),
    }
    for name, (table, message) in cases.items():
        parquet.write_table(table, tmp_path / name)
        with pytest.raises(ValueError, match=message):
            build(tmp_path / name)
    for name, message in {
        "e.parquet": "damaged or no Parquet",
        "f.arrow": "damaged or no Arrow",
        "g.csv": "no file that",
    }.items():
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(ValueError, match=message):
            build(tmp_path / name)
    with pytest.raises(ValueError, match="there is no file"):
        build(tmp_path / "h.npy")
    with pytest.raises(ValueError, match="has no features"):
        filled(torch.zeros(3, 0))


# The file


def saved(tmp_path: Path, bits: object = 8) -> Path:
    path = tmp_path / "s.qgnn"
    features = {("paper", "x"): matrix(), ("paper", "y"): torch.arange(N), ("author", "x"): matrix(60, 5).abs()}
    QuantizedFeatureStore.build(features, path, bits={("paper", "x"): bits, ("author", "x"): 4})
    return path


def contents(store: QuantizedFeatureStore) -> list[torch.Tensor]:
    return [store[attr.group_name, attr.attr_name, None] for attr in store.get_all_tensor_attrs()]


@pytest.mark.parametrize("bits", [8, "mixed"])
def test_a_file_holds_what_was_built_and_saving_it_again_changes_nothing(bits, tmp_path, small_blocks):
    path = saved(tmp_path, widths() if bits == "mixed" else bits)
    store = QuantizedFeatureStore.open(path)
    expected = filled(matrix(), bits=widths() if bits == "mixed" else bits)
    assert store["paper", "x", None].equal(expected[None, "x", None])
    assert store["paper", "y", torch.tensor([3, 9])].tolist() == [3, 9]
    assert store["author", "x", None].shape == (60, 5)
    store.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    memory = QuantizedFeatureStore()
    for attr, tensor in zip(
        store.get_all_tensor_attrs(),
        (store.get_codes("paper", "x"), torch.arange(N), store.get_codes("author", "x")),
        strict=True,
    ):
        memory.put_tensor(tensor, attr.group_name, attr.attr_name, None)
    memory.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "s.qgnn"]
    assert abs(path.stat().st_size - store.nbytes) < 4096


def test_every_byte_that_is_changed_is_noticed(tmp_path):
    path = saved(tmp_path)
    whole = path.read_bytes()
    for place in [*range(0, 900, 50), len(whole) // 2, len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[place] ^= 0x11
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged|no feature store|does not hold"):
            QuantizedFeatureStore.open(path)


def test_a_wrong_checksum_names_the_tensor_and_an_unverified_file_opens(tmp_path):
    path = saved(tmp_path)
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"the checksum of \d\.\w+ in .*s\.qgnn is wrong"):
        QuantizedFeatureStore.open(path)
    QuantizedFeatureStore.open(path, verify=False)


@pytest.mark.parametrize("kept", [0, 5, 300, -1])
def test_a_file_that_is_cut_off_is_refused_without_reading_it(kept, tmp_path):
    path = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="damaged, cut off or no feature store"):
        QuantizedFeatureStore.open(path, verify=False)


def test_another_version_and_another_format_are_named(tmp_path):
    path = saved(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(rb"\"version\": 1", rb"\"version\": 7"))
    with pytest.raises(ValueError, match="has format version 7 and this is version 1; build it again"):
        QuantizedFeatureStore.open(path)
    path.write_bytes(whole.replace(b"qgnn-feature-store", b"qgnn-integer-model"))
    with pytest.raises(ValueError, match="is no feature store"):
        QuantizedFeatureStore.open(path)
    with pytest.raises(FileNotFoundError, match="there is no feature store"):
        QuantizedFeatureStore.open(tmp_path / "nothing")


def test_a_place_outside_the_rows_is_refused_even_unverified(tmp_path):
    path = saved(tmp_path, widths())
    whole = bytearray(path.read_bytes())
    length = int.from_bytes(whole[:8], "little")
    start, _ = json.loads(whole[8 : 8 + length])["0.pos"]["data_offsets"]
    whole[8 + length + start + 3] = 0x40  # above 2^30
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="x has rows outside its 500"):
        QuantizedFeatureStore.open(path, verify=False)


def test_a_file_takes_its_place_as_a_whole(tmp_path):
    path = saved(tmp_path)
    before, reader = path.read_bytes(), QuantizedFeatureStore.open(path)
    values = reader["paper", "x", None]
    bad = matrix()
    bad[400] = float("nan")
    with pytest.raises(ValueError, match="row 400"):
        QuantizedFeatureStore.build({"x": bad}, path)
    assert path.read_bytes() == before
    QuantizedFeatureStore.build({"x": matrix(seed=5)}, path)
    assert reader["paper", "x", None].equal(values), "an open store goes on with the file that it opened"


# PyG's interface


def test_reading_by_every_kind_of_index():
    store = filled(matrix())
    whole = store[None, "x", None]
    mask = torch.arange(N) % 3 == 0
    for index in (torch.tensor([4, 4, 0]), slice(3, 9), slice(None, None, 50), mask, 17, -1):
        assert store[None, "x", index].equal(whole[index])
    assert store.get_codes(None, "x", slice(3, 9)).dequantize().equal(whole[3:9])
    with pytest.raises(IndexError):
        store[None, "x", N]


def test_putting_removing_and_sizes(tmp_path):
    store = filled(matrix())
    store.put_tensor(np.arange(N), None, "y", None)
    assert [(a.group_name, a.attr_name) for a in store.get_all_tensor_attrs()] == [(None, "x"), (None, "y")]
    assert store.get_tensor_size(None, "x", None) == (N, F)
    with pytest.raises(ValueError, match="y' is kept as it is"):
        store.get_codes(None, "y")
    with pytest.raises(ValueError, match="as a whole"):
        store[None, "x", torch.tensor([1])] = torch.zeros(1, F)
    assert store.remove_tensor(None, "y", None)
    assert not store.remove_tensor(None, "y", None)
    with pytest.raises(KeyError):
        store[None, "y", None]
    with pytest.raises(KeyError):
        store.get_codes(None, "y")
    fixed = QuantizedFeatureStore.open(saved(tmp_path))
    with pytest.raises(ValueError, match="stays as it is"):
        fixed["paper", "x", None] = matrix()
    with pytest.raises(ValueError, match="stays as it is"):
        fixed.remove_tensor("paper", "x", None)


def test_pinned_memory_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="pinned memory is for a GPU"):
        QuantizedFeatureStore(pin=True)


def test_a_worker_process_gets_the_path_of_a_file(tmp_path):
    store = QuantizedFeatureStore.open(saved(tmp_path))
    text = bytes(ForkingPickler.dumps(store))  # as torch.multiprocessing does it
    assert len(text) < 500
    assert contents(ForkingPickler.loads(text))[0].equal(contents(store)[0])
    memory = filled(matrix())
    assert contents(ForkingPickler.loads(ForkingPickler.dumps(memory)))[0].equal(contents(memory)[0])


def graph() -> Data:
    draw = torch.Generator().manual_seed(3)
    return Data(edge_index=torch.randint(0, N, (2, 4000), generator=draw), num_nodes=N)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["memory", "file"])
def test_loaders_give_the_rows_of_their_nodes(kind, workers, tmp_path):
    store = filled(matrix())
    store.put_tensor(torch.arange(N), None, "y", None)
    if kind == "file":
        store.save(tmp_path / "s")
        store = QuantizedFeatureStore.open(tmp_path / "s")
    whole, data = store[None, "x", None], graph()
    sampler = NeighborSampler(data, [5, 5])
    loaders = [
        NodeLoader((store, data), sampler, torch.arange(100), batch_size=40, num_workers=workers),
        NeighborLoader(
            (store, data), [5, 5], torch.arange(100), neighbor_sampler=sampler, batch_size=40, num_workers=workers
        ),
        LinkNeighborLoader(
            (store, data), [5, 5], (None, data.edge_index[:, :80]), neighbor_sampler=sampler, batch_size=40,
            num_workers=workers,
        ),
    ]  # fmt: skip
    for loader in loaders:
        batches = list(loader)
        assert len(batches) >= 2
        for batch in batches:
            assert batch.x.equal(whole[batch.n_id])
            assert batch.y.equal(batch.n_id)


def test_loaders_of_many_kinds_of_nodes_get_each_kind(tmp_path):
    store = QuantizedFeatureStore.open(saved(tmp_path))
    edges = HeteroData()
    kind = ("author", "writes", "paper")
    edges[kind].edge_index = torch.tensor([[0, 1], [2, 3]])
    nodes = {"author": torch.tensor([7, 7, 1]), "paper": torch.tensor([2, 5])}
    row, col = {kind: torch.tensor([0, 2])}, {kind: torch.tensor([1, 0])}
    batch = filter_custom_hetero_store(store, edges, nodes, row, col, {kind: None})
    assert batch["paper"].x.equal(store["paper", "x", nodes["paper"]])
    assert batch["author"].x.equal(store["author", "x", None][nodes["author"]])
    assert batch["paper"].y.tolist() == [2, 5]


def test_codes_of_a_batch_go_into_integer_kernels_as_they_are():
    store = filled(matrix())
    index = torch.tensor([4, 4, 0, 99])
    weight = QTensor.quantize(torch.randn(7, F), 0.01, 4.0)
    whole = ops.matmul(store.get_codes(None, "x"), QTensor.quantize(weight.dequantize().t(), 0.01, 4.0, axis="col"))
    part = ops.matmul(
        store.get_codes(None, "x", index), QTensor.quantize(weight.dequantize().t(), 0.01, 4.0, axis="col")
    )
    assert part.acc.equal(whole.acc[index])


def test_building_never_holds_the_matrix(tmp_path):
    """In a process of its own, whose peak is then that of building; 600,000 rows of 128 features are 307 MB in float32."""
    rows = 600_000
    x = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (rows, 128))
    x[:1000] = 1  # a file with holes: pages of zeros are read like others
    del x
    command = [sys.executable, "-m", "qgnn.perf.store", "peak", str(tmp_path / "x.npy"), str(tmp_path / "s"), "8"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    in_file, in_memory = json.loads(finished.stdout).values()
    assert max(in_file, in_memory) < 200e6
