"""Measured shapes on disk: JSON lines that survive a kill, and are only ever added to by the model that began them.

The first line tells what was measured: fingerprints of model and data, the search space, the size of both. Every
further line is the record of one shape, as `evaluation.evaluate_shapes` returns it. `open_records` begins a file or
goes on with it, `append_record` adds to it, `read_records` needs neither model nor data, `to_dataset` is for Parquet
and the Hub:

    records = evaluate_shapes(supernet, batches, shapes, records_file="search/records.jsonl")
    to_dataset(read_records("search/records.jsonl"), space).to_parquet("search/records.parquet")
    push_folder("search", "user/supernet", path_in_repo="search")
"""

import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, Features, List, Value

from ..files import to_json, write_file
from ..model.modeling_supershaper import IGNORE_INDEX, SuperShaperForMaskedLM
from ..model.shapes import SearchSpace


FORMAT = "supershaper-hf records 1"
# What a row is only comparable with itself under: header key -> how to name it to a user.
CONDITIONS = {"model": "another model", "data": "other data", "precision": "another precision"}
# What of a configuration decides the loss, beside the weights.
SIZES = (
    "hidden_size",
    "hidden_sizes",
    "width_choices",
    "merged_bottlenecks",
    "head_slicing",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "layer_norm_eps",
    "vocab_size",
    "max_position_embeddings",
    "type_vocab_size",
    "tie_word_embeddings",
)
KEYS = ("shape", "loss", "perplexity", "accuracy")
LARGEST_EXPONENT = 709.0  # exp overflows a little above
SHOWN = 10  # damaged lines that a warning lists

Batch = dict[str, torch.Tensor]
Record = dict[str, Any]
Header = dict[str, Any]


def perplexity(loss: float) -> float:
    """Return the exponential of a loss in nats: infinite where it overflows, NaN for NaN."""
    return math.exp(loss) if not loss >= LARGEST_EXPONENT else math.inf


# What was measured


def fingerprint_model(model: SuperShaperForMaskedLM) -> str:
    """Return the SHA-256 of what decides a model's predictions: configured sizes, and every weight with its dtype.

    It does not depend on the device, nor on the number of processes that FSDP (version 2) spreads the weights over.
    Then all of them have to call it: each tensor is collected for itself, so memory grows by the largest one only.
    """
    digest = hashlib.sha256(json.dumps({name: getattr(model.config, name) for name in SIZES}).encode())
    tensors = model.state_dict()
    for name in sorted(tensors.keys() - model.all_tied_weights_keys):
        tensor = tensors[name]
        update(digest, name, tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor)
    return digest.hexdigest()


def fingerprint_data(batches: Sequence[Batch]) -> str:
    """Return the SHA-256 of all tensors of all batches, in order: other masks or another batch size are other data."""
    digest = hashlib.sha256()
    for number, batch in enumerate(batches):
        for name in sorted(batch):
            update(digest, f"{number} {name}", batch[name])
    return digest.hexdigest()


def update(digest: Any, name: str, tensor: torch.Tensor) -> None:
    """Add name, dtype, size and bytes of a tensor to a hash."""
    digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())  # numpy has no bfloat16


def make_header(model: SuperShaperForMaskedLM, batches: Sequence[Batch], precision: str = "no") -> Header:
    """Return the first line of a records file: what is measured, on what.

    Args:
        model: A supernet or a subnet.
        batches: What it is measured on.
        precision: Dtype of autocast, such as `"bfloat16"`; `"no"` without it.
    """
    from .. import __version__  # it imports this module

    config = model.config
    labels = [batch["labels"] for batch in batches]
    return {
        "format": FORMAT,
        "version": __version__,
        "model": fingerprint_model(model),
        "data": fingerprint_data(batches),
        "precision": precision,
        "num_layers": config.num_hidden_layers,
        "width_choices": config.width_choices,
        "hidden_size": config.hidden_size,
        "hidden_sizes": config.hidden_sizes,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sequences": sum(len(rows) for rows in labels),
        "labelled_tokens": sum(int((rows != IGNORE_INDEX).sum()) for rows in labels),
    }


# The file


def open_records(file: str | Path, header: Header) -> list[Record]:
    """Begin a records file, or return the records of one that is there and make it fit to be added to.

    Half a last line, as a kill or a full disk leaves it, is cut off. Other damaged lines stay in the file and do not
    count.

    Args:
        file: The file; its folder is made if there is none.
        header: From `make_header`.

    Raises:
        ValueError: If the file was begun by another model, on other data or in another precision, or has no header.
        OSError: If it cannot be read or written.
    """
    file = Path(file)
    with explain_failure(file):
        if not file.exists() or file.stat().st_size == 0:
            begin(file, header)
            return []
        contents = parse(file)
    for key, other in CONDITIONS.items():
        if contents.header[key] != header[key]:
            raise ValueError(
                f"{file} holds records of {other}: {key} is {contents.header[key]} there, {header[key]} here. Give "
                "another records_file, or delete this one to measure anew."
            )
    with explain_failure(file), file.open("r+b") as stream:
        stream.truncate(contents.good_bytes)
        if contents.unfinished:
            stream.seek(0, os.SEEK_END)
            stream.write(b"\n")
    contents.warn(file)
    return contents.records


def append_record(file: str | Path, record: Record) -> None:
    """Add a record to a file from `open_records`. When this returns, the record survives kills and power cuts.

    Raises:
        OSError: If it cannot be written, for example on a full disk. Records that were there stay.
    """
    row = {key: record[key] for key in KEYS}
    if not math.isfinite(record["loss"]):
        row["loss_is"] = str(record["loss"])  # JSON has neither inf nor nan: both become null
    file = Path(file)
    with explain_failure(file), file.open("ab") as stream:
        stream.write(f"{to_json(row)}\n".encode())
        stream.flush()
        os.fsync(stream.fileno())


def read_records(file: str | Path) -> list[Record]:
    """Return the records of a file in the order they were measured, each shape once.

    A warning tells which lines are damaged; the rest is returned. The file is only read.

    Raises:
        ValueError: If the file has no header, or a damaged one.
        OSError: If it cannot be read.

    Example:
        >>> records = read_records("search/records.jsonl")  # doctest: +SKIP
        >>> predictor = ShapePredictor.fit(  # doctest: +SKIP
        ...     [record["shape"] for record in records], [record["loss"] for record in records]
        ... )
    """
    contents = parse(Path(file))
    contents.warn(Path(file))
    return contents.records


def to_dataset(records: Sequence[Record], space: SearchSpace | None = None) -> Dataset:
    """Return records as a dataset with the columns `shape`, `loss`, `perplexity` and `accuracy`.

    Its `to_list()` gives the records back, also from Parquet.

    Args:
        records: From `evaluate_shapes` or `read_records`.
        space: If given, a column `parameters` counts those of the subnet at each shape.

    Raises:
        ValueError: If a shape is not in `space`.

    Example:
        >>> to_dataset(records, space).to_parquet("search/records.parquet")  # doctest: +SKIP
        >>> push_folder("search", "user/supernet", path_in_repo="search")  # doctest: +SKIP
    """
    columns: dict[str, list[Any]] = {key: [record[key] for record in records] for key in KEYS}
    features: dict[str, Any] = {key: Value("float64") for key in KEYS} | {"shape": List(Value("int64"))}
    if space is not None:
        columns["parameters"] = [space.num_parameters(shape) for shape in columns["shape"]]
        features["parameters"] = Value("int64")
    return Dataset.from_dict(columns, features=Features(features))


# Reading what a kill, a full disk or a slip of the hand has left


class Contents(NamedTuple):
    """A parsed file. `good_bytes` lead up to half a last line; `unfinished`: a whole last line lacks its end."""

    header: Header
    records: list[Record]
    damage: list[str]
    good_bytes: int
    unfinished: bool

    def warn(self, file: Path) -> None:
        if self.damage:
            more = len(self.damage) - SHOWN
            warnings.warn(
                f"{file}: {len(self.damage)} damaged line(s) do not count, so their shapes are not measured yet: "
                f"{'; '.join(self.damage[:SHOWN])}{f'; and {more} more' if more > 0 else ''}.",
                stacklevel=3,
            )


def parse(file: Path) -> Contents:
    """Read a whole file; see `Contents`."""
    content = file.read_bytes()
    first, *lines = content.split(b"\n")
    header = parse_header(file, first)
    rows: dict[tuple[int, ...], Record] = {}
    damage, good_bytes, unfinished = [], len(content), not lines
    for number, line in enumerate(lines, start=2):
        last = number == len(lines) + 1  # nothing, where every line was ended
        if not line.strip():
            continue
        try:
            row = parse_row(line, header)
            first_row = rows.setdefault(tuple(row["shape"]), row)
            if repr(first_row) != repr(row):  # as text, because NaN is not equal to itself
                raise ValueError(f"{row['shape']} was measured before, with another result")
            unfinished = last
        except (ValueError, OverflowError, RecursionError) as error:
            reason = str(error)
            if last:
                reason, good_bytes = "half a line, as a run that is killed leaves it", len(content) - len(line)
            damage.append(f"line {number} ({reason})")
    return Contents(header, list(rows.values()), damage, good_bytes, unfinished)


def parse_header(file: Path, line: bytes) -> Header:
    """Return the first line of `file`, or raise a ValueError that says what to do."""
    try:
        header = json.loads(line)
        is_header = (
            header["format"] == FORMAT
            and all(isinstance(header[key], str) for key in CONDITIONS)
            and is_shape(header["hidden_sizes"])
            and (header["width_choices"] is None or is_shape(header["width_choices"]))
            and len(header["hidden_sizes"]) == header["num_layers"]
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        is_header = False
    if not is_header:
        raise ValueError(
            f"{file} does not begin with a header of {FORMAT!r}, but with {line[:60]!r}: it is damaged, or no records "
            "file. Give another records_file, or delete this one to measure anew."
        )
    return header


def parse_row(line: bytes, header: Header) -> Record:
    """Return the record in a line, or raise a ValueError with the reason why it is none."""
    try:
        row = json.loads(line)
    except ValueError:
        raise ValueError("not JSON") from None
    if not isinstance(row, dict) or row.keys() - {"loss_is"} != set(KEYS):
        raise ValueError(f"not an object with {', '.join(KEYS)}")
    shape = row["shape"]
    choices = header["width_choices"]
    allowed = is_shape(shape) and (
        shape == header["hidden_sizes"]
        if choices is None
        else len(shape) == header["num_layers"] and {0, *choices}.issuperset(shape) and any(shape)
    )
    if not allowed:
        raise ValueError(f"{shape} is not a shape of this supernet")
    if row["loss"] is None and row.get("loss_is") in ("nan", "inf"):
        row["loss"] = float(row["loss_is"])
    row.pop("loss_is", None)
    loss, accuracy = row["loss"], row["accuracy"]
    if type(loss) is not float or type(accuracy) is not float or not 0 <= accuracy <= 1:
        raise ValueError("loss or accuracy is not a number in its range")
    expected = perplexity(loss)
    if not math.isfinite(expected):
        agrees = row["perplexity"] is None
    else:
        agrees = type(row["perplexity"]) is float and math.isclose(row["perplexity"], expected, rel_tol=1e-9)
    if not agrees:
        raise ValueError(f"perplexity {row['perplexity']} is not the exponential of loss {loss}")
    return {"shape": shape, "loss": loss, "perplexity": expected, "accuracy": accuracy}


def is_shape(value: Any) -> bool:
    """Return whether a JSON value is a list of integers; True and False are none."""
    return isinstance(value, list) and all(type(width) is int for width in value)


def begin(file: Path, header: Header) -> None:
    """Write the first line. The file appears with the whole of it or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, f"{to_json(header)}\n")


@contextmanager
def explain_failure(file: Path) -> Iterator[None]:
    """Turn an OSError into one that names the file and says what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{file} could not be read or written: {error}. Solve that (is the disk full?), or give another "
            "records_file; then make the same call again: it goes on from the records that are there."
        ) from error
