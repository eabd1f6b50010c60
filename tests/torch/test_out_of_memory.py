"""Errors for lack of memory, the real ones where this machine can provoke them."""

import errno
import subprocess
import sys

import pytest
import torch

from fedpruner_common.out_of_memory import is_out_of_memory

HUGE = 1 << 40

# Under a limit on its data the process asks in turn for 1 TiB in every way that training does.
PROVOKED = f"""
import mmap, resource, tempfile
import torch
from fedpruner_common.out_of_memory import is_out_of_memory

file = tempfile.TemporaryFile()
file.truncate({HUGE})
_, hard = resource.getrlimit(resource.RLIMIT_DATA)
resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, hard))
path = f"/proc/self/fd/{{file.fileno()}}"
WAYS = dict(
    tensor=lambda: torch.empty({HUGE}, dtype=torch.uint8),
    copy=lambda: torch.zeros(1 << 10).repeat(1 << 28),
    file=lambda: torch.UntypedStorage.from_file(path, False, {HUGE}),
    python=lambda: bytearray({HUGE}),
    mmap=lambda: mmap.mmap(-1, {HUGE}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS),
)
for name, way in WAYS.items():
    try:
        way()
    except BaseException as error:
        print(name, type(error).__name__, is_out_of_memory(error), error)
"""


@pytest.fixture(scope="module")
def provoked() -> dict[str, list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", PROVOKED], capture_output=True, text=True, check=True, timeout=120
    )
    lines = (line.split(maxsplit=3) for line in done.stdout.splitlines())
    return {way: rest for way, *rest in lines}


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_DATA as Linux counts it")
@pytest.mark.parametrize(
    ("way", "kind"),
    [
        ("tensor", "RuntimeError"),
        ("copy", "RuntimeError"),
        ("file", "RuntimeError"),
        ("python", "MemoryError"),
        ("mmap", "OSError"),
    ],
)
def test_a_real_refusal_of_memory_is_recognised(
    provoked: dict[str, list[str]], way: str, kind: str
) -> None:
    assert provoked[way][:2] == [kind, "True"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.cuda.OutOfMemoryError("no matter what it says"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronous"),
        RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
            "memory: you tried to allocate 8 bytes. Error code 12 (Cannot allocate memory)"
        ),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: "
            "you tried to allocate 8 bytes."
        ),
        RuntimeError("unable to mmap 8 bytes from file </a b>: Cannot allocate memory (12)"),
        RuntimeError("std::bad_alloc"),
        RuntimeError(
            'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/pytorch/c10/cuda/'
            'CUDACachingAllocator.cpp":995, please report a bug to PyTorch.'
        ),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=lambda error: f"{type(error).__name__} {error}"[:50],
)
def test_every_way_to_say_it_is_recognised(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED"),
        RuntimeError("unable to mmap 8 bytes from file </a>: No such device (19)"),
        RuntimeError("NVML_SUCCESS == r INTERNAL ASSERT FAILED at elsewhere.cpp"),
        RuntimeError("can't start new thread"),
        RuntimeError(""),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("Cannot allocate memory"),
        ValueError("CUDA out of memory"),
        KeyError("DefaultCPUAllocator: can't allocate memory"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: f"{type(error).__name__} {error}"[:50],
)
def test_nothing_else_is(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_it_works_where_torch_is_not_loaded() -> None:
    program = (
        "import sys\n"
        "from fedpruner_common.out_of_memory import is_out_of_memory\n"
        "assert is_out_of_memory(MemoryError()) and not is_out_of_memory(RuntimeError('x'))\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
