"""Published data sets: read from files below a root folder, through the classes of PyTorch Geometric (PyG) and of the Open Graph Benchmark (OGB).

:data:`READERS` names them; :mod:`qgnn.data` documents and loads them. PyG's classes keep what they have processed beside the raw files; where
that folder is not to be written to, they do so in a temporary one, each time.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from .files import explained, need, opened, read_files

if TYPE_CHECKING:
    from torch_geometric.data import Data, InMemoryDataset

Family = Literal["citation", "digits", "synthetic", "ogb", "inductive", "superpixels", "molecules", "tu"]
Task = Literal["node", "node-multilabel", "link", "graph", "graph-multilabel", "graph-regression"]
T = TypeVar("T")

SEED = 12345
"""Of the folds and of random splits: the papers' (A2Q A.6)."""

_PARTS = ("train", "val", "test")
_OGB_PARTS = ("train", "valid", "test")
_PLANETOID_FILES = ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index")
_SAINT_FILES = ("adj_full.npz", "feats.npy", "class_map.json", "role.json")
_SAINT = "the folder on Google Drive that https://github.com/GraphSAINT/GraphSAINT links to"
_SNAP = "http://snap.stanford.edu/ogb/data"
_TU_NAMES = """
    AIDS BZR BZR_MD COIL-DEL COIL-RAG COLLAB COLORS-3 COX2 COX2_MD Cuneiform DBLP_v1 DD DHFR DHFR_MD ENZYMES ER_MD FIRSTMM_DB FRANKENSTEIN
    Fingerprint IMDB-BINARY IMDB-MULTI KKI Letter-high Letter-low Letter-med MCF-7 MCF-7H MOLT-4 MOLT-4H MSRC_21 MSRC_21C MSRC_9 MUTAG
    Mutagenicity NCI-H23 NCI-H23H NCI1 NCI109 OHSU OVCAR-8 OVCAR-8H P388 P388H PC-3 PC-3H PROTEINS PROTEINS_full PTC_FM PTC_FR PTC_MM PTC_MR
    Peking_1 REDDIT-BINARY REDDIT-MULTI-12K REDDIT-MULTI-5K SF-295 SF-295H SN12C SN12CH SW-620 SW-620H SYNTHETIC SYNTHETICnew Synthie
    TRIANGLES TWITTER-Real-Graph-Partial Tox21_AR-LBD_evaluation Tox21_AR-LBD_testing Tox21_AR-LBD_training Tox21_ARE_evaluation
    Tox21_ARE_testing Tox21_ARE_training Tox21_AR_evaluation Tox21_AR_testing Tox21_AR_training Tox21_ATAD5_evaluation Tox21_ATAD5_testing
    Tox21_ATAD5_training Tox21_AhR_evaluation Tox21_AhR_testing Tox21_AhR_training Tox21_ER-LBD_evaluation Tox21_ER-LBD_testing
    Tox21_ER-LBD_training Tox21_ER_evaluation Tox21_ER_testing Tox21_ER_training Tox21_HSE_evaluation Tox21_HSE_testing Tox21_HSE_training
    Tox21_MMP_evaluation Tox21_MMP_testing Tox21_MMP_training Tox21_PPAR-gamma_evaluation Tox21_PPAR-gamma_testing
    Tox21_PPAR-gamma_training Tox21_aromatase_evaluation Tox21_aromatase_testing Tox21_aromatase_training Tox21_p53_evaluation
    Tox21_p53_testing Tox21_p53_training UACC257 UACC257H Yeast YeastH ZINC_full ZINC_test ZINC_train ZINC_val alchemy_full aspirin benzene
    dblp_ct1 dblp_ct2 deezer_ego_nets ethanol facebook_ct1 facebook_ct2 github_stargazers highschool_ct1 highschool_ct2 infectious_ct1
    infectious_ct2 malonaldehyde mit_ct1 mit_ct2 naphthalene reddit_threads salicylic_acid toluene tumblr_ct1 tumblr_ct2 twitch_egos uracil
"""


@dataclass(frozen=True, eq=False)
class Dataset:
    """One graph.

    Attributes:
        name: the name it was loaded by, in its usual spelling.
        data: ``x`` float32 ``[N, F]`` and ``edge_index`` int64 ``[2, E]`` (source, target). For nodes ``y`` int64 ``[N]``, with many labels float32
            ``[N, num_classes]`` of 0 and 1, and the bool masks ``train_mask``, ``val_mask``, ``test_mask`` ``[N]``, which do not overlap. For links
            ``split_edges``, OGB's ``{"train": {"edge"}, "valid": {"edge", "edge_neg"}, "test": {"edge", "edge_neg"}}``, each int64 ``[P, 2]``.
        num_classes: labels are ``0 .. num_classes - 1``, or there are as many of 0 and 1; 1, a score, for links.
        family: data sets of one family share their recipes.
        task: what is predicted.
    """

    name: str
    data: Data
    num_classes: int
    family: Family
    task: Task = "node"


@dataclass(frozen=True, eq=False)
class Split:
    """Indices of graphs, int64."""

    train: Tensor
    val: Tensor
    test: Tensor


@dataclass(frozen=True, eq=False)
class GraphDataset:
    """Many graphs.

    Attributes:
        name: the name it was loaded by, in its usual spelling.
        graphs: with ``x`` float32 ``[n, num_features]``, ``edge_index`` int64 ``[2, e]`` and ``y``, whose first dimension is 1: a class int64
            ``[1]``, labels float32 ``[1, num_classes]`` of 0 and 1, NaN where one is missing, or targets float32 ``[1]`` or ``[1, num_classes]``.
        num_features: width of ``x``.
        num_classes: outputs of a model: classes, labels, or targets of a regression.
        family: data sets of one family share their recipes.
        task: what is predicted.
        splits: one where the split is standard, else the 10 folds.
    """

    name: str
    graphs: Sequence[Data]
    num_features: int
    num_classes: int
    family: Family
    task: Task
    splits: tuple[Split, ...]


# One graph


def _citation(name: str, root: Path) -> Dataset:
    from torch_geometric.datasets import Planetoid
    from torch_geometric.io import read_planetoid_data

    folder = root / name / "raw"
    # The raw files are parsed each time, which takes half a second, so the folder may be read-only and nothing can be out of date.
    data = read_files(
        name,
        folder,
        [f"ind.{name.lower()}.{part}" for part in _PLANETOID_FILES],
        Planetoid.url,
        partial(read_planetoid_data, str(folder), name),
        partial(Planetoid, str(root), name),
    )
    return Dataset(name, data, int(data.y.max()) + 1, "citation")


def _inductive(name: str, root: Path) -> Dataset:
    from torch_geometric import datasets

    folder = root / name
    reddit = name == "Reddit"
    files = ("reddit_data.npz", "reddit_graph.npz") if reddit else _SAINT_FILES
    read = partial(opened, getattr(datasets, name), folder, {"root": str(folder)})
    data = read_files(name, folder / "raw", files, datasets.Reddit.url if reddit else _SAINT, read)[0][0]
    if data.y.dim() == 1:
        return Dataset(name, data, int(data.y.max()) + 1, "inductive")
    data.y = data.y.float()
    return Dataset(name, data, data.y.size(1), "inductive", "node-multilabel")


def _mag(name: str, root: Path) -> Dataset:
    """PyG's class, which needs no OGB. Edges go both ways, as in OGB's own baseline for this relation."""
    from torch_geometric.data import Data
    from torch_geometric.datasets import OGB_MAG
    from torch_geometric.utils import to_undirected

    folder = root / "mag"
    files = ("node-feat", "node-label", "relations", "split", "num-node-dict.csv.gz")
    read = partial(opened, OGB_MAG, folder, {"root": str(root)})
    hetero = read_files(name, folder / "raw", files, OGB_MAG.url, read)[0][0]
    paper = hetero["paper"]
    masks = {f"{part}_mask": paper[f"{part}_mask"] for part in _PARTS}
    edges = to_undirected(hetero["paper", "cites", "paper"].edge_index, num_nodes=len(paper.x))
    return Dataset(name, Data(x=paper.x, edge_index=edges, y=paper.y, **masks), int(paper.y.max()) + 1, "ogb")


def _ogb(name: str, root: Path, base: str, files: Sequence[str], split: Callable[[Any], T]) -> tuple[Data, T]:
    """The graph of a data set of OGB's, and its split."""
    need(name, "ogb", "'qgnn[datasets]'")
    kind = {"ogbn": "nodeproppred", "ogbl": "linkproppred"}[name[:4]]
    with explained("ogb cannot be imported", "install it anew: pip install 'qgnn[datasets]'"):
        module = importlib.import_module(f"ogb.{kind}")
    folder = root / name.replace("-", "_")

    def read() -> tuple[Data, T]:
        with torch.serialization.safe_globals(_ogb_globals()):
            (dataset,) = opened(getattr(module, base), folder, {"root": str(root), "name": name})
            return dataset[0], split(dataset)

    def download() -> None:
        if folder.exists():  # OGB would ask on the terminal, or read what is there
            raise FileExistsError("OGB downloads a data set as a whole, so delete that folder first")
        try:
            read()
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    wanted = (
        "RELEASE_v1.txt",
        "raw/num-node-list.csv.gz",
        "raw/num-edge-list.csv.gz",
        "raw/node-feat.csv.gz",
        "raw/edge.csv.gz",
        *files,
    )
    return read_files(name, folder, wanted, f"{_SNAP}/{kind}/{name[5:]}.zip", read, download)


def _ogb_globals() -> list[Any]:
    """What OGB's files hold beside tensors; its classes call ``torch.load``, which since torch 2.6 takes nothing that is not named."""
    from torch_geometric.data.data import DataEdgeAttr, DataTensorAttr
    from torch_geometric.data.storage import GlobalStorage

    array = np.zeros(0, np.int64)
    rebuild = array.__reduce__()[0]
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")  # before and since NumPy 2
    arrays = [(rebuild, f"{module}._reconstruct") for module in modules]
    types = {type(np.dtype(kind)) for kind in (np.int64, np.float32, np.float64)}
    return [DataEdgeAttr, DataTensorAttr, GlobalStorage, np.ndarray, np.dtype, *types, *arrays]


def _arxiv(name: str, root: Path) -> Dataset:
    """Edges go both ways, as in OGB's own baselines."""
    from torch_geometric.data import Data
    from torch_geometric.utils import index_to_mask, to_undirected

    files = (
        "raw/node-label.csv.gz",
        "raw/node_year.csv.gz",
        *(f"split/time/{part}.csv.gz" for part in _OGB_PARTS),
    )
    data, split = _ogb(name, root, "PygNodePropPredDataset", files, lambda dataset: dataset.get_idx_split())
    nodes = len(data.x)
    masks = {f"{part}_mask": index_to_mask(split[ogb], nodes) for part, ogb in zip(_PARTS, _OGB_PARTS, strict=True)}
    graph = Data(x=data.x, edge_index=to_undirected(data.edge_index, num_nodes=nodes), y=data.y.squeeze(1), **masks)
    return Dataset(name, graph, int(graph.y.max()) + 1, "ogb")


def _collab(name: str, root: Path) -> Dataset:
    """OGB has a training edge once in every year of a collaboration and in both directions; ``edge_weight`` is the number of papers."""
    from torch_geometric.data import Data

    files = (
        "raw/edge_weight.csv.gz",
        "raw/edge_year.csv.gz",
        *(f"split/time/{part}.pt" for part in _OGB_PARTS),
    )
    data, split = _ogb(name, root, "PygLinkPropPredDataset", files, lambda dataset: dataset.get_edge_split())
    edges = {part: {key: pairs[key] for key in ("edge", "edge_neg") if key in pairs} for part, pairs in split.items()}
    graph = Data(x=data.x, edge_index=data.edge_index, edge_weight=data.edge_weight.view(-1).float(), split_edges=edges)
    return Dataset(name, graph, 1, "ogb", "link")


# Many graphs


def packed(x: Tensor, edge_index: Tensor, y: Tensor, nodes: Tensor, edges: Tensor) -> InMemoryDataset:
    """Graphs from their concatenated tensors, edges in each numbered from 0, and their numbers of nodes and edges ``[G]``."""
    from torch_geometric.data import Data, InMemoryDataset
    from torch_geometric.utils import cumsum

    graphs = InMemoryDataset()
    graphs.data = Data(x=x.float(), edge_index=edge_index, y=y)
    graphs.slices = {"x": cumsum(nodes), "edge_index": cumsum(edges), "y": torch.arange(len(nodes) + 1)}
    return graphs


def _joined(parts: Sequence[Any], features: Callable[[Data], Tensor]) -> InMemoryDataset:
    """The graphs of several of PyG's data sets, one after another, with what ``features`` makes of their attributes as ``x``."""
    stored = [part._data for part in parts]  # collated; their ``data`` warns that it is
    x = torch.cat([features(data) for data in stored])
    nodes, edges = (torch.cat([part.slices[key].diff() for part in parts]) for key in ("x", "edge_index"))
    edge_index = torch.cat([data.edge_index for data in stored], dim=1)
    return packed(x, edge_index, torch.cat([data.y for data in stored]), nodes, edges)


def _consecutive(*sizes: int) -> Split:
    return Split(*torch.arange(sum(sizes)).split(list(sizes)))


def _random(graphs: int) -> Split:
    """80, 10 and 10 %."""
    order = torch.from_numpy(np.random.default_rng(SEED).permutation(graphs))
    return Split(*order.tensor_split([int(0.8 * graphs), int(0.9 * graphs)]))


def _superpixels(name: str, root: Path) -> GraphDataset:
    from torch_geometric.datasets import GNNBenchmarkDataset

    variants = [{"root": str(root), "name": name, "split": part} for part in _PARTS]
    read = partial(opened, GNNBenchmarkDataset, root / name, *variants)
    parts = read_files(name, root / name / "raw", (f"{name}_v2.pt",), GNNBenchmarkDataset.urls[name], read)
    graphs = _joined(parts, lambda data: torch.cat([data.x, data.pos], dim=1))
    splits = (_consecutive(*map(len, parts)),)
    return GraphDataset(name, graphs, graphs.num_features, 10, "superpixels", "graph", splits)


def _zinc(name: str, root: Path) -> GraphDataset:
    from torch_geometric.datasets import ZINC

    variants = [{"root": str(root / name), "subset": True, "split": part} for part in _PARTS]
    files = [f"{part}.{suffix}" for suffix in ("pickle", "index") for part in _PARTS]
    parts = read_files(name, root / name / "raw", files, ZINC.url, partial(opened, ZINC, root / name, *variants))
    graphs = _joined(parts, lambda data: data.x.view(-1, 1).float())
    return GraphDataset(name, graphs, 1, 1, "molecules", "graph-regression", (_consecutive(*map(len, parts)),))


def _qm9(name: str, root: Path) -> GraphDataset:
    from torch_geometric.datasets import QM9

    # PyG parses the molecules where RDKit is installed, and takes its own copy of the result where it is not.
    parsed = importlib.util.find_spec("rdkit") is not None
    files = ("gdb9.sdf", "gdb9.sdf.csv", "uncharacterized.txt") if parsed else ("qm9_v3.pt",)
    origin = f"{QM9.raw_url} and {QM9.raw_url2}" if parsed else QM9.processed_url
    read = partial(opened, QM9, root / name, {"root": str(root / name)})
    graphs = _joined(read_files(name, root / name / "raw", files, origin, read), lambda data: data.x)
    return GraphDataset(name, graphs, 11, 19, "molecules", "graph-regression", (_random(len(graphs)),))


def _pcba(name: str, root: Path) -> GraphDataset:
    from torch_geometric.datasets import MoleculeNet

    folder = root / "pcba"
    if not (folder / "processed" / "data.pt").exists():
        need(name, "rdkit", "rdkit")
    read = partial(opened, MoleculeNet, folder, {"root": str(root), "name": name})
    parts = read_files(name, folder / "raw", ("pcba.csv",), MoleculeNet.url.format("pcba.csv.gz"), read)
    graphs = _joined(parts, lambda data: data.x)
    return GraphDataset(name, graphs, 9, 128, "molecules", "graph-multilabel", (_random(len(graphs)),))


def _tu(name: str, root: Path) -> GraphDataset:
    from torch_geometric.datasets import TUDataset
    from torch_geometric.io import read_tu_data

    folder = root / name / "raw"
    files = [f"{name}_{part}.txt" for part in ("A", "graph_indicator")]
    read = partial(read_tu_data, str(folder), name)
    data, slices, sizes = read_files(
        name, folder, files, f"{TUDataset.url}/{name}.zip", read, partial(TUDataset, str(root), name)
    )
    edges = slices["edge_index"].diff()
    if sizes["num_node_labels"]:
        x, nodes = data.x[:, sizes["num_node_attributes"] :], slices["x"].diff()
    else:
        nodes = slices["x"].diff() if "x" in slices else torch.tensor(data._num_nodes)
        x = _degree_features(data.edge_index[1], nodes, edges)
    graphs = packed(x, data.edge_index, data.y, nodes, edges)
    if data.y.is_floating_point():
        targets = data.y.view(len(graphs), -1).size(1)
        return GraphDataset(name, graphs, x.size(1), targets, "tu", "graph-regression", _folds(data.y))
    return GraphDataset(name, graphs, x.size(1), int(data.y.max()) + 1, "tu", "graph", _folds(data.y))


def _degree_features(target: Tensor, nodes: Tensor, edges: Tensor) -> Tensor:
    """One-hot in-degrees, or, from 1,000 on, a single one less the mean and over the standard deviation, as PyG's benchmarks have them."""
    from torch_geometric.utils import cumsum, one_hot

    first = cumsum(nodes)
    degree = torch.bincount(target + first[:-1].repeat_interleave(edges), minlength=int(first[-1]))
    if degree.max() < 1000:
        return one_hot(degree)
    value = degree.float()
    return ((value - value.mean()) / value.std()).unsqueeze(1)


def _folds(y: Tensor, folds: int = 10) -> tuple[Split, ...]:
    """As in PyG's benchmarks: stratified, each fold tests once, and the one before it validates."""
    from sklearn.model_selection import KFold, StratifiedKFold

    kind = KFold if y.is_floating_point() else StratifiedKFold
    parts = kind(folds, shuffle=True, random_state=SEED).split(np.zeros(len(y)), y.numpy())
    tests = [torch.from_numpy(test) for _, test in parts]
    splits = []
    for i in range(folds):
        train = torch.ones(len(y), dtype=torch.bool)
        train[tests[i]] = train[tests[i - 1]] = False
        splits.append(Split(train.nonzero().view(-1), tests[i - 1], tests[i]))
    return tuple(splits)


READERS: dict[str, Callable[[str, Path], Dataset | GraphDataset]] = {
    **dict.fromkeys(_TU_NAMES.split(), _tu),
    **dict.fromkeys(("Cora", "CiteSeer", "PubMed"), _citation),
    "ogbn-arxiv": _arxiv,
    "ogbn-mag": _mag,
    "ogbl-collab": _collab,
    **dict.fromkeys(("Reddit", "Reddit2", "Flickr", "Yelp", "AmazonProducts"), _inductive),
    **dict.fromkeys(("MNIST", "CIFAR10"), _superpixels),
    "ZINC": _zinc,
    "QM9": _qm9,
    "PCBA": _pcba,
}
"""Name of a data set -> what reads it, given the name and the root."""
