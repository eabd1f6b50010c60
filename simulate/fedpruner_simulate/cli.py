"""`fedpruner simulate`: arguments and nothing else; heavy imports wait until they are needed."""

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Simulate a run with many virtual devices in one process.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
def simulate(
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", "-c", help="TOML file: the coordinator's settings, and [[devices]]."
        ),
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Hugging Face directory.")] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(
            help="A virtual device: its text and what it holds, in layers or in bytes: "
            "mine.jsonl=4 or mine.jsonl=6GiB. Repeat for more."
        ),
    ] = None,
    eval_data: Annotated[list[Path] | None, typer.Option(help="Held-out text; repeat.")] = None,
    calibration_data: Annotated[
        list[Path] | None, typer.Option(help="Public text to measure the layers on.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="default, paper, or a baseline; see docs/method.md.")
    ] = None,
    num_rounds: Annotated[int | None, typer.Option(help="Rounds.")] = None,
    clients_per_round: Annotated[
        int | None, typer.Option(help="Devices per round; 0 for all.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the first round.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps per round.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    threads: Annotated[int | None, typer.Option(help="Of torch; 1 if not given.")] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(help="Gets rounds.jsonl and the adapter; nothing is kept if not given."),
    ] = None,
) -> None:
    """Simulate a run: same plans, same training and same aggregation as over the network.

    The result is that of a real run with the same settings, seeds and number of threads. Every
    setting of the coordinator can stand in the TOML file (docs/configuration.md), and each device
    there is a table [[devices]] with name, data, and num_layers or memory_budget.
    """
    from fedpruner_common.cli import exit_on_error

    flags: dict[str, Any] = {
        "model": model,
        "data.eval": eval_data,
        "data.calibration": calibration_data,
        "profile": profile,
        "run.num_rounds": num_rounds,
        "run.clients_per_round": clients_per_round,
        "training.learning_rate": learning_rate,
        "training.max_steps": max_steps,
        "run.seed": seed,
        "threads": threads,
    }
    with exit_on_error():
        if device:
            flags["devices"] = [_device(index, text) for index, text in enumerate(device)]
        from fedpruner_common.config import load
        from fedpruner_simulate.fleet import SimulationSettings
        from fedpruner_simulate.show import run_and_show

        run_and_show(load(SimulationSettings, config, flags), output_dir)


def _device(index: int, text: str) -> dict[str, Any]:
    """A virtual device from FILE=LAYERS or FILE=BYTES."""
    path, separator, size = text.rpartition("=")
    if not separator:
        raise typer.BadParameter(f"{text!r}: expected FILE=LAYERS or FILE=BYTES")
    device: dict[str, Any] = {"name": f"device-{index}", "data": [path]}
    try:
        device["num_layers"] = float(size)
    except ValueError:
        device["memory_budget"] = size
    return device


def main() -> None:
    app(prog_name="fedpruner simulate")
