"""Tables and plots of measured shapes and Pareto fronts."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .search import ParetoFront
from .shapes import SearchSpace


def text_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay out records as a plain-text table, numbers to the right; the first record's keys are the columns.

    Example:
        >>> print(text_table([{"shape": "rectangle", "parameters": 1234567}, {"shape": "bottle", "parameters": 9}]))
        shape      parameters
        ---------  ----------
        rectangle   1,234,567
        bottle              9
    """
    columns = list(rows[0])
    cells = [[_cell(row[column]) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in [columns, *cells]) for i in range(len(columns))]
    numeric = [not isinstance(rows[0][column], (str, list)) for column in columns]

    def align(line: Sequence[str]) -> str:
        return "  ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(line, widths, numeric)).rstrip()

    return "\n".join([align(columns), "  ".join("-" * width for width in widths), *map(align, cells)])


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay out records as a Markdown table; the first record's keys are the columns."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def plot_pareto(
    file: str | Path,
    space: SearchSpace,
    front: ParetoFront,
    measured: Sequence[Mapping[str, Any]],
    compared: Sequence[Mapping[str, Any]],
) -> None:
    """Write a PNG of parameters against perplexity: measured shapes, the predicted front, and shapes by name.

    Args:
        file: Where to write it.
        space: Tells the parameters of a shape.
        front: The predicted front in parameters, drawn as a line.
        measured: Records of `evaluate_shapes`.
        compared: Rows with `name`, `parameters` and `perplexity`; the first one is highlighted.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")  # not pyplot: no screen, no global state
    axes = figure.subplots()
    sizes = [space.num_parameters(record["shape"]) for record in measured]
    perplexities = [record["perplexity"] for record in measured]
    axes.scatter(sizes, perplexities, s=14, color="0.6", label=f"{len(measured)} measured shapes")
    axes.plot(front.costs, np.exp(front.losses), color="C0", label="predicted Pareto front (exact)")
    chosen, *others = compared
    for row, marker in zip(others, itertools.cycle("osv^DPX*p")):
        point, name = (row["parameters"], row["perplexity"]), row["name"].replace("_", " ")
        axes.scatter(*point, s=42, marker=marker, facecolor="none", edgecolor="C1", label=name)
    point = (chosen["parameters"], chosen["perplexity"])
    axes.scatter(*point, s=140, marker="*", color="C3", zorder=3, label=chosen["name"])
    axes.set_xlabel("parameters of the subnet")
    axes.set_ylabel("perplexity of masked tokens, held-out text")
    axes.set_yscale("log")  # layers add up in log-perplexity
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g} M")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(file, dpi=130)


def plot_evaluations(file: str | Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write a PNG of loss over training steps, one line for each evaluated shape.

    Args:
        file: Where to write it.
        records: Those of a training run; the ones with `evaluation` are used.
    """
    evaluations = [record for record in records if "evaluation" in record]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name in evaluations[-1]["evaluation"]:
        points = [(record["step"], record["evaluation"][name]["loss"]) for record in evaluations]
        axes.plot(*zip(*points), marker=".", label=name)
    axes.set_xlabel("training step")
    axes.set_ylabel("loss on held-out text (nats per masked token)")
    axes.legend()
    figure.savefig(file, dpi=120)
