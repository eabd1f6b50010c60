"""The processes a measurement started: their CPU and memory together, and their end."""

import contextlib
import signal
import threading
import time
from dataclasses import dataclass
from types import TracebackType

import psutil

PERIOD_S = 0.1
# For the PSS of one of these processes the kernel takes 3 ms, of one with gigabytes 20 ms, under a
# lock that its mmap and munmap wait for. Each 100 ms that would be a fifth of a core with one
# client and all of it with ten, of the cores that are measured.
_PSS_PERIOD_S = 1
_PSS_SHARE = 0.05  # of a core, at most
_GRACE_S = 8


@dataclass(frozen=True)
class Sample:
    """All processes at one time.

    Attributes:
        at: of `time.monotonic`, which is one clock for all processes of a machine.
        cpu_s: user and system time since their start, of ended children too.
        rss_bytes: a page that n processes share counts n times.
        pss_bytes: such a page counts once. None where it was not asked for.
    """

    at: float
    cpu_s: float
    rss_bytes: int
    pss_bytes: int | None


class ProcessTree:
    """Processes given to it and all that descend from them.

    A process once seen stays in it when its parent ends, so orphans are counted and stopped too.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[int, psutil.Process] = {}

    def add(self, pid: int) -> None:
        with self._lock:
            self._known[pid] = psutil.Process(pid)

    def sample(self, *, pss: bool) -> Sample:
        """What they use now, with or without PSS."""
        at, cpu_s, rss_bytes, pss_bytes = time.monotonic(), 0.0, 0, 0
        for process in self._living():
            try:
                # An ended child is in its parent's times once the parent has waited for it, and
                # in its own until then: nothing is lost or counted twice.
                cpu_s += sum(process.cpu_times()[:4])
                rss_bytes += process.memory_info().rss
                if pss:
                    pss_bytes += process.memory_full_info().pss
            except psutil.Error:  # it ended meanwhile; a zombie has times but no memory
                continue
        return Sample(at, cpu_s, rss_bytes, pss_bytes if pss else None)

    def stop(self) -> None:
        """End them all: SIGTERM, and SIGKILL for what is left after some seconds."""
        processes = self._living()
        try:
            _send(processes, signal.SIGTERM)
            psutil.wait_procs(processes, timeout=_GRACE_S)
        finally:  # also where a second Ctrl-C ends the wait
            # Those that came while the others ended, too.
            left = self._living()
            _send(left, signal.SIGKILL)
            psutil.wait_procs(left, timeout=_GRACE_S)

    def _living(self) -> list[psutil.Process]:
        with self._lock:
            self._known = {pid: p for pid, p in self._known.items() if p.is_running()}
            parents = {process: _parent(process) for process in psutil.process_iter()}
            grown = True
            while grown:
                new = [p for p, parent in parents.items() if parent in self._known]
                new = [p for p in new if p.pid not in self._known]
                self._known.update((p.pid, p) for p in new)
                grown = bool(new)
            return list(self._known.values())


class Sampler:
    """Samples of a tree, each 100 ms while it is open; with PSS each second or less often."""

    def __init__(self, tree: ProcessTree) -> None:
        self.samples: list[Sample] = []
        self.own_cpu_s = 0.0  # what sampling costs; it is not in the samples
        self._tree = tree
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="sampler", daemon=True)

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def wait_beyond(self, at: float) -> None:
        """Return once there is a sample from after this time."""
        while not (self.samples and self.samples[-1].at > at):
            if not self._thread.is_alive():
                raise RuntimeError(f"sampling ended before time {at}")
            time.sleep(PERIOD_S)

    def cpu_s_between(self, begin: float, end: float) -> float:
        """CPU seconds from one time to another; between two samples, on the line through them."""
        return self._cpu_s_at(end) - self._cpu_s_at(begin)

    def within(self, begin: float, end: float) -> list[Sample]:
        """Samples of a stretch of time."""
        return [sample for sample in self.samples if begin <= sample.at <= end]

    def _cpu_s_at(self, at: float) -> float:
        before = max((s for s in self.samples if s.at <= at), key=lambda s: s.at, default=None)
        after = min((s for s in self.samples if s.at > at), key=lambda s: s.at, default=None)
        if before is None or after is None:
            raise ValueError(f"time {at} is not between two samples")
        share = (at - before.at) / (after.at - before.at)
        return before.cpu_s + share * (after.cpu_s - before.cpu_s)

    def _loop(self) -> None:
        begin = pss_due = time.monotonic()
        while not self._ended.wait(max(0, begin + PERIOD_S - time.monotonic())):
            begin, cpu_begin = time.monotonic(), time.thread_time()
            pss = begin >= pss_due
            self.samples.append(self._tree.sample(pss=pss))
            self.own_cpu_s = time.thread_time()
            if pss:
                pss_due = begin + max(_PSS_PERIOD_S, (self.own_cpu_s - cpu_begin) / _PSS_SHARE)


def runs(pid: int) -> bool:
    """Whether there is such a process, and it is no zombie."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _parent(process: psutil.Process) -> int | None:
    try:
        return int(process.ppid())
    except psutil.Error:
        return None


def _send(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)
