"""Sentences whose words have labels, as in named-entity recognition: from CoNLL, JSON lines, Parquet or the Hub."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from datasets import Dataset, Features, List, Value

from .rows import BYTE_ORDER_MARK, Row, check_file, check_row, read_rows, read_split


SENTENCES = Features({"tokens": List(Value("string")), "labels": List(Value("string"))})
LABEL_COLUMNS = ("ner_tags", "tags", "labels")  # the names that columns of labels have in data sets of the Hub
LABEL = re.compile(r"O|[BIES](-.*)?")
DOCUMENT_START = "-DOCSTART-"


def read_sentences(
    source: str | Path, split: str | None = None, token_column: int = 0, label_column: int = -1
) -> Dataset:
    r"""Read sentences as lists of words and lists of their labels, such as B-PER, I-PER and O.

    A CoNLL file has one word a line with its label, in columns that blanks or tabs separate, and an empty line after
    each sentence. Lines that start with -DOCSTART- end a sentence and are left out. In JSON lines, JSON lists and
    Parquet, a row is a sentence, with the words in `tokens` and the labels in `ner_tags`, `tags` or `labels`.

    Args:
        source: A file: .jsonl, .json or .parquet, or CoNLL with any other suffix. Or, with `split`, a data set.
        split: The split of the data set whose Hub id or folder is `source`, or either with `:configuration`.
        token_column: The column of the word in a CoNLL file, from 0; -1 is the last one.
        label_column: The column of the label in a CoNLL file.

    Returns:
        A dataset with the columns `tokens` and `labels`, both lists of text.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a file or a row is damaged, or a label does not say where an entity begins.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "train.conll")
        ...     _ = file.write_text("George NNP B-PER\nBush NNP I-PER\n\nCongress NNP B-ORG\nmet VBD O\n")
        ...     read_sentences(file)["labels"][:]
        [['B-PER', 'I-PER'], ['B-ORG', 'O']]
    """
    if split is not None:
        sentences = labelled_rows(read_split(str(source), split))
    elif Path(source).suffix in (".jsonl", ".json", ".parquet"):
        sentences = labelled_rows(read_rows(source))
    else:
        sentences = conll_sentences(Path(source), token_column, label_column)
    kept = [{"tokens": tokens, "labels": labels} for tokens, labels in sentences if tokens]
    if not kept:
        raise ValueError(f"{source} holds no sentence.")
    return Dataset.from_list(kept, features=SENTENCES)


def labelled_rows(rows: Iterator[Row]) -> Iterator[tuple[list[str], list[str]]]:
    """Yield the words and labels of rows, each of which is a sentence."""
    for place, row in rows:
        check_row(place, row, {"tokens": list})
        column = next((name for name in LABEL_COLUMNS if name in row), LABEL_COLUMNS[0])
        check_row(place, row, {column: list})
        tokens, labels = row["tokens"], row[column]
        wrong = [token for token in tokens if not isinstance(token, str)]
        if wrong:
            raise ValueError(f"{place} has {wrong[0]!r} among its tokens. Allowed: text.")
        if len(tokens) != len(labels):
            raise ValueError(f"{place} has {len(tokens)} tokens, but {len(labels)} labels. Each token needs a label.")
        for label in labels:
            check_label(place, label)
        yield tokens, labels


def conll_sentences(file: Path, token_column: int = 0, label_column: int = -1) -> Iterator[tuple[list[str], list[str]]]:
    """Yield the words and labels of each sentence of a CoNLL file. A sentence may be empty."""
    check_file(file)
    tokens: list[str] = []
    labels: list[str] = []
    width = None
    for number, line in enumerate(file.read_bytes().removeprefix(BYTE_ORDER_MARK).split(b"\n"), start=1):
        columns = split_columns(f"{file}, line {number}", line)
        if not columns or columns[0] == DOCUMENT_START:
            yield tokens, labels
            tokens, labels = [], []
            continue
        width = width or len(columns)
        check_columns(f"{file}, line {number}", columns, width, (token_column, label_column))
        check_label(f"{file}, line {number}", columns[label_column])
        tokens.append(columns[token_column])
        labels.append(columns[label_column])
    yield tokens, labels


def split_columns(place: str, line: bytes) -> list[str]:
    """Return the columns of a line. Only blanks and tabs separate them: a word may hold any other white space."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place} is not UTF-8: byte {line[error.start]:#04x}. Convert the file, for example with iconv -t utf-8."
        ) from None
    text = text.strip(" \t\r")
    return re.split(r"[ \t]+", text) if text else []


def check_columns(place: str, columns: Sequence[str], width: int, chosen: tuple[int, int]) -> None:
    """Raise a ValueError unless a line has as many columns as the first one, and the two that are read."""
    if len(columns) != width:
        raise ValueError(
            f"{place} has {len(columns)} columns, but the first line has {width}: {' '.join(columns)[:60]!r}"
        )
    if any(not -width <= column < width for column in chosen) or chosen[0] % width == chosen[1] % width:
        raise ValueError(
            f"{place} has {width} columns, 0 to {width - 1}: token_column={chosen[0]} and label_column={chosen[1]} "
            "must be two of them."
        )


def check_label(place: str, label: object) -> None:
    """Raise a ValueError unless a label is "O", or begins with B, I, E or S and names a type."""
    if not isinstance(label, str) or not LABEL.fullmatch(label):
        raise ValueError(
            f"{place} has the label {label!r}. Allowed: 'O', and 'B-', 'I-', 'E-' or 'S-' with the type of an entity, "
            "such as 'B-PER'. Numbers need the names of a ClassLabel."
        )
