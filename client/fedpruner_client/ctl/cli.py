"""`fedpruner`: ask a running coordinator, or try everything out on one machine."""

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Federated fine-tuning of language models on devices that cannot hold them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Server = Annotated[str, typer.Option(help="Coordinator's address.", envvar="FEDPRUNER_SERVER")]
Certificates = Annotated[
    Path | None,
    typer.Option(
        help="CA of the coordinator's certificate, PEM.", envvar="FEDPRUNER_ROOT_CERTIFICATES"
    ),
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="No TLS, also to addresses off this machine.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_DEFAULT_SERVER = "127.0.0.1:9092"


def _ask(
    question: str, server: str, certificates: Path | None, insecure: bool, as_json: bool
) -> None:
    """Ask one of the admin calls that take no arguments, and show the answer."""
    from fedpruner_client.ctl.admin import AdminClient
    from fedpruner_common.cli import exit_on_error

    with exit_on_error():
        client = AdminClient(server, root_certificates=certificates, insecure=insecure)
        reply = getattr(client, question)()
        client.close()
        _print(question, reply, as_json)


def _print(view: str, reply: Any, as_json: bool, *arguments: Any) -> None:
    if as_json:
        from google.protobuf.json_format import MessageToDict

        values = MessageToDict(
            reply, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        typer.echo(_json(values))
        return
    from fedpruner_client.ctl import views

    views.show(getattr(views, view)(reply, *arguments))


def _json(values: Any) -> str:
    """Protobuf writes 64-bit numbers as strings; people's tools want numbers."""
    import json

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return int(value) if isinstance(value, str) and value.isdecimal() else value

    return json.dumps(plain(values), indent=2)


@app.command()
def status(
    server: Server = _DEFAULT_SERVER,
    root_certificates: Certificates = None,
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """What the run is doing, and why."""
    _ask("status", server, root_certificates, insecure, as_json)


@app.command()
def devices(
    server: Server = _DEFAULT_SERVER,
    root_certificates: Certificates = None,
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Every device: what it offers, what it holds, what it is doing."""
    _ask("devices", server, root_certificates, insecure, as_json)


@app.command()
def rounds(
    server: Server = _DEFAULT_SERVER,
    root_certificates: Certificates = None,
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Every round so far."""
    _ask("rounds", server, root_certificates, insecure, as_json)


@app.command()
def plan(
    memory: Annotated[str | None, typer.Option(help="A device's budget, e.g. 6GiB.")] = None,
    floor: Annotated[
        str, typer.Option(help="What its training process needs before any model.")
    ] = "400MiB",
    server: Server = _DEFAULT_SERVER,
    root_certificates: Certificates = None,
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Dry run: what a device with so much memory would hold, and what each size costs."""
    from fedpruner_client.ctl.admin import AdminClient
    from fedpruner_common.cli import exit_on_error
    from fedpruner_common.units import parse_bytes

    with exit_on_error():
        try:
            budget, floor_bytes = parse_bytes(memory or 0), parse_bytes(floor)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        client = AdminClient(server, root_certificates=root_certificates, insecure=insecure)
        reply = client.plan(memory_budget_bytes=budget, floor_bytes=floor_bytes)
        client.close()
        _print("plan", reply, as_json, budget)


@app.command()
def demo(
    model: Annotated[
        Path | None,
        typer.Option(help="Hugging Face directory; the built-in small model if not given."),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="JSONL or text; several files are one device each, one file is dealt out."
        ),
    ] = None,
    num_rounds: Annotated[int, typer.Option(help="Rounds.")] = 10,
    max_steps: Annotated[int, typer.Option(help="Optimizer steps per device and round.")] = 3,
    batch_size: Annotated[int, typer.Option(help="Sequences per step.")] = 16,
    max_seq_length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 256,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Of the first round; 5e-3 for the built-in model, else 1e-3."),
    ] = None,
    granularity: Annotated[
        str, typer.Option(help="layer (FedPruner) or component (FedPruner+).")
    ] = "layer",
    selection: Annotated[str, typer.Option(help="argmax, or sample as in the paper.")] = "argmax",
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder of the run; runs/demo-<time> if not given.")
    ] = None,
) -> None:
    """One coordinator and four agents with different memory budgets, on this machine, offline."""
    from fedpruner_client.ctl.demo.run import DemoOptions, run_demo
    from fedpruner_common.cli import exit_on_error

    with exit_on_error():
        options = DemoOptions(
            model=model,
            data=tuple(data or ()),
            num_rounds=num_rounds,
            max_steps=max_steps,
            batch_size=batch_size,
            max_seq_length=max_seq_length,
            learning_rate=learning_rate or (1e-3 if model else 5e-3),
            granularity=granularity,
            selection=selection,
            seed=seed,
            output_dir=output_dir,
        )
        raise typer.Exit(run_demo(options))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def simulate(context: typer.Context) -> None:
    """Many virtual devices in one process; `fedpruner simulate --help` tells more."""
    import os
    import sys

    # A program of its own: it needs both the coordinator's and the agent's parts.
    arguments = [sys.executable, "-m", "fedpruner_simulate", *context.args]
    os.execv(sys.executable, arguments)


@app.command()
def version() -> None:
    """Print the version."""
    from fedpruner_common import __version__

    typer.echo(__version__)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
