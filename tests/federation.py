"""A server and its agents as processes, with budgets that hold as many layers as a test wants."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from programs import Program
from safetensors.numpy import load_file

from fedpruner_client.config import AgentSettings
from fedpruner_client.trainer import Trainer
from fedpruner_common.config import load
from fedpruner_server.blockstore import BlockStore
from fedpruner_server.core.planning import Offer
from fedpruner_server.describe import describe
from fedpruner_simulate.fleet import DeviceOptions, SimulationSettings, offer_of

Start = Callable[..., Program]
Row = dict[str, Any]

WAIT_S = 150.0  # for a whole run, also on a busy machine
ALL = "4GiB"  # room for everything
MARGIN = 0.05  # the default of plan.margin
_NOBODY = [{"name": "nobody", "data": [], "num_layers": 1}]  # a simulation's settings want one


@cache
def measured_floor(folder: Path) -> int:
    """Bytes that a training process on this machine needs before any model."""
    settings = AgentSettings(
        data=[folder], state_dir=folder / "floor", num_threads=1, device="cpu", name="floor"
    )
    trainer = Trainer(settings)
    try:
        return trainer.measure().floor_bytes
    finally:
        trainer.close()


def budget_like(offer: Offer, floor_bytes: int) -> int:
    """A budget that leaves as much beside this floor as an offer leaves beside its own."""
    room = offer.budget_bytes * (1 - MARGIN) - offer.floor_bytes
    return int((room + floor_bytes) / (1 - MARGIN))


@dataclass(frozen=True)
class Federation:
    """Starts the programs of one run.

    Attributes:
        start: the fixture.
        folder: of all state directories.
    """

    start: Start
    folder: Path

    def server(self, config: Path) -> Program:
        """A coordinator on this federation's state."""
        return self.start(
            "server",
            "fedpruner_server.cli",
            "run",
            *("--config", str(config)),
            *("--state-dir", str(self.state_dir)),
        )

    def agent(
        self,
        address: str,
        name: str,
        *data: Path,
        budget: int | str | None = None,
        state: str | None = None,
        config: Path | None = None,
    ) -> Program:
        """A device; `state` names another state directory than its own."""
        return self.start(
            name,
            "fedpruner_client.cli",
            "run",
            *("--server", address),
            *("--name", name),
            *(part for path in data for part in ("--data", str(path))),
            *("--state-dir", str(self.folder / (state or name))),
            *("--num-threads", "1"),
            *("--device", "cpu"),
            *("--max-wait-time", "1"),
            *(("--memory-budget", str(budget)) if budget is not None else ()),
            *(("--config", str(config)) if config else ()),
        )

    @property
    def state_dir(self) -> Path:
        return self.folder / "server"

    @property
    def metrics(self) -> list[Row]:
        """Lines of metrics.jsonl."""
        return [json.loads(line) for line in self.metrics_text.splitlines()]

    @property
    def metrics_text(self) -> str:
        return (self.state_dir / "metrics.jsonl").read_text()

    def rows(self, kind: str) -> list[Row]:
        """Lines of metrics.jsonl of one type."""
        return [row for row in self.metrics if row["type"] == kind]

    def adapter(self, name: str = "final") -> dict[str, np.ndarray]:
        """An exported adapter's tensors."""
        return load_file(self.state_dir / "peft" / name / "adapter_model.safetensors")

    def adapter_after(self, number: int) -> dict[str, np.ndarray]:
        """The global adapter's tensors after a round."""
        return load_file(self.state_dir / "adapters" / f"round-{number:04d}.safetensors")


def at_address(config: Path, address: str) -> Path:
    """The same settings at an address that agents know already."""
    fixed = config.with_name("fixed.toml")
    fixed.write_text(config.read_text().replace("127.0.0.1:0", address))
    return fixed


def wait_for_all(*programs: Program) -> None:
    """Until they ended, all of them well; fails as soon as one did not."""
    deadline = time.monotonic() + WAIT_S
    while not all(program.process.poll() == 0 for program in programs):
        for program in programs:
            assert not program.process.poll(), f"failed:\n{program.output()}"
        assert time.monotonic() < deadline, f"still running:\n{programs[0].output()}"
        time.sleep(0.1)


def assert_equal_bits(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    """The same tensors, bit for bit; the message says how far apart the first difference is."""
    assert one.keys() == other.keys()
    for name, values in one.items():
        difference = np.abs(values.astype(np.float64) - other[name]).max()
        assert values.tobytes() == other[name].tobytes(), f"{name}: up to {difference} apart"


def budgets(config: Path, folder: Path, **num_layers: float) -> dict[str, int]:
    """Budgets that hold so many layers on this machine, as a simulation's devices would."""
    settings = load(SimulationSettings, config, {"devices": _NOBODY})
    spec = describe(
        settings.model,
        BlockStore(settings.model, hash_cache=folder / "hashes.json").tensors,
        lora=settings.lora,
        training=settings.training,
    )
    floor_bytes = measured_floor(folder)
    devices = [DeviceOptions(name=n, data=(), num_layers=k) for n, k in num_layers.items()]
    return {d.name: budget_like(offer_of(d, spec, margin=MARGIN), floor_bytes) for d in devices}
