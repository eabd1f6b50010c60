"""What the coordinator asks of one client in one round, and what comes back beside the tensors."""

from dataclasses import dataclass
from enum import Enum

from fedpruner_common.manifest import FileInfo, TensorInfo
from fedpruner_common.submodel import Submodel


@dataclass(frozen=True)
class LoraSettings:
    """PEFT's names.

    Attributes:
        target_modules: exact module names. A suffix such as `q_proj` or `all-linear` would mean
            other modules on the full model than on a submodel.
    """

    r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: tuple[str, ...]


SMALLEST_LOSS_CHUNK = 64  # tokens; below it the head's weights are read more than they are worth


@dataclass(frozen=True)
class TrainingSettings:
    """Hugging Face's names.

    Attributes:
        per_device_train_batch_size: sequences per forward pass.
        gradient_accumulation_steps: forward passes per optimizer step.
        max_steps: optimizer steps of this round.
        max_seq_length: tokens per sequence.
        learning_rate: of this round; the coordinator follows the schedule over rounds.
        dtype: of the base weights in memory: float32, bfloat16 or auto (as stored).
        seed: of this client's data order in this round.
        proximal_mu: FedProx: half of it times the squared distance from the global adapter is added
            to the loss.
        train_factor: which LoRA factors train this round: both, A or B.
        loss_chunk: tokens whose logits exist at a time; 0 for all of a micro-batch.
        optim: adamw, or adamw_8bit with its moments in 8 bit.
    """

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    max_steps: int
    max_seq_length: int
    learning_rate: float
    weight_decay: float
    max_grad_norm: float
    gradient_checkpointing: bool
    dtype: str
    seed: int
    proximal_mu: float = 0.0
    train_factor: str = "both"
    loss_chunk: int = 0
    optim: str = "adamw"


class BridgeKind(str, Enum):
    """What stands in for a run of dropped components; see `modeling.bridges`."""

    OFF = "off"
    SCALE = "scale"
    LOWRANK = "lowrank"
    FULL = "full"


@dataclass(frozen=True)
class BridgeSettings:
    """How the runs of dropped components are bridged on a device.

    Attributes:
        kind: which map.
        rank: of a low-rank one.
        local: the device fits the map on its own text; else the coordinator did, on public text.
        corrected: the device notes what the map misses on every token of the round's batches and
            adds it in training, so that training starts in the full model's function exactly.
    """

    kind: BridgeKind = BridgeKind.OFF
    rank: int = 0
    local: bool = False
    corrected: bool = False

    @property
    def sweeps(self) -> bool:
        """The device runs the full model once per round, one layer in memory at a time."""
        return self.local or self.corrected


NO_BRIDGE = BridgeSettings()


@dataclass(frozen=True)
class Task:
    """One client's part of a round.

    Attributes:
        task_id: unique in the run.
        round: 1-based.
        submodel: the components this client holds.
        tensors: every base tensor of the submodel; fetch what the cache lacks.
        files: config and tokenizer.
        predicted_peak_bytes: what the coordinator expects training to need.
        bridge: what stands in for the dropped runs.
        other_tensors: the full model's remaining tensors, where the device sweeps it; the adapter
            is then that of the full model too, and the submodel's part of it trains.
        bridge_file: bridges that the coordinator fitted, None if there are none.
        streamed: kept layers that are in memory only while they work.
    """

    task_id: str
    round: int
    submodel: Submodel
    tensors: tuple[TensorInfo, ...]
    files: tuple[FileInfo, ...]
    lora: LoraSettings
    training: TrainingSettings
    predicted_peak_bytes: int
    bridge: BridgeSettings = NO_BRIDGE
    other_tensors: tuple[TensorInfo, ...] = ()
    bridge_file: FileInfo | None = None
    streamed: tuple[int, ...] = ()


@dataclass(frozen=True)
class ProbeTask:
    """Ask of a device how alike the layers are on its own text, and what each is worth.

    Attributes:
        task_id: unique in the run.
        num_layers: of the model.
        tensors: of the full model, of which one layer is in memory at a time.
        files: config and tokenizer.
        lora: on all modules; the global adapter is applied.
        granularity: `layer` or `component`.
        score: which importance.
        num_sequences: how many of the device's sequences to use.
        max_seq_length: tokens per sequence.
        dtype: to compute with, as in `TrainingSettings`.
        seed: of which sequences and tokens are taken.
        rms_rows: scale tokens alike before CKA.
    """

    task_id: str
    num_layers: int
    tensors: tuple[TensorInfo, ...]
    files: tuple[FileInfo, ...]
    lora: LoraSettings
    granularity: str
    score: str
    num_sequences: int
    max_seq_length: int
    dtype: str
    seed: int
    rms_rows: bool = True


@dataclass(frozen=True)
class UpdateMetrics:
    """What a client says of its training.

    Attributes:
        num_examples: sequences in its local training data; the weight in aggregation.
        num_tokens: tokens with loss that it trained on this round.
        train_loss_first, train_loss_last: loss of the first and last step, nats per token.
        measured_peak_bytes: of the training process (RSS) or the GPU allocator.
        train_s: wall time of the task in the training process.
        rungs: what was made smaller because memory ran out, in order; see the agent's `ladder`.
    """

    num_examples: int
    num_tokens: int
    train_loss_first: float
    train_loss_last: float
    measured_peak_bytes: int
    train_s: float
    rungs: tuple[str, ...] = ()
