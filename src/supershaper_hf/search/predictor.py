"""Predict the loss of a shape from a few measured ones, as a sum over layers and over pairs of neighbouring layers.

The prediction is in nats, that is in log-perplexity, where the contributions of layers add up. Because each term
involves one layer or two neighbours, the best shape under a budget can be found exactly (`search.pareto_front`).

The model: `loss = intercept + slope * mean relative width + sum of effect[layer][width] + sum of pair[layer][width of
the kept layer before][width]`. Each layer's effects are a random walk over its widths: ridge regression on the steps
between neighbouring width choices, each scaled by the distance between the two. The pairs are products of such steps,
and are left out where leave-one-out cross-validation does not ask for them. It also chooses the strength of the ridge.

Ridge regression is Bayesian regression with a normal prior, so it also tells how uncertain it is: `uncertainty` of a
prediction, and `draw`, other predictors that fit the measurements about as well.
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import lsq_linear
from scipy.stats import kendalltau, spearmanr

from ..files import write_file


MINIMUM_SHAPES = 8
RIDGE_STRENGTHS = np.logspace(-6, 3, 37)
FOLDS = 5
POOR_R2, POOR_SPEARMAN = 0.5, 0.7  # below either, a predictor warns
FORMAT = "supershaper-hf predictor 1"


@dataclass(frozen=True)
class Quality:
    """How well the losses of shapes that were left out of the fit are predicted (5-fold cross-validation).

    Attributes:
        shapes: Number of measured shapes.
        rmse: Root mean square error in nats.
        r2: Share of the variance of the losses that is predicted, at most 1.
        spearman: Rank correlation.
        kendall: Rank correlation: probability that two shapes are put in the right order, times 2, minus 1.
    """

    shapes: int
    rmse: float
    r2: float
    spearman: float
    kendall: float

    @classmethod
    def of(cls, losses: np.ndarray, predicted: np.ndarray) -> "Quality":
        """Compare measured and predicted losses, (n,) each."""
        errors = losses - predicted
        ranked = len(predicted) > 1 and np.ptp(predicted) > 0 and np.ptp(losses) > 0
        return cls(
            shapes=len(losses),
            rmse=float(np.sqrt(np.mean(errors**2))),
            r2=float(1 - errors @ errors / max(np.sum((losses - losses.mean()) ** 2), np.finfo(float).tiny)),
            spearman=float(spearmanr(losses, predicted).statistic) if ranked else 0.0,
            kendall=float(kendalltau(losses, predicted).statistic) if ranked else 0.0,
        )

    @property
    def poor(self) -> bool:
        return self.r2 < POOR_R2 or self.spearman < POOR_SPEARMAN

    def __str__(self) -> str:
        return (
            f"R2 {self.r2:.3f}, Spearman {self.spearman:.3f}, Kendall {self.kendall:.3f}, off by {self.rmse:.3f} nats "
            f"({FOLDS}-fold cross-validation on {self.shapes} shapes)"
        )


@dataclass(frozen=True)
class Evidence:
    """What uncertainty follows from: the measured shapes, and how the fit weighed them.

    Attributes:
        shapes: (n, layers) measured shapes.
        strength: Of the ridge.
        noise: Standard deviation of one measurement around the sum, in nats.
    """

    shapes: np.ndarray
    strength: float
    noise: float


class ShapePredictor:
    """A predictor of the loss of shapes, additive over layers and pairs of neighbouring layers.

    Args:
        width_choices: The hidden sizes it knows, increasing; 0 among them if it was fitted on dropped layers.
        intercept: The loss, in nats, of a shape of which every layer has the smallest of these.
        effects: (layers, widths): what each width of each layer adds to the intercept, in nats.
        pair_effects: (layers, widths, widths): what the pair (width of the kept layer before, width) adds at each
            layer, in nats; zero at the first layer and for the smallest width. By default zero everywhere.
        evidence: Of the fit, for `uncertainty` and `draw`.
        quality: On shapes left out of the fit.

    Example:
        >>> shapes = [[a, b, 16] for a in (16, 32, 48) for b in (16, 32, 48)]
        >>> predictor = ShapePredictor.fit(shapes, [3 - a / 100 - b / 200 for a, b, _ in shapes])
        >>> predictor.predict([[48, 32, 16]]).round(2)
        array([2.36])
    """

    def __init__(
        self,
        width_choices: Sequence[int],
        intercept: float,
        effects: np.ndarray,
        pair_effects: np.ndarray | None = None,
        evidence: Evidence | None = None,
        quality: Quality | None = None,
    ):
        self.width_choices = list(width_choices)
        self.intercept = float(intercept)
        self.effects = np.asarray(effects, dtype=np.float64)
        layers, widths = len(self.effects), len(self.width_choices)
        pair_size = (layers, widths, widths)
        self.pair_effects = np.zeros(pair_size) if pair_effects is None else np.asarray(pair_effects, dtype=np.float64)
        if self.effects.shape != (layers, widths) or self.pair_effects.shape != pair_size:
            raise ValueError(
                f"{widths} width choices need effects (layers, {widths}) and pair_effects (layers, {widths}, "
                f"{widths}), got {self.effects.shape} and {self.pair_effects.shape}."
            )
        if not all(np.isfinite(part).all() for part in (self.intercept, self.effects, self.pair_effects)):
            raise ValueError("intercept, effects and pair_effects must be finite.")
        if evidence is not None and not set(np.unique(evidence.shapes)) <= set(self.width_choices):
            raise ValueError(f"The measured shapes have widths that are not in {self.width_choices}.")
        self.evidence, self.quality = evidence, quality
        self._index_of_width = np.full(self.width_choices[-1] + 1, -1)
        self._index_of_width[self.width_choices] = range(widths)

    @classmethod
    def fit(
        cls,
        shapes: Sequence[Sequence[int]] | np.ndarray,
        losses: Sequence[float] | np.ndarray,
        pairs: bool | None = None,
        monotone: bool = False,
    ) -> "ShapePredictor":
        """Fit on measured `shapes` (n, layers) and their `losses` (n,) in nats.

        Warns if shapes left out of the fit are predicted poorly.

        Args:
            shapes: Integers; 0 drops a layer.
            losses: One per shape.
            pairs: Whether to use terms of neighbouring layers; `None` chooses by leave-one-out cross-validation.
            monotone: Whether a wider layer is never worse. Excludes `pairs`.

        Raises:
            ValueError: If the lengths differ, there are too few shapes, or the losses are not finite or all equal.
        """
        widths, target = np.array(shapes), np.asarray(losses, dtype=np.float64)  # a copy: the predictor keeps it
        _check_measurements(widths, target)
        if monotone and pairs:
            raise ValueError("monotone=True cannot be kept with pairs=True. Leave one of them out.")
        pairs = False if monotone else pairs
        basis = _Basis(np.unique(widths).astype(np.int64), widths.shape[1])
        held_out = np.empty(len(target))
        order = np.random.default_rng(0).permutation(len(target))
        for fold in range(FOLDS):
            test = np.zeros(len(target), dtype=bool)
            test[order[fold::FOLDS]] = True
            fitted, *_ = cls._fit(basis, widths[~test], target[~test], pairs, monotone)
            held_out[test] = fitted._sum(np.searchsorted(basis.choices, widths[test]))
        predictor = cls._fit(basis, widths, target, pairs, monotone)[0]
        predictor.quality = Quality.of(target, held_out)
        predictor._warn_if_poor()
        return predictor

    @classmethod
    def _fit(
        cls, basis: "_Basis", shapes: np.ndarray, losses: np.ndarray, pairs: bool | None, monotone: bool
    ) -> tuple["ShapePredictor", float]:
        """Return a predictor without quality, and its leave-one-out root mean square error."""
        index = np.searchsorted(basis.choices, shapes)
        candidates = []
        for use_pairs in (False, True) if pairs is None else (pairs,):
            fit = _ridge(basis.trend(index), basis.steps(index, use_pairs), losses)
            candidates.append((fit.loo_rmse, use_pairs, fit))
        loo_rmse, use_pairs, fit = min(candidates, key=lambda candidate: candidate[0])
        slope, weights = fit.slope, fit.weights
        if monotone:
            slope, weights = _monotone_ridge(basis, index, losses, fit.strength)
        evidence = Evidence(shapes, fit.strength, fit.noise)
        return cls(basis.choices.tolist(), *basis.tables(slope, weights), evidence), loo_rmse

    @property
    def droppable(self) -> list[bool]:
        """Whether each layer can be dropped: width 0 is known, and this layer was dropped in a measured shape."""
        if self.width_choices[0] != 0:
            return [False] * len(self.effects)
        if self.evidence is None:
            return [True] * len(self.effects)
        return (self.evidence.shapes == 0).any(axis=0).tolist()

    def knows(self, shape: Sequence[int]) -> bool:
        """Return whether `shape` can be predicted: all widths known, and no layer dropped that never was."""
        may_be_dropped = len(shape) == len(self.droppable) and all(np.array(shape, dtype=bool) | self.droppable)
        return may_be_dropped and set(shape) - {0} <= set(self.width_choices)

    def predict(self, shapes: Sequence[Sequence[int]] | np.ndarray) -> np.ndarray:
        """Return the predicted losses (n,) in nats, the logarithms of perplexities, of `shapes` (n, layers).

        Raises:
            ValueError: If a width was not among the measured ones, a layer is dropped that never was, or the number of
                layers differs.
        """
        return self._sum(self._index(shapes))

    def uncertainty(self, shapes: Sequence[Sequence[int]] | np.ndarray) -> np.ndarray:
        """Return the standard deviation (n,) in nats of what measuring `shapes` (n, layers) would show.

        It contains what the measurements leave open and their noise. It takes the sum of terms for true; where widths
        interact beyond neighbours, and with `monotone`, it is a guide only.

        Raises:
            ValueError: As `predict`; also if the predictor was not fitted.
        """
        terms = self._posterior.terms(self._index(shapes))
        solved = np.linalg.solve(self._posterior.factor, terms.T)
        return self._posterior.noise * np.sqrt(1 + (solved**2).sum(axis=0))

    def draw(self, n: int, seed: int | Sequence[int]) -> "list[ShapePredictor]":
        """Draw `n` predictors from what the measurements leave open: their spread is the uncertainty of the fit.

        Raises:
            ValueError: If the predictor was not fitted.
        """
        posterior = self._posterior
        normal = np.random.default_rng(seed).standard_normal((len(posterior.factor), n))
        errors = posterior.noise * np.linalg.solve(posterior.factor.T, normal)
        drawn = []
        for error in errors.T:
            intercept, effects, pair_effects = posterior.basis.tables(error[:2], error[2:])
            drawn.append(
                ShapePredictor(
                    self.width_choices,
                    self.intercept + intercept,
                    self.effects + effects,
                    self.pair_effects + pair_effects,
                    self.evidence,
                )
            )
        return drawn

    def save(self, file: str | Path) -> None:
        """Write the predictor as JSON, the measured shapes included."""
        content: dict[str, Any] = {
            "format": FORMAT,
            "width_choices": self.width_choices,
            "intercept": self.intercept,
            "effects": self.effects.tolist(),
            "pair_effects": self.pair_effects.tolist() if self.pair_effects.any() else None,
            "quality": self.quality and asdict(self.quality),
            "evidence": self.evidence and {**asdict(self.evidence), "shapes": self.evidence.shapes.tolist()},
        }
        write_file(file, json.dumps(content) + "\n")

    @classmethod
    def load(cls, file: str | Path) -> "ShapePredictor":
        """Read a predictor written by `save`. Warns if its quality is poor.

        Raises:
            ValueError: If the file holds something else.
        """
        try:
            content = json.loads(Path(file).read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT:
                raise ValueError("another format")
            quality, evidence = content.pop("quality"), content.pop("evidence")
            if evidence:
                evidence = Evidence(**{**evidence, "shapes": np.array(evidence["shapes"])})
            predictor = cls(**content, evidence=evidence, quality=Quality(**quality) if quality else None)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(
                f"{file} is not a predictor of this version: {error!r}. Write it with ShapePredictor.save."
            ) from error
        predictor._warn_if_poor()
        return predictor

    def _index(self, shapes: Sequence[Sequence[int]] | np.ndarray) -> np.ndarray:
        """Return the positions (n, layers) of widths in `width_choices`, or raise."""
        widths = np.atleast_2d(np.asarray(shapes))
        layers = len(self.effects)
        largest = self.width_choices[-1]
        index = np.full(widths.shape, -1)
        if np.issubdtype(widths.dtype, np.integer):
            index = np.where((widths >= 0) & (widths <= largest), self._index_of_width[np.clip(widths, 0, largest)], -1)
        unknown = np.unique(widths[index < 0]).tolist()
        if widths.shape[1] != layers or unknown:
            raise ValueError(
                f"The predictor knows {layers} layers and the widths {self.width_choices}, but got {widths.shape[1]} "
                f"layers{f' and the widths {unknown}' if unknown else ''}."
            )
        if self.width_choices[0] == 0:
            strange = np.flatnonzero((index == 0).any(axis=0) & ~np.array(self.droppable))
            if len(strange):
                raise ValueError(
                    f"Layers {strange.tolist()} were not dropped in any measured shape, so what dropping them costs is "
                    "unknown. Measure shapes without them, and fit again."
                )
        return index

    def _sum(self, index: np.ndarray) -> np.ndarray:
        """Add up the terms (n,) of positions `index` (n, layers), whether or not their layers can be dropped."""
        layers = np.arange(len(self.effects))
        sources = _sources(index, dropping=self.width_choices[0] == 0)
        terms = self.effects[layers, index] + self.pair_effects[layers, sources, index]
        return self.intercept + terms.sum(axis=1)

    @cached_property
    def _posterior(self) -> "_Posterior":
        if self.evidence is None:
            raise ValueError("This predictor was not fitted, so its uncertainty is unknown. Use ShapePredictor.fit.")
        basis = _Basis(np.array(self.width_choices), len(self.effects))
        return _Posterior.of(basis, self.evidence, pairs=bool(self.pair_effects.any()))

    def _warn_if_poor(self) -> None:
        if self.quality is not None and self.quality.poor:
            warnings.warn(
                f"Shapes left out of the fit are predicted poorly: {self.quality}. Measure more shapes, on more text, "
                f"or train the supernet longer, before trusting a search (R2 {POOR_R2} and Spearman {POOR_SPEARMAN} "
                "are the least).",
                stacklevel=3,
            )


def _check_measurements(shapes: np.ndarray, losses: np.ndarray) -> None:
    if len(shapes) < MINIMUM_SHAPES and losses.shape == (len(shapes),):
        raise ValueError(
            f"{len(shapes)} measured shapes are too few: at least {MINIMUM_SHAPES}, better 4 for each layer."
        )
    if shapes.ndim != 2 or losses.shape != (len(shapes),):
        raise ValueError(
            f"shapes must be (n, layers) and losses (n,), one per shape, got {shapes.shape} and {losses.shape}."
        )
    if not np.issubdtype(shapes.dtype, np.integer):
        raise ValueError(f"shapes must be integers, got {shapes.dtype}.")
    if shapes.min() < 0:
        raise ValueError(f"Width {shapes.min()} is negative. Allowed: positive widths, and 0 for a dropped layer.")
    if not np.isfinite(losses).all():
        raise ValueError(f"{(~np.isfinite(losses)).sum()} of the losses are not finite; remove those shapes.")
    if np.ptp(losses) == 0:
        raise ValueError(
            f"All {len(losses)} losses are {losses[0]:g}: the shape makes no difference, so there is nothing to "
            "predict. Check that shape= was passed when measuring, and that the supernet is trained."
        )


# The terms of the sum, and their fit


@dataclass(frozen=True)
class _Basis:
    """The columns of the regression. `index` is (n, layers): positions of widths in `choices`, which are increasing."""

    choices: np.ndarray
    layers: int

    @property
    def scale(self) -> np.ndarray:
        """Standard deviation of each step of the random walk, in the unit of the prior."""
        return np.sqrt(np.diff(self.choices) / self.choices[-1])

    def trend(self, index: np.ndarray) -> np.ndarray:
        """Return the columns that are not penalised, (n, 2): one, and the mean relative width."""
        return np.column_stack([np.ones(len(index)), self.choices[index].mean(axis=1) / self.choices[-1]])

    def steps(self, index: np.ndarray, pairs: bool) -> np.ndarray:
        """Return the penalised columns: steps taken by each layer, then products of steps of neighbours."""
        taken = (index[:, :, None] > np.arange(len(self.choices) - 1)) * self.scale
        columns = [taken.reshape(len(index), -1)]
        if pairs:
            sources = _sources(index, dropping=self.choices[0] == 0)
            before = (sources[:, 1:, None] > np.arange(len(self.choices) - 1)) * self.scale
            columns.append((before[..., None] * taken[:, 1:, None, :]).reshape(len(index), -1))
        return np.hstack(columns)

    def tables(self, slope: np.ndarray, weights: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """Add coefficients up to intercept, effects (layers, widths) and pair effects (layers, widths, widths)."""
        steps = len(self.choices) - 1
        walk = np.zeros((self.layers, steps + 1))
        walk[:, 1:] = np.cumsum(weights[: self.layers * steps].reshape(self.layers, steps) * self.scale, axis=1)
        effects = walk + slope[1] * (self.choices - self.choices[0]) / (self.choices[-1] * self.layers)
        pairs = np.zeros((self.layers, steps + 1, steps + 1))
        if len(weights) > self.layers * steps:
            products = weights[self.layers * steps :].reshape(self.layers - 1, steps, steps)
            pairs[1:, 1:, 1:] = (products * np.outer(self.scale, self.scale)).cumsum(axis=1).cumsum(axis=2)
        return float(slope[0] + slope[1] * self.choices[0] / self.choices[-1]), effects, pairs


def _sources(index: np.ndarray, dropping: bool) -> np.ndarray:
    """Return, for each layer, the position of the width of the kept layer before it; 0, which adds nothing, for none.

    Args:
        index: (n, layers) positions of widths in the width choices.
        dropping: Whether position 0 is a dropped layer.
    """
    if dropping:
        kept = np.maximum.accumulate(np.where(index > 0, np.arange(index.shape[1]), 0), axis=1)
        index = np.take_along_axis(index, kept, axis=1)
    return np.pad(index[:, :-1], ((0, 0), (1, 0)))


@dataclass(frozen=True)
class _Ridge:
    slope: np.ndarray
    weights: np.ndarray
    strength: float
    loo_rmse: float
    noise: float


def _ridge(trend: np.ndarray, steps: np.ndarray, target: np.ndarray) -> _Ridge:
    """Fit `target` by the unpenalised columns of `trend` and the ridge-penalised columns of `steps`.

    The strength is the one with the lowest leave-one-out error, which a linear fit tells without fitting again: the
    residual over one minus the diagonal of the hat matrix.
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
    return _Ridge(
        slope=solve_trend @ (target - steps @ weights),
        weights=weights,
        strength=float(RIDGE_STRENGTHS[best]),
        loo_rmse=float(loo[best]),
        noise=float(np.sqrt(np.mean(left_out[best] * residuals[best]))),  # var(left_out) = noise^2 / (1 - leverage)
    )


def _monotone_ridge(
    basis: _Basis, index: np.ndarray, target: np.ndarray, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    """Fit as `_ridge` at one strength, under the constraint that no step to a wider layer raises the loss.

    Unknown are the trend and the whole steps, trend included, which are at most 0. What is penalised is by how much a
    step differs from the trend.
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
class _Posterior:
    """The distribution of the coefficients: normal, with covariance noise^2 (factor factor^T)^-1."""

    basis: _Basis
    pairs: bool
    factor: np.ndarray
    noise: float

    @classmethod
    def of(cls, basis: _Basis, evidence: Evidence, pairs: bool) -> "_Posterior":
        index = np.searchsorted(basis.choices, evidence.shapes)
        terms = np.hstack([basis.trend(index), basis.steps(index, pairs)])
        # The trend has no prior; a millionth of the measurements' weight keeps the matrix regular where it is not told.
        penalty = np.full(terms.shape[1], evidence.strength)
        penalty[:2] = 1e-6 * len(terms)
        return cls(basis, pairs, np.linalg.cholesky(terms.T @ terms + np.diag(penalty)), evidence.noise)

    def terms(self, index: np.ndarray) -> np.ndarray:
        return np.hstack([self.basis.trend(index), self.basis.steps(index, self.pairs)])
