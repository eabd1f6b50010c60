"""One training in the agent's own training process, beside what the byte model says of it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.memory.models import Shape, make_model
from fedpruner_common.budget import (
    activation_bytes,
    bridge_bytes_per_run,
    demand,
    predicted_peak_bytes,
    streamed_peak_bytes,
    sweep_peak_bytes,
)
from fedpruner_common.child import Child
from fedpruner_common.components import ComponentId, Kind
from fedpruner_common.manifest import TensorInfo
from fedpruner_common.spec import ModelSpec
from fedpruner_common.submodel import Submodel
from fedpruner_common.task import NO_BRIDGE, BridgeSettings
from fedpruner_server import specs
from fedpruner_server.blockstore import BlockStore
from fedpruner_server.config import LoraOptions, TrainingOptions
from fedpruner_server.core.aggregation import initial_adapter
from fedpruner_server.export import write_adapter

MIB = 1 << 20
_NO_LIMIT = 1 << 60  # a budget makes the process confirm it by a step at full length first


@dataclass(frozen=True)
class Setup:
    """What is trained and how.

    Attributes:
        shape: of the base model.
        kept: layers of the submodel; kept[i] halves of it where `halves` says so.
        halves: of a kept layer; both, or only one.
        training, lora: as the coordinator's settings have them.
        bridge: what stands in for dropped runs.
        streamed: kept layers that are in memory only while they work.
    """

    shape: Shape
    kept: tuple[int, ...]
    training: TrainingOptions
    lora: LoraOptions = field(default_factory=LoraOptions)
    bridge: BridgeSettings = NO_BRIDGE
    streamed: tuple[int, ...] = ()
    halves: tuple[Kind, ...] = tuple(Kind)

    @property
    def submodel(self) -> Submodel:
        components = [ComponentId(layer, kind) for layer in self.kept for kind in self.halves]
        return Submodel.of(self.shape.layers, components)


def spread(num_layers: int, num_kept: int) -> tuple[int, ...]:
    """Layers to keep: the first, the last, and what lies evenly between."""
    return tuple(round(i * (num_layers - 1) / max(1, num_kept - 1)) for i in range(num_kept))


def describe(
    worker: Child,
    model_dir: Path,
    tensors: Iterable[TensorInfo],
    lora: LoraOptions,
    training: TrainingOptions,
) -> ModelSpec:
    """The facts of a model, as the coordinator's own child process finds them."""
    arguments = {
        "model": str(model_dir),
        "tensors": [asdict(info) for info in tensors],
        "lora": lora.model_dump(),
        "training": training.model_dump(),
    }
    return specs.spec_from_json(worker.call("describe", arguments))


def predict(spec: ModelSpec, setup: Setup, *, floor_bytes: int) -> int:
    """Peak of the training process, as planning has it."""
    if setup.streamed:
        return streamed_peak_bytes(
            spec.memory, setup.streamed, floor_bytes=floor_bytes, kept=setup.submodel.components
        )
    submodel = setup.submodel
    peak = predicted_peak_bytes(spec.memory, submodel.components, floor_bytes=floor_bytes)
    if submodel.is_full:
        return peak
    runs = len(submodel.dropped_runs())
    peak += runs * bridge_bytes_per_run(spec.memory, setup.bridge)
    if setup.bridge.sweeps:
        sweep = sweep_peak_bytes(spec.memory, setup.bridge, floor_bytes=floor_bytes)
        peak = max(peak, sweep)
    return peak


def terms(spec: ModelSpec, setup: Setup) -> dict[str, float]:
    """What the prediction is made of, MiB; without what bridges, sweeps and streaming change."""
    memory, wanted = spec.memory, demand(spec.memory, setup.submodel.components)
    weights = memory.shared_weight_bytes + wanted.weight_bytes
    parts = {
        "shared_weights": memory.shared_weight_bytes,
        "weights": wanted.weight_bytes,
        "converting": weights * memory.disk_ratio,
        "trained": memory.trained_bytes * wanted.lora_parameters,
        "saved": wanted.saved_bytes,
        "saved_by_one_layer": wanted.layer_saved_bytes,
        "temporary": wanted.temporary_bytes,
        "loss": memory.loss_bytes,
        "activations": activation_bytes(memory, wanted),
    }
    return {name: round(value / MIB, 2) for name, value in parts.items()}


class Bench:
    """Measures setups one after another, each in a fresh training process."""

    def __init__(self, folder: Path, text: Path, tokenizers: Path) -> None:
        """Use an empty folder of its own; the text is every device's data."""
        self._folder, self._text, self._tokenizers = folder, text, tokenizers
        folder.mkdir(parents=True, exist_ok=True)
        self._worker = Child("fedpruner_server.torch_jobs", log_path=folder / "torch_jobs.log")
        self._made: tuple[Shape, Path, BlockStore] | None = None

    def close(self) -> None:
        self._worker.close()

    def model(self, shape: Shape) -> tuple[Path, BlockStore]:
        """The model of a shape; the one before it is gone then."""
        if self._made is None or self._made[0] != shape:
            _remove(self._folder / "model")
            _remove(self._folder / "blobs")
            model_dir = make_model(shape, self._folder / "model", self._tokenizers)
            blocks = BlockStore(model_dir, hash_cache=self._folder / "hashes.json")
            (self._folder / "blobs").mkdir()
            for info in blocks.tensors.values():
                _cut_out(blocks, info, self._folder / "blobs" / info.hash)
            self._made = (shape, model_dir, blocks)
        return self._made[1:]

    @property
    def blobs(self) -> Path:
        """Where the model's tensors are, one file each."""
        return self._folder / "blobs"

    @property
    def update(self) -> Path:
        """What the last training has written."""
        return self._folder / "update.safetensors"

    def describe(self, setup: Setup) -> ModelSpec:
        """The facts of a setup's model."""
        model_dir, blocks = self.model(setup.shape)
        tensors = blocks.tensors.values()
        return describe(self._worker, model_dir, tensors, setup.lora, setup.training)

    def measure(self, setup: Setup) -> dict[str, Any]:
        """Floor, predicted and measured peak of one setup, bytes, and the prediction's terms."""
        spec = self.describe(setup)
        with self.process() as process:
            floor: int = process.call("measure", {"device": "cpu"})["floor_bytes"]
            result = process.call("train", self.arguments(setup, spec))
        return {
            "floor_bytes": floor,
            "predicted_bytes": predict(spec, setup, floor_bytes=floor),
            "measured_bytes": result["measured_peak_bytes"],
            "loss_chunk": spec.memory.loss_chunk,
            "terms_mib": terms(spec, setup),
        }

    @contextmanager
    def process(self) -> Iterator[Child]:
        process = Child(
            "fedpruner_client.train_jobs",
            log_path=self._folder / "training.log",
            env={"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        )
        try:
            yield process
        finally:
            process.close()

    def arguments(self, setup: Setup, spec: ModelSpec) -> dict[str, Any]:
        """A task as the agent words it; its adapter is written."""
        model_dir, blocks = self.model(setup.shape)
        submodel = setup.submodel
        sweeps = setup.bridge.sweeps and not submodel.is_full
        own = spec.tensor_names(submodel)
        others = set(spec.tensor_names(spec.full())) - set(own) if sweeps else set()
        adapted = spec.full().components if setup.bridge.sweeps else submodel.components
        adapter = self._folder / "adapter.safetensors"
        write_adapter(initial_adapter(spec.adapter_shapes(setup.lora.r, adapted), seed=0), adapter)
        training = {
            **setup.training.model_dump(exclude={"lr_scheduler_type"}),
            "loss_chunk": spec.memory.loss_chunk,
            "seed": 0,
        }
        modules = [target.module for target in spec.targets(submodel.components)]

        def located(names: Iterable[str]) -> list[dict[str, Any]]:
            infos = [blocks.tensors[name] for name in sorted(names)]
            return [{**asdict(info), "path": str(self.blobs / info.hash)} for info in infos]

        return {
            "task_id": "benchmark",
            "client_id": "benchmark",
            "config_dir": str(model_dir),
            "num_layers": spec.num_layers,
            "components": [str(component) for component in submodel.components],
            "tensors": located(own),
            "other_tensors": located(others),
            "bridge": asdict(setup.bridge),
            "bridges": None,
            "streamed": list(setup.streamed),
            "work_dir": str(self._folder),
            "lora": {**setup.lora.model_dump(), "target_modules": modules},
            "training": training,
            "adapter": str(adapter),
            "update": str(self.update),
            "data": [str(self._text)],
            "device": "cpu",
            "memory_budget_bytes": _NO_LIMIT,
        }


def with_training(setup: Setup, **changes: Any) -> Setup:
    """The same setup with some training options changed."""
    return replace(setup, training=setup.training.model_copy(update=changes))


def _cut_out(blocks: BlockStore, info: TensorInfo, path: Path) -> None:
    """A tensor as a raw file, as in an agent's cache."""
    place = blocks.locate(info.hash)
    with place.path.open("rb") as file:
        file.seek(place.start)
        path.write_bytes(file.read(place.num_bytes))


def _remove(folder: Path) -> None:
    if folder.is_dir():
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
