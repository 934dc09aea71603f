import itertools
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_config

from supershaper_hf import SearchSpace, SuperShaperConfig, SuperShaperForMaskedLM
from supershaper_hf.model.modeling_supershaper import empty_model
from supershaper_hf.model.shapes import DISTRIBUTIONS, PROFILES, SHAPE_NAMES


GOLDEN = json.loads((Path(__file__).with_name("params_golden.json")).read_text())
PAPER = SearchSpace.from_config(SuperShaperConfig(vocab_size=28996))
TINY = SearchSpace.from_config(tiny_config())
SIX_LAYERS = SearchSpace.from_config(
    SuperShaperConfig(vocab_size=500, hidden_size=384, num_hidden_layers=6, intermediate_size=1536)
)


# Parameters


def stored_parameters(config, shape):
    """Parameters of the subnet itself, tied weights once."""
    subnet = empty_model(SuperShaperForMaskedLM, config.subnet_config(shape))
    return sum(parameter.numel() for parameter in subnet.parameters())


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: row["name"])
def test_paper_shapes_have_the_published_sizes(row):
    """The counts were taken from the subnets of the 2021 code, bottlenecks merged and embeddings tied."""
    assert PAPER.num_parameters(row["hidden_sizes"]) == row["merged_tied_numel"]


@pytest.mark.parametrize("row", GOLDEN[-3:], ids=lambda row: row["name"])
def test_golden_table_is_what_subnets_store(row):
    assert stored_parameters(PAPER.config, row["hidden_sizes"]) == row["merged_tied_numel"]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("shape", [[8, 20, 36], [48, 48, 48], [0, 36, 8], [20, 0, 48], [36, 8, 0], [0, 20, 0]], ids=str)
def test_num_parameters_is_what_the_subnet_stores(shape, tied):
    config = tiny_config(tie_word_embeddings=tied)
    subnet = SuperShaperForMaskedLM(config).extract_subnet(shape)
    assert SearchSpace.from_config(config).num_parameters(shape) == sum(
        parameter.numel() for parameter in subnet.parameters()
    )


def test_num_parameters_of_many_shapes_are_those_of_each():
    shapes = [list(shape) for shape in itertools.product([0, *TINY.width_choices], repeat=3) if any(shape)]
    counts = TINY.num_parameters(np.array(shapes))
    assert counts.tolist() == [TINY.num_parameters(shape) for shape in shapes]


def test_one_shape_gives_an_int():
    for shape in ([8, 0, 36], (8, 0, 36), np.array([8, 0, 36])):
        assert type(TINY.num_parameters(shape)) is int


def test_small_integer_types_do_not_overflow():
    shapes = np.array([[48, 48, 48]], dtype=np.uint8)
    assert TINY.num_parameters(shapes) == TINY.num_parameters([48, 48, 48])


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([[8, 20]], "shape=[8, 20] has 2 widths, but the supernet has 3 layers"),
        (
            [[[8, 20, 36]]],
            "or an integer array (n, layers)), got an array of the NumPy type int64 and the size (1, 1, 3)",
        ),
        (
            [[8.0, 20.0, 36.0]],
            "or an integer array (n, layers)), got an array of the NumPy type float64 and the size (1, 3)",
        ),
        ([[True, True, True]], "or an integer array (n, layers)), got an array of the NumPy type bool"),
        ([[8, 20, 36], [8, 20, 40]], "width 40 of layer 3 is not one of the width choices"),
        ([[8, 20, 36], [0, 0, 0]], "drops every layer"),
    ],
)
def test_wrong_arrays_of_shapes_are_refused(shapes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TINY.num_parameters(np.array(shapes))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([8, 20, 40], "width 40 of layer 3 is not one of the width choices"),
        ([8, 20.0, 36], "shapes must be one shape (a list of integers) or many"),
        ([[8, 20, 36], [8, 20]], "got lists of different lengths"),
        (8, "or an integer array (n, layers)), got an array of the NumPy type int64 and the size ()"),
        ("8,20,36", "shapes must be one shape (a list of integers) or many"),
    ],
    ids=str,
)
def test_wrong_shapes_are_refused_by_every_cost(shape, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TINY.num_parameters(shape)
    with pytest.raises(ValueError, match=re.escape(message)):
        TINY.flops(shape, sequence_length=4)


def test_list_of_shapes_is_an_array_of_shapes():
    shapes = [[8, 0, 36], [48, 48, 48]]
    assert TINY.num_parameters(shapes).tolist() == TINY.num_parameters(np.array(shapes)).tolist()


# The space


def test_size_counts_the_shapes_without_dropped_layers():
    assert PAPER.size == 7**12
    assert TINY.size == len(list(itertools.product(TINY.width_choices, repeat=3)))


def test_largest_and_smallest_bound_every_shape():
    counts = TINY.num_parameters(np.array(list(itertools.product(TINY.width_choices, repeat=3))))
    assert TINY.num_parameters(TINY.smallest) == counts.min()
    assert TINY.num_parameters(TINY.largest) == counts.max()


def test_validate_returns_python_integers():
    assert TINY.validate(np.array([8, 0, 36])) == [8, 0, 36]


def test_space_of_a_subnet_is_refused():
    with pytest.raises(ValueError, match=re.escape("belongs to a subnet with fixed hidden_sizes=[8, 36]")):
        SearchSpace.from_config(tiny_config().subnet_config([8, 0, 36]))


# Sampling


@pytest.fixture(params=DISTRIBUTIONS)
def distribution(request):
    return request.param


def budget_positions(space, shapes):
    """Where the parameters of each shape lie between the smallest subnet (0) and the largest (1)."""
    smallest, largest = space.num_parameters(space.smallest), space.num_parameters(space.largest)
    return (space.num_parameters(shapes) - smallest) / (largest - smallest)


def distance_from_uniform(positions):
    """Kolmogorov-Smirnov: largest gap between the empirical distribution function and that of uniform numbers."""
    ordered, steps = np.sort(positions), np.arange(len(positions) + 1) / len(positions)
    return max(np.abs(ordered - steps[1:]).max(), np.abs(ordered - steps[:-1]).max())


def test_draws_by_budget_are_those_of_earlier_versions():
    """A run that goes on with a newer version trains the shapes it would have trained."""
    assert TINY.sample(4, (5, 7), "budget", 0.3).tolist() == [[0, 48, 48], [0, 20, 0], [8, 20, 0], [0, 20, 0]]
    assert SIX_LAYERS.sample(2, 3, "budget").tolist() == [[96, 288, 288, 288, 336, 336], [240, 288, 48, 288, 144, 240]]


def test_uniform_draws_are_those_of_earlier_versions():
    for seed in (3, (3, 1)):
        expected = np.random.default_rng(seed).choice(TINY.width_choices, size=(20, 3))
        assert np.array_equal(TINY.sample(20, seed), expected)
        assert np.array_equal(TINY.sample(20, seed, "uniform", 0.0), expected)


@pytest.mark.parametrize("drop_rate", [0.0, 0.3, 0.95])
def test_draws_depend_on_the_seed_alone(distribution, drop_rate):
    first = TINY.sample(20, (3, 1), distribution, drop_rate)
    np.random.seed(7)
    TINY.sample(5, (3, 2), distribution, drop_rate)
    assert np.array_equal(TINY.sample(20, (3, 1), distribution, drop_rate), first)
    assert np.array_equal(SearchSpace.from_config(tiny_config()).sample(20, [3, 1], distribution, drop_rate), first)


def test_every_seed_and_step_draws_its_own_shapes(distribution):
    seeds = [(seed, step) for seed in range(3) for step in range(3)]
    assert len({tuple(TINY.sample(20, seed, distribution).ravel()) for seed in seeds}) == 9


@pytest.mark.parametrize("drop_rate", [0.0, 0.3])
def test_sampled_shapes_are_allowed(distribution, drop_rate):
    shapes = SIX_LAYERS.sample(50, 0, distribution, drop_rate)
    assert shapes.shape == (50, 6)
    assert np.issubdtype(shapes.dtype, np.integer)
    for shape in shapes:
        SIX_LAYERS.validate(shape)
    assert SIX_LAYERS.sample(0, 0, distribution, drop_rate).shape == (0, 6)


def test_space_of_one_shape_can_be_sampled(distribution):
    space = SearchSpace.from_config(tiny_config(width_choices=[48]))
    assert space.sample(2, 0, distribution).tolist() == [[48, 48, 48]] * 2


def test_every_layer_draws_every_width_equally_often():
    shapes = TINY.sample(8000, seed=0)
    for width in TINY.width_choices:
        assert np.abs((shapes == width).mean(axis=0) - 1 / 4).max() < 0.02


@pytest.mark.parametrize("name", ["uniform", "parameters"])
def test_layers_are_drawn_independently(name):
    correlations = np.corrcoef(TINY.sample(8000, 0, name).T)
    assert np.abs(correlations - np.eye(3)).max() < 0.05


def test_parameters_draws_widths_in_proportion_to_their_layers_parameters():
    subnet = empty_model(SuperShaperForMaskedLM, tiny_config(num_hidden_layers=4).subnet_config(TINY.width_choices))
    sizes = np.array(
        [sum(parameter.numel() for parameter in layer.parameters()) for layer in subnet.bert.encoder.layer]
    )
    shapes = TINY.sample(8000, 0, "parameters")
    for width, odds in zip(TINY.width_choices, sizes / sizes.sum()):
        assert np.abs((shapes == width).mean(axis=0) - odds).max() < 0.02


# The tiny space has 34 sizes: jumping in the middle between neighbours, its distance is 0.065 at best.
@pytest.mark.parametrize(
    ("space", "bound"), [(PAPER, 0.02), (SIX_LAYERS, 0.02), (TINY, 0.08)], ids=["paper", "six layers", "tiny"]
)
def test_budget_draws_subnets_of_every_size_equally_often(space, bound):
    assert distance_from_uniform(budget_positions(space, space.sample(4000, 0, "budget"))) < bound
    assert distance_from_uniform(budget_positions(space, space.sample(4000, 0, "uniform"))) > 2 * bound


def test_budget_draws_one_at_a_time_are_spread_as_well():
    shapes = np.concatenate([PAPER.sample(1, (0, step), "budget") for step in range(1000)])
    assert distance_from_uniform(budget_positions(PAPER, shapes)) < 0.04


def test_budget_draws_one_shape_from_each_slice_in_random_order():
    positions = budget_positions(PAPER, PAPER.sample(20, 0, "budget"))
    middles = (np.arange(20) + 0.5) / 20
    assert np.abs(np.sort(positions) - middles).max() < 1.6 / 20
    assert abs(np.corrcoef(positions, middles)[0, 1]) < 0.6


@pytest.mark.parametrize("architecture", ["SuperShaperModel", "SuperShaperForSequenceClassification"])
def test_budget_draws_the_same_shapes_whatever_head_is_counted(architecture):
    """A head costs the same at every shape, so it moves budgets and sizes alike."""
    config = tiny_config()
    drawn, expected = (
        each.sample(40, seed=0, distribution="budget")
        for each in (SearchSpace.from_config(config, architecture), SearchSpace.from_config(config))
    )
    np.testing.assert_array_equal(drawn, expected)


def test_budget_reaches_both_ends_and_keeps_layers_diverse():
    shapes = PAPER.sample(4000, 0, "budget")
    positions = budget_positions(PAPER, shapes)
    assert positions.min() < 0.01
    assert positions.max() > 0.99
    for width in PAPER.width_choices:
        assert (shapes == width).mean(axis=0).min() > 0.05
    middle = shapes[np.abs(positions - 0.5) < 0.1]
    distinct = [len(set(shape)) for shape in middle.tolist()]
    assert np.mean(distinct) > 4.5


@pytest.mark.parametrize("space", [TINY, SIX_LAYERS], ids=["tiny", "six layers"])
def test_budget_treats_all_layers_alike(space):
    shapes = space.sample(4000, 0, "budget")
    for width in space.width_choices:
        assert np.ptp((shapes == width).mean(axis=0)) < 0.05


def test_one_shape_is_drawn_in_under_three_milliseconds(distribution):
    def seconds(step):
        start = time.perf_counter()
        PAPER.sample(1, (0, step), distribution, 0.1)
        return time.perf_counter() - start

    assert min(seconds(step) for step in range(20)) < 0.003


def test_dropping_leaves_the_other_layers_as_drawn(distribution):
    whole, thinned = TINY.sample(4000, 0, distribution), TINY.sample(4000, 0, distribution, 0.3)
    assert np.array_equal(thinned, np.where(thinned > 0, whole, 0))
    dropped = thinned == 0
    # All three layers are dropped with probability .3 ** 3, and then one of them is kept.
    assert np.abs(dropped.mean(axis=0) - (0.3 - 0.3**3 / 3)).max() < 0.02
    assert len({tuple(row) for row in dropped.tolist()}) == 7


def test_layers_are_dropped_independently():
    correlations = np.corrcoef((SIX_LAYERS.sample(8000, 0, drop_rate=0.2) == 0).T)
    assert np.abs(correlations - np.eye(6)).max() < 0.04


def test_one_random_layer_survives_when_all_would_be_dropped(distribution):
    kept = TINY.sample(3000, 0, distribution, 0.999) > 0
    assert kept.any(axis=1).all()
    assert np.abs(kept.mean(axis=0) - 1 / 3).max() < 0.03


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_shapes": -1}, "num_shapes=-1 must be an integer of at least 0."),
        ({"num_shapes": 2.0}, "num_shapes=2.0 must be an integer of at least 0."),
        (
            {"distribution": "normal"},
            "distribution='normal' is unknown. Allowed: 'uniform', 'parameters', 'budget'.",
        ),
        ({"drop_rate": -0.1}, "drop_rate=-0.1 must be a finite number at least 0 and below 1"),
        ({"drop_rate": 1}, "drop_rate=1 must be a finite number at least 0 and below 1"),
        ({"drop_rate": float("nan")}, "drop_rate=nan must be a finite number at least 0 and below 1"),
    ],
    ids=str,
)
def test_wrong_arguments_of_sample_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TINY.sample(**{"num_shapes": 3, "seed": 0, **arguments})


# Named shapes


def profile_at_every_scale(space, name):
    """Every shape of a profile, found by trying scales: the stretched profile, rounded to the nearest choice."""
    profile = np.array(PROFILES[name]) / max(PROFILES[name])
    stretched = np.interp(np.linspace(0, 1, space.num_layers), np.linspace(0, 1, len(profile)), profile)
    choices = np.array(space.width_choices)
    scales = np.linspace(0, 2 * choices[-1] / stretched.min(), 100_000)
    scaled = stretched * scales[:, None, None]  # (scales, 1, layers)
    nearest = np.abs(scaled - choices[:, None]).argmin(axis=1)
    return np.unique(choices[nearest], axis=0)


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("space", [TINY, SIX_LAYERS, PAPER], ids=["tiny", "six layers", "paper"])
def test_named_shape_is_the_largest_of_its_profile_within_the_budget(space, name):
    shapes = profile_at_every_scale(space, name)
    counts = space.num_parameters(shapes)
    for budget in [*counts, *(counts - 1)]:
        if budget >= counts.min():
            shape = space.named_shape(name, int(budget))
            assert shape in shapes.tolist()
            assert space.num_parameters(shape) == counts[counts <= budget].max()


@pytest.mark.parametrize("name", ["bottle", "inverted_bottle", "diamond", "inverted_diamond", "upper_triangle"])
def test_papers_own_shape_is_found_at_its_own_size(name):
    row = next(row for row in GOLDEN if row["name"].startswith(name.replace("triangle", "traingle")))
    assert PAPER.named_shape(name, row["merged_tied_numel"]) == row["hidden_sizes"]


@pytest.mark.parametrize("name", SHAPE_NAMES)
def test_named_shape_grows_with_the_budget(name):
    budgets = np.linspace(PAPER.num_parameters(PAPER.smallest) + 8_000_000, 130_000_000, 50)
    counts = [PAPER.num_parameters(PAPER.named_shape(name, int(budget))) for budget in budgets]
    assert counts == sorted(counts)
    assert all(count <= budget for count, budget in zip(counts, budgets))
    assert counts[-1] == PAPER.num_parameters(PAPER.largest)


def test_first_layers_keeps_the_bottom_and_drops_the_top():
    exact = PAPER.num_parameters([768] * 4 + [0] * 8)
    assert PAPER.named_shape("first_layers", exact) == [768] * 4 + [0] * 8
    assert PAPER.named_shape("first_layers", exact - 1) == [768] * 3 + [0] * 9


@pytest.fixture(scope="module")
def six_layer_shapes():
    budget = (SIX_LAYERS.num_parameters(SIX_LAYERS.smallest) + SIX_LAYERS.num_parameters(SIX_LAYERS.largest)) // 2
    return {name: SIX_LAYERS.named_shape(name, budget) for name in PROFILES}


def test_rectangle_is_level(six_layer_shapes):
    assert len(set(six_layer_shapes["rectangle"])) == 1


@pytest.mark.parametrize(("rising", "falling"), [("bottle", "inverted_bottle"), ("lower_triangle", "upper_triangle")])
def test_mirrored_profiles_rise_and_fall(six_layer_shapes, rising, falling):
    assert six_layer_shapes[rising] == sorted(six_layer_shapes[rising])
    assert six_layer_shapes[rising][0] < six_layer_shapes[rising][-1]
    assert six_layer_shapes[falling] == six_layer_shapes[rising][::-1]


def test_diamond_is_widest_and_inverted_diamond_narrowest_in_the_middle(six_layer_shapes):
    diamond, inverted = six_layer_shapes["diamond"], six_layer_shapes["inverted_diamond"]
    assert max(diamond[0], diamond[-1]) < max(diamond[2:4])
    assert min(inverted[0], inverted[-1]) > min(inverted[2:4])


def test_supershaper_is_narrow_after_the_first_layer_and_widest_at_the_top(six_layer_shapes):
    first, second, *_, top = six_layer_shapes["supershaper"]
    assert second < first < top


def test_budget_below_the_smallest_is_refused():
    with pytest.raises(ValueError, match=r"max_parameters=30,000,000 is below the smallest 'rectangle' subnet, which"):
        PAPER.named_shape("rectangle", 30_000_000)


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"Unknown shape name 'triangle'\. Allowed: rectangle, bottle"):
        PAPER.named_shape("triangle", 63_000_000)


# Profiles of one's own


def one_wider(space, shape):
    """Every shape in which one layer has the next width choice."""
    following = dict(zip(space.width_choices, space.width_choices[1:]))
    layers = [layer for layer, width in enumerate(shape) if width in following]
    return [[*shape[:layer], following[shape[layer]], *shape[layer + 1 :]] for layer in layers]


@pytest.mark.parametrize("name", PROFILES)
def test_profile_shape_is_the_named_shape_with_the_rest_of_the_budget_spent_on_single_layers(name):
    for budget in (40_000_000, 63_000_000, 90_000_000):
        shape, scaled = PAPER.profile_shape(PROFILES[name], budget), PAPER.named_shape(name, budget)
        assert PAPER.num_parameters(shape) <= budget
        assert all(PAPER.num_parameters(wider) > budget for wider in one_wider(PAPER, shape))
        assert all(own >= least for own, least in zip(shape, scaled))


def test_rest_of_the_budget_goes_to_the_layer_that_keeps_the_profile():
    assert TINY.width_choices == [8, 20, 36, 48]
    largest = TINY.num_parameters(TINY.largest)
    assert TINY.profile_shape([1, 1, 1], largest) == [48, 48, 48]
    assert TINY.profile_shape([1, 1, 1], largest - 1) == [36, 48, 48]  # of equally near ones the last layers
    assert TINY.profile_shape([1, 1, 1], TINY.num_parameters([20, 20, 20])) == [20, 20, 20]


def test_profile_shape_does_not_depend_on_the_unit():
    expected = PAPER.profile_shape(PROFILES["supershaper"], 63_000_000)
    for scale in (1e-3, 768.0):
        profile = [scale * width for width in PROFILES["supershaper"]]
        assert PAPER.profile_shape(profile, 63_000_000) == expected


@pytest.mark.parametrize("profile", [[], [1, 0, 1], [1, -1, 1], [1, float("nan"), 1], [1, float("inf"), 1]], ids=str)
def test_profile_that_is_not_positive_is_refused(profile):
    with pytest.raises(ValueError, match="must be positive numbers: relative widths, first layer first"):
        TINY.profile_shape(profile, 1_000_000)


def test_profile_shape_above_the_budget_is_refused():
    with pytest.raises(ValueError, match=r"max_parameters=1,000 is below the smallest scaled subnet, which has"):
        TINY.profile_shape([1, 2, 3], 1000)
