"""Question 1: what do the start and the recipe give, and what does equal quality cost?

    python -m benchmarks.study.start_and_recipe --data DATA --bert MINILM

The paper trains the largest, the smallest and a random shape from labels and from the largest one, and starts with the
first channels of the BERT as they are. Ours teaches random shapes the last hidden states of the original, and starts
from a calibration. Each recipe is run from more than one start.
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from supershaper_hf import markdown_table

from .found_runs import Found, figure_columns, how_all_are_measured, how_measured, over_seeds, read_runs
from .runs import (
    FOLLOWED,
    OURS,
    OURS_BY_WIDTH,
    OURS_SHARED,
    OURS_WITH_LABELS,
    PAPER,
    PAPER_BY_WIDTH,
    Recipe,
    run_script,
)
from .study import FLOPS, STS, Target, cell, number, save_picture


RECIPES = {
    "paper: identity": Recipe("paper", "identity", PAPER, FOLLOWED),
    "paper: calibrated, by width": PAPER_BY_WIDTH,
    "ours: identity": Recipe("ours_identity", "identity", OURS, FOLLOWED),
    "ours: calibrated, shared": OURS_SHARED,
    "ours: calibrated, by width": OURS_BY_WIDTH,
    "ours and labels: calibrated, by width": OURS_WITH_LABELS,
}
PAPERS = "paper: identity"
CANDIDATES = ("ours: calibrated, by width", "ours and labels: calibrated, by width")
TARGET = 0.2  # of the paper's operations
MEASURES = {"distance": "distance to the original", "loss": "masked-LM loss, nats"}
PICTURE = "start_and_recipe.png"

Curve = list[tuple[float, float]]  # operations, and a figure


def curve(found: Found, recipe: Recipe, figure: str) -> Curve:
    """Return operations and the mean of a figure over random shapes and seeds, from the start to the end."""
    points = []
    for quarters in (0, *FOLLOWED):
        rows = found.of(recipe, quarters)
        if rows:
            values = over_seeds(rows, "random", figure)
            points.append((sum(row["flops"] for row in rows) / len(rows), sum(values) / len(values)))
    return points


def begun(found: Found) -> dict[str, Recipe]:
    """Return the recipes that have points after their start."""
    return {name: each for name, each in RECIPES.items() if any(found.of(each, quarters) for quarters in FOLLOWED)}


def flops_to_reach(points: Sequence[tuple[float, float]], value: float) -> float | None:
    """Return the operations after which a curve is at a value or below for the first time; None if it never is.

    Between two points the curve is taken for a straight line.
    """
    before: tuple[float, float] | None = None
    for flops, reached in points:
        if reached <= value:
            if before is None:
                return flops
            share = (before[1] - value) / (before[1] - reached)
            return before[0] + share * (flops - before[0])
        before = flops, reached
    return None


def costs(found: Found) -> dict[str, dict[str, float | None]]:
    """Return, for each figure and recipe, the share of the paper's operations that reach the paper's best point."""
    shares: dict[str, dict[str, float | None]] = {}
    for figure in MEASURES:
        papers = curve(found, RECIPES[PAPERS], figure)
        if len(papers) <= len(FOLLOWED):
            continue
        goal, own = min(value for _, value in papers), {}
        for name, recipe in RECIPES.items():
            reached = flops_to_reach(curve(found, recipe, figure), goal)
            own[name] = None if reached is None else reached / papers[-1][0]
        shares[figure] = own
    return shares


def cost_table(found: Found) -> str:
    shares, rows = costs(found), []
    for name, recipe in RECIPES.items():
        ends = found.of(recipe)
        if ends:
            row = {"recipe: start": name, "operations in all, 1e12": cell([end["flops"] for end in ends], FLOPS)}
            row["of which for the start"] = cell([end["flops_of"]["start"] for end in ends], FLOPS)
            for figure in shares:
                share = shares[figure][name]
                column = f"until as good as the paper's run ever was, by {figure}: % of its operations"
                row[column] = "not reached" if share is None else f"{share:.1%}"
            rows.append(row)
    return markdown_table(rows)


def targets(results_folder: Path) -> list[Target]:
    """Return what was to be reached, as far as it was measured."""
    found, measured = read_runs(results_folder), []
    for figure, shares in costs(found).items():
        share = shares[CANDIDATES[0]]
        if not found.of(RECIPES[CANDIDATES[0]]):
            continue
        what = f"ours: operations until as good as the paper's run ever was, by {figure}"
        words = "never" if share is None else f"{share:.1%}"
        start, best = (curve(found, RECIPES[name], figure) for name in (CANDIDATES[0], PAPERS))
        if start and start[0][1] <= min(value for _, value in best):
            words += ", by the start alone"
        measured.append(Target(what, f"at most {TARGET:.0%}", words, share is not None and share <= TARGET))
    return measured


def verdict(found: Found) -> str:
    """Say whether the target is met by ours, for each figure."""
    words = []
    for figure, shares in costs(found).items():
        papers = [value for _, value in curve(found, RECIPES[PAPERS], figure)]
        goal = min(papers)
        when = ", before training, which leads away from the original" if papers[0] == goal else ""
        words.append(f"By {MEASURES[figure].split(',')[0]}, the best point of the paper's run is {goal:.3f}{when}.")
        for name in CANDIDATES:
            share = shares[name]
            if found.of(RECIPES[name]):
                start = curve(found, RECIPES[name], figure)[0][1]
                reached = "never reaches it" if share is None else f"reaches it after {share:.1%} of the operations"
                if start <= goal:
                    reached = f"has {start:.3f} before training, whose start took {share:.1%} of the operations"
                met = "met" if share is not None and share <= TARGET else "missed"
                by = ", by the start alone; the recipe is not tested by it" if start <= goal and met == "met" else ""
                words.append(f'"{name}" {reached}: the target, {TARGET:.0%}, is {met}{by}.')
    return " ".join(words)


def points_table(found: Found) -> str:
    rows = []
    for name, recipe in begun(found).items():
        for quarters in (0, *FOLLOWED):
            own = found.of(recipe, quarters)
            if own:
                tokens = round(sum(row["tokens"] for row in own) / len(own))
                rows.append({"recipe: start": name, "tokens": tokens, **figure_columns(own)})
    return markdown_table(rows)


def rectangles_table(found: Found) -> str:
    """Distance, loss and STS of each rectangle at the end."""
    rows = []
    for name, recipe in RECIPES.items():
        ends = found.of(recipe)
        if ends:
            row = {"recipe: start": name}
            for index, width in enumerate(sorted(found.settings["width_choices"], reverse=True)):
                figures = {name: over_seeds(ends, "rectangles", name, index) for name in ("distance", "loss", STS)}
                row[str(width)] = " / ".join(number(sum(each) / len(each), name) for name, each in figures.items())
            rows.append(row)
    return markdown_table(rows)


def draw(file: Path, found: Found) -> None:
    """Draw each figure over operations."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, (measure, label) in zip(figure.subplots(1, len(MEASURES)), MEASURES.items()):
        for name, recipe in begun(found).items():
            points = [(flops / 1e12, value) for flops, value in curve(found, recipe, measure)]
            axes.plot(*zip(*points), marker=".", label=name)
        axes.set_xlabel("operations of start and training, 1e12")
        axes.set_ylabel(f"{label}, mean of the random shapes")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    save_picture(figure, file)


def answer(results_folder: Path, pictures_folder: Path) -> str:
    """Return the section as Markdown, from what was measured so far, and draw its picture."""
    found = read_runs(results_folder)
    if not any(found.of(recipe) for recipe in RECIPES.values()):
        return ""
    draw(pictures_folder / PICTURE, found)
    text = [how_measured(found, "start_and_recipe", RECIPES.values()), how_all_are_measured(found)]
    text += ["Random shapes:", points_table(found)]
    text += ["Rectangles after all tokens, distance / masked-LM loss / STS:", rectangles_table(found)]
    text += ["Operations:", cost_table(found), verdict(found)]
    text.append(f"![Operations against distance and masked-LM loss of random shapes]({pictures_folder.name}/{PICTURE})")
    return "\n\n".join(part for part in text if part)


if __name__ == "__main__":
    run_script(__doc__, [(recipe, (0,)) for recipe in RECIPES.values()], answer)
