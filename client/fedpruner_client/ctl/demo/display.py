"""Live progress: the rounds, the devices, what each one holds."""

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from fedpruner_client.ctl import views
from fedpruner_common.pb import admin_pb2 as pb


class Display:
    """A live view on a terminal; elsewhere one line per round."""

    def __init__(self, console: Console, num_rounds: int) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("rounds"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        )
        self._bar = self._progress.add_task("rounds", total=num_rounds)
        self._live = Live(console=console, refresh_per_second=4, transient=True)
        self._printed: set[int] = set()

    def __enter__(self) -> "Display":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def update(
        self, status: pb.StatusReply, devices: pb.DevicesReply, rounds: pb.RoundsReply
    ) -> None:
        """Show the newest answers."""
        closed = [r for r in rounds.rounds if r.phase == "abandoned" or r.HasField("loss")]
        for item in closed:
            if item.round not in self._printed:
                self._printed.add(item.round)
                self._console.print(_line(item, status))
        self._progress.update(self._bar, completed=len(closed))
        if self._console.is_terminal:
            view = Group(
                Text(status.explanation, style="bold"), views.devices(devices), self._progress
            )
            self._live.update(view)


def _line(item: pb.Round, status: pb.StatusReply) -> str:
    if item.phase == "abandoned":
        return f"round {item.round}: {item.explanation}"
    stored = sum(client.outcome == "stored" for client in item.clients)
    return (
        f"round {item.round}/{status.num_rounds}: held-out loss {item.loss:.4f} "
        f"(base {status.loss_base:.4f}), {stored} of {len(item.clients)} devices, "
        f"{item.seconds:.0f} s"
    )
