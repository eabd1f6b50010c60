"""A real agent without torch: `python -m light_agent run ...`, arguments as of fedpruner-agent.

All of it is the real program: loop, heartbeat, connection, transfers, cache, outbox, and the
trainer with its child process; only that child is another (this module without arguments), which
moves the adapter by a deterministic step instead of training it. It begins in a fraction of a
second and needs some 50 MB. What it offers is fixed: FLOOR_BYTES before any model, and room for
everything, or the `--memory-budget`. The same task by the same client brings the same bits.

PYTHONPATH must name this folder. Environment variables, of the agent:

    LIGHT_STEPS    steps of a task; the task's own max_steps if not given
    LIGHT_STEP_S   seconds each of them takes; 0 if not given
    LIGHT_HANG_AT  after this step the child hangs for ever, while its agent lives on
    LIGHT_FAIL_AT  after this step the task fails with "told to fail"
"""

import os
import sys
import threading
from pathlib import Path
from typing import Any

from fedpruner_common.child import Child, Json, Progress, serve
from fedpruner_common.errors import CorruptChunk, DataError

FLOOR_BYTES = 100 << 20
EXAMPLES = 10
_AVAILABLE_BYTES = 64 << 30
_STEP = 0.01  # how far every value moves at most, all steps together


def _number(name: str, default: float) -> float:
    return float(os.environ.get(name) or default)


def moved(key: str, values: Any, *, client_id: str, seed: int) -> Any:
    """What one tensor becomes by a task of this client with this seed."""
    import numpy as np
    from blake3 import blake3

    told = f"{client_id} {seed} {key}".encode() + values.tobytes()
    rng = np.random.default_rng(int.from_bytes(blake3(told).digest(8), "little"))
    where = rng.random(values.shape, dtype=np.float32)
    return values + np.float32(_STEP) * (where - np.float32(0.5))


def train(arguments: Json, on_progress: Progress) -> Json:
    """Write the update of a task; the child's only job."""
    from safetensors.numpy import load_file, save_file

    from fedpruner_common.adapters import from_peft

    held = 0
    for tensor in (*arguments["tensors"], *arguments["other_tensors"]):
        num_bytes = Path(tensor["path"]).stat().st_size
        if num_bytes != tensor["num_bytes"]:
            raise CorruptChunk(f"{tensor['name']}: {num_bytes} bytes in the cache")
        held += num_bytes
    training, wanted = arguments["training"], set(arguments["lora"]["target_modules"])
    adapter = {
        key: values
        for key, values in load_file(arguments["adapter"]).items()
        if from_peft(key).rpartition(".")[0] in wanted
    }
    num_steps = int(_number("LIGHT_STEPS", training["max_steps"]))
    for step in range(1, num_steps + 1):
        threading.Event().wait(_number("LIGHT_STEP_S", 0))
        on_progress({"step": step, "num_steps": num_steps, "train_loss": 2.0 - step / num_steps})
        if step == _number("LIGHT_HANG_AT", 0):
            threading.Event().wait()
        if step == _number("LIGHT_FAIL_AT", 0):
            raise DataError("told to fail")
    for key, values in adapter.items():
        adapter[key] = moved(key, values, client_id=arguments["client_id"], seed=training["seed"])
    save_file(adapter, arguments["update"], metadata={"format": "pt"})
    return {
        "num_examples": EXAMPLES,
        "num_tokens": 100 * num_steps,
        "train_loss_first": 2.0,
        "train_loss_last": 1.0,
        "measured_peak_bytes": FLOOR_BYTES + held,
        "train_s": num_steps * _number("LIGHT_STEP_S", 0),
    }


def main() -> None:
    """The real program, with the other child."""
    from fedpruner_client import agent, cli
    from fedpruner_client.config import AgentSettings
    from fedpruner_client.trainer import Baseline, Trainer

    class LightTrainer(Trainer):
        def __init__(self, settings: AgentSettings) -> None:
            super().__init__(settings)
            self._child = Child("light_agent", log_path=settings.state_dir / "training.log")

        def measure(self) -> Baseline:
            # A limit of the process itself is not looked at again, so the offer stays as it is.
            return Baseline("rss", FLOOR_BYTES, _AVAILABLE_BYTES, "RLIMIT of a light agent")

    agent.Trainer = LightTrainer  # type: ignore[misc]
    cli.main()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main()
    else:
        serve({"train": train})
