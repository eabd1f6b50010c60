"""`fedpruner-agent`: arguments and nothing else; heavy imports wait until they are needed."""

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="The FedPruner agent: trains the part of a large model that fits this device, on data "
    "that never leaves it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _option(key: str, help_text: str) -> Any:
    """A flag that stands for a key of the settings; the default lives in config.py."""
    return typer.Option("--" + key.replace("_", "-"), help=help_text)


@app.command()
def run(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="TOML file with settings.")
    ] = None,
    server: Annotated[
        str | None, _option("server", "Coordinator's address, 127.0.0.1:9092 if not given.")
    ] = None,
    data: Annotated[
        list[Path] | None,
        _option("data", "Local training data, .jsonl or text; repeat for more files."),
    ] = None,
    name: Annotated[
        str | None,
        _option("name", "This device's name in the federation; the host's if not given."),
    ] = None,
    state_dir: Annotated[Path | None, _option("state_dir", "Cache and logs.")] = None,
    memory_budget: Annotated[
        str | None,
        _option(
            "memory_budget", "Most memory training may use, e.g. 6GiB; what is free if not given."
        ),
    ] = None,
    memory_reserve: Annotated[
        str | None,
        _option("memory_reserve", "Free memory to leave to others, 256MiB if not given."),
    ] = None,
    device: Annotated[str | None, _option("device", "auto, cpu or cuda.")] = None,
    num_threads: Annotated[
        int | None, _option("num_threads", "CPU threads for training; 0 for all cores.")
    ] = None,
    root_certificates: Annotated[
        Path | None, _option("root_certificates", "CA of the coordinator's certificate, PEM.")
    ] = None,
    insecure: Annotated[
        bool | None,
        typer.Option("--insecure", help="No TLS, also to addresses off this machine."),
    ] = None,
    max_retries: Annotated[
        int | None,
        _option("max_retries", "Give up after so many failed calls; never if not given."),
    ] = None,
    max_wait_time: Annotated[
        float | None, _option("max_wait_time", "Longest pause between retries, seconds.")
    ] = None,
    stay: Annotated[
        bool | None, typer.Option("--stay", help="Wait for the next run after this one.")
    ] = None,
    log_level: Annotated[str | None, _option("log_level", "debug, info, warning or error.")] = None,
    log_json: Annotated[bool | None, typer.Option("--log-json", help="Logs as JSON lines.")] = None,
) -> None:
    """Take part in a run until it is over; SIGTERM stops.

    Every setting can also stand in the TOML file or the environment (FEDPRUNER_AGENT_...); the
    file docs/configuration.md lists them all.
    """
    flags = {
        "server": server,
        "data": data,
        "name": name,
        "state_dir": state_dir,
        "memory_budget": memory_budget,
        "memory_reserve": memory_reserve,
        "device": device,
        "num_threads": num_threads,
        "root_certificates": root_certificates,
        "insecure": insecure,
        "max_retries": max_retries,
        "max_wait_time": max_wait_time,
        "stay": stay,
        "log_level": log_level,
        "log_json": log_json,
    }
    from fedpruner_common import malloc

    malloc.set_for_wire()
    from fedpruner_client.config import AgentSettings
    from fedpruner_common import log
    from fedpruner_common.cli import exit_on_error
    from fedpruner_common.config import load

    with exit_on_error():
        settings = load(AgentSettings, config, flags)
        log.configure(level=settings.log_level, json=settings.log_json)
        from fedpruner_client.agent import Agent

        raise typer.Exit(Agent(settings).run())


@app.command()
def version() -> None:
    """Print the version."""
    from fedpruner_common import __version__

    typer.echo(__version__)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
