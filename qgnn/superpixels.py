"""Images as graphs of superpixels: SLIC segments, linked with their nearest neighbours.

SLIC (Achanta et al., "SLIC Superpixels Compared to State-of-the-art Superpixel Methods", 2012) is k-means of the pixels by intensity and
position, where a pixel looks only at the clusters around it. Segments become nodes as Dwivedi et al. ("Benchmarking Graph Neural Networks")
make them of MNIST. All images are worked on at once, in plain numpy, whose elementwise float64 arithmetic and sums in a fixed order give the same
graphs everywhere.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def enlarge(images: Floats, factor: int) -> Floats:
    """Bilinear interpolation of square images ``[B, n, n]`` to ``[B, factor n, factor n]``; the edge pixels are repeated outward."""
    size = images.shape[1]
    place = np.clip((np.arange(factor * size) + 0.5) / factor - 0.5, 0, size - 1)
    low = np.minimum(place.astype(np.int64), size - 2)
    part = place - low
    rows = images[:, low] * (1 - part)[:, None] + images[:, low + 1] * part[:, None]
    return rows[:, :, low] * (1 - part) + rows[:, :, low + 1] * part


def slic(images: Floats, grid: int, compactness: float = 0.25, iterations: int = 5) -> tuple[NDArray[np.int64], Floats]:
    """Segments of square images.

    The clusters start as ``grid x grid`` squares; in each iteration a pixel joins the nearest of the 9 clusters around the square it lies in (SLIC's
    window of twice the grid interval). The squared distance is (difference of intensity)^2 + (compactness * distance in grid intervals)^2.
    Parts of a segment that the others cut off stay with it.

    Args:
        images: ``[B, n, n]``, intensities in [0, 1].
        grid: ``grid^2`` clusters an image; one that loses all its pixels stays empty.
        compactness: weight of the position; the larger, the squarer the segments. Dwivedi et al. use 0.25.
        iterations: of k-means; of scikit-learn's digits, 0.3 % of the pixels change segments after the fifth.

    Returns:
        The cluster of every pixel ``[B, n * n]``, and the means ``[B, grid^2, 3]`` of intensity, y and x over each cluster, positions in
        [0, 1] from top left; infinite for an empty cluster.
    """
    count, size = len(images), images.shape[1]
    place = (np.arange(size) + 0.5) / size
    y, x = (np.broadcast_to(p.ravel(), (count, size * size)) for p in np.meshgrid(place, place, indexing="ij"))
    pixels = (images.reshape(count, -1), y, x)
    weights = (1.0, compactness * grid, compactness * grid)
    square = np.minimum((place * grid).astype(np.int64), grid - 1)
    around = np.clip(square + np.array([[-1], [0], [1]]), 0, grid - 1)
    near = (around[:, None, :, None] * grid + around[None, :, None, :]).reshape(9, size * size)
    labels = np.broadcast_to(near[4], (count, size * size))
    for _ in range(iterations):
        means = np.moveaxis(_means(pixels, labels, grid * grid), -1, 0)
        terms = list(zip(pixels, means, weights, strict=True))
        distance = [sum(((pixel - mean[:, near_i]) * weight) ** 2 for pixel, mean, weight in terms) for near_i in near]
        labels = near[np.argmin(distance, axis=0), np.arange(size * size)]
    return labels, _means(pixels, labels, grid * grid)


def _means(pixels: tuple[Floats, ...], labels: NDArray[np.int64], clusters: int) -> Floats:
    count = len(labels)
    flat = (labels + clusters * np.arange(count)[:, None]).ravel()
    size = np.bincount(flat, minlength=count * clusters)
    sums = np.stack([np.bincount(flat, values.ravel(), count * clusters) for values in pixels], axis=-1)
    means = np.divide(sums, size[:, None], out=np.full_like(sums, np.inf), where=size[:, None] > 0)
    return means.reshape(count, clusters, len(pixels))


def neighbour_graphs(means: Floats, neighbours: int = 8) -> tuple[Floats, NDArray[np.int64], NDArray[np.int64]]:
    """A graph of each image: its segments, and edges to a segment from the ``neighbours`` whose centres are nearest; of equals, the first.

    Args:
        means: as :func:`slic` gives them; an image has more than ``neighbours`` segments that are not empty.

    Returns:
        Features ``[N, 3]`` of all images' nodes one after another; edges ``[2, neighbours * N]`` (source, target), in each image numbered from 0
        and sorted by target; and the number of nodes of every image ``[B]``.
    """
    there = np.isfinite(means[..., 0])
    centres = np.where(there[..., None], means[..., 1:], 0.0)
    distance = ((centres[:, :, None] - centres[:, None]) ** 2).sum(-1)
    distance[np.broadcast_to(~there[:, None], distance.shape)] = np.inf
    itself = np.arange(means.shape[1])
    distance[:, itself, itself] = np.inf
    near = distance.argsort(axis=2, kind="stable")[..., :neighbours]
    number = there.cumsum(1) - 1  # of a segment, when the empty ones are left out
    source = np.take_along_axis(number[:, None], near, axis=2)[there].ravel()
    return means[there], np.stack([source, np.repeat(number[there], neighbours)]), there.sum(1)
