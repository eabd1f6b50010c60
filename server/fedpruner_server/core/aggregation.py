"""Client updates -> the new global adapter, tensor by tensor."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Adapter = Mapping[str, Array]


@dataclass(frozen=True)
class ClientUpdate:
    """The trained adapter values of one client.

    Attributes:
        client_id: whose.
        num_examples: its weight.
        tensors: canonical name -> values, of the components of its submodel.
    """

    client_id: str
    num_examples: int
    tensors: Adapter


def aggregate(current: Adapter, updates: Iterable[ClientUpdate]) -> dict[str, Array]:
    """Average each adapter tensor over the clients that trained it.

    A client trains only the components of its own submodel, so each tensor has its own contributors
    and its own denominator. A tensor nobody trained keeps its value. Sums are taken in float64.

    Args:
        current: global adapter, canonical name -> float32 array of any shape.
        updates: one per client, sorted by client (float sums depend on the order). Read once, so it
            may stream from disk.

    Raises:
        ValueError: a name is unknown, a shape differs, or `num_examples` is not positive.

    Source: FedAvg weighting, McMahan et al. 2017, algorithm 1, applied per tensor.
    """
    sums: dict[str, NDArray[np.float64]] = {}
    weights: dict[str, int] = {}
    for update in updates:
        if update.num_examples <= 0:
            raise ValueError(f"{update.client_id}: num_examples is {update.num_examples}")
        for name, values in update.tensors.items():
            if name not in current or values.shape != current[name].shape:
                raise ValueError(f"{update.client_id}: {name} {values.shape} is not in the adapter")
            term = values.astype(np.float64) * update.num_examples
            sums[name] = sums[name] + term if name in sums else term
            weights[name] = weights.get(name, 0) + update.num_examples
    return {
        name: (sums[name] / weights[name]).astype(np.float32) if name in sums else values
        for name, values in current.items()
    }


def initial_adapter(shapes: Mapping[str, tuple[int, int]], *, seed: int) -> dict[str, Array]:
    """The adapter before round 1: A uniform in ±1/sqrt(in_features) as PEFT draws it, B zero.

    Args:
        shapes: canonical name -> shape.
        seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    adapter: dict[str, Array] = {}
    for name, shape in sorted(shapes.items()):
        if name.endswith(".lora_A"):
            bound = 1 / np.sqrt(shape[1])
            adapter[name] = rng.uniform(-bound, bound, shape).astype(np.float32)
        else:
            adapter[name] = np.zeros(shape, dtype=np.float32)
    return adapter
