"""Turn the files of a search into `explorer.html`, a page on which a reader chooses a shape by looking.

    python -m supershaper_hf.report outputs/search

A reader moves a budget along the Pareto front and sees the best shape, its predicted and measured quality, the
hand-crafted shapes of the same budget, and the code that cuts the shape out. The page is one file that loads nothing
else. It is laid out in `explorer_template.html`; this file computes the numbers that it shows.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment

from ..checks import check_number
from ..files import write_file
from ..model.shapes import SHAPE_NAMES
from .findings import Findings


EXPLORER_FILE = "explorer.html"
TEMPLATE = Path(__file__).with_name("explorer_template.html")
SCORES = {"loss": "accuracy", "distance": "cosine", "task_loss": "score"}  # what else is measured, higher is better
FIELDS = ("shape", "parameters", "flops", "latency", "predicted", "deviation", "measured", "score")
UNKNOWN_SUPERNET = "FOLDER-OF-THE-SUPERNET"

CODE = (  # before and after the shape
    """\
{imports}from supershaper_hf import extract_from_folder
from transformers import {auto_class}, AutoTokenizer

supernet = {source}
folder = extract_from_folder(supernet, """,
    """, "subnet")
model = {auto_class}.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
""",
)


def write_explorer(
    folder: str | Path,
    cost: str = "parameters",
    max_cost: Sequence[float] = (),
    sequence_length: int = 128,
    supernet: str | Path | None = None,
) -> Path:
    """Write `explorer.html` of a search into its folder, and return its path.

    Args:
        folder: The output folder of `examples/search_shapes.py`.
        cost: The cost that the page shows first: `"parameters"`, `"flops"` or `"latency"`.
        max_cost: The page starts with the first of these budgets, in the unit of `cost`, and otherwise with a budget in
            the middle of the front.
        sequence_length: Tokens per sequence, to count FLOPs. If latency was measured, the length of that measurement is
            used instead.
        supernet: Folder or Hub id of the supernet, for the code that the page shows. Without it, that code has a
            placeholder.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, the files do not belong together, or `cost` is latency but none was measured.

    Example:
        >>> write_explorer("outputs/search", supernet="user/supernet")  # doctest: +SKIP
    """
    page = explorer_page(Findings.read(folder, sequence_length), cost, max_cost, supernet)
    return write_file(Path(folder) / EXPLORER_FILE, page)


def explorer_page(
    findings: Findings, cost: str = "parameters", max_cost: Sequence[float] = (), supernet: str | Path | None = None
) -> str:
    """Return the HTML of the page. The arguments are those of `write_explorer`.

    Example:
        >>> html = explorer_page(Findings.read("outputs/search"))  # doctest: +SKIP
    """
    for budget in max_cost:
        check_number("max_cost", budget, above=0)
    data = explorer_data(findings, supernet)
    costs = findings.front(cost).costs[cost]
    budget = max_cost[0] if len(max_cost) else float(costs.min() + costs.max()) / 2
    data["start"] = {"cost": cost, "budget": max(budget, float(costs.min()))}
    # Autoescape and `tojson` keep any name from ending the script element that holds the data.
    environment = Environment(autoescape=True)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "separators": (",", ":"), "allow_nan": False}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        data=data,
        layers=findings.space.num_layers,
        measure=findings.measure,
        measured=len(findings.records),
        possible=findings.num_possible(),
        quality=findings.predictor.quality,
        supernet=supernet,
        table=findings.table,
    )


def explorer_data(findings: Findings, supernet: str | Path | None = None) -> dict[str, Any]:
    """Return all numbers of the page. Rows of shapes are lists of the values that `fields` names.

    Example:
        >>> data = explorer_data(Findings.read("outputs/search"))  # doctest: +SKIP
        >>> dict(zip(data["fields"], data["fronts"]["parameters"][0]))  # doctest: +SKIP
    """
    space, measure = findings.space, findings.measure
    costs, rows = _costs(findings), _Rows(findings)
    named = {name: rows(space.named_shapes(name)) for name in SHAPE_NAMES}
    predicted = FIELDS.index("predicted")
    return {
        "measure": {"title": measure.title, "digits": measure.digits, "logarithmic": measure.shown != measure.name},
        "score": findings.score or SCORES[measure.name],
        "hidden_size": space.config.hidden_size,
        "costs": costs,
        "fields": FIELDS,
        "fronts": {cost: rows(findings.front(cost).shapes) for cost in costs},
        "measured": rows(np.array([record["shape"] for record in findings.records])),
        "hand_crafted": {  # without those that drop layers, if the predictor does not know such shapes
            name: shapes for name, shapes in named.items() if all(row[predicted] is not None for row in shapes)
        },
        "code": _code(findings, supernet),
    }


def _costs(findings: Findings) -> dict[str, dict[str, Any]]:
    """Return what the page says of each cost, and how many of our units its unit and that of its axis are."""
    length, table = findings.sequence_length, findings.table
    costs: dict[str, dict[str, Any]] = {
        "parameters": {"title": "parameters", "unit": "parameters", "axis": "million parameters", "per_tick": 1e6},
        "flops": {"title": f"operations ({length} tokens)", "unit": "GFLOPs", "axis": "GFLOPs", "per_tick": 1e9},
    }
    if table is not None:
        batch = f"latency (batch of {table.batch_size} x {length} tokens)"
        costs["latency"] = {"title": batch, "unit": "ms", "axis": "milliseconds", "per_tick": 1e-3}
    return {name: {**cost, "per": 1 if name == "parameters" else cost["per_tick"]} for name, cost in costs.items()}


class _Rows:
    """The rows of shapes as the page needs them: the `FIELDS`, in numbers that JSON can hold."""

    def __init__(self, findings: Findings):
        self.findings = findings
        score = findings.measure.keys[-1]
        self.scores = {tuple(record["shape"]): record[score] for record in findings.records}

    def __call__(self, shapes: np.ndarray) -> list[list[Any]]:
        measure = self.findings.measure
        rows = []
        for row in self.findings.rows(shapes):
            predicted, deviation = row[f"predicted_{measure.shown}"], row["predicted_deviation"]
            if predicted is not None:
                deviation *= predicted if measure.name == "loss" else 1.0  # as in the report's table
            values = {
                **row,
                "predicted": predicted,
                "deviation": deviation,
                "measured": row[f"measured_{measure.shown}"],
                "score": self.scores.get(tuple(row["shape"])),
            }
            rows.append([_json_value(values[field]) for field in FIELDS])
        return rows


def _json_value(value: Any) -> Any:
    """Return a value for JSON: infinity and NaN, the measurements of a shape that diverged, become text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _code(findings: Findings, supernet: str | Path | None) -> list[str]:
    """Return what stands before and after the shape in the lines of Python that cut it out and load it."""
    source = _literal(UNKNOWN_SUPERNET if supernet is None else str(supernet))
    on_hub = isinstance(supernet, str) and not Path(supernet).is_dir()
    head = findings.space.model_class.__name__.removeprefix("SuperShaper").removeprefix("Model")
    parts = {
        "imports": "from huggingface_hub import snapshot_download\n" if on_hub else "",
        "source": f"snapshot_download({source})" if on_hub else source,
        "auto_class": f"AutoModel{head}",
    }
    return [half.format(**parts) for half in CODE]


def _literal(text: str) -> str:
    """Return a Python literal of a string, which shows every character that could mislead a reader as an escape."""
    return json.dumps(text, ensure_ascii=False) if text.isprintable() else repr(text)
