"""Does the time of a subnet depend on its shape, or on its number of parameters alone?

The SuperShaper paper (arXiv 2110.04711) finds the latter: among shapes of about equal size, the standard deviation of
the seconds is about 1 % of their mean. `compare_equal_sizes` repeats that measurement. It also measures the noise, that
is the standard deviation that equally fast shapes would show, since no timing is exact.
"""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import f as f_distribution

from ..checks import as_numbers, check_count, check_number
from ..files import read_json, write_json
from ..model.shapes import SearchSpace, shape_rows
from .table import LatencyTable
from .timing import SubnetTimer


FORMAT = "supershaper-hf insensitivity 2"
COPIES = 2  # subnets that are built of each shape: their difference is noise
SIGNIFICANCE = 0.05  # probability that noise is mistaken for a difference between shapes
DRAWS, ROUNDS = 4096, 8  # shapes that are drawn over all sizes in a round, and rounds, before the search gives up


@dataclass(frozen=True)
class Insensitivity:
    """How much the seconds of shapes of about equal size differ.

    Attributes:
        target: The number of parameters that was asked for.
        shapes: The measured shapes, from the fastest to the slowest.
        seconds: Seconds of each shape: the mean over its copies, each of which is the median of its runs.
        parameters: Number of parameters of each shape.
        noise: What `spread` would be, on average, if all shapes were equally fast.
        p_value: Probability of a spread at least this large if all shapes were equally fast.
    """

    target: int
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
        """Standard deviation of the numbers of parameters over their mean. The sizes are only about equal."""
        return _relative_deviation(self.parameters)

    @property
    def excess(self) -> float:
        """The part of the spread that is not noise: the root of the difference of both variances."""
        return float(np.sqrt(max(self.spread**2 - self.noise**2, 0.0)))

    @property
    def verdict(self) -> str:
        """The result of the F-test in words: `"no more than noise"`, or by how much the spread exceeds the noise."""
        return "no more than noise" if self.p_value > SIGNIFICANCE else f"{self.excess:.1%} above noise"


def compare_equal_sizes(
    space: SearchSpace,
    parameters: Sequence[int],
    num_shapes: int = 10,
    tolerance: float = 0.02,
    device: str | torch.device = "cpu",
    batch_size: int = 1,
    sequence_length: int = 128,
    dtype: torch.dtype = torch.float32,
    repeats: int = 15,
    warmup: int = 2,
    seed: int = 0,
) -> list[Insensitivity]:
    """Measure subnets of about equal numbers of parameters, and compare their seconds.

    Two copies of every shape are built, and every sweep runs all subnets of a size once, in random order. The copies of
    a shape are equally fast, but their measured seconds differ: by the order of runs, and by where in memory their
    weights lie, which no repetition of the same copy would show. Half the mean squared difference of copies is
    therefore the variance of one copy, and half of that the variance of a shape's mean: the noise. An F-test at 5 %, as
    in a one-way analysis of variance, decides whether the spread of the shapes exceeds it.

    All subnets of one size are in memory at once: 5 GB for 10 shapes of 63 M parameters in float32.

    Args:
        space: The search space.
        parameters: Numbers of parameters of the subnets, tied weights counted once.
        num_shapes: Number of shapes to measure for each of these. If fewer are found, there is a warning.
        tolerance: Largest difference between a shape's number of parameters and the one asked for, as a share of it.
            Embeddings count, too: where they are most of the model, ask for less, such as 0.002.
        device: `"cpu"`, `"cuda"`, `"cuda:1"` or `"mps"`.
        batch_size: Sequences in a batch.
        sequence_length: Tokens in a sequence.
        dtype: Type of weights and activations.
        repeats: Number of sweeps over all subnets of a size.
        warmup: Number of sweeps before them, which are thrown away.
        seed: Random seed of the shapes, the weights, the tokens and the order of runs.

    Returns:
        One comparison for each of `parameters`.

    Raises:
        ValueError: If fewer than two shapes of a size are found, a number is out of its range, or the sequence is too
            long.

    Example:
        >>> from supershaper_hf import SearchSpace, SuperShaperConfig, compare_equal_sizes
        >>> config = SuperShaperConfig(hidden_size=96, num_attention_heads=4, num_hidden_layers=6, vocab_size=50)
        >>> space = SearchSpace.from_config(config)
        >>> [comparison] = compare_equal_sizes(space, [2_000_000], num_shapes=3, repeats=2, sequence_length=16)
        >>> len(comparison.shapes)
        3
    """
    check_count("num_shapes", num_shapes, least=2)
    check_count("repeats", repeats)
    check_count("warmup", warmup, least=0)
    chosen = [shapes_near(space, target, num_shapes, tolerance, seed) for target in parameters]
    comparisons = []
    for target, shapes in zip(parameters, chosen):
        copies = np.repeat(shapes, COPIES, axis=0)
        timer = SubnetTimer(space, copies, device, batch_size, sequence_length, dtype, seed)
        for sweep in range(warmup + repeats):
            timer.sweep(keep=sweep >= warmup)
        medians = np.median(timer.seconds, axis=0).reshape(len(shapes), COPIES)
        del timer  # frees the memory before the subnets of the next size are built
        comparisons.append(summarize(target, shapes, np.asarray(space.num_parameters(shapes)), medians))
    return comparisons


def summarize(target: int, shapes: np.ndarray, parameters: np.ndarray, medians: np.ndarray) -> Insensitivity:
    """Compare shapes by their median seconds.

    Args:
        target: The number of parameters that was asked for.
        shapes: (n, layers) shapes.
        parameters: (n,) numbers of parameters.
        medians: (n, copies) seconds of each copy.

    Example:
        >>> medians = np.array([[1.0, 1.2], [2.0, 2.2]])
        >>> comparison = summarize(100, np.array([[16], [24]]), np.array([99, 101]), medians)
        >>> round(comparison.spread, 3), round(comparison.noise, 3), comparison.verdict
        (0.442, 0.063, '43.8% above noise')
    """
    n, copies = medians.shape
    seconds = medians.mean(axis=1)
    between, within = seconds.var(ddof=1), medians.var(axis=1, ddof=1).mean() / copies  # variances of a shape's mean
    ratio = between / within if within > 0 else np.inf if between > 0 else 0.0
    order = np.argsort(seconds, kind="stable")
    return Insensitivity(
        target=target,
        shapes=shapes[order].tolist(),
        seconds=seconds[order].tolist(),
        parameters=parameters[order].tolist(),
        noise=float(np.sqrt(within) / seconds.mean()),
        p_value=float(f_distribution.sf(ratio, n - 1, n * (copies - 1))),
    )


def shapes_near(
    space: SearchSpace, parameters: int, num_shapes: int, tolerance: float = 0.02, seed: int = 0
) -> np.ndarray:
    """Return up to `num_shapes` different shapes (found, layers) with about `parameters` parameters.

    Shapes are drawn evenly over all sizes, and the first ones that fit are taken. If fewer are found in `DRAWS` times
    `ROUNDS` draws, there is a warning.

    Args:
        space: The search space.
        parameters: Number of parameters of the subnets, tied weights counted once.
        num_shapes: Number of shapes to find.
        tolerance: Largest difference from `parameters`, as a share of it.
        seed: Random seed of the draws.

    Raises:
        ValueError: If fewer than two shapes are found, or `tolerance` is not in [0, 1).
    """
    check_number("tolerance", tolerance, least=0, below=1)
    found: dict[tuple[int, ...], None] = {}  # keeps the order, as a set does not
    for attempt in range(ROUNDS):
        drawn = space.sample(DRAWS, seed=(seed, attempt), distribution="budget")
        near = np.abs(np.asarray(space.num_parameters(drawn)) - parameters) <= tolerance * parameters
        found.update(dict.fromkeys(map(tuple, drawn[near].tolist())))
        if len(found) >= num_shapes:
            break
    if len(found) < 2:
        smallest, largest = space.num_parameters(space.smallest), space.num_parameters(space.largest)
        raise ValueError(
            f"{len(found)} shapes have {parameters:,} parameters within {tolerance:.1%}, but a comparison needs two. "
            f"Subnets of this space have {smallest:,} to {largest:,}: choose a number in between, or raise the "
            "tolerance."
        )
    if len(found) < num_shapes:
        warnings.warn(
            f"Only {len(found)} of {num_shapes} shapes were found that have {parameters:,} parameters within "
            f"{tolerance:.1%}. Raise the tolerance for more.",
            stacklevel=2,
        )
    return np.array(list(found)[:num_shapes])


def save_comparisons(file: str | Path, comparisons: Sequence[Insensitivity]) -> None:
    """Write what `compare_equal_sizes` has returned as JSON."""
    write_json(file, FORMAT, {"comparisons": [asdict(comparison) for comparison in comparisons]})


def load_comparisons(file: str | Path) -> list[Insensitivity]:
    """Read what `save_comparisons` has written.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or holds something else.

    Example:
        >>> import tempfile
        >>> measured = Insensitivity(100, [[8, 16], [16, 8]], [0.1, 0.2], [99, 101], noise=0.01, p_value=0.001)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "insensitivity.json"
        ...     save_comparisons(file, [measured])
        ...     load_comparisons(file) == [measured]
        True
    """
    content = read_json(file, FORMAT)
    try:
        return [_read_comparison(**comparison) for comparison in content["comparisons"]]
    except (ValueError, KeyError, TypeError) as error:
        reason = str(error).rstrip(".")
        raise ValueError(f"{file} holds no comparison: {reason}. Write it with save_comparisons.") from error


def _read_comparison(
    target: Any, shapes: Any, seconds: Any, parameters: Any, noise: Any, p_value: Any
) -> Insensitivity:
    check_count("target", target)
    rows, single = shape_rows(shapes)
    times, sizes = as_numbers("seconds", seconds), as_numbers("parameters", parameters)
    if single or len(rows) < 2 or not times.shape == sizes.shape == (len(rows),):
        raise ValueError("shapes, seconds and parameters must be lists of one length, at least 2.")
    for number in (*seconds, *parameters):
        check_number("seconds or parameters", number, least=0)
    check_number("noise", noise, least=0)
    check_number("p_value", p_value, least=0, most=1)
    return Insensitivity(target, shapes, seconds, parameters, noise, p_value)


def insensitivity_rows(comparisons: Sequence[Insensitivity]) -> list[dict[str, Any]]:
    """Return one row of text per comparison, for `tables.markdown_table`."""
    return [
        {
            "parameters": f"{np.mean(comparison.parameters):,.0f}",
            "their spread": f"{comparison.parameter_spread:.2%}",
            "shapes": len(comparison.shapes),
            "mean": _milliseconds(np.mean(comparison.seconds)),
            "spread of shapes": f"{comparison.spread:.2%}",
            "noise": f"{comparison.noise:.2%}",
            "verdict": comparison.verdict,
            "fastest": f"{_milliseconds(comparison.seconds[0])} {comparison.shapes[0]}",
            "slowest": f"{_milliseconds(comparison.seconds[-1])} {comparison.shapes[-1]}",
        }
        for comparison in comparisons
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
