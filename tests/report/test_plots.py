import itertools
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.image import imread

from supershaper_hf import ParetoFront
from supershaper_hf.report.plots import (
    AXES,
    DPI,
    new_figure,
    plot_agreement,
    plot_evaluations,
    plot_front,
    plot_measured,
    plot_profile,
)
from supershaper_hf.search.profile import Profile


COSTS = {"parameters": 1e6 * np.arange(30, 70, 5), "flops": 1e9 * np.arange(1, 9), "latency": 1e-3 * np.arange(5, 13)}
PERPLEXITIES = np.linspace(20, 6, 8)
NAMED = {f"shape_{i}": (45e6 + 1e6 * i, 12.0) for i in range(12)}
PARTS = {
    "measured": [(35e6, 18.0), (50e6, 12.0)],
    "chosen": [(40e6, 16.0), (60e6, 9.0)],
    "named": {"supershaper": (55e6, 10.0), "lower_triangle": (55e6, 12.0)},
}


def read(file):
    """The pixels of a PNG, which must be large enough to read and not blank."""
    assert file.read_bytes().startswith(b"\x89PNG")
    pixels = imread(file)
    assert min(pixels.shape[:2]) > 250
    assert 0.005 < (pixels[..., :3] < 0.9).any(axis=2).mean() < 0.5
    return pixels


def make_front(cost="parameters", costs=COSTS["parameters"], perplexities=PERPLEXITIES, two_costs=False):
    """A front with made-up points. With `two_costs`, a second cost falls while the first one rises."""
    both = {cost: costs, **({"latency": 1 / costs} if two_costs else {})}
    return ParetoFront(np.full((len(costs), 2), 8), both, np.log(perplexities))


def front(folder, cost="parameters", costs=COSTS["parameters"], perplexities=PERPLEXITIES, two_costs=False, **parts):
    plot_front(folder / "front.png", make_front(cost, costs, perplexities, two_costs), **parts)
    return read(folder / "front.png")


@pytest.fixture
def figures(monkeypatch):
    """Axes of the figures that are drawn, so that tests can look at what is in them."""
    drawn = []

    def remember(*size):
        figure, axes = new_figure(*size)
        drawn.append(axes)
        return figure, axes

    monkeypatch.setattr("supershaper_hf.report.plots.new_figure", remember)
    return drawn


# Cost against perplexity


def test_front_is_a_staircase_of_one_cost_and_dots_of_two(tmp_path, figures):
    front(tmp_path)
    front(tmp_path, two_costs=True)
    one, two = (axes.get_lines()[0] for axes in figures)
    assert one.get_drawstyle() == "steps-post"
    assert (two.get_linestyle(), two.get_marker()) == ("None", ".")


@pytest.mark.parametrize("cost", COSTS)
def test_front_of_each_cost_is_drawn_in_its_unit(cost, tmp_path, figures):
    front(tmp_path, cost, COSTS[cost])
    (axes,) = figures
    label, _, suffix = AXES[cost]
    assert axes.get_xlabel() == label
    ticks = [text.get_text() for text in axes.get_xticklabels()]
    assert all(tick.endswith(suffix) for tick in ticks)
    values = [float(tick.removesuffix(suffix)) for tick in ticks]
    np.testing.assert_allclose(values, axes.get_xticks() / AXES[cost][1], rtol=1e-5)


def test_large_numbers_are_written_out(tmp_path, figures):
    """A perplexity of two millions is 2,000,000 on its axis, not 2e+06; so are parameters beyond a million millions."""
    front(tmp_path, costs=1e6 * np.array([1e6, 3e6]), perplexities=np.array([2e6, 1e6]))
    (axes,) = figures
    texts = [text.get_text() for text in (*axes.get_xticklabels(), *axes.get_yticklabels(which="both"))]
    assert "1,000,000 M" in texts
    assert "2,000,000" in texts
    assert not any("e+" in text for text in texts)


def test_every_cost_of_a_front_has_a_label():
    assert set(AXES) == {"parameters", "flops", "latency"}


def test_front_is_drawn_with_and_without_each_part(tmp_path):
    choices = [parts for n in range(4) for parts in itertools.combinations(PARTS, n)]
    pictures = {front(tmp_path, **{part: PARTS[part] for part in parts}).tobytes() for parts in choices}
    assert len(pictures) == 8  # each part shows


def test_parts_may_be_arrays(tmp_path):
    arrays = front(tmp_path, measured=np.array(PARTS["measured"]), chosen=np.array(PARTS["chosen"]))
    lists = front(tmp_path, measured=PARTS["measured"], chosen=PARTS["chosen"])
    assert np.array_equal(arrays, lists)
    front(tmp_path, measured=np.empty((0, 2)), chosen=np.empty((0, 2)), named={})


def test_every_part_is_drawn_at_its_points(tmp_path, figures):
    front(tmp_path, **PARTS)
    (axes,) = figures
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    expected = np.column_stack([COSTS["parameters"], PERPLEXITIES])
    np.testing.assert_allclose(lines["predicted Pareto front (exact)"], expected, rtol=1e-12)
    assert lines["2 measured shapes"] == [list(point) for point in PARTS["measured"]]
    assert lines["shapes of the front, measured"] == [list(point) for point in PARTS["chosen"]]
    points = {dots.get_label(): dots.get_offsets().tolist() for dots in axes.collections}
    assert points == {"supershaper": [[55e6, 10.0]], "lower triangle": [[55e6, 12.0]]}
    legend = {text.get_text() for text in axes.get_legend().get_texts()}
    assert legend == {*lines, *points}


def test_first_named_shape_is_highlighted(tmp_path, figures):
    front(tmp_path, named=NAMED)
    first, *others = figures[0].collections
    assert all(first.get_sizes()[0] > 2 * other.get_sizes()[0] for other in others)


@pytest.mark.parametrize("place", [0, 1, 11], ids=["first", "second", "after the last marker"])
def test_every_named_shape_is_visible(place, tmp_path):
    moved = {**NAMED, f"shape_{place}": (35e6, 18.0)}
    assert not np.array_equal(front(tmp_path, named=NAMED), front(tmp_path, named=moved))


def test_front_of_two_costs_is_drawn_in_order_of_the_first(tmp_path, figures):
    order = np.random.default_rng(0).permutation(len(PERPLEXITIES))
    front(tmp_path, costs=COSTS["parameters"][order], perplexities=PERPLEXITIES[order])
    assert figures[0].lines[0].get_xdata().tolist() == COSTS["parameters"].tolist()
    np.testing.assert_allclose(figures[0].lines[0].get_ydata(), PERPLEXITIES, rtol=1e-12)


def test_perplexity_is_drawn_as_its_logarithm(tmp_path, figures):
    """Layers add up in log-perplexity."""
    front(tmp_path)
    assert figures[0].get_yscale() == "log"


def test_front_of_one_shape_is_drawn(tmp_path):
    front(tmp_path, costs=np.array([63e6]), perplexities=np.array([7.0]))


# Agreement, profile, evaluations


def test_agreement_shows_each_shape_with_its_deviation_and_the_diagonal(tmp_path, figures):
    measured, predicted, deviations = np.array([2.0, 3.0, 4.0]), np.array([2.1, 2.9, 4.5]), np.array([0.1, 0.2, 0.3])
    plot_agreement(tmp_path / "agreement.png", measured, predicted, deviations)
    read(tmp_path / "agreement.png")
    (axes,) = figures
    dots, *_, diagonal = axes.lines
    assert dots.get_xydata().tolist() == np.column_stack([measured, predicted]).tolist()
    assert diagonal.get_xydata().tolist() == [[2.0, 2.0], [4.5, 4.5]]
    (bars,) = axes.containers[0].lines[2]
    spans = [(bottom, top) for (_, bottom), (_, top) in bars.get_segments()]
    np.testing.assert_allclose(spans, np.column_stack([predicted - deviations, predicted + deviations]))


def test_distances_are_drawn_as_they_are_and_named(tmp_path, figures):
    """No logarithm, no exponential, no perplexity."""
    costs, distances = np.array([1e6, 2e6]), np.array([0.5, 0.25])
    front = ParetoFront(np.full((2, 2), 8), {"parameters": costs}, distances, "distance")
    plot_front(tmp_path / "front.png", front, measured=[(1.5e6, 0.4)])
    plot_agreement(tmp_path / "agreement.png", distances, distances, distances / 10, "distance")
    plot_profile(tmp_path / "profile.png", replace(made_profile(), measure="distance"))
    front_axes, agreement = figures
    assert front_axes.lines[-1].get_ydata().tolist() == distances.tolist()
    assert front_axes.get_yscale() == "linear"
    assert front_axes.get_ylabel() == "distance to the original, held-out text"
    assert agreement.get_xlabel() == "measured distance to the original"
    assert agreement.get_ylabel() == "predicted distance ± one standard deviation"


def test_measured_shapes_are_drawn_in_groups_from_zero(tmp_path, figures):
    rectangles, random = [(12e6, 0.7), (23e6, 0.05)], [(15e6, 0.8), (18e6, 0.5), (20e6, 0.4)]
    plot_measured(tmp_path / "quality.png", rectangles=rectangles, random=random)
    read(tmp_path / "quality.png")
    axes = figures[-1]
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["rectangles"].get_xydata().tolist() == [list(point) for point in rectangles]
    assert lines["random"].get_xydata().tolist() == [list(point) for point in random]
    assert (lines["rectangles"].get_linestyle(), lines["random"].get_linestyle()) == ("-", "None")
    assert axes.get_ylim()[0] == 0
    assert axes.get_xaxis().get_major_formatter()(15e6) == "15 M"


def made_profile(layers=12):
    values = np.arange(1.0, layers + 1)
    return Profile(values / values.mean(), np.full(layers, 0.1), values / 10, np.full(layers, 0.02))


def test_profile_has_a_chart_of_widths_and_one_of_importances(tmp_path):
    plot_profile(tmp_path / "profile.png", made_profile())
    assert read(tmp_path / "profile.png").shape[0] == pytest.approx(2.6 * DPI * 2, abs=1)


def test_bars_of_a_profile_are_its_layers_counted_from_one(tmp_path, monkeypatch):
    drawn = []
    bar = "supershaper_hf.report.plots.Axes.bar"
    monkeypatch.setattr(bar, lambda axes, places, values, **style: drawn.append((axes, places, values, style["yerr"])))
    profile = made_profile(3)
    plot_profile(tmp_path / "profile.png", profile)
    (widths, places, *first), (importances, _, *second) = drawn
    assert places.tolist() == widths.get_xticks().tolist() == importances.get_xticks().tolist() == [1, 2, 3]
    assert [values.tolist() for values in first] == [profile.widths.tolist(), [0.1] * 3]
    assert [values.tolist() for values in second] == [profile.importances.tolist(), [0.02] * 3]
    assert (importances.get_xlabel(), widths.get_ylabel()) == ("layer", "relative width")
    assert importances.get_ylabel() == "importance (nats)"


def evaluation(step, **losses):
    return {
        "step": step,
        "evaluation": {name: {"loss": loss, "perplexity": 2.0**loss} for name, loss in losses.items()},
    }


def test_evaluations_are_one_line_for_each_shape(tmp_path, figures):
    records = [
        {"step": 1, "loss": 7.0},
        evaluation(10, largest=5.0, smallest=6.0),
        {"step": 15, "loss": 5.0},
        evaluation(20, largest=4.0, smallest=5.5),
    ]
    plot_evaluations(tmp_path / "evaluations.png", records)
    read(tmp_path / "evaluations.png")
    lines = {line.get_label(): line.get_xydata().tolist() for line in figures[0].lines}
    assert lines == {"largest": [[10, 5.0], [20, 4.0]], "smallest": [[10, 6.0], [20, 5.5]]}
    assert figures[0].get_ylabel() == "loss on held-out text (nats per masked token)"


def test_distances_of_a_run_are_drawn(tmp_path, figures):
    entries = [{"step": step, "evaluation": {"largest": {"distance": 1 / step, "cosine": 0.9}}} for step in (1, 2)]
    plot_evaluations(tmp_path / "evaluations.png", entries)
    read(tmp_path / "evaluations.png")
    assert figures[0].lines[0].get_xydata().tolist() == [[1, 1.0], [2, 0.5]]
    assert figures[0].get_ylabel() == "distance to the original on held-out text"


def test_one_evaluation_is_drawn(tmp_path):
    plot_evaluations(tmp_path / "evaluations.png", [evaluation(10, largest=5.0)])
    read(tmp_path / "evaluations.png")


def test_files_may_be_given_as_text(tmp_path):
    plot_front(str(tmp_path / "front.png"), make_front("flops", COSTS["flops"]))
    read(tmp_path / "front.png")
