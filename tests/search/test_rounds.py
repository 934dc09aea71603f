import itertools
import re

import numpy as np
import pytest
from conftest import tiny_config

from supershaper_hf import SearchSpace, ShapePredictor, pareto_front
from supershaper_hf.model.costs import ChainCost, chain_cost, parameter_cost
from supershaper_hf.search.rounds import best_measured, measure_in_rounds, propose_shapes


SPACE = SearchSpace.from_config(tiny_config(num_hidden_layers=5))
SMALL = SearchSpace.from_config(tiny_config(num_hidden_layers=3, width_choices=[20, 48]))  # 8 shapes


def random_truth(space, seed=0):
    """Effects of every layer and of neighbouring pairs: a predictor that is right."""
    generator = np.random.default_rng(seed)
    layers, widths = space.num_layers, len(space.width_choices)
    effects = np.zeros((layers, widths))
    effects[:, 1:] = -generator.gamma(0.6, 0.15, size=(layers, widths - 1)).cumsum(axis=1)
    pairs = np.zeros((layers, widths, widths))
    pairs[1:, 1:, 1:] = 0.02 * generator.standard_normal((layers - 1, widths - 1, widths - 1)).cumsum(1).cumsum(2)
    return ShapePredictor(space.width_choices, 4.0, effects, pairs)


class Measure:
    """Measures shapes by a known truth with noise of each shape's own, and resumes: what it knows it does not repeat.

    Dies before the measuring of shape number `dies_at`.
    """

    def __init__(self, truth=None, noise=0.01, seed=0, broken=()):
        self.truth, self.noise, self.seed, self.broken = truth or random_truth(SPACE), noise, seed, broken
        self.records, self.calls, self.dies_at = {}, [], None

    def __call__(self, shapes):
        self.calls.append([list(shape) for shape in shapes])
        for shape in map(tuple, shapes):
            if shape not in self.records:
                if len(self.records) == self.dies_at:
                    raise KeyboardInterrupt
                self.records[shape] = {"shape": list(shape), "loss": self.loss(shape)}
        return [self.records[tuple(shape)] for shape in shapes]

    def loss(self, shape):
        if len(self.records) in self.broken:
            return float("nan") if len(self.records) % 2 else float("inf")
        kept = np.array([shape]) if 0 in self.truth.width_choices else np.maximum([shape], self.truth.width_choices[0])
        noise = np.random.default_rng([self.seed, *shape]).standard_normal()
        return float(self.truth.predict(kept)[0] + self.noise * noise)


def in_rounds(space, measure, num_shapes, rounds=4, seed=0, cost="parameters", **options):
    """Measure in rounds for three budgets, spread over the upper half of the range of the (first) cost."""
    terms = space.terms(cost[0] if isinstance(cost, list) else cost)
    low, high = chain_cost(terms, space.config.hidden_size, np.array([space.smallest, space.largest]))
    budgets = [low + part * (high - low) for part in (0.5, 0.75, 1)]
    return measure_in_rounds(space, measure, num_shapes, rounds, seed, cost, **{"max_cost": budgets} | options)


def shapes_of(records):
    return [tuple(record["shape"]) for record in records]


# How many


@pytest.mark.parametrize(
    ("num_shapes", "rounds", "sizes"),
    [
        (40, 4, [10, 10, 10, 10]),
        (43, 4, [10, 11, 11, 11]),
        (8, 1, [8]),
        (25, 1, [25]),
        (20, 5, [8, 3, 3, 3, 3]),
        (11, 30, [8, 1, 1, 1]),
        (8, 4, [8]),
    ],
)
def test_as_many_shapes_as_asked_for_are_measured_none_twice(num_shapes, rounds, sizes):
    measure = Measure()
    records = in_rounds(SPACE, measure, num_shapes, rounds)
    assert [len(call) for call in measure.calls] == sizes
    assert len(set(shapes_of(records))) == len(records) == num_shapes
    assert shapes_of(records) == list(measure.records)
    assert records == list(measure.records.values())


@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_whole_small_space_is_measured_where_more_is_asked_for(rounds):
    measure = Measure(random_truth(SMALL))
    records = in_rounds(SMALL, measure, 40, rounds)
    assert sorted(shapes_of(records)) == list(itertools.product([20, 48], repeat=3))
    assert all(measure.calls)


@pytest.mark.parametrize("options", [{}, {"max_cost": None}], ids=["in rounds", "at random"])
def test_space_with_fewer_shapes_than_a_predictor_needs_is_refused_before_measuring(options):
    space = SearchSpace.from_config(tiny_config(num_hidden_layers=2, width_choices=[20, 48]))
    measure = Measure(random_truth(space))
    with pytest.raises(
        ValueError, match=r"This search space has 4 shapes only, but a predictor needs 8\. Measure all of"
    ):
        in_rounds(space, measure, 20, 4, **options)
    assert measure.calls == []
    with_drops = Measure(ShapePredictor([0, 20, 48], 3.0, [[0.0, -0.5, -0.7], [0.0, -0.3, -0.4]]))
    assert len(in_rounds(space, with_drops, 20, 1, drop_rate=0.5)) == 8  # with dropped layers there are enough


def test_fewer_are_measured_where_every_drawn_front_is_known():
    """Wider is always worse: the smallest shape alone is the front, and no later round has more to ask."""
    truth = ShapePredictor(SPACE.width_choices, 3.0, np.tile([0.0, 1.0, 2.0, 3.0], (5, 1)))
    measure = Measure(truth, noise=1e-4)
    assert len(in_rounds(SPACE, measure, 60, 2)) == 30
    assert len(measure.calls) == 1


@pytest.mark.parametrize(("num_shapes", "rounds"), [(20, 0), (20, -1), (7, 1), (7, 3), (0, 1)])
def test_too_few_shapes_or_rounds_are_refused_before_measuring(num_shapes, rounds):
    measure = Measure()
    message = f"num_shapes={num_shapes} is too small: the first round needs at least 8 shapes."
    if rounds < 1:
        message = f"rounds={rounds} must be an integer of at least 1."
    with pytest.raises(ValueError, match=re.escape(message)):
        in_rounds(SPACE, measure, num_shapes, rounds)
    assert measure.calls == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cost": "seconds", "max_cost": None}, "Unknown cost 'seconds'"),
        ({"cost": 1e9, "max_cost": None}, "Unknown cost 1000000000.0"),
        ({"cost": "flops", "max_cost": None, "sequence_length": 0}, "sequence_length=0 must be an integer"),
        ({"max_cost": []}, "max_cost names no budget"),
        ({"max_cost": "many"}, "max_cost must be numbers"),
        ({"num_shapes": "40"}, "num_shapes='40' must be an integer"),
        ({"num_shapes": 40.0}, "num_shapes=40.0 must be an integer"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused_before_measuring(options, message):
    """A cost is checked without budgets, too: it is that of the front which follows."""
    measure = Measure()
    arguments = {"num_shapes": 40, "rounds": 4, "max_cost": 1e9} | options
    with pytest.raises(ValueError, match=re.escape(message)):
        measure_in_rounds(SPACE, measure, **arguments)
    assert measure.calls == []


def test_space_of_many_widths_needs_a_shape_for_each():
    space = SearchSpace.from_config(tiny_config(width_choices=list(range(4, 49, 4))))
    with pytest.raises(ValueError, match="the first round needs at least 12 shapes"):
        in_rounds(space, Measure(), 11)


# The first round


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("drop_rate", [0.0, 0.3])
@pytest.mark.parametrize("choices", [[8, 20, 36, 48], list(range(4, 49, 4))], ids=["4 widths", "12 widths"])
def test_first_round_has_both_ends_and_every_width(seed, drop_rate, choices):
    space = SearchSpace.from_config(tiny_config(width_choices=choices))
    shapes = in_rounds(
        space, lambda shapes: [{"shape": shape, "loss": 1.0} for shape in shapes], 12, 1, seed, drop_rate=drop_rate
    )
    shapes = [record["shape"] for record in shapes]
    assert space.smallest in shapes
    assert space.largest in shapes
    assert {width for shape in shapes for width in shape} - {0} == set(choices)
    assert len(set(map(tuple, shapes))) == 12
    for shape in shapes:
        space.validate(shape)


def test_without_budgets_all_shapes_are_random_and_measured_at_once():
    measure = Measure()
    shapes = np.array(shapes_of(measure_in_rounds(SPACE, measure, 200, rounds=4, seed=3)))
    assert len(measure.calls) == 1
    assert (shapes > 0).all()
    for layer in shapes.T:
        assert np.bincount(np.searchsorted(SPACE.width_choices, layer)).min() > 30
    dropping = np.array(shapes_of(measure_in_rounds(SPACE, Measure(), 100, 1, seed=3, drop_rate=0.3)))
    assert abs((dropping == 0).mean() - 0.3) < 0.08


def test_seeds_measure_shapes_of_their_own():
    shapes = [set(shapes_of(in_rounds(SPACE, Measure(), 40, 4, seed))) for seed in (0, 0, 1)]
    assert shapes[0] == shapes[1]
    assert len(shapes[0] & shapes[2]) < 25


# Later rounds


@pytest.mark.parametrize("cost", ["parameters", "flops"])
def test_proposed_shapes_lie_on_fronts_of_drawn_predictors(cost, monkeypatch):
    drawn, draw = [], ShapePredictor.draw
    monkeypatch.setattr(ShapePredictor, "draw", lambda *args: drawn.extend(draw(*args)) or drawn[-args[1] :])
    measure = Measure()
    records = in_rounds(SPACE, measure, 40, 4, cost=cost)
    assert len(drawn) == 30
    for record, predictor in zip(records[10:], drawn, strict=True):
        assert record["shape"] in pareto_front(SPACE, predictor, cost).shapes.tolist()


@pytest.fixture(scope="module")
def fitted():
    shapes = SPACE.sample(60, 0, "budget")
    losses = [Measure().loss(tuple(shape)) for shape in shapes]
    return ShapePredictor.fit(shapes, losses)


def test_budgets_take_turns_and_are_kept(fitted, monkeypatch):
    monkeypatch.setattr(ShapePredictor, "draw", lambda self, n, seed: [self] * n)
    front, budgets = pareto_front(SPACE, fitted), [120_000, 160_000]
    proposed = propose_shapes(SPACE, fitted, 6, set(), seed=0, max_cost=budgets)
    for number, shape in enumerate(proposed):
        fits = front.costs["parameters"] <= budgets[number % 2]
        left = [each for each in front.shapes[fits].tolist() if each not in proposed[:number]]
        assert shape == min(left, key=lambda each: fitted.predict([each])[0])


def test_known_shapes_are_not_proposed_until_the_front_is_known(fitted):
    known, everything = set(), set(itertools.product(SPACE.width_choices, repeat=5))
    budget = SPACE.num_parameters(SPACE.largest)
    for number in range(4):
        proposed = {tuple(shape) for shape in propose_shapes(SPACE, fitted, 15, known, (0, number), max_cost=budget)}
        assert len(proposed) <= 15
        assert len(proposed) > 5 or number > 0
        assert not proposed & known
        known |= proposed
    assert propose_shapes(SPACE, fitted, 5, everything, seed=0, max_cost=budget) == []
    assert propose_shapes(SPACE, fitted, 0, set(), seed=0, max_cost=budget) == []
    (best,) = propose_shapes(SPACE, fitted, 1, set(), seed=0, max_cost=budget)
    assert propose_shapes(SPACE, fitted, 1, everything - {tuple(best)}, seed=0, max_cost=budget) == [best]


@pytest.mark.parametrize("max_cost", [1000, float("nan"), [1e9, 1000]])
def test_budget_that_no_shape_meets_is_refused(fitted, max_cost):
    message = f"cannot be met: the cheapest shape has {SPACE.num_parameters(SPACE.smallest):,} parameters. Raise the"
    with pytest.raises(ValueError, match=message):
        propose_shapes(SPACE, fitted, 5, set(), seed=0, max_cost=max_cost)
    for rounds in (1, 4):
        measure = Measure()
        with pytest.raises(ValueError, match=message):
            measure_in_rounds(SPACE, measure, 40, rounds, max_cost=max_cost)
        assert measure.calls == []


def test_budgets_take_turns(fitted):
    low, high = (SPACE.num_parameters([width] * 5) for width in (20, 48))
    proposed = propose_shapes(SPACE, fitted, 8, set(), seed=0, max_cost=[low, high])
    within = [SPACE.num_parameters(shape) <= low for shape in proposed]
    assert within == [True, False] * 4


def test_other_seeds_draw_other_shapes(fitted):
    budget = SPACE.num_parameters([36] * 5)
    assert shapes_of(measure_in_rounds(SPACE, Measure(), 20)) != shapes_of(
        measure_in_rounds(SPACE, Measure(), 20, seed=1)
    )
    first, other = (propose_shapes(SPACE, fitted, 8, set(), seed, max_cost=budget) for seed in (0, 1))
    assert first != other


@pytest.mark.parametrize("length", [8, 500])
def test_budget_in_flops_is_for_the_length_that_is_given(fitted, length):
    budget = SPACE.flops([36] * 5, length)
    options = {"cost": "flops", "max_cost": budget, "sequence_length": length}
    proposed = propose_shapes(SPACE, fitted, 10, set(), seed=0, **options)
    records = measure_in_rounds(SPACE, Measure(), 30, **options)
    for shapes in (proposed, shapes_of(records)[10:]):
        costs = np.array([SPACE.flops(shape, length) for shape in shapes])
        assert (costs <= budget).all()
        assert costs.max() > 0.9 * budget


def test_best_measured_is_the_lowest_loss_within_the_budget():
    records = measure_in_rounds(SPACE, Measure(), 50)
    costs = SPACE.num_parameters(np.array(shapes_of(records)))
    for budget in np.quantile(costs, [0.1, 0.5, 1]):
        within = [record for record, cost in zip(records, costs) if cost <= budget]
        assert (
            best_measured(SPACE, records, "parameters", budget)
            == min(within, key=lambda record: record["loss"])["shape"]
        )
    cheapest = f"the cheapest of all 50 costs {costs.min():,} parameters"
    with pytest.raises(ValueError, match=f"costs at most 1,000 parameters: {cheapest}"):
        best_measured(SPACE, records, "parameters", 1000)
    with pytest.raises(ValueError, match="costs at most nan parameters"):
        best_measured(SPACE, records, "parameters", float("nan"))


def test_rounds_of_distances_measure_the_shapes_of_losses():
    """What is measured has another name, and the same numbers."""
    measure = Measure()

    def measure_distances(shapes):
        return [{"shape": record["shape"], "distance": record["loss"]} for record in measure(shapes)]

    losses, distances = in_rounds(SPACE, Measure(), 20), in_rounds(SPACE, measure_distances, 20)
    assert [[*record.values()] for record in distances] == [[*record.values()] for record in losses]
    budget = SPACE.num_parameters([20, 36, 20, 36, 20])
    best = [best_measured(SPACE, records, "parameters", budget) for records in (losses, distances)]
    assert best[0] == best[1]
    with pytest.raises(ValueError, match="No measured shape with a distance costs at most"):
        best_measured(SPACE, distances, "parameters", 5)


def test_large_costs_are_written_out():
    config = tiny_config(num_hidden_layers=2, vocab_size=2_000_000)
    space = SearchSpace.from_config(config)
    with pytest.raises(ValueError, match="costs at most 63,000,000 parameters: the cheapest of all 1 costs 98,"):
        best_measured(space, [{"shape": space.largest, "loss": 1.0}], "parameters", 63e6)


def test_measured_cost_of_a_shape_is_a_budget_that_it_meets():
    """Seconds are no binary fractions: another order of adding misses some budgets by one unit in the last place."""
    random = np.random.default_rng(0)
    for seed in range(40):
        seconds = RandomSeconds(seed)
        shapes = SPACE.sample(5, seed)
        predictor = ShapePredictor(SPACE.width_choices, 3.0, -random.random((5, 4)).cumsum(axis=1))
        front = pareto_front(SPACE, predictor, seconds)
        shapes = np.concatenate([shapes, front.shapes])
        records = [{"shape": shape, "loss": loss} for shape, loss in zip(shapes.tolist(), predictor.predict(shapes))]
        for shape, cost in zip(front.shapes.tolist(), front.costs["latency"].tolist()):
            assert best_measured(SPACE, records, seconds, cost) == shape


def test_no_records_have_no_best_one():
    with pytest.raises(ValueError, match="There are no records to choose from"):
        best_measured(SPACE, [], "parameters", 1e9)


@pytest.mark.parametrize("loss", ["2.5", None], ids=repr)
def test_best_measured_of_a_loss_that_is_no_number_is_refused(loss):
    records = [{"shape": SPACE.largest, "loss": 2.0}, {"shape": SPACE.smallest, "loss": loss}]
    with pytest.raises(ValueError, match="losses must be numbers"):
        best_measured(SPACE, records, "parameters", 1e9)


def test_best_measured_in_the_order_of_before_is_refused():
    records = [{"shape": SPACE.largest, "loss": 2.0}]
    with pytest.raises(ValueError, match=r"Unknown cost 1000000000\.0\. Allowed: 'parameters', 'flops', or a Lat"):
        best_measured(SPACE, records, 1e9, "parameters")


def test_best_measured_passes_over_losses_that_are_not_finite():
    records = [{"shape": SPACE.largest, "loss": float("nan")}, {"shape": SPACE.smallest, "loss": 2.0}]
    assert best_measured(SPACE, records, "parameters", 1e9) == SPACE.smallest


class RandomSeconds:
    """A cost of random nanoseconds."""

    def __init__(self, seed):
        random = np.random.default_rng(seed)
        self.blocks, self.bottlenecks = (random.integers(10**9, size=size) / 1e9 for size in ((49, 49), 49))

    def chain_cost(self, config):
        return ChainCost(
            "latency",
            fixed=0.123456789,
            enter=lambda source, width: self.blocks[source, width],
            layer=lambda width: np.zeros(np.shape(width)),
            leave=lambda width: self.bottlenecks[width],
        )


class Seconds:
    """A cost of its own, as a latency table is: seconds in proportion to parameters."""

    def chain_cost(self, config):
        cost = parameter_cost(config)
        return cost._replace(
            name="latency",
            fixed=0.1,
            enter=lambda source, width: 1e-6 * cost.enter(source, width),
            layer=lambda width: 1e-6 * cost.layer(width),
            leave=lambda width: 1e-6 * cost.leave(width),
        )


@pytest.mark.parametrize("cost", [Seconds(), ["parameters", Seconds()]], ids=["latency", "two costs"])
def test_rounds_for_seconds_and_for_two_costs_measure_as_many(cost):
    assert len(set(shapes_of(in_rounds(SPACE, Measure(), 24, 3, cost=cost)))) == 24


def test_dropped_layers_are_measured_in_later_rounds_too():
    effects = np.tile([0.0, -0.3, -0.31, -0.32, -0.33], (5, 1))
    effects[2] = [0.0, 0.1, 0.1, 0.1, 0.1]  # this layer is best dropped
    measure = Measure(ShapePredictor([0, *SPACE.width_choices], 4.0, effects))
    records = in_rounds(SPACE, measure, 60, 3, drop_rate=0.3)
    assert len(set(shapes_of(records))) == 60
    assert (np.array(shapes_of(records[40:]))[:, 2] == 0).mean() > 0.8


# Crashes and losses that are not finite


def test_killed_anywhere_and_called_again_measures_the_same_and_nothing_twice():
    uninterrupted = Measure()
    expected = in_rounds(SPACE, uninterrupted, 20, 3, seed=4)
    for kill in range(20):
        measure = Measure()
        measure.dies_at = kill
        with pytest.raises(KeyboardInterrupt):
            in_rounds(SPACE, measure, 20, 3, seed=4)
        assert len(measure.records) == kill
        measure.dies_at = None
        assert in_rounds(SPACE, measure, 20, 3, seed=4) == expected
        assert list(measure.records) == list(uninterrupted.records)


def test_losses_that_are_not_finite_are_returned_but_not_fitted():
    records = in_rounds(SPACE, Measure(broken={3, 6, 14, 21}), 40, 4)
    assert len(set(shapes_of(records))) == 40
    assert [i for i, record in enumerate(records) if not np.isfinite(record["loss"])] == [3, 6, 14, 21]


def test_too_few_finite_losses_say_so():
    with pytest.raises(ValueError, match="Only 5 of 10 measured losses are finite, but a predictor needs at least 8"):
        in_rounds(SPACE, Measure(broken={2, 4, 6, 8, 9}), 30, 3)


def test_poor_fit_before_the_last_round_does_not_warn():
    """Warnings are errors here: the losses are noise, which a fit by itself warns of."""
    measure = Measure(ShapePredictor(SPACE.width_choices, 3.0, np.zeros((5, 4))), noise=1.0)
    records = in_rounds(SPACE, measure, 40, 4)
    with pytest.warns(UserWarning, match="predicted poorly"):
        ShapePredictor.fit(shapes_of(records), [record["loss"] for record in records])


# What it is for


@pytest.mark.filterwarnings("ignore:Shapes left out")
def test_rounds_find_a_better_shape_for_a_budget_than_as_many_random_shapes():
    """A shape's noise is its own and stays: measuring is how to find the good ones."""
    space = SearchSpace.from_config(tiny_config(num_hidden_layers=8, width_choices=[8, 16, 24, 32, 40, 48]))
    budget = (space.num_parameters(space.smallest) + space.num_parameters(space.largest)) // 2
    losses = []
    for seed in range(6):
        measure = Measure(random_truth(space, seed), 0.02, seed)
        in_rounds = measure_in_rounds(space, measure, 48, seed=seed, max_cost=budget)
        random = measure_in_rounds(space, measure, 46, seed=seed)
        predictor = ShapePredictor.fit(shapes_of(random), [record["loss"] for record in random])
        random += measure([pareto_front(space, predictor).best(budget)])
        losses.append(
            [measure([best_measured(space, each, "parameters", budget)])[0]["loss"] for each in (in_rounds, random)]
        )
    rounds, random = np.mean(losses, axis=0)
    assert rounds < random - 0.01
