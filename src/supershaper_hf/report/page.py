"""Turn the files of a search into a page: Markdown, plots and a CSV file, which a model card can include.

`explorer` writes a second page, on which a reader chooses a shape by looking.

    python -m supershaper_hf.report outputs/search

The page is made from the files in the folder alone (`findings`), so it can be made again at any time and on any
machine.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import check_count, check_number
from ..files import write_file
from ..latency.insensitivity import insensitivity_rows, width_rows
from ..model.shapes import SHAPE_NAMES
from ..search.measures import Measure
from ..search.pareto import ParetoFront, shapes_at
from ..search.profile import derive_profile
from ..search.records import Record
from .data_card import FRONT_TABLE, write_data_card, write_front
from .explorer import EXPLORER_FILE, explorer_page
from .findings import LATENCY_FILE, PREDICTOR_FILE, RECORDS_FILE, Findings
from .plots import plot_agreement, plot_front, plot_profile
from .tables import markdown_table


PAGE_FILE, FRONT_FILE = "report.md", "front.csv"
TOLERATED = 1.25  # the page warns if the error on new shapes is larger than this, times that of cross-validation


def write_report(
    folder: str | Path,
    cost: str = "parameters",
    max_cost: Sequence[float] = (),
    num_budgets: int = 8,
    sequence_length: int = 128,
    supernet: str | Path | None = None,
) -> Path:
    """Write `report.md`, `explorer.html`, `front.csv` and the plots of a search into its folder.

    In `explorer.html` a reader chooses a shape by looking: see `write_explorer`.

    The folder also becomes a data set: see `write_data_card`.

    Args:
        folder: The output folder of `examples/search_shapes.py`.
        cost: The cost of the front in the table: `"parameters"`, `"flops"` or `"latency"`.
        max_cost: The budgets that matter most, in the unit of `cost`. The page begins with the best measured shape for
            each of them.
        num_budgets: Number of rows of the table, evenly spaced over the cost of the front.
        sequence_length: Tokens per sequence, to count FLOPs. If latency was measured, the length of that measurement is
            used instead.
        supernet: Folder or Hub id of the supernet, for the code that `explorer.html` shows.

    Returns:
        The path of `report.md`.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, the files do not belong together, `cost` is latency but none was measured, or
            no measured shape is within one of the budgets.

    Example:
        >>> write_report("outputs/search", max_cost=[63_000_000])  # doctest: +SKIP
    """
    check_count("num_budgets", num_budgets)
    check_count("sequence_length", sequence_length)
    for budget in max_cost:
        check_number("max_cost", budget, above=0)
    folder, findings = Path(folder), Findings.read(folder, sequence_length)
    front = findings.front(cost)
    rows = findings.rows(np.unique(shapes_at(front, num_budgets), axis=0))
    rows.sort(key=lambda row: row[cost])
    front_rows = findings.rows(front.shapes)
    write_csv(folder / FRONT_FILE, front_rows)
    write_front(folder / FRONT_TABLE, front_rows)
    write_file(folder / EXPLORER_FILE, explorer_page(findings, cost, max_cost, supernet))
    sections = [
        _summary(findings, front, cost),
        _chosen_section(findings, cost, max_cost),
        _front_section(folder, findings, cost, rows),
        _trust_section(folder, findings),
        _profile_section(folder, findings),
        _latency_section(findings),
    ]
    write_data_card(folder)
    return write_file(folder / PAGE_FILE, "\n\n".join(section for section in sections if section) + "\n")


def write_csv(file: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as a CSV file. The keys of the first row are the columns.

    The numbers of a list are separated by blanks, and the cell of None is empty.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in row.items()})
    write_file(file, text.getvalue())


def _summary(findings: Findings, front: ParetoFront, cost: str) -> str:
    measure = findings.measure
    text = (
        f"## Shapes for every budget\n\n"
        f"{len(findings.records):,} of {findings.num_possible():,} shapes were measured, all on the same "
        f"{measure.text} (`{RECORDS_FILE}`). The predictor (`{PREDICTOR_FILE}`) was tested on shapes that were left "
        f"out of its fit: {findings.predictor.quality}. The exact Pareto front of {cost} against predicted "
        f"{measure.title} has {len(front):,} shapes (`{FRONT_FILE}`). Open `{EXPLORER_FILE}` in a browser to choose "
        "one by looking."
    )
    if findings.table is not None:
        text += f" Milliseconds (`ms`) of a shape are predicted from the parts that were measured (`{LATENCY_FILE}`)."
    if missing := findings.missing():
        text += (
            f"\n\n**The records of {missing} shapes that the predictor was fitted on are not in `{RECORDS_FILE}`.** "
            "They cannot be checked here."
        )
    return text


def _chosen_section(findings: Findings, cost: str, max_cost: Sequence[float]) -> str:
    """Return the best measured shape for each of the budgets that matter most."""
    if not len(max_cost):
        return ""
    measure, shapes = findings.measure, np.array([findings.best_measured(cost, budget) for budget in max_cost])
    table = [
        {
            "budget": _budget(budget, cost),
            **_costs_of(row, findings),
            f"measured {measure.title}": _figure(row[f"measured_{measure.shown}"], measure),
            "shape": row["shape"],
        }
        for budget, row in zip(max_cost, findings.rows(shapes))
    ]
    return f"The best measured shape for each budget:\n\n{markdown_table(table)}"


def _front_section(folder: Path, findings: Findings, cost: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of shapes for a few budgets, and a plot of the front for each cost."""
    measure = findings.measure
    finite = [record for record in findings.records if np.isfinite(record[measure.shown])]
    values = np.array([record[measure.shown] for record in finite])
    costs = findings.costs([record["shape"] for record in finite], cost)

    def best_measured(max_cost: float) -> str:
        affordable = values[costs <= max_cost]
        return _figure(affordable.min(), measure) if len(affordable) else ""

    def predicted(row: Mapping[str, Any]) -> str:
        shown, deviation = row[f"predicted_{measure.shown}"], row["predicted_deviation"]
        scale = shown if measure.name == "loss" else 1.0  # the derivative of the exponential, to first order
        return f"{_figure(shown, measure)} ± {_figure(scale * deviation, measure)}"

    table = [
        {
            **_costs_of(row, findings),
            f"predicted {measure.title}": predicted(row),
            "measured": _figure(row[f"measured_{measure.shown}"], measure),
            "best measured": best_measured(row[cost]),
            "shape": row["shape"],
        }
        for row in rows
    ]
    explained = (
        "Each row is a shape of this front: no shape that costs the same or less is predicted to be better. The number "
        "after ± is the standard deviation of a measurement around its prediction. "
        f"`best measured` is the lowest {measure.shown} of all measured shapes that cost no more. "
        f"{findings.explanation}"
    ).rstrip()
    chosen = {tuple(row["shape"]) for row in rows}
    axes = dict.fromkeys([cost, "parameters", *(["latency"] if findings.table else [])])
    plots = [_front_plot(folder, findings, finite, axis, chosen if axis == cost else set()) for axis in axes]
    return "\n\n".join([explained, markdown_table(table), *plots])


def _front_plot(
    folder: Path, findings: Findings, records: Sequence[Record], cost: str, chosen: set[tuple[int, ...]]
) -> str:
    """Plot the front of a cost together with all records, and return its Markdown. Shapes in `chosen` are stars."""
    values = findings.costs([record["shape"] for record in records], cost).tolist()
    points: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for value, record in zip(values, records):
        points[tuple(record["shape"]) in chosen].append((value, record[findings.measure.shown]))
    name = f"front_{cost}.png"
    plot_front(folder / name, findings.front(cost), measured=points[False], chosen=points[True])
    return f"![{cost} against {findings.measure.title}: measured shapes and the predicted front]({name})"


def _costs_of(row: Mapping[str, Any], findings: Findings) -> dict[str, Any]:
    """Return the costs in a row of `Findings.rows` as columns of a table."""
    return {
        "parameters": row["parameters"],
        f"GFLOPs ({findings.sequence_length} tokens)": row["flops"] / 1e9,
        **({} if row["latency"] is None else {"ms": row["latency"] * 1e3}),
    }


def _figure(value: float | None, measure: Measure) -> str:
    """Return what a table shows of a measured or predicted value: nothing where it is not known."""
    return "" if value is None else f"{value:.{measure.digits}f}"


def _budget(budget: float, cost: str) -> str:
    return f"{budget * 1e3:.2f} ms" if cost == "latency" else f"{budget:,.0f}"


def _trust_section(folder: Path, findings: Findings) -> str:
    """Compare predictions with measurements of shapes that the predictor was not fitted on, if there are any."""
    measure = findings.measure
    records = [record for record in findings.held_out() if np.isfinite(record[measure.name])]
    if len(records) < 2:
        return ""
    shapes = np.array([record["shape"] for record in records])
    losses = np.array([record[measure.name] for record in records])
    predicted, deviations = findings.predictor.predict(shapes), findings.predictor.uncertainty(shapes)
    plot_agreement(folder / "agreement.png", losses, predicted, deviations, measure.name)
    error = np.sqrt(np.mean((predicted - losses) ** 2))
    conclusion = "This agrees with cross-validation."
    if findings.predictor.quality is not None and error > TOLERATED * findings.predictor.quality.rmse:
        conclusion = (
            f"In cross-validation the error was only {findings.predictor.quality.rmse:.3f}: a shape that is chosen "
            "because its prediction is low is often worse than predicted. Trust measurements more than predictions."
        )
    within = (np.abs(predicted - losses) <= 2 * deviations).sum()
    return (
        "## Can the predictions be trusted?\n\n"
        f"{len(records)} shapes were measured that the predictor was not fitted on. The root mean square error of "
        f"their predictions is {measure.amount(error)}. Measurements within two standard deviations of their "
        f"prediction: {within} of {len(records)}. {conclusion}\n\n"
        f"![predicted against measured {measure.plural}](agreement.png)"
    )


def _profile_section(folder: Path, findings: Findings) -> str:
    """Say what good shapes have in common. A table compares a shape with this profile to the front and named shapes."""
    space, predictor, measure = findings.space, findings.predictor, findings.measure
    profile = derive_profile(space, predictor)
    plot_profile(folder / "profile.png", profile)
    budget = (space.num_parameters(space.smallest) + space.num_parameters(space.largest)) // 2
    shapes = {
        "best of the front": findings.front("parameters").best(budget),
        "this profile": profile.shape(space, budget),
        **{name: space.named_shape(name, budget) for name in SHAPE_NAMES if name != "first_layers"},
    }
    rows = [
        {
            "shape": name,
            "parameters": space.num_parameters(shape),
            f"predicted {measure.title}": _figure(measure.show(predictor.predict(shape)), measure),
            "widths": shape,
        }
        for name, shape in shapes.items()
    ]
    return (
        f"## What good shapes have in common\n\n{profile.sentence()}\n\n"
        "The relative width of a layer is its width over the mean width of its shape, averaged over the front.\n\n"
        "![relative width and importance of each layer](profile.png)\n\n"
        "The best shape of the front, a shape with this profile, and hand-crafted shapes, each with at most "
        f"{budget:,} parameters:\n\n{markdown_table(rows)}"
    )


def _latency_section(findings: Findings) -> str:
    """Show the seconds of each width, and whether shapes of equal size are equally fast, if they were measured."""
    parts = []
    if findings.table is not None:
        table = findings.table
        parts.append(
            f"## Latency on {table.device}\n\n"
            f"The seconds are medians of {table.repeats} sweeps over batches of {table.batch_size} x "
            f"{table.sequence_length} tokens in {table.dtype}, with torch {table.torch_version}. A block is a layer "
            "and the bottleneck before it; in this table, the layer before it has the same width:\n\n"
            f"{markdown_table(width_rows(table))}"
        )
    if findings.comparisons:
        parts.append(
            "Shapes of equal size, and how much their latency differs (standard deviation over mean). The noise is the "
            "spread that equally fast shapes would show; it is known because two copies of each shape were measured. "
            "The verdict is an F-test at 5 %: a spread above the noise can still be chance.\n\n"
            f"{markdown_table(insensitivity_rows(findings.comparisons))}"
        )
    return "\n\n".join(parts)
