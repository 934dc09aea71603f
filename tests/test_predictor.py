import itertools
import json
import re

import numpy as np
import pytest

from supershaper_hf import predictor as predictor_module
from supershaper_hf.predictor import RIDGE_STRENGTHS, ShapePredictor


CHOICES = np.array([8, 20, 36, 48])
PAPER_CHOICES = np.array([120, 240, 360, 480, 540, 600, 768])


def random_shapes(n, layers=3, choices=CHOICES, seed=0):
    return np.random.default_rng(seed).choice(choices, size=(n, layers))


def random_truth(layers=3, choices=CHOICES, seed=0):
    """Losses that fall with every width by amounts of its own: a function of shapes."""
    generator = np.random.default_rng(seed)
    falls = generator.uniform(0.02, 0.3, size=(layers, len(choices)))
    effects = 4.0 / layers - falls.cumsum(axis=1)
    return lambda shapes: effects[np.arange(layers), np.searchsorted(choices, shapes)].sum(axis=1)


@pytest.fixture
def noisy():
    """A predictor of noisy measurements, with its data."""
    shapes = random_shapes(40)
    losses = random_truth()(shapes) + 0.05 * np.random.default_rng(1).standard_normal(40)
    return ShapePredictor.fit(shapes, losses), shapes, losses


# Fitting


def test_additive_truth_is_recovered():
    shapes = random_shapes(40)
    predictor = ShapePredictor.fit(shapes, random_truth()(shapes))
    everything = np.array(list(itertools.product(CHOICES, repeat=3)))
    np.testing.assert_allclose(predictor.predict(everything), random_truth()(everything), atol=1e-4)
    assert predictor.loo_rmse < 1e-4


def test_paper_sized_space_is_predicted_from_fifty_noisy_measurements():
    truth = random_truth(12, PAPER_CHOICES)
    shapes = random_shapes(50, 12, PAPER_CHOICES)
    noise = 0.02 * np.random.default_rng(1).standard_normal(50)
    predictor = ShapePredictor.fit(shapes, truth(shapes) + noise)
    unseen = random_shapes(500, 12, PAPER_CHOICES, seed=2)
    residual = predictor.predict(unseen) - truth(unseen)
    assert 1 - residual.var() / truth(unseen).var() > 0.8


def test_effects_of_a_layer_start_at_its_smallest_width(noisy):
    predictor, _, _ = noisy
    assert predictor.effects.shape == (3, 4)
    assert (predictor.effects[:, 0] == 0).all()
    assert predictor.predict([[8, 8, 8]])[0] == predictor.intercept


def test_constant_losses_are_predicted_everywhere():
    predictor = ShapePredictor.fit(random_shapes(10), [2.5] * 10)
    np.testing.assert_allclose(predictor.predict(random_shapes(20, seed=1)), 2.5, atol=1e-9)


def test_unmeasured_width_of_a_layer_lies_between_its_neighbours():
    """The middle width of the second layer was never measured: the random walk goes on through it."""
    shapes = [[a, b] for a in (12, 24, 36) for b in (12, 36)]
    predictor = ShapePredictor.fit(shapes, [5 - (a + b) / 36 for a, b in shapes])
    low, middle, high = predictor.predict([[12, 12], [12, 24], [12, 36]])
    assert middle == pytest.approx((low + high) / 2, abs=1e-3)


def test_unmeasured_width_is_nearer_to_the_neighbour_that_is_nearer():
    """The random walk takes steps in proportion to the distance: 16 lies a sixth of the way from 12 to 36."""
    shapes = [[a, b] for a in (12, 16, 36) for b in (12, 36)]
    predictor = ShapePredictor.fit(shapes, [5 - a / 360 - b / 18 for a, b in shapes])
    low, middle, high = predictor.predict([[12, 12], [12, 16], [12, 36]])
    assert middle == pytest.approx(low + (high - low) / 6, abs=1e-3)


def test_trend_with_the_mean_width_is_found_from_few_shapes():
    """It is not shrunk, so widths that were seldom measured follow it."""
    shapes, unseen = (random_shapes(n, 12, PAPER_CHOICES, seed=n) for n in (10, 100))
    predictor = ShapePredictor.fit(shapes, 4 - shapes.mean(axis=1) / 300)
    np.testing.assert_allclose(predictor.predict(unseen), 4 - unseen.mean(axis=1) / 300, atol=1e-6)


def test_adding_a_constant_to_the_losses_moves_only_the_intercept(noisy):
    predictor, shapes, losses = noisy
    moved = ShapePredictor.fit(shapes, losses + 3)
    assert moved.intercept == pytest.approx(predictor.intercept + 3)
    np.testing.assert_allclose(moved.effects, predictor.effects, atol=1e-9)


def test_order_of_the_measurements_does_not_matter(noisy):
    predictor, shapes, losses = noisy
    reverse = ShapePredictor.fit(shapes[::-1], losses[::-1])
    np.testing.assert_allclose(reverse.predict(shapes), predictor.predict(shapes), atol=1e-9)


def test_leave_one_out_error_is_that_of_refitting_without_each(noisy, monkeypatch):
    predictor, shapes, losses = noisy
    refitted = []
    for strength in RIDGE_STRENGTHS:
        monkeypatch.setattr(predictor_module, "RIDGE_STRENGTHS", [strength])
        errors = []
        for left_out in range(len(shapes)):
            rest = np.arange(len(shapes)) != left_out
            fitted = ShapePredictor.fit(shapes[rest], losses[rest])
            errors.append(fitted.predict(shapes[[left_out]])[0] - losses[left_out])
        refitted.append(np.sqrt(np.mean(np.square(errors))))
    assert predictor.loo_rmse == pytest.approx(min(refitted), rel=1e-6)


def test_prediction_uses_the_strength_with_the_lowest_leave_one_out_error(noisy, monkeypatch):
    predictor, shapes, losses = noisy
    candidates = []
    for strength in RIDGE_STRENGTHS:
        monkeypatch.setattr(predictor_module, "RIDGE_STRENGTHS", [strength])
        candidates.append(ShapePredictor.fit(shapes, losses))
    best = min(candidates, key=lambda candidate: candidate.loo_rmse)
    assert np.array_equal(predictor.predict(shapes), best.predict(shapes))
    assert not np.allclose(predictor.predict(shapes), candidates[-1].predict(shapes), atol=1e-3)


@pytest.mark.parametrize(
    ("shapes", "losses", "message"),
    [
        ([[8, 20]] * 4, [1.0] * 3, "one per shape, got (4, 2) and (3,)"),
        ([8, 20, 36, 48], [1.0] * 4, "one per shape, got (4,) and (4,)"),
        ([[8, 20]] * 4, [[1.0]] * 4, "one per shape, got (4, 2) and (4, 1)"),
        ([[8, 20]] * 3, [1.0] * 3, "3 measured shapes are too few: at least 4"),
        ([[8, 20]] * 5, [1.0, float("nan"), 1.0, float("inf"), 1.0], "2 of the losses are not finite"),
    ],
)
def test_unusable_measurements_are_refused(shapes, losses, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ShapePredictor.fit(shapes, losses)


# Predicting


def test_prediction_is_the_intercept_plus_one_effect_per_layer():
    predictor = ShapePredictor([8, 20], intercept=3.0, effects=[[0.0, -0.5], [0.0, -0.25]], loo_rmse=0.1)
    shapes = [[8, 8], [20, 8], [8, 20], [20, 20]]
    assert predictor.predict(shapes).tolist() == [3.0, 2.5, 2.75, 2.25]


def test_one_shape_may_be_given_bare(noisy):
    predictor, _, _ = noisy
    assert predictor.predict([8, 20, 36]).tolist() == predictor.predict([[8, 20, 36]]).tolist()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([8, 20, 24], "knows 3 layers and the widths [8, 20, 36, 48], but got 3 layers and the widths [24]."),
        ([0, 20, 64], "but got 3 layers and the widths [0, 64]."),
        ([8, 20], "knows 3 layers and the widths [8, 20, 36, 48], but got 2 layers."),
    ],
)
def test_shapes_of_another_space_are_refused(noisy, shape, message):
    predictor, _, _ = noisy
    with pytest.raises(ValueError, match=re.escape(message)):
        predictor.predict([shape])


# Saving


def test_saved_predictor_loads_equal(noisy, tmp_path):
    predictor, shapes, _ = noisy
    predictor.save(tmp_path / "predictor.json")
    loaded = ShapePredictor.load(str(tmp_path / "predictor.json"))
    assert np.array_equal(loaded.predict(shapes), predictor.predict(shapes))
    assert loaded.width_choices == predictor.width_choices
    assert loaded.loo_rmse == predictor.loo_rmse


def test_saved_predictor_is_plain_json(noisy, tmp_path):
    predictor, _, _ = noisy
    predictor.save(tmp_path / "predictor.json")
    stored = json.loads((tmp_path / "predictor.json").read_text(encoding="utf-8"))
    assert stored["width_choices"] == [8, 20, 36, 48]
    assert stored["effects"] == predictor.effects.tolist()
