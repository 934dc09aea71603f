"""Tables and plots of measured shapes and Pareto fronts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .search import ParetoFront


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
    front: ParetoFront,
    measured: tuple[Sequence[int], Sequence[float]],
    named: Mapping[str, tuple[int, float]],
    chosen: tuple[int, float],
) -> None:
    """Write a PNG: cost against perplexity of measured shapes, named shapes, the predicted front and the chosen shape.

    Args:
        file: Where to write it.
        front: The predicted front, drawn as a line.
        measured: Costs and measured perplexities of the shapes the predictor was fitted on.
        named: Cost and measured perplexity of each hand-crafted shape, by name.
        chosen: Cost and measured perplexity of the shape found by the search.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")  # not pyplot: no screen, no global state
    axes = figure.subplots()
    axes.scatter(*measured, s=14, color="0.6", label=f"{len(measured[0])} measured shapes")
    axes.plot(front.costs, np.exp(front.losses), color="C0", label="predicted Pareto front (exact)")
    markers = "osv^DPX*p"
    for (name, point), marker in zip(named.items(), markers):
        axes.scatter(*point, s=42, marker=marker, facecolor="none", edgecolor="C1", label=name.replace("_", " "))
    axes.scatter(*chosen, s=140, marker="*", color="C3", zorder=3, label="searched shape, measured")
    axes.set_xlabel(f"{front.cost_name} of the subnet")
    axes.set_ylabel("perplexity of masked tokens, held-out text")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g} M")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(file, dpi=130)
