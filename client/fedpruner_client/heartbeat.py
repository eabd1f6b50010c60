"""The sign of life, from a thread of its own: it also minds the lease and transfers that stall."""

import faulthandler
import os
import sys
import threading
import time

from fedpruner_client.config import AgentSettings
from fedpruner_client.connection import Connection
from fedpruner_client.trainer import Trainer
from fedpruner_client.transfers import Transfers
from fedpruner_common.errors import FedPrunerError, UnknownClient
from fedpruner_common.log import get_logger


class Heartbeat(threading.Thread):
    """Tells the coordinator that the device lives, also while it trains.

    Attributes:
        activity, step, num_steps, train_loss: what is told; the loop writes them.
    """

    def __init__(
        self,
        connection: Connection,
        transfers: Transfers,
        trainer: Trainer,
        settings: AgentSettings,
    ) -> None:
        super().__init__(daemon=True, name="heartbeat")
        self._connection = connection
        self._transfers = transfers
        self._trainer = trainer
        self._settings = settings
        self._heard_at = time.monotonic()
        self._stop = threading.Event()
        self._log = get_logger()
        self.task_id = ""
        self.in_vain = False
        self.activity = "joined"
        self.step = self.num_steps = 0
        self.train_loss = 0.0

    def working_on(self, task_id: str, activity: str) -> None:
        """Note what the loop begins to do."""
        if task_id != self.task_id:
            self.in_vain = False
            self.step = self.num_steps = 0
        self.task_id, self.activity = task_id, activity

    def run(self) -> None:
        refused = 0
        while not self._stop.wait(self._connection.heartbeat_interval_s):
            if self._transfers.cancel_stalled(self._settings.transfer_idle_s):
                _begin_anew()
            session, task_id = self._connection.session, self.task_id
            try:
                wanted = self._connection.heartbeat(
                    task_id=task_id,
                    activity=self.activity,
                    step=self.step,
                    num_steps=self.num_steps,
                    train_loss=self.train_loss,
                )
            except UnknownClient:  # the coordinator was restarted
                self._rejoin(session)
                continue
            except FedPrunerError:  # unreachable: the loop's own calls will tell
                self._mind_the_lease()
                continue
            self._heard_at = time.monotonic()
            # Twice in a row, so that an answer that crossed the end of a task does no harm.
            refused = refused + 1 if task_id and task_id == self.task_id and not wanted else 0
            if refused >= 2:
                self._stop_training("the coordinator no longer wants this task")

    def _mind_the_lease(self) -> None:
        """Stop training once the coordinator has given this device up: the GPU is others' again."""
        patience = self._settings.offline_training_s
        silence = time.monotonic() - self._heard_at
        if silence > (self._connection.lease_s if patience is None else patience):
            self._stop_training(f"no word from the coordinator for {silence:.0f} s")

    def _stop_training(self, why: str) -> None:
        if self.activity == "training" and not self.in_vain:
            self._log.warning(f"{why}: stopping", task=self.task_id)
            self.in_vain = True
            self._trainer.abort()

    def _rejoin(self, session: str) -> None:
        try:
            self._connection.register(instead_of=session, patient=False)
        except FedPrunerError as error:
            self._log.warning("cannot join again", reason=str(error))

    def close(self) -> None:
        self._stop.set()


def _begin_anew() -> None:
    """Replace this process by a new one of the same command; all that counts is on disk.

    For a main thread that waits in gRPC for a stream that has long been cancelled: seen once in
    about a thousand faults. Where it waits goes to the log.
    """
    get_logger().error("a transfer hangs: the agent begins anew")
    faulthandler.dump_traceback(all_threads=True)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
