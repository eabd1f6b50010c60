"""One task, through its files: swept, bridged, corrected, streamed; and what is kept between tasks.

The reference is transformers' full model with the adapter merged into its weights by hand.
"""

import gc
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch_support import (
    ALPHA,
    ARCHITECTURES,
    BOTH,
    CPU,
    FFN,
    PAD,
    TRAINING_SETTINGS,
    R,
    TinyModel,
    make_tokenizer,
    module_at,
    submodel_without,
)

from fedpruner_client import workshop
from fedpruner_client.sweep import Corrections
from fedpruner_client.train import batches
from fedpruner_client.workshop import Work, Workshop
from fedpruner_common.errors import CorruptChunk, ModelError
from fedpruner_common.modeling.bridges import save_bridges
from fedpruner_common.modeling.data import Batch, load_sequences
from fedpruner_common.modeling.fitting import bridge_runs, install_bridges
from fedpruner_common.modeling.stubs import skipping
from fedpruner_common.submodel import Submodel
from fedpruner_common.task import BridgeKind, BridgeSettings, TrainingSettings, UpdateMetrics
from fedpruner_server.export import read_adapter, write_adapter

SETTINGS = replace(TRAINING_SETTINGS, per_device_train_batch_size=2, max_seq_length=64)
FIXED = replace(SETTINGS, learning_rate=0.0)  # every step's loss is that of the first adapter
DROPPED = {0: frozenset({FFN}), 2: BOTH, 3: BOTH}
PRUNED = submodel_without(5, DROPPED)
CORRECTED = BridgeSettings(BridgeKind.LOWRANK, rank=4, local=True, corrected=True)
OFF = BridgeSettings()
SHOP = Workshop(CPU)  # one for all tests that do not look into it, as in an agent
Losses = list[float]


def random_adapter(tiny: TinyModel, submodel: Submodel, seed: int = 3) -> dict[str, np.ndarray]:
    """Values that matter: neither A nor B is zero."""
    rng = np.random.default_rng(seed)
    everything = {
        name: (0.1 * rng.standard_normal(shape)).astype(np.float32)
        for name, shape in tiny.spec.adapter_shapes(R, Submodel.full(5).components).items()
    }
    names = tiny.spec.adapter_shapes(R, submodel.components)
    return {name: everything[name] for name in names}


def write_rows(path: Path, *, unequal: bool, count: int = 12, seed: int = 0) -> Path:
    """Rows with an answer: of one length, or of many."""
    rng = np.random.default_rng(seed)
    letters = "abcdefghij klmnop"
    with path.open("w") as file:
        for row in range(count):
            length = 1 + (row * 5) % 18 if unequal else 9
            text = "".join(rng.choice(list(letters), size=length))
            file.write(json.dumps({"instruction": "q", "output": text}) + "\n")
    return path


@pytest.fixture(autouse=True, scope="module")
def short_collections() -> Iterator[None]:
    """A task begins with a garbage collection, which need not look at all that pytest holds."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def work_for(tmp_path: Path) -> Callable[..., Work]:
    """A task with all its files; the adapter is for the whole model where the task sweeps it."""

    def make(
        tiny: TinyModel,
        submodel: Submodel = PRUNED,
        bridge: BridgeSettings = OFF,
        *,
        training: TrainingSettings = SETTINGS,
        unequal: bool = False,
        bridges: list[dict[str, torch.Tensor]] | None = None,
        whole_adapter: bool | None = None,
        streamed: tuple[int, ...] = (),
    ) -> Work:
        whole = bridge.sweeps if whole_adapter is None else whole_adapter
        adapter_path = tmp_path / "adapter.safetensors"
        write_adapter(random_adapter(tiny, Submodel.full(5) if whole else submodel), adapter_path)
        if bridges is not None:
            save_bridges(bridges, tmp_path / "bridges.safetensors")
        names = tiny.spec.tensor_names(submodel)
        others = tuple(set(tiny.infos) - set(names)) if bridge.sweeps else ()
        return Work(
            client_id="device-1",
            submodel=submodel,
            lora=tiny.lora_settings(submodel),
            training=training,
            bridge=bridge,
            streamed=streamed,
            tensors=tuple(tiny.local_tensors(names)),
            other_tensors=tuple(tiny.local_tensors(others)),
            config_dir=tiny.path,
            adapter_path=adapter_path,
            bridge_path=None if bridges is None else tmp_path / "bridges.safetensors",
            update_path=tmp_path / "update.safetensors",
            data=(write_rows(tmp_path / "data.jsonl", unequal=unequal),),
            work_dir=tmp_path,
        )

    return make


def do(work: Work, shop: Workshop | None = None) -> tuple[UpdateMetrics, dict[str, Any], Losses]:
    """Do a task: its metrics, the update, and the loss of every step."""
    losses: Losses = []
    work.update_path.unlink(missing_ok=True)
    metrics = (shop or SHOP).do(work, lambda _, loss: losses.append(loss))
    return metrics, read_adapter(work.update_path), losses


def largest_difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    assert a.keys() == b.keys()
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


# The reference


def merged(tiny: TinyModel) -> Any:
    """The full model with the global adapter added to its weights: W + alpha / r B A."""
    model, adapter = tiny.full().float(), random_adapter(tiny, Submodel.full(5))
    for name in adapter:
        if name.endswith(".lora_A"):
            module = name.removesuffix(".lora_A")
            a, b = (torch.from_numpy(adapter[f"{module}.lora_{f}"]) for f in "AB")
            with torch.no_grad():
                module_at(model, module).weight += ALPHA / R * b @ a
    return model


def micro_batches(work: Work) -> list[Batch]:
    tokenizer = make_tokenizer()
    sequences = load_sequences(work.data, tokenizer, max_seq_length=work.training.max_seq_length)
    order = f"{work.client_id} {work.training.seed}"
    return batches(sequences, work.training, order=order, pad_token_id=PAD)


def loss_by_hand(model: Any, group: list[Batch]) -> float:
    """Mean over all tokens with loss of a step's micro-batches, one sequence at a time."""
    total, count = 0.0, 0
    for batch in group:
        for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum").item()
            count += int((labels[1:] != -100).sum())
    return total / count


def losses_by_hand(model: Any, work: Work) -> Losses:
    every = micro_batches(work)
    size = work.training.gradient_accumulation_steps
    return [loss_by_hand(model, every[i : i + size]) for i in range(0, len(every), size)]


# Corrections


@pytest.mark.parametrize("kind", list(BridgeKind))
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_corrected_training_starts_in_the_full_models_function(
    zoo: Callable[[str], TinyModel], work_for: Callable[..., Work], name: str, kind: BridgeKind
) -> None:
    tiny = zoo(name)
    settings = BridgeSettings(kind, rank=4, local=True, corrected=True)
    work = work_for(tiny, bridge=settings, training=FIXED)
    expected = losses_by_hand(merged(tiny), work)
    assert do(work)[2] == pytest.approx(expected, abs=1e-4)


def test_plain_pruned_training_does_not(llama: TinyModel, work_for: Callable[..., Work]) -> None:
    """Negative control of the test above."""
    work = work_for(llama, training=FIXED)
    full = merged(llama)
    losses = do(work)[2]
    assert min(np.abs(np.subtract(losses, losses_by_hand(full, work)))) > 0.02
    with skipping(full, llama.skeleton.anatomy, work.submodel.skipped()):
        assert losses == pytest.approx(losses_by_hand(full, work), abs=1e-4)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_every_micro_batch_of_unequal_lengths_gets_its_own_corrections(
    llama: TinyModel, work_for: Callable[..., Work], accumulated: int
) -> None:
    training = replace(FIXED, gradient_accumulation_steps=accumulated, max_steps=4)
    work = work_for(llama, bridge=CORRECTED, training=training, unequal=True)
    assert len({batch.input_ids.shape[1] for batch in micro_batches(work)}) > 2
    expected = losses_by_hand(merged(llama), work)
    assert do(work)[2] == pytest.approx(expected, abs=1e-4)


def test_another_micro_batchs_corrections_are_wrong(
    llama: TinyModel, work_for: Callable[..., Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control of the test above: it would notice an index that is off by one."""
    work = work_for(llama, bridge=CORRECTED, training=FIXED)
    expected = losses_by_hand(merged(llama), work)
    select = Corrections.select
    monkeypatch.setattr(Corrections, "select", lambda s, b, i: select(s, b, (i + 1) % 3))
    assert min(np.abs(np.subtract(do(work)[2], expected))) > 1e-3


def test_corrected_training_learns(llama: TinyModel, work_for: Callable[..., Work]) -> None:
    training = replace(SETTINGS, max_steps=12)
    _, update, losses = do(work_for(llama, bridge=CORRECTED, training=training))
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.05
    start = random_adapter(llama, PRUNED)
    assert min(float(np.abs(update[name] - start[name]).max()) for name in start) > 1e-3


def test_a_full_submodel_trains_the_same_whatever_the_bridge_settings(
    llama: TinyModel, work_for: Callable[..., Work]
) -> None:
    plain = do(work_for(llama, Submodel.full(5)))
    swept = do(work_for(llama, Submodel.full(5), CORRECTED))
    assert swept[2] == plain[2]
    assert largest_difference(swept[1], plain[1]) == 0.0


def test_gradient_checkpointing_changes_nothing_about_corrected_training(
    llama: TinyModel, work_for: Callable[..., Work]
) -> None:
    training = replace(SETTINGS, gradient_accumulation_steps=2)
    plain = do(work_for(llama, bridge=CORRECTED, training=training, unequal=True))
    training = replace(training, gradient_checkpointing=True)
    checkpointed = do(work_for(llama, bridge=CORRECTED, training=training, unequal=True))
    assert largest_difference(plain[1], checkpointed[1]) < 1e-6


def test_nothing_of_the_devices_text_stays_behind(
    llama: TinyModel, work_for: Callable[..., Work], tmp_path: Path
) -> None:
    before = {"adapter.safetensors", "data.jsonl"}
    work = work_for(llama, bridge=CORRECTED)
    assert {path.name for path in tmp_path.iterdir()} == before
    do(work)
    assert {path.name for path in tmp_path.iterdir()} == {*before, "update.safetensors"}


# Bridges without corrections


def bridged_loss(tiny: TinyModel, work: Work, bridges: list[Any]) -> float:
    """The first loss of the merged full model, pruned, with these bridges in place."""
    model, anatomy = merged(tiny), tiny.skeleton.anatomy
    with skipping(model, anatomy, work.submodel.skipped()):
        install_bridges(model, anatomy, work.submodel, bridges)
        return losses_by_hand(model, work)[0]


def test_a_local_bridge_without_correction_is_the_one_fitted_to_the_rounds_batches(
    llama: TinyModel, work_for: Callable[..., Work]
) -> None:
    settings = BridgeSettings(BridgeKind.FULL, local=True)
    work = work_for(llama, bridge=settings, training=FIXED)
    ids = torch.cat([batch.input_ids for batch in micro_batches(work)])
    states = [torch.empty(*ids.shape, 32) for _ in work.submodel.dropped_runs()]
    bridges = bridge_runs(
        merged(llama), llama.skeleton.anatomy, work.submodel, ids, kind=BridgeKind.FULL, rank=0,
        states=states, corrected=False, rows=2,
    )  # fmt: skip
    assert do(work)[2][0] == pytest.approx(bridged_loss(llama, work, bridges), abs=1e-4)
    assert do(work_for(llama, training=FIXED))[2][0] != pytest.approx(
        bridged_loss(llama, work, bridges), abs=1e-2
    )


def given_bridges() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(9)
    return [
        {"weight": torch.randn(32, 32, generator=generator) / 6, "bias": torch.full((32,), 0.1)},
        {"weight": torch.randn(32, 32, generator=generator) / 6, "bias": torch.zeros(32)},
    ]


def test_the_coordinators_bridges_are_used_and_need_no_other_tensors(
    llama: TinyModel, work_for: Callable[..., Work]
) -> None:
    settings = BridgeSettings(BridgeKind.FULL)
    work = work_for(llama, bridge=settings, training=FIXED, bridges=given_bridges())
    assert work.other_tensors == ()
    expected = bridged_loss(llama, work, given_bridges())
    assert do(work)[2][0] == pytest.approx(expected, abs=1e-4)
    assert expected != pytest.approx(do(work_for(llama, training=FIXED))[2][0], abs=1e-2)


def test_the_coordinators_bridges_can_be_corrected_too(
    llama: TinyModel, work_for: Callable[..., Work]
) -> None:
    settings = BridgeSettings(BridgeKind.FULL, corrected=True)
    work = work_for(llama, bridge=settings, bridges=given_bridges())
    _, update, losses = do(work)
    assert losses[0] == pytest.approx(losses_by_hand(merged(llama), work)[0], abs=1e-4)
    # They are the coordinator's and not fitted here: the gradient goes through other maps.
    fitted = do(work_for(llama, bridge=replace(settings, local=True), bridges=given_bridges()))
    assert fitted[2][0] == pytest.approx(losses[0], abs=1e-4)
    assert largest_difference(fitted[1], update) > 1e-4


def test_a_bridge_file_for_other_runs_is_a_model_error(
    llama: TinyModel, work_for: Callable[..., Work]
) -> None:
    work = work_for(llama, bridge=BridgeSettings(BridgeKind.FULL), bridges=given_bridges()[:1])
    with pytest.raises(ModelError, match="no bridge for run 1"):
        do(work)


# Streaming


@pytest.fixture(scope="session")
def half_precision(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A Llama stored in bfloat16."""
    tiny = TinyModel(tmp_path_factory.mktemp("bf16"), ARCHITECTURES["llama"])
    tiny.save(tiny.full().to(torch.bfloat16))
    assert {info.dtype for info in tiny.infos.values()} == {"BF16"}
    return tiny


KEPT = (0, 1, 4)
VARIANTS: dict[str, tuple[BridgeSettings, dict[str, Any]]] = {
    "pruned": (OFF, {}),
    "corrected": (CORRECTED, {}),
    "accumulated": (CORRECTED, {"gradient_accumulation_steps": 2}),
    "checkpointed": (CORRECTED, {"gradient_checkpointing": True}),
    "A only": (OFF, {"train_factor": "A"}),
    "B only": (CORRECTED, {"train_factor": "B"}),
    "proximal": (OFF, {"proximal_mu": 1.0}),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("streamed", [KEPT, (1,)], ids=["all kept layers", "one layer"])
def test_streamed_training_gives_the_same_update(
    llama: TinyModel, work_for: Callable[..., Work], variant: str, streamed: tuple[int, ...]
) -> None:
    bridge, changes = VARIANTS[variant]
    training = replace(SETTINGS, max_steps=2, **changes)
    resident = do(work_for(llama, bridge=bridge, training=training))
    found = do(work_for(llama, bridge=bridge, training=training, streamed=streamed))
    assert found[2] == pytest.approx(resident[2], abs=1e-6)
    assert largest_difference(found[1], resident[1]) < 1e-6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
@pytest.mark.parametrize("streamed", [KEPT, (4,)], ids=["all kept layers", "one layer"])
def test_streamed_training_of_a_bfloat16_model_gives_the_same_update(
    half_precision: TinyModel,
    work_for: Callable[..., Work],
    dtype: str,
    streamed: tuple[int, ...],
) -> None:
    training = replace(SETTINGS, max_steps=2, dtype=dtype)
    resident = do(work_for(half_precision, bridge=CORRECTED, training=training))
    found = do(work_for(half_precision, bridge=CORRECTED, training=training, streamed=streamed))
    assert found[2] == pytest.approx(resident[2], abs=1e-6)
    assert largest_difference(found[1], resident[1]) < 1e-6


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.05)])
def test_corrections_of_a_bfloat16_model_hold_in_the_dtype_of_training(
    half_precision: TinyModel, work_for: Callable[..., Work], dtype: str, tolerance: float
) -> None:
    work = work_for(half_precision, bridge=CORRECTED, training=replace(FIXED, dtype=dtype))
    expected = losses_by_hand(merged(half_precision), work)
    assert do(work)[2] == pytest.approx(expected, abs=tolerance)


# Adapters


def test_the_update_has_the_submodels_tensors_where_the_adapter_has_all(
    llama: TinyModel, work_for: Callable[..., Work]
) -> None:
    part = do(work_for(llama, whole_adapter=False))
    whole = do(work_for(llama, whole_adapter=True))
    shapes = llama.spec.adapter_shapes(R, PRUNED.components)
    assert {name: value.shape for name, value in whole[1].items()} == shapes
    assert largest_difference(part[1], whole[1]) == 0.0
    corrected = do(work_for(llama, bridge=CORRECTED))
    assert {name: value.shape for name, value in corrected[1].items()} == shapes


FOREIGN = {
    "no name of PEFT's": "model.layers.0.self_attn.q_proj.weight",
    "a module there is not": "base_model.model.model.layers.0.self_attn.aq_proj.lora_A.weight",
}


@pytest.mark.parametrize("what", FOREIGN)
@pytest.mark.parametrize("bridge", [OFF, CORRECTED], ids=["pruned", "corrected"])
def test_an_adapter_with_foreign_names_is_a_corrupt_chunk(
    llama: TinyModel, work_for: Callable[..., Work], what: str, bridge: BridgeSettings
) -> None:
    work = work_for(llama, bridge=bridge)
    values = load_file(work.adapter_path)
    # Instead of one of the submodel's own.
    del values["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    save_file({**values, FOREIGN[what]: torch.zeros(R, 32)}, work.adapter_path)
    with pytest.raises(CorruptChunk, match="adapter"):
        do(work)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all"])
def test_an_adapter_that_cannot_be_read_is_a_corrupt_chunk(
    llama: TinyModel, work_for: Callable[..., Work], content: bytes
) -> None:
    work = work_for(llama)
    work.adapter_path.write_bytes(content)
    with pytest.raises(CorruptChunk, match="cannot be read"):
        do(work)


# What is kept between tasks


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often the slow parts of a task's beginning have run."""
    counts = dict.fromkeys(("load_sequences", "load_tokenizer", "Skeleton.read"), 0)

    def count(owner: Any, attribute: str, name: str) -> None:
        original = getattr(owner, attribute)

        def counting(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, attribute, counting)

    count(workshop, "load_sequences", "load_sequences")
    count(workshop, "load_tokenizer", "load_tokenizer")
    count(workshop.Skeleton, "read", "Skeleton.read")
    return counts


def test_text_tokenizer_and_anatomy_are_read_once_for_many_tasks(
    llama: TinyModel, work_for: Callable[..., Work], counted: dict[str, int]
) -> None:
    llama.spec  # noqa: B018 - what the fixture counts must not be the making of the task
    shop = Workshop(CPU)
    first = do(work_for(llama), shop)
    assert counted == {"load_sequences": 1, "load_tokenizer": 1, "Skeleton.read": 1}
    data = work_for(llama).data[0]
    stamp = data.stat().st_mtime_ns
    later = work_for(llama, bridge=CORRECTED)
    os.utime(data, ns=(stamp, stamp))
    counted.update(dict.fromkeys(counted, 0))
    do(later, shop)
    again = do(replace(work_for(llama), data=later.data), shop)
    assert counted["load_tokenizer"] == counted["Skeleton.read"] == 0
    # And what is kept is not changed by the tasks in between.
    assert largest_difference(first[1], again[1]) == 0.0


@pytest.mark.parametrize("folder", [False, True], ids=["a file", "a file in a folder"])
def test_text_is_read_again_when_it_changes_and_only_then(
    llama: TinyModel,
    work_for: Callable[..., Work],
    counted: dict[str, int],
    tmp_path: Path,
    folder: bool,
) -> None:
    (tmp_path / "texts").mkdir()
    file = write_rows(tmp_path / "texts" / "a.jsonl", unequal=False, count=7)
    shop, work = Workshop(CPU), work_for(llama)
    work = replace(work, data=(file.parent if folder else file,))
    assert [do(work, shop)[0].num_examples for _ in range(3)] == [7, 7, 7]
    assert counted["load_sequences"] == 1
    write_rows(file, unequal=False, count=9)
    assert do(work, shop)[0].num_examples == 9
    short = replace(work, training=replace(SETTINGS, max_seq_length=40))
    assert do(short, shop)[0].num_tokens < do(work, shop)[0].num_tokens
    assert counted["load_sequences"] == 3
