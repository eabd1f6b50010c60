"""Live progress: the rounds, the devices, what each one holds."""

from typing import Any

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
        self._printed: list[int] = []

    def __enter__(self) -> "Display":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def update(self, status: pb.StatusReply, devices: pb.DevicesReply) -> None:
        """Show the newest answers."""
        if self._console.is_terminal:
            explanation = Text(status.explanation, style="bold")
            self._live.update(Group(explanation, views.devices(devices), self._progress))

    def closed(self, rounds: list[dict[str, Any]]) -> None:
        """Print the rounds that have closed since, from their lines in metrics.jsonl."""
        for row in rounds[len(self._printed) :]:
            self._printed.append(row["round"])
            if row["eval_loss"] is None:
                text = row["explanation"] or "not evaluated"
            else:
                text = f"held-out loss {row['eval_loss']:.4f}, {row['seconds']:.0f} s"
            self._console.print(f"round {row['round']}: {text}")
        self._progress.update(self._bar, completed=len(self._printed))
