"""The product's own coordinator, whole: `fedpruner-server run` on a model of random weights.

It reads the checkpoint, traces the model in its child process, journals, plans, aggregates and
exports as ever. One thing is given to it: how alike the layers are and what each is worth, which it
would find by running the model on text, in the child process and once; it finds that in its state
directory as if it had been started before. There is no text to score adapters on.
"""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import trustme

from benchmarks.wire.sides import environment
from fedpruner_common.statistics import (
    Family,
    FamilyStatistics,
    Statistics,
    statistics_to_json,
)
from fedpruner_server.blockstore import BlockStore
from fedpruner_server.config import ServerSettings
from fedpruner_server.storage import Storage
from fedpruner_server.torch_worker import TorchWorker

Json = dict[str, Any]
_READY_S = 120.0


class _Given(TorchWorker):
    """Answers a probe without running the model."""

    def __init__(self, settings: ServerSettings, storage: Storage, blocks: BlockStore) -> None:
        super().__init__(settings, storage, blocks)
        config = json.loads((settings.model / "config.json").read_text())
        self._num_layers: int = config["num_hidden_layers"]

    async def _call(self, job: str, arguments: Json) -> Json:
        if job != "probe":
            return await super()._call(job, arguments)
        layers = FamilyStatistics(
            np.eye(self._num_layers), tuple(1.0 for _ in range(self._num_layers))
        )
        families = {Family.LAYER: layers}
        return statistics_to_json(Statistics(families, "public", arguments["score"]))


class Coordinator:
    """A running one; close it.

    Attributes:
        pid: of it.
        address: where it listens.
        blobs: content hash -> bytes of the model's tensors.
        certificates: what agents trust; None without TLS.
    """

    def __init__(
        self,
        folder: Path,
        model: Path,
        *,
        tls: bool = False,
        profile: Path | None = None,
        **tables: Mapping[str, Any],
    ) -> None:
        """Start it and wait until it is ready.

        Args:
            folder: of its state and log; is made.
            model: a Hugging Face directory.
            tls: with a certificate made for this.
            profile: have cProfile write here what the main thread did.
            tables: of its settings, by name.
        """
        folder.mkdir(parents=True)
        self.certificates = folder / "ca.pem" if tls else None
        self.state_dir = folder / "state"
        config = folder / "server.toml"
        config.write_text(_toml(folder, model, tables))
        settings = _settings(config, self.state_dir)
        self.blobs = asyncio.run(_prepare(settings))
        command = [sys.executable, "-m", *_profiled(profile), "fedpruner_server.cli", "run"]
        command += ["--config", str(config), "--state-dir", str(self.state_dir)]
        if tls:
            command += ["--ssl-certfile", str(folder / "server.pem")]
            command += ["--ssl-keyfile", str(folder / "server.key")]
            _make_certificates(folder)
        self._log = folder / "server.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment()
            )
        self.pid = self._process.pid
        self.address = self._wait_for("listening on").rsplit(" ", 1)[1]
        self._wait_for("waiting for ")

    def _wait_for(self, text: str) -> str:
        deadline = time.monotonic() + _READY_S
        while time.monotonic() < deadline:
            for line in self._log.read_text().splitlines():
                if text in line:
                    return line
            if self._process.poll() is not None:
                break
            time.sleep(0.05)
        self.close()
        raise RuntimeError(f"no {text!r} from the coordinator:\n{self._log.read_text()[-3000:]}")

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _profiled(profile: Path | None) -> list[str]:
    return ["cProfile", "-o", str(profile), "-m"] if profile else []


def _settings(config: Path, state_dir: Path) -> ServerSettings:
    from fedpruner_common.config import load

    return load(ServerSettings, config, {"state_dir": state_dir})


async def _prepare(settings: ServerSettings) -> dict[str, int]:
    """Have the coordinator remember what it would find out of the model; returns the blobs."""
    storage = Storage(settings.state_dir)
    try:
        blocks = BlockStore(settings.model.resolve(), hash_cache=settings.state_dir / "hashes.json")
        worker = _Given(settings, storage, blocks)
        try:
            await worker.describe()
            await worker.probe(None)
        finally:
            await worker.close()
    finally:
        storage.close()
    return {info.hash: info.num_bytes for info in blocks.tensors.values()}


def _toml(folder: Path, model: Path, tables: Mapping[str, Mapping[str, Any]]) -> str:
    text = folder / "public.txt"
    text.write_text("nobody reads this\n")
    values: dict[str, dict[str, Any]] = {
        "data": {"calibration": [str(text)]},
        "plan": {"statistics_every": 0, "statistics_drift": 1e9},
    }
    for name, table in tables.items():
        values[name] = {**values.get(name, {}), **table}
    lines = [f"model = {json.dumps(str(model.resolve()))}", 'listen = "127.0.0.1:0"']
    lines += ["num_threads = 1", 'log_level = "info"']
    for name, table in values.items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"


def _make_certificates(folder: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1", "localhost")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    issued.private_key_pem.write_to_path(folder / "server.key")
    with (folder / "server.pem").open("wb") as file:
        for part in issued.cert_chain_pems:
            file.write(part.bytes())
