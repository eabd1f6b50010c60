"""A simulation for people: a line per round while it runs, and a summary."""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from fedpruner_common.errors import ConfigError
from fedpruner_common.units import format_bytes
from fedpruner_simulate.fleet import SimulationSettings
from fedpruner_simulate.simulation import RoundResult, Simulation


def run_and_show(settings: SimulationSettings, output_dir: Path | None) -> None:
    """Simulate, telling of every round.

    Raises:
        FedPrunerError: the simulation cannot run; the message says why.
    """
    console = Console(highlight=False)
    if output_dir is not None and output_dir.exists() and any(output_dir.iterdir()):
        raise ConfigError(f"{output_dir} is not empty; nothing was simulated")
    with tempfile.TemporaryDirectory(prefix="fedpruner-simulate-") as folder:
        console.print(f"reading {settings.model}, measuring {len(settings.devices)} devices")
        try:
            simulation = Simulation(settings, Path(folder) / "work")
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if simulation.losses_base:
            console.print(f"base model: loss {_mean(simulation.losses_base):.4f}")
        total = settings.run.num_rounds

        def tell(result: RoundResult) -> None:
            console.print(_line(result, total))
            if output_dir is not None:
                output_dir.mkdir(parents=True, exist_ok=True)
                with (output_dir / "rounds.jsonl").open("a") as file:
                    file.write(json.dumps(_row(result)) + "\n")

        results = simulation.run(tell)
        console.print(_summary(results, simulation.losses_base))
        if output_dir is not None:
            simulation.export(output_dir / "adapter")
            console.print(f"adapter: {output_dir / 'adapter'}  (loads with plain PEFT)")


def _line(result: RoundResult, total: int) -> str:
    loss = "" if result.loss is None else f"  loss {result.loss:.4f}"
    lines = [f"round {result.number}/{total}{loss}  {result.seconds:.1f} s"]
    for client_id, plan in result.plans.items():
        metrics = result.metrics[client_id]
        how = "corrected" if plan.bridge.corrected else plan.bridge.kind.value
        if plan.streamed:
            how = f"{len(plan.streamed)} layers streamed"
        elif plan.submodel.is_full:
            how = "full"
        lines.append(
            f"  {client_id}  {plan.submodel.picture()}  {how}  train loss "
            f"{metrics.train_loss_first:.3f} -> {metrics.train_loss_last:.3f}"
        )
    lines += [f"  {client_id}  left out: {why}" for client_id, why in result.left_out.items()]
    return "\n".join(lines)


def _row(result: RoundResult) -> dict[str, object]:
    return {
        "round": result.number,
        "loss": result.loss,
        "losses": dict(result.losses),
        "bytes_up": result.bytes_up,
        "seconds": round(result.seconds, 3),
        "left_out": dict(result.left_out),
        "clients": {
            client_id: {
                "components": [str(component) for component in plan.submodel.components],
                "corrected": plan.bridge.corrected,
                "streamed": list(plan.streamed),
                "predicted_peak_bytes": plan.predicted_peak_bytes,
                **asdict(result.metrics[client_id]),
            }
            for client_id, plan in result.plans.items()
        },
    }


def _summary(results: list[RoundResult], losses_base: dict[str, float]) -> str:
    text = f"uploaded {format_bytes(sum(result.bytes_up for result in results))} in all"
    last = results[-1]
    if last.loss is None:
        return text
    rows = [
        f"  {name}: {losses_base[name]:.4f} -> {loss:.4f}" for name, loss in last.losses.items()
    ]
    return "\n".join([f"loss {_mean(losses_base):.4f} -> {last.loss:.4f}", *rows, text])


def _mean(losses: dict[str, float]) -> float:
    return sum(losses.values()) / len(losses)
