"""The answer to question 4, out of the rows of `shape_search.py`: tables, whether the targets are met, pictures."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import kendalltau

from supershaper_hf import markdown_table
from supershaper_hf.files import read_json
from supershaper_hf.report.plots import new_figure
from supershaper_hf.search.quality import Quality

from .shapes import HAND_CRAFTED, SEARCHED
from .study import FORMAT, STS, Row, Target, cell, mean_and_spread, number, read_rows, save_picture


QUESTION = "shape_search"
SHARES = (0.60, 0.45, 0.30)
EVOLUTIONARY, HEURISTIC = "evolutionary", "heuristic"
NAMES = (SEARCHED, EVOLUTIONARY, HEURISTIC, *HAND_CRAFTED)
MEAN = "mean of the tasks"
PARTS = "parts"  # rows with the figures of a shape on each part of the text
BUDGETS = "budgets"  # rows with what is predicted at many budgets
DISTANCE, ALL_LAYERS = "distance", "all_layers"  # in the last layer; in all layers, which subnets do not have
FIGURES = {ALL_LAYERS: "distance in all layers", DISTANCE: "distance", "cosine": "cosine", STS: "STS"}
COMPARED = (ALL_LAYERS, DISTANCE, STS)
UNKNOWN, SAME = "-", "the same shape"
VERDICTS = ("better", SAME, "within the spread", "worse")
RESAMPLINGS = 500  # of the shapes, for the error of a correlation
FEWEST = 3  # shapes that a correlation needs
PICTURE, TASKS_PICTURE = "shape_search.png", "distance_and_tasks.png"
WITHIN, KENDALL, TASKS_KENDALL = 0.02, 0.85, 0.7  # targets: the heuristic; the predictor; distance against scores


Key = tuple[int, ...]  # a shape


class Found:
    """What the file of results holds, by kind of row."""

    def __init__(self, folder: Path) -> None:
        content = read_json(folder / f"{QUESTION}.json", FORMAT)
        self.settings, self.machine, rows = content["settings"], content["machine"], content["rows"]
        self.shapes = {(row["share"], row["name"]): row for row in rows if row["kind"] == "shape"}
        self.inherited = {tuple(row["shape"]): row for row in rows if row["kind"] == "inherited"}
        self.parts = {tuple(row["shape"]): row for row in rows if row["kind"] == PARTS}
        self.budgets = [row for row in rows if row["kind"] == BUDGETS]
        self.held_out = [row for row in rows if row["kind"] == "held_out"]
        self.original = next((row for row in rows if row["kind"] == "original"), None)
        self.trained = best_rates([row for row in rows if row["kind"] == "trained"])

    def values(self, share: float, name: str, figure: str, trained: bool) -> list[float]:
        """Return a figure of a shape: as it was cut out, or after training with each seed. It may be missing."""
        row = self.shapes.get((share, name))
        if row is None:
            return []
        key = tuple(row["shape"])
        rows = self.trained.get(key, []) if trained else [self.inherited[key]] if key in self.inherited else []
        return [row[figure] for row in rows if figure in row]

    def same(self, share: float, first: str, second: str) -> bool:
        """Return whether two names mean the same shape."""
        return bool(self.shapes[share, first]["shape"] == self.shapes[share, second]["shape"])

    def error(self, share: float, first: str, second: str, figure: str) -> float | None:
        """Return twice the standard error of the difference between two inherited shapes.

        It is that of paired differences, one for each part of the text; `None` if they were not measured.
        """
        pair = [self.parts.get(tuple(self.shapes[share, name]["shape"]), {}).get(figure) for name in (first, second)]
        if None in pair:
            return None
        differences = np.subtract(*pair)
        return 2 * float(differences.std(ddof=1)) / len(differences) ** 0.5

    def spread(self, figure: str) -> float | None:
        """Return the largest standard deviation of a figure over seeds; `None` if nothing has several seeds."""
        known = [[row[figure] for row in rows if figure in row] for rows in self.trained.values()]
        spreads = [mean_and_spread(values)[1] for values in known if values]
        return max((spread for spread in spreads if spread is not None), default=None)


def best_rates(rows: Sequence[Row]) -> dict[Key, list[Row]]:
    """Return the rows of each trained shape, of that learning rate whose mean distance is the lowest."""
    found: dict[Key, dict[float, list[Row]]] = {}
    for row in rows:
        found.setdefault(tuple(row["shape"]), {}).setdefault(row["rate"], []).append(row)
    return {
        shape: min(of.values(), key=lambda own: mean_and_spread([row["distance"] for row in own])[0])
        for shape, of in found.items()
    }


def percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %")


def shapes_table(found: Found, share: float) -> str:
    """Return the table of one budget."""
    rows = []
    for name in NAMES:
        row = found.shapes.get((share, name))
        if row is not None:
            predicted = row["predicted"]
            cells = {"shape": name, "widths": str(row["shape"]), "parameters": f"{row['parameters']:,}"}
            cells["predicted"] = "-" if predicted is None else f"{predicted:.3f}"
            for trained, words in ((False, ""), (True, ", trained")):
                for figure, title in FIGURES.items():
                    if not (trained and figure == ALL_LAYERS):
                        cells[title + words] = cell(found.values(share, name, figure, trained), figure)
            rows.append(cells)
    return markdown_table(rows)


def comparisons(found: Found) -> list[dict[str, Any]]:
    """Compare the front's shape with the best hand-crafted one, for each budget, figure and stage that is measured.

    `gain` is positive if the front's shape is better. The spread of trained shapes is that of seeds. No seed decides
    what is inherited: there it is the error of the difference, see `Found.error`.
    """
    compared = []
    for share, figure, trained in itertools.product(SHARES, COMPARED, (False, True)):
        sign = 1 if figure == STS else -1
        front = found.values(share, SEARCHED, figure, trained)
        hands = {name: values for name in HAND_CRAFTED if (values := found.values(share, name, figure, trained))}
        if front and hands:
            best = max(hands, key=lambda name: sign * mean_and_spread(hands[name])[0])
            gain = sign * (mean_and_spread(front)[0] - mean_and_spread(hands[best])[0])
            own = {"share": share, "figure": figure, "trained": trained, "front": front, "best": best}
            spread = found.spread(figure) if trained else found.error(share, SEARCHED, best, figure)
            own["same"] = found.same(share, SEARCHED, best)
            compared.append({**own, "hand": hands[best], "gain": gain, "spread": spread})
    return compared


def comparison_table(compared: Sequence[dict[str, Any]]) -> str:
    return markdown_table(
        [
            {
                "share of the encoder": percent(each["share"]),
                "measured": FIGURES[each["figure"]] + (", trained" if each["trained"] else ""),
                "front": cell(each["front"], each["figure"]),
                "best hand-crafted": f"{cell(each['hand'], each['figure'])} ({each['best']})",
                "difference": number(each["gain"], each["figure"], "+"),
                "spread": "not known" if each["spread"] is None else number(each["spread"], each["figure"]),
                "the front is": judged(each),
            }
            for each in compared
        ]
    )


def judged(each: dict[str, Any]) -> str:
    """Return whether the front's shape is better or worse than the best hand-crafted one."""
    if each["same"]:
        return SAME
    if each["spread"] is None:
        return UNKNOWN
    return "within the spread" if abs(each["gain"]) <= each["spread"] else "better" if each["gain"] > 0 else "worse"


def at_least_as_good(verdicts: Sequence[str]) -> bool:
    """Return whether the front's shape is better than all hand-crafted ones, or one of them, at every budget."""
    return all(verdict in ("better", SAME) for verdict in verdicts)


def verdict_on_search(compared: Sequence[dict[str, Any]]) -> str:
    """Say where the front's shape is better than every hand-crafted one."""
    table = []
    for figure, trained in itertools.product(COMPARED, (False, True)):
        own = [judged(each) for each in compared if (each["figure"], each["trained"]) == (figure, trained)]
        if own:
            counts = {word: own.count(word) for word in VERDICTS}
            met = "yes" if at_least_as_good(own) else "no"
            table.append({"by": FIGURES[figure] + (", trained" if trained else ""), **counts, "met": met})
    return (
        "A positive difference means that the front's shape is better. The spread of trained shapes is that of seeds, "
        "the largest that was measured. No seed decides what is inherited: its spread is twice the standard error of "
        "the difference, over parts of the text or of the pairs.\n\n"
        "The target is a shape of the front that is at least as good as every hand-crafted one at every budget: better "
        "by more than the spread, or the same shape. Budgets at which it is:\n\n"
        f"{markdown_table(table)}\n\n"
        "The distance in all layers is what the search has minimised and what agrees with scores after fine-tuning; "
        "shapes that are wide at the end copy the last states better."
    )


def heuristic_gaps(found: Found) -> list[tuple[float, bool, float]]:
    """Return how much further away the heuristic's shape is than the front's, relative to it.

    One for each share of the encoder, as it was cut out (in all layers) and after training (in the last one).
    """
    gaps = []
    for share, trained in itertools.product(SHARES, (False, True)):
        figure = DISTANCE if trained else ALL_LAYERS
        front, own = (found.values(share, name, figure, trained) for name in (SEARCHED, HEURISTIC))
        if front and own:
            gaps.append((share, trained, mean_and_spread(own)[0] / mean_and_spread(front)[0] - 1))
    return gaps


def predicted_gaps(found: Found) -> list[float]:
    """Return by how much the heuristic's shape is predicted to be further away than the front's, for many budgets."""
    return [row[HEURISTIC] / row[SEARCHED] - 1 for row in found.budgets]


def verdict_on_others(found: Found) -> str:
    """Say how far the heuristic and the evolutionary search are from the front."""
    gaps = heuristic_gaps(found)
    if not gaps:
        return ""
    words = [f"{gap:+.1%} at {percent(share)}{' (trained)' if trained else ''}" for share, trained, gap in gaps]
    met = all(gap <= WITHIN for _, _, gap in gaps)
    pairs = [
        [found.shapes[share, name]["shape"] for name in (SEARCHED, EVOLUTIONARY)]
        for share in SHARES
        if {(share, SEARCHED), (share, EVOLUTIONARY)} <= found.shapes.keys()
    ]
    same = sum(exact == evolved for exact, evolved in pairs)
    return (
        "The distance of the heuristic shape (in all layers; after training, in the last one), relative to that of the "
        f"front's: {', '.join(words)}. The target, at most {WITHIN:+.0%} at every budget, is "
        f"{'met' if met else 'missed'} there. {verdict_on_predicted(found)}The evolutionary search finds the shape of "
        f"the exact front at {same} of {len(pairs)} budgets."
    )


def verdict_on_predicted(found: Found) -> str:
    """Say how far the heuristic is predicted to be from the front at many budgets."""
    gaps, shares = predicted_gaps(found), [row["share"] for row in found.budgets]
    if not gaps:
        return ""
    return (
        f"As the predictor has it, at {len(gaps)} budgets from {percent(min(shares))} to {percent(max(shares))}, the "
        f"heuristic's shape is further away by {np.mean(gaps):.1%} on average and {max(gaps):.1%} at most, by more "
        f"than {WITHIN:.0%} at {sum(gap > WITHIN for gap in gaps)}. "
    )


def predictor_quality(found: Found) -> Quality:
    """Return how well the predictor predicts random shapes."""
    measured, predicted = ([row[name] for row in found.held_out] for name in ("distance", "predicted"))
    return Quality.of(np.array(measured), np.array(predicted), "distance")


def verdict_on_predictor(found: Found) -> str:
    """Say how well the predictor predicts random shapes."""
    quality = predictor_quality(found)
    return (
        f"The predictor, fitted on {found.settings['fitted_on']} shapes, on {len(found.held_out)} random ones that "
        f"were not measured in the search: R2 {quality.r2:.3f}, Spearman {quality.spearman:.3f}, Kendall "
        f"{quality.kendall:.3f}, root mean square error {quality.rmse:.3f}. The target, a Kendall of at least "
        f"{KENDALL}, is {'met' if quality.kendall >= KENDALL else 'missed'}."
    )


# Distance against the scores of tasks


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


def rank_correlations(found: Found, scores: dict[str, dict[Key, float]]) -> list[dict[str, Any]]:
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


def correlation_gains(found: Found, means: dict[Key, float]) -> dict[str, tuple[float, float, float]]:
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


def targets(results_folder: Path) -> list[Target]:
    """Return what was to be reached, as far as it was measured."""
    if not (results_folder / f"{QUESTION}.json").exists():
        return []
    found, targets = Found(results_folder), []
    for figure, trained in itertools.product(COMPARED, (False, True)):
        of = [each for each in comparisons(found) if (each["figure"], each["trained"]) == (figure, trained)]
        own = [judged(each) for each in of]
        if own and UNKNOWN not in own:
            words = FIGURES[figure] + (", trained" if trained else "")
            what = f"searched shape, {words}: at least as good as every hand-crafted one"
            good = sum(at_least_as_good([verdict]) for verdict in own)
            targets.append(Target(what, f"at {len(own)} budgets", f"at {good}", good == len(own)))
    if gaps := [gap for _, _, gap in heuristic_gaps(found)]:
        what = "heuristic: distance above that of the searched shape, largest at three budgets"
        targets.append(Target(what, f"at most {WITHIN:.0%}", f"{max(gaps):+.1%}", max(gaps) <= WITHIN))
    if gaps := predicted_gaps(found):
        what = f"heuristic: the same as predicted, largest at {len(gaps)} budgets"
        targets.append(Target(what, f"at most {WITHIN:.0%}", f"{max(gaps):+.1%}", max(gaps) <= WITHIN))
    if len(found.held_out) >= FEWEST:
        kendall, what = predictor_quality(found).kendall, "predictor: Kendall, shapes that it was not fitted on"
        targets.append(Target(what, f"at least {KENDALL}", f"{kendall:.3f}", kendall >= KENDALL))
    correlations = rank_correlations(found, task_scores(results_folder))
    if correlations and correlations[0]["task"] == MEAN:
        value, size = (correlations[0][name] for name in (FIGURES[ALL_LAYERS], "parameters"))
        what = f"distance in all layers against mean task score: Kendall (parameters alone: {size:.3f})"
        targets.append(Target(what, f"at least {TASKS_KENDALL}", f"{value:.3f}", value >= TASKS_KENDALL))
    return targets


# Pictures


def draw_shapes(file: Path, found: Found) -> None:
    """Draw the distances of each shape, a panel for each budget: in all layers inherited, in the last one trained."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, share in zip(figure.subplots(1, len(SHARES), sharey=True), SHARES):
        for place, name in enumerate(reversed(NAMES)):
            color = "C3" if name == SEARCHED else "C0" if name in HAND_CRAFTED else "C1"
            for of, trained, face in ((ALL_LAYERS, False, color), (DISTANCE, True, "white")):
                values = found.values(share, name, of, trained)
                axes.plot(values, [place] * len(values), "o", color=color, markerfacecolor=face)
        axes.set_yticks(range(len(NAMES)), [name.replace("_", " ") for name in reversed(NAMES)])
        axes.set_title(f"{percent(share)} of the encoder", fontsize=10)
        axes.set_xlabel("distance in all layers (hollow: last layer, trained)", fontsize=9)
        axes.grid(alpha=0.3)
    save_picture(figure, file)


def draw_tasks(file: Path, found: Found, means: dict[Key, float]) -> None:
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


def how_measured(found: Found) -> str:
    """Return the sentences that say how the numbers came about."""
    get, machine = found.settings, found.machine
    seeds = sorted({row["seed"] for rows in found.trained.values() for row in rows})
    words = [
        f"`python -m benchmarks.study.{QUESTION} --data DATA --bert MINILM`. Distance and cosine are those of the last",
        "states to those of the original. The distance in all layers, which is what the search minimises, is the mean",
        f"over the layers. Both are on {get['max_eval_samples']} held-out sequences that the search did not use. STS",
        f"is that of {get['num_pairs']} pairs of sentences, times 100"
        + ("." if found.original is None else f"; the original has {number(found.original[STS], STS)}."),
        "Predicted is the distance in all layers on the text of the search. Each shape has at most the parameters of",
        "the budget. The heuristic has the mean relative widths of the front. It and the hand-crafted ones are",
        "widened, layer by layer, until no more fits, at the end first: the rectangle is one as far as that allows.",
        "Mirrored, it is wider at the start.",
    ]
    if seeds:
        words.append(
            f"Trained: cut out, refitted on {get['calibration_tokens']:,} tokens, then trained alone on about "
            f"{get['tokens']:,}, precision {get['mixed_precision']}, learning rate {get['rates'][0]:g} (shapes that "
            f"drop layers: the better of {' and '.join(f'{rate:g}' for rate in get['rates'])}), seed {seeds[0]}; with "
            f"± seeds {', '.join(map(str, seeds))}, mean and standard deviation."
        )
    words.append(f"Machine: {machine['device']}, torch {machine['torch']}.")
    return " ".join(words)


def answer(results_folder: Path, pictures_folder: Path) -> str:
    """Return the section as Markdown, from what was measured so far, and draw its pictures."""
    if not (results_folder / f"{QUESTION}.json").exists():
        return ""
    found, scores = Found(results_folder), task_scores(results_folder)
    parts = [how_measured(found)]
    for share in SHARES:
        if any((share, name) in found.shapes for name in NAMES):
            parts += [f"{percent(share)} of the encoder:", shapes_table(found, share)]
    compared, correlations = comparisons(found), rank_correlations(found, scores)
    if compared:
        draw_shapes(pictures_folder / PICTURE, found)
        parts += [f"![Distance of each shape at three budgets]({pictures_folder.name}/{PICTURE})"]
        parts += [comparison_table(compared), verdict_on_search(compared), verdict_on_others(found)]
    if len(found.held_out) >= FEWEST:
        parts.append(verdict_on_predictor(found))
    if correlations:
        parts.append(verdict_on_distance(correlations))
    if correlations and correlations[0]["task"] == MEAN:
        parts.append(verdict_on_gains(correlation_gains(found, scores[MEAN])))
        draw_tasks(pictures_folder / TASKS_PICTURE, found, scores[MEAN])
        parts.append(f"![Distance against the mean score of the tasks]({pictures_folder.name}/{TASKS_PICTURE})")
    return "\n\n".join(parts)
