"""The loss of a causal language model without the logits of all tokens at once.

The head is frozen, so a chunk of tokens' logits can go as soon as the gradient of these tokens'
hidden states is known, and that is known in the forward pass already. What is held is a chunk's
logits twice in float32, instead of all tokens' three times, and one more copy of the hidden states.

Source: METHOD.md 2.3 of the project's notes.
"""

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from fedpruner_common.errors import ModelError
from fedpruner_common.modeling.data import IGNORED
from fedpruner_common.modeling.forwards import replaced_forwards

Head = Callable[[torch.Tensor], torch.Tensor]


def causal_lm_loss(
    model: Any, batch_arguments: dict[str, torch.Tensor], *, chunk_tokens: int
) -> torch.Tensor:
    """Mean loss over the labelled tokens, nats, as `model(**batch_arguments).loss` has it.

    Like that, not a number where nothing is labelled.

    Args:
        model: a causal language model of transformers, or such a model with an adapter.
        batch_arguments: of the model's forward; `labels` among them, not yet shifted.
        chunk_tokens: labelled tokens whose logits exist at a time; 0 for the model's own loss.

    Raises:
        ModelError: the head has gradients of its own, or the model's loss is not only the tokens'.
    """
    if not chunk_tokens:
        loss: torch.Tensor = model(**batch_arguments).loss
        return loss
    causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
    decoder = causal_lm.get_decoder()
    if getattr(causal_lm.config, "output_router_logits", False):
        raise ModelError(
            "loss_chunk needs output_router_logits off: the loss of the routers is not in chunks"
        )
    if torch.is_grad_enabled():
        _refuse_trained_head(causal_lm, decoder)
    arguments = dict(batch_arguments)
    labels = arguments.pop("labels")
    # A cache is of no use here, and layers that are recomputed would add to it twice.
    output = decoder(**{"use_cache": False, **arguments})
    hidden = output.last_hidden_state
    head = _head(causal_lm, decoder, type(output))
    rows, targets = _labelled(labels)
    flat = hidden.reshape(-1, hidden.shape[-1])
    if torch.is_grad_enabled() and flat.requires_grad:
        function: Any = _ChunkedLoss
        total = function.apply(head, flat, rows, targets, chunk_tokens)
    else:
        total = _total_loss(head, flat, rows, targets, chunk_tokens, gradient=None)
    mean: torch.Tensor = total / len(rows)
    return mean


def _refuse_trained_head(causal_lm: nn.Module, decoder: nn.Module) -> None:
    within = set(decoder.modules())
    for path, module in causal_lm.named_modules():
        if module in within:
            continue
        for name, parameter in module.named_parameters(path, recurse=False):
            if parameter.requires_grad:
                raise ModelError(f"loss_chunk needs a frozen head, and {name} is to be trained")


def _labelled(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows of the flattened hidden states predict a labelled token, and these tokens."""
    following = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    rows = (following != IGNORED).nonzero().squeeze(1)
    return rows, following[rows]


def _head(causal_lm: Any, decoder: nn.Module, output_type: type) -> Head:
    """What the model makes of its decoder's output, in its own code: (rows, hidden) to logits.

    That may be more than a matrix: Gemma 2 caps its logits, Granite and Cohere scale them.
    """

    def head(rows: torch.Tensor) -> torch.Tensor:
        ids = torch.zeros(1, len(rows), dtype=torch.long, device=rows.device)
        asked = False

        def answer(*_args: Any, **_kwargs: Any) -> Any:
            nonlocal asked
            asked = True
            return output_type(last_hidden_state=rows[None])

        with replaced_forwards({decoder: answer}):
            logits: torch.Tensor = causal_lm(input_ids=ids).logits
        if not asked:
            raise ModelError(
                f"loss_chunk can't be used with {type(causal_lm).__name__}: "
                f"its head does not follow {type(decoder).__name__}"
            )
        return logits[0]

    return head


class _ChunkedLoss(torch.autograd.Function):
    """The summed loss, which saves nothing but its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        head: Head,
        hidden: torch.Tensor,
        rows: torch.Tensor,
        targets: torch.Tensor,
        chunk_tokens: int,
    ) -> torch.Tensor:
        gradient = torch.zeros_like(hidden)
        total = _total_loss(head, hidden, rows, targets, chunk_tokens, gradient=gradient)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return None, gradient * gradients[0].to(gradient.dtype), None, None, None


def _total_loss(
    head: Head,
    hidden: torch.Tensor,
    rows: torch.Tensor,
    targets: torch.Tensor,
    chunk_tokens: int,
    *,
    gradient: torch.Tensor | None,
) -> torch.Tensor:
    """Summed loss, a float32 scalar, of some rows of the hidden states.

    Args:
        head: from rows of hidden states to logits.
        hidden: (tokens, hidden).
        rows: indices of those with a loss.
        targets: the token each of them should predict.
        chunk_tokens: rows at a time.
        gradient: zeros like `hidden`, to be filled with the gradient; None: it is not needed.
    """
    total = torch.zeros((), device=hidden.device)
    for some, wanted in zip(rows.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
        chunk = hidden.detach()[some]
        if gradient is None:
            with torch.no_grad():
                total += _cross_entropy(torch.log_softmax(head(chunk).float(), dim=-1), wanted)
        else:
            loss, gradient[some] = _chunk_loss(head, chunk, wanted)
            total += loss
    return total


def _chunk_loss(
    head: Head, chunk: torch.Tensor, wanted: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss of a chunk's rows, and its gradient by them."""
    chunk.requires_grad_()
    with torch.enable_grad():
        logits = head(chunk)
    edge, dtype = get_gradient_edge(logits), logits.dtype
    slope = logits.detach().float()
    del logits  # backward needs the graph and not them
    slope = torch.log_softmax(slope, dim=-1)
    loss = _cross_entropy(slope, wanted)
    # By the logits, in place: the probabilities, less one for the wanted token.
    slope.exp_()
    slope[torch.arange(len(wanted), device=wanted.device), wanted] -= 1
    (gradient,) = torch.autograd.grad(edge, chunk, slope.to(dtype))
    return loss, gradient


def _cross_entropy(log_probabilities: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return nn.functional.nll_loss(log_probabilities, wanted, reduction="sum")
