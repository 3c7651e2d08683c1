"""Post-training quantization of PyG's models: trains GCN, GAT and GIN in FP32 with plain PyG, converts, calibrates and freezes them, without any
training on quantized values, and prints the test accuracy of the FP32 model and of the integer ones.

`python examples/ptq.py --data Cora --seeds 3`: one to two minutes on a CPU. Cora is read from QGNN_DATA, else ./data, and downloaded where it is
missing; `--data digits` needs no download.
"""

from __future__ import annotations

import argparse
import copy
import statistics

import torch
import torch.nn.functional as F
from torch import nn
from torch_geometric.data import Data
from torch_geometric.nn import GAT, GCN, GIN

import qgnn

METHODS = ("minmax", "percentile", "mse")
SETTINGS = {
    "GCN": {"make": GCN, "hidden": 16, "dropout": 0.5, "lr": 0.01},
    "GAT": {"make": GAT, "hidden": 8 * 8, "dropout": 0.6, "lr": 0.005, "heads": 8, "act": "elu"},
    "GIN": {"make": GIN, "hidden": 16, "dropout": 0.5, "lr": 0.01},
}


def accuracy(model: nn.Module, data: Data, mask: torch.Tensor) -> float:
    """Share of right predictions, in percent."""
    with torch.no_grad():
        right = model.eval()(data.x, data.edge_index).argmax(1) == data.y
    return 100 * float(right[mask].float().mean())


def trained(
    data: Data,
    classes: int,
    epochs: int,
    make: type[nn.Module],
    hidden: int,
    dropout: float,
    lr: float,
    **kwargs: object,
) -> nn.Module:
    """A model of PyG's in FP32, as it was in the epoch with the best validation accuracy."""
    model = make(data.x.size(1), hidden, 2, classes, dropout=dropout, **kwargs)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=5e-4)
    best, state = -1.0, model.state_dict()
    for _ in range(epochs):
        optimizer.zero_grad()
        out = model.train()(data.x, data.edge_index)
        F.cross_entropy(out[data.train_mask], data.y[data.train_mask]).backward()
        optimizer.step()
        validation = accuracy(model, data, data.val_mask)
        if validation > best:
            best, state = validation, copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    return model


def main() -> None:
    """Trains, quantizes, and prints one line a model."""
    parser = argparse.ArgumentParser(
        description="Test accuracy of PyG's models before and after post-training quantization."
    )
    parser.add_argument("--data", default="Cora", help="a data set of one graph (qgnn.data.NAMES)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=200)
    arguments = parser.parse_args()
    dataset = qgnn.data.load(arguments.data)
    data = dataset.data
    print(f"{arguments.data}: test accuracy in percent, mean of {arguments.seeds} seeds")
    print(
        f"{'':5}{'FP32':>8}"
        + "".join(f"{scheme + ' ' + method:>17}" for scheme in ("int8", "int4") for method in METHODS)
    )
    for name, settings in SETTINGS.items():
        columns: dict[str, list[float]] = {}
        for seed in range(arguments.seeds):
            torch.manual_seed(seed)
            model = trained(data, dataset.num_classes, arguments.epochs, **settings)
            columns.setdefault("FP32", []).append(accuracy(model, data, data.test_mask))
            for scheme in ("int8", "int4"):
                for method in METHODS:
                    quantized = qgnn.calibrate(qgnn.convert(model, scheme), data, method=method)
                    integers = qgnn.freeze(quantized, data)
                    columns.setdefault(f"{scheme} {method}", []).append(accuracy(integers, data, data.test_mask))
        means = [statistics.fmean(column) for column in columns.values()]
        print(f"{name:5}{means[0]:8.2f}" + "".join(f"{mean:17.2f}" for mean in means[1:]))


if __name__ == "__main__":
    main()
