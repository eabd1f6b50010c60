"""The agent's settings. Environment variables are FEDPRUNER_AGENT_ plus the key."""

import os
import socket
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, field_validator
from pydantic_settings import SettingsConfigDict

from fedpruner_common.config import Settings
from fedpruner_common.rpc import KEEPALIVE_S
from fedpruner_common.units import parse_bytes


class AgentSettings(Settings):
    """Everything an agent can be told."""

    model_config = SettingsConfigDict(env_prefix="FEDPRUNER_AGENT_")

    server: str = "127.0.0.1:9092"
    data: list[Path] = Field(min_length=1)
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")] | None = None
    state_dir: Path = Path("fedpruner-agent-state")
    # None: what is really free, less the reserve.
    memory_budget: Annotated[int, Field(ge=0)] | None = None
    memory_reserve: Annotated[int, Field(ge=0)] = 256 << 20
    cache_limit: Annotated[int, Field(ge=0)] = 64 << 30
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: Annotated[int, Field(ge=0)] = 0  # of torch; 0: all cores this process may use
    root_certificates: Path | None = None
    insecure: bool = False
    keepalive_s: Annotated[float, Field(ge=1)] = KEEPALIVE_S  # pings on a silent connection
    transfer_idle_s: PositiveFloat = 60.0  # a transfer in which nothing moves begins again
    offline_training_s: Annotated[float, Field(ge=0)] | None = None  # None: one lease
    max_retries: int | None = None  # None: for ever
    max_wait_time: PositiveFloat = 60.0  # longest pause between retries, seconds
    idle_s: Annotated[float, Field(ge=0)] = 60.0  # how long the training process stays warm
    stay: bool = False
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_json: bool = False

    @field_validator("memory_budget", "memory_reserve", "cache_limit", mode="before")
    @classmethod
    def _size(cls, value: object) -> object:
        return parse_bytes(value) if isinstance(value, str) else value

    @property
    def client_id(self) -> str:
        """The device's name in the federation: as given, or the host's."""
        return self.name or socket.gethostname().split(".")[0]

    def threads(self) -> int:
        """Threads for torch."""
        return self.num_threads or len(os.sched_getaffinity(0))
