"""Predict the loss of a shape from a few measured ones, as a sum of one term per layer and width.

The prediction is in nats, that is in log-perplexity, where the contributions of layers add up. Because it is a sum, the
best shape under a budget can be found exactly (`search.pareto_front`).

The model: `loss = intercept + slope * mean relative width + sum over layers of effect[layer][width]`. Each layer's
effects are a random walk over its widths: ridge regression on the steps between neighbouring width choices, each scaled
by the distance between the two. The ridge strength is chosen by leave-one-out cross-validation.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


RIDGE_STRENGTHS = np.logspace(-6, 3, 37)


class ShapePredictor:
    """An additive predictor of the loss of shapes.

    Args:
        width_choices: The hidden sizes it knows, increasing.
        intercept: The loss, in nats, of a shape of which every layer has the smallest width.
        effects: (layers, widths): what each width of each layer adds to the intercept, in nats.
        loo_rmse: Root mean square leave-one-out error in nats.

    Example:
        >>> shapes = [[16, 16], [16, 32], [32, 16], [32, 32]]
        >>> predictor = ShapePredictor.fit(shapes, [3.0, 2.9, 2.8, 2.7])
        >>> predictor.predict([[32, 32]]).round(2)
        array([2.7])
    """

    def __init__(self, width_choices: Sequence[int], intercept: float, effects: np.ndarray, loo_rmse: float):
        self.width_choices = list(width_choices)
        self.intercept = intercept
        self.effects = np.asarray(effects)
        self.loo_rmse = loo_rmse

    @classmethod
    def fit(cls, shapes: Sequence[Sequence[int]], losses: Sequence[float]) -> "ShapePredictor":
        """Fit on measured `shapes` (n, layers) and their `losses` (n,) in nats.

        Raises:
            ValueError: If the lengths differ, there are fewer than 4 shapes, or a loss is not finite.
        """
        widths = np.asarray(shapes)
        target = np.asarray(losses, dtype=np.float64)
        if widths.ndim != 2 or target.shape != (len(widths),):
            raise ValueError(
                f"shapes must be (n, layers) and losses (n,), one per shape, got {widths.shape} and {target.shape}."
            )
        if len(widths) < 4:
            raise ValueError(f"{len(widths)} measured shapes are too few: at least 4, better 40, are needed.")
        if not np.isfinite(target).all():
            raise ValueError(f"{(~np.isfinite(target)).sum()} of the losses are not finite; remove those shapes.")
        choices = np.unique(widths)
        scale = np.sqrt(np.diff(choices) / choices[-1])
        steps = ((widths[:, :, None] >= choices[1:]) * scale).reshape(len(widths), -1)
        trend = np.column_stack([np.ones(len(widths)), widths.mean(axis=1) / choices[-1]])
        slope, weights, loo_rmse = _ridge(trend, steps, target)
        step_effects = weights.reshape(widths.shape[1], -1) * scale
        walk = np.pad(np.cumsum(step_effects, axis=1), ((0, 0), (1, 0)))
        effects = walk + slope[1] * (choices - choices[0]) / (choices[-1] * widths.shape[1])
        return cls(choices.tolist(), float(slope[0] + slope[1] * choices[0] / choices[-1]), effects, loo_rmse)

    def predict(self, shapes: Sequence[Sequence[int]] | np.ndarray) -> np.ndarray:
        """Return the predicted losses (n,) in nats, the logarithms of perplexities, of `shapes` (n, layers).

        Raises:
            ValueError: If a width was not among the measured ones, or the number of layers differs.
        """
        widths = np.atleast_2d(np.asarray(shapes))
        layers = self.effects.shape[0]
        unknown = np.setdiff1d(widths, self.width_choices)
        if widths.shape[1] != layers or len(unknown):
            raise ValueError(
                f"The predictor knows {layers} layers and the widths {self.width_choices}, but got {widths.shape[1]} "
                f"layers{f' and the widths {unknown.tolist()}' if len(unknown) else ''}."
            )
        return self.intercept + self.effects[np.arange(layers), np.searchsorted(self.width_choices, widths)].sum(axis=1)

    def save(self, file: str | Path) -> None:
        """Write the predictor as JSON."""
        Path(file).write_text(json.dumps(self._to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, file: str | Path) -> "ShapePredictor":
        """Read a predictor written by `save`."""
        return cls(**json.loads(Path(file).read_text(encoding="utf-8")))

    def _to_dict(self) -> dict[str, Any]:
        return {
            "width_choices": self.width_choices,
            "intercept": self.intercept,
            "effects": self.effects.tolist(),
            "loo_rmse": self.loo_rmse,
        }


def _ridge(trend: np.ndarray, steps: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Fit `target` by the unpenalised columns of `trend` and the ridge-penalised columns of `steps`.

    Returns:
        Coefficients of `trend` and of `steps`, and the leave-one-out root mean square error at the best strength.
    """
    solve_trend = np.linalg.pinv(trend)
    onto_trend = trend @ solve_trend
    left, values, right = np.linalg.svd(steps - onto_trend @ steps, full_matrices=False)
    residual = target - onto_trend @ target
    best_error, best_shrinkage = np.inf, values
    for strength in RIDGE_STRENGTHS:
        hat = onto_trend + (left * (values**2 / (values**2 + strength))) @ left.T
        error = np.sqrt(np.mean(((target - hat @ target) / np.maximum(1 - np.diag(hat), 1e-6)) ** 2))
        if error < best_error:
            best_error, best_shrinkage = error, values / (values**2 + strength)
    weights = right.T @ (best_shrinkage * (left.T @ residual))
    return solve_trend @ (target - steps @ weights), weights, float(best_error)
