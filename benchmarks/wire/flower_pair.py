"""Flower and ours in the same run: 1 GB there and back to one client."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.wire import flower
from benchmarks.wire.coordinator import Coordinator
from benchmarks.wire.models import LARGE, write_model
from benchmarks.wire.records import Recorder, priority
from benchmarks.wire.sides import Side, watched
from benchmarks.wire.transfers import UPLOAD_RANK, clean

_UPLOADS = 10  # of 100 MB each


def run(folder: Path, recorder: Recorder, rounds: int) -> None:
    """Flower's rounds, with one of ours before, between and after them.

    Ours is the model down to verified files, then ten updates of 100 MB up, each checked and
    durable: an update may not be larger than its task's adapter, and an adapter of 1 GB would be
    another task. Flower's arrays are 1 GB of the same in memory both ways.
    """
    folder.mkdir(parents=True)
    model = folder / "model"
    write_model(model, LARGE)
    num_agents = _UPLOADS * (2 * rounds + 1) + 1
    tables: dict[str, Any] = {
        "run": {"min_available_clients": num_agents, "lease_s": 3600.0},
        "lora": {"r": UPLOAD_RANK},
    }
    with ExitStack() as opened:
        coordinator = Coordinator(folder / "server", model, **tables)
        opened.callback(coordinator.close)
        side = Side("benchmarks.wire.agents", log=folder / "agents.log")
        opened.callback(side.close)
        side.call(
            "join",
            address=coordinator.address,
            certificates=None,
            folder=str(folder),
            num_agents=num_agents,
        )
        update = side.call("take_tasks", folder=str(folder))
        turns = iter(range(num_agents - 1))

        def ours(repetition: int) -> None:
            agents = [next(turns) for _ in range(_UPLOADS)]
            with watched([coordinator.pid, side.pid]) as uses:
                down = side.call("fetch", blobs=coordinator.blobs, folder=str(folder / "cache"))
                up = side.call("push", agents=agents)
            clean(folder)
            server, client = uses[coordinator.pid], uses[side.pid]
            recorder.add(
                "flower",
                {
                    "system": "ours",
                    "repetition": repetition,
                    "seconds": round(down["seconds"] + up["seconds"] + up["hash_seconds"], 3),
                    "down_seconds": round(down["seconds"], 3),
                    "up_seconds": round(up["seconds"] + up["hash_seconds"], 3),
                    "bytes_down": down["bytes"],
                    "bytes_up": _UPLOADS * update["bytes"],
                    "cpu_seconds": round(server.cpu_s + client.cpu_s, 2),
                    "peak_rss_bytes": server.rss_peak + client.rss_peak,
                    "peak_anon_bytes": server.anon_peak + client.anon_peak,
                    "server": server.to_json(),
                    "client": client.to_json(),
                },
            )

        _alternate(ours, recorder, rounds)


def _alternate(ours: Callable[[int], None], recorder: Recorder, rounds: int) -> None:
    """Flower needs a deployment per run, so its rounds come in a row, between halves of ours."""
    for repetition in range(rounds):
        ours(repetition)
    with _like_ours():
        theirs = flower.run(1000, clients=1, rounds=rounds)
    recorder.add("flower", theirs)
    for repetition in range(rounds, 2 * rounds):
        ours(repetition)


@contextmanager
def _like_ours() -> Iterator[None]:
    """Give Flower's programs this session's priority: each of them begins a session of its own."""
    ended = threading.Event()
    wanted = priority()

    def look() -> None:
        while wanted and not ended.wait(0.2):
            for child in psutil.Process().children(recursive=True):
                # It may have ended meanwhile.
                with suppress(OSError):
                    Path(f"/proc/{child.pid}/autogroup").write_text(wanted)

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    try:
        yield
    finally:
        ended.set()
        looking.join()
