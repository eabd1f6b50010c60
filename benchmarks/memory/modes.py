"""One limit, several ways to live with it: what is dropped, bridged, corrected or streamed.

A Llama of 16 layers that needs more than twice the limit, in the agent's training process, in a
control group with that limit and no swap, weights mapped from files that are not in memory. Time,
peak and what really came from the disk are measured; what each way is worth in loss is in
docs/results.md.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blake3 import blake3
from tests.cgroups import Group

from benchmarks.memory.agent import Bench, Setup, predict, spread
from benchmarks.memory.models import Shape
from benchmarks.memory.records import RESULTS, append, read
from fedpruner_common.errors import ChildDied
from fedpruner_common.task import NO_BRIDGE, BridgeKind, BridgeSettings
from fedpruner_server.config import TrainingOptions

MIB = 1 << 20
LLAMA = Shape.of("llama", hidden=512, layers=16, vocab=8192)  # 196 MiB of weights
CORRECTED = BridgeSettings(corrected=True)
LOW_RANK = BridgeSettings(BridgeKind.LOWRANK, 32, local=True)
STEPS = 4
RECORDS = RESULTS / "memory-modes.jsonl"


@dataclass(frozen=True)
class Mode:
    """One way.

    Attributes:
        name: for people.
        kept: layers that train.
        streamed: of them, those that are in memory only while they work.
        bridge: what stands in for the others.
    """

    name: str
    kept: tuple[int, ...]
    streamed: tuple[int, ...] = ()
    bridge: BridgeSettings = NO_BRIDGE


def modes(num_layers: int, num_held: int) -> Iterator[Mode]:
    """Ways to live with memory for `num_held` layers."""
    held, everything = spread(num_layers, num_held), tuple(range(num_layers))
    half = spread(num_layers, (num_held + num_layers) // 2)
    yield Mode("pruned", held)
    yield Mode("pruned, low-rank bridges", held, bridge=LOW_RANK)
    yield Mode("pruned, corrected (default)", held, bridge=CORRECTED)
    some = held[::2]  # what passes through needs room of its own
    yield Mode(
        "half streamed, rest corrected",
        half,
        tuple(layer for layer in half if layer not in some),
        CORRECTED,
    )
    yield Mode("streamed", everything, tuple(layer for layer in everything if layer not in some))
    yield Mode("streamed, none held", everything, everything)
    yield Mode("all in memory", everything)


def measure(bench: Bench, mode: Mode, room_bytes: int | None) -> dict[str, Any]:
    """One task of `STEPS` steps under a limit of so many bytes beyond what torch takes."""
    training = TrainingOptions(
        per_device_train_batch_size=4, max_seq_length=256, max_steps=STEPS, learning_rate=1e-3
    )
    setup = Setup(LLAMA, mode.kept, training, bridge=mode.bridge, streamed=mode.streamed)
    spec = bench.describe(setup)
    group = Group() if room_bytes is not None else None
    steps: list[float] = []
    try:
        with bench.process() as process:
            floor: int = process.call("measure", {"device": "cpu"})["floor_bytes"]
            arguments = bench.arguments(setup, spec)
            arguments["memory_budget_bytes"] = None
            chill(bench.blobs)
            if group is not None and process.pid is not None:
                group.enter(process.pid)
                group.limit(room_bytes or 0)
            before = read_bytes(process.pid)
            started = time.monotonic()
            try:
                result = process.call(
                    "train", arguments, lambda _: steps.append(time.monotonic() - started)
                )
            except ChildDied as error:
                found = {"mode": mode.name, "layers": len(mode.kept), "killed": error.returncode}
                return {**found, "room_mib": (room_bytes or 0) // MIB}
            read = read_bytes(process.pid) - before
    finally:
        if group is not None:
            group.remove()
    per_step = (steps[-1] - steps[0]) / (STEPS - 1)
    return {
        "mode": mode.name,
        "layers": len(mode.kept),
        "streamed": len(mode.streamed),
        "room_mib": None if room_bytes is None else room_bytes // MIB,
        "floor_bytes": floor,
        "predicted_bytes": predict(spec, setup, floor_bytes=floor),
        "measured_bytes": result["measured_peak_bytes"],
        "seconds_per_step": round(per_step, 3),
        "seconds_before_the_first_step": round(steps[0] - per_step, 3),
        "bytes_read": read,
        "train_loss": [round(result[f"train_loss_{which}"], 6) for which in ("first", "last")],
        "update": blake3(bench.update.read_bytes()).hexdigest()[:16],
    }


def chill(folder: Path) -> None:
    """Put files out of memory, so that reading them is reading the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_bytes(pid: int | None) -> int:
    """What a process has made the disk read, page faults of mapped files included."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def run(work: Path, text: Path) -> None:
    """Every mode under the limit that `pruned` needs, and the full model without a limit."""
    bench = Bench(work / "modes", text, work / "tokenizers")
    done = {record["mode"] for record in read(RECORDS)}
    try:
        for mode, room in _cases(bench):
            if mode.name not in done:
                record = measure(bench, mode, room)
                append(RECORDS, record)
                print(record, flush=True)
    finally:
        bench.close()


def _cases(bench: Bench) -> Iterator[tuple[Mode, int | None]]:
    num_layers, num_held = LLAMA.layers, 5
    found = {mode.name: mode for mode in modes(num_layers, num_held)}
    setup = Setup(LLAMA, found["pruned"].kept, TrainingOptions(
        per_device_train_batch_size=4, max_seq_length=256, max_steps=STEPS))  # fmt: skip
    room = int(1.08 * predict(bench.describe(setup), setup, floor_bytes=0))
    for mode in found.values():
        yield mode, room
    yield replace(found["all in memory"], name="all in memory, no limit"), None
    yield replace(found["streamed, none held"], name="streamed, none held, no limit"), None
