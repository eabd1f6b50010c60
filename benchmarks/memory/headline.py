"""What a device with memory for two layers needs, and what LoRA on the full model needs.

Small models are trained; large ones are only described, from their configuration.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.memory import accuracy
from benchmarks.memory.agent import MIB, Bench, Setup, describe, predict, spread
from benchmarks.memory.models import Shape, make_weightless
from benchmarks.memory.records import RESULTS, ROOT, Record, append, read
from fedpruner_common.child import Child
from fedpruner_server.config import LoraOptions, TrainingOptions

RECORDS = RESULTS / "memory-headline.jsonl"
PLAIN, UNSAVED, SAVED, STREAMED = "plain PEFT", "agent, nothing saved", "agent", "agent, streamed"
LORA = LoraOptions(r=16, lora_alpha=32)
SMALL_BATCH, LARGE_BATCH = (4, 256), (4, 512)

MEASURED = {
    "demo, 1.3 M, float32": Shape(),
    "Llama 52 M, 32k, float32": Shape.of("llama", hidden=512, layers=12, vocab=32_000, tied=True),
    "Llama 52 M, 32k, bfloat16": Shape.of(
        "llama", hidden=512, layers=12, vocab=32_000, tied=True, stored="bfloat16"
    ),
    "Llama 47 M, 150k, float32": Shape.of("llama", hidden=256, layers=12, vocab=150_000, tied=True),
    "Llama 47 M, 150k, bfloat16": Shape.of(
        "llama", hidden=256, layers=12, vocab=150_000, tied=True, stored="bfloat16"
    ),
}
PREDICTED = {
    "Qwen2.5-0.5B": Shape("qwen2", 24, 896, 4864, 14, 2, 64, 151_936, "bfloat16", tied=True),
    "TinyLlama-1.1B": Shape("llama", 22, 2048, 5632, 32, 4, 64, 32_000, "bfloat16"),
    "Llama-2-7B": Shape("llama", 32, 4096, 11_008, 32, 32, 128, 32_000, "bfloat16"),
    "Llama-2-13B": Shape("llama", 40, 5120, 13_824, 40, 40, 128, 32_000, "bfloat16"),
}


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        model: key of `MEASURED` or `PREDICTED`.
        how: one of the four ways above.
        layers: kept.
    """

    model: str
    how: str
    layers: int

    @property
    def name(self) -> str:
        return f"{self.model} | {self.how} | {self.layers}"

    @property
    def shape(self) -> Shape:
        return {**MEASURED, **PREDICTED}[self.model]

    def setup(self, batch: int, seq_len: int) -> Setup:
        """As the agent trains it."""
        saves = self.how != UNSAVED
        training = TrainingOptions(
            per_device_train_batch_size=batch,
            max_seq_length=seq_len,
            max_steps=3,
            dtype="auto",
            gradient_checkpointing=saves,
            loss_chunk="auto" if saves else 0,
            optim="adamw_8bit" if saves else "adamw",
        )
        kept = spread(self.shape.layers, self.layers)
        return Setup(self.shape, kept, training, LORA, streamed=kept * (self.how == STREAMED))


def runs() -> Iterator[Run]:
    """All of them, of one model together."""
    for model, shape in {**MEASURED, **PREDICTED}.items():
        full = shape.layers
        if model in MEASURED:
            yield Run(model, PLAIN, full)
            yield Run(model, PLAIN, 2)
        for layers in (full, full // 2, full // 4, 2):
            yield Run(model, UNSAVED, layers)
            yield Run(model, SAVED, layers)
        yield Run(model, STREAMED, full)


def run(work: Path, text: Path, only: list[str]) -> None:
    """Do what has no record yet."""
    done = {record["name"] for record in read(RECORDS)}
    missing = [r for r in runs() if r.name not in done and (not only or r.model in only)]
    bench = Bench(work / "headline", text, work / "tokenizers")
    try:
        for one in missing:
            if one.model in PREDICTED:
                record = _predict(one, work)
            elif one.how == PLAIN:
                record = _plain(one, bench, text)
            else:
                record = {**bench.measure(one.setup(*SMALL_BATCH)), "measured": True}
            batch = LARGE_BATCH if one.model in PREDICTED else SMALL_BATCH
            facts = {"batch": batch[0], "seq_len": batch[1], "r": LORA.r}
            identity = {"name": one.name, "model": one.model, "how": one.how, "layers": one.layers}
            append(RECORDS, {**identity, **facts, **record})
            peak = record.get("measured_bytes") or record["predicted_bytes"]
            print(f"{one.name:60} {peak / MIB:9.1f} MiB", flush=True)
    finally:
        bench.close()


def _plain(one: Run, bench: Bench, text: Path) -> Record:
    model_dir, _ = bench.model(one.shape)
    batch, seq_len = SMALL_BATCH
    layers = 0 if one.layers == one.shape.layers else one.layers
    arguments = [str(model_dir), str(text), one.shape.stored]
    numbers = map(str, (batch, seq_len, LORA.r, layers))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory.plain", *arguments, *numbers],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return {**json.loads(done.stdout.splitlines()[-1]), "measured": True}


def _predict(one: Run, work: Path) -> Record:
    """What the byte model says, on a device whose floor is the mean of those measured."""
    floors = [record["floor_bytes"] for record in read(accuracy.RECORDS)]
    floor = round(statistics.mean(floors))
    setup = one.setup(*LARGE_BATCH)
    folder = work / "weightless" / one.model
    model_dir, tensors = make_weightless(one.shape, folder)
    worker = Child("fedpruner_server.torch_jobs", log_path=work / "weightless" / "torch_jobs.log")
    try:
        spec = describe(worker, model_dir, tensors.values(), setup.lora, setup.training)
    finally:
        worker.close()
    return {
        "floor_bytes": floor,
        "predicted_bytes": predict(spec, setup, floor_bytes=floor),
        "measured": False,
    }
