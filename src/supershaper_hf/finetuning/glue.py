"""The tasks of GLUE, and classification or regression of sentences and pairs of sentences in files of your own.

Source: GLUE, arXiv 1804.07461. Data comes from the Hub (`nyu-mll/glue`), or from CSV, JSON lines or Parquet files whose
columns have GLUE's names.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from pyarrow import ArrowException
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
)

from ..checks import check_choice
from ..data.sequences import check_length
from .metrics import GlueMetric
from .rows import check_file
from .task import Task


GLUE = "nyu-mll/glue"
FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class GlueTask:
    """What is known of a task before its data is read.

    Attributes:
        columns: The columns of the text: one, or two for a pair. None: the first of `COLUMNS` that the data has.
        labels: The names of the labels, in GLUE's order; none for numbers; None: those that the data has.
        scores: What is reported. The mean of them chooses the best epoch, as GLUE ranks models.
        splits: The splits that are scored. The first one chooses the best epoch.
    """

    columns: tuple[str, ...] | None
    labels: tuple[str, ...] | None
    scores: tuple[str, ...] = ("accuracy",)
    splits: tuple[str, ...] = ("validation",)


SENTENCE, PAIR = ("sentence",), ("sentence1", "sentence2")
COLUMNS = [PAIR, SENTENCE, ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"), ("text",)]
TASKS = {
    "cola": GlueTask(SENTENCE, ("unacceptable", "acceptable"), ("matthews_correlation",)),
    "sst2": GlueTask(SENTENCE, ("negative", "positive")),
    "mrpc": GlueTask(PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "qqp": GlueTask(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "stsb": GlueTask(PAIR, (), ("pearson", "spearmanr")),
    "mnli": GlueTask(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        splits=("validation_matched", "validation_mismatched"),
    ),
    "qnli": GlueTask(("question", "sentence"), ("entailment", "not_entailment")),
    "rte": GlueTask(PAIR, ("entailment", "not_entailment")),
    "wnli": GlueTask(PAIR, ("not_entailment", "entailment")),
    "classification": GlueTask(None, None, ("accuracy", "macro_f1")),
    "regression": GlueTask(None, (), ("pearson", "spearmanr")),
}


def glue_task(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    train_file: str | None = None,
    validation_files: Sequence[str] = (),
    dataset_name: str = GLUE,
    max_length: int = 128,
) -> Task:
    """Return a task of GLUE, or of your own files, tokenised.

    Args:
        name: One of the nine tasks of GLUE: "cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte" or "wnli". Or
            "classification" or "regression" for files with other labels. Their text is in columns that a task of GLUE
            has, or in `text`; labels may be words.
        tokenizer: The tokenizer of the model.
        train_file: A CSV, JSON lines or Parquet file with GLUE's column names. By default data comes from the Hub.
        validation_files: As many such files as the task has scored splits: two for "mnli", else one.
        dataset_name: Hub id or folder of a data set with the configurations of GLUE, if there are no files.
        max_length: Tokens of the longest example. Longer ones are cut, pairs at the longer sentence.

    Raises:
        ValueError: If the task is unknown, files are missing, a column is missing, or a label is not one of the task.
        FileNotFoundError: If there is no such file.

    Example:
        >>> glue_task("sst2", tokenizer, "train.csv", ["validation.csv"]).score  # doctest: +SKIP
        'accuracy'
    """
    check_choice("task", name, TASKS)
    check_length(tokenizer, max_length)
    known = TASKS[name]
    splits = read_splits(name, train_file, validation_files, dataset_name)
    columns = known.columns or find_columns(splits["train"], train_file or dataset_name)
    labels = known.labels if known.labels is not None else find_labels(splits)
    checked = {split: check_examples(data, name, split, columns, labels) for split, data in splits.items()}
    if known.labels is None and len(labels) < 2:
        raise ValueError(f"The examples of task {name!r} have the labels {list(labels)}. It needs two different ones.")
    tokenized = {split: tokenize_pairs(data, tokenizer, columns, max_length) for split, data in checked.items()}
    score = known.scores[0] if len(known.scores) == 1 else "combined_score"
    return Task(
        name=name,
        auto_class=AutoModelForSequenceClassification,
        config=head_config(labels),
        train=tokenized.pop("train"),
        evaluation=tokenized,
        collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=partial(compute_metrics, known.scores),
        score=score,
    )


def head_config(labels: Sequence[str]) -> dict[str, Any]:
    """Return what the configuration of a model says of its labels; without any, it predicts a number."""
    if not labels:
        return {"num_labels": 1, "problem_type": "regression", "id2label": {0: "score"}, "label2id": {"score": 0}}
    return {
        "num_labels": len(labels),
        "problem_type": "single_label_classification",
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
    }


def compute_metrics(scores: Sequence[str], prediction: EvalPrediction) -> dict[str, float]:
    """Return the scores of logits (examples, labels), and their mean as `combined_score` if there are several."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    predicted = logits.squeeze(-1) if logits.shape[-1] == 1 else logits.argmax(axis=-1)
    found = GlueMetric(scores).compute(predictions=predicted, references=prediction.label_ids)
    return found if len(found) == 1 else found | {"combined_score": float(np.mean(list(found.values())))}


# Reading


def read_splits(
    name: str, train_file: str | None, validation_files: Sequence[str], dataset_name: str
) -> dict[str, Dataset]:
    """Return the training split and the splits that are scored, as they are in the files or on the Hub."""
    scored = TASKS[name].splits
    if train_file is None and not validation_files:
        if name not in TASKS or TASKS[name].columns is None:
            raise ValueError(f"task={name!r} has no data on the Hub. Give train_file and validation_files.")
        return {split: load_dataset(dataset_name, name, split=split) for split in ("train", *scored)}
    if train_file is None or len(validation_files) != len(scored):
        raise ValueError(
            f"task={name!r} needs one training file and {len(scored)} for validation ({', '.join(scored)}); got "
            f"train_file={train_file!r}, validation_files={list(validation_files)!r}."
        )
    return {split: read_file(file) for split, file in zip(("train", *scored), (train_file, *validation_files))}


def read_file(file: str | Path) -> Dataset:
    """Read a CSV, JSON lines or Parquet file. Words such as "NA" or "null" in a CSV file are text.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If its suffix is unknown, or it is damaged or has no row.
    """
    kind = FORMATS.get(Path(file).suffix)
    if kind is None:
        raise ValueError(f"{file} has an unknown format. Allowed: {', '.join(FORMATS)}.")
    check_file(file)
    options = {"keep_default_na": False, "index_col": False} if kind == "csv" else {}
    hint = " Text that holds a comma must stand in quotes." if kind == "csv" else ""
    try:
        with warnings.catch_warnings():  # a first row with more values than the header has columns only warns
            warnings.filterwarnings("error", "Length of header or names does not match")
            return load_dataset(kind, data_files=str(file), split="train", **options)
    except (DatasetGenerationError, ArrowException) as error:
        reason = str(error.__cause__ or error).strip(" .\n")
        raise ValueError(f"{file} is damaged, or is no {Path(file).suffix} file: {reason}.{hint}") from error
    except (ValueError, StopIteration) as error:  # what `datasets` raises where it finds no row
        raise ValueError(f"{file} has no row that can be read. {error}") from error


def find_columns(data: Dataset, source: str) -> tuple[str, ...]:
    """Return the columns of the text."""
    for columns in COLUMNS:
        if set(columns) <= set(data.column_names):
            return columns
    names = ", ".join("+".join(columns) for columns in COLUMNS)
    raise ValueError(f"{source} has the columns {data.column_names}. Its text must be in one of: {names}.")


def find_labels(splits: Mapping[str, Dataset]) -> tuple[str, ...]:
    """Return the labels of all splits as text, sorted; whole numbers by their value. Nothing is no label."""
    found: set[str] = set()
    for data in splits.values():
        if "label" in data.column_names:
            words = class_names(data)
            found.update(text for value in data.unique("label") if (text := label_text(value, words)) is not None)
    return tuple(sorted(found, key=lambda text: (not text.isdecimal(), int(text) if text.isdecimal() else 0, text)))


def class_names(data: Dataset) -> list[str] | None:
    """Return the names of the labels of `data`, if it has numbers for them."""
    kind = data.features["label"]
    return kind.names if isinstance(kind, ClassLabel) else None


def label_text(value: Any, words: Sequence[str] | None) -> str | None:
    """Return a label as text, which is its name if `words` are the names of numbers; None if there is none."""
    if value is None or value == "":
        return None
    if words is None:
        return str(value)
    return words[value] if 0 <= value < len(words) else None


def check_examples(data: Dataset, name: str, split: str, columns: Sequence[str], labels: Sequence[str]) -> Dataset:
    """Return text and labels alone, with labels as indices, or as numbers for regression.

    Raises:
        ValueError: If a column is missing, an example has no text, or a label is not one of the task.
    """
    missing = {*columns, "label"} - set(data.column_names)
    if missing or not len(data):
        what = f"lacks the columns {sorted(missing)}; it has {data.column_names}" if missing else "has no example"
        raise ValueError(f"The split {split!r} of task {name!r} {what}.")
    data = data.select_columns([*columns, "label"])
    for column in columns:
        empty = next((row for row, text in enumerate(data[column]) if not isinstance(text, str)), None)
        if empty is not None:
            raise ValueError(f"The split {split!r} of task {name!r} has no text in column {column!r} of row {empty}.")
    words = class_names(data)
    if words is not None and not set(words) & set(labels):
        words = None  # the numbers are indices of labels
    values = [label_value(value, labels, words) for value in data["label"]]
    wrong = next((row for row, value in enumerate(values) if value is None), None)
    if wrong is not None:
        allowed = f"one of {list(labels)} or its index" if labels else "a finite number"
        value = data[wrong]["label"]
        value = value if words is None else label_text(value, words)
        raise ValueError(
            f"The split {split!r} of task {name!r} has the label {value!r} in row {wrong}. Allowed: {allowed}."
        )
    features = Features({column: Value("string") for column in columns} | {"label": Value(LABEL_TYPE[bool(labels)])})
    return Dataset.from_dict({column: data[column] for column in columns} | {"label": values}, features=features)


LABEL_TYPE = {True: "int64", False: "float32"}  # by whether there are labels


def label_value(value: Any, labels: Sequence[str], words: Sequence[str] | None) -> int | float | None:
    """Return the index of a label, or a number for regression; None if it is not allowed."""
    if not labels:
        try:
            return float(value) if np.isfinite(float(value)) else None
        except (TypeError, ValueError):
            return None
    text = label_text(value, words)
    if text is not None and text in labels:
        return list(labels).index(text)
    return value if words is None and isinstance(value, int) and 0 <= value < len(labels) else None


def tokenize_pairs(
    data: Dataset, tokenizer: PreTrainedTokenizerBase, columns: Sequence[str], max_length: int
) -> Dataset:
    """Return `data` as token ids, without padding, with the column `labels`."""

    def tokenize(batch: dict[str, list[Any]]) -> dict[str, Any]:
        encoded = tokenizer(*(batch[column] for column in columns), truncation=True, max_length=max_length)
        return {**encoded, "labels": batch["label"]}

    return data.map(tokenize, batched=True, remove_columns=data.column_names)
