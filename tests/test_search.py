import itertools
import re

import numpy as np
import pytest
from conftest import tiny_config

from supershaper_hf import SearchSpace
from supershaper_hf.predictor import ShapePredictor
from supershaper_hf.search import pareto_front


SPACE = SearchSpace(tiny_config())
# Every layer gains with its width, so the front has many points.
FALLING = ShapePredictor(
    SPACE.width_choices, 3.0, -np.array([[0.0, 0.2, 0.3, 0.35], [0.0, 0.1, 0.3, 0.4], [0.0, 0.3, 0.5, 0.8]]), 0.0
)


def random_case(seed, ties=False):
    """A small space and a predictor of it.

    With `ties`, effects are multiples of 1/4: sums are exact, and many shapes share cost and loss.
    """
    generator = np.random.default_rng(seed)
    choices = [4 * int(width) for width in sorted(generator.choice(range(1, 12), generator.integers(0, 4), False))]
    layers = int(generator.integers(1, 5))
    config = tiny_config(
        num_hidden_layers=layers,
        width_choices=[*choices, 48],
        intermediate_size=int(generator.integers(1, 100)),
        tie_word_embeddings=bool(generator.integers(2)),
    )
    effects = generator.normal(size=(layers, len(choices) + 1))
    if ties:
        effects = np.round(effects * 2) / 4
    return SearchSpace(config), ShapePredictor([*choices, 48], 3.0, effects, loo_rmse=0.0)


def costs_of(space, shapes, cost):
    return space.num_parameters(shapes) if cost == "parameters" else space.flops(shapes, sequence_length=128)


def brute_force(space, predictor, cost):
    """Cost and loss of every shape that beats everything cheaper, found by trying all shapes."""
    shapes = np.array(list(itertools.product(space.width_choices, repeat=space.num_layers)))
    points = sorted(zip(costs_of(space, shapes, cost).tolist(), predictor.predict(shapes).tolist()))
    lowest = np.minimum.accumulate([np.inf, *(loss for _, loss in points)])
    return [point for point, before in zip(points, lowest) if point[1] < before]


def points_of(front):
    return list(zip(front.costs.tolist(), front.losses.tolist()))


@pytest.mark.parametrize("cost", ["parameters", "flops"])
def test_front_equals_brute_force(cost):
    for seed in range(200):
        space, predictor = random_case(seed)
        front = pareto_front(space, predictor, cost)
        np.testing.assert_allclose(points_of(front), brute_force(space, predictor, cost), rtol=0, atol=1e-12)


@pytest.mark.parametrize("cost", ["parameters", "flops"])
def test_front_equals_brute_force_where_shapes_tie(cost):
    for seed in range(100):
        space, predictor = random_case(seed, ties=True)
        assert points_of(pareto_front(space, predictor, cost)) == brute_force(space, predictor, cost)


@pytest.mark.parametrize("cost", ["parameters", "flops"])
def test_costs_and_losses_are_those_of_the_shapes(cost):
    for seed in range(50):
        space, predictor = random_case(seed)
        front = pareto_front(space, predictor, cost)
        assert front.costs.tolist() == costs_of(space, front.shapes, cost).tolist()
        np.testing.assert_allclose(front.losses, predictor.predict(front.shapes), rtol=0, atol=1e-12)


def test_front_gains_with_every_cost():
    front = pareto_front(SPACE, FALLING)
    assert len(front) > 10
    assert (np.diff(front.costs) > 0).all()
    assert (np.diff(front.losses) < 0).all()


def test_one_shape_remains_where_narrow_is_always_better():
    predictor = ShapePredictor(SPACE.width_choices, 3.0, np.tile([0.0, 0.1, 0.2, 0.3], (3, 1)), loo_rmse=0.0)
    assert pareto_front(SPACE, predictor).shapes.tolist() == [SPACE.smallest]


def test_front_of_the_papers_space_keeps_what_random_shapes_cannot_beat():
    """Too many shapes for brute force: no random shape lies below the front."""
    config = tiny_config(num_hidden_layers=12, width_choices=[8, 16, 20, 28, 36, 40, 48])
    generator = np.random.default_rng(0)
    falls = -generator.uniform(0.0, 0.2, size=(12, 7)).cumsum(axis=1)
    space, predictor = SearchSpace(config), ShapePredictor(config.width_choices, 3.0, falls, loo_rmse=0.0)
    front = pareto_front(space, predictor)
    shapes = space.sample(2000, seed=0)
    reachable = front.losses[np.searchsorted(front.costs, space.num_parameters(shapes), side="right") - 1]
    assert (reachable <= predictor.predict(shapes) + 1e-12).all()


def test_operations_are_those_of_the_sequence_length():
    short, long = (pareto_front(SPACE, FALLING, "flops", sequence_length=length) for length in (8, 512))
    assert short.costs.tolist() == SPACE.flops(short.shapes, 8).tolist()
    assert long.costs.tolist() == SPACE.flops(long.shapes, 512).tolist()


# The best shape for a budget


def test_best_is_the_brute_force_optimum_of_every_budget():
    for seed in range(30):
        space, predictor = random_case(seed)
        shapes = np.array(list(itertools.product(space.width_choices, repeat=space.num_layers)))
        costs, losses = space.num_parameters(shapes), predictor.predict(shapes)
        front = pareto_front(space, predictor)
        for budget in np.linspace(costs.min(), costs.max(), 7):
            best = front.best(max_cost=budget)
            assert space.num_parameters(best) <= budget
            assert predictor.predict(best)[0] == pytest.approx(losses[costs <= budget].min(), abs=1e-12)


def test_budget_may_be_spent_to_the_last_parameter():
    front = pareto_front(SPACE, FALLING)
    for shape, cost in zip(front.shapes.tolist(), front.costs.tolist()):
        assert front.best(max_cost=cost) == shape
    assert front.best(max_cost=int(front.costs[1]) - 1) == front.shapes[0].tolist()


def test_best_shape_is_a_list_of_python_integers():
    best = pareto_front(SPACE, FALLING).best(max_cost=1e12)
    assert best == SPACE.largest
    assert [type(width) for width in best] == [int, int, int]


@pytest.mark.parametrize("cost", ["parameters", "flops"])
def test_budget_below_the_smallest_names_its_size(cost):
    front = pareto_front(SPACE, FALLING, cost)
    smallest = int(costs_of(SPACE, np.array([SPACE.smallest]), cost)[0])
    message = f"max_cost={smallest - 1:,} {cost} is below the smallest subnet, which has {smallest:,} {cost}. Raise"
    with pytest.raises(ValueError, match=re.escape(message)):
        front.best(max_cost=smallest - 1)


# The rest of the interface


def test_table_has_one_record_per_point():
    front = pareto_front(SPACE, FALLING, cost="flops")
    table = front.table()
    assert len(table) == len(front)
    assert table[0]["shape"] == front.shapes[0].tolist()
    assert table[0]["flops"] == front.costs[0]
    assert table[-1]["perplexity"] == pytest.approx(np.exp(front.losses[-1]))


def test_unknown_cost_is_refused():
    with pytest.raises(ValueError, match=r"Unknown cost 'latency'\. Allowed: 'parameters', 'flops'\."):
        pareto_front(SPACE, FALLING, cost="latency")


@pytest.mark.parametrize(("choices", "layers"), [([8, 20, 48], 3), ([8, 20, 36, 44], 3), ([8, 20, 36, 48], 2)], ids=str)
def test_predictor_of_another_space_is_refused(choices, layers):
    predictor = ShapePredictor(choices, 3.0, np.zeros((layers, len(choices))), loo_rmse=0.0)
    message = f"fitted on {layers} layers with the widths {choices}, but the search space has 3 layers with the widths"
    with pytest.raises(ValueError, match=re.escape(message)):
        pareto_front(SPACE, predictor)
