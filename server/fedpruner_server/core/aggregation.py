"""Client updates -> the new global adapter, module by module.

A module is a linear layer with a LoRA pair: A (r, in_features), B (out_features, r); its product
B A is what the model sees. Weights are normalised over the clients that trained the module (its
holders), never over the cohort. Sums are taken in float64, results are float32.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from fedpruner_server.core.server_optimizer import (
    Moments,
    ServerOptimizer,
    ServerOptimizerSettings,
    server_step,
)

Array = NDArray[np.float32]
Array64 = NDArray[np.float64]
Adapter = Mapping[str, Array]
LowRank = tuple[Array64, Array64]  # P (out_features, k), Q (k, in_features), standing for P Q

_A = ".lora_A"
_B = ".lora_B"
_RESIDUAL_RANKS = 4  # cap of a residual's rank, in ranks of the adapter
# Singular directions of A below this share of the largest: float32 noise, not to be divided by.
_PINV_CUTOFF = 1e-7
_TAKE_AS_IT_IS = ServerOptimizerSettings()


class Aggregation(str, Enum):
    """How the adapters of several clients become one.

    FEDIT: mean of A and mean of B (Zhang et al. 2024, FedIT).
    ANCHOR: mean of A; B is the least-squares best for the exact mean of the products given that A.
    SVD: the best rank-r factors of the exact mean product, turned to be close to the previous ones.
    ROLORA: clients train one factor at a time, so its mean is exact (Chen et al. 2025, RoLoRA).
    FFA: clients train B only, A stays as drawn (Sun et al. 2024, FFA-LoRA).
    HETLORA: ranks may differ; zero-padded means, weighted by the norm of each client's product
        too (Cho et al. 2024, HetLoRA).
    FLEXLORA: ranks may differ; the best rank-r factors of the exact mean product, largest singular
        value first, so that a client of rank k takes the first k (Bai et al. 2024, FlexLoRA).
    """

    FEDIT = "fedit"
    ANCHOR = "anchor"
    SVD = "svd"
    ROLORA = "rolora"
    FFA = "ffa"
    HETLORA = "hetlora"
    FLEXLORA = "flexlora"

    @property
    def mixes_ranks(self) -> bool:
        """May clients have a smaller rank than the global adapter?"""
        return self in (Aggregation.HETLORA, Aggregation.FLEXLORA)


class Factor(str, Enum):
    """Which half of a LoRA pair."""

    BOTH = "both"
    A = "A"
    B = "B"

    def includes(self, name: str) -> bool:
        """Does it mean the adapter tensor of this canonical name?"""
        return self is Factor.BOTH or name.endswith(_A if self is Factor.A else _B)


def trained_factor(aggregation: Aggregation, round_number: int) -> Factor:
    """The factor that clients train in a round; the other one is frozen and need not be sent.

    RoLoRA trains B in even rounds and A in odd ones, but B in round 1: until B has been trained it
    is zero, and A gets no gradient.

    Args:
        aggregation: of the run.
        round_number: from 1.
    """
    if aggregation is Aggregation.FFA:
        return Factor.B
    if aggregation is Aggregation.ROLORA:
        return Factor.A if round_number % 2 == 1 and round_number > 1 else Factor.B
    return Factor.BOTH


@dataclass(frozen=True)
class AggregationSettings:
    """How a run combines updates.

    Attributes:
        method: of making one adapter out of several.
        error_feedback: keep what the new factors miss of the exact mean product, as a low-rank
            residual of at most 4 r. The next round's target contains it; an exported adapter, of
            rank r, does without. Measured before the server optimizer's step: what that holds back
            is not a loss to be made up for.
        min_holders: a module that fewer clients trained keeps its values.
        shrink: c0; the step of a module with n holders is multiplied by n / (n + c0).
        server_optimizer: turns aggregated values into the next global ones.
        server_learning_rate: eta of the tensors it applies to.
        server_momentum: of ServerOptimizer.MOMENTUM.
        server_beta1: decay of FedAdam's first moment.
        server_beta2: decay of FedAdam's second moment.
        server_tau: FedAdam's adaptivity.
        fedadam_factor: the tensors FedAdam applies to; the others take the aggregated values.

    Raises:
        ValueError: a number is out of its range, or a name is unknown.
    """

    method: Aggregation = Aggregation.FEDIT
    error_feedback: bool = False
    min_holders: int = 1
    shrink: float = 0.0
    server_optimizer: ServerOptimizer = ServerOptimizer.FEDAVG
    server_learning_rate: float = 1.0
    server_momentum: float = 0.9
    server_beta1: float = 0.9
    server_beta2: float = 0.99
    server_tau: float = 1e-3
    fedadam_factor: Factor = Factor.B

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", Aggregation(self.method))
        object.__setattr__(self, "server_optimizer", ServerOptimizer(self.server_optimizer))
        object.__setattr__(self, "fedadam_factor", Factor(self.fedadam_factor))
        if self.min_holders < 1:
            raise ValueError(f"min_holders is {self.min_holders}, expected at least 1")
        if not (self.shrink >= 0 and math.isfinite(self.shrink)):
            raise ValueError(f"shrink is {self.shrink}, expected at least 0")
        self.optimizer_of("")

    def optimizer_of(self, name: str) -> ServerOptimizerSettings:
        """The optimizer of one adapter tensor."""
        adam = self.server_optimizer is ServerOptimizer.FEDADAM
        settings = ServerOptimizerSettings(
            self.server_optimizer,
            learning_rate=self.server_learning_rate,
            momentum=self.server_momentum,
            beta1=self.server_beta1,
            beta2=self.server_beta2,
            tau=self.server_tau,
        )
        return settings if not adam or self.fedadam_factor.includes(name) else _TAKE_AS_IT_IS


@dataclass(frozen=True)
class ClientUpdate:
    """The trained adapter values of one client.

    Attributes:
        client_id: whose.
        num_examples: its weight.
        tensors: canonical name -> values, of the components of its submodel. May read a tensor
            when it is asked for it: each is asked for once, those of one module together.
        weight: multiplies num_examples, e.g. less than 1 for an update that comes late.
    """

    client_id: str
    num_examples: int
    tensors: Adapter
    weight: float = 1.0


@dataclass(frozen=True)
class ServerState:
    """What must survive a restart beside the adapter; empty at first.

    Attributes:
        residuals: module -> (P, Q): its share of the global model beyond B A.
        first_moments: canonical name -> the server optimizer's first moment.
        second_moments: canonical name -> its second moment.
    """

    residuals: Mapping[str, LowRank] = field(default_factory=dict)
    first_moments: Mapping[str, Array64] = field(default_factory=dict)
    second_moments: Mapping[str, Array64] = field(default_factory=dict)

    def to_tensors(self) -> dict[str, Array64]:
        """Everything as one flat dict, sorted by name, to be written as one file."""
        tensors: dict[str, Array64] = {}
        for module, (p, q) in self.residuals.items():
            tensors[f"residual.{module}.P"] = p
            tensors[f"residual.{module}.Q"] = q
        for name, values in self.first_moments.items():
            tensors[f"first_moment.{name}"] = values
        for name, values in self.second_moments.items():
            tensors[f"second_moment.{name}"] = values
        return {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Array64]) -> "ServerState":
        """The state that `to_tensors` wrote.

        Raises:
            ValueError: a name is unknown, or half of a residual is missing or does not fit.
        """
        found: dict[str, dict[str, Array64]] = {
            kind: {} for kind in ("residual", "first_moment", "second_moment")
        }
        for name, values in tensors.items():
            kind, _, rest = name.partition(".")
            if kind not in found or not rest:
                raise ValueError(f"{name} is not part of a server state")
            found[kind][rest] = values
        return cls(_paired(found["residual"]), found["first_moment"], found["second_moment"])


def _paired(halves: Mapping[str, Array64]) -> dict[str, LowRank]:
    """Module -> (P, Q), of `<module>.P` and `<module>.Q`."""
    pairs: dict[str, LowRank] = {}
    for module in sorted({name.rpartition(".")[0] for name in halves}):
        names = (f"{module}.P", f"{module}.Q")
        if not set(names) <= halves.keys():
            raise ValueError(f"residual.{module} lacks its P or its Q")
        p, q = (halves[name] for name in names)
        if p.ndim != 2 or q.ndim != 2 or p.shape[1] != q.shape[0]:
            raise ValueError(f"residual.{module}: P {p.shape} and Q {q.shape} do not fit")
        pairs[module] = p, q
    if 2 * len(pairs) != len(halves):
        raise ValueError("a residual has parts that are neither P nor Q")
    return pairs


@dataclass(frozen=True)
class CombineReport:
    """What one round's aggregation saw.

    Attributes:
        num_holders: module -> clients that trained it, of every module of the adapter.
        fedit_error: |mean of the products - product of the means| / |mean of the products|,
            Frobenius, averaged over the combined modules: what plain averaging gets wrong.
            Modules whose mean product is zero do not count; 0 if none is left.
        left_alone: modules with holders, but fewer than min_holders, sorted.
    """

    num_holders: Mapping[str, int]
    fedit_error: float
    left_alone: tuple[str, ...]


@dataclass(frozen=True)
class Combined:
    """The outcome of a round.

    Attributes:
        adapter: canonical name -> float32 values, names and order as before.
        state: to give to the next round.
        report: for the log.
    """

    adapter: dict[str, Array]
    state: ServerState
    report: CombineReport


_PLAIN = AggregationSettings()
_NOTHING = ServerState()


def aggregate(
    current: Adapter,
    updates: Iterable[ClientUpdate],
    *,
    settings: AggregationSettings = _PLAIN,
    state: ServerState = _NOTHING,
    round_number: int = 1,
) -> dict[str, Array]:
    """The adapter of `combine`, for callers that keep no state.

    By default each adapter tensor is averaged over the clients that trained it, and a tensor
    nobody trained keeps its value.

    Raises:
        ValueError: as `combine`.

    Source: FedAvg weighting, McMahan et al. 2017, algorithm 1, applied per tensor.
    """
    combined = combine(current, updates, settings=settings, state=state, round_number=round_number)
    return combined.adapter


def combine(
    current: Adapter,
    updates: Iterable[ClientUpdate],
    *,
    settings: AggregationSettings = _PLAIN,
    state: ServerState = _NOTHING,
    round_number: int = 1,
) -> Combined:
    """The next global adapter, with what to remember and what to log.

    A client trains only the components of its own submodel, so each module has its own holders and
    its own denominator. Modules nobody trained keep their values, residuals and moments. The order
    of the updates does not matter, bit for bit. Holds one module of every client at a time when
    the updates' tensors are lazy.

    Args:
        current: global adapter, canonical name -> float32 array. Every method but FEDIT wants
            LoRA pairs; FEDIT takes arrays of any name and shape.
        updates: one per client. With a method that freezes a factor, what an update says of the
            frozen one is not read: the current values stand.
        settings: of the run.
        state: what the last round returned.
        round_number: from 1.

    Raises:
        ValueError: two updates of one client; a weight that is not positive; a name that is
            unknown or missing; a shape that differs; a rank above the global one; a state of
            another adapter.
    """
    ordered = sorted(updates, key=lambda update: update.client_id)
    names = _check_updates(current, ordered)
    modules = _modules(current, settings.method)
    _check_state(current, modules, state)
    factor = trained_factor(settings.method, round_number)
    combination = _Combination(current, settings, state, factor)
    num_holders: dict[str, int] = {}
    left_alone: list[str] = []
    for module, tensors in modules.items():
        trained = {name for name in tensors if factor.includes(name)}
        holders = _holders(trained, ordered, names)
        num_holders[module] = len(holders)
        if len(holders) >= settings.min_holders:
            combination.combine_module(module, tensors, holders)
        elif holders:
            left_alone.append(module)
    report = CombineReport(num_holders, combination.fedit_error(), tuple(sorted(left_alone)))
    return Combined(combination.adapter, combination.state(), report)


def residual_factors(state: ServerState) -> dict[str, tuple[Array, Array]]:
    """What the adapter cannot express, module -> (P, Q), float32: to be merged beside it.

    With it the global weight is W + scaling (B A + P Q), with the scaling of LoRA (alpha / r).

    Returns:
        P (out_features, k), Q (k, in_features), for every module that has a residual.
    """
    return {
        module: (_float32(p), _float32(q)) for module, (p, q) in sorted(state.residuals.items())
    }


def squared_norm(product: LowRank) -> float:
    """Squared Frobenius norm of P Q: the trace of (P'P)(Q Q'), from the two small matrices.

    They are not small where the ranks of many clients are stacked; then P Q itself is.
    """
    left, right = product
    rows, rank, columns = len(left), len(right), right.shape[1]
    if rank * (rows + columns) > rows * columns:
        return float(np.square(left @ right).sum())
    return max(0.0, float(((left.T @ left) * (right @ right.T)).sum()))


def initial_adapter(shapes: Mapping[str, tuple[int, int]], *, seed: int) -> dict[str, Array]:
    """The adapter before round 1: A uniform in ±1/sqrt(in_features) as PEFT draws it, B zero.

    Args:
        shapes: canonical name -> shape.
        seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    adapter: dict[str, Array] = {}
    for name, shape in sorted(shapes.items()):
        if name.endswith(_A):
            bound = 1 / np.sqrt(shape[1])
            adapter[name] = rng.uniform(-bound, bound, shape).astype(np.float32)
        else:
            adapter[name] = np.zeros(shape, dtype=np.float32)
    return adapter


def _check_updates(current: Adapter, ordered: Sequence[ClientUpdate]) -> list[frozenset[str]]:
    """The names in each update; reads no tensor.

    A mapping that reads on access may also read when asked whether it has a name, so this is the
    only place that looks at the names.
    """
    names: list[frozenset[str]] = []
    for index, update in enumerate(ordered):
        who = update.client_id
        if index and ordered[index - 1].client_id == who:
            raise ValueError(f"{who}: two updates in one round")
        if update.num_examples <= 0:
            raise ValueError(f"{who}: num_examples is {update.num_examples}")
        if not (update.weight > 0 and math.isfinite(update.weight)):
            raise ValueError(f"{who}: weight is {update.weight}, expected a positive number")
        held = frozenset(update.tensors)
        for name in sorted(held - current.keys()):
            raise ValueError(f"{who}: {name} is not in the adapter")
        names.append(held)
    return names


def _holders(
    trained: set[str], ordered: Sequence[ClientUpdate], names: Sequence[frozenset[str]]
) -> list[ClientUpdate]:
    """The updates that have these tensors, the trained ones of a module."""
    holders = []
    for update, held in zip(ordered, names, strict=True):
        if held.isdisjoint(trained):
            continue
        if not trained <= held:
            raise ValueError(f"{update.client_id}: {min(trained - held)} is missing")
        holders.append(update)
    return holders


def _check_state(
    current: Adapter, modules: Mapping[str, Sequence[str]], state: ServerState
) -> None:
    """Refuse a state that belongs to another adapter."""
    for module, (p, q) in state.residuals.items():
        a, b = current.get(module + _A), current.get(module + _B)
        if module not in modules or a is None or b is None:
            raise ValueError(f"the residual of {module} has no LoRA pair in the adapter")
        if (p.shape[0], q.shape[1]) != (b.shape[0], a.shape[1]):
            raise ValueError(f"the residual of {module} has another shape than its product")
    for moments in (state.first_moments, state.second_moments):
        for name, values in moments.items():
            if name not in current or current[name].shape != values.shape:
                raise ValueError(f"the moment of {name} {values.shape} is not of the adapter")


def _modules(current: Adapter, method: Aggregation) -> dict[str, tuple[str, ...]]:
    """Module -> names of its tensors: a LoRA pair, A first, or one tensor that stands alone."""
    modules: dict[str, tuple[str, ...]] = {}
    for name in current:
        module = name.removesuffix(_A).removesuffix(_B)
        pair = (module + _A, module + _B)
        if all(half in current for half in pair):
            modules.setdefault(module, pair)
        elif method is Aggregation.FEDIT:
            modules[name] = (name,)
        else:
            raise ValueError(f"{name} is not half of a LoRA pair, which {method.value} needs")
    return modules


@dataclass(frozen=True)
class _Part:
    """What one holder has of a module: A (r, in_features), B (out_features, r), in float64."""

    weight: float
    a: Array64
    b: Array64


class _Combination:
    """The adapter and the state of a round while its modules are combined one by one."""

    def __init__(
        self, current: Adapter, settings: AggregationSettings, state: ServerState, factor: Factor
    ) -> None:
        self.adapter = dict(current)
        self._settings = settings
        self._factor = factor
        self._residuals = dict(state.residuals)
        self._first = dict(state.first_moments)
        self._second = dict(state.second_moments)
        self._errors: list[float] = []

    def combine_module(
        self, module: str, tensors: tuple[str, ...], holders: Sequence[ClientUpdate]
    ) -> None:
        """Replace one module's values, its residual and its moments."""
        if len(tensors) == 2:
            aggregated = self._aggregate_pair(module, tensors, holders)
        else:
            (name,) = tensors
            values = [_read(u, name, self.adapter[name].shape) for u in holders]
            aggregated = {name: _float32(_mean([_weight(u) for u in holders], values))}
        shrink = len(holders) / (len(holders) + self._settings.shrink)
        for name, new in aggregated.items():
            if self._factor.includes(name):
                self._step(name, new, scale=shrink)

    def fedit_error(self) -> float:
        return math.fsum(self._errors) / len(self._errors) if self._errors else 0.0

    def state(self) -> ServerState:
        return ServerState(self._residuals, self._first, self._second)

    def _aggregate_pair(
        self, module: str, tensors: tuple[str, ...], holders: Sequence[ClientUpdate]
    ) -> dict[str, Array]:
        """Canonical name -> what the holders agree on; notes the residual and the error."""
        settings = self._settings
        current_a, current_b = (self.adapter[name] for name in tensors)
        parts = [
            _part(u, module, current_a, current_b, self._factor, settings.method) for u in holders
        ]
        if settings.method is Aggregation.HETLORA:
            parts = _weighted_by_norm(parts)
        residual = self._residuals.get(module) if settings.error_feedback else None
        a, b = _new_factors(settings.method, parts, current_a, current_b, residual, self._factor)
        error = _fedit_error(parts)
        if error is not None:
            self._errors.append(error)
        if settings.error_feedback:
            max_rank = _RESIDUAL_RANKS * len(current_a)
            rest = _rest(_mean_product(parts, residual), a, b, max_rank=max_rank)
            if rest is None:
                self._residuals.pop(module, None)
            else:
                self._residuals[module] = rest
        return dict(zip(tensors, (a, b), strict=True))

    def _step(self, name: str, aggregated: Array, *, scale: float) -> None:
        self.adapter[name], moments = server_step(
            self.adapter[name],
            aggregated,
            Moments(self._first.get(name), self._second.get(name)),
            settings=self._settings.optimizer_of(name),
            scale=scale,
        )
        if moments.first is not None:
            self._first[name] = moments.first
        if moments.second is not None:
            self._second[name] = moments.second


def _weight(update: ClientUpdate) -> float:
    return update.num_examples * update.weight


def _read(update: ClientUpdate, name: str, shape: tuple[int, ...]) -> Array64:
    values = update.tensors[name]
    if values.shape != shape:
        raise ValueError(
            f"{update.client_id}: {name} {values.shape} is not in the adapter, which has {shape}"
        )
    return values.astype(np.float64)


def _part(
    update: ClientUpdate,
    module: str,
    current_a: Array,
    current_b: Array,
    factor: Factor,
    method: Aggregation,
) -> _Part:
    """One holder's module; the current values where a factor is frozen."""
    if method.mixes_ranks:
        return _padded_part(update, module, current_a.shape, current_b.shape)
    a, b = module + _A, module + _B
    return _Part(
        _weight(update),
        current_a.astype(np.float64) if factor is Factor.B else _read(update, a, current_a.shape),
        current_b.astype(np.float64) if factor is Factor.A else _read(update, b, current_b.shape),
    )


def _padded_part(
    update: ClientUpdate, module: str, shape_a: tuple[int, ...], shape_b: tuple[int, ...]
) -> _Part:
    """One holder's module of its own rank, padded with zeros to the global one."""
    who, r = update.client_id, shape_a[0]
    a, b = update.tensors[module + _A], update.tensors[module + _B]
    for name, values, shape in ((_A, a, shape_a), (_B, b.T, shape_b[::-1])):
        if values.ndim != 2 or values.shape[1] != shape[1]:
            raise ValueError(f"{who}: {module}{name} does not have the shape of the adapter's")
        if len(values) > r:
            raise ValueError(f"{who}: {module}{name} has rank {len(values)}, the adapter {r}")
    rank = len(a)
    if rank != b.shape[1]:
        raise ValueError(f"{who}: {module} has an A of rank {rank} and a B of rank {b.shape[1]}")
    padded_a, padded_b = np.zeros(shape_a), np.zeros(shape_b)
    padded_a[:rank], padded_b[:, :rank] = a, b
    return _Part(_weight(update), padded_a, padded_b)


def _weighted_by_norm(parts: Sequence[_Part]) -> list[_Part]:
    """The same parts, weighted by |B A| too; as they were where every product is zero.

    Source: Cho et al. 2024 (HetLoRA), sparsity-weighted aggregation.
    """
    weights = [part.weight * _norm((part.b, part.a)) for part in parts]
    if not any(weights):
        return list(parts)
    return [_Part(weight, part.a, part.b) for weight, part in zip(weights, parts, strict=True)]


def _new_factors(
    method: Aggregation,
    parts: Sequence[_Part],
    current_a: Array,
    current_b: Array,
    residual: LowRank | None,
    factor: Factor,
) -> tuple[Array, Array]:
    """A and B of the aggregated adapter; a frozen one is the current one itself."""
    if method is Aggregation.ANCHOR:
        return _anchored(parts, residual)
    if method in (Aggregation.SVD, Aggregation.FLEXLORA):
        split = _aligned_split if method is Aggregation.SVD else _sorted_split
        a, b = split(
            _mean_product(parts, residual),
            current_a.astype(np.float64),
            current_b.astype(np.float64),
        )
        return _float32(a), _float32(b)
    weights = [part.weight for part in parts]
    return (
        current_a if factor is Factor.B else _float32(_mean(weights, [part.a for part in parts])),
        current_b if factor is Factor.A else _float32(_mean(weights, [part.b for part in parts])),
    )


def _anchored(parts: Sequence[_Part], residual: LowRank | None) -> tuple[Array, Array]:
    """The mean A, and the B whose product with it is nearest to the exact mean product.

    Through the pseudo-inverse of A rather than the normal equations: those would square its
    condition number.
    """
    a = _float32(_mean([part.weight for part in parts], [part.a for part in parts]))
    inverse = np.linalg.pinv(a.astype(np.float64), rcond=_PINV_CUTOFF)  # (in_features, r)
    left, right = _mean_product(parts, residual)
    return a, _float32(left @ (right @ inverse))


def _aligned_split(
    product: LowRank, previous_a: Array64, previous_b: Array64
) -> tuple[Array64, Array64]:
    """The best rank-r factors of a product that move little from the previous ones.

    Factors are unique only up to an invertible r x r matrix between them. Of those, this takes the
    balanced split, at the previous ratio |A| : |B|, rotated onto the previous factors: without the
    rotation signs and order jump between rounds, without the ratio the clients' learning rate
    means something else. While B is still zero there is no ratio, and |A| is kept instead.
    """
    a, b, rank = _balanced(product, previous_a.shape, previous_b.shape)
    a, b = _scaled(a, b, previous_a, previous_b)
    x, _, y = np.linalg.svd(b.T @ previous_b + a @ previous_a.T)
    rotation = x @ y
    if rank < len(a):
        # A direction in which A and B are both zero has no gradient, for ever.
        seen_a, seen_b = rotation @ previous_a, previous_b @ rotation.T
        a[:rank], b[:, :rank] = _scaled(a[:rank], b[:, :rank], seen_a[:rank], seen_b[:, :rank])
        a[rank:] = seen_a[rank:]
    return rotation.T @ a, b @ rotation


def _sorted_split(
    product: LowRank, previous_a: Array64, previous_b: Array64
) -> tuple[Array64, Array64]:
    """The best rank-r factors of a product, largest singular value first, in equal shares.

    Signs are those nearer to the previous factors; directions the product lacks keep the previous
    rows of A, so that they can be trained.
    """
    a, b, rank = _balanced(product, previous_a.shape, previous_b.shape)
    a[rank:] = previous_a[rank:]
    agreement = (a * previous_a).sum(axis=1) + (b * previous_b).sum(axis=0)
    sign = np.where(agreement < 0, -1.0, 1.0)
    return sign[:, None] * a, b * sign


def _balanced(
    product: LowRank, shape_a: tuple[int, ...], shape_b: tuple[int, ...]
) -> tuple[Array64, Array64, int]:
    """A, B and how many of their directions the product fills; the others are zero."""
    u, s, vt = _svd(product)
    rank = min(shape_a[0], len(s))
    root = np.sqrt(s[:rank])
    a, b = np.zeros(shape_a), np.zeros(shape_b)
    a[:rank], b[:, :rank] = root[:, None] * vt[:rank], u[:, :rank] * root
    return a, b, rank


def _scaled(
    a: Array64, b: Array64, previous_a: Array64, previous_b: Array64
) -> tuple[Array64, Array64]:
    """The same product at the previous ratio |A| : |B|, or the previous |A| where B was zero."""
    norm_a, norm_b, before_a, before_b = (
        float(np.linalg.norm(factor)) for factor in (a, b, previous_a, previous_b)
    )
    if not (norm_a and norm_b and before_a):
        return a, b
    c = math.sqrt(before_a / before_b * (norm_b / norm_a)) if before_b else before_a / norm_a
    return a * c, b / c


def _rest(product: LowRank, a: Array, b: Array, *, max_rank: int) -> LowRank | None:
    """The best low-rank form of product - B A, in equal shares; None if nothing is left."""
    left, right = product
    u, s, vt = _svd((np.concatenate([left, -b], axis=1), np.concatenate([right, a], axis=0)))
    rank = min(max_rank, len(s))
    if not rank:
        return None
    root = np.sqrt(s[:rank])
    return np.ascontiguousarray(u[:, :rank] * root), root[:, None] * vt[:rank]


def _svd(product: LowRank) -> tuple[Array64, Array64, Array64]:
    """Singular vectors and values of a product, largest first, without those that are rounding.

    Works on the small core between two thin QRs; never forms (out_features, in_features).

    Returns:
        (out_features, k), (k,), (k, in_features), with k the numerical rank, possibly 0.
    """
    left, right = product
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right.T)
    u, s, vt = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
    size = float(np.linalg.norm(r_left) * np.linalg.norm(r_right))
    rank = int((s > np.finfo(np.float64).eps * left.shape[1] * size).sum())
    return q_left @ u[:, :rank], s[:rank], vt[:rank] @ q_right.T


def _mean(weights: Sequence[float], values: Sequence[Array64]) -> Array64:
    """Weighted mean; the total of the weights need not be 1."""
    total = values[0] * weights[0]
    for weight, term in zip(weights[1:], values[1:], strict=True):
        total = total + term * weight
    return total / sum(weights)


def _mean_product(parts: Sequence[_Part], residual: LowRank | None) -> LowRank:
    """The exact weighted mean of the products B A, plus a residual, with ranks stacked."""
    total = sum(part.weight for part in parts)
    left = [part.b * (part.weight / total) for part in parts]
    right = [part.a for part in parts]
    if residual is not None:
        left, right = [*left, residual[0]], [*right, residual[1]]
    return np.concatenate(left, axis=1), np.concatenate(right, axis=0)


def _fedit_error(parts: Sequence[_Part]) -> float | None:
    """|mean product - product of means| / |mean product|; None where the mean product is zero.

    The difference is the weighted mean of (B_i - mean B)(A_i - mean A), which does not cancel.
    """
    weights = [part.weight for part in parts]
    a, b = _mean(weights, [part.a for part in parts]), _mean(weights, [part.b for part in parts])
    spread = [_Part(part.weight, part.a - a, part.b - b) for part in parts]
    whole = _norm(_mean_product(parts, None))
    return _norm(_mean_product(spread, None)) / whole if whole else None


def _norm(product: LowRank) -> float:
    return math.sqrt(squared_norm(product))


def _float32(values: Array64) -> Array:
    return np.ascontiguousarray(values, dtype=np.float32)
