"""What was measured of a model, read from files: the tables in its card, and scores for the Hub.

`search_results` reads the folder of a search, `front_results` does so for a whole supernet, and `tuning_results` reads
the `results.json` of a fine-tuning. Each refuses files of another model. A score is an `EvalResult` of huggingface_hub,
which the metadata of a card holds (`model-index`); `result_files` writes scores on data sets of the Hub in the newer
form, as files in `.eval_results`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id, yaml_dump

from ..files import parse_json, read_json
from ..model.modeling_supershaper import SuperShaperPreTrainedModel
from ..report.findings import RECORDS_FILE, Findings
from ..report.tables import markdown_table
from ..search.pareto import shapes_at


FINE_TUNING, SIMILARITY = "supershaper-hf fine-tuning 1", "supershaper-hf sentence similarity 1"
RESULTS_FOLDER = ".eval_results"  # the one hidden folder that the Hub reads
LIBRARIES = ("supershaper-hf", "transformers", "torch")
HELD_OUT = "held-out"  # type of a data set that is not on the Hub


@dataclass(frozen=True)
class Results:
    """Text for the section on evaluation, and scores for the metadata of a card."""

    text: str = ""
    scores: list[EvalResult] = field(default_factory=list)

    def __add__(self, other: "Results") -> "Results":
        return Results("\n\n".join(filter(None, [self.text, other.text])), [*self.scores, *other.scores])


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that compute results.

    Example:
        >>> list(library_versions())
        ['supershaper-hf', 'transformers', 'torch']
    """
    return {library: version(library) for library in LIBRARIES}


# From the folder of a search


def search_results(findings: Findings, shape: Sequence[int], task_type: str) -> Results:
    """Return what a search says of a subnet as it was cut: measured and predicted values, beside the largest shape.

    Args:
        findings: The search, from `Findings.read`.
        shape: The shape of the subnet.
        task_type: The task of its head on the Hub.

    Raises:
        ValueError: If `shape` is not one of the supernet of this search.
    """
    findings.space.validate(shape)
    measure, largest = findings.measure, findings.space.largest
    shapes = {"this subnet": list(shape)} | ({"largest shape": largest} if list(shape) != largest else {})
    found = findings.rows(np.array(list(shapes.values())))
    rows = [{"": name, **_values(row, findings)} for name, row in zip(shapes, found)]
    row, remarks = found[0], []
    if row[f"measured_{measure.shown}"] is None:
        remarks.append("This subnet was not measured. One that is chosen by its prediction is often worse than that.")
    if findings.explanation:
        remarks.append(findings.explanation)
    text = (
        f"As cut out of the supernet, on held-out {measure.text} ({len(findings.records):,} shapes were measured; the "
        f"others are predicted from them). {' '.join(remarks)}"
    )
    value = row[f"measured_{measure.shown}"]
    scores = []
    if value is not None and np.isfinite(value):
        name = f"Held-out {measure.text} of the search"
        scores.append(EvalResult(task_type, HELD_OUT, name, measure.shown, round(float(value), 6)))
    return Results(f"{text.rstrip()}\n\n{markdown_table(rows)}", scores)


def front_results(findings: Findings, rows: int = 8) -> Results:
    """Return the best shapes of a supernet for some budgets, as predicted and as measured.

    Args:
        findings: The search, from `Findings.read`.
        rows: Number of rows of the table, evenly spaced over the parameters of the front.
    """
    shapes = np.unique(shapes_at(findings.front("parameters"), rows), axis=0)
    found = sorted(findings.rows(shapes), key=lambda row: row["parameters"])
    table = [{"parameters": row["parameters"], **_values(row, findings), "shape": str(row["shape"])} for row in found]
    text = (
        f"The best shapes for some budgets, by a predictor that was fitted on measured shapes ("
        f"{len(findings.records):,} were measured on the same held-out {findings.measure.text}: `{RECORDS_FILE}`). "
        f"{findings.explanation}"
    )
    return Results(f"{text.rstrip()}\n\n{markdown_table(table)}")


def _values(row: Mapping[str, Any], findings: Findings) -> dict[str, str]:
    """Return the cells of a measured and a predicted value; empty where it is not known."""
    measure = findings.measure

    def text(value: float | None) -> str:
        return "" if value is None else f"{value:.{measure.digits}f}"

    return {
        f"measured {measure.title}": text(row[f"measured_{measure.shown}"]),
        f"predicted {measure.title}": text(row[f"predicted_{measure.shown}"]),
    }


# From the results of a fine-tuning


def tuning_results(
    file: str | Path, model: SuperShaperPreTrainedModel, task_type: str, dataset: str | None = None
) -> Results:
    """Return the scores in the `results.json` of `run_glue.py`, `run_ner.py`, `run_qa.py` or `run_sts.py`.

    Args:
        file: The file.
        model: The model that was fine-tuned, as it was saved.
        task_type: The task of its head on the Hub.
        dataset: Hub id of the data set that was scored. Without it, a score names the task only.

    Raises:
        ValueError: If the file is damaged or of another kind, or its results are of another model.
    """
    content = parse_json(Path(file).read_bytes(), str(file))
    kind = content.get("format") if isinstance(content, dict) else None
    content = read_json(file, SIMILARITY if kind == SIMILARITY else FINE_TUNING)
    config: Any = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    shape = content["shape"] if kind == FINE_TUNING else None
    if content["parameters"] != parameters or shape not in (None, config.hidden_sizes):
        raise ValueError(
            f"{file} has the results of another model: {content['parameters']:,} parameters"
            f"{f' and the shape {shape}' * (shape is not None)}, but this one has {parameters:,} and "
            f"{config.hidden_sizes}. Name the results of this model, or none."
        )
    results = (_similarity if kind == SIMILARITY else _fine_tuning)(content, task_type, dataset)
    versions = content.get("library_version")
    if versions:
        names = ", ".join(f"{library} {number}" for library, number in versions.items())
        results += Results(f"Computed with {names}.")
    return results


def _fine_tuning(content: Mapping[str, Any], task_type: str, dataset: str | None) -> Results:
    task, count = content["task"], len(content["seeds"])
    (best,) = [found for found in content["seeds"] if found["seed"] == content["best_seed"]]
    rows, scores = [], []
    for split, values in best["scores"].items():
        for name, value in values.items():
            row = {"task": task, "split": split, "score": name, "this model": f"{value:.4f}"}
            if count > 1:
                mean, spread = content["mean"][split][name], content["spread"][split][name]
                row[f"mean ± standard deviation of {count} seeds"] = f"{mean:.4f} ± {spread:.4f}"
            rows.append(row)
            scores.append(_score(task_type, dataset, task, split, name, value))
    scores.sort(key=lambda score: score.metric_type != content["score"])  # the one that chose the model comes first
    return Results(f"After fine-tuning, with the seed {best['seed']}:\n\n{markdown_table(rows)}", scores)


def _similarity(content: Mapping[str, Any], task_type: str, dataset: str | None) -> Results:
    value = content.get("after", content["before"])
    text = f"Spearman's correlation of cosines with the ratings of {content['pairs']:,} pairs: {value:.4f}."
    return Results(text, [_score(task_type, dataset, "rated pairs", "validation", "spearman_cosine", value)])


def _score(task_type: str, dataset: str | None, task: str, split: str, name: str, value: float) -> EvalResult:
    return EvalResult(
        task_type,
        dataset_type=dataset or task,
        dataset_name=task,
        metric_type=name,
        metric_value=value,
        dataset_config=task if dataset else None,
        dataset_split=split,
    )


# For the Hub


def result_files(results: Sequence[EvalResult]) -> dict[str, str]:
    """Return the files that show scores on data sets of the Hub to the Hub: name -> YAML.

    Each has one score of a data set and a task, the first one. A score on another data set is in none.

    Example:
        >>> score = EvalResult("text-classification", "nyu-mll/glue", "sst2", "accuracy", 0.9, dataset_config="sst2")
        >>> print(result_files([score])[".eval_results/nyu-mll_glue_sst2.yaml"])
        - dataset:
            id: nyu-mll/glue
            task_id: sst2
          notes: accuracy
          value: 0.9
        <BLANKLINE>
    """
    files: dict[str, str] = {}
    for score in results:
        if not is_hub_id(score.dataset_type):
            continue
        task = score.dataset_config or "default"
        notes = ", ".join(filter(None, [score.metric_type, score.dataset_split]))
        entry = EvalResultEntry(score.dataset_type, task, score.metric_value, notes=notes)
        name = re.sub(r"[^\w-]+", "_", f"{score.dataset_type}_{task}")
        files.setdefault(f"{RESULTS_FOLDER}/{name}.yaml", yaml_dump(eval_result_entries_to_yaml([entry])))
    return files


def is_hub_id(name: str) -> bool:
    """Return whether `name` can be that of a data set of a user on the Hub.

    Example:
        >>> is_hub_id("nyu-mll/glue"), is_hub_id("sst2"), is_hub_id("../glue")
        (True, False, False)
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name
