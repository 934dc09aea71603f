"""Does the time of a subnet depend on its shape, or on its number of parameters alone?

The SuperShaper paper (arXiv 2110.04711) finds the latter: among shapes of about equal size, the standard deviation of
the seconds is about 1 % of their mean. `compare_equal_sizes` repeats that measurement here, and beside it measures what the
same number would be if all shapes were equally fast, which no timing is precise enough to leave out.

Example:
    >>> from supershaper_hf import SuperShaperConfig
    >>> from supershaper_hf.latency.insensitivity import compare_equal_sizes
    >>> config = SuperShaperConfig(hidden_size=96, num_attention_heads=4, num_hidden_layers=6, vocab_size=50)
    >>> [record] = compare_equal_sizes(config, [2_000_000], shapes_per_budget=3, repeats=2, sequence_length=16)
    >>> len(record.shapes)
    3
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import f as f_distribution

from ..checks import check_count
from ..model.configuration_supershaper import SuperShaperConfig
from ..model.shapes import SearchSpace
from .table import LatencyTable
from .timing import SubnetTimer


COPIES = 2  # of each shape: two tell how far apart equal subnets are measured
SIGNIFICANCE = 0.05  # probability to take noise for a difference between shapes
DRAWS, ROUNDS = 4096, 8  # shapes drawn over all sizes in a round, and rounds, before giving up


@dataclass(frozen=True)
class Insensitivity:
    """How the seconds of shapes of about equal size differ.

    Attributes:
        budget: The number of parameters asked for.
        shapes: The measured shapes, from the fastest to the slowest.
        seconds: Of each: the mean of its copies, each the median of its runs.
        parameters: Of each.
        noise: What `spread` would be, on average, if all shapes were equally fast.
        p_value: Probability of a spread as large as this one if they were.
    """

    budget: int
    shapes: list[list[int]]
    seconds: list[float]
    parameters: list[int]
    noise: float
    p_value: float

    @property
    def spread(self) -> float:
        """Standard deviation of the seconds over their mean."""
        return _relative_deviation(self.seconds)

    @property
    def parameter_spread(self) -> float:
        """Standard deviation of the numbers of parameters over their mean, for they are not quite equal."""
        return _relative_deviation(self.parameters)

    @property
    def excess(self) -> float:
        """What of the spread is not noise: variances add up, so the root of their difference."""
        return float(np.sqrt(max(self.spread**2 - self.noise**2, 0.0)))

    @property
    def verdict(self) -> str:
        """In words: `"no more than noise"`, or how much above."""
        return "no more than noise" if self.p_value > SIGNIFICANCE else f"{self.excess:.1%} above noise"


def compare_equal_sizes(
    config: SuperShaperConfig,
    budgets: Sequence[int],
    shapes_per_budget: int = 10,
    tolerance: float = 0.02,
    device: str | torch.device = "cpu",
    batch_size: int = 1,
    sequence_length: int = 128,
    dtype: torch.dtype = torch.float32,
    repeats: int = 15,
    warmup: int = 2,
    seed: int = 0,
) -> list[Insensitivity]:
    """Measure subnets of about equal numbers of parameters; one record per budget.

    Every shape is built twice, and all of a budget's subnets run once in every sweep, in random order. Two copies of a
    shape differ in what also makes two shapes differ without being slower: their runs, and where in memory their
    weights happen to lie, which no repetition of the same copy would show. So half the mean squared difference of
    copies is the variance of one, and half of that the variance of a shape's mean: the noise. Whether the spread
    exceeds it is decided by an F-test at 5 %, as in a one-way analysis of variance.

    All subnets of one budget are in memory at once: for 10 shapes of 63 M parameters 5 GB in float32.

    Args:
        config: The supernet's configuration.
        budgets: Numbers of parameters of the masked-LM subnets, tied weights once.
        shapes_per_budget: Shapes to measure for each. Warns where fewer are found.
        tolerance: Largest distance of a shape's parameters from the budget, over the budget.
        device: `"cpu"`, `"cuda"`, `"cuda:1"` or `"mps"`.
        batch_size: Sequences in a batch.
        sequence_length: Tokens in a sequence.
        dtype: Of weights and activations.
        repeats: Sweeps over all subnets of a budget.
        warmup: Sweeps before them, which are thrown away.
        seed: Of the shapes, weights, tokens and the order of runs.

    Raises:
        ValueError: If fewer than two shapes are found, a number is out of range, or the input does not fit.
    """
    check_count("shapes_per_budget", shapes_per_budget, least=2)
    check_count("repeats", repeats)
    check_count("warmup", warmup, least=0)
    space = SearchSpace(config)
    chosen = [shapes_near(space, budget, shapes_per_budget, tolerance, seed) for budget in budgets]
    records = []
    for budget, shapes in zip(budgets, chosen):
        copies = np.repeat(shapes, COPIES, axis=0)
        timer = SubnetTimer(config, copies, device, batch_size, sequence_length, dtype, seed)
        for sweep in range(warmup + repeats):
            timer.sweep(keep=sweep >= warmup)
        medians = np.median(timer.seconds, axis=0).reshape(len(shapes), COPIES)
        del timer  # before the next budget's subnets are built
        records.append(summarize(budget, shapes, np.asarray(space.num_parameters(shapes)), medians))
    return records


def summarize(budget: int, shapes: np.ndarray, parameters: np.ndarray, medians: np.ndarray) -> Insensitivity:
    """Compare shapes by their median seconds.

    Args:
        budget: The number of parameters asked for.
        shapes: (n, layers).
        parameters: (n,) numbers of parameters.
        medians: (n, copies) seconds.

    Example:
        >>> medians = np.array([[1.0, 1.2], [2.0, 2.2]])
        >>> record = summarize(100, np.array([[16], [24]]), np.array([99, 101]), medians)
        >>> round(record.spread, 3), round(record.noise, 3), record.verdict
        (0.442, 0.063, '43.8% above noise')
    """
    n, copies = medians.shape
    seconds = medians.mean(axis=1)
    between, within = seconds.var(ddof=1), medians.var(axis=1, ddof=1).mean() / copies  # both of a mean of copies
    ratio = between / within if within > 0 else np.inf if between > 0 else 0.0
    order = np.argsort(seconds, kind="stable")
    return Insensitivity(
        budget=budget,
        shapes=shapes[order].tolist(),
        seconds=seconds[order].tolist(),
        parameters=parameters[order].tolist(),
        noise=float(np.sqrt(within) / seconds.mean()),
        p_value=float(f_distribution.sf(ratio, n - 1, n * (copies - 1))),
    )


def shapes_near(space: SearchSpace, budget: int, n: int, tolerance: float = 0.02, seed: int = 0) -> np.ndarray:
    """Return up to `n` distinct shapes (found, layers) whose parameters are within `tolerance` of `budget`.

    They are the first fitting ones of shapes drawn evenly over all sizes. Warns if there are fewer than `n` among
    `DRAWS` times `ROUNDS` draws.

    Raises:
        ValueError: If fewer than two are found, or the tolerance is not a share.
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance={tolerance} must be at least 0 and below 1: a share of the budget.")
    found: dict[tuple[int, ...], None] = {}  # an ordered set
    for attempt in range(ROUNDS):
        drawn = space.sample(DRAWS, seed=(seed, attempt), distribution="budget")
        near = np.abs(np.asarray(space.num_parameters(drawn)) - budget) <= tolerance * budget
        found.update(dict.fromkeys(map(tuple, drawn[near].tolist())))
        if len(found) >= n:
            break
    if len(found) < 2:
        smallest, largest = space.num_parameters(space.smallest), space.num_parameters(space.largest)
        raise ValueError(
            f"Only {len(found)} shapes are within {tolerance:.1%} of budget={budget:,} parameters, but a comparison "
            f"takes two. Subnets have {smallest:,} to {largest:,}: choose a budget in between, or raise the tolerance."
        )
    if len(found) < n:
        warnings.warn(
            f"Only {len(found)} of {n} shapes were found within {tolerance:.1%} of budget={budget:,} parameters. Raise "
            "the tolerance for more.",
            stacklevel=2,
        )
    return np.array(list(found)[:n])


def insensitivity_rows(records: Sequence[Insensitivity]) -> list[dict[str, Any]]:
    """Return one row of text per record, for `tables.markdown_table`."""
    return [
        {
            "parameters": f"{np.mean(record.parameters):,.0f}",
            "their spread": f"{record.parameter_spread:.2%}",
            "shapes": len(record.shapes),
            "mean": _milliseconds(np.mean(record.seconds)),
            "spread of shapes": f"{record.spread:.2%}",
            "noise": f"{record.noise:.2%}",
            "verdict": record.verdict,
            "fastest": f"{_milliseconds(record.seconds[0])} {record.shapes[0]}",
            "slowest": f"{_milliseconds(record.seconds[-1])} {record.shapes[-1]}",
        }
        for record in records
    ]


def width_rows(table: LatencyTable) -> list[dict[str, Any]]:
    """Return one row of text per width of `table.width_costs()`, for `tables.markdown_table`."""
    return [
        {
            "width": row["width"],
            "block": _milliseconds(row["seconds"]),
            "parameters": row["parameters"],
            "time per parameter": f"{row['relative']:.2f} x that of {table.width_choices[-1]}",
            "head size": row["head_size"],
            "multiple of": "64" if row["multiple_of_64"] else "8" if row["multiple_of_8"] else "neither 8 nor 64",
        }
        for row in table.width_costs()
    ]


def _relative_deviation(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1) / np.mean(values))


def _milliseconds(seconds: Any) -> str:
    return f"{seconds * 1e3:.2f} ms"
