"""A run between hosts of their own, over a slow network that loses packets and then everything."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from invariants import check
from lightbed import BASE_BYTES, Bed, ended_well, wait_until
from netbed import Host, Net, why_not
from programs import Program

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"no network bed: {why_not()}")


class HostProgram(Program):
    """A program on one of the hosts."""

    host: Host

    def __init__(
        self,
        folder: Path,
        name: str,
        module: str,
        *arguments: str,
        env: Mapping[str, str] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.stdout_path = folder / f"{name}.out"
        self.stderr_path = folder / f"{name}.err"
        environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        with self.stdout_path.open("w") as out, self.stderr_path.open("w") as err:
            self.process: subprocess.Popen[bytes] = self.host.popen(
                [sys.executable, "-m", module, *arguments],
                stdout=out,
                stderr=err,
                env={**environment, **(env or {})},
            )


def on(host: Host) -> type[HostProgram]:
    return type("OnHost", (HostProgram,), {"host": host})


def test_a_run_over_a_slow_lossy_network_that_is_cut_in_the_middle_of_a_transfer(bed: Bed) -> None:
    with Net() as net:
        hub = net["server"]
        for name in ("agent-0", "agent-1"):
            net.shape(name, "server", delay_s=0.02, loss=0.01)
        bed.make, bed.address = on(hub), f"{hub.address}:0"
        server = bed.server(
            run={"num_rounds": 2, "min_available_clients": 2}, keepalive_s=2, insecure=True
        )
        agents = []
        for name in ("agent-0", "agent-1"):
            bed.make = on(net[name])
            agents.append(bed.agent(name, insecure=True, keepalive_s=1, transfer_idle_s=3))
        wait_until(lambda: bed.arrived("agent-0") > BASE_BYTES // 4, "it is in the middle of it")
        net.cut("agent-0", "server")
        dropped = net.link("server", "agent-0").num_dropped
        agents[0].wait_for("cannot fetch tensors, trying again", timeout_s=30)
        had = bed.arrived("agent-0")
        assert had < BASE_BYTES
        assert net.link("server", "agent-0").num_dropped > dropped
        net.mend("agent-0", "server")
        ended_well(server, *agents)
    outcomes = {(r["round"], r["client_id"]): r["outcome"] for r in bed.rows("client")}
    assert outcomes == {(n, name): "stored" for n in (1, 2) for name in ("agent-0", "agent-1")}
    check(bed.state_dir, bed.config, num_rounds=2)
