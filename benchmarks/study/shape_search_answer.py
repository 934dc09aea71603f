"""The answer to question 4, out of the rows of `shape_search.py`: tables, whether the targets are met, pictures."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from supershaper_hf import markdown_table
from supershaper_hf.search.quality import Quality

from .distance_and_tasks import FEWEST, distance_targets, distance_text
from .found_shapes import (
    ALL_LAYERS,
    BUDGET_SHARES,
    DISTANCE,
    EVOLUTIONARY,
    FIGURES,
    HEURISTIC,
    MEASURED,
    NAMES,
    QUESTION,
    FoundShapes,
)
from .shapes import HAND_CRAFTED, SEARCHED
from .study import STS, Target, cell, mean_and_spread, number, percent, save_picture


COMPARED = (ALL_LAYERS, DISTANCE, STS)
UNKNOWN, SAME = "-", "the same shape"
VERDICTS = ("better", SAME, "within the spread", "worse")
PICTURE = "shape_search.png"
WITHIN, KENDALL = 0.02, 0.85  # targets: the heuristic; the predictor


def shapes_table(found: FoundShapes, share: float) -> str:
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


def comparisons(found: FoundShapes, ours: str = SEARCHED) -> list[dict[str, Any]]:
    """Compare our shape with the best hand-crafted one, for each budget, figure and stage that is measured.

    `gain` is positive if our shape is better. The spread of trained shapes is that of seeds. No seed decides
    what is inherited: there it is the error of the difference, see `FoundShapes.error`.
    """
    compared = []
    for share, figure, trained in itertools.product(BUDGET_SHARES, COMPARED, (False, True)):
        sign = 1 if figure == STS else -1
        front = found.values(share, ours, figure, trained)
        hands = {name: values for name in HAND_CRAFTED if (values := found.values(share, name, figure, trained))}
        if front and hands:
            best = max(hands, key=lambda name: sign * mean_and_spread(hands[name])[0])
            gain = sign * (mean_and_spread(front)[0] - mean_and_spread(hands[best])[0])
            own = {"share": share, "figure": figure, "trained": trained, "front": front, "best": best}
            spread = found.spread(figure) if trained else found.error(share, ours, best, figure)
            own["same"] = found.same(share, ours, best)
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
        "The distance in all layers is what the search has minimised; how it agrees with scores after fine-tuning is "
        "measured below. Shapes that are wide at the end copy the last states better."
    )


def verdict_on_measured(found: FoundShapes) -> str:
    """Say what one more round of measuring gives, by the distance in all layers."""
    compared = [each for each in comparisons(found, MEASURED) if each["figure"] == ALL_LAYERS]
    if not compared:
        return ""
    words = [
        f"{cell(each['front'])} at {percent(each['share'])} ({judged(each)}; the best hand-crafted one has "
        f"{cell(each['hand'])})"
        for each in compared
    ]
    return (
        "The front's shape is predicted to be the best of its size, with the error of the predictor. After one more "
        f"round of measuring near the budget, the best measured shape has a distance in all layers of "
        f"{', '.join(words)}."
    )


def heuristic_gaps(found: FoundShapes) -> list[tuple[float, bool, float]]:
    """Return how much further away the heuristic's shape is than the front's, relative to it.

    One for each share of the encoder, as it was cut out (in all layers) and after training (in the last one).
    """
    gaps = []
    for share, trained in itertools.product(BUDGET_SHARES, (False, True)):
        figure = DISTANCE if trained else ALL_LAYERS
        front, own = (found.values(share, name, figure, trained) for name in (SEARCHED, HEURISTIC))
        if front and own:
            gaps.append((share, trained, mean_and_spread(own)[0] / mean_and_spread(front)[0] - 1))
    return gaps


def predicted_gaps(found: FoundShapes) -> list[float]:
    """Return by how much the heuristic's shape is predicted to be further away than the front's, for many budgets."""
    return [row[HEURISTIC] / row[SEARCHED] - 1 for row in found.budgets]


def verdict_on_others(found: FoundShapes) -> str:
    """Say how far the heuristic and the evolutionary search are from the front."""
    gaps = heuristic_gaps(found)
    if not gaps:
        return ""
    words = [f"{gap:+.1%} at {percent(share)}{' (trained)' if trained else ''}" for share, trained, gap in gaps]
    met = all(gap <= WITHIN for _, _, gap in gaps)
    pairs = [
        [found.shapes[share, name]["shape"] for name in (SEARCHED, EVOLUTIONARY)]
        for share in BUDGET_SHARES
        if {(share, SEARCHED), (share, EVOLUTIONARY)} <= found.shapes.keys()
    ]
    same = sum(exact == evolved for exact, evolved in pairs)
    return (
        "The distance of the heuristic shape (in all layers; after training, in the last one), relative to that of the "
        f"front's: {', '.join(words)}. The target, at most {WITHIN:+.0%} at every budget, is "
        f"{'met' if met else 'missed'} there. {verdict_on_predicted(found)}The evolutionary search finds the shape of "
        f"the exact front at {same} of {len(pairs)} budgets."
    )


def verdict_on_predicted(found: FoundShapes) -> str:
    """Say how far the heuristic is predicted to be from the front at many budgets."""
    gaps, shares = predicted_gaps(found), [row["share"] for row in found.budgets]
    if not gaps:
        return ""
    return (
        f"As the predictor has it, at {len(gaps)} budgets from {percent(min(shares))} to {percent(max(shares))}, the "
        f"heuristic's shape is further away by {np.mean(gaps):.1%} on average and {max(gaps):.1%} at most, by more "
        f"than {WITHIN:.0%} at {sum(gap > WITHIN for gap in gaps)}. "
    )


def predictor_quality(found: FoundShapes) -> Quality:
    """Return how well the predictor predicts random shapes."""
    measured, predicted = ([row[name] for row in found.held_out] for name in ("distance", "predicted"))
    return Quality.of(np.array(measured), np.array(predicted), "distance")


def verdict_on_predictor(found: FoundShapes) -> str:
    """Say how well the predictor predicts random shapes."""
    quality = predictor_quality(found)
    return (
        f"The predictor, fitted on {found.settings['fitted_on']} shapes, on {len(found.held_out)} random ones that "
        f"were not measured in the search: R2 {quality.r2:.3f}, Spearman {quality.spearman:.3f}, Kendall "
        f"{quality.kendall:.3f}, root mean square error {quality.rmse:.3f}. The target, a Kendall of at least "
        f"{KENDALL}, is {'met' if quality.kendall >= KENDALL else 'missed'}."
    )


def target_of_search(what: str, verdicts: Sequence[str]) -> Target:
    """Return the target that our shape is at least as good as every hand-crafted one."""
    good = sum(at_least_as_good([verdict]) for verdict in verdicts)
    what = f"{what}: at least as good as every hand-crafted one"
    return Target(what, f"at {len(verdicts)} budgets", f"at {good}", good == len(verdicts))


def targets(results_folder: Path) -> list[Target]:
    """Return what was to be reached, as far as it was measured."""
    if not (results_folder / f"{QUESTION}.json").exists():
        return []
    found, targets = FoundShapes(results_folder), []
    for figure, trained in itertools.product(COMPARED, (False, True)):
        of = [each for each in comparisons(found) if (each["figure"], each["trained"]) == (figure, trained)]
        own = [judged(each) for each in of]
        if own and UNKNOWN not in own:
            words = FIGURES[figure] + (", trained" if trained else "")
            targets.append(target_of_search(f"searched shape, {words}", own))
    own = [judged(each) for each in comparisons(found, MEASURED) if each["figure"] == ALL_LAYERS]
    if own and UNKNOWN not in own:
        targets.append(target_of_search(f"the same after one more round of measuring, {FIGURES[ALL_LAYERS]}", own))
    if gaps := [gap for _, _, gap in heuristic_gaps(found)]:
        what = "heuristic: distance above that of the searched shape, largest at three budgets"
        targets.append(Target(what, f"at most {WITHIN:.0%}", f"{max(gaps):+.1%}", max(gaps) <= WITHIN))
    if gaps := predicted_gaps(found):
        what = f"heuristic: the same as predicted, largest at {len(gaps)} budgets"
        targets.append(Target(what, f"at most {WITHIN:.0%}", f"{max(gaps):+.1%}", max(gaps) <= WITHIN))
    if len(found.held_out) >= FEWEST:
        kendall, what = predictor_quality(found).kendall, "predictor: Kendall, shapes that it was not fitted on"
        targets.append(Target(what, f"at least {KENDALL}", f"{kendall:.3f}", kendall >= KENDALL))
    return [*targets, *distance_targets(found, results_folder)]


# Pictures


def draw_shapes(file: Path, found: FoundShapes) -> None:
    """Draw the distances of each shape, a panel for each budget: in all layers inherited, in the last one trained."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, share in zip(figure.subplots(1, len(BUDGET_SHARES), sharey=True), BUDGET_SHARES):
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


def how_measured(found: FoundShapes) -> str:
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
    found = FoundShapes(results_folder)
    parts = [how_measured(found)]
    for share in BUDGET_SHARES:
        if any((share, name) in found.shapes for name in NAMES):
            parts += [f"{percent(share)} of the encoder:", shapes_table(found, share)]
    compared = comparisons(found)
    if compared:
        draw_shapes(pictures_folder / PICTURE, found)
        parts += [f"![Distance of each shape at three budgets]({pictures_folder.name}/{PICTURE})"]
        parts += [comparison_table(compared), verdict_on_search(compared), verdict_on_measured(found)]
        parts += [verdict_on_others(found)]
    if len(found.held_out) >= FEWEST:
        parts.append(verdict_on_predictor(found))
    parts.append(distance_text(found, results_folder, pictures_folder))
    return "\n\n".join(part for part in parts if part)
