"""Scores: equal to those of scikit-learn and SciPy, and defined where these are not."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from supershaper_hf.finetuning.metrics import GlueMetric


@pytest.fixture(scope="module")
def labels():
    generator = np.random.default_rng(0)
    expected = generator.integers(0, 3, 200)
    predicted = np.where(generator.random(200) < 0.7, expected, generator.integers(0, 3, 200))
    return {"predictions": predicted, "references": expected}


def score(name, predictions, references):
    return GlueMetric([name]).compute(predictions=predictions, references=references)[name]


@pytest.mark.parametrize("number", [2, 3])
def test_scores_of_labels_are_those_of_scikit_learn(labels, number):
    predicted, expected = (np.minimum(values, number - 1) for values in labels.values())
    found = GlueMetric(["accuracy", "macro_f1", "matthews_correlation"]).compute(
        predictions=predicted, references=expected
    )
    assert found["accuracy"] == metrics.accuracy_score(expected, predicted)
    assert found["macro_f1"] == pytest.approx(metrics.f1_score(expected, predicted, average="macro"), abs=1e-12)
    assert found["matthews_correlation"] == pytest.approx(metrics.matthews_corrcoef(expected, predicted), abs=1e-12)


def test_macro_f1_counts_labels_that_are_only_predicted():
    predicted, expected = [0, 1, 2, 1], [0, 1, 1, 1]
    assert score("macro_f1", predicted, expected) == pytest.approx(
        metrics.f1_score(expected, predicted, average="macro"), abs=1e-12
    )


@pytest.mark.parametrize("name", ["pearson", "spearmanr"])
def test_correlation_of_one_example_is_0(name):
    assert score(name, [1.0], [2.0]) == 0


def test_f1_is_that_of_label_1(labels):
    predicted, expected = (np.minimum(values, 1) for values in labels.values())
    assert score("f1", predicted, expected) == pytest.approx(metrics.f1_score(expected, predicted), abs=1e-12)
    assert score("f1", 1 - predicted, 1 - expected) != score("f1", predicted, expected)


def test_correlations_are_those_of_scipy():
    generator = np.random.default_rng(0)
    expected = generator.random(50).astype("float32") * 5
    predicted = (expected + generator.normal(0, 2, 50)).astype("float32")
    assert score("pearson", predicted, expected) == pytest.approx(stats.pearsonr(predicted, expected)[0], abs=1e-6)
    assert score("spearmanr", predicted, expected) == pytest.approx(stats.spearmanr(predicted, expected)[0], abs=1e-6)


@pytest.mark.parametrize("name", ["matthews_correlation", "pearson", "spearmanr", "f1"])
def test_the_same_prediction_for_every_example_has_the_score_0(name):
    assert score(name, [0, 0, 0, 0], [0, 1, 0, 1]) == 0


def test_scores_are_one_or_more_known_ones():
    with pytest.raises(ValueError, match=r"scores=\['recall'\] must be one or more of accuracy, f1"):
        GlueMetric(["recall"])
    with pytest.raises(ValueError, match=r"scores=\[\] must"):
        GlueMetric([])
