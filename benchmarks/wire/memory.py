"""What the coordinator needs while many transfer at once: it should not depend on how many."""

from pathlib import Path
from typing import Any

from benchmarks.wire.coordinator import Coordinator
from benchmarks.wire.models import LARGE, MEDIUM, SMALL, Shape, write_model
from benchmarks.wire.records import Recorder
from benchmarks.wire.sides import Side, watched

CROWDS = (1, 10, 100)
_MAX_BYTES = 10**10  # of one measurement, all agents together
_NEVER = {"min_available_clients": 10_000, "lease_s": 3600.0}
UPLOADS, UPLOAD_RANK = 100, 8  # of MEDIUM's adapter: 1 MiB


def downloads(folder: Path, recorder: Recorder) -> None:
    """Crowds that download two models, with the default number of streams and without limit."""
    for model, shape in (("small", SMALL), ("large", LARGE)):
        for streams in (None, max(CROWDS)):
            place = folder / f"{model}-{streams or 'default'}"
            _downloads(place, recorder, model=model, shape=shape, streams=streams)


def _downloads(
    folder: Path, recorder: Recorder, *, model: str, shape: Shape, streams: int | None
) -> None:
    folder.mkdir(parents=True)
    num_bytes = write_model(folder / "model", shape)
    for crowd in CROWDS:
        tables: dict[str, Any] = {"run": _NEVER}
        if streams:
            tables["transfer"] = {"max_downloads": streams}
        # A new one each time: what a crowd left in its heap would hide what the next takes.
        coordinator = Coordinator(folder / f"crowd-{crowd}", folder / "model", **tables)
        side = Side("benchmarks.wire.agents", log=folder / f"agents-{crowd}.log")
        try:
            side.call("gather", address=coordinator.address, certificates=None, num_agents=crowd)
            at_most = _MAX_BYTES // crowd
            with watched([coordinator.pid, side.pid]) as uses:
                answer = side.call("download", blobs=coordinator.blobs, at_most=at_most)
            recorder.add(
                "memory",
                {
                    "model": model,
                    "model_bytes": num_bytes,
                    "agents": crowd,
                    "max_downloads": streams or "default",
                    "seconds": round(answer["seconds"], 3),
                    "bytes": answer["bytes"],
                    "server": uses[coordinator.pid].to_json(),
                    "client": uses[side.pid].to_json(),
                },
            )
        finally:
            side.close()
            coordinator.close()


def uploads(folder: Path, recorder: Recorder, repetitions: int) -> None:
    """A hundred agents that all upload 1 MiB at once; each time to a new coordinator."""
    folder.mkdir(parents=True)
    write_model(folder / "model", MEDIUM)
    # One agent more, which uploads last, so that aggregation is not in the uploads' memory.
    num_agents = UPLOADS + 1
    tables: dict[str, Any] = {
        "run": {"min_available_clients": num_agents, "num_rounds": 2, "lease_s": 3600.0},
        "lora": {"r": UPLOAD_RANK},
    }
    for repetition in range(repetitions):
        coordinator = Coordinator(folder / f"uploads-{repetition}", folder / "model", **tables)
        side = Side("benchmarks.wire.agents", log=folder / "agents.log")
        try:
            side.call(
                "gather", address=coordinator.address, certificates=None, num_agents=num_agents
            )
            update = side.call("ready")
            with watched([coordinator.pid, side.pid]) as uses:
                answer = side.call("upload", begin=0, end=UPLOADS)
            with watched([coordinator.pid]) as aggregating:
                side.call("upload", begin=UPLOADS, end=num_agents)
                side.call("ready")  # the next round has begun
            recorder.add(
                "uploads",
                {
                    "agents": UPLOADS,
                    "update_bytes": update["bytes"],
                    "repetition": repetition,
                    "seconds": round(answer["seconds"], 4),
                    "server": uses[coordinator.pid].to_json(),
                    "client": uses[side.pid].to_json(),
                    "aggregating": aggregating[coordinator.pid].to_json(),
                },
            )
        finally:
            side.close()
            coordinator.close()
