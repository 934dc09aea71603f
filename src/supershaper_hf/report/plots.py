"""The plots of fronts, predictions, profiles and training runs, written as PNG files."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..search.measures import MEASURES, measure_of


if TYPE_CHECKING:  # only for annotations: drawing the losses of a training run needs no search
    from ..search.pareto import ParetoFront
    from ..search.profile import Profile


AXES = {  # cost -> label of its axis, unit as a number, unit as text
    "parameters": ("parameters of the subnet", 1e6, " M"),
    "flops": ("operations for one sequence", 1e9, " GFLOPs"),
    "latency": ("latency of a batch", 1e-3, " ms"),
}
LABELS = {  # measure -> label of the axis of what is shown, label of the axis of the value itself
    "loss": ("perplexity of masked tokens, held-out text", "loss (nats per masked token)"),
    "distance": ("distance to the original, held-out text", "distance to the original"),
    "task_loss": ("loss on the task, held-out examples", "loss on the task"),
}
DPI = 100  # dots per inch: pictures of 40 kB that a repository keeps
Point = tuple[float, float]  # cost, and perplexity or distance


def new_figure(width: float = 8, height: float = 5) -> tuple[Figure, Axes]:
    """Return a figure with one pair of axes. It does not use pyplot, which keeps global state."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes


def plot_front(
    file: str | Path,
    front: "ParetoFront",
    *,
    measured: Sequence[Point] = (),
    chosen: Sequence[Point] = (),
    named: Mapping[str, Point] | None = None,
) -> None:
    """Write a PNG of a Pareto front: its (first) cost against predicted perplexity, or what else is predicted.

    The front of one cost is drawn as steps: up to the next point, the cheaper shape stays the best. The front of two
    costs is drawn as dots, because the first cost alone does not decide which shapes are on it.

    Args:
        file: The PNG file to write.
        front: The front, from `pareto_front`.
        measured: Cost and perplexity (or distance) of measured shapes, drawn as dots.
        chosen: Cost and perplexity of measured shapes that lie on the front, drawn as stars.
        named: Cost and perplexity of single shapes by name. The first one is highlighted.

    Example:
        >>> front = pareto_front(space, predictor)  # doctest: +SKIP
        >>> shapes = {name: space.named_shape(name, 63_000_000) for name in ("rectangle", "diamond")}  # doctest: +SKIP
        >>> [rectangle, diamond] = evaluate_shapes(supernet, batches, list(shapes.values()))  # doctest: +SKIP
        >>> plot_front("front.png", front, named={"rectangle": (63e6, rectangle["perplexity"])})  # doctest: +SKIP
    """
    cost, costs = next(iter(front.costs.items()))
    shown = MEASURES[front.measure].show(front.losses)
    figure, axes = new_figure()
    if len(measured):
        axes.plot(*np.transpose(measured), ".", markersize=5, color="0.6", label=f"{len(measured)} measured shapes")
    by_cost = np.argsort(costs, kind="stable")
    style: dict[str, Any] = {"color": "C0", "label": "predicted Pareto front (exact)"}
    if len(front.costs) == 1:
        axes.step(costs[by_cost], shown[by_cost], where="post", **style)
    else:
        axes.plot(costs, shown, ".", markersize=3, **style)
    if len(chosen):
        axes.plot(*np.transpose(chosen), "*", markersize=9, color="C3", label="shapes of the front, measured")
    for number, ((name, point), marker) in enumerate(zip((named or {}).items(), itertools.cycle("*osv^DPX*p"))):
        style = {"s": 42, "marker": marker, "facecolor": "none", "edgecolor": "C1"}
        if number == 0:
            style = {"s": 140, "marker": "*", "color": "C3", "zorder": 3}
        axes.scatter(*point, label=name.replace("_", " "), **style)
    label, unit, suffix = AXES[cost]
    axes.set_xlabel(label)
    axes.set_ylabel(LABELS[front.measure][0])
    if front.measure == "loss":
        axes.set_yscale("log")  # layers add up in log-perplexity
    axes.yaxis.set_major_formatter("{x:,.10g}")  # 10 digits, because 6 would print 2,000,000 as 2e+06
    axes.yaxis.set_minor_formatter("{x:,.10g}")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / unit:,.10g}{suffix}")
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(file, dpi=DPI)


def plot_measured(file: str | Path, quantity: str | None = None, /, **groups: Sequence[Point]) -> None:
    """Write a PNG of measured shapes: parameters against distance to the original, or another quantity.

    Args:
        file: The PNG file to write.
        quantity: What was measured, in words. By default it is the distance to the original.
        **groups: Parameters and distance of the shapes of each group. The first group is joined by a line.

    Example:
        >>> plot_measured("quality.png", rectangles=[(12e6, 0.7), (23e6, 0.0)])  # doctest: +SKIP
    """
    figure, axes = new_figure(6.5, 4)
    for number, (name, points) in enumerate(groups.items()):
        axes.plot(*np.transpose(points), "o-" if number == 0 else ".", color=f"C{number}", label=name)
    label, unit, suffix = AXES["parameters"]
    axes.set_xlabel(label)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / unit:,.10g}{suffix}")
    axes.set_ylabel(quantity or LABELS["distance"][0])
    if quantity is None:
        axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=DPI)


def plot_agreement(
    file: str | Path, measured: np.ndarray, predicted: np.ndarray, deviations: np.ndarray, measure: str = "loss"
) -> None:
    """Write a PNG of predicted against measured losses or distances.

    Args:
        file: The PNG file to write.
        measured: (n,) measured losses in nats, or measured distances.
        predicted: (n,) predictions in the same unit.
        deviations: (n,) standard deviations of the predictions, drawn as error bars.
        measure: What was measured, `"loss"`, `"distance"` or `"task_loss"`.
    """
    figure, axes = new_figure(5.5, 5)
    axes.errorbar(measured, predicted, yerr=deviations, fmt=".", capsize=2, linewidth=0.8)
    ends = [min(measured.min(), predicted.min()), max(measured.max(), predicted.max())]
    axes.plot(ends, ends, color="0.6", linewidth=1, label="equal")
    axes.set_xlabel(f"measured {LABELS[measure][1]}")
    axes.set_ylabel(f"predicted {measure} ± one standard deviation")
    axes.legend(frameon=False)
    figure.savefig(file, dpi=DPI)


def plot_profile(file: str | Path, profile: "Profile") -> None:
    """Write a PNG of a profile: relative width and importance of each layer, as bars with standard deviations.

    Example:
        >>> plot_profile("profile.png", derive_profile(space, predictor))  # doctest: +SKIP
    """
    charts = {
        "relative width": (profile.widths, profile.width_deviations),
        f"importance ({MEASURES[profile.measure].unit.strip() or profile.measure})": (
            profile.importances,
            profile.importance_deviations,
        ),
    }
    figure = Figure(figsize=(8, 2.6 * len(charts)), layout="constrained")
    layers = np.arange(1, len(profile.widths) + 1)
    for axes, (label, (values, deviations)) in zip(figure.subplots(len(charts), 1), charts.items()):
        axes.bar(layers, values, yerr=deviations, capsize=3, color="C0", alpha=0.8)
        axes.set_xticks(layers)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3, axis="y")
    axes.set_xlabel("layer")
    figure.savefig(file, dpi=DPI)


def plot_evaluations(file: str | Path, log_history: Sequence[Mapping[str, Any]]) -> None:
    """Write a PNG of loss or distance over training steps, one line for each evaluated shape.

    Args:
        file: The PNG file to write.
        log_history: The lines of a training run's log. Those with `evaluation` are drawn.
    """
    evaluations = [entry for entry in log_history if "evaluation" in entry]
    measure = measure_of(list(evaluations[-1]["evaluation"].values())).name
    figure, axes = new_figure()
    for name in evaluations[-1]["evaluation"]:
        points = [(entry["step"], entry["evaluation"][name][measure]) for entry in evaluations]
        axes.plot(*zip(*points), marker=".", label=name)
    axes.set_xlabel("training step")
    axes.set_ylabel(
        {
            "loss": "loss on held-out text (nats per masked token)",
            "distance": "distance to the original on held-out text",
        }[measure]
    )
    axes.legend()
    figure.savefig(file, dpi=DPI)
