import grpc
import pytest

from fedpruner_common import errors
from fedpruner_common.errors import Busy, FedPrunerError, Forbidden, Unauthenticated, Unavailable
from fedpruner_common.status import CODE_KEY, error_of, status_of

# The table of the design: what each error travels as.
TABLE = {
    errors.InvalidUpdate: "INVALID_ARGUMENT",
    errors.BudgetTooSmall: "FAILED_PRECONDITION",
    errors.StaleRound: "ABORTED",
    errors.UnknownClient: "NOT_FOUND",
    errors.NotFound: "NOT_FOUND",
    errors.Unauthenticated: "UNAUTHENTICATED",
    errors.Forbidden: "PERMISSION_DENIED",
    errors.Busy: "RESOURCE_EXHAUSTED",
    errors.CorruptChunk: "DATA_LOSS",
    errors.Unavailable: "UNAVAILABLE",
}
LOCAL = [
    errors.ConfigError,
    errors.ModelError,
    errors.DataError,
    errors.StorageError,
    errors.RunFailed,
    errors.OutOfMemory,
    errors.ChildDied,
]


class FailedCall(grpc.RpcError):
    """What grpc raises for a call that ended with a status."""

    def __init__(self, code, details="", metadata=()):
        super().__init__()
        self._values = code, details, metadata

    def code(self):
        return self._values[0]

    def details(self):
        return self._values[1]

    def trailing_metadata(self):
        return self._values[2]


def all_errors():
    return {
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, FedPrunerError)
    }


def test_every_error_is_in_the_table_or_local():
    assert all_errors() == {FedPrunerError, *TABLE, *LOCAL}


def test_every_code_stands_for_one_error():
    assert len({kind.code for kind in all_errors()}) == len(all_errors())


@pytest.mark.parametrize(("kind", "status"), TABLE.items())
def test_a_protocol_error_arrives_as_what_it_was_with_its_message(kind, status):
    error = kind("expected this, got that")
    assert status_of(error) is grpc.StatusCode[status]
    call = FailedCall(status_of(error), str(error), (("x", "y"), (CODE_KEY, error.code)))
    rebuilt = error_of(call)
    assert type(rebuilt) is kind
    assert str(rebuilt) == "expected this, got that"


@pytest.mark.parametrize("kind", LOCAL)
def test_a_local_error_does_not_travel_as_itself(kind):
    error = kind("about this machine")
    assert status_of(error) is None
    rebuilt = error_of(FailedCall(status_of(error), "internal", ((CODE_KEY, error.code),)))
    assert type(rebuilt) is FedPrunerError


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        ("UNAVAILABLE", Unavailable),
        ("DEADLINE_EXCEEDED", Unavailable),
        ("RESOURCE_EXHAUSTED", Busy),
        ("UNAUTHENTICATED", Unauthenticated),
        ("PERMISSION_DENIED", Forbidden),
        ("INTERNAL", FedPrunerError),
        ("UNIMPLEMENTED", FedPrunerError),
    ],
)
@pytest.mark.parametrize("metadata", [None, (), ((CODE_KEY, "from_the_future"),)])
def test_an_error_without_a_code_we_know_means_what_its_status_says(status, kind, metadata):
    assert type(error_of(FailedCall(grpc.StatusCode[status], "why", metadata))) is kind


def test_an_error_without_details_still_says_its_status():
    assert "UNAVAILABLE" in str(error_of(FailedCall(grpc.StatusCode.UNAVAILABLE, None)))
