"""The results of a run, from the files it left: for summary.json and for people."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedpruner_client.ctl.views import picture
from fedpruner_common.units import format_bytes

Json = dict[str, Any]


def read_metrics(state_dir: Path) -> list[Json]:
    """The lines of the coordinator's metrics.jsonl; none before the first round has closed."""
    path = state_dir / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def closed_rounds(state_dir: Path) -> list[Json]:
    """The rounds that have closed so far."""
    return [row for row in read_metrics(state_dir) if row["type"] == "round"]


def read_summary(state_dir: Path, *, budgets: dict[str, int]) -> Json:
    """The facts of a finished run.

    Args:
        state_dir: of the coordinator; its metrics.jsonl is the source of everything.
        budgets: device -> bytes it offered.
    """
    rows = read_metrics(state_dir)
    (run,) = [row for row in rows if row["type"] == "run"]
    clients = [row for row in rows if row["type"] == "client"]
    devices = []
    for name, budget in budgets.items():
        mine = [row for row in clients if row["client_id"] == name]
        measured = [row["measured_peak_bytes"] for row in mine if "measured_peak_bytes" in row]
        devices.append(
            {
                "name": name,
                "budget_bytes": budget,
                "predicted_peak_bytes": max(row["predicted_peak_bytes"] for row in mine),
                "measured_peak_bytes": max(measured, default=0),
                "components": mine[-1]["components"],
                "num_components_total": run["num_components_total"],
                "bytes_down": [row["base_bytes_down"] + row["adapter_bytes_down"] for row in mine],
                "base_bytes_down": [row["base_bytes_down"] for row in mine],
                "bytes_up": [row["bytes_up"] for row in mine],
            }
        )
    return {
        "loss_base": run["loss_base"],
        "loss_final": run["loss_final"],
        "losses_base": run["losses_base"],
        "losses_final": run["losses_final"],
        "rounds": run["rounds"],
        "adapter_dir": run["adapter_dir"],
        "model_dir": run["model"],
        "loss_by_round": [row["eval_loss"] for row in rows if row["type"] == "round"],
        "devices": devices,
    }


def show_summary(summary: Json, console: Console) -> None:
    """Print the tables and how to load the adapter."""
    console.print()
    console.print(_memory_table(summary))
    console.print()
    console.print(_traffic_table(summary))
    console.print()
    console.print(_loss_table(summary))
    console.print()
    console.print("The adapter loads on the full model with transformers and peft:", style="bold")
    # Plain prints: these lines are copied, rich would wrap and colour them.
    print(f'  model = AutoModelForCausalLM.from_pretrained("{summary["model_dir"]}")')
    print(f'  model = PeftModel.from_pretrained(model, "{summary["adapter_dir"]}")')
    print()


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, no_wrap=True)
    return table


def _memory_table(summary: Json) -> Table:
    table = _table(
        "Memory of training", "device", "holds", "components", "budget", "predicted", "measured"
    )
    for device in summary["devices"]:
        total = device["num_components_total"]
        table.add_row(
            device["name"],
            picture(device["components"], total),
            f"{len(device['components'])} of {total}",
            format_bytes(device["budget_bytes"]),
            format_bytes(device["predicted_peak_bytes"]),
            format_bytes(device["measured_peak_bytes"]),
        )
    return table


def _traffic_table(summary: Json) -> Table:
    table = _table("Traffic", "device", "down, round 1", "down, each later", "up, each round")
    for device in summary["devices"]:
        first, *later = device["bytes_down"]
        table.add_row(
            device["name"],
            format_bytes(first),
            format_bytes(sum(later) / max(1, len(later))),
            format_bytes(sum(device["bytes_up"]) / len(device["bytes_up"])),
        )
    return table


def _loss_table(summary: Json) -> Table:
    table = Table(
        title="Loss on held-out text, nats per token",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for name in ("text", "base, no tuning", f"after {summary['rounds']} rounds", "change"):
        table.add_column(name)
    rows = [(k, v, summary["losses_final"][k]) for k, v in summary["losses_base"].items()]
    rows.append(("all", summary["loss_base"], summary["loss_final"]))
    for name, base, final in rows:
        style = "bold" if name == "all" else None
        table.add_row(name, f"{base:.4f}", f"{final:.4f}", f"{final - base:+.4f}", style=style)
    return table
