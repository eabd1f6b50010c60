"""1 GB down and 100 MB up: ours and bare sockets in turn, each pair on the same machine."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.wire.coordinator import Coordinator
from benchmarks.wire.models import LARGE, write_model
from benchmarks.wire.records import Record, Recorder
from benchmarks.wire.sides import Json, Side, machine_cpu_s, read_status, watched

UPLOAD_RANK = 81  # of LARGE's adapter: 99.9 MB in float32


@dataclass(frozen=True)
class Way:
    """One way that bytes take.

    Attributes:
        name: in the records.
        against: name of the bare socket that it is compared with; itself where it is one.
        measure: does it once; returns seconds and bytes.
        server, client: pids of both ends.
    """

    name: str
    against: str
    measure: Callable[[], Json]
    server: int
    client: int


def in_turn(
    ways: Sequence[Way], recorder: Recorder, folder: Path, *, kind: str, repetitions: int
) -> None:
    """Measure every way once to warm it, then all of them, again and again.

    `others_cores` says how many cores other programs took meanwhile, the kernel's own threads
    included.
    """
    # Of an agent that has joined and moved nothing yet.
    floors = {way.client: read_status(way.client)["RssAnon"] for way in ways}
    for repetition in range(-1, repetitions):
        for way in ways:
            before = machine_cpu_s()
            with watched([way.server, way.client]) as uses:
                answer = way.measure()
            own = sum(use.cpu_s for use in uses.values())
            others = (machine_cpu_s() - before - own) / answer["seconds"]
            clean(folder)
            if repetition < 0:
                continue
            record: Record = {
                "path": way.name,
                "against": way.against,
                "repetition": repetition,
                **{k: round(v, 4) if isinstance(v, float) else v for k, v in answer.items()},
                "others_cores": round(max(0.0, others), 2),
                "gb_per_s": round(answer["bytes"] / answer["seconds"] / 1e9, 3),
                "server": uses[way.server].to_json(),
                "client": uses[way.client].to_json(),
                "client_above_floor_bytes": uses[way.client].anon_peak - floors[way.client],
            }
            recorder.add(kind, record)


def clean(folder: Path) -> None:
    """Delete what arrived, outside of its time, at either end and of either kind.

    A virtual machine may give freed memory back to its host, and then a page that was not used
    just now costs several times as much to write: whoever kept its files would pay for that. No
    round ends here, so nobody asks for the stored updates.
    """
    shutil.rmtree(folder / "cache", ignore_errors=True)
    (folder / "taken").unlink(missing_ok=True)
    for update in folder.glob("*/state/updates/round-*/*.safetensors"):
        update.unlink()


class Sockets:
    """Two bare sides."""

    def __init__(self, folder: Path, certificates: Path) -> None:
        """Start them; certificates are a coordinator's folder."""
        self.called = Side("benchmarks.wire.sockets", log=folder / "called.log")
        self.calling = Side("benchmarks.wire.sockets", log=folder / "calling.log")
        self._port = self.called.call("listen")["port"]
        self._folder = folder
        self._serving = {
            "certificate": str(certificates / "server.pem"),
            "key": str(certificates / "server.key"),
        }
        self._trusted = {"certificates": str(certificates / "ca.pem")}

    def down(self, source: Path, *, tls: bool, to_file: bool) -> Json:
        self.called.begin("send_down", path=str(source), **(self._serving if tls else {}))
        answer = self.calling.call(
            "take_down",
            port=self._port,
            num_bytes=source.stat().st_size,
            path=str(self._folder / "taken") if to_file else None,
            **(self._trusted if tls else {}),
        )
        self.called.answer()
        return answer

    def up(self, source: Path, *, tls: bool, to_file: bool, sync: bool = False) -> Json:
        self.called.begin(
            "take_up",
            num_bytes=source.stat().st_size,
            path=str(self._folder / "taken") if to_file else None,
            sync=sync,
            **(self._serving if tls else {}),
        )
        answer = self.calling.call(
            "send_up", port=self._port, path=str(source), **(self._trusted if tls else {})
        )
        self.called.answer()
        return answer

    def close(self) -> None:
        self.called.close()
        self.calling.close()


@contextmanager
def _federations(
    folder: Path, model: Path, *, num_agents: int, **tables: Any
) -> Iterator[list[tuple[str, Coordinator, Side]]]:
    """A coordinator and an agents' side in the clear, and the same with TLS."""
    with ExitStack() as opened:
        found = []
        for name, tls in (("clear", False), ("tls", True)):
            coordinator = Coordinator(folder / name, model, tls=tls, **tables)
            opened.callback(coordinator.close)
            side = Side("benchmarks.wire.agents", log=folder / f"agents-{name}.log")
            opened.callback(side.close)
            trusted = str(coordinator.certificates) if coordinator.certificates else None
            side.call(
                "join",
                address=coordinator.address,
                certificates=trusted,
                folder=str(folder),
                num_agents=num_agents,
            )
            found.append((name, coordinator, side))
        yield found


def down(folder: Path, recorder: Recorder, repetitions: int) -> None:
    """The whole model of 1 GB into an empty cache."""
    folder.mkdir(parents=True)
    model = folder / "model"
    write_model(model, LARGE)
    source = model / "model.safetensors"
    never = {"min_available_clients": 1000, "lease_s": 3600.0}
    with ExitStack() as opened:
        pairs = opened.enter_context(_federations(folder, model, num_agents=1, run=never))
        sockets = Sockets(folder, folder / "tls")
        opened.callback(sockets.close)
        ways = []
        for name, coordinator, side in pairs:
            blobs, cache = coordinator.blobs, str(folder / "cache")
            tls = name == "tls"
            bare = "python ssl" if tls else "sendfile"
            ends = (sockets.called.pid, sockets.calling.pid)

            def to_file(tls: bool = tls) -> Json:
                return sockets.down(source, tls=tls, to_file=True)

            def to_nowhere(tls: bool = tls) -> Json:
                return sockets.down(source, tls=tls, to_file=False)

            def ours(side: Side = side, blobs: Json = blobs, cache: str = cache) -> Json:
                return side.call("fetch", blobs=blobs, folder=cache)

            ways += [
                Way(f"{bare} to file", f"{bare} to file", to_file, *ends),
                Way(f"ours, {name}", f"{bare} to file", ours, coordinator.pid, side.pid),
                Way(f"{bare}, no file", f"{bare} to file", to_nowhere, *ends),
            ]
        in_turn(ways, recorder, folder, kind="down", repetitions=repetitions)


def up(folder: Path, recorder: Recorder, repetitions: int) -> None:
    """An update of 100 MB to a coordinator that checks and stores it."""
    folder.mkdir(parents=True)
    model = folder / "model"
    write_model(model, LARGE)
    # One more than will ever upload, so that the round goes on.
    num_agents = repetitions + 2
    tables: dict[str, Any] = {
        "run": {"min_available_clients": num_agents, "lease_s": 3600.0},
        "lora": {"r": UPLOAD_RANK},
    }
    with ExitStack() as opened:
        pairs = opened.enter_context(_federations(folder, model, num_agents=num_agents, **tables))
        sockets = Sockets(folder, folder / "tls")
        opened.callback(sockets.close)
        ways = []
        for name, coordinator, side in pairs:
            (folder / f"updates-{name}").mkdir()
            taken = side.call("take_tasks", folder=str(folder / f"updates-{name}"))
            source = Path(taken["path"])
            tls = name == "tls"
            bare = "python ssl" if tls else "sendfile"
            ends = (sockets.called.pid, sockets.calling.pid)
            turns = iter(range(num_agents - 1))

            def synced(tls: bool = tls, source: Path = source) -> Json:
                return sockets.up(source, tls=tls, to_file=True, sync=True)

            def to_file(tls: bool = tls, source: Path = source) -> Json:
                return sockets.up(source, tls=tls, to_file=True)

            def to_nowhere(tls: bool = tls, source: Path = source) -> Json:
                return sockets.up(source, tls=tls, to_file=False)

            def ours(
                side: Side = side, turns: Iterator[int] = turns, size: int = taken["bytes"]
            ) -> Json:
                return {"bytes": size, **side.call("push", agents=[next(turns)])}

            ways += [
                Way(f"{bare} to file, synced", f"{bare} to file, synced", synced, *ends),
                Way(f"ours, {name}", f"{bare} to file, synced", ours, coordinator.pid, side.pid),
                Way(f"{bare} to file", f"{bare} to file, synced", to_file, *ends),
                Way(f"{bare}, no file", f"{bare} to file, synced", to_nowhere, *ends),
            ]
        in_turn(ways, recorder, folder, kind="up", repetitions=repetitions)
