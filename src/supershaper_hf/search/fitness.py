"""What makes one shape fitter than another in an evolutionary search: what is minimised, and the constraints.

A shape that meets all constraints is fitter than any that does not. Among shapes that meet them, the lower value of
what is minimised is fitter. Among shapes that do not, the lower sum of relative violations is fitter (Deb 2000, "An
efficient constraint handling method for genetic algorithms").
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np

from ..checks import check_choice, check_count, check_number
from ..model.costs import ChainCost, HasChainCost, chain_cost
from ..model.shapes import SearchSpace
from .measures import MEASURES


CONSTRAINTS = ("parameters", "flops", "latency", "perplexity", "distance", "task_loss")
MINIMIZABLE = ("loss", "distance", "task_loss", "parameters", "flops", "latency")
MAX_LOG = 700.0  # exp of more overflows


class Predictor(Protocol):
    """Predicts the losses (n,) in nats of integer shapes (n, layers), as a `ShapePredictor` does.

    If it has an attribute `measure` with the value `"distance"` or `"task_loss"`, it predicts these instead.
    """

    def predict(self, shapes: np.ndarray, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a search finds, apart from the predictor and the costs.

    Raises:
        ValueError: If a value is out of its range.
    """

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
        check_choice("minimize", self.minimize, MINIMIZABLE)
        for name, least in (("sequence_length", 1), ("population_size", 2), ("num_parents", 1)):
            check_count(name, getattr(self, name), least)
        for name in ("num_mutations", "num_crossovers", "seed"):
            check_count(name, getattr(self, name), 0)
        check_number("mutation_rate", self.mutation_rate, above=0, most=1)
        check_number("drop_rate", self.drop_rate, least=0, below=1)
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


def check_constraints(constraints: Mapping[str, float]) -> dict[str, float]:
    """Return the upper bounds as floats in the order of `CONSTRAINTS`, whatever order they were given in."""
    if not isinstance(constraints, Mapping):
        raise ValueError(f'constraints={constraints!r} must map names to upper bounds, such as {{"parameters": 63e6}}.')
    for name, bound in constraints.items():
        if name not in CONSTRAINTS:
            raise ValueError(f"Unknown constraint {name!r}. Allowed: {', '.join(map(repr, CONSTRAINTS))}.")
        check_number(f"constraints[{name!r}]", bound, above=0)
    return {name: float(constraints[name]) for name in CONSTRAINTS if name in constraints}


class Population(NamedTuple):
    """Evaluated shapes, all different, the fittest first.

    Attributes:
        picks: (n, layers) positions of the widths in `Problem.choices`.
        codes: (n,) 64-bit hashes of the picks.
        values: (n, measures), see `Problem.measures`.
        violations: (n,) sums of relative violations; 0 for a shape that meets all constraints.
    """

    picks: np.ndarray
    codes: np.ndarray
    values: np.ndarray
    violations: np.ndarray


class Problem:
    """How shapes are evaluated and compared.

    Attributes:
        choices: The widths that a layer can have, with 0 first if layers can be dropped.
        droppable: (layers,) booleans: which layers can be dropped.
        measure: What the predictor predicts, `"loss"`, `"distance"` or `"task_loss"`.
        measures: Names of the columns of values: what is predicted, and what else is minimised or constrained.
        costs: The terms of each known cost, by name.
    """

    def __init__(
        self, space: SearchSpace, predictor: Predictor, settings: Settings, latency: HasChainCost | None
    ) -> None:
        self.space, self.predictor, self.settings = space, predictor, settings
        self.droppable = _droppable(predictor, settings)
        self.choices = np.array([0] * bool(settings.drop_rate) + space.width_choices)
        self.measure = measure_of_predictor(predictor)
        self.measures = list(dict.fromkeys([self.measure, settings.minimize, *settings.constraints]))
        self._check_measures()
        self.minimized = self.measures.index(settings.minimize)
        self.bounded = [self.measures.index(name) for name in settings.constraints]
        self.bounds = np.array(list(settings.constraints.values()))
        # Zobrist hashing: the sum of one random number per layer and width. Two of a million shapes have the same sum
        # with a probability of 3e-8, and comparing 64-bit numbers is ten times faster than comparing rows.
        tables = np.random.default_rng(0).integers(2**64, size=(space.num_layers, len(self.choices)), dtype=np.uint64)
        self.table, self.offsets = tables.ravel(), np.arange(space.num_layers) * len(self.choices)
        self.costs = self._resolve_costs(latency)

    def _check_measures(self) -> None:
        """Raise a ValueError if something is minimised or constrained that follows from another measure."""
        for other in MEASURES.values():
            if other.name != self.measure and (wrong := {other.name, other.shown}.intersection(self.measures)):
                own = MEASURES[self.measure]
                raise ValueError(
                    f"The predictor predicts a {own.name}, so the {wrong.pop()} of a shape is unknown. Minimise "
                    f"{own.name!r} and constrain {own.shown!r} instead, or fit a predictor on {other.plural}."
                )

    def _resolve_costs(self, latency: HasChainCost | None) -> dict[str, ChainCost]:
        """Return the terms of every known cost by name.

        Raises:
            ValueError: If latency is needed and there is no table, or no shape at all can meet a bound.
        """
        space, settings = self.space, self.settings
        costs = {name: space.terms(name, settings.sequence_length) for name in ("parameters", "flops")}
        if latency is not None:
            if not hasattr(latency, "chain_cost"):
                raise ValueError(f"latency={latency!r} must be a LatencyTable, or have its method chain_cost(config).")
            costs["latency"] = space.terms(latency, settings.sequence_length)
        elif "latency" in (settings.minimize, *settings.constraints):
            raise ValueError("Latency is constrained or minimised, but not known. Pass latency=LatencyTable(...).")
        for name in ("parameters", "flops"):  # they grow with every width; seconds need not
            least = int(chain_cost(costs[name], space.config.hidden_size, self.cheapest[None])[0])
            bound = settings.constraints.get(name, math.inf)
            if least > bound:
                raise ValueError(
                    f"constraints[{name!r}]={readable(bound)} is below the smallest subnet, which has "
                    f"{readable(least)} {name}. Raise the bound."
                )
        return costs

    @property
    def cheapest(self) -> np.ndarray:
        """The shape (layers,) with the fewest parameters and operations: both grow with every width."""
        shape = np.where(self.droppable, 0, self.space.smallest)
        if not shape.any():
            shape[-1] = self.space.smallest[-1]
        return shape

    @cached_property
    def initial(self) -> np.ndarray:
        """The initial picks (population_size, layers): the cheapest shape, the largest, and random ones of all sizes.

        If widths were drawn uniformly, most shapes would be of medium size, and small budgets would be left to luck.
        """
        settings, count = self.settings, self.settings.population_size - 2
        sizes = self.space.sample(count, (settings.seed, 0), "budget")
        dropped = self.space.sample(count, (settings.seed, 0), "budget", settings.drop_rate) == 0
        shapes = np.concatenate([[self.cheapest, self.space.largest], np.where(dropped & self.droppable, 0, sizes)])
        return np.searchsorted(self.choices, shapes)

    @cached_property
    def probe(self) -> np.ndarray:
        """Values (population_size, measures) of the initial shapes. Another predictor or cost gives others."""
        return self.evaluate(self.initial)

    def encode(self, picks: np.ndarray) -> np.ndarray:
        """Return the hashes (n,) of `picks` (n, layers)."""
        return self.table[picks + self.offsets].sum(axis=1)  # wraps around

    def evaluate(self, picks: np.ndarray) -> np.ndarray:
        """Return the values (n, measures) of `picks` (n, layers).

        Raises:
            ValueError: If the predictor does not return one finite number per shape.
        """
        shapes = self.choices[picks]
        losses = self._predict(shapes)
        values = np.empty((len(shapes), len(self.measures)))
        for column, name in enumerate(self.measures):
            if name == self.measure:
                values[:, column] = losses
            elif name == "perplexity":
                values[:, column] = np.exp(np.minimum(losses, MAX_LOG))
            else:
                values[:, column] = chain_cost(self.costs[name], self.space.config.hidden_size, shapes)
        return values

    def _predict(self, shapes: np.ndarray) -> np.ndarray:
        losses, plural = np.asarray(self.predictor.predict(shapes)), MEASURES[self.measure].plural
        unit = " in nats" if self.measure == "loss" else ""
        if losses.shape != (len(shapes),) or losses.dtype.kind not in "iuf":  # integers and floats
            raise ValueError(
                f"predictor.predict returned {losses.dtype} {losses.shape} for shapes {shapes.shape}. It must return "
                f"one number per shape, float64 {(len(shapes),)}: a {self.measure}{unit}."
            )
        if not np.isfinite(losses).all():
            strange = int((~np.isfinite(losses)).argmax())
            raise ValueError(
                f"predictor.predict returned a {self.measure} of {losses[strange]} for the shape "
                f"{shapes[strange].tolist()}. {plural.capitalize()} must be finite: check the {plural} that the "
                "predictor was fitted on."
            )
        return losses.astype(np.float64)

    def select(self, population: Population | None, picks: np.ndarray) -> tuple[Population, int]:
        """Return the fittest of the population and the new among `picks` (n, layers), and how many were new."""
        codes, old = self.encode(picks), 0
        if population is not None:
            picks, codes = np.concatenate([population.picks, picks]), np.concatenate([population.codes, codes])
            old = len(population.codes)
        first = np.sort(np.unique(codes, return_index=True)[1])
        new = first[old:]  # the shapes of the population are all different, so each of them comes first
        new = new[self.choices[picks[new]].any(axis=1)]  # a shape keeps at least one layer
        if len(new) == 0 and population is not None:
            return population, 0
        values = self.evaluate(picks[new])
        violations = self.violations(values)
        kept = np.concatenate([np.arange(old), new])
        if population is not None:
            values = np.concatenate([population.values, values])
            violations = np.concatenate([population.violations, violations])
        # A shape that meets all constraints has a violation of exactly 0. The older of two equally fit shapes is kept.
        order = np.lexsort((values[:, self.minimized], violations))[: self.settings.population_size]
        kept = kept[order]
        return Population(picks[kept], codes[kept], values[order], violations[order]), len(new)

    def violations(self, values: np.ndarray) -> np.ndarray:
        """Return the sums (n,) over the constraints of the relative excess over the bound."""
        return (np.maximum(values[:, self.bounded] - self.bounds, 0) / self.bounds).sum(axis=1)


def measure_of_predictor(predictor: Predictor) -> str:
    """Return what a predictor predicts, the name of a measure. One that does not say so predicts losses."""
    return getattr(predictor, "measure", "loss")


def _droppable(predictor: Predictor, settings: Settings) -> np.ndarray:
    """Return which layers can be dropped, (layers,) booleans: those that were dropped in a measured shape.

    A predictor without the attributes `width_choices` and `droppable` is assumed to know every shape.

    Raises:
        ValueError: If layers are to be dropped, but none was dropped in a measured shape, or the number of layers
            differs.
    """
    layers = settings.num_layers
    if not settings.drop_rate:
        return np.zeros(layers, dtype=bool)
    widths = getattr(predictor, "width_choices", [0])
    droppable = np.array(getattr(predictor, "droppable", [0 in widths] * layers), dtype=bool)
    if len(droppable) != layers:
        raise ValueError(f"The predictor knows {len(droppable)} layers, but the search space has {layers}.")
    if not droppable.any():
        raise ValueError(
            f"drop_rate={settings.drop_rate} drops layers, but the predictor knows only the widths {list(widths)}. "
            "Fit it on shapes with dropped layers (0) too, or use drop_rate=0."
        )
    return droppable


def readable(value: float) -> str:
    """Return a number as text: without decimals from a thousand on, else with six digits."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.6g}"
