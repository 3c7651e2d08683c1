"""Sizes, splits and distributions of the data sets, where they are looked for, and what is said when they are missing."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from qgnn.data import Dataset, _rmat_edges, load
from qgnn.published import _PLANETOID_FILES


def files_of(name: str) -> list[str]:
    return [f"ind.{name.lower()}.{part}" for part in _PLANETOID_FILES]


@pytest.fixture
def own_root(citation_root: Path, tmp_path: Path) -> Path:
    """A root of its own with Cora's raw files."""
    folder = tmp_path / "root"
    (folder / "Cora" / "raw").mkdir(parents=True)
    for file in files_of("Cora"):
        shutil.copyfile(citation_root / "Cora" / "raw" / file, folder / "Cora" / "raw" / file)
    return folder


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_geometric.datasets import Planetoid

    def refuse(self: Planetoid) -> None:
        raise OSError("no network")

    monkeypatch.setattr(Planetoid, "download", refuse)


def split_sizes(dataset: Dataset) -> list[int]:
    data = dataset.data
    masks = data.train_mask, data.val_mask, data.test_mask
    assert all(mask.dtype == torch.bool and mask.shape == (data.num_nodes,) for mask in masks)
    assert int(torch.stack(masks).sum(0).max()) == 1, "the masks overlap"
    return [int(mask.sum()) for mask in masks]


def listing(folder: Path) -> list[tuple[str, int, int]]:
    return sorted((str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*"))


# Citation networks


@pytest.mark.parametrize(
    ("name", "nodes", "edges", "features", "classes"),
    [("Cora", 2708, 10556, 1433, 7), ("CiteSeer", 3327, 9104, 3703, 6)],
)
def test_citation_networks_have_the_public_split(
    citation_root: Path, name: str, nodes: int, edges: int, features: int, classes: int
) -> None:
    dataset = load(name, citation_root)
    assert (dataset.name, dataset.family, dataset.num_classes) == (name, "citation", classes)
    assert dataset.data.x.shape == (nodes, features)
    assert dataset.data.x.dtype == torch.float32
    assert dataset.data.edge_index.shape == (2, edges)
    assert dataset.data.edge_index.dtype == torch.int64
    assert split_sizes(dataset) == [20 * classes, 500, 1000]
    assert torch.bincount(dataset.data.y[dataset.data.train_mask]).tolist() == [20] * classes
    assert set(dataset.data.x.unique().tolist()) == {0.0, 1.0}, "features as published, not normalised"


@pytest.mark.parametrize("name", ["cora", "CORA", " Cora "])
def test_case_of_a_name_does_not_matter(citation_root: Path, name: str) -> None:
    assert load(name, citation_root).name == "Cora"


@pytest.mark.parametrize("mode", [0o555, 0o755], ids=["read-only", "writable"])
def test_nothing_is_written_beside_raw_files_that_are_there(own_root: Path, mode: int) -> None:
    folders = [own_root, own_root / "Cora", own_root / "Cora" / "raw"]
    for folder in folders:
        folder.chmod(mode)
    before = listing(own_root)
    try:
        assert split_sizes(load("Cora", own_root)) == [140, 500, 1000]
        assert listing(own_root) == before
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_root_is_the_argument_then_the_variable_then_data_here(
    own_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_download: None
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    monkeypatch.setenv("QGNN_DATA", str(empty))
    assert load("Cora", own_root).data.num_nodes == 2708
    with pytest.raises(ValueError, match="empty"):
        load("Cora")
    monkeypatch.setenv("QGNN_DATA", str(own_root))
    assert load("Cora").data.num_nodes == 2708
    monkeypatch.delenv("QGNN_DATA")
    with pytest.raises(ValueError, match=r"in data/Cora/raw,"):
        load("Cora")
    shutil.copytree(own_root, empty / "data", dirs_exist_ok=True)
    assert load("Cora").data.num_nodes == 2708


def test_missing_files_without_network_are_named(tmp_path: Path, no_download: None) -> None:
    with pytest.raises(ValueError, match="no network") as error:
        load("CiteSeer", tmp_path)
    assert str(tmp_path / "CiteSeer" / "raw") in str(error.value)
    assert all(file in str(error.value) for file in files_of("CiteSeer"))
    assert "\n" not in str(error.value)


def test_only_what_is_missing_is_named(own_root: Path, no_download: None) -> None:
    (own_root / "Cora/raw/ind.cora.graph").unlink()
    with pytest.raises(ValueError, match=r"wants the files ind\.cora\.graph in "):
        load("Cora", own_root)


def test_nothing_is_downloaded_into_a_read_only_root(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(ValueError, match=r"ind\.pubmed\.x.*cannot be written to.*QGNN_DATA"):
            load("PubMed", tmp_path)
        assert listing(tmp_path) == []
    finally:
        tmp_path.chmod(0o755)


def test_missing_files_are_downloaded_by_pyg(
    citation_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch_geometric.datasets import Planetoid

    def download(self: Planetoid) -> None:
        for file in self.raw_file_names:
            shutil.copyfile(citation_root / self.name / "raw" / file, Path(self.raw_dir) / file)

    monkeypatch.setattr(Planetoid, "download", download)
    assert split_sizes(load("Cora", tmp_path / "new")) == [140, 500, 1000]
    assert sorted(p.name for p in (tmp_path / "new/Cora/raw").iterdir()) == sorted(files_of("Cora"))


def test_damaged_file_is_one_clear_error(own_root: Path) -> None:
    graph = own_root / "Cora/raw/ind.cora.graph"
    graph.write_bytes(graph.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read") as error:
        load("Cora", own_root)
    assert str(graph.parent) in str(error.value)


# Digits


def test_digits_have_a_fixed_stratified_split() -> None:
    dataset = load("digits")
    data = dataset.data
    assert (dataset.name, dataset.family, dataset.num_classes) == ("digits", "digits", 10)
    assert data.x.shape == (1797, 64)
    assert data.num_edges == 19858, "ties are broken by index, whatever the machine"
    assert (float(data.x.min()), float(data.x.max())) == (0.0, 1.0)
    assert split_sizes(dataset) == [200, 500, 1097]
    assert torch.bincount(data.y[data.train_mask]).tolist() == [20] * 10
    assert torch.bincount(data.y[data.val_mask]).tolist() == [50] * 10
    again = load("Digits").data
    assert all(torch.equal(data[key], again[key]) for key in data.keys())  # noqa: SIM118 - Data iterates over items


def test_digits_graph_is_symmetric_and_holds_the_nearest_neighbours() -> None:
    data = load("digits").data
    source, target = data.edge_index
    adjacency = torch.zeros(1797, 1797, dtype=torch.int64).index_put_(
        (target, source), torch.tensor(1), accumulate=True
    )
    assert torch.equal(adjacency, adjacency.t())
    assert int(adjacency.max()) == 1, "an edge twice"
    assert int(adjacency.diagonal().sum()) == 0, "a self loop"
    # Squared distances of pixels 0..16 are integers, exact in float64. A node's neighbours are its 8 nearest and those whose 8 nearest it is among;
    # which of equals is the 8th is free.
    pixels = (data.x * 16).double()
    squares = (pixels * pixels).sum(1)
    distance = squares.unsqueeze(1) + squares - 2 * pixels @ pixels.t()
    distance.fill_diagonal_(torch.inf)
    eighth = distance.kthvalue(8, dim=1).values
    linked = adjacency.bool()
    assert bool((linked[distance < eighth.unsqueeze(1)]).all()), "one of the 7 nearest is not linked"
    assert bool((distance[linked] <= torch.maximum(eighth.unsqueeze(1), eighth).expand_as(distance)[linked]).all())
    assert int(adjacency.sum(1).min()) >= 8


# Synthetic graphs


@pytest.mark.parametrize(("nodes", "edges"), [(10, 0), (1000, 12345), (20000, 400000)])
def test_powerlaw_has_exactly_the_edges_asked_for(nodes: int, edges: int) -> None:
    dataset = load(f"powerlaw:{nodes},{edges}")
    data = dataset.data
    assert (dataset.name, dataset.family) == (f"powerlaw:{nodes},{edges}", "synthetic")
    assert data.edge_index.shape == (2, edges)
    assert data.edge_index.dtype == torch.int64
    assert data.x.shape == (nodes, 128)
    assert data.x.dtype == torch.float32
    assert edges == 0 or (int(data.edge_index.min()) >= 0 and int(data.edge_index.max()) < nodes)
    assert 0 <= int(data.y.min()) <= int(data.y.max()) < dataset.num_classes
    assert sum(split_sizes(dataset)) == nodes
    assert min(split_sizes(dataset)) > 0


@pytest.mark.parametrize("end", [0, 1])
def test_powerlaw_has_a_heavy_tail(end: int) -> None:
    nodes, edges = 20000, 400000
    degree = np.bincount(load(f"powerlaw:{nodes},{edges}").data.edge_index[end].numpy(), minlength=nodes)
    order = np.argsort(-degree)
    # Rank r <= R is drawn with chance (R / N)^(1/3), so the edges of these R nodes are binomial; 6 standard deviations. The R largest degrees
    # are theirs or larger. The first rank has four times the edges of the second: it is the largest degree.
    for top in (1, 100, 2000):
        chance = (top / nodes) ** (1 / 3)
        excess = degree[order[:top]].sum() - edges * chance
        bound = 6 * math.sqrt(edges * chance * (1 - chance))
        assert excess > -bound
        assert top > 1 or excess < bound
    # Nodes are numbered at random: the mean of 200 numbers is within 6 standard errors of the middle.
    assert abs(order[:200].mean() - nodes / 2) < 6 * nodes / math.sqrt(12 * 200)


def test_rmat_follows_its_quadrants() -> None:
    scale, edges = 8, 100_000
    source, target = _rmat_edges(np.random.default_rng(1), scale, edges)
    assert min(source.min(), target.min()) >= 0
    assert max(source.max(), target.max()) < 2**scale
    for level in range(scale):
        quadrant = 2 * (source >> level & 1) + (target >> level & 1)
        share = np.bincount(quadrant, minlength=4) / edges
        # A binomial share has a standard deviation of at most 0.5 / sqrt(edges); 6 of them.
        assert np.abs(share - [0.57, 0.19, 0.19, 0.05]).max() < 3 / math.sqrt(edges)


def test_rmat_sizes() -> None:
    dataset = load("RMAT:7, 16")
    assert dataset.name == "rmat:7,16"
    assert dataset.data.num_nodes == 128
    assert dataset.data.edge_index.shape == (2, 128 * 16)


def test_regular_graphs_have_one_in_degree() -> None:
    data = load("regular:50,7").data
    assert np.bincount(data.edge_index[1].numpy(), minlength=50).tolist() == [7] * 50
    assert len(set(data.edge_index[0].tolist())) > 25, "sources are drawn at random"
    assert data.x.shape == (50, 128)


@pytest.mark.parametrize("name", ["powerlaw:500,3000", "regular:50,7", "rmat:6,4"])
def test_synthetic_graphs_are_reproducible(name: str) -> None:
    first, second = load(name).data, load(name).data
    assert all(torch.equal(first[key], second[key]) for key in first.keys())  # noqa: SIM118 - Data iterates over items


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        (
            "Corra",
            "choose one of Cora, CiteSeer, PubMed, ogbn-arxiv.*, digits, digits-superpixels, powerlaw:N,E, regular:N,D.*TUDataset such as MUTAG",
        ),
        ("", "choose one of Cora"),
        ("powerlaw", "powerlaw:10000,150000"),
        ("powerlaw:", "powerlaw:10000,150000"),
        ("powerlaw:100", "powerlaw:10000,150000"),
        ("powerlaw:1e3,5e3", "powerlaw:10000,150000"),
        ("powerlaw:9,5", "9 is out of range"),
        ("regular:9,5", "9 is out of range"),
        ("powerlaw:3000000000,5", "fewer than 2\\^31 nodes"),
        ("powerlaw:100,99999999999999999999", "does not fit into memory"),
        ("rmat:3", "rmat:16,16"),
        ("rmat:31,16", "31 is out of range"),
        ("rmat:-4,16", "rmat:16,16"),
    ],
)
def test_names_that_make_no_sense_are_refused_with_the_cure(name: str, cure: str) -> None:
    with pytest.raises(ValueError, match=cure) as error:
        load(name)
    assert "\n" not in str(error.value)
