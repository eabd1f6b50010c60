"""Records as JSON lines, each with where and of what code it is."""

import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
RECORDS = ROOT / "benchmarks" / "results" / "wire.jsonl"
Record = dict[str, Any]
_PACKAGES = ("grpcio", "protobuf", "blake3", "xxhash", "safetensors")


def read(path: Path = RECORDS) -> list[Record]:
    """All records of a file; none if there is no file."""
    return [json.loads(line) for line in path.open()] if path.exists() else []


class Recorder:
    """Appends the records of one run."""

    def __init__(self, path: Path, folder: Path) -> None:
        """Note where and with what this run is made; `folder` is where its files are."""
        self._path = path
        self._environment = {"run": _now(), **_environment(), "file_system": file_system(folder)}

    def add(self, kind: str, record: Record) -> None:
        """Append and print one."""
        load = {"load_average": round(os.getloadavg()[0], 2)}
        line = json.dumps({"kind": kind, **record, **load, **self._environment})
        with self._path.open("a") as file:
            file.write(line + "\n")
        print(json.dumps({"kind": kind, **record, **load}), flush=True)


def priority() -> str:
    """Niceness of this session among sessions, where the kernel groups processes by them."""
    path = Path("/proc/self/autogroup")
    return path.read_text().rpartition("nice")[2].strip() if path.exists() else ""


def file_system(folder: Path) -> str:
    """The type of the file system that a folder is on."""
    best, kind = "", "unknown"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mounted, found = line.split()[:3]
        if folder.resolve().is_relative_to(mounted) and len(mounted) >= len(best):
            best, kind = mounted, found
    return kind


def _environment() -> Record:
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty=+changes"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    return {
        "command": "python -m benchmarks.wire " + " ".join(sys.argv[1:]),
        "commit": described.stdout.strip(),
        "machine": f"{platform.machine()}, {platform.system()} {platform.release()}",
        "cpu": f"{os.cpu_count()} x {_cpu()}",
        # Of this session among all sessions: -20 keeps other people's programs off the cores.
        "autogroup": f"nice {priority()}" if priority() else "",
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
    }


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
