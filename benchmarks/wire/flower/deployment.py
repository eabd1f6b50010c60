"""A SuperLink, its SuperNodes and one run of the app, each process with a log of its own."""

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from benchmarks.wire.flower.environment import variables
from benchmarks.wire.flower.errors import FlowerError, tail
from benchmarks.wire.flower.processes import ProcessTree

_APP = Path(__file__).parent / "app"
_HOST = "127.0.0.1"
_START_TIMEOUT_S = 60
_SUBMIT_TIMEOUT_S = 60
_POLL_S = 0.1


class Deployment:
    """Flower's processes on loopback. The caller stops `tree`, whatever happens."""

    def __init__(self, venv: Path, folder: Path) -> None:
        """Use an empty folder for homes, logs and configuration."""
        self.tree = ProcessTree()
        self._venv, self._folder = venv, folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._address = ""

    def start(self, clients: int) -> None:
        """Bring the SuperLink up, and the SuperNodes on their way to it.

        Raises:
            FlowerError: one has ended, or the SuperLink is not healthy in time.
        """
        # Flower refuses port 0, so ports are looked for here; another program may take one first.
        ports = _free_ports(1 + clients)
        self._address = f"{_HOST}:{ports[0]}"
        place = ["--host", _HOST, "--port"]
        self._spawn("superlink", ["flower-superlink", "--insecure", *place, str(ports[0])])
        self._await_health()
        for index, port in enumerate(ports[1:]):
            link = ["--superlink", self._address, *place, str(port)]
            self._spawn(f"supernode-{index}", ["flower-supernode", "--insecure", *link])

    def submit(self, settings: dict[str, int | float | str]) -> None:
        """`flwr run` the app with these settings; it goes on after this returns.

        Raises:
            FlowerError: the SuperLink did not take it.
        """
        home = self._home("run")
        home.joinpath("config.toml").write_text(
            '[superlink]\ndefault = "loopback"\n'
            f'[superlink.loopback]\naddress = "{self._address}"\ninsecure = true\n'
        )
        toml = self._folder / "settings.toml"
        # A JSON string, int or float is TOML too.
        toml.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in settings.items()))
        command = ["flwr", "run", str(_APP), "loopback", "--run-config", str(toml)]
        process = self._spawn("run", command)
        try:
            code = process.wait(_SUBMIT_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise self.failure(f"flwr run took over {_SUBMIT_TIMEOUT_S} s", "run") from error
        if code != 0:
            raise self.failure(f"flwr run left with {code}", "run")
        del self._processes["run"]

    def check(self) -> None:
        """Raise FlowerError where a process that should run has ended."""
        for name, process in self._processes.items():
            if process.poll() is not None:
                raise self.failure(f"{name} ended with {process.returncode}", name)

    def failure(self, what: str, *names: str) -> FlowerError:
        """An error with the end of these processes' logs; without names, of the first two."""
        parts = [
            f"{name} wrote last:\n{tail(self._log(name).read_text(errors='replace'))}"
            for name in names or ("superlink", "supernode-0")
            if self._log(name).is_file()
        ]
        return FlowerError("\n".join([what, *parts]))

    def _spawn(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        program = self._venv / "bin" / command[0]
        with self._log(name).open("wb") as log:
            process = subprocess.Popen(
                [str(program), *command[1:]],
                cwd=self._home(name),
                env=variables(self._venv, self._home(name)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A terminal's Ctrl-C must reach us only: we end them, in order, and wait.
                start_new_session=True,
            )
        self.tree.add(process.pid)
        self._processes[name] = process
        return process

    def _await_health(self) -> None:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            self.check()
            try:
                with opener.open(f"http://{self._address}/health", timeout=1):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(_POLL_S)
        raise self.failure(f"the SuperLink was not healthy after {_START_TIMEOUT_S} s", "superlink")

    def _home(self, name: str) -> Path:
        """A FLWR_HOME for each: on machines of their own, none shares another's installed app."""
        home = self._folder / name
        home.mkdir(exist_ok=True)
        return home

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind((_HOST, 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
