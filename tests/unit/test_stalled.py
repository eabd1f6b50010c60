"""A transfer in which nothing moves, from the side of the thread that looks after it."""

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fedpruner_client import heartbeat, transfers
from fedpruner_client.config import AgentSettings
from fedpruner_client.connection import Connection, Offer
from fedpruner_client.transfers import Transfers


class Stream:
    """A stream of no chunks that ends when it is cancelled, or does not even then."""

    def __init__(self, *, deaf: bool) -> None:
        self.cancelled, self.over = threading.Event(), threading.Event()
        self._deaf = deaf

    def cancel(self) -> None:
        self.cancelled.set()
        if not self._deaf:
            self.over.set()

    def __iter__(self) -> Any:
        self.over.wait(30)
        return iter(())


@pytest.fixture
def watched() -> Transfers:
    settings = AgentSettings(server="127.0.0.1:1", data=[Path("x")], name="a")
    return Transfers(Connection(settings, Offer(1, 1, "rss")))


def reading(watched: Transfers, stream: Stream) -> threading.Thread:
    reader = threading.Thread(target=lambda: list(watched._watched(stream)))
    reader.start()
    while watched._call is not stream:
        time.sleep(0.001)
    return reader


def test_a_stream_that_moves_is_left_alone_and_one_that_does_not_is_cancelled(
    watched: Transfers,
) -> None:
    stream = Stream(deaf=False)
    reader = reading(watched, stream)
    assert not watched.cancel_stalled(60)
    assert not stream.cancelled.is_set()
    assert not watched.cancel_stalled(-1)
    reader.join(10)
    assert stream.cancelled.is_set()
    assert not watched.cancel_stalled(-1)  # nothing is under way any more


def test_a_stream_that_does_not_end_when_it_is_cancelled_is_told(
    watched: Transfers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "_STUCK_S", 0.05)
    stream = Stream(deaf=True)
    reader = reading(watched, stream)
    assert not watched.cancel_stalled(-1)
    time.sleep(0.06)
    assert watched.cancel_stalled(-1)
    stream.over.set()
    reader.join(10)


def test_an_agent_that_begins_anew_is_the_same_command(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(os, "execv", lambda path, arguments: begun.append((path, arguments)))
    monkeypatch.setattr(heartbeat.faulthandler, "dump_traceback", lambda **_: None)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "fedpruner_client.cli", "run", "--x"])
    heartbeat._begin_anew()
    command = [sys.executable, "-m", "fedpruner_client.cli", "run", "--x"]
    assert begun == [(sys.executable, command)]
