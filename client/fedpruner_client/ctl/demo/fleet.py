"""The demo's processes: one coordinator and its agents, started, watched and stopped in order."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from fedpruner_common.errors import FedPrunerError
from fedpruner_common.interrupt import heard, held

_STOP_S = 8.0
_LOG_TAIL_LINES = 15


@dataclass
class Member:
    """One process of the fleet and its log."""

    name: str
    process: "subprocess.Popen[str]"
    log_path: Path

    def log_tail(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines()
        return "\n".join(lines[-_LOG_TAIL_LINES:])


class Fleet:
    """All processes of one demo; leaving the `with` block ends every one of them."""

    def __init__(self, log_dir: Path) -> None:
        self._log_dir = log_dir
        self._members: list[Member] = []

    def __enter__(self) -> "Fleet":
        return self

    def __exit__(self, *_: object) -> None:
        heard()
        for member in reversed(self._members):
            if member.process.poll() is None:
                member.process.terminate()
        for member in reversed(self._members):
            try:
                member.process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                member.process.kill()
                member.process.wait()
            if member.process.stdout:
                member.process.stdout.close()

    def start(self, name: str, module: str, *arguments: str) -> Member:
        """Run `python -m module arguments` with its log in a file of its own."""
        log_path = self._log_dir / f"{name}.log"
        log_path.parent.mkdir(parents=True, exist_ok=True)
        # Held: a process that is started must also be in the list of those to stop.
        with log_path.open("w") as log, held():
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C reaches the demo alone, which stops the fleet
            )
            member = Member(name, process, log_path)
            self._members.append(member)
        return member

    def start_server(self, config: Path) -> tuple[Member, str]:
        """The coordinator and the address it listens on.

        Raises:
            FedPrunerError: it ended before it listened; the message has the end of its log.
        """
        server = self.start("server", "fedpruner_server.cli", "run", "--config", str(config))
        assert server.process.stdout is not None
        line = server.process.stdout.readline()
        if "listening on " not in line:
            server.process.wait()
            raise FedPrunerError(f"the coordinator did not start:\n{server.log_tail()}")
        return server, line.rsplit(" ", 1)[1].strip()

    def check(self) -> None:
        """Notice a process that failed.

        Raises:
            FedPrunerError: its name and the end of its log.
        """
        for member in self._members:
            code = member.process.poll()
            if code not in (None, 0):
                raise FedPrunerError(
                    f"{member.name} ended with exit code {code}; the end of {member.log_path}:\n"
                    f"{member.log_tail()}"
                )
