"""Ridge regression of losses on the widths of layers and of neighbouring layers: what `ShapePredictor` is fitted with.

Each layer's effect is a random walk over its widths. The columns of the regression are therefore steps from one width
choice to the next: a layer has taken a step if it is at least as wide as the choice after it. Each step is scaled by
the square root of the distance between the two widths, so that a long step may change the loss by more than a short
one. The columns of a pair of neighbouring layers are products of their steps.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import lsq_linear


RIDGE_STRENGTHS = np.logspace(-6, 3, 37)


@dataclass(frozen=True)
class Basis:
    """The columns of the regression.

    Every `index` below is an integer array (n, layers): the position of each layer's width in `choices`.

    Attributes:
        choices: (widths,) width choices, strictly increasing; the first is 0 if layers can be dropped.
        layers: Number of layers.

    Example:
        >>> basis = Basis(np.array([16, 32, 64]), layers=2)
        >>> basis.steps(np.array([[0, 2]]), pairs=False).round(2)  # the first layer has taken no step, the second both
        array([[0.  , 0.  , 0.5 , 0.71]])
    """

    choices: np.ndarray
    layers: int

    @property
    def scale(self) -> np.ndarray:
        """Standard deviation (widths - 1,) of each step of the random walk, in units of the prior."""
        return np.sqrt(np.diff(self.choices) / self.choices[-1])

    def trend(self, index: np.ndarray) -> np.ndarray:
        """Return the columns (n, 2) that are not penalised: a constant, and the mean relative width."""
        return np.column_stack([np.ones(len(index)), self.choices[index].mean(axis=1) / self.choices[-1]])

    def steps(self, index: np.ndarray, pairs: bool) -> np.ndarray:
        """Return the penalised columns (n, columns): steps of each layer and, with `pairs`, products of neighbours."""
        taken = (index[:, :, None] > np.arange(len(self.choices) - 1)) * self.scale
        columns = [taken.reshape(len(index), math.prod(taken.shape[1:]))]
        if pairs:
            before_index = sources(index, dropping=self.choices[0] == 0)
            before = (before_index[:, 1:, None] > np.arange(len(self.choices) - 1)) * self.scale
            products = before[..., None] * taken[:, 1:, None, :]
            columns.append(products.reshape(len(index), math.prod(products.shape[1:])))
        return np.hstack(columns)

    def tables(self, slope: np.ndarray, weights: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """Add coefficients up to what a `ShapePredictor` stores.

        Args:
            slope: (2,) coefficients of `trend`.
            weights: (columns,) coefficients of `steps`, with or without pairs.

        Returns:
            The intercept, the effects (layers, widths) and the pair effects (layers, widths, widths).
        """
        steps = len(self.choices) - 1
        walk = np.zeros((self.layers, steps + 1))
        walk[:, 1:] = np.cumsum(weights[: self.layers * steps].reshape(self.layers, steps) * self.scale, axis=1)
        effects = walk + slope[1] * (self.choices - self.choices[0]) / (self.choices[-1] * self.layers)
        pairs = np.zeros((self.layers, steps + 1, steps + 1))
        if len(weights) > self.layers * steps:
            products = weights[self.layers * steps :].reshape(self.layers - 1, steps, steps)
            pairs[1:, 1:, 1:] = (products * np.outer(self.scale, self.scale)).cumsum(axis=1).cumsum(axis=2)
        return float(slope[0] + slope[1] * self.choices[0] / self.choices[-1]), effects, pairs


def sources(index: np.ndarray, dropping: bool) -> np.ndarray:
    """Return, for each layer, the position (n, layers) of the width of the last kept layer before it.

    Where no layer before it is kept, this is position 0, to which no pair effect belongs.

    Args:
        index: (n, layers) positions of widths in the width choices.
        dropping: Whether position 0 stands for a dropped layer.

    Example:
        >>> sources(np.array([[2, 0, 1]]), dropping=True)
        array([[0, 2, 2]])
    """
    if dropping:
        kept = np.maximum.accumulate(np.where(index > 0, np.arange(index.shape[1]), 0), axis=1)
        index = np.take_along_axis(index, kept, axis=1)
    return np.pad(index[:, :-1], ((0, 0), (1, 0)))


@dataclass(frozen=True)
class RidgeFit:
    """The result of `ridge`.

    Attributes:
        slope: (2,) coefficients of the trend.
        weights: (columns,) coefficients of the steps.
        strength: The penalty that was chosen.
        loo_rmse: Root mean square of the leave-one-out errors.
        noise: Estimated standard deviation of one measurement around the regression.
    """

    slope: np.ndarray
    weights: np.ndarray
    strength: float
    loo_rmse: float
    noise: float


def ridge(trend: np.ndarray, steps: np.ndarray, target: np.ndarray) -> RidgeFit:
    """Fit `target` (n,) by the columns of `trend` (n, 2), unpenalised, and those of `steps` (n, columns), penalised.

    The strength of the penalty is the one of `RIDGE_STRENGTHS` with the lowest leave-one-out error. For a linear fit,
    that error is known without fitting again: it is the residual over one minus the diagonal of the hat matrix.
    """
    solve_trend = np.linalg.pinv(trend)
    onto_trend = trend @ solve_trend
    left, values, right = np.linalg.svd(steps - onto_trend @ steps, full_matrices=False)
    residual = target - onto_trend @ target
    shrinkage = values**2 / (values**2 + RIDGE_STRENGTHS[:, None])  # (strengths, values)
    projected = left.T @ residual
    residuals = residual - (shrinkage * projected) @ left.T  # (strengths, n)
    leverage = np.diag(onto_trend) + shrinkage @ (left**2).T
    left_out = residuals / np.maximum(1 - leverage, 1e-12)  # both tend to 0 where a fit can follow every measurement
    loo = np.sqrt(np.mean(left_out**2, axis=1))
    best = int(loo.argmin())
    weights = right.T @ (values / (values**2 + RIDGE_STRENGTHS[best]) * projected)
    return RidgeFit(
        slope=solve_trend @ (target - steps @ weights),
        weights=weights,
        strength=float(RIDGE_STRENGTHS[best]),
        loo_rmse=float(loo[best]),
        noise=float(np.sqrt(np.mean(left_out[best] * residuals[best]))),  # var(left_out) = noise^2 / (1 - leverage)
    )


def monotone_ridge(
    basis: Basis, index: np.ndarray, target: np.ndarray, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    """Fit as `ridge` does with one `strength`, but so that no step to a wider layer raises the loss.

    The unknowns are the trend, and for each step the whole change of the loss, including the part that the trend
    explains. This change must not be positive. The penalty is on the part that the trend does not explain.

    Returns:
        The coefficients `slope` (2,) and `weights` (columns,), as those of `RidgeFit`.
    """
    scale = np.tile(basis.scale, basis.layers)
    along_trend = np.tile(np.diff(basis.choices) / (basis.choices[-1] * basis.layers), basis.layers)
    taken = basis.steps(index, pairs=False) / scale
    n, columns = taken.shape
    penalty = np.sqrt(strength) * np.column_stack([np.zeros(columns), -along_trend / scale, np.diag(1 / scale)])
    matrix = np.vstack([np.column_stack([np.ones(n), np.zeros(n), taken]), penalty])
    bounds = (-np.inf, np.array([np.inf, np.inf, *np.zeros(columns)]))
    solution = lsq_linear(matrix, np.concatenate([target, np.zeros(columns)]), bounds).x
    smallest, slope, steps = solution[0], solution[1], solution[2:]
    trend = np.array([smallest - slope * basis.choices[0] / basis.choices[-1], slope])
    return trend, (steps - slope * along_trend) / scale


@dataclass(frozen=True)
class Posterior:
    """The distribution of the coefficients after the measurements: normal, with covariance noise^2 (F F^T)^-1.

    Ridge regression is Bayesian regression with a normal prior, whose precision is the strength of the ridge.

    Attributes:
        basis: The columns.
        pairs: Whether they contain those of pairs.
        factor: The lower triangular matrix F, (columns, columns).
        noise: Standard deviation of one measurement.
    """

    basis: Basis
    pairs: bool
    factor: np.ndarray
    noise: float

    @classmethod
    def after(cls, basis: Basis, pairs: bool, index: np.ndarray, strength: float, noise: float) -> "Posterior":
        """Return the posterior after measuring the shapes with positions `index` (n, layers)."""
        terms = np.hstack([basis.trend(index), basis.steps(index, pairs)])
        # The trend has no prior. A millionth of the weight of the measurements keeps the matrix regular where they do
        # not determine it.
        penalty = np.full(terms.shape[1], strength)
        penalty[:2] = 1e-6 * len(terms)
        return cls(basis, pairs, np.linalg.cholesky(terms.T @ terms + np.diag(penalty)), noise)

    def deviations(self, index: np.ndarray) -> np.ndarray:
        """Return the standard deviations (n,) of new measurements of the shapes with positions `index` (n, layers)."""
        terms = np.hstack([self.basis.trend(index), self.basis.steps(index, self.pairs)])
        solved = np.linalg.solve(self.factor, terms.T)
        return self.noise * np.sqrt(1 + (solved**2).sum(axis=0))

    def draw(self, num_draws: int, random: np.random.Generator) -> np.ndarray:
        """Draw deviations of the coefficients from their estimates: (num_draws, columns), the trend's two first."""
        normal = random.standard_normal((len(self.factor), num_draws))
        return (self.noise * np.linalg.solve(self.factor.T, normal)).T
