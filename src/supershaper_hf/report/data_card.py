"""The folder of a search as a data set: `records.parquet`, `front.parquet`, and a README.md that names them.

Without a README.md, `load_dataset` would take the plots for the data, and the header of `records.jsonl` for a record.
It is also the card of the data set repository that the folder becomes on the Hub. Both tables are Parquet, because
`load_dataset` reads all tables of a folder in the format of the first.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value
from huggingface_hub import DatasetCardData

from ..files import write_file
from ..search.measures import Measure
from ..search.records import to_dataset
from .findings import INSENSITIVITY_FILE, LATENCY_FILE, PREDICTOR_FILE, RECORDS_FILE, Findings


CARD_FILE, TABLE_FILE, FRONT_TABLE = "README.md", "records.parquet", "front.parquet"
MARK = "<!-- written by supershaper-hf -->"  # a README.md without it is its owner's and stays
COLUMNS = {
    "shape": "hidden size of each layer; 0 is a dropped layer",
    "loss": "loss of masked tokens, in nats",
    "perplexity": "exponential of the loss",
    "accuracy": "share of the masked tokens that were predicted",
    "distance": "distance of the hidden states to those of the original, of the last layer or the mean over all",
    "cosine": "cosine of the last hidden states and those of the original",
    "task_loss": "loss on the examples of a task",
    "score": "score on the examples of a task, if one was computed",
    "parameters": "parameters of the subnet, with its head",
}


def write_data_card(folder: str | Path, name: str | None = None, supernet: str | None = None) -> Path:
    """Write `records.parquet` and README.md into the folder of a search, so that `load_dataset(folder)` loads it.

    A README.md that this function has not written stays as it is.

    Args:
        folder: The output folder of `examples/search_shapes.py`, with its front, from `write_report`.
        name: What the code example in the README.md loads: a Hub id. By default the name of the folder.
        supernet: Hub id of the supernet, for the README.md.

    Returns:
        The path of the README.md.

    Raises:
        FileNotFoundError: If a file of the search is missing.
        ValueError: If a file is damaged, or the files do not belong together.

    Example:
        >>> write_data_card("outputs/search", "user/supernet-search")  # doctest: +SKIP
        >>> load_dataset("outputs/search", split="train")[0]["shape"]  # doctest: +SKIP
        [480, 240, 240, 360, 480, 768]
    """
    folder = Path(folder)
    findings, card = Findings.read(folder), folder / CARD_FILE
    write_parquet(folder / TABLE_FILE, to_dataset(findings.records, findings.space))
    if not card.exists() or MARK in card.read_text(encoding="utf-8"):
        write_file(card, data_card(folder, findings, name or folder.resolve().name, supernet))
    return card


def write_front(file: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of `Findings.rows` as Parquet: a column for each key, with null where a value is not known."""
    types = {"shape": List(Value("int64")), "parameters": Value("int64"), "flops": Value("int64")}
    features = Features({key: types.get(key, Value("float64")) for key in rows[0]})
    write_parquet(Path(file), Dataset.from_list([dict(row) for row in rows], features=features))


def write_parquet(file: Path, table: Dataset) -> None:
    """Write a table as Parquet. The file is complete or as it was."""
    partial = file.with_name(f".{file.name}.partial")
    table.to_parquet(partial)
    partial.replace(file)


def data_card(folder: Path, findings: Findings, name: str, supernet: str | None) -> str:
    """Return the text of the README.md."""
    with_front = (folder / FRONT_TABLE).exists()
    configs: list[dict[str, Any]] = [{"config_name": "records", "data_files": TABLE_FILE, "default": True}]
    configs += [{"config_name": "front", "data_files": FRONT_TABLE}] if with_front else []
    data = DatasetCardData(tags=["supershaper"], configs=configs, base_model=supernet)
    columns = [f"| `{column}` | {COLUMNS[column]} |" for column in (*findings.measure.keys, "parameters")]
    front = ""
    if with_front:
        front = (
            '`load_dataset(..., "front", split="train")` loads the Pareto front: every shape for which no cheaper one '
            "is predicted to be better, with its costs, its prediction, and its measurement if there is one.\n\n"
        )
    return (
        f"---\n{data.to_yaml()}\n---\n{MARK}\n\n"
        f"# {_title(findings.measure)} of {len(findings.records):,} shapes of a supernet\n\n"
        f"A shape is the list of the hidden sizes of all layers. All were measured on the same "
        f"{findings.measure.text}.\n\n"
        f'```python\nfrom datasets import load_dataset\n\nrecords = load_dataset({json.dumps(name)}, split="train")\n'
        f"```\n\n| column | meaning |\n| --- | --- |\n" + "\n".join(columns) + f"\n\n{front}{_files(folder)}"
    )


def _title(measure: Measure) -> str:
    return measure.plural.replace("_", " ").capitalize()


def _files(folder: Path) -> str:
    """Say what lies in the folder besides the tables."""
    meanings = {
        RECORDS_FILE: "the records as they were measured, with what they were measured on",
        PREDICTOR_FILE: "predicts shapes that were not measured (`ShapePredictor.load`)",
        LATENCY_FILE: "seconds of the parts of a subnet on one device (`LatencyTable.load`)",
        INSENSITIVITY_FILE: "how much the seconds of shapes of equal size differ",
        "report.md": "the front as a table and plots",
    }
    lines = [f"- `{name}`: {meaning}" for name, meaning in meanings.items() if (folder / name).exists()]
    return "Other files:\n\n" + "\n".join(lines) + "\n"
