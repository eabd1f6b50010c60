"""One task, from cached tensors to an update; and what is kept between tasks.

The training process of an agent has one workshop; `fedpruner simulate` has one for all its virtual
devices.
"""

import gc
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from transformers import PreTrainedTokenizerBase

from fedpruner_client.memory import PeakMeter
from fedpruner_client.model import (
    LocalTensor,
    Skeleton,
    adapted_modules,
    add_adapter,
    build_submodel,
    part_of,
    read_adapter,
    save_update,
)
from fedpruner_client.sweep import Corrections, sweep
from fedpruner_client.train import OnStep, TrainingResult, batches, dry_run, train
from fedpruner_common import malloc
from fedpruner_common.errors import OutOfMemory
from fedpruner_common.modeling.bridges import load_bridges
from fedpruner_common.modeling.data import (
    TokenSequence,
    load_sequences,
    load_tokenizer,
    pad_token_id,
)
from fedpruner_common.modeling.fitting import Tensors, install_bridges
from fedpruner_common.modeling.probe import draw, probe
from fedpruner_common.statistics import Granularity, Score, Statistics
from fedpruner_common.submodel import Submodel
from fedpruner_common.task import (
    BridgeKind,
    BridgeSettings,
    LoraSettings,
    TrainingSettings,
    UpdateMetrics,
)
from fedpruner_common.units import format_bytes

_TOKENIZER_SUFFIXES = (".json", ".jinja", ".model", ".txt")


@dataclass(frozen=True)
class Work:
    """A task and where on this device everything it needs is.

    Attributes:
        client_id: whose data order it is.
        submodel, lora, training, bridge, streamed: as in `Task`.
        tensors: of the submodel.
        other_tensors: the full model's remaining ones, where the task sweeps it.
        config_dir: config and tokenizer.
        adapter_path: the global adapter, of the submodel's modules or of all.
        bridge_path: bridges that the coordinator fitted, None if there are none.
        update_path: where the update goes.
        data: the device's text.
        work_dir: for temporary files.
        memory_budget_bytes: what training may use; a dry run at full length confirms it before the
            first step. None for no limit and no dry run.
    """

    client_id: str
    submodel: Submodel
    lora: LoraSettings
    training: TrainingSettings
    bridge: BridgeSettings
    streamed: tuple[int, ...]
    tensors: tuple[LocalTensor, ...]
    other_tensors: tuple[LocalTensor, ...]
    config_dir: Path
    adapter_path: Path
    bridge_path: Path | None
    update_path: Path
    data: tuple[Path, ...]
    work_dir: Path
    memory_budget_bytes: int | None = None


@dataclass(frozen=True)
class ProbeWork:
    """A probe of the full model, and where on this device all it needs is; see `ProbeTask`."""

    config_dir: Path
    num_layers: int
    tensors: tuple[LocalTensor, ...]
    lora: LoraSettings
    adapter_path: Path
    granularity: Granularity
    score: Score
    num_sequences: int
    max_seq_length: int
    dtype: str
    seed: int
    rms_rows: bool
    data: tuple[Path, ...]


class Workshop:
    """Does tasks; keeps the tokenized text, the tokenizer and the model's anatomy between them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._skeletons: dict[str, Skeleton] = {}
        self._tokenizers: dict[str, PreTrainedTokenizerBase] = {}
        self._texts: dict[Any, list[TokenSequence]] = {}
        self._confirmed: set[Any] = set()  # what a dry run has shown to fit

    def do(self, work: Work, on_step: OnStep) -> UpdateMetrics:
        """Build the submodel, train it, write the update.

        Raises:
            FedPrunerError: the model, the adapter or the data cannot be used.
        """
        started = time.monotonic()
        gc.collect()
        meter = PeakMeter(self._device)
        meter.start()
        skeleton = self._skeleton(work.config_dir)
        tokenizer, sequences = self._text(work.config_dir, work.data, work.training.max_seq_length)
        malloc.trim()
        adapter = read_adapter(work.adapter_path)
        corrections = None
        if work.bridge.sweeps and not work.submodel.is_full:
            corrections = self._sweep(work, skeleton, sequences, adapter, pad_token_id(tokenizer))
            malloc.trim()
        adapter = part_of(adapter, work.lora)
        bridges = corrections.bridges if corrections else self._given(work, skeleton)
        result = self._train(
            work, skeleton, sequences, adapter, bridges, corrections, pad_token_id(tokenizer),
            on_step, meter,
        )  # fmt: skip
        return UpdateMetrics(
            num_examples=len(sequences),
            num_tokens=result.num_tokens,
            train_loss_first=result.loss_first,
            train_loss_last=result.loss_last,
            measured_peak_bytes=meter.peak_bytes(),
            train_s=time.monotonic() - started,
        )

    def _skeleton(self, config_dir: Path) -> Skeleton:
        key = _digest([config_dir / "config.json"])
        if key not in self._skeletons:
            self._skeletons[key] = Skeleton.read(config_dir)
        return self._skeletons[key]

    def _text(
        self, config_dir: Path, data: tuple[Path, ...], max_seq_length: int
    ) -> tuple[PreTrainedTokenizerBase, list[TokenSequence]]:
        which = _digest(path for path in config_dir.iterdir() if path.suffix in _TOKENIZER_SUFFIXES)
        if which not in self._tokenizers:
            self._tokenizers[which] = load_tokenizer(config_dir)
        tokenizer = self._tokenizers[which]
        key = (which, _stamps(data), max_seq_length)
        if key not in self._texts:
            self._texts[key] = load_sequences(list(data), tokenizer, max_seq_length=max_seq_length)
        return tokenizer, self._texts[key]

    def probe(self, work: ProbeWork) -> Statistics:
        """How alike the layers are and what each is worth, one layer in memory at a time.

        Raises:
            FedPrunerError: the model, the adapter or the data cannot be used.
        """
        gc.collect()
        skeleton = self._skeleton(work.config_dir)
        tokenizer, sequences = self._text(work.config_dir, work.data, work.max_seq_length)
        full = build_submodel(
            skeleton,
            Submodel.full(work.num_layers),
            work.tensors,
            dtype=work.dtype,
            device=self._device,
            streamed=range(work.num_layers),
        )
        model = add_adapter(full.model, work.lora, work.adapter_path)
        rng = np.random.default_rng(work.seed)
        drawn = draw(sequences, work.num_sequences, pad_token_id=pad_token_id(tokenizer), rng=rng)
        with full.streaming():
            return probe(
                model,
                skeleton.anatomy,
                drawn,
                families=work.granularity.families,
                score=work.score,
                rng=rng,
                rms_rows=work.rms_rows,
            )

    def _given(self, work: Work, skeleton: Skeleton) -> list[Tensors] | None:
        """The coordinator's bridges, if it sent some."""
        if work.bridge_path is None or work.submodel.is_full:
            return None
        return load_bridges(
            work.bridge_path,
            num_runs=len(work.submodel.dropped_runs()),
            hidden_size=skeleton.config.get_text_config(decoder=True).hidden_size,
        )

    def _sweep(
        self,
        work: Work,
        skeleton: Skeleton,
        sequences: list[TokenSequence],
        adapter: dict[str, torch.Tensor],
        pad: int,
    ) -> Corrections:
        full = build_submodel(
            skeleton,
            Submodel.full(work.submodel.num_layers),
            (*work.tensors, *work.other_tensors),
            dtype=work.training.dtype,
            device=self._device,
            streamed=range(work.submodel.num_layers),
        )
        lora = replace(work.lora, target_modules=adapted_modules(adapter))
        add_adapter(full.model, lora, adapter)  # in place
        fits_here = work.bridge.local or work.bridge.kind is BridgeKind.OFF
        return sweep(
            full,
            skeleton,
            work.submodel,
            batches(sequences, work.training, order=_order(work), pad_token_id=pad),
            work.bridge,
            given=None if fits_here else self._given(work, skeleton),
            work_dir=work.work_dir,
            pad_token_id=pad,
        )

    def _train(
        self,
        work: Work,
        skeleton: Skeleton,
        sequences: list[TokenSequence],
        adapter: dict[str, torch.Tensor],
        bridges: list[Tensors] | None,
        corrections: Corrections | None,
        pad: int,
        on_step: OnStep,
        meter: PeakMeter,
    ) -> TrainingResult:
        built = build_submodel(
            skeleton,
            work.submodel,
            work.tensors,
            dtype=work.training.dtype,
            device=self._device,
            streamed=work.streamed,
        )
        model = add_adapter(built.model, work.lora, adapter)
        adapter.clear()  # the file it was read from is in memory as long as any tensor of it
        installed = (
            install_bridges(built.model, skeleton.anatomy, work.submodel, bridges)
            if bridges is not None
            else []
        )

        def on_batch(index: int) -> None:
            if corrections:
                corrections.select(installed, index)

        with built.streaming():
            self._confirm(work, model, sequences, meter, pad)
            result = train(
                model,
                sequences,
                work.training,
                order=_order(work),
                pad_token_id=pad,
                device=self._device,
                on_step=on_step,
                on_batch=on_batch,
            )
        save_update(model, work.update_path)
        return result

    def _confirm(
        self,
        work: Work,
        model: Any,
        sequences: list[TokenSequence],
        meter: PeakMeter,
        pad: int,
    ) -> None:
        """Make sure that a step at full length stays within the budget, once for each shape.

        Raises:
            OutOfMemory: it does not.
        """
        limit = work.memory_budget_bytes
        shape = replace(work.training, seed=0, learning_rate=0.0, max_steps=1)
        key = (work.submodel, work.streamed, work.bridge, work.lora, shape, limit)
        if limit is None or key in self._confirmed:
            return
        dry_run(model, sequences, work.training, pad_token_id=pad, device=self._device)
        if (peak := meter.high_water_bytes()) > limit:
            raise OutOfMemory(
                f"a dry run at full length took {format_bytes(peak)}, "
                f"{format_bytes(peak - limit)} more than this device offers"
            )
        self._confirmed.add(key)


def _stamps(paths: Iterable[Path]) -> tuple[tuple[str, int, int], ...]:
    """What changes when any of some files, or files in folders, does."""
    files = [f for p in paths for f in ([p, *sorted(p.iterdir())] if p.is_dir() else [p])]
    stats = [(str(f), f.stat()) for f in files if f.exists()]
    return tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats)


def _order(work: Work) -> str:
    return f"{work.client_id} {work.training.seed}"


def _digest(paths: Iterable[Path]) -> str:
    """Of names and contents of some files."""
    digest = blake3()
    for path in sorted(paths):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
