"""Question 2: what should the widths of a layer share?

    python -m benchmarks.study.bottlenecks --data DATA --bert MINILM

With `bottlenecks="by_width"` each narrow width of a layer has maps of its own, with `"shared"` it takes a part of the
full ones. With `head_slicing="per_head"` a narrow layer keeps the first channels of each head, with `"prefix"` the
first channels of all, which it divides into heads anew. The recipe is the same.
"""

from pathlib import Path

from supershaper_hf import markdown_table
from supershaper_hf.report.plots import new_figure

from .found_runs import AS_IN_QUESTION_1, Found, figure_columns, how_measured, over_seeds, read_runs
from .runs import OURS, OURS_BY_WIDTH, OURS_SHARED, Recipe, run_script
from .study import STS, cell, save_picture


RECIPES = {
    "by width, per head": OURS_BY_WIDTH,
    "shared, per head": OURS_SHARED,
    "by width, prefix": Recipe("ours_by_width_prefix", "by_width_prefix", OURS),
    "shared, prefix": Recipe("ours_shared_prefix", "shared_prefix", OURS),
}
SEEDS = {"by width, per head": (0, 1, 2), "shared, per head": (0, 1, 2)}  # the deciding pair; one seed for the others
BETTER = {"distance": -1, "cosine": 1, "loss": -1, STS: 1}  # the sign of what is better
NAMES = {"distance": "distance", "cosine": "cosine", "loss": "masked-LM loss", STS: "STS"}
PICTURE = "bottlenecks.png"


def table(found: Found, quarters: int) -> str:
    rows = []
    for name, recipe in RECIPES.items():
        own = found.of(recipe, quarters)
        if own:
            row = {"bottlenecks, heads": name, "seeds": len(own), **figure_columns(own)}
            rows.append({**row, "distance of the largest": cell(over_seeds(own, "rectangles", "distance", 0))})
    return markdown_table(rows) if rows else ""


def verdict(found: Found) -> str:
    """Compare the deciding pair, seed by seed: both read the same batches and draw the same shapes."""
    first, second = ({row["seed"]: row for row in found.of(RECIPES[name])} for name in SEEDS)
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return ""
    words = []
    for figure, sign in BETTER.items():
        pairs = [over_seeds([runs[seed] for seed in seeds], "random", figure) for runs in (first, second)]
        differences = [a - b for a, b in zip(*pairs)]
        if differences:
            wins = sum(sign * difference > 0 for difference in differences)
            words.append(
                f"{NAMES[figure]} {cell(differences, figure)} (better with {wins} of {len(differences)} seeds)"
            )
    return f"By width minus shared, per head, the same seed, random shapes: {'; '.join(words)}."


def draw(file: Path, found: Found) -> None:
    """Draw the distance of each rectangle before training (dashed) and after it."""
    figure, axes = new_figure()
    widths = sorted(found.settings["width_choices"], reverse=True)
    for number, (name, recipe) in enumerate(RECIPES.items()):
        for quarters, style in ((0, "--"), (4, "-")):
            own = found.of(recipe, quarters)
            if own:
                means = [over_seeds(own, "rectangles", "distance", index) for index in range(len(widths))]
                values = [sum(each) / len(each) for each in means]
                label = None if name in axes.get_legend_handles_labels()[1] else name
                axes.plot(widths, values, style, color=f"C{number}", marker=".", label=label)
    axes.set_xlabel("width of all layers (dashed: before training)")
    axes.set_ylabel("distance to the original")
    axes.legend()
    save_picture(figure, file)


def answer(results_folder: Path, pictures_folder: Path) -> str:
    """Return the section as Markdown, from what was measured so far, and draw its picture."""
    found = read_runs(results_folder)
    if not any(found.of(recipe) for recipe in RECIPES.values()):
        return ""
    draw(pictures_folder / PICTURE, found)
    text = [how_measured(found, "bottlenecks", RECIPES.values()), AS_IN_QUESTION_1]
    text += ["Random shapes before training:", table(found, 0), "After all tokens:", table(found, 4), verdict(found)]
    text.append(f"![Distance of rectangles before and after training]({pictures_folder.name}/{PICTURE})")
    return "\n\n".join(part for part in text if part)


if __name__ == "__main__":
    plan = [(recipe, SEEDS.get(name, (0,))) for name, recipe in RECIPES.items()]
    run_script(__doc__, plan, answer)
