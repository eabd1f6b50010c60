"""The coordinator's torch work, from the side of the coordinator: a child process does it.

The coordinator itself never imports torch, so its memory does not depend on the model. The child
stays warm as long as the run lasts; what it found about the model is remembered for a restart.
"""

import asyncio
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedpruner_common.child import Child
from fedpruner_common.errors import ConfigError
from fedpruner_common.spec import ModelSpec
from fedpruner_common.statistics import Statistics, statistics_from_json
from fedpruner_common.submodel import Submodel
from fedpruner_server import specs
from fedpruner_server.blockstore import BlockStore
from fedpruner_server.config import ServerSettings
from fedpruner_server.storage import Storage

Json = dict[str, Any]


class TorchWorker:
    """Runs one job at a time."""

    def __init__(self, settings: ServerSettings, storage: Storage, blocks: BlockStore) -> None:
        self._settings = settings
        self._storage = storage
        self._blocks = blocks
        self._child = Child(
            "fedpruner_server.torch_jobs",
            log_path=storage.state_dir / "torch_jobs.log",
            env={
                "FEDPRUNER_NUM_THREADS": str(settings.num_threads),
                # Threads that spin while they wait cost more than they bring beside other work.
                "OMP_WAIT_POLICY": "PASSIVE",
            },
        )

    async def describe(self) -> ModelSpec:
        """The facts of the base model.

        Raises:
            ModelError: it cannot be pruned.
        """
        arguments = {
            "model": str(self._blocks.model_dir),
            "lora": self._settings.lora.model_dump(),
            "training": self._settings.training.model_dump(),
            "tensors": [asdict(info) for info in self._blocks.tensors.values()],
        }
        return specs.spec_from_json(await self._remembered("describe", arguments))

    def calibration(self) -> list[str]:
        """Files of public text.

        Raises:
            ConfigError: there is no such text.
        """
        calibration = self._settings.data.calibration or self._settings.data.eval
        if not calibration:
            raise ConfigError(
                "no text to measure the layers on: set data.calibration (--calibration-data) to "
                "some public text, .jsonl or plain; a few thousand words are enough"
            )
        return [str(path) for path in calibration]

    async def probe(self, adapter_dir: Path | None) -> Statistics:
        """How alike the layers are and what each is worth, on public text.

        Raises:
            ConfigError: there is no such text.
        """
        settings = self._settings
        arguments = {
            "model": str(self._blocks.model_dir),
            "calibration": self.calibration(),
            "granularity": settings.plan.granularity.value,
            "score": settings.plan.importance.value,
            "max_seq_length": settings.training.max_seq_length,
            "num_sequences": settings.data.num_calibration_sequences,
            "seed": settings.run.seed,
            "rms_rows": settings.plan.rms_rows,
            "adapter": str(adapter_dir) if adapter_dir else None,
        }
        if adapter_dir is None:
            return statistics_from_json(await self._remembered("probe", arguments))
        return statistics_from_json(await self._call("probe", arguments))

    async def fit_bridges(
        self, submodels: Sequence[Submodel], paths: Sequence[Path], *, adapter_dir: Path | None
    ) -> None:
        """Write the bridges of each submodel to its path, fitted on public text.

        Raises:
            ConfigError: there is no such text.
        """
        settings = self._settings
        arguments = {
            "model": str(self._blocks.model_dir),
            "calibration": self.calibration(),
            "max_seq_length": settings.training.max_seq_length,
            "num_sequences": settings.data.num_bridge_sequences,
            "num_layers": submodels[0].num_layers,
            "submodels": [[str(c) for c in submodel.components] for submodel in submodels],
            "paths": [str(path) for path in paths],
            "kind": settings.plan.bridge.value,
            "rank": settings.plan.bridge_rank,
            "adapter": str(adapter_dir) if adapter_dir else None,
        }
        await self._call("fit_bridges", arguments)

    async def evaluate(self, adapter_dir: Path | None) -> dict[str, float]:
        """Held-out loss of each evaluation file, with an exported adapter or of the base model."""
        settings = self._settings
        arguments = {
            "model": str(self._blocks.model_dir),
            "files": [str(path) for path in settings.data.eval],
            "max_seq_length": settings.training.max_seq_length,
            "max_sequences": settings.data.max_eval_sequences,
            "adapter": str(adapter_dir) if adapter_dir else None,
        }
        if adapter_dir is None:
            result = await self._remembered("evaluate", arguments)
        else:
            result = await self._call("evaluate", arguments)
        losses: dict[str, float] = result["losses"]
        return losses

    async def close(self) -> None:
        """End the child process."""
        await asyncio.to_thread(self._child.close)

    async def _call(self, job: str, arguments: Json) -> Json:
        return await asyncio.to_thread(self._child.call, job, arguments)

    async def _remembered(self, job: str, arguments: Json) -> Json:
        """The result of a job, from an earlier start of this run if nothing has changed."""
        tensors = sorted(info.hash for info in self._blocks.tensors.values())
        text = json.dumps([arguments, tensors], sort_keys=True)
        key = f"{job} {hashlib.sha256(text.encode()).hexdigest()}"
        result: Json = self._storage.fact(key) or await self._call(job, arguments)
        self._storage.remember(key, result)
        return result
