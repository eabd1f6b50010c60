"""A ServerApp that sends arrays to all clients and compares what comes back.

It appends to the file of the setting `events`, one JSON object a line: `ready` with its pid and
when nothing happened, one `round` each, and `done` or `failed`. `begin` and `end` are of the
machine's monotonic clock.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

_ARRAY_BYTES = 10_000_000
_CONNECT_TIMEOUT_S = 90
_IDLE_S = 3  # for a sample of what all programs hold without arrays
Tell = Callable[..., None]

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds."""
    config: dict[str, Any] = dict(context.run_config)
    path = Path(config["events"])

    def tell(event: str, **facts: object) -> None:
        with path.open("a") as file:
            file.write(json.dumps({"event": event, **facts}) + "\n")

    try:
        nodes = _nodes(grid, int(config["clients"]))
        begin = time.monotonic()
        time.sleep(_IDLE_S)
        tell("ready", pid=os.getpid(), begin=begin, end=time.monotonic())
        for number in range(int(config["rounds"])):
            tell("round", round=number, **_round(grid, nodes, number, config))
        tell("done", at=time.monotonic())
    except Exception as error:
        tell("failed", error=f"{type(error).__name__}: {error}")
        raise


def _nodes(grid: Grid, count: int) -> list[int]:
    """Ids of all SuperNodes, once so many are there."""
    deadline = time.monotonic() + _CONNECT_TIMEOUT_S
    while len(nodes := list(grid.get_node_ids())) < count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"expected {count} SuperNodes, {len(nodes)} connected")
        time.sleep(0.2)
    return nodes


def _round(grid: Grid, nodes: list[int], number: int, config: dict[str, Any]) -> dict[str, Any]:
    """Begin, end, and whether every reply is what was sent."""
    arrays = _arrays(int(config["bytes"]), seed=number)
    begin = time.monotonic()
    # Gives each array's memory back as it is converted: what an app need not hold is not charged.
    record = ArrayRecord(arrays, keep_input=False)
    messages = [Message(RecordDict({"arrays": record}), node, "train") for node in nodes]
    replies = list(grid.send_and_receive(messages, timeout=float(config["timeout"])))
    end = time.monotonic()
    if len(replies) != len(nodes):
        raise TimeoutError(f"round {number}: {len(replies)} replies of {len(nodes)} in time")
    for reply in replies:
        if reply.has_error():
            raise RuntimeError(f"round {number}: a ClientApp failed: {reply.error}")
    equal = all(_same(record, reply.content["arrays"]) for reply in replies)
    return {"begin": begin, "end": end, "equal": equal}


def _arrays(num_bytes: int, *, seed: int) -> list[np.ndarray]:
    """Random float32 arrays of 10 MB, the last with what is left. New ones each round: equal
    objects are stored once."""
    generator = np.random.default_rng(seed)
    sizes = [min(_ARRAY_BYTES, num_bytes - at) for at in range(0, num_bytes, _ARRAY_BYTES)]
    return [generator.random(size // 4, dtype=np.float32) for size in sizes]


def _same(sent: ArrayRecord, received: ArrayRecord) -> bool:
    """Bit for bit: an Array's data are its header (dtype, shape) and its values."""
    return list(sent) == list(received) and all(
        sent[name].data == received[name].data for name in sent
    )
