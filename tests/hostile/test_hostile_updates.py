"""Everything an agent could send instead of an update: a clear error, and the run goes on."""

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from fake_agent import GIB, FakeAgent, start_server
from programs import Program, address_of, server_config
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from fedpruner_common.chunks import make_chunk
from fedpruner_common.errors import (
    Busy,
    CorruptChunk,
    FedPrunerError,
    InvalidUpdate,
    NotFound,
    StaleRound,
    Unauthenticated,
    UnknownClient,
)
from fedpruner_common.pb import federation_pb2 as pb


class FakeTrainer(FakeAgent):
    """It can send anything as an update."""

    task = pb.Task()

    def next_task(self) -> pb.Task:
        self.task = self.pull("task")
        return self.task

    def adapter(self) -> dict[str, np.ndarray]:
        request = pb.FetchAdapterRequest(
            client_id=self.client_id, session=self.session, task_id=self.task.task_id
        )
        return load_safetensors(b"".join(c.data for c in self.stub.FetchAdapter(request)))

    def header(self, num_bytes: int, **fields: Any) -> pb.UpdateHeader:
        values: dict[str, Any] = {
            "client_id": self.client_id,
            "session": self.session,
            "task_id": self.task.task_id,
            "round": self.task.round,
            "num_examples": 10,
            "num_tokens": 100,
            "train_loss_first": 2.0,
            "train_loss_last": 1.0,
            "measured_peak_bytes": GIB,
            "num_bytes": num_bytes,
            "train_s": 1.0,
            **fields,
        }
        return pb.UpdateHeader(**values)

    def push(self, data: bytes, *, promised: int | None = None, **fields: Any) -> None:
        num_bytes = len(data) if promised is None else promised
        self.send_file(self.header(num_bytes, **fields), data)


@pytest.fixture(scope="module")
def server(
    small_model: Path, texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Program]:
    folder = tmp_path_factory.mktemp("hostile")
    config = server_config(
        folder / "server.toml",
        small_model,
        texts,
        run={"num_rounds": 2, "min_available_clients": 2, "lease_s": 120},
    )
    program = start_server(folder, config)
    yield program
    program.end()


@pytest.fixture(scope="module")
def agents(server: Program) -> tuple[FakeTrainer, FakeTrainer]:
    """Two registered agents, both with a task of round 1."""
    address = address_of(server)
    mallory, alice = FakeTrainer(address, "mallory"), FakeTrainer(address, "alice")
    mallory.next_task()
    alice.next_task()
    return mallory, alice


@pytest.fixture(scope="module")
def mallory(agents: tuple[FakeTrainer, FakeTrainer]) -> FakeTrainer:
    return agents[0]


@pytest.fixture
def good(mallory: FakeTrainer) -> dict[str, np.ndarray]:
    """What an honest agent would send."""
    return mallory.adapter()


def raw_safetensors(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def with_nan(good: dict[str, np.ndarray]) -> bytes:
    name = sorted(good)[0]
    bad = {**good, name: np.full_like(good[name], np.nan)}
    return save_safetensors(bad)


def with_one(good: dict[str, np.ndarray], change: Callable[[np.ndarray], np.ndarray]) -> bytes:
    name = sorted(good)[0]
    return save_safetensors({**good, name: np.ascontiguousarray(change(good[name]))})


def without_one(good: dict[str, np.ndarray]) -> bytes:
    return save_safetensors({name: good[name] for name in sorted(good)[1:]})


def renamed(good: dict[str, np.ndarray], new: str) -> bytes:
    first, *rest = sorted(good)
    return save_safetensors({new: good[first], **{name: good[name] for name in rest}})


BAD_FILES: dict[str, tuple[Callable[[dict[str, np.ndarray]], bytes], str]] = {
    "an unknown tensor name": (
        lambda good: renamed(good, "base_model.model.lm_head.lora_A.weight"),
        "'lm_head.lora_A' is not part of this task",
    ),
    "a name that is a path": (
        lambda good: renamed(good, "../../../etc/passwd"),
        "not a safetensors file of LoRA weights",
    ),
    "a base weight": (
        lambda good: renamed(good, "model.embed_tokens.weight"),
        "not a safetensors file of LoRA weights",
    ),
    "a missing tensor": (without_one, "is missing"),
    "a transposed tensor": (lambda good: with_one(good, np.transpose), "expected"),
    "a larger tensor": (
        lambda good: with_one(good, lambda a: np.concatenate([a, a[:1]])),
        "expected",
    ),
    "float64": (
        lambda good: with_one(good, lambda a: a.astype(np.float64)[:, : a.shape[1] // 2]),
        "expected",
    ),
    "float16": (lambda good: with_one(good, lambda a: a.astype(np.float16)), "F16, expected F32"),
    "NaN": (with_nan, "not finite"),
    "infinity": (lambda good: with_one(good, lambda a: a + np.float32(np.inf)), "not finite"),
    "a truncated file": (lambda good: save_safetensors(good)[:-100], "truncated"),
    "bytes after the end": (lambda good: save_safetensors(good) + b"x" * 8, "bytes after its end"),
    "nothing": (lambda _: b"", "not a usable safetensors"),
    "garbage": (lambda _: b"\x93NUMPY" * 50, "not a usable safetensors"),
    "a pickle": (lambda _: b"\x80\x04\x95" + b"." * 200, "not a usable safetensors"),
    "a header of 2^63 bytes": (lambda _: struct.pack("<Q", 1 << 63) + b"{}", "a header of"),
    "a header that is a list": (lambda _: raw_safetensors([], b""), "not a usable safetensors"),
    "negative offsets": (
        lambda _: raw_safetensors(
            {"x": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, b"1234"
        ),
        "not where it should be",
    ),
    "overlapping tensors": (
        lambda _: raw_safetensors(
            {
                "x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                "y": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            },
            b"1234",
        ),
        "not where it should be",
    ),
    "a shape that is not its bytes": (
        lambda _: raw_safetensors(
            {"x": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}}, b"1234"
        ),
        "not a usable safetensors",
    ),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_bad_file_is_refused_and_the_message_says_why(
    mallory: FakeTrainer, good: dict[str, np.ndarray], what: str
) -> None:
    make, message = BAD_FILES[what]
    with pytest.raises(InvalidUpdate, match=message.replace("(", r"\(")):
        mallory.push(make(good))


def test_a_promise_of_too_many_bytes_is_refused_before_they_travel(mallory: FakeTrainer) -> None:
    with pytest.raises(InvalidUpdate, match="at most"):
        mallory.push(b"", promised=10 * GIB)


def test_more_bytes_than_promised_are_refused(
    mallory: FakeTrainer, good: dict[str, np.ndarray]
) -> None:
    data = save_safetensors(good)
    with pytest.raises(CorruptChunk, match="more than the promised"):
        mallory.push(data, promised=len(data) - 8)


def test_a_stream_that_ends_early_is_refused(
    mallory: FakeTrainer, good: dict[str, np.ndarray]
) -> None:
    data = save_safetensors(good)
    with pytest.raises(InvalidUpdate, match="ended before"):
        mallory.push(data[:200], promised=len(data))


def test_a_damaged_chunk_is_refused(mallory: FakeTrainer, good: dict[str, np.ndarray]) -> None:
    data = save_safetensors(good)
    chunk = make_chunk(data, blob=0, offset=0)
    damaged = replace(chunk, data=data[:-1] + bytes([data[-1] ^ 1]))
    header = mallory.header(len(data), hash=blake3(data).hexdigest())
    with pytest.raises(CorruptChunk, match="checksum"):
        mallory.send(header, [damaged])
    # Nothing of it is kept: the next attempt begins at the start.
    reply = mallory.call(mallory.stub.OpenUpload, pb.OpenUploadRequest(header=header))
    assert (reply.state, reply.offset) == (pb.OpenUploadReply.GRANTED, 0)


def test_a_file_that_is_not_what_its_hash_says_is_refused(
    mallory: FakeTrainer, good: dict[str, np.ndarray]
) -> None:
    data = save_safetensors(good)
    with pytest.raises(CorruptChunk, match="other content than its hash"):
        mallory.push(data, hash="ab" * 32)
    with pytest.raises(InvalidUpdate, match="not a content hash"):
        mallory.push(data, hash="../../../journal.sqlite")


def test_an_upload_without_a_slot_is_refused(agents: tuple[FakeTrainer, FakeTrainer]) -> None:
    _, alice = agents  # who has not asked for one
    data = save_safetensors(alice.adapter())
    header = alice.header(len(data), hash=blake3(data).hexdigest())
    with pytest.raises(Busy, match="ask for an upload slot first"):
        alice.call(alice.stub.PushUpdate, iter([header, make_chunk(data, blob=0, offset=0)]))


def test_an_upload_that_does_not_begin_with_a_header_is_refused(mallory: FakeTrainer) -> None:
    with pytest.raises(InvalidUpdate, match="begins with its header"):
        mallory.call(mallory.stub.PushUpdate, iter([make_chunk(b"x", blob=0, offset=0)]))
    with pytest.raises(InvalidUpdate, match="begins with its header"):
        mallory.call(mallory.stub.PushUpdate, iter([]))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"round": 7}, StaleRound, "an update for round 7; .* is of round 1"),
        ({"round": 0}, StaleRound, "round 0"),
        ({"task_id": "round-1-alice"}, StaleRound, "not part of"),
        ({"task_id": "nonsense"}, StaleRound, "not part of"),
        ({"session": "guess"}, Unauthenticated, "newer session"),
        ({"client_id": "nobody"}, UnknownClient, "not registered"),
        ({"num_examples": 0}, InvalidUpdate, "num_examples"),
        ({"num_examples": 1 << 63}, InvalidUpdate, "num_examples"),
        ({"train_loss_last": float("nan")}, InvalidUpdate, "train_loss_last"),
    ],
)
def test_a_header_that_lies_is_refused(
    mallory: FakeTrainer,
    good: dict[str, np.ndarray],
    fields: dict[str, Any],
    error: type[FedPrunerError],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        mallory.push(save_safetensors(good), **fields)


def test_a_blob_that_is_not_in_the_base_model_is_not_found(mallory: FakeTrainer) -> None:
    for name in ("0" * 64, "../state/journal.sqlite", ""):
        request = pb.FetchBlobsRequest(
            client_id="mallory", session=mallory.session, blobs=[pb.BlobRange(hash=name)]
        )
        with pytest.raises(NotFound):
            mallory.call(
                lambda r, timeout: list(mallory.stub.FetchBlobs(r, timeout=timeout)), request
            )


@pytest.mark.parametrize("name", ["", "../x", "a/b", "x" * 65, "a b", "-rf"])
def test_a_client_id_that_is_not_a_plain_name_is_refused(mallory: FakeTrainer, name: str) -> None:
    with pytest.raises(InvalidUpdate, match="client id"):
        mallory.call(mallory.stub.Register, pb.RegisterRequest(client_id=name))


def test_after_all_that_the_run_completes_with_exactly_the_honest_values(
    server: Program, agents: tuple[FakeTrainer, FakeTrainer]
) -> None:
    """Runs last in this file: two honest updates a round, and the mean of them comes out."""
    mallory, alice = agents
    before = mallory.adapter()
    up = {name: values + np.float32(0.5) for name, values in before.items()}
    mallory.push(save_safetensors(up), num_examples=3)
    mallory.push(save_safetensors(up), num_examples=3)  # the answer got lost: harmless
    alice.push(save_safetensors(before), num_examples=1)
    assert mallory.next_task().round == 2
    after = mallory.adapter()
    for name, values in before.items():
        # (3 * (v + 0.5) + 1 * v) / 4 = v + 0.375
        np.testing.assert_allclose(after[name], values + 0.375, atol=1e-6)
    with pytest.raises(StaleRound):
        mallory.push(save_safetensors(up), round=1, task_id="round-1-mallory")
    alice.next_task()
    for agent in agents:
        agent.push(save_safetensors(agent.adapter()))
    for agent in agents:
        assert agent.pull("finished")
    assert server.wait() == 0
    assert "bug" not in server.output()
    assert not list(Path(server.stdout_path).parent.glob("state/updates/incoming/*/*"))
