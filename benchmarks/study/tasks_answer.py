"""The answer to question 6, out of the rows that `tasks.py` has measured."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from supershaper_hf import markdown_table
from supershaper_hf.report.plots import new_figure

from .compared import INT8, KINDS, ORIGINAL, SUPERNET
from .shapes import FIRST_LAYERS, RECTANGLE, SEARCHED, SHARES
from .study import Row, Target, command_and_machine, mean_and_spread, read_rows, read_settings, save_picture


QUESTION = "tasks"
PICTURE = "tasks.png"
TASKS = ("cola", "sst2", "mrpc", "stsb")
GUESSED = "rte"  # measured of the original only
DATA = "data"  # the file of results of data.py, which has the score of guessing on each task
GUESS = "always the same answer"
TUNED, SUPER = "fine-tuned", "super"  # ways to a fine-tuned model: each by itself, and all shapes at once
UNTAUGHT, SUPER_FIRST, LONGER = "untaught", "super_first", "longer"  # other ways, which are tried on one task
TRIED_ON, TIMES_LONGER = "stsb", 3  # the task, and how many times the steps
TRIED = {  # way -> its words
    TUNED: "as above",
    UNTAUGHT: "without the teacher",
    SUPER: "super fine-tuning",
    SUPER_FIRST: "super fine-tuning, then alone",
    LONGER: f"alone, {TIMES_LONGER} times the steps",
}
RANDOM = "random"
GUESSES_WITHIN = 3.0  # points above guessing: the standard error of an accuracy of 277 examples
KEPT = {0.60: 0.98, 0.30: 0.94}  # share of the encoder -> share of the original's mean score to keep
ABOVE_FIRST_LAYERS = {0.60: 1.5}  # share of the encoder -> points above the first layers
MISSING = "-"

SCORES = (
    "The scores are those of GLUE, times 100, on the validation examples: Matthews correlation for cola, accuracy for "
    "sst2, the mean of accuracy and F1 for mrpc, and the mean of both correlations for stsb."
)
NOT_GLUE = {"sst2": "sentences", "mrpc": "not GLUE's split", "stsb": "pairs of STS 2012 to 2015, not GLUE's STS-B"}


def answer(results_folder: Path, pictures_folder: Path) -> str:
    """Return the section as Markdown, from what was measured so far, and draw its picture; "" if there is no row."""
    rows = read_rows(results_folder, QUESTION)
    if not rows:
        return ""
    settings = read_settings(results_folder, QUESTION)
    tuned = fine_tuned(rows)
    text = [command_and_machine(results_folder, QUESTION, "tasks")]
    text.append(" ".join(part for part in (SCORES, examples_text(results_folder)) if part))
    text.append(recipe_text(settings["recipe"], rows))
    if tuned:
        guesses = scores_of_guesses(results_folder)
        text += [scores_table(tuned, guesses), above_guessing(tuned, guesses), missing_text(tuned)]
        if met := [target.row() for target in targets(results_folder)]:
            text.append(markdown_table(met))
        text += ["8-bit integers (the same models, exported):", int8_table(tuned), guessed_text(tuned, guesses)]
    text += [super_text(rows), tried_text(rows)]
    if any(mean_scores(tuned, model) for model in models_of(tuned)):
        draw(pictures_folder / PICTURE, tuned)
        text.append(f"![Mean task score over the parameters of the encoder]({pictures_folder.name}/{PICTURE})")
    return "\n\n".join(part for part in text if part)


def fine_tuned(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of models that were fine-tuned each by itself, see `whole_seeds`."""
    return whole_seeds([row for row in rows if row["way"] == TUNED])


def recipe_text(recipe: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Return how the models were fine-tuned and scored."""
    seeds = sorted({row["seed"] for row in rows})
    weight = next((row["weight"] for row in rows if row.get("weight")), None)
    of_states = next((row["state_weight"] for row in rows if row.get("state_weight")), None)
    states = f", and the relative error to its last hidden states is added with the weight {of_states}"
    taught = (
        f"Supernet and subnets have a teacher: the fine-tuned original, of the seed that scored best. {weight:.0%} of "
        f"the loss is the distance to its logits{states if of_states else ''}. "
        if weight
        else ""
    )
    return (
        f"Common to all models: as many epochs as come nearest to {recipe['steps']:,} steps, with "
        f"AdamW, a learning rate of {recipe['learning_rate']:g}, {recipe['batch_size']} examples of similar length in "
        f"a step, at most {recipe['max_length']} tokens, bfloat16. {taught}Scores are computed in float32. Seeds "
        f"{', '.join(map(str, seeds))}: mean ± standard deviation; a number without ± is of one seed. Processor "
        "seconds are those of fine-tuning on the four tasks with one seed, with what the teacher is asked."
    )


def examples_text(folder: Path) -> str:
    """Return how many examples each task has; "" if they were not counted."""
    counts = {row["file"]: row["examples"] for row in read_rows(folder, DATA)}
    words = []
    for task in TASKS:
        of = [counts.get(f"tasks/{task}/{split}.csv") for split in ("train", "validation")]
        if None in of:
            return ""
        note = f" ({NOT_GLUE[task]})" if task in NOT_GLUE else ""
        words.append(f"{task}{note} {of[0]:,} and {of[1]:,}")
    return f"Examples to train on and to score: {', '.join(words)}."


def scores_of_guesses(folder: Path) -> dict[str, float]:
    """Return the score of always giving the same answer on the validation examples of each task."""
    files = {row["file"]: row["guess"] for row in read_rows(folder, DATA)}
    found = {task: files.get(f"tasks/{task}/validation.csv") for task in (*TASKS, GUESSED)}
    return {task: score for task, score in found.items() if score is not None}


def guessed_text(rows: Sequence[Row], guesses: Mapping[str, float]) -> str:
    """Return why there are no subnets on one of the five tasks."""
    scores = scores_of(rows, ORIGINAL, GUESSED).values()
    if not scores or GUESSED not in guesses:
        return ""
    more = statistics.fmean(scores) > guesses[GUESSED] + GUESSES_WITHIN
    why = "it guesses. A subnet that guesses, too, would keep all of that"
    return (
        f"On rte, fine-tuned in the same way (`--only original --tasks rte`), the original itself has {shown(scores)}, "
        f"where the more frequent answer has {guesses[GUESSED]:.1f}: {'no subnet was measured' if more else why}, so "
        "rte is left out of the tables and of the means."
    )


# Rows of one model


def models_of(rows: Sequence[Row]) -> list[str]:
    """Return the names of the models in `rows`, from the largest budget to the smallest, the original first."""
    first = {row["model"]: row for row in rows}
    kinds = [ORIGINAL, SUPERNET, *KINDS, RANDOM]
    return sorted(first, key=lambda name: (-(first[name]["share"] or 2), kinds.index(first[name]["kind"])))


def whole_seeds(rows: Sequence[Row]) -> list[Row]:
    """Return the rows without those of seeds of a model that lack a task, unless the model has no other seed."""
    tasks: dict[tuple[str, int], set[str]] = {}
    for row in rows:
        tasks.setdefault((row["model"], row["seed"]), set()).add(row["task"])
    whole = {key for key, own in tasks.items() if own >= set(TASKS)}
    models = {model for model, _ in whole}
    return [row for row in rows if row["model"] not in models or (row["model"], row["seed"]) in whole]


def model_named(rows: Sequence[Row], kind: str, share: float) -> str | None:
    """Return the name of the model of a kind and a budget, if it was measured."""
    return next((row["model"] for row in rows if (row["kind"], row["share"]) == (kind, share)), None)


def scores_of(rows: Sequence[Row], model: str, task: str, figure: str = "score") -> dict[int, float]:
    """Return the scores of a model on a task by seed."""
    return {row["seed"]: row[figure] for row in rows if (row["model"], row["task"]) == (model, task)}


def mean_scores(rows: Sequence[Row], model: str | None, figure: str = "score") -> list[float]:
    """Return the mean over all tasks of each seed that was measured on all of them."""
    if model is None:
        return []
    by_task = [scores_of(rows, model, task, figure) for task in TASKS]
    seeds = sorted(set.intersection(*(set(scores) for scores in by_task)))
    return [statistics.fmean(scores[seed] for scores in by_task) for seed in seeds]


def share_kept(rows: Sequence[Row], model: str | None, figure: str = "score") -> float | None:
    """Return a model's mean score as a share of that of the original in float32; `None` if one is missing."""
    own, original = mean_scores(rows, model, figure), mean_scores(rows, ORIGINAL)
    return statistics.fmean(own) / statistics.fmean(original) if own and original else None


def shown(values: Iterable[float]) -> str:
    """Return mean ± standard deviation."""
    values = list(values)
    if not values:
        return MISSING
    mean, spread = mean_and_spread(values)
    return f"{mean:.1f}" if spread is None else f"{mean:.1f} ± {spread:.1f}"


def percent(share: float | None) -> str:
    return MISSING if share is None else f"{share:.1%}"


# Tables


def scores_table(rows: Sequence[Row], guesses: Mapping[str, float]) -> str:
    """Return a table of the scores of every model, and of guessing."""
    first = {row["model"]: row for row in rows}
    table = [
        {
            "model": name,
            "shape": MISSING if first[name]["shape"] is None else str(first[name]["shape"]),
            "encoder": percent(first[name]["encoder"]),
            **score_cells(rows, name),
            "of the original": percent(share_kept(rows, name)),
            "int8": shown(mean_scores(rows, name, INT8)),
            "int8 of the original": percent(share_kept(rows, name, INT8)),
            "processor seconds": shown_seconds(rows, name),
        }
        for name in models_of(rows)
    ]
    table += [dict.fromkeys(table[0], MISSING) | cells for cells in guess_cells(guesses)]
    return markdown_table(table)


def score_cells(rows: Sequence[Row], model: str) -> dict[str, str]:
    """Return the cells of a table with the scores of a model on each task, and their mean."""
    scores = {task: shown(scores_of(rows, model, task).values()) for task in TASKS}
    return {"model": model, **scores, "mean": shown(mean_scores(rows, model))}


def guess_cells(guesses: Mapping[str, float]) -> list[dict[str, str]]:
    """Return the row of a table with the scores of giving always the same answer, if they are known."""
    if not guesses.keys() >= set(TASKS):
        return []
    scores = {task: [guesses[task]] for task in TASKS} | {"mean": [statistics.fmean(guesses[task] for task in TASKS)]}
    return [{"model": GUESS, **{name: shown(values) for name, values in scores.items()}}]


def above_guessing(rows: Sequence[Row], guesses: Mapping[str, float]) -> str:
    """Say what share of the original's points above guessing the searched shapes keep; "" if something is missing."""
    cells, words = guess_cells(guesses), []
    original = mean_scores(rows, ORIGINAL)
    if not cells or not original:
        return ""
    guess = statistics.fmean(guesses[task] for task in TASKS)
    for share in SHARES:
        name = model_named(rows, SEARCHED, share)
        if name is not None and (own := mean_scores(rows, name)):
            kept = (statistics.fmean(own) - guess) / (statistics.fmean(original) - guess)
            words.append(f"{name} {kept:.0%}")
    return f"Of the points above the same answer for everything, these are kept: {', '.join(words)}." if words else ""


def shown_seconds(rows: Sequence[Row], model: str) -> str:
    """Return the seconds of fine-tuning on all tasks with one seed."""
    by_task = [
        [row["seconds"] for row in rows if (row["model"], row["task"]) == (model, task) and row["seconds"] is not None]
        for task in TASKS
    ]
    return f"{sum(map(statistics.fmean, by_task)):,.0f}" if all(by_task) else MISSING


def int8_table(rows: Sequence[Row]) -> str:
    """Return a table of the scores of the 8-bit files, and how far they are from float32."""
    table = []
    for name in models_of(rows):
        own, whole = mean_scores(rows, name, INT8), mean_scores(rows, name)
        change = f"{statistics.fmean(own) - statistics.fmean(whole):+.1f}" if own and whole else MISSING
        scores = {task: shown(scores_of(rows, name, task, INT8).values()) for task in TASKS}
        table.append({"model": name, **scores, "mean": shown(own), "minus float32": change})
    return markdown_table(table)


def targets(results_folder: Path) -> list[Target]:
    """Return what was to be reached, as far as it was measured. Without a spread of seeds it is open who is better."""
    rows, found = fine_tuned(read_rows(results_folder, QUESTION)), []
    for share, least in KEPT.items():
        kept = share_kept(rows, model_named(rows, SEARCHED, share))
        if kept is not None:
            what = f"searched {share:.0%}: share of the original's mean score"
            found.append(Target(what, f"at least {least:.0%}", percent(kept), kept >= least))
    for share in SHARES:
        searched = mean_scores(rows, model_named(rows, SEARCHED, share))
        for kind in (FIRST_LAYERS, RECTANGLE):
            other = mean_scores(rows, model_named(rows, kind, share))
            if not searched or not other:
                continue
            difference = statistics.fmean(searched) - statistics.fmean(other)
            least = ABOVE_FIRST_LAYERS.get(share, 0.0) if kind == FIRST_LAYERS else 0.0
            spreads = [mean_and_spread(values)[1] for values in (searched, other)]
            spread = None if None in spreads else max(each for each in spreads if each is not None)
            known = "one seed" if spread is None else f"spread of the seeds: {spread:.1f}"
            what = f"searched {share:.0%}: points above {kind} ({known})"
            met = None if spread is None else difference >= max(least, spread)
            found.append(Target(what, f"at least {least:.1f}, and the spread", f"{difference:+.1f}", met))
    return found


def super_text(rows: Sequence[Row]) -> str:
    """Return what super fine-tuning reaches: the same shapes, fine-tuned at once and each on its own."""
    at_once = [row for row in rows if row["way"] == SUPER]
    each = [row for row in rows if row["way"] == TUNED]
    table = []
    for name in models_of([row for row in at_once if row["kind"] != RANDOM]):
        cells = {}
        for task in TASKS:
            own = scores_of(at_once, name, task)
            others = scores_of(each, name, task)
            alone = f"{statistics.fmean(others.values()):.1f}" if others else MISSING
            cells[task] = f"{statistics.fmean(own.values()):.1f} / {alone}" if own else MISSING
        mean = " / ".join(shown(mean_scores(group, name)).split(" ±")[0] for group in (at_once, each))
        table.append({"model": name, **cells, "mean": mean})
    if not table:
        return ""
    text = "Super fine-tuning (all shapes at once, one seed) / fine-tuning each (mean of the seeds):"
    random = [mean_scores(at_once, name) for name in models_of(at_once) if name.startswith(RANDOM)]
    means = [values[0] for values in random if values]
    summary = (
        f"{len(means)} random shapes after super fine-tuning have mean scores from {min(means):.1f} to "
        f"{max(means):.1f}, {statistics.fmean(means):.1f} on average."
        if means
        else ""
    )
    return "\n\n".join(part for part in (text, markdown_table(table), summary) if part)


def missing_text(rows: Sequence[Row]) -> str:
    """Say which of the planned models were not fine-tuned each by itself; "" if none is missing."""
    shares = [f"{share:.0%} of the encoder" for share in SHARES if model_named(rows, SEARCHED, share) is None]
    missing = shares + ([] if any(row["kind"] == SUPERNET for row in rows) else ["the supernet"])
    if not missing:
        return ""
    return f"Not fine-tuned, because time was short and seeds were preferred to sizes: {', '.join(missing)}."


def tried_text(rows: Sequence[Row]) -> str:
    """Return what other ways to a fine-tuned model reach: scores of one task with the first seed."""
    seed = min(row["seed"] for row in rows)
    own = [row for row in rows if (row["task"], row["seed"]) == (TRIED_ON, seed)]
    table = []
    for name in models_of([row for row in own if row["way"] in (UNTAUGHT, SUPER_FIRST, LONGER)]):
        scores = {row["way"]: row["score"] for row in own if row["model"] == name}
        table.append(
            {"model": name, **{words: shown([scores[way]] if way in scores else []) for way, words in TRIED.items()}}
        )
    if not table:
        return ""
    return (
        f"Other ways, tried on {TRIED_ON}, where subnets lose the most points, seed {seed}:\n\n{markdown_table(table)}"
    )


def draw(file: Path, rows: Sequence[Row]) -> None:
    """Draw the mean score of every model over the parameters of its encoder, with the spread of the seeds."""
    figure, axes = new_figure(6.5, 4)
    first = {row["model"]: row for row in rows}
    for number, kind in enumerate(KINDS):
        names = [name for name in models_of(rows) if first[name]["kind"] == kind and mean_scores(rows, name)]
        if names:
            means, spreads = zip(*(mean_and_spread(mean_scores(rows, name)) for name in names))
            places = [first[name]["encoder"] for name in names]
            errors = [spread or 0.0 for spread in spreads]
            axes.errorbar(places, means, errors, fmt="o-", capsize=3, color=f"C{number}", label=kind.replace("_", " "))
    for name, style in ((ORIGINAL, "-"), (SUPERNET, ":")):
        scores = mean_scores(rows, name)
        if scores:
            axes.axhline(statistics.fmean(scores), color="0.4", linestyle=style, label=name)
    axes.set_xlabel("encoder, share of the original's parameters")
    axes.set_xlim(min(SHARES) - 0.05, max(SHARES) + 0.05)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_ylabel("mean score of the tasks")
    axes.legend(frameon=False)
    save_picture(figure, file)
