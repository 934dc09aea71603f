"""Choose what to measure: in rounds, where the Pareto front is uncertain.

Most random shapes are far from the front and tell little about it. After a first round of random shapes, every round
draws predictors from what the measurements leave open, computes the exact front of each, and measures shapes of these
fronts: shapes that may well be optimal (Thompson sampling; Thompson 1933). Where the measurements agree, the drawn
fronts do too, and their shapes are already measured.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .costs import Cost
from .predictor import MINIMUM_SHAPES, ShapePredictor
from .search import pareto_front
from .shapes import SearchSpace


Records = list[dict[str, Any]]


def measure_in_rounds(
    space: SearchSpace,
    measure: Callable[[list[list[int]]], Records],
    num_shapes: int,
    rounds: int = 4,
    seed: int = 0,
    cost: Cost = "parameters",
    drop_rate: float = 0.0,
) -> Records:
    """Measure `num_shapes` shapes: one round of random ones, then those that may lie on the front.

    Everything is drawn from the seed and the measured losses, so with a `measure` that resumes, such as
    `evaluate_shapes` with a records file, the same call goes on after a crash.

    Args:
        space: The search space.
        measure: Takes shapes, returns one record each, with `shape` and `loss` in nats.
        num_shapes: In all. At least `MINIMUM_SHAPES` of them are in the first round.
        rounds: Number of rounds; 1 measures random shapes only.
        seed: Non-negative.
        cost: Of the front that matters.
        drop_rate: Chance of each layer to be dropped in the first round: see `SearchSpace.sample`.

    Returns:
        All records, in the order of measuring.

    Raises:
        ValueError: If `rounds` is below 1, or `num_shapes` too small for them.

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
    if rounds == 1:
        first = num_shapes
    records = measure(_first_shapes(space, first, seed, drop_rate))
    for number in range(1, rounds):
        share = (num_shapes - len(records)) // (rounds - number)
        losses = [record["loss"] for record in records]
        finite = np.isfinite(losses)
        predictor = ShapePredictor.fit(
            np.array([record["shape"] for record in records])[finite], np.array(losses)[finite]
        )
        known = {tuple(record["shape"]) for record in records}
        records = records + measure(propose_shapes(space, predictor, share, known, seed=(seed, number), cost=cost))
    return records


def propose_shapes(
    space: SearchSpace,
    predictor: ShapePredictor,
    n: int,
    known: set[tuple[int, ...]],
    seed: int | Sequence[int],
    cost: Cost = "parameters",
) -> list[list[int]]:
    """Return up to `n` shapes that are not in `known`, each from the front of a predictor drawn from the posterior.

    The budgets at which the shapes are taken are spread evenly over the front. Where a shape is known, the nearest
    one on the same front that is not is taken; fewer are returned if a whole front is known.
    """
    random = np.random.default_rng(seed)
    positions = (random.permutation(n) + random.random(n)) / max(n, 1)
    chosen: dict[tuple[int, ...], None] = {}
    for position, drawn in zip(positions, predictor.draw(n, seed)):
        front = pareto_front(space, drawn, cost)
        costs = next(iter(front.costs.values()))
        budget = costs[0] + position * (costs[-1] - costs[0])
        for index in np.argsort(np.abs(costs - budget), kind="stable"):
            shape = tuple(front.shapes[index].tolist())
            if shape not in known and shape not in chosen:
                chosen[shape] = None
                break
    return [list(shape) for shape in chosen]


def _first_shapes(space: SearchSpace, n: int, seed: int, drop_rate: float) -> list[list[int]]:
    """Return `n` different shapes of all sizes, smallest and largest among them, in which every width occurs."""
    drawn = space.sample(4 * n, seed=(seed, 0), distribution="budget", drop_rate=drop_rate).tolist()
    unique = dict.fromkeys(map(tuple, [space.smallest, space.largest, *drawn]))
    shapes = [list(shape) for shape in unique][:n]
    missing = set(space.width_choices).difference(*shapes)
    for number, width in enumerate(sorted(missing)):  # the predictor only knows widths that were measured
        shapes[-1 - number][number % space.num_layers] = width
    return shapes
