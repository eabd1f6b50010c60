"""What happened in every round, for people and for metrics.jsonl."""

from dataclasses import asdict, dataclass, field
from typing import Any

from fedpruner_common.task import UpdateMetrics
from fedpruner_server.core.round import Round
from fedpruner_server.method import TaskPlan


@dataclass
class ClientRecord:
    """One client in one round; bytes are counted by the coordinator."""

    client_id: str
    plan: TaskPlan
    base_bytes_down: int = 0
    adapter_bytes_down: int = 0
    bytes_up: int = 0
    metrics: UpdateMetrics | None = None

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(map(str, self.plan.components))

    @property
    def predicted_peak_bytes(self) -> int:
        return self.plan.predicted_peak_bytes


@dataclass
class RoundRecord:
    """One round.

    Attributes:
        started, seconds: wall clock.
        loss: of the new global adapter on held-out text, when it was evaluated.
        losses: the same, by file.
        fedit_error: how far the mean of A times the mean of B is from the mean of the products,
            relative; small where plain averaging does no harm.
    """

    round: Round
    started: float
    clients: dict[str, ClientRecord] = field(default_factory=dict)
    seconds: float = 0.0
    loss: float | None = None
    losses: dict[str, float] = field(default_factory=dict)
    fedit_error: float | None = None

    def rows(self) -> list[dict[str, Any]]:
        """Lines for metrics.jsonl: one per client, then one for the round."""
        number = self.round.number
        rows: list[dict[str, Any]] = []
        for client_id, client in sorted(self.clients.items()):
            task = self.round.tasks[client_id]
            metrics = asdict(client.metrics) if client.metrics else {}
            rows.append(
                {
                    "type": "client",
                    "round": number,
                    "client_id": client_id,
                    "outcome": task.outcome.value,
                    "reason": task.reason,
                    "components": list(client.components),
                    "corrected": client.plan.bridge.corrected,
                    "streamed": list(client.plan.streamed),
                    "predicted_peak_bytes": client.predicted_peak_bytes,
                    "base_bytes_down": client.base_bytes_down,
                    "adapter_bytes_down": client.adapter_bytes_down,
                    "bytes_up": client.bytes_up,
                    **metrics,
                }
            )
        rows.append(
            {
                "type": "round",
                "round": number,
                "phase": self.round.phase.value,
                "explanation": self.round.explanation,
                "seconds": round(self.seconds, 3),
                "eval_loss": self.loss,
                "eval_losses": self.losses,
                "fedit_error": self.fedit_error,
            }
        )
        return rows
