"""The devices the coordinator knows: what they offer, whether they live, what they are doing."""

import secrets
from dataclasses import dataclass, field
from enum import Enum

from fedpruner_common.errors import Unauthenticated, UnknownClient


class DeviceState(str, Enum):
    IDLE = "idle"
    WORKING = "working"
    LOST = "lost"


@dataclass
class Device:
    """One client, as it was last heard of.

    Attributes:
        last_seen: in the coordinator's monotonic clock.
        progressed_at: when it last moved a byte or a step, or began something; same clock.
    """

    client_id: str
    session: str
    memory_budget_bytes: int
    floor_bytes: int
    memory_kind: str
    last_seen: float
    progressed_at: float
    read_bytes_per_s: int = 0
    activity: str = "joined"
    step: int = 0
    num_steps: int = 0
    train_loss: float = 0.0
    task_id: str = ""
    last_failure: str = ""
    unfit: str = ""  # why no submodel fits, until it registers again
    checked: tuple[object, str] | None = None  # an offer, and why it is too little
    told_finished: bool = False
    predicted_peak_bytes: int = 0
    measured_peak_bytes: int = 0
    components: tuple[str, ...] = ()
    bytes_down: int = 0
    bytes_up: int = 0

    def does(self, activity: str, *, step: int, num_steps: int, now: float) -> None:
        """Note what it says it is doing."""
        if (activity, step) != (self.activity, self.step):
            self.progressed_at = now
        self.activity, self.step, self.num_steps = activity, step, num_steps


@dataclass
class Registry:
    """All devices by client id.

    Attributes:
        lease_s: a device not heard of for so long is lost.
    """

    lease_s: float
    devices: dict[str, Device] = field(default_factory=dict)

    def register(
        self,
        client_id: str,
        *,
        memory_budget_bytes: int,
        floor_bytes: int,
        memory_kind: str,
        read_bytes_per_s: int = 0,
        now: float,
    ) -> Device:
        """The device under a new session; what was counted for it stays."""
        session = secrets.token_urlsafe(24)
        device = self.devices.get(client_id)
        if device is None:
            device = Device(
                client_id, session, memory_budget_bytes, floor_bytes, memory_kind, now, now
            )
            self.devices[client_id] = device
        device.session = session
        device.memory_budget_bytes = memory_budget_bytes
        device.floor_bytes = floor_bytes
        device.memory_kind = memory_kind
        device.read_bytes_per_s = read_bytes_per_s
        device.last_seen = device.progressed_at = now
        device.activity = "joined"
        device.unfit = ""
        device.told_finished = False
        return device

    def authenticate(self, client_id: str, session: str, *, now: float) -> Device:
        """The device behind a call; being called is a sign of life.

        Raises:
            UnknownClient: it has to register, also after a restart of the coordinator.
            Unauthenticated: the session is not its current one.
        """
        device = self.devices.get(client_id)
        if device is None:
            raise UnknownClient(f"client {client_id[:80]!r} is not registered")
        if not secrets.compare_digest(device.session.encode(), session.encode()):
            raise Unauthenticated(
                f"client {client_id!r} has a newer session: is a second agent using the same name?"
            )
        device.last_seen = now
        return device

    def forgive(self, seconds: float, *, now: float) -> None:
        """Count so much of everyone's silence as if it had not been."""
        for device in self.devices.values():
            device.last_seen = min(now, device.last_seen + seconds)
            device.progressed_at = min(now, device.progressed_at + seconds)

    def state(self, device: Device, *, now: float) -> DeviceState:
        if now - device.last_seen > self.lease_s:
            return DeviceState.LOST
        return DeviceState.WORKING if device.task_id else DeviceState.IDLE

    def available(self, *, now: float) -> list[Device]:
        """Devices that live and have no task and no reason not to get one."""
        return [
            device
            for device in self.devices.values()
            if self.state(device, now=now) is DeviceState.IDLE and not device.unfit
        ]
