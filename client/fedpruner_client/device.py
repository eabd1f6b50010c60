"""The memory this process may really use.

psutil and /proc/meminfo show the host also inside a container; the true limit is the tightest of
all control groups above this process, in either version of the hierarchy, or both.
"""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import psutil

# cgroup v1 writes 9223372036854771712 for "no limit".
_UNLIMITED = 1 << 60


def available_bytes(root: Path = Path("/")) -> int:
    """Bytes that could be allocated here now without swapping or being killed.

    The least of what the host has available, what is left under the control groups' limits, and
    what is left under RLIMIT_AS and RLIMIT_DATA.

    Args:
        root: of the file system to look at; tests give a tree of their own.
    """
    candidates = [psutil.virtual_memory().available]
    candidates.extend(limit - used for limit, used in cgroup_limits(root))
    candidates.extend(_rlimits())
    return max(0, min(candidates))


def cgroup_limits(root: Path = Path("/")) -> Iterator[tuple[int, int]]:
    """(limit, bytes used under it) of every control group that bounds this process.

    A parent's limit is shared with its other children, so each limit goes with the use of its own
    group. Bytes that can simply be dropped (inactive file cache) do not count as used.
    """
    for version, directory, mount in _memory_groups(root):
        if version == 1:
            # Of ancestors outside a container nothing can be seen but their tightest limit.
            hierarchical = _stat(directory).get("hierarchical_memory_limit")
            if hierarchical is not None and hierarchical < _UNLIMITED:
                yield hierarchical, _used(directory, version)
        for group in _upwards(directory, mount):
            names = ("memory.limit_in_bytes",) if version == 1 else ("memory.max", "memory.high")
            for limit in (_number(group / name) for name in names):
                if limit is not None:
                    yield limit, _used(group, version)


def _upwards(directory: Path, mount: Path) -> Iterator[Path]:
    """A group and its ancestors as far as the mount point."""
    yield directory
    if directory != mount and mount in directory.parents:
        yield from _upwards(directory.parent, mount)


def _used(group: Path, version: int) -> int:
    usage, droppable = (
        ("memory.usage_in_bytes", "total_inactive_file")
        if version == 1
        else ("memory.current", "inactive_file")
    )
    return max(0, (_number(group / usage) or 0) - _stat(group).get(droppable, 0))


def _memory_groups(root: Path) -> Iterator[tuple[int, Path, Path]]:
    """(version, this process's group, its mount point) of each memory hierarchy."""
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:  # not Linux
        return
    own: dict[int, str] = {}
    for line in memberships:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            own[2] = path
        elif "memory" in controllers.split(","):
            own[1] = path
    for line in mounts:
        left, _, right = line.partition(" - ")
        fields, kind, options = left.split(), right.split()[0], right.split()[-1]
        version = 2 if kind == "cgroup2" else 1 if kind == "cgroup" else None
        if version not in own or (version == 1 and "memory" not in options.split(",")):
            continue
        mount = root / fields[4].lstrip("/")
        # Docker on v1 mounts /docker/ID at the mount point: the group's path is relative to that.
        relative = os.path.relpath(own[version], fields[3])
        yield version, mount if relative.startswith("..") else mount / relative, mount


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() and int(text) < _UNLIMITED else None


def _stat(directory: Path) -> dict[str, int]:
    try:
        lines = (directory / "memory.stat").read_text().splitlines()
    except OSError:
        return {}
    return {key: int(value) for key, value in (line.split() for line in lines)}


def _rlimits() -> Iterator[int]:
    memory = psutil.Process().memory_info()
    for limit, used in ((resource.RLIMIT_AS, memory.vms), (resource.RLIMIT_DATA, memory.rss)):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            yield soft - used
