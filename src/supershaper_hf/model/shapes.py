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

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from ..checks import check_choice, check_count, check_number
from . import modeling_supershaper
from .configuration_supershaper import SuperShaperConfig
from .costs import ChainCost, Cost, Surroundings, chain_cost, flops_cost, parameter_cost
from .modeling_supershaper import SuperShaperForMaskedLM, SuperShaperPreTrainedModel, empty_model


# Relative widths from the first layer to the last. "supershaper" is the rule that the paper derives: layer 1 at the
# mean, layers 2 to 4 narrow, the top wide. The paper compares its result with the others at 63 to 65 M parameters.
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
# Number of shapes drawn for each budget, of which the nearest is kept. With 1 the sizes are spread unevenly, and 32 are
# hardly better than 8.
CANDIDATES = 8


@dataclass(frozen=True)
class SearchSpace:
    """All shapes of one supernet: each layer takes one of its `width_choices`.

    Make it with `from_config` or `from_model`. Parameters, operations and seconds are those of a subnet with its
    embeddings and its head: that of masked language modeling, unless `surroundings` are given.
    """

    config: SuperShaperConfig
    surroundings: Surroundings | None = None

    def __post_init__(self) -> None:
        if self.config.width_choices is None:
            raise ValueError(
                f"This configuration belongs to a subnet with fixed hidden_sizes={self.config.hidden_sizes}. "
                "Make the search space from the supernet's configuration."
            )

    @classmethod
    def from_config(cls, config: SuperShaperConfig, architecture: str = "SuperShaperForMaskedLM") -> "SearchSpace":
        """Return the search space of a supernet.

        Args:
            config: The supernet's configuration.
            architecture: Name of the model class whose subnets are counted, such as `"SuperShaperModel"` for an encoder
                without a head. `config.architectures` of a saved supernet names its class.

        Raises:
            ValueError: If `config` belongs to a subnet, which has only one shape, or there is no such class.

        Example:
            >>> config = SuperShaperConfig(hidden_size=96, num_attention_heads=4, num_hidden_layers=2)
            >>> SearchSpace.from_config(config).largest
            [96, 96]
        """
        if architecture == SuperShaperForMaskedLM.__name__:
            return cls(config)
        check_choice("architecture", architecture, modeling_supershaper.__all__)
        return cls(config, Surroundings.of(empty_model(getattr(modeling_supershaper, architecture), config)))

    @classmethod
    def from_model(cls, model: SuperShaperPreTrainedModel) -> "SearchSpace":
        """Return the search space of a supernet. Its subnets have the head that `model` has, or none.

        Raises:
            ValueError: If `model` is a subnet, which has only one shape.

        Example:
            >>> from supershaper_hf import SuperShaperModel
            >>> config = SuperShaperConfig(hidden_size=96, num_attention_heads=4, num_hidden_layers=2, vocab_size=50)
            >>> encoder = SuperShaperModel(config)
            >>> SearchSpace.from_model(encoder).num_parameters([40, 16])
            427952
            >>> encoder.extract_subnet([40, 16]).num_parameters()
            427952
        """
        return cls(model.config, Surroundings.of(model))

    @property
    def model_class(self) -> type:
        """The class of the subnets whose costs are counted."""
        return SuperShaperForMaskedLM if self.surroundings is None else self.surroundings.model_class

    @property
    def width_choices(self) -> list[int]:
        """The hidden sizes that a layer can have, from the smallest to the largest."""
        return list(self.config.width_choices or [])

    @property
    def num_layers(self) -> int:
        """Number of layers of the supernet."""
        return self.config.num_hidden_layers

    @property
    def size(self) -> int:
        """Number of shapes that drop no layer."""
        return len(self.width_choices) ** self.num_layers

    @property
    def largest(self) -> list[int]:
        """Every layer at the largest width choice."""
        return [self.width_choices[-1]] * self.num_layers

    @property
    def smallest(self) -> list[int]:
        """Every layer at the smallest width choice, none dropped."""
        return [self.width_choices[0]] * self.num_layers

    def validate(self, shape: Sequence[int]) -> list[int]:
        """Return `shape` as a list of Python integers, or raise as `SuperShaperConfig.normalize_shape` does.

        Example:
            >>> config = SuperShaperConfig(hidden_size=96, num_attention_heads=4, num_hidden_layers=2)
            >>> SearchSpace.from_config(config).validate(np.array([40, 16]))
            [40, 16]
        """
        return self.config.normalize_shape(shape)

    def sample(
        self, num_shapes: int, seed: int | Sequence[int], distribution: str = "uniform", drop_rate: float = 0.0
    ) -> np.ndarray:
        """Draw `num_shapes` shapes as an integer array (num_shapes, layers).

        They depend on the arguments alone: the same seed gives the same shapes on every machine. With
        `seed=(seed, step)` every training step has its own shapes.

        Args:
            num_shapes: Number of shapes.
            seed: A non-negative integer, or a sequence of them.
            distribution: How widths are drawn. `"uniform"`, as in the paper: each layer takes each width equally often.
                `"parameters"`: a layer takes a width in proportion to the parameters of a layer of that width, so
                wide layers are drawn more often. `"budget"`: the numbers of parameters are spread evenly from the
                smallest subnet to the largest, so small and large subnets are drawn equally often. The range is cut
                into `num_shapes` equal slices, and one shape is drawn near a random point of each, in random order.
                With the other two distributions most subnets are of middle size, because the widths of many layers add
                up.
            drop_rate: Probability that a layer is dropped after its width was drawn. A shape that would lose every
                layer keeps a random one. Budgets are met before layers are dropped.

        Raises:
            ValueError: If `num_shapes` is not an integer of at least 0, the distribution is unknown, or the rate is
                outside [0, 1).

        Example:
            >>> config = SuperShaperConfig(hidden_size=96, num_attention_heads=4, num_hidden_layers=4)
            >>> space = SearchSpace.from_config(config)
            >>> space.sample(2, seed=(0, 1), distribution="budget", drop_rate=0.25)
            array([[24, 40,  0, 24],
                   [ 0, 96, 80, 96]])
        """
        check_count("num_shapes", num_shapes, least=0)
        check_choice("distribution", distribution, DISTRIBUTIONS)
        check_number("drop_rate", drop_rate, least=0, below=1)
        random = np.random.default_rng(seed)
        if distribution == "budget":
            shapes = self._sample_budgets(num_shapes, random)
        else:
            sizes = parameter_cost(self.config).layer(np.array(self.width_choices))
            odds = None if distribution == "uniform" else sizes / sizes.sum()
            shapes = random.choice(self.width_choices, size=(num_shapes, self.num_layers), p=odds)
        if drop_rate:
            dropped = random.random(shapes.shape) < drop_rate
            kept = random.integers(self.num_layers, size=num_shapes)  # the layer that stays if all were to be dropped
            emptied = dropped.all(axis=1)
            dropped[emptied, kept[emptied]] = False
            shapes[dropped] = 0
        return shapes

    def _sample_budgets(self, num_shapes: int, random: np.random.Generator) -> np.ndarray:
        """Draw one shape near each of `num_shapes` numbers of parameters, which are spread over the space's range.

        1. Draw the budgets, one in each of `num_shapes` equal slices of the range.
        2. The width of each layer is drawn on its own, from p(w) ~ exp(tilt * parameters(w)). This distribution has the
           largest entropy among those with the same mean size, so the widths stay as diverse as the budget allows.
        3. The mean number of parameters rises with the tilt. A table of both gives the tilt of each budget.
        4. Single shapes scatter around this mean, so `CANDIDATES` are drawn and the nearest is kept.
        """
        budgets = self._draw_budgets(num_shapes, random)
        odds = self._tilted_odds(self._tilts_of(budgets))  # (num_shapes, choices)
        bounds = odds.cumsum(axis=1)[:, None, None, :-1]
        picks = (random.random((num_shapes, CANDIDATES, self.num_layers, 1)) > bounds).sum(axis=-1)
        candidates = np.array(self.width_choices)[picks]  # (num_shapes, CANDIDATES, layers)
        rows = candidates.reshape(-1, self.num_layers)
        sizes = chain_cost(self.terms("parameters"), self.config.hidden_size, rows)
        distances = np.abs(sizes.reshape(num_shapes, CANDIDATES) - budgets[:, None])
        return candidates[np.arange(num_shapes), distances.argmin(axis=1)]

    def _draw_budgets(self, num_shapes: int, random: np.random.Generator) -> np.ndarray:
        """Return a random number of parameters from each of `num_shapes` equal slices, in random order."""
        smallest, largest = self.num_parameters(self.smallest), self.num_parameters(self.largest)
        slices = random.permutation(num_shapes) + random.random(num_shapes)
        return smallest + (largest - smallest) * slices / num_shapes

    def _tilts_of(self, budgets: np.ndarray) -> np.ndarray:
        """Return the tilts at which shapes have these numbers of parameters on average."""
        cost, full, layers = self.terms("parameters"), self.config.hidden_size, self.num_layers
        choices = np.array(self.width_choices)
        # At -548 every layer has the smallest width, at 0 all widths are equally likely, at 548 it has the largest.
        tilts = np.sinh(np.linspace(-7, 7, 141))
        odds = self._tilted_odds(tilts)
        # Terms of one width: into the first layer, all layers, out of the last one. Terms of two: between layers.
        alone = cost.enter(full, choices) + layers * cost.layer(choices) + cost.leave(choices)
        paired = (layers - 1) * cost.enter(choices[:, None], choices)
        means = cost.fixed + odds @ alone + ((odds @ paired) * odds).sum(axis=1)
        return np.interp(budgets, means, tilts)

    def _tilted_odds(self, tilts: np.ndarray) -> np.ndarray:
        """Return the probability of each width choice at each tilt, as an array (tilts, choices)."""
        layer = parameter_cost(self.config).layer
        exponents = np.outer(tilts, layer(np.array(self.width_choices)) / layer(self.config.hidden_size))
        odds = np.exp(exponents - exponents.max(axis=1, keepdims=True))
        return odds / odds.sum(axis=1, keepdims=True)

    @overload
    def num_parameters(self, shapes: Sequence[int]) -> int: ...
    @overload
    def num_parameters(self, shapes: np.ndarray) -> "int | np.ndarray": ...
    def num_parameters(self, shapes):
        """Return the number of parameters of the subnet at each shape, tied weights once.

        Args:
            shapes: One shape or many, see `shape_rows`.

        Returns:
            An int for one shape, an integer array (n,) for n shapes.

        Raises:
            ValueError: If a shape is not allowed.

        Example:
            >>> space = SearchSpace.from_config(SuperShaperConfig(vocab_size=28996))
            >>> space.num_parameters([360] * 12)
            58108612
            >>> space.num_parameters([space.smallest, space.largest])
            array([ 33219652, 116018500])
        """
        return self._cost(self.terms("parameters"), shapes)

    @overload
    def flops(self, shapes: Sequence[int], sequence_length: int) -> int: ...
    @overload
    def flops(self, shapes: np.ndarray, sequence_length: int) -> "int | np.ndarray": ...
    def flops(self, shapes, sequence_length):
        """Return the floating-point operations of one forward pass of the subnet at each shape.

        Args:
            shapes: One shape or many, see `shape_rows`.
            sequence_length: Number of tokens of the one sequence.

        Returns:
            An int for one shape, an integer array (n,) for n shapes. See `costs.flops_cost` for what is counted.

        Raises:
            ValueError: If a shape is not allowed, or `sequence_length` is not an integer of at least 1 or too large.

        Example:
            >>> SearchSpace.from_config(SuperShaperConfig(vocab_size=28996)).flops([360] * 12, sequence_length=128)
            15028764672
        """
        return self._cost(self.terms("flops", sequence_length), shapes)

    def terms(self, cost: Cost, sequence_length: int = 128) -> ChainCost:
        """Return the terms of which a cost of a shape is the sum.

        Warns if a latency table was measured on subnets with another head.

        Args:
            cost: `"parameters"`, `"flops"`, or a latency table.
            sequence_length: Number of tokens for `"flops"`.

        Raises:
            ValueError: If the cost is none of these, the table does not fit, or a number is too large.
        """
        if not isinstance(cost, str) and hasattr(cost, "chain_cost"):
            measured, counted = getattr(cost, "architecture", None), self.model_class.__name__
            if measured not in (None, counted):
                warnings.warn(
                    f"The latency table was measured on a {measured}, but the subnets are of {counted}: its seconds "
                    "hold for the former. Measure a table of this search space with LatencyTable.measure.",
                    stacklevel=2,
                )
            return cost.chain_cost(self.config)
        if cost not in ("parameters", "flops"):
            raise ValueError(f"Unknown cost {cost!r}. Allowed: 'parameters', 'flops', or a LatencyTable.")
        if cost == "parameters":
            return parameter_cost(self.config, self.surroundings)
        return flops_cost(self.config, sequence_length, self.surroundings)

    def named_shape(self, name: str, max_parameters: int) -> list[int]:
        """Return the largest shape with the profile `name` whose subnet has at most `max_parameters`.

        Args:
            name: One of `SHAPE_NAMES`. A profile is stretched over the layers, scaled, and rounded to the nearest
                width choices. `"first_layers"` keeps the first layers at full width and drops the rest.
            max_parameters: Largest number of parameters of the subnet.

        Raises:
            ValueError: If the name is unknown, or even the smallest shape of this profile has more parameters.

        Example:
            >>> space = SearchSpace.from_config(SuperShaperConfig(vocab_size=28996))
            >>> space.named_shape("diamond", max_parameters=63_000_000)
            [120, 240, 360, 480, 480, 480, 768, 480, 480, 360, 240, 120]
        """
        return self._largest_within(max_parameters, self.named_shapes(name), repr(name))

    def named_shapes(self, name: str) -> np.ndarray:
        """Return every shape with the profile `name`, (n, layers), from the smallest to the largest.

        `named_shape` takes the largest of them that is within a budget.

        Args:
            name: One of `SHAPE_NAMES`.

        Raises:
            ValueError: If the name is unknown.

        Example:
            >>> space = SearchSpace.from_config(SuperShaperConfig(vocab_size=28996, num_hidden_layers=3))
            >>> space.named_shapes("rectangle")[:2].tolist()
            [[120, 120, 120], [240, 240, 240]]
        """
        if name == "first_layers":
            return np.tril(np.full((self.num_layers, self.num_layers), self.config.hidden_size))
        if name in PROFILES:
            return self._scaled(PROFILES[name])
        raise ValueError(f"Unknown shape name {name!r}. Allowed: {', '.join(SHAPE_NAMES)}.")

    def profile_shape(self, profile: Sequence[float], max_parameters: int) -> list[int]:
        """Return the shape with about these relative widths that uses up a budget.

        The widths are scaled together and rounded to the nearest width choices. What then is left of the budget goes to
        single layers: as long as a wider one fits, the one that leaves the shape nearest to the profile. Of equally
        near ones it is the last.

        Args:
            profile: Positive relative widths from the first layer to the last, in any unit. They are stretched over the
                layers.
            max_parameters: Largest number of parameters of the subnet.

        Raises:
            ValueError: If a relative width is not positive, or even the smallest such shape has more parameters.

        Example:
            >>> space = SearchSpace.from_config(SuperShaperConfig(vocab_size=28996))
            >>> space.profile_shape([1, 1, 2], max_parameters=63_000_000)
            [240, 240, 360, 360, 360, 360, 360, 360, 480, 480, 540, 600]
        """
        if len(profile) == 0 or not np.all(np.isfinite(profile) & (np.asarray(profile) > 0)):
            raise ValueError(f"profile={list(profile)} must be positive numbers: relative widths, first layer first.")
        shape = np.array(self._largest_within(max_parameters, self._scaled(profile), "scaled"))
        while len(wider := self._one_wider(shape, max_parameters)):
            shape = min(wider, key=lambda each: _distance_to_profile(each, self._stretched(profile)))
        return shape.tolist()

    def _one_wider(self, shape: np.ndarray, max_parameters: int) -> np.ndarray:
        """Return the shapes (n, layers) within a budget in which one layer is a step wider; the last layer first."""
        steps = np.searchsorted(self.width_choices, shape) + np.eye(self.num_layers, dtype=int)[::-1]
        shapes = np.array(self.width_choices)[steps[steps.max(axis=1) < len(self.width_choices)]]
        return shapes[self.num_parameters(shapes) <= max_parameters] if len(shapes) else shapes

    def _largest_within(self, max_parameters: int, candidates: np.ndarray, name: str) -> list[int]:
        """Return the last of `candidates` (n, layers) with at most `max_parameters`. They are sorted by size."""
        sizes = self._cost(self.terms("parameters"), candidates)
        fits = np.flatnonzero(sizes <= max_parameters)
        if len(fits) == 0:
            raise ValueError(
                f"max_parameters={max_parameters:,} is below the smallest {name} subnet, which has {sizes.min():,} "
                f"parameters (the smallest subnet of any shape without dropped layers: "
                f"{self.num_parameters(self.smallest):,}). Use a larger max_parameters."
            )
        return candidates[fits[-1]].tolist()

    def _stretched(self, profile: Sequence[float]) -> np.ndarray:
        """Return the relative widths of a profile with any number of them, one for each layer."""
        return np.interp(np.linspace(0, 1, self.num_layers), np.linspace(0, 1, len(profile)), profile)

    def _scaled(self, profile: Sequence[float]) -> np.ndarray:
        """Return every shape that the profile becomes as its scale grows, from the smallest to the largest."""
        stretched, choices = self._stretched(profile), np.array(self.width_choices)
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


def _distance_to_profile(shape: np.ndarray, profile: np.ndarray) -> float:
    """Return the squared distance of two lists of widths relative to their means, rounded so that ties are ties."""
    return round(float(np.square(shape / shape.mean() - profile / profile.mean()).sum()), 9)


def shape_rows(shapes: Sequence[int] | Sequence[Sequence[int]] | np.ndarray) -> tuple[np.ndarray, bool]:
    """Return one shape or many as an integer array (n, layers), and whether it was one.

    Every function that takes `shapes` follows this rule. For one shape, which is a sequence of integers, it returns one
    result. For many, which are a sequence of shapes or an integer array (n, layers), it returns an array of n results.

    Raises:
        ValueError: If `shapes` is neither, its widths are not integers, or the shapes have different lengths.

    Example:
        >>> shape_rows([40, 16])
        (array([[40, 16]]), True)
    """
    try:
        rows = np.asarray(shapes)
        found = f"an array of the NumPy type {rows.dtype} and the size {rows.shape}"
    except ValueError:
        rows, found = np.empty(0, dtype=object), "lists of different lengths"
    if rows.ndim not in (1, 2) or not np.issubdtype(rows.dtype, np.integer):
        raise ValueError(
            f"shapes must be one shape (a list of integers) or many (a list of shapes, or an integer array (n, "
            f"layers)), got {found}."
        )
    return np.atleast_2d(rows), rows.ndim == 1
