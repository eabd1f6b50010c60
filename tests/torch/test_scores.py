"""Every statistic of the probe: streamed against resident, and against other ways to compute it."""

import math
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from streaming_support import resident, streamed
from torch_support import (
    ARCHITECTURES,
    TinyModel,
    difference,
    hooked_off,
    module_at,
    random_ids,
)

from fedpruner_common.components import Kind
from fedpruner_common.errors import ModelError
from fedpruner_common.modeling.check import find_anatomy
from fedpruner_common.modeling.data import Batch, TokenSequence, collate
from fedpruner_common.modeling.meta import decoder_layers
from fedpruner_common.modeling.probe import probe
from fedpruner_common.modeling.stubs import skipping
from fedpruner_common.statistics import Family, Score, Statistics

FAMILIES = tuple(Family)
LENGTHS = ((20, 13, 20), (16, 9))  # so that some batches are padded, and not equally long
LAYERS = range(5)


def sequences() -> list[list[TokenSequence]]:
    return [
        [
            TokenSequence.of(ids := random_ids(length, seed=10 * group + row).tolist(), ids)
            for row, length in enumerate(lengths)
        ]
        for group, lengths in enumerate(LENGTHS)
    ]


def batches() -> list[Batch]:
    return [collate(group, pad_token_id=0) for group in sequences()]


def run(tiny: TinyModel, model: Any, score: Score, *, seed: int = 1, **options: Any) -> Statistics:
    anatomy = find_anatomy(tiny.architecture.config)
    options = {"families": FAMILIES, **options}
    return probe(model, anatomy, batches(), score=score, rng=np.random.default_rng(seed), **options)


def mean_loss(model: Any) -> float:
    """Nats per token of all batches, by the model's own loss."""
    with torch.no_grad():
        found = [(model(**b.arguments(torch.device("cpu"))).loss.item(), b) for b in batches()]
    return sum(loss * b.num_tokens for loss, b in found) / sum(b.num_tokens for _, b in found)


def precise_loss(model: Any) -> float:
    """As `mean_loss`, in float64 from the logits on."""
    total, count = 0.0, 0
    for batch in batches():
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids).logits.double()[:, :-1].flatten(0, 1)
        labels = batch.labels[:, 1:].flatten()
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        count += int((labels >= 0).sum())
    return total / count


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_a_streamed_model_has_exactly_the_statistics_of_the_resident_one(
    zoo: Callable[[str], TinyModel], name: str, adapter: bool
) -> None:
    tiny = zoo(name)
    scores = [score for score in Score if adapter or score is not Score.FISHER]
    whole = resident(tiny, adapter=adapter)
    with streamed(tiny, adapter=adapter) as model:
        for score in scores:
            a, b = run(tiny, model, score), run(tiny, whole, score)
            for family in FAMILIES:
                one, two = a.families[family], b.families[family]
                assert np.array_equal(one.similarity, two.similarity), (score, family)
                assert one.importance == two.importance, (score, family)
                assert len(set(one.importance)) > 1
            assert a.cost
            assert b.cost
            assert a.cost.loss_full == b.cost.loss_full


def test_an_adapter_changes_every_score_that_looks_at_the_function(llama: TinyModel) -> None:
    for score in (Score.BI, Score.ANGULAR, Score.LOO, Score.GATE_TAYLOR):
        a = run(llama, resident(llama, adapter=True), score).families
        b = run(llama, resident(llama, adapter=False), score).families
        for family in FAMILIES:
            assert a[family].importance != pytest.approx(b[family].importance, rel=1e-3)


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_one_sweep_leaves_out_every_item_as_skipping_them_one_by_one_does(
    zoo: Callable[[str], TinyModel], name: str
) -> None:
    tiny = zoo(name)
    model = resident(tiny, adapter=name != "gpt2")
    anatomy = find_anatomy(tiny.architecture.config)
    intact = mean_loss(model)
    found = run(tiny, model, Score.LOO)
    assert found.cost
    assert found.cost.loss_full == pytest.approx(intact, abs=1e-6)
    for family in FAMILIES:
        expected = []
        for layer in LAYERS:
            with skipping(model, anatomy, {layer: family.kinds}):
                expected.append(mean_loss(model) - intact)
        assert found.families[family].importance == pytest.approx(expected, abs=1e-6)
        assert max(map(abs, expected)) > 1e-3


@pytest.mark.parametrize("families", [(Family.LAYER,), (Family.ATTENTION, Family.FFN)])
def test_sleb_removes_what_is_missed_least_again_and_again(
    llama: TinyModel, families: tuple[Family, ...]
) -> None:
    model = llama.reference
    left = [(family, layer) for family in families for layer in (1, 2, 3)]
    removed: dict[int, frozenset[Kind]] = {}
    expected = {family: [1.0] * 5 for family in families}
    num_items = len(left)
    for place in range(1, num_items + 1):
        losses = []
        for family, layer in left:
            trial = {**removed, layer: removed.get(layer, frozenset()) | family.kinds}
            with hooked_off(model, llama.architecture, trial):
                losses.append(mean_loss(model))
        family, layer = left.pop(int(np.argmin(losses)))
        removed[layer] = removed.get(layer, frozenset()) | family.kinds
        expected[family][layer] = place / (num_items + 1)
    found = run(llama, resident(llama, adapter=False), Score.SLEB, families=families)
    for family in families:
        assert found.families[family].importance == pytest.approx(expected[family])


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_angular_distance_is_the_angle_at_the_last_token_of_each_sequence(
    zoo: Callable[[str], TinyModel], name: str
) -> None:
    tiny = zoo(name)
    found = run(tiny, resident(tiny, adapter=False), Score.ANGULAR).families
    model, architecture = tiny.full(), tiny.architecture
    seen: dict[tuple[int, str], torch.Tensor] = {}

    def note(key: tuple[int, str], tensor: torch.Tensor) -> None:
        seen[key] = tensor[0, -1].double()

    for i in LAYERS:
        layer = module_at(model, f"{architecture.stack}.{i}")
        layer.register_forward_pre_hook(lambda _m, args, i=i: note((i, "in"), args[0]))
        layer.register_forward_hook(lambda _m, _a, output, i=i: note((i, "out"), output))
        getattr(layer, architecture.attention).register_forward_hook(
            lambda _m, _a, o, i=i: note((i, "attention"), o[0] if isinstance(o, tuple) else o)
        )
    angles: dict[Family, list[list[float]]] = {family: [] for family in FAMILIES}
    for sequence in [*sequences()[0], *sequences()[1]]:  # each alone: no padding
        with torch.no_grad():
            model(input_ids=sequence.input_ids.long()[None])
        middles = [seen[i, "in"] + seen[i, "attention"] for i in LAYERS]
        pairs = {
            Family.LAYER: [(seen[i, "in"], seen[i, "out"]) for i in LAYERS],
            Family.ATTENTION: [(seen[i, "in"], middles[i]) for i in LAYERS],
            Family.FFN: [(middles[i], seen[i, "out"]) for i in LAYERS],
        }
        for family, vectors in pairs.items():
            angles[family].append(
                [math.acos(a @ b / math.sqrt(a @ a * (b @ b))) / math.pi for a, b in vectors]
            )
    for family in FAMILIES:
        expected = np.mean(angles[family], axis=0)
        assert found[family].importance == pytest.approx(expected, abs=1e-5)


@contextmanager
def scaled(model: Any, tiny: TinyModel, family: Family, layer: int, alpha: float) -> Any:
    """x + alpha f(x) in place of x + f(x), by hooks on the modules the zoo names by hand."""
    block = module_at(model, f"{tiny.architecture.stack}.{layer}")

    def scale_layer(_: Any, args: Any, output: Any) -> Any:
        return args[0] + alpha * (output - args[0])

    def scale_half(_m: Any, _a: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (alpha * output[0], *output[1:])
        return alpha * output

    if family is Family.LAYER:
        handle = block.register_forward_hook(scale_layer)
    else:
        part = "attention" if family is Family.ATTENTION else "ffn"
        child = getattr(block, getattr(tiny.architecture, part))
        handle = child.register_forward_hook(scale_half)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox"])
def test_gate_taylor_is_the_derivative_by_a_gate_as_finite_differences_find_it(
    zoo: Callable[[str], TinyModel], name: str
) -> None:
    tiny = zoo(name)
    model = tiny.full().double()

    def slope(family: Family, layer: int, step: float) -> float:
        losses = []
        for alpha in (1 + step, 1 - step):
            with scaled(model, tiny, family, layer, alpha):
                losses.append(precise_loss(model))
        return (losses[0] - losses[1]) / (2 * step)

    found = run(tiny, model, Score.GATE_TAYLOR).families
    for family in FAMILIES:
        for layer in LAYERS:
            # Steps are large, as norms are in float32 whatever the model's dtype;
            # extrapolated (Richardson), so that the error is of fourth order.
            expected = abs(4 * slope(family, layer, 1e-2) - slope(family, layer, 2e-2)) / 3
            assert found[family].importance[layer] == pytest.approx(expected, rel=1e-3, abs=2e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_fisher_is_the_norm_of_the_mean_squared_gradients_of_the_items_adapter(
    llama: TinyModel,
) -> None:
    found = run(llama, resident(llama, adapter=True), Score.FISHER).families
    model, squares = resident(llama, adapter=True).eval(), {}
    for batch in batches():
        model.zero_grad()
        model(**batch.arguments(torch.device("cpu"))).loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                squares[name] = squares.get(name, 0) + parameter.grad**2 / len(LENGTHS)
    assert len(squares) == 5 * 7 * 2  # layers, linear modules, A and B
    words = {Family.LAYER: "", Family.ATTENTION: "self_attn", Family.FFN: "mlp"}
    for family, word in words.items():
        for layer in LAYERS:
            place = f".layers.{layer}.{word}"
            expected = sum(s.norm().item() for n, s in squares.items() if place in n)
            assert found[family].importance[layer] == pytest.approx(expected, rel=1e-4)


def test_fisher_without_an_adapter_says_what_it_needs(llama: TinyModel) -> None:
    with pytest.raises(ModelError, match=r"fisher.*needs an adapter"):
        run(llama, resident(llama, adapter=False), Score.FISHER)


def test_wnorm_is_the_norm_of_the_stored_matrices_whatever_the_adapter(llama: TinyModel) -> None:
    stored = load_file(llama.path / "model.safetensors")
    words = {Family.LAYER: "", Family.ATTENTION: "self_attn", Family.FFN: "mlp"}
    for adapter in (False, True):
        found = run(llama, resident(llama, adapter=adapter), Score.WNORM).families
        for family, word in words.items():
            for layer in LAYERS:
                matrices = [
                    tensor.double().flatten()
                    for name, tensor in stored.items()
                    if f".layers.{layer}.{word}" in name and tensor.dim() == 2
                ]
                expected = torch.cat(matrices).norm().item()
                assert found[family].importance[layer] == pytest.approx(expected, rel=1e-5)


def test_depth_prefers_early_layers_and_random_depends_on_the_seed_alone(llama: TinyModel) -> None:
    model = resident(llama, adapter=False)
    depth = run(llama, model, Score.DEPTH).families[Family.LAYER].importance
    assert depth == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    a, b, c = (
        run(llama, model, Score.RANDOM, seed=seed).families[Family.FFN].importance
        for seed in (1, 1, 2)
    )
    assert a == b
    assert a != c


def test_weights_are_read_once_for_all_batches_that_share_a_sweep(llama: TinyModel) -> None:
    stored = load_file(llama.path / "model.safetensors")
    once = sum(tensor.nbytes for name, tensor in stored.items() if ".layers." in name)
    reads = {
        (Score.BI, 1 << 20): 1,
        (Score.LOO, 1 << 20): 1,
        (Score.LOO, 0): 2,  # one sweep for each of two batches
        (Score.WNORM, 1 << 20): 2,
        (Score.GATE_TAYLOR, 1 << 20): 1 + 2 * 2,  # forward and backward of two batches
        (Score.SLEB, 1 << 20): 1 + 5 + 4 + 3,  # a layer that was removed is not read
    }
    with streamed(llama, adapter=False) as model:
        for (score, stream_bytes), times in reads.items():
            families = (Family.LAYER,)
            found = run(llama, model, score, families=families, stream_bytes=stream_bytes).cost
            assert found
            assert found.bytes_read == pytest.approx(
                once * times if score is not Score.SLEB else once / 5 * (5 + 5 + 4 + 3)
            )
            assert found.num_tokens == 20 + 13 + 20 + 16 + 9 - 5
            assert found.seconds > 0
    resident_cost = run(llama, resident(llama, adapter=False), Score.BI).cost
    assert resident_cost
    assert resident_cost.bytes_read == 0


def test_sharing_a_sweep_or_not_gives_the_same_statistics(llama: TinyModel) -> None:
    model = resident(llama, adapter=True)
    a, b = (run(llama, model, Score.LOO, stream_bytes=size) for size in (0, 1 << 20))
    for family in FAMILIES:
        assert a.families[family].importance == b.families[family].importance
        assert np.array_equal(a.families[family].similarity, b.families[family].similarity)


def test_the_probe_leaves_the_model_as_it_was(llama: TinyModel) -> None:
    model = resident(llama, adapter=True).train()
    ids = random_ids(2, 8)
    before = [(name, id(module)) for name, module in model.named_modules()]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    for score in Score:
        run(llama, model, score)
    assert model.training
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in decoder_layers(model))
    with torch.no_grad():
        assert difference(model(input_ids=ids).logits, expected) == 0


def test_a_model_that_works_between_its_layers_is_refused(llama: TinyModel) -> None:
    model = llama.full()

    def double(_: Any, args: Any) -> Any:
        return (2 * args[0], *args[1:])

    model.model.layers[2].register_forward_pre_hook(double)
    with pytest.raises(ModelError, match="between its layers"):
        run(llama, model, Score.BI)
