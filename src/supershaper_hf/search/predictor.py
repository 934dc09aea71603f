"""Predict the loss of a shape from a few measured ones, as a sum over layers and over pairs of neighbouring layers.

The prediction is in nats, the unit of log-perplexity, in which the contributions of layers add up. Each term involves
one layer or two neighbours, so the best shape under a budget can be found exactly (`search.pareto_front`). Distances to
the original are predicted in the same way; wherever this file says loss, it can be a distance (`measures`).

The model: `loss = intercept + sum of effect[layer][width] + sum of pair[layer][width of the kept layer before][width]`.
It is fitted by ridge regression (`search.regression`). Leave-one-out cross-validation chooses the strength of the ridge
and whether terms of pairs are used at all.

Ridge regression is Bayesian regression with a normal prior, so the fit also knows how uncertain it is: `uncertainty`
returns the standard deviation of a prediction, `draw` returns other predictors that fit the measurements about as well.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np

from ..checks import as_numbers, check_count, check_number, check_widths
from ..files import read_json, write_json
from ..model.shapes import shape_rows
from .measures import find_measure, measure_of
from .quality import FOLDS, POOR_R2, POOR_SPEARMAN, Quality, read_quality
from .regression import Basis, Posterior, monotone_ridge, ridge, sources


MINIMUM_SHAPES = 8
FORMAT = "supershaper-hf predictor 2"


@dataclass(frozen=True)
class Evidence:
    """The measurements that a predictor was fitted on, and two results of the fit. The uncertainty follows from these.

    Attributes:
        shapes: (n, layers) measured shapes.
        losses: (n,) their losses in nats, or their distances.
        strength: Strength of the ridge.
        noise: Standard deviation of one measurement around the sum, in nats.
    """

    shapes: np.ndarray
    losses: np.ndarray
    strength: float
    noise: float

    def __post_init__(self) -> None:
        if np.shape(self.shapes) != (len(self.losses), *np.shape(self.shapes)[1:]) or np.ndim(self.shapes) != 2:
            raise ValueError(
                f"Measured shapes (n, layers) need losses (n,), got {np.shape(self.shapes)} and "
                f"{np.shape(self.losses)}."
            )
        check_number("strength", self.strength, above=0)
        check_number("noise", self.noise, least=0)


class ShapePredictor:
    """A predictor of the loss of shapes, additive over layers and pairs of neighbouring layers. Make it with `fit`.

    Args:
        width_choices: The hidden sizes that the predictor knows, strictly increasing. 0 is among them if it was fitted
            on shapes with dropped layers.
        intercept: Loss in nats of the shape whose layers all have the smallest of `width_choices`.
        effects: (layers, widths): what each width of each layer adds to the intercept, in nats.
        pair_effects: (layers, widths, widths): what the pair (width of the kept layer before, width) adds at each
            layer, in nats. It must be zero at the first layer and for the smallest width. The default is zero
            everywhere.
        evidence: The measurements that the predictor was fitted on, for `uncertainty` and `draw`.
        quality: How well shapes that were left out of the fit are predicted.
        measure: What is predicted, `"loss"` in nats, or `"distance"` or `"task_loss"`, which have no unit.

    Raises:
        ValueError: If sizes do not agree, a number is not finite, a width is negative or occurs twice, or the measure
            is unknown.

    Example:
        >>> shapes = [[a, b, 16] for a in (16, 32, 48) for b in (16, 32, 48)]
        >>> predictor = ShapePredictor.fit(shapes, [3 - a / 100 - b / 200 for a, b, _ in shapes])
        >>> round(predictor.predict([48, 32, 16]), 2)
        2.36
        >>> predictor.predict([[48, 32, 16], [16, 16, 16]]).round(2)
        array([2.36, 2.76])
    """

    def __init__(
        self,
        width_choices: Sequence[int],
        intercept: float,
        effects: np.ndarray | Sequence[Sequence[float]],
        pair_effects: np.ndarray | Sequence[Sequence[Sequence[float]]] | None = None,
        evidence: Evidence | None = None,
        quality: Quality | None = None,
        measure: str = "loss",
    ):
        self.measure = find_measure(measure).name
        check_widths("width_choices", width_choices, least=0)
        check_number("intercept", intercept)
        self.width_choices = [int(width) for width in width_choices]
        self.intercept = float(intercept)
        self.effects = as_numbers("effects", effects)
        layers, widths = len(self.effects) if self.effects.ndim else 0, len(self.width_choices)
        pair_size = (layers, widths, widths)
        self.pair_effects = np.zeros(pair_size) if pair_effects is None else as_numbers("pair_effects", pair_effects)
        if layers == 0 or self.effects.shape != (layers, widths) or self.pair_effects.shape != pair_size:
            raise ValueError(
                f"{widths} width choices need effects (layers, {widths}) and pair_effects (layers, {widths}, "
                f"{widths}), got {self.effects.shape} and {self.pair_effects.shape}."
            )
        if not all(np.isfinite(part).all() for part in (self.effects, self.pair_effects)):
            raise ValueError("effects and pair_effects must be finite.")
        if any(part.any() for part in (self.pair_effects[0], self.pair_effects[:, 0], self.pair_effects[:, :, 0])):
            raise ValueError("pair_effects must be zero at the first layer and for the smallest width.")
        if evidence is not None and evidence.shapes.shape[1] != layers:
            raise ValueError(f"The measured shapes have {evidence.shapes.shape[1]} layers, but effects have {layers}.")
        if evidence is not None and not np.isin(evidence.shapes, self.width_choices).all():
            raise ValueError(f"The measured shapes have widths that are not in {self.width_choices}.")
        if quality is not None and quality.measure != measure:
            raise ValueError(f"The quality is that of a {quality.measure}, but the predictor predicts a {measure}.")
        self.evidence, self.quality = evidence, quality

    @classmethod
    def fit(
        cls,
        shapes: Sequence[Sequence[int]] | np.ndarray,
        losses: Sequence[float] | np.ndarray,
        pairs: bool | None = None,
        monotone: bool = False,
        measure: str = "loss",
    ) -> "ShapePredictor":
        """Fit a predictor on measured `shapes` (n, layers) and their `losses` (n,) in nats, or their distances.

        Warns if shapes that are left out of the fit are predicted poorly.

        Args:
            shapes: Integers. A width of 0 drops a layer.
            losses: One per shape. Distances, if `measure="distance"`.
            pairs: Whether to use terms of neighbouring layers. With None, leave-one-out cross-validation chooses.
            monotone: Whether a wider layer is never worse. It excludes `pairs`.
            measure: What was measured, `"loss"`, `"distance"` or `"task_loss"`. Predictions are in the same unit.

        Raises:
            ValueError: If the lengths differ, there are too few shapes, or the losses are not finite or all equal.
        """
        predictor = cls._fit_with_quality(shapes, losses, pairs, monotone, measure)
        predictor._warn_if_poor()
        return predictor

    @classmethod
    def fit_records(
        cls, records: Sequence[Mapping[str, Any]], pairs: bool | None = None, monotone: bool = False
    ) -> "ShapePredictor":
        """Fit a predictor on the records of measured shapes, as `evaluate_shapes` and `read_records` return them.

        Records whose loss is not finite are left out, with a warning that says how many they are.

        Args:
            records: Mappings with `shape` and `loss`, or with `shape` and `distance`.
            pairs: Whether to use terms of neighbouring layers: see `fit`.
            monotone: Whether a wider layer is never worse: see `fit`.

        Raises:
            ValueError: If a loss is not a number, too few losses are finite, all losses are equal, or the records are
                of different measures.

        Example:
            >>> records = [{"shape": [a, b], "loss": 3 - (a + b) / 90} for a in (8, 16, 24) for b in (8, 16, 24)]
            >>> ShapePredictor.fit_records(records).quality.num_shapes
            9
        """
        measure = measure_of(records)
        measured = as_numbers(measure.plural, [record[measure.name] for record in records])
        finite = [record for record, loss in zip(records, measured) if np.isfinite(loss)]
        if len(finite) < min(len(records), MINIMUM_SHAPES):
            raise ValueError(
                f"Only {len(finite)} of {len(records)} measured {measure.plural} are finite, but a predictor needs at "
                f"least {MINIMUM_SHAPES}. Check that the supernet is trained, and that it is stable in this precision."
            )
        if len(finite) < len(records):
            warnings.warn(
                f"{len(records) - len(finite)} of {len(records)} measured shapes have no finite {measure.name} and are "
                "left out of the fit.",
                stacklevel=2,
            )
        shapes, losses = [record["shape"] for record in finite], [record[measure.name] for record in finite]
        predictor = cls._fit_with_quality(shapes, losses, pairs, monotone, measure.name)
        predictor._warn_if_poor()
        return predictor

    @classmethod
    def _fit_with_quality(
        cls, shapes: Any, losses: Any, pairs: bool | None, monotone: bool, measure: str
    ) -> "ShapePredictor":
        """Fit on all measurements, and on those outside each of `FOLDS` folds to know the quality."""
        widths, target = _check_measurements(shapes, losses, find_measure(measure).plural)
        if monotone and pairs:
            raise ValueError("monotone=True cannot be kept with pairs=True. Leave one of them out.")
        pairs = False if monotone else pairs
        basis = Basis(np.unique(widths), widths.shape[1])
        held_out = np.empty(len(target))
        order = np.random.default_rng(0).permutation(len(target))
        for fold in range(FOLDS):
            test = np.zeros(len(target), dtype=bool)
            test[order[fold::FOLDS]] = True
            fitted = cls._fit(basis, widths[~test], target[~test], pairs, monotone)
            held_out[test] = fitted._sum(np.searchsorted(basis.choices, widths[test]))
        predictor = cls._fit(basis, widths, target, pairs, monotone)
        predictor.quality, predictor.measure = Quality.of(target, held_out, measure), measure
        return predictor

    @classmethod
    def _fit(
        cls, basis: Basis, shapes: np.ndarray, losses: np.ndarray, pairs: bool | None, monotone: bool
    ) -> "ShapePredictor":
        """Return a predictor without quality. Of fits with and without pairs, the lower leave-one-out error wins."""
        index = np.searchsorted(basis.choices, shapes)
        fits = [
            ridge(basis.trend(index), basis.steps(index, use_pairs), losses)
            for use_pairs in ((False, True) if pairs is None else (pairs,))
        ]
        fit = min(fits, key=lambda candidate: candidate.loo_rmse)
        slope, weights = fit.slope, fit.weights
        if monotone:
            slope, weights = monotone_ridge(basis, index, losses, fit.strength)
        evidence = Evidence(shapes, losses, fit.strength, fit.noise)
        return cls(basis.choices.tolist(), *basis.tables(slope, weights), evidence)

    @property
    def droppable(self) -> list[bool]:
        """Whether each layer can be dropped: width 0 is known, and this layer was dropped in a measured shape."""
        if self.width_choices[0] != 0:
            return [False] * len(self.effects)
        if self.evidence is None:
            return [True] * len(self.effects)
        return (self.evidence.shapes == 0).any(axis=0).tolist()

    def knows(self, shape: Sequence[int]) -> bool:
        """Return whether `shape` can be predicted.

        Its number of layers and its widths must be known, and each layer that it drops must have been dropped in a
        measured shape.
        """
        may_be_dropped = len(shape) == len(self.droppable) and all(np.array(shape, dtype=bool) | self.droppable)
        return may_be_dropped and set(shape) - {0} <= set(self.width_choices)

    @overload
    def predict(self, shapes: Sequence[int]) -> float: ...
    @overload
    def predict(self, shapes: Sequence[Sequence[int]] | np.ndarray) -> np.ndarray: ...
    def predict(self, shapes):
        """Return predicted losses in nats, the logarithms of perplexities, or predicted distances.

        Args:
            shapes: One shape or many, see `model.shapes.shape_rows`.

        Returns:
            A float for one shape, an array (n,) for many.

        Raises:
            ValueError: If a width was not among the measured ones, a layer is dropped that was never dropped in a
                measured shape, or the number of layers differs.
        """
        index, single = self._index(shapes)
        losses = self._sum(index)
        return float(losses[0]) if single else losses

    @overload
    def uncertainty(self, shapes: Sequence[int]) -> float: ...
    @overload
    def uncertainty(self, shapes: Sequence[Sequence[int]] | np.ndarray) -> np.ndarray: ...
    def uncertainty(self, shapes):
        """Return the standard deviation, of a loss in nats, of a new measurement around its prediction.

        It contains the uncertainty of the fit and the noise of the measurement. It assumes that the loss is a sum of
        these terms. Where widths interact beyond neighbours, and with `monotone`, it is only a guide.

        Args:
            shapes: One shape or many, see `model.shapes.shape_rows`.

        Returns:
            A float for one shape, an array (n,) for many.

        Raises:
            ValueError: As for `predict`, and if the predictor was not fitted.

        Example:
            >>> shapes = [[a, b] for a in (16, 32, 48) for b in (16, 32, 48)]
            >>> predictor = ShapePredictor.fit(shapes, [3 - a / 100 - b / 200 for a, b in shapes])
            >>> predictor.uncertainty([[48, 32], [16, 16]]).shape, len(predictor.draw(5, seed=0))
            ((2,), 5)
        """
        posterior = self._posterior
        index, single = self._index(shapes)
        deviations = posterior.deviations(index)
        return float(deviations[0]) if single else deviations

    def draw(self, num_draws: int, seed: int | Sequence[int]) -> "list[ShapePredictor]":
        """Draw predictors that fit the measurements about as well. How much they differ is the uncertainty of the fit.

        Args:
            num_draws: Number of predictors to draw.
            seed: Random seed.

        Raises:
            ValueError: If the predictor was not fitted.
        """
        check_count("num_draws", num_draws, least=0)
        posterior = self._posterior
        drawn = []
        for error in posterior.draw(num_draws, np.random.default_rng(seed)):
            intercept, effects, pair_effects = posterior.basis.tables(error[:2], error[2:])
            drawn.append(
                ShapePredictor(
                    self.width_choices,
                    self.intercept + intercept,
                    self.effects + effects,
                    self.pair_effects + pair_effects,
                    self.evidence,
                    measure=self.measure,
                )
            )
        return drawn

    def save(self, file: str | Path) -> None:
        """Write the predictor, with the measurements that it was fitted on, as JSON."""
        evidence = None
        if self.evidence is not None:
            lists = {"shapes": self.evidence.shapes.tolist(), "losses": self.evidence.losses.tolist()}
            evidence = {**asdict(self.evidence), **lists}
        content: dict[str, Any] = {
            "measure": self.measure,
            "width_choices": self.width_choices,
            "intercept": self.intercept,
            "effects": self.effects.tolist(),
            "pair_effects": self.pair_effects.tolist() if self.pair_effects.any() else None,
            "quality": self.quality and asdict(self.quality),
            "evidence": evidence,
        }
        write_json(file, FORMAT, content)

    @classmethod
    def load(cls, file: str | Path) -> "ShapePredictor":
        """Read a predictor written by `save`. Warns if its quality is poor.

        A file without a measure is of a time when only losses were predicted.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged or holds something else.

        Example:
            >>> import tempfile
            >>> predictor = ShapePredictor([16, 32], 3.0, [[0.0, -0.5], [0.0, -0.25]])
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     predictor.save(f"{folder}/predictor.json")
            ...     ShapePredictor.load(f"{folder}/predictor.json").predict([32, 32])
            2.25
        """
        content = read_json(file, FORMAT)
        try:
            quality, evidence = content.pop("quality"), content.pop("evidence")
            predictor = cls(
                **content,
                evidence=None if evidence is None else _read_evidence(**evidence),
                quality=None if quality is None else read_quality(**quality),
            )
        except (ValueError, KeyError, TypeError) as error:
            reason = str(error).rstrip(".")
            raise ValueError(f"{file} holds no predictor: {reason}. Write it with ShapePredictor.save.") from error
        predictor._warn_if_poor()
        return predictor

    def _index(self, shapes: Any) -> tuple[np.ndarray, bool]:
        """Return the positions (n, layers) in `width_choices`, and whether `shapes` is one shape; or raise."""
        rows, single = shape_rows(shapes)
        layers, choices = len(self.effects), np.array(self.width_choices)
        index = np.minimum(np.searchsorted(choices, rows), len(choices) - 1)
        unknown = np.unique(rows[choices[index] != rows]).tolist()
        if rows.shape[1] != layers or unknown:
            raise ValueError(
                f"The predictor knows {layers} layers and the widths {self.width_choices}, but got {rows.shape[1]} "
                f"layers{f' and the widths {unknown}' if unknown else ''}."
            )
        if self.width_choices[0] == 0:
            never = np.flatnonzero((index == 0).any(axis=0) & ~np.array(self.droppable))
            if len(never):
                raise ValueError(
                    f"Layers {never.tolist()} were not dropped in any measured shape, so what dropping them costs is "
                    "unknown. Measure shapes without them, and fit again."
                )
        return index, single

    def _sum(self, index: np.ndarray) -> np.ndarray:
        """Add up the terms (n,) of positions `index` (n, layers), whether or not their layers can be dropped.

        The terms are added from the first layer to the last, as `pareto_front` does, so that both return the same
        number to the last bit.
        """
        before = sources(index, dropping=self.width_choices[0] == 0)
        losses = np.full(len(index), self.intercept)
        for layer, (effects, pair_effects) in enumerate(zip(self.effects, self.pair_effects)):
            losses += effects[index[:, layer]] + pair_effects[before[:, layer], index[:, layer]]
        return losses

    @cached_property
    def _posterior(self) -> Posterior:
        if self.evidence is None:
            raise ValueError("This predictor was not fitted, so its uncertainty is unknown. Use ShapePredictor.fit.")
        basis = Basis(np.array(self.width_choices), len(self.effects))
        index = np.searchsorted(basis.choices, self.evidence.shapes)
        pairs = bool(self.pair_effects.any())
        return Posterior.after(basis, pairs, index, self.evidence.strength, self.evidence.noise)

    def _warn_if_poor(self) -> None:
        if self.quality is not None and self.quality.poor:
            warnings.warn(
                f"Shapes left out of the fit are predicted poorly: {self.quality}. R2 should be at least {POOR_R2} and "
                f"Spearman at least {POOR_SPEARMAN}. Measure more shapes, on more text, or train the supernet longer, "
                "before you trust a search.",
                stacklevel=3,
            )


def _check_measurements(shapes: Any, losses: Any, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Return shapes (n, layers) as integers and losses (n,) as floats, both copied, or raise."""
    try:
        widths = np.array(shapes)  # a copy, because the predictor keeps it
    except ValueError:
        raise ValueError("shapes must be (n, layers), but the shapes have different numbers of layers.") from None
    target = as_numbers(what, losses)
    if len(widths) < MINIMUM_SHAPES and target.shape == (len(widths),):
        raise ValueError(
            f"{len(widths)} measured shapes are too few: at least {MINIMUM_SHAPES} are needed, and 4 for each layer "
            "are better."
        )
    if widths.ndim != 2 or target.shape != (len(widths),):
        raise ValueError(
            f"shapes must be (n, layers) and {what} (n,), one per shape, got {widths.shape} and {target.shape}."
        )
    if not np.issubdtype(widths.dtype, np.integer):
        raise ValueError(f"shapes must be integers, got {widths.dtype}.")
    if widths.min() < 0:
        raise ValueError(f"Width {widths.min()} is negative. Allowed: positive widths, and 0 for a dropped layer.")
    if not np.isfinite(target).all():
        raise ValueError(
            f"{(~np.isfinite(target)).sum()} of the {what} are not finite. Leave those shapes out, or use "
            "ShapePredictor.fit_records, which does."
        )
    if np.ptp(target) == 0:
        raise ValueError(
            f"All {len(target)} {what} are {target[0]:g}: the shape makes no difference, so there is nothing to "
            "predict. Check that shape= was passed when measuring, and that the supernet is trained."
        )
    return widths.astype(np.int64), target


def _read_evidence(shapes: Any, losses: Any, strength: Any, noise: Any) -> Evidence:
    rows, single = shape_rows(shapes)
    target = as_numbers("losses", losses)
    if single or not np.isfinite(target).all():
        raise ValueError("The evidence must have many shapes, each with a finite loss.")
    return Evidence(rows, target, strength, noise)
