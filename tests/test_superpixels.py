"""SLIC by its definition, neighbour graphs by brute force, and the graphs of scikit-learn's digits."""

import numpy as np
import pytest
import torch

from qgnn.data import GraphDataset, load
from qgnn.superpixels import enlarge, neighbour_graphs, slic

RANDOM = np.random.default_rng(0)


def positions(size: int) -> np.ndarray:
    """``[size^2, 2]``: y and x of the pixels' centres in [0, 1]."""
    place = (np.arange(size) + 0.5) / size
    return np.stack(np.meshgrid(place, place, indexing="ij"), axis=-1).reshape(-1, 2)


def test_enlarging_interpolates_between_pixel_centres() -> None:
    image = np.array([[[0.0, 1.0], [2.0, 3.0]]])
    assert enlarge(image, 2)[0].tolist() == [
        [0.0, 0.25, 0.75, 1.0],
        [0.5, 0.75, 1.25, 1.5],
        [1.5, 1.75, 2.25, 2.5],
        [2.0, 2.25, 2.75, 3.0],
    ]


def test_segments_are_the_squares_of_the_grid_when_the_position_decides() -> None:
    labels, means = slic(RANDOM.random((3, 12, 12)), grid=4, compactness=100.0)
    squares = np.repeat(np.repeat(np.arange(16).reshape(4, 4), 3, axis=0), 3, axis=1)
    assert np.array_equal(labels.reshape(3, 12, 12), np.broadcast_to(squares, (3, 12, 12)))
    # Sums of 9 numbers below 1, each rounded to within 2^-53 of it.
    np.testing.assert_allclose(means[..., 1:], np.broadcast_to(positions(4), (3, 16, 2)), atol=9 * 2**-53)


def test_segments_do_not_cross_an_edge_when_the_intensity_decides() -> None:
    image = np.zeros((1, 12, 12))
    image[:, :, 5:] = 1.0
    _, means = slic(image, grid=4, compactness=0.01)
    assert set(means[0, :, 0].tolist()) <= {0.0, 1.0, np.inf}


def test_every_pixel_is_in_the_nearest_segment_around_it_and_means_are_means() -> None:
    size, grid, compactness = 12, 4, 0.3
    images = RANDOM.random((5, size, size))
    labels, means = slic(images, grid, compactness, iterations=200)
    place = positions(size)
    home = np.floor(place * grid).astype(int)
    for image, label, mean in zip(images.reshape(5, -1), labels, means, strict=True):
        for cluster in np.unique(label):
            members = label == cluster
            expected = [image[members].mean(), *place[members].mean(0)]
            # A segment has at most the 81 pixels of 3 x 3 squares; sums of 81 numbers in either order.
            np.testing.assert_allclose(mean[cluster], expected, rtol=2 * 81 * 2**-53)
        for pixel in range(size * size):
            distance = {
                y * grid + x: (image[pixel] - mean[y * grid + x, 0]) ** 2
                + (compactness * grid) ** 2 * ((place[pixel] - mean[y * grid + x, 1:]) ** 2).sum()
                for y in range(grid)
                for x in range(grid)
                if max(abs(y - home[pixel, 0]), abs(x - home[pixel, 1])) <= 1
            }
            assert distance[label[pixel]] <= min(distance.values()) * (1 + 1e-12)


def test_a_segment_without_pixels_is_no_node() -> None:
    means = RANDOM.random((2, 12, 3))
    means[0, 4] = np.inf
    x, edges, nodes = neighbour_graphs(means, neighbours=3)
    assert nodes.tolist() == [11, 12]
    assert np.array_equal(x, np.concatenate([np.delete(means[0], 4, axis=0), means[1]]))
    for first, last in ((0, 11), (11, 23)):
        centre = x[first:last, 1:]
        distance = ((centre[:, None] - centre) ** 2).sum(-1)
        np.fill_diagonal(distance, np.inf)
        source, target = edges[:, 3 * first : 3 * last]
        assert target.tolist() == np.repeat(np.arange(last - first), 3).tolist()
        assert source.reshape(-1, 3).tolist() == distance.argsort(axis=1)[:, :3].tolist()


@pytest.fixture(scope="module")
def digits() -> GraphDataset:
    dataset = load("Digits-Superpixels")
    assert isinstance(dataset, GraphDataset)
    return dataset


def test_digits_as_graphs(digits: GraphDataset) -> None:
    assert (digits.name, digits.family, digits.task) == ("digits-superpixels", "superpixels", "graph")
    assert (digits.num_features, digits.num_classes, len(digits.graphs)) == (3, 10, 1797)
    assert sum(graph.num_nodes for graph in digits.graphs) == 64690, "the same wherever it is made"
    for graph in digits.graphs:
        assert graph.x.dtype == torch.float32
        assert bool(((graph.x >= 0) & (graph.x <= 1)).all())
        assert graph.edge_index[1].tolist() == torch.arange(graph.num_nodes).repeat_interleave(8).tolist()
        assert not graph.has_self_loops()
        assert int(graph.edge_index.max()) < graph.num_nodes


def test_digits_as_graphs_keep_the_ink(digits: GraphDataset) -> None:
    """Segments of 7 of the 256 pixels: their plain mean is near that of the image, though they differ in size."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    assert [int(graph.y) for graph in digits.graphs] == labels.tolist()
    ink = np.array([float(graph.x[:, 0].mean()) for graph in digits.graphs])
    assert np.corrcoef(ink, pixels.mean(1))[0, 1] > 0.95


def test_digits_as_graphs_have_a_fixed_stratified_split(digits: GraphDataset) -> None:
    (split,) = digits.splits
    (again,) = load("digits-superpixels").splits
    parts = {"train": 1000, "val": 297, "test": 500}
    everything = torch.cat([getattr(split, part) for part in parts])
    assert sorted(everything.tolist()) == list(range(1797))
    share = torch.bincount(digits.graphs.y, minlength=10) / 1797
    for part, size in parts.items():
        chosen = getattr(split, part)
        assert torch.equal(chosen, getattr(again, part))
        count = torch.bincount(digits.graphs.y[chosen], minlength=10)
        assert float((count - size * share).abs().max()) <= 1, "in proportion, but for rounding at both ends"
