"""Question 5: what does a shape lose by sharing its weights with all others?

    python -m benchmarks.study.sharing --data DATA --bert MINILM

Each chosen shape is inherited from the supernet that the recipe of `examples/make_supernet.py` has trained, and also
cut from the same calibrated start and trained alone, with the same losses. Both runs have read the same tokens. Alone,
a shape learns from all of them; in the supernet each step trains three random shapes. Alone, the learning rate is one
of two, and the better one counts.
"""

from pathlib import Path

from supershaper_hf import markdown_table
from supershaper_hf.report.plots import new_figure

from .found_runs import AS_IN_QUESTION_1, Found, figure_columns, how_measured, over_seeds, read_runs
from .runs import COMMON, OURS_BY_WIDTH, STATES, Recipe, run_script
from .study import Row, Target, save_picture


NUM_SHAPES = 3
RATES = (3e-4, 5e-4)
TARGET = 0.05
PICTURE = "sharing.png"


def alone(shape: int, rate: float) -> Recipe:
    """Return the training of a chosen shape alone. Nothing is shared, so all weights learn at the same rate."""
    training = {**COMMON, **STATES, "pooled_weight": 1.0, "sampling": "fixed", "learning_rate": rate}
    return Recipe(
        f"alone-{shape}-{rate:g}", OURS_BY_WIDTH.start, training | {"shared_learning_rate_scale": 1.0}, (4,), shape
    )


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def best_alone(found: Found, shape: int) -> Recipe | None:
    """Return the training with the better learning rate, by distance; None if one was not measured."""
    measured = [recipe for rate in RATES if found.of(recipe := alone(shape, rate))]
    if len(measured) < len(RATES):
        return None
    return min(measured, key=lambda recipe: mean(over_seeds(found.of(recipe), "chosen", "distance")), default=None)


def supernets(found: Found, alone: Recipe, quarters: int = 4) -> list[Row]:
    """Return the rows of the supernet with the seeds that the shape was trained alone with, too."""
    seeds = {row["seed"] for row in found.of(alone)}
    return [row for row in found.of(OURS_BY_WIDTH, quarters) if row["seed"] in seeds]


def excess(found: Found, shape: int) -> float | None:
    """Return by what share of the distance alone the inherited shape is further away; None if one is missing."""
    recipe = best_alone(found, shape)
    supernet = [] if recipe is None else supernets(found, recipe)
    if recipe is None or not supernet:
        return None
    inherited = mean(over_seeds(supernet, "chosen", "distance", shape))
    return inherited / mean(over_seeds(found.of(recipe), "chosen", "distance")) - 1


def table(found: Found) -> str:
    rows = []
    for shape, text in enumerate(found.settings["chosen"]):
        recipe = best_alone(found, shape)
        if recipe is None:
            continue
        ends = found.of(recipe)
        kinds = {
            "at the start": (supernets(found, recipe, 0), shape),
            "inherited": (supernets(found, recipe), shape),
            f"alone, {recipe.training['learning_rate']:g}": (ends, 0),
        }
        for kind, (own, index) in kinds.items():
            row = {"shape": text, "encoder": f"{ends[0]['share_of_encoder']:.0%}", "weights": kind}
            difference = excess(found, shape) if kind == "inherited" else None
            more = "" if difference is None else f"{difference:+.1%}"
            rows.append({**row, **figure_columns(own, "chosen", index), "distance against alone": more})
    return markdown_table(rows)


def differences(found: Found) -> list[float]:
    """Return by what share of the distance alone each inherited shape is further away, of those that were measured."""
    each = [excess(found, shape) for shape in range(NUM_SHAPES)]
    return [difference for difference in each if difference is not None]


def targets(results_folder: Path) -> list[Target]:
    """Return what was to be reached, as far as it was measured."""
    known = differences(read_runs(results_folder))
    if not known:
        return []
    what = "inherited, after 72 steps: distance above that of the same shape trained alone, largest"
    return [Target(what, f"at most {TARGET:.0%}", f"{max(known):+.1%}", max(known) <= TARGET)]


def verdict(found: Found) -> str:
    known = differences(found)
    if not known:
        return ""
    within = sum(each <= TARGET for each in known)
    return (
        f"The target is an inherited distance within {TARGET:.0%} of that of the shape trained alone: it is met by "
        f"{within} of {len(known)} shapes; the largest difference is {max(known):+.1%}."
    )


def draw(file: Path, found: Found) -> None:
    """Draw the distance of each shape at the start, inherited, and trained alone."""
    figure, axes = new_figure(7, 4)
    names: list[str] = []
    for shape, text in enumerate(found.settings["chosen"]):
        recipe = best_alone(found, shape)
        if recipe is None:
            continue
        groups = ((supernets(found, recipe, 0), shape), (supernets(found, recipe), shape), (found.of(recipe), 0))
        for number, (own, index) in enumerate(groups):
            values = over_seeds(own, "chosen", "distance", index)
            if values:
                axes.bar(len(names) + 0.25 * (number - 1), mean(values), width=0.25, color=f"C{number}")
        names.append(text)
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_ylabel("distance to the original")
    handles = [axes.bar(0, 0, color=f"C{number}") for number in range(3)]
    axes.legend(handles, ["at the start", "inherited", "trained alone"])
    save_picture(figure, file)


def answer(results_folder: Path, pictures_folder: Path) -> str:
    """Return the section as Markdown, from what was measured so far, and draw its picture."""
    found = read_runs(results_folder)
    trained = [best_alone(found, shape) for shape in range(NUM_SHAPES)]
    if not any(trained):
        return ""
    draw(pictures_folder / PICTURE, found)
    text = [how_measured(found, "sharing", [recipe for recipe in trained if recipe is not None]), AS_IN_QUESTION_1]
    text += [
        table(found),
        verdict(found),
        f"![Distance at the start, inherited, and trained alone]({pictures_folder.name}/{PICTURE})",
    ]
    return "\n\n".join(part for part in text if part)


if __name__ == "__main__":
    recipes = [OURS_BY_WIDTH, *(alone(shape, rate) for shape in range(NUM_SHAPES) for rate in RATES)]
    run_script(__doc__, [(recipe, (0,)) for recipe in recipes], answer)
