"""What decoder layers are called with and return, and how to stand in for them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Forward = Callable[..., Any]
Beside = tuple[Any, ...] | None  # what a layer returns after the hidden states; None: no tuple
Compute = Callable[..., tuple[torch.Tensor, Beside]]  # (hidden, *args, **kwargs)


def split_call(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    """The hidden states a layer is called with, and its other arguments."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], (), {k: v for k, v in kwargs.items() if k != "hidden_states"}


def split_output(output: Any) -> tuple[torch.Tensor, Beside]:
    """The hidden states a layer or a half returns, and what it returns beside them."""
    return (output[0], output[1:]) if isinstance(output, tuple) else (output, None)


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states a layer or a half returns, alone or in a tuple."""
    return split_output(output)[0]


def joined(hidden: torch.Tensor, beside: Beside) -> Any:
    """What `split_output` took apart."""
    return hidden if beside is None else (hidden, *beside)


def padded(hidden: torch.Tensor, returns: int) -> Any:
    """Hidden states as the output of a module that returns so many values, 0 for a bare tensor."""
    return joined(hidden, (None,) * (returns - 1) if returns else None)


def as_forward(compute: Compute) -> Forward:
    """A layer's forward that leaves the work to `compute`."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden, args, kwargs = split_call(args, kwargs)
        return joined(*compute(hidden, *args, **kwargs))

    return forward


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Layers work by other forwards for the length of a `with` block; such blocks may be nested."""
    saved = {layer: layer.__dict__.get("forward") for layer in forwards}
    try:
        for layer, forward in forwards.items():
            layer.__dict__["forward"] = forward
        yield
    finally:
        for layer, before in saved.items():
            if before is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.__dict__["forward"] = before
