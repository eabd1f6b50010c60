"""What is simulated is what runs: the same settings end with the same adapter, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
from federation import (
    Federation,
    Start,
    assert_equal_bits,
    budget_like,
    measured_floor,
    wait_for_all,
)
from programs import address_of, server_config
from safetensors.numpy import load_file

from fedpruner_common.config import load
from fedpruner_simulate.fleet import SimulationSettings
from fedpruner_simulate.simulation import RoundResult, Simulation

# A simulation has torch in this process; see tests/torch/conftest.py.
# Batch and sequence large enough that half a layer is more than the floor's own variation.
_TRAINING = {"per_device_train_batch_size": 16, "max_seq_length": 256}

# Everything that has a state or a file of its own: statistics of each device, drawn halves, public
# bridges, sweeps, residuals, moments, and a cohort that changes.
_PARTS = {
    "plan": {
        "granularity": "component",
        "selection": "sample",
        "statistics": "device",
        "statistics_every": 2,
        "bridge": "lowrank",
        "bridge_rank": 4,
        "correction": True,
    },
    "aggregation": {
        "method": "anchor",
        "error_feedback": True,
        "server_optimizer": "fedadam",
        "server_learning_rate": 0.01,
    },
    "run": {"clients_per_round": 2, "min_available_clients": 3, "seed": 3},
}


@pytest.mark.parametrize(
    ("options", "num_layers"),
    [
        pytest.param({}, {"big": 4.5, "small": 2.5}, id="default"),
        pytest.param(_PARTS, {"big": 5.0, "middle": 3.77, "small": 2.7}, id="parts"),
    ],
)
def test_a_simulation_ends_with_the_adapter_of_a_run_over_grpc(
    start: Start,
    tmp_path: Path,
    small_model: Path,
    texts: dict[str, Path],
    options: dict[str, Any],
    num_layers: dict[str, float],
) -> None:
    data = {
        "big": [texts["counting-train"]],
        "middle": [texts["letters-train"], texts["counting-held_out"]],
        "small": [texts["letters-train"]],
    }
    config = server_config(
        tmp_path / "server.toml", small_model, texts, **{"training": _TRAINING, **options}
    )
    devices = [{"name": n, "data": data[n], "num_layers": k} for n, k in num_layers.items()]
    settings = load(SimulationSettings, config, {"devices": devices, "threads": 1})
    simulation = Simulation(settings, tmp_path / "simulation")
    simulated = simulation.run()
    simulation.export(tmp_path / "simulated")

    federation = Federation(start, tmp_path)
    floor = measured_floor(tmp_path)
    server = federation.server(config)
    address = address_of(server)
    agents = [
        federation.agent(
            address, name, *data[name], budget=budget_like(simulation.offers[name], floor)
        )
        for name in num_layers
    ]
    wait_for_all(server, *agents)

    assert _plans_of_rows(federation) == _plans(simulated)
    assert any(not p.submodel.is_full for r in simulated for p in r.plans.values())
    losses = [row["eval_losses"] for row in federation.rows("round")]
    assert [result.losses for result in simulated] == losses
    (run,) = federation.rows("run")
    assert simulation.losses_base == run["losses_base"]
    of_simulation = load_file(tmp_path / "simulated/adapter_model.safetensors")
    assert_equal_bits(of_simulation, federation.adapter())


def _plans_of_rows(federation: Federation) -> dict[tuple[int, str], tuple[list[str], bool]]:
    return {
        (row["round"], row["client_id"]): (row["components"], row["corrected"])
        for row in federation.rows("client")
    }


def _plans(results: list[RoundResult]) -> dict[tuple[int, str], tuple[list[str], bool]]:
    return {
        (result.number, name): (list(map(str, plan.submodel.components)), plan.bridge.corrected)
        for result in results
        for name, plan in result.plans.items()
    }
