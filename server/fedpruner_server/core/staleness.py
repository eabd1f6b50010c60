"""Updates that come late: what they would have changed, applied to what there is now."""

from collections.abc import Iterator, Mapping

from fedpruner_server.core.aggregation import Adapter, Array


def discount(staleness: int, exponent: float) -> float:
    """Weight of an update that began so many adapters ago.

    Source: Nguyen et al. 2022 (FedBuff), polynomial staleness with exponent 1/2.
    """
    return float((1 + staleness) ** -exponent)


class Rebased(Mapping[str, Array]):
    """A late update's values as if it had begun with the current adapter.

    current + weight * (values - base): its step, shortened. Weighting it among the holders instead
    would not do: one that trained a component alone would count in full.
    """

    def __init__(self, values: Adapter, *, base: Adapter, current: Adapter, weight: float) -> None:
        """See above; every tensor is computed when it is asked for."""
        self._values, self._base, self._current = values, base, current
        self._weight = weight

    def __getitem__(self, name: str) -> Array:
        step = self._values[name] - self._base[name]
        rebased: Array = self._current[name] + self._weight * step
        return rebased.astype(self._current[name].dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)
