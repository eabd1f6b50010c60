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
        kept: all members that are kept, ascending, where a knapsack decided; otherwise empty.
        values: what each member was worth to that knapsack, its noise included.
        noise: the Gumbel number of each member in `values`; empty if nothing was drawn.
        swapped_in: items that coverage put in the place of a chosen one, in the order it did.
    """

    members: tuple[int, ...]
    probabilities: tuple[float, ...]
    uniform: float | None
    chosen: int
    kept: tuple[int, ...] = ()
    values: tuple[float, ...] = ()
    noise: tuple[float, ...] = ()
    swapped_in: tuple[int, ...] = ()

    @classmethod
    def only(cls, item: int) -> "Choice":
        """An item that is kept without any choice."""
        return cls((item,), (1.0,), None, item)

    @property
    def items(self) -> tuple[int, ...]:
        """What of the group is kept."""
        return self.kept or (self.chosen,)


def replay(choice: Choice) -> int:
    """The item that was chosen, from what the choice tells of how.

    Raises:
        ValueError: a knapsack decided; it weighs all groups against each other, so one group does
            not tell.
    """
    if choice.kept:
        raise ValueError(f"what a knapsack kept of {choice.members} depends on the other groups")
    if choice.swapped_in:
        return choice.swapped_in[-1]
    return choice.members[_position(np.array(choice.probabilities), choice.uniform)]


def probabilities(
    importance: Sequence[float], *, temperature: float = 1.0, floor: float = 0.0
) -> NDArray[np.float64]:
    """Selection probability of each member of a group: its share of the group's importance.

    Importance below zero (the model is better without the item) counts as zero; a group without
    any importance is drawn from evenly.

    Args:
        importance: of each member; only the ratios matter.
        temperature: shares are of importance to the power 1 / temperature: near 0 the most
            important member is certain, large ones draw evenly.
        floor: part of the probability that is spread evenly.

    Raises:
        ValueError: `temperature` is not positive or `floor` not within [0, 1].
    """
    if not temperature > 0 or not 0 <= floor <= 1:
        raise ValueError(
            f"temperature must be above 0 and floor within 0 to 1, got {temperature} and {floor}"
        )
    scores = np.maximum(np.asarray(importance, dtype=np.float64), 0.0)
    scores = scores / max(scores.max(), 1e-30) + 1e-6
    scores = (scores / scores.max()) ** (1.0 / temperature)
    shares: NDArray[np.float64] = (1.0 - floor) * scores / scores.sum() + floor / len(scores)
    return shares


def systematic(probabilities: Sequence[float], num_draws: int, uniform: float) -> tuple[int, ...]:
    """Items drawn at evenly spaced points of the cumulated probabilities, ascending.

    An item of probability p is drawn num_draws * p times, rounded up or down: as often as in
    independent draws on average, with less chance in it.

    Args:
        probabilities: of each item, adding up to 1.
        num_draws: how many.
        uniform: number in [0, 1) that shifts all points.
    """
    shares = np.asarray(probabilities, dtype=np.float64)
    return tuple(_position(shares, _point(i, num_draws, uniform)) for i in range(num_draws))


def choose(
    labels: Sequence[int],
    importance: Sequence[float],
    *,
    uniforms: Sequence[float] | None,
    temperature: float = 1.0,
    floor: float = 0.0,
) -> list[Choice]:
    """The representative of every group, in the order of the labels.

    Args:
        labels: group of each item, 0 to K - 1.
        importance: of each item.
        uniforms: one number in [0, 1) per group to draw with; None takes the most important member,
            the first one on a tie.
        temperature, floor: as in `probabilities`.
    """
    return [
        _choice(
            members,
            probabilities([importance[i] for i in members], temperature=temperature, floor=floor),
            None if uniforms is None else float(uniforms[label]),
        )
        for label, members in enumerate(_members(labels))
    ]


def choose_jointly(
    labels: Sequence[int],
    importance: Sequence[float],
    *,
    uniforms: Sequence[float],
    orders: Sequence[Sequence[int]],
    temperature: float = 1.0,
    floor: float = 0.0,
) -> list[list[Choice]]:
    """For each of several clients the representative of every group, from one draw per group.

    Together the clients hold an item as often as its probability says, rounded up or down. Each
    choice has the client's own point as its `uniform`, so it replays like an independent draw.

    Args:
        labels: group of each item, 0 to K - 1.
        importance: of each item.
        uniforms: one number in [0, 1) per group.
        orders: per group, which point each client gets: a permutation of 0 to m - 1. A random one,
            or the same clients would always hold the early items.
        temperature, floor: as in `probabilities`.
    """
    num_clients = len(orders[0])
    points = [
        [
            _point(order[client], num_clients, uniform)
            for uniform, order in zip(uniforms, orders, strict=True)
        ]
        for client in range(num_clients)
    ]
    return [
        choose(labels, importance, uniforms=own, temperature=temperature, floor=floor)
        for own in points
    ]


def choose_without_groups(
    importance: Sequence[float],
    num_chosen: int,
    *,
    uniforms: Sequence[float] | None,
    temperature: float = 1.0,
    floor: float = 0.0,
) -> list[Choice]:
    """So many items, one after the other from those that are left.

    Args:
        importance: of each item.
        num_chosen: how many.
        uniforms: one number in [0, 1) per choice to draw with; None takes the most important items,
            the first ones on a tie.
        temperature, floor: as in `probabilities`.
    """
    left = list(range(len(importance)))
    choices = []
    for turn in range(num_chosen):
        shares = probabilities([importance[i] for i in left], temperature=temperature, floor=floor)
        choice = _choice(left, shares, None if uniforms is None else float(uniforms[turn]))
        left.remove(choice.chosen)
        choices.append(choice)
    return choices


def first_and_last(num_items: int, num_chosen: int) -> tuple[int, ...]:
    """The first items and the last one."""
    return (*range(num_chosen - 1), num_items - 1)


def evenly_spaced(num_items: int, num_chosen: int) -> tuple[int, ...]:
    """Items at equal distances, the first and the last among them; a single one is the first."""
    steps = num_chosen - 1
    if steps == 0:
        return (0,)
    return tuple((2 * i * (num_items - 1) + steps) // (2 * steps) for i in range(num_chosen))


def top(importance: Sequence[float], num_chosen: int) -> tuple[int, ...]:
    """The most important items, ascending; the first ones on a tie."""
    by_worth = sorted(range(len(importance)), key=lambda item: -importance[item])
    return tuple(sorted(by_worth[:num_chosen]))


def _choice(members: Sequence[int], shares: NDArray[np.float64], uniform: float | None) -> Choice:
    chosen = members[_position(shares, uniform)]
    return Choice(tuple(members), tuple(shares.tolist()), uniform, chosen)


def _position(shares: NDArray[np.float64], uniform: float | None) -> int:
    """Where the number falls on the cumulated shares; the first largest share without one."""
    if uniform is None:
        return int(shares.argmax())
    position = int(np.searchsorted(np.cumsum(shares), uniform, side="right"))
    return min(position, len(shares) - 1)  # the sum may round to just below 1


def _point(index: int, num_points: int, uniform: float) -> float:
    return min((index + uniform) / num_points, float(np.nextafter(1.0, 0.0)))


def _members(labels: Sequence[int]) -> list[list[int]]:
    return [
        [item for item, label in enumerate(labels) if label == group]
        for group in range(max(labels) + 1)
    ]
