"""Wall clock time that does not jump: deadlines are in the journal, so they need one to live by."""

import time


class Clock:
    """Wall clock time when it was made, and from there on only the seconds that really pass.

    When somebody sets the machine's clock, nothing ends early or late; a restart takes up the new
    time.
    """

    def __init__(self) -> None:
        self._wall, self._monotonic = time.time(), time.monotonic()

    def now(self) -> float:
        """Seconds since 1970."""
        return self._wall + time.monotonic() - self._monotonic
