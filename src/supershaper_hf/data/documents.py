"""From files and data sets of the Hub to documents: text, JSON lines, Parquet, compressed or not, stored or streaming.

`datasets` reads, decompresses and caches; this file finds the files and says clearly what is wrong with them.
"""

import glob
import io
import json
import random
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import fsspec
import zstandard
from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError
from datasets.table import CastError


FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # suffix -> reader of `datasets`
COMPRESSIONS = (".gz", ".xz", ".zst", ".bz2")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")  # data set, user/data-set, either with :configuration
TEXT = Features({"text": Value("string")})
ROWS = 1000  # read at a time


def load_text(
    sources: str | Path | Sequence[str | Path], column: str = "text", split: str = "train", streaming: bool = False
) -> Dataset | IterableDataset:
    """Read documents into a dataset with one column, `text`, in the order of the sources. Blank ones are dropped.

    Text is one document a line, JSON lines and Parquet one a row. Files may be compressed (.gz, .xz, .zst, .bz2). A
    second call reads from the cache of `datasets`, unless a file has changed.

    Args:
        sources: One or more files, globs, folders (searched for .txt, .jsonl, .json and .parquet, sorted by path), or
            data sets of the Hub, `user/name` or `user/name:configuration`. What is on disk comes first. A file with any
            other suffix is text.
        column: The column of JSON lines, Parquet and Hub data sets that holds the text.
        split: The split of Hub data sets.
        streaming: Read while iterating, store nothing. Faults of files then raise when they are reached. Going on from
            a saved state reads the current file again from its start: many smaller files make that quick.

    Raises:
        FileNotFoundError: If nothing on disk and no data set of the Hub matches a source, or a file has vanished.
        ValueError: If a file is empty, damaged, not UTF-8, not in its format, or has no such column of text.

    Example:
        >>> load_text(["books/*.txt.gz", "news.jsonl"])["text"]  # doctest: +SKIP
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


def find_files(source: str | Path) -> list[str]:
    """Return the files of a path, glob or folder; none if `source` can only be a name on the Hub."""
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(str(file) for file in path.rglob("*") if file.is_file() and known_format(file))
        if not files:
            raise FileNotFoundError(f"Folder {path} holds no file that ends in {', '.join(FORMATS)}.")
        return files
    files = [str(path)] if path.is_file() else sorted(glob.glob(str(path), recursive=True))
    files = [file for file in files if Path(file).is_file()]
    if not files and (isinstance(source, Path) or known_format(path) or not HUB_NAME.fullmatch(source)):
        raise FileNotFoundError(f"Text file {path} does not exist or is not a file, and as a glob it matches none.")
    return files


def known_format(file: str | Path) -> str | None:
    """Return the reader for a file's suffix, compression left out; `None` if it is unknown."""
    path = Path(file)
    return FORMATS.get(Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix)


def load_files(files: list[str], column: str, streaming: bool) -> Dataset | IterableDataset:
    stats = [Path(file).stat() for file in files]
    # The cache is keyed by these arguments, so a changed file is read again.
    arguments = {
        "files": [str(Path(file).absolute()) for file in files],
        "versions": [f"{stat.st_mtime_ns} {stat.st_size}" for stat in stats],
        "column": column,
    }
    if streaming:
        return IterableDataset.from_generator(read_files, features=TEXT, gen_kwargs=arguments)
    try:
        return Dataset.from_generator(read_files, features=TEXT, gen_kwargs=arguments)
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None


def read_files(files: list[str], versions: list[str], column: str) -> Iterator[dict[str, str]]:
    """Yield the documents of all files. `datasets` resumes and caches by these arguments."""
    for file in files:
        empty = True
        for batch in read_batches(file):
            for text in texts_of(batch, column if known_format(file) in ("json", "parquet") else "text", file):
                empty = False
                yield {"text": text}
        if empty:
            raise ValueError(f"{file} is empty: it holds no line with text.")


def read_batches(file: str) -> Iterator[dict[str, list]]:
    """Let `datasets` read one file, and turn what it raises into an error that names the file and its fault."""
    try:
        if Path(file).stat().st_size == 0:
            return
        rows = load_dataset(known_format(file) or "text", data_files=[glob.escape(file)], split="train", streaming=True)
        yield from rows.iter(batch_size=ROWS)  # not `iter(rows)`, which shares rows out among workers of a DataLoader
        if file.endswith(".zst"):
            check_zstandard(file)
    except Exception as error:  # each reader and decompressor has its own
        if not Path(file).is_file():
            raise FileNotFoundError(f"Text file {file} does not exist any more.") from error
        if isinstance(error, CastError):  # the reader of JSON goes by the first 10 MB
            raise ValueError(f"Some rows of {file} have other columns than its first: {error.details()}.") from error
        raise ValueError(describe_fault(file) or f"{file} cannot be read: {error}") from error


def check_zstandard(file: str) -> None:
    """Raise if the file is cut off: fsspec then ends without a word, as if this were the end of the text."""
    whole, frame = True, zstandard.ZstdDecompressor().decompressobj()
    with open(file, "rb") as stream:
        while data := stream.read(1 << 20):
            while data:
                frame.decompress(data)
                whole, data = frame.eof, frame.unused_data
                if whole:
                    frame = zstandard.ZstdDecompressor().decompressobj()
    if not whole:
        raise ValueError("it ends in the middle of a zstd frame. Fetch or compress it again.")


def describe_fault(file: str) -> str | None:
    """Look for what kept a file from being read: damage, encoding, a broken line of JSON."""
    if known_format(file) == "parquet":
        return None
    number = position = 0
    array = False
    try:
        # Buffered, as zstandard's reader has no lines.
        with fsspec.open(file, "rb", compression="infer") as stream, io.BufferedReader(stream) as lines:
            for number, line in enumerate(lines, start=1):
                text = line.decode()
                array = array or (number == 1 and text.lstrip().startswith("["))
                if known_format(file) == "json" and text.strip() and not array:
                    json.loads(text)
                position += len(line)
    except UnicodeDecodeError as error:
        start = position + error.start
        return (
            f"{file} is not UTF-8: byte {error.object[error.start]:#04x} at position {start}. Convert it, for example "
            f"with: iconv -f latin1 -t utf-8 {file} > utf8.txt" + (" (decompressed first)" if compressed(file) else "")
        )
    except json.JSONDecodeError as error:
        return f"{file} is not JSON lines: line {number} is broken ({error}). Each line must be one JSON object."
    except Exception as error:
        return f"{file} is damaged, or not what its suffix says: {error}. Fetch or compress it again."
    return None


def compressed(file: str) -> bool:
    return Path(file).suffix in COMPRESSIONS


def texts_of(batch: dict[str, list], column: str, source: str) -> list[str]:
    """Return the documents of some rows, without blank ones and outer white space."""
    if column not in batch:
        raise ValueError(f"{source} has no column {column!r}. Its columns are {sorted(batch)}: choose one by column=.")
    for value in batch[column]:
        if not isinstance(value, (str, type(None))):
            kind = type(value).__name__
            raise ValueError(f"Column {column!r} of {source} holds {kind}, not text: {str(value)[:40]}.")
    return [text.strip() for text in batch[column] if text and text.strip()]


def keep_text(batch: dict[str, list], column: str, source: str) -> dict[str, list]:
    return {"text": texts_of(batch, column, source)}


def load_from_hub(name: str, column: str, split: str, streaming: bool) -> Dataset | IterableDataset:
    path, _, configuration = name.partition(":")
    try:
        dataset = load_dataset(path, configuration or None, split=split, streaming=streaming)
        columns = dataset.column_names or list(next(iter(dataset), {}))
    except OSError as error:
        raise FileNotFoundError(
            f"Nothing on disk matches {name!r}, and no data set of the Hub could be loaded by this name: {error}"
        ) from error
    except (ValueError, DatasetGenerationError) as error:
        raise ValueError(
            f"Data set {name} cannot be loaded with split={split!r}: {error.__cause__ or error} Name a configuration "
            f"as {path}:CONFIGURATION."
        ) from error
    if columns and column not in columns:
        texts_of({name: [] for name in columns}, column, name)
    arguments: dict[str, Any] = {"fn_kwargs": {"column": column, "source": name}, "features": TEXT}
    if not streaming:
        arguments["desc"] = f"Reading {name}"
    return dataset.map(keep_text, batched=True, batch_size=ROWS, remove_columns=columns, **arguments)


def split_text(dataset: Dataset, held_out: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split documents at random into training text and a held-out share, which gets at least one document.

    Raises:
        ValueError: If there are fewer than two documents.
    """
    if len(dataset) < 2:
        raise ValueError(f"The text has {len(dataset)} document(s), but at least 2 are needed: one to hold out.")
    order = list(range(len(dataset)))
    random.Random(seed).shuffle(order)
    cut = min(max(1, round(held_out * len(dataset))), len(dataset) - 1)
    return dataset.select(sorted(order[cut:])), dataset.select(sorted(order[:cut]))
