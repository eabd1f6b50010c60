"""One layer resident at a time: run and train a model whose weights do not fit.

The model is loaded as memory mappings of its files, which costs no memory until pages are touched.
A streamed layer brings its weights in for its forward, and again for its backward, which recomputes
the layer from its input; after each it lets them go. What is held is one layer, the layers'
inputs and the adapter, and the function is exactly the full model's. The price is time: the weights
are read once per forward and once more per backward.

Source: METHOD.md 2.9 of the project's notes.
"""

import ctypes
import mmap
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from fedpruner_common.errors import ModelError
from fedpruner_common.modeling.forwards import (
    Beside,
    joined,
    replaced_forwards,
    split_call,
    split_output,
)
from fedpruner_common.modeling.meta import decoder_layers

_MADV_DONTNEED = 4


class Weights:
    """The frozen parameters of one layer: mapped while it rests, in memory while it works.

    Where the mapping's own dtype and device are the ones to compute with, the layer computes on the
    mapping, and letting go gives its pages back. Otherwise it computes on a copy.
    """

    def __init__(
        self,
        layer: nn.Module,
        mapped: Collection[int],
        *,
        dtype: torch.dtype | None,
        device: torch.device,
    ) -> None:
        """Take over the layer's frozen parameters.

        Args:
            layer: a decoder layer, its frozen parameters in mapped files.
            mapped: addresses of storages that are private mappings of files.
            dtype: to compute with; None: each parameter's own.
            device: to compute with.

        Raises:
            ModelError: a parameter is not in a mapped file, so that letting go of it would lose it.
        """
        self._dtype, self._device = dtype, device
        self._resting = [(p, p.data) for p in layer.parameters() if not p.requires_grad]
        for name, parameter in layer.named_parameters():
            if not parameter.requires_grad and _address(parameter) not in mapped:
                raise ModelError(
                    f"{name} is converted while it is loaded and can't be streamed from its file"
                )
        self._copied = any(
            data.dtype != (dtype or data.dtype) or data.device != device
            for _, data in self._resting
        )
        self._holders = 0
        self.num_bytes = sum(data.nbytes for _, data in self._resting)
        self.bytes_read = 0

    @contextmanager
    def held(self) -> Iterator[None]:
        """The weights are ready to compute with for the length of a `with` block.

        Blocks may be nested: the outermost one brings the weights in and lets them go.
        """
        self._holders += 1
        try:
            if self._holders == 1:
                self._bring_in()
            yield
        finally:
            self._holders -= 1
            if not self._holders:
                self._let_go()

    def _bring_in(self) -> None:
        self.bytes_read += self.num_bytes
        if self._copied:
            for parameter, data in self._resting:
                parameter.data = data.to(self._device, self._dtype or data.dtype)
                drop_pages(data)

    def _let_go(self) -> None:
        if self._copied:
            for parameter, data in self._resting:
                parameter.data = data
        for _, data in self._resting:
            drop_pages(data)


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def drop_pages(tensor: torch.Tensor) -> None:
    """Give back the resident pages of a tensor in a privately mapped file.

    The next access reads them from the file again, so nothing may ever have been written to it.
    Only whole pages within the tensor are dropped: what shares a page with it may be anything.
    """
    start, length = tensor.data_ptr(), tensor.nbytes
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (start + length) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first and _madvise is not None:
        _madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_DONTNEED)


def _find_madvise() -> Callable[..., int] | None:
    try:
        function: Callable[..., int] = ctypes.CDLL(None, use_errno=True).madvise
    except (OSError, AttributeError):
        return None  # then the kernel alone decides when clean pages go
    return function


_madvise = _find_madvise()


def _get_random_state(device: torch.device) -> torch.Tensor:
    """Of the generator that dropout on this device draws from."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(state: torch.Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


@contextmanager
def _random_state(state: torch.Tensor, device: torch.device) -> Iterator[None]:
    """Draw as if from an earlier state for the length of a `with` block."""
    later = _get_random_state(device)
    _set_random_state(state, device)
    try:
        yield
    finally:
        _set_random_state(later, device)


class _Recomputed(torch.autograd.Function):
    """A layer that saves its input only and is computed again, weights brought in, for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[[torch.Tensor], torch.Tensor],
        weights: Weights,
        hidden: torch.Tensor,
        *trained: torch.Tensor,
    ) -> torch.Tensor:
        ctx.run, ctx.weights, ctx.trained = run, weights, trained
        ctx.save_for_backward(hidden)
        ctx.random_state = _get_random_state(hidden.device)  # LoRA's dropout must drop the same
        with weights.held():
            return run(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (hidden,) = ctx.saved_tensors
        inputs = hidden.detach().requires_grad_(ctx.needs_input_grad[2])
        wanted = [inputs] if inputs.requires_grad else []
        with ctx.weights.held():
            with _random_state(ctx.random_state, hidden.device), torch.enable_grad():
                output = ctx.run(inputs)
            found = torch.autograd.grad(
                output, [*wanted, *ctx.trained], gradients[0], allow_unused=True
            )
        gradient = (found[0],) if wanted else (None,)
        return (None, None, *gradient, *found[len(wanted) :])


class _StreamedForward:
    """Stands in for a layer's own `forward`."""

    def __init__(self, layer: nn.Module, weights: Weights) -> None:
        self._forward = layer.forward
        self._layer = layer
        self.weights = weights

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden, args, kwargs = split_call(args, kwargs)
        beside: Beside = None

        def run(value: torch.Tensor) -> torch.Tensor:
            nonlocal beside
            output, beside = split_output(self._forward(value, *args, **kwargs))
            return output

        # Asked each time: of an adapter, one factor may have been frozen since.
        trained = [p for p in self._layer.parameters() if p.requires_grad]
        if torch.is_grad_enabled() and (trained or hidden.requires_grad):
            recomputed: Any = _Recomputed
            out = recomputed.apply(run, self.weights, hidden, *trained)
        else:
            with self.weights.held():
                out = run(hidden)
        return joined(out, beside)


@contextmanager
def streaming(
    model: nn.Module,
    layers: Iterable[int],
    mapped: Iterable[torch.Tensor],
    *,
    dtype: torch.dtype | None,
    device: torch.device,
) -> Iterator[None]:
    """Within a `with` block, these layers are brought in for their work and let go after it.

    Args:
        model: its layers' frozen parameters are mappings (see `load_submodel`); adapters may be in
            place, and train.
        layers: indices of the layers to stream.
        mapped: the mappings (see `map_tensor`).
        dtype: to compute with; None: as each parameter is stored.
        device: to compute with.

    Raises:
        ModelError: a layer's weights are not mappings of files.
    """
    addresses = {_address(tensor) for tensor in mapped}
    stack = decoder_layers(model)
    forwards = {
        layer: _StreamedForward(layer, Weights(layer, addresses, dtype=dtype, device=device))
        for layer in (stack[index] for index in layers)
    }
    with replaced_forwards(forwards):
        yield


def _weights(layer: nn.Module) -> Weights | None:
    forward = layer.__dict__.get("forward")
    return forward.weights if isinstance(forward, _StreamedForward) else None


@contextmanager
def holding(layer: nn.Module) -> Iterator[None]:
    """Read a streamed layer's weights once for all that is done with it within a `with` block.

    A layer that is not streamed is there anyway.
    """
    weights = _weights(layer)
    with weights.held() if weights else nullcontext():
        yield


def bytes_read(model: nn.Module) -> int:
    """Bytes of weights that the streamed layers have brought in so far."""
    found = (_weights(layer) for layer in decoder_layers(model))
    return sum(weights.bytes_read for weights in found if weights)
