"""Find a good shape under several constraints at once by evolution, as the paper does (arXiv 2110.04711).

For costs and predictors that are sums over the layers, `search.pareto.pareto_front` is exact and faster. Evolutionary
search works with any predictor and any number of constraints, among them latency and perplexity.

The algorithm: evaluate a population of random shapes of all sizes. Then, in every iteration, the fittest shapes become
parents. Mutate parents (redraw some of their widths), crossover parents (mix the widths of two), evaluate the new
shapes, and keep the fittest of the old and the new. `fitness.py` says which of two shapes is fitter. Because a shape
that violates the constraints less is fitter, a population in which no shape meets them evolves towards one that does.
"""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..checks import check_count
from ..files import lock, read_json, write_json
from ..model.costs import HasChainCost, chain_cost
from ..model.shapes import SearchSpace
from .fitness import (
    MAX_LOG,
    Population,
    Predictor,
    Problem,
    Settings,
    check_constraints,
    measure_of_predictor,
    readable,
)


FORMAT = "supershaper-hf evolution 1"


@dataclass(frozen=True)
class EvolutionResult:
    """The best shape an evolutionary search has found.

    Attributes:
        shape: Hidden sizes, one per layer.
        loss: Its predicted loss in nats, or None if something else was predicted.
        perplexity: Its predicted perplexity, exp(loss), or None if something else was predicted.
        costs: Its `"parameters"`, its `"flops"` and, if a table was given, its `"latency"` in seconds.
        candidates: Number of evaluated shapes.
        history: One dictionary for the initial population and one per iteration. `iteration` is its number,
            `candidates` the number of shapes evaluated so far. The other entries describe the best shape so far:
            `violation` (sum of the relative violations of the constraints; 0 if it meets all), the
            prediction, and, by name, what is minimised or constrained.
        distance: Its predicted distance to the original, or None if something else was predicted.
        task_loss: Its predicted loss on a task, or None if something else was predicted.
    """

    shape: list[int]
    loss: float | None
    perplexity: float | None
    costs: dict[str, int | float]
    candidates: int
    history: list[dict[str, float]]
    distance: float | None = None
    task_loss: float | None = None


def evolutionary_search(
    space: SearchSpace,
    predictor: Predictor,
    constraints: Mapping[str, float],
    *,
    minimize: str | None = None,
    latency: HasChainCost | None = None,
    sequence_length: int = 128,
    population_size: int = 100,
    num_parents: int = 10,
    num_mutations: int = 100,
    mutation_rate: float = 0.4,
    num_crossovers: int = 100,
    iterations: int = 300,
    drop_rate: float = 0.0,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_steps: int = 50,
) -> EvolutionResult:
    """Return the best shape found that meets all constraints. The default sizes are the paper's.

    Args:
        space: The search space.
        predictor: Its `predict(shapes (n, layers))` returns losses (n,) in nats, or of another measure if its
            attribute `measure` says so. It need not be additive.
        constraints: Upper bounds, inclusive: `"parameters"`, `"flops"`, `"latency"` (seconds) and `"perplexity"` (the
            exponential of the predicted loss), `"distance"` or `"task_loss"`. An empty mapping allows every shape.
        minimize: `"parameters"`, `"flops"`, `"latency"`, or what is predicted, `"loss"`, `"distance"` or
            `"task_loss"`. By default it is what is predicted.
        latency: A `LatencyTable`, or another object with its method `chain_cost(config)`, in seconds.
        sequence_length: Tokens per sequence, for FLOPs.
        population_size: Number of shapes that are kept from one iteration to the next.
        num_parents: Number of the fittest shapes from which new ones are made.
        num_mutations: Number of shapes made in each iteration by redrawing widths of one parent.
        mutation_rate: Probability that the width of a layer is redrawn.
        num_crossovers: Number of shapes made in each iteration by taking each width from one of two parents.
        iterations: Number of iterations. All of them are run: there is no test of convergence.
        drop_rate: Probability that a drawn width is 0, which drops the layer. With a `ShapePredictor`, only layers are
            dropped that are dropped in some of the measured shapes. By default no layer is dropped.
        seed: Random seed. Iteration i draws from (seed, i) alone.
        checkpoint: A JSON file that is written every `checkpoint_steps` iterations and at the end. The same call
            continues from it and returns what an uninterrupted one would have returned. `iterations` may be raised.
            One search at a time may use it.
        checkpoint_steps: Number of iterations between two checkpoints.

    Raises:
        ValueError: If no shape was found that meets the constraints (the message names the nearest one and what it
            violates), an argument is out of its range, or the checkpoint is damaged or belongs to another search.
        RuntimeError: If another search is using the checkpoint.

    Example:
        >>> from supershaper_hf import SearchSpace, SuperShaperConfig
        >>> from supershaper_hf.search.predictor import ShapePredictor
        >>> space = SearchSpace.from_config(SuperShaperConfig(vocab_size=28996))
        >>> shapes = space.sample(100, seed=0)
        >>> predictor = ShapePredictor.fit(shapes, 5 - shapes @ range(1, 13) / 30_000)  # upper layers matter more
        >>> result = evolutionary_search(space, predictor, {"parameters": 63e6, "perplexity": 60}, iterations=50)
        >>> result.costs["parameters"] <= 63e6
        True
    """
    settings = Settings(
        constraints=check_constraints(constraints),
        minimize=measure_of_predictor(predictor) if minimize is None else minimize,
        sequence_length=sequence_length,
        population_size=population_size,
        num_parents=num_parents,
        num_mutations=num_mutations,
        mutation_rate=mutation_rate,
        num_crossovers=num_crossovers,
        drop_rate=drop_rate,
        seed=seed,
        width_choices=space.width_choices,
        num_layers=space.num_layers,
    )
    check_count("iterations", iterations)
    check_count("checkpoint_steps", checkpoint_steps)
    problem = Problem(space, predictor, settings, latency)
    with ExitStack() as held:
        if checkpoint is not None:
            held.enter_context(lock(checkpoint))
        state = _start(problem, iterations, checkpoint)
        for iteration in range(len(state.history), iterations + 1):
            state = _iterate(problem, state, np.random.default_rng((seed, iteration)))
            if checkpoint is not None and (iteration % checkpoint_steps == 0 or iteration == iterations):
                _save(problem, state, Path(checkpoint))
    return _result(problem, state)


# The algorithm


class _State(NamedTuple):
    population: Population
    history: list[dict[str, float]]  # see `EvolutionResult`


def _mutate(problem: Problem, parents: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Redraw each width of random parents with the probability `mutation_rate`: (num_mutations, layers) picks."""
    settings = problem.settings
    chosen = parents[random.integers(len(parents), size=settings.num_mutations)]
    smallest = int(bool(settings.drop_rate))  # position of the smallest width: 1 if 0, a dropped layer, comes before it
    drawn = random.integers(smallest, len(problem.choices), size=chosen.shape)
    if settings.drop_rate:
        drawn[(random.random(chosen.shape) < settings.drop_rate) & problem.droppable] = 0
    return np.where(random.random(chosen.shape) < settings.mutation_rate, drawn, chosen)


def _crossover(problem: Problem, parents: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Take each width from one of two different random parents: (num_crossovers, layers) picks."""
    size, count = problem.settings.num_crossovers, len(parents)
    first = random.integers(count, size=size)
    second = (first + random.integers(1, max(count, 2), size=size)) % count  # another parent, if there are two
    return np.where(random.random((size, parents.shape[1])) < 0.5, parents[first], parents[second])


def _iterate(problem: Problem, state: _State, random: np.random.Generator) -> _State:
    """One iteration: parents, mutate, crossover, evaluate, keep the fittest."""
    parents = state.population.picks[: problem.settings.num_parents]
    picks = np.concatenate([_mutate(problem, parents, random), _crossover(problem, parents, random)])
    population, new = problem.select(state.population, picks)
    candidates = int(state.history[-1]["candidates"]) + new
    entry = _describe(problem, population, candidates, len(state.history))
    return _State(population, [*state.history, entry])


def _describe(problem: Problem, population: Population, candidates: int, iteration: int) -> dict[str, float]:
    """Return the entry of the history for a population, see `EvolutionResult`."""
    best = dict(zip(problem.measures, population.values[0].tolist()))
    return {"iteration": iteration, "candidates": candidates, "violation": float(population.violations[0]), **best}


def _result(problem: Problem, state: _State) -> EvolutionResult:
    """Return the fittest shape.

    Raises:
        ValueError: If it is not feasible.
    """
    shape = problem.choices[state.population.picks[0]]
    best = state.history[-1]
    candidates = int(best["candidates"])
    if best["violation"] > 0:
        missed = [
            f"{name}: {readable(best[name])}, {100 * (best[name] / bound - 1):.3g} % above the bound {readable(bound)}"
            for name, bound in problem.settings.constraints.items()
            if best[name] > bound
        ]
        raise ValueError(
            f"No shape met the constraints after {len(state.history) - 1} iterations ({candidates:,} candidates). The "
            f"nearest, {shape.tolist()}, misses {'; '.join(missed)}. Raise a bound, or search for more iterations."
        )
    hidden_size = problem.space.config.hidden_size
    costs = {name: chain_cost(cost, hidden_size, shape[None])[0].item() for name, cost in problem.costs.items()}
    loss = best.get("loss")
    perplexity = None if loss is None else best.get("perplexity", float(np.exp(min(loss, MAX_LOG))))
    others = {name: best.get(name) for name in ("distance", "task_loss")}
    return EvolutionResult(shape.tolist(), loss, perplexity, costs, candidates, state.history, **others)


# Checkpoints


def _start(problem: Problem, iterations: int, checkpoint: str | Path | None) -> _State:
    """Return the state in the checkpoint, or the initial population if there is no checkpoint yet."""
    if checkpoint is not None and Path(checkpoint).exists():
        return _load(problem, iterations, Path(checkpoint))
    population, candidates = problem.select(None, problem.initial)
    return _State(population, [_describe(problem, population, candidates, 0)])


def _save(problem: Problem, state: _State, file: Path) -> None:
    content = {
        "settings": _plain(problem.settings),
        "picks": state.population.picks.tolist(),
        "values": state.population.values.tolist(),
        "history": state.history,
        "probe": problem.probe.tolist(),
    }
    write_json(file, FORMAT, content)


def _plain(settings: Settings) -> dict[str, Any]:
    """Return the settings as JSON knows them: NumPy numbers become Python numbers."""
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in asdict(settings).items()}


def _load(problem: Problem, iterations: int, file: Path) -> _State:
    """Read what `_save` has written.

    Raises:
        ValueError: If the file is damaged, belongs to another search, or holds more iterations than are asked for.
    """
    content = read_json(file, FORMAT)
    if not isinstance(content.get("settings"), dict):
        raise _damaged(file)
    _check_same_settings(problem, content["settings"], file)
    if not _is_checkpoint(problem, content):
        raise _damaged(file)
    _check_same_values(problem, np.array(content["probe"]), file)
    done = len(content["history"]) - 1
    if done > iterations:
        raise ValueError(
            f"{file} is a checkpoint of iteration {done}, beyond iterations={iterations}. Ask for at least {done}, or "
            "use another file."
        )
    picks, values = np.array(content["picks"]), np.array(content["values"])
    population = Population(picks, problem.encode(picks), values, problem.violations(values))
    return _State(population, content["history"])


def _damaged(file: Path) -> ValueError:
    return ValueError(f"{file} is damaged, or is not a checkpoint of this search space. Remove it to start again.")


def _is_checkpoint(problem: Problem, content: Mapping[str, Any]) -> bool:
    """Return whether the values of a checkpoint have the types and sizes that `_save` writes."""
    names = {"iteration", "candidates", "violation", *problem.measures}
    history = content.get("history")
    picks, values, probe = (_array(content.get(name)) for name in ("picks", "values", "probe"))
    count, measures = len(picks), len(problem.measures)
    return (
        0 < count <= problem.settings.population_size
        and picks.dtype.kind == "i"
        and picks.shape == (count, problem.space.num_layers)
        and picks.min() >= 0
        and picks.max() < len(problem.choices)
        and values.dtype.kind == probe.dtype.kind == "f"
        and values.shape == (count, measures)
        and probe.shape == problem.probe.shape
        and isinstance(history, list)
        and len(history) > 0
        and all(isinstance(entry, dict) and entry.keys() == names for entry in history)
        and all(type(number) is int or _is_finite(number) for entry in history for number in entry.values())
    )


def _array(value: Any) -> np.ndarray:
    """Return a JSON value as an array, which is empty unless the value is an array of finite numbers."""
    try:
        array = np.array(value)
    except ValueError:  # lists of different lengths
        array = np.empty(0)
    return array if array.ndim and array.dtype.kind in "if" and np.isfinite(array).all() else np.empty(0)


def _is_finite(value: Any) -> bool:
    return type(value) is float and math.isfinite(value)


def _check_same_settings(problem: Problem, settings: Mapping[str, Any], file: Path) -> None:
    differing = [
        f"{name} was {settings.get(name)!r} and is {value!r}"
        for name, value in _plain(problem.settings).items()
        if settings.get(name) != value
    ]
    if differing:
        raise _another_search(file, "; ".join(differing))


def _check_same_values(problem: Problem, probe: np.ndarray, file: Path) -> None:
    """Raise if the predictor or a cost gives other values for the initial shapes than in the checkpoint."""
    same = np.isclose(probe, problem.probe, rtol=1e-9, atol=0).all(axis=0)
    for name in np.array(problem.measures)[~same][:1]:
        what = "predictor" if name in ("loss", "perplexity", "distance", "task_loss") else name
        raise _another_search(file, f"the {what} gives other values for the same shapes")


def _another_search(file: Path, difference: str) -> ValueError:
    return ValueError(
        f"{file} is a checkpoint of another search: {difference}. Repeat the call that began it, or use another file."
    )
