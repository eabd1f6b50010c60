"""Everything an agent could say of its layers: a clear error, and the run goes on."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_agent import FakeAgent, start_server
from programs import NUM_LAYERS, Program, address_of, server_config

from fedpruner_common.errors import (
    FedPrunerError,
    InvalidUpdate,
    StaleRound,
    Unauthenticated,
    UnknownClient,
)
from fedpruner_common.pb import federation_pb2 as pb

TRIANGLE = NUM_LAYERS * (NUM_LAYERS + 1) // 2
MAX_TOKENS = 5 * 64  # sequences and tokens in each, as the settings below say


class FakeDevice(FakeAgent):
    """It can say anything of its layers."""

    def statistics(self, **fields: Any) -> pb.PushStatisticsRequest:
        """What an honest device says, with fields changed."""
        similarity = [0.5] * TRIANGLE
        for layer in range(NUM_LAYERS):
            similarity[layer * NUM_LAYERS - layer * (layer - 1) // 2] = 1.0
        layers = pb.FamilyStatistics(
            family="layer", similarity=similarity, importance=[0.4, 0.1, 0.3, 0.2]
        )
        values: dict[str, Any] = {
            "client_id": self.client_id,
            "session": self.session,
            "task_id": f"probe-1-{self.client_id}",
            "families": [layers],
            "num_tokens": 100,
            "seconds": 1.0,
            "bytes_read": 1000,
            "loss": 3.0,
            **fields,
        }
        return pb.PushStatisticsRequest(**values)

    def push(self, request: pb.PushStatisticsRequest) -> None:
        self.call(self.stub.PushStatistics, request)


@pytest.fixture(scope="module")
def server(
    small_model: Path, texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Program]:
    folder = tmp_path_factory.mktemp("hostile-statistics")
    config = server_config(
        folder / "server.toml",
        small_model,
        texts,
        run={"num_rounds": 1, "min_available_clients": 2, "lease_s": 120},
        plan={"statistics": "cohort"},
        data={"num_calibration_sequences": 5},
    )
    program = start_server(folder, config)
    yield program
    program.end()


@pytest.fixture(scope="module")
def devices(server: Program) -> tuple[FakeDevice, FakeDevice]:
    """Two devices, both asked about their layers before round 1."""
    address = address_of(server)
    mallory, alice = FakeDevice(address, "mallory"), FakeDevice(address, "alice")
    for device in (mallory, alice):
        assert device.pull("probe").task_id == f"probe-1-{device.client_id}"
    return mallory, alice


@pytest.fixture(scope="module")
def mallory(devices: tuple[FakeDevice, FakeDevice]) -> FakeDevice:
    return devices[0]


def similarity_of(index: int, value: float) -> Callable[[pb.PushStatisticsRequest], None]:
    def change(request: pb.PushStatisticsRequest) -> None:
        request.families[0].similarity[index] = value

    return change


def importance_of(index: int, value: float) -> Callable[[pb.PushStatisticsRequest], None]:
    def change(request: pb.PushStatisticsRequest) -> None:
        request.families[0].importance[index] = value

    return change


def replaced(*families: pb.FamilyStatistics) -> Callable[[pb.PushStatisticsRequest], None]:
    def change(request: pb.PushStatisticsRequest) -> None:
        del request.families[:]
        request.families.extend(families)

    return change


def ones(family: str, num_layers: int) -> pb.FamilyStatistics:
    triangle = [1.0] * (num_layers * (num_layers + 1) // 2)
    return pb.FamilyStatistics(family=family, similarity=triangle, importance=[1.0] * num_layers)


def one_more(request: pb.PushStatisticsRequest) -> None:
    request.families[0].similarity.append(0.5)


def one_less(request: pb.PushStatisticsRequest) -> None:
    del request.families[0].similarity[-1]


def without_importance(request: pb.PushStatisticsRequest) -> None:
    del request.families[0].importance[:]


MILLION = pb.FamilyStatistics(family="layer", importance=[1.0] * 1_000_000)
BAD: dict[str, tuple[Callable[[pb.PushStatisticsRequest], None], str]] = {
    "nothing": (replaced(), "not of the families"),
    "halves where layers were asked for": (
        replaced(ones("attention", NUM_LAYERS), ones("ffn", NUM_LAYERS)),
        "not of the families",
    ),
    "more families than asked for": (
        replaced(ones("layer", NUM_LAYERS), ones("ffn", NUM_LAYERS)),
        "not of the families",
    ),
    "an unknown family": (replaced(ones("head", NUM_LAYERS)), "make no sense.*head"),
    "a family without a name": (replaced(ones("", NUM_LAYERS)), "make no sense"),
    "one layer fewer": (replaced(ones("layer", NUM_LAYERS - 1)), "not of 4 layers"),
    "one layer more": (replaced(ones("layer", NUM_LAYERS + 1)), "not of 4 layers"),
    "no layers": (replaced(ones("layer", 0)), "not of 4 layers"),
    "a thousand layers": (replaced(ones("layer", 1000)), "not of 4 layers"),
    "a million layers": (replaced(MILLION), "0 similarities of 1000000 items"),
    "a triangle with one too many": (one_more, "11 similarities of 4 items"),
    "a triangle with one missing": (one_less, "9 similarities of 4 items"),
    "similarities of nothing": (without_importance, "10 similarities of 0 items"),
    "a similarity that is NaN": (similarity_of(1, math.nan), "not finite"),
    "a similarity with itself that is NaN": (similarity_of(0, math.nan), "not finite"),
    "an infinite similarity": (similarity_of(1, math.inf), "not finite"),
    "a similarity above 1": (similarity_of(1, 1.5), r"outside \[0, 1\]"),
    "a negative similarity": (similarity_of(1, -0.5), r"outside \[0, 1\]"),
    "a large negative similarity": (similarity_of(1, -1e30), r"outside \[0, 1\]"),
    "a negative similarity with itself": (similarity_of(0, -0.5), r"outside \[0, 1\]"),
    "an importance that is NaN": (importance_of(0, math.nan), "not finite"),
    "an infinite importance": (importance_of(0, -math.inf), "not finite"),
}


@pytest.mark.parametrize("what", BAD)
def test_statistics_that_make_no_sense_are_refused_and_the_message_says_why(
    mallory: FakeDevice, what: str
) -> None:
    change, message = BAD[what]
    request = mallory.statistics()
    change(request)
    with pytest.raises(InvalidUpdate, match=message):
        mallory.push(request)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"task_id": ""}, StaleRound, "not waited for"),
        ({"task_id": "nonsense"}, StaleRound, "not waited for"),
        ({"task_id": "probe-1-alice"}, StaleRound, "not waited for"),
        ({"task_id": "probe-2-mallory"}, StaleRound, "not waited for"),
        ({"task_id": "round-1-mallory"}, StaleRound, "not waited for"),
        ({"session": "guess"}, Unauthenticated, "newer session"),
        ({"client_id": "nobody"}, UnknownClient, "not registered"),
        # As alice, but with mallory's session.
        ({"client_id": "alice", "task_id": "probe-1-alice"}, Unauthenticated, "newer session"),
        # So many tokens that nobody else's would count in the cohort's mean.
        ({"num_tokens": MAX_TOKENS + 1}, InvalidUpdate, "expected 1 to 320"),
        ({"num_tokens": (1 << 64) - 1}, InvalidUpdate, "num_tokens"),
        ({"loss": math.nan}, InvalidUpdate, "loss"),
        ({"seconds": math.inf}, InvalidUpdate, "seconds"),
    ],
)
def test_a_message_that_lies_is_refused(
    mallory: FakeDevice, fields: dict[str, Any], error: type[FedPrunerError], message: str
) -> None:
    with pytest.raises(error, match=message):
        mallory.push(mallory.statistics(**fields))


def test_a_message_too_large_for_the_wire_is_refused(mallory: FakeDevice) -> None:
    huge = pb.FamilyStatistics(family="layer", similarity=[1.0] * (2 << 20))
    with pytest.raises(FedPrunerError):
        mallory.push(mallory.statistics(families=[huge]))


def test_an_update_for_a_survey_is_refused(mallory: FakeDevice) -> None:
    header = pb.UpdateHeader(
        client_id="mallory", session=mallory.session, task_id="probe-1-mallory", num_examples=1
    )
    with pytest.raises(StaleRound):
        mallory.send(header, [])
    with pytest.raises(StaleRound):
        mallory.call(mallory.stub.PushUpdate, iter([header]))


def test_someone_elses_survey_cannot_be_failed(mallory: FakeDevice) -> None:
    request = pb.ReportFailureRequest(
        client_id="mallory", session=mallory.session, task_id="probe-1-alice", reason="no"
    )
    with pytest.raises(StaleRound):
        mallory.call(mallory.stub.ReportFailure, request)


def test_after_all_that_honest_statistics_are_taken_and_the_round_begins(
    server: Program, devices: tuple[FakeDevice, FakeDevice]
) -> None:
    """Runs last in this file."""
    mallory, alice = devices
    # Both are still waited for: nothing of the above has counted.
    for device in devices:
        assert device.pull("probe").task_id == f"probe-1-{device.client_id}"
    mallory.push(mallory.statistics(num_tokens=MAX_TOKENS))
    mallory.push(mallory.statistics())  # the answer got lost: harmless
    alice.push(alice.statistics())
    for device in devices:
        assert device.pull("task").task_id == f"round-1-{device.client_id}"
    with pytest.raises(StaleRound, match="not waited for"):
        mallory.push(mallory.statistics())
    for device in devices:
        request = pb.ReportFailureRequest(
            client_id=device.client_id,
            session=device.session,
            task_id=f"round-1-{device.client_id}",
            reason="enough of this",
        )
        device.call(device.stub.ReportFailure, request)
    for device in devices:
        assert device.pull("finished")
    assert server.wait() == 0
    assert "bug" not in server.output()
    assert "Traceback" not in server.output()
