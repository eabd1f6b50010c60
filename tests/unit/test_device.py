"""File trees as the kernel shows them, for every layout of control groups met so far."""

import contextlib
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fedpruner_client.device import (
    NamedLimit,
    ProcessLimit,
    available_bytes,
    cgroup_limits,
    memory_limits,
    process_limits,
    tightest,
)

MIB = 1 << 20
V1 = "sys/fs/cgroup/memory"
UNLIMITED = "9223372036854771712\n"
OTHER_MOUNTS = (
    "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
    "23 22 0:21 / /proc rw,nosuid - proc proc rw\n"
    "33 22 0:29 / /sys/fs/cgroup/cpu rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
)
OTHER_GROUPS = "9:cpu,cpuacct:/elsewhere\n1:name=systemd:/init.scope\n"


def mount_v1(root):
    return f"34 22 0:30 {root} /{V1} rw,nosuid shared:10 - cgroup cgroup rw,memory\n"


def mount_v2(root, at="/sys/fs/cgroup"):
    return f"35 22 0:31 {root} {at} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


def stat_v1(limit, inactive_file=0, active_file=0, mapped_file=0):
    return (
        f"cache 1\nhierarchical_memory_limit {str(limit).strip()}\n"
        f"total_inactive_file {inactive_file}\ntotal_active_file {active_file}\n"
        f"total_mapped_file {mapped_file}\n"
    )


@pytest.fixture
def tree(tmp_path):
    def make(groups, mounts, files):
        texts = {
            "proc/self/cgroup": OTHER_GROUPS + groups,
            "proc/self/mountinfo": OTHER_MOUNTS + mounts,
            **files,
        }
        for name, text in texts.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return make


# layout -> (lines of /proc/self/cgroup and of /proc/self/mountinfo, files, the tightest limit)
LAYOUTS = {
    "v1 on the host": (
        "4:memory:/jobs/a\n",
        mount_v1("/"),
        {f"{V1}/jobs/a/memory.limit_in_bytes": f"{512 * MIB}\n"},
        512 * MIB,
    ),
    "v1, a parent is tighter": (
        "4:memory:/jobs/a\n",
        mount_v1("/"),
        {
            f"{V1}/jobs/a/memory.limit_in_bytes": f"{512 * MIB}\n",
            f"{V1}/jobs/a/memory.stat": stat_v1(300 * MIB),
        },
        300 * MIB,
    ),
    "v1 without a limit": (
        "4:memory:/a\n",
        mount_v1("/"),
        {
            f"{V1}/a/memory.limit_in_bytes": UNLIMITED,
            f"{V1}/a/memory.stat": stat_v1(UNLIMITED),
        },
        None,
    ),
    "docker on v1: the group is mounted at the mount point": (
        "4:memory:/docker/ab\n0::/docker/ab\n",
        mount_v1("/docker/ab"),
        {f"{V1}/memory.limit_in_bytes": f"{512 * MIB}\n"},
        512 * MIB,
    ),
    "docker on v1 with a group of its own inside": (
        "4:memory:/docker/ab/job\n",
        mount_v1("/docker/ab"),
        {
            f"{V1}/memory.limit_in_bytes": f"{512 * MIB}\n",
            f"{V1}/job/memory.limit_in_bytes": f"{64 * MIB}\n",
        },
        64 * MIB,
    ),
    "docker on v1 with a private namespace": (
        "4:memory:/\n",
        mount_v1("/"),
        {f"{V1}/memory.limit_in_bytes": f"{512 * MIB}\n"},
        512 * MIB,
    ),
    "v2 on the host": (
        "0::/user.slice/a.service\n",
        mount_v2("/"),
        {"sys/fs/cgroup/user.slice/a.service/memory.max": f"{512 * MIB}\n"},
        512 * MIB,
    ),
    "v2 nested, the parent is tighter": (
        "0::/parent/child\n",
        mount_v2("/"),
        {
            "sys/fs/cgroup/parent/memory.max": f"{64 * MIB}\n",
            "sys/fs/cgroup/parent/child/memory.max": f"{512 * MIB}\n",
        },
        64 * MIB,
    ),
    "v2, memory.high is tighter": (
        "0::/a\n",
        mount_v2("/"),
        {
            "sys/fs/cgroup/a/memory.max": f"{512 * MIB}\n",
            "sys/fs/cgroup/a/memory.high": f"{128 * MIB}\n",
        },
        128 * MIB,
    ),
    "v2 without a limit": (
        "0::/a\n",
        mount_v2("/"),
        {"sys/fs/cgroup/a/memory.max": "max\n", "sys/fs/cgroup/a/memory.high": "max\n"},
        None,
    ),
    "docker on v2": (
        "0::/\n",
        mount_v2("/"),
        {"sys/fs/cgroup/memory.max": f"{512 * MIB}\n", "sys/fs/cgroup/memory.high": "max\n"},
        512 * MIB,
    ),
    "v2, the mount shows another branch": (
        "0::/../other\n",
        mount_v2("/docker/ab"),
        {"sys/fs/cgroup/memory.max": f"{512 * MIB}\n"},
        512 * MIB,
    ),
    "hybrid: memory is on v1": (
        "4:memory:/a\n0::/a\n",
        mount_v2("/", "/sys/fs/cgroup/unified") + mount_v1("/"),
        {f"{V1}/a/memory.limit_in_bytes": f"{256 * MIB}\n"},
        256 * MIB,
    ),
    "hybrid without a limit": (
        "4:memory:/a\n0::/a\n",
        mount_v2("/", "/sys/fs/cgroup/unified") + mount_v1("/"),
        {f"{V1}/a/memory.stat": stat_v1(UNLIMITED)},
        None,
    ),
    "docker on v1: the parent outside is tighter": (
        "4:memory:/par/ab\n",
        mount_v1("/par/ab"),
        {
            f"{V1}/memory.limit_in_bytes": f"{512 * MIB}\n",
            f"{V1}/memory.stat": stat_v1(300 * MIB),
        },
        300 * MIB,
    ),
    "docker on v1: the path is nowhere inside": (
        "4:memory:/docker/ab\n",
        mount_v1("/"),
        {
            f"{V1}/memory.limit_in_bytes": f"{512 * MIB}\n",
            f"{V1}/memory.stat": stat_v1(300 * MIB),
        },
        300 * MIB,
    ),
    "docker without limit": (
        "4:memory:/docker/ab\n0::/docker/ab\n",
        mount_v1("/docker/ab"),
        {
            f"{V1}/memory.limit_in_bytes": UNLIMITED,
            f"{V1}/memory.stat": stat_v1(UNLIMITED),
        },
        None,
    ),
    "v1 with memory and cpu in one hierarchy": (
        "4:cpu,memory:/a\n",
        f"34 22 0:30 / /{V1} rw,nosuid - cgroup cgroup rw,cpu,memory\n",
        {f"{V1}/a/memory.limit_in_bytes": f"{512 * MIB}\n"},
        512 * MIB,
    ),
    "v2, a grandparent is tighter, the parent has none": (
        "0::/kubepods.slice/pod/app\n",
        mount_v2("/"),
        {
            "sys/fs/cgroup/kubepods.slice/memory.max": f"{64 * MIB}\n",
            "sys/fs/cgroup/kubepods.slice/pod/memory.max": "max\n",
            "sys/fs/cgroup/kubepods.slice/pod/app/memory.max": f"{512 * MIB}\n",
        },
        64 * MIB,
    ),
    "v2, the group was removed, its parent is still there": (
        "0::/a/gone (deleted)\n",
        mount_v2("/"),
        {"sys/fs/cgroup/a/memory.max": f"{512 * MIB}\n"},
        512 * MIB,
    ),
    "v2, the process is above its namespace": (
        "0::/../..\n",
        mount_v2("/"),
        {"sys/fs/cgroup/memory.max": f"{512 * MIB}\n"},
        512 * MIB,
    ),
    "v2, the mount comes from above the namespace": (
        "0::/\n",
        mount_v2("/../.."),
        {"sys/fs/cgroup/memory.max": f"{512 * MIB}\n"},
        512 * MIB,
    ),
    "v2, the mount shows a sibling's branch too": (
        "0::/../other\n",
        mount_v2("/.."),
        {
            "sys/fs/cgroup/memory.max": f"{512 * MIB}\n",
            "sys/fs/cgroup/other/memory.max": f"{64 * MIB}\n",
        },
        64 * MIB,
    ),
    "v2, a group below the sibling's name is not taken for ours": (
        "0::/../other\n",
        mount_v2("/"),
        {
            "sys/fs/cgroup/memory.max": f"{512 * MIB}\n",
            "sys/fs/cgroup/other/memory.max": f"{64 * MIB}\n",
        },
        512 * MIB,
    ),
    "v2, another branch is mounted, with a group of the same name": (
        "0::/pod/job\n",
        mount_v2("/elsewhere"),
        {
            "sys/fs/cgroup/memory.max": f"{512 * MIB}\n",
            "sys/fs/cgroup/job/memory.max": f"{64 * MIB}\n",
        },
        512 * MIB,
    ),
    "v2, a name with an escaped character": (
        "0::/dev-disk-by\\x2duuid.slice/a b/job\n",
        mount_v2("/dev-disk-by\\134x2duuid.slice/a\\040b", "/sys/fs/my\\040groups"),
        {"sys/fs/my groups/job/memory.max": f"{512 * MIB}\n"},
        512 * MIB,
    ),
    "v2, a limit of nothing": (
        "0::/a\n",
        mount_v2("/"),
        {
            "sys/fs/cgroup/memory.max": f"{512 * MIB}\n",
            "sys/fs/cgroup/a/memory.max": "0\n",
        },
        0,
    ),
    "v1, a limit of nothing": (
        "4:memory:/a\n",
        mount_v1("/"),
        {f"{V1}/a/memory.limit_in_bytes": "0\n"},
        0,
    ),
    "v2, swap neither adds nor takes": (
        "0::/a\n",
        mount_v2("/"),
        {
            "sys/fs/cgroup/a/memory.max": f"{512 * MIB}\n",
            "sys/fs/cgroup/a/memory.swap.max": f"{64 * MIB}\n",
        },
        512 * MIB,
    ),
    "v1, memory and swap together do not add": (
        "4:memory:/a\n",
        mount_v1("/"),
        {
            f"{V1}/a/memory.limit_in_bytes": f"{512 * MIB}\n",
            f"{V1}/a/memory.memsw.limit_in_bytes": f"{1024 * MIB}\n",
        },
        512 * MIB,
    ),
    "no memory controller at all": ("", "", {}, None),
    "a mount without a source": (
        "0::/\n",
        "40 22 0:40 / /mnt rw,relatime - tmpfs  rw\n" + mount_v2("/"),
        {"sys/fs/cgroup/memory.max": f"{512 * MIB}\n"},
        512 * MIB,
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_tightest_limit_above_this_process_is_found(tree, layout):
    groups, mounts, files, limit = LAYOUTS[layout]
    limits = [found.available_bytes for found in cgroup_limits(tree(groups, mounts, files))]
    assert min(limits, default=None) == limit


def test_without_proc_there_is_no_limit(tmp_path):
    assert list(cgroup_limits(tmp_path)) == []


GARBAGE = ["", "\n", "max max\n", "-1\n", "12 apples\n", "\x00\xff\n", "9" * 5000, "²\n", "1\n2\n"]


@pytest.mark.parametrize("garbage", GARBAGE, ids=lambda text: repr(text[:12]))
@pytest.mark.parametrize(
    "name", ["memory.max", "memory.high", "memory.current", "memory.stat", "memory.events"]
)
def test_a_file_that_makes_no_sense_is_no_limit_and_no_error(tree, name, garbage):
    files = {"sys/fs/cgroup/memory.max": f"{512 * MIB}\n", f"sys/fs/cgroup/a/{name}": garbage}
    limits = cgroup_limits(tree("0::/a\n", mount_v2("/"), files))
    assert [limit.available_bytes for limit in limits] == [512 * MIB]


@pytest.mark.parametrize(
    ("groups", "mounts"),
    [
        ("0\n:\n::\n0:\n4:memory\n\n", mount_v2("/")),
        ("0::\n", mount_v2("/")),
        ("0::relative\n", mount_v2("/")),
        ("0::/a\x00b\n", mount_v2("/")),
        ("0::/a\n4:memory:/a\n", "1 2 3\n - \n1 2 0:3 / - cgroup2\n35 22 0:31 / /m rw -\n\n"),
        ("0::/a\n4:memory:/a\n", "35 22 0:31 / /m rw - cgroup\n35 22 0:31 a b rw - cgroup2 x y\n"),
    ],
)
def test_lines_that_make_no_sense_are_passed_over(tree, groups, mounts):
    assert list(cgroup_limits(tree(groups, mounts, {}))) == []


def test_a_directory_in_place_of_a_file_is_passed_over(tree, tmp_path):
    (tmp_path / "sys/fs/cgroup/a/memory.max").mkdir(parents=True)
    assert list(cgroup_limits(tree("0::/a\n", mount_v2("/"), {}))) == []


def used_v1(usage, stat):
    files = {
        f"{V1}/a/memory.limit_in_bytes": f"{512 * MIB}\n",
        f"{V1}/a/memory.usage_in_bytes": f"{usage}\n",
        f"{V1}/a/memory.stat": stat,
    }
    return "4:memory:/a\n", mount_v1("/"), files


def used_v2(usage, stat):
    files = {
        "sys/fs/cgroup/a/memory.max": f"{512 * MIB}\n",
        "sys/fs/cgroup/a/memory.current": f"{usage}\n",
        "sys/fs/cgroup/a/memory.stat": stat,
    }
    return "0::/a\n", mount_v2("/"), files


# 100 in use, of which 30 + 20 are page cache, of which 5 are mapped by a program: 55 must stay.
USES = {
    "v1": used_v1(100 * MIB, stat_v1(UNLIMITED, 30 * MIB, 20 * MIB, 5 * MIB)),
    "v2": used_v2(
        100 * MIB,
        f"anon 5\nfile_mapped {5 * MIB}\ninactive_file {30 * MIB}\nactive_file {20 * MIB}\n",
    ),
}


@pytest.mark.parametrize("version", USES)
def test_page_cache_that_can_be_dropped_does_not_count_as_used(tree, version):
    (limit,) = cgroup_limits(tree(*USES[version]))
    assert limit.available_bytes == (512 - 55) * MIB


def test_mapped_shared_memory_does_not_make_the_cache_negative(tree):
    # Mapped shared memory is in file_mapped, but in neither of the lists.
    stat = f"file_mapped {50 * MIB}\ninactive_file {30 * MIB}\nactive_file 0\n"
    (limit,) = cgroup_limits(tree(*used_v2(100 * MIB, stat)))
    assert limit.available_bytes == 412 * MIB


def test_available_is_what_the_limit_leaves(tree):
    files = {
        "sys/fs/cgroup/a/memory.max": f"{40 * MIB}\n",
        "sys/fs/cgroup/a/memory.current": f"{30 * MIB}\n",
        "sys/fs/cgroup/a/memory.stat": f"inactive_file {4 * MIB}\n",
    }
    # 40 - (30 - 4); the machine itself has more than that to give
    assert available_bytes(tree("0::/a\n", mount_v2("/"), files)) == 14 * MIB


def test_what_siblings_use_counts_against_the_limit_of_the_parent(tree):
    files = {
        "sys/fs/cgroup/pod/memory.max": f"{40 * MIB}\n",
        "sys/fs/cgroup/pod/memory.current": f"{30 * MIB}\n",
        "sys/fs/cgroup/pod/agent/memory.max": f"{64 * MIB}\n",
        "sys/fs/cgroup/pod/agent/memory.current": f"{5 * MIB}\n",
    }
    # 40 - 30 are left in the pod, though the agent's own group uses only 5.
    assert available_bytes(tree("0::/pod/agent\n", mount_v2("/"), files)) == 10 * MIB


def test_pages_swapped_out_count_against_the_limit_on_memory_and_swap(tree):
    files = {
        f"{V1}/a/memory.limit_in_bytes": f"{512 * MIB}\n",
        f"{V1}/a/memory.usage_in_bytes": f"{400 * MIB}\n",
        f"{V1}/a/memory.memsw.limit_in_bytes": f"{512 * MIB}\n",
        f"{V1}/a/memory.memsw.usage_in_bytes": f"{500 * MIB}\n",
    }
    # 112 more would fit into memory, but with the 100 that are in swap only 12 are allowed.
    limits = memory_limits(
        tree("4:memory:/a\n", mount_v1("/"), files), host=lambda: 1 << 40, own=list
    )
    assert tightest(limits) == NamedLimit("cgroup /a memory.memsw.limit_in_bytes", 12 * MIB)


def test_more_used_than_allowed_leaves_nothing(tree):
    files = {
        "sys/fs/cgroup/a/memory.max": f"{10 * MIB}\n",
        "sys/fs/cgroup/a/memory.current": f"{30 * MIB}\n",
    }
    assert available_bytes(tree("0::/a\n", mount_v2("/"), files)) == 0


def test_every_limit_is_told_with_its_name(tree):
    files = {
        "sys/fs/cgroup/pod/memory.max": f"{40 * MIB}\n",
        "sys/fs/cgroup/pod/agent/memory.max": f"{64 * MIB}\n",
        "sys/fs/cgroup/pod/agent/memory.high": f"{60 * MIB}\n",
    }
    limits = memory_limits(
        tree("0::/pod/agent\n", mount_v2("/"), files),
        host=lambda: 100 * MIB,
        own=lambda: [
            ProcessLimit("RLIMIT_DATA", 50 * MIB, 20 * MIB),
            ProcessLimit("RLIMIT_AS", 50 * MIB, 70 * MIB),
        ],
    )
    assert limits == [
        NamedLimit("host", 100 * MIB),
        NamedLimit("cgroup /pod/agent memory.max", 64 * MIB),
        NamedLimit("cgroup /pod/agent memory.high", 60 * MIB),
        NamedLimit("cgroup /pod memory.max", 40 * MIB),
        NamedLimit("RLIMIT_DATA", 30 * MIB),
        NamedLimit("RLIMIT_AS", 0),
    ]
    assert tightest(limits).source == "RLIMIT_AS"


def test_a_container_is_named_as_the_host_knows_it(tree):
    files = {
        f"{V1}/memory.limit_in_bytes": f"{512 * MIB}\n",
        f"{V1}/memory.stat": stat_v1(300 * MIB),
    }
    limits = list(cgroup_limits(tree("4:memory:/docker/ab\n", mount_v1("/docker/ab"), files)))
    assert limits == [
        NamedLimit("cgroup /docker/ab memory.limit_in_bytes", 512 * MIB),
        NamedLimit("cgroup /docker/ab hierarchical_memory_limit", 300 * MIB),
    ]


def test_a_group_that_repeats_its_parents_limit_is_named_by_the_file_that_sets_it(tree):
    files = {
        f"{V1}/a/memory.limit_in_bytes": f"{300 * MIB}\n",
        f"{V1}/a/memory.stat": stat_v1(300 * MIB),
    }
    limits = cgroup_limits(tree("4:memory:/a\n", mount_v1("/"), files))
    assert tightest(limits).source == "cgroup /a memory.limit_in_bytes"


def test_the_host_binds_where_nothing_else_does(tmp_path):
    assert memory_limits(tmp_path, host=lambda: 7, own=list) == [NamedLimit("host", 7)]


def test_without_control_groups_available_is_at_most_what_the_machine_has(tmp_path):
    assert 0 < available_bytes(tmp_path) <= psutil.virtual_memory().total


@contextlib.contextmanager
def soft_limit(which, num_bytes):
    soft, hard = resource.getrlimit(which)
    resource.setrlimit(which, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(which, (soft, hard))


def test_a_limit_on_the_address_space_counts(tmp_path):
    room = 64 * MIB
    with soft_limit(resource.RLIMIT_AS, psutil.Process().memory_info().vms + room):
        found = available_bytes(tmp_path)
    assert 0 < found <= room


PROMISED = """
import resource, psutil
from fedpruner_client.device import memory_limits, tightest

held = psutil.Process().memory_info().data
resource.setrlimit(resource.RLIMIT_DATA, (held + (96 << 20), resource.RLIM_INFINITY))
reserved = bytearray(32 << 20)  # never touched: not in the resident set, but it counts
limit = tightest(memory_limits())
print(limit.source, limit.available_bytes >> 20)
promised = bytearray(limit.available_bytes - (2 << 20))
try:
    bytearray(4 << 20)
except MemoryError:
    print("no more")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mappings on Linux only")
def test_what_a_limit_on_data_leaves_can_be_allocated_and_no_more():
    done = subprocess.run(
        [sys.executable, "-c", PROMISED], capture_output=True, text=True, check=True, timeout=60
    )
    said, more = done.stdout.splitlines()
    source, room = said.split()
    assert source == "RLIMIT_DATA"
    assert 56 <= int(room) <= 64
    assert more == "no more"


def test_a_process_without_limits_has_none():
    unlimited = resource.RLIM_INFINITY
    with soft_limit(resource.RLIMIT_AS, unlimited), soft_limit(resource.RLIMIT_DATA, unlimited):
        assert process_limits() == []


CHILD = """
import sys
from fedpruner_client.device import memory_limits, tightest

sys.stdin.readline()  # until it is in the group
block = bytearray(30 << 20)
block[::4096] = b"x" * len(block[::4096])
limit = tightest(memory_limits())
print(limit.source, limit.available_bytes, sep="\\t")
"""


@pytest.fixture
def own_group():
    """(directory of a memory control group made for this test, name of its limit's file)."""
    v1, v2 = Path("/") / V1, Path("/sys/fs/cgroup")
    if (v1 / "memory.limit_in_bytes").exists():
        base, limit = v1, "memory.limit_in_bytes"
    elif (v2 / "cgroup.controllers").exists():
        base, limit = v2, "memory.max"
    else:
        pytest.skip("no memory control groups are mounted here")
    path = base / f"fedpruner-test-{os.getpid()}-{time.monotonic_ns()}"
    try:
        path.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        if not (path / limit).exists():
            pytest.skip(f"{base} does not pass the memory controller on to its children")
        yield path, limit
    finally:
        for _ in range(100):  # a process that ended takes a moment to leave
            with contextlib.suppress(OSError):
                path.rmdir()
                break
            time.sleep(0.02)


@pytest.mark.parametrize("nested", [False, True], ids=["its own limit", "its parent's limit"])
def test_a_real_limit_on_a_real_process_is_what_it_reports(own_group, nested):
    path, limit = own_group
    (path / limit).write_text(str(200 * MIB))
    inner = path / "inner" if nested and limit == "memory.limit_in_bytes" else path
    if nested and inner == path:
        pytest.skip("a v2 group with processes cannot pass its controllers on")
    inner.mkdir(exist_ok=True)
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        (inner / "cgroup.procs").write_text(str(child.pid))
        said, _ = child.communicate("go\n", timeout=60)
    finally:
        child.kill()
        child.wait()
        if nested:
            inner.rmdir()
    assert child.returncode == 0
    source, available = said.rstrip().split("\t")
    assert source == f"cgroup /{path.name} {limit}"
    # 200, less the block and what else the child took after it was moved
    assert 150 * MIB <= int(available) <= 170 * MIB
