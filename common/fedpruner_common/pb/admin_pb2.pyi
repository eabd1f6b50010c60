from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("state", "explanation", "round", "num_rounds", "model", "loss_base", "loss", "adapter_dir", "num_devices", "run_dir", "losses_base")
    class LossesBaseEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    STATE_FIELD_NUMBER: _ClassVar[int]
    EXPLANATION_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    NUM_ROUNDS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LOSS_BASE_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_DIR_FIELD_NUMBER: _ClassVar[int]
    NUM_DEVICES_FIELD_NUMBER: _ClassVar[int]
    RUN_DIR_FIELD_NUMBER: _ClassVar[int]
    LOSSES_BASE_FIELD_NUMBER: _ClassVar[int]
    state: str
    explanation: str
    round: int
    num_rounds: int
    model: str
    loss_base: float
    loss: float
    adapter_dir: str
    num_devices: int
    run_dir: str
    losses_base: _containers.ScalarMap[str, float]
    def __init__(self, state: _Optional[str] = ..., explanation: _Optional[str] = ..., round: _Optional[int] = ..., num_rounds: _Optional[int] = ..., model: _Optional[str] = ..., loss_base: _Optional[float] = ..., loss: _Optional[float] = ..., adapter_dir: _Optional[str] = ..., num_devices: _Optional[int] = ..., run_dir: _Optional[str] = ..., losses_base: _Optional[_Mapping[str, float]] = ...) -> None: ...

class DevicesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Device(_message.Message):
    __slots__ = ("client_id", "state", "activity", "step", "num_steps", "train_loss", "memory_budget_bytes", "floor_bytes", "predicted_peak_bytes", "measured_peak_bytes", "components", "num_components_total", "last_seen_s", "last_failure", "bytes_down", "bytes_up", "memory_ratio", "too_much_bytes")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    TRAIN_LOSS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    FLOOR_BYTES_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEASURED_PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    COMPONENTS_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPONENTS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_S_FIELD_NUMBER: _ClassVar[int]
    LAST_FAILURE_FIELD_NUMBER: _ClassVar[int]
    BYTES_DOWN_FIELD_NUMBER: _ClassVar[int]
    BYTES_UP_FIELD_NUMBER: _ClassVar[int]
    MEMORY_RATIO_FIELD_NUMBER: _ClassVar[int]
    TOO_MUCH_BYTES_FIELD_NUMBER: _ClassVar[int]
    client_id: str
    state: str
    activity: str
    step: int
    num_steps: int
    train_loss: float
    memory_budget_bytes: int
    floor_bytes: int
    predicted_peak_bytes: int
    measured_peak_bytes: int
    components: _containers.RepeatedScalarFieldContainer[str]
    num_components_total: int
    last_seen_s: float
    last_failure: str
    bytes_down: int
    bytes_up: int
    memory_ratio: float
    too_much_bytes: int
    def __init__(self, client_id: _Optional[str] = ..., state: _Optional[str] = ..., activity: _Optional[str] = ..., step: _Optional[int] = ..., num_steps: _Optional[int] = ..., train_loss: _Optional[float] = ..., memory_budget_bytes: _Optional[int] = ..., floor_bytes: _Optional[int] = ..., predicted_peak_bytes: _Optional[int] = ..., measured_peak_bytes: _Optional[int] = ..., components: _Optional[_Iterable[str]] = ..., num_components_total: _Optional[int] = ..., last_seen_s: _Optional[float] = ..., last_failure: _Optional[str] = ..., bytes_down: _Optional[int] = ..., bytes_up: _Optional[int] = ..., memory_ratio: _Optional[float] = ..., too_much_bytes: _Optional[int] = ...) -> None: ...

class DevicesReply(_message.Message):
    __slots__ = ("devices",)
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    devices: _containers.RepeatedCompositeFieldContainer[Device]
    def __init__(self, devices: _Optional[_Iterable[_Union[Device, _Mapping]]] = ...) -> None: ...

class RoundsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ClientRound(_message.Message):
    __slots__ = ("client_id", "outcome", "reason", "predicted_peak_bytes", "measured_peak_bytes", "num_components", "num_examples", "train_loss", "train_s", "bytes_down", "bytes_up", "components", "base_bytes_down", "rungs", "too_large")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEASURED_PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPONENTS_FIELD_NUMBER: _ClassVar[int]
    NUM_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    TRAIN_LOSS_FIELD_NUMBER: _ClassVar[int]
    TRAIN_S_FIELD_NUMBER: _ClassVar[int]
    BYTES_DOWN_FIELD_NUMBER: _ClassVar[int]
    BYTES_UP_FIELD_NUMBER: _ClassVar[int]
    COMPONENTS_FIELD_NUMBER: _ClassVar[int]
    BASE_BYTES_DOWN_FIELD_NUMBER: _ClassVar[int]
    RUNGS_FIELD_NUMBER: _ClassVar[int]
    TOO_LARGE_FIELD_NUMBER: _ClassVar[int]
    client_id: str
    outcome: str
    reason: str
    predicted_peak_bytes: int
    measured_peak_bytes: int
    num_components: int
    num_examples: int
    train_loss: float
    train_s: float
    bytes_down: int
    bytes_up: int
    components: _containers.RepeatedScalarFieldContainer[str]
    base_bytes_down: int
    rungs: _containers.RepeatedScalarFieldContainer[str]
    too_large: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, client_id: _Optional[str] = ..., outcome: _Optional[str] = ..., reason: _Optional[str] = ..., predicted_peak_bytes: _Optional[int] = ..., measured_peak_bytes: _Optional[int] = ..., num_components: _Optional[int] = ..., num_examples: _Optional[int] = ..., train_loss: _Optional[float] = ..., train_s: _Optional[float] = ..., bytes_down: _Optional[int] = ..., bytes_up: _Optional[int] = ..., components: _Optional[_Iterable[str]] = ..., base_bytes_down: _Optional[int] = ..., rungs: _Optional[_Iterable[str]] = ..., too_large: _Optional[_Iterable[int]] = ...) -> None: ...

class Round(_message.Message):
    __slots__ = ("round", "phase", "loss", "seconds", "clients", "explanation", "losses")
    class LossesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    EXPLANATION_FIELD_NUMBER: _ClassVar[int]
    LOSSES_FIELD_NUMBER: _ClassVar[int]
    round: int
    phase: str
    loss: float
    seconds: float
    clients: _containers.RepeatedCompositeFieldContainer[ClientRound]
    explanation: str
    losses: _containers.ScalarMap[str, float]
    def __init__(self, round: _Optional[int] = ..., phase: _Optional[str] = ..., loss: _Optional[float] = ..., seconds: _Optional[float] = ..., clients: _Optional[_Iterable[_Union[ClientRound, _Mapping]]] = ..., explanation: _Optional[str] = ..., losses: _Optional[_Mapping[str, float]] = ...) -> None: ...

class RoundsReply(_message.Message):
    __slots__ = ("rounds",)
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    rounds: _containers.RepeatedCompositeFieldContainer[Round]
    def __init__(self, rounds: _Optional[_Iterable[_Union[Round, _Mapping]]] = ...) -> None: ...

class PlanRequest(_message.Message):
    __slots__ = ("memory_budget_bytes", "floor_bytes")
    MEMORY_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    FLOOR_BYTES_FIELD_NUMBER: _ClassVar[int]
    memory_budget_bytes: int
    floor_bytes: int
    def __init__(self, memory_budget_bytes: _Optional[int] = ..., floor_bytes: _Optional[int] = ...) -> None: ...

class PlanRow(_message.Message):
    __slots__ = ("num_kept", "predicted_peak_bytes")
    NUM_KEPT_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    num_kept: int
    predicted_peak_bytes: int
    def __init__(self, num_kept: _Optional[int] = ..., predicted_peak_bytes: _Optional[int] = ...) -> None: ...

class PlanReply(_message.Message):
    __slots__ = ("components", "predicted_peak_bytes", "num_components_total", "rows", "margin")
    COMPONENTS_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPONENTS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    MARGIN_FIELD_NUMBER: _ClassVar[int]
    components: _containers.RepeatedScalarFieldContainer[str]
    predicted_peak_bytes: int
    num_components_total: int
    rows: _containers.RepeatedCompositeFieldContainer[PlanRow]
    margin: float
    def __init__(self, components: _Optional[_Iterable[str]] = ..., predicted_peak_bytes: _Optional[int] = ..., num_components_total: _Optional[int] = ..., rows: _Optional[_Iterable[_Union[PlanRow, _Mapping]]] = ..., margin: _Optional[float] = ...) -> None: ...
