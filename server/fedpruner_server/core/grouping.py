"""Functional groups from similarities: the paper's macro step, and what it is compared with."""

from enum import Enum

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Labels = NDArray[np.int64]


class Grouping(str, Enum):
    """How items are put into groups."""

    SPECTRAL = "spectral"  # the paper's: unnormalised Laplacian
    SPECTRAL_NORMALIZED = "spectral_normalized"  # Ng, Jordan and Weiss 2002
    CONTIGUOUS = "contiguous"  # neighbours only, the best such split
    EVEN = "even"  # neighbours only, equally many each
    RANDOM = "random"  # the control: what groups are worth that mean nothing
    SHUFFLED = "shuffled"  # the other control: spectral groups of other items than the measured
    NONE = "none"  # everything in one group, of which planning takes several


def group(similarity: Matrix, num_groups: int, *, kind: Grouping, seed: int) -> Labels:
    """Group label of every item, labels ordered by their first item.

    As many groups as items are singletons whatever the kind; otherwise `Grouping.NONE` gives one
    group.

    Args:
        similarity: (n, n), symmetric; only its off-diagonal part is used.
        num_groups: 1 to n.
        kind: how.
        seed: of k-means and of random groups.

    Raises:
        ValueError: `num_groups` out of range.
    """
    n = len(similarity)
    if not 1 <= num_groups <= n:
        raise ValueError(f"cannot make {num_groups} groups of {n} items")
    if num_groups == n:
        return np.arange(n)
    if kind is Grouping.SPECTRAL:
        return spectral_groups(similarity, num_groups, seed=seed)
    if kind is Grouping.SPECTRAL_NORMALIZED:
        return _normalized_spectral_groups(similarity, num_groups, seed=seed)
    if kind is Grouping.CONTIGUOUS:
        return _contiguous_groups(similarity, num_groups)
    if kind is Grouping.EVEN:
        return np.arange(n) * num_groups // n
    if kind is Grouping.SHUFFLED:
        order = np.random.default_rng(seed).permutation(n)
        return _ordered(spectral_groups(similarity, num_groups, seed=seed)[order])
    if kind is Grouping.RANDOM:
        return _random_groups(n, num_groups, seed=seed)
    return np.zeros(n, dtype=np.int64)


def spectral_groups(similarity: Matrix, num_groups: int, *, seed: int) -> Labels:
    """Group label of every item, labels ordered by their first item.

    Complete graph with the similarities as edge weights, unnormalised Laplacian L = D - W, the
    eigenvectors of the `num_groups` smallest eigenvalues as coordinates, k-means on them.

    On layers this tends to give outliers (first, last) groups of their own and to leave one large
    middle group. That is a property of the unnormalised Laplacian, not a fault.

    Args:
        similarity: (n, n), symmetric; only its off-diagonal part is used.
        num_groups: 1 to n.
        seed: of k-means.

    Raises:
        ValueError: `num_groups` out of range.

    Source: arXiv 2508.17209, macro step; eigenvectors and k-means as in the same authors' DevFT.
    """
    n = len(similarity)
    if not 1 <= num_groups <= n:
        raise ValueError(f"cannot make {num_groups} groups of {n} items")
    if num_groups == n:
        return np.arange(n)
    weights = _edges(similarity)
    laplacian = np.diag(weights.sum(axis=1)) - weights
    _, vectors = np.linalg.eigh(laplacian)
    return _ordered(_k_means(vectors[:, :num_groups], num_groups, seed=seed))


def _normalized_spectral_groups(similarity: Matrix, num_groups: int, *, seed: int) -> Labels:
    """Like `spectral_groups`, with I - D^-1/2 W D^-1/2 and every item's coordinates at length 1."""
    weights = _edges(similarity)
    root = np.sqrt(weights.sum(axis=1))
    laplacian = np.eye(len(weights)) - weights / np.outer(root, root)
    _, vectors = np.linalg.eigh(laplacian)
    points = vectors[:, :num_groups]
    points /= np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    return _ordered(_k_means(points, num_groups, seed=seed))


def _contiguous_groups(similarity: Matrix, num_groups: int) -> Labels:
    """The split into runs that makes the mean dissimilarity of items to their run smallest.

    Dissimilarity is 1 - similarity, and 0 of an item to itself, which counts in its run's mean.
    Exact, by dynamic programming over where the last run starts.
    """
    n = len(similarity)
    distance = 1.0 - (similarity + similarity.T) / 2
    np.fill_diagonal(distance, 0.0)
    cost = np.full((n, n + 1), np.inf)  # of the run from start to just before end
    for start in range(n):
        for end in range(start + 1, n + 1):
            cost[start, end] = distance[start:end, start:end].sum() / (end - start)
    best = np.concatenate(([0.0], np.full(n, np.inf)))  # of the items before each end
    starts = np.zeros((num_groups, n + 1), dtype=np.int64)  # of the last run
    for label in range(num_groups):
        totals = best[:n, None] + cost  # (start, end)
        starts[label] = totals.argmin(axis=0)
        best = totals.min(axis=0)
    labels = np.zeros(n, dtype=np.int64)
    end = n
    for label in range(num_groups - 1, -1, -1):
        start = int(starts[label, end])
        labels[start:end] = label
        end = start
    return labels


def _random_groups(num_items: int, num_groups: int, *, seed: int) -> Labels:
    rng = np.random.default_rng(seed)
    labels = rng.integers(num_groups, size=num_items)
    # One item for every group first, so that none is empty.
    labels[rng.permutation(num_items)[:num_groups]] = np.arange(num_groups)
    return _ordered(labels)


def _edges(similarity: Matrix) -> Matrix:
    """Edge weights: symmetric, positive, no loops."""
    weights: Matrix = np.clip((similarity + similarity.T) / 2, 0.0, None) + 1e-9
    np.fill_diagonal(weights, 0.0)
    return weights


def _k_means(points: Matrix, num_groups: int, *, seed: int) -> Labels:
    from sklearn.cluster import KMeans  # half a second to import, needed at planning only

    fitted = KMeans(n_clusters=num_groups, n_init=20, random_state=seed).fit(points)
    labels: Labels = fitted.labels_.astype(np.int64)
    # Items that coincide can leave a cluster empty: split the largest one until there are enough.
    for label in range(num_groups):
        if not (labels == label).any():
            largest = np.bincount(labels, minlength=num_groups).argmax()
            labels[np.flatnonzero(labels == largest)[-1]] = label
    return labels


def _ordered(labels: Labels) -> Labels:
    _, first = np.unique(labels, return_index=True)
    rank = {labels[index]: position for position, index in enumerate(np.sort(first))}
    return np.array([rank[label] for label in labels])
