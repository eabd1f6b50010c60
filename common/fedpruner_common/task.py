"""What the coordinator asks of one client in one round, and what comes back beside the tensors."""

from dataclasses import dataclass

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
    lora_alpha: int
    lora_dropout: float
    target_modules: tuple[str, ...]


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


@dataclass(frozen=True)
class Task:
    """One client's part of a round.

    Attributes:
        task_id: unique in the run.
        round: 1-based.
        submodel: the components this client holds.
        tensors: every base tensor it needs; fetch what the cache lacks.
        files: config and tokenizer.
        predicted_peak_bytes: what the coordinator expects training to need.
    """

    task_id: str
    round: int
    submodel: Submodel
    tensors: tuple[TensorInfo, ...]
    files: tuple[FileInfo, ...]
    lora: LoraSettings
    training: TrainingSettings
    predicted_peak_bytes: int


@dataclass(frozen=True)
class UpdateMetrics:
    """What a client says of its training.

    Attributes:
        num_examples: sequences in its local training data; the weight in aggregation.
        num_tokens: tokens with loss that it trained on this round.
        train_loss_first, train_loss_last: loss of the first and last step, nats per token.
        measured_peak_bytes: of the training process (RSS) or the GPU allocator.
        train_s: wall time of the task in the training process.
    """

    num_examples: int
    num_tokens: int
    train_loss_first: float
    train_loss_last: float
    measured_peak_bytes: int
    train_s: float
