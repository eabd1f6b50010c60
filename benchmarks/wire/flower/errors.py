"""What goes wrong around Flower, with the end of the log that tells why."""

_LINES = 30


class FlowerError(RuntimeError):
    """Flower could not be installed, started or used."""


def tail(log: str) -> str:
    """The last lines of a log, without the SuperLink's line for each successful request."""
    lines = [line for line in log.splitlines() if line.strip() and '" 200' not in line]
    return "\n".join(f"    {line}" for line in lines[-_LINES:]) or "    (empty)"
