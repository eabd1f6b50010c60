"""glibc's allocator, set for what a process does. A no-op on other C libraries.

glibc moves its mmap threshold up to 32 MiB as it sees large blocks freed. That puts activations on
a heap it cannot give back: peaks of training were 1.1 to 10 times the bytes really in use. With a
fixed low threshold every large block is a mapping of its own and returns when freed. Moving 1 MiB
wire messages wants the opposite: no mmap and page faults per message.
"""

import ctypes

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_TRAINING_MMAP_BYTES = 1 << 17  # up to 256 KiB measured alike; from 1 MiB on peaks grow
_WIRE_BYTES = 256 << 20  # set both or neither: trim alone is harmful


def _mallopt(parameter: int, value: int) -> None:
    try:
        ctypes.CDLL(None).mallopt(parameter, value)
    except (AttributeError, OSError):  # not glibc
        return


def set_for_training() -> None:
    """Call in the training process before torch is imported."""
    _mallopt(_M_MMAP_THRESHOLD, _TRAINING_MMAP_BYTES)


def trim() -> None:
    """Give every free page of the heap back to the system, after a phase that used much of it."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):  # not glibc
        return


def set_for_wire() -> None:
    """Call first thing in a process that moves tensors over gRPC."""
    _mallopt(_M_MMAP_THRESHOLD, _WIRE_BYTES)
    _mallopt(_M_TRIM_THRESHOLD, _WIRE_BYTES)
    # Messages are made in one thread and freed in another: with an arena per thread each of them
    # keeps what it once had. An agent that receives 1 GB peaked at 62 MB instead of 119 to 126.
    _mallopt(_M_ARENA_MAX, 1)
