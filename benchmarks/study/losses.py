"""Question 3: which loss should the shapes learn from, and which shapes should learn in a step?

    python -m benchmarks.study.losses --data DATA --bert MINILM

All start from the calibrated supernet by width, and have the same batches and learning rates. The losses are compared
with the paper's sandwich, which some of them need: the largest, the smallest and a random shape in each step. Then the
sampling is compared with the loss of `examples/make_supernet.py`.

In the authors' older runs in-place distillation helped the largest net and hurt the average one. Here it is compared
with labels alone.
"""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from supershaper_hf import markdown_table
from supershaper_hf.report.plots import new_figure

from .found_runs import AS_IN_QUESTION_1, Found, figure_columns, how_measured, over_seeds, read_runs
from .runs import (
    LABELS,
    OURS,
    OURS_BY_WIDTH,
    OURS_WITH_LABELS,
    PAPER,
    PAPER_BY_WIDTH,
    SANDWICH,
    STATES,
    Recipe,
    run_script,
)
from .study import cell, save_picture


START = "by_width_per_head"
BY_LABELS = {**SANDWICH, **LABELS}
BY_STATES = {**SANDWICH, **STATES}


def by_width(name: str, training: Mapping[str, Any]) -> Recipe:
    return Recipe(name, START, training)


LABELS_ONLY, IN_PLACE = "labels only", "labels and in-place distillation"
LOSSES = {
    LABELS_ONLY: by_width("labels", BY_LABELS),
    IN_PLACE: PAPER_BY_WIDTH,
    "labels and alpha-divergence": by_width("alpha", {**PAPER, "divergence": "alpha"}),
    "labels, in place hidden states and attention": by_width(
        "layers", {**BY_LABELS, "hidden_weight": 1.0, "attention_weight": 1.0}
    ),
    "labels and attention relations of the original": by_width("relations", {**BY_LABELS, "teacher_weight": 1.0}),
    "labels, last hidden state and its mean, 3 random by budget": OURS_WITH_LABELS,
    "last hidden state": by_width("states", BY_STATES),
    "last hidden state and its mean": by_width("states_pooled", {**BY_STATES, "pooled_weight": 1.0}),
    "last hidden state, its mean, and the first token with .5": by_width(
        "states_first", {**BY_STATES, "pooled_weight": 1.0, "first_token_weight": 0.5}
    ),
}
SAMPLINGS = {
    "the sandwich, 1 uniform": LOSSES["last hidden state and its mean"],
    "3 random, uniform": by_width("ours_uniform", {**OURS, "distribution": "uniform"}),
    "3 random, by parameters": by_width("ours_parameters", {**OURS, "distribution": "parameters"}),
    "3 random, by budget (ours)": OURS_BY_WIDTH,
}
SAMPLING = "Sampling, with the last hidden state and its mean as the loss:"
PICTURE = "losses.png"


def table(found: Found, title: str, recipes: Mapping[str, Recipe]) -> str:
    """Return the figures of the largest shape and of the random ones, and of the start before all."""
    rows = []
    start = found.of(Recipe(START, START), 0)
    for name, own in {"before training": start, **{name: found.of(each) for name, each in recipes.items()}}.items():
        if own:
            row: dict[str, Any] = {title: name, "seeds": len(own)}
            row["largest: distance"] = cell(over_seeds(own, "rectangles", "distance", 0))
            row["largest: loss"] = cell(over_seeds(own, "rectangles", "loss", 0))
            row["smallest: distance"] = cell(over_seeds(own, "rectangles", "distance", -1))
            row["smallest: loss"] = cell(over_seeds(own, "rectangles", "loss", -1))
            row |= {f"random: {key}": value for key, value in figure_columns(own).items()}
            rows.append(row)
    return markdown_table(rows) if rows else ""


def verdict(found: Found) -> str:
    """Say whether in-place distillation helps the largest shape and hurts the average one, by masked-LM loss."""
    with_it, without = ({row["seed"]: row for row in found.of(LOSSES[name])} for name in (IN_PLACE, LABELS_ONLY))
    seeds = sorted(with_it.keys() & without.keys())
    if not seeds:
        return ""

    def differences(group: str, index: int | None) -> list[float]:
        pairs = [over_seeds([runs[seed] for seed in seeds], group, "loss", index) for runs in (with_it, without)]
        return [a - b for a, b in zip(*pairs)]

    largest, average = differences("rectangles", 0), differences("random", None)
    helps, hurts = all(each < 0 for each in largest), all(each > 0 for each in average)
    confirmed = {
        (True, True): "confirm it",
        (True, False): "confirm the first half only",
        (False, True): "confirm the second half only",
        (False, False): "do not confirm it",
    }[helps, hurts]
    return (
        f"In-place distillation minus labels alone, masked-LM loss, the same seed ({len(seeds)} of them): "
        f"{cell(largest)} for the largest shape, {cell(average)} for the mean of the random shapes; below 0 it helps. "
        f"The authors' older runs show it helping the largest net and hurting the average one: these runs {confirmed}."
        + (" One seed leaves that open." if len(seeds) == 1 else "")
    )


def draw(file: Path, found: Found) -> None:
    """Draw for each recipe the masked-LM loss of the largest shape against the mean of the random ones."""
    figure, axes = new_figure(9, 5)
    once = {recipe.name: (name, recipe) for name, recipe in {**SAMPLINGS, **LOSSES}.items()}
    for number, (marker, (name, recipe)) in enumerate(zip(itertools.cycle("osv^DPX*<>ph"), once.values())):
        own = found.of(recipe)
        if own:
            places = [over_seeds(own, "rectangles", "loss", 0), over_seeds(own, "random", "loss")]
            axes.plot(*places, marker, color=f"C{number % 10}", linestyle="", label=name)
    axes.set_xlabel("masked-LM loss of the largest shape, nats")
    axes.set_ylabel("masked-LM loss, mean of the random shapes, nats")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save_picture(figure, file)


def answer(results_folder: Path, pictures_folder: Path) -> str:
    """Return the section as Markdown, from what was measured so far, and draw its picture."""
    found = read_runs(results_folder)
    if not any(found.of(recipe) for recipe in {**LOSSES, **SAMPLINGS}.values()):
        return ""
    draw(pictures_folder / PICTURE, found)
    text = [how_measured(found, "losses", {**LOSSES, **SAMPLINGS}.values()), AS_IN_QUESTION_1]
    text.append(
        "Losses. Every step trains the largest shape, the smallest and a random one, as in the paper, unless others "
        "are named. Without labels, nothing teaches the masked-LM head, which is that of the original and reads the "
        "states of each shape:"
    )
    text += [table(found, "loss", LOSSES), verdict(found)]
    text += [SAMPLING, table(found, "shapes of a step", SAMPLINGS)]
    text.append(
        f"![Masked-LM loss of the largest shape and of random shapes, by recipe]({pictures_folder.name}/{PICTURE})"
    )
    return "\n\n".join(part for part in text if part)


if __name__ == "__main__":
    run_script(__doc__, [(recipe, (0,)) for recipe in {**LOSSES, **SAMPLINGS}.values()], answer)
