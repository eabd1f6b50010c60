"""One side of a transfer: a process started by exec, told what to do in lines of JSON.

What it uses is measured from outside: CPU from the kernel's times of it, the peak of its resident
set (VmHWM, which the kernel resets when 5 is written to its clear_refs), and anonymous memory,
sampled, since weights are files and the kernel can take their pages back.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.wire.records import ROOT

Json = dict[str, Any]
_PERIOD_S = 0.01


def environment() -> dict[str, str]:
    """Of a side: as of the products, and this repository to import from."""
    before = os.environ.get("PYTHONPATH", "")
    path = os.pathsep.join([before, str(ROOT)] if before else [str(ROOT)])
    return {**os.environ, "GRPC_ENABLE_FORK_SUPPORT": "0", "PYTHONPATH": path}


class Side:
    """A worker process; `call` has it do something and returns what it answers."""

    def __init__(self, *arguments: str, log: Path) -> None:
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment(),
            )
        self._log = log
        self.pid = self._process.pid

    def begin(self, what: str, **values: Any) -> None:
        """Have it begin; `answer` waits for the end."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": what, **values}) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Json:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a side has ended:\n{self._log.read_text()[-3000:]}")
        answer: Json = json.loads(line)
        return answer

    def call(self, what: str, **values: Any) -> Json:
        self.begin(what, **values)
        return self.answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def serve(commands: dict[str, Any]) -> None:
    """In a side: do what is asked, until the other end closes."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever else prints does not answer
    for line in sys.stdin:
        request = json.loads(line)
        answer = commands[request.pop("do")](**request)
        print(json.dumps(answer or {}), file=answers, flush=True)


@dataclass
class Use:
    """What a process used while it was watched.

    Attributes:
        cpu_s: user and system time.
        rss_before, rss_peak: resident bytes.
        anon_before, anon_peak: of them anonymous; sampled.
    """

    cpu_s: float = 0.0
    rss_before: int = 0
    rss_peak: int = 0
    anon_before: int = 0
    anon_peak: int = 0

    def to_json(self) -> Json:
        return {
            "cpu_s": round(self.cpu_s, 3),
            "peak_rss_bytes": self.rss_peak,
            "rss_growth_bytes": self.rss_peak - self.rss_before,
            "peak_anon_bytes": self.anon_peak,
            "anon_growth_bytes": self.anon_peak - self.anon_before,
        }


@contextmanager
def watched(pids: Sequence[int]) -> Iterator[dict[int, Use]]:
    """What processes use within the `with` block; complete after it."""
    uses = {pid: Use() for pid in pids}
    cpu = {pid: cpu_s(pid) for pid in pids}
    for pid, use in uses.items():
        Path(f"/proc/{pid}/clear_refs").write_text("5")
        status = read_status(pid)
        use.rss_before, use.anon_before = status["VmRSS"], status["RssAnon"]
        use.anon_peak = use.anon_before
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(_PERIOD_S):
            for pid, use in uses.items():
                use.anon_peak = max(use.anon_peak, read_status(pid)["RssAnon"])

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield uses
    finally:
        ended.set()
        sampler.join()
        for pid, use in uses.items():
            status = read_status(pid)
            use.anon_peak = max(use.anon_peak, status["RssAnon"])
            use.rss_peak = status["VmHWM"]
            use.cpu_s = cpu_s(pid) - cpu[pid]


def read_status(pid: int) -> dict[str, int]:
    """Bytes, by the kernel's names."""
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            found[name] = int(value.split()[0]) * 1024
    return found


def cpu_s(pid: int) -> float:
    """User and system seconds of a process so far, its ended threads included."""
    # The clock's id as glibc's clock_getcpuclockid makes it: CPUCLOCK_SCHED of that process.
    return time.clock_gettime((~pid << 3) | 2)


def machine_cpu_s() -> float:
    """User and system seconds of the whole machine so far, to a hundredth."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return sum(map(int, fields[1:4])) / os.sysconf("SC_CLK_TCK")
