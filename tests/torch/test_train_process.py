"""The training process for real: started by exec, measured by the kernel, ended for good."""

import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import transformers
from torch_support import TRAINING_SETTINGS, Architecture, TinyModel

from fedpruner_common.budget import predicted_peak_bytes
from fedpruner_common.child import Child
from fedpruner_common.components import ComponentId, all_components
from fedpruner_common.errors import ChildDied, DataError
from fedpruner_common.submodel import Submodel
from fedpruner_common.task import BridgeKind, BridgeSettings
from fedpruner_server.config import LoraOptions, TrainingOptions
from fedpruner_server.core.aggregation import initial_adapter
from fedpruner_server.export import read_adapter, write_adapter

NUM_LAYERS = 8
LORA = LoraOptions(r=4, lora_alpha=8)
BATCH, SEQ_LEN = 16, 256
MIB = 1 << 20


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=128, intermediate_size=352, num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=SEQ_LEN,
    )  # fmt: skip
    tiny = TinyModel(
        tmp_path_factory.mktemp("small"),
        Architecture(config, "model.layers", "self_attn", "mlp"),
        noise=0,
    )
    (tiny.path / "data.txt").write_text("all work and no play makes jack a dull boy\n" * 200)
    return tiny


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    log = tmp_path_factory.mktemp("child") / "training.log"
    child = Child("fedpruner_client.train_jobs", log_path=log, env={"OMP_NUM_THREADS": "1"})
    yield child
    child.close()


@pytest.fixture(scope="module")
def floor_bytes(child: Child) -> int:
    baseline = child.call("measure", {"device": "cpu"})
    assert baseline["memory_kind"] == "rss"
    return int(baseline["floor_bytes"])


def layers(*indices: int) -> list[ComponentId]:
    return [c for c in all_components(NUM_LAYERS) if c.layer in indices]


def arguments(
    tiny: TinyModel,
    work_dir: Path,
    components: list[ComponentId],
    *,
    max_steps: int = 2,
    batch: int = BATCH,
    seq_len: int = SEQ_LEN,
) -> dict[str, Any]:
    """A task as `trainer` words it, with its adapter written."""
    settings = replace(
        TRAINING_SETTINGS, per_device_train_batch_size=batch, max_steps=max_steps,
        max_seq_length=seq_len, learning_rate=1e-3, seed=0,
    )  # fmt: skip
    submodel = Submodel.of(NUM_LAYERS, components)
    shapes = tiny.spec.adapter_shapes(LORA.r, submodel.components)
    write_adapter(initial_adapter(shapes, seed=0), work_dir / "adapter.safetensors")
    tensors = tiny.local_tensors(tiny.spec.tensor_names(submodel))
    return {
        "task_id": "t1",
        "client_id": "c1",
        "config_dir": str(tiny.path),
        "num_layers": NUM_LAYERS,
        "components": [str(c) for c in submodel.components],
        "tensors": [{**asdict(t.info), "path": str(t.path)} for t in tensors],
        "other_tensors": [],
        "bridge": asdict(BridgeSettings()),
        "bridges": None,
        "streamed": [],
        "work_dir": str(work_dir),
        "lora": {
            "r": LORA.r,
            "lora_alpha": LORA.lora_alpha,
            "lora_dropout": 0.0,
            "target_modules": [t.module for t in tiny.spec.targets(submodel.components)],
        },
        "training": asdict(settings),
        "adapter": str(work_dir / "adapter.safetensors"),
        "update": str(work_dir / "update.safetensors"),
        "data": [str(tiny.path / "data.txt")],
        "memory_budget_bytes": None,
        "device": "cpu",
    }


def test_the_floor_is_that_of_an_imported_torch(floor_bytes: int, child: Child) -> None:
    assert 150 * MIB < floor_bytes < 1500 * MIB
    # It cannot be far from what the process holds now: nothing has run since but tiny steps.
    assert child.pid is not None
    assert child.pid != os.getpid()


def test_a_task_writes_an_update_and_tells_each_step(
    small: TinyModel, child: Child, floor_bytes: int, tmp_path: Path
) -> None:
    progress: list[dict[str, Any]] = []
    kept = layers(0, 7)
    task = arguments(small, tmp_path, kept, max_steps=3, batch=4, seq_len=32)
    result = child.call("train", task, progress.append)
    assert [p["step"] for p in progress] == [1, 2, 3]
    assert {p["num_steps"] for p in progress} == {3}
    assert result["train_loss_first"] == progress[0]["train_loss"]
    assert result["train_loss_last"] == progress[-1]["train_loss"] < result["train_loss_first"]
    assert result["num_tokens"] == 3 * 4 * 31
    # 200 lines of 43 characters and one end token, in windows of 32
    assert result["num_examples"] == -(-(200 * 43 + 1) // 32)
    assert result["measured_peak_bytes"] > floor_bytes
    update = read_adapter(tmp_path / "update.safetensors")
    assert {n: v.shape for n, v in update.items()} == small.spec.adapter_shapes(LORA.r, kept)


def test_the_predicted_peak_is_the_measured_one_within_a_tenth(
    small: TinyModel, child: Child, floor_bytes: int, tmp_path: Path
) -> None:
    training = TrainingOptions(per_device_train_batch_size=BATCH, max_seq_length=SEQ_LEN)
    profile = small.describe(LORA, training).memory
    measured, predicted = {}, {}
    for kept in ((0, 7), (0, 1, 3, 4, 6, 7), tuple(range(NUM_LAYERS))):
        task = arguments(small, tmp_path, layers(*kept))
        measured[len(kept)] = child.call("train", task)["measured_peak_bytes"]
        predicted[len(kept)] = predicted_peak_bytes(profile, layers(*kept), floor_bytes=floor_bytes)
    assert predicted == pytest.approx(measured, rel=0.1)
    # Not because everything is floor: six layers more cost what is predicted, within a fifth.
    increment = measured[8] - measured[2]
    assert increment > 100 * MIB
    assert increment == pytest.approx(predicted[8] - predicted[2], rel=0.2)


# Swept, corrected and streamed, in the process


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Mostly weights: 8 layers of 16 MiB, and short sequences of 32 tokens."""
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=512, intermediate_size=2048, num_hidden_layers=NUM_LAYERS,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=64,
    )  # fmt: skip
    tiny = TinyModel(
        tmp_path_factory.mktemp("heavy"),
        Architecture(config, "model.layers", "self_attn", "mlp"),
        noise=0,
    )
    (tiny.path / "data.txt").write_text("all work and no play makes jack a dull boy\n" * 20)
    return tiny


def with_sweep(tiny: TinyModel, task: dict[str, Any]) -> dict[str, Any]:
    """The same task, corrected: with the other tensors, and an adapter for the whole model."""
    shapes = tiny.spec.adapter_shapes(LORA.r, all_components(NUM_LAYERS))
    write_adapter(initial_adapter(shapes, seed=0), Path(task["adapter"]))
    sent = {tensor["name"] for tensor in task["tensors"]}
    others = tiny.local_tensors(tuple(sorted(set(tiny.infos) - sent)))
    settings = BridgeSettings(BridgeKind.LOWRANK, rank=8, local=True, corrected=True)
    return {
        **task,
        "bridge": asdict(settings),
        "other_tensors": [{**asdict(t.info), "path": str(t.path)} for t in others],
    }


def test_a_corrected_task_sweeps_the_full_model_without_holding_it(
    heavy: TinyModel, child: Child, floor_bytes: int, tmp_path: Path
) -> None:
    kept = layers(0, 7)
    plain = arguments(heavy, tmp_path, kept, batch=2, seq_len=32)
    pruned = child.call("train", plain)
    corrected = child.call("train", with_sweep(heavy, plain))
    whole = child.call(
        "train", arguments(heavy, tmp_path, layers(*range(NUM_LAYERS)), batch=2, seq_len=32)
    )
    # The same adapter (B is zero) and batches: the first loss is the full model's.
    assert corrected["train_loss_first"] == pytest.approx(whole["train_loss_first"], abs=1e-4)
    assert abs(pruned["train_loss_first"] - whole["train_loss_first"]) > 1e-3
    # Six layers of 16 MiB were swept; they cost one layer and what is noted, not six layers.
    swept, full = (
        r["measured_peak_bytes"] - pruned["measured_peak_bytes"] for r in (corrected, whole)
    )
    assert full > 80 * MIB
    assert swept < 0.4 * full
    child.call("train", with_sweep(heavy, arguments(heavy, tmp_path, kept, batch=2, seq_len=32)))
    update = read_adapter(tmp_path / "update.safetensors")
    assert {n: v.shape for n, v in update.items()} == heavy.spec.adapter_shapes(LORA.r, kept)
    assert floor_bytes


def test_a_streamed_task_peaks_below_a_resident_one_by_most_of_the_weights(
    heavy: TinyModel, child: Child, floor_bytes: int, tmp_path: Path
) -> None:
    everything = layers(*range(NUM_LAYERS))
    task = arguments(heavy, tmp_path, everything, batch=2, seq_len=32)
    resident = child.call("train", task)
    update = (tmp_path / "update.safetensors").read_bytes()
    task = arguments(heavy, tmp_path, everything, batch=2, seq_len=32)
    streamed = child.call("train", {**task, "streamed": list(range(NUM_LAYERS))})
    assert streamed["train_loss_last"] == resident["train_loss_last"]
    assert (tmp_path / "update.safetensors").read_bytes() == update
    weights = sum(info.num_bytes for info in heavy.infos.values())
    saved = resident["measured_peak_bytes"] - streamed["measured_peak_bytes"]
    assert weights > 120 * MIB
    assert 0.7 * weights < saved < 1.2 * weights
    assert floor_bytes


def test_an_error_of_the_job_keeps_its_kind_and_the_process(
    small: TinyModel, child: Child, floor_bytes: int, tmp_path: Path
) -> None:
    pid = child.pid
    task = arguments(small, tmp_path, layers(0))
    with pytest.raises(DataError, match=r"gone\.jsonl"):
        child.call("train", {**task, "data": [str(tmp_path / "gone.jsonl")]})
    assert child.pid == pid is not None
    assert floor_bytes


def test_after_close_the_process_is_gone(child: Child, floor_bytes: int) -> None:
    pid = child.pid
    assert floor_bytes
    assert pid is not None
    assert psutil.pid_exists(pid)
    child.close()
    assert not psutil.pid_exists(pid)
    assert child.pid is None


def test_killed_during_training_is_child_died_with_the_signal(
    small: TinyModel, child: Child, tmp_path: Path
) -> None:
    pids: list[int | None] = []

    def kill_after_first_step(_: dict[str, Any]) -> None:
        pids.append(child.pid)
        child.kill()

    task = arguments(small, tmp_path, layers(0), max_steps=10_000, batch=2, seq_len=16)
    with pytest.raises(ChildDied, match="killed") as died:
        child.call("train", task, kill_after_first_step)
    assert died.value.returncode == -9
    assert pids[0] is not None
    assert not psutil.pid_exists(pids[0])
    assert not (tmp_path / "update.safetensors").exists()
