"""Bridges: small frozen maps that stand in for runs of dropped components.

For the residual stream x at the first dropped component, a bridge adds what the run would have:

    scale     s x                      one number
    lowrank   U V' rms(x) + c          2 d r + d numbers
    full      W rms(x) + c             d d + d numbers

They are fitted by ridge regression on hidden states of the full model with its current adapter, so
the job of replacing the missing layers is done before LoRA trains, and LoRA sees the task only.

Source: METHOD.md 2.5 of the project's notes; the scale is Prune&Comp's.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fedpruner_common.errors import ModelError
from fedpruner_common.modeling.streaming import drop_pages
from fedpruner_common.task import BridgeKind

_RIDGE = 1e-2  # times the mean of the diagonal
_EPS = 1e-6
_KEYS = {
    BridgeKind.SCALE: ("scale",),
    BridgeKind.LOWRANK: ("bias", "down", "up"),
    BridgeKind.FULL: ("bias", "weight"),
}


class Bridge(nn.Module):
    """What is added to the residual stream in place of one run.

    Attributes:
        gain: what the layer multiplies a block's output with before adding it (1 in most models).
        offset: added besides: what the bridge misses on each token of the current batch,
            (batch, seq_len, hidden_size) or None. See `fitting`.
        in_file: the offset is a mapping of a file, whose pages need not stay after their use.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], *, gain: float = 1.0) -> None:
        """From the tensors of `BridgeKind`'s formula.

        Args:
            tensors: `scale` (1,); or `down` (r, d), `up` (d, r), `bias` (d,); or `weight` (d, d),
                `bias` (d,).
            gain: see above.
        """
        super().__init__()
        for name, value in tensors.items():
            self.register_buffer(name, value, persistent=False)
        self.kind = kind_of(tensors)
        self.gain = gain
        self.offset: torch.Tensor | None = None
        self.in_file = False

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """What to add to `hidden`, of the same shape."""
        added = self.estimate(hidden)
        if self.offset is not None:
            added = added + self.offset.reshape(added.shape)  # some layers flatten their tokens
            if self.in_file:
                drop_pages(self.offset)
        return added / self.gain if self.gain != 1.0 else added

    def estimate(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the run adds to the residual stream, as far as the bridge knows."""
        get = self.get_buffer
        if self.kind is BridgeKind.SCALE:
            return hidden * get("scale").to(hidden.dtype)
        x = nn.functional.rms_norm(hidden, hidden.shape[-1:], eps=_EPS)
        if self.kind is BridgeKind.LOWRANK:
            x = nn.functional.linear(x, get("down").to(x.dtype))
            return nn.functional.linear(x, get("up").to(x.dtype), get("bias").to(x.dtype))
        return nn.functional.linear(x, get("weight").to(x.dtype), get("bias").to(x.dtype))


def kind_of(tensors: Mapping[str, torch.Tensor]) -> BridgeKind:
    """Which kind of bridge these tensors make.

    Raises:
        ModelError: none.
    """
    for kind, keys in _KEYS.items():
        if tuple(sorted(tensors)) == keys:
            return kind
    raise ModelError(f"a bridge cannot have the tensors {sorted(tensors)}")


class Moments:
    """Sums over tokens from which every kind of bridge is solved; float64, d x d."""

    def __init__(self, hidden_size: int) -> None:
        self._xx = torch.zeros(hidden_size + 1, hidden_size + 1, dtype=torch.float64)
        self._xt = torch.zeros(hidden_size + 1, hidden_size, dtype=torch.float64)
        self._hh = self._ht = 0.0

    def add(self, hidden: torch.Tensor, added: torch.Tensor) -> None:
        """Take note of tokens.

        Args:
            hidden: what the bridge will see, (..., d).
            added: what it should add, (..., d).
        """
        h, t = (v.detach().flatten(0, -2).to("cpu", torch.float64) for v in (hidden, added))
        x = nn.functional.rms_norm(h, h.shape[-1:], eps=_EPS)
        x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)  # (tokens, d + 1)
        self._xx += x.T @ x
        self._xt += x.T @ t
        self._hh += float((h * h).sum())
        self._ht += float((h * t).sum())

    def solve(self, kind: BridgeKind, *, rank: int) -> dict[str, torch.Tensor]:
        """The bridge's tensors, float32.

        Low rank keeps the directions of the output in which the full solution acts most on these
        tokens, not the largest singular values of the map itself.

        Args:
            kind: which bridge.
            rank: of `lowrank`.
        """
        if kind is BridgeKind.SCALE:
            return {"scale": torch.tensor([self._ht / max(self._hh, 1e-30)])}
        size = len(self._xx)
        ridge = _RIDGE * self._xx.diagonal().mean().clamp(min=1e-12)
        solution = torch.linalg.solve(
            self._xx + ridge * torch.eye(size, dtype=torch.float64), self._xt
        )
        weight, bias = solution[:-1], solution[-1].float()  # (d_in, d_out)
        if kind is BridgeKind.FULL:
            return {"weight": weight.T.float().contiguous(), "bias": bias}
        outputs = weight.T @ self._xx[:-1, :-1] @ weight  # (d_out, d_out)
        _, vectors = torch.linalg.eigh(outputs)
        up = vectors[:, max(0, len(vectors) - rank) :]  # (d_out, r), largest last
        down = (weight @ up).T  # (r, d_in)
        return {"down": down.float().contiguous(), "up": up.float().contiguous(), "bias": bias}


def save_bridges(bridges: Sequence[Mapping[str, torch.Tensor]], path: Path) -> None:
    """Write the bridges of a submodel, in the order of its dropped runs."""
    tensors = {
        f"{run}.{name}": value.contiguous()
        for run, bridge in enumerate(bridges)
        for name, value in bridge.items()
    }
    save_file(tensors, path)


def load_bridges(path: Path, *, num_runs: int, hidden_size: int) -> list[dict[str, torch.Tensor]]:
    """The bridges in a file of `save_bridges`.

    Raises:
        ModelError: it does not hold exactly one well-formed bridge per run.
    """
    try:
        tensors = load_file(path)
    except Exception as error:  # safetensors has an exception of its own
        raise ModelError(f"the bridges cannot be read: {error}") from error
    bridges: dict[str, dict[str, torch.Tensor]] = {str(run): {} for run in range(num_runs)}
    for key, value in tensors.items():
        run, _, name = key.partition(".")
        if run not in bridges:
            raise ModelError(f"a bridge for run {run[:20]!r}: the submodel has {num_runs} runs")
        bridges[run][name] = value
    for run, bridge in bridges.items():
        if not bridge:
            raise ModelError(f"there is no bridge for run {run} of {num_runs}")
        _check(bridge, hidden_size)
    return list(bridges.values())


def _check(bridge: Mapping[str, torch.Tensor], hidden_size: int) -> None:
    kind_of(bridge)
    rank = bridge["down"].shape[0] if "down" in bridge and bridge["down"].dim() else 0
    shapes = {
        "scale": (1,),
        "bias": (hidden_size,),
        "down": (rank, hidden_size),
        "up": (hidden_size, rank),
        "weight": (hidden_size, hidden_size),
    }
    for name, value in bridge.items():
        found = f"{value.dtype} {tuple(value.shape)}"
        if value.dtype != torch.float32 or tuple(value.shape) != shapes[name]:
            raise ModelError(
                f"bridge tensor {name} should be torch.float32 {shapes[name]}, got {found}"
            )
        if not torch.isfinite(value).all():
            raise ModelError(f"bridge tensor {name} holds a value that is not finite")
