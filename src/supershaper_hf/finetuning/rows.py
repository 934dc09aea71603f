"""Rows of JSON lines, JSON lists, Parquet files and data sets of the Hub, each with its place for error messages."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import ClassLabel, Dataset, get_dataset_split_names, load_dataset
from transformers import PreTrainedTokenizerBase

from ..data.sequences import check_length
from ..files import parse_json


BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors write it at the start of a file

Row = tuple[str, Any]  # where it stands, such as "train.jsonl, line 7", and what it holds
Source = tuple[str, str | None]  # a file and None, or a data set and its split


def split_sources(
    train_file: str | Path | None, scored: Mapping[str, str | Path | None], dataset_name: str | None
) -> dict[str, Source]:
    """Return where the examples of each split are: "train", and those of `scored` that there are.

    Args:
        train_file: The file of the examples to train on.
        scored: The file of each split that can be scored. The first one is needed, the others may be None.
        dataset_name: Instead of files, a data set: a Hub id or folder, or either with `:configuration`.

    Raises:
        ValueError: If neither all needed files nor a data set is given, or both.

    Example:
        >>> split_sources("train.conll", {"validation": "dev.conll", "test": None}, None)
        {'train': ('train.conll', None), 'validation': ('dev.conll', None)}
    """
    first = next(iter(scored))
    files = {"train": train_file, **scored}
    if dataset_name is not None:
        if any(file is not None for file in files.values()):
            raise ValueError("Give dataset_name or files, not both.")
        name, _, configuration = dataset_name.partition(":")
        known = get_dataset_split_names(name, configuration or None)
        return {split: (dataset_name, split) for split in files if split in known or split in ("train", first)}
    missing = [f"{split}_file" for split in ("train", first) if files[split] is None]
    if missing:
        raise ValueError(f"{' and '.join(missing)} missing. Give files to train on and to score, or dataset_name.")
    return {split: (str(file), None) for split, file in files.items() if file is not None}


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Raise a ValueError unless `tokenizer` makes sequences of `max_length` and knows where each token stands."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} cannot say where in the text a token stands. Use a fast tokenizer."
        )
    check_length(tokenizer, max_length)


def read_rows(file: str | Path) -> Iterator[Row]:
    r"""Yield the rows of a file, each with its place. In JSON, a list or `{"data": [...]}` holds the rows of a file.

    Args:
        file: Its suffix is .jsonl, .json or .parquet. Class labels in Parquet become their names.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If its suffix is another one, or it is damaged or has no row.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "two.jsonl")
        ...     _ = file.write_text('{"id": 1}\n{"id": 2}\n')
        ...     [row for place, row in read_rows(file)]
        [{'id': 1}, {'id': 2}]
    """
    suffix = Path(file).suffix
    if suffix not in (".jsonl", ".json", ".parquet"):
        raise ValueError(f"{file} has an unknown format. Allowed: .jsonl, .json, .parquet.")
    check_file(file)
    if suffix == ".parquet":
        try:
            data = Dataset(pyarrow.parquet.read_table(file))
        except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
            raise ValueError(f"{file} is not a Parquet file, or is damaged: {error}") from error
        yield from rows_of(data, str(file))
    else:
        yield from json_rows(Path(file))


def check_file(file: str | Path) -> None:
    """Raise an error unless `file` is a file that is not empty."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file} does not exist, or is not a file.")
    if not Path(file).stat().st_size:
        raise ValueError(f"{file} is empty.")


def json_rows(file: Path) -> Iterator[Row]:
    """Yield the rows of JSON lines, or of one JSON value that may extend over many lines."""
    content = file.read_bytes().removeprefix(BYTE_ORDER_MARK)
    lines = [(number, line) for number, line in enumerate(content.split(b"\n"), start=1) if line.strip()]
    if not lines:
        raise ValueError(f"{file} is empty.")
    if file.suffix == ".jsonl" or (len(lines) > 1 and is_json(lines[0][1])):
        for number, line in lines:
            yield f"{file}, line {number}", parse_json(line, f"{file}, line {number}")
        return
    value = parse_json(content, str(file))
    value = value["data"] if isinstance(value, dict) and isinstance(value.get("data"), list) else value
    for number, row in enumerate(value if isinstance(value, list) else [value], start=1):
        yield f"{file}, row {number}", row


def is_json(line: bytes) -> bool:
    try:
        parse_json(line, "")
        return True
    except ValueError:
        return False


def rows_of(data: Dataset, source: str) -> Iterator[Row]:
    """Yield the rows of a dataset, with the names of class labels in place of their numbers."""
    kinds = {column: class_label(kind) for column, kind in data.features.items() if class_label(kind)}
    if not len(data):
        raise ValueError(f"{source} has no row.")
    for number, row in enumerate(data, start=1):
        place = f"{source}, row {number}"
        for column, kind in kinds.items():
            if row[column] is not None:
                row[column] = [label_name(place, kind.names, label) for label in row[column]]
        yield place, row


def label_name(place: str, names: Sequence[str], number: Any) -> str:
    """Return the name of a class label, or raise a ValueError if it has none, as -1 in splits without labels."""
    if number is None or not 0 <= number < len(names):
        raise ValueError(
            f"{place} has the label {number}. Allowed: 0 to {len(names) - 1}, which stand for {', '.join(names)}. "
            "Use a split that has labels."
        )
    return names[number]


def class_label(kind: Any) -> Any:
    """Return the ClassLabel of a column that holds lists of class labels, or None."""
    inner = getattr(kind, "feature", None)
    return inner if isinstance(inner, ClassLabel) else None


def read_split(source: str, split: str) -> Iterator[Row]:
    """Yield the rows of one split of a data set: a Hub id or folder, or either with `:configuration`.

    Raises:
        ValueError: If it has no such split or row.
    """
    name, _, configuration = source.partition(":")
    data = load_dataset(name, configuration or None, split=split)
    yield from rows_of(data, f"{source}, split {split}")


def check_row(place: str, row: Any, columns: dict[str, type]) -> None:
    """Raise a ValueError unless a row is a JSON object that holds `columns` of these types."""
    if not isinstance(row, dict):
        raise ValueError(f"{place} must be a JSON object, got {str(row)[:40]!r}.")
    for column, kind in columns.items():
        if column not in row:
            raise ValueError(f"{place} has no {column!r}, only {sorted(row)}.")
        if not isinstance(row[column], kind):
            raise ValueError(f"{place}: {column!r} must be of the type {kind.__name__}, got {str(row[column])[:40]!r}.")
