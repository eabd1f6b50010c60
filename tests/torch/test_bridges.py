"""Bridges: what they are fitted to, by brute force in numpy, and what a file of them may hold."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fedpruner_common.budget import bridge_bytes
from fedpruner_common.errors import ModelError
from fedpruner_common.modeling.bridges import Bridge, Moments, load_bridges, save_bridges
from fedpruner_common.task import BridgeKind

D, TOKENS, RANK = 12, 90, 4
Tensors = dict[str, torch.Tensor]


def data(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (3, 30, d) of unlike sizes, and what a run with a bend would add to them."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(3, 30, D, generator=generator) + 0.5
    hidden *= torch.logspace(-1, 1, 30)[None, :, None]
    mixing = torch.randn(D, D, generator=generator)
    return hidden, torch.tanh(hidden @ mixing) * 3 + 1


def moments(hidden: torch.Tensor, added: torch.Tensor) -> Moments:
    found = Moments(D)
    for h, t in zip(hidden, added, strict=True):  # in parts, as a sweep does
        found.add(h, t)
    return found


def rows(tensor: torch.Tensor) -> np.ndarray:
    return tensor.reshape(-1, D).numpy().astype(np.float64)


def normed(hidden: torch.Tensor) -> np.ndarray:
    x = rows(hidden)
    return x / np.sqrt((x * x).mean(axis=1, keepdims=True) + 1e-6)


def ridge_regression(x: np.ndarray, t: np.ndarray) -> np.ndarray:
    """(d + 1, d): minimises |a S - t|^2 + ridge |S|^2, as least squares with rows of its own."""
    a = np.hstack([x, np.ones((len(x), 1))])
    ridge = 1e-2 * np.trace(a.T @ a) / (D + 1)
    stacked = np.vstack([a, np.sqrt(ridge) * np.eye(D + 1)])
    wanted = np.vstack([t, np.zeros((D + 1, D))])
    return np.linalg.lstsq(stacked, wanted, rcond=None)[0]


def squared_error(tensors: Tensors, hidden: torch.Tensor, added: torch.Tensor) -> float:
    return float((Bridge(tensors)(hidden) - added).square().sum())


# Fitting


def test_a_full_bridge_is_numpys_ridge_regression_with_its_bias() -> None:
    hidden, added = data()
    bridge = moments(hidden, added).solve(BridgeKind.FULL, rank=0)
    expected = ridge_regression(normed(hidden), rows(added))
    assert bridge["weight"].numpy() == pytest.approx(expected[:-1].T, abs=1e-5)
    assert bridge["bias"].numpy() == pytest.approx(expected[-1], abs=1e-5)
    # What the bridge adds is that solution's prediction.
    predicted = normed(hidden) @ expected[:-1] + expected[-1]
    assert rows(Bridge(bridge)(hidden)) == pytest.approx(predicted, abs=1e-4)
    # The ridge matters here: plain least squares is another map.
    ones = np.ones((3 * 30, 1))
    plain = np.linalg.lstsq(np.hstack([normed(hidden), ones]), rows(added), rcond=None)[0]
    assert np.abs(plain - expected).max() > 1e-2


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_lowrank_bridge_is_the_best_of_its_rank_on_what_the_full_one_adds(rank: int) -> None:
    hidden, added = data()
    bridge = moments(hidden, added).solve(BridgeKind.LOWRANK, rank=rank)
    assert bridge["down"].shape == (rank, D)
    assert bridge["up"].shape == (D, rank)
    solution = ridge_regression(normed(hidden), rows(added))
    outputs = normed(hidden) @ solution[:-1]  # (tokens, d), without the bias
    left, sizes, right = np.linalg.svd(outputs, full_matrices=False)
    best = (left[:, :rank] * sizes[:rank]) @ right[:rank]  # Eckart and Young
    assert rows(Bridge(bridge)(hidden)) - solution[-1] == pytest.approx(best, abs=1e-4)

    # Cutting the map itself, instead of what it does to these tokens, is visibly worse.
    u, s, v = np.linalg.svd(solution[:-1])
    cut = normed(hidden) @ (u[:, :rank] * s[:rank]) @ v[:rank]
    assert np.square(outputs - cut).sum() > 1.01 * np.square(outputs - best).sum()


@pytest.mark.parametrize("rank", [D, D + 7])
def test_a_lowrank_bridge_of_the_hidden_size_is_the_full_one(rank: int) -> None:
    hidden, added = data()
    lowrank = moments(hidden, added).solve(BridgeKind.LOWRANK, rank=rank)
    full = moments(hidden, added).solve(BridgeKind.FULL, rank=0)
    assert (Bridge(lowrank)(hidden) - Bridge(full)(hidden)).abs().max() < 1e-5


def test_a_scale_bridge_is_one_number_by_hand() -> None:
    hidden = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    added = torch.tensor([[2.0, 2.0], [5.0, -1.0]])
    found = Moments(2)
    found.add(hidden, added)
    # h.t = 1*2 + 2*2 + 0*5 + 3*(-1) = 3;  h.h = 1 + 4 + 0 + 9 = 14
    bridge = found.solve(BridgeKind.SCALE, rank=0)
    assert bridge["scale"].tolist() == pytest.approx([3 / 14])
    assert Bridge(bridge)(torch.tensor([[14.0, 28.0]])).tolist() == [pytest.approx([3.0, 6.0])]


@pytest.mark.parametrize("kind", [BridgeKind.SCALE, BridgeKind.LOWRANK, BridgeKind.FULL])
def test_a_run_that_is_such_a_map_is_found_exactly(kind: BridgeKind) -> None:
    """Exactly as far as the ridge lets it: that shrinks by about a hundredth, which is undone."""
    hidden, _ = data()
    generator = torch.Generator().manual_seed(5)
    true: Tensors = {"scale": torch.tensor([0.3])}
    if kind is not BridgeKind.SCALE:
        true = {
            "down": torch.randn(RANK, D, generator=generator),
            "up": torch.randn(D, RANK, generator=generator),
            "bias": torch.randn(D, generator=generator),
        }
    added = Bridge(true)(hidden)
    bridge = moments(hidden, added).solve(kind, rank=RANK)
    error = squared_error(bridge, hidden, added) / float(added.square().sum())
    if kind is BridgeKind.SCALE:
        assert error < 1e-10
        return
    assert error < 2e-3
    # A ridge solution is the truth times (G + r)^-1 G with G = a'a: undo that, and it is the truth.
    a = np.hstack([normed(hidden), np.ones((TOKENS, 1))])
    gram = a.T @ a
    shrunk = gram + 1e-2 * np.trace(gram) / (D + 1) * np.eye(D + 1)
    full = moments(hidden, added).solve(BridgeKind.FULL, rank=0)
    found = np.vstack([full["weight"].T.numpy(), full["bias"][None].numpy()]).astype(np.float64)
    truth = np.vstack([(true["up"] @ true["down"]).T.numpy(), true["bias"][None].numpy()])
    assert np.linalg.solve(gram, shrunk @ found) == pytest.approx(truth, abs=1e-4)


def test_tokens_in_parts_and_in_another_order_give_the_same_bridge() -> None:
    hidden, added = data()
    whole = Moments(D)
    whole.add(hidden.flip(0, 1), added.flip(0, 1))
    for kind in (BridgeKind.SCALE, BridgeKind.FULL):
        a, b = whole.solve(kind, rank=0), moments(hidden, added).solve(kind, rank=0)
        assert all((a[name] - b[name]).abs().max() < 1e-6 for name in a)


def test_bfloat16_states_are_summed_in_double_precision() -> None:
    hidden, added = (value.bfloat16() for value in data())
    bridge = moments(hidden, added).solve(BridgeKind.FULL, rank=0)
    expected = moments(hidden.double(), added.double()).solve(BridgeKind.FULL, rank=0)
    assert torch.equal(bridge["weight"], expected["weight"])
    assert bridge["weight"].dtype == torch.float32
    assert Bridge(bridge)(hidden).dtype == torch.bfloat16


def test_states_of_zero_give_a_bridge_of_finite_numbers() -> None:
    zeros = torch.zeros(5, D)
    for kind in (BridgeKind.SCALE, BridgeKind.LOWRANK, BridgeKind.FULL):
        found = Moments(D)
        found.add(zeros, zeros)
        assert all(v.isfinite().all() for v in found.solve(kind, rank=2).values())


# What a bridge adds


def test_a_bridge_adds_its_offset_and_divides_by_the_layers_gain() -> None:
    bridge = Bridge({"scale": torch.tensor([0.5])}, gain=4.0)
    hidden = torch.tensor([[[2.0, 6.0]]])
    assert bridge(hidden).tolist() == [[[0.25, 0.75]]]  # 0.5 * 2 / 4, 0.5 * 6 / 4
    bridge.offset = torch.tensor([[[3.0, -3.0]]])
    assert bridge(hidden).tolist() == [[[1.0, 0.0]]]  # (1 + 3) / 4, (3 - 3) / 4


def test_a_bridge_has_nothing_that_trains_or_is_saved() -> None:
    bridge = Bridge({"weight": torch.eye(D), "bias": torch.zeros(D)})
    assert list(bridge.parameters()) == []
    assert bridge.state_dict() == {}


# Files


def some_bridges() -> list[Tensors]:
    hidden, added = data()
    found = moments(hidden, added)
    kinds = (BridgeKind.SCALE, BridgeKind.LOWRANK, BridgeKind.FULL)
    return [found.solve(kind, rank=RANK) for kind in kinds]


def test_bridges_come_back_from_their_file_as_they_were(tmp_path: Path) -> None:
    bridges = some_bridges()
    save_bridges(bridges, tmp_path / "bridges")
    loaded = load_bridges(tmp_path / "bridges", num_runs=3, hidden_size=D)
    assert [sorted(bridge) for bridge in loaded] == [
        ["scale"], ["bias", "down", "up"], ["bias", "weight"]
    ]  # fmt: skip
    for before, after in zip(bridges, loaded, strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_eleven_runs_keep_their_order(tmp_path: Path) -> None:
    save_bridges([{"scale": torch.tensor([float(i)])} for i in range(11)], tmp_path / "bridges")
    loaded = load_bridges(tmp_path / "bridges", num_runs=11, hidden_size=D)
    assert [bridge["scale"].item() for bridge in loaded] == list(range(11))


@pytest.mark.parametrize("rank", [1, RANK, D + 3])
@pytest.mark.parametrize("kind", [BridgeKind.SCALE, BridgeKind.LOWRANK, BridgeKind.FULL])
def test_bridge_bytes_are_those_of_the_tensors(kind: BridgeKind, rank: int) -> None:
    tensors = moments(*data()).solve(kind, rank=rank)
    real = sum(value.nbytes for value in tensors.values())
    assert bridge_bytes(kind, hidden_size=D, rank=rank) == real


def test_no_bridge_takes_no_bytes() -> None:
    assert bridge_bytes(BridgeKind.OFF, hidden_size=D, rank=RANK) == 0


SCALE = torch.ones(1)
BAD_FILES: dict[str, tuple[Tensors, str]] = {
    "a run too many": ({"0.scale": SCALE, "1.scale": SCALE, "2.scale": SCALE}, "2 runs"),
    "a run too few": ({"0.scale": SCALE}, "run 1"),
    "a negative run": ({"0.scale": SCALE, "-1.scale": SCALE}, "2 runs"),
    "a run that is no number": ({"0.scale": SCALE, "one.scale": SCALE}, "2 runs"),
    "a run spelled otherwise": ({"0.scale": SCALE, "01.scale": SCALE}, "2 runs"),
    "a run of five thousand digits": ({"0.scale": SCALE, "1" * 5000 + ".scale": SCALE}, "2 runs"),
    "no run at all": ({"0.scale": SCALE, "scale": SCALE}, "2 runs"),
    "a missing tensor": ({"0.scale": SCALE, "1.weight": torch.eye(D)}, "weight"),
    "a foreign tensor": ({"0.scale": SCALE, "1.scale": SCALE, "1.extra": SCALE}, "extra"),
    "tensors of two kinds": (
        {"0.scale": SCALE, "1.scale": SCALE, "1.weight": torch.eye(D), "1.bias": torch.ones(D)},
        "weight",
    ),
    "another hidden size": (
        {"0.scale": SCALE, "1.weight": torch.eye(D + 1), "1.bias": torch.ones(D + 1)},
        r"\(13, 13\)|\(13,\)",
    ),
    "two ranks": (
        {"0.scale": SCALE, "1.down": torch.ones(2, D), "1.up": torch.ones(D, 3),
         "1.bias": torch.ones(D)}, "up",
    ),
    "a rank without a dimension": (
        {"0.scale": SCALE, "1.down": torch.tensor(1.0), "1.up": torch.ones(D, 1),
         "1.bias": torch.ones(D)}, "down",
    ),
    "a scale of two numbers": ({"0.scale": SCALE, "1.scale": torch.ones(2)}, "scale"),
    "not a number": ({"0.scale": SCALE, "1.scale": torch.tensor([float("nan")])}, "not finite"),
    "infinity": (
        {"0.scale": SCALE, "1.weight": torch.full((D, D), torch.inf),
         "1.bias": torch.ones(D)}, "not finite",
    ),
    "integers": ({"0.scale": SCALE, "1.scale": torch.ones(1, dtype=torch.int64)}, "scale"),
    "eight bits": ({"0.scale": SCALE, "1.scale": torch.ones(1).to(torch.float8_e4m3fn)}, "scale"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_file_that_is_not_one_bridge_per_run_is_a_model_error(what: str, tmp_path: Path) -> None:
    tensors, message = BAD_FILES[what]
    save_file({name: value.clone() for name, value in tensors.items()}, tmp_path / "bridges")
    with pytest.raises(ModelError, match=message):
        load_bridges(tmp_path / "bridges", num_runs=2, hidden_size=D)


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all", b"\xff" * 64])
def test_a_file_that_is_not_safetensors_is_a_model_error(
    content: bytes | None, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "bridges").write_bytes(content)
    with pytest.raises(ModelError, match="cannot be read"):
        load_bridges(tmp_path / "bridges", num_runs=2, hidden_size=D)
