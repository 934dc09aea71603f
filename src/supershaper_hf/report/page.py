"""Turn the files of a search into a page: plots, a CSV and Markdown that a model card can include.

    python -m supershaper_hf.report.page outputs/search

`examples/search_shapes.py` writes the files: `config.json` of the supernet, `records.jsonl` of measured shapes,
`predictor.json`, and, where they were asked for, `latency.json` and `insensitivity.json`. The page is made of them
alone, so it can be made again anywhere. Shapes that were measured, but that the predictor was not fitted on, show how
far its predictions can be trusted.
"""

import argparse
import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..latency.insensitivity import width_rows
from ..latency.table import LatencyTable
from ..model.configuration_supershaper import SuperShaperConfig
from ..model.costs import Cost, chain_cost, resolve_cost
from ..model.shapes import SHAPE_NAMES, SearchSpace
from ..search.pareto import ParetoFront, pareto_front, shapes_at
from ..search.predictor import ShapePredictor
from ..search.profile import derive_profile
from ..search.records import Record, read_records
from ..search.rounds import best_measured
from .plots import plot_agreement, plot_front, plot_profile
from .tables import markdown_table


RECORDS_FILE, PREDICTOR_FILE = "records.jsonl", "predictor.json"
LATENCY_FILE, INSENSITIVITY_FILE = "latency.json", "insensitivity.json"
PAGE_FILE, FRONT_FILE = "report.md", "front.csv"
TOLERATED = 1.25  # error on new shapes over that of cross-validation, before the page warns


@dataclass(frozen=True)
class Findings:
    """What a search has found out: the files of its folder, read.

    Attributes:
        space: The search space.
        records: Of all measured shapes.
        predictor: Fitted on all or some of them.
        table: Seconds on a device, if they were measured.
        insensitivity: Rows of `insensitivity.insensitivity_rows`, if it was measured.
        sequence_length: Tokens per sequence, for FLOPs and latency.
    """

    space: SearchSpace
    records: list[Record]
    predictor: ShapePredictor
    table: LatencyTable | None
    insensitivity: list[dict[str, Any]] | None
    sequence_length: int

    @classmethod
    def read(cls, folder: str | Path, sequence_length: int = 128) -> "Findings":
        """Read the files of a search.

        Where latency was measured, its `sequence_length` is taken, and never more than the model's longest input.

        Raises:
            OSError: If a file that is needed is missing.
            ValueError: If one is damaged.
        """
        folder = Path(folder)
        for name in ("config.json", RECORDS_FILE, PREDICTOR_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} has no {name}. Make the folder with examples/search_shapes.py.")
        space = SearchSpace(SuperShaperConfig.from_pretrained(folder))
        table = LatencyTable.load(folder / LATENCY_FILE) if (folder / LATENCY_FILE).exists() else None
        rows = folder / INSENSITIVITY_FILE
        return cls(
            space,
            read_records(folder / RECORDS_FILE),
            ShapePredictor.load(folder / PREDICTOR_FILE),
            table,
            json.loads(rows.read_text(encoding="utf-8")) if rows.exists() else None,
            min(sequence_length, space.config.max_position_embeddings) if table is None else table.sequence_length,
        )

    def front(self, cost: str) -> ParetoFront:
        """Return the Pareto front of `"parameters"`, `"flops"` or, where there is a table, `"latency"`."""
        return pareto_front(self.space, self.predictor, self._cost(cost), self.sequence_length)

    def costs(self, shapes: Sequence[Sequence[int]], cost: str) -> np.ndarray:
        """Return the costs (n,) of `shapes`."""
        terms = resolve_cost(self._cost(cost), self.space.config, self.sequence_length)
        return chain_cost(terms, self.space.config.hidden_size, np.array(shapes))

    def best_measured(self, cost: str, max_cost: float) -> list[int]:
        """Return the measured shape with the lowest loss that costs at most `max_cost`."""
        return best_measured(self.space, self.records, self._cost(cost), max_cost, self.sequence_length)

    def rows(self, shapes: np.ndarray) -> list[dict[str, Any]]:
        """Return what is known of each of `shapes` (n, layers): costs, prediction and, if it was made, measurement."""
        measured = {tuple(record["shape"]): record for record in self.records}
        predicted, deviations = self.predictor.predict(shapes), self.predictor.uncertainty(shapes)
        seconds = [None] * len(shapes) if self.table is None else self.table.predict(shapes).tolist()
        return [
            {
                "shape": shape,
                "parameters": self.space.num_parameters(shape),
                "flops": self.space.flops(shape, self.sequence_length),
                "latency": latency,
                "predicted_loss": float(loss),
                "predicted_deviation": float(deviation),
                "predicted_perplexity": float(np.exp(loss)),
                "measured_perplexity": measured[tuple(shape)]["perplexity"] if tuple(shape) in measured else None,
            }
            for shape, latency, loss, deviation in zip(shapes.tolist(), seconds, predicted, deviations)
        ]

    def held_out(self) -> list[Record]:
        """Return the records of shapes that the predictor was not fitted on, but knows all widths of."""
        evidence = self.predictor.evidence
        fitted = set() if evidence is None else set(map(tuple, evidence.shapes.tolist()))
        new = [record for record in self.records if tuple(record["shape"]) not in fitted]
        return [record for record in new if self.predictor.knows(record["shape"])]

    def _cost(self, cost: str) -> Cost:
        if cost != "latency":
            return cost
        if self.table is None:
            raise ValueError(f"cost='latency' needs {LATENCY_FILE}: measure it with search_shapes.py --latency.")
        return self.table


def write_report(
    folder: str | Path,
    cost: str = "parameters",
    num_budgets: int = 8,
    sequence_length: int = 128,
    max_cost: Sequence[float] = (),
) -> Path:
    """Write `report.md`, `front.csv` and the plots of a search into its folder; return the path of the page.

    Args:
        folder: With the files of a search.
        cost: Of the front in the table: `"parameters"`, `"flops"` or `"latency"`.
        num_budgets: Rows of the table, evenly spaced over the cost of the front.
        sequence_length: Tokens per sequence, for FLOPs; where latency was measured, the length it was measured for.
        max_cost: Budgets that matter most, in the unit of `cost`: the best measured shape of each is shown first.

    Raises:
        OSError: If a file is missing.
        ValueError: If a file is damaged, `cost` is latency and none was measured, or no measured shape is as cheap as
            one of `max_cost`.

    Example:
        >>> write_report("outputs/search")  # doctest: +SKIP
    """
    folder, findings = Path(folder), Findings.read(folder, sequence_length)
    front = findings.front(cost)
    rows = findings.rows(np.unique(shapes_at(front, num_budgets), axis=0))
    rows.sort(key=lambda row: row[cost])
    write_csv(folder / FRONT_FILE, findings.rows(front.shapes))
    sections = [
        _summary(findings, front, cost),
        _chosen_section(findings, cost, max_cost),
        _front_section(folder, findings, cost, rows),
        _trust_section(folder, findings),
        _profile_section(folder, findings),
        _latency_section(findings),
    ]
    page = folder / PAGE_FILE
    page.write_text("\n\n".join(section for section in sections if section) + "\n", encoding="utf-8")
    return page


def write_csv(file: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write records as CSV; the first one's keys are the columns, lists are separated by blanks, None is empty."""
    with Path(file).open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in row.items()})


def _summary(findings: Findings, front: ParetoFront, cost: str) -> str:
    space = findings.space
    return (
        f"## Shapes for every budget\n\n"
        f"{len(findings.records)} of {space.size:,} shapes were measured, all on the same masked text. The predictor: "
        f"{findings.predictor.quality}. The exact Pareto front of {cost} against predicted perplexity has {len(front)} "
        f"points, all of them in `{FRONT_FILE}`."
    )


def _chosen_section(findings: Findings, cost: str, max_cost: Sequence[float]) -> str:
    """Return the best measured shape for each of the budgets that matter most."""
    if not max_cost:
        return ""
    shapes = np.array([findings.best_measured(cost, budget) for budget in max_cost])
    table = [
        {
            "budget": _amount(budget, cost),
            **_costs_of(row, findings),
            "measured perplexity": row["measured_perplexity"],
            "shape": row["shape"],
        }
        for budget, row in zip(max_cost, findings.rows(shapes))
    ]
    return f"The best measured shape for each budget:\n\n{markdown_table(table)}"


def _front_section(folder: Path, findings: Findings, cost: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of a few budgets and a plot for each cost."""
    finite = [record for record in findings.records if np.isfinite(record["perplexity"])]
    perplexities = np.array([record["perplexity"] for record in finite])
    costs = findings.costs([record["shape"] for record in finite], cost)
    table = [
        {
            **_costs_of(row, findings),
            "predicted perplexity": f"{row['predicted_perplexity']:.2f} "
            f"± {row['predicted_perplexity'] * row['predicted_deviation']:.2f}",
            "measured": "" if row["measured_perplexity"] is None else f"{row['measured_perplexity']:.2f}",
            "best measured": float(min(perplexities[costs <= row[cost]], default=np.inf)),
            "shape": row["shape"],
        }
        for row in rows
    ]
    explained = (
        f"Each row is the shape that is predicted to be the best for its {cost}; `best measured` is the lowest "
        "perplexity of all measured shapes that cost no more."
    )
    chosen = {tuple(row["shape"]) for row in rows}
    axes = dict.fromkeys([cost, "parameters", *(["latency"] if findings.table else [])])
    plots = [_front_plot(folder, findings, finite, axis, chosen if axis == cost else set()) for axis in axes]
    return "\n\n".join([explained, markdown_table(table), *plots])


def _front_plot(
    folder: Path, findings: Findings, records: Sequence[Record], cost: str, chosen: set[tuple[int, ...]]
) -> str:
    """Plot the front of a cost with all records, those in `chosen` as stars."""
    values = findings.costs([record["shape"] for record in records], cost).tolist()
    points: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for value, record in zip(values, records):
        points[tuple(record["shape"]) in chosen].append((value, record["perplexity"]))
    name = f"front_{cost}.png"
    plot_front(folder / name, findings.front(cost), measured=points[False], chosen=points[True])
    return f"![{cost} against perplexity: measured shapes and the predicted front]({name})"


def _costs_of(row: Mapping[str, Any], findings: Findings) -> dict[str, Any]:
    """Return the costs in a row of `Findings.rows` as columns of a table."""
    return {
        "parameters": row["parameters"],
        f"GFLOPs ({findings.sequence_length} tokens)": row["flops"] / 1e9,
        **({} if row["latency"] is None else {"ms": row["latency"] * 1e3}),
    }


def _amount(budget: float, cost: str) -> str:
    return f"{budget * 1e3:.2f} ms" if cost == "latency" else f"{budget:,.0f}"


def _trust_section(folder: Path, findings: Findings) -> str:
    """Compare predictions with measurements of shapes the predictor has not seen, if there are any."""
    records = [record for record in findings.held_out() if np.isfinite(record["loss"])]
    if len(records) < 2:
        return ""
    shapes = np.array([record["shape"] for record in records])
    losses = np.array([record["loss"] for record in records])
    predicted, deviations = findings.predictor.predict(shapes), findings.predictor.uncertainty(shapes)
    plot_agreement(folder / "agreement.png", losses, predicted, deviations)
    error = np.sqrt(np.mean((predicted - losses) ** 2))
    conclusion = "That is about what cross-validation promised."
    if findings.predictor.quality is not None and error > TOLERATED * findings.predictor.quality.rmse:
        conclusion = (
            f"Cross-validation promised {findings.predictor.quality.rmse:.3f}: shapes that are chosen because their "
            "prediction is low tend to disappoint. Trust measurements more than predictions here."
        )
    within = (np.abs(predicted - losses) <= 2 * deviations).sum()
    return (
        "## Can the predictions be trusted?\n\n"
        f"{len(records)} shapes were measured that the predictor was not fitted on: it is off by {error:.3f} nats "
        f"(root mean square), and {within} of them lie within two of its standard deviations. {conclusion}\n\n"
        "![predicted against measured losses](agreement.png)"
    )


def _profile_section(folder: Path, findings: Findings) -> str:
    """Say what good shapes have in common, and compare a shape made from that with the front and hand-crafted ones."""
    space, predictor = findings.space, findings.predictor
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
            "predicted perplexity": float(np.exp(predictor.predict([shape])[0])),
            "widths": shape,
        }
        for name, shape in shapes.items()
    ]
    return (
        f"## What good shapes have in common\n\n{profile.sentence()}\n\n"
        "Relative width: a layer's width over the mean width of the shape, averaged over the front.\n\n"
        "![relative width and importance of each layer](profile.png)\n\n"
        f"Predicted for {budget:,} parameters:\n\n{markdown_table(rows)}"
    )


def _latency_section(findings: Findings) -> str:
    parts = []
    if findings.table is not None:
        table = findings.table
        parts.append(
            f"## Latency on {table.device}\n\n"
            f"Median of {table.repeats} sweeps, batch {table.batch_size} x {table.sequence_length} tokens, "
            f"{table.dtype}, torch {table.torch_version}. Each width's block, fed by the same width:\n\n"
            f"{markdown_table(width_rows(table))}"
        )
    if findings.insensitivity:
        parts.append(
            "Shapes of equal size, and how much their latency differs (standard deviation over mean). Noise is the "
            "spread that equally fast shapes would show, told from two copies of each; the verdict is an F-test at "
            "5 %, so a spread somewhat above the noise may still be chance.\n\n"
            f"{markdown_table(findings.insensitivity)}"
        )
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output folder of examples/search_shapes.py")
    parser.add_argument("--cost", default="parameters", choices=["parameters", "flops", "latency"])
    parser.add_argument("--num_budgets", type=int, default=8, help="rows of the table")
    parser.add_argument("--sequence_length", type=int, default=128, help="of FLOPs, where no latency was measured")
    parser.add_argument("--max_cost", type=float, nargs="*", default=[], help="budgets that matter most")
    args = parser.parse_args()
    print(write_report(args.folder, args.cost, args.num_budgets, args.sequence_length, args.max_cost))


if __name__ == "__main__":
    main()
