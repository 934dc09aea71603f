"""Read documents from files and data sets of the Hub: text, JSON lines and Parquet, compressed or not.

`datasets` reads, decompresses, streams and caches. This module finds the files, and says clearly what is wrong with a
file that cannot be read.
"""

import errno
import glob
import hashlib
import io
import json
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow.parquet
import zstandard
from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError
from datasets.table import CastError

from ..checks import check_number


FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # suffix -> reader of `datasets`
COMPRESSIONS = (".gz", ".xz", ".zst", ".bz2")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")  # data set, user/data-set, either with :configuration
TEXT = Features({"text": Value("string")})
ROWS = 1000  # number of rows that are read at a time
READER = 1  # a part of the cache key: raise it when this module makes other documents from the same file
BYTE_ORDER_MARK = "\ufeff"  # some editors write it at the start of a file; the reader of JSON leaves it out by itself
DISK_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def load_text(
    sources: str | Path | Sequence[str | Path], column: str = "text", split: str = "train", streaming: bool = False
) -> Dataset | IterableDataset:
    r"""Read documents into a dataset with one column, `text`, in the order of the sources.

    Each line of a text file is a document, and so is each row of JSON lines and of Parquet. Blank documents are left
    out. Files may be compressed (.gz, .xz, .zst, .bz2).

    Stored documents are kept in the cache of `datasets`, and a second call with the same files reads them from there.
    A file is the same if its path and its content are the same. To compare the content, each call computes the SHA-256
    of every file, which takes 0.07 to 0.16 s for a file of 100 MB (measured on an AMD EPYC).

    A stream is read again by every process of a training run, from the start to the end: each process keeps its share
    of the documents and skips the others. So more processes do not read faster.

    Args:
        sources: One or more files, globs, folders (searched for .txt, .jsonl, .json and .parquet, sorted by path), or
            data sets of the Hub, as `user/name` or `user/name:configuration`. If a name matches something on disk,
            that is read. A file with any other suffix is read as text.
        column: The column of JSON lines, Parquet and Hub data sets that holds the text.
        split: The split of Hub data sets.
        streaming: Read while iterating, and store nothing. Errors in a file are then raised when it is reached. A run
            that is resumed reads its current file again from the start, which is quicker with many small files.

    Raises:
        FileNotFoundError: If nothing on disk and no data set of the Hub matches a source, or a file has vanished.
        OSError: If the disk of the cache is full.
        ValueError: If a file is empty, damaged, not UTF-8, not in its format, or has no such column of text.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     _ = Path(folder, "two.txt").write_text("The first document.\nThe second one.\n")
        ...     list(load_text(folder, streaming=True))
        [{'text': 'The first document.'}, {'text': 'The second one.'}]
    """
    given = [sources] if isinstance(sources, (str, Path)) else list(sources)
    if not given:
        raise ValueError("No text files given. Name at least one UTF-8 file with one document a line.")
    found = [(str(source), find_files(source)) for source in given]
    parts = []
    for on_disk, group in groupby(found, key=lambda pair: bool(pair[1])):
        if on_disk:
            parts.append(load_files([file for _, files in group for file in files], column, streaming))
        else:
            parts += [load_from_hub(name, column, split, streaming) for name, _ in group]
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


# Files


def find_files(source: str | Path) -> list[str]:
    """Return the files of a path, glob or folder, or an empty list if `source` can only be a name on the Hub."""
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(str(file) for file in path.rglob("*") if file.is_file() and known_format(file))
        if not files:
            raise FileNotFoundError(f"Folder {path} holds no file that ends in {', '.join(FORMATS)}.")
        return files
    files = [str(path)] if path.is_file() else sorted(glob.glob(str(path), recursive=True))
    files = [file for file in files if Path(file).is_file()]
    if not files and (isinstance(source, Path) or known_format(path) or not HUB_NAME.fullmatch(source)):
        raise FileNotFoundError(
            f"Text file {path} does not exist or is not a file, and as a glob pattern it matches no file."
        )
    return files


def known_format(file: str | Path) -> str | None:
    """Return the reader for the suffix of a file, whether or not it is compressed, or `None` if it is unknown."""
    path = Path(file)
    return FORMATS.get(Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix)


def load_files(files: list[str], column: str, streaming: bool) -> Dataset | IterableDataset:
    """Return the documents of `files`. Stored ones come from the cache if content, column and reader are the same."""
    arguments: dict[str, Any] = {"files": [str(Path(file).absolute()) for file in files], "column": column}
    if streaming:
        return IterableDataset.from_generator(read_files, features=TEXT, gen_kwargs=arguments)
    arguments |= {"contents": [hash_content(file) for file in files], "reader": READER}
    with explained_disk_errors(datasets.config.HF_DATASETS_CACHE):
        try:
            return Dataset.from_generator(read_files, features=TEXT, gen_kwargs=arguments)
        except DatasetGenerationError as error:
            raise (error.__cause__ or error) from None


def hash_content(file: str) -> str:
    """Return the SHA-256 of a file. Its size and its time of change do not show every change of its content."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def explained_disk_errors(folder: str | Path) -> Iterator[None]:
    """Turn the error of a full disk, with which `datasets` names no place, into an OSError that names `folder`."""
    try:
        yield
    except (OSError, DatasetGenerationError) as error:
        if not is_disk_full(error):
            raise
        raise OSError(
            errno.ENOSPC,
            f"The text cannot be stored in {folder}, because the disk or the quota is full. Free some space, or set "
            "the environment variable HF_HOME to a folder on another disk",
        ) from error


def is_disk_full(error: Exception) -> bool:
    """Return whether an error of `datasets`, or the error behind it, says that there is no room on the disk."""
    cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
    if not isinstance(cause, OSError):
        return False
    # Some errors of `datasets` only repeat the text of the system's error. Its own, if the free space is smaller than
    # a data set of the Hub, has no number either.
    texts = ["Not enough disk space", *(f"[Errno {number}]" for number in DISK_FULL)]
    return cause.errno in DISK_FULL or any(text in str(cause) for text in texts)


def read_files(
    files: list[str], column: str, contents: list[str] | None = None, reader: int | None = None
) -> Iterator[dict[str, str]]:
    """Yield the documents of all files.

    `datasets` caches the documents by all arguments. `contents` and `reader` are there for this purpose only.
    """
    for file in files:
        empty = True
        for batch in read_batches(file):
            for text in texts_of(batch, column if known_format(file) in ("json", "parquet") else "text", file):
                empty = False
                yield {"text": text}
        if empty:
            raise ValueError(describe_empty(file))


def read_batches(file: str) -> Iterator[dict[str, list]]:
    """Let `datasets` read one file, and turn what it raises into an error that names the file and its fault."""
    reader = known_format(file) or "text"
    try:
        if Path(file).stat().st_size == 0:
            return
        rows = load_dataset(reader, data_files=[glob.escape(file)], split="train", streaming=True)
        # `iter(rows)` would divide the rows among the workers of a DataLoader.
        for number, batch in enumerate(rows.iter(batch_size=ROWS)):
            if reader == "text" and number == 0:
                batch["text"][0] = batch["text"][0].removeprefix(BYTE_ORDER_MARK)
            yield batch
        if file.endswith(".zst"):
            check_zstandard(file)
    except Exception as error:  # each reader and decompressor has its own
        if is_disk_full(error):
            raise
        if not Path(file).is_file():
            raise FileNotFoundError(f"Text file {file} does not exist any more.") from error
        if isinstance(error, CastError):  # the reader of JSON takes the columns from the first 10 MB
            raise ValueError(f"Some rows of {file} have other columns than the first: {error.details()}.") from error
        raise ValueError(describe_fault(file) or f"{file} cannot be read: {error}") from error


def texts_of(batch: dict[str, list], column: str, source: str) -> list[str]:
    """Return the documents of some rows, without blank ones and without white space around them."""
    if column not in batch:
        raise ValueError(f"{source} has no column {column!r}. Its columns are {sorted(batch)}: choose one by column=.")
    for value in batch[column]:
        if not isinstance(value, (str, type(None))):
            kind = type(value).__name__
            raise ValueError(f"Column {column!r} of {source} holds {kind}, not text: {str(value)[:40]}.")
    return [text.strip() for text in batch[column] if text and text.strip()]


# What is wrong with a file


def check_zstandard(file: str) -> None:
    """Raise a ValueError if the file is cut off. The reader of `datasets` takes this for the end of the text."""
    whole, frame = True, zstandard.ZstdDecompressor().decompressobj()
    with open(file, "rb") as stream:
        while data := stream.read(1 << 20):
            while data:
                frame.decompress(data)
                whole, data = frame.eof, frame.unused_data
                if whole:
                    frame = zstandard.ZstdDecompressor().decompressobj()
    if not whole:
        raise ValueError("it ends in the middle of a zstd frame")


def describe_empty(file: str) -> str:
    return f"{file} is empty: it holds no document with text. Remove it, or put text into it."


def describe_fault(file: str) -> str | None:
    """Look for the fault that kept a file from being read, and return a description, or `None` if there is no fault."""
    return describe_parquet_fault(file) if known_format(file) == "parquet" else describe_text_fault(file)


def describe_parquet_fault(file: str) -> str | None:
    """Detect a file without rows. The errors of the Parquet reader describe all other faults."""
    try:
        empty = pyarrow.parquet.read_metadata(file).num_rows == 0
    except (OSError, pyarrow.ArrowException):
        return None
    return describe_empty(file) if empty else None


def describe_text_fault(file: str) -> str | None:
    """Look for an empty or damaged file, a byte that is not UTF-8, or a broken line of JSON."""
    number = position = 0
    empty, array = True, False
    try:
        if file.endswith(".zst"):
            check_zstandard(file)
        # Buffered, because the reader of zstandard cannot be iterated line by line.
        with fsspec.open(file, "rb", compression="infer") as stream, io.BufferedReader(stream) as lines:
            for number, line in enumerate(lines, start=1):
                text = line.decode()
                if number == 1:
                    text = text.removeprefix(BYTE_ORDER_MARK)
                    array = text.lstrip().startswith("[")
                if text.strip():
                    empty = False
                    if known_format(file) == "json" and not array:
                        json.loads(text)
                position += len(line)
    except UnicodeDecodeError as error:
        start = position + error.start
        return (
            f"{file} is not UTF-8: byte {error.object[error.start]:#04x} at position {start}. Convert it, for example "
            f"with: iconv -f latin1 -t utf-8 {file} > utf8.txt"
            + (" (decompressed first)" if Path(file).suffix in COMPRESSIONS else "")
        )
    except json.JSONDecodeError as error:
        return f"{file} is not JSON lines: line {number} is broken ({error}). Each line must be one JSON object."
    except Exception as error:  # each decompressor has its own
        return f"{file} is damaged, or not what its suffix says: {error}. Fetch or compress it again."
    return describe_empty(file) if empty else None


# Data sets of the Hub


def load_from_hub(name: str, column: str, split: str, streaming: bool) -> Dataset | IterableDataset:
    """Return the documents of a data set of the Hub, `user/name` or `user/name:configuration`."""
    path, _, configuration = name.partition(":")
    with explained_disk_errors(datasets.config.HF_CACHE_HOME):
        try:
            dataset = load_dataset(path, configuration or None, split=split, streaming=streaming)
            columns = dataset.column_names or list(next(iter(dataset), {}))
        except OSError as error:
            if is_disk_full(error):
                raise
            raise FileNotFoundError(
                f"Nothing on disk matches {name!r}, and no data set of the Hub could be loaded by this name: {error}"
            ) from error
        except (ValueError, DatasetGenerationError) as error:
            if is_disk_full(error):
                raise
            raise ValueError(
                f"Data set {name} cannot be loaded with split={split!r}: {error.__cause__ or error} Name a "
                f"configuration as {path}:CONFIGURATION."
            ) from error
        if columns and column not in columns:
            texts_of({name: [] for name in columns}, column, name)
        arguments: dict[str, Any] = {
            "fn_kwargs": {"column": column, "source": name, "reader": READER},
            "features": TEXT,
        }
        if not streaming:
            arguments["desc"] = f"Reading {name}"
        return dataset.map(keep_text, batched=True, batch_size=ROWS, remove_columns=columns, **arguments)


def keep_text(batch: dict[str, list], column: str, source: str, reader: int) -> dict[str, list]:
    return {"text": texts_of(batch, column, source)}


# Splitting


def split_text(dataset: Dataset, held_out: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split documents at random into training text and a held-out share. Each part gets at least one document.

    Args:
        dataset: The documents.
        held_out: Share of the documents to hold out, between 0 and 1.
        seed: Random seed of the split.

    Raises:
        ValueError: If there are fewer than two documents, or `held_out` is not between 0 and 1.

    Example:
        >>> documents = Dataset.from_dict({"text": ["one", "two", "three", "four"]})
        >>> train, held_out = split_text(documents, held_out=0.25, seed=0)
        >>> train["text"][:], held_out["text"][:]
        (['one', 'two', 'four'], ['three'])
    """
    check_number("held_out", held_out, least=0, most=1)
    if len(dataset) < 2:
        raise ValueError(f"The text has {len(dataset)} document(s), but at least 2 are needed: one to hold out.")
    order = list(range(len(dataset)))
    random.Random(seed).shuffle(order)
    cut = min(max(1, round(held_out * len(dataset))), len(dataset) - 1)
    return dataset.select(sorted(order[cut:])), dataset.select(sorted(order[:cut]))
