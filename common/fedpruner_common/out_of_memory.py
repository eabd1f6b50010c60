"""Whether an error means that memory ran out: torch says it in many ways.

torch is looked at only if it is loaded; without it there are no errors of its.
"""

import errno
import re
import sys

_SAID_BY_TORCH = re.compile(
    r"DefaultCPUAllocator: (can't allocate memory|not enough memory)"
    r"|unable to mmap \d+ bytes from file .*: Cannot allocate memory"
    r"|std::bad_alloc"
    r"|\b(CUDA|HIP) (error: )?out of memory"
    r"|\b(CU|HIP)BLAS_STATUS_ALLOC_FAILED"
    r"|\bCUDNN_STATUS_ALLOC_FAILED"
    # Without NVML (Jetson, some MIG slices) torch fails while it words its out-of-memory error:
    # https://github.com/pytorch/pytorch/issues/185240
    r"|NVML_SUCCESS == \S+ INTERNAL ASSERT FAILED at .*CUDACachingAllocator",
    re.DOTALL,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether less memory would have avoided the error, on the CPU or on a GPU."""
    if isinstance(error, (MemoryError, *_torch_errors())):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and bool(_SAID_BY_TORCH.search(str(error)))


def _torch_errors() -> tuple[type[BaseException], ...]:
    """torch's own error, which older versions know under `torch.cuda` only."""
    torch = sys.modules.get("torch")
    owners = (torch, getattr(torch, "cuda", None))
    found = (getattr(owner, "OutOfMemoryError", None) for owner in owners)
    return tuple(error for error in found if isinstance(error, type))
