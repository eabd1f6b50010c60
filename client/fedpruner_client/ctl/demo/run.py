"""The demo from start to end: data, coordinator, agents with binding budgets, results."""

import json
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fedpruner_client.config import AgentSettings
from fedpruner_client.ctl.admin import AdminClient
from fedpruner_client.ctl.demo import domains
from fedpruner_client.ctl.demo.display import Display
from fedpruner_client.ctl.demo.fleet import Fleet, Member
from fedpruner_client.ctl.demo.summary import closed_rounds, read_summary, show_summary
from fedpruner_client.ctl.demo.userdata import split_user_data
from fedpruner_client.trainer import Trainer
from fedpruner_common.errors import FedPrunerError, Unavailable
from fedpruner_common.interrupt import Stopped, raise_on_signals
from fedpruner_common.pb import admin_pb2 as pb
from fedpruner_common.units import format_bytes

BASE_MODEL_DIR = Path(__file__).parent / "base_model"

# What part of the model each device holds: everything down to a quarter.
_SHARES = (1.0, 2 / 3, 5 / 12, 1 / 4)
_NAMES = ("workstation", "laptop", "jetson", "phone")
_POLL_S = 0.4
_SPARE_BYTES = 4 << 20  # the floor differs a little from process to process


@dataclass(frozen=True)
class DemoOptions:
    """What the command line says; see `fedpruner demo --help`."""

    model: Path | None
    data: tuple[Path, ...]
    num_rounds: int
    max_steps: int
    batch_size: int
    max_seq_length: int
    learning_rate: float
    granularity: str
    selection: str
    seed: int
    output_dir: Path | None


@dataclass(frozen=True)
class LocalData:
    """The demo's text, by who may see it.

    Attributes:
        private: one training file per device.
        held_out: what the coordinator evaluates on.
        public: what it measures the layers on.
    """

    private: tuple[Path, ...]
    held_out: tuple[Path, ...]
    public: Path


def run_demo(options: DemoOptions) -> int:
    """Run the demo; returns the exit code.

    Raises:
        FedPrunerError: a part of it failed; the message has the end of that part's log.
    """
    console = Console()
    run_dir = options.output_dir or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    run_dir = run_dir.resolve()
    if run_dir.exists() and any(run_dir.iterdir()):
        raise FedPrunerError(f"{run_dir} is not empty: give another --output-dir")
    run_dir.mkdir(parents=True, exist_ok=True)
    raise_on_signals()
    try:
        with Fleet(run_dir / "logs") as fleet:
            _run(options, run_dir, fleet, console)
    except Stopped:
        console.print(f"stopped; everything up to here is in {run_dir}")
        return 130
    return 0


def _run(options: DemoOptions, run_dir: Path, fleet: Fleet, console: Console) -> None:
    console.print("making the devices' private text")
    data = _prepare_data(options, run_dir / "data")
    names = _device_names(len(data.private))
    server, address = fleet.start_server(_server_config(options, run_dir, data))
    admin = AdminClient(address)
    console.print("measuring what a training process needs before any model")
    floor_bytes = _measure_floor(run_dir)
    console.print("measuring how alike the model's layers are and what each one is worth")
    budgets = _budgets(admin, fleet, len(names), floor_bytes)
    for name, file, budget in zip(names, data.private, budgets, strict=True):
        console.print(f"  {name}: {format_bytes(budget)}, trains on {file.stem}")
        fleet.start(
            name,
            "fedpruner_client.cli",
            "run",
            *("--server", address),
            *("--name", name),
            *("--data", str(file)),
            *("--memory-budget", str(budget)),
            *("--state-dir", str(run_dir / "agents" / name)),
            *("--num-threads", "1"),
            *("--device", "cpu"),
        )
    _watch(admin, fleet, server, run_dir / "server", Display(console, options.num_rounds))
    admin.close()
    summary = read_summary(run_dir / "server", budgets=dict(zip(names, budgets, strict=True)))
    path = run_dir / "summary.json"
    path.write_text(json.dumps(summary, indent=2) + "\n")
    show_summary(summary, console)
    # Plain print: the last line is for scripts and must not be wrapped.
    print(path)


def _prepare_data(options: DemoOptions, folder: Path) -> LocalData:
    if options.data:
        pairs = split_user_data(options.data, folder, num_parts=len(_SHARES))
    else:
        pairs = [domains.write_domain(name, folder) for name in domains.DOMAINS]
    private, held_out = zip(*pairs, strict=True)
    if options.model and options.data:
        public = held_out[0]  # the only other text that the coordinator may see
    else:
        public = domains.write_public_text(folder / "public.jsonl")
    return LocalData(private, held_out, public)


def _device_names(count: int) -> tuple[str, ...]:
    if count == len(_NAMES):
        return _NAMES
    return tuple(f"device-{number + 1}" for number in range(count))


def _server_config(options: DemoOptions, run_dir: Path, data: LocalData) -> Path:
    """The coordinator's TOML file, which doubles as an example of one."""
    tables: dict[str, dict[str, Any]] = {
        "": {
            "model": str((options.model or BASE_MODEL_DIR).resolve()),
            "state_dir": str(run_dir / "server"),
            "listen": "127.0.0.1:0",
        },
        "lora": {"r": 8, "lora_alpha": 16},
        "training": {
            "per_device_train_batch_size": options.batch_size,
            "max_seq_length": options.max_seq_length,
            "max_steps": options.max_steps,
            "learning_rate": options.learning_rate,
        },
        "plan": {"granularity": options.granularity, "selection": options.selection},
        "run": {
            "num_rounds": options.num_rounds,
            "min_available_clients": len(data.private),
            "save_every": 5,
            "seed": options.seed,
        },
        "data": {
            "calibration": [str(data.public)],
            "eval": [str(path) for path in data.held_out],
            "max_eval_sequences": 16,
        },
    }
    lines = []
    for table, values in tables.items():
        lines += [f"[{table}]"] if table else []
        # JSON strings, numbers and lists are TOML's too.
        lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    path = run_dir / "server.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def _measure_floor(run_dir: Path) -> int:
    """What every agent will measure for itself; needed here to choose budgets that bind."""
    settings = AgentSettings(
        data=[run_dir], state_dir=run_dir / "agents" / "floor", device="cpu", num_threads=1
    )
    trainer = Trainer(settings)
    try:
        return trainer.measure().floor_bytes
    finally:
        trainer.close()


def _budgets(admin: AdminClient, fleet: Fleet, count: int, floor_bytes: int) -> list[int]:
    """One budget per device: from just enough for the whole model to a quarter of it."""
    reply = _plan_table(admin, fleet, floor_bytes)
    rows = list(reply.rows)
    smallest, largest = rows[0].num_kept, rows[-1].num_kept
    shares = _SHARES if count == len(_SHARES) else _evenly(count)
    budgets = []
    for share in shares:
        num_kept = max(smallest, round(share * largest))
        peak = rows[num_kept - smallest].predicted_peak_bytes
        budgets.append(int(peak / (1 - reply.margin)) + _SPARE_BYTES)
    return budgets


def _evenly(count: int) -> list[float]:
    """Shares from the whole model down to a quarter in equal steps."""
    return [1 - 0.75 * index / max(1, count - 1) for index in range(count)]


def _plan_table(admin: AdminClient, fleet: Fleet, floor_bytes: int) -> pb.PlanReply:
    while True:
        fleet.check()
        try:
            return admin.plan(memory_budget_bytes=0, floor_bytes=floor_bytes)
        except Unavailable:  # still preparing
            time.sleep(_POLL_S)


def _watch(
    admin: AdminClient, fleet: Fleet, server: Member, state_dir: Path, display: Display
) -> None:
    """Show progress until the coordinator has ended."""
    with display:
        while server.process.poll() is None:
            fleet.check()
            with suppress(Unavailable):  # it is just ending
                display.update(admin.status(), admin.devices())
            display.closed(closed_rounds(state_dir))
            time.sleep(_POLL_S)
        fleet.check()
        display.closed(closed_rounds(state_dir))
