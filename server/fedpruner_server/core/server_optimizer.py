"""The step from the global adapter towards what the clients brought, tensor by tensor.

Source: Reddi et al. 2021 (Adaptive Federated Optimization), algorithm 2; Hsu et al. 2019 (server
momentum).
"""

import math
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray


class ServerOptimizer(str, Enum):
    """How the server turns aggregated values into the next global ones."""

    FEDAVG = "fedavg"
    MOMENTUM = "momentum"
    FEDADAM = "fedadam"


@dataclass(frozen=True)
class ServerOptimizerSettings:
    """Of one optimizer; the defaults take the aggregated values as they are.

    Attributes:
        optimizer: which.
        learning_rate: eta. FedAdam's steps are about this long whatever the clients brought, so it
            wants values such as 1e-2; the others want about 1.
        momentum: share of the last step that MOMENTUM keeps.
        beta1: decay of FEDADAM's first moment.
        beta2: decay of FEDADAM's second moment.
        tau: FEDADAM's adaptivity: added to the root of the second moment, which starts at tau^2.

    Raises:
        ValueError: a number is out of its range.
    """

    optimizer: ServerOptimizer = ServerOptimizer.FEDAVG
    learning_rate: float = 1.0
    momentum: float = 0.9
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        object.__setattr__(self, "optimizer", ServerOptimizer(self.optimizer))
        for name in ("learning_rate", "tau"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}, expected a positive number")
        for name in ("momentum", "beta1", "beta2"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"{name} is {value}, expected at least 0 and below 1")


@dataclass(frozen=True)
class Moments:
    """What an optimizer remembers of one tensor; None before its first step.

    Attributes:
        first: momentum, or FedAdam's m; shape of the tensor.
        second: FedAdam's v; shape of the tensor.
    """

    first: NDArray[np.float64] | None = None
    second: NDArray[np.float64] | None = None


def server_step(
    current: NDArray[np.float32],
    aggregated: NDArray[np.float32],
    moments: Moments,
    *,
    settings: ServerOptimizerSettings,
    scale: float = 1.0,
) -> tuple[NDArray[np.float32], Moments]:
    """One tensor's next global values, and what to remember of it.

    Args:
        current: global values before the round.
        aggregated: what the clients of the round agree on; same shape.
        moments: what the last step of this tensor returned.
        settings: of the optimizer.
        scale: factor on the step, for tensors that few clients trained.

    Returns:
        New values, float32: `aggregated` itself where the step goes all the way; and the moments.
    """
    rate = settings.learning_rate * scale
    if settings.optimizer is ServerOptimizer.FEDAVG and rate == 1.0:
        return aggregated, moments  # current + (aggregated - current) would lose the last bit
    before = current.astype(np.float64)
    direction, moments = _direction(aggregated - before, moments, settings)
    return (before + rate * direction).astype(np.float32), moments


def _direction(
    delta: NDArray[np.float64], moments: Moments, settings: ServerOptimizerSettings
) -> tuple[NDArray[np.float64], Moments]:
    """Where to go, before the learning rate; the moments after it."""
    if settings.optimizer is ServerOptimizer.FEDAVG:
        return delta, moments
    first = np.zeros_like(delta) if moments.first is None else moments.first
    if settings.optimizer is ServerOptimizer.MOMENTUM:
        first = settings.momentum * first + delta
        return first, Moments(first, moments.second)
    second = np.full_like(delta, settings.tau**2) if moments.second is None else moments.second
    first = settings.beta1 * first + (1 - settings.beta1) * delta
    second = settings.beta2 * second + (1 - settings.beta2) * delta**2
    return first / (np.sqrt(second) + settings.tau), Moments(first, second)
