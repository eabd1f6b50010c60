"""The coordinator's answers as tables for people."""

from collections.abc import Iterable, Iterator

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedpruner_common.components import ComponentId
from fedpruner_common.pb import admin_pb2 as pb
from fedpruner_common.submodel import Submodel
from fedpruner_common.units import format_bytes


def picture(components: Iterable[str], num_components_total: int) -> str:
    """One character a layer: ■ whole, ▀ attention only, ▄ ffn only, · dropped."""
    parsed = [ComponentId.parse(component) for component in components]
    return Submodel.of(num_components_total // 2, parsed).picture()


def status(reply: pb.StatusReply) -> RenderableType:
    lines = [f"[bold]{reply.state}[/bold]: {reply.explanation}"]
    lines.append(f"round     {reply.round} of {reply.num_rounds}")
    lines.append(f"devices   {reply.num_devices}")
    if reply.HasField("loss_base"):
        lines.append(f"loss      {reply.loss_base:.4f} without tuning")
    if reply.HasField("loss"):
        lines.append(f"          {reply.loss:.4f} with the current adapter")
    lines.append(f"model     {reply.model}")
    lines.append(f"state     {reply.run_dir}")
    if reply.adapter_dir:
        lines.append(f"adapter   {reply.adapter_dir}")
    return Group(*(Text.from_markup(line) for line in lines))


def devices(reply: pb.DevicesReply) -> RenderableType:
    if not reply.devices:
        return Text("no device has joined yet; start one with: fedpruner-agent run --server ...")
    table = Table(box=None, pad_edge=False)
    for name in ("device", "state", "doing", "budget", "holds", "predicted", "measured", "loss"):
        table.add_column(name, no_wrap=name == "holds")
    for device in reply.devices:
        doing = device.activity
        if device.activity == "training" and device.num_steps:
            doing += f" {device.step}/{device.num_steps}"
        table.add_row(
            device.client_id,
            _STATES.get(device.state, device.state),
            doing,
            format_bytes(device.memory_budget_bytes),
            picture(device.components, device.num_components_total),
            format_bytes(device.predicted_peak_bytes) if device.predicted_peak_bytes else "",
            format_bytes(device.measured_peak_bytes) if device.measured_peak_bytes else "",
            f"{device.train_loss:.3f}" if device.train_loss else "",
        )
    notes = [
        Text(f"{device.client_id}: {note}", style="yellow")
        for device in reply.devices
        for note in _notes(device)
    ]
    return Group(table, *notes)


def _notes(device: pb.Device) -> Iterator[str]:
    """What is to be known of a device beside its row."""
    if device.last_failure:
        yield device.last_failure
    if device.too_much_bytes:
        too_much = format_bytes(device.too_much_bytes)
        yield f"has run out of memory; gets nothing any more that takes {too_much} above its floor"
    if device.memory_ratio != 1.0:
        yield f"its predictions are corrected by {device.memory_ratio:.2f}, from its own peaks"


_STATES = {"lost": "[red]lost[/red]", "working": "[green]working[/green]"}


def rounds(reply: pb.RoundsReply) -> RenderableType:
    if not reply.rounds:
        return Text("no round has begun")
    table = Table(box=None, pad_edge=False)
    for name in ("round", "phase", "loss", "seconds", "updates", "down", "up", "remarks"):
        table.add_column(name)
    for item in reply.rounds:
        stored = sum(client.outcome == "stored" for client in item.clients)
        remarks = [f"{c.client_id}: {remark}" for c in item.clients for remark in _remarks(c)]
        table.add_row(
            str(item.round),
            item.phase,
            f"{item.loss:.4f}" if item.HasField("loss") else "",
            f"{item.seconds:.1f}" if item.seconds else "",
            f"{stored}/{len(item.clients)}",
            format_bytes(sum(client.bytes_down for client in item.clients)),
            format_bytes(sum(client.bytes_up for client in item.clients)),
            item.explanation or "; ".join(remarks),
        )
    return table


def _remarks(client: pb.ClientRound) -> Iterator[str]:
    """What did not go as planned with a client in a round."""
    if client.too_large:
        sizes = ", ".join(map(str, client.too_large))
        yield f"had no memory for {sizes} components, got {client.num_components}"
    if client.rungs:
        yield f"made do with less ({', '.join(client.rungs)})"
    if client.reason:
        yield client.reason


def plan(reply: pb.PlanReply, budget_bytes: int) -> RenderableType:
    table = Table(box=None, pad_edge=False, title_justify="left")
    for name in ("kept of each kind", "predicted peak", "budget needed"):
        table.add_column(name)
    for row in reply.rows:
        needed = row.predicted_peak_bytes / (1 - reply.margin)
        table.add_row(
            str(row.num_kept), format_bytes(row.predicted_peak_bytes), format_bytes(needed)
        )
    if not budget_bytes:
        return table
    kept, total = len(reply.components), reply.num_components_total
    summary = (
        f"{format_bytes(budget_bytes)} holds {kept} of {total} components, predicted peak "
        f"{format_bytes(reply.predicted_peak_bytes)}: {picture(reply.components, total)}"
    )
    return Group(table, Text(), Text(summary))


def show(view: RenderableType) -> None:
    """Print a view to standard output."""
    Console().print(view)
