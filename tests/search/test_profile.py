import numpy as np
import pytest
from conftest import tiny_config

from supershaper_hf import SearchSpace, ShapePredictor, pareto_front
from supershaper_hf.search.pareto import ParetoFront, shapes_at
from supershaper_hf.search.profile import Profile, derive_profile


SPACE = SearchSpace.from_config(tiny_config(num_hidden_layers=5, width_choices=[8, 16, 24, 32, 40, 48]))
GAINS = np.array([0.4, 0.1, 0.1, 0.4, 1.2])  # nats from the smallest width to the largest


def falling(gains, choices=SPACE.width_choices):
    """A predictor whose layers gain with the logarithm of their width: the more they gain, the wider is best."""
    logarithms = np.log(np.array(choices) / choices[0]) / np.log(choices[-1] / choices[0])
    return ShapePredictor(choices, 4.0, -np.outer(gains, logarithms))


def measured(n, noise=0.02, seed=0, truth=None):
    """A predictor fitted on noisy measurements of the planted truth."""
    shapes = SPACE.sample(n, (seed, 0), "budget")
    losses = (truth or falling(GAINS)).predict(shapes)
    return ShapePredictor.fit(shapes, losses + noise * np.random.default_rng((seed, 1)).standard_normal(n))


@pytest.fixture(scope="module")
def profile():
    return derive_profile(SPACE, measured(80))


def test_planted_profile_is_found(profile):
    """The layers that gain most are widest, those that gain least narrow."""
    widths = profile.widths
    assert widths.argmax() == 4
    assert widths[[1, 2]].max() < 0.85 < widths[[0, 3]].min()
    assert widths[4] > 1.3
    assert widths.mean() == pytest.approx(1)


def test_planted_importances_are_found(profile):
    np.testing.assert_allclose(profile.importances, GAINS, atol=0.05)
    exact = derive_profile(SPACE, measured(80, noise=0.0))
    np.testing.assert_allclose(exact.importances, GAINS, atol=0.01)


def test_deviations_shrink_with_more_measurements():
    few, many = (derive_profile(SPACE, measured(n, noise=0.1), num_budgets=10) for n in (60, 600))
    assert many.importance_deviations.mean() < 0.5 * few.importance_deviations.mean()
    assert many.width_deviations.mean() < 0.7 * few.width_deviations.mean()


def test_deviations_are_the_scatter_over_repeated_measurements():
    profiles = [derive_profile(SPACE, measured(100, 0.05, seed), num_budgets=20) for seed in range(20)]
    for values, deviations in [("importances", "importance_deviations"), ("widths", "width_deviations")]:
        scatter = np.std([getattr(profile, values) for profile in profiles], axis=0, ddof=1).mean()
        told = np.mean([getattr(profile, deviations) for profile in profiles])
        assert 0.6 < told / scatter < 1.8


def test_importance_of_a_layer_contains_its_pairs():
    """A pair is averaged over the widths of its neighbour, which are drawn evenly."""
    truth = falling(GAINS)
    truth.pair_effects[1, 5, 5] = -0.6  # both first layers at full width
    shapes = SPACE.sample(400, 0)
    fitted = ShapePredictor.fit(shapes, truth.predict(shapes), pairs=True)
    expected = GAINS + np.array([0.1, 0.1, 0, 0, 0])
    np.testing.assert_allclose(
        derive_profile(SPACE, fitted, num_draws=2, num_budgets=5).importances, expected, atol=0.03
    )


def test_widths_are_the_mean_over_the_middle_of_the_front():
    fitted = measured(80)
    front = pareto_front(SPACE, fitted)
    low, high = front.costs["parameters"][[0, -1]]
    shapes = np.array([front.best(low + part * (high - low)) for part in np.linspace(0.1, 0.9, 7)])
    expected = (shapes / shapes.mean(axis=1, keepdims=True)).mean(axis=0)
    np.testing.assert_allclose(derive_profile(SPACE, fitted, num_draws=2, num_budgets=7).widths, expected)


def test_profile_depends_on_the_seed_alone():
    fitted = measured(60, noise=0.1)
    first, again, other = (derive_profile(SPACE, fitted, 5, 10, seed) for seed in (0, 0, 1))
    for name in vars(first):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    assert np.array_equal(first.widths, other.widths)
    assert not np.array_equal(first.importance_deviations, other.importance_deviations)
    assert not np.array_equal(first.width_deviations, other.width_deviations)


def test_sentence_names_narrow_mean_and_wide_layers_and_the_most_important():
    profile = Profile(
        np.array([1.0, 0.6, 0.7, 1.1, 1.6]),
        np.zeros(5),
        np.array([0.3, 0.05, 0.1, 0.8, 0.6]),
        np.linspace(0.01, 0.05, 5),
    )
    assert profile.sentence() == (
        "Good shapes have layer 1 at the mean (1.00), layers 2-3 narrow (0.65), layer 4 at the mean (1.10), "
        "layer 5 wide (1.60); widest is layer 5. Layer 4 matters most (0.800 ± 0.040 nats from its smallest width to "
        "its largest), layer 2 least (0.050 ± 0.020)."
    )


def test_profile_of_distances_has_no_nats():
    shapes = SPACE.sample(40, seed=0)
    values = 1 - shapes @ np.linspace(1, 2, 5) / 500
    of_losses, of_distances = (
        derive_profile(SPACE, ShapePredictor.fit(shapes, values, measure=measure), 2, 4)
        for measure in ("loss", "distance")
    )
    assert of_distances.measure == "distance"
    assert of_distances.sentence() == of_losses.sentence().replace(" nats", " of distance")
    assert " nats" in of_losses.sentence()


def test_shape_is_the_largest_within_the_budget_and_follows_the_profile(profile):
    low, high = SPACE.num_parameters(SPACE.smallest), SPACE.num_parameters(SPACE.largest)
    for budget in np.linspace(low, high, 20).astype(int).tolist():
        shape = profile.shape(SPACE, budget)
        assert SPACE.num_parameters(shape) <= budget
        assert shape == SPACE.profile_shape(profile.widths.tolist(), budget)
        ordered = np.array(shape)[np.argsort(profile.widths)]
        assert (np.diff(ordered) >= 0).all()
    assert profile.shape(SPACE, high) == SPACE.largest


def test_layer_that_good_shapes_drop_has_the_smallest_width():
    choices = [0, *SPACE.width_choices]
    truth = ShapePredictor(choices, 4.0, -np.outer([0.5, 0.5, 0.0, 0.5, 0.5], np.log1p(choices) / np.log(49)))
    truth.effects[2, 1:] = 0.3
    shapes = SPACE.sample(120, 0, "budget", drop_rate=0.3)
    noise = 0.01 * np.random.default_rng(0).standard_normal(120)
    profile = derive_profile(SPACE, ShapePredictor.fit(shapes, truth.predict(shapes) + noise), num_draws=5)
    assert profile.widths[2] == 0
    assert "layer 3 narrow (0.00)" in profile.sentence()
    budget = (SPACE.num_parameters(SPACE.smallest) + SPACE.num_parameters(SPACE.largest)) // 2
    shape = profile.shape(SPACE, budget)
    assert shape[2] == 8
    assert min(shape[:2] + shape[3:]) > 8
    assert SPACE.num_parameters(shape) <= budget


def test_shapes_at_evenly_spaced_budgets_are_the_fronts_best():
    front = pareto_front(SPACE, falling(GAINS))
    costs = front.costs["parameters"]
    shapes = shapes_at(front, 5)
    assert shapes[0].tolist() == SPACE.smallest
    assert shapes[-1].tolist() == SPACE.largest
    assert shapes.tolist() == [front.best(budget) for budget in np.linspace(costs[0], costs[-1], 5)]
    assert len(shapes_at(front, 1)) == 1


def test_shapes_at_all_budgets_include_both_ends():
    """However the seconds are rounded."""
    for seed in range(200):
        costs = np.random.default_rng(seed).uniform(0.01, 0.3, 2)
        front = ParetoFront(
            np.array([SPACE.smallest, SPACE.largest]), {"latency": np.sort(costs)}, np.array([2.0, 1.0])
        )
        assert shapes_at(front, 3)[[0, -1]].tolist() == [SPACE.smallest, SPACE.largest]


def test_shapes_at_budgets_of_two_costs_are_the_best_for_the_first():
    space = SearchSpace.from_config(tiny_config())
    predictor = falling(GAINS[:3], space.width_choices)
    both, one = pareto_front(space, predictor, ["parameters", "flops"]), pareto_front(space, predictor)
    np.testing.assert_allclose(predictor.predict(shapes_at(both, 5)), predictor.predict(shapes_at(one, 5)))


def test_unfitted_predictor_is_refused():
    with pytest.raises(ValueError, match=r"was not fitted, so its uncertainty is unknown\. Use ShapePredictor\.fit"):
        derive_profile(SPACE, falling(GAINS))


def test_predictor_of_another_space_is_refused():
    with pytest.raises(ValueError, match="but the search space has 3 layers"):
        derive_profile(SearchSpace.from_config(tiny_config()), measured(60))


@pytest.mark.parametrize(
    ("draws", "budgets", "message"),
    [
        (0, 5, "num_draws=0 must be an integer of at least 2."),
        (1, 5, "num_draws=1 must be an integer of at least 2."),
        (5, 0, "num_budgets=0 must be an integer of at least 1."),
    ],
)
def test_too_few_draws_or_budgets_are_refused(draws, budgets, message):
    with pytest.raises(ValueError, match=message):
        derive_profile(SPACE, measured(60), draws, budgets)


@pytest.mark.parametrize("num_budgets", [0, -1, 1.5])
def test_shapes_at_no_budget_are_refused(num_budgets):
    with pytest.raises(ValueError, match=f"num_budgets={num_budgets} must be an integer of at least 1."):
        shapes_at(pareto_front(SPACE, falling(GAINS)), num_budgets)
