"""The main job for a user of PyG, on real data: PyG's own model classes, converted, trained for a while, frozen; predictions stay."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from torch import nn
from torch_geometric.loader import DataLoader

import qgnn

MODELS = {
    "gcn": lambda: pyg.GCN(1433, 16, 2, 7, dropout=0.5),
    "gat": lambda: pyg.GAT(1433, 64, 2, 7, dropout=0.5, heads=8),
    "gin": lambda: pyg.GIN(1433, 16, 2, 7, dropout=0.5),
    "sage": lambda: pyg.GraphSAGE(1433, 16, 2, 7, dropout=0.5),
}


class PooledGIN(nn.Module):
    def __init__(self, in_channels: int, classes: int) -> None:
        super().__init__()
        self.gin = pyg.GIN(in_channels, 32, 3, norm="batch_norm")
        self.head = pyg.MLP([32, 32, classes], norm=None)

    def forward(self, x, edge_index, batch):
        return self.head(pyg.global_add_pool(self.gin(x, edge_index), batch))


def assert_same(report: qgnn.integer.FreezeReport) -> None:
    """Every differing code follows from a counted tie; without one, logits agree to 1e-4 and so do all predictions (NUMERICS 7)."""
    assert not any(layer.kind == "float" for layer in report.layers)
    if report.ties == 0:
        assert report.inherited == 0
        assert report.max_relative < 1e-4
        assert report.mismatched_predictions == 0
    assert report.ties < 20 and report.mismatched_predictions <= report.ties


@pytest.mark.parametrize("scheme", ["int8", "a2q"])
@pytest.mark.parametrize("kind", MODELS)
def test_on_cora(citation_root, kind, scheme):
    torch.manual_seed(0)
    data = qgnn.data.load("Cora", citation_root).data
    model = qgnn.convert(MODELS[kind](), scheme, num_nodes=data.num_nodes)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=5e-4)
    for _ in range(15):
        optimizer.zero_grad()
        out = model(data.x, data.edge_index)
        F.cross_entropy(out[data.train_mask], data.y[data.train_mask]).backward()
        optimizer.step()
    frozen = qgnn.freeze(model, data)
    assert_same(frozen.report)
    right = (frozen().argmax(1) == data.y)[data.test_mask].float().mean()
    assert right > 0.4, "it has learned nothing, so agreement would mean little"
    # at least 4 x below FP32: 8 bits where the input is dense
    assert frozen.report.packed_bytes * 3.9 <= frozen.report.fp32_bytes


@pytest.mark.parametrize("scheme", ["int8", "a2q-nns"])
def test_on_proteins(citation_root, scheme):
    torch.manual_seed(0)
    dataset = qgnn.data.load("PROTEINS", citation_root)
    graphs = list(dataset.graphs)
    model = qgnn.convert(PooledGIN(dataset.num_features, 2), scheme)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for batch in DataLoader(graphs[:640], 64, shuffle=True):
        optimizer.zero_grad()
        F.cross_entropy(model(batch.x, batch.edge_index, batch.batch), batch.y).backward()
        optimizer.step()
    model.eval()
    first, unseen = DataLoader(graphs[640:1040], 200)
    frozen = qgnn.freeze(model, first)
    assert_same(frozen.report)
    with torch.no_grad():
        expected = model(unseen.x, unseen.edge_index, unseen.batch)
    out = frozen(unseen.x, unseen.edge_index, unseen.batch)
    gap = expected.diff(dim=1).abs().squeeze(1)
    different = out.argmax(1) != expected.argmax(1)
    # graphs that training never saw: only where two classes are as good as equal may a tie decide
    assert (gap[different] <= 0.05 * expected.abs().max()).all()
