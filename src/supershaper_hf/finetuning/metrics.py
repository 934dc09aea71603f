"""The scores of GLUE, as its authors define them, in the form of `evaluate`.

`evaluate.load("glue")` fetches a script from the Hub. These metrics compute the same and need no network.
"""

from collections.abc import Sequence
from typing import Any

import evaluate
import numpy as np
from datasets import Features, Value
from scipy.stats import pearsonr, spearmanr


SCORES = ("accuracy", "f1", "macro_f1", "matthews_correlation", "pearson", "spearmanr")


class GlueMetric(evaluate.Metric):
    """Scores of predicted labels, or of predicted numbers for the two correlations.

    Args:
        scores: Which of `SCORES` to compute. "f1" is that of label 1, as in GLUE. "macro_f1" is the mean of the F1 of
            all labels that occur.
        **options: Further arguments of `evaluate.Metric`.

    Raises:
        ValueError: If a score is unknown.

    Example:
        >>> GlueMetric(["accuracy", "f1"]).compute(predictions=[1, 1, 0, 0], references=[1, 0, 0, 0])
        {'accuracy': 0.75, 'f1': 0.6666666666666666}
    """

    def __init__(self, scores: Sequence[str], **options: Any) -> None:
        unknown = [score for score in scores if score not in SCORES]
        if unknown or not scores:
            raise ValueError(f"scores={list(scores)!r} must be one or more of {', '.join(SCORES)}.")
        self.scores = list(scores)
        super().__init__(**options)

    def _info(self) -> evaluate.MetricInfo:
        kind = "float32" if {"pearson", "spearmanr"} & set(self.scores) else "int64"
        return evaluate.MetricInfo(
            description="The scores of GLUE (arXiv 1804.07461).",
            citation="",
            inputs_description="predictions and references: labels, or numbers for correlations",
            features=Features({"predictions": Value(kind), "references": Value(kind)}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        predicted, expected = np.asarray(predictions), np.asarray(references)
        return {score: float(COMPUTE[score](predicted, expected)) for score in self.scores}


def accuracy(predicted: np.ndarray, expected: np.ndarray) -> float:
    """Return the share of labels that are right."""
    return float((predicted == expected).mean())


def f1(predicted: np.ndarray, expected: np.ndarray, label: int = 1) -> float:
    """Return the harmonic mean of precision and recall of one label; 0 if it is neither predicted nor expected."""
    found = int(((predicted == label) & (expected == label)).sum())
    total = int((predicted == label).sum() + (expected == label).sum())
    return 2 * found / total if total else 0.0


def macro_f1(predicted: np.ndarray, expected: np.ndarray) -> float:
    """Return the mean F1 of all labels that occur."""
    return float(np.mean([f1(predicted, expected, label) for label in np.union1d(predicted, expected)]))


def matthews_correlation(predicted: np.ndarray, expected: np.ndarray) -> float:
    """Return the correlation of predicted and expected labels (for several labels: Gorodkin 2004).

    It is 0 if one of the two is the same for every example.
    """
    labels = np.union1d(predicted, expected)
    one_hot = [(values[:, None] == labels).astype(float) for values in (predicted, expected)]
    first, second = (values - values.mean(axis=0) for values in one_hot)
    spread = np.sqrt((first**2).sum() * (second**2).sum())
    return float((first * second).sum() / spread) if spread else 0.0


def correlation(compute: Any, predicted: np.ndarray, expected: np.ndarray) -> float:
    """Return a correlation of numbers; 0 if one of the two is the same for every example, where it is not defined."""
    if np.ptp(predicted) == 0 or np.ptp(expected) == 0:
        return 0.0
    return float(compute(predicted, expected)[0])


def pearson(predicted: np.ndarray, expected: np.ndarray) -> float:
    """Return the correlation of predicted and expected numbers."""
    return correlation(pearsonr, predicted, expected)


def spearman(predicted: np.ndarray, expected: np.ndarray) -> float:
    """Return the correlation of the ranks of predicted and expected numbers."""
    return correlation(spearmanr, predicted, expected)


COMPUTE = dict(zip(SCORES, (accuracy, f1, macro_f1, matthews_correlation, pearson, spearman), strict=True))
