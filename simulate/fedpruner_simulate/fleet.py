"""The virtual devices of a simulation, and its settings."""

import math
from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveFloat, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from fedpruner_common.config import Section
from fedpruner_common.spec import ModelSpec
from fedpruner_common.statistics import Granularity
from fedpruner_common.units import parse_bytes
from fedpruner_server.config import ServerSettings
from fedpruner_server.core.planning import Offer, PlanSettings, peak_of_sizes

FLOOR_BYTES = 400 << 20  # of a training process; the same for all, so only differences matter


class DeviceOptions(Section):
    """One virtual device; `memory_budget` or `num_layers` says how much it holds.

    A device of 3.5 layers has the memory half way between what 3 and 4 whole layers take to train,
    without any bridge.
    """

    name: str
    data: tuple[Path, ...]
    memory_budget: str | None = None
    num_layers: PositiveFloat | None = None

    @field_validator("memory_budget")
    @classmethod
    def _is_a_size(cls, value: str | None) -> str | None:
        if value is not None:
            parse_bytes(value)
        return value

    @model_validator(mode="after")
    def _says_it_once(self) -> "DeviceOptions":
        if (self.memory_budget is None) == (self.num_layers is None):
            raise ValueError(f"device {self.name}: give either memory_budget or num_layers")
        return self


class SimulationSettings(ServerSettings):
    """A coordinator's settings and a fleet; the network's settings have no meaning here."""

    model_config = SettingsConfigDict(env_prefix="FEDPRUNER_SIMULATE_")

    devices: Annotated[tuple[DeviceOptions, ...], Field(min_length=1)]
    threads: Annotated[int, Field(ge=1)] = 1

    @field_validator("devices")
    @classmethod
    def _names_differ(cls, value: tuple[DeviceOptions, ...]) -> tuple[DeviceOptions, ...]:
        names = [device.name for device in value]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two devices have the name {min(twice)!r}")
        return value


def offer_of(device: DeviceOptions, spec: ModelSpec, *, margin: float) -> Offer:
    """What a virtual device brings, so that `num_layers` is what is left beside the margin."""
    if device.memory_budget is not None:
        return Offer(device.name, parse_bytes(device.memory_budget), FLOOR_BYTES)
    assert device.num_layers is not None
    usable = _budget_bytes(spec, device.num_layers)
    return Offer(device.name, math.ceil(usable / (1 - margin)), FLOOR_BYTES)


def _budget_bytes(spec: ModelSpec, num_layers: float) -> int:
    """Memory that training so many whole layers takes, between two counts in proportion."""
    plain = PlanSettings(
        granularity=Granularity.LAYER, sample=False, protect=(), margin=0.0, seed=0
    )

    def cost(count: int) -> int:
        (family,) = plain.granularity.families
        return peak_of_sizes(spec, plain, {family: count}, floor_bytes=FLOOR_BYTES)

    low = min(int(num_layers), spec.num_layers)
    high = min(low + 1, spec.num_layers)
    step = cost(high) - cost(low) if high > low else cost(low) - cost(low - 1)
    return cost(low) + int((num_layers - low) * step)
