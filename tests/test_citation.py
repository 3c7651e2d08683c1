"""The main job on real data: train on a citation network, freeze, run on packed integers. A lower bar than docs/accuracy.md, for one seed."""

from __future__ import annotations

from pathlib import Path

import pytest

from qgnn import Graph, data, freeze, quant, train
from qgnn.features import SparseFeatures
from qgnn.recipes import recipe_for


@pytest.mark.parametrize(("name", "accuracy", "limit"), [("Cora", 79.0, 1.75), ("CiteSeer", 68.0, 1.90)])
def test_a2q_is_accurate_narrow_and_the_same_on_integers(
    citation_root: Path, name: str, accuracy: float, limit: float
) -> None:
    dataset = data.load(name, citation_root)
    recipe = recipe_for("gcn", quant.parse("a2q"), dataset).changed(hidden=64)
    run = train.train(dataset, "gcn", "a2q", 0, recipe=recipe)
    assert run.record["test_acc"] > accuracy
    assert run.record["average_bits"] <= limit
    frozen = freeze(run.model, run.data)
    report = frozen.report
    assert report is not None
    assert [layer.launches for layer in report.layers] == [2, 2]
    assert report.mismatched_predictions <= report.ties
    if not report.ties:
        assert report.max_relative < 1e-4
    features, hidden = report.layers
    nodes = dataset.data.num_nodes
    assert features.average_bits == 1.0, "0/1 features are exact in one bit"
    assert hidden.code_bytes <= 1.3 * hidden.average_bits * nodes * 64 / 8
    # other edges in another order, unsorted: the same sums
    unsorted = Graph.from_edge_index(run.data.edge_index.flip(1), nodes, sort=False)
    assert frozen(run.data.x, unsorted).equal(frozen())


def test_training_multiplies_bags_of_words_as_sparse_matrices(citation_root: Path) -> None:
    dataset = data.load("Cora", citation_root)
    x = train.training_features(train.prepare(dataset, recipe_for("gcn", quant.parse("fp32"), dataset)).x)
    assert isinstance(x, SparseFeatures) and x.shape == (2708, 1433)


def test_training_can_learn_the_widths_of_a_bag_of_words(citation_root: Path) -> None:
    """-input: sparse features are quantized like any other map, without the dropout whose scale their steps would fit."""
    dataset = data.load("Cora", citation_root)
    recipe = recipe_for("gcn", quant.parse("a2q-input"), dataset).changed(epochs=2, hidden=8)
    assert recipe.input_dropout == 0 < recipe_for("gcn", quant.parse("a2q"), dataset).input_dropout
    run = train.train(dataset, "gcn", "a2q-input", 0, recipe=recipe)
    assert run.frozen is not None and run.frozen.report is not None
    features, hidden = run.frozen.report.layers
    assert 1 < features.average_bits <= 2, "the start is 1.65 in both maps"
    assert run.record["average_bits"] == pytest.approx((features.average_bits + hidden.average_bits) / 2)
    assert run.record["integer_mismatches"] <= run.record["integer_ties"]
