"""Disks that are full or go read-only, of coordinator and device. Real ones, so it needs root."""

import os
import shutil
import socket
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from invariants import check
from lightbed import MIB, Bed, ended_well, status_of, wait_until
from proxy import Proxy

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="to mount a small disk needs root")

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
Mount = Callable[..., None]


def run(*command: str, may_return: tuple[int, ...] = (0,)) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode in may_return, f"{command}: {done.stderr}"
    return done.stdout.strip()


@pytest.fixture
def mount() -> Iterator[Mount]:
    """Mounts something at a folder until the programs have ended: ask for it before `bed`."""
    mounted: list[Path] = []

    def mount_at(folder: Path, *arguments: str) -> None:
        folder.mkdir(exist_ok=True)
        run("mount", *arguments, str(folder))
        mounted.append(folder)

    yield mount_at
    for folder in reversed(mounted):
        run("umount", str(folder), may_return=(0, 32))  # 32: the test has done it


def fill(folder: Path, *, but_bytes: int) -> Path:
    """A file that leaves so many bytes of a disk."""
    filler = folder / "filler"
    num_bytes = shutil.disk_usage(folder).free - but_bytes
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, num_bytes)
    return filler


def healths(*addresses: str) -> list[int]:
    """What each address answers to a health check."""
    found = []
    for address in addresses:
        with grpc.insecure_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            found.append(stub.Check(health_pb2.HealthCheckRequest(), timeout=10).status)
    return found


def check_journal(state_dir: Path) -> None:
    with closing(sqlite3.connect(state_dir / "journal.sqlite")) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def free_address() -> str:
    with socket.socket() as end:
        end.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{end.getsockname()[1]}"


@pytest.mark.parametrize(("left_bytes", "told"), [
    (0, "cannot write to its disk: No space left on device"),
    (2 * MIB, "disk is full: 2 MiB free, "),
])  # fmt: skip
def test_a_full_disk_is_told_and_updates_wait_until_there_is_room(
    mount: Mount, bed: Bed, left_bytes: int, told: str
) -> None:
    mount(bed.state_dir, "-t", "tmpfs", "-o", "size=64m", "small")
    beside = free_address()
    server = bed.server(transfer={"min_free_bytes": "4MiB"}, health_server_address=beside)
    bed.ready()
    with grpc.insecure_channel(bed.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(), timeout=60
        )
        heard = (reply.status for reply in watch)
        assert SERVING in heard  # reads up to it
        assert healths(bed.address, beside) == [SERVING] * 2
        agent = bed.agent("one", steps=10, step_s=0.1)
        agent.wait_for("fetched")
        filler = fill(bed.state_dir, but_bytes=left_bytes)
        assert next(heard) == NOT_SERVING
        assert healths(bed.address, beside) == [NOT_SERVING] * 2
        assert told in status_of(bed)
        agent.wait_for("cannot upload the update, trying again")
        filler.unlink()
        assert next(heard) == SERVING
        watch.cancel()
    ended_well(server, agent)
    assert bed.outcomes() == {"one": ("stored", "")}
    check(bed.state_dir, bed.config, num_rounds=1)


@pytest.mark.parametrize("moment", ["upload", "aggregation", "export"])
def test_a_disk_that_fills_up_in_the_middle_of_anything_costs_only_time(
    mount: Mount, bed: Bed, moment: str
) -> None:
    left_mib = {"upload": 3, "aggregation": 9, "export": 14}[moment]
    mount(bed.state_dir, "-t", "tmpfs", "-o", "size=64m", "small")
    server = bed.server(run={"num_rounds": 2})
    agent = bed.agent("one", steps=10, step_s=0.1)
    agent.wait_for("fetched")
    filler = fill(bed.state_dir, but_bytes=left_mib * MIB)
    if moment == "upload":
        agent.wait_for("cannot upload the update, trying again")
        wait_until(lambda: "disk is full: 3 MiB free" in status_of(bed), "status says so")
        wait_until(lambda: healths(bed.address) == [NOT_SERVING], "the health falls")
    else:
        server.wait_for("the run waits for its disk")
        wait_until(lambda: "waiting for the disk" in status_of(bed), "status says so")
    check_journal(bed.state_dir)
    filler.unlink()
    ended_well(server, agent)
    check(bed.state_dir, bed.config, num_rounds=2)


def test_a_coordinator_whose_disk_goes_read_only_waits_and_goes_on_after_a_repair(
    mount: Mount, bed: Bed
) -> None:
    missing = [name for name in ("mkfs.ext4", "e2fsck", "losetup") if not shutil.which(name)]
    if missing or not Path("/dev/loop-control").exists():
        pytest.skip(f"no disk in a file: {missing or 'no /dev/loop-control'}")
    image = bed.folder / "disk"
    with image.open("wb") as file:
        file.truncate(128 * MIB)
    run("mkfs.ext4", "-q", str(image))
    mount(bed.state_dir, "-o", "loop,errors=remount-ro", str(image))
    device = Path(run("findmnt", "-no", "SOURCE", str(bed.state_dir))).name
    trigger = Path("/sys/fs/ext4", device, "trigger_fs_error")
    if not trigger.exists():
        pytest.skip(f"no {trigger} to make a disk fail with")
    server = bed.server()
    agent = bed.agent("one", steps=10, step_s=0.1)
    agent.wait_for("fetched")
    run("sync", "-f", str(bed.state_dir))  # the copied part of it, which nobody brought to the disk
    trigger.write_text("a test")  # what the kernel does after a disk's first error
    agent.wait_for("cannot upload the update, trying again")
    wait_until(lambda: healths(bed.address) == [NOT_SERVING], "the health falls")
    assert "Read-only file system" in status_of(bed)
    assert server.terminate() == 0
    run("umount", str(bed.state_dir))
    run("e2fsck", "-fy", str(image), may_return=(0, 1))
    mount(bed.state_dir, "-o", "loop", str(image))
    check_journal(bed.state_dir)
    server = bed.server()
    ended_well(server, agent)
    assert bed.outcomes() == {"one": ("stored", "")}
    check(bed.state_dir, bed.config, num_rounds=1)


@pytest.mark.parametrize(("disk", "reason"), [
    ("size=10m", "this task's tensors need 16 MiB more disk"),
    ("size=64m,nr_inodes=20", "No space left on device"),  # for no more files
    ("size=25m", "No space left on device"),  # for base and adapter, not for the update
])  # fmt: skip
def test_a_device_whose_disk_is_full_fails_by_name_and_the_run_goes_on(
    mount: Mount, bed: Bed, disk: str, reason: str
) -> None:
    server = bed.server(run={"min_available_clients": 2, "num_rounds": 2})
    mount(bed.folder / "small", "-t", "tmpfs", "-o", disk, "small")
    small, fine = bed.agent("small"), bed.agent("fine")
    ended_well(server, small, fine)
    assert len(bed.rows("round")) == 2
    for row in bed.rows("client"):
        if row["client_id"] == "small":
            assert row["outcome"] == "failed"
            assert reason in row["reason"]
        else:
            assert row["outcome"] == "stored"
    check(bed.state_dir, bed.config, num_rounds=2)


def test_a_devices_disk_that_fills_up_in_a_download_is_told_and_space_is_used_again(
    mount: Mount, bed: Bed
) -> None:
    with ExitStack() as clean:
        server = bed.server(run={"min_available_clients": 2, "num_rounds": 2})
        proxy = clean.enter_context(Proxy(bed.address))
        proxy.freeze_at(down=8 * MIB)
        disk = bed.folder / "small"
        mount(disk, "-t", "tmpfs", "-o", "size=64m", "small")
        small, fine = bed.agent("small", proxy.address), bed.agent("fine", steps=20, step_s=0.1)
        proxy.wait_for_bytes(down=8 * MIB)
        filler = fill(disk, but_bytes=MIB)
        proxy.mend()
        server.wait_for("task failed")
        filler.unlink()
        ended_well(server, small, fine)
    outcomes = {(r["round"], r["client_id"]): r for r in bed.rows("client")}
    assert outcomes[1, "small"]["outcome"] == "failed"
    assert "No space left on device" in outcomes[1, "small"]["reason"]
    assert outcomes[2, "small"]["outcome"] == "stored"
    assert outcomes[2, "small"]["base_bytes_down"] < 14 * MIB  # it kept what had arrived
    check(bed.state_dir, bed.config, num_rounds=2)
