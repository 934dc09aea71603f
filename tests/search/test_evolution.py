import doctest
import itertools
import json
import re

import numpy as np
import pytest
from conftest import tiny_config

from supershaper_hf import SearchSpace
from supershaper_hf.files import read_json, write_json
from supershaper_hf.model.costs import ChainCost
from supershaper_hf.search import evolution
from supershaper_hf.search.evolution import FORMAT, evolutionary_search
from supershaper_hf.search.pareto import pareto_front
from supershaper_hf.search.predictor import ShapePredictor


SPACE = SearchSpace(tiny_config(num_hidden_layers=4))
MIDDLE = (SPACE.num_parameters(SPACE.smallest) + SPACE.num_parameters(SPACE.largest)) // 2
SMALL = {"population_size": 20, "num_parents": 5, "num_mutations": 15, "num_crossovers": 15, "iterations": 40}


class Falling:
    """Not additive: wide layers gain, and gain more beside a wide one; `twist` makes seeds differ.

    It remembers every shape it was asked for, and raises at call number `fail_at`.
    """

    def __init__(self, seed=0, fail_at=None):
        random = np.random.default_rng(seed)
        self.gain, self.pair = random.uniform(0.1, 1.0, size=8), random.uniform(0.1, 1.0, size=7)
        self.fail_at, self.asked, self.calls = fail_at, [], 0

    def predict(self, shapes):
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("interrupted")
        self.asked.append(shapes.copy())
        relative = shapes / 48
        layers = shapes.shape[1]
        single = (np.sqrt(relative) * self.gain[:layers]).sum(axis=1)
        return 6 - single - (relative[:, 1:] * relative[:, :-1] * self.pair[: layers - 1]).sum(axis=1)


class Seconds:
    """A table whose narrow layers are slow, so that seconds fall while parameters rise."""

    def __init__(self, scale=0.001):
        self.scale = scale

    def chain_cost(self, config):
        return ChainCost(
            "latency",
            fixed=0.5 * self.scale,
            enter=lambda source, width: self.scale * np.ones(np.shape(width)),
            layer=lambda width: self.scale * (60.0 - width),
            leave=lambda width: self.scale * np.ones(np.shape(width)),
        )


def all_shapes(space=SPACE, choices=None):
    return np.array(list(itertools.product(choices or space.width_choices, repeat=space.num_layers)))


def search(constraints=None, predictor=None, space=SPACE, **changes):
    constraints = {"parameters": MIDDLE} if constraints is None else constraints
    return evolutionary_search(space, predictor or Falling(), constraints, **{**SMALL, **changes})


def facts(result):
    return result.shape, result.loss, result.perplexity, result.costs, result.candidates, result.history


# What it finds


def test_finds_the_brute_force_optimum_of_a_predictor_that_is_not_additive():
    shapes = all_shapes()
    sizes, found = SPACE.num_parameters(shapes), 0
    for seed in range(20):
        predictor = Falling(seed)
        optimum = predictor.predict(shapes)[sizes <= MIDDLE].min()
        result = search(predictor=predictor, seed=seed)
        assert result.costs["parameters"] <= MIDDLE
        assert result.loss >= optimum - 1e-12
        found += result.loss <= optimum + 1e-12
    assert found >= 19


def test_finds_the_optimum_under_several_constraints():
    shapes, table, predictor = all_shapes(), Seconds(), Falling(3)
    sizes, operations, losses = SPACE.num_parameters(shapes), SPACE.flops(shapes, 32), predictor.predict(shapes)
    seconds, perplexity = 0.16, 60.0
    bounds = {"parameters": MIDDLE, "flops": int(np.median(operations)), "latency": seconds, "perplexity": perplexity}
    latencies = 0.001 * (0.5 + 4 + (60.0 - shapes).sum(axis=1) + 1)
    fits = (sizes <= MIDDLE) & (operations <= bounds["flops"]) & (latencies <= seconds) & (np.exp(losses) <= perplexity)
    assert 0 < fits.sum() < len(shapes) / 4
    result = search(bounds, predictor, latency=table, sequence_length=32)
    assert result.loss == pytest.approx(losses[fits].min(), abs=1e-12)


@pytest.mark.parametrize("cost", ["parameters", "flops", "latency"])
def test_minimises_a_cost_under_a_bound_on_perplexity(cost):
    shapes, predictor = all_shapes(), Falling(1)
    perplexities = np.exp(predictor.predict(shapes))
    bound = float(np.quantile(perplexities, 0.3))
    values = {
        "parameters": SPACE.num_parameters(shapes),
        "flops": SPACE.flops(shapes, 128),
        "latency": 0.001 * (5.5 + (60.0 - shapes).sum(axis=1)),
    }
    result = search({"perplexity": bound}, predictor, minimize=cost, latency=Seconds())
    assert result.perplexity <= bound
    assert result.costs[cost] == pytest.approx(values[cost][perplexities <= bound].min(), rel=1e-12)


def test_fitter_is_lower():
    """The 2021 search maximised perplexity for weeks."""
    assert search({}).shape == SPACE.largest  # the lowest loss, and nothing is bounded
    assert search({}, minimize="parameters").shape == SPACE.smallest
    assert search({}, minimize="flops").shape == SPACE.smallest
    assert search({}, minimize="latency", latency=Seconds()).shape == SPACE.largest


def test_loss_of_the_best_never_rises_once_it_is_feasible():
    history = search().history
    losses = [record["loss"] for record in history if record["violation"] == 0]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_bounds_are_upper_bounds_that_may_be_reached():
    largest = SPACE.num_parameters(SPACE.largest)
    assert search({"parameters": largest}).shape == SPACE.largest
    assert search({"parameters": largest - 1}).shape != SPACE.largest
    assert search({"parameters": SPACE.num_parameters(SPACE.smallest)}).shape == SPACE.smallest
    exact = search({"perplexity": search({}).perplexity}, minimize="parameters")
    assert exact.shape == SPACE.largest


def test_the_smallest_shape_is_found_in_a_large_space():
    """Random shapes would all exceed a budget this tight, and so would their children."""
    space = SearchSpace(tiny_config(num_hidden_layers=8))
    assert (
        search({"parameters": space.num_parameters(space.smallest)}, space=space, iterations=1).shape == space.smallest
    )
    assert search({}, space=space, iterations=1).shape == space.largest


def test_evolves_towards_constraints_that_no_initial_shape_meets():
    """Small in parameters and short in seconds exclude each other in this table, but for a few shapes."""
    space = SearchSpace(tiny_config(num_hidden_layers=8))
    shapes = space.sample(20_000, seed=1)
    sizes = space.num_parameters(shapes)
    seconds = 0.001 * (9.5 + (60.0 - shapes).sum(axis=1))
    bounds = {"parameters": float(np.median(sizes)), "latency": float(seconds[sizes <= np.median(sizes)].min())}
    result = search(bounds, space=space, latency=Seconds(), iterations=100)
    violations = [record["violation"] for record in result.history]
    assert violations[0] > 0
    assert violations == sorted(violations, reverse=True)
    assert violations[-1] == 0
    assert result.costs["latency"] <= bounds["latency"]


def test_the_nearest_shape_is_near_in_all_constraints_together():
    """Neither bound can be met together with the other: the end is the least sum of relative violations."""
    shapes, predictor = all_shapes(), Falling()
    sizes, perplexities = SPACE.num_parameters(shapes), np.exp(predictor.predict(shapes))
    bounds = {"parameters": float(np.quantile(sizes, 0.2)), "perplexity": float(np.quantile(perplexities, 0.05))}
    excess = np.maximum(sizes / bounds["parameters"] - 1, 0) + np.maximum(perplexities / bounds["perplexity"] - 1, 0)
    with pytest.raises(ValueError, match=re.escape(f"The nearest, {shapes[excess.argmin()].tolist()}, misses")):
        search(bounds, predictor)


# How it goes about it


def test_the_same_seed_gives_the_same_result_and_another_does_not():
    assert facts(search(seed=3)) == facts(search(seed=3))
    assert search(seed=3).history != search(seed=4).history


def test_the_initial_population_is_drawn_from_the_seed():
    predictors = [Falling(), Falling(), Falling()]
    for seed, predictor in zip((0, 0, 1), predictors):
        search(predictor=predictor, seed=seed, iterations=1)
    first = [set(map(tuple, predictor.asked[0].tolist())) for predictor in predictors]
    assert first[0] == first[1] != first[2]


def test_iterations_draw_from_the_seed():
    """All mutants come from one parent, the smallest shape: what differs is drawn after the initial population."""
    children = []
    for seed in (0, 1):
        predictor = Falling()
        search({}, predictor, minimize="parameters", seed=seed, num_parents=1, num_crossovers=0, iterations=1)
        children.append(set(map(tuple, predictor.asked[1].tolist())))
    assert len(children[0] & children[1]) < len(children[0]) / 2


def test_the_initial_population_is_of_all_sizes():
    space, predictor = SearchSpace(tiny_config(num_hidden_layers=12)), Falling()
    predictor.gain, predictor.pair = np.ones(12), np.ones(11)
    search({}, predictor, space, population_size=200, iterations=1)
    counts = space.num_parameters(predictor.asked[0])
    low, high = space.num_parameters(space.smallest), space.num_parameters(space.largest)
    assert np.histogram((counts - low) / (high - low), 5)[0].min() > 20


def test_the_initial_population_drops_layers_if_asked_for():
    predictor = Falling()
    search(predictor=predictor, drop_rate=0.3, iterations=1)
    assert (predictor.asked[0] == 0).mean() > 0.1


def test_the_order_of_constraints_does_not_matter():
    forth = search({"parameters": MIDDLE, "perplexity": 300.0})
    assert facts(forth) == facts(search({"perplexity": 300.0, "parameters": MIDDLE}))


def test_no_shape_is_asked_for_twice_while_it_is_in_the_population():
    predictor = Falling()
    result = search({}, predictor, population_size=300)  # holds all 256 shapes
    asked = np.concatenate(predictor.asked)
    assert len(np.unique(asked, axis=0)) == len(asked) == result.candidates <= SPACE.size
    assert len(asked) > 200


def test_every_call_asks_for_distinct_shapes_and_all_are_counted():
    predictor = Falling()
    result = search(predictor=predictor)
    assert all(len(np.unique(shapes, axis=0)) == len(shapes) for shapes in predictor.asked)
    assert result.candidates == sum(len(shapes) for shapes in predictor.asked)


def test_a_space_of_one_shape_is_searched_at_once():
    space = SearchSpace(tiny_config(width_choices=[48]))
    predictor = Falling()
    result = search({}, predictor, space=space)
    assert (result.shape, result.candidates, predictor.calls) == ([48, 48, 48], 1, 1)


def test_history_has_a_record_of_every_iteration():
    predictor = Falling()
    result = search({"parameters": MIDDLE, "perplexity": 300.0}, predictor, iterations=7)
    assert [record["iteration"] for record in result.history] == list(range(8))
    candidates = [record["candidates"] for record in result.history]
    assert candidates == sorted(candidates)
    assert candidates[0] == len(predictor.asked[0])
    assert candidates[-1] == result.candidates
    assert result.history[-1] == {
        "iteration": 7,
        "candidates": result.candidates,
        "violation": 0.0,
        "loss": result.loss,
        "parameters": result.costs["parameters"],
        "perplexity": result.perplexity,
    }


def test_result_tells_all_costs_in_python_numbers():
    result = search(latency=Seconds(), sequence_length=16)
    assert SPACE.validate(result.shape) == result.shape
    assert result.costs["parameters"] == SPACE.num_parameters(result.shape)
    assert result.costs["flops"] == SPACE.flops(result.shape, 16)
    assert result.costs["latency"] == pytest.approx(0.001 * (5.5 + sum(60 - width for width in result.shape)))
    assert [type(value) for value in result.costs.values()] == [int, int, float]
    assert [type(width) for width in result.shape] == [int] * 4
    assert result.perplexity == pytest.approx(np.exp(result.loss))
    assert list(search().costs) == ["parameters", "flops"]


def test_mutation_alone_and_crossover_alone_go_on_finding():
    for changes in ({"num_crossovers": 0, "num_parents": 1}, {"num_mutations": 0}):
        history = search(**changes, iterations=10).history
        assert history[-1]["candidates"] > history[0]["candidates"]
        assert history[-1]["loss"] < history[0]["loss"]


def test_mutation_redraws_the_given_share_of_widths():
    space = SearchSpace(tiny_config(num_hidden_layers=8))
    changed = {}
    for rate in (0.1, 0.9):
        predictor = Falling()
        search({}, predictor, space=space, iterations=1, num_parents=1, num_mutations=500, num_crossovers=0,
               mutation_rate=rate, minimize="parameters")  # fmt: skip
        changed[rate] = (predictor.asked[1] != space.smallest).mean()  # the parent
    assert changed[0.9] == pytest.approx(0.9 * 3 / 4, abs=0.03)
    assert changed[0.1] < 0.25  # copies of the parent are left out, which raises the share


def test_crossover_takes_widths_from_both_parents_alone():
    """The two parents share no width, so their children show whose each is."""
    space = SearchSpace(tiny_config(num_hidden_layers=8))
    predictor = Falling()
    search({}, predictor, space=space, population_size=2, num_parents=2, iterations=1, num_mutations=0,
           num_crossovers=200)  # fmt: skip
    assert set(predictor.asked[1].ravel()) == {8, 48}
    assert (predictor.asked[1] == 48).mean() == pytest.approx(0.5, abs=0.05)


def test_parents_are_the_fittest():
    """With one parent, each new shape shares most layers with the best so far."""
    space = SearchSpace(tiny_config(num_hidden_layers=8))
    predictor = Falling()
    search({}, predictor, space=space, num_parents=1, num_crossovers=0, mutation_rate=0.05, iterations=3)
    for shapes in predictor.asked[1:]:
        assert ((shapes == 48).sum(axis=1) >= 5).all()


# Dropped layers


def test_layers_are_dropped_only_if_asked_for():
    predictor, dropping = Falling(), Falling()
    search(predictor=predictor)
    search(predictor=dropping, drop_rate=0.3)
    assert not (np.concatenate(predictor.asked) == 0).any()
    assert (np.concatenate(dropping.asked) == 0).mean() > 0.1


def test_finds_the_optimum_where_layers_may_be_dropped():
    shapes = all_shapes(choices=[0, *SPACE.width_choices])[1:]
    bound = (SPACE.num_parameters([8, 0, 0, 0]) + SPACE.num_parameters(SPACE.smallest)) // 2
    for seed in range(5):
        predictor = Falling(seed)
        losses = predictor.predict(shapes)[SPACE.num_parameters(shapes) <= bound]
        result = search({"parameters": bound}, predictor, drop_rate=0.3, seed=seed)
        assert result.loss == pytest.approx(losses.min(), abs=1e-12)


def test_a_shape_never_loses_every_layer():
    predictor = Falling()
    result = search({}, predictor, minimize="parameters", drop_rate=0.9)
    assert np.concatenate(predictor.asked).any(axis=1).all()
    assert sorted(result.shape) == [0, 0, 0, 8]


def test_predictor_that_knows_no_dropped_layers_is_refused():
    predictor = Falling()
    predictor.width_choices = SPACE.width_choices
    assert search(predictor=predictor).shape
    message = "drop_rate=0.2 drops layers, but the predictor knows only the widths [8, 20, 36, 48]. Fit it on shapes"
    with pytest.raises(ValueError, match=re.escape(message)):
        search(predictor=predictor, drop_rate=0.2)
    predictor.width_choices = [0, *SPACE.width_choices]
    assert search(predictor=predictor, drop_rate=0.2).shape


def test_only_layers_that_the_predictor_has_seen_dropped_are_dropped():
    """As in `pareto_front`, whose front holds the optimum."""
    shapes = all_shapes(choices=[0, *SPACE.width_choices])[1:]
    shapes = shapes[(shapes[:, [0, 2]] > 0).all(axis=1)]
    losses = 6 - np.sqrt(shapes / 48) @ [0.9, 0.1, 0.3, 0.2]
    predictor = ShapePredictor.fit(shapes, losses)
    assert predictor.droppable == [False, True, False, True]
    bound = SPACE.num_parameters([8, 8, 8, 8]) - 1
    result = search({"parameters": bound}, predictor, drop_rate=0.3)
    assert result.shape == pareto_front(SPACE, predictor).best(bound)
    assert search({}, predictor, drop_rate=0.9, minimize="parameters").shape == [8, 0, 8, 0]
    with pytest.raises(ValueError, match=r"is below the smallest subnet"):
        search({"parameters": SPACE.num_parameters([8, 0, 8, 0]) - 1}, predictor, drop_rate=0.3)
    with pytest.raises(ValueError, match="The predictor knows 4 layers, but the search space has 5"):
        search({}, predictor, drop_rate=0.3, space=SearchSpace(tiny_config(num_hidden_layers=5)))


def test_example():
    results = doctest.testmod(evolution)
    assert (results.failed, results.attempted) == (0, 7)


# Constraints that cannot be met


@pytest.mark.parametrize("drop_rate", [0.0, 0.2])
@pytest.mark.parametrize("cost", ["parameters", "flops"])
def test_bound_below_the_smallest_shape_is_refused_at_once(cost, drop_rate):
    smallest = [8, 0, 0, 0] if drop_rate else SPACE.smallest
    least = SPACE.num_parameters(smallest) if cost == "parameters" else SPACE.flops(smallest, 64)
    predictor = Falling()
    message = f"constraints['{cost}']={least - 1:,} is below the smallest subnet, which has {least:,} {cost}. Raise"
    with pytest.raises(ValueError, match=re.escape(message)):
        search({cost: least - 1}, predictor, sequence_length=64, drop_rate=drop_rate)
    assert predictor.calls == 0
    result = search({cost: least}, sequence_length=64, drop_rate=drop_rate)
    assert result.costs[cost] == least


def test_constraint_that_nothing_meets_is_named_with_the_best_value():
    best = float(np.exp(Falling().predict(np.array([SPACE.largest]))[0]))
    message = (
        rf"No shape met the constraints after 40 iterations \([\d,]+ candidates\)\. The nearest, \[48, 48, 48, 48\], "
        rf"misses perplexity: {best:.6g}, 100 % above the bound {best / 2:.6g}\. Raise a bound, or search for more"
    )
    with pytest.raises(ValueError, match=message):
        search({"perplexity": best / 2, "parameters": 1e9})


def test_every_constraint_that_the_nearest_shape_misses_is_named():
    message = r"misses parameters: [\d,]+, [\d.]+ % above the bound [\d,]+; perplexity: [\d.]+, [\d.]+ % above"
    size = SPACE.num_parameters([8, 8, 8, 20])
    shapes = all_shapes()
    sizes, losses = SPACE.num_parameters(shapes), Falling().predict(shapes)
    with pytest.raises(ValueError, match=message):
        search({"perplexity": float(np.exp(np.median(losses))), "parameters": (size + sizes.min()) / 2, "flops": 1e12})


def test_huge_losses_do_not_overflow():
    class Huge:
        def predict(self, shapes):
            return 1000.0 + shapes.sum(axis=1)

    with pytest.raises(ValueError, match="misses perplexity"):
        search({"perplexity": 8.0}, Huge())
    assert search({}, Huge()).perplexity > 1e300


# Checkpoints


@pytest.mark.parametrize("fail_at", [1, 2, 9, 17, 30, 41])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, fail_at):
    file = tmp_path / "new" / "search.json"
    whole = search()
    with pytest.raises(RuntimeError, match="interrupted"):
        search(predictor=Falling(fail_at=fail_at), checkpoint=file, checkpoint_steps=5)
    if fail_at > 8:
        assert json.loads(file.read_text())["history"]
    resumed = Falling()
    assert facts(search(predictor=resumed, checkpoint=file, checkpoint_steps=5)) == facts(whole)
    assert resumed.calls <= 41 - 5 * ((fail_at - 3) // 5)  # iterations before the checkpoint are not run again
    assert {path.name for path in file.parent.iterdir()} == {"search.json", ".search.json.lock"}


def test_resumes_with_several_measures_and_dropped_layers(tmp_path):
    arguments = {
        "constraints": {"parameters": MIDDLE, "latency": 0.2, "perplexity": 300.0},
        "latency": Seconds(),
        "minimize": "flops",
        "drop_rate": 0.1,
        "seed": np.int64(5),
    }
    whole = search(**arguments)
    file = tmp_path / "search.json"
    search(**arguments, checkpoint=file, iterations=13)
    assert facts(search(**arguments, checkpoint=str(file))) == facts(whole)


class Distances(Falling):
    measure = "distance"


def test_distances_are_searched_as_losses_are(tmp_path):
    """In the same numbers, by other names."""
    of_losses, file = search({"parameters": MIDDLE}), tmp_path / "search.json"
    found = search({"parameters": MIDDLE}, Distances(), checkpoint=file)
    assert (found.shape, found.distance) == (of_losses.shape, of_losses.loss)
    assert (found.loss, found.perplexity, of_losses.distance) == (None, None, None)
    assert found.history[-1]["distance"] == of_losses.history[-1]["loss"]
    assert search({"parameters": MIDDLE}, Distances(), checkpoint=file) == found
    bound = found.distance + 0.5
    small = search({"distance": bound}, Distances(), minimize="parameters")
    assert small.distance <= bound
    assert small.costs["parameters"] < found.costs["parameters"]


@pytest.mark.parametrize(
    ("predictor", "arguments", "message"),
    [
        (
            Distances(),
            {"minimize": "loss"},
            "predicts a distance, so the loss of a shape is unknown. Minimise 'distance'",
        ),
        (Distances(), {"constraints": {"perplexity": 9.0}}, "so the perplexity of a shape is unknown"),
        (
            Falling(),
            {"minimize": "distance"},
            "predicts a loss, so the distance of a shape is unknown. Minimise 'loss'",
        ),
        (
            Falling(),
            {"constraints": {"distance": 0.5}},
            "constrain 'perplexity' instead, or fit a predictor on distances",
        ),
    ],
)
def test_what_the_predictor_does_not_predict_is_refused(predictor, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        search(predictor=predictor, **arguments)


def test_finished_search_is_read_from_its_checkpoint(tmp_path):
    file = tmp_path / "search.json"
    first = search(checkpoint=file)
    again = Falling()
    assert facts(search(predictor=again, checkpoint=file)) == facts(first)
    assert again.calls == 1  # the probe


def test_unreachable_constraints_are_reported_again_from_the_checkpoint(tmp_path):
    for _ in range(2):
        with pytest.raises(ValueError, match="misses perplexity"):
            search({"perplexity": 1.0}, checkpoint=tmp_path / "search.json")
    assert (tmp_path / "search.json").exists()


def test_checkpoint_is_written_every_few_iterations_and_at_the_end(tmp_path):
    file = tmp_path / "search.json"
    seen = []

    class Watching(Falling):
        def predict(self, shapes):
            seen.append(len(json.loads(file.read_text())["history"]) - 1 if file.exists() else None)
            return super().predict(shapes)

    search(predictor=Watching(), checkpoint=file, checkpoint_steps=3, iterations=8)
    assert {step for step in seen if step is not None} == {3, 6}
    assert len(json.loads(file.read_text())["history"]) == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"constraints": {"parameters": MIDDLE + 1}}, f"constraints was {{'parameters': {MIDDLE}.0}} and is"),
        ({"minimize": "flops"}, "minimize was 'loss' and is 'flops'"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"num_mutations": 14}, "num_mutations was 15 and is 14"),
        ({"num_crossovers": 14}, "num_crossovers was 15 and is 14"),
        ({"num_parents": 4}, "num_parents was 5 and is 4"),
        ({"population_size": 21}, "population_size was 20 and is 21"),
        ({"mutation_rate": 0.5}, "mutation_rate was 0.4 and is 0.5"),
        ({"drop_rate": 0.5}, "drop_rate was 0.0 and is 0.5"),
        ({"sequence_length": 64}, "sequence_length was 128 and is 64"),
        ({"predictor": Falling(1)}, "the predictor gives other values for the same shapes"),
        ({"space": SearchSpace(tiny_config(num_hidden_layers=5))}, "num_layers was 4 and is 5"),
        (
            {"space": SearchSpace(tiny_config(num_hidden_layers=4, width_choices=[8, 48]))},
            "width_choices was [8, 20, 36, 48] and is [8, 48]",
        ),
        (
            {"space": SearchSpace(tiny_config(num_hidden_layers=4, vocab_size=62))},
            "the parameters gives other values for the same shapes",
        ),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_checkpoint_of_another_search_is_refused(tmp_path, changes, message):
    file = tmp_path / "search.json"
    search(checkpoint=file)
    before = file.read_bytes()
    with pytest.raises(ValueError, match="of another search: .*" + re.escape(message)):
        search(**{"checkpoint": file, **changes})
    assert file.read_bytes() == before


def test_checkpoint_of_another_latency_table_is_refused(tmp_path):
    arguments = {"constraints": {"latency": 0.2}, "checkpoint": tmp_path / "search.json"}
    search(**arguments, latency=Seconds())
    with pytest.raises(ValueError, match="the latency gives other values for the same shapes"):
        search(**arguments, latency=Seconds(0.0011))


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of a small search, which is `SHORT`."""
    search(**SHORT, checkpoint=tmp_path / "search.json")
    return tmp_path / "search.json"


SHORT = {"iterations": 1, "population_size": 2, "num_parents": 2}


@pytest.mark.parametrize(
    "damage",
    [
        lambda good: b"",
        lambda good: good[: len(good) // 2],
        lambda good: b"[]",
        lambda good: b"{}",
        lambda good: b"3",
        lambda good: b'{"digest": "x"}',
        lambda good: b"\xff\xfe",
        lambda good: b"[" * 100_000,
        lambda good: b'{"settings": ' * 100_000,
        lambda good: good.replace(b"evolution 1", b"evolution 2"),
        lambda good: good.replace(b'"seed": 0', b'"seed": NaN'),
    ],
)
def test_damaged_checkpoint_is_refused(checkpoint, damage):
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(checkpoint))} is "):
        search(**SHORT, checkpoint=checkpoint)


def test_no_changed_byte_of_a_checkpoint_gives_another_result(checkpoint):
    """Whatever one byte becomes: the same result, or a refusal that names the file."""
    expected, good, harmless = facts(search(**SHORT)), checkpoint.read_bytes(), 0
    for position, byte in enumerate(good):
        changed = byte ^ 0x01 if position % 2 else ord("\n")
        checkpoint.write_bytes(good[:position] + bytes([changed]) + good[position + 1 :])
        try:
            harmless += facts(search(**SHORT, checkpoint=checkpoint)) == expected
        except ValueError as error:
            harmless += str(error).startswith(str(checkpoint))
    assert harmless == len(good)


@pytest.mark.parametrize(
    "change",
    [
        {"settings": 3},
        {"picks": None},
        {"picks": []},
        {"picks": [[0, 1, 2, 4]]},
        {"picks": [[0, 1, 2, -1]]},
        {"picks": [[0, 1, 2, 10**30]]},
        {"picks": [[0, 1, 2]]},
        {"picks": [[0, 1, 2], [0]]},
        {"picks": [[0.0, 1.0, 2.0, 3.0]]},
        {"picks": [[0, 1, 2, True]]},
        {"picks": [[0, 1, 2, 3]]},  # the values are of more shapes
        {"values": [[1.0, "2"]]},
        {"values": 1.0},
        {"probe": [[1.0]]},
        {"history": []},
        {"history": {}},
        {"history": [3]},
        {"history": [{"iteration": 0}]},
        {"history": [dict.fromkeys(["iteration", "candidates", "violation", "loss", "parameters"], "1")]},
    ],
    ids=str,
)
def test_checkpoint_of_other_types_is_refused(checkpoint, change):
    """Also where somebody has written the right checksum."""
    write_json(checkpoint, FORMAT, read_json(checkpoint, FORMAT) | change)
    with pytest.raises(
        ValueError, match=re.escape(f"{checkpoint} is damaged, or is not a checkpoint of this search space.")
    ):
        search(**SHORT, checkpoint=checkpoint)


def test_a_second_search_on_the_same_checkpoint_is_told_so_and_stops(tmp_path):
    file, told = tmp_path / "search.json", []

    class Meanwhile(Falling):
        def predict(self, shapes):
            with pytest.raises(RuntimeError, match=re.escape(f"{file} is in use by another run.")):
                search(checkpoint=file)
            told.append(file.exists())
            return super().predict(shapes)

    result = search(predictor=Meanwhile(), checkpoint=file, iterations=3, checkpoint_steps=1)
    assert told[0] is False  # from the first shapes on
    assert told[-1] is True
    assert facts(result) == facts(search(checkpoint=file, iterations=3))


def test_fewer_iterations_than_the_checkpoint_has_are_refused(tmp_path):
    file = tmp_path / "search.json"
    search(checkpoint=file)
    message = f"{file} is a checkpoint of iteration 40, beyond iterations=39. Ask for at least 40, or"
    with pytest.raises(ValueError, match=re.escape(message)):
        search(checkpoint=file, iterations=39)


# What is refused


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        (
            {"params": 1e6},
            "Unknown constraint 'params'. Allowed: 'parameters', 'flops', 'latency', 'perplexity', 'distance', ",
        ),
        ({"loss": 2.0}, "Unknown constraint 'loss'. Allowed"),
        ({"parameters": 0}, "constraints['parameters']=0 must be a finite number above 0."),
        ({"flops": -1.0}, "constraints['flops']=-1.0 must be"),
        ({"perplexity": float("nan")}, "constraints['perplexity']=nan must be"),
        ({"perplexity": float("inf")}, "constraints['perplexity']=inf must be"),
        ({"perplexity": "8"}, "constraints['perplexity']='8' must be"),
        ({"perplexity": True}, "constraints['perplexity']=True must be"),
        ({"latency": 0.1}, "but not known. Pass latency=LatencyTable(...)"),
        ([("parameters", 1e6)], 'must map names to upper bounds, such as {"parameters": 63e6}'),
    ],
    ids=str,
)
def test_bad_constraints_are_refused(constraints, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        search(constraints)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"minimize": "perplexity"},
            "minimize='perplexity' is unknown. Allowed: 'loss', 'distance', 'task_loss', 'parameters', ",
        ),
        ({"minimize": "latency"}, "but not known. Pass latency=LatencyTable(...)"),
        ({"latency": "parameters"}, "latency='parameters' must be a LatencyTable, or have its method chain_cost"),
        ({"sequence_length": 0}, "sequence_length=0 must be an integer of at least 1."),
        ({"population_size": 1, "num_parents": 1}, "population_size=1 must be an integer of at least 2."),
        ({"population_size": 20.0}, "population_size=20.0 must be an integer"),
        ({"num_parents": 0}, "num_parents=0 must be an integer of at least 1."),
        ({"num_parents": 21}, "num_parents=21 cannot be chosen from population_size=20. Use fewer parents"),
        ({"num_parents": 1}, "num_crossovers=15 needs two parents. Use num_parents of at least 2, or"),
        ({"num_mutations": -1}, "num_mutations=-1 must be an integer of at least 0."),
        ({"num_crossovers": -1}, "num_crossovers=-1 must be an integer of at least 0."),
        ({"num_mutations": 0, "num_crossovers": 0}, "make no new shapes. Raise at least one"),
        ({"mutation_rate": 0.0}, "mutation_rate=0.0 must be a finite number above 0 and at most 1."),
        ({"mutation_rate": 1.1}, "mutation_rate=1.1 must be a finite number above 0 and at most 1."),
        ({"mutation_rate": float("nan")}, "mutation_rate=nan must be"),
        ({"drop_rate": 1.0}, "drop_rate=1.0 must be a finite number at least 0 and below 1."),
        ({"drop_rate": -0.1}, "drop_rate=-0.1 must be"),
        ({"drop_rate": "0.1"}, "drop_rate='0.1' must be"),
        ({"mutation_rate": "0.1"}, "mutation_rate='0.1' must be"),
        ({"seed": "0"}, "seed='0' must be an integer"),
        ({"seed": -1}, "seed=-1 must be an integer of at least 0."),
        ({"iterations": 0}, "iterations=0 must be an integer of at least 1."),
        ({"iterations": True}, "iterations=True must be an integer"),
        ({"checkpoint_steps": 0}, "checkpoint_steps=0 must be an integer of at least 1."),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        search(**changes)


def test_predictions_that_are_no_losses_are_refused():
    class Column(Falling):
        def predict(self, shapes):
            return super().predict(shapes)[:, None]

    class Undefined(Falling):
        def predict(self, shapes):
            return np.where((shapes == 48).all(axis=1), np.nan, super().predict(shapes))

    class Text(Falling):
        def predict(self, shapes):
            return super().predict(shapes).astype(str)

    with pytest.raises(ValueError, match=r"returned float64 \(\d+, 1\) for shapes \(\d+, 4\)\. It must return one num"):
        search(predictor=Column())
    with pytest.raises(ValueError, match=r"returned <U32 \(\d+,\) for shapes \(\d+, 4\)\. It must return one number"):
        search(predictor=Text())
    with pytest.raises(ValueError, match=r"returned a loss of nan for the shape \[48, 48, 48, 48\]\. Losses must be"):
        search(predictor=Undefined())
