"""What the runs of questions 1, 2, 3 and 5 have shown, out of the rows of `runs.py`; and the words for them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from supershaper_hf import markdown_table
from supershaper_hf.files import read_json

from .runs import COMMON, QUESTION, Recipe
from .study import FORMAT, STS, Row, cell, mean_and_spread, rank_correlation_error


WORDS = {
    "paper": "its losses and its sampling: labels and in-place distillation, half of the loss each; in every step the "
    "largest shape, the smallest and a random one",
    "ours": "the last hidden state of the original and its mean over tokens; in every step three random shapes, drawn "
    "evenly over sizes",
    "labels": "masked tokens, as in the training of BERT",
    "identity": "the supernet as `from_bert` makes it; a narrow shape has the first channels of the BERT",
    "calibrated": "then narrow shapes are fitted to what they can keep of the BERT, in closed form",
    "shared, by width": "whether all widths of a layer share its bottlenecks, or each narrow width has its own",
    "prefix, per head": "whether a narrow layer keeps the first channels of all heads together, or some of each head",
    "inherited, alone": "cut out of the trained supernet; or cut out of its start, and then trained alone with the "
    "learning rate that is named",
}
AS_IN_QUESTION_1 = "Runs, words and figures are those of question 1."


class Found(NamedTuple):
    """What the file of results holds."""

    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    rows: Sequence[Row]

    def of(self, recipe: Recipe, quarters: int = 4) -> list[Row]:
        """Return the rows of a recipe, one for each seed. Before the first step they are those of its start."""
        own = Recipe(recipe.start, recipe.start) if quarters == 0 else recipe
        key = {**own.key(), "quarters": quarters}
        return [row for row in self.rows if all(row[name] == value for name, value in key.items())]


def read_runs(folder: Path) -> Found:
    """Return what was measured so far."""
    file = folder / f"{QUESTION}.json"
    if not file.exists():
        return Found({}, {}, [])
    content = read_json(file, FORMAT)
    return Found(content["settings"], content["machine"], content["rows"])


def mean_of(row: Row, group: str, figure: str) -> float | None:
    """Return the mean of a figure over the shapes of a group that have it; None if none has."""
    values = row[group][figure]
    return sum(values) / len(values) if values else None


def over_seeds(rows: Sequence[Row], group: str, figure: str, index: int | None = None) -> list[float]:
    """Return a figure of each row that has it: of one shape of a group, or the mean of all."""
    if index is None:
        found = [mean_of(row, group, figure) for row in rows]
        return [value for value in found if value is not None]
    return [row[group][figure][index] for row in rows if len(row[group][figure]) > index]


def figure_columns(rows: Sequence[Row], group: str = "random", index: int | None = None) -> dict[str, str]:
    """Return the cells of a table with the four figures of the shapes of a group."""
    titles = {"distance": "distance", "cosine": "cosine", "loss": "masked-LM loss", STS: "STS"}
    return {title: cell(over_seeds(rows, group, figure, index), figure) for figure, title in titles.items()}


def how_measured(found: Found, script: str, recipes: Iterable[Recipe]) -> str:
    """Return the command of a question and the seeds of its runs."""
    seeds = sorted({row["seed"] for recipe in recipes for row in found.of(recipe)})
    return (
        f"Command: `python -m benchmarks.study.{script} --data DATA --bert MINILM`. Seeds: "
        f"{', '.join(map(str, seeds))}."
    )


def how_all_are_measured(found: Found) -> str:
    """Return the paragraph that says how the runs of all questions are made and measured, and the words for them."""
    get, ends = found.settings, [row for row in found.rows if row["quarters"] == 4]
    tokens, steps = (max(row[name] for row in ends) for name in ("tokens", "steps"))
    starts = [row for row in found.rows if row["quarters"] == 0 and row["start"] != "identity"]
    original = next((over_seeds([row], "rectangles", STS, 0) for row in starts), [])
    rate = COMMON["learning_rate"]
    error = 100 * rank_correlation_error(mean_and_spread(original)[0], get["num_pairs"])
    text = (
        "The paper trains on 4.6e10 tokens: these runs say what a start gives and how a recipe begins, not where it "
        f"ends. Each run has {steps} steps of {get['batch_size']} sequences of at most {get['max_length']} tokens, up "
        f"to {tokens:,} tokens in all, in precision {get['mixed_precision']}. All runs of a seed read the same "
        f"batches, without dropout. Unless another one is named, the learning rate is {rate:g}, for weights that all "
        f"widths share {rate * COMMON['shared_learning_rate_scale']:g}. Starts are calibrated on "
        f"{get['calibration_tokens']:,} tokens. Held out are {get['clean_tokens']:,} tokens for distance and cosine "
        f"(of the last hidden states), {get['masked_tokens']:,} tokens for the loss, 15 % of them masked, and "
        f"{get['num_pairs']} pairs of sentences for STS: a correlation times 100, whose standard error is about "
        f"{error:.0f}; the original has {cell(original, STS)} there. Figures of random shapes are means of "
        f"{get['num_random']}, those of STS of {get['num_sts']} of them. Machine: {found.machine['device']}."
    )
    return f"{text}\n\n{markdown_table([{'word': word, 'meaning': meaning} for word, meaning in WORDS.items()])}"
