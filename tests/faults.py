"""Faults at exact moments of real processes: `python -m faults PROGRAM ARGUMENTS...`.

The program is the product's own (`server`), or the agent without torch (`light_agent`). The moment
is named by the environment variable FAULT, `name` or `name:n` for the n-th time it comes; there the
process ends as by kill -9, unless the fault says otherwise. It is brought about by wrapping one
function of the product, which knows nothing of it.

CHUNK_BYTES in the environment makes chunks small, so that a small model has a middle of a transfer.
"""

import faulthandler
import os
import signal
import sys
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any


class Fault(str, Enum):
    """Where a process dies, in the order of a round."""

    # the coordinator
    GATHERING = "gathering"  # the cohort is chosen, nothing journaled
    TASKS_OUT = "tasks_out"  # the plans are journaled, nobody told
    MID_DOWNLOAD = "mid_download"
    MID_UPLOAD = "mid_upload"  # some chunks of an update are on disk
    BEFORE_JOURNAL = "before_journal"  # the update is in place, nothing journaled
    BEFORE_REPLY = "before_reply"  # the update is journaled, the agent does not know
    MID_AGGREGATION = "mid_aggregation"  # half of the new adapter is written
    BEFORE_AGGREGATED = "before_aggregated"  # the new adapter is in place, nothing journaled
    BEFORE_PUBLISH = "before_publish"  # it is journaled, nothing exported
    MID_EXPORT = "mid_export"
    BEFORE_CLOSED = "before_closed"  # metrics are written, the end of the round is not journaled
    AFTER_CLOSED = "after_closed"
    # the agent
    TASK_RECEIVED = "task_received"
    AGENT_MID_DOWNLOAD = "agent_mid_download"
    TRAINING = "training"
    AFTER_TRAINING = "after_training"  # the update is written, nobody knows of it
    BEFORE_PUSH = "before_push"
    AGENT_MID_UPLOAD = "agent_mid_upload"
    AFTER_PUSH = "after_push"  # the coordinator has it, the agent does not know that
    # an agent that lives on
    PUSH_TWICE = "push_twice"
    CORRUPT_CHUNK = "corrupt_chunk"  # one of an upload
    WRONG_HASH = "wrong_hash"
    TRUNCATED = "truncated"  # fewer bytes than promised

    @property
    def of_server(self) -> bool:
        return list(Fault).index(self) < list(Fault).index(Fault.TASK_RECEIVED)

    @property
    def kills(self) -> bool:
        return list(Fault).index(self) < list(Fault).index(Fault.PUSH_TWICE)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class _Countdown:
    """True the n-th time it is asked."""

    def __init__(self, n: int) -> None:
        self._left = n

    def __call__(self) -> bool:
        self._left -= 1
        return self._left == 0


def _wrap(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    setattr(owner, name, make(getattr(owner, name)))


def _around(
    owner: Any,
    name: str,
    now: Callable[[], bool],
    *,
    before: Callable[..., int] | None = None,
    after: Callable[..., int] | None = None,
) -> None:
    """Die before or after a call, when it is time; the conditions say how often it counts."""

    def make(inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if before and any(now() for _ in range(before(*args, **kwargs))):
                die()
            result = inner(*args, **kwargs)
            if after and any(now() for _ in range(after(*args, **kwargs))):
                die()
            return result

        return call

    _wrap(owner, name, make)


def _always(*_: Any, **__: Any) -> int:
    return 1


def _event(kind: str) -> Callable[..., int]:
    return lambda _storage, _round, events: sum(found == kind for found, _ in events)


def arm_server(fault: Fault, now: Callable[[], bool]) -> None:
    """Have the coordinator of this process die there."""
    from fedpruner_common.chunks import ChunkWriter
    from fedpruner_server import run, sending, storing
    from fedpruner_server.storage import Storage

    if fault is Fault.GATHERING:
        _around(Storage, "append_all", now, before=_event("CohortChosen"))
    elif fault is Fault.TASKS_OUT:
        _around(Storage, "append_all", now, after=_event("CohortChosen"))
    elif fault is Fault.MID_DOWNLOAD:
        _around(sending, "make_chunk", now, after=_always)
    elif fault is Fault.MID_UPLOAD:
        _around(ChunkWriter, "write", now, after=_always)
    elif fault is Fault.BEFORE_JOURNAL:
        _around(storing, "make_durable", now, after=len)
    elif fault is Fault.BEFORE_REPLY:
        _around(Storage, "append_all", now, after=_event("UpdateStored"))
    elif fault is Fault.MID_AGGREGATION:
        _wrap(run, "write_adapter", lambda inner: _half_written(inner, now))
    elif fault is Fault.BEFORE_AGGREGATED:
        _around(Storage, "append_all", now, before=_event("Aggregated"))
    elif fault is Fault.BEFORE_PUBLISH:
        _around(Storage, "append_all", now, after=_event("Aggregated"))
    elif fault is Fault.MID_EXPORT:
        from fedpruner_server import export

        _around(export.shutil, "copyfile", now, after=_always)
    elif fault is Fault.BEFORE_CLOSED:
        _around(Storage, "append_all", now, before=_event("Closed"))
    elif fault is Fault.AFTER_CLOSED:
        _around(Storage, "append_all", now, after=_event("Closed"))


def _half_written(inner: Callable[..., Any], now: Callable[[], bool]) -> Callable[..., Any]:
    def write(adapter: Any, path: Any) -> None:
        if now():
            inner(adapter, path)
            data = path.read_bytes()
            path.unlink()
            path.with_suffix(".tmp").write_bytes(data[: len(data) // 2])
            die()
        inner(adapter, path)

    return write


def arm_agent(fault: Fault, now: Callable[[], bool]) -> None:
    """Have the agent of this process die, or misbehave, there."""
    from fedpruner_client import transfers
    from fedpruner_client.agent import Agent
    from fedpruner_client.outbox import Outbox
    from fedpruner_client.trainer import Trainer
    from fedpruner_client.transfers import Transfers
    from fedpruner_common.chunks import ChunkWriter

    if fault is Fault.TASK_RECEIVED:
        _around(Agent, "_work", now, before=_always)
    elif fault is Fault.AGENT_MID_DOWNLOAD:
        _around(ChunkWriter, "write", now, after=_always)
    elif fault is Fault.TRAINING:
        _wrap(Trainer, "_attempt", lambda inner: _dying_on_progress(inner, now))
    elif fault is Fault.AFTER_TRAINING:
        _around(Outbox, "put", now, before=_always)
    elif fault is Fault.BEFORE_PUSH:
        _around(Outbox, "put", now, after=_always)
    elif fault is Fault.AFTER_PUSH:
        _around(Transfers, "push", now, after=_always)
    elif fault is Fault.PUSH_TWICE:
        _wrap(Transfers, "push", _twice)
    else:
        _wrap(transfers, "read_chunks", lambda inner: _bad_upload(inner, fault, now))
        if fault is Fault.WRONG_HASH:
            _wrap(Outbox, "put", lambda inner: _other_hash(inner, now))


def _dying_on_progress(inner: Callable[..., Any], now: Callable[[], bool]) -> Callable[..., Any]:
    def attempt(self: Any, task: Any, cache: Any, _: Any, budget: int) -> Any:
        return inner(self, task, cache, lambda _: die() if now() else None, budget)

    return attempt


def _twice(inner: Callable[..., Any]) -> Callable[..., Any]:
    def push(self: Any, update: Any) -> None:
        inner(self, update)
        inner(self, update)

    return push


def _other_hash(inner: Callable[..., Any], now: Callable[[], bool]) -> Callable[..., Any]:
    from dataclasses import replace

    def put(*args: Any) -> Any:
        update = inner(*args)
        return replace(update, hash="ab" * 32) if now() else update

    return put


def _bad_upload(
    inner: Callable[..., Any], fault: Fault, now: Callable[[], bool]
) -> Callable[..., Any]:
    from dataclasses import replace

    def read(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for index, chunk in enumerate(inner(*args, **kwargs)):
            if index and fault in (Fault.AGENT_MID_UPLOAD, Fault.CORRUPT_CHUNK) and now():
                if fault is Fault.AGENT_MID_UPLOAD:
                    die()
                chunk = replace(chunk, checksum=chunk.checksum ^ 1)
            if index and fault is Fault.TRUNCATED and now():
                return
            yield chunk

    return read


def main() -> None:
    program, *arguments = sys.argv[1:]
    from fedpruner_common import chunks

    faulthandler.register(signal.SIGUSR1, all_threads=True)  # where does it hang?
    chunks.CHUNK_BYTES = int(os.environ.get("CHUNK_BYTES", chunks.CHUNK_BYTES))
    name, _, count = os.environ.get("FAULT", "").partition(":")
    now = _Countdown(int(count or 1))
    sys.argv = [program, *arguments]
    if program == "server":
        from fedpruner_server import cli

        if name:
            arm_server(Fault(name), now)
        cli.main()
    else:
        import light_agent

        if name:
            arm_agent(Fault(name), now)
        light_agent.main()


if __name__ == "__main__":
    main()
