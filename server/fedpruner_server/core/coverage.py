"""Keeping every item trained: items that nobody has held for long are worth more, or are forced in.

An item's age is the number of rounds since an update of it was last aggregated.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum


class Coverage(str, Enum):
    """What planning does about items that have not been trained for long."""

    OFF = "off"
    SOFT = "soft"  # their importance grows
    HARD = "hard"  # and at the greatest age they replace another choice


@dataclass(frozen=True)
class Slot:
    """Room for one item on one client.

    Attributes:
        client_id: whose.
        members: items of the group that the slot represents.
        chosen: the item it holds.
    """

    client_id: str
    members: tuple[int, ...]
    chosen: int


def soften(
    importance: Sequence[float], ages: Sequence[int], *, kappa: float, max_age: int
) -> tuple[float, ...]:
    """Importance times 1 to 1 + `kappa`, growing with age up to `max_age` rounds."""
    return tuple(
        value * (1.0 + kappa * min(age / max_age, 1.0))
        for value, age in zip(importance, ages, strict=True)
    )


def cover(
    slots: Sequence[Slot],
    ages: Sequence[int],
    *,
    max_age: int,
    fits: Callable[[str, frozenset[int]], bool] = lambda _client_id, _items: True,
) -> tuple[dict[int, int], tuple[int, ...]]:
    """Which slots must hold another item, and the items that are too old and still left out.

    An item goes into a slot of a group of its own, on the client that has the most slots. It
    replaces the item that most clients hold, never the only one of an item that is as urgent.
    A group with more old items than slots is started early enough to get through in time.

    Args:
        slots: of all clients of the round. One with a single member is never changed.
        ages: of every item, in rounds.
        max_age: an item of this age must be held this round.
        fits: whether a client can hold these items instead of its own.

    Returns:
        slot index -> the item to swap in; items of `max_age` or more that no slot holds, ascending.
    """
    due = _due(slots, ages, max_age)
    held = [slot.chosen for slot in slots]
    swaps: dict[int, int] = {}
    for item in sorted(due, key=lambda item: (-ages[item], item)):
        if item in held:
            continue
        # Who comes later in this order and is not too old yet may have to wait for another slot.
        waiting = {i for i in due if ages[i] < max_age and (-ages[i], i) > (-ages[item], item)}
        for index in _candidates(slots, held, item, due - waiting, ages):
            client_id = slots[index].client_id
            others = (
                held[i] for i, s in enumerate(slots) if s.client_id == client_id and i != index
            )
            if fits(client_id, frozenset((*others, item))):
                held[index] = swaps[index] = item
                break
    left_out = (item for item, age in enumerate(ages) if age >= max_age and item not in held)
    return swaps, tuple(left_out)


def _candidates(
    slots: Sequence[Slot], held: list[int], item: int, spared: set[int], ages: Sequence[int]
) -> list[int]:
    """Slots that may take the item, the best first; not the only slot of an item that is spared."""
    num_slots = Counter(slot.client_id for slot in slots)
    holders = Counter(held)

    def rank(index: int) -> tuple[int, str, int, int, int]:
        client_id, chosen = slots[index].client_id, held[index]
        return (-num_slots[client_id], client_id, -holders[chosen], ages[chosen], index)

    return sorted(
        (
            index
            for index, slot in enumerate(slots)
            if item in slot.members and (held[index] not in spared or holders[held[index]] > 1)
        ),
        key=rank,
    )


def _due(slots: Sequence[Slot], ages: Sequence[int], max_age: int) -> set[int]:
    """Items that must be held this round, so that no age passes `max_age` now or later.

    Of the items that compete for an item's slots, the older ones go first, as many a round as there
    are slots. If the item would then be too old at its turn, those before it must start now.
    """
    order = sorted(range(len(ages)), key=lambda item: (-ages[item], item))
    due = {item for item in order if ages[item] >= max_age}
    for position, item in enumerate(order):
        own = [slot for slot in slots if item in slot.members and len(slot.members) > 1]
        if not own:
            continue
        rivals = {member for slot in own for member in slot.members}
        before = [other for other in order[:position] if other in rivals]
        if ages[item] + len(before) // len(own) >= max_age:
            due.update((item, *before))
    return due
