"""One round as a state machine: step(round, event) -> (round, effects).

                CohortChosen            all in, or deadline with quorum
    GATHERING ---------------> TRAINING ---------------------------> AGGREGATING
                                  | over without quorum                 | Aggregated
                                  v                                     v
                              ABANDONED                                DONE

While a round trains, a client that ran out of memory gets a smaller task: TaskTooLarge asks for
one, TaskReplaced hands it out. A round with a target ends as soon as so many updates are in; who
still works then is late, and if the round carries, its task goes on in the next round.

Pure: restarting the coordinator is replaying the journal's events through `step`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from fedpruner_common.errors import Busy, StaleRound


class Phase(str, Enum):
    GATHERING = "gathering"
    TRAINING = "training"
    AGGREGATING = "aggregating"
    DONE = "done"
    ABANDONED = "abandoned"


class Outcome(str, Enum):
    """How a client's task stands."""

    WORKING = "working"
    SHRINKING = "shrinking"  # ran out of memory; a smaller task is being planned
    STORED = "stored"
    FAILED = "failed"
    LOST = "lost"


@dataclass(frozen=True)
class TaskState:
    task_id: str
    outcome: Outcome = Outcome.WORKING
    reason: str = ""


@dataclass(frozen=True)
class Round:
    """One round; never changed, `step` returns the next.

    Attributes:
        number: 1-based.
        phase: where it stands.
        quorum: fewest updates to aggregate.
        deadline: when waiting ends, in the clock of `Tick`.
        target: updates that are enough; 0 for those of all clients.
        carries: tasks that are not done when it ends go on in the next round.
        tasks: client -> its task.
        explanation: one sentence for people, when there is something to explain.
    """

    number: int
    phase: Phase = Phase.GATHERING
    quorum: int = 1
    deadline: float = float("inf")
    target: int = 0
    carries: bool = False
    tasks: Mapping[str, TaskState] = field(default_factory=dict)
    explanation: str = ""

    def clients(self, outcome: Outcome) -> tuple[str, ...]:
        """Clients whose task stands so, sorted."""
        return tuple(sorted(c for c, task in self.tasks.items() if task.outcome is outcome))


# Events


@dataclass(frozen=True)
class CohortChosen:
    """Who takes part, client -> task id; those of earlier rounds that go on are among them."""

    tasks: Mapping[str, str]
    quorum: int
    deadline: float
    target: int = 0
    carries: bool = False


@dataclass(frozen=True)
class UpdateStored:
    """The client's update is durable."""

    client_id: str


@dataclass(frozen=True)
class TaskFailed:
    """The client said it cannot do its task."""

    client_id: str
    reason: str


@dataclass(frozen=True)
class TaskTooLarge:
    """The client has not the memory for its task.

    Attributes:
        refused: it said so before it began, having less to offer than it had; else it tried.
    """

    client_id: str
    reason: str
    refused: bool = False


@dataclass(frozen=True)
class TaskReplaced:
    """The client gets a smaller task in the same round."""

    client_id: str
    task_id: str


@dataclass(frozen=True)
class ClientLost:
    """The client's lease is over."""

    client_id: str


@dataclass(frozen=True)
class Tick:
    now: float


@dataclass(frozen=True)
class Aggregated:
    """The new global adapter is durable."""


Event = (
    CohortChosen
    | UpdateStored
    | TaskFailed
    | TaskTooLarge
    | TaskReplaced
    | ClientLost
    | Tick
    | Aggregated
)


# Effects


@dataclass(frozen=True)
class AssignTasks:
    """Hand out the round's tasks."""


@dataclass(frozen=True)
class Shrink:
    """Plan a smaller task for this client."""

    client_id: str


@dataclass(frozen=True)
class Aggregate:
    """Combine these clients' updates, in this order."""

    clients: tuple[str, ...]


@dataclass(frozen=True)
class Publish:
    """The new adapter is the global one."""


@dataclass(frozen=True)
class Abandon:
    """The round ends without a new adapter."""

    reason: str


Effect = AssignTasks | Shrink | Aggregate | Publish | Abandon


def step(current: Round, event: Event) -> tuple[Round, tuple[Effect, ...]]:
    """The round after an event, and what must be done about it.

    An event that no longer matters (a late failure, a second update) changes nothing.
    """
    if isinstance(event, CohortChosen) and current.phase is Phase.GATHERING:
        tasks = {client: TaskState(task_id) for client, task_id in event.tasks.items()}
        started = replace(
            current,
            phase=Phase.TRAINING,
            quorum=event.quorum,
            deadline=event.deadline,
            target=event.target,
            carries=event.carries,
            tasks=tasks,
        )
        return started, (AssignTasks(),)
    if isinstance(event, Aggregated) and current.phase is Phase.AGGREGATING:
        return replace(current, phase=Phase.DONE), (Publish(),)
    if current.phase is not Phase.TRAINING:
        return current, ()
    if isinstance(event, UpdateStored):
        return _settle(_mark(current, event.client_id, Outcome.STORED), timed_out=False)
    if isinstance(event, TaskFailed):
        failed = _mark(current, event.client_id, Outcome.FAILED, event.reason)
        return _settle(failed, timed_out=False)
    if isinstance(event, TaskTooLarge):
        shrinking = _mark(current, event.client_id, Outcome.SHRINKING, event.reason)
        return shrinking, (Shrink(event.client_id),) if shrinking != current else ()
    if isinstance(event, TaskReplaced):
        return _replace(current, event), ()
    if isinstance(event, ClientLost):
        reason = "no heartbeat"
        return _settle(_mark(current, event.client_id, Outcome.LOST, reason), timed_out=False)
    if isinstance(event, Tick):
        return _settle(current, timed_out=event.now >= current.deadline)
    return current, ()


# From which outcomes a client may come to another. A lost client that comes back in time with its
# update, or with the reason why it has none, is welcome; nothing else is undone.
_OPEN_TO = {
    Outcome.STORED: {Outcome.WORKING, Outcome.LOST},
    Outcome.SHRINKING: {Outcome.WORKING, Outcome.LOST},
    Outcome.FAILED: {Outcome.WORKING, Outcome.SHRINKING},
    Outcome.LOST: {Outcome.WORKING},
}


def _mark(current: Round, client_id: str, outcome: Outcome, reason: str = "") -> Round:
    task = current.tasks.get(client_id)
    if task is None or task.outcome not in _OPEN_TO[outcome]:
        return current
    tasks = {**current.tasks, client_id: replace(task, outcome=outcome, reason=reason)}
    return replace(current, tasks=tasks)


def _replace(current: Round, event: TaskReplaced) -> Round:
    task = current.tasks.get(event.client_id)
    if task is None or task.outcome is not Outcome.SHRINKING:
        return current
    return replace(current, tasks={**current.tasks, event.client_id: TaskState(event.task_id)})


def _settle(current: Round, *, timed_out: bool) -> tuple[Round, tuple[Effect, ...]]:
    """End the training phase when nothing more is to be waited for."""
    stored = current.clients(Outcome.STORED)
    working = current.clients(Outcome.WORKING) + current.clients(Outcome.SHRINKING)
    enough = 0 < current.target <= len(stored)
    if working and not timed_out and not enough:
        return current, ()
    if len(stored) >= current.quorum:
        return replace(current, phase=Phase.AGGREGATING), (Aggregate(stored),)
    why = "the deadline passed" if working else "nobody is left to wait for"
    troubles = [f"{c}: {t.reason}" for c, t in sorted(current.tasks.items()) if t.reason]
    troubles += [f"{c}: still working" for c in current.clients(Outcome.WORKING)]
    reason = f"{len(stored)} of {current.quorum} updates needed when {why}"
    if troubles:
        reason += f" ({'; '.join(troubles)})"
    return replace(current, phase=Phase.ABANDONED, explanation=reason), (Abandon(reason),)


def check_accepts(current: Round, *, client_id: str, task_id: str) -> bool:
    """Whether an update still has to travel: True to send it, False if it is stored already.

    Called on the header, before any tensor.

    Raises:
        StaleRound: the task is not this client's task of the current round, or too late.
        Busy: it is late, and will be welcome in the next round.
    """
    task = current.tasks.get(client_id)
    if task is None or task.task_id != task_id:
        raise StaleRound(f"task {task_id[:80]!r} is not part of round {current.number}")
    if task.outcome is Outcome.STORED:
        return False
    if task.outcome in (Outcome.FAILED, Outcome.SHRINKING):
        raise StaleRound(f"task {task_id} was reported as failed")
    if current.phase is not Phase.TRAINING:
        if current.carries:
            raise Busy(f"round {current.number} is being closed: the next one takes the update")
        raise StaleRound(f"round {current.number} is {current.phase.value}: too late for an update")
    return True


def carried(previous: Round) -> dict[str, str]:
    """Client -> task id of what goes on after a round has ended."""
    if not previous.carries:
        return {}
    late = previous.clients(Outcome.WORKING)
    return {client: previous.tasks[client].task_id for client in late}
