"""Every error that means something to the other side, or to the person at the keyboard.

FedPrunerError
├── protocol errors: cross the wire with their `code` (status.py has the table)
│   ├── InvalidUpdate      names, shapes, dtype, NaN, size
│   ├── BudgetTooSmall     not even the smallest submodel fits
│   ├── StaleRound         the round has moved on, or the task is not yours
│   ├── UnknownClient      the coordinator does not know this id: register again
│   ├── Unauthenticated    no valid session
│   ├── Forbidden          identity is known and not allowed
│   ├── Busy               try the same call later
│   ├── CorruptChunk       checksum or length differs: fetch again
│   ├── NotFound           no such blob
│   └── Unavailable        starting, stopping or unreachable: try the same call later
└── local errors: stop the program with one plain sentence
    ├── ConfigError        a setting is missing or wrong
    ├── ModelError         the base model cannot be used
    ├── DataError          the training or evaluation data cannot be used
    ├── StorageError       the state directory cannot be used
    ├── RunFailed          rounds keep bringing nothing
    ├── OutOfMemory        a device has not the memory for its task
    └── ChildDied          a child process ended without an answer
"""


class FedPrunerError(Exception):
    """Base of all errors above. The message says what was expected, what came, and which name."""

    code: str = "internal"


class InvalidUpdate(FedPrunerError):
    """A client update does not match its task."""

    code = "invalid_update"


class BudgetTooSmall(FedPrunerError):
    """The device cannot hold even the smallest submodel; the message has the missing bytes."""

    code = "budget_too_small"


class StaleRound(FedPrunerError):
    """The task belongs to a round that is over, or never was this client's."""

    code = "stale_round"


class UnknownClient(FedPrunerError):
    """The coordinator has no record of this client id."""

    code = "unknown_client"


class Unauthenticated(FedPrunerError):
    """The call carries no valid session."""

    code = "unauthenticated"


class Forbidden(FedPrunerError):
    """The caller is known and may not do this."""

    code = "forbidden"


class Busy(FedPrunerError):
    """Too many transfers at once."""

    code = "busy"


class CorruptChunk(FedPrunerError):
    """Bytes arrived that are not the bytes that were promised."""

    code = "corrupt_chunk"


class NotFound(FedPrunerError):
    """The coordinator has no blob of this hash."""

    code = "not_found"


class Unavailable(FedPrunerError):
    """The other side is starting, stopping or unreachable."""

    code = "unavailable"


class ConfigError(FedPrunerError):
    """A setting is missing or wrong; the message names it."""

    code = "config"


class ModelError(FedPrunerError):
    """The base model cannot be used; the message says what is missing."""

    code = "model"


class DataError(FedPrunerError):
    """Local data cannot be used; the message names file and line."""

    code = "data"


class StorageError(FedPrunerError):
    """The state directory cannot be used."""

    code = "storage"


class RunFailed(FedPrunerError):
    """Round after round brought no update; the message has the last reason."""

    code = "run_failed"


class OutOfMemory(FedPrunerError):
    """A device has not the memory for its task: it says so, or it tried."""

    code = "out_of_memory"


class ChildDied(FedPrunerError):
    """A child process ended without an answer.

    Attributes:
        returncode: as `subprocess` gives it; -9 means killed, most often for memory.
    """

    code = "child_died"

    def __init__(self, message: str, returncode: int | None = None) -> None:
        super().__init__(message)
        self.returncode = returncode
