"""Proof that a traced anatomy is right, before anything relies on it."""

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from fedpruner_common.errors import ModelError
from fedpruner_common.modeling.anatomy import LayerAnatomy, trace_anatomy
from fedpruner_common.modeling.meta import decoder_layers, meta_model
from fedpruner_common.modeling.stubs import bare_layer, run_bare


def find_anatomy(config: PreTrainedConfig) -> list[LayerAnatomy]:
    """The anatomy of every layer, proved by `check`.

    Raises:
        ModelError: the layers are laid out in a way that cannot be pruned by halves.
    """
    model = meta_model(config)
    anatomy = trace_anatomy(model)
    check(model, anatomy)
    return anatomy


def check(model: PreTrainedModel, anatomy: list[LayerAnatomy]) -> None:
    """Prove the anatomy: a layer with both halves stubbed must return its input exactly.

    Costs nothing, since such a layer has no weights left.

    Raises:
        ModelError: it does not; this model can't be pruned by halves.
    """
    hidden_size = model.config.get_text_config(decoder=True).hidden_size
    for index, (layer, parts) in enumerate(zip(decoder_layers(model), anatomy, strict=True)):
        name = f"{type(layer).__name__} {index}"
        if any(half.adds_residual for half in parts.halves.values()):
            raise ModelError(
                f"{name} adds the residual inside a block and can't be pruned by halves"
            )
        bare = bare_layer(layer, parts)
        left = [parameter for parameter, _ in bare.named_parameters()]
        if left:
            raise ModelError(f"{name} has parameters outside both halves: {', '.join(left)}")
        x = torch.randn(2, 3, hidden_size)
        try:
            y = run_bare(bare, x)
        except Exception as error:
            raise ModelError(f"{name} can't run without its blocks: {error}") from error
        if not torch.equal(x, y):
            raise ModelError(f"{name} without its blocks is not the identity")
