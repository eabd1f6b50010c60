"""One representative per group by importance: the paper's micro step."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Choice:
    """How one group's representative was chosen; enough to replay it.

    Attributes:
        members: item indices of the group, ascending.
        probabilities: of each member.
        uniform: the random number in [0, 1) that decided, None for argmax.
        chosen: the representative.
    """

    members: tuple[int, ...]
    probabilities: tuple[float, ...]
    uniform: float | None
    chosen: int


def probabilities(importance: Sequence[float]) -> NDArray[np.float64]:
    """Selection probability of each member of a group: its share of the group's importance.

    Importance below zero (the model is better without the item) counts as zero; a group without
    any importance is drawn from evenly.
    """
    scores = np.maximum(np.asarray(importance, dtype=np.float64), 0.0)
    scores = scores / max(scores.max(), 1e-30) + 1e-6
    shares: NDArray[np.float64] = scores / scores.sum()
    return shares


def choose(
    labels: Sequence[int], importance: Sequence[float], *, uniforms: Sequence[float] | None
) -> list[Choice]:
    """The representative of every group, in the order of the labels.

    Args:
        labels: group of each item, 0 to K - 1.
        importance: of each item.
        uniforms: one number in [0, 1) per group to draw with; None takes the most important member,
            the first one on a tie.
    """
    choices = []
    for group in range(max(labels) + 1):
        members = [item for item, label in enumerate(labels) if label == group]
        shares = probabilities([importance[item] for item in members])
        uniform = None if uniforms is None else float(uniforms[group])
        if uniform is None:
            position = int(shares.argmax())
        else:
            position = int(np.searchsorted(np.cumsum(shares), uniform, side="right"))
            position = min(position, len(members) - 1)  # the sum may round to just below 1
        choices.append(
            Choice(tuple(members), tuple(shares.tolist()), uniform, chosen=members[position])
        )
    return choices
