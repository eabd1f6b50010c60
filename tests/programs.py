"""Running our real programs in tests: start, wait for a line, stop by pid."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedpruner_client.ctl.admin import AdminClient
from fedpruner_common.errors import FedPrunerError

NUM_LAYERS = 4
READY_S = 60.0


class Program:
    """A running command of ours; its output goes to files."""

    def __init__(
        self,
        folder: Path,
        name: str,
        module: str,
        *arguments: str,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Start `python -m module`; `env` adds to the environment."""
        folder.mkdir(parents=True, exist_ok=True)
        self.stdout_path = folder / f"{name}.out"
        self.stderr_path = folder / f"{name}.err"
        with self.stdout_path.open("w") as out, self.stderr_path.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
                env={**os.environ, **(env or {})},
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def output(self) -> str:
        return self.stdout_path.read_text() + self.stderr_path.read_text()

    def wait_for(self, text: str, timeout_s: float = READY_S) -> str:
        """The first line with this text; fails with the whole output when it does not come."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for line in self.output().splitlines():
                if text in line:
                    return line
            assert self.process.poll() is None, f"ended without {text!r}:\n{self.output()}"
            time.sleep(0.05)
        raise AssertionError(f"no {text!r} within {timeout_s} s:\n{self.output()}")

    def wait(self, timeout_s: float = READY_S) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s} s:\n{self.output()}") from None

    def terminate(self) -> int:
        self.process.terminate()
        return self.wait(20)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        """For clean-up: end it and what it started, whatever happened."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def server_config(path: Path, model: Path, texts: dict[str, Path], **tables: Any) -> Path:
    """A small run's settings as a TOML file; tables override keys."""
    values: dict[str, dict[str, Any]] = {
        "training": {
            "per_device_train_batch_size": 4,
            "max_seq_length": 64,
            "max_steps": 3,
            "learning_rate": 5e-3,
        },
        "run": {"num_rounds": 3, "min_available_clients": 2},
        "data": {
            "calibration": [str(texts["counting-held_out"])],
            "eval": [str(texts["counting-held_out"]), str(texts["letters-held_out"])],
        },
        "lora": {"r": 4},
        "plan": {},
    }
    for name, table in tables.items():
        values[name] = {**values.get(name, {}), **table}
    lines = [f"model = {json.dumps(str(model))}", 'listen = "127.0.0.1:0"', "num_threads = 1"]
    for name, table in values.items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in table.items()]
    path.write_text("\n".join(lines) + "\n")
    return path


def address_of(server: Program) -> str:
    """Where a server listens."""
    return server.wait_for("listening on").rsplit(" ", 1)[1]


def when_ready(address: str, timeout_s: float = READY_S) -> AdminClient:
    """An operator's connection, once the coordinator has prepared itself."""
    admin = AdminClient(address)
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            admin.plan(memory_budget_bytes=0, floor_bytes=0)
            return admin
        except FedPrunerError:
            assert time.monotonic() < deadline, "the coordinator does not get ready"
            time.sleep(0.1)
