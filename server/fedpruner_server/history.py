"""What happened in every round, for people and for metrics.jsonl."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fedpruner_common.task import UpdateMetrics
from fedpruner_server.core.calibration import Calibration, Observation, calibrate
from fedpruner_server.core.round import Round
from fedpruner_server.method import TaskPlan


@dataclass
class ClientRecord:
    """One client in one round; bytes are counted by the coordinator.

    Attributes:
        plan: of its task; the last one, if it needed a smaller one.
        task_round: in which the task began; an earlier one, if it is late.
        base_round: whose adapter the task began with.
        too_large: plans before that one for which its memory did not do, and whether it refused
            them before it began.
    """

    client_id: str
    plan: TaskPlan
    task_round: int = 0
    base_round: int = 0
    too_large: list[tuple[TaskPlan, bool]] = field(default_factory=list)
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

    def observations(self) -> Iterator[Observation]:
        """What this round says of the byte model on this device."""
        for plan, refused in self.too_large:
            if not refused:
                yield Observation(plan.floor_bytes, plan.model_peak_bytes, None)
        if self.metrics is not None and self.metrics.measured_peak_bytes > 0:
            # With something made smaller, the peak is that of another task than was predicted.
            peak = None if self.metrics.rungs else self.metrics.measured_peak_bytes
            yield Observation(self.plan.floor_bytes, self.plan.model_peak_bytes, peak)


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
                    "task_round": client.task_round,
                    "components": list(client.components),
                    "corrected": client.plan.bridge.corrected,
                    "streamed": list(client.plan.streamed),
                    "predicted_peak_bytes": client.predicted_peak_bytes,
                    "model_peak_bytes": client.plan.model_peak_bytes,
                    "too_large": [len(plan.components) for plan, _ in client.too_large],
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


def calibration_of(client_id: str, history: Mapping[int, RoundRecord]) -> Calibration:
    """How a device's predictions are corrected, from all its rounds so far."""
    records = [record.clients.get(client_id) for _, record in sorted(history.items())]
    return calibrate([o for client in records if client for o in client.observations()])
