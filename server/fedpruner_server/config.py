"""The coordinator's settings. Keys reuse Hugging Face's and PEFT's names.

TOML tables are the classes below; an environment variable is FEDPRUNER_SERVER_ plus the key, with
two underscores between table and key: FEDPRUNER_SERVER_RUN__NUM_ROUNDS=50.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt
from pydantic_settings import SettingsConfigDict

from fedpruner_common.config import Section, Settings
from fedpruner_server.core.statistics import Granularity


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


class PlanOptions(Section):
    """The method: how submodels are chosen."""

    granularity: Granularity = Granularity.LAYER
    selection: Literal["argmax", "sample"] = "argmax"
    importance: Literal["loo", "bi"] = "loo"
    statistics: Literal["public"] = "public"
    protect: tuple[int, ...] = (0, -1)
    margin: Annotated[float, Field(ge=0, lt=1)] = 0.05


class RunOptions(Section):
    """The rounds."""

    num_rounds: PositiveInt = 20
    min_available_clients: PositiveInt = 2
    clients_per_round: Annotated[int, Field(ge=0)] = 0  # 0: everyone available
    min_updates: PositiveInt = 1
    round_deadline_s: PositiveFloat = 3600.0
    lease_s: PositiveFloat = 30.0  # without a heartbeat for so long, a device is lost
    max_abandoned_rounds: PositiveInt = 5  # in a row; then the run has failed
    evaluate_every: PositiveInt = 1
    save_every: PositiveInt = 10
    seed: Annotated[int, Field(ge=0)] = 0


class DataOptions(Section):
    """Text the coordinator itself may see; never a device's."""

    calibration: tuple[Path, ...] = ()
    eval: tuple[Path, ...] = ()
    num_calibration_sequences: PositiveInt = 8
    max_eval_sequences: PositiveInt = 128  # per file


class ServerSettings(Settings):
    """Everything the coordinator can be told."""

    model_config = SettingsConfigDict(env_prefix="FEDPRUNER_SERVER_")

    model: Path
    state_dir: Path = Path("fedpruner-server-state")
    listen: str = "127.0.0.1:9092"
    insecure: bool = False
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    stay: bool = False
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_json: bool = False
    num_threads: Annotated[int, Field(ge=0)] = 0  # of torch in the coordinator's jobs; 0: all cores
    lora: LoraOptions = LoraOptions()
    training: TrainingOptions = TrainingOptions()
    plan: PlanOptions = PlanOptions()
    run: RunOptions = RunOptions()
    data: DataOptions = DataOptions()
