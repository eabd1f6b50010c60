"""Updates that have arrived become part of their round: durable first, then journaled.

Those that arrive at about the same time share the waiting for the disk, so a hundred devices that
finish together do not stand in line for it.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fedpruner_common.errors import Busy, FedPrunerError
from fedpruner_common.log import get_logger
from fedpruner_common.task import UpdateMetrics
from fedpruner_server.coordinator import Coordinator
from fedpruner_server.core import round as rounds
from fedpruner_server.registry import Device
from fedpruner_server.storage import make_durable


@dataclass(frozen=True)
class Arrived:
    """An update that is whole, checked and on disk, but not yet part of its round.

    Attributes:
        device: whose.
        task_id: whose update it is.
        round: the current one when it was checked.
        path: where it arrived.
        num_bytes: of it.
        metrics: of the training.
    """

    device: Device
    task_id: str
    round: int
    path: Path
    num_bytes: int
    metrics: UpdateMetrics


_Waiting = list[tuple[Arrived, "asyncio.Future[None]"]]


class UpdateStore:
    """Takes updates in, in the order they came."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._c = coordinator
        self._waiting: _Waiting = []
        self._storing: asyncio.Task[None] | None = None
        self._log = get_logger()

    async def add(self, update: Arrived) -> None:
        """Returns when the update counts.

        Raises:
            StaleRound: its round ended meanwhile.
            Busy: likewise, and the next one will take it.
            StorageError: the disk is full.
        """
        counted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((update, counted))
        if self._storing is None:
            self._storing = asyncio.create_task(self._store_all())
        await asyncio.shield(counted)

    async def _store_all(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = _one_of_each(self._waiting)
                outcomes = await self._store([update for update, _ in batch])
                for (_, counted), outcome in zip(batch, outcomes, strict=True):
                    if counted.cancelled():
                        continue
                    if outcome is None:
                        counted.set_result(None)
                    else:
                        counted.set_exception(outcome)
                        counted.exception()  # whoever waited may be gone
        finally:
            self._storing = None

    async def _store(self, batch: Sequence[Arrived]) -> list[Exception | None]:
        """Why each of some updates does not count; None for those that do."""
        outcomes = [self._refusal(update) for update in batch]
        wanted = [
            update
            for update, refusal in zip(batch, outcomes, strict=True)
            if refusal is None and not self._is_stored(update)
        ]
        try:
            moves = [
                (update.path, self._final(update)) for update in wanted if update.path.is_file()
            ]
            await asyncio.to_thread(make_durable, moves)
            # From here to the journal nothing else happens.
            self._c.apply_all(
                [
                    (
                        rounds.UpdateStored(update.device.client_id),
                        {"metrics": asdict(update.metrics), "bytes_up": update.num_bytes},
                    )
                    for update in wanted
                    if self._refusal(update) is None and self._is_in_place(update)
                ]
            )
        except Exception as error:
            return [error] * len(batch)
        for update in wanted:
            if self._is_stored(update):
                self._count(update)
            else:  # its round has ended, with one beside it perhaps
                outcomes[batch.index(update)] = self._refusal(update) or Busy("send it again")
                self._final(update).unlink(missing_ok=True)
        return outcomes

    def _final(self, update: Arrived) -> Path:
        return self._c.storage.update_path(update.round, update.device.client_id)

    def _is_in_place(self, update: Arrived) -> bool:
        """Whether it was there to be moved: another one of its device may have displaced it."""
        final = self._final(update)
        return final.is_file() and final.stat().st_size == update.num_bytes

    def _is_stored(self, update: Arrived) -> bool:
        current = self._c.round
        task = current.tasks.get(update.device.client_id) if current else None
        stored = task is not None and task.outcome is rounds.Outcome.STORED
        return stored and task is not None and task.task_id == update.task_id

    def _refusal(self, update: Arrived) -> Exception | None:
        """Why an update cannot count any more."""
        current = self._c.round
        assert current is not None
        try:
            rounds.check_accepts(current, client_id=update.device.client_id, task_id=update.task_id)
        except FedPrunerError as error:
            return error
        if current.number != update.round:
            return Busy(f"round {update.round} ended while its update arrived")
        return None

    def _count(self, update: Arrived) -> None:
        device, metrics = update.device, update.metrics
        device.measured_peak_bytes = metrics.measured_peak_bytes
        device.train_loss = metrics.train_loss_last
        device.task_id = ""
        self._log.info(
            "update stored",
            client=device.client_id,
            round=update.round,
            train_loss=round(metrics.train_loss_last, 4),
        )


def _one_of_each(waiting: _Waiting) -> tuple[_Waiting, _Waiting]:
    """The first update of each device, and the others: an update has one place on disk."""
    now: _Waiting = []
    later: _Waiting = []
    devices: set[str] = set()
    for entry in waiting:
        client_id = entry[0].device.client_id
        (later if client_id in devices else now).append(entry)
        devices.add(client_id)
    return now, later
