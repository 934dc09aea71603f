"""Find the best shape for every budget at once: the exact Pareto front of an additive predictor and additive costs.

Parameters, operations and seconds of a subnet are sums of terms that involve a layer and the width before it, and so is
the predicted loss. The best shape under a budget is therefore a shortest path with a resource constraint, which dynamic
programming over the layers finds. After each layer, it keeps the non-dominated partial shapes for each width of the
last kept layer: no other one that ends in this width is as good in all costs and in loss. After the last layer, the
whole shapes that are left form the front.

For example, take two layers and the widths 16 and 48. The state of a partial shape is the position of its last kept
width: 1 for 16, 2 for 48, and 0 if no layer was kept yet. Before the first layer there is one partial shape, in state
0. The first layer leads from it to one partial shape in state 1 and one in state 2. The second layer leads from each of
these two to both states, so each state has two candidates, and keeps those that are not dominated. `_leave` adds what
comes after the last layer, puts the states together, and keeps what is not dominated: the front. `_trace` follows every
point of the front back through the states, and so finds its widths.

In reading order: `ParetoFront`, `pareto_front`, then the search itself: `_extend`, `_leave`, `_trace` and
`_non_dominated`.

Costs and losses are added up in the order of `model.costs.chain_cost` and `ShapePredictor.predict`, so the front has
the same numbers to the last bit. A cost of the front can therefore be used as a budget, also after it was written to a
file and read back.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ..checks import check_count
from ..model.costs import ChainCost, Cost
from ..model.shapes import SearchSpace
from .measures import MEASURES
from .predictor import ShapePredictor


PAIRWISE = 32  # up to this many rows are compared with each other directly; more are split into halves
UNITS = {"parameters": "parameters", "flops": "FLOPs", "latency": "seconds"}  # cost -> its unit, in words


@dataclass(frozen=True)
class ParetoFront:
    """The shapes that no other shape beats in all costs and in predicted loss, by increasing (first) cost.

    Attributes:
        shapes: (n, layers) integers; 0 drops a layer.
        costs: (n,) numbers by name: `"parameters"`, `"flops"`, `"latency"` (seconds); one or two of them.
        losses: (n,) predicted losses in nats, or predicted distances or losses on a task. With one cost, they decrease.
        measure: What is predicted, `"loss"`, `"distance"` or `"task_loss"`.
    """

    shapes: np.ndarray
    costs: dict[str, np.ndarray]
    losses: np.ndarray
    measure: str = "loss"

    def __len__(self) -> int:
        return len(self.losses)

    def best(self, max_cost: float | Mapping[str, float]) -> list[int]:
        """Return the shape with the lowest predicted loss or distance that costs at most `max_cost`.

        Args:
            max_cost: The budget in the unit of the front's cost. For a front of two costs, a mapping from the name of a
                cost to its budget; a cost that is not in it has no bound.

        Raises:
            ValueError: If no shape is that cheap, or a name is not one of the front's costs.

        Example:
            >>> front = ParetoFront(
            ...     shapes=np.array([[8, 16], [16, 48]]),
            ...     costs={"parameters": np.array([20_000, 50_000])},
            ...     losses=np.array([3.0, 2.5]),
            ... )
            >>> front.best(max_cost=30_000)
            [8, 16]
        """
        if not isinstance(max_cost, Mapping):
            if len(self.costs) > 1:
                one, other = self.costs
                raise ValueError(f'This front has two costs: give max_cost={{"{one}": ..., "{other}": ...}}.')
            max_cost = dict.fromkeys(self.costs, max_cost)
        if unknown := sorted(set(max_cost) - set(self.costs)):
            raise ValueError(f"Unknown cost(s) {unknown} in max_cost. This front has {list(self.costs)}.")
        fits = np.ones(len(self), dtype=bool)
        for name, bound in max_cost.items():
            cheapest = self.costs[name].min()
            if not cheapest <= bound:  # also if the bound is NaN
                raise ValueError(
                    f"max_cost={amount(bound, name)} is below the cheapest subnet, which has "
                    f"{amount(cheapest, name)}. Raise the budget."
                )
            fits &= self.costs[name] <= bound
        if not fits.any():
            raise ValueError(f"No shape is within all of max_cost={dict(max_cost)} at once. Raise one of the budgets.")
        return self.shapes[np.where(fits, self.losses, np.inf).argmin()].tolist()

    def table(self) -> list[dict[str, Any]]:
        """Return one mapping per point: `shape`, costs by name, predicted `loss` and `perplexity`, or `distance`."""
        costs, measure = zip(*(values.tolist() for values in self.costs.values())), MEASURES[self.measure]
        return [
            {"shape": shape, **dict(zip(self.costs, row)), measure.name: loss, measure.shown: measure.show(loss)}
            for shape, row, loss in zip(self.shapes.tolist(), costs, self.losses.tolist())
        ]


def pareto_front(
    space: SearchSpace,
    predictor: ShapePredictor,
    cost: Cost | Sequence[Cost] = "parameters",
    sequence_length: int = 128,
) -> ParetoFront:
    """Return the exact Pareto front of one or two costs against the prediction over all shapes of `space`.

    What is predicted, and as low as possible, is the loss or the distance to the original: see `ShapePredictor`.

    Layers can be dropped where the predictor was fitted on shapes that drop them.

    Args:
        space: The search space.
        predictor: A predictor that was fitted on shapes of this space.
        cost: `"parameters"`, `"flops"`, a `LatencyTable`, or a sequence of two of these. The front of two costs can
            have very many points.
        sequence_length: Tokens per sequence, for FLOPs.

    Raises:
        ValueError: If a cost is unknown or given twice, or the predictor was fitted on another space.

    Example:
        >>> import itertools
        >>> from supershaper_hf import SearchSpace, ShapePredictor, SuperShaperConfig, pareto_front
        >>> config = SuperShaperConfig(hidden_size=96, num_attention_heads=4, num_hidden_layers=2, vocab_size=50)
        >>> space = SearchSpace.from_config(config)
        >>> shapes = list(itertools.product(space.width_choices, repeat=2))
        >>> predictor = ShapePredictor.fit(shapes, [4 - a / 90 - b / 50 for a, b in shapes])
        >>> pareto_front(space, predictor).best(max_cost=600_000)
        [24, 56]
    """
    choices = np.array(predictor.width_choices)
    kept = choices[choices > 0].tolist()
    if kept != space.width_choices or len(predictor.effects) != space.num_layers:
        raise ValueError(
            f"The predictor was fitted on {len(predictor.effects)} layers with the widths {kept}, but the search space "
            f"has {space.num_layers} layers with the widths {space.width_choices}. Measure shapes that use every "
            "width, and fit again."
        )
    costs = [cost] if isinstance(cost, str) or not isinstance(cost, Sequence) else cost
    if not 1 <= len(costs) <= 2:
        raise ValueError(f"cost has {len(costs)} entries. Allowed: one cost, or a sequence of two.")
    terms = [space.terms(each, sequence_length) for each in costs]
    if len({term.name for term in terms}) < len(terms):
        raise ValueError(f"Both costs are {terms[0].name!r}. Give it once, or give two different costs.")
    layers = list(_extend(terms, space, predictor))
    front = _leave(terms, space, layers[-1])
    return ParetoFront(
        shapes=np.array([0, *space.width_choices])[_trace(layers, front)],
        costs={  # next to seconds the other cost is float64, too, which holds integers up to 2**53 exactly
            term.name: front.costs[:, i].astype(type(term.fixed)) for i, term in enumerate(terms)
        },
        losses=front.losses,
        measure=predictor.measure,
    )


def shapes_at(front: ParetoFront, num_budgets: int, part: Sequence[float] = (0.0, 1.0)) -> np.ndarray:
    """Return the best shapes (num_budgets, layers) for budgets that are evenly spaced over the front's (first) cost.

    Args:
        front: The front.
        num_budgets: Number of budgets, at least 1.
        part: First and last budget, as parts of the range from the lowest cost of the front (0) to its highest (1).

    Example:
        >>> front = pareto_front(space, predictor)  # doctest: +SKIP
        >>> shapes_at(front, 3)  # the best shapes for the least, the middle and the largest budget  # doctest: +SKIP
    """
    check_count("num_budgets", num_budgets)
    costs = next(iter(front.costs.values()))
    lowest, highest = costs.min(), costs.max()
    low, high = lowest * (1 - np.array(part)) + highest * np.array(part)  # this form is exact for parts 0 and 1
    return np.array([front.best({next(iter(front.costs)): budget}) for budget in np.linspace(low, high, num_budgets)])


def amount(value: float, cost: str) -> str:
    """Return an amount of a cost in words, for messages.

    Example:
        >>> amount(63_000_000, "parameters"), amount(0.125, "latency")
        ('63,000,000 parameters', '0.125 seconds')
    """
    return f"{value:,.0f} {UNITS[cost]}" if value >= 1000 else f"{value:,.10g} {UNITS[cost]}"


@dataclass(frozen=True)
class _Partial:
    """Partial shapes in one state that no other partial shape in this state dominates.

    Positions count from 1 in the width choices of the space.

    Attributes:
        costs: (n, costs).
        losses: (n,) in nats.
        position: (n,) position of this layer's width, or 0 if the layer is dropped.
        previous: (n,) the state before this layer: position of the last kept width, or 0 if no layer was kept.
        index: (n,) row of the partial shape in that state that was extended by this layer.
    """

    costs: np.ndarray
    losses: np.ndarray
    position: np.ndarray
    previous: np.ndarray
    index: np.ndarray

    def __len__(self) -> int:
        return len(self.losses)

    def extended(self, costs: Sequence[float], loss: float, position: int, state: int) -> "_Partial":
        """Return these partial shapes, which are in `state`, with one more layer."""
        count = len(self)
        return _Partial(
            self.costs + np.array(costs),
            self.losses + loss,
            np.full(count, position, dtype=np.int16),
            np.full(count, state, dtype=np.int16),
            np.arange(count),
        )


def _extend(terms: Sequence[ChainCost], space: SearchSpace, predictor: ShapePredictor) -> Iterator[dict[int, _Partial]]:
    """Yield, layer by layer, the non-dominated partial shapes of each state."""
    # If the predictor knows no dropped layers, its tables get a first row for them, so that positions count from 1. The
    # effects of pairs are 0 where no layer was kept before, which is state 0.
    unknown_zero = int(predictor.width_choices[0] != 0)
    effects = np.pad(predictor.effects, ((0, 0), (unknown_zero, 0)))
    pairs = np.pad(predictor.pair_effects, ((0, 0), (unknown_zero, 0), (unknown_zero, 0)))
    sources = [space.config.hidden_size, *space.width_choices]  # in state 0 no layer was kept so far
    nothing = np.zeros(1, dtype=np.int16)
    integral = all(isinstance(term.fixed, int) for term in terms)
    costs = np.array([[term.fixed for term in terms]], dtype=np.int64 if integral else np.float64)
    states = {0: _Partial(costs, np.array([predictor.intercept]), nothing, nothing, np.zeros(1, dtype=np.int64))}
    for layer, droppable in enumerate(predictor.droppable):
        candidates: dict[int, list[_Partial]] = {}
        for state, partial in states.items():
            if droppable:
                dropped = partial.extended([0] * len(terms), effects[layer, 0], 0, state)
                candidates.setdefault(state, []).append(dropped)
            for position, width in enumerate(space.width_choices, start=1):
                step = [term.enter(sources[state], width) + term.layer(width) for term in terms]
                loss = effects[layer, position] + pairs[layer, state, position]
                candidates.setdefault(position, []).append(partial.extended(step, loss, position, state))
        states = {state: _non_dominated(found) for state, found in sorted(candidates.items())}
        yield states


def _leave(terms: Sequence[ChainCost], space: SearchSpace, states: dict[int, _Partial]) -> _Partial:
    """Return the non-dominated whole shapes, each by its last state and its row there."""
    ends = [
        partial.extended([term.leave(space.width_choices[state - 1]) for term in terms], 0.0, 0, state)
        for state, partial in states.items()
        if state > 0  # at least one layer is kept
    ]
    return _non_dominated(ends)


def _trace(layers: list[dict[int, _Partial]], front: _Partial) -> np.ndarray:
    """Follow the front's points back to the first layer: (n, layers) positions, from 1 in the width choices."""
    state, index = front.previous, front.index
    columns = []
    for states in reversed(layers):
        position, before, index_before = (np.empty(len(front), dtype=np.int64) for _ in range(3))
        for number, partial in states.items():
            here = state == number
            position[here] = partial.position[index[here]]
            before[here], index_before[here] = partial.previous[index[here]], partial.index[index[here]]
        state, index = before, index_before
        columns.append(position)
    return np.column_stack(columns[::-1])


def _non_dominated(candidates: Sequence[_Partial]) -> _Partial:
    """Merge candidates and keep those that no other equals or beats in all costs and loss."""
    costs, losses, position, previous, index = (
        np.concatenate([getattr(candidate, field.name) for candidate in candidates]) for field in fields(_Partial)
    )
    order = np.lexsort((losses, *costs.T[::-1]))  # by first cost, then second cost, then loss
    rest = np.column_stack([costs[order, 1:], losses[order]])
    kept = order[_lowest(rest) if rest.shape[1] == 1 else _undominated(rest)]
    return _Partial(costs[kept], losses[kept], position[kept], previous[kept], index[kept])


def _lowest(losses: np.ndarray) -> np.ndarray:
    """Return which rows of `losses` (n, 1), sorted by cost, are below all rows before them, as booleans (n,)."""
    return losses[:, 0] < np.minimum.accumulate(np.concatenate([[np.inf], losses[:-1, 0]]))


def _undominated(rows: np.ndarray) -> np.ndarray:
    """Return which rows of `rows` (n, 2) have no row before them that is as low in both columns, as booleans (n,).

    The rows are sorted by the first cost, and their columns are second cost and loss. Divide and conquer: rows of the
    second half also have to be below the staircase that the rows of the first half form.
    """
    n = len(rows)
    if n <= PAIRWISE:
        as_low = (rows[:, None] <= rows[None]).all(axis=2)  # [i, j]: i is as low as j
        return np.logical_not(np.triu(as_low, 1).any(axis=0))
    first, second = _undominated(rows[: n // 2]), _undominated(rows[n // 2 :])
    stairs = rows[: n // 2][first]
    stairs = stairs[np.argsort(stairs[:, 0], kind="stable")]
    lowest = np.concatenate([[np.inf], np.minimum.accumulate(stairs[:, 1])])
    below = lowest[np.searchsorted(stairs[:, 0], rows[n // 2 :, 0], side="right")] > rows[n // 2 :, 1]
    return np.concatenate([first, second & below])
