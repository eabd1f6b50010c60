"""The GPU memory this process may really use.

torch comes in as an argument: the agent's own process never imports it.

NVML is not needed. `mem_get_info` asks the driver, so what other processes hold is already off;
NVML would count devices regardless of CUDA_VISIBLE_DEVICES, shows the whole card inside a MIG
slice, and is absent on Tegra.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil

if TYPE_CHECKING:
    import torch

MemoryKind = Literal["cuda", "unified"]

_TEGRA = ("etc/nv_tegra_release", "sys/module/tegra_fuse")


@dataclass(frozen=True)
class GpuMemory:
    """What a GPU can bring to training.

    Attributes:
        kind: `cuda`: memory of its own; `unified`: it shares the host's.
        free_bytes: what this process could still take.
        floor_bytes: what it holds already, measured as `PeakMeter` measures the peak.
        total_bytes: of the device or of the slice of it that is visible.
    """

    kind: MemoryKind
    free_bytes: int
    floor_bytes: int
    total_bytes: int

    @property
    def available_bytes(self) -> int:
        """The most this process could hold in all; a budget goes up to this."""
        return self.free_bytes + self.floor_bytes


def is_unified(torch_module: Any, device: "torch.device", root: Path = Path("/")) -> bool:
    """Whether the GPU has no memory of its own (Jetson, integrated GPUs).

    Args:
        torch_module: torch.
        device: a CUDA device.
        root: of the file system to look at; tests give a tree of their own.
    """
    properties = torch_module.cuda.get_device_properties(device)
    integrated = getattr(properties, "is_integrated", None)
    if integrated is not None:  # also right for a discrete card plugged into a Tegra board
        return bool(integrated)
    return any((root / name).exists() for name in _TEGRA)


def gpu_offer(
    torch_module: Any,
    device: "torch.device",
    host_available_bytes: int,
    *,
    resident_bytes: int | None = None,
    root: Path = Path("/"),
) -> GpuMemory:
    """What the device leaves to this process, once all that costs memory by itself is loaded.

    The CUDA context (hundreds of MiB) is created here if it is not there yet, so that it is not
    offered. Libraries load their kernels and workspaces on first use: train a tiny step before.

    On unified memory CUDA's own answer is no use: it counts page cache as taken and knows nothing
    of control groups. There the host's figure is the free memory, and what this process holds is
    its resident set and the allocator's share.

    Args:
        torch_module: torch.
        device: a CUDA device.
        host_available_bytes: the least of the host's and the control groups' limits.
        resident_bytes: resident set of this process; looked up if None.
        root: of the file system to look at; tests give a tree of their own.
    """
    cuda = torch_module.cuda
    cuda.synchronize(device)
    reserved = int(cuda.memory_reserved(device))
    free, total = cuda.mem_get_info(device)
    if not is_unified(torch_module, device, root):
        return GpuMemory("cuda", int(free), reserved, int(total))
    if resident_bytes is None:
        resident_bytes = int(psutil.Process().memory_info().rss)
    return GpuMemory("unified", host_available_bytes, resident_bytes + reserved, int(total))


def limit_allocator(
    torch_module: Any, device: "torch.device", budget_bytes: int, *, root: Path = Path("/")
) -> bool:
    """Make more than the budget raise torch's OutOfMemoryError; returns whether that is in force.

    Else a task that needs more than planned takes what others on the GPU count on. Not on unified
    memory: there the budget covers the host's side of the process too, which this cannot see.

    Args:
        torch_module: torch.
        device: a CUDA device.
        budget_bytes: most that the allocator may reserve, blocks it keeps for reuse included.
        root: of the file system to look at; tests give a tree of their own.

    Raises:
        ValueError: the budget is negative.
    """
    if budget_bytes < 0:
        raise ValueError(f"expected a budget of at least 0 bytes, got {budget_bytes}")
    if is_unified(torch_module, device, root):
        return False
    # The fraction is of what mem_get_info calls total, not of the card around a MIG slice.
    _, total = torch_module.cuda.mem_get_info(device)
    fraction = min(1.0, budget_bytes / total)
    torch_module.cuda.set_per_process_memory_fraction(fraction, device)
    return True
