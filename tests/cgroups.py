"""A memory cgroup of a test's own, v1 or v2: a hard limit, what was used, and who was killed."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


class Group:
    """A group whose limit is set when the process in it is ready.

    Pages that a process touched before it entered are not charged here, those from then on are:
    its own, and those of files that nobody has in memory yet.
    """

    def __init__(self) -> None:
        """Make it.

        Raises:
            OSError: it cannot be had here; the message says why.
        """
        v1 = _ROOT / "memory"
        self.is_v1 = (v1 / "memory.limit_in_bytes").exists()
        base = v1 if self.is_v1 else _ROOT
        if not self.is_v1 and "memory" not in (base / "cgroup.subtree_control").read_text():
            raise OSError("the memory controller is not on")
        self.path = base / f"fedpruner-test-{os.getpid()}-{time.monotonic_ns()}"
        self.path.mkdir()

    def enter(self, pid: int) -> None:
        (self.path / "cgroup.procs").write_text(str(pid))

    def limit(self, num_bytes: int) -> None:
        """Let the group have so much memory, and no swap; never more than the last time."""
        name = "memory.limit_in_bytes" if self.is_v1 else "memory.max"
        (self.path / name).write_text(str(num_bytes))
        swap = "memory.memsw.limit_in_bytes" if self.is_v1 else "memory.swap.max"
        with contextlib.suppress(OSError):  # where swap is accounted at all
            (self.path / swap).write_text(str(num_bytes if self.is_v1 else 0))

    def raise_limit(self) -> None:
        """Let the group have all that there is."""
        if self.is_v1:
            for name in ("memory.memsw.limit_in_bytes", "memory.limit_in_bytes"):
                with contextlib.suppress(OSError):
                    (self.path / name).write_text("-1")
        else:
            (self.path / "memory.max").write_text("max")

    def peak_bytes(self) -> int | None:
        """Most that was charged at once, cached pages of files too; None before Linux 5.19 (v2)."""
        name = "memory.max_usage_in_bytes" if self.is_v1 else "memory.peak"
        with contextlib.suppress(FileNotFoundError):
            return int((self.path / name).read_text())
        return None

    def oom_kills(self) -> int:
        """Processes of the group that the kernel has killed for lack of memory."""
        name = "memory.oom_control" if self.is_v1 else "memory.events"
        lines = (self.path / name).read_text().splitlines()
        return int(dict(line.split() for line in lines)["oom_kill"])

    def remove(self) -> None:
        for _ in range(100):  # a killed process takes a moment to leave
            with contextlib.suppress(OSError):
                self.path.rmdir()
                return
            time.sleep(0.02)


@contextlib.contextmanager
def memory_group() -> Iterator[tuple[Group | None, str]]:
    """A group and "", or None and why it cannot be had; gone at the end of the `with` block."""
    try:
        group = Group()
    except OSError as error:
        yield None, f"no memory cgroup of our own: {error}"
        return
    try:
        yield group, ""
    finally:
        group.remove()
