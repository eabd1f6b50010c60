"""The device's sweep: once per round, the full model, one layer in memory at a time.

It fits the bridges on the device's own text, or notes what they miss on every token of the round's
batches, or both; see `fedpruner_common.modeling.fitting`. What is noted is on disk.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fedpruner_client.model import MappedModel, Skeleton
from fedpruner_common.errors import ModelError, StorageError
from fedpruner_common.modeling.bridges import Bridge
from fedpruner_common.modeling.data import Batch
from fedpruner_common.modeling.fitting import Tensors, bridge_runs
from fedpruner_common.submodel import Submodel
from fedpruner_common.task import BridgeSettings
from fedpruner_common.units import format_bytes


class Corrections:
    """What the bridges miss on the tokens of each micro-batch, in files.

    Attributes:
        bridges: tensors of each dropped run's bridge.
    """

    def __init__(
        self,
        bridges: list[Tensors],
        states: list[torch.Tensor] | None,
        places: list[tuple[slice, slice]],
    ) -> None:
        """From what a sweep left.

        Args:
            bridges: see `bridge_runs`.
            states: likewise; None if it only fitted bridges.
            places: each batch's rows and columns in them.
        """
        self.bridges = bridges
        self._states = states
        self._places = places

    def select(self, installed: Sequence[Bridge], index: int) -> None:
        """Have the bridges in a submodel, in the order of its runs, correct one micro-batch."""
        if self._states is None:
            return
        for bridge, states in zip(installed, self._states, strict=True):
            device = next(bridge.buffers()).device
            bridge.offset = states[self._places[index]].to(device)
            bridge.in_file = device.type == "cpu"


def sweep(
    full: MappedModel,
    skeleton: Skeleton,
    submodel: Submodel,
    batches: Sequence[Batch],
    settings: BridgeSettings,
    *,
    given: Sequence[Tensors] | None,
    work_dir: Path,
    pad_token_id: int,
) -> Corrections:
    """Fit or correct the bridges of a submodel on a round's batches.

    Args:
        full: the full model with all layers streamed, the adapter in place.
        skeleton: of it.
        submodel: what will train.
        batches: of the round, in order.
        settings: of the bridges.
        given: bridges from the coordinator, None to fit them here.
        work_dir: where the space for one nameless file per dropped run is, each as large as the
            round's hidden states.
        pad_token_id: for the padding up to the round's longest sequence.
    """
    ids, places = _together(batches, pad_token_id)
    hidden_size = full.model.get_decoder().get_input_embeddings().weight.shape[1]
    shape = (*ids.shape, hidden_size)
    states = [
        _state_file(work_dir / f"missed-{run}.bin", shape, full.dtype)
        for run in range(len(submodel.dropped_runs()))
    ]

    full.model.eval()
    bridges = bridge_runs(
        full.model,
        skeleton.anatomy,
        submodel,
        ids,
        kind=settings.kind,
        rank=settings.rank,
        given=given,
        states=states,
        corrected=settings.corrected,
        rows=len(batches[0].input_ids),
        streamed=full.streaming,
    )
    if not all(torch.isfinite(value).all() for bridge in bridges for value in bridge.values()):
        raise ModelError("a bridge could not be fitted: its values are not finite")
    return Corrections(bridges, states if settings.corrected else None, places)


def _together(
    batches: Sequence[Batch], pad_token_id: int
) -> tuple[torch.Tensor, list[tuple[slice, slice]]]:
    """All sequences of a round in one tensor, and where in it each batch is."""
    longest = max(batch.input_ids.shape[1] for batch in batches)
    total = sum(len(batch.input_ids) for batch in batches)
    ids = torch.full((total, longest), pad_token_id, dtype=torch.long)
    places, start = [], 0
    for batch in batches:
        count, length = batch.input_ids.shape
        ids[start : start + count, :length] = batch.input_ids
        places.append((slice(start, start + count), slice(0, length)))
        start += count
    return ids, places


def _state_file(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor that is a shared mapping of a new file: its pages go to disk, not to memory.

    The file has no name any more: it is gone with the tensor, however the process ends.

    Raises:
        StorageError: the disk is full.
    """
    path.unlink(missing_ok=True)
    count = math.prod(shape)
    num_bytes = count * dtype.itemsize
    try:
        with path.open("wb") as file:  # written to past a full disk, a mapping kills the process
            os.posix_fallocate(file.fileno(), 0, num_bytes)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise StorageError(
            f"no room for {format_bytes(num_bytes)} of hidden states in {path.parent}: {error}. "
            "Free some, or turn plan.correction off"
        ) from error
    flat: Any = torch.from_file(str(path), shared=True, size=count, dtype=dtype)
    path.unlink()
    tensor: torch.Tensor = flat.view(shape)
    return tensor
