import itertools
import re

import numpy as np
import pytest
from conftest import tiny_config

from supershaper_hf import SearchSpace
from supershaper_hf.model.costs import ChainCost, chain_cost
from supershaper_hf.search.pareto import PAIRWISE, ParetoFront, _undominated, pareto_front
from supershaper_hf.search.predictor import Evidence, ShapePredictor


SPACE = SearchSpace.from_config(tiny_config())
# Every layer gains with its width, so the front has many points.
FALLS = -np.array([[0.0, 0.2, 0.3, 0.35], [0.0, 0.1, 0.3, 0.4], [0.0, 0.3, 0.5, 0.8]])
FALLING = ShapePredictor(SPACE.width_choices, 3.0, FALLS)


class Seconds:
    """Random seconds of every bottleneck and layer, as a latency table has them; with `ties`, multiples of 1/4.

    By default all are binary fractions, so sums are exact: shapes with the same bottlenecks in another order take
    equally long. With `parts`, all are multiples of 1 / parts.
    """

    def __init__(self, space, seed, ties=False, parts=2**20):
        random = np.random.default_rng(seed)
        size = space.config.hidden_size + 1
        parts = 4 if ties else parts
        self.enter, self.layer, self.leave = (
            random.integers(parts, size=shape) / parts for shape in ((size, size), size, size)
        )

    def chain_cost(self, config):
        return ChainCost(
            "latency",
            fixed=1.5,
            enter=lambda source, width: self.enter[source, width],
            layer=lambda width: self.layer[width],
            leave=lambda width: self.leave[width],
        )


def random_case(seed, ties=False, pairs=False, dropping=False, max_layers=4):
    """A small space and a predictor of it.

    With `ties`, effects are multiples of 1/4: sums are exact, and many shapes share cost and loss. With `dropping`, all
    layers can be dropped, or some of them.
    """
    random = np.random.default_rng(seed)
    choices = [4 * int(width) for width in sorted(random.choice(range(1, 12), random.integers(0, 4), False))]
    choices = [*choices, 48]
    layers = int(random.integers(1, max_layers + 1))
    config = tiny_config(
        num_hidden_layers=layers,
        width_choices=choices,
        intermediate_size=int(random.integers(1, 100)),
        tie_word_embeddings=bool(random.integers(2)),
    )
    known = [0, *choices] if dropping else choices
    effects = random.normal(size=(layers, len(known)))
    if seed % 2:  # wider is better, so that the front is long
        effects = -np.abs(effects).cumsum(axis=1)
    pair_effects = random.normal(size=(layers, len(known), len(known)))
    pair_effects[0] = pair_effects[:, 0] = pair_effects[:, :, 0] = 0
    if ties:
        effects, pair_effects = np.round(effects * 2) / 4, np.round(pair_effects * 2) / 4
    evidence = None
    if dropping and random.integers(2):
        dropped = random.random(layers) < 0.5
        evidence = Evidence(np.where(dropped, 0, [[48] * layers]), losses=np.ones(1), strength=1.0, noise=0.1)
    predictor = ShapePredictor(known, 3.0, effects, pair_effects if pairs else None, evidence)
    return SearchSpace.from_config(config), predictor


def all_shapes(space, predictor):
    """Every shape of the space that keeps a layer, the dropped ones only where the predictor allows them."""
    options = [[0, *space.width_choices] if droppable else space.width_choices for droppable in predictor.droppable]
    shapes = np.array(list(itertools.product(*options)))
    return shapes[shapes.any(axis=1)]


def costs_of(space, shapes, cost):
    if cost == "parameters":
        return space.num_parameters(shapes)
    if cost == "flops":
        return space.flops(shapes, sequence_length=128)
    return chain_cost(cost.chain_cost(space.config), space.config.hidden_size, shapes)


def non_dominated(points):
    """The different rows of `points` (n, axes) that no other row equals or beats in all, in order of the first."""
    points = np.unique(points, axis=0)
    as_low = (points[:, None] <= points[None]).all(axis=2)  # [i, j]: i is as low as j
    return points[as_low.sum(axis=0) == 1]  # as low as itself


def brute_force(space, predictor, *costs):
    """Costs and loss of every shape that no other one beats, found by trying all shapes."""
    shapes = all_shapes(space, predictor)
    return non_dominated(
        np.column_stack([*(costs_of(space, shapes, cost) for cost in costs), predictor.predict(shapes)])
    )


def points_of(front):
    return np.column_stack([*front.costs.values(), front.losses])


def assert_costs_and_losses_are_those_of_the_shapes(front, space, predictor, *costs):
    for cost, values in zip(costs, front.costs.values(), strict=True):
        assert values.tolist() == costs_of(space, front.shapes, cost).tolist()
        assert values.dtype.kind == ("i" if isinstance(cost, str) else "f")
    assert front.losses.tolist() == predictor.predict(front.shapes).tolist()


# The front is exact


@pytest.mark.parametrize("dropping", [False, True], ids=["keeping", "dropping"])
@pytest.mark.parametrize("pairs", [False, True], ids=["layers", "pairs"])
@pytest.mark.parametrize("cost", ["parameters", "flops", "latency"])
def test_front_equals_brute_force(cost, pairs, dropping):
    for seed in range(60):
        space, predictor = random_case(seed, pairs=pairs, dropping=dropping)
        cost_of_case = Seconds(space, seed) if cost == "latency" else cost
        front = pareto_front(space, predictor, cost_of_case)
        assert list(front.costs) == [cost]
        expected = brute_force(space, predictor, cost_of_case)
        np.testing.assert_allclose(points_of(front), expected, rtol=0, atol=1e-12)
        assert_costs_and_losses_are_those_of_the_shapes(front, space, predictor, cost_of_case)


@pytest.mark.parametrize("dropping", [False, True], ids=["keeping", "dropping"])
@pytest.mark.parametrize("pairs", [False, True], ids=["layers", "pairs"])
@pytest.mark.parametrize("cost", ["parameters", "flops", "latency"])
def test_front_equals_brute_force_where_shapes_tie(cost, pairs, dropping):
    for seed in range(40):
        space, predictor = random_case(seed, ties=True, pairs=pairs, dropping=dropping)
        cost_of_case = Seconds(space, seed, ties=True) if cost == "latency" else cost
        front = pareto_front(space, predictor, cost_of_case)
        assert points_of(front).tolist() == brute_force(space, predictor, cost_of_case).tolist()
        assert front.losses.tolist() == predictor.predict(front.shapes).tolist()


@pytest.mark.parametrize("ties", [False, True], ids=["all different", "ties"])
@pytest.mark.parametrize("other", ["flops", "latency"])
def test_front_of_two_costs_equals_brute_force(other, ties):
    sizes = []
    for seed in range(60):
        space, predictor = random_case(seed, ties, pairs=seed % 4 < 2, dropping=seed % 3 == 0)
        costs = ["parameters", Seconds(space, seed, ties) if other == "latency" else other]
        if seed % 5 == 0:
            costs = costs[::-1]
        front = pareto_front(space, predictor, costs)
        assert set(front.costs) == {"parameters", other}
        expected = brute_force(space, predictor, *costs)
        np.testing.assert_allclose(points_of(front), expected, rtol=0, atol=1e-12)
        assert_costs_and_losses_are_those_of_the_shapes(front, space, predictor, *costs)
        sizes.append(len(front))
    assert ties or max(sizes) > PAIRWISE  # the halves are merged, too


def test_front_of_two_costs_holds_the_points_of_each_alone():
    both = {tuple(point) for point in points_of(pareto_front(SPACE, FALLING, ["parameters", "flops"])).tolist()}
    parameters = points_of(pareto_front(SPACE, FALLING, "parameters")).tolist()
    flops = points_of(pareto_front(SPACE, FALLING, "flops")).tolist()
    assert {tuple(point) for point in parameters} <= {(count, loss) for count, _, loss in both}
    assert {tuple(point) for point in flops} <= {(operations, loss) for _, operations, loss in both}


def test_costs_keep_the_order_they_are_given_in():
    assert list(pareto_front(SPACE, FALLING, ["flops", "parameters"]).costs) == ["flops", "parameters"]
    assert list(pareto_front(SPACE, FALLING, ("parameters",)).costs) == ["parameters"]


@pytest.mark.parametrize("costs", ["parameters", ["parameters", "flops"]], ids=str)
def test_front_has_increasing_first_costs(costs):
    front = pareto_front(SPACE, FALLING, costs)
    assert len(front) == len(front.shapes) > 10
    assert (np.diff(front.costs["parameters"]) >= 0).all()
    if costs == "parameters":
        assert (np.diff(front.costs["parameters"]) > 0).all()
        assert (np.diff(front.losses) < 0).all()


def test_one_shape_remains_where_narrow_is_always_better():
    predictor = ShapePredictor(SPACE.width_choices, 3.0, np.tile([0.0, 0.1, 0.2, 0.3], (3, 1)))
    assert pareto_front(SPACE, predictor).shapes.tolist() == [SPACE.smallest]


def test_no_front_has_a_shape_without_layers():
    """Even where every layer does harm, one is kept."""
    predictor = ShapePredictor([0, *SPACE.width_choices], 3.0, np.tile([0.0, 0.1, 0.2, 0.3, 0.4], (3, 1)))
    front = pareto_front(SPACE, predictor)
    assert front.shapes.sum(axis=1).tolist() == [8]
    assert predictor.predict(front.shapes)[0] == pytest.approx(3.1)


def test_only_layers_that_were_dropped_in_measurements_are_dropped():
    measured = np.array([[8, 0, 8], [8, 8, 8]])
    effects = np.tile([0.0, 0.1, 0.2, 0.3, 0.4], (3, 1))
    predictor = ShapePredictor(
        [0, *SPACE.width_choices], 3.0, effects, evidence=Evidence(measured, np.ones(2), 1.0, 0.1)
    )
    assert pareto_front(SPACE, predictor).shapes.tolist() == [[8, 0, 8]]


def test_pair_effect_counts_from_the_last_kept_layer():
    """Only the pair (48 before 8) at the last layer helps; the layer between them is dropped."""
    pair_effects = np.zeros((3, 5, 5))
    pair_effects[2, 4, 1] = -1.0
    effects = np.zeros((3, 5))
    effects[:, 0] = [5.0, -0.5, 5.0]
    predictor = ShapePredictor([0, *SPACE.width_choices], 3.0, effects, pair_effects)
    assert pareto_front(SPACE, predictor).best(max_cost=1e9) == [48, 0, 8]


@pytest.mark.parametrize("pairs", [False, True], ids=["layers", "pairs"])
def test_front_of_the_papers_space_keeps_what_random_shapes_cannot_beat(pairs):
    """Too many shapes for brute force: no random shape lies below the front."""
    config = tiny_config(num_hidden_layers=12, width_choices=[8, 16, 20, 28, 36, 40, 48])
    random = np.random.default_rng(0)
    falls = -random.uniform(0.0, 0.2, size=(12, 7)).cumsum(axis=1)
    pair_effects = 0.03 * random.normal(size=(12, 7, 7)) * (np.arange(12) > 0)[:, None, None]
    pair_effects[:, 0] = pair_effects[:, :, 0] = 0
    predictor = ShapePredictor(config.width_choices, 3.0, falls, pair_effects if pairs else None)
    space = SearchSpace.from_config(config)
    front = pareto_front(space, predictor)
    assert front.costs["parameters"].tolist() == space.num_parameters(front.shapes).tolist()
    np.testing.assert_allclose(front.losses, predictor.predict(front.shapes), atol=1e-12)
    near = front.shapes[np.random.default_rng(1).integers(len(front), size=2000)]
    changed = np.where(np.random.default_rng(2).random(near.shape) < 0.1, space.sample(2000, seed=3), near)
    shapes = np.concatenate([space.sample(2000, seed=0), space.sample(2000, seed=0, distribution="budget"), changed])
    position = np.searchsorted(front.costs["parameters"], space.num_parameters(shapes), side="right") - 1
    assert (front.losses[position] <= predictor.predict(shapes) + 1e-12).all()


def test_operations_are_those_of_the_sequence_length():
    short, long = (pareto_front(SPACE, FALLING, "flops", sequence_length=length) for length in (8, 512))
    assert short.costs["flops"].tolist() == SPACE.flops(short.shapes, 8).tolist()
    assert long.costs["flops"].tolist() == SPACE.flops(long.shapes, 512).tolist()


def test_fitted_predictor_is_searched_exactly():
    """Measured shapes in, best shape out: with pairs and dropped layers, as the fit leaves them."""
    shapes = np.concatenate([SPACE.sample(60, seed=0, drop_rate=0.3), SPACE.sample(20, seed=1)])
    shapes[:, 2] = np.where(shapes[:, 2] == 0, 20, shapes[:, 2])
    losses = 4 - shapes @ [0.01, 0.02, 0.03] + 1e-3 * shapes[:, 1] * (shapes[:, 2] == 48)
    predictor = ShapePredictor.fit(shapes, losses, pairs=True)
    assert predictor.droppable == [True, True, False]
    front = pareto_front(SPACE, predictor)
    np.testing.assert_allclose(points_of(front), brute_force(SPACE, predictor, "parameters"), rtol=0, atol=1e-12)


# Rows that no row before them is as low as


def undominated_one_by_one(rows):
    return [not (rows[:i] <= row).all(axis=1).any() for i, row in enumerate(rows)]


@pytest.mark.parametrize("n", [0, 1, 2, PAIRWISE, PAIRWISE + 1, 100, 257, 1000])
@pytest.mark.parametrize("values", [2, 10, 10**9], ids="up to {}".format)
def test_rows_are_compared_with_all_before_them(n, values):
    for seed in range(8):
        random = np.random.default_rng(seed)
        rows = random.integers(values, size=(n, 2)) / 4
        if seed % 2:  # falling, so that many remain
            rows[:, 1] = np.sort(rows[:, 1])[::-1] + random.integers(-1, 2, size=n) * (values < 100)
        assert _undominated(rows).tolist() == undominated_one_by_one(rows)


# The best shape for a budget


@pytest.mark.parametrize("cost", ["parameters", "flops", "latency"])
def test_best_is_the_brute_force_optimum_of_every_budget(cost):
    for seed in range(30):
        space, predictor = random_case(seed, pairs=seed % 2 == 0, dropping=seed % 3 == 0)
        cost_of_case = Seconds(space, seed) if cost == "latency" else cost
        shapes = all_shapes(space, predictor)
        costs, losses = costs_of(space, shapes, cost_of_case), predictor.predict(shapes)
        front = pareto_front(space, predictor, cost_of_case)
        for budget in np.linspace(costs.min() * (1 + 1e-9), costs.max() * 1.1, 9):
            best = np.array([front.best(max_cost=budget)])
            assert costs_of(space, best, cost_of_case)[0] <= budget
            assert predictor.predict(best)[0] == pytest.approx(losses[costs <= budget].min(), abs=1e-12)
            assert front.best(max_cost={cost: budget}) == best[0].tolist()


def test_best_under_two_budgets_is_the_brute_force_optimum():
    for seed in range(30):
        space, predictor = random_case(seed, pairs=seed % 2 == 0, dropping=seed % 3 == 0, max_layers=3)
        seconds = Seconds(space, seed)
        shapes = all_shapes(space, predictor)
        parameters, latency = space.num_parameters(shapes), costs_of(space, shapes, seconds)
        losses = predictor.predict(shapes)
        front = pareto_front(space, predictor, ["parameters", seconds])
        for share in itertools.product([0.0, 0.3, 0.6, 1.0], repeat=2):
            bounds = [np.quantile(values, part) * (1 + 1e-9) for values, part in zip((parameters, latency), share)]
            fits = (parameters <= bounds[0]) & (latency <= bounds[1])
            budget = {"parameters": bounds[0], "latency": bounds[1]}
            if not fits.any():
                with pytest.raises(ValueError, match="at once"):
                    front.best(budget)
                continue
            best = np.array([front.best(budget)])
            assert space.num_parameters(best)[0] <= bounds[0]
            assert costs_of(space, best, seconds)[0] <= bounds[1]
            assert predictor.predict(best)[0] == pytest.approx(losses[fits].min(), abs=1e-12)
            alone = predictor.predict([front.best({"latency": bounds[1]})])[0]
            assert alone == pytest.approx(losses[latency <= bounds[1]].min(), abs=1e-12)


def test_budget_may_be_spent_to_the_last_parameter():
    front = pareto_front(SPACE, FALLING)
    for shape, cost in zip(front.shapes.tolist(), front.costs["parameters"].tolist()):
        assert front.best(max_cost=cost) == shape
    assert front.best(max_cost=int(front.costs["parameters"][1]) - 1) == front.shapes[0].tolist()


@pytest.mark.parametrize("two", [False, True], ids=["one cost", "two costs"])
def test_cost_of_the_front_is_that_of_its_shape_to_the_last_bit(two):
    """Decimal fractions are rounded in every sum, so another order of adding would show in many of these tables."""
    for seed in range(60):
        space, predictor = random_case(seed, pairs=seed % 2 == 0, dropping=seed % 3 == 0)
        seconds = Seconds(space, seed, parts=10**9)
        front = pareto_front(space, predictor, ["parameters", seconds] if two else seconds)
        assert front.costs["latency"].tolist() == costs_of(space, front.shapes, seconds).tolist()
        assert front.losses.tolist() == predictor.predict(front.shapes).tolist()
        for number, shape in enumerate(front.shapes.tolist()):
            budget = {name: float(repr(values[number].item())) for name, values in front.costs.items()}
            assert front.best(budget) == shape


def test_budget_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match=re.escape("max_cost=nan parameters is below the cheapest subnet")):
        pareto_front(SPACE, FALLING).best(float("nan"))


def test_best_shape_is_a_list_of_python_integers():
    best = pareto_front(SPACE, FALLING).best(max_cost=1e12)
    assert best == SPACE.largest
    assert [type(width) for width in best] == [int, int, int]


@pytest.mark.parametrize("cost", ["parameters", "flops"])
def test_budget_below_the_cheapest_names_its_size(cost):
    front = pareto_front(SPACE, FALLING, cost)
    smallest = int(costs_of(SPACE, np.array([SPACE.smallest]), cost)[0])
    unit = {"parameters": "parameters", "flops": "FLOPs"}[cost]
    message = f"max_cost={smallest - 1:,} {unit} is below the cheapest subnet, which has {smallest:,} {unit}. Raise"
    with pytest.raises(ValueError, match=re.escape(message)):
        front.best(max_cost=smallest - 1)


def test_budget_of_seconds_is_named_with_its_digits():
    front = ParetoFront(np.array([[8, 8]]), {"latency": np.array([0.25])}, np.array([2.0]))
    message = "max_cost=0.12345 seconds is below the cheapest subnet, which has 0.25 seconds."
    with pytest.raises(ValueError, match=re.escape(message)):
        front.best(max_cost=0.12345)
    assert front.best(max_cost=0.25) == [8, 8]


def test_front_of_distances_says_so():
    """Its table has no perplexity: the exponential of a distance means nothing."""
    predictor = ShapePredictor(FALLING.width_choices, 1.0, FALLING.effects, measure="distance")
    front = pareto_front(SPACE, predictor)
    assert front.measure == "distance"
    assert pareto_front(SPACE, FALLING).measure == "loss"
    for row, value in zip(front.table(), front.losses.tolist(), strict=True):
        assert set(row) == {"shape", "parameters", "distance"}
        assert row["distance"] == value


TWO = ParetoFront(
    np.array([[8, 48], [48, 8]]),
    {"parameters": np.array([1000, 2000]), "latency": np.array([0.5, 0.25])},
    np.array([2.0, 1.0]),
)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (2000, 'This front has two costs: give max_cost={"parameters": ..., "latency": ...}.'),
        ({"flops": 1}, "Unknown cost(s) ['flops'] in max_cost. This front has ['parameters', 'latency']."),
        ({"parameters": 1000, "latency": 0.3}, "No shape is within all of max_cost={'parameters': 1000, 'latency'"),
        ({"parameters": 5000, "latency": 0.2}, "max_cost=0.2 seconds is below the cheapest subnet, which has 0.25"),
    ],
    ids=str,
)
def test_budgets_that_no_shape_meets_are_refused(budget, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TWO.best(budget)


def test_cost_without_a_bound_is_free():
    assert TWO.best({"parameters": 1500}) == [8, 48]
    assert TWO.best({"latency": 0.3}) == [48, 8]
    assert TWO.best({}) == [48, 8]


# The rest of the interface


@pytest.mark.parametrize("cost", ["flops", ["parameters", "flops"]], ids=str)
def test_table_has_one_record_per_point(cost):
    front = pareto_front(SPACE, FALLING, cost)
    table = front.table()
    assert [row["shape"] for row in table] == front.shapes.tolist()
    assert [row["loss"] for row in table] == front.losses.tolist()
    np.testing.assert_allclose([row["perplexity"] for row in table], np.exp(front.losses))
    for name, values in front.costs.items():
        assert [row[name] for row in table] == values.tolist()
    assert list(table[0]) == ["shape", *front.costs, "loss", "perplexity"]
    assert type(table[0]["flops"]) is int


@pytest.mark.parametrize("cost", ["latency", ["parameters", "latency"]], ids=str)
def test_unknown_cost_is_refused(cost):
    with pytest.raises(ValueError, match=r"Unknown cost 'latency'\. Allowed: 'parameters', 'flops', or a LatencyTable"):
        pareto_front(SPACE, FALLING, cost)


@pytest.mark.parametrize("cost", [[], ["parameters", "flops", Seconds(SPACE, 0)]], ids=len)
def test_front_has_one_or_two_costs(cost):
    message = f"cost has {len(cost)} entries. Allowed: one cost, or a sequence of two."
    with pytest.raises(ValueError, match=re.escape(message)):
        pareto_front(SPACE, FALLING, cost)


@pytest.mark.parametrize("cost", [["flops", "flops"], [Seconds(SPACE, 0), Seconds(SPACE, 1)]], ids=["flops", "latency"])
def test_two_costs_of_one_name_are_refused(cost):
    name = SPACE.terms(cost[0]).name
    with pytest.raises(ValueError, match=f"Both costs are '{name}'. Give it once, or give two different costs"):
        pareto_front(SPACE, FALLING, cost)


@pytest.mark.parametrize(
    ("choices", "layers"),
    [([8, 20, 48], 3), ([8, 20, 36, 44], 3), ([8, 20, 36, 48], 2), ([0, 8, 20, 48], 3)],
    ids=str,
)
def test_predictor_of_another_space_is_refused(choices, layers):
    predictor = ShapePredictor(choices, 3.0, np.zeros((layers, len(choices))))
    kept = [width for width in choices if width]
    message = f"fitted on {layers} layers with the widths {kept}, but the search space has 3 layers with the widths"
    with pytest.raises(ValueError, match=re.escape(message)):
        pareto_front(SPACE, predictor)


def test_space_of_many_widths_has_a_front():
    space = SearchSpace.from_config(
        tiny_config(hidden_size=768, width_choices=list(range(4, 769, 4)), num_hidden_layers=2)
    )
    effects = -np.sqrt(np.array([space.width_choices] * 2)) / 100
    front = pareto_front(space, ShapePredictor(space.width_choices, 3.0, effects))
    assert front.shapes[-1].tolist() == front.best(space.num_parameters(space.largest)) == space.largest
    assert front.costs["parameters"].tolist() == [space.num_parameters(shape) for shape in front.shapes.tolist()]
