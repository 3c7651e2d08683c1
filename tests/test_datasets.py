"""Published data sets: PyG's and OGB's classes over small files in their raw formats, written here, and TUDatasets of the real data where
they lie. Whether a root may be written to or not, the same comes out."""

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from torch import Tensor

from qgnn.data import NAMES, Dataset, GraphDataset, load
from qgnn.published import READERS, _citation, _tu

NODES = 12
SOURCE, TARGET = np.array([[0, 1, 2, 3, 4, 4, 11, 7], [1, 2, 0, 4, 3, 5, 4, 8]])
RANDOM = np.random.default_rng(0)
X = RANDOM.random((NODES, 5)).astype(np.float32)
Y = np.arange(NODES) % 4
LABELS = RANDOM.integers(0, 2, (NODES, 3))
ROLE = np.array([0] * 6 + [1] * 2 + [2] * 3 + [3])  # train, validation, test, and one node in none of them


def csv(path: Path, values: Any, header: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(values).to_csv(path, header=header, index=False, compression="gzip")


def indices(part: int) -> list[int]:
    return np.flatnonzero(part == ROLE).tolist()


# Files as they are downloaded


def reddit(root: Path) -> None:
    raw = root / "Reddit/raw"
    raw.mkdir(parents=True)
    np.savez(raw / "reddit_data.npz", feature=X, label=Y, node_types=ROLE + 1)
    edges = scipy.sparse.coo_matrix((np.ones(len(SOURCE)), (SOURCE, TARGET)), (NODES, NODES))
    scipy.sparse.save_npz(raw / "reddit_graph.npz", edges)


def saint(name: str, labels: Any) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        raw = root / name / "raw"
        raw.mkdir(parents=True)
        edges = scipy.sparse.csr_matrix((np.ones(len(SOURCE)), (SOURCE, TARGET)), (NODES, NODES))
        np.savez(raw / "adj_full.npz", data=edges.data, indices=edges.indices, indptr=edges.indptr, shape=edges.shape)
        np.save(raw / "feats.npy", X.astype(np.float64))
        (raw / "class_map.json").write_text(json.dumps({str(i): label for i, label in enumerate(labels.tolist())}))
        (raw / "role.json").write_text(json.dumps({key: indices(i) for i, key in enumerate(("tr", "va", "te"))}))

    return write


def ogb_graph(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "RELEASE_v1.txt").touch()
    csv(folder / "raw/edge.csv.gz", np.stack([SOURCE, TARGET], 1))
    csv(folder / "raw/node-feat.csv.gz", X)
    csv(folder / "raw/num-node-list.csv.gz", [NODES])
    csv(folder / "raw/num-edge-list.csv.gz", [len(SOURCE)])


def arxiv(root: Path) -> None:
    folder = root / "ogbn_arxiv"
    ogb_graph(folder)
    csv(folder / "raw/node-label.csv.gz", Y)
    csv(folder / "raw/node_year.csv.gz", 2000 + Y)
    for i, part in enumerate(("train", "valid", "test")):
        csv(folder / f"split/time/{part}.csv.gz", indices(i))


PAIRS = {"train": SOURCE, "valid": SOURCE[:2], "test": SOURCE[2:5]}


def collab(root: Path) -> None:
    folder = root / "ogbl_collab"
    ogb_graph(folder)
    csv(folder / "raw/edge_weight.csv.gz", 1 + np.arange(len(SOURCE)))
    csv(folder / "raw/edge_year.csv.gz", 2000 + SOURCE)
    (folder / "split/time").mkdir(parents=True)
    for part, ends in PAIRS.items():
        pairs = np.stack([ends, ends[::-1]], 1)
        content = {"edge": pairs, "weight": np.ones(len(ends), np.int64), "year": 2000 + ends}
        if part != "train":
            content["edge_neg"] = pairs[:, ::-1].copy()
        # As OGB's was stored: before NumPy 2, which renamed the module. In torch's older format names stand in clear.
        stored = BytesIO()
        torch.save(content, stored, _use_new_zipfile_serialization=False)
        old = stored.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
        (folder / f"split/time/{part}.pt").write_bytes(old)


def mag(root: Path) -> None:
    raw = root / "mag/raw"
    csv(
        raw / "num-node-dict.csv.gz",
        {"author": [3], "institution": [2], "field_of_study": [4], "paper": [NODES]},
        header=True,
    )
    csv(raw / "node-feat/paper/node-feat.csv.gz", X)
    csv(raw / "node-feat/paper/node_year.csv.gz", 2000 + Y)
    csv(raw / "node-label/paper/node-label.csv.gz", Y)
    for relation in (
        "author___affiliated_with___institution",
        "author___writes___paper",
        "paper___has_topic___field_of_study",
    ):
        csv(raw / f"relations/{relation}/edge.csv.gz", [[0, 1], [1, 0]])
    csv(raw / "relations/paper___cites___paper/edge.csv.gz", np.stack([SOURCE, TARGET], 1))
    for i, part in enumerate(("train", "valid", "test")):
        csv(raw / f"split/time/paper/{part}.csv.gz", indices(i))


SIZES = {"train": [4, 3, 5, 2], "val": [3, 2], "test": [2, 6, 3]}


def ring(nodes: int) -> Tensor:
    return torch.stack([torch.arange(nodes), (torch.arange(nodes) + 1) % nodes])


def superpixels(name: str, channels: int) -> Callable[[Path], None]:
    def graph(nodes: int) -> dict[str, Tensor]:
        x, pos = torch.rand(nodes, channels), torch.rand(nodes, 2)
        return {
            "x": x,
            "pos": pos,
            "edge_index": ring(nodes),
            "edge_attr": torch.ones(nodes, 1),
            "y": torch.tensor([nodes]),
        }

    def write(root: Path) -> None:
        (root / name / "raw").mkdir(parents=True)
        parts = [[graph(nodes) for nodes in sizes] for sizes in SIZES.values()]
        torch.save(parts, root / name / "raw" / f"{name}_v2.pt")

    return write


def zinc(root: Path) -> None:
    """Two more molecules than the subset takes, one before it and one after."""
    raw = root / "ZINC/raw"
    raw.mkdir(parents=True)
    for part, sizes in SIZES.items():
        molecules = []
        for nodes in [7, *sizes, 7]:
            bonds = torch.zeros(nodes, nodes, dtype=torch.int64).index_put_(tuple(ring(nodes)), torch.tensor(1))
            target = torch.tensor([nodes / 4])
            molecules.append(
                {"atom_type": 27 - torch.arange(nodes), "bond_type": bonds, "logP_SA_cycle_normalized": target}
            )
        pd.to_pickle(molecules, raw / f"{part}.pickle")
        (raw / f"{part}.index").write_text(",".join(str(1 + i) for i in range(len(sizes))) + "\n")


MOLECULES = [3 + i % 4 for i in range(20)]


def qm9(root: Path) -> None:
    """What PyG offers where RDKit is not installed."""
    (root / "QM9/raw").mkdir(parents=True)
    molecules = [{"x": torch.rand(n, 11), "edge_index": ring(n), "y": torch.full((1, 19), float(n))} for n in MOLECULES]
    torch.save(molecules, root / "QM9/raw/qm9_v3.pt")


def pcba(root: Path) -> None:
    """With the processed file, which RDKit makes of the raw one."""
    from torch_geometric.data import Data
    from torch_geometric.datasets import MoleculeNet

    (root / "pcba/raw").mkdir(parents=True)
    (root / "pcba/processed").mkdir()
    (root / "pcba/raw/pcba.csv").write_text("")
    labels = torch.tensor([0.0, 1.0, torch.nan, 1.0]).repeat(32).view(1, 128)
    molecules = [Data(x=torch.full((n, 9), 6), edge_index=ring(n), y=labels, smiles="C" * n) for n in MOLECULES]
    MoleculeNet.save(molecules, str(root / "pcba/processed/data.pt"))


def tu(name: str, sizes: list[int], edges: Any = None, **files: str) -> Callable[[Path], None]:
    """Graphs of the given sizes, by default rings, with edges in both directions."""

    def write(root: Path) -> None:
        raw = root / name / "raw"
        raw.mkdir(parents=True)
        first = np.cumsum([1, *sizes[:-1]])
        rings = [start + ring(n).numpy().T for start, n in zip(first, sizes, strict=True)]
        one_way = np.concatenate(rings) if edges is None else np.array(edges)
        lines = [f"{a}, {b}" for a, b in np.concatenate([one_way, one_way[:, ::-1]])]
        (raw / f"{name}_A.txt").write_text(column(lines))
        (raw / f"{name}_graph_indicator.txt").write_text(column(np.repeat(np.arange(len(sizes)) + 1, sizes)))
        for file, content in files.items():
            (raw / f"{name}_{file}.txt").write_text(content)

    return write


def column(values: Any) -> str:
    return "\n".join(map(str, values)) + "\n"


RINGS = [3 + i % 5 for i in range(40)]
WRITERS: dict[str, Callable[[Path], None]] = {
    "Reddit": reddit,
    "Reddit2": saint("Reddit2", Y),
    "Flickr": saint("Flickr", Y),
    "Yelp": saint("Yelp", LABELS),
    "AmazonProducts": saint("AmazonProducts", LABELS),
    "ogbn-arxiv": arxiv,
    "ogbl-collab": collab,
    "ogbn-mag": mag,
    "MNIST": superpixels("MNIST", 1),
    "CIFAR10": superpixels("CIFAR10", 3),
    "ZINC": zinc,
    "QM9": qm9,
    "PCBA": pcba,
    "COLLAB": tu("COLLAB", RINGS, graph_labels=column(5 * (n % 2) for n in RINGS)),
}


@pytest.fixture(autouse=True)
def without_rdkit(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the same files are asked for, whether it is installed or not."""
    monkeypatch.setitem(sys.modules, "rdkit", None)


def listing(folder: Path) -> list[tuple[str, int, int]]:
    return sorted((str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*"))


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "root"
    folder.mkdir()
    yield folder
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)


def protect(root: Path) -> None:
    for path in (root, *root.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)


def one_graph(name: str, root: Path) -> Dataset:
    WRITERS[name](root)
    dataset = load(name, root)
    assert isinstance(dataset, Dataset)
    assert dataset.name == name
    assert dataset.data.x.dtype == torch.float32
    np.testing.assert_allclose(dataset.data.x, X, rtol=1e-6)  # through text in OGB's formats
    return dataset


def many_graphs(name: str, root: Path) -> GraphDataset:
    WRITERS[name](root)
    dataset = load(name, root)
    assert isinstance(dataset, GraphDataset)
    assert dataset.name == name
    for graph in dataset.graphs:
        assert graph.x.dtype == torch.float32
        assert graph.x.size(1) == dataset.num_features
        assert graph.y.size(0) == 1
    return dataset


def directed(edge_index: Tensor) -> set[tuple[int, int]]:
    return {(int(a), int(b)) for a, b in edge_index.t()}


FORWARD = set(zip(SOURCE.tolist(), TARGET.tolist(), strict=True))
BOTH = FORWARD | {(b, a) for a, b in FORWARD}


def masks(dataset: Dataset) -> list[list[int]]:
    return [dataset.data[f"{part}_mask"].nonzero().view(-1).tolist() for part in ("train", "val", "test")]


# One graph


@pytest.mark.parametrize("name", ["Reddit", "Reddit2", "Flickr", "ogbn-mag", "ogbn-arxiv"])
def test_node_classification(name: str, root: Path) -> None:
    dataset = one_graph(name, root)
    assert (dataset.family, dataset.task) == ("ogb" if name.startswith("ogb") else "inductive", "node")
    assert dataset.num_classes == 4
    assert dataset.data.y.dtype == torch.int64
    assert dataset.data.y.tolist() == Y.tolist()
    assert masks(dataset) == [indices(0), indices(1), indices(2)]
    expected = BOTH if name.startswith("ogb") else FORWARD
    assert directed(dataset.data.edge_index) == expected
    assert dataset.data.edge_index.size(1) == len(expected), "an edge twice"


@pytest.mark.parametrize("name", ["Yelp", "AmazonProducts"])
def test_many_labels_a_node(name: str, root: Path) -> None:
    dataset = one_graph(name, root)
    assert (dataset.family, dataset.task, dataset.num_classes) == ("inductive", "node-multilabel", 3)
    assert dataset.data.y.dtype == torch.float32, "as binary cross-entropy takes it"
    assert dataset.data.y.tolist() == LABELS.tolist()
    assert masks(dataset) == [indices(0), indices(1), indices(2)]
    assert directed(dataset.data.edge_index) == FORWARD


def test_link_prediction(root: Path) -> None:
    dataset = one_graph("ogbl-collab", root)
    assert (dataset.family, dataset.task, dataset.num_classes) == ("ogb", "link", 1)
    assert directed(dataset.data.edge_index) == BOTH
    weight = {
        (int(a), int(b)): w
        for (a, b), w in zip(dataset.data.edge_index.t(), dataset.data.edge_weight.tolist(), strict=True)
    }
    assert weight[int(SOURCE[5]), int(TARGET[5])] == weight[int(TARGET[5]), int(SOURCE[5])] == 6.0
    split = dataset.data.split_edges
    assert {part: set(pairs) for part, pairs in split.items()} == {
        "train": {"edge"},
        "valid": {"edge", "edge_neg"},
        "test": {"edge", "edge_neg"},
    }
    for part, ends in PAIRS.items():
        assert split[part]["edge"].dtype == torch.int64
        assert split[part]["edge"].tolist() == np.stack([ends, ends[::-1]], 1).tolist()
    assert split["test"]["edge_neg"].tolist() == split["test"]["edge"].flip(1).tolist()


def test_ogb_is_named_with_its_extra_when_it_is_not_installed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ogb", None)
    with pytest.raises(ValueError, match=r"ogbn-arxiv is read with ogb, .*pip install 'qgnn\[datasets\]'"):
        load("ogbn-arxiv", root)


def test_ogb_is_not_left_to_ask_on_the_terminal(root: Path) -> None:
    arxiv(root)
    (root / "ogbn_arxiv/RELEASE_v1.txt").unlink()
    with pytest.raises(
        ValueError, match=r"wants the files RELEASE_v1\.txt in .*ogbn_arxiv, from http.*delete that folder first"
    ):
        load("ogbn-arxiv", root)


def test_an_interrupted_download_of_ogb_leaves_nothing_behind(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ogb.nodeproppred import PygNodePropPredDataset

    def interrupted(self: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PygNodePropPredDataset, "download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load("ogbn-arxiv", root)
    assert listing(root) == []


def test_what_ogb_prints_stays_out_of_the_output(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_graph("ogbn-arxiv", root)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Processing graphs" in captured.err


# Many graphs


@pytest.mark.parametrize(("name", "features"), [("MNIST", 3), ("CIFAR10", 5)])
def test_superpixels(name: str, features: int, root: Path) -> None:
    dataset = many_graphs(name, root)
    assert (dataset.family, dataset.task, dataset.num_classes) == ("superpixels", "graph", 10)
    assert dataset.num_features == features, "intensity or colour, and position"
    raw = torch.load(root / name / "raw" / f"{name}_v2.pt")
    for graph, written in zip(dataset.graphs, chain(*raw), strict=True):
        assert torch.equal(graph.x, torch.cat([written["x"], written["pos"]], 1))
        assert torch.equal(graph.edge_index, written["edge_index"])
        assert torch.equal(graph.y, written["y"])
    (split,) = dataset.splits
    assert [split.train.tolist(), split.val.tolist(), split.test.tolist()] == [[0, 1, 2, 3], [4, 5], [6, 7, 8]]


def test_zinc_is_the_subset_with_the_numbers_of_its_atoms(root: Path) -> None:
    dataset = many_graphs("ZINC", root)
    assert (dataset.family, dataset.task) == ("molecules", "graph-regression")
    assert (dataset.num_features, dataset.num_classes) == (1, 1)
    for graph, nodes in zip(dataset.graphs, chain(*SIZES.values()), strict=True):
        assert graph.x.tolist() == [[float(kind)] for kind in range(27, 27 - nodes, -1)]
        assert directed(graph.edge_index) == directed(ring(nodes))
        assert graph.y.tolist() == [nodes / 4]
    (split,) = dataset.splits
    assert [split.train.tolist(), split.val.tolist(), split.test.tolist()] == [[0, 1, 2, 3], [4, 5], [6, 7, 8]]


@pytest.mark.parametrize(
    ("name", "features", "outputs", "task"), [("QM9", 11, 19, "graph-regression"), ("PCBA", 9, 128, "graph-multilabel")]
)
def test_molecules_with_a_random_split(name: str, features: int, outputs: int, task: str, root: Path) -> None:
    dataset = many_graphs(name, root)
    assert (dataset.family, dataset.task) == ("molecules", task)
    assert (dataset.num_features, dataset.num_classes) == (features, outputs)
    assert [graph.num_nodes for graph in dataset.graphs] == MOLECULES
    (split,) = dataset.splits
    assert [len(split.train), len(split.val), len(split.test)] == [16, 2, 2]
    assert sorted(torch.cat([split.train, split.val, split.test]).tolist()) == list(range(20))
    (again,) = load(name, root).splits
    assert torch.equal(split.train, again.train)
    for graph, nodes in zip(dataset.graphs, MOLECULES, strict=True):
        assert graph.y.shape == (1, outputs)
        if name == "QM9":
            assert bool((graph.y == nodes).all())
        else:
            assert graph.y[0, :2].tolist() == [0.0, 1.0]
            assert graph.y.isnan().nonzero()[:, 1].tolist() == list(range(2, 128, 4)), "an assay that was not made"


def test_pcba_names_rdkit_when_molecules_have_to_be_parsed(root: Path) -> None:
    pcba(root)
    shutil.rmtree(root / "pcba/processed")
    with pytest.raises(ValueError, match="PCBA is read with rdkit, which is not installed: pip install rdkit"):
        load("PCBA", root)


# TUDatasets


def test_tudataset_without_labels_has_one_hot_degrees(root: Path) -> None:
    sizes = [3, 6] * 10
    tu("DD", sizes, graph_labels=column([1, -1] * 10))(root)
    raw = root / "DD/raw/DD_A.txt"
    raw.write_text(
        raw.read_text() + "1, 3\n4, 6\n4, 7\n7, 4\n"
    )  # an edge that is there already, and three that are not
    dataset = load("dd", root)
    assert isinstance(dataset, GraphDataset)
    assert (dataset.name, dataset.family, dataset.task) == ("DD", "tu", "graph")
    assert dataset.num_classes == 2
    assert dataset.num_features == 4, "in-degrees 0 to 3"
    assert [int(graph.y) for graph in dataset.graphs] == [1, 0] * 10, "labels are numbered in their order"
    assert dataset.graphs[0].x.argmax(1).tolist() == [2, 2, 2]
    assert dataset.graphs[1].x.argmax(1).tolist() == [3, 2, 3, 3, 2, 2], "one of the edges goes one way only"
    assert dataset.graphs[1].edge_index.max() == 5, "edges are numbered in their graph"


def test_tudataset_with_large_degrees_has_them_standardised(root: Path) -> None:
    """A star of 1,000 rays and 20 pairs."""
    edges = [(1, ray) for ray in range(2, 1002)] + [(node, node + 1) for node in range(1002, 1042, 2)]
    tu("REDDIT-BINARY", [1001] + [2] * 20, edges, graph_labels=column([1] + [1, -1] * 10))(root)
    dataset = load("REDDIT-BINARY", root)
    assert isinstance(dataset, GraphDataset)
    degrees = np.array([1000] + [1] * 1040, np.float64)
    assert dataset.num_features == 1
    # Sums of 1,041 float32 are within 1,041 units of 2^-24 of their terms, all of one sign: 6.2e-5 of the mean and of the variance.
    expected = (degrees - degrees.mean()) / degrees.std(ddof=1)
    np.testing.assert_allclose(torch.cat([graph.x for graph in dataset.graphs])[:, 0], expected, rtol=2e-4)


def test_tudataset_has_node_labels_without_attributes(root: Path) -> None:
    labels = column(i % 3 for i in range(sum(RINGS)))
    attributes = column(f"{i}.5, 2" for i in range(sum(RINGS)))
    classes = column(n % 2 for n in RINGS)
    tu("ENZYMES", RINGS, graph_labels=classes, node_labels=labels, node_attributes=attributes)(root)
    dataset = load("ENZYMES", root)
    assert isinstance(dataset, GraphDataset)
    x = torch.cat([graph.x for graph in dataset.graphs])
    assert torch.equal(x, torch.eye(3)[torch.arange(sum(RINGS)) % 3])
    tu("Synthie", RINGS, graph_labels=classes, node_attributes=attributes)(root)
    assert load("Synthie", root).graphs[0].x.tolist() == [[0.0, 0.0, 1.0]] * 3


def test_tudataset_of_a_regression(root: Path) -> None:
    tu("alchemy_full", RINGS, graph_attributes=column(f"{n}.25, -1" for n in RINGS))(root)
    dataset = load("alchemy_full", root)
    assert isinstance(dataset, GraphDataset)
    assert (dataset.task, dataset.num_classes, len(dataset.splits)) == ("graph-regression", 2, 10)
    assert dataset.graphs[2].y.tolist() == [[5.25, -1.0]]


def test_folds_are_those_of_pygs_benchmarks(root: Path) -> None:
    from sklearn.model_selection import StratifiedKFold

    dataset = many_graphs("COLLAB", root)
    y = np.array([int(graph.y) for graph in dataset.graphs])
    tests = [test for _, test in StratifiedKFold(10, shuffle=True, random_state=12345).split(np.zeros(40), y)]
    assert len(dataset.splits) == 10
    for i, split in enumerate(dataset.splits):
        assert split.test.tolist() == tests[i].tolist()
        assert split.val.tolist() == tests[i - 1].tolist()
        assert sorted(torch.cat([split.train, split.val, split.test]).tolist()) == list(range(40))
        assert len(split.train) == 32


@pytest.fixture(scope="session")
def tu_root() -> Path:
    """The folder with the real ones: QGNN_DATA, else the data that lies beside a checkout."""
    folder = Path(os.environ.get("QGNN_DATA") or Path(__file__).parent / "../../shared/data").resolve()
    if not (folder / "MUTAG/raw/MUTAG_A.txt").is_file():
        message = f"wants MUTAG, PROTEINS and IMDB-BINARY in {folder}; set QGNN_DATA"
        if os.environ.get("QGNN_REQUIRE_DATA") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.mark.parametrize(
    ("name", "graphs", "nodes", "edges", "features"),
    [("MUTAG", 188, 3371, 7442, 7), ("PROTEINS", 1113, 43471, 162088, 3), ("IMDB-BINARY", 1000, 19773, 193062, 136)],
)
def test_real_tudatasets(tu_root: Path, name: str, graphs: int, nodes: int, edges: int, features: int) -> None:
    before = listing(tu_root / name)
    dataset = load(name.lower(), tu_root)
    assert isinstance(dataset, GraphDataset)
    assert listing(tu_root / name) == before
    assert (dataset.name, dataset.num_features, dataset.num_classes) == (name, features, 2)
    assert len(dataset.graphs) == graphs
    assert sum(graph.num_nodes for graph in dataset.graphs) == nodes
    assert sum(graph.num_edges for graph in dataset.graphs) == edges
    shares = [float((dataset.graphs[split.test].y == 1).float().mean()) for split in dataset.splits]
    whole = float((dataset.graphs.y == 1).float().mean())
    # Stratified: the number of graphs of a class in a fold is a neighbour of its share, one off in a fold of graphs / 10 or one less.
    assert max(abs(share - whole) for share in shares) <= 1 / (graphs // 10)


# Roots


@pytest.mark.parametrize("name", WRITERS)
def test_a_read_only_root_gives_the_same_and_stays_as_it_is(name: str, root: Path) -> None:
    WRITERS[name](root)
    protect(root)
    before = listing(root)
    first = load(name, root)
    assert listing(root) == before
    for path in (root, *root.rglob("*")):
        path.chmod(0o755)
    second = load(name, root)
    assert any(root.glob("**/processed/*.pt")) == (name != "COLLAB"), "what PyG and OGB process is kept"
    if isinstance(first, Dataset):
        assert torch.equal(first.data.x, second.data.x)
        assert torch.equal(first.data.edge_index, second.data.edge_index)
    else:
        assert len(first.graphs) == len(second.graphs)
        assert all(torch.equal(a.x, b.x) for a, b in zip(first.graphs, second.graphs, strict=True))


@pytest.mark.parametrize("name", sorted({reader: name for name, reader in READERS.items()}.values()))
def test_missing_files_are_named_with_their_folder_and_their_origin(
    name: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "PCBA":  # RDKit comes before files
        monkeypatch.setattr(importlib.util, "find_spec", lambda module: object())
    root.chmod(0o555)
    with pytest.raises(
        ValueError, match=r"wants the files .* in .*, from .*http.* cannot be written to.*QGNN_DATA"
    ) as error:
        load(name, root)
    assert str(root) in str(error.value)
    assert "\n" not in str(error.value)
    assert listing(root) == []


def test_missing_files_are_downloaded_by_pyg_and_ogb(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ogb.nodeproppred import PygNodePropPredDataset
    from torch_geometric.datasets import Flickr

    def flickr(self: Flickr) -> None:
        os.rmdir(self.raw_dir)
        saint("Flickr", Y)(Path(self.root).parent)

    def ogb(self: PygNodePropPredDataset) -> None:
        shutil.rmtree(self.root)
        arxiv(Path(self.original_root))

    monkeypatch.setattr(Flickr, "download", flickr)
    monkeypatch.setattr(PygNodePropPredDataset, "download", ogb)
    for name in ("Flickr", "ogbn-arxiv"):
        dataset = load(name, root / "new")
        assert isinstance(dataset, Dataset)
        assert dataset.data.y.tolist() == Y.tolist()


def test_a_failed_download_is_one_line(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_geometric.datasets import Flickr

    def refuse(self: Flickr) -> None:
        raise OSError("no network\nat all")

    monkeypatch.setattr(Flickr, "download", refuse)
    with pytest.raises(
        ValueError, match=r"adj_full\.npz, feats\.npy.*Google Drive.*OSError: no network\); put them there by hand"
    ):
        load("Flickr", root)


def test_a_damaged_file_is_one_clear_error(root: Path) -> None:
    saint("Flickr", Y)(root)
    (root / "Flickr/raw/role.json").write_text("{")
    with pytest.raises(
        ValueError, match=r"role\.json in .*Flickr/raw cannot be read \(JSONDecodeError.*delete the folder 'processed'"
    ):
        load("Flickr", root)


def test_names() -> None:
    assert len({name.lower() for name in NAMES}) == len(NAMES), "they differ in more than case"
    assert sum(reader is _citation for reader in READERS.values()) == 3
    assert {"MUTAG", "PROTEINS", "ENZYMES", "NCI1", "IMDB-BINARY", "REDDIT-BINARY"} <= {
        name for name, reader in READERS.items() if reader is _tu
    }
