"""`fedpruner-server`: arguments and nothing else; heavy imports wait until they are needed."""

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="The FedPruner coordinator: keeps the global model, plans a submodel per device, "
    "aggregates what they learn.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _option(key: str, help_text: str) -> Any:
    """A flag that stands for a key of the settings; the default lives in config.py."""
    return typer.Option("--" + key.rpartition(".")[2].replace("_", "-"), help=help_text)


@app.command()
def run(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="TOML file with settings.")
    ] = None,
    model: Annotated[
        Path | None, _option("model", "Hugging Face directory of the base model.")
    ] = None,
    eval_data: Annotated[
        list[Path] | None,
        _option("data.eval_data", "Held-out text to score the adapter on; repeat for more files."),
    ] = None,
    calibration_data: Annotated[
        list[Path] | None,
        _option(
            "data.calibration_data",
            "Public text to measure the layers on; the held-out text if not given.",
        ),
    ] = None,
    state_dir: Annotated[
        Path | None, _option("state_dir", "Where the run lives; start again with it to go on.")
    ] = None,
    listen: Annotated[
        str | None,
        _option("listen", "Address, 127.0.0.1:9092 if not given; port 0 takes a free one."),
    ] = None,
    profile: Annotated[
        str | None,
        _option("profile", "default, paper, or a baseline to compare with; see docs/method.md."),
    ] = None,
    num_rounds: Annotated[int | None, _option("run.num_rounds", "Rounds of the run.")] = None,
    min_available_clients: Annotated[
        int | None, _option("run.min_available_clients", "Devices to wait for before a round.")
    ] = None,
    learning_rate: Annotated[
        float | None, _option("training.learning_rate", "Of the first round.")
    ] = None,
    max_steps: Annotated[
        int | None, _option("training.max_steps", "Optimizer steps per device and round.")
    ] = None,
    granularity: Annotated[
        str | None,
        _option("plan.granularity", "What is pruned: layer (FedPruner) or component (FedPruner+)."),
    ] = None,
    selection: Annotated[
        str | None,
        _option("plan.selection", "Representative of a group: argmax, or sample as in the paper."),
    ] = None,
    seed: Annotated[int | None, _option("run.seed", "Of everything random.")] = None,
    ssl_certfile: Annotated[
        Path | None, _option("ssl_certfile", "Server certificate, PEM.")
    ] = None,
    ssl_keyfile: Annotated[Path | None, _option("ssl_keyfile", "Its private key, PEM.")] = None,
    insecure: Annotated[
        bool | None,
        typer.Option("--insecure", help="No TLS, also on addresses off this machine."),
    ] = None,
    stay: Annotated[
        bool | None, typer.Option("--stay", help="Keep answering after the run is over.")
    ] = None,
    log_level: Annotated[str | None, _option("log_level", "debug, info, warning or error.")] = None,
    log_json: Annotated[bool | None, typer.Option("--log-json", help="Logs as JSON lines.")] = None,
) -> None:
    """Run the coordinator until the run is complete; SIGTERM stops it, the next start goes on.

    Every setting can also stand in the TOML file or the environment (FEDPRUNER_SERVER_...); the
    file docs/configuration.md lists them all.
    """
    flags = {
        "model": model,
        "data.eval": eval_data,
        "data.calibration": calibration_data,
        "state_dir": state_dir,
        "listen": listen,
        "profile": profile,
        "run.num_rounds": num_rounds,
        "run.min_available_clients": min_available_clients,
        "training.learning_rate": learning_rate,
        "training.max_steps": max_steps,
        "plan.granularity": granularity,
        "plan.selection": selection,
        "run.seed": seed,
        "ssl_certfile": ssl_certfile,
        "ssl_keyfile": ssl_keyfile,
        "insecure": insecure,
        "stay": stay,
        "log_level": log_level,
        "log_json": log_json,
    }
    from fedpruner_common import malloc

    malloc.set_for_wire()
    from fedpruner_common import log
    from fedpruner_common.cli import exit_on_error
    from fedpruner_common.config import load
    from fedpruner_server.config import ServerSettings

    with exit_on_error():
        settings = load(ServerSettings, config, flags)
        log.configure(level=settings.log_level, json=settings.log_json)
        from fedpruner_server.app import main as serve

        raise typer.Exit(serve(settings))


@app.command()
def export(
    state_dir: Annotated[Path, typer.Option(help="State directory of the run.")],
    output: Annotated[Path, typer.Option(help="Directory to write.")],
    merged: Annotated[
        bool,
        typer.Option(
            "--merged", help="Fold the adapter into the base model: a plain model directory."
        ),
    ] = False,
    model: Annotated[
        Path | None,
        typer.Option(help="The base model, if it is not where it was during the run."),
    ] = None,
) -> None:
    """Write the newest adapter of a run as a PEFT directory, or merged into the base model."""
    from fedpruner_common.cli import exit_on_error
    from fedpruner_server.export import export_run

    with exit_on_error():
        export_run(state_dir, output, merged=merged, model=model)
        what = "merged model" if merged else "PEFT adapter"
        typer.echo(f"{what} written to {output}")


@app.command()
def version() -> None:
    """Print the version."""
    from fedpruner_common import __version__

    typer.echo(__version__)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
