"""Which configurations the byte model is held against; most of them drawn by lot, once."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.memory.agent import Bench, Setup, spread
from benchmarks.memory.models import FAMILIES, Shape
from benchmarks.memory.records import RESULTS, Record, read
from fedpruner_common.components import Kind
from fedpruner_common.task import NO_BRIDGE, BridgeKind, BridgeSettings
from fedpruner_server.config import LoraOptions, TrainingOptions

RECORDS = RESULTS / "memory.jsonl"
BEFORE = RESULTS / "memory-before.jsonl"
_PER_FAMILY = 5
_MAX_LOGITS = 100_000_000  # of a draw with unchunked loss: 1.2 GB of them and their gradients
_SPREADS: dict[str, list[Any]] = {
    "kept": [2, 3, 4, 6],
    "dtypes": [
        ("float32", "auto"),
        ("bfloat16", "auto"),
        ("float32", "bfloat16"),
        ("bfloat16", "float32"),
    ],
    "vocab": [2048, 32_000, 150_000],
    "gradient_checkpointing": [False, True],
    "loss_chunk": ["auto", 0, 64],
    "optim": ["adamw", "adamw_8bit"],
    "r": [8, 64],
}
_FIRST: dict[str, list[Any]] = {
    "hidden": [192, 256, 384],
    "batch": [(2, 256), (4, 256), (8, 128), (4, 512), (2, 1024), (1, 1024), (8, 256)],
    "bridge": [NO_BRIDGE],
}
_SECOND: dict[str, list[Any]] = {
    "hidden": [128, 320, 448],
    "batch": [(3, 320), (6, 192), (16, 64), (1, 768), (2, 512), (5, 384)],
    "bridge": [NO_BRIDGE, NO_BRIDGE, NO_BRIDGE, BridgeSettings(corrected=True)],
}


@dataclass(frozen=True)
class Case:
    """A configuration with a name.

    Attributes:
        fresh: never looked at while the byte model was made or corrected.
    """

    name: str
    setup: Setup
    fresh: bool = False


def cases() -> list[Case]:
    """All configurations; the same ones every time."""
    first = _drawn("memory", "drawn", _FIRST, fresh=False)
    second = _drawn("memory, the third lot", "drawn last", _SECOND, fresh=True)
    return [*_known(), *first, *_chosen(), *second]


def missing(records: list[Record], names: list[str]) -> list[Case]:
    """Cases without a record, of those named if any are; of one shape together."""
    done = {record["name"] for record in records}
    wanted = [c for c in cases() if c.name not in done and (not names or c.name in names)]
    return sorted(wanted, key=lambda case: repr(case.setup.shape))


def measure(case: Case, bench: Bench) -> Record:
    """A record of one case."""
    setup = case.setup
    training = setup.training
    return {
        "name": case.name,
        "family": setup.shape.family,
        "of_layers": setup.shape.layers,
        "hidden": setup.shape.hidden,
        "vocab": setup.shape.vocab,
        "stored": setup.shape.stored,
        "kept": list(setup.kept),
        "halves": [kind.value for kind in setup.halves],
        "batch": training.per_device_train_batch_size,
        "seq_len": training.max_seq_length,
        "dtype": training.dtype,
        "gradient_checkpointing": training.gradient_checkpointing,
        "asked_loss_chunk": training.loss_chunk,
        "optim": training.optim,
        "r": setup.lora.r,
        "lora_dropout": setup.lora.lora_dropout,
        "bridge": setup.bridge.kind.value,
        "corrected": setup.bridge.corrected,
        "streamed": len(setup.streamed),
        **bench.measure(setup),
    }


def records(path: Path = RECORDS) -> list[Record]:
    """Records of cases that there are, with the errors."""
    known = {case.name: case for case in cases()}
    return [
        with_errors({**record, "fresh": known[record["name"]].fresh})
        for record in read(path)
        if record["name"] in known
    ]


def with_errors(record: Record) -> Record:
    """A record with the prediction's relative errors: of the peak, and of what is above floor."""
    floor, predicted = record["floor_bytes"], record["predicted_bytes"]
    measured = record["measured_bytes"]
    return {
        **record,
        "error": predicted / measured - 1,
        "error_above_floor": (predicted - floor) / (measured - floor) - 1,
    }


def _training(batch: int, seq_len: int, **others: Any) -> TrainingOptions:
    return TrainingOptions(
        per_device_train_batch_size=batch, max_seq_length=seq_len, max_steps=2, **others
    )


def _known() -> Iterator[Case]:
    """The model and shapes that the byte model's constants were looked at with."""
    for batch, seq_len in ((4, 128), (8, 256), (4, 1024)):
        for layers, dtype, again in (
            (2, "float32", False),
            (12, "float32", False),
            (12, "float32", True),
            (12, "bfloat16", False),
        ):
            training = _training(batch, seq_len, dtype=dtype, gradient_checkpointing=again)
            name = f"demo {layers} of 12, {batch} x {seq_len}, {dtype}" + ", again" * again
            yield Case(name, Setup(Shape(), tuple(range(layers)), training))


def _drawn(lot: str, prefix: str, own: dict[str, list[Any]], *, fresh: bool) -> Iterator[Case]:
    """Every family a few times; each other choice as often as the next, in an order by lot."""
    rng = random.Random(lot)
    count = _PER_FAMILY * len(FAMILIES)
    columns = {}
    for name, values in {**_SPREADS, **own}.items():
        column = (values * count)[:count]
        rng.shuffle(column)
        columns[name] = column
    for index in range(count):
        draw = {name: column[index] for name, column in columns.items()}
        family, (batch, seq_len) = FAMILIES[index % len(FAMILIES)], draw["batch"]
        stored, dtype = draw["dtypes"]
        loss_chunk = draw["loss_chunk"]
        if loss_chunk == 0 and batch * seq_len * draw["vocab"] > _MAX_LOGITS:
            loss_chunk = "auto"
        again = draw["gradient_checkpointing"]
        training = _training(
            batch,
            seq_len,
            dtype=dtype,
            gradient_checkpointing=again,
            loss_chunk=loss_chunk,
            optim=draw["optim"],
        )
        setup = Setup(
            Shape.of(family, hidden=draw["hidden"], layers=6, vocab=draw["vocab"], stored=stored),
            spread(6, draw["kept"]),
            training,
            LoraOptions(r=draw["r"], lora_alpha=16),
            draw["bridge"],
        )
        yield Case(f"{prefix} {index + 1}, {family}", setup, fresh)


def _chosen() -> Iterator[Case]:
    """What a draw would not bring: bridges, sweeps, streaming, single halves, a larger model."""
    llama = Shape.of("llama", hidden=256, layers=8, vocab=32_000)
    qwen = Shape.of("qwen3", hidden=256, layers=8, vocab=32_000, stored="bfloat16")
    large = Shape.of("llama", hidden=512, layers=12, vocab=32_000, stored="bfloat16")
    training = _training(4, 256)
    four = spread(8, 4)
    corrected = BridgeSettings(corrected=True)
    low_rank = BridgeSettings(BridgeKind.LOWRANK, rank=32, local=True, corrected=True)
    full = BridgeSettings(BridgeKind.FULL, local=True)
    yield Case("correction, llama", Setup(llama, four, training, bridge=corrected))
    yield Case("correction, qwen3 in bfloat16", Setup(qwen, four, training, bridge=corrected))
    yield Case("low-rank bridge and correction", Setup(llama, four, training, bridge=low_rank))
    yield Case("full bridge of its own", Setup(llama, (0, 7), training, bridge=full))
    everything = tuple(range(8))
    yield Case("all layers streamed", Setup(llama, everything, training, streamed=everything))
    yield Case(
        "half the layers streamed, float32 of bfloat16",
        Setup(qwen, everything, _training(4, 256, dtype="float32"), streamed=(1, 2, 3, 4)),
    )
    yield Case("attention only", Setup(llama, four, training, halves=(Kind.ATTENTION,)))
    yield Case("ffn only", Setup(llama, four, training, halves=(Kind.FFN,)))
    dropout = LoraOptions(r=16, lora_dropout=0.05)
    yield Case("LoRA with dropout", Setup(llama, four, training, dropout))
    again = _training(4, 512, gradient_checkpointing=True, optim="adamw_8bit")
    yield Case("large, everything saved", Setup(large, spread(12, 12), _training(4, 512)))
    yield Case("large, everything on", Setup(large, spread(12, 12), again, LoraOptions(r=16)))
    yield Case("large, 2 layers", Setup(large, (0, 11), _training(8, 512)))
    yield Case(
        "large, rank 256, 8 bit",
        Setup(large, spread(12, 12), _training(1, 64, optim="adamw_8bit"), LoraOptions(r=256)),
    )
    yield Case(
        "large, rank 256, 32 bit",
        Setup(large, spread(12, 12), _training(1, 64), LoraOptions(r=256)),
    )
