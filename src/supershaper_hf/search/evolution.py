"""Find a good shape under several constraints at once by evolution, as the paper does (arXiv 2110.04711).

For costs and predictors that are sums along the layers, `search.pareto_front` is exact and faster. Evolutionary search
asks for no such structure: any predictor will do, and any number of constraints, among them latency and perplexity.

The algorithm: evaluate a population of random shapes of all sizes. Then, in every iteration, the fittest become
parents; mutate them (redraw some of their widths) and crossover them (mix the widths of two); evaluate the new shapes;
keep the fittest of old and new. A shape that meets all constraints is fitter than any that does not; among those that
do, the lower value of what is minimised is fitter; among those that do not, the lower sum of relative violations (Deb
2000, "An efficient constraint handling method for genetic algorithms"). So a population without any feasible shape
evolves towards one, and no candidate is ever drawn again until it fits.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..checks import check_count
from ..files import write_file
from ..model.costs import ChainCost, HasChainCost, chain_cost, resolve_cost
from ..model.shapes import SearchSpace


CONSTRAINTS = ("parameters", "flops", "latency", "perplexity")
MINIMIZABLE = ("loss", "parameters", "flops", "latency")
MAX_LOG = 700.0  # exp of more overflows


class Predictor(Protocol):
    """Whatever predicts the losses (n,) in nats of integer shapes (n, layers), such as a `ShapePredictor`."""

    def predict(self, shapes: np.ndarray, /) -> np.ndarray: ...


@dataclass(frozen=True)
class EvolutionResult:
    """The best shape an evolutionary search has found.

    Attributes:
        shape: Hidden sizes, one per layer.
        loss: Its predicted loss in nats.
        perplexity: Its predicted perplexity, exp(loss).
        costs: Its `"parameters"`, `"flops"` and, where a table was given, `"latency"` in seconds.
        candidates: Number of shapes evaluated.
        history: One record per iteration, the first of the initial population: `iteration`, `candidates` evaluated so
            far, and of the best shape so far `violation` (sum of relative violations, 0 if feasible), `loss`, and what
            is minimised or constrained by its name.
    """

    shape: list[int]
    loss: float
    perplexity: float
    costs: dict[str, int | float]
    candidates: int
    history: list[dict[str, float]]


def evolutionary_search(
    space: SearchSpace,
    predictor: Predictor,
    constraints: Mapping[str, float],
    *,
    minimize: str = "loss",
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
    """Return the best shape found that meets all constraints. The sizes default to the paper's.

    Args:
        space: The search space.
        predictor: Has `predict(shapes (n, layers)) -> losses (n,)` in nats; it need not be additive.
        constraints: Upper bounds, which may be reached: `"parameters"`, `"flops"`, `"latency"` (seconds) and
            `"perplexity"` (of the predicted loss). An empty mapping bounds nothing.
        minimize: `"loss"`, `"parameters"`, `"flops"` or `"latency"`.
        latency: A `LatencyTable`, or what else has `chain_cost(config)`, in seconds.
        sequence_length: Tokens per sequence, for FLOPs.
        population_size: Shapes kept from one iteration to the next.
        num_parents: The fittest shapes of the population, from which new ones are made.
        num_mutations: Shapes made in each iteration by redrawing widths of one parent.
        mutation_rate: Probability of each layer to have its width redrawn.
        num_crossovers: Shapes made in each iteration by taking each layer's width from one of two parents.
        iterations: Always run in full: there is no test of convergence.
        drop_rate: Probability of a drawn width to be 0, which drops the layer; by default no layer is dropped.
        seed: Iteration i draws from (seed, i) alone.
        checkpoint: JSON file. It is written every `checkpoint_steps` iterations and at the end; the same call goes on
            from it and returns what an uninterrupted one would have. `iterations` may be raised.
        checkpoint_steps: Iterations between two checkpoints.

    Raises:
        ValueError: If no shape was found that meets the constraints, with the nearest one and what it misses; if an
            argument is out of its range; if the checkpoint is damaged or of another search.

    Example:
        >>> from supershaper_hf import SearchSpace, SuperShaperConfig
        >>> from supershaper_hf.search.predictor import ShapePredictor
        >>> space = SearchSpace(SuperShaperConfig(vocab_size=28996))
        >>> shapes = space.sample(100, seed=0)
        >>> predictor = ShapePredictor.fit(shapes, 5 - shapes @ range(1, 13) / 30_000)  # upper layers matter more
        >>> result = evolutionary_search(space, predictor, {"parameters": 63e6, "perplexity": 60}, iterations=50)
        >>> result.costs["parameters"] <= 63e6
        True
    """
    settings = _Settings(
        constraints=_check_bounds(constraints),
        minimize=minimize,
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
    check_count("iterations", iterations, 1)
    check_count("checkpoint_steps", checkpoint_steps, 1)
    problem = _Problem(space, predictor, settings, _resolve_costs(space, settings, latency))
    state = _start(problem, iterations, checkpoint)
    for iteration in range(len(state.history), iterations + 1):
        state = _iterate(problem, state, np.random.default_rng((seed, iteration)))
        if checkpoint is not None and (iteration % checkpoint_steps == 0 or iteration == iterations):
            _save(problem, state, Path(checkpoint))
    return _result(problem, state)


# What is searched for


@dataclass(frozen=True)
class _Settings:
    """Everything but the predictor and the costs that decides what a search finds. Checked at construction."""

    constraints: dict[str, float]
    minimize: str
    sequence_length: int
    population_size: int
    num_parents: int
    num_mutations: int
    mutation_rate: float
    num_crossovers: int
    drop_rate: float
    seed: int
    width_choices: list[int]
    num_layers: int

    def __post_init__(self) -> None:
        if self.minimize not in MINIMIZABLE:
            raise ValueError(f"minimize={self.minimize!r}. Allowed: {', '.join(map(repr, MINIMIZABLE))}.")
        for name, least in (("sequence_length", 1), ("population_size", 2), ("num_parents", 1)):
            check_count(name, getattr(self, name), least)
        for name in ("num_mutations", "num_crossovers", "seed"):
            check_count(name, getattr(self, name), 0)
        if self.num_parents > self.population_size:
            raise ValueError(
                f"num_parents={self.num_parents} cannot be chosen from population_size={self.population_size}. "
                "Use fewer parents or a larger population."
            )
        if self.num_crossovers and self.num_parents < 2:
            raise ValueError(
                f"num_crossovers={self.num_crossovers} needs two parents. Use num_parents of at least 2, or "
                "num_crossovers=0."
            )
        if self.num_mutations + self.num_crossovers == 0:
            raise ValueError("num_mutations=0 and num_crossovers=0 make no new shapes. Raise at least one of them.")
        if not 0 < self.mutation_rate <= 1:
            raise ValueError(f"mutation_rate={self.mutation_rate} must be above 0 and at most 1.")
        if not 0 <= self.drop_rate < 1:
            raise ValueError(f"drop_rate={self.drop_rate} must be at least 0 and below 1. Use 0 to drop no layer.")


def _check_bounds(constraints: Mapping[str, float]) -> dict[str, float]:
    """Return the bounds as floats in the order of `CONSTRAINTS`, whatever order they were given in."""
    if not isinstance(constraints, Mapping):
        raise ValueError(f'constraints={constraints!r} must map names to upper bounds, such as {{"parameters": 63e6}}.')
    for name, bound in constraints.items():
        if name not in CONSTRAINTS:
            raise ValueError(f"Unknown constraint {name!r}. Allowed: {', '.join(map(repr, CONSTRAINTS))}.")
        number = isinstance(bound, int | float | np.number) and not isinstance(bound, bool)
        if not number or not 0 < bound < math.inf:
            raise ValueError(
                f"constraints[{name!r}]={bound!r} must be a finite number above 0: an upper bound. "
                "Leave the constraint out to allow everything."
            )
    return {name: float(constraints[name]) for name in CONSTRAINTS if name in constraints}


def _resolve_costs(space: SearchSpace, settings: _Settings, latency: HasChainCost | None) -> dict[str, ChainCost]:
    """Return the terms of every cost that can be told, by name.

    Raises:
        ValueError: If latency is asked for without a table, or no shape at all can meet a bound.
    """
    costs = {name: resolve_cost(name, space.config, settings.sequence_length) for name in ("parameters", "flops")}
    if latency is not None:
        if not hasattr(latency, "chain_cost"):
            raise ValueError(f"latency={latency!r} must be a LatencyTable, or have chain_cost(config) as it does.")
        costs["latency"] = resolve_cost(latency, space.config, settings.sequence_length)
    elif "latency" in (settings.minimize, *settings.constraints):
        raise ValueError("Latency is constrained or minimised, but nothing tells it. Pass latency=LatencyTable(...).")
    cheapest = np.array([_cheapest(space, settings)])
    for name in ("parameters", "flops"):  # they grow with every width; seconds need not
        least = int(chain_cost(costs[name], space.config.hidden_size, cheapest)[0])
        bound = settings.constraints.get(name, math.inf)
        if least > bound:
            raise ValueError(
                f"constraints[{name!r}]={_number(bound)} is below the smallest subnet, which has {_number(least)} "
                f"{name}. Raise the bound."
            )
    return costs


def _cheapest(space: SearchSpace, settings: _Settings) -> list[int]:
    """The shape of fewest parameters and operations: all terms of these are positive and grow with the widths."""
    kept = 1 if settings.drop_rate else space.num_layers
    return [0] * (space.num_layers - kept) + space.smallest[:kept]


# Evaluating candidates


class _Population(NamedTuple):
    """Evaluated shapes, no two equal, the fittest first. `picks` (n, layers) index `_Problem.choices`."""

    picks: np.ndarray
    codes: np.ndarray  # (n,) 64-bit hashes of the picks
    values: np.ndarray  # (n, measures)
    violations: np.ndarray  # (n,)


class _State(NamedTuple):
    population: _Population
    history: list[dict[str, float]]  # of the initial population and every iteration so far


class _Problem:
    """How candidates are drawn, evaluated and compared.

    `measures` names the columns of values: the loss, and what else is minimised or constrained.
    """

    def __init__(
        self, space: SearchSpace, predictor: Predictor, settings: _Settings, costs: dict[str, ChainCost]
    ) -> None:
        known = getattr(predictor, "width_choices", None)
        if settings.drop_rate and known is not None and 0 not in known:
            raise ValueError(
                f"drop_rate={settings.drop_rate} drops layers, but the predictor knows only the widths {list(known)}. "
                "Fit it on shapes with dropped layers (0) too, or use drop_rate=0."
            )
        self.space, self.predictor, self.settings, self.costs = space, predictor, settings, costs
        self.choices = np.array([0] * bool(settings.drop_rate) + space.width_choices)
        self.measures = list(dict.fromkeys(["loss", settings.minimize, *settings.constraints]))
        self.fitness = self.measures.index(settings.minimize)
        self.bounded = [self.measures.index(name) for name in settings.constraints]
        self.bounds = np.array(list(settings.constraints.values()))
        # Zobrist hashing: a random number per layer and width, all added up. Two of a million shapes share a sum with
        # a probability of 3e-8, and comparing 64-bit numbers is an order of magnitude faster than comparing rows.
        tables = np.random.default_rng(0).integers(2**64, size=(space.num_layers, len(self.choices)), dtype=np.uint64)
        self.table, self.offsets = tables.ravel(), np.arange(space.num_layers) * len(self.choices)

    @cached_property
    def probe(self) -> np.ndarray:
        """Values (population_size, measures) of the initial shapes: another predictor or cost shows in them."""
        return self.evaluate(_initial(self))

    def encode(self, picks: np.ndarray) -> np.ndarray:
        """Return the hashes (n,) of `picks` (n, layers)."""
        return self.table[picks + self.offsets].sum(axis=1)  # wraps around

    def evaluate(self, picks: np.ndarray) -> np.ndarray:
        """Return the values (n, measures) of `picks` (n, layers)."""
        shapes = self.choices[picks]
        losses = np.asarray(self.predictor.predict(shapes), dtype=np.float64)
        if losses.shape != (len(shapes),):
            raise ValueError(
                f"predictor.predict returned {losses.shape} for shapes {shapes.shape}. It must return one loss per "
                f"shape, {(len(shapes),)}."
            )
        if not np.isfinite(losses).all():
            strange = int((~np.isfinite(losses)).argmax())
            raise ValueError(
                f"predictor.predict returned a loss of {losses[strange]} for the shape {shapes[strange].tolist()}. "
                "Losses must be finite: look at what the predictor was fitted on."
            )
        values = np.empty((len(shapes), len(self.measures)))
        for column, name in enumerate(self.measures):
            if name == "loss":
                values[:, column] = losses
            elif name == "perplexity":
                values[:, column] = np.exp(np.minimum(losses, MAX_LOG))
            else:
                values[:, column] = chain_cost(self.costs[name], self.space.config.hidden_size, shapes)
        return values

    def select(self, population: _Population | None, picks: np.ndarray) -> tuple[_Population, int]:
        """Return the fittest of the population and the new among `picks` (n, layers), and how many were new."""
        codes, old = self.encode(picks), 0
        if population is not None:
            picks, codes = np.concatenate([population.picks, picks]), np.concatenate([population.codes, codes])
            old = len(population.codes)
        first = np.sort(np.unique(codes, return_index=True)[1])
        new = first[old:]  # shapes of the population differ from each other, so all of them are first
        new = new[self.choices[picks[new]].any(axis=1)]  # a shape keeps at least one layer
        if len(new) == 0 and population is not None:
            return population, 0
        values = self.evaluate(picks[new])
        violations = self.violations(values)
        kept = np.concatenate([np.arange(old), new])
        if population is not None:
            values = np.concatenate([population.values, values])
            violations = np.concatenate([population.violations, violations])
        # Feasible shapes have a violation of exactly 0, so fitness decides among them; the older one wins a tie.
        order = np.lexsort((values[:, self.fitness], violations))[: self.settings.population_size]
        kept = kept[order]
        return _Population(picks[kept], codes[kept], values[order], violations[order]), len(new)

    def violations(self, values: np.ndarray) -> np.ndarray:
        """Return the sums (n,) over the constraints of the relative excess over the bound."""
        return (np.maximum(values[:, self.bounded] - self.bounds, 0) / self.bounds).sum(axis=1)

    def record(self, population: _Population, candidates: int, iteration: int) -> dict[str, float]:
        best = dict(zip(self.measures, population.values[0].tolist()))
        return {"iteration": iteration, "candidates": candidates, "violation": float(population.violations[0]), **best}


# The algorithm


def _initial(problem: _Problem) -> np.ndarray:
    """Draw the initial picks (population_size, layers): the cheapest shape, the largest, and random ones of all sizes.

    Widths drawn uniformly would crowd in the middle of the budgets, and leave tight ones to luck.
    """
    space, settings = problem.space, problem.settings
    sizes = space.sample(settings.population_size - 2, (settings.seed, 0), "budget", settings.drop_rate)
    shapes = np.concatenate([[_cheapest(space, settings), space.largest], sizes])
    return np.searchsorted(problem.choices, shapes)


def _mutate(problem: _Problem, parents: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Redraw each width of random parents with the probability `mutation_rate`: (num_mutations, layers) picks."""
    settings = problem.settings
    chosen = parents[random.integers(len(parents), size=settings.num_mutations)]
    dropping = int(bool(settings.drop_rate))  # the first choice is then 0
    drawn = random.integers(dropping, len(problem.choices), size=chosen.shape)
    if dropping:
        drawn[random.random(chosen.shape) < settings.drop_rate] = 0
    return np.where(random.random(chosen.shape) < settings.mutation_rate, drawn, chosen)


def _crossover(problem: _Problem, parents: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Take each width from one of two different random parents: (num_crossovers, layers) picks."""
    size, count = problem.settings.num_crossovers, len(parents)
    first = random.integers(count, size=size)
    second = (first + random.integers(1, max(count, 2), size=size)) % count  # another one, where there is one
    return np.where(random.random((size, parents.shape[1])) < 0.5, parents[first], parents[second])


def _iterate(problem: _Problem, state: _State, random: np.random.Generator) -> _State:
    """One iteration: parents, mutate, crossover, evaluate, keep the fittest."""
    parents = state.population.picks[: problem.settings.num_parents]
    picks = np.concatenate([_mutate(problem, parents, random), _crossover(problem, parents, random)])
    population, new = problem.select(state.population, picks)
    candidates = int(state.history[-1]["candidates"]) + new
    state.history.append(problem.record(population, candidates, len(state.history)))
    return state._replace(population=population)


def _result(problem: _Problem, state: _State) -> EvolutionResult:
    """Return the fittest shape.

    Raises:
        ValueError: If it is not feasible.
    """
    shape = problem.choices[state.population.picks[0]]
    best = state.history[-1]
    candidates = int(best["candidates"])
    if best["violation"] > 0:
        missed = [
            f"{name}: {_number(best[name])}, {100 * (best[name] / bound - 1):.3g} % above the bound {_number(bound)}"
            for name, bound in problem.settings.constraints.items()
            if best[name] > bound
        ]
        raise ValueError(
            f"No shape met the constraints after {len(state.history) - 1} iterations ({candidates:,} candidates). The "
            f"nearest, {shape.tolist()}, misses {'; '.join(missed)}. Raise a bound, or search for more iterations."
        )
    hidden_size = problem.space.config.hidden_size
    costs = {name: chain_cost(cost, hidden_size, shape[None])[0].item() for name, cost in problem.costs.items()}
    perplexity = best.get("perplexity", float(np.exp(min(best["loss"], MAX_LOG))))
    return EvolutionResult(shape.tolist(), best["loss"], perplexity, costs, candidates, state.history)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.6g}"


# Checkpoints


def _start(problem: _Problem, iterations: int, checkpoint: str | Path | None) -> _State:
    """Return the state the checkpoint holds, or that of the initial population if there is none yet."""
    if checkpoint is not None and Path(checkpoint).exists():
        return _load(problem, iterations, Path(checkpoint))
    if checkpoint is not None:
        Path(checkpoint).parent.mkdir(parents=True, exist_ok=True)  # now rather than after the search
    population, candidates = problem.select(None, _initial(problem))
    return _State(population, [problem.record(population, candidates, 0)])


def _save(problem: _Problem, state: _State, file: Path) -> None:
    """Write the state as JSON."""
    content = {
        "settings": asdict(problem.settings),
        "picks": state.population.picks.tolist(),
        "values": state.population.values.tolist(),
        "history": state.history,
        "probe": problem.probe.tolist(),
    }
    write_file(file, _to_json({"digest": _digest(content), **content}) + "\n")


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_to_json(content).encode()).hexdigest()


def _to_json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, default=float)  # settings may be NumPy numbers


def _load(problem: _Problem, iterations: int, file: Path) -> _State:
    """Read what `_save` wrote.

    Raises:
        ValueError: If the file is damaged, of another search, or of more iterations than are asked for.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        intact = content.pop("digest") == _digest(content)
    except (ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise ValueError(f"{file} is damaged, or no checkpoint of evolutionary_search. Remove it to start again.")
    _check_same_search(problem, content, file)
    done = len(content["history"]) - 1
    if done > iterations:
        raise ValueError(
            f"{file} is a checkpoint of iteration {done}, beyond iterations={iterations}. Ask for at least {done}, or "
            "use another file."
        )
    picks, values = np.array(content["picks"]), np.array(content["values"])
    population = _Population(picks, problem.encode(picks), values, problem.violations(values))
    return _State(population, content["history"])


def _check_same_search(problem: _Problem, content: Mapping[str, Any], file: Path) -> None:
    """Raise if settings, predictor or costs are not those of the checkpoint."""
    now = asdict(problem.settings)
    differing = [
        f"{name} was {content['settings'].get(name)!r} and is {value!r}"
        for name, value in now.items()
        if content["settings"].get(name) != value
    ]
    if not differing:  # else the initial populations differ, and so would everything
        same = np.isclose(np.array(content["probe"]), problem.probe, rtol=1e-9, atol=0).all(axis=0)
        differing = [
            f"the {'predictor' if name in ('loss', 'perplexity') else name} gives other values for the same shapes"
            for name in np.array(problem.measures)[~same][:1]
        ]
    if differing:
        raise ValueError(
            f"{file} is a checkpoint of another search: {'; '.join(differing)}. Repeat its call, or use another file."
        )
