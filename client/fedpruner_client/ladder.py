"""What a device makes smaller when memory runs out, one rung after another.

Every rung leaves the round's optimizer steps what they were, up to the order of sums: a smaller
micro-batch is accumulated more often, activations are computed again instead of kept, the loss
takes fewer tokens at a time. What is left after the last rung is a smaller submodel, and that is
the coordinator's to choose: it knows what the parts are worth.
"""

from dataclasses import replace

from fedpruner_common.task import SMALLEST_LOSS_CHUNK, TrainingSettings


def next_rung(training: TrainingSettings) -> tuple[str, TrainingSettings] | None:
    """What to make smaller next, for people, and the settings with it; None after the last rung."""
    batch = training.per_device_train_batch_size
    if batch > 1:
        smaller = max(size for size in range(1, batch // 2 + 1) if batch % size == 0)
        accumulated = training.gradient_accumulation_steps * batch // smaller
        return f"micro-batch {batch} -> {smaller}", replace(
            training,
            per_device_train_batch_size=smaller,
            gradient_accumulation_steps=accumulated,
        )
    if not training.gradient_checkpointing:
        return "gradient checkpointing", replace(training, gradient_checkpointing=True)
    chunk = training.loss_chunk or training.max_seq_length
    if chunk > SMALLEST_LOSS_CHUNK:
        name = f"loss chunk {chunk} -> {SMALLEST_LOSS_CHUNK}"
        return name, replace(training, loss_chunk=SMALLEST_LOSS_CHUNK)
    return None
