"""Functional similarity of layers: minibatch linear CKA from Gram matrices.

Source: Kornblith et al. 2019 (CKA); Song et al. 2012 and Nguyen et al. 2020, eq. 3 (unbiased HSIC,
averaged over minibatches before dividing).
"""

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def gram(features: NDArray[np.floating], *, rms_rows: bool = True) -> Matrix:
    """Gram matrix of one layer's outputs, rows scaled to unit root mean square.

    Without the scaling a few tokens with massive activations decide the similarity.

    Args:
        features: (num_tokens, hidden_size).
        rms_rows: whether to scale them.

    Returns:
        (num_tokens, num_tokens), float64.
    """
    x = features.astype(np.float64)
    if rms_rows:
        x /= np.sqrt((x * x).mean(axis=1, keepdims=True) + 1e-6)
    product: Matrix = x @ x.T
    return product


def hsic1(k: Matrix, l: Matrix) -> float:  # noqa: E741 - the paper's names
    """Unbiased HSIC of two Gram matrices of the same n >= 4 tokens.

    Raises:
        ValueError: fewer than 4 tokens, or shapes differ.
    """
    n = len(k)
    if n < 4 or k.shape != l.shape:
        raise ValueError(
            f"unbiased HSIC needs two equal shapes of at least 4, got {k.shape}, {l.shape}"
        )
    k = k - np.diag(np.diag(k))
    l = l - np.diag(np.diag(l))  # noqa: E741
    trace = float((k * l).sum())
    means = float(k.sum() * l.sum()) / ((n - 1) * (n - 2))
    cross = 2.0 * float(k.sum(axis=0) @ l.sum(axis=1)) / (n - 2)
    return (trace + means - cross) / (n * (n - 3))


class CkaAccumulator:
    """Sums HSIC over minibatches; holds one minibatch's Gram matrices at a time."""

    def __init__(self, num_items: int) -> None:
        self._hsic = np.zeros((num_items, num_items))

    def add(self, grams: list[Matrix]) -> None:
        """Add one minibatch: a Gram matrix per item, over the same tokens."""
        for i, k in enumerate(grams):
            for j in range(i, len(grams)):
                value = hsic1(k, grams[j])
                self._hsic[i, j] += value
                self._hsic[j, i] = self._hsic[i, j]

    def matrix(self) -> Matrix:
        """CKA of every pair: symmetric, ones on the diagonal, within [0, 1]."""
        scale = np.sqrt(np.maximum(np.diag(self._hsic), 1e-12))
        similarity: Matrix = np.clip(self._hsic / np.outer(scale, scale), 0.0, 1.0)
        np.fill_diagonal(similarity, 1.0)
        return similarity
