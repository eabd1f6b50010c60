"""The coordinator's settings. Keys reuse Hugging Face's and PEFT's names.

TOML tables are the classes below; an environment variable is FEDPRUNER_SERVER_ plus the key, with
two underscores between table and key: FEDPRUNER_SERVER_RUN__NUM_ROUNDS=50.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from fedpruner_common.config import Section, Settings
from fedpruner_common.rpc import KEEPALIVE_S
from fedpruner_common.statistics import Granularity, Score
from fedpruner_common.task import BridgeKind
from fedpruner_common.units import parse_bytes
from fedpruner_server.core.aggregation import Aggregation
from fedpruner_server.core.coverage import Coverage
from fedpruner_server.core.grouping import Grouping
from fedpruner_server.core.planning import Policy
from fedpruner_server.core.server_optimizer import ServerOptimizer
from fedpruner_server.profiles import PROFILES, apply_profile


class LoraOptions(Section):
    """PEFT's LoRA settings."""

    r: PositiveInt = 8
    lora_alpha: PositiveInt = 16
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Literal["all-linear"] | list[str] = "all-linear"


class TrainingOptions(Section):
    """What an agent does with its submodel in one round."""

    per_device_train_batch_size: PositiveInt = 4
    gradient_accumulation_steps: PositiveInt = 1
    max_steps: PositiveInt = 10
    max_seq_length: Annotated[int, Field(ge=2)] = 512
    learning_rate: PositiveFloat = 2e-4
    lr_scheduler_type: Literal["cosine", "constant"] = "cosine"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: PositiveFloat = 1.0
    gradient_checkpointing: bool = False
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    proximal_mu: Annotated[float, Field(ge=0)] = 0.0  # FedProx
    # Tokens whose logits exist at a time; 0: all of a micro-batch. The result is the same.
    loss_chunk: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    optim: Literal["adamw", "adamw_8bit"] = "adamw"


class PlanOptions(Section):
    """The method: how submodels are chosen, and what stands in for what they lack."""

    policy: Policy = Policy.FEDPRUNER
    granularity: Granularity = Granularity.LAYER
    grouping: Grouping = Grouping.SPECTRAL
    selection: Literal["argmax", "sample"] = "argmax"
    temperature: PositiveFloat = 1.0
    floor: Annotated[float, Field(ge=0, le=1)] = 0.0
    joint: bool = True
    coverage: Coverage = Coverage.SOFT
    coverage_kappa: Annotated[float, Field(ge=0)] = 1.0
    coverage_rounds: PositiveInt = 10
    importance: Score = Score.LOO
    statistics: Literal["public", "cohort", "device"] = "public"
    statistics_every: Annotated[int, Field(ge=0)] = 10  # rounds; 0: once
    statistics_drift: PositiveFloat = 0.5  # of the adapter, relative; measured again beyond it
    rms_rows: bool = True
    protect: tuple[int, ...] = (0, -1)
    margin: Annotated[float, Field(ge=0, lt=1)] = 0.05
    bridge: BridgeKind = BridgeKind.OFF
    bridge_rank: PositiveInt = 32
    bridge_data: Literal["public", "local"] = "public"
    correction: bool = True
    streaming: bool = False
    stream_seconds: Annotated[float, Field(ge=0)] = 0.0  # per step; 0: no limit


class AggregationOptions(Section):
    """How updates become the next adapter."""

    method: Aggregation = Aggregation.FEDIT
    error_feedback: bool = False
    min_holders: PositiveInt = 1
    shrink: Annotated[float, Field(ge=0)] = 0.0
    server_optimizer: ServerOptimizer = ServerOptimizer.FEDAVG
    server_learning_rate: PositiveFloat = 1.0
    server_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9


class RunOptions(Section):
    """The rounds."""

    num_rounds: PositiveInt = 20
    min_available_clients: PositiveInt = 2
    clients_per_round: Annotated[int, Field(ge=0)] = 0  # 0: everyone available
    min_updates: PositiveInt = 1
    round_deadline_s: PositiveFloat = 3600.0
    lease_s: PositiveFloat = 30.0  # without a heartbeat for so long, a device is lost
    progress_timeout_s: PositiveFloat = 1800.0  # a device that gets nowhere for so long has failed
    gather_deadline_s: PositiveFloat = 86400.0  # of waiting for enough devices; then the run fails
    over_selection: Annotated[float, Field(ge=0)] = 0.0  # of clients_per_round, asked on top of it
    buffer_size: Annotated[int, Field(ge=0)] = 0  # updates that end a round; 0: everyone's
    late_updates: Literal["drop", "next_round"] = "drop"
    max_staleness: PositiveInt = 5  # rounds; what is older is dropped
    staleness_exponent: Annotated[float, Field(ge=0)] = 0.5  # weight (1 + staleness) ** -exponent
    max_abandoned_rounds: PositiveInt = 5  # in a row; then the run has failed
    evaluate_every: PositiveInt = 1
    save_every: PositiveInt = 10
    seed: Annotated[int, Field(ge=0)] = 0


class TransferOptions(Section):
    """What moves between the coordinator and its devices, and how much of it at once."""

    max_uploads: PositiveInt = 8
    max_downloads: PositiveInt = 16
    max_bytes_per_s: Annotated[float, Field(ge=0)] = 0.0  # of one transfer; 0: no limit
    idle_s: PositiveFloat = 60.0  # a transfer in which nothing moves for so long is ended
    min_free_bytes: Annotated[int, Field(ge=0)] = 64 << 20  # of disk, kept for the journal

    @field_validator("min_free_bytes", mode="before")
    @classmethod
    def _size(cls, value: object) -> object:
        return parse_bytes(value) if isinstance(value, str) else value


class DataOptions(Section):
    """Text the coordinator itself may see; never a device's."""

    calibration: tuple[Path, ...] = ()
    eval: tuple[Path, ...] = ()
    num_calibration_sequences: PositiveInt = 8
    num_bridge_sequences: PositiveInt = 32
    max_eval_sequences: PositiveInt = 128  # per file


class ServerSettings(Settings):
    """Everything the coordinator can be told."""

    model_config = SettingsConfigDict(env_prefix="FEDPRUNER_SERVER_")

    model: Path
    profile: Literal[tuple(PROFILES)] = "default"  # type: ignore[valid-type]
    state_dir: Path = Path("fedpruner-server-state")
    listen: str = "127.0.0.1:9092"
    insecure: bool = False
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    health_server_address: str | None = None  # gRPC health in the clear, beside the service itself
    keepalive_s: Annotated[float, Field(ge=1)] = KEEPALIVE_S  # pings on a silent connection
    stay: bool = False
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_json: bool = False
    num_threads: Annotated[int, Field(ge=0)] = 0  # of torch in the coordinator's jobs; 0: all cores
    lora: LoraOptions = LoraOptions()
    training: TrainingOptions = TrainingOptions()
    plan: PlanOptions = PlanOptions()
    aggregation: AggregationOptions = AggregationOptions()
    run: RunOptions = RunOptions()
    transfer: TransferOptions = TransferOptions()
    data: DataOptions = DataOptions()

    @model_validator(mode="before")
    @classmethod
    def _fill_from_profile(cls, values: Any) -> Any:
        return apply_profile(values) if isinstance(values, dict) else values
