"""The training process under a hard limit: what the byte model picks trains, the full model dies.

The limit is put on the running process once it has measured its floor, so that `room`, what it may
take from then on, does not depend on how large libraries are. The device's budget is both together.

What a memory cgroup counts: anonymous memory, and pages of files read for the first time. It takes
back the latter when it is full. So weights that are converted on loading have to fit, and weights
that are mapped as they are stored need not: without their room a model trains, but reads them again
and again. The byte model counts both.
"""

import ctypes
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from cgroups import Group, memory_group
from safetensors.torch import load_file
from torch_support import Architecture, TinyModel

from fedpruner_common.budget import predicted_peak_bytes, streamed_peak_bytes
from fedpruner_common.child import Child
from fedpruner_common.errors import ChildDied, OutOfMemory
from fedpruner_common.spec import ModelSpec
from fedpruner_common.statistics import Family, FamilyStatistics, Granularity, Statistics
from fedpruner_common.submodel import Submodel
from fedpruner_common.task import NO_BRIDGE, TrainingSettings
from fedpruner_server.config import LoraOptions, PlanOptions, TrainingOptions
from fedpruner_server.core.aggregation import initial_adapter
from fedpruner_server.core.planning import PlanSettings, Policy, plan_client
from fedpruner_server.export import write_adapter

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc of Linux"),
    pytest.mark.usefixtures("starter"),  # first, so that libraries are imported meanwhile
]

MIB = 1 << 20
LORA = LoraOptions(r=4, lora_alpha=8)
NUM_LAYERS, HIDDEN, FFN = 12, 384, 1024
SHAPE = {"per_device_train_batch_size": 3, "max_seq_length": 128, "max_steps": 2}
WEIGHTS = NUM_LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * FFN) * 4  # 81 MiB in float32
SAVED = NUM_LAYERS * 3 * 128 * 19 * HIDDEN * 4  # 128 MiB of activations, all linears adapted
# Room in MiB: the first two are below the full model's activations, the others above them, and all
# below activations and weights.
TIGHT, WIDE = (105, 120), (182, 195)


@dataclass(frozen=True)
class Stored:
    """A generated model with its text, as one way of holding weights needs it.

    Attributes:
        model: on disk.
        training: what one round does with it.
        spec: what the coordinator knows of it.
    """

    model: TinyModel
    training: TrainingOptions
    spec: ModelSpec

    @classmethod
    def make(cls, path: Path, config: Any, training: TrainingOptions) -> "Stored":
        model = TinyModel(path, Architecture(config, "model.layers", "self_attn", "mlp"), noise=0)
        (path / "data.txt").write_text("all work and no play makes jack a dull boy\n" * 100)
        for info in model.infos.values():
            with model.raw(info.name).open("rb") as file:
                os.fsync(file.fileno())  # pages that are not written yet cannot be let go
        return cls(model, training, model.describe(LORA, training))

    def cool(self) -> None:
        """Let go of the weights' cached pages, so that they count for whoever reads them next."""
        if not all(let_go(self.model.raw(name)) for name in self.model.infos):
            pytest.skip(f"pages of files in {self.model.path} stay in memory")

    def task(self, work_dir: Path, submodel: Submodel, **changes: Any) -> dict[str, Any]:
        """A task as `trainer` words it, with its adapter written."""
        work_dir.mkdir(exist_ok=True)
        settings = self.training.model_dump(exclude={"lr_scheduler_type", "loss_chunk"})
        training = TrainingSettings(**{**settings, "loss_chunk": 0, "seed": 0, **changes})
        shapes = self.spec.adapter_shapes(LORA.r, submodel.components)
        write_adapter(initial_adapter(shapes, seed=0), work_dir / "adapter.safetensors")
        tensors = self.model.local_tensors(self.spec.tensor_names(submodel))
        return {
            "task_id": "t1",
            "client_id": "c1",
            "config_dir": str(self.model.path),
            "num_layers": self.spec.num_layers,
            "components": [str(c) for c in submodel.components],
            "tensors": [{**asdict(t.info), "path": str(t.path)} for t in tensors],
            "other_tensors": [],
            "bridge": asdict(NO_BRIDGE),
            "bridges": None,
            "streamed": [],
            "work_dir": str(work_dir),
            "lora": {
                **LORA.model_dump(),
                "target_modules": [t.module for t in self.spec.targets(submodel.components)],
            },
            "training": asdict(training),
            "adapter": str(work_dir / "adapter.safetensors"),
            "update": str(work_dir / "update.safetensors"),
            "data": [str(self.model.path / "data.txt")],
            "memory_budget_bytes": None,  # the kernel is to find out, not the dry run
            "device": "cpu",
        }


def let_go(path: Path) -> bool:
    """Drop a file from memory; returns whether all of it is gone."""
    with path.open("rb") as file:
        for _ in range(100):  # pages that the kernel is busy with stay for now
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if not pages_in_memory(path):
                return True
            time.sleep(0.01)
    return False


def pages_in_memory(path: Path) -> int:
    """Pages of a file that are cached, found without touching them."""
    mapped = np.memmap(path, np.uint8, "r")
    found = np.zeros(-(-mapped.size // resource.getpagesize()), np.uint8)
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    if mincore(mapped.ctypes.data, mapped.size, found.ctypes.data):
        raise OSError(ctypes.get_errno(), "mincore")
    return int((found & 1).sum())


def llama(**values: Any) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256, **values
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stored]:
    """One model held in two ways: converted to memory of its own, and mapped as it is stored."""
    sizes = {
        "vocab_size": 128, "hidden_size": HIDDEN, "intermediate_size": FFN,
        "num_hidden_layers": NUM_LAYERS,
    }  # fmt: skip
    return {
        held: Stored.make(
            tmp_path_factory.mktemp(held),
            llama(**sizes, dtype=stored),
            TrainingOptions(**SHAPE, dtype=dtype),
        )
        for held, stored, dtype in (
            ("anonymous", "bfloat16", "float32"),
            ("mapped", "float32", "auto"),
        )
    }


# The process


@dataclass(frozen=True)
class Ready:
    """A training process that has measured its floor."""

    child: Child
    floor_bytes: int

    def status_bytes(self, field: str) -> int:
        lines = Path(f"/proc/{self.child.pid}/status").read_text().splitlines()
        return next(int(n.split()[1]) * 1024 for n in lines if n.startswith(field + ":"))

    def major_faults(self) -> int:
        """Times that it had to wait for a page of a file."""
        stat = Path(f"/proc/{self.child.pid}/stat").read_text()
        return int(stat.rpartition(")")[2].split()[9])

    def allow(self, group: Group, room: int) -> None:
        """From now on it may take so much more, or is killed."""
        assert self.child.pid is not None
        group.enter(self.child.pid)
        group.limit(room)

    def allow_data(self, room: int) -> None:
        """From now on it may map so much more, or gets no memory."""
        assert self.child.pid is not None
        limit = self.status_bytes("VmData") + room
        resource.prlimit(self.child.pid, resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))

    def train(self, task: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """A task's result, and the kernel's own high-water mark of the process during it."""
        steps: list[int] = []
        result = self.child.call("train", task, lambda values: steps.append(values["step"]))
        assert steps == list(range(1, task["training"]["max_steps"] + 1))
        assert Path(task["update"]).is_file()
        return result, self.status_bytes("VmHWM")


class Starter:
    """Starts training processes; while one is used, the next one imports its libraries."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pool = ThreadPoolExecutor(1)
        self._children: list[Child] = []
        self._next = self._pool.submit(self._start)

    def _start(self) -> Ready:
        log = self._folder / "training.log"
        child = Child("fedpruner_client.train_jobs", log_path=log, env={"OMP_NUM_THREADS": "1"})
        self._children.append(child)
        baseline = child.call("measure", {"device": "cpu"})
        assert baseline["memory_kind"] == "rss"
        return Ready(child, baseline["floor_bytes"])

    def get(self) -> Ready:
        ready, self._next = self._next.result(), self._pool.submit(self._start)
        return ready

    def close(self) -> None:
        for child in self._children:
            child.kill()
        self._pool.shutdown()
        for child in self._children:
            child.close()


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    starter = Starter(tmp_path_factory.mktemp("processes"))
    yield starter
    starter.close()


@pytest.fixture
def ready(starter: Starter) -> Iterator[Ready]:
    ready = starter.get()
    yield ready
    ready.child.close()


@pytest.fixture
def group() -> Iterator[Group]:
    with memory_group() as (found, reason):
        if found is None:
            pytest.skip(reason)
        yield found


# What the coordinator picks


def picked(spec: ModelSpec, *, room: int, floor_bytes: int) -> Submodel:
    """The submodel of a device that has so much room; of layers at equal distances.

    Checks that the byte model says what it picks it for.
    """
    settings = PlanSettings(
        granularity=Granularity.LAYER,
        sample=False,
        protect=(),
        margin=PlanOptions().margin,
        seed=0,
        policy=Policy.EVEN,
    )
    nothing_known = FamilyStatistics(
        tuple(() for _ in range(spec.num_layers)), (1.0,) * spec.num_layers
    )
    plan = plan_client(
        spec,
        Statistics({Family.LAYER: nothing_known}, source="test", score="none"),
        settings,
        client_id="c1",
        round_number=1,
        budget_bytes=floor_bytes + room,
        floor_bytes=floor_bytes,
    )
    assert plan.predicted_peak_bytes == predicted(spec, plan.submodel, floor_bytes)
    assert plan.predicted_peak_bytes <= 0.95 * (floor_bytes + room)
    assert predicted(spec, spec.full(), floor_bytes) > floor_bytes + room
    return plan.submodel


def predicted(spec: ModelSpec, submodel: Submodel, floor_bytes: int) -> int:
    return predicted_peak_bytes(spec.memory, submodel.components, floor_bytes=floor_bytes)


def assert_is_killed(ready: Ready, group: Group, task: dict[str, Any]) -> None:
    before = group.oom_kills()
    with pytest.raises(ChildDied) as died:
        ready.child.call("train", task)
    assert died.value.returncode == -signal.SIGKILL
    assert group.oom_kills() == before + 1


def test_the_limits_are_where_this_file_says() -> None:
    assert max(TIGHT) * MIB < SAVED < min(WIDE) * MIB
    assert max(WIDE) * MIB < SAVED + WEIGHTS


@pytest.mark.parametrize(
    ("held", "room"),
    [
        *(("anonymous", room) for room in TIGHT + WIDE),
        *(("mapped", room) for room in TIGHT),
    ],
)
def test_where_the_full_model_is_killed_the_picked_submodel_trains(
    held: str, room: int, models: dict[str, Stored], group: Group, ready: Ready, tmp_path: Path
) -> None:
    stored, room = models[held], room * MIB
    submodel = picked(stored.spec, room=room, floor_bytes=ready.floor_bytes)
    small = stored.task(tmp_path / "small", submodel)
    full = stored.task(tmp_path / "full", stored.spec.full())
    stored.cool()
    ready.allow(group, room)
    result, peak = ready.train(small)
    expected = predicted(stored.spec, submodel, ready.floor_bytes)
    assert result["measured_peak_bytes"] == pytest.approx(peak, rel=0.01)
    assert expected == pytest.approx(peak, rel=0.03)
    used = group.peak_bytes()
    assert used is None or used <= room
    assert_is_killed(ready, group, full)


@pytest.mark.parametrize("room", WIDE)
def test_mapped_weights_without_room_are_read_again_and_again(
    room: int, models: dict[str, Stored], group: Group, ready: Ready, tmp_path: Path
) -> None:
    stored, room = models["mapped"], room * MIB
    submodel = picked(stored.spec, room=room, floor_bytes=ready.floor_bytes)
    small = stored.task(tmp_path / "small", submodel)
    full = stored.task(tmp_path / "full", stored.spec.full())
    stored.cool()
    ready.allow(group, room)
    _, peak = ready.train(small)
    assert predicted(stored.spec, submodel, ready.floor_bytes) == pytest.approx(peak, rel=0.03)
    for_small = ready.major_faults()
    _, peak = ready.train(full)  # the limit does not stop it
    assert group.oom_kills() == 0
    assert peak < 0.97 * predicted(stored.spec, stored.spec.full(), ready.floor_bytes)
    # Less than what the submodel read was yet to be read: the rest has been read again.
    assert 2 * len(submodel.components) > len(stored.spec.full().components)
    assert ready.major_faults() - for_small > for_small > 0


def test_under_a_limit_of_its_own_the_process_says_so_and_lives(
    models: dict[str, Stored], ready: Ready, tmp_path: Path
) -> None:
    """RLIMIT_DATA counts private mappings of files in full, so mapped weights have to fit too."""
    pid = ready.child.pid
    assert pid is not None
    for held, room in zip(["anonymous", "mapped"] * 2, TIGHT + WIDE, strict=True):
        stored = models[held]
        submodel = picked(stored.spec, room=room * MIB, floor_bytes=ready.floor_bytes)
        small = stored.task(tmp_path / f"small-{room}", submodel, max_steps=1)
        full = stored.task(tmp_path / f"full-{room}", stored.spec.full(), max_steps=1)
        ready.allow_data(room * MIB)
        ready.train(small)
        ready.allow_data(room * MIB)
        with pytest.raises(OutOfMemory, match="memory ran out"):
            ready.child.call("train", full)
    assert ready.child.pid == pid


# What is streamed


@pytest.mark.parametrize("held", ["anonymous", "mapped"])
def test_below_its_own_weights_the_streamed_full_model_trains_to_the_same_adapter(
    held: str, models: dict[str, Stored], group: Group, ready: Ready, tmp_path: Path
) -> None:
    stored, room = models[held], 70 * MIB
    weights = stored.spec.memory.shared_weight_bytes + sum(stored.spec.memory.weight_bytes.values())
    assert room < weights
    layers = range(stored.spec.num_layers)
    full = stored.spec.full()
    streamed = {**stored.task(tmp_path / "streamed", full), "streamed": list(layers)}
    again = {**stored.task(tmp_path / "again", full), "streamed": list(layers)}
    expected = streamed_peak_bytes(stored.spec.memory, layers, floor_bytes=ready.floor_bytes)
    stored.cool()
    ready.allow(group, room)
    _, peak = ready.train(streamed)
    assert expected == pytest.approx(peak, rel=0.03)
    used = group.peak_bytes()
    assert used is None or used <= room
    # The same again, weights read again; then without a limit and with all in memory.
    ready.train(again)
    resident = stored.task(tmp_path / "resident", full)
    group.raise_limit()
    ready.train(resident)
    found, same, reference = (load_file(t["update"]) for t in (streamed, again, resident))
    assert all(torch.equal(found[name], same[name]) for name in found)
    for name, value in reference.items():
        assert (found[name] - value).abs().max() <= 1e-5 * value.abs().max(), name


# What is made smaller

CHUNK, CHECKPOINTED = {"loss_chunk": 64}, {"gradient_checkpointing": True}
LESS: dict[str, dict[str, Any]] = {
    "chunk": CHUNK, "checkpointed": CHECKPOINTED, "both": {**CHUNK, **CHECKPOINTED},
}  # fmt: skip


@pytest.fixture(scope="module")
def wordy(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """Logits take 72 MiB at the loss, activations 60, weights 31; converted on loading."""
    config = llama(
        vocab_size=12_288, hidden_size=256, intermediate_size=704, num_hidden_layers=6,
        tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    training = TrainingOptions(
        per_device_train_batch_size=4, max_seq_length=128, max_steps=1, dtype="float32",
        loss_chunk=0,
    )  # fmt: skip
    return Stored.make(tmp_path_factory.mktemp("wordy"), config, training)


def test_a_chunked_loss_or_checkpointing_saves_what_is_killed_without(
    wordy: Stored, group: Group, ready: Ready, tmp_path: Path
) -> None:
    full, room = wordy.spec.full(), 155 * MIB
    tasks = {name: wordy.task(tmp_path / name, full, **changes) for name, changes in LESS.items()}
    neither = wordy.task(tmp_path / "neither", full)
    wordy.cool()
    ready.allow(group, room)
    losses = []
    for name, changes in LESS.items():
        result, peak = ready.train(tasks[name])
        losses.append(result["train_loss_first"])
        spec = wordy.model.describe(LORA, wordy.training.model_copy(update=changes))
        assert predicted(spec, full, ready.floor_bytes) == pytest.approx(peak, rel=0.04)
        assert predicted(spec, full, ready.floor_bytes) < ready.floor_bytes + room
    assert losses == pytest.approx([losses[0]] * len(losses), abs=1e-4)
    assert predicted(wordy.spec, full, ready.floor_bytes) > ready.floor_bytes + room
    assert_is_killed(ready, group, neither)
