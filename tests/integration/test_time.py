"""What only time brings about: leases, devices that get nowhere, transfers that stall, clocks."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import repeat
from typing import Any

import psutil
import pytest
from blake3 import blake3
from fake_agent import FakeAgent
from invariants import check
from jumping_clock import JUMP_S
from lightbed import (
    BASE_BYTES,
    MIB,
    UPDATE_BYTES,
    Bed,
    ended_well,
    status_of,
    training_process,
    wait_until,
)
from proxy import Proxy

from fedpruner_common.chunks import make_chunk
from fedpruner_common.errors import Unavailable
from fedpruner_common.pb import federation_pb2 as pb
from fedpruner_server.clock import Clock


@pytest.fixture
def clean() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_a_device_that_gets_nowhere_fails_by_name_and_the_round_goes_on_without_it(
    bed: Bed,
) -> None:
    run = {"lease_s": 3, "progress_timeout_s": 1.5, "min_available_clients": 2, "num_rounds": 1}
    server = bed.server(run=run)
    stuck = bed.agent("stuck", steps=3, hang_at=1)
    fine = bed.agent("fine")
    server.wait_for("device hangs")
    child = training_process(stuck)
    ended_well(server, fine, stuck)
    child.wait(10)  # its agent ended it
    outcome, reason = bed.outcomes()["stuck"]
    assert outcome == "failed"
    assert reason.startswith("no progress for ")
    assert reason.endswith(" s (training, step 1 of 3)")
    assert bed.outcomes()["fine"] == ("stored", "")
    assert "the coordinator no longer wants this task: stopping" in stuck.output()
    check(bed.state_dir, bed.config, num_rounds=1)


def test_a_run_whose_devices_all_hang_ends_and_says_who_and_why(bed: Bed) -> None:
    run = {"lease_s": 3, "progress_timeout_s": 1, "max_abandoned_rounds": 1, "num_rounds": 5}
    bed.server(run=run, stay=True)
    bed.agent("stuck", steps=3, hang_at=2)
    wait_until(lambda: "the run failed" in status_of(bed), "the run is over")
    admin = bed.admin()
    status, (device,), (round_1,) = (
        admin.status(),
        admin.devices().devices,
        admin.rounds().rounds,
    )
    admin.close()
    assert status.state == "failed"
    for told in (status.explanation, round_1.explanation):
        assert "stuck: no progress for " in told
        assert "step 2 of 3" in told
    assert device.last_failure.startswith("no progress for ")
    (client,) = round_1.clients
    assert (client.client_id, client.outcome) == ("stuck", "failed")


@pytest.mark.parametrize("offline_training_s", [None, 60])
def test_an_agent_whose_lease_is_gone_stops_training_unless_it_is_to_go_on_without(
    bed: Bed, clean: ExitStack, offline_training_s: float | None
) -> None:
    server = bed.server(run={"lease_s": 1.5, "min_available_clients": 2})
    proxy = clean.enter_context(Proxy(bed.address))
    patience = {"offline_training_s": offline_training_s} if offline_training_s else {}
    # When it has to begin anew, there is not enough time left before the other one is done.
    steps = 50 if offline_training_s else 200
    cut_off = bed.agent(
        "cut-off", proxy.address, steps=steps, step_s=0.1, keepalive_s=1, **patience
    )
    slow = bed.agent("slow", steps=80, step_s=0.1)
    wait_until(lambda: proxy.bytes_down > BASE_BYTES + UPDATE_BYTES, "it has its task")
    wait_until(lambda: psutil.Process(cut_off.pid).children(), "it trains")
    child = training_process(cut_off)
    proxy.swallow()
    server.wait_for("device lost: no heartbeat client=cut-off")
    if offline_training_s is None:
        cut_off.wait_for("no word from the coordinator for ")
        child.wait(5)
        proxy.mend()
    else:
        wait_until((bed.folder / "cut-off/task/finished.json").exists, "it has trained all of it")
        assert child.is_running()
        proxy.mend()
        server.wait_for("update stored client=cut-off")
    ended_well(server, cut_off, slow)
    expected = ("stored", "") if offline_training_s else ("lost", "no heartbeat")
    assert bed.outcomes() == {"cut-off": expected, "slow": ("stored", "")}
    check(bed.state_dir, bed.config, num_rounds=1)


def test_a_run_that_waits_for_devices_in_vain_ends_and_says_which_were_there(bed: Bed) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        bed.address = f"127.0.0.1:{free.getsockname()[1]}"
    agents = gone, there = bed.agent("gone"), bed.agent("there")
    for agent in agents:  # they are there before the waiting begins, however long they take
        agent.wait_for("cannot join, trying again")
    server = bed.server(run={"min_available_clients": 3, "lease_s": 2, "gather_deadline_s": 6})
    gone.wait_for("joined")
    gone.kill()
    assert server.wait() == 1
    (told,) = [line for line in server.output().splitlines() if "state=failed" in line]
    assert "gave up waiting for 2 of 3 agents after 6 s (gone was last heard " in told
    assert "there was" not in told
    assert there.wait() == 0


def stalled_download(agent: FakeAgent, content_hash: str) -> Any:
    """A stream of which only the first chunk is read."""
    request = pb.FetchBlobsRequest(
        client_id=agent.client_id,
        session=agent.session,
        blobs=repeat(pb.BlobRange(hash=content_hash), 60),
    )
    stream = agent.stub.FetchBlobs(request)
    next(stream)
    return stream


def test_a_reader_that_stalls_is_hung_up_on_and_its_slot_is_the_next_ones(bed: Bed) -> None:
    server = bed.server(
        run={"min_available_clients": 2}, transfer={"max_downloads": 1, "idle_s": 1.0}
    )
    lazy = FakeAgent(bed.address, "lazy")
    agent = bed.agent("one")
    hashes = [t.hash for t in lazy.pull("task").tensors if t.num_bytes > MIB]
    agent.wait_for("fetched")  # its own is over
    stream = stalled_download(lazy, hashes[0])
    other = FakeAgent(bed.address, "other")
    request = pb.FetchBlobsRequest(
        client_id="other", session=other.session, blobs=[pb.BlobRange(hash=hashes[1])]
    )
    began = time.monotonic()
    chunks = [c for c in other.stub.FetchBlobs(request, timeout=15) if c.data]
    waited_s = time.monotonic() - began
    assert blake3(b"".join(c.data for c in chunks)).hexdigest() == hashes[1]
    assert 0.8 < waited_s < 10
    with pytest.raises(Unavailable, match="nothing has moved for 1 s"):
        FakeAgent.call(lambda *_, **__: list(stream), None)
    assert server.process.poll() is None
    for fake in (lazy, other):
        fake.channel.close()


def test_an_upload_that_stalls_is_ended_and_the_next_device_gets_its_slot(bed: Bed) -> None:
    server = bed.server(
        run={"min_available_clients": 2, "lease_s": 8},
        transfer={"max_uploads": 1, "idle_s": 1.5},
    )
    lazy = FakeAgent(bed.address, "lazy")
    agent = bed.agent("one", steps=1, step_s=2)
    task = lazy.pull("task")
    header = pb.UpdateHeader(
        client_id="lazy",
        session=lazy.session,
        task_id=task.task_id,
        round=1,
        num_examples=1,
        num_bytes=UPDATE_BYTES,
        hash="0" * 64,
    )
    silence = threading.Event()

    def messages() -> Iterator[Any]:
        yield header
        yield make_chunk(bytes(MIB), blob=0, offset=0)
        silence.wait()

    request = pb.OpenUploadRequest(header=header, wait_s=15)
    reply = FakeAgent.call(lazy.stub.OpenUpload, request)
    assert reply.state == pb.OpenUploadReply.GRANTED
    with ThreadPoolExecutor(1) as thread:
        uploading = thread.submit(lazy.call, lazy.stub.PushUpdate, messages())
        with pytest.raises(Unavailable, match=r"nothing has moved for 1\.5 s"):
            uploading.result(15)
        silence.set()
    server.wait_for("update stored client=one")
    # What came before it stalled need not travel again.
    again = FakeAgent.call(lazy.stub.OpenUpload, request)
    assert (again.state, again.offset) == (pb.OpenUploadReply.GRANTED, MIB)
    lazy.channel.close()
    ended_well(server, agent)
    assert bed.outcomes() == {"lazy": ("lost", "no heartbeat"), "one": ("stored", "")}
    check(bed.state_dir, bed.config, num_rounds=1)


def test_with_one_slot_two_updates_come_in_one_after_the_other(bed: Bed) -> None:
    server = bed.server(
        run={"min_available_clients": 2},
        transfer={"max_uploads": 1, "max_bytes_per_s": 5 * MIB},
    )
    agents = [bed.agent(name) for name in ("one", "two")]
    ended_well(server, *agents)
    first, second = sorted(bed.stored_at().values())
    assert second - first > 0.8 * UPDATE_BYTES / (5 * MIB)
    check(bed.state_dir, bed.config, num_rounds=1)


@pytest.mark.parametrize("jump_s", [JUMP_S, -JUMP_S])
def test_the_coordinators_clock_does_not_jump_with_the_machines(
    monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    clock = Clock()
    before, wall = clock.now(), time.time
    assert abs(before - wall()) < 1
    monkeypatch.setattr(time, "time", lambda: wall() + jump_s)
    assert 0 <= clock.now() - before < 1
    assert abs(Clock().now() - (wall() + jump_s)) < 1  # a restart takes up the new time


def test_a_round_outlives_a_jump_of_the_wall_clock_in_either_direction(bed: Bed) -> None:
    through = ("jumping_clock", "fedpruner_server.cli")
    run = {"num_rounds": 2, "round_deadline_s": 60, "lease_s": 5}
    server = bed.server(run=run, through=through)
    agent = bed.agent("one", steps=10, step_s=0.1)
    for number, jump in ((1, signal.SIGUSR1), (2, signal.SIGUSR2)):
        server.wait_for(f"round {number} of 2: 1 devices train")
        os.kill(server.pid, jump)
    ended_well(server, agent)
    assert server.output().count("the clock says ") == 2
    for row in bed.rows("round"):
        assert row["phase"] == "done"
        assert 0.9 < row["seconds"] < 30
    check(bed.state_dir, bed.config, num_rounds=2)
