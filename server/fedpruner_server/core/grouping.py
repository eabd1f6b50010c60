"""Functional groups from similarities: the paper's macro step."""

import numpy as np
from numpy.typing import NDArray

from fedpruner_server.core.similarity import Matrix


def spectral_groups(similarity: Matrix, num_groups: int, *, seed: int) -> NDArray[np.int64]:
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
    weights = np.clip((similarity + similarity.T) / 2, 0.0, None) + 1e-9
    np.fill_diagonal(weights, 0.0)
    laplacian = np.diag(weights.sum(axis=1)) - weights
    _, vectors = np.linalg.eigh(laplacian)
    return _ordered(_k_means(vectors[:, :num_groups], num_groups, seed=seed))


def _k_means(points: Matrix, num_groups: int, *, seed: int) -> NDArray[np.int64]:
    from sklearn.cluster import KMeans  # half a second to import, needed at planning only

    fitted = KMeans(n_clusters=num_groups, n_init=20, random_state=seed).fit(points)
    labels: NDArray[np.int64] = fitted.labels_.astype(np.int64)
    # Items that coincide can leave a cluster empty: split the largest one until there are enough.
    for label in range(num_groups):
        if not (labels == label).any():
            largest = np.bincount(labels, minlength=num_groups).argmax()
            labels[np.flatnonzero(labels == largest)[-1]] = label
    return labels


def _ordered(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    _, first = np.unique(labels, return_index=True)
    rank = {labels[index]: position for position, index in enumerate(np.sort(first))}
    return np.array([rank[label] for label in labels])
