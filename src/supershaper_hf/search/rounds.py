"""Choose what to measure: random shapes first, then in rounds those that may be the best for a budget.

Random shapes teach the predictor most, but they lie far from the Pareto front. In every further round, predictors are
drawn that fit the measurements so far about as well as the best one, and the best shapes of these predictors for the
budgets that matter are measured (Thompson sampling; Thompson 1933). Where the measurements leave little doubt, the
drawn predictors agree, and their best shapes are measured already.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..checks import as_numbers, check_count
from ..model.costs import Cost, chain_cost
from ..model.shapes import SearchSpace
from .measures import measure_of
from .pareto import ParetoFront, amount, pareto_front
from .predictor import MINIMUM_SHAPES, Evidence, ShapePredictor


ATTEMPTS = 64  # after this many draws without enough different shapes, the space is taken to have no others

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

    Everything is drawn from the seed and what was measured. With a `measure` that resumes, such as `evaluate_shapes`
    with a records file, the same call therefore continues after a crash. Whatever can be checked is checked before the
    first shape is measured.

    Args:
        space: The search space.
        measure: A function that takes shapes and returns one record for each, with `shape` and with `loss` in nats or
            `distance`.
        num_shapes: Number of shapes in all rounds together. The first round has at least `MINIMUM_SHAPES` of them.
        rounds: Number of rounds. The first one is random.
        seed: Random seed, not negative.
        cost: The cost of the Pareto front, or two costs: see `pareto_front`.
        max_cost: The budgets that matter, in the unit of the (first) cost. Without them all shapes are random: if
            every budget matters, rounds help only from about 100 shapes on (docs/results.md).
        drop_rate: Probability of each layer to be dropped in the first round: see `SearchSpace.sample`.
        sequence_length: Tokens per sequence, for a cost in FLOPs.

    Returns:
        All records, in the order of measuring. There are fewer than `num_shapes` if the whole space is measured, or
        all shapes that the drawn predictors propose.

    Raises:
        ValueError: If a number is too small, the space has too few shapes for a predictor, a cost is unknown, no shape
            is as cheap as a budget, or too few of the measurements are finite.

    Example:
        >>> from supershaper_hf import SearchSpace, SuperShaperConfig
        >>> config = SuperShaperConfig(hidden_size=96, num_attention_heads=4, num_hidden_layers=4, vocab_size=50)
        >>> space = SearchSpace.from_config(config)
        >>> def measure(shapes):  # stands for `evaluate_shapes` on a supernet
        ...     return [{"shape": shape, "loss": 4 - shape[0] / 90 - shape[3] / 60} for shape in shapes]
        >>> records = measure_in_rounds(space, measure, num_shapes=30, cost="parameters", max_cost=1_500_000)
        >>> best_measured(space, records, "parameters", 1_500_000)
        [80, 24, 16, 96]
    """
    budgets = None if rounds == 1 else max_cost  # without further rounds, all shapes are random
    shapes = _first_round(space, num_shapes, rounds, seed, cost, max_cost, drop_rate, sequence_length)
    records = measure(shapes)
    if budgets is None:
        return records
    for number in range(1, rounds):
        share = -(-(num_shapes - len(records)) // (rounds - number))  # rounded up: with many rounds the last have none
        if share == 0:
            break
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # only the caller's fit on all records has to warn
            predictor = ShapePredictor.fit_records(records)
        known = {tuple(record["shape"]) for record in records}
        proposed = propose_shapes(
            space, predictor, share, known, (seed, number), cost, max_cost=budgets, sequence_length=sequence_length
        )
        if proposed:
            records = records + measure(proposed)
    return records


def _first_round(
    space: SearchSpace,
    num_shapes: int,
    rounds: int,
    seed: int,
    cost: Cost | Sequence[Cost],
    max_cost: float | Sequence[float] | None,
    drop_rate: float,
    sequence_length: int,
) -> list[list[int]]:
    """Return the shapes of the first round, after all checks that need no measurement."""
    check_count("num_shapes", num_shapes, least=0)
    check_count("rounds", rounds)
    least = max(MINIMUM_SHAPES, len(space.width_choices))
    if num_shapes < least:
        raise ValueError(f"num_shapes={num_shapes} is too small: the first round needs at least {least} shapes.")
    only_round = rounds == 1 or max_cost is None
    shapes = _random_shapes(space, num_shapes if only_round else max(num_shapes // rounds, least), seed, drop_rate)
    if len(shapes) < MINIMUM_SHAPES:
        raise ValueError(
            f"This search space has {len(shapes)} shapes only, but a predictor needs {MINIMUM_SHAPES}. Measure all of "
            "them with evaluate_shapes, and choose the best one with best_measured."
        )
    front = pareto_front(space, _indifferent_predictor(space, shapes), cost, sequence_length)  # it checks the cost
    if max_cost is not None:
        _check_affordable(front, max_cost)
    return shapes


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
    """Return up to `num_shapes` shapes that are not in `known`, each from the front of a different drawn predictor.

    The budgets `max_cost` take turns. From each front, the best shape within one budget is taken that is not known yet.
    There are fewer shapes if all shapes of a front within the budget are known.

    Raises:
        ValueError: If no shape is as cheap as a budget.
    """
    budgets = np.atleast_1d(max_cost)
    chosen: dict[tuple[int, ...], None] = {}
    for number, drawn in enumerate(predictor.draw(num_shapes, seed)):
        front = pareto_front(space, drawn, cost, sequence_length)
        _check_affordable(front, max_cost)
        costs = next(iter(front.costs.values()))
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
    """Return the measured shape with the lowest loss or distance that costs at most `max_cost`.

    Args:
        space: The search space.
        records: Records of measured shapes, with `shape` and `loss` or `distance`. Records in which this is NaN are
            ignored.
        cost: `"parameters"`, `"flops"` or a `LatencyTable`.
        max_cost: The budget, in the unit of the cost.
        sequence_length: Tokens per sequence, for FLOPs.

    Raises:
        ValueError: If no measured shape is that cheap, a loss or distance is not a number, or some records hold losses
            and others distances.

    Example:
        >>> from supershaper_hf import SearchSpace, SuperShaperConfig
        >>> config = SuperShaperConfig(hidden_size=96, num_attention_heads=4, num_hidden_layers=2, vocab_size=50)
        >>> space = SearchSpace.from_config(config)
        >>> records = [{"shape": [96, 96], "loss": 2.0}, {"shape": [16, 96], "loss": 2.2}]
        >>> best_measured(space, records, "parameters", 900_000)
        [16, 96]
    """
    if not records:
        raise ValueError("There are no records to choose from. Measure shapes with evaluate_shapes.")
    measure, shapes = measure_of(records), np.array([record["shape"] for record in records])
    terms = space.terms(cost, sequence_length)
    costs = chain_cost(terms, space.config.hidden_size, shapes)
    values = as_numbers(measure.plural, [record[measure.name] for record in records])
    losses = np.where(costs <= max_cost, values, np.nan)
    if np.isnan(losses).all():
        raise ValueError(
            f"No measured shape with a {measure.name} costs at most {amount(max_cost, terms.name)}: the cheapest of "
            f"all {len(costs)} costs {amount(costs.min(), terms.name)}. Raise the budget, or measure cheaper shapes."
        )
    return shapes[np.nanargmin(losses)].tolist()


def _check_affordable(front: ParetoFront, max_cost: float | Sequence[float]) -> None:
    """Raise a ValueError unless a shape of the front is as cheap as the lowest of the budgets `max_cost`."""
    budgets = as_numbers("max_cost", max_cost)
    if budgets.size == 0:
        raise ValueError("max_cost names no budget. Leave it out if every budget matters.")
    name, costs = next(iter(front.costs.items()))
    lowest = budgets.min()
    if not costs.min() <= lowest:  # also if it is not a number
        raise ValueError(
            f"max_cost={amount(lowest, name)} cannot be met: the cheapest shape has {amount(costs.min(), name)}. "
            "Raise the budget."
        )


def _indifferent_predictor(space: SearchSpace, shapes: list[list[int]]) -> ShapePredictor:
    """Return a predictor with the same loss for all shapes, so that its front is the cheapest shape alone.

    It drops the layers that are dropped in one of `shapes`, as a predictor does that is fitted on them.
    """
    measured = np.array(shapes)
    widths = [*([0] if (measured == 0).any() else []), *space.width_choices]
    evidence = Evidence(measured, np.zeros(len(measured)), strength=1.0, noise=0.0)
    return ShapePredictor(widths, 0.0, np.zeros((space.num_layers, len(widths))), evidence=evidence)


def _random_shapes(space: SearchSpace, num_shapes: int, seed: int, drop_rate: float) -> list[list[int]]:
    """Return `num_shapes` different random shapes. The smallest and the largest are among them, and every width occurs.

    There are fewer if a small space does not have so many.
    """
    shapes = dict.fromkeys([tuple(space.smallest), tuple(space.largest)])
    for step in range(ATTEMPTS):
        missing = set(space.width_choices).difference(*shapes)
        for shape in map(tuple, space.sample(num_shapes, (seed, 0, step), drop_rate=drop_rate).tolist()):
            # The predictor only knows widths that were measured, so the last places are kept for widths still missing.
            if len(shapes) < num_shapes - len(missing) or missing.intersection(shape):
                shapes[shape] = None
                missing.difference_update(shape)
        if len(shapes) >= num_shapes:
            break
    return [list(shape) for shape in shapes]
