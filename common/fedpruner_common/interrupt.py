"""SIGTERM and SIGINT as an exception that cannot get lost.

An exception raised by a signal handler can surface inside a callback of a C library, which prints
or drops it. So it is raised again and again until somebody says that he heard it.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_REPEAT_S = 0.5
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)
_held = 0


class Stopped(BaseException):
    """Somebody wants this process to end; unwinds the main thread from wherever it is."""


def raise_on_signals() -> None:
    """From here on SIGTERM and SIGINT raise `Stopped` in the main thread."""
    for number in _SIGNALS:
        signal.signal(number, _raise)


def heard() -> None:
    """The stop was noticed: clean-up, which is bounded, is not to be disturbed by more signals."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def held() -> Iterator[None]:
    """Signals wait until this is left: what happens in here happens whole."""
    global _held
    _held += 1
    try:
        yield
    finally:
        _held -= 1


def _raise(_signal: int, _frame: FrameType | None) -> None:
    signal.setitimer(signal.ITIMER_REAL, _REPEAT_S)
    if not _held:
        raise Stopped
