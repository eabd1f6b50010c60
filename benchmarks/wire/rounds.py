"""Rounds in which nobody trains: what a round costs beside what devices do in it."""

from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.wire.coordinator import Coordinator
from benchmarks.wire.models import MEDIUM, TINY, Shape, write_model
from benchmarks.wire.records import Recorder
from benchmarks.wire.sides import Side, watched

# Name -> model, modules with LoRA, rank: adapters of 1 KiB and 1 MiB, and their file's header.
PAYLOADS: dict[str, tuple[Shape, str | list[str], int]] = {
    "1 KiB": (TINY, ["q_proj"], 1),
    "1 MiB": (MEDIUM, "all-linear", 8),
}
# Agents -> rounds.
CROWDS = {10: 60, 100: 10, 500: 3}


def run(
    folder: Path,
    recorder: Recorder,
    *,
    crowds: dict[int, int] = CROWDS,
    profile: Path | None = None,
) -> None:
    """All crowds with both payloads; the first round of each run is left out."""
    for payload, (shape, modules, rank) in PAYLOADS.items():
        model = folder / payload.replace(" ", "-") / "model"
        write_model(model, shape)
        for crowd, num_rounds in crowds.items():
            lora: dict[str, Any] = {"r": rank, "target_modules": modules}
            _run(
                model.parent / str(crowd),
                recorder,
                model=model,
                payload=payload,
                crowd=crowd,
                num_rounds=num_rounds,
                lora=lora,
                profile=profile and profile / f"{payload.replace(' ', '-')}-{crowd}.prof",
            )


def _run(
    folder: Path,
    recorder: Recorder,
    *,
    model: Path,
    payload: str,
    crowd: int,
    num_rounds: int,
    lora: dict[str, Any],
    profile: Path | None,
) -> None:
    tables: dict[str, Any] = {
        "run": {
            "min_available_clients": crowd,
            "num_rounds": num_rounds + 1,
            "save_every": 1000,
            "lease_s": 600.0,
        },
        "lora": lora,
    }
    coordinator = Coordinator(folder, model, profile=profile, **tables)
    side = Side("benchmarks.wire.agents", log=folder / "agents.log")
    try:
        side.call("gather", address=coordinator.address, certificates=None, num_agents=crowd)
        with watched([coordinator.pid, side.pid]) as uses:
            answer = side.call("rounds")
    finally:
        side.close()
        coordinator.close()
    begins, ends = answer["begins"], answer["ends"]
    periods = [1e3 * (after - before) for before, after in pairwise(begins[1:])]
    moving = [1e3 * (end - begin) for begin, end in zip(begins[1:], ends[1:], strict=True)]
    between = [1e3 * (begin - end) for begin, end in zip(begins[2:], ends[1:], strict=False)]
    recorder.add(
        "rounds",
        {
            "payload": payload,
            "update_bytes": answer["bytes"],
            "agents": crowd,
            "rounds": len(periods),
            "profiled": profile is not None,
            "ms_per_round": [round(period, 2) for period in periods],
            "median_ms": round(median(periods), 2),
            "moving_ms": round(median(moving), 2),
            "between_ms": round(median(between), 2),
            "server_cpu_ms_per_round": round(1e3 * uses[coordinator.pid].cpu_s / len(begins), 2),
            "client_cpu_ms_per_round": round(1e3 * uses[side.pid].cpu_s / len(begins), 2),
            "server": uses[coordinator.pid].to_json(),
            "client": uses[side.pid].to_json(),
        },
    )
