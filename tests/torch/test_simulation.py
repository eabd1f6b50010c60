"""Simulated runs of a tiny model: what must not make a difference does not, and what must does."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from fedpruner_common.components import ComponentId, Kind
from fedpruner_common.errors import RunFailed
from fedpruner_common.submodel import Submodel
from fedpruner_common.task import BridgeKind
from fedpruner_server.core.planning import Policy
from fedpruner_simulate.fleet import DeviceOptions, SimulationSettings
from fedpruner_simulate.simulation import Simulation, Tools

NUM_LAYERS = 4
Adapter = dict[str, np.ndarray]


class Fleet:
    """Makes simulations that differ from one another by what is given."""

    def __init__(self, folder: Path, model: Path, texts: dict[str, Path], tools: Tools) -> None:
        self._folder, self._model, self._texts, self._tools = folder, model, texts, tools

    def simulation(
        self,
        *num_layers: float,
        evaluated: bool = False,
        tools: Tools | None = None,
        **tables: Any,
    ) -> Simulation:
        """Devices that hold so many layers, the first of them with the text that counts."""
        data = [self._texts["counting-train"], self._texts["letters-train"]]
        values: dict[str, Any] = {
            "model": self._model,
            "lora": {"r": 4},
            "training": {
                "per_device_train_batch_size": 2,
                "max_seq_length": 32,
                "max_steps": 2,
                "learning_rate": 5e-3,
            },
            "run": {"num_rounds": 2},
            "data": {
                "calibration": [self._texts["counting-held_out"]],
                "eval": [self._texts["counting-held_out"]] if evaluated else [],
            },
            "devices": [
                {"name": f"device-{index}", "data": [data[index % 2]], "num_layers": count}
                for index, count in enumerate(num_layers)
            ],
        }
        for name, table in tables.items():
            old = values.get(name, {})
            values[name] = {**old, **table} if isinstance(table, dict) else table
        settings = SimulationSettings(**values)
        return Simulation(settings, self._folder / "work", tools or self._tools)

    def adapter(self, *num_layers: float, **more: Any) -> Adapter:
        """What a whole run ends with."""
        simulation = self.simulation(*num_layers, **more)
        simulation.run()
        return dict(simulation.adapter)

    @cached_property
    def adapter_of_full(self) -> Adapter:
        """What a run ends with whose devices train everything, without any method."""
        return self.adapter(9, 9, profile="full")


@pytest.fixture(scope="module")
def fleet(
    tmp_path_factory: pytest.TempPathFactory, small_model: Path, texts: dict[str, Path]
) -> Fleet:
    return Fleet(tmp_path_factory.mktemp("fleet"), small_model, texts, Tools())


def same_bits(one: Adapter, other: Adapter) -> bool:
    assert one.keys() == other.keys()
    return all(values.tobytes() == other[name].tobytes() for name, values in one.items())


@pytest.mark.parametrize(
    "options",
    [
        *(pytest.param({"plan": {"policy": policy}}, id=policy.value) for policy in Policy),
        pytest.param({"profile": "paper"}, id="paper"),
        pytest.param({"profile": "paper-plus"}, id="paper-plus"),
        pytest.param({"plan": {"grouping": "random", "selection": "sample"}}, id="random-groups"),
        pytest.param({"plan": {"bridge": "lowrank", "bridge_data": "local"}}, id="bridge"),
        pytest.param({"plan": {"streaming": True}}, id="streaming"),
    ],
)
def test_where_every_device_holds_everything_all_methods_are_one(
    fleet: Fleet, options: dict[str, Any]
) -> None:
    # More than all layers: bridges and sweeps are planned for, though nothing is dropped.
    found = fleet.adapter(9, 9, **options)
    assert same_bits(fleet.adapter_of_full, found)
    moved = [np.abs(v).max() > 0 for k, v in found.items() if k.endswith("lora_B")]
    assert len(moved) == 7 * NUM_LAYERS
    assert all(moved)


def test_methods_differ_where_devices_cannot_hold_everything(fleet: Fleet) -> None:
    def adapter(policy: Policy) -> Adapter:
        plan = {"policy": policy, "correction": False}
        return fleet.adapter(4, 2.5, plan=plan, run={"num_rounds": 1})

    full = adapter(Policy.FULL)
    assert not same_bits(full, adapter(Policy.DEPTH))
    assert not same_bits(full, adapter(Policy.EXCLUSIVE))
    assert not same_bits(adapter(Policy.LAST), adapter(Policy.DEPTH))


def test_equal_seeds_give_equal_runs_and_other_seeds_do_not(fleet: Fleet) -> None:
    options = {"profile": "paper", "run": {"num_rounds": 2, "seed": 7}}
    first = fleet.simulation(4, 2.5, evaluated=True, **options)
    results = first.run()
    # In a process that has done nothing else; the first one's tools are warm.
    second = fleet.simulation(4, 2.5, evaluated=True, tools=Tools(), **options)
    again = second.run()
    assert [r.plans for r in results] == [r.plans for r in again]
    assert [r.losses for r in results] == [r.losses for r in again]
    assert same_bits(dict(first.adapter), dict(second.adapter))
    other = fleet.adapter(4, 2.5, profile="paper", run={"num_rounds": 2, "seed": 8})
    assert not same_bits(dict(first.adapter), other)


def test_exclusive_trains_on_those_that_hold_all_and_says_why_not_on_others(fleet: Fleet) -> None:
    simulation = fleet.simulation(2.5, 4, profile="exclusive")
    results = simulation.run()
    for result in results:
        assert result.plans.keys() == result.metrics.keys() == {"device-1"}
        assert result.left_out.keys() == {"device-0"}
        assert "short of all 4 layers" in result.left_out["device-0"]


def test_exclusive_with_nobody_large_enough_fails_with_the_reason(fleet: Fleet) -> None:
    simulation = fleet.simulation(2.5, 3.5, profile="exclusive")
    with pytest.raises(RunFailed, match=r"no device can take part: .* short of all 4 layers"):
        simulation.run()


@pytest.mark.parametrize("profile", ["hetlora", "flexlora"])
@pytest.mark.parametrize(("num_layers", "rank"), [(4, 4), (2.9, 2), (1, 1)])
def test_a_rank_is_to_the_whole_as_the_layers_that_the_device_could_hold(
    fleet: Fleet, profile: str, num_layers: float, rank: int
) -> None:
    simulation = fleet.simulation(num_layers, profile=profile, run={"num_rounds": 1})
    (result,) = simulation.run()
    (plan,) = result.plans.values()
    assert plan.submodel.is_full
    # A layer: q 32+32, k 32+16, v 32+16, o 32+32, gate 32+64, up 32+64, down 64+32 = 512 rows and
    # columns; four layers of them, 4 bytes each, times the rank.
    assert result.bytes_up == 4 * 512 * 4 * rank


def test_a_full_submodel_is_worth_what_the_model_is_whatever_was_asked_before(
    fleet: Fleet,
) -> None:
    simulation = fleet.simulation(4, 2.5, evaluated=True, run={"num_rounds": 1})
    (result,) = simulation.run()
    full = Submodel.full(NUM_LAYERS)
    ends = Submodel.of(NUM_LAYERS, [ComponentId(i, k) for i in (0, 3) for k in Kind])
    assert simulation.submodel_losses(full, BridgeKind.LOWRANK) == result.losses
    dropped = simulation.submodel_losses(ends, BridgeKind.OFF)
    bridged = simulation.submodel_losses(ends, BridgeKind.LOWRANK)
    assert len({*dropped.values(), *bridged.values(), *result.losses.values()}) == 3
    assert simulation.submodel_losses(full, BridgeKind.OFF) == result.losses


@pytest.mark.parametrize("sizes", [{}, {"num_layers": 2, "memory_budget": "4GiB"}])
def test_a_device_says_in_one_way_how_much_it_holds(sizes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="phone: give either memory_budget or num_layers"):
        DeviceOptions(name="phone", data=(), **sizes)


def test_a_budget_that_is_no_size_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ValidationError, match="lots"):
        DeviceOptions(name="phone", data=(), memory_budget="lots")


def test_two_devices_of_one_name_are_refused(small_model: Path) -> None:
    device = {"name": "phone", "data": [], "num_layers": 2}
    with pytest.raises(ValidationError, match="two devices have the name 'phone'"):
        SimulationSettings(model=small_model, devices=[device, device])
