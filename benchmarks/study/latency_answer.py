"""The answer to question 8, out of the rows that `latency_of_shapes.py` has measured."""

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from supershaper_hf import markdown_table
from supershaper_hf.latency.insensitivity import SIGNIFICANCE, Insensitivity, insensitivity_rows
from supershaper_hf.report.plots import new_figure

from .compared import INT8, KINDS, ONNX, ORIGINAL, by_size
from .shapes import SEARCHED
from .study import Row, command_and_machine, read_rows, read_settings, save_picture


QUESTION = "latency_of_shapes"
PICTURE = "latency_of_shapes.png"
PYTORCH = "pytorch"
FORMATS = (PYTORCH, ONNX, INT8)
MODELS, EQUAL_SIZE = "models", "equal size"  # what a row is about
INSENSITIVITY = ("target", "shapes", "seconds", "parameters", "noise", "p_value")  # of a row on equal sizes
SHARE = 0.60  # of the encoder, in the answer
MISSING = "-"


def answer(results_folder: Path, pictures_folder: Path) -> str:
    """Return the section as Markdown, from what was measured so far, and draw its picture; "" if there is no row."""
    rows = read_rows(results_folder, QUESTION)
    if not rows:
        return ""
    settings = read_settings(results_folder, QUESTION)
    sweeps = ", ".join(f"{repeats} for batches of {size}" for size, repeats in settings["repeats"].items())
    text = [
        command_and_machine(results_folder, QUESTION, QUESTION),
        f"Sequences of {settings['sequence_length']} tokens, "
        "no head. Milliseconds are medians of interleaved sweeps "
        f"({sweeps}); in brackets is the distance between the quartiles in percent of the median. Of the original is "
        "the median over the sweeps of the time divided by that of the original in PyTorch.",
    ]
    timed = [row for row in rows if row["what"] == MODELS]
    for batch_size in sorted({row["batch_size"] for row in timed}):
        own = [row for row in timed if row["batch_size"] == batch_size]
        text += [f"Batches of {batch_size}:", markdown_table(table_rows(own))]
    compared = [row for row in rows if row["what"] == EQUAL_SIZE]
    if compared:
        text += [
            f"Shapes of equal size, {settings['equal_repeats']} sweeps, PyTorch. Above noise is what is left of the "
            "spread without that of copies of one shape. Every row was timed alone: only shapes of one row compare.",
            markdown_table(equal_rows(compared)),
        ]
    text.append(verdict(timed, compared))
    if timed:
        draw(pictures_folder / PICTURE, timed)
        text.append(f"![Milliseconds over the parameters of the encoder]({pictures_folder.name}/{PICTURE})")
    return "\n\n".join(part for part in text if part)


def verdict(timed: Sequence[Row], compared: Sequence[Row]) -> str:
    """Answer both halves of the question in sentences, as far as they were measured."""
    words = []
    for size in sorted({row["batch_size"] for row in timed}):
        own = {(row["kind"], row["share"], row["format"]): row for row in timed if row["batch_size"] == size}
        base = own.get((ORIGINAL, None, PYTORCH))
        others = {
            "the original in 8 bits takes": own.get((ORIGINAL, None, INT8)),
            f"the searched shape for {SHARE:.0%} of the encoder": own.get((SEARCHED, SHARE, PYTORCH)),
            "this shape in 8 bits": own.get((SEARCHED, SHARE, INT8)),
        }
        shown = [
            f"{what} {ratio(row, base):.2f}" for what, row in others.items() if row is not None and base is not None
        ]
        if shown:
            words.append(f"In batches of {size} {', '.join(shown)} of the original's time.")
    if compared:
        found = [insensitivity(row) for row in compared]
        spreads, noises = ([getattr(each, name) for each in found] for name in ("spread", "noise"))
        above = sum(each.p_value <= SIGNIFICANCE for each in found)
        words.append(
            f"Shapes of equal size differ by {min(spreads):.1%} to {max(spreads):.1%} (standard deviation; noise "
            f"{min(noises):.1%} to {max(noises):.1%}), by more than noise in {above} of {len(found)} comparisons. The "
            "paper has about 1 %."
        )
    return " ".join(words)


def insensitivity(row: Row) -> Insensitivity:
    """Return the comparison of shapes of equal size that a row holds."""
    return Insensitivity(**{name: row[name] for name in INSENSITIVITY})


def table_rows(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Return a row for each model, from rows of one batch size."""
    base = next((row for row in rows if (row["kind"], row["format"]) == (ORIGINAL, PYTORCH)), None)
    first = {row["model"]: row for row in by_size(rows)}
    table = []
    for name, model in first.items():
        line = {
            "model": name,
            "shape": MISSING if model["shape"] is None else str(model["shape"]),
            "encoder": f"{model['encoder']:.1%}",
        }
        for kind in FORMATS:
            found = next((row for row in rows if (row["model"], row["format"]) == (name, kind)), None)
            line[f"{kind}, MB"] = MISSING if found is None else f"{found['bytes'] / 1e6:.1f}"
            line[f"{kind}, ms"] = MISSING if found is None else milliseconds(found["seconds"])
            line[f"{kind} of the original"] = MISSING if found is None or base is None else f"{ratio(found, base):.2f}"
        table.append(line)
    return table


def milliseconds(seconds: Sequence[float]) -> str:
    """Return the median, and the distance between the quartiles."""
    low, median, high = np.quantile(seconds, [0.25, 0.5, 0.75])
    return f"{1e3 * median:.1f} ({(high - low) / median:.0%})"


def ratio(row: Row, base: Row) -> float:
    """Return the median over the sweeps of one time over another."""
    return statistics.median(own / other for own, other in zip(row["seconds"], base["seconds"], strict=True))


def equal_rows(rows: Sequence[Row]) -> list[dict[str, object]]:
    """Return a row for each comparison of shapes of equal size."""
    table: list[dict[str, object]] = []
    for row in sorted(rows, key=lambda row: (row["batch"], -row["share"])):
        [found] = insensitivity_rows([insensitivity(row)])
        table.append({"batch": row["batch"], "encoder": f"{row['share']:.0%}", **found})
    return table


def draw(file: Path, rows: Sequence[Row]) -> None:
    """Draw the milliseconds of a sequence in the largest batches over the parameters of the encoder."""
    figure, axes = new_figure(6.5, 4)
    size = max(row["batch_size"] for row in rows)
    for kind, style in zip(FORMATS, ("-", "--", ":")):
        own = [row for row in rows if (row["batch_size"], row["format"]) == (size, kind)]
        places = [row["encoder"] for row in own]
        times = [1e3 * statistics.median(row["seconds"]) / size for row in own]
        line = np.polynomial.Polynomial.fit(places, times, 1) if len(set(places)) > 1 else None
        if line is not None:
            ends = np.array([min(places), max(places)])
            axes.plot(ends, line(ends), style, color="0.7", zorder=1)
        for number, group in enumerate([ORIGINAL, *KINDS]):
            points = [(place, took) for row, place, took in zip(own, places, times) if row["kind"] == group]
            if points:
                label = group.replace("_", " ") if kind == PYTORCH else None
                axes.plot(*zip(*points), "o", color=f"C{number}", markersize=4, label=label, zorder=2)
        if own:
            axes.annotate(kind, (max(places), max(times)), xytext=(4, 0), textcoords="offset points", fontsize=8)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("encoder, share of the original's parameters")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_ylabel(f"milliseconds of a sequence, batches of {size}")
    axes.legend(frameon=False)
    save_picture(figure, file)
