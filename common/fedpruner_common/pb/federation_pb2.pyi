from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RegisterRequest(_message.Message):
    __slots__ = ("client_id", "memory_budget_bytes", "floor_bytes", "memory_kind", "agent_version", "read_bytes_per_s")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    FLOOR_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_KIND_FIELD_NUMBER: _ClassVar[int]
    AGENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    client_id: str
    memory_budget_bytes: int
    floor_bytes: int
    memory_kind: str
    agent_version: str
    read_bytes_per_s: int
    def __init__(self, client_id: _Optional[str] = ..., memory_budget_bytes: _Optional[int] = ..., floor_bytes: _Optional[int] = ..., memory_kind: _Optional[str] = ..., agent_version: _Optional[str] = ..., read_bytes_per_s: _Optional[int] = ...) -> None: ...

class RegisterReply(_message.Message):
    __slots__ = ("session", "heartbeat_interval_s", "lease_s", "run_id")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_INTERVAL_S_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    session: str
    heartbeat_interval_s: float
    lease_s: float
    run_id: str
    def __init__(self, session: _Optional[str] = ..., heartbeat_interval_s: _Optional[float] = ..., lease_s: _Optional[float] = ..., run_id: _Optional[str] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("client_id", "session", "activity", "step", "num_steps", "train_loss", "task_id")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    TRAIN_LOSS_FIELD_NUMBER: _ClassVar[int]
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    client_id: str
    session: str
    activity: str
    step: int
    num_steps: int
    train_loss: float
    task_id: str
    def __init__(self, client_id: _Optional[str] = ..., session: _Optional[str] = ..., activity: _Optional[str] = ..., step: _Optional[int] = ..., num_steps: _Optional[int] = ..., train_loss: _Optional[float] = ..., task_id: _Optional[str] = ...) -> None: ...

class HeartbeatReply(_message.Message):
    __slots__ = ("task_id",)
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    def __init__(self, task_id: _Optional[str] = ...) -> None: ...

class PullTaskRequest(_message.Message):
    __slots__ = ("client_id", "session", "wait_s", "memory_budget_bytes")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    client_id: str
    session: str
    wait_s: float
    memory_budget_bytes: int
    def __init__(self, client_id: _Optional[str] = ..., session: _Optional[str] = ..., wait_s: _Optional[float] = ..., memory_budget_bytes: _Optional[int] = ...) -> None: ...

class PullTaskReply(_message.Message):
    __slots__ = ("task", "waiting", "finished", "probe")
    TASK_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    task: Task
    waiting: str
    finished: str
    probe: ProbeTask
    def __init__(self, task: _Optional[_Union[Task, _Mapping]] = ..., waiting: _Optional[str] = ..., finished: _Optional[str] = ..., probe: _Optional[_Union[ProbeTask, _Mapping]] = ...) -> None: ...

class Component(_message.Message):
    __slots__ = ("layer", "kind")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    layer: int
    kind: str
    def __init__(self, layer: _Optional[int] = ..., kind: _Optional[str] = ...) -> None: ...

class TensorInfo(_message.Message):
    __slots__ = ("name", "dtype", "shape", "num_bytes", "hash")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    num_bytes: int
    hash: str
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., num_bytes: _Optional[int] = ..., hash: _Optional[str] = ...) -> None: ...

class FileInfo(_message.Message):
    __slots__ = ("name", "num_bytes", "hash")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    name: str
    num_bytes: int
    hash: str
    def __init__(self, name: _Optional[str] = ..., num_bytes: _Optional[int] = ..., hash: _Optional[str] = ...) -> None: ...

class LoraSettings(_message.Message):
    __slots__ = ("r", "lora_alpha", "lora_dropout", "target_modules")
    R_FIELD_NUMBER: _ClassVar[int]
    LORA_ALPHA_FIELD_NUMBER: _ClassVar[int]
    LORA_DROPOUT_FIELD_NUMBER: _ClassVar[int]
    TARGET_MODULES_FIELD_NUMBER: _ClassVar[int]
    r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, r: _Optional[int] = ..., lora_alpha: _Optional[float] = ..., lora_dropout: _Optional[float] = ..., target_modules: _Optional[_Iterable[str]] = ...) -> None: ...

class TrainingSettings(_message.Message):
    __slots__ = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "max_seq_length", "learning_rate", "weight_decay", "max_grad_norm", "gradient_checkpointing", "dtype", "seed", "proximal_mu", "train_factor", "loss_chunk", "optim")
    PER_DEVICE_TRAIN_BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_ACCUMULATION_STEPS_FIELD_NUMBER: _ClassVar[int]
    MAX_STEPS_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQ_LENGTH_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    MAX_GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_CHECKPOINTING_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    PROXIMAL_MU_FIELD_NUMBER: _ClassVar[int]
    TRAIN_FACTOR_FIELD_NUMBER: _ClassVar[int]
    LOSS_CHUNK_FIELD_NUMBER: _ClassVar[int]
    OPTIM_FIELD_NUMBER: _ClassVar[int]
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
    proximal_mu: float
    train_factor: str
    loss_chunk: int
    optim: str
    def __init__(self, per_device_train_batch_size: _Optional[int] = ..., gradient_accumulation_steps: _Optional[int] = ..., max_steps: _Optional[int] = ..., max_seq_length: _Optional[int] = ..., learning_rate: _Optional[float] = ..., weight_decay: _Optional[float] = ..., max_grad_norm: _Optional[float] = ..., gradient_checkpointing: bool = ..., dtype: _Optional[str] = ..., seed: _Optional[int] = ..., proximal_mu: _Optional[float] = ..., train_factor: _Optional[str] = ..., loss_chunk: _Optional[int] = ..., optim: _Optional[str] = ...) -> None: ...

class BridgeSettings(_message.Message):
    __slots__ = ("kind", "rank", "local", "corrected")
    KIND_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    LOCAL_FIELD_NUMBER: _ClassVar[int]
    CORRECTED_FIELD_NUMBER: _ClassVar[int]
    kind: str
    rank: int
    local: bool
    corrected: bool
    def __init__(self, kind: _Optional[str] = ..., rank: _Optional[int] = ..., local: bool = ..., corrected: bool = ...) -> None: ...

class Task(_message.Message):
    __slots__ = ("task_id", "round", "num_layers", "components", "tensors", "files", "lora", "training", "predicted_peak_bytes", "bridge", "other_tensors", "bridge_file", "streamed")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    COMPONENTS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    BRIDGE_FIELD_NUMBER: _ClassVar[int]
    OTHER_TENSORS_FIELD_NUMBER: _ClassVar[int]
    BRIDGE_FILE_FIELD_NUMBER: _ClassVar[int]
    STREAMED_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    round: int
    num_layers: int
    components: _containers.RepeatedCompositeFieldContainer[Component]
    tensors: _containers.RepeatedCompositeFieldContainer[TensorInfo]
    files: _containers.RepeatedCompositeFieldContainer[FileInfo]
    lora: LoraSettings
    training: TrainingSettings
    predicted_peak_bytes: int
    bridge: BridgeSettings
    other_tensors: _containers.RepeatedCompositeFieldContainer[TensorInfo]
    bridge_file: FileInfo
    streamed: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, task_id: _Optional[str] = ..., round: _Optional[int] = ..., num_layers: _Optional[int] = ..., components: _Optional[_Iterable[_Union[Component, _Mapping]]] = ..., tensors: _Optional[_Iterable[_Union[TensorInfo, _Mapping]]] = ..., files: _Optional[_Iterable[_Union[FileInfo, _Mapping]]] = ..., lora: _Optional[_Union[LoraSettings, _Mapping]] = ..., training: _Optional[_Union[TrainingSettings, _Mapping]] = ..., predicted_peak_bytes: _Optional[int] = ..., bridge: _Optional[_Union[BridgeSettings, _Mapping]] = ..., other_tensors: _Optional[_Iterable[_Union[TensorInfo, _Mapping]]] = ..., bridge_file: _Optional[_Union[FileInfo, _Mapping]] = ..., streamed: _Optional[_Iterable[int]] = ...) -> None: ...

class ProbeTask(_message.Message):
    __slots__ = ("task_id", "num_layers", "tensors", "files", "lora", "granularity", "score", "num_sequences", "max_seq_length", "dtype", "seed", "rms_rows")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    GRANULARITY_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    NUM_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQ_LENGTH_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    RMS_ROWS_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    num_layers: int
    tensors: _containers.RepeatedCompositeFieldContainer[TensorInfo]
    files: _containers.RepeatedCompositeFieldContainer[FileInfo]
    lora: LoraSettings
    granularity: str
    score: str
    num_sequences: int
    max_seq_length: int
    dtype: str
    seed: int
    rms_rows: bool
    def __init__(self, task_id: _Optional[str] = ..., num_layers: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[TensorInfo, _Mapping]]] = ..., files: _Optional[_Iterable[_Union[FileInfo, _Mapping]]] = ..., lora: _Optional[_Union[LoraSettings, _Mapping]] = ..., granularity: _Optional[str] = ..., score: _Optional[str] = ..., num_sequences: _Optional[int] = ..., max_seq_length: _Optional[int] = ..., dtype: _Optional[str] = ..., seed: _Optional[int] = ..., rms_rows: bool = ...) -> None: ...

class FamilyStatistics(_message.Message):
    __slots__ = ("family", "similarity", "importance")
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    SIMILARITY_FIELD_NUMBER: _ClassVar[int]
    IMPORTANCE_FIELD_NUMBER: _ClassVar[int]
    family: str
    similarity: _containers.RepeatedScalarFieldContainer[float]
    importance: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, family: _Optional[str] = ..., similarity: _Optional[_Iterable[float]] = ..., importance: _Optional[_Iterable[float]] = ...) -> None: ...

class PushStatisticsRequest(_message.Message):
    __slots__ = ("client_id", "session", "task_id", "families", "num_tokens", "seconds", "bytes_read", "loss")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    FAMILIES_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    BYTES_READ_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    client_id: str
    session: str
    task_id: str
    families: _containers.RepeatedCompositeFieldContainer[FamilyStatistics]
    num_tokens: int
    seconds: float
    bytes_read: int
    loss: float
    def __init__(self, client_id: _Optional[str] = ..., session: _Optional[str] = ..., task_id: _Optional[str] = ..., families: _Optional[_Iterable[_Union[FamilyStatistics, _Mapping]]] = ..., num_tokens: _Optional[int] = ..., seconds: _Optional[float] = ..., bytes_read: _Optional[int] = ..., loss: _Optional[float] = ...) -> None: ...

class PushStatisticsReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class BlobRange(_message.Message):
    __slots__ = ("hash", "offset")
    HASH_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    hash: str
    offset: int
    def __init__(self, hash: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class FetchBlobsRequest(_message.Message):
    __slots__ = ("client_id", "session", "blobs")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    BLOBS_FIELD_NUMBER: _ClassVar[int]
    client_id: str
    session: str
    blobs: _containers.RepeatedCompositeFieldContainer[BlobRange]
    def __init__(self, client_id: _Optional[str] = ..., session: _Optional[str] = ..., blobs: _Optional[_Iterable[_Union[BlobRange, _Mapping]]] = ...) -> None: ...

class FetchAdapterRequest(_message.Message):
    __slots__ = ("client_id", "session", "task_id", "offset")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    client_id: str
    session: str
    task_id: str
    offset: int
    def __init__(self, client_id: _Optional[str] = ..., session: _Optional[str] = ..., task_id: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("blob", "offset", "data", "checksum")
    BLOB_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    blob: int
    offset: int
    data: bytes
    checksum: int
    def __init__(self, blob: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ..., checksum: _Optional[int] = ...) -> None: ...

class UpdateHeader(_message.Message):
    __slots__ = ("client_id", "session", "task_id", "round", "num_examples", "num_tokens", "train_loss_first", "train_loss_last", "measured_peak_bytes", "num_bytes", "train_s", "rungs", "hash")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    NUM_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRAIN_LOSS_FIRST_FIELD_NUMBER: _ClassVar[int]
    TRAIN_LOSS_LAST_FIELD_NUMBER: _ClassVar[int]
    MEASURED_PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRAIN_S_FIELD_NUMBER: _ClassVar[int]
    RUNGS_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    client_id: str
    session: str
    task_id: str
    round: int
    num_examples: int
    num_tokens: int
    train_loss_first: float
    train_loss_last: float
    measured_peak_bytes: int
    num_bytes: int
    train_s: float
    rungs: _containers.RepeatedScalarFieldContainer[str]
    hash: str
    def __init__(self, client_id: _Optional[str] = ..., session: _Optional[str] = ..., task_id: _Optional[str] = ..., round: _Optional[int] = ..., num_examples: _Optional[int] = ..., num_tokens: _Optional[int] = ..., train_loss_first: _Optional[float] = ..., train_loss_last: _Optional[float] = ..., measured_peak_bytes: _Optional[int] = ..., num_bytes: _Optional[int] = ..., train_s: _Optional[float] = ..., rungs: _Optional[_Iterable[str]] = ..., hash: _Optional[str] = ...) -> None: ...

class OpenUploadRequest(_message.Message):
    __slots__ = ("header", "wait_s")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    header: UpdateHeader
    wait_s: float
    def __init__(self, header: _Optional[_Union[UpdateHeader, _Mapping]] = ..., wait_s: _Optional[float] = ...) -> None: ...

class OpenUploadReply(_message.Message):
    __slots__ = ("state", "offset", "reason")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        WAIT: _ClassVar[OpenUploadReply.State]
        GRANTED: _ClassVar[OpenUploadReply.State]
        STORED: _ClassVar[OpenUploadReply.State]
    WAIT: OpenUploadReply.State
    GRANTED: OpenUploadReply.State
    STORED: OpenUploadReply.State
    STATE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    state: OpenUploadReply.State
    offset: int
    reason: str
    def __init__(self, state: _Optional[_Union[OpenUploadReply.State, str]] = ..., offset: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class PushUpdateRequest(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: UpdateHeader
    chunk: Chunk
    def __init__(self, header: _Optional[_Union[UpdateHeader, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ...) -> None: ...

class PushUpdateReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReportFailureRequest(_message.Message):
    __slots__ = ("client_id", "session", "task_id", "reason", "out_of_memory", "memory_budget_bytes")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    OUT_OF_MEMORY_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    client_id: str
    session: str
    task_id: str
    reason: str
    out_of_memory: bool
    memory_budget_bytes: int
    def __init__(self, client_id: _Optional[str] = ..., session: _Optional[str] = ..., task_id: _Optional[str] = ..., reason: _Optional[str] = ..., out_of_memory: bool = ..., memory_budget_bytes: _Optional[int] = ...) -> None: ...

class ReportFailureReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
