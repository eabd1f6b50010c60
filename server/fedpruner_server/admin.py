"""What an operator can ask. Changes nothing."""

import time
from collections.abc import Mapping
from typing import Any

from fedpruner_common.components import all_components
from fedpruner_common.errors import Unavailable
from fedpruner_common.pb import admin_pb2 as pb
from fedpruner_common.pb.admin_pb2_grpc import AdminServicer
from fedpruner_server.coordinator import Coordinator
from fedpruner_server.core.planning import peak_of_sizes, plan_client
from fedpruner_server.core.round import Outcome
from fedpruner_server.history import RoundRecord


class Admin(AdminServicer):
    """The operator's service."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._c = coordinator

    async def Status(self, _: pb.StatusRequest, __: Any) -> pb.StatusReply:
        c = self._c
        evaluated = [r.loss for _, r in sorted(c.history.items()) if r.loss is not None]
        adapter = c.storage.peft_dir("final" if c.state == "finished" else "latest")
        return pb.StatusReply(
            state=c.state,
            explanation=c.explanation_with_trouble,
            round=c.round.number if c.round else 0,
            num_rounds=c.settings.run.num_rounds,
            model=str(c.blocks.model_dir),
            loss_base=c.loss_base,
            losses_base=c.losses_base,
            loss=evaluated[-1] if evaluated else None,
            adapter_dir=str(adapter.resolve()) if adapter.exists() else "",
            num_devices=len(c.registry.devices),
            run_dir=str(c.storage.state_dir.resolve()),
        )

    async def Devices(self, _: pb.DevicesRequest, __: Any) -> pb.DevicesReply:
        now, registry = time.monotonic(), self._c.registry
        total = 2 * self._c.spec.num_layers if self._c.spec else 0
        return pb.DevicesReply(
            devices=[
                pb.Device(
                    client_id=d.client_id,
                    state=registry.state(d, now=now).value,
                    activity=d.activity,
                    step=d.step,
                    num_steps=d.num_steps,
                    train_loss=d.train_loss,
                    memory_budget_bytes=d.memory_budget_bytes,
                    floor_bytes=d.floor_bytes,
                    predicted_peak_bytes=d.predicted_peak_bytes,
                    measured_peak_bytes=d.measured_peak_bytes,
                    components=d.components,
                    num_components_total=total,
                    last_seen_s=now - d.last_seen,
                    last_failure=d.last_failure,
                    bytes_down=d.bytes_down,
                    bytes_up=d.bytes_up,
                    memory_ratio=(calibration := self._c.calibration(d.client_id)).ratio,
                    too_much_bytes=calibration.too_much_bytes or 0,
                )
                for _, d in sorted(registry.devices.items())
            ]
        )

    async def Rounds(self, _: pb.RoundsRequest, __: Any) -> pb.RoundsReply:
        return pb.RoundsReply(rounds=[_round(r) for _, r in sorted(self._c.history.items())])

    async def Plan(self, request: pb.PlanRequest, _: Any) -> pb.PlanReply:
        spec, statistics, settings = self._c.spec, self._c.statistics, self._c.plan_settings()
        if spec is None:
            raise Unavailable(f"the coordinator is still {self._c.explanation}")
        smallest = max(1, len(settings.protected(spec.num_layers)))
        families = settings.granularity.families
        rows = []
        for size in range(smallest, spec.num_layers + 1):
            sizes = dict.fromkeys(families, size)
            peak = peak_of_sizes(spec, settings, sizes, floor_bytes=request.floor_bytes)
            rows.append(pb.PlanRow(num_kept=size, predicted_peak_bytes=peak))
        reply = pb.PlanReply(
            num_components_total=len(all_components(spec.num_layers)),
            rows=rows,
            margin=settings.margin,
        )
        if request.memory_budget_bytes and statistics is None:
            raise Unavailable("the layers have not been measured yet: no device has joined")
        if isinstance(statistics, Mapping):  # every device has its own: show one of them
            statistics = statistics[min(statistics)]
        if request.memory_budget_bytes and statistics is not None:
            plan = plan_client(
                spec,
                statistics,
                settings,
                client_id="plan",
                round_number=1,
                budget_bytes=request.memory_budget_bytes,
                floor_bytes=request.floor_bytes,
            )
            reply.components.extend(str(component) for component in plan.submodel.components)
            reply.predicted_peak_bytes = plan.predicted_peak_bytes
        return reply


def _round(record: RoundRecord) -> pb.Round:
    clients = []
    for client_id, client in sorted(record.clients.items()):
        task, metrics = record.round.tasks[client_id], client.metrics
        row = pb.ClientRound(
            client_id=client_id,
            outcome=task.outcome.value,
            reason=task.reason,
            predicted_peak_bytes=client.predicted_peak_bytes,
            num_components=len(client.components),
            bytes_down=client.base_bytes_down + client.adapter_bytes_down,
            base_bytes_down=client.base_bytes_down,
            bytes_up=client.bytes_up,
            components=client.components,
            too_large=[len(plan.components) for plan, _ in client.too_large],
        )
        if metrics and task.outcome is Outcome.STORED:
            row.measured_peak_bytes = metrics.measured_peak_bytes
            row.num_examples = metrics.num_examples
            row.train_loss = metrics.train_loss_last
            row.train_s = metrics.train_s
            row.rungs.extend(metrics.rungs)
        clients.append(row)
    return pb.Round(
        round=record.round.number,
        phase=record.round.phase.value,
        loss=record.loss,
        losses=record.losses,
        seconds=record.seconds,
        clients=clients,
        explanation=record.round.explanation,
    )
