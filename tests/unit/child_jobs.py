"""The child process of test_child.py: `python -m child_jobs`."""

import os
import signal
import sys
import threading

from fedpruner_common.child import Json, Progress, serve
from fedpruner_common.errors import BudgetTooSmall


def echo(arguments: Json, _: Progress) -> Json:
    return {"echo": arguments, "pid": os.getpid()}


def count(arguments: Json, progress: Progress) -> Json:
    for step in range(arguments["to"]):
        progress({"step": step})
    return {"done": True}


def refuse(_: Json, __: Progress) -> Json:
    raise BudgetTooSmall("12 bytes short")


def bug(_: Json, __: Progress) -> Json:
    return {"never": 1 // 0}


def killed(_: Json, __: Progress) -> Json:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def leave(_: Json, __: Progress) -> Json:
    print("the last words", file=sys.stderr, flush=True)
    os._exit(3)


def noisy(_: Json, __: Progress) -> Json:
    print("a library prints", flush=True)
    os.write(1, b"a C library writes\n")
    return {"quiet": False}


def hang(_: Json, progress: Progress) -> Json:
    progress({"pid": os.getpid()})
    threading.Event().wait()
    return {}


if __name__ == "__main__":
    if "NOISY_IMPORT" in os.environ:
        print("a library prints while it is imported", flush=True)
    serve(
        {
            "echo": echo,
            "count": count,
            "refuse": refuse,
            "bug": bug,
            "killed": killed,
            "leave": leave,
            "noisy": noisy,
            "hang": hang,
        }
    )
