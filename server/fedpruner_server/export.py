"""The global adapter as things a user can take away."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fedpruner_common.adapters import from_peft, to_peft
from fedpruner_common.errors import ConfigError, StorageError
from fedpruner_common.spec import ModelSpec
from fedpruner_server.config import LoraOptions
from fedpruner_server.core.aggregation import Adapter, Array, ServerState
from fedpruner_server.storage import make_durable
from fedpruner_server.tensorfile import read_header

ADAPTER_FILE = "adapter_model.safetensors"


def write_adapter(adapter: Adapter, path: Path) -> None:
    """Write adapter tensors in PEFT's spelling; the file appears whole or not at all.

    Raises:
        StorageError: the disk is full or read-only.
    """
    tensors = {to_peft(name): values for name, values in adapter.items()}
    _save(tensors, path, metadata={"format": "pt"})


def _save(tensors: dict[str, Any], path: Path, *, metadata: dict[str, str] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    try:
        save_file(tensors, temporary, metadata=metadata)
    except SafetensorError as error:  # what it makes of the system's errors
        temporary.unlink(missing_ok=True)
        raise StorageError(f"cannot write {path}: {error}") from error
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    make_durable([(temporary, path)])


def read_adapter(path: Path) -> dict[str, Array]:
    """The adapter tensors in a file that `write_adapter` wrote, by canonical name."""
    return {from_peft(key): values for key, values in load_file(path).items()}


class AdapterFile(Mapping[str, Array]):
    """The float32 tensors of an adapter file by canonical name, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            ModelError: not a safetensors file.
        """
        self._path = path
        self._located = {from_peft(key): found for key, found in read_header(path).items()}

    def __getitem__(self, name: str) -> Array:
        found = self._located[name]
        with self._path.open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), found.place.num_bytes, found.place.start)
        return np.frombuffer(data, dtype="<f4").reshape(found.info.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._located)

    def __len__(self) -> int:
        return len(self._located)


def write_state(state: ServerState, path: Path) -> None:
    """Write what aggregation keeps beside the adapter; the file appears whole or not at all.

    Raises:
        StorageError: the disk is full or read-only.
    """
    _save(state.to_tensors(), path)


def read_state(path: Path) -> ServerState:
    """What `write_state` wrote; empty where there is no file, as before the first round."""
    return ServerState.from_tensors(load_file(path)) if path.exists() else ServerState()


def export_peft(
    adapter_path: Path, output_dir: Path, *, spec: ModelSpec, lora: LoraOptions, model: Path
) -> None:
    """A directory that plain `PeftModel.from_pretrained` loads on the full base model.

    Module names are written out in full: a pattern that selects the right modules of a submodel
    may select others in the full model.

    Args:
        adapter_path: the global adapter of a round.
        output_dir: to write; replaced if it exists.
        spec: of the model.
        lora: settings of the run.
        model: the base model's directory.
    """
    partial = output_dir.with_name(output_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "inference_mode": True,
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": [target.module for target in spec.targets(spec.full().components)],
        "bias": "none",
        "fan_in_fan_out": spec.fan_in_fan_out,
    }
    (partial / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copyfile(adapter_path, partial / ADAPTER_FILE)
    shutil.rmtree(output_dir, ignore_errors=True)
    os.replace(partial, output_dir)


def export_run(state_dir: Path, output_dir: Path, *, merged: bool, model: Path | None) -> None:
    """Copy a run's newest exported adapter, or fold it into the base model.

    Raises:
        ConfigError: there is no run, no adapter yet, or the output is already there.
        ModelError: the base model cannot be loaded.
    """
    candidates = [state_dir / "peft" / "final", state_dir / "peft" / "latest"]
    adapter_dir = next((path for path in candidates if path.is_dir()), None)
    if adapter_dir is None:
        raise ConfigError(f"{state_dir} has no adapter: no round of a run has finished there")
    if output_dir.is_file():
        raise ConfigError(f"{output_dir} is a file; nothing was written")
    if output_dir.exists() and any(output_dir.iterdir()):
        raise ConfigError(f"{output_dir} is not empty; nothing was written")
    if not merged:
        shutil.copytree(adapter_dir, output_dir, dirs_exist_ok=True)
        return
    from fedpruner_server.merge import merge  # torch

    config = json.loads((adapter_dir / "adapter_config.json").read_text())
    merge(model or Path(config["base_model_name_or_path"]), adapter_dir, output_dir)
