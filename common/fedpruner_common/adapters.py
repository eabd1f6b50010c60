"""Adapter tensor names: one canonical, global spelling, and PEFT's.

canonical   model.layers.7.self_attn.q_proj.lora_A
PEFT file   base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight
"""

from collections.abc import Iterable
from dataclasses import dataclass

_PREFIX = "base_model.model."
_SUFFIX = ".weight"


@dataclass(frozen=True)
class LoraTarget:
    """A linear module that carries a LoRA pair.

    Attributes:
        module: full name in the global model.
        in_features: columns of A.
        out_features: rows of B.
    """

    module: str
    in_features: int
    out_features: int

    def shapes(self, r: int) -> dict[str, tuple[int, int]]:
        """Canonical name -> shape of the two factors: A (r, in_features), B (out_features, r)."""
        return {
            f"{self.module}.lora_A": (r, self.in_features),
            f"{self.module}.lora_B": (self.out_features, r),
        }

    def num_parameters(self, r: int) -> int:
        return r * (self.in_features + self.out_features)


def adapter_shapes(targets: Iterable[LoraTarget], r: int) -> dict[str, tuple[int, int]]:
    """Canonical name -> shape of every adapter tensor of these modules, sorted by name."""
    shapes = {name: shape for target in targets for name, shape in target.shapes(r).items()}
    return dict(sorted(shapes.items()))


def to_peft(name: str) -> str:
    """Canonical name -> key in PEFT's adapter_model.safetensors."""
    return f"{_PREFIX}{name}{_SUFFIX}"


def from_peft(key: str) -> str:
    """Key in PEFT's file or state dict -> canonical name.

    Raises:
        ValueError: not a LoRA weight in PEFT's spelling.
    """
    name = key.removeprefix(_PREFIX).removesuffix(_SUFFIX)
    if to_peft(name) != key or not name.endswith((".lora_A", ".lora_B")):
        raise ValueError(f"{key!r} is not a LoRA weight in PEFT's spelling")
    return name
