"""Does the distance to the original rank shapes as the scores of tasks do? The last part of question 4.

The shapes are the random ones of question 6, which were fine-tuned all at once.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import kendalltau

from supershaper_hf import markdown_table
from supershaper_hf.report.plots import new_figure

from .found_shapes import ALL_LAYERS, DISTANCE, FIGURES, FoundShapes, Key
from .study import Target, read_rows, save_picture


MEAN = "mean of the tasks"
RESAMPLINGS = 500  # of the shapes, for the error of a correlation
FEWEST = 3  # shapes that a correlation needs
TASKS_KENDALL = 0.7  # target: of the distance in all layers with the mean score
TASKS_PICTURE = "distance_and_tasks.png"


def task_scores(folder: Path) -> dict[str, dict[Key, float]]:
    """Return the score of each shape by task, and their mean over the tasks for shapes that have all: from question 6.

    They are the random shapes of a super fine-tuning: all shapes of a task were fine-tuned at once. The mean over seeds
    is taken.
    """
    found: dict[str, dict[Key, list[float]]] = {}
    for row in read_rows(folder, "tasks"):
        if (row["way"], row["kind"]) == ("super", "random"):
            found.setdefault(row["task"], {}).setdefault(tuple(row["shape"]), []).append(row["score"])
    scores = {task: {shape: sum(each) / len(each) for shape, each in of.items()} for task, of in found.items()}
    complete = set.intersection(*map(set, scores.values())) if scores else set()
    means = {shape: sum(of[shape] for of in scores.values()) / len(scores) for shape in sorted(complete)}
    return {MEAN: means, **scores} if means else scores


def rank_correlations(found: FoundShapes, scores: dict[str, dict[Key, float]]) -> list[dict[str, Any]]:
    """Return, for each task, how well distance, cosine and size rank shapes as the score does (Kendall).

    Size alone ranks shapes too, because larger ones are better. So the correlation of a distance is also given for
    equal size: Kendall's partial correlation.
    """
    rows = []
    for task, of in scores.items():
        shapes = [shape for shape in of if shape in found.inherited]
        records = [found.inherited[shape] for shape in shapes]
        if len(shapes) < FEWEST:
            continue
        score, size = [of[shape] for shape in shapes], [row["parameters"] for row in records]
        by_size, row = kendall(size, score), {"task": task, "shapes": len(shapes)}
        for figure in (ALL_LAYERS, DISTANCE):
            near = [-record[figure] for record in records]
            by_distance, both = kendall(near, score), kendall(near, size)
            row[FIGURES[figure]] = by_distance
            rest = max(((1 - by_size**2) * (1 - both**2)) ** 0.5, 1e-9)
            row[f"{FIGURES[figure]}, at equal size"] = (by_distance - by_size * both) / rest
        row["cosine"] = kendall([record["cosine"] for record in records], score)
        rows.append(row | {"parameters": by_size})
    return rows


def kendall(first: Any, second: Any) -> float:
    return float(kendalltau(first, second).statistic)


def correlation_gains(found: FoundShapes, means: dict[Key, float]) -> dict[str, tuple[float, float, float]]:
    """Return by how much the distance in all layers ranks shapes better (Kendall) than what else they are ranked by.

    Returns:
        The difference, and the ends of the interval that has 95 % of the differences in resamplings of the shapes.
    """
    records = [found.inherited[shape] for shape in means if shape in found.inherited]
    scores = np.array([means[shape] for shape in means if shape in found.inherited])
    near = -np.array([record[ALL_LAYERS] for record in records])
    others = {
        "the number of parameters": np.array([record["parameters"] for record in records]),
        "the distance of the last states": -np.array([record[DISTANCE] for record in records]),
    }
    draws = np.random.default_rng(0).integers(0, len(records), (RESAMPLINGS, len(records)))
    gains = {}
    for name, other in others.items():
        drawn = [kendall(near[rows], scores[rows]) - kendall(other[rows], scores[rows]) for rows in draws]
        low, high = np.nanquantile(drawn, (0.025, 0.975))
        gains[name] = kendall(near, scores) - kendall(other, scores), float(low), float(high)
    return gains


def verdict_on_gains(gains: dict[str, tuple[float, float, float]]) -> str:
    """Say whether the distance in all layers is more than another way to say how large a shape is."""
    words = [f"than that of {name} by {gain:.3f} [{low:.3f}, {high:.3f}]" for name, (gain, low, high) in gains.items()]
    alike = [name for name, (_, low, _) in gains.items() if low <= 0]
    told = f"so many shapes do not tell it from {' or '.join(alike)}" if alike else "that is not chance"
    return (
        f"The correlation of the distance in all layers with the mean score is higher {', '.join(words)}; in "
        f"brackets is where 95 % of {RESAMPLINGS} resamplings of the shapes lie: {told}."
    )


def verdict_on_distance(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of rank correlations, and whether the target is met."""
    table = [
        {name: f"{value:.3f}" if isinstance(value, float) else value for name, value in row.items()} for row in rows
    ]
    lines = [
        "Rank correlations (Kendall) with the scores of question 6, of random shapes that were fine-tuned all at once. "
        "A correlation is positive if the shape that is nearer to the original, or larger, has the better score. "
        '"At equal size" is the partial correlation.',
        markdown_table(table),
    ]
    if rows[0]["task"] == MEAN:
        for figure in (ALL_LAYERS, DISTANCE):
            value = rows[0][FIGURES[figure]]
            met = "met" if value >= TASKS_KENDALL else "missed"
            lines.append(
                f"The {FIGURES[figure]} against the mean score: {value:.3f}; the target, at least {TASKS_KENDALL}, is "
                f"{met}."
            )
    return "\n\n".join(lines)


def distance_text(found: FoundShapes, results_folder: Path, pictures_folder: Path) -> str:
    """Return the last part of the answer as Markdown, and draw its picture; "" if too little was measured."""
    scores = task_scores(results_folder)
    correlations = rank_correlations(found, scores)
    if not correlations:
        return ""
    parts = [verdict_on_distance(correlations)]
    if correlations[0]["task"] == MEAN:
        parts.append(verdict_on_gains(correlation_gains(found, scores[MEAN])))
        draw_tasks(pictures_folder / TASKS_PICTURE, found, scores[MEAN])
        parts.append(f"![Distance against the mean score of the tasks]({pictures_folder.name}/{TASKS_PICTURE})")
    return "\n\n".join(parts)


def distance_targets(found: FoundShapes, results_folder: Path) -> list[Target]:
    """Return what was to be reached, as far as it was measured."""
    correlations = rank_correlations(found, task_scores(results_folder))
    if not correlations or correlations[0]["task"] != MEAN:
        return []
    value, size = (correlations[0][name] for name in (FIGURES[ALL_LAYERS], "parameters"))
    what = f"distance in all layers against mean task score: Kendall (parameters alone: {size:.3f})"
    return [Target(what, f"at least {TASKS_KENDALL}", f"{value:.3f}", value >= TASKS_KENDALL)]


def draw_tasks(file: Path, found: FoundShapes, means: dict[Key, float]) -> None:
    """Draw the distance of random shapes against their mean score; the colour is their size."""
    shapes = [shape for shape in means if shape in found.inherited]
    rows = [found.inherited[shape] for shape in shapes]
    figure, axes = new_figure(6, 4)
    sizes = [row["parameters"] / 1e6 for row in rows]
    dots = axes.scatter([row[ALL_LAYERS] for row in rows], [means[shape] for shape in shapes], c=sizes)
    figure.colorbar(dots, label="million parameters")
    axes.set_xlabel("distance to the original in all layers")
    axes.set_ylabel("mean score of the tasks")
    save_picture(figure, file)
