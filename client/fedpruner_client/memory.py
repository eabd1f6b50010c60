"""Peak memory of this process, over a span of time."""

import os
import threading
from pathlib import Path

import psutil
import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_SAMPLE_S = 0.002


class PeakMeter:
    """Peak since `start`: of the CUDA allocator on a GPU, of the resident set on the CPU.

    The kernel keeps the high-water mark itself and resets it on request. Where it does not (not
    Linux, or a locked-down /proc), a thread samples. `getrusage` is no use: its maximum survives
    exec and so contains the parent's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sampler: _Sampler | None = None

    def start(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        try:
            _CLEAR_REFS.write_text("5")
        except OSError:
            self._sampler = _Sampler()
            self._sampler.start()

    def peak_bytes(self) -> int:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return int(torch.cuda.max_memory_reserved(self._device))
        if self._sampler is not None:
            return self._sampler.stop()
        return _status_bytes("VmHWM")


class _Sampler(threading.Thread):
    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._process = psutil.Process(os.getpid())
        self._stopped = threading.Event()
        self._peak = 0

    def run(self) -> None:
        while True:
            self._peak = max(self._peak, self._process.memory_info().rss)
            if self._stopped.wait(_SAMPLE_S):
                return

    def stop(self) -> int:
        self._stopped.set()
        self.join()
        return self._peak


def _status_bytes(key: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"{_STATUS} has no {key}")


def resident_bytes() -> int:
    """Memory this process holds now."""
    return int(psutil.Process().memory_info().rss)
