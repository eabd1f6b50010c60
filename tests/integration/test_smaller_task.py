"""A device whose memory runs out gets a smaller task in the same round, also across a restart."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_agent import GIB, FakeAgent
from federation import Federation, Start, at_address
from programs import address_of, server_config, when_ready
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from fedpruner_common.errors import BudgetTooSmall, StaleRound
from fedpruner_common.pb import federation_pb2 as pb

KILLED = "training was killed, out of memory? (budget 4 GiB)"


class Device(FakeAgent):
    """Trains nothing and says what a test wants; its budget holds the whole model."""

    def task(self) -> pb.Task:
        task: pb.Task = self.pull("task")
        return task

    def fail(self, task: pb.Task, *, budget: int = 0) -> None:
        request = pb.ReportFailureRequest(
            client_id=self.client_id,
            session=self.session,
            task_id=task.task_id,
            reason=KILLED,
            out_of_memory=True,
            memory_budget_bytes=budget,
        )
        self.call(self.stub.ReportFailure, request)

    def push(self, task: pb.Task, *, rungs: tuple[str, ...] = ()) -> None:
        """The adapter as it came, as an update."""
        request = pb.FetchAdapterRequest(
            client_id=self.client_id, session=self.session, task_id=task.task_id
        )
        fetched = load_safetensors(b"".join(c.data for c in self.stub.FetchAdapter(request)))
        modules = set(task.lora.target_modules)
        own: dict[str, np.ndarray] = {
            name: value
            for name, value in fetched.items()
            if name.removeprefix("base_model.model.").rpartition(".lora_")[0] in modules
        }
        data = save_safetensors(own)

        header = pb.UpdateHeader(
            client_id=self.client_id,
            session=self.session,
            task_id=task.task_id,
            round=task.round,
            num_examples=10,
            num_tokens=100,
            train_loss_first=2.0,
            train_loss_last=1.0,
            measured_peak_bytes=task.predicted_peak_bytes,
            train_s=1.0,
            rungs=rungs,
        )
        self.send_file(header, data)


@pytest.fixture
def federation(start: Start, tmp_path: Path) -> Federation:
    return Federation(start, tmp_path)


@pytest.fixture
def config(tmp_path: Path, small_model: Path, texts: dict[str, Path]) -> Path:
    return server_config(
        tmp_path / "server.toml",
        small_model,
        texts,
        run={"num_rounds": 2, "min_available_clients": 2, "lease_s": 60},
        plan={"margin": 0.0},  # of this model, a margin would be more than the model
    )


def size_of(task: pb.Task) -> int:
    return len(task.components)


def test_a_smaller_task_in_the_same_round_and_never_that_size_again(
    federation: Federation, config: Path
) -> None:
    address = address_of(federation.server(config))
    phone, laptop = Device(address, "phone"), Device(address, "laptop")
    first = phone.task()
    phone.fail(first)
    second = phone.task()
    assert (second.round, size_of(second) < size_of(first)) == (1, True)
    assert second.task_id != first.task_id
    assert second.predicted_peak_bytes < first.predicted_peak_bytes
    with pytest.raises(StaleRound):
        phone.fail(first)  # said again, it means nothing
    phone.fail(second)
    third = phone.task()
    assert size_of(third) < size_of(second)
    phone.push(third)
    other = laptop.task()
    assert size_of(other) == size_of(first)  # nothing was wrong with it elsewhere
    laptop.push(other)

    # The next round knows, and so does the operator.
    again = phone.task()
    assert again.round == 2
    assert again.predicted_peak_bytes < second.predicted_peak_bytes
    admin = when_ready(address)
    rounds = admin.rounds().rounds
    of_phone = next(c for c in rounds[0].clients if c.client_id == "phone")
    assert list(of_phone.too_large) == [size_of(first), size_of(second)]
    device = next(d for d in admin.devices().devices if d.client_id == "phone")
    assert device.too_much_bytes == second.predicted_peak_bytes - GIB
    assert KILLED in device.last_failure


def test_what_a_device_could_only_do_with_less_is_not_planned_again(
    federation: Federation, config: Path
) -> None:
    address = address_of(federation.server(config))
    phone, laptop = Device(address, "phone"), Device(address, "laptop")
    first = phone.task()
    phone.push(first, rungs=("micro-batch 4 -> 2",))
    laptop.push(laptop.task())
    assert phone.task().predicted_peak_bytes < first.predicted_peak_bytes
    client = next(c for c in when_ready(address).rounds().rounds[0].clients
                  if c.client_id == "phone")  # fmt: skip
    assert list(client.rungs) == ["micro-batch 4 -> 2"]


def test_when_nothing_is_small_enough_the_round_goes_on_without_the_device(
    federation: Federation, config: Path
) -> None:
    server = federation.server(config)
    address = address_of(server)
    phone, laptop = Device(address, "phone"), Device(address, "laptop")
    laptop.push(laptop.task())
    tried: list[pb.Task] = []

    def try_for_ever() -> None:
        while True:
            tried.append(phone.task())
            phone.fail(tried[-1])

    with pytest.raises(BudgetTooSmall, match="smallest submodel"):
        try_for_ever()
    assert [size_of(t) for t in tried] == sorted({size_of(t) for t in tried}, reverse=True)
    server.wait_for("round closed")
    of_phone = next(r for r in federation.rows("client") if r["client_id"] == "phone")
    assert of_phone["outcome"] == "failed"
    assert of_phone["reason"] == f"{KILLED}; nothing smaller is possible"
    assert of_phone["too_large"] == [size_of(task) for task in tried]


def test_less_free_memory_means_a_smaller_task_for_as_long_as_it_is_less(
    federation: Federation, config: Path
) -> None:
    address = address_of(federation.server(config))
    phone, laptop = Device(address, "phone"), Device(address, "laptop")
    first = phone.task()
    less = first.predicted_peak_bytes - 1
    phone.fail(first, budget=less)
    second = phone.task()
    assert second.predicted_peak_bytes <= less
    phone.push(second)
    laptop.push(laptop.task())
    request = pb.PullTaskRequest(
        client_id="phone", session=phone.session, wait_s=15, memory_budget_bytes=4 * GIB
    )
    assert size_of(phone.call(phone.stub.PullTask, request).task) == size_of(first)


def test_a_killed_coordinator_still_owes_the_smaller_task(
    federation: Federation, config: Path
) -> None:
    server = federation.server(config)
    address = address_of(server)
    phone, laptop = Device(address, "phone"), Device(address, "laptop")
    first: Any = phone.task()
    laptop.push(laptop.task())
    phone.fail(first)
    server.kill()
    federation.server(at_address(config, address))
    when_ready(address)
    phone, laptop = Device(address, "phone"), Device(address, "laptop")
    deadline = time.monotonic() + 60
    while (second := phone.task()).task_id == first.task_id:  # it is being planned
        assert time.monotonic() < deadline
    assert (second.round, size_of(second) < size_of(first)) == (1, True)
    phone.push(second)
    assert phone.task().round == 2
