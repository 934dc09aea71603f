"""From text to sequences of tokens: read, split, train or check a tokenizer, cut or pack. `batches` masks them.

`datasets` reads text, JSON lines and Parquet, compressed or not, local or on the Hub, caches, and runs processes; this
file finds the files and says clearly what is wrong with them. A sequence crosses documents only if asked to.
"""

import glob
import io
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import fsspec
import zstandard
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError
from datasets.table import CastError
from tokenizers import BertWordPieceTokenizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from transformers import BertTokenizer, PreTrainedTokenizerBase

from .configuration_supershaper import SuperShaperConfig


FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # suffix -> reader of `datasets`
COMPRESSIONS = (".gz", ".xz", ".zst", ".bz2")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")  # data set, user/data-set, either with :configuration
TEXT = Features({"text": Value("string")})
SEQUENCES = Features({"input_ids": List(Value("int32")), "special_tokens_mask": List(Value("int8"))})
SHORTEST_SEQUENCE = 8  # tokens; shorter tails of a document are left out
ROWS = 1000  # read, and tokenised, at a time


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


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerBase:
    """Train an uncased WordPiece tokenizer like BERT's on `texts`."""
    texts = list(texts)
    trained = BertWordPieceTokenizer(lowercase=True)
    # The trainer numbers continuation characters in random order and breaks ties by number: number them here instead.
    words = BertPreTokenizer().pre_tokenize_str(trained.normalize("\n".join(texts)))
    characters = sorted({character for word, _ in words for character in word[1:]})
    first = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"##{character}" for character in characters)]
    trained.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=first, show_progress=False)
    return BertTokenizer(vocab=trained.get_vocab(), do_lower_case=True, model_max_length=max_length)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: SuperShaperConfig) -> None:
    """Raise a ValueError unless every token of `tokenizer` has an embedding."""
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, but the model has vocab_size={config.vocab_size}: tokens from "
            f"{config.vocab_size} on have no embedding. Use the tokenizer the model was trained with, or call "
            f"model.resize_token_embeddings({len(tokenizer)}) and train."
        )


def check_length(tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Raise a ValueError unless `tokenizer` can make sequences of `max_length` tokens."""
    if not SHORTEST_SEQUENCE <= max_length <= tokenizer.model_max_length:
        raise ValueError(
            f"max_length={max_length} must be between {SHORTEST_SEQUENCE} and {tokenizer.model_max_length}, the "
            "tokenizer's model_max_length."
        )
    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise ValueError("The tokenizer has no [CLS] or no [SEP] token: a BERT sequence begins and ends with them.")


def tokenize(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    cross_documents: bool = False,
    num_proc: int | None = None,
) -> Dataset:
    """Turn documents into sequences of at most `max_length` tokens, [CLS] and [SEP] included; see `tokenize_documents`.

    The result does not depend on `num_proc`. It is cached beside a dataset that comes from disk: a second call with
    equal arguments, in any process, reads it.

    Args:
        dataset: Documents in a column `text`.
        tokenizer: One with [CLS] and [SEP].
        max_length: Tokens of the longest sequence.
        cross_documents: Pack 1,000 documents at a time into full sequences, with [SEP] between them.
        num_proc: Number of processes that tokenise.

    Returns:
        A dataset with the columns `input_ids` and `special_tokens_mask`.

    Raises:
        ValueError: If `max_length` does not fit the tokenizer, or no document has `SHORTEST_SEQUENCE` tokens.

    Example:
        >>> sequences = tokenize(load_text("mine.txt"), tokenizer, max_length=128, num_proc=8)  # doctest: +SKIP
    """
    check_length(tokenizer, max_length)
    if "text" not in dataset.column_names:
        raise ValueError(f"The dataset has no column 'text', only {dataset.column_names}. Make it with load_text.")
    common: dict[str, Any] = {"batched": True, "batch_size": ROWS}
    arguments = {"tokenizer": tokenizer, "max_length": max_length, "cross_documents": cross_documents}
    if cross_documents:
        # Processes cut the text in other places than batches do, which packing would show: so it is done by one.
        documents = dataset.map(
            encode_batch,
            fn_kwargs={"tokenizer": tokenizer},
            remove_columns=dataset.column_names,
            features=Features({"tokens": List(Value("int32"))}),
            num_proc=num_proc,
            desc="Tokenising",
            **common,
        )
        sequences = documents.map(
            pack_batch, fn_kwargs=arguments, remove_columns=["tokens"], features=SEQUENCES, desc="Packing", **common
        )
    else:
        sequences = dataset.map(
            tokenize_batch,
            fn_kwargs=arguments,
            remove_columns=dataset.column_names,
            features=SEQUENCES,
            num_proc=num_proc,
            desc="Tokenising",
            **common,
        )
    if len(sequences) == 0:
        raise ValueError(
            f"None of the {len(dataset)} documents has {SHORTEST_SEQUENCE} tokens. Use longer text, a document a line."
        )
    return sequences


def tokenize_documents(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int, cross_documents: bool = False
) -> dict[str, list[list[int]]]:
    """Cut documents into sequences of at most `max_length` tokens, [CLS] and [SEP] included.

    Each document is cut by itself; tails shorter than `SHORTEST_SEQUENCE` are left out. With `cross_documents` the
    documents are first joined with [SEP] between them, so that all sequences but the last are full.

    Returns:
        `input_ids` and `special_tokens_mask`, one list per sequence; the latter marks [CLS], [SEP], [PAD] and [MASK].

    Raises:
        ValueError: If `max_length` does not fit the tokenizer.

    Example:
        >>> tokenize_documents(["the cat sat on the mat"], tokenizer, max_length=8)["input_ids"]  # doctest: +SKIP
        [[2, 5, 7, 11, 14, 5, 9, 3]]
    """
    check_length(tokenizer, max_length)
    return pack(encode(texts, tokenizer), tokenizer, max_length, cross_documents)


def encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the tokens of each document, without special tokens."""
    if not texts:
        return []
    options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    return tokenizer(list(texts), verbose=False, **options)["input_ids"]  # not verbose: documents may be long


def pack(
    documents: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, max_length: int, cross_documents: bool
) -> dict[str, list[list[int]]]:
    """Cut tokens of documents into sequences; see `tokenize_documents`."""
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    if cross_documents:
        documents = [[token for tokens in documents if tokens for token in (*tokens, last)][:-1]]
    inner = max_length - 2
    pieces = [tokens[start : start + inner] for tokens in documents for start in range(0, len(tokens), inner)]
    sequences = [[first, *piece, last] for piece in pieces if len(piece) + 2 >= SHORTEST_SEQUENCE]
    special = {first, last, tokenizer.pad_token_id, tokenizer.mask_token_id}
    masks = [[int(token in special) for token in sequence] for sequence in sequences]
    return {"input_ids": sequences, "special_tokens_mask": masks}


# What `Dataset.map` runs in its processes. Module-level, with all they need as arguments: the cache goes by these.


def tokenize_batch(batch: dict[str, list], **arguments: Any) -> dict[str, list]:
    return tokenize_documents(batch["text"], **arguments)


def encode_batch(batch: dict[str, list], tokenizer: PreTrainedTokenizerBase) -> dict[str, list]:
    return {"tokens": encode(batch["text"], tokenizer)}


def pack_batch(batch: dict[str, list], **arguments: Any) -> dict[str, list]:
    return pack(batch["tokens"], **arguments)
