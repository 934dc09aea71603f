import itertools
import json
import re
import tracemalloc
import warnings

import numpy as np
import pytest
from damages import damages, load_or_refuse
from scipy.stats import kendalltau, spearmanr

from supershaper_hf.files import read_json, write_json
from supershaper_hf.search import regression
from supershaper_hf.search.predictor import FORMAT, MINIMUM_SHAPES, Evidence, ShapePredictor
from supershaper_hf.search.quality import FOLDS, Quality
from supershaper_hf.search.regression import RIDGE_STRENGTHS, Basis, ridge


CHOICES = np.array([8, 20, 36, 48])
DROPPING = np.array([0, 8, 20, 48])
PAPER_CHOICES = np.array([120, 240, 360, 480, 540, 600, 768])


def random_shapes(n, layers=3, choices=CHOICES, seed=0):
    return np.random.default_rng(seed).choice(choices, size=(n, layers))


def every_shape(layers=3, choices=CHOICES):
    return np.array(list(itertools.product(choices, repeat=layers)))


def random_truth(layers=3, choices=CHOICES, seed=0):
    """Losses that fall with every width by amounts of its own: a function of shapes."""
    generator = np.random.default_rng(seed)
    falls = generator.uniform(0.02, 0.3, size=(layers, len(choices)))
    effects = 4.0 / layers - falls.cumsum(axis=1)
    return lambda shapes: effects[np.arange(layers), np.searchsorted(choices, shapes)].sum(axis=1)


def kept_before(shape, layer):
    """The width of the last kept layer before `layer`, or 0."""
    return next((width for width in reversed(shape[:layer]) if width), 0)


def pair_truth(layers=3, choices=CHOICES, seed=0):
    """As `random_truth`, plus what each pair of widths of neighbouring kept layers adds."""
    additive = random_truth(layers, choices, seed)
    amounts = np.random.default_rng(seed + 1).normal(size=layers)

    def losses(shapes):
        pairs = [
            sum(amounts[i] * kept_before(shape, i) * shape[i] / 48**2 for i in range(1, layers))
            for shape in np.asarray(shapes).tolist()
        ]
        return additive(shapes) + np.array(pairs)

    return losses


def quietly(fit, *args, **options):
    """Fit where a poor fit is what the test is about, or does not matter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fit(*args, **options)


def noisy_data(n=40, layers=3, choices=CHOICES, noise=0.05):
    shapes = random_shapes(n, layers, choices)
    return shapes, random_truth(layers, choices)(shapes) + noise * np.random.default_rng(1).standard_normal(n)


@pytest.fixture
def noisy():
    """A predictor of noisy measurements, with its data."""
    shapes, losses = noisy_data()
    return ShapePredictor.fit(shapes, losses), shapes, losses


# Fitting


@pytest.mark.parametrize("choices", [CHOICES, DROPPING], ids=str)
@pytest.mark.parametrize("pairs", [None, False, True])
def test_additive_truth_is_recovered(pairs, choices):
    """Also with terms of pairs: they do no harm."""
    shapes = random_shapes(200, choices=choices)
    predictor = ShapePredictor.fit(shapes, random_truth(choices=choices)(shapes), pairs=pairs)
    everything = every_shape(choices=choices)
    np.testing.assert_allclose(predictor.predict(everything), random_truth(choices=choices)(everything), atol=2e-3)
    assert predictor.quality.r2 > 0.999
    assert predictor.pair_effects.any() == bool(pairs)


@pytest.mark.parametrize("choices", [CHOICES, DROPPING], ids=str)
@pytest.mark.parametrize("pairs", [None, True])
def test_pair_truth_is_recovered(pairs, choices):
    shapes, everything = random_shapes(200, choices=choices), every_shape(choices=choices)
    truth = pair_truth(choices=choices)
    predictor = ShapePredictor.fit(shapes, truth(shapes), pairs=pairs)
    np.testing.assert_allclose(predictor.predict(everything), truth(everything), atol=2e-3)
    assert predictor.pair_effects.any()


def test_pairs_are_chosen_where_the_truth_has_them():
    for seed in range(10):
        shapes = random_shapes(80, seed=seed)
        noise = 0.02 * np.random.default_rng(seed).standard_normal(80)
        assert quietly(ShapePredictor.fit, shapes, pair_truth(seed=seed)(shapes) + noise).pair_effects.any()
        assert not quietly(ShapePredictor.fit, shapes, pair_truth()(shapes) + noise, pairs=False).pair_effects.any()


def test_pairs_are_left_out_or_do_no_harm_where_the_truth_has_none():
    unseen, left_out = every_shape(), 0
    for seed in range(10):
        shapes, truth = random_shapes(50, seed=seed), random_truth(seed=seed)
        losses = truth(shapes) + 0.05 * np.random.default_rng(seed).standard_normal(50)
        chosen, without = ShapePredictor.fit(shapes, losses), ShapePredictor.fit(shapes, losses, pairs=False)
        errors = [np.sqrt(np.mean((each.predict(unseen) - truth(unseen)) ** 2)) for each in (chosen, without)]
        assert errors[0] < 1.5 * errors[1]
        left_out += not chosen.pair_effects.any()
    assert left_out >= 4


@pytest.mark.parametrize("pairs", [False, True], ids=["layers", "pairs"])
@pytest.mark.parametrize("n", [8, 15, 24])
def test_leave_one_out_error_is_that_of_refitting_where_there_are_more_terms_than_shapes(n, pairs):
    """Then a weak ridge follows every measurement: residuals and one minus the leverage both tend to 0."""
    choices = np.array([120, 240, 360, 480, 540, 600, 768])
    shapes = random_shapes(n, layers=12, choices=choices)
    losses = random_truth(12, choices)(shapes) + 0.01 * np.random.default_rng(0).standard_normal(n)
    basis, index = Basis(choices, 12), np.searchsorted(choices, shapes)
    trend, steps = basis.trend(index), basis.steps(index, pairs)
    with pytest.MonkeyPatch.context() as patch:
        for strength in RIDGE_STRENGTHS[::6]:
            patch.setattr(regression, "RIDGE_STRENGTHS", np.array([strength]))
            # Solved in the space of measurements: stable where there are fewer of them than terms.
            errors = []
            for i in range(n):
                rest = np.arange(n) != i
                kernel = steps[rest] @ steps[rest].T + strength * np.eye(n - 1)
                solved = np.linalg.solve(kernel, np.column_stack([trend[rest], losses[rest]]))
                slope = np.linalg.solve(trend[rest].T @ solved[:, :2], trend[rest].T @ solved[:, 2])
                weights = steps[rest].T @ (solved[:, 2] - solved[:, :2] @ slope)
                errors.append(trend[i] @ slope + steps[i] @ weights - losses[i])
            assert ridge(trend, steps, losses).loo_rmse == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=1e-4)


def test_measured_shapes_are_kept_as_they_were(noisy):
    shapes, losses = noisy_data()
    predictor = quietly(ShapePredictor.fit, shapes, losses)
    expected = predictor.uncertainty(CHOICES[:3][None])
    shapes[:] = CHOICES[0]
    assert quietly(ShapePredictor.fit, noisy_data()[0], losses).uncertainty(CHOICES[:3][None]) == expected
    assert (predictor.evidence.shapes == noisy_data()[0]).all()


def test_known_shapes_are_those_that_can_be_predicted():
    shapes = random_shapes(40, layers=3)
    shapes[:5, 1] = 0
    predictor = quietly(ShapePredictor.fit, shapes, random_truth(3)(np.maximum(shapes, CHOICES[0])))
    a, b = CHOICES[:2].tolist()
    assert [predictor.knows(shape) for shape in ([a, b, a], [a, 0, b])] == [True, True]
    assert [predictor.knows(shape) for shape in ([0, a, b], [a, b, a + 1], [a, b])] == [False] * 3
    never = quietly(ShapePredictor.fit, *noisy_data())
    assert never.knows([a, b, a])
    assert not never.knows([a, 0, b])


def test_choice_of_pairs_has_the_lower_leave_one_out_error():
    for seed in range(10):
        shapes = random_shapes(40, seed=seed)
        losses = random_truth(seed=seed)(shapes) + 0.1 * np.random.default_rng(seed).standard_normal(40)
        basis = Basis(CHOICES, 3)
        index = np.searchsorted(CHOICES, shapes)
        without, using = (ridge(basis.trend(index), basis.steps(index, pairs), losses) for pairs in (False, True))
        predictor = quietly(ShapePredictor.fit, shapes, losses)
        assert predictor.evidence.strength == min(without, using, key=lambda fit: fit.loo_rmse).strength
        assert predictor.pair_effects.any() == (using.loo_rmse < without.loo_rmse)


def test_paper_sized_space_is_predicted_from_fifty_noisy_measurements():
    shapes, losses = noisy_data(50, 12, PAPER_CHOICES, noise=0.02)
    predictor = quietly(ShapePredictor.fit, shapes, losses)
    unseen = random_shapes(500, 12, PAPER_CHOICES, seed=2)
    expected = random_truth(12, PAPER_CHOICES)(unseen)
    assert 1 - (predictor.predict(unseen) - expected).var() / expected.var() > 0.8


def test_effects_start_at_the_smallest_width_and_pairs_at_the_second_layer():
    shapes = random_shapes(60, choices=DROPPING)
    predictor = ShapePredictor.fit(shapes, pair_truth(choices=DROPPING)(shapes), pairs=True)
    assert predictor.effects.shape == (3, 4)
    assert predictor.pair_effects.shape == (3, 4, 4)
    assert not predictor.effects[:, 0].any()
    assert not predictor.pair_effects[0].any()
    assert not predictor.pair_effects[:, 0].any()
    assert not predictor.pair_effects[:, :, 0].any()
    assert predictor.predict([[0, 0, 0]])[0] == predictor.intercept


def test_unmeasured_width_of_a_layer_lies_between_its_neighbours():
    """The middle width of the second layer was never measured: the random walk goes on through it."""
    shapes = [[a, b] for a in (12, 24, 36) for b in (12, 36)] * 2
    predictor = ShapePredictor.fit(shapes, [5 - (a + b) / 36 for a, b in shapes])
    low, middle, high = predictor.predict([[12, 12], [12, 24], [12, 36]])
    assert middle == pytest.approx((low + high) / 2, abs=1e-3)


def test_unmeasured_width_is_nearer_to_the_neighbour_that_is_nearer():
    """The random walk takes steps in proportion to the distance: 16 lies a sixth of the way from 12 to 36."""
    shapes = [[a, b] for a in (12, 16, 36) for b in (12, 36)] * 2
    predictor = ShapePredictor.fit(shapes, [5 - a / 360 - b / 18 for a, b in shapes])
    low, middle, high = predictor.predict([[12, 12], [12, 16], [12, 36]])
    assert middle == pytest.approx(low + (high - low) / 6, abs=1e-3)


def test_trend_with_the_mean_width_is_found_from_few_shapes():
    """It is not shrunk, so widths that were seldom measured follow it."""
    shapes, unseen = (random_shapes(n, 12, PAPER_CHOICES, seed=n) for n in (10, 100))
    predictor = ShapePredictor.fit(shapes, 4 - shapes.mean(axis=1) / 300)
    np.testing.assert_allclose(predictor.predict(unseen), 4 - unseen.mean(axis=1) / 300, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"pairs": True}, {"monotone": True}], ids=str)
def test_adding_a_constant_to_the_losses_moves_only_the_intercept(noisy, options):
    _, shapes, losses = noisy
    predictor, moved = (ShapePredictor.fit(shapes, losses + constant, **options) for constant in (0, 3))
    assert moved.intercept == pytest.approx(predictor.intercept + 3)
    np.testing.assert_allclose(moved.effects, predictor.effects, atol=1e-6)
    np.testing.assert_allclose(moved.pair_effects, predictor.pair_effects, atol=1e-9)


def test_order_of_the_measurements_does_not_matter(noisy):
    predictor, shapes, losses = noisy
    reverse = ShapePredictor.fit(shapes[::-1], losses[::-1])
    np.testing.assert_allclose(reverse.predict(shapes), predictor.predict(shapes), atol=1e-9)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int32], ids=lambda dtype: dtype.__name__)
def test_type_of_the_integers_does_not_matter(dtype, noisy):
    predictor, shapes, losses = noisy
    other = ShapePredictor.fit(shapes.astype(dtype), losses)
    assert other.predict(shapes.astype(dtype)).tolist() == predictor.predict(shapes).tolist()
    assert other.uncertainty(shapes).tolist() == predictor.uncertainty(shapes).tolist()


@pytest.mark.parametrize("options", [{"pairs": True}, {"monotone": True}, {}], ids=str)
def test_one_layer_is_enough(options):
    shapes = np.array([[8], [20], [36], [48]] * 3)
    predictor = ShapePredictor.fit(shapes, 3 - shapes[:, 0] / 48, **options)
    np.testing.assert_allclose(predictor.predict([[8], [48]]), [3 - 8 / 48, 2], atol=1e-6)


@pytest.mark.parametrize(
    ("shapes", "losses", "message"),
    [
        ([[8, 20]] * 8, [1.0] * 7, "one per shape, got (8, 2) and (7,)"),
        ([[8, 20], [8]] * 4, range(8), "but the shapes have different numbers of layers"),
        (
            [[8, 20], [36, 48]] * 4,
            [f"{i}.5" for i in range(8)],
            "losses must be numbers, got an array of the NumPy type <U3",
        ),
        (
            [[8, 20], [36, 48]] * 4,
            [i < 4 for i in range(8)],
            "losses must be numbers, got an array of the NumPy type bool",
        ),
        ([[8, 20], [36, 48]] * 4, [None] * 8, "losses must be numbers, got an array of the NumPy type object"),
        ([8, 20, 36, 48] * 2, [1.0] * 8, "one per shape, got (8,) and (8,)"),
        ([[8, 20]] * 8, [[1.0]] * 8, "one per shape, got (8, 2) and (8, 1)"),
        ([[8.0, 20.0]] * 8, [1.0] * 8, "shapes must be integers, got float64."),
        ([[8, 20]] * 7, range(7), "7 measured shapes are too few: at least 8 are needed, and 4 for each layer"),
        ([], [], "0 measured shapes are too few"),
        ([[8, 20]] * 9, [1.0, float("nan"), 1.0, float("inf"), *[1.0] * 5], "2 of the losses are not finite"),
        ([[8, 20]] * 8, [2.5] * 8, "All 8 losses are 2.5: the shape makes no difference"),
    ],
)
def test_unusable_measurements_are_refused(shapes, losses, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ShapePredictor.fit(shapes, losses)


def test_eight_measurements_are_enough():
    shapes = random_shapes(MINIMUM_SHAPES)
    assert ShapePredictor.fit(shapes, -shapes.sum(axis=1)).quality.num_shapes == 8


# The ridge


def refit_without_each(trend, steps, target, strength):
    """Leave-one-out errors of a ridge regression, by solving it again without each measurement."""
    columns = np.hstack([trend, steps])
    penalty = np.diag([0.0] * trend.shape[1] + [strength] * steps.shape[1])
    errors = []
    for i in range(len(target)):
        rest = np.arange(len(target)) != i
        solution = np.linalg.solve(columns[rest].T @ columns[rest] + penalty, columns[rest].T @ target[rest])
        errors.append(columns[i] @ solution - target[i])
    return np.array(errors)


@pytest.mark.parametrize("pairs", [False, True], ids=["layers", "pairs"])
def test_leave_one_out_error_is_that_of_refitting_and_the_best_strength_is_taken(pairs):
    shapes, losses = noisy_data()
    basis, index = Basis(CHOICES, 3), np.searchsorted(CHOICES, shapes)
    trend, steps = basis.trend(index), basis.steps(index, pairs)
    errors = [refit_without_each(trend, steps, losses, strength) for strength in RIDGE_STRENGTHS]
    refitted = np.sqrt(np.mean(np.square(errors), axis=1))
    fit = ridge(trend, steps, losses)
    assert fit.loo_rmse == pytest.approx(refitted.min(), rel=1e-6)
    assert fit.strength == RIDGE_STRENGTHS[refitted.argmin()]
    assert refitted.argmin() not in (0, len(RIDGE_STRENGTHS) - 1)
    residuals = losses - trend @ fit.slope - steps @ fit.weights
    assert fit.noise == pytest.approx(np.sqrt(np.mean(-errors[refitted.argmin()] * residuals)), rel=1e-6)
    columns = np.hstack([trend, steps])
    penalty = np.diag([0.0, 0.0] + [fit.strength] * steps.shape[1])
    solution = np.linalg.solve(columns.T @ columns + penalty, columns.T @ losses)
    np.testing.assert_allclose(np.concatenate([fit.slope, fit.weights]), solution, atol=1e-8)


def test_strength_is_chosen_again_in_every_fit(monkeypatch, noisy):
    predictor, shapes, losses = noisy
    assert predictor.evidence.strength in RIDGE_STRENGTHS
    monkeypatch.setattr(regression, "RIDGE_STRENGTHS", np.array([1e3]))
    strong = quietly(ShapePredictor.fit, shapes, losses)
    assert strong.evidence.strength == 1e3
    assert not np.allclose(predictor.predict(shapes), strong.predict(shapes), atol=1e-2)


# Quality


@pytest.mark.parametrize("options", [{}, {"pairs": True}, {"monotone": True}], ids=str)
def test_quality_is_that_of_refitting_without_each_fold(options):
    shapes, losses = noisy_data(43)
    order = np.random.default_rng(0).permutation(43)
    predicted = np.empty(43)
    for fold in np.array([*range(FOLDS)]):
        test = order[fold::FOLDS]
        rest = np.setdiff1d(order, test)
        assert len(np.unique(shapes[rest])) == len(CHOICES)
        predicted[test] = quietly(ShapePredictor.fit, shapes[rest], losses[rest], **options).predict(shapes[test])
    quality = ShapePredictor.fit(shapes, losses, **options).quality
    assert quality.num_shapes == 43
    assert quality.rmse == pytest.approx(np.sqrt(np.mean((losses - predicted) ** 2)), rel=1e-9)
    assert quality.r2 == pytest.approx(1 - quality.rmse**2 / losses.var(), rel=1e-9)
    assert quality.spearman == pytest.approx(spearmanr(losses, predicted).statistic)
    assert quality.kendall == pytest.approx(kendalltau(losses, predicted).statistic)


def test_predictions_that_are_all_equal_have_no_rank_correlation():
    quality = Quality.of(np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 2.0]))
    assert (quality.num_shapes, quality.r2, quality.spearman, quality.kendall) == (3, 0.0, 0.0, 0.0)
    assert quality.poor
    assert Quality.of(np.array([1.0, 1.0]), np.array([1.0, 2.0])).spearman == 0


@pytest.mark.parametrize(
    ("r2", "spearman", "poor"),
    [
        (0.49, 0.9, True),
        (float("nan"), 0.9, True),
        (0.9, float("nan"), True),
        (0.9, 0.69, True),
        (0.51, 0.71, False),
        (0.5, 0.7, False),
    ],
)
def test_quality_is_poor_below_either_limit(r2, spearman, poor):
    assert Quality(10, 0.1, r2, spearman, 0.5).poor == poor


def test_quality_is_told_in_a_line():
    text = "R2 0.912, Spearman 0.967, Kendall 0.854, off by 0.123 nats (5-fold cross-validation on 50 shapes)"
    assert str(Quality(50, 0.1234, 0.912, 0.967, 0.854)) == text


def test_poor_predictor_warns_when_fitted_and_when_loaded(tmp_path):
    shapes = random_shapes(40)
    with pytest.warns(UserWarning, match=r"predicted poorly: R2 .* on 40 shapes\)\. .* Measure more shapes") as fitted:
        predictor = ShapePredictor.fit(shapes, np.random.default_rng(0).standard_normal(40))
    predictor.save(tmp_path / "predictor.json")
    with pytest.warns(UserWarning, match=re.escape(f"predicted poorly: {predictor.quality}. R2 should")) as loaded:
        ShapePredictor.load(tmp_path / "predictor.json")
    assert [warning.filename for warning in (*fitted, *loaded)] == [__file__] * 2  # the line that called


# Monotone


@pytest.mark.parametrize("choices", [CHOICES, DROPPING, PAPER_CHOICES], ids=str)
def test_wider_is_never_worse_where_monotone(choices):
    for seed in range(8):
        shapes = random_shapes(60, 4, choices, seed)
        losses = 3 - 0.1 * shapes.mean(axis=1) / choices[-1] + 0.1 * np.random.default_rng(seed).standard_normal(60)
        losses += 0.5 * (shapes[:, 1] >= choices[2])  # a step up, not by chance
        free, monotone = (quietly(ShapePredictor.fit, shapes, losses, pairs=False, monotone=m) for m in (False, True))
        assert np.diff(free.effects, axis=1).max() > 0.05
        assert np.diff(monotone.effects, axis=1).max() <= 1e-12
        assert not monotone.pair_effects.any()


@pytest.mark.parametrize("choices", [CHOICES, DROPPING], ids=str)
def test_monotone_fit_is_the_free_one_where_that_falls_everywhere(choices):
    shapes = random_shapes(50, choices=choices)
    losses = random_truth(choices=choices)(shapes)
    free, monotone = (ShapePredictor.fit(shapes, losses, pairs=False, monotone=m) for m in (False, True))
    assert np.diff(free.effects, axis=1).max() < 0
    np.testing.assert_allclose(monotone.effects, free.effects, atol=1e-7)
    assert monotone.intercept == pytest.approx(free.intercept, abs=1e-7)


def test_monotone_fit_is_the_best_of_those_that_never_rise():
    """No other predictor without a step up has a lower penalised error: moves along the steps and the trend."""
    shapes = random_shapes(40)
    losses = 3 - shapes.mean(axis=1) / 48 + 0.3 * np.random.default_rng(0).standard_normal(40)
    fitted = quietly(ShapePredictor.fit, shapes, losses, monotone=True)
    along, scale = np.diff(CHOICES) / (CHOICES[-1] * 3), np.sqrt(np.diff(CHOICES) / CHOICES[-1])
    index, layers = np.searchsorted(CHOICES, shapes), np.arange(3)

    def penalised(intercept, steps):
        effects = np.pad(steps.cumsum(axis=1), ((0, 0), (1, 0)))
        errors = losses - intercept - effects[layers, index].sum(axis=1)
        slope = (steps * along / scale**2).sum() / (3 * along**2 / scale**2).sum()  # the best for these steps
        off_trend = (steps - slope * along) / scale
        return errors @ errors + fitted.evidence.strength * (off_trend**2).sum()

    steps = np.diff(fitted.effects, axis=1)
    best = penalised(fitted.intercept, steps)
    random = np.random.default_rng(1)
    for size in np.repeat([1e-1, 1e-2, 1e-3], 300):
        moved = np.minimum(steps + size * random.standard_normal(steps.shape), 0)
        assert penalised(fitted.intercept + size * random.standard_normal(), moved) >= best - 1e-9


def test_strength_of_a_monotone_fit_is_that_without_pairs():
    """Also where pairs would fit better."""
    shapes = random_shapes(80)
    losses = pair_truth()(shapes)
    monotone, without = (
        quietly(ShapePredictor.fit, shapes, losses, **options) for options in ({"monotone": True}, {"pairs": False})
    )
    assert monotone.evidence.strength == without.evidence.strength
    assert quietly(ShapePredictor.fit, shapes, losses).evidence.strength != without.evidence.strength


def test_monotone_excludes_pairs(noisy):
    _, shapes, losses = noisy
    with pytest.raises(ValueError, match="monotone=True cannot be kept with pairs=True"):
        ShapePredictor.fit(shapes, losses, pairs=True, monotone=True)


# Uncertainty


def from_the_prior(seed, n, unseen, choices=CHOICES, layers=4, pairs=False, strength=0.1, noise=0.1):
    """Measured shapes and losses, unseen ones and theirs: the truth is drawn from the prior of the ridge."""
    random = np.random.default_rng(seed)
    shapes = random.choice(choices, size=(n + unseen, layers))
    basis, index = Basis(choices, layers), np.searchsorted(choices, shapes)
    steps = basis.steps(index, pairs)
    weights = noise / np.sqrt(strength) * random.standard_normal(steps.shape[1])
    losses = 3 - 2 * shapes.mean(axis=1) / 48 + steps @ weights + noise * random.standard_normal(n + unseen)
    return shapes[:n], losses[:n], shapes[n:], losses[n:]


@pytest.mark.parametrize("choices", [CHOICES, DROPPING], ids=str)
@pytest.mark.parametrize("pairs", [False, True], ids=["layers", "pairs"])
def test_errors_are_as_large_as_the_uncertainty_says(pairs, choices):
    standardised = []
    for seed in range(60):
        shapes, losses, unseen, truth = from_the_prior(seed, 40, 20, choices, pairs=pairs)
        predictor = quietly(ShapePredictor.fit, shapes, losses, pairs=pairs)
        standardised.append((truth - predictor.predict(unseen)) / predictor.uncertainty(unseen))
    assert 0.85 < np.std(standardised) < 1.2
    assert abs(np.mean(standardised)) < 0.15


def test_noise_is_told_apart_from_what_is_unknown():
    found = [quietly(ShapePredictor.fit, *from_the_prior(seed, 60, 0)[:2], pairs=False) for seed in range(40)]
    assert np.mean([predictor.evidence.noise for predictor in found]) == pytest.approx(0.1, rel=0.1)


def test_uncertainty_is_that_of_bayesian_regression(noisy):
    _, shapes, losses = noisy
    for pairs in (False, True):
        predictor = ShapePredictor.fit(shapes, losses, pairs=pairs)
        basis, unseen = Basis(CHOICES, 3), every_shape()
        measured, wanted = (
            np.hstack([basis.trend(index), basis.steps(index, pairs)])
            for index in (np.searchsorted(CHOICES, shapes), np.searchsorted(CHOICES, unseen))
        )
        prior = np.diag([0.0, 0.0] + [predictor.evidence.strength] * (measured.shape[1] - 2))
        spread = np.einsum("ij,jk,ik->i", wanted, np.linalg.inv(measured.T @ measured + prior), wanted)
        expected = predictor.evidence.noise * np.sqrt(1 + spread)
        np.testing.assert_allclose(predictor.uncertainty(unseen), expected, rtol=1e-4)


def test_uncertainty_is_larger_where_less_was_measured():
    shapes = random_shapes(60)
    shapes[:, 0] = np.where(shapes[:, 0] == 48, 36, shapes[:, 0])  # the first layer was never at full width
    losses = random_truth()(shapes) + 0.05 * np.random.default_rng(0).standard_normal(60)
    predictor = ShapePredictor.fit(shapes, losses, pairs=False)
    others = every_shape(2)
    at = {width: predictor.uncertainty(np.insert(others, 0, width, axis=1)) for width in CHOICES}
    assert (at[48] > 1.02 * np.maximum(at[20], at[36])).all()
    assert (predictor.uncertainty(every_shape()) > predictor.evidence.noise).all()


def test_uncertainty_falls_with_measurements():
    means = []
    for n in (30, 60, 120, 480):
        each = []
        for seed in range(5):
            shapes, losses, unseen, _ = from_the_prior(seed, n, 50)
            predictor = quietly(ShapePredictor.fit, shapes, losses, pairs=False)
            each.append(np.sqrt(np.mean(predictor.uncertainty(unseen) ** 2) - predictor.evidence.noise**2))
        means.append(np.mean(each))
    assert (np.diff(means) < 0).all()
    assert means[-1] < means[0] / 2


def test_uncertainty_needs_a_fit():
    predictor = ShapePredictor([8, 20], 3.0, [[0.0, -0.5]])
    for use in (lambda: predictor.uncertainty([[8]]), lambda: predictor.draw(1, 0)):
        with pytest.raises(
            ValueError, match=r"was not fitted, so its uncertainty is unknown\. Use ShapePredictor\.fit"
        ):
            use()


@pytest.mark.parametrize("options", [{"pairs": False}, {"pairs": True}], ids=str)
@pytest.mark.parametrize("choices", [CHOICES, DROPPING], ids=str)
def test_draws_scatter_around_the_prediction_as_the_measurements_leave_open(choices, options):
    shapes, losses = noisy_data(40, choices=choices)
    predictor = quietly(ShapePredictor.fit, shapes, losses, **options)
    unseen = every_shape(choices=choices)
    drawn = np.array([each.predict(unseen) for each in predictor.draw(3000, seed=0)])
    open_ = np.sqrt(predictor.uncertainty(unseen) ** 2 - predictor.evidence.noise**2)
    assert (np.abs(drawn.mean(axis=0) - predictor.predict(unseen)) < 5 * open_ / np.sqrt(3000)).all()
    np.testing.assert_allclose(drawn.std(axis=0), open_, rtol=0.08)


def test_draws_follow_from_the_seed(noisy):
    predictor, shapes, _ = noisy
    first, again, other = (
        np.array([each.predict(shapes) for each in predictor.draw(4, seed)]) for seed in (1, 1, (1, 2))
    )
    assert np.array_equal(first, again)
    assert not np.isclose(first, other).all(axis=1).any()
    assert len(np.unique(first, axis=0)) == 4
    assert predictor.draw(0, 0) == []


def test_draws_know_the_same_shapes():
    shapes = random_shapes(40, choices=DROPPING)
    shapes[:, 1] = 20
    predictor = quietly(ShapePredictor.fit, shapes, -shapes.sum(axis=1) / 48 + shapes[:, 0] % 7)
    (drawn,) = predictor.draw(1, 0)
    assert drawn.width_choices == predictor.width_choices
    assert drawn.droppable == predictor.droppable == [True, False, True]


# Predicting


def test_prediction_is_the_intercept_plus_one_effect_per_layer():
    predictor = ShapePredictor([8, 20], intercept=3.0, effects=[[0.0, -0.5], [0.0, -0.25]])
    shapes = [[8, 8], [20, 8], [8, 20], [20, 20]]
    assert predictor.predict(shapes).tolist() == [3.0, 2.5, 2.75, 2.25]


@pytest.mark.parametrize("choices", [CHOICES, DROPPING], ids=str)
def test_pair_effects_are_those_of_the_last_kept_layer_before(choices):
    random = np.random.default_rng(0)
    effects, pairs = random.normal(size=(4, 4)), random.normal(size=(4, 4, 4))
    pairs[0] = pairs[:, 0] = pairs[:, :, 0] = 0
    predictor = ShapePredictor(choices, 2.0, effects, pairs)
    shapes = every_shape(4, choices)
    position = {width: i for i, width in enumerate(choices.tolist())}
    expected = [
        2.0
        + sum(effects[i, position[width]] for i, width in enumerate(shape))
        + sum(
            pairs[i, position[kept_before(shape, i)], position[shape[i]]] for i in range(1, 4) if kept_before(shape, i)
        )
        for shape in shapes.tolist()
    ]
    np.testing.assert_allclose(predictor.predict(shapes), expected, atol=1e-12)


@pytest.mark.parametrize("method", ["predict", "uncertainty"])
def test_one_shape_gives_a_float_and_many_give_an_array(noisy, method):
    function = getattr(noisy[0], method)
    for one in ([8, 20, 36], (8, 20, 36), np.array([8, 20, 36])):
        assert type(function(one)) is float
        for many in ([one], np.array([one])):
            assert function(many).shape == (1,)
            assert function(many)[0] == function(one)
    assert function(np.empty((0, 3), dtype=int)).shape == (0,)


@pytest.mark.parametrize("method", ["predict", "uncertainty"])
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([8, 20, 24], "knows 3 layers and the widths [8, 20, 36, 48], but got 3 layers and the widths [24]."),
        ([0, 20, 64], "but got 3 layers and the widths [0, 64]."),
        ([-8, 20, 8], "but got 3 layers and the widths [-8]."),
        ([8, 20], "knows 3 layers and the widths [8, 20, 36, 48], but got 2 layers."),
        ([2**62, 20, 20], f"but got 3 layers and the widths [{2**62}]."),
        ([8.0, 20.0, 20.0], "shapes must be one shape (a list of integers) or many"),
    ],
)
def test_shapes_of_another_space_are_refused(noisy, shape, message, method):
    predictor, _, _ = noisy
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(predictor, method)([shape])


# Dropped layers


def some_dropped(n=60):
    """Measurements that drop the first and the last of three layers only, the last one once."""
    shapes = random_shapes(n, choices=DROPPING)
    shapes[:, 1:] = np.where(shapes[:, 1:] == 0, 20, shapes[:, 1:])
    shapes[5, 2] = 0
    return shapes, random_truth(choices=DROPPING)(shapes)


@pytest.mark.parametrize("options", [{}, {"pairs": True}, {"monotone": True}], ids=str)
def test_layer_may_have_been_dropped_once(options):
    """The fold that leaves this shape out cannot know what dropping costs; the fit does."""
    predictor = ShapePredictor.fit(*some_dropped(), **options)
    assert predictor.droppable == [True, False, True]
    assert predictor.quality.r2 > 0.8


@pytest.mark.parametrize("method", ["predict", "uncertainty"])
def test_layer_that_was_never_dropped_cannot_be(method):
    predictor = ShapePredictor.fit(*some_dropped())
    known = getattr(predictor, method)([[0, 20, 20], [20, 20, 0], [0, 20, 0]])
    assert np.isfinite(known).all()
    message = r"Layers \[1\] were not dropped in any measured shape, so what dropping them costs is unknown"
    with pytest.raises(ValueError, match=message):
        getattr(predictor, method)([[20, 20, 20], [20, 0, 20]])


def test_negative_width_is_not_a_dropped_layer():
    predictor = ShapePredictor([0, 8, 20], 3.0, np.zeros((2, 3)))
    with pytest.raises(ValueError, match=re.escape("but got 2 layers and the widths [-8].")):
        predictor.predict([[8, -8]])


def test_layers_can_be_dropped_only_where_zero_is_known(noisy):
    assert noisy[0].droppable == [False] * 3
    assert ShapePredictor([8, 20], 3.0, np.zeros((2, 2))).droppable == [False] * 2
    assert ShapePredictor([0, 20], 3.0, np.zeros((2, 2))).droppable == [True] * 2
    evidence = Evidence(np.array([[0, 20], [20, 20]]), np.array([3.0, 2.0]), 1.0, 0.1)
    assert ShapePredictor([0, 20], 3.0, np.zeros((2, 2)), evidence=evidence).droppable == [True, False]


# Saving


@pytest.mark.parametrize("options", [{}, {"pairs": True}, {"monotone": True}], ids=str)
@pytest.mark.parametrize("choices", [CHOICES, DROPPING], ids=str)
def test_saved_predictor_loads_equal(choices, options, tmp_path):
    shapes, losses = noisy_data(50, choices=choices)
    predictor = quietly(ShapePredictor.fit, shapes, losses, **options)
    predictor.save(tmp_path / "predictor.json")
    loaded = quietly(ShapePredictor.load, str(tmp_path / "predictor.json"))
    everything = every_shape(choices=choices)
    assert loaded.width_choices == predictor.width_choices
    assert loaded.predict(everything).tolist() == predictor.predict(everything).tolist()
    assert loaded.uncertainty(everything).tolist() == predictor.uncertainty(everything).tolist()
    assert loaded.draw(1, 0)[0].predict(shapes).tolist() == predictor.draw(1, 0)[0].predict(shapes).tolist()
    assert loaded.quality == predictor.quality
    assert loaded.evidence.shapes.tolist() == shapes.tolist()
    assert loaded.evidence.losses.tolist() == losses.tolist()
    assert loaded.droppable == predictor.droppable
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "predictor.json").read_bytes()


def test_predictor_that_was_not_fitted_can_be_saved(tmp_path):
    predictor = ShapePredictor([8, 20], 3.0, [[0.0, -0.5], [0.0, -0.25]], [[[0, 0], [0, 0]], [[0, 0], [0, 0.5]]])
    predictor.save(tmp_path / "predictor.json")
    loaded = ShapePredictor.load(tmp_path / "predictor.json")
    assert loaded.predict([[20, 20]]).tolist() == [2.75]
    assert loaded.quality is None
    assert loaded.evidence is None


def test_saved_predictor_is_plain_json(noisy, tmp_path):
    predictor, shapes, losses = noisy
    predictor.save(tmp_path / "predictor.json")
    text = (tmp_path / "predictor.json").read_text(encoding="utf-8")
    stored = json.loads(text)
    assert text.endswith("\n")
    assert stored["format"] == "supershaper-hf predictor 2"
    assert stored["width_choices"] == [8, 20, 36, 48]
    assert stored["effects"] == predictor.effects.tolist()
    assert stored["pair_effects"] is None
    assert stored["evidence"]["shapes"] == shapes.tolist()
    assert stored["evidence"]["losses"] == losses.tolist()
    assert stored["quality"]["num_shapes"] == 40


def changed(part, **changes):
    """Another content, in which entries of one part are others; None leaves an entry out."""
    return lambda content: {
        **content,
        part: {name: value for name, value in {**content[part], **changes}.items() if value is not None},
    }


@pytest.mark.parametrize(
    "change",
    [
        lambda content: {name: value for name, value in content.items() if name != "effects"},
        lambda content: {name: value for name, value in content.items() if name != "quality"},
        lambda content: {**content, "loo_rmse": 0.1},
        lambda content: {**content, "width_choices": [8, 20]},
        lambda content: {**content, "width_choices": [8, "20", 36, 48]},
        lambda content: {**content, "width_choices": [8, 20, 20, 48]},
        lambda content: {**content, "width_choices": [-8, 20, 36, 48]},
        lambda content: {**content, "width_choices": [8, 20, 36, 10**30]},
        lambda content: {**content, "width_choices": [True, 20, 36, 48]},
        lambda content: {**content, "width_choices": 48},
        lambda content: {**content, "intercept": "3.0"},
        lambda content: {**content, "intercept": None},
        lambda content: {**content, "effects": content["effects"][0]},
        lambda content: {**content, "effects": None},
        lambda content: {**content, "effects": []},
        lambda content: {**content, "effects": [[str(effect) for effect in row] for row in content["effects"]]},
        lambda content: {**content, "pair_effects": np.ones((3, 4, 4)).tolist()},
        lambda content: {**content, "quality": {"r2": 1.0}},
        lambda content: {**content, "quality": 5},
        lambda content: {**content, "evidence": []},
        changed("quality", r2="0.9"),
        changed("quality", num_shapes=40.5),
        changed("evidence", shapes=[[8, 20], [8]]),
        changed("evidence", shapes=[8, 20, 36]),
        changed("evidence", shapes=[[8, 20, 37]] * 40),
        changed("evidence", shapes=[[8, 20]] * 40),
        changed("evidence", shapes=[[8, 20, 36]] * 39),
        changed("evidence", losses=[1.0] * 39),
        changed("evidence", losses=["1.0"] * 40),
        changed("evidence", losses=None),
        changed("evidence", strength=0),
        changed("evidence", noise=-0.1),
        changed("evidence", noise="0.1"),
    ],
)
def test_content_that_is_no_predictor_is_refused_by_name(noisy, change, tmp_path):
    """Somebody has written the file by hand, so the checksum is right."""
    file = tmp_path / "predictor.json"
    noisy[0].save(file)
    write_json(file, FORMAT, change(read_json(file, FORMAT)))
    with pytest.raises(ValueError, match=re.escape(f"{file} holds no predictor: ") + ".*Write it with"):
        ShapePredictor.load(file)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: {**content, "format": "supershaper-hf predictor 1"},
        lambda content: {name: value for name, value in content.items() if name != "format"},
        lambda content: {**content, "intercept": content["intercept"] + 1},
        lambda content: [content],
    ],
)
def test_file_with_something_else_is_refused_by_name(noisy, damage, tmp_path):
    file = tmp_path / "predictor.json"
    noisy[0].save(file)
    file.write_text(json.dumps(damage(json.loads(file.read_text()))))
    with pytest.raises(ValueError, match=re.escape(str(file))):
        ShapePredictor.load(file)


@pytest.mark.parametrize(
    "content",
    [b"", b'{"format": "supersha', b"\xff\xfe\x00", b"null", b"[" * 100_000],
    ids=lambda text: repr(text[:20]),
)
def test_file_that_is_not_json_is_refused_by_name(content, tmp_path):
    file = tmp_path / "predictor.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(file))):
        ShapePredictor.load(file)


def test_damaged_file_is_refused_by_name_or_changes_nothing(noisy, tmp_path):
    predictor, _, _ = noisy
    file = tmp_path / "predictor.json"
    predictor.save(file)
    whole = file.read_bytes()
    for damaged in damages(whole):
        file.write_bytes(damaged)
        loaded = load_or_refuse(ShapePredictor.load, file)
        if loaded is not None:
            loaded.save(file)
            assert file.read_bytes() == whole


def test_widths_cost_no_memory_in_proportion_to_them(tmp_path):
    predictor = ShapePredictor([8, 2_000_000_000], 3.0, [[0.0, -0.5], [0.0, -0.25]])
    predictor.save(tmp_path / "predictor.json")
    tracemalloc.start()
    loaded = ShapePredictor.load(tmp_path / "predictor.json")
    assert loaded.predict([8, 2_000_000_000]) == 2.75
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6


def test_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        ShapePredictor.load(tmp_path / "predictor.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pair_effects": [[[0.0, 0.0]]]}, "need effects (layers, 2) and pair_effects (layers, 2, 2), got (1, 2) and"),
        ({"effects": [[0.0]]}, "got (1, 1)"),
        ({"effects": [[0.0, None]]}, "effects must be numbers, got an array of the NumPy type object."),
        ({"effects": [[0.0, float("inf")]]}, "must be finite"),
        ({"intercept": None}, "intercept=None must be a finite number."),
        ({"intercept": float("nan")}, "intercept=nan must be a finite number."),
        ({"evidence": Evidence(np.array([[9]]), np.ones(1), 1.0, 0.1)}, "widths that are not in [8, 20]"),
        ({"evidence": Evidence(np.array([[8, 8]]), np.ones(1), 1.0, 0.1)}, "have 2 layers, but effects have 1"),
        ({"pair_effects": [[[0.0, 0.0], [0.0, 1.0]]]}, "pair_effects must be zero at the first layer and for the"),
        ({"width_choices": [20, 8]}, "width_choices=[20, 8] must be strictly increasing integers of at least 0."),
        ({"width_choices": [8, 8]}, "width_choices=[8, 8] must be strictly increasing integers of at least 0."),
        ({"width_choices": [-8, 8]}, "width_choices=[-8, 8] must be strictly increasing integers of at least 0."),
    ],
    ids=str,
)
def test_parts_that_make_no_predictor_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ShapePredictor(**{"width_choices": [8, 20], "intercept": 3.0, "effects": [[0.0, -0.5]], **arguments})


def test_negative_widths_are_refused():
    with pytest.raises(ValueError, match="Width -8 is negative"):
        ShapePredictor.fit([[8, 20], [-8, 20]] * 5, range(10))


# Records


def records_of(shapes, losses):
    return [{"shape": shape, "loss": loss} for shape, loss in zip(shapes.tolist(), losses.tolist())]


@pytest.mark.parametrize("options", [{}, {"pairs": True}, {"monotone": True}], ids=str)
def test_fit_on_records_is_the_fit_on_their_shapes_and_losses(noisy, options):
    _, shapes, losses = noisy
    fitted = ShapePredictor.fit_records(records_of(shapes, losses), **options)
    assert fitted.predict(shapes).tolist() == ShapePredictor.fit(shapes, losses, **options).predict(shapes).tolist()
    assert fitted.quality == ShapePredictor.fit(shapes, losses, **options).quality


def test_records_without_a_finite_loss_are_left_out_with_a_warning(noisy):
    _, shapes, losses = noisy
    records = records_of(shapes, losses)
    records[3]["loss"], records[17]["loss"] = float("nan"), float("inf")
    with pytest.warns(UserWarning, match="2 of 40 measured shapes have no finite loss and are left out") as caught:
        fitted = ShapePredictor.fit_records(records)
    rest = np.delete(np.arange(40), [3, 17])
    assert fitted.evidence.shapes.tolist() == shapes[rest].tolist()
    assert fitted.evidence.losses.tolist() == losses[rest].tolist()
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("loss", ["2.5", None, [2.5]], ids=repr)
def test_record_whose_loss_is_no_number_is_refused(noisy, loss):
    records = records_of(*noisy[1:])
    records[3]["loss"] = loss
    with pytest.raises(ValueError, match="losses must be numbers"):
        ShapePredictor.fit_records(records)


def test_too_few_finite_losses_are_counted(noisy):
    records = records_of(*noisy[1:])[:10]
    for record in records[:3]:
        record["loss"] = float("nan")
    with pytest.raises(ValueError, match="Only 7 of 10 measured losses are finite, but a predictor needs at least 8"):
        ShapePredictor.fit_records(records)


@pytest.mark.parametrize("count", [0, 1, 7])
def test_too_few_records_are_counted(noisy, count):
    with pytest.raises(ValueError, match=f"{count} measured shapes are too few: at least 8 are needed"):
        ShapePredictor.fit_records(records_of(*noisy[1:])[:count])


# Distances


def test_distances_are_predicted_as_losses_are(noisy, tmp_path):
    """In the same numbers; only the words differ, and the file keeps them."""
    of_losses, shapes, losses = noisy
    records = [{"shape": shape, "distance": loss} for shape, loss in zip(shapes.tolist(), losses.tolist(), strict=True)]
    for predictor in (
        ShapePredictor.fit(shapes, losses, measure="distance"),
        ShapePredictor.fit_records(records),
    ):
        assert predictor.predict(shapes).tolist() == of_losses.predict(shapes).tolist()
        predictor.save(tmp_path / "predictor.json")
        loaded = ShapePredictor.load(tmp_path / "predictor.json")
        for each in (predictor, loaded, *predictor.draw(1, seed=0)):
            assert each.measure == "distance"
        assert "nats" not in str(loaded.quality)
        assert str(loaded.quality) == str(of_losses.quality).replace(" nats", "")


def test_file_without_a_measure_predicts_losses(noisy, tmp_path):
    file = tmp_path / "predictor.json"
    noisy[0].save(file)
    content = read_json(file, FORMAT)
    assert content.pop("measure") == content["quality"].pop("measure") == "loss"
    write_json(file, FORMAT, content)
    loaded = ShapePredictor.load(file)
    assert (loaded.measure, loaded.quality) == ("loss", noisy[0].quality)


def test_records_of_two_measures_are_refused(noisy):
    records = records_of(*noisy[1:])
    del records[3]["loss"]
    with pytest.raises(ValueError, match="has none of 'loss', 'distance', 'task_loss'"):
        ShapePredictor.fit_records(records)
    records[3]["distance"] = 0.5
    with pytest.raises(ValueError, match="Some records hold losses and others distances"):
        ShapePredictor.fit_records(records)


def test_messages_about_distances_name_them(noisy):
    with pytest.raises(ValueError, match="All 40 distances are 1"):
        ShapePredictor.fit(noisy[1], np.ones(40), measure="distance")
    with pytest.raises(ValueError, match="measure='perplexity' is unknown"):
        ShapePredictor.fit(*noisy[1:], measure="perplexity")
    with pytest.raises(ValueError, match="quality is that of a loss, but the predictor predicts a distance"):
        ShapePredictor([8, 20], 1.0, np.zeros((1, 2)), quality=noisy[0].quality, measure="distance")


def test_poor_fit_on_records_warns_at_the_line_that_called():
    shapes = random_shapes(40)
    with pytest.warns(UserWarning, match="predicted poorly") as caught:
        ShapePredictor.fit_records(records_of(shapes, np.random.default_rng(0).standard_normal(40)))
    assert [warning.filename for warning in caught] == [__file__]
