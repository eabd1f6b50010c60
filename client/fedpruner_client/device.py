"""The memory this process may really use, and which limit it is that binds.

psutil and /proc/meminfo show the host also inside a container; the true limit is the tightest of
all control groups above this process, in either version of the hierarchy, or both.

No limit on swap is looked at as a gain (v2 `memory.swap.max`, v1 `memsw` beyond the memory limit):
training that swaps is training that does not end.
"""

import re
import resource
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

# cgroup v1 writes 9223372036854771712 for "no limit".
_UNLIMITED = 1 << 60

# (limit, what is used under it). v1's memsw is memory and swap together: it never gives more than
# the memory limit, but when pages of the group are swapped out it can leave less.
_FILES = {
    1: (
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ("memory.memsw.limit_in_bytes", "memory.memsw.usage_in_bytes"),
    ),
    # Beyond memory.high the kernel does not kill but throttles, until nothing moves any more.
    2: (("memory.max", "memory.current"), ("memory.high", "memory.current")),
}


@dataclass(frozen=True)
class NamedLimit:
    """One bound on what this process can still allocate.

    Attributes:
        source: what sets it: `host`, `cgroup /a/b memory.max`, `RLIMIT_DATA`.
        available_bytes: what it leaves; never negative.
    """

    source: str
    available_bytes: int


@dataclass(frozen=True)
class ProcessLimit:
    """One of this process's own limits, as `setrlimit` sets them.

    Attributes:
        name: `RLIMIT_AS` or `RLIMIT_DATA`.
        limit_bytes: the soft limit.
        used_bytes: what counts against it.
    """

    name: str
    limit_bytes: int
    used_bytes: int


def host_available_bytes() -> int:
    """What the whole machine could give without swapping."""
    return int(psutil.virtual_memory().available)


def process_limits() -> list[ProcessLimit]:
    """The limits that are set on this process itself; empty where none is."""
    memory = psutil.Process().memory_info()
    # Private writable mappings, touched or not: that is what RLIMIT_DATA counts on Linux.
    data = getattr(memory, "data", memory.rss)
    found = []
    for name, used in (("RLIMIT_AS", memory.vms), ("RLIMIT_DATA", data)):
        soft, _ = resource.getrlimit(getattr(resource, name))
        if soft != resource.RLIM_INFINITY:
            found.append(ProcessLimit(name, soft, used))
    return found


def available_bytes(root: Path = Path("/")) -> int:
    """Bytes that could be allocated here now without swapping or being killed.

    Args:
        root: of the file system to look at; tests give a tree of their own.
    """
    return tightest(memory_limits(root)).available_bytes


def tightest(limits: Iterable[NamedLimit]) -> NamedLimit:
    """The limit that binds: the one that leaves least, the first of several alike.

    Raises:
        ValueError: there is none.
    """
    return min(limits, key=lambda limit: limit.available_bytes)


def memory_limits(
    root: Path = Path("/"),
    *,
    host: Callable[[], int] = host_available_bytes,
    own: Callable[[], Iterable[ProcessLimit]] = process_limits,
) -> list[NamedLimit]:
    """Everything that bounds this process: the host, its control groups, its own limits.

    Limits of a process count what that process uses: ask in the process that will allocate.

    Args:
        root: of the file system to look at; tests give a tree of their own.
        host: bytes that the machine has available.
        own: the limits on the process itself.
    """
    return [
        NamedLimit("host", max(0, host())),
        *cgroup_limits(root),
        *(NamedLimit(o.name, max(0, o.limit_bytes - o.used_bytes)) for o in own()),
    ]


def cgroup_limits(root: Path = Path("/")) -> Iterator[NamedLimit]:
    """What every control group that bounds this process leaves, innermost group first.

    A parent's limit is shared with its other children, so each limit goes with the use of its own
    group. Files that are missing or make no sense are as good as no limit.
    """
    for hierarchy in _hierarchies(root):
        for group in hierarchy.groups():
            for limit_name, usage_name in _FILES[hierarchy.version]:
                limit = _number(group / limit_name)
                if limit is not None:
                    left = limit - _used(group, usage_name, hierarchy.version)
                    yield NamedLimit(f"cgroup {hierarchy.shown(group)} {limit_name}", max(0, left))
        if hierarchy.version == 1:
            yield from _hierarchical_limit(hierarchy)


@dataclass(frozen=True)
class _Hierarchy:
    """One mounted tree of control groups that has a say about memory.

    Attributes:
        version: 1 or 2.
        mount: directory where it is mounted.
        mount_root: the group that the mount point shows.
        directory: of this process's own group, or the nearest that can be seen: the mount point.
    """

    version: int
    mount: Path
    mount_root: PurePosixPath
    directory: Path

    def groups(self) -> Iterator[Path]:
        """The process's group and its ancestors as far as the mount point."""
        yield self.directory
        group = self.directory
        while group != self.mount:
            group = group.parent
            yield group

    def shown(self, group: Path) -> str:
        """A group's name as /proc/self/cgroup would write it."""
        return str(self.mount_root / group.relative_to(self.mount))


def _hierarchical_limit(hierarchy: _Hierarchy) -> Iterator[NamedLimit]:
    """v1: the tightest limit of all ancestors, also of those outside the container.

    What those have in use cannot be seen; the process's own group stands in, so this is the most
    that can be left.
    """
    for group in hierarchy.groups():
        stat = _stat(group)
        if stat:
            limit = stat.get("hierarchical_memory_limit", _UNLIMITED)
            if limit < _UNLIMITED:
                left = limit - _used(group, "memory.usage_in_bytes", version=1)
                source = f"cgroup {hierarchy.shown(group)} hierarchical_memory_limit"
                yield NamedLimit(source, max(0, left))
            return


def _used(group: Path, usage_name: str, version: int) -> int:
    """Bytes of a group that the kernel cannot simply take back."""
    return max(0, (_number(group / usage_name) or 0) - _droppable(_stat(group), version))


def _droppable(stat: Mapping[str, int], version: int) -> int:
    """Page cache of a group that gives way when memory is asked for.

    Active as much as inactive, as in the kernel's own MemAvailable: whatever is read twice becomes
    active, so weights that were downloaded and then hashed would else count against training them.
    Measured in a v1 group of 256 MiB with 200 MiB of active cache: 180 MiB could be allocated.
    Mapped files stay counted. They are libraries and weights in use, which would be read again at
    once; and they are in the resident set, which the agent adds as the floor of its budget.
    """
    prefix, mapped = ("total_", "total_mapped_file") if version == 1 else ("", "file_mapped")
    cached = stat.get(f"{prefix}inactive_file", 0) + stat.get(f"{prefix}active_file", 0)
    return max(0, cached - stat.get(mapped, 0))


def _hierarchies(root: Path) -> Iterator[_Hierarchy]:
    """Where this process is, in each tree of control groups that is mounted here."""
    own = _memberships(_lines(root / "proc/self/cgroup"))
    for line in _lines(root / "proc/self/mountinfo"):
        left, _, right = line.partition(" - ")
        fields, kinds = left.split(), right.split()
        if len(fields) < 5 or not kinds:
            continue
        version = {"cgroup2": 2, "cgroup": 1}.get(kinds[0])
        if version not in own or (version == 1 and "memory" not in kinds[-1].split(",")):
            continue
        mount = root / _unescaped(fields[4]).lstrip("/")
        mount_root = PurePosixPath(_unescaped(fields[3]))
        yield _Hierarchy(version, mount, mount_root, mount / _below(mount_root, own[version]))


def _memberships(lines: Iterable[str]) -> dict[int, PurePosixPath]:
    """The process's group by version of the hierarchy."""
    own = {}
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if colon and number == "0" and not controllers:
            own[2] = PurePosixPath(path)
        elif colon and "memory" in controllers.split(","):
            own[1] = PurePosixPath(path)
    return own


def _below(mount_root: PurePosixPath, group: PurePosixPath) -> PurePosixPath:
    """A group's path under the mount point; `.` where the mount does not show it.

    Docker on v1 mounts `/docker/ID` at the mount point while /proc/self/cgroup still says
    `/docker/ID`. In a control group namespace a path or a mount root may begin with `/..`, for
    what lies above the namespace, under a name that cannot be known. Then the mount point, an
    ancestor or the container's own root, is the best there is.
    """
    above = mount_root.parts
    inside = group.parts[len(above) :]
    if group.parts[: len(above)] != above or ".." in inside:
        return PurePosixPath()
    return PurePosixPath(*inside)


def _unescaped(field: str) -> str:
    """mountinfo writes space, tab, newline and backslash as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _number(path: Path) -> int | None:
    """The number in a file; None for `max`, for v1's way to say so, and for anything else."""
    lines = _lines(path)
    number = _natural(lines[0]) if len(lines) == 1 else None
    return number if number is not None and number < _UNLIMITED else None


def _stat(group: Path) -> dict[str, int]:
    """The lines `name number` of a group's memory.stat; empty where it cannot be read."""
    found = {}
    for line in _lines(group / "memory.stat"):
        name, _, value = line.partition(" ")
        number = _natural(value)
        if number is not None:
            found[name] = number
    return found


def _natural(text: str) -> int | None:
    text = text.strip()
    # The kernel's own go up to 2**64; beyond 4300 digits int() refuses.
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 20 else None


def _lines(path: Path) -> list[str]:
    """The lines of a file of the kernel; none where there is no such file."""
    try:
        return path.read_text(errors="replace").splitlines()
    except (OSError, ValueError):  # ValueError: a path with a null byte
        return []
