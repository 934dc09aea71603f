"""Choose what to measure: random shapes first, then in rounds those that may be the best for a budget.

Random shapes tell most about the predictor's terms, but lie far from the front. Every further round draws predictors
from what the measurements so far leave open, and measures the best shapes of these for the budgets that matter: shapes
that may well be optimal (Thompson sampling; Thompson 1933). Where the measurements agree, the drawn predictors do too,
and their best shapes are already measured.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..model.costs import Cost, chain_cost, resolve_cost
from ..model.shapes import SearchSpace
from .pareto import pareto_front
from .predictor import MINIMUM_SHAPES, ShapePredictor


DRAWS = 64  # times that the first shapes are drawn before a space is taken to have no more

Records = list[dict[str, Any]]


def measure_in_rounds(
    space: SearchSpace,
    measure: Callable[[list[list[int]]], Records],
    num_shapes: int,
    rounds: int = 4,
    seed: int = 0,
    cost: Cost | Sequence[Cost] = "parameters",
    max_cost: float | Sequence[float] | None = None,
    drop_rate: float = 0.0,
    sequence_length: int = 128,
) -> Records:
    """Measure `num_shapes` shapes: random ones, then in rounds those that may be the best for the budgets `max_cost`.

    Everything is drawn from the seed and the measured losses, so with a `measure` that resumes, such as
    `evaluate_shapes` with a records file, the same call goes on after a crash.

    Args:
        space: The search space.
        measure: Takes shapes, returns one record each, with `shape` and `loss` in nats.
        num_shapes: In all. At least `MINIMUM_SHAPES` of them are in the first round.
        rounds: Number of rounds, the first of random shapes.
        seed: Non-negative.
        cost: Of the front that matters, or two of them: as for `pareto_front`.
        max_cost: The budgets that matter, in the unit of the (first) cost. By default all shapes are random: where
            every budget matters, rounds only pay from about 100 shapes on (docs/results.md).
        drop_rate: Chance of each layer to be dropped in the first round: see `SearchSpace.sample`.
        sequence_length: Tokens per sequence, for a cost in FLOPs.

    Returns:
        All records, in the order of measuring. They are fewer where every drawn front, or the whole space, is known.

    Raises:
        ValueError: If `rounds` is below 1, `num_shapes` too small for them, too few of the losses are finite, or no
            shape is as cheap as a budget. Then the first round is measured.

    Example:
        >>> measure = lambda shapes: evaluate_shapes(supernet, batches, shapes)  # doctest: +SKIP
        >>> records = measure_in_rounds(space, measure, num_shapes=60)  # doctest: +SKIP
    """
    first = max(num_shapes // rounds, MINIMUM_SHAPES, len(space.width_choices)) if rounds > 0 else 0
    if rounds < 1 or num_shapes < first:
        raise ValueError(
            f"num_shapes={num_shapes} and rounds={rounds}: rounds must be at least 1, and the first of them needs "
            f"{max(MINIMUM_SHAPES, len(space.width_choices))} shapes or more."
        )
    if rounds == 1 or max_cost is None:
        return measure(_first_shapes(space, num_shapes, seed, drop_rate))
    shapes = _first_shapes(space, first, seed, drop_rate)
    records = measure(shapes)
    for number in range(1, rounds):
        share = -(-(num_shapes - len(records)) // (rounds - number))  # rounded up: with many rounds the last have none
        if share == 0 or len(shapes) < first:  # the whole space is known
            break
        finite = [record for record in records if np.isfinite(record["loss"])]
        if len(finite) < MINIMUM_SHAPES:
            raise ValueError(
                f"Only {len(finite)} of {len(records)} measured losses are finite, {MINIMUM_SHAPES} are needed: is the "
                "supernet trained, and stable in this precision?"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a poor fit is no news before the last round
            predictor = ShapePredictor.fit(
                [record["shape"] for record in finite], [record["loss"] for record in finite]
            )
        known = {tuple(record["shape"]) for record in records}
        proposed = propose_shapes(
            space, predictor, share, known, (seed, number), cost, max_cost=max_cost, sequence_length=sequence_length
        )
        if proposed:
            records = records + measure(proposed)
    return records


def propose_shapes(
    space: SearchSpace,
    predictor: ShapePredictor,
    num_shapes: int,
    known: set[tuple[int, ...]],
    seed: int | Sequence[int],
    cost: Cost | Sequence[Cost] = "parameters",
    *,
    max_cost: float | Sequence[float],
    sequence_length: int = 128,
) -> list[list[int]]:
    """Return up to `num_shapes` shapes that are not in `known`, each from the front of a predictor drawn from the posterior.

    From each front the best unknown shape for one of the budgets `max_cost`, in turn, is taken. Fewer are returned if
    all affordable shapes of a front are known.

    Raises:
        ValueError: If no shape is as cheap as a budget.
    """
    budgets = np.atleast_1d(max_cost)
    chosen: dict[tuple[int, ...], None] = {}
    for number, drawn in enumerate(predictor.draw(num_shapes, seed)):
        front = pareto_front(space, drawn, cost, sequence_length)
        name, costs = next(iter(front.costs.items()))
        if not budgets.min() >= costs.min():  # also if it is not a number
            raise ValueError(
                f"max_cost={budgets.min():,.10g} cannot be met: the cheapest shape has {name} {costs.min():,.10g}. "
                "Choose a higher budget."
            )
        affordable = np.flatnonzero(costs <= budgets[number % len(budgets)])
        for index in affordable[np.argsort(front.losses[affordable], kind="stable")]:
            shape = tuple(front.shapes[index].tolist())
            if shape not in known and shape not in chosen:
                chosen[shape] = None
                break
    return [list(shape) for shape in chosen]


def best_measured(
    space: SearchSpace, records: Records, cost: Cost, max_cost: float, sequence_length: int = 128
) -> list[int]:
    """Return the measured shape with the lowest loss that costs at most `max_cost`.

    Raises:
        ValueError: If no measured shape is that cheap.
    """
    shapes = np.array([record["shape"] for record in records])
    costs = chain_cost(resolve_cost(cost, space.config, sequence_length), space.config.hidden_size, shapes)
    losses = np.where(costs <= max_cost, [record["loss"] for record in records], np.nan)
    if np.isnan(losses).all():
        raise ValueError(
            f"No measured shape with a loss costs at most {max_cost:,g}: the cheapest of all {len(costs)} costs "
            f"{costs.min():,g}. Raise the budget, or measure cheaper shapes."
        )
    return shapes[np.nanargmin(losses)].tolist()


def _first_shapes(space: SearchSpace, num_shapes: int, seed: int, drop_rate: float) -> list[list[int]]:
    """Return `num_shapes` different random shapes, smallest and largest among them, in which every width occurs.

    Fewer are returned if nearly every shape of a small space was found.
    """
    shapes = dict.fromkeys([tuple(space.smallest), tuple(space.largest)])
    for step in range(DRAWS):
        missing = set(space.width_choices).difference(*shapes)
        for shape in map(tuple, space.sample(num_shapes, (seed, 0, step), drop_rate=drop_rate).tolist()):
            # The predictor only knows widths that were measured: the last places are kept for those still missing.
            if len(shapes) < num_shapes - len(missing) or missing.intersection(shape):
                shapes[shape] = None
                missing.difference_update(shape)
        if len(shapes) >= num_shapes:
            break
    return [list(shape) for shape in shapes]
