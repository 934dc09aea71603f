"""Plots, written as PNG. They take plain numbers, so that every room can use them."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure


AXES = {  # of costs: label, unit as a number, unit as text
    "parameters": ("parameters of the subnet", 1e6, " M"),
    "flops": ("operations for one sequence", 1e9, " GFLOPs"),
    "latency": ("latency of a batch", 1e-3, " ms"),
}
Point = tuple[float, float]  # cost, perplexity


def new_figure(width: float = 8, height: float = 5) -> tuple[Figure, Axes]:
    """Return a figure with one pair of axes. Not pyplot: no screen, no global state."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes


def plot_front(
    file: str | Path,
    cost: str,
    costs: np.ndarray,
    perplexities: np.ndarray,
    *,
    steps: bool = True,
    measured: Sequence[Point] = (),
    chosen: Sequence[Point] = (),
    named: Mapping[str, Point] | None = None,
) -> None:
    """Write a PNG of cost against perplexity: the predicted front as steps, measured shapes as dots.

    Args:
        file: Where to write it.
        cost: `"parameters"`, `"flops"` or `"latency"`, for the label of the axis.
        costs: (n,) of the front's points.
        perplexities: (n,) of the front's points, predicted.
        steps: Whether this cost alone decides what is on the front; with two costs its points are drawn as dots.
        measured: Cost and perplexity of measured shapes, drawn as dots.
        chosen: Cost and perplexity of measured shapes of the front, drawn as stars.
        named: Cost and perplexity of single shapes by name; the first one is highlighted.
    """
    figure, axes = new_figure()
    if len(measured):
        axes.plot(*np.transpose(measured), ".", markersize=5, color="0.6", label=f"{len(measured)} measured shapes")
    by_cost = np.argsort(costs, kind="stable")
    front: dict[str, Any] = {"color": "C0", "label": "predicted Pareto front (exact)"}
    if steps:  # between two points, the cheaper one is the best
        axes.step(costs[by_cost], perplexities[by_cost], where="post", **front)
    else:
        axes.plot(costs, perplexities, ".", markersize=3, **front)
    if len(chosen):
        axes.plot(*np.transpose(chosen), "*", markersize=9, color="C3", label="shapes of the front, measured")
    for number, ((name, point), marker) in enumerate(zip((named or {}).items(), itertools.cycle("*osv^DPX*p"))):
        style: dict[str, Any] = {"s": 42, "marker": marker, "facecolor": "none", "edgecolor": "C1"}
        if number == 0:
            style = {"s": 140, "marker": "*", "color": "C3", "zorder": 3}
        axes.scatter(*point, label=name.replace("_", " "), **style)
    label, unit, suffix = AXES[cost]
    axes.set_xlabel(label)
    axes.set_ylabel("perplexity of masked tokens, held-out text")
    axes.set_yscale("log")  # layers add up in log-perplexity
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / unit:g}{suffix}")
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(file, dpi=130)


def plot_agreement(file: str | Path, measured: np.ndarray, predicted: np.ndarray, deviations: np.ndarray) -> None:
    """Write a PNG of predicted against measured losses, (n,) each in nats, with the predicted standard deviations."""
    figure, axes = new_figure(5.5, 5)
    axes.errorbar(measured, predicted, yerr=deviations, fmt=".", capsize=2, linewidth=0.8)
    ends = [min(measured.min(), predicted.min()), max(measured.max(), predicted.max())]
    axes.plot(ends, ends, color="0.6", linewidth=1, label="equal")
    axes.set_xlabel("measured loss (nats per masked token)")
    axes.set_ylabel("predicted loss, one standard deviation")
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)


def plot_layers(file: str | Path, rows: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Write a PNG with one bar chart over the layers for each row: a label, values and deviations (layers,)."""
    figure = Figure(figsize=(8, 2.6 * len(rows)), layout="constrained")
    for axes, (label, (values, deviations)) in zip(np.atleast_1d(figure.subplots(len(rows), 1)), rows.items()):
        axes.bar(np.arange(1, len(values) + 1), values, yerr=deviations, capsize=3, color="C0", alpha=0.8)
        axes.set_xticks(np.arange(1, len(values) + 1))
        axes.set_ylabel(label)
        axes.grid(alpha=0.3, axis="y")
    axes.set_xlabel("layer")
    figure.savefig(file, dpi=120)


def plot_evaluations(file: str | Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write a PNG of loss over training steps, one line for each evaluated shape.

    Args:
        file: Where to write it.
        records: Those of a training run; the ones with `evaluation` are used.
    """
    evaluations = [record for record in records if "evaluation" in record]
    figure, axes = new_figure()
    for name in evaluations[-1]["evaluation"]:
        points = [(record["step"], record["evaluation"][name]["loss"]) for record in evaluations]
        axes.plot(*zip(*points), marker=".", label=name)
    axes.set_xlabel("training step")
    axes.set_ylabel("loss on held-out text (nats per masked token)")
    axes.legend()
    figure.savefig(file, dpi=120)
