"""What a task is made of, by name, size and content hash."""

import math
import re
from dataclasses import dataclass

# safetensors dtype -> bytes per element. Sub-byte and exotic types are not trained on.
ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}

_HASH = re.compile(r"[0-9a-f]{64}")


def is_content_hash(text: str) -> bool:
    """Whether a text can be a BLAKE3 in hex; hashes become file names."""
    return _HASH.fullmatch(text) is not None


@dataclass(frozen=True)
class TensorInfo:
    """One base tensor.

    Attributes:
        name: as in the base checkpoint.
        dtype: safetensors spelling, one of `ITEM_BYTES`.
        shape: of the tensor; empty for a scalar.
        num_bytes: length of the data.
        hash: BLAKE3 of the data, hex.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    hash: str

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"tensor {self.name}: unknown dtype {self.dtype!r}")
        if any(side < 0 for side in self.shape):
            raise ValueError(f"tensor {self.name}: negative shape {list(self.shape)}")
        if math.prod(self.shape) * ITEM_BYTES[self.dtype] != self.num_bytes:
            raise ValueError(
                f"tensor {self.name}: {self.dtype} of shape {list(self.shape)} "
                f"is not {self.num_bytes} bytes"
            )


@dataclass(frozen=True)
class FileInfo:
    """One small file of the model directory: config or tokenizer."""

    name: str
    num_bytes: int
    hash: str
