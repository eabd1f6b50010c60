"""A child process for work that needs torch: one JSON line in, one or more out.

The parent stays small, and the child's end provably returns its memory to the system. Children are
started with exec, never forked. A child ends by itself when its parent is gone: its standard input
closes, and a thread of its own watches for that.

    parent -> child   {"job": "train", "arguments": {...}}
    child -> parent   {"progress": {...}}            any number
                      {"result": {...}}  or  {"error": {"code": ..., "message": ...}}
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from fedpruner_common import errors
from fedpruner_common.errors import ChildDied, FedPrunerError

Json = dict[str, Any]
Progress = Callable[[Json], None]
Job = Callable[[Json, Progress], Json]

_ERRORS = {
    kind.code: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, FedPrunerError)
}
_LOG_TAIL_LINES = 12


class Child:
    """One child process; started by the first call, started again after it ended."""

    def __init__(
        self, module: str, *, log_path: Path, env: Mapping[str, str] | None = None
    ) -> None:
        """Prepare to run `python -m module`; its stderr is appended to `log_path`."""
        self._module = module
        self._log_path = log_path
        self._env = {**os.environ, **(env or {})}
        self._process: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int | None:
        """Of the running child, None when there is none."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def call(self, job: str, arguments: Json, on_progress: Progress | None = None) -> Json:
        """Run one job and return its result; blocks.

        Raises:
            FedPrunerError: what the job raised, rebuilt from its code.
            ChildDied: the process ended without an answer.
        """
        process = self._process
        if process is None or process.poll() is not None:
            process = self._start()
        stdin, stdout = _pipes(process)
        try:
            stdin.write(json.dumps({"job": job, "arguments": arguments}) + "\n")
            stdin.flush()
            for line in stdout:
                message = _message(line)
                if message is None:
                    continue
                if "progress" in message:
                    if on_progress:
                        on_progress(message["progress"])
                elif "error" in message:
                    error = message["error"]
                    raise _ERRORS.get(error["code"], FedPrunerError)(error["message"])
                elif "result" in message:
                    result: Json = message["result"]
                    return result
        except BrokenPipeError:
            pass  # it died before reading; told below
        raise self._died(job)

    def close(self, *, timeout_s: float = 5.0) -> None:
        """End the child: ask by closing its input, then kill. Does nothing when there is none."""
        process, self._process = self._process, None
        if process is None:
            return
        stdin, stdout = _pipes(process)
        with contextlib.suppress(BrokenPipeError):
            stdin.close()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        stdout.close()

    def kill(self) -> None:
        """End the child at once, from any thread; a call in progress raises ChildDied."""
        process = self._process
        if process is not None:
            process.kill()

    def _start(self) -> "subprocess.Popen[str]":
        self.close()
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        with self._log_path.open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self._module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self._env,
                start_new_session=True,  # Ctrl-C is for the parent, which ends its children
            )
        return self._process

    def _died(self, job: str) -> ChildDied:
        assert self._process is not None
        returncode = self._process.wait()
        self.close()
        if returncode == -9:
            why = "it was killed, most likely for lack of memory"
        else:
            tail = self._log_path.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
            why = f"exit code {returncode}; the end of {self._log_path}:\n" + "\n".join(tail)
        return ChildDied(f"the child process ended during {job!r}: {why}", returncode)


def _message(line: str) -> Json | None:
    """The message in a line; None for what a library printed before `serve` took over."""
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


def _pipes(process: "subprocess.Popen[str]") -> tuple[IO[str], IO[str]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


def serve(jobs: Mapping[str, Job]) -> None:
    """The child's main loop: run jobs from standard input until it closes."""
    # The protocol gets a descriptor of its own, so that a library that prints cannot disturb it.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def send(message: Json) -> None:
        replies.write(json.dumps(message) + "\n")

    requests: queue.SimpleQueue[Json] = queue.SimpleQueue()

    def read_requests() -> None:
        for line in sys.stdin:
            requests.put(json.loads(line))
        os._exit(0)  # the parent is gone or done; nothing here is worth finishing

    threading.Thread(target=read_requests, daemon=True).start()
    while True:
        request = requests.get()
        try:
            job = jobs[request["job"]]
            result = job(request["arguments"], lambda values: send({"progress": values}))
            send({"result": result})
        except FedPrunerError as error:
            send({"error": {"code": error.code, "message": str(error)}})
        except Exception as error:
            traceback.print_exc()
            message = f"{type(error).__name__}: {error}"
            send({"error": {"code": FedPrunerError.code, "message": message}})
