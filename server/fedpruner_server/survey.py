"""Asking devices about the layers, before a round: who was asked, what they said."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from fedpruner_common.statistics import Statistics
from fedpruner_common.task import ProbeTask


@dataclass
class Survey:
    """One survey; it is not journaled, and begins anew when the coordinator restarts.

    Attributes:
        tasks: client -> its task's id.
        probe: what is asked, the same of everyone but for the task id.
        results: client -> what it found out.
        failed: client -> why it could not.
    """

    tasks: dict[str, str]
    probe: ProbeTask
    results: dict[str, Statistics] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def task_of(self, client_id: str) -> ProbeTask | None:
        """What a client still has to do."""
        if client_id not in self.tasks or client_id in self.results or client_id in self.failed:
            return None
        return replace(self.probe, task_id=self.tasks[client_id])

    def waiting_for(self, alive: Iterable[str]) -> list[str]:
        """Clients that live and have not answered."""
        return [client_id for client_id in alive if self.task_of(client_id)]
