"""File trees as the kernel shows them, for every layout of control groups met so far."""

import resource

import psutil
import pytest

from fedpruner_client.device import available_bytes, cgroup_limits

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


def stat_v1(limit, inactive_file=0):
    return (
        f"cache 1\nhierarchical_memory_limit {str(limit).strip()}\n"
        f"total_inactive_file {inactive_file}\n"
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
    limits = [found for found, _ in cgroup_limits(tree(groups, mounts, files))]
    assert min(limits, default=None) == limit


def test_without_proc_there_is_no_limit(tmp_path):
    assert list(cgroup_limits(tmp_path)) == []


def test_what_is_used_on_v1_leaves_out_the_page_cache_that_can_be_dropped(tree):
    files = {
        f"{V1}/a/memory.usage_in_bytes": f"{100 * MIB}\n",
        f"{V1}/a/memory.stat": stat_v1(512 * MIB, inactive_file=30 * MIB),
    }
    limits = list(cgroup_limits(tree("4:memory:/a\n", mount_v1("/"), files)))
    assert limits == [(512 * MIB, 70 * MIB)]


def test_what_is_used_on_v2_leaves_out_the_page_cache_that_can_be_dropped(tree):
    files = {
        "sys/fs/cgroup/a/memory.max": f"{512 * MIB}\n",
        "sys/fs/cgroup/a/memory.current": f"{100 * MIB}\n",
        "sys/fs/cgroup/a/memory.stat": f"anon 5\ninactive_file {30 * MIB}\nactive_file 7\n",
    }
    limits = list(cgroup_limits(tree("0::/a\n", mount_v2("/"), files)))
    assert limits == [(512 * MIB, 70 * MIB)]


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


def test_more_used_than_allowed_leaves_nothing(tree):
    files = {
        "sys/fs/cgroup/a/memory.max": f"{10 * MIB}\n",
        "sys/fs/cgroup/a/memory.current": f"{30 * MIB}\n",
    }
    assert available_bytes(tree("0::/a\n", mount_v2("/"), files)) == 0


def test_without_control_groups_available_is_at_most_what_the_machine_has(tmp_path):
    assert 0 < available_bytes(tmp_path) <= psutil.virtual_memory().total


def test_a_limit_on_the_address_space_counts(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    room = 64 * MIB
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + room, hard))
    try:
        found = available_bytes(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert found <= room
