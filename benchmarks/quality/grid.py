"""One simulated run of the grid, as a record."""

import json
import platform
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality.domains import Domain
from benchmarks.quality.methods import ALL
from fedpruner_common.components import Kind
from fedpruner_common.submodel import Submodel
from fedpruner_common.task import BridgeKind
from fedpruner_server.core.planning import ClientPlan
from fedpruner_simulate.fleet import SimulationSettings
from fedpruner_simulate.simulation import RoundResult, Simulation, Tools

# Layers, of 12, that each of the ten devices has memory for; half a layer is left over.
BUDGETS = {
    "sev": (3, 3, 3, 3, 4, 4, 4, 6, 6, 6),  # nobody holds more than half the model
    "mod": (4, 4, 6, 6, 6, 8, 8, 9, 10, 12),  # one device holds all of it
}
_DEPLOYED = {"sev": (3, 6), "mod": (4, 9)}
_TOOLS = Tools()  # tokenised text, the evaluation model: the same for all runs of a process


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


_COMMIT = _commit()  # of the code that this process has read, whatever is committed meanwhile


@dataclass(frozen=True)
class Cell:
    """Which run: everything random depends on the seed alone, not on the method."""

    method: str
    budgets: str
    seed: int
    learning_rate: float

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Shape:
    """What all runs of a grid have in common."""

    model: Path
    num_layers: int
    num_rounds: int = 8
    clients_per_round: int = 4
    max_steps: int = 8
    batch_size: int = 8
    seq_length: int = 64
    rank: int = 4


def settings_of(cell: Cell, shape: Shape, domain: Domain) -> SimulationSettings:
    """The settings of a run."""
    method = ALL[cell.method]
    scale = shape.num_layers / 12
    devices = []
    for index, layers in enumerate(BUDGETS[cell.budgets]):
        size = shape.num_layers if method.unlimited else layers * scale
        devices.append(
            {
                "name": f"client-{index}",
                "data": [domain.train[index]],
                "num_layers": size + 0.5,
            }
        )
    tables: dict[str, Any] = {
        "training": {
            "per_device_train_batch_size": shape.batch_size,
            "max_steps": shape.max_steps,
            "max_seq_length": shape.seq_length,
            "learning_rate": cell.learning_rate,
        },
        "lora": {"r": shape.rank, "lora_alpha": 2 * shape.rank},
        "run": {
            "num_rounds": shape.num_rounds,
            "clients_per_round": shape.clients_per_round,
            "evaluate_every": shape.num_rounds,
            "seed": cell.seed,
        },
        "data": {
            "calibration": [domain.public],
            "eval": domain.eval,
            "max_eval_sequences": 32,
            "num_calibration_sequences": 8,
            "num_bridge_sequences": 64,
        },
    }
    for table, options in method.options.items():
        tables[table] = {**tables.get(table, {}), **options}
    return SimulationSettings(model=shape.model, profile=method.profile, devices=devices, **tables)


def run_cell(cell: Cell, shape: Shape, domain: Domain, work_dir: Path) -> dict[str, Any]:
    """Simulate one run; returns its record."""
    started = time.monotonic()
    simulation = Simulation(settings_of(cell, shape, domain), work_dir, _TOOLS)
    results = simulation.run()
    num_layers = simulation.spec.num_layers
    plans = [plan for result in results for plan in result.plans.values()]
    loss_base = _mean(simulation.losses_base)
    deployed = {
        str(size): _deployed(simulation, results, round(size * num_layers / 12))
        for size in _DEPLOYED[cell.budgets]
    }
    return {
        **asdict(cell),
        "domain": domain.name,
        "model": shape.model.name,
        "shape": {k: v for k, v in asdict(shape).items() if k != "model"},
        "loss_base": loss_base,
        "loss": results[-1].loss if plans else loss_base,
        "losses": results[-1].losses,
        "submodel_losses": deployed,
        "bytes_up": sum(result.bytes_up for result in results),
        "layer_tokens": sum(result.layer_tokens for result in results),
        "tasks": len(plans),
        "left_out": sum(len(result.left_out) for result in results),
        "peak_bytes": max((plan.predicted_peak_bytes for plan in plans), default=0),
        "mean_components": sum(len(p.submodel.components) for p in plans) / max(1, len(plans)),
        "coverage": _coverage(plans, num_layers),
        "seconds": round(time.monotonic() - started, 1),
        "commit": _COMMIT,
        "machine": f"{platform.machine()} {platform.python_version()}",
    }


def _deployed(
    simulation: Simulation, results: list[RoundResult], num_layers: int
) -> dict[str, Any]:
    """Loss of the submodel that a device of so many layers would use, without and with bridges."""
    spec = simulation.spec
    of_size = [
        plan.submodel
        for result in reversed(results)
        for plan in result.plans.values()
        if len(plan.submodel.components) == 2 * num_layers
    ]
    # Methods that never planned that size leave the device the same layers: spread over the depth.
    spread = {round(i * (spec.num_layers - 1) / max(1, num_layers - 1)) for i in range(num_layers)}
    fallback = Submodel.of(
        spec.num_layers, [c for c in spec.full().components if c.layer in spread]
    )
    submodel = of_size[0] if of_size else fallback
    return {
        "plain": _mean(simulation.submodel_losses(submodel, BridgeKind.OFF)),
        "bridged": _mean(simulation.submodel_losses(submodel, BridgeKind.LOWRANK)),
        "planned": bool(of_size),
    }


def _coverage(plans: list[ClientPlan], num_layers: int) -> list[int]:
    """How often each layer's attention was trained."""
    counts = [0] * num_layers
    for plan in plans:
        for component in plan.submodel.components:
            counts[component.layer] += component.kind is Kind.ATTENTION
    return counts


def _mean(losses: dict[str, float]) -> float:
    return sum(losses.values()) / len(losses)
