"""Local training: LoRA on the submodel, AdamW, a fixed number of steps."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch

from fedpruner_client.loss import causal_lm_loss
from fedpruner_client.optimizer import make_optimizer
from fedpruner_common.errors import FedPrunerError
from fedpruner_common.modeling.data import Batch, TokenSequence, collate
from fedpruner_common.task import TrainingSettings

OnStep = Callable[[int, float], None]
OnBatch = Callable[[int], None]


@dataclass(frozen=True)
class TrainingResult:
    """What one local training did.

    Attributes:
        num_tokens: tokens with loss that were trained on.
        loss_first, loss_last: mean loss of the first and last optimizer step, nats per token.
    """

    num_tokens: int
    loss_first: float
    loss_last: float


def train(
    model: Any,
    sequences: list[TokenSequence],
    settings: TrainingSettings,
    *,
    order: str,
    pad_token_id: int,
    device: torch.device,
    on_step: OnStep,
    on_batch: OnBatch = lambda _: None,
) -> TrainingResult:
    """Train the model's adapter in place for `max_steps` optimizer steps.

    The optimizer starts fresh: its moments belong to this device's submodel of this round. With
    `proximal_mu`, the adapter is pulled towards where it started (FedProx, Li et al. 2020).

    Args:
        model: with an adapter; only that has gradients.
        sequences: the device's data.
        settings: of the task.
        order: seeds the order of the data; the same text gives the same batches.
        pad_token_id: to pad shorter sequences with.
        device: where the model is.
        on_step: called after every step with its number, from 1, and its loss.
        on_batch: called before every micro-batch with its index, from 0, as `batches` orders them.

    Raises:
        FedPrunerError: the loss is not finite.
    """
    torch.manual_seed(settings.seed)
    parameters = _trainable(model, settings)
    proximal = _Proximal(parameters, settings.proximal_mu)
    optimizer = make_optimizer(parameters, settings)
    endless = _endless_batches(sequences, settings, order=order, pad_token_id=pad_token_id)
    num_tokens, num_batches, losses = 0, 0, []
    for step in range(1, settings.max_steps + 1):
        micro = list(islice(endless, settings.gradient_accumulation_steps))
        step_tokens = max(1, sum(batch.num_tokens for batch in micro))
        step_loss = 0.0
        for batch in micro:
            on_batch(num_batches)
            num_batches += 1
            # Every token weighs the same, whichever micro-batch it is in.
            loss = causal_lm_loss(model, batch.arguments(device), chunk_tokens=settings.loss_chunk)
            loss = loss * (batch.num_tokens / step_tokens)
            loss.backward()
            step_loss += loss.item()
            del loss
        if not torch.isfinite(torch.tensor(step_loss)):
            raise FedPrunerError(
                f"the loss became {step_loss} in step {step}: lower learning_rate?"
            )
        proximal.add_gradients()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm, foreach=False)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        num_tokens += step_tokens
        losses.append(step_loss)
        on_step(step, step_loss)
    return TrainingResult(num_tokens, losses[0], losses[-1])


def dry_run(
    model: Any,
    sequences: list[TokenSequence],
    settings: TrainingSettings,
    *,
    pad_token_id: int,
    device: torch.device,
) -> None:
    """Go through one optimizer step at full length, so that its peak is known; changes nothing.

    The device's own sequences may be short today and long tomorrow. The optimizer's moments are
    there before the activations come, as from the second real step on.
    """
    some = torch.cat([s.input_ids for s in sequences[: settings.max_seq_length]])
    ids = some.repeat(-(-settings.max_seq_length // len(some)))[: settings.max_seq_length]
    longest = [TokenSequence(ids, ids)] * settings.per_device_train_batch_size
    batch = collate(longest, pad_token_id=pad_token_id)
    parameters = _trainable(model, settings)
    optimizer = make_optimizer(parameters, replace(settings, learning_rate=0.0, weight_decay=0.0))
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    arguments = batch.arguments(device)
    causal_lm_loss(model, arguments, chunk_tokens=settings.loss_chunk).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _trainable(model: Any, settings: TrainingSettings) -> list[torch.nn.Parameter]:
    """What trains; the model is made ready for it."""
    if settings.gradient_checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    _freeze_factor(model, settings.train_factor)
    return [p for p in model.parameters() if p.requires_grad]


def _freeze_factor(model: torch.nn.Module, train_factor: str) -> None:
    """Leave one of the two LoRA factors as it is, if only the other is to train."""
    frozen = {"A": ".lora_B.", "B": ".lora_A."}.get(train_factor)
    for name, parameter in model.named_parameters():
        if frozen and frozen in name:
            parameter.requires_grad_(False)


class _Proximal:
    """The gradient of mu / 2 times the squared distance from where training started."""

    def __init__(self, parameters: list[torch.nn.Parameter], mu: float) -> None:
        self._mu = mu
        self._pairs = [(p, p.detach().clone()) for p in parameters] if mu else []

    def add_gradients(self) -> None:
        for parameter, start in self._pairs:
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - start, alpha=self._mu)


def batches(
    sequences: list[TokenSequence], settings: TrainingSettings, *, order: str, pad_token_id: int
) -> list[Batch]:
    """Every micro-batch of a round, in the order in which `train` takes them."""
    count = settings.max_steps * settings.gradient_accumulation_steps
    endless = _endless_batches(sequences, settings, order=order, pad_token_id=pad_token_id)
    return list(islice(endless, count))


def _endless_batches(
    sequences: list[TokenSequence], settings: TrainingSettings, *, order: str, pad_token_id: int
) -> Iterator[Batch]:
    """Batches without end: shuffled, each sequence once before any comes again."""
    rng = random.Random(order)
    size = settings.per_device_train_batch_size
    queue: list[TokenSequence] = []
    while True:
        while len(queue) < size:
            queue.extend(rng.sample(sequences, len(sequences)))
        yield collate(queue[:size], pad_token_id=pad_token_id)
        del queue[:size]
