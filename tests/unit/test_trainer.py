"""What the agent does when its training process runs out of memory, and when it ends otherwise."""

import json
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fedpruner_client.cache import Cache
from fedpruner_client.config import AgentSettings
from fedpruner_client.trainer import Trainer
from fedpruner_common.child import Child
from fedpruner_common.errors import ChildDied, DataError, OutOfMemory
from fedpruner_common.submodel import Submodel
from fedpruner_common.task import LoraSettings, Task, TrainingSettings

HERE = str(Path(__file__).parent)
BUDGET = 3 << 30
TRAINING = TrainingSettings(
    per_device_train_batch_size=8,
    gradient_accumulation_steps=3,
    max_steps=5,
    max_seq_length=256,
    learning_rate=0.1,
    weight_decay=0.0,
    max_grad_norm=1.0,
    gradient_checkpointing=False,
    dtype="float32",
    seed=7,
)
BATCH_OF_2 = {"per_device_train_batch_size": 2}
NOTHING = {"max_steps": -1}
LADDER = [
    "micro-batch 8 -> 4",
    "micro-batch 4 -> 2",
    "micro-batch 2 -> 1",
    "gradient checkpointing",
    "loss chunk 256 -> 64",
]


def task_of(training=TRAINING, task_id="t1"):
    submodel = Submodel.full(2)
    lora = LoraSettings(4, 8.0, 0.0, ("q_proj",))
    return Task(task_id, 1, submodel, (), (), lora, training, predicted_peak_bytes=0)


class Bench:
    """A trainer whose process is a stand-in."""

    def __init__(self, folder, *, fits, end):
        self._attempts = folder / "attempts.jsonl"
        self._cache = Cache(folder / "cache", limit_bytes=1 << 20)
        self.trainer = Trainer(
            AgentSettings(data=[folder / "train.jsonl"], name="pi", state_dir=folder)
        )
        self.trainer._child = Child(
            "trainer_stand_in",
            log_path=folder / "training.log",
            env={
                "PYTHONPATH": HERE,
                "ATTEMPTS": str(self._attempts),
                "FITS": json.dumps(fits),
                "END": end,
            },
        )

    def train(self, task, on_progress=lambda _: None):
        return self.trainer.train(task, self._cache, on_progress, memory_budget_bytes=BUDGET)

    def attempts(self):
        """Process and settings of every attempt."""
        lines = map(json.loads, self._attempts.read_text().splitlines())
        return [(line["pid"], TrainingSettings(**line["training"])) for line in lines]


@pytest.fixture
def bench(tmp_path):
    made = []

    def make(fits, end):
        made.append(Bench(tmp_path, fits=fits, end=end))
        return made[-1]

    yield make
    for one in made:
        one.trainer.close()


def test_what_fits_is_trained_once_as_asked(bench):
    device = bench({}, "killed")
    steps = []
    metrics, path = device.train(task_of(), lambda values: steps.append(values["step"]))
    assert [training for _, training in device.attempts()] == [TRAINING]
    assert metrics.rungs == ()
    assert (metrics.num_examples, metrics.measured_peak_bytes) == (10, 4096)
    assert path.name == "update.safetensors"
    assert steps == [5]


@pytest.mark.parametrize("end", ["killed", "out_of_memory"])
def test_without_memory_the_ladder_is_climbed_until_the_task_fits(bench, end):
    device = bench(BATCH_OF_2, end)
    metrics, _ = device.train(task_of())
    assert metrics.rungs == ("micro-batch 8 -> 4", "micro-batch 4 -> 2")
    pids, tried = zip(*device.attempts(), strict=True)
    # An optimizer step is of 24 sequences all along, and nothing else is another.
    sizes = [(t.per_device_train_batch_size, t.gradient_accumulation_steps) for t in tried]
    assert sizes == [(8, 3), (4, 6), (2, 12)]
    unchanged = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 3}
    assert {replace(training, **unchanged) for training in tried} == {TRAINING}
    # What is left in a process that ran out of memory would be in the next attempt's way.
    assert len(set(pids)) == 3


def test_the_ladder_goes_beyond_the_micro_batch(bench):
    device = bench({"loss_chunk": 64}, "killed")
    metrics, _ = device.train(task_of())
    assert list(metrics.rungs) == LADDER
    last = device.attempts()[-1][1]
    assert last == replace(
        TRAINING,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=24,
        gradient_checkpointing=True,
        loss_chunk=64,
    )


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("killed", "training was killed, out of memory? (budget 3 GiB)"),
        ("out_of_memory", "memory ran out: not enough of it"),
    ],
)
def test_where_nothing_is_left_to_make_smaller_the_rungs_are_named(bench, end, reason):
    device = bench(NOTHING, end)
    with pytest.raises(OutOfMemory) as caught:
        device.train(task_of())
    assert str(caught.value) == f"{reason} after {', '.join(LADDER)}"
    assert len(device.attempts()) == 1 + len(LADDER)
    assert device.trainer.pid is None


def test_what_is_as_small_as_it_gets_is_tried_once(bench):
    smallest = replace(
        TRAINING, per_device_train_batch_size=1, gradient_checkpointing=True, loss_chunk=64
    )
    device = bench(NOTHING, "out_of_memory")
    with pytest.raises(OutOfMemory) as caught:
        device.train(task_of(smallest))
    assert str(caught.value) == "memory ran out: not enough of it"
    assert len(device.attempts()) == 1


def test_the_next_task_begins_with_its_own_settings(bench):
    device = bench(BATCH_OF_2, "killed")
    device.train(task_of())
    other = replace(TRAINING, per_device_train_batch_size=4, seed=8)
    metrics, _ = device.train(task_of(other, "t2"))
    assert metrics.rungs == ("micro-batch 4 -> 2",)
    tried = [asdict(training) for _, training in device.attempts()]
    assert [(t["per_device_train_batch_size"], t["seed"]) for t in tried] == [
        (8, 7), (4, 7), (2, 7), (4, 8), (2, 8),
    ]  # fmt: skip


def test_a_task_that_is_aborted_is_not_tried_with_less(bench):
    device = bench({"per_device_train_batch_size": 4}, "hang")
    running = threading.Event()
    aborting = threading.Thread(target=lambda: running.wait(60) and device.trainer.abort())
    aborting.start()
    with pytest.raises(ChildDied) as caught:
        device.train(task_of(), lambda _: running.set())
    aborting.join()
    assert caught.value.returncode == -9
    assert len(device.attempts()) == 1


def test_after_an_aborted_task_the_ladder_is_there_again(bench):
    device = bench(BATCH_OF_2, "killed")
    device.trainer.abort()
    metrics, _ = device.train(task_of())
    assert metrics.rungs == ("micro-batch 8 -> 4", "micro-batch 4 -> 2")


def test_data_that_cannot_be_used_is_not_tried_again(bench):
    device = bench(NOTHING, "no_data")
    with pytest.raises(DataError, match=r"^train\.jsonl: line 3 is not JSON$"):
        device.train(task_of())
    ((pid, _),) = device.attempts()
    assert device.trainer.pid == pid


def test_a_process_that_leaves_for_another_reason_is_not_tried_again(bench):
    device = bench(NOTHING, "leave")
    with pytest.raises(ChildDied, match="the last words") as caught:
        device.train(task_of())
    assert caught.value.returncode == 3
    assert len(device.attempts()) == 1
