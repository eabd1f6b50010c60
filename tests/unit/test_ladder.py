"""What is made smaller when memory runs out, in which order."""

from dataclasses import replace

import pytest

from fedpruner_client.ladder import next_rung
from fedpruner_common.task import TrainingSettings

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


def climb(training):
    """Every rung's name and settings."""
    rungs = []
    while (found := next_rung(training)) is not None:
        rungs.append(found)
        training = found[1]
    return rungs


def test_the_ladder_in_order():
    assert [name for name, _ in climb(TRAINING)] == [
        "micro-batch 8 -> 4",
        "micro-batch 4 -> 2",
        "micro-batch 2 -> 1",
        "gradient checkpointing",
        "loss chunk 256 -> 64",
    ]


@pytest.mark.parametrize("batch", range(1, 17))
def test_a_step_sees_as_many_sequences_on_every_rung(batch):
    training = replace(TRAINING, per_device_train_batch_size=batch)
    for _, settings in climb(training):
        size = settings.per_device_train_batch_size
        assert size * settings.gradient_accumulation_steps == 3 * batch


@pytest.mark.parametrize(
    ("batch", "sizes"), [(6, [3, 1]), (7, [1]), (9, [3, 1]), (12, [6, 3, 1]), (1, [])]
)
def test_a_micro_batch_is_divided_without_remainder(batch, sizes):
    training = replace(TRAINING, per_device_train_batch_size=batch)
    found = [settings.per_device_train_batch_size for _, settings in climb(training)]
    assert found[: len(sizes)] == sizes
    assert set(found[len(sizes) :]) == {1}


def test_what_is_as_small_as_it_gets_is_not_made_smaller():
    smallest = replace(
        TRAINING, per_device_train_batch_size=1, gradient_checkpointing=True, loss_chunk=64
    )
    assert next_rung(smallest) is None
    assert next_rung(replace(smallest, loss_chunk=0, max_seq_length=64)) is None


def test_nothing_but_memory_changes():
    last = climb(TRAINING)[-1][1]
    assert (
        replace(
            last,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=3,
            gradient_checkpointing=False,
            loss_chunk=0,
        )
        == TRAINING
    )
