"""Eight devices under hard memory limits, twenty rounds: who ran out of memory, what came of it.

    python -m benchmarks.fleet --output benchmarks/results/fleet.jsonl

A real coordinator and eight real agents, each in a control group of its own with one of four limits
(needs root and a memory controller). In some rounds another program on some of the devices takes
memory away, before the round or in the middle of it. Every kill by the kernel is counted, and a run
is good when each of them was an event: the agent went on, the task came back smaller or was done
with less, and no round was lost.
"""

import argparse
import json
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cgroups import Group

from benchmarks.quality.domains import Domain, headers
from fedpruner_client.config import AgentSettings
from fedpruner_client.ctl.admin import AdminClient
from fedpruner_client.ctl.demo.run import BASE_MODEL_DIR
from fedpruner_client.trainer import Trainer
from fedpruner_common.errors import FedPrunerError
from fedpruner_common.interrupt import raise_on_signals

MIB = 1 << 20
LAYERS = (3, 5, 8, 12)  # that the four limits are made for
AGENT_BYTES = 55 * MIB  # of an agent's own process and the kernel's share, anonymous
RESERVE_BYTES = 24 * MIB
HOG = "import sys, time; held = bytearray(b'x') * int(sys.argv[1]); time.sleep(float(sys.argv[2]))"


@dataclass
class Device:
    """One agent in its group."""

    name: str
    limit_bytes: int
    group: Group
    process: "subprocess.Popen[bytes]"
    pressed: bool  # whether another program takes memory from it at times
    hog: "subprocess.Popen[bytes] | None" = None
    hogs: int = 0
    hog_kills: int = 0

    def press(self, num_bytes: int, seconds: float) -> None:
        """Let another program on the device take memory for a while."""
        if self.hog is not None and self.hog.poll() is None:
            return
        if self.hog is not None and self.hog.returncode == -9:
            self.hog_kills += 1
        self.hog = in_group(self.group, [sys.executable, "-c", HOG, str(num_bytes), str(seconds)])
        self.hogs += 1


@dataclass
class Fleet:
    """Everything that has to end with the benchmark."""

    devices: list[Device] = field(default_factory=list)
    others: "list[subprocess.Popen[bytes]]" = field(default_factory=list)

    def end(self) -> None:
        hogs = [d.hog for d in self.devices if d.hog is not None]
        for process in (*hogs, *(d.process for d in self.devices), *self.others):
            process.terminate()
        for process in (*hogs, *(d.process for d in self.devices), *self.others):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for device in self.devices:
            device.group.remove()


def in_group(
    group: Group, command: list[str], log: Path | None = None
) -> "subprocess.Popen[bytes]":
    """Start a program in a control group: all it allocates is charged there."""
    script = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
    output: Any = log.open("wb") if log else subprocess.DEVNULL
    try:
        return subprocess.Popen(
            ["sh", "-c", script, str(group.path), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    finally:
        if log:
            output.close()


def server_config(folder: Path, domain: Domain, arguments: argparse.Namespace) -> Path:
    path = folder / "server.toml"
    path.write_text(
        f"""
model = {json.dumps(str(BASE_MODEL_DIR))}
listen = "127.0.0.1:0"
num_threads = 1
[training]
per_device_train_batch_size = 8
max_seq_length = 256
max_steps = {arguments.max_steps}
learning_rate = 0.005
dtype = "float32"
[run]
num_rounds = {arguments.num_rounds}
min_available_clients = 6
clients_per_round = {arguments.clients_per_round}
evaluate_every = {arguments.num_rounds}
round_deadline_s = 600.0
lease_s = 60.0
[data]
calibration = [{json.dumps(str(domain.public))}]
eval = [{json.dumps(str(domain.eval[0]))}]
"""
    )
    return path


def start_server(fleet: Fleet, folder: Path, config: Path) -> str:
    """Its address."""
    log = folder / "server.log"
    with log.open("wb") as file:
        command = [sys.executable, "-m", "fedpruner_server.cli", "run", "--config", str(config)]
        process = subprocess.Popen(
            [*command, "--state-dir", str(folder / "server")],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    fleet.others.append(process)
    while True:
        for line in log.read_text().splitlines():
            if "listening on" in line:
                return line.rsplit(" ", 1)[1]
        if process.poll() is not None:
            raise SystemExit(log.read_text())
        time.sleep(0.2)


def model_bytes(address: str) -> dict[int, int]:
    """Layers -> predicted peak without the floor."""
    while True:
        try:
            admin = AdminClient(address)
            rows = admin.plan(memory_budget_bytes=0, floor_bytes=0).rows
            return {row.num_kept: row.predicted_peak_bytes for row in rows}
        except FedPrunerError:
            time.sleep(0.5)


def anonymous_floor(folder: Path) -> int:
    """Anonymous memory of a training process before any model: what a group is charged for it."""
    trainer = Trainer(
        AgentSettings(data=[folder], state_dir=folder / "floor", num_threads=1, device="cpu")
    )
    try:
        trainer.measure()
        status = Path(f"/proc/{trainer.pid}/status").read_text()
    finally:
        trainer.close()
    return next(int(x.split()[1]) * 1024 for x in status.splitlines() if x.startswith("RssAnon"))


def start_devices(
    fleet: Fleet, folder: Path, address: str, limits: list[int], data: list[Path]
) -> None:
    for index, limit in enumerate(limits):
        name = f"device-{index}"
        group = Group()
        group.limit(limit)
        command = [
            *(sys.executable, "-m", "fedpruner_client.cli", "run"),
            *("--server", address, "--name", name, "--data", str(data[index])),
            *("--state-dir", str(folder / name), "--num-threads", "1", "--device", "cpu"),
            *("--memory-reserve", str(RESERVE_BYTES)),
        ]
        process = in_group(group, command, folder / f"{name}.log")
        fleet.devices.append(Device(name, limit, group, process, pressed=index % 2 == 1))


def watch(fleet: Fleet, address: str, arguments: argparse.Namespace) -> str:
    """Until the run is over; takes memory away now and then. Returns how it ended."""
    rng = random.Random(arguments.seed)
    admin, ends, said = AdminClient(address), time.monotonic() + 60 * arguments.minutes, 0
    server = fleet.others[0]
    while time.monotonic() < ends:
        time.sleep(1.0)
        if all(device.process.poll() for device in fleet.devices):
            return "every agent has failed"
        if server.poll() is not None:
            return f"the coordinator has ended with code {server.returncode}"
        try:
            status = admin.status()
        except FedPrunerError:
            continue
        if status.state in ("finished", "failed"):
            return f"{status.state}: {status.explanation}"
        if status.round != said:
            said = status.round
            print(f"round {said}", file=sys.stderr, flush=True)
        if 3 <= status.round <= arguments.num_rounds - 3:
            for device in fleet.devices:
                if device.pressed and device.process.poll() is None and rng.random() < 0.04:
                    share = rng.uniform(0.1, 0.4)
                    device.press(int(share * (device.limit_bytes - 300 * MIB)), rng.uniform(5, 30))
    return f"not over after {arguments.minutes} minutes"


def rows_of(state_dir: Path) -> list[dict[str, Any]]:
    path = state_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def report(fleet: Fleet, state_dir: Path, ended: str, arguments: argparse.Namespace) -> list[Any]:
    rows = rows_of(state_dir)
    records: list[dict[str, Any]] = []
    for device in fleet.devices:
        mine = [r for r in rows if r["type"] == "client" and r["client_id"] == device.name]
        peaks = [r["measured_peak_bytes"] / r["predicted_peak_bytes"]
                 for r in mine if r.get("measured_peak_bytes") and not r.get("rungs")]  # fmt: skip
        records.append(
            {
                "device": device.name,
                "limit_mib": device.limit_bytes // MIB,
                "pressed": device.hogs,
                "layers": sorted({len(r["components"]) // 2 for r in mine}),
                "tasks": dict(Counter(r["outcome"] for r in mine)),
                "retried_smaller": sum(len(r["too_large"]) for r in mine),
                "with_less": sum(bool(r.get("rungs")) for r in mine),
                "kernel_kills": device.group.oom_kills() - device.hog_kills,
                "other_program_killed": device.hog_kills,
                "agent_died": device.process.poll() not in (None, 0),
                "measured_over_predicted": [round(min(peaks), 3), round(max(peaks), 3)]
                if peaks
                else None,
            }
        )
    closed = [r for r in rows if r["type"] == "round"]
    tasks = [r for r in rows if r["type"] == "client"]
    summary = {
        "rounds": len(closed),
        "abandoned": sum(r["phase"] == "abandoned" for r in closed),
        "tasks": dict(Counter(r["outcome"] for r in tasks)),
        "kernel_kills": sum(r["kernel_kills"] for r in records),
        "uncaught": sum(r["agent_died"] for r in records),
        "ended": ended,
        "command": f"python -m benchmarks.fleet --num-rounds {arguments.num_rounds} "
        f"--max-steps {arguments.max_steps} --clients-per-round {arguments.clients_per_round} "
        f"--seed {arguments.seed}",
        "machine": f"{platform.machine()}, {platform.release()}",
        "python": platform.python_version(),
    }
    return [*records, summary]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-rounds", type=int, default=20)
    parser.add_argument("--max-steps", type=int, default=3)
    parser.add_argument("--clients-per-round", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0, help="give up after so long")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--keep", type=Path, help="leave logs and state here")
    arguments = parser.parse_args()
    fleet = Fleet()
    raise_on_signals()  # whatever ends this ends the devices too
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            domain = headers(folder / "text")
            config = server_config(folder, domain, arguments)
            address = start_server(fleet, folder, config)
            base = anonymous_floor(folder) + AGENT_BYTES + RESERVE_BYTES
            wanted = model_bytes(address)
            limits = [base + int(1.08 * wanted[k]) for k in LAYERS for _ in range(2)]
            start_devices(fleet, folder, address, limits, list(domain.train))
            ended = watch(fleet, address, arguments)
            records = report(fleet, folder / "server", ended, arguments)
        finally:
            fleet.end()
    text = "".join(json.dumps(record) + "\n" for record in records)
    print(text, end="")
    if arguments.output:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
