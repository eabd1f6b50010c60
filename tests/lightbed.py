"""One run with light agents, on a model whose transfers take megabytes, quick to start.

A coordinator needs seconds to get to know its model. One does so once a session (`prepare`), and
every run begins with a copy of what it remembered: a real coordinator that is ready in a second.
"""

import json
import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from programs import Program, address_of, server_config, when_ready

from fedpruner_client.ctl.admin import AdminClient
from fedpruner_common.errors import Unavailable

MIB = 1 << 20
BASE_BYTES = 16 * MIB  # more than this travels down first
UPDATE_BYTES = 5 * MIB  # more than this up, and as much down, in every round
WAIT_S = 90.0  # for a run that takes seconds, also on a busy machine
TESTS = Path(__file__).parent
_LORA_R = 64


def make_model(model_dir: Path, small_model: Path) -> Path:
    """A random Llama of four layers and 16 MiB, with the small model's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.copytree(small_model, model_dir)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=256,
        intermediate_size=1088,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(model_dir)
    return model_dir


@dataclass(frozen=True)
class Prepared:
    """A coordinator's state that knows its model already."""

    model: Path
    texts: dict[str, Path]
    state_dir: Path


def prepare(folder: Path, small_model: Path, texts: dict[str, Path]) -> Prepared:
    """Have a coordinator get to know the model."""
    model = make_model(folder / "model", small_model)
    bed = Bed(folder, Prepared(model, texts, folder / "nothing"))
    bed.state_dir.mkdir()
    try:
        server = bed.server()
        server.wait_for("agents state=waiting")
        assert server.terminate() == 0
    finally:
        bed.close()
    return Prepared(model, texts, bed.state_dir)


class Bed:
    """One run's programs and folders; `close` ends them.

    Attributes:
        folder: of everything.
        state_dir: of the coordinator; may be set before it starts.
        config: of the coordinator, once it was started.
        address: of the coordinator, once it was started; it keeps it.
        make: starts a program; another one than `Program` may start it elsewhere.
    """

    def __init__(self, folder: Path, prepared: Prepared) -> None:
        self.folder = folder
        self.state_dir = folder / "server"
        self.config = folder / "server.toml"
        self.address = "127.0.0.1:0"
        self.make: Callable[..., Program] = Program
        self._prepared = prepared
        self._programs: list[Program] = []

    def start(self, name: str, *arguments: str, env: dict[str, str] | None = None) -> Program:
        program = self.make(
            self.folder / "logs",
            f"{name}-{len(self._programs)}",
            *arguments,
            env={"PYTHONPATH": str(TESTS), **(env or {})},
        )
        self._programs.append(program)
        return program

    def server(
        self,
        *,
        run: dict[str, Any] | None = None,
        transfer: dict[str, Any] | None = None,
        through: tuple[str, ...] = ("fedpruner_server.cli",),
        **settings: Any,
    ) -> Program:
        """The coordinator, listening; every start is at the same address.

        Args:
            run: keys of that table.
            transfer: likewise.
            through: the module, and arguments before its own.
            settings: keys without a table.
        """
        if not (self.state_dir / "journal.sqlite").exists() and self._prepared.state_dir.exists():
            shutil.copytree(self._prepared.state_dir, self.state_dir, dirs_exist_ok=True)
        server_config(
            self.config,
            self._prepared.model,
            self._prepared.texts,
            training={"max_seq_length": 16},
            lora={"r": _LORA_R},
            plan={"statistics_every": 0, "statistics_drift": 1e9},
            data={"eval": [], "num_calibration_sequences": 1},
            run={"num_rounds": 1, "min_available_clients": 1, **(run or {})},
            transfer={"min_free_bytes": 0, **(transfer or {})},
        )
        server = self.start(
            "server",
            *through,
            "run",
            *("--config", str(self.config)),
            *("--state-dir", str(self.state_dir)),
            *("--listen", self.address),
            env=_environment("FEDPRUNER_SERVER_", settings),
        )
        self.address = address_of(server)
        return server

    def agent(
        self,
        name: str,
        address: str | None = None,
        *,
        steps: int = 1,
        step_s: float = 0.0,
        hang_at: int = 0,
        **settings: Any,
    ) -> Program:
        """A device; settings are the agent's own.

        Args:
            name: of the device.
            address: of the coordinator, or of a proxy to it.
            steps: of every task.
            step_s: seconds each takes.
            hang_at: after this step it hangs.
            settings: keys of its configuration.
        """
        light = {"LIGHT_STEPS": steps, "LIGHT_STEP_S": step_s, "LIGHT_HANG_AT": hang_at}
        return self.start(
            name,
            "light_agent",
            "run",
            *("--server", address or self.address),
            *("--name", name),
            *("--data", "nothing.jsonl"),
            *("--state-dir", str(self.folder / name)),
            *("--memory-budget", "4GiB"),
            env={
                **{key: str(value) for key, value in light.items()},
                **_environment("FEDPRUNER_AGENT_", {"max_wait_time": 0.5, **settings}),
            },
        )

    def admin(self, **options: Any) -> AdminClient:
        """An operator's connection to the coordinator; close it."""
        return AdminClient(self.address, **options)

    def ready(self) -> None:
        """Wait until the coordinator has prepared itself."""
        when_ready(self.address).close()

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl of one type; all lines are whole."""
        text = (self.state_dir / "metrics.jsonl").read_text()
        assert text.endswith("\n")
        rows = [json.loads(line) for line in text.splitlines()]
        return [row for row in rows if row["type"] == kind]

    def outcomes(self) -> dict[str, tuple[str, str]]:
        """Client -> outcome and reason, in the last round."""
        return {r["client_id"]: (r["outcome"], r["reason"]) for r in self.rows("client")}

    def stored_at(self) -> dict[str, float]:
        """Client -> when its update was journaled, in seconds of the journal's clock."""
        query = (
            "SELECT json_extract(data, '$.event.client_id'), "
            "(julianday(at) - 2440587.5) * 86400 FROM events WHERE type = 'UpdateStored'"
        )
        with closing(sqlite3.connect(self.state_dir / "journal.sqlite")) as database:
            return dict(database.execute(query).fetchall())

    def arriving(self) -> int:
        """Bytes of updates that have arrived and are not stored yet."""
        return _size_of((self.state_dir / "updates" / "incoming").glob("*/*"))

    def arrived(self, name: str) -> int:
        """Bytes that a device has fetched and keeps."""
        cache = self.folder / name / "cache"
        return _size_of([*cache.glob("??/*"), *cache.glob("partial/*")])

    def close(self) -> None:
        for program in reversed(self._programs):
            program.end()


def _size_of(paths: Any) -> int:
    total = 0
    for path in paths:
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # it was moved meanwhile
            continue
    return total


def _environment(prefix: str, settings: dict[str, Any]) -> dict[str, str]:
    return {prefix + key.upper(): str(value) for key, value in settings.items()}


def wait_until(is_so: Callable[[], Any], what: str, timeout_s: float = 30.0) -> None:
    """Block until something is so.

    Raises:
        AssertionError: it never was; the message says what.
    """
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)


def training_process(agent: Program) -> psutil.Process:
    """The one child of an agent."""
    (child,) = psutil.Process(agent.pid).children()
    return child


def ended_well(*programs: Program, timeout_s: float = WAIT_S) -> None:
    """Wait until all have ended; fails with its output if one did not end well."""
    for program in programs:
        assert program.wait(timeout_s) == 0, program.output()


def status_of(bed: Bed) -> str:
    """The explanation in `status`; what went wrong while nobody answers."""
    admin = bed.admin()
    try:
        return str(admin.status().explanation)
    except Unavailable as error:
        return str(error)
    finally:
        admin.close()
