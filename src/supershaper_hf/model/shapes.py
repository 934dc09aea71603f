"""The search space: which shapes a supernet can take, how to draw them, and the hand-crafted ones by name.

Example:
    >>> from supershaper_hf import SearchSpace, SuperShaperConfig
    >>> space = SearchSpace.from_config(SuperShaperConfig(vocab_size=28996))
    >>> space.size
    13841287201
    >>> space.num_parameters(space.smallest)
    33219652
    >>> space.named_shape("rectangle", max_parameters=63_000_000)
    [360, 360, 360, 360, 360, 360, 360, 360, 360, 360, 360, 360]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from .configuration_supershaper import SuperShaperConfig
from .costs import ChainCost, chain_cost, flops_cost, parameter_cost


# Relative widths from the first layer to the last. The hand-crafted ones are the paper's comparisons at 63-65 M
# parameters; "supershaper" is its published heuristic: first layer at the mean, 2-4 narrow, the top wide.
PROFILES: dict[str, Sequence[float]] = {
    "rectangle": [1] * 12,
    "bottle": [120] * 6 + [600] * 5 + [768],
    "inverted_bottle": [768] + [600] * 5 + [120] * 6,
    "diamond": [120, 240, 360, 480, 480, 540, 768, 540, 480, 360, 240, 120],
    "inverted_diamond": [768, 600, 360, 240, 240, 120, 120, 240, 240, 360, 600, 768],
    "lower_triangle": [120, 120, 240, 240, 360, 360, 360, 480, 540, 540, 600, 768],
    "upper_triangle": [768, 600, 540, 540, 480, 360, 360, 360, 240, 240, 120, 120],
    "supershaper": [0.99, 0.58, 0.58, 0.63, 0.99, 0.99, 0.99, 0.99, 1.25, 1.25, 1.39, 1.39],
}
SHAPE_NAMES = [*PROFILES, "first_layers"]

DISTRIBUTIONS = ("uniform", "parameters", "budget")
CANDIDATES = 8  # shapes drawn for each budget, of which the nearest is kept; 1 is visibly uneven, 32 hardly better


@dataclass(frozen=True)
class SearchSpace:
    """All shapes of one supernet: `width_choices` for every layer.

    Args:
        config: The supernet's configuration.

    Raises:
        ValueError: If `config` belongs to a subnet, which has one shape only.
    """

    config: SuperShaperConfig

    def __post_init__(self) -> None:
        if self.config.width_choices is None:
            raise ValueError(
                f"This configuration belongs to a subnet with fixed hidden_sizes={self.config.hidden_sizes}. "
                "Make the search space from the supernet's configuration."
            )

    @classmethod
    def from_config(cls, config: SuperShaperConfig) -> "SearchSpace":
        return cls(config)

    @property
    def width_choices(self) -> list[int]:
        return list(self.config.width_choices or [])

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def size(self) -> int:
        """Number of shapes that drop no layer."""
        return len(self.width_choices) ** self.num_layers

    @property
    def largest(self) -> list[int]:
        return [self.width_choices[-1]] * self.num_layers

    @property
    def smallest(self) -> list[int]:
        """Every layer at the smallest width choice, none dropped."""
        return [self.width_choices[0]] * self.num_layers

    def validate(self, shape: Sequence[int]) -> list[int]:
        """Return `shape` as a list of Python integers, or raise: see `SuperShaperConfig.normalize_shape`."""
        return self.config.normalize_shape(shape)

    def sample(
        self, n: int, seed: int | Sequence[int], distribution: str = "uniform", drop_rate: float = 0.0
    ) -> np.ndarray:
        """Draw `n` shapes, an integer array (n, layers), from `seed` alone.

        The same seed gives the same shapes everywhere; `seed=(seed, step)` gives each training step its own.

        Args:
            n: Number of shapes.
            seed: A non-negative integer, or a sequence of them.
            distribution: `"uniform"`: each layer's width uniform over the choices, as in the paper.
                `"parameters"`: in proportion to the parameters of a layer of that width, so wide layers are seen more
                often. `"budget"`: uniform over the number of parameters of the subnet, from the smallest to the
                largest, so that small and large subnets are seen equally often; under the other two, sums over many
                layers crowd in the middle. The range is cut into `n` equal slices, and one shape is drawn near a
                random point of each, in random order.
            drop_rate: Probability of each layer to be dropped after its width is drawn. A shape that would lose every
                layer keeps one, drawn at random. Budgets are met before dropping.

        Raises:
            ValueError: If `n` is negative, the distribution unknown, or the rate outside [0, 1).

        Example:
            >>> config = SuperShaperConfig(hidden_size=96, num_attention_heads=4, num_hidden_layers=4)
            >>> SearchSpace(config).sample(2, seed=(0, 1), distribution="budget", drop_rate=0.25)
            array([[24, 40,  0, 24],
                   [ 0, 96, 80, 96]])
        """
        if n < 0:
            raise ValueError(f"n={n} shapes cannot be drawn. Allowed: 0 or more.")
        if distribution not in DISTRIBUTIONS:
            raise ValueError(f"Unknown distribution={distribution!r}. Allowed: {', '.join(map(repr, DISTRIBUTIONS))}.")
        if not 0 <= drop_rate < 1:
            raise ValueError(
                f"drop_rate={drop_rate} must be at least 0 and below 1: the probability of each layer to be dropped. "
                "Use 0 to drop none."
            )
        random = np.random.default_rng(seed)
        if distribution == "budget":
            shapes = self._sample_budgets(n, random)
        else:
            sizes = parameter_cost(self.config).layer(np.array(self.width_choices))
            odds = None if distribution == "uniform" else sizes / sizes.sum()
            shapes = random.choice(self.width_choices, size=(n, self.num_layers), p=odds)
        if drop_rate:
            dropped = random.random(shapes.shape) < drop_rate
            survivor = random.integers(self.num_layers, size=n)
            emptied = dropped.all(axis=1)
            dropped[emptied, survivor[emptied]] = False
            shapes[dropped] = 0
        return shapes

    def _sample_budgets(self, n: int, random: np.random.Generator) -> np.ndarray:
        """Draw one shape near each of `n` numbers of parameters that are spread evenly over the space's range.

        Widths are drawn independently from p(w) ~ exp(tilt * cost(w)), the distribution of largest entropy for its mean
        cost, so layers stay as diverse as the budget allows. The mean number of parameters rises with the tilt: a table
        of both tells the tilt of each budget. Single draws scatter around the mean, so the nearest of a few is kept.
        """
        smallest, largest = self.num_parameters(self.smallest), self.num_parameters(self.largest)
        budgets = smallest + (largest - smallest) * (random.permutation(n) + random.random(n)) / n

        full, layers, choices = self.config.hidden_size, self.num_layers, np.array(self.width_choices)
        cost = parameter_cost(self.config)
        # Mean parameters of widths drawn from p: fixed + p . alone + p . paired . p
        alone = cost.enter(full, choices) + layers * cost.layer(choices) + cost.leave(choices)
        paired = (layers - 1) * cost.enter(choices[:, None], choices)

        def odds(tilts: np.ndarray) -> np.ndarray:
            exponents = np.outer(tilts, cost.layer(choices) / cost.layer(full))
            odds = np.exp(exponents - exponents.max(axis=1, keepdims=True))
            return odds / odds.sum(axis=1, keepdims=True)

        tilts = np.sinh(np.linspace(-7, 7, 141))  # from all at the smallest width (-548) over uniform to the largest
        table = odds(tilts)
        means = cost.fixed + table @ alone + ((table @ paired) * table).sum(axis=1)
        bounds = odds(np.interp(budgets, means, tilts)).cumsum(axis=1)[:, None, None, :-1]
        picks = (random.random((n, CANDIDATES, layers, 1)) > bounds).sum(axis=-1)
        candidates = choices[picks]  # (n, CANDIDATES, layers)
        counts = chain_cost(cost, full, candidates.reshape(-1, layers)).reshape(n, CANDIDATES)
        return candidates[np.arange(n), np.abs(counts - budgets[:, None]).argmin(axis=1)]

    @overload
    def num_parameters(self, shapes: Sequence[int]) -> int: ...
    @overload
    def num_parameters(self, shapes: np.ndarray) -> "int | np.ndarray": ...
    def num_parameters(self, shapes):
        """Return the number of parameters of the masked-LM subnet at each shape, tied weights once.

        Args:
            shapes: One shape or many, see `shape_rows`.

        Returns:
            An int for one shape, an integer array (n,) for many.
        """
        return self._cost(parameter_cost(self.config), shapes)

    @overload
    def flops(self, shapes: Sequence[int], sequence_length: int) -> int: ...
    @overload
    def flops(self, shapes: np.ndarray, sequence_length: int) -> "int | np.ndarray": ...
    def flops(self, shapes, sequence_length):
        """Return the operations of one forward pass over one sequence of `sequence_length` tokens: see `costs`."""
        return self._cost(flops_cost(self.config, sequence_length), shapes)

    def named_shape(self, name: str, max_parameters: int) -> list[int]:
        """Return the largest shape with the profile `name` whose subnet has at most `max_parameters`.

        Args:
            name: One of `SHAPE_NAMES`. A profile is stretched over the layers, scaled, and rounded to the nearest
                width choices; `"first_layers"` keeps the first layers at full width and drops the rest.
            max_parameters: Budget in parameters of the masked-LM subnet.

        Raises:
            ValueError: If the name is unknown, or even the smallest shape of this profile exceeds the budget.
        """
        if name == "first_layers":
            candidates = np.tril(np.full((self.num_layers, self.num_layers), self.config.hidden_size))
        elif name in PROFILES:
            candidates = self._scaled(PROFILES[name])
        else:
            raise ValueError(f"Unknown shape name {name!r}. Allowed: {', '.join(SHAPE_NAMES)}.")
        return self._largest_within(max_parameters, candidates, repr(name))

    def profile_shape(self, profile: Sequence[float], max_parameters: int) -> list[int]:
        """Return the largest shape with these relative widths whose subnet has at most `max_parameters`.

        Args:
            profile: Positive relative widths from the first layer to the last, in any unit; stretched over the layers,
                scaled, and rounded to the nearest width choices.
            max_parameters: Budget in parameters of the masked-LM subnet.

        Raises:
            ValueError: If a relative width is not positive, or even the smallest such shape exceeds the budget.
        """
        if len(profile) == 0 or not np.all(np.isfinite(profile) & (np.asarray(profile) > 0)):
            raise ValueError(f"profile={list(profile)} must be positive numbers: relative widths, first layer first.")
        return self._largest_within(max_parameters, self._scaled(profile), "scaled")

    def _largest_within(self, max_parameters: int, candidates: np.ndarray, name: str) -> list[int]:
        """Return the last of `candidates`, which grow, that has at most `max_parameters`."""
        sizes = self._cost(parameter_cost(self.config), candidates)
        fits = np.flatnonzero(sizes <= max_parameters)
        if len(fits) == 0:
            raise ValueError(
                f"max_parameters={max_parameters:,} is below the smallest {name} subnet, which has {sizes.min():,} "
                f"parameters (the smallest subnet of any shape without dropped layers: "
                f"{self.num_parameters(self.smallest):,}). Raise the budget."
            )
        return candidates[fits[-1]].tolist()

    def _scaled(self, profile: Sequence[float]) -> np.ndarray:
        """Return every shape that the profile takes on as its scale grows, from the smallest to the largest."""
        stretched = np.interp(np.linspace(0, 1, self.num_layers), np.linspace(0, 1, len(profile)), profile)
        choices = np.array(self.width_choices)
        # A layer's rounded width changes only where its scaled width crosses the middle between two choices.
        middles = (choices[1:] + choices[:-1]) / 2
        crossings = np.unique(np.divide.outer(middles, stretched))
        scales = np.concatenate([[0.0], crossings * (1 + 1e-9)])
        return choices[np.searchsorted(middles, scales[:, None] * stretched)]

    def _cost(self, cost: ChainCost, shapes):
        rows, single = shape_rows(shapes)
        for row in rows[~self._allowed(rows)][:1]:
            self.validate(row)  # raises, and names the width
        costs = chain_cost(cost, self.config.hidden_size, rows)
        return int(costs[0]) if single else costs

    def _allowed(self, rows: np.ndarray) -> np.ndarray:
        """Return which of `rows` (n, layers) are shapes of this space, as booleans (n,)."""
        if rows.shape[1] != self.num_layers:
            return np.zeros(len(rows), dtype=bool)
        return np.logical_and(np.isin(rows, [0, *self.width_choices]).all(axis=1), rows.any(axis=1))


def shape_rows(shapes: Sequence[int] | Sequence[Sequence[int]] | np.ndarray) -> tuple[np.ndarray, bool]:
    """Return one shape or many as an integer array (n, layers), and whether it was one.

    Every function that takes `shapes` follows this rule: for one shape, a sequence of integers, it returns one result;
    for many, a sequence of shapes or an integer array (n, layers), it returns an array of n results.

    Raises:
        ValueError: If `shapes` is neither, or its widths are not integers.

    Example:
        >>> shape_rows([40, 16])
        (array([[40, 16]]), True)
    """
    try:
        rows = np.asarray(shapes)
    except ValueError:  # shapes of different lengths
        rows = np.empty(0, dtype=object)
    if rows.ndim not in (1, 2) or not np.issubdtype(rows.dtype, np.integer):
        raise ValueError(
            f"shapes must be one shape (a list of integers) or many (a list of shapes, or an integer array (n, "
            f"layers)), got {rows.dtype} {rows.shape}."
        )
    return np.atleast_2d(rows), rows.ndim == 1
