"""Peak memory of this process, over a span of time."""

import os
import threading
from pathlib import Path

import psutil
import torch

from fedpruner_client.gpu import is_unified

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_SAMPLE_S = 0.002


class PeakMeter:
    """Peak since `start`: of the CUDA allocator on a GPU, of the resident set on the CPU.

    On unified memory both come out of the same pool, so it is the sum of both peaks: as if they
    came at the same moment, which errs on the safe side.

    The kernel keeps the high-water mark itself and resets it on request. Where it does not (not
    Linux, or a locked-down /proc), a thread samples. `getrusage` is no use: its maximum survives
    exec and so contains the parent's.

    Args:
        device: where training runs.
        unified: whether the GPU shares the host's memory; looked up if None.
    """

    def __init__(self, device: torch.device, *, unified: bool | None = None) -> None:
        self._device = device
        self._counts_allocator = device.type == "cuda"
        if unified is None:
            unified = self._counts_allocator and is_unified(torch, device)
        self._counts_resident = unified or not self._counts_allocator
        self._sampler: _Sampler | None = None

    def start(self) -> None:
        if self._counts_allocator:
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
        if self._counts_resident:
            self._start_resident()

    def _start_resident(self) -> None:
        if self._sampler is not None:
            self._sampler.stop()
            self._sampler = None
        if not _reset_resident_peak():
            self._sampler = _Sampler()
            self._sampler.start()

    def peak_bytes(self) -> int:
        """The peak, at the end of the span."""
        if self._counts_allocator:
            torch.cuda.synchronize(self._device)
        if self._sampler is not None:
            self._sampler.stop()
        return self.high_water_bytes()

    def high_water_bytes(self) -> int:
        """The peak so far; may be asked at any time, from any thread, and ends nothing.

        Before `start` it is that of the process's whole life.
        """
        peak = 0
        if self._counts_allocator:
            peak += int(torch.cuda.max_memory_reserved(self._device))
        if self._counts_resident:
            peak += self._sampler.peak_bytes() if self._sampler else _life_peak_bytes()
        return peak


class _Sampler(threading.Thread):
    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._process = psutil.Process(os.getpid())
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._peak = 0

    def run(self) -> None:
        while not self._stopped.wait(_SAMPLE_S):
            self._sample()

    def _sample(self) -> None:
        with self._lock:
            self._peak = max(self._peak, self._process.memory_info().rss)

    def start(self) -> None:
        self._sample()
        super().start()

    def peak_bytes(self) -> int:
        if not self._stopped.is_set():
            self._sample()
        return self._peak

    def stop(self) -> None:
        if not self._stopped.is_set():
            self._sample()
        self._stopped.set()
        self.join()


def _reset_resident_peak() -> bool:
    """Start the kernel's high-water mark anew; returns whether there is one."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return _kernel_peak_bytes() is not None


def _life_peak_bytes() -> int:
    """The kernel's high-water mark of the resident set; what it is now where there is none."""
    peak = _kernel_peak_bytes()
    return resident_bytes() if peak is None else peak


def _kernel_peak_bytes() -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:  # not Linux
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == "VmHWM":
            return int(value.split()[0]) * 1024
    return None


def resident_bytes() -> int:
    """Memory this process holds now."""
    return int(psutil.Process().memory_info().rss)
