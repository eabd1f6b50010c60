"""Run a module whose wall clock somebody sets: `python -m jumping_clock MODULE ARGUMENTS...`.

SIGUSR1 puts `time.time` ten days ahead, SIGUSR2 ten days back. `time.monotonic` goes on, as it does
when a machine's clock is set.
"""

import runpy
import signal
import sys
import time
from types import FrameType

JUMP_S = 10 * 86_400.0
_true_time = time.time
_offset_s = 0.0


def _jump(number: int, _: FrameType | None) -> None:
    global _offset_s
    _offset_s += JUMP_S if number == signal.SIGUSR1 else -JUMP_S
    print(f"the clock says {time.time() - _true_time():+.0f} s", file=sys.stderr, flush=True)


def main() -> None:
    time.time = lambda: _true_time() + _offset_s
    signal.signal(signal.SIGUSR1, _jump)
    signal.signal(signal.SIGUSR2, _jump)
    module = sys.argv[1]
    del sys.argv[0]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
