"""How well a predictor predicts: errors and rank correlations on shapes that were left out of the fit."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import kendalltau, spearmanr

from ..checks import check_count, check_number
from .measures import MEASURES, find_measure


FOLDS = 5
POOR_R2, POOR_SPEARMAN = 0.5, 0.7  # a predictor below one of these warns


@dataclass(frozen=True)
class Quality:
    """How well shapes that were left out of the fit are predicted (5-fold cross-validation).

    Attributes:
        num_shapes: Number of measured shapes.
        rmse: Root mean square error, of losses in nats.
        r2: Share of the variance of the measurements that is predicted, at most 1.
        spearman: Spearman's rank correlation.
        kendall: Kendall's rank correlation: the probability that two shapes are put in the right order, times 2,
            minus 1.
        measure: What is predicted, `"loss"`, `"distance"` or `"task_loss"`.

    Example:
        >>> print(Quality.of(np.array([3.0, 2.5, 2.0]), np.array([2.9, 2.6, 2.0])))
        R2 0.960, Spearman 1.000, Kendall 1.000, off by 0.082 nats (5-fold cross-validation on 3 shapes)
    """

    num_shapes: int
    rmse: float
    r2: float
    spearman: float
    kendall: float
    measure: str = "loss"

    @classmethod
    def of(cls, losses: np.ndarray, predicted: np.ndarray, measure: str = "loss") -> "Quality":
        """Compare measured losses or distances (n,) with predicted ones (n,)."""
        errors = losses - predicted
        ranked = len(predicted) > 1 and np.ptp(predicted) > 0 and np.ptp(losses) > 0
        return cls(
            num_shapes=len(losses),
            rmse=float(np.sqrt(np.mean(errors**2))),
            r2=float(1 - errors @ errors / max(np.sum((losses - losses.mean()) ** 2), np.finfo(float).tiny)),
            spearman=float(spearmanr(losses, predicted).statistic) if ranked else 0.0,
            kendall=float(kendalltau(losses, predicted).statistic) if ranked else 0.0,
            measure=measure,
        )

    @property
    def poor(self) -> bool:
        """Whether R2 or Spearman is below its limit, or is NaN."""
        return not (self.r2 >= POOR_R2 and self.spearman >= POOR_SPEARMAN)

    def __str__(self) -> str:
        return (
            f"R2 {self.r2:.3f}, Spearman {self.spearman:.3f}, Kendall {self.kendall:.3f}, off by "
            f"{MEASURES[self.measure].amount(self.rmse)} ({FOLDS}-fold cross-validation on {self.num_shapes} shapes)"
        )


def read_quality(num_shapes: Any, measure: Any = "loss", **figures: Any) -> Quality:
    """Return the quality with these attributes, or raise a ValueError or TypeError: they come from a file."""
    check_count("num_shapes", num_shapes)
    for name, value in figures.items():
        check_number(name, value)
    find_measure(measure)
    return Quality(num_shapes, measure=measure, **figures)
