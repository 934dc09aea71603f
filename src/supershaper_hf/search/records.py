"""Records of measured shapes on disk: JSON lines. They survive a kill, and new ones are added at the end.

The first line, the header, says what was measured: the measure, and fingerprints of the model and of the data, which
`evaluation.make_header` computes. A header without a measure is of a time when only losses were measured. Every further
line is the record of one shape, as `evaluation.evaluate_shapes` returns it. Each line holds a checksum of itself, so a
line that was changed is noticed and does not count.

`evaluate_shapes` writes the file. `read_records` reads it and needs neither the model nor the data. `to_dataset` turns
records into a dataset, for Parquet and the Hub:

    records = evaluate_shapes(supernet, batches, shapes, records_file="search/records.jsonl")
    to_dataset(read_records("search/records.jsonl"), space).to_parquet("search/records.parquet")
    push_folder("search", "user/supernet-search", repo_type="dataset")
"""

import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, Features, List, Value

from ..files import checksum, lock, parse_json, to_json, write_file
from ..model.shapes import SearchSpace
from .measures import MEASURES, measure_of


FORMAT = "supershaper-hf records 2"
FAMILY = FORMAT.rstrip("0123456789")  # what every version of the format begins with
# Records can be compared only if these values of the header agree: key of the header -> words for an error.
CONDITIONS = {
    "measure": "another measure",
    "model": "another model",
    "original": "the distance to another original",
    "score": "another score",
    "layers": "the distance of other layers",
    "data": "other data",
    "precision": "another precision",
}
ROUNDING = 1e-3  # a cosine that was computed in float32 can be a little above 1
LARGEST_EXPONENT = 709.0  # exp overflows a little above
SHOWN = 10  # a warning lists this many damaged lines at most
ADVICE = "Give another records_file, or delete this one to measure again."

Record = dict[str, Any]
Header = dict[str, Any]


def perplexity(loss: float) -> float:
    """Return the exponential of a loss in nats: infinity where it overflows, NaN for NaN."""
    return math.exp(loss) if not loss >= LARGEST_EXPONENT else math.inf


# Writing


@contextmanager
def hold_records(file: str | Path) -> Iterator[None]:
    """Keep every other run away from a records file while this one uses `open_records` and `append_record`.

    Raises:
        RuntimeError: If another run holds the file.
        OSError: If the folder of the file cannot be written to.
    """
    with ExitStack() as stack:
        with explain_failure(Path(file)):
            stack.enter_context(lock(file))
        yield


def open_records(file: str | Path, header: Header) -> list[Record]:
    """Begin a records file, or return the records of an existing one and prepare it for new lines.

    A kill or a full disk can leave an incomplete last line. It is cut off. Other damaged lines stay in the file and do
    not count.

    Args:
        file: The file. Its folder is created if there is none.
        header: What is measured: the values of `CONDITIONS`, `num_layers`, `width_choices`, `hidden_sizes`, and
            whatever else a reader may want to know.

    Raises:
        ValueError: If the file was begun with another measure, model, original, score, layers or precision, or with
            other data, or has no valid header.
        OSError: If it cannot be read or written.
    """
    file = Path(file)
    with explain_failure(file):
        if not file.exists() or file.stat().st_size == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_file(file, to_line({"format": FORMAT, **header}))
            return []
        contents = parse(file)
    for key, other in CONDITIONS.items():
        if contents.header[key] != header[key]:
            raise ValueError(
                f"{file} holds records of {other}: {key} is {contents.header[key]} there, {header[key]} here. {ADVICE}"
            )
    with explain_failure(file), file.open("r+b") as stream:
        stream.truncate(contents.good_bytes)
        if contents.lacks_newline:
            stream.seek(0, os.SEEK_END)
            stream.write(b"\n")
    contents.warn(file)
    return contents.records


def append_record(file: str | Path, record: Record) -> None:
    """Add a record to a file from `open_records`. When this returns, the record survives kills and power cuts.

    Raises:
        OSError: If it cannot be written, for example on a full disk. The records in the file stay.
    """
    measure = measure_of([record])
    row, value = {key: record[key] for key in measure.keys}, record[measure.name]
    if not math.isfinite(value):
        row[f"{measure.name}_is"] = str(value)  # JSON has neither infinity nor NaN: both become null
    file = Path(file)
    with explain_failure(file), file.open("ab") as stream:
        stream.write(to_line(row).encode())
        stream.flush()
        os.fsync(stream.fileno())


def to_line(content: Mapping[str, Any]) -> str:
    """Return `content` and its checksum as one line of JSON."""
    content = json.loads(to_json(content))  # the checksum is of what a reader will see
    return f"{json.dumps({**content, 'checksum': checksum(content)})}\n"


@contextmanager
def explain_failure(file: Path) -> Iterator[None]:
    """Turn an OSError into one that names the file and says what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{file} could not be read or written: {error}. Solve the problem (is the disk full?), or give another "
            "records_file. Then make the same call again: it continues from the records in the file."
        ) from error


# Reading


def read_records(file: str | Path) -> list[Record]:
    """Return the records of a file in the order in which they were measured, each shape once.

    Damaged lines do not count, and a warning names them. The file is only read, so another run may be writing to it.

    Raises:
        ValueError: If the file has no header, a damaged one, or one of another version.
        OSError: If it cannot be read.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from supershaper_hf import SuperShaperConfig, SuperShaperForMaskedLM, evaluate_shapes
        >>> sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 2}
        >>> supernet = SuperShaperForMaskedLM(SuperShaperConfig(**sizes, vocab_size=50, width_choices=[4, 8]))
        >>> batch = {"input_ids": torch.tensor([[2, 7, 4, 3]]), "labels": torch.tensor([[-100, -100, 9, -100]])}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = f"{folder}/records.jsonl"
        ...     records = evaluate_shapes(supernet, [batch], [[8, 4], [4, 0]], records_file=file)
        ...     read_records(file) == records
        True
    """
    contents = parse(Path(file))
    contents.warn(Path(file))
    return contents.records


class Contents(NamedTuple):
    """What a records file holds.

    Attributes:
        header: The first line.
        records: The first valid record of each shape.
        damage: The number of each damaged line and what is wrong with it.
        good_bytes: The length of the file without an incomplete last line.
        lacks_newline: Whether the last line is complete but for its line break.
    """

    header: Header
    records: list[Record]
    damage: list[str]
    good_bytes: int
    lacks_newline: bool

    def warn(self, file: Path) -> None:
        """Warn of the damaged lines, if there are any."""
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
    records: dict[tuple[int, ...], Record] = {}
    damage, good_bytes, lacks_newline = [], len(content), not lines
    for number, line in enumerate(lines, start=2):
        is_last = number == len(lines) + 1  # what follows the last line break; nothing if the file is complete
        if not line.strip():
            continue
        try:
            record = parse_record(line, header)
            first_record = records.setdefault(tuple(record["shape"]), record)
            if repr(first_record) != repr(record):  # compared as text, because NaN is not equal to itself
                raise ValueError(f"{record['shape']} was measured before, with another result")
            lacks_newline = is_last
        except ValueError as error:
            reason = str(error)
            if is_last:
                reason, good_bytes = "an incomplete line, as a killed run leaves it", len(content) - len(line)
            damage.append(f"line {number} ({reason})")
    return Contents(header, list(records.values()), damage, good_bytes, lacks_newline)


def parse_header(file: Path, line: bytes) -> Header:
    """Return the first line of `file`, or raise a ValueError that says what to do."""
    try:
        header = parse_json(line, str(file))
    except ValueError:
        header = None
    found = header.get("format") if isinstance(header, dict) else None
    if isinstance(found, str) and found.startswith(FAMILY) and found != FORMAT:
        raise ValueError(
            f"{file} has the format {found!r}, but this version of the package needs {FORMAT!r}, with checksums. "
            f"{ADVICE}"
        )
    try:
        header = parse_line(line)
        choices, measure = header["width_choices"], header.setdefault("measure", "loss")
        original, score = (header.setdefault(name, None) for name in ("original", "score"))
        layers = header.setdefault("layers", "last" if measure == "distance" else None)  # older files name none
        valid = (
            header.pop("format") == FORMAT
            and measure in MEASURES
            and all(isinstance(header[key], str) for key in ("model", "data", "precision"))
            and isinstance(original, str if measure == "distance" else type(None))
            and (score is None or (measure == "task_loss" and isinstance(score, str)))
            and (layers in ("last", "all") if measure == "distance" else layers is None)
            and is_shape(header["hidden_sizes"])
            and (choices is None or is_shape(choices))
            and len(header["hidden_sizes"]) == header["num_layers"]
        )
    except (ValueError, KeyError, TypeError):  # the measure may be a list, which no dictionary can look up
        valid = False
    if not valid:
        raise ValueError(
            f"{file} does not begin with a valid header of {FORMAT!r}, but with {line[:60]!r}: the header is damaged, "
            f"or this is not a records file. {ADVICE}"
        )
    return header


def parse_line(line: bytes) -> dict[str, Any]:
    """Return what `to_line` was given, or raise a ValueError with the reason why the line cannot be trusted."""
    try:
        content = parse_json(line, "line")
    except ValueError:
        raise ValueError("not JSON") from None
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    if content.pop("checksum", None) != checksum(content):
        raise ValueError("its checksum is wrong: it was changed")
    return content


def parse_record(line: bytes, header: Header) -> Record:
    """Return the record in a line, or raise a ValueError that says why the line is not a record."""
    row, measure = parse_line(line), MEASURES[header["measure"]]
    value_is = f"{measure.name}_is"
    if row.keys() - {value_is} != set(measure.keys):
        raise ValueError(f"not an object with {', '.join(measure.keys)}")
    shape, choices = row["shape"], header["width_choices"]
    allowed = is_shape(shape) and (
        shape == header["hidden_sizes"]
        if choices is None
        else len(shape) == header["num_layers"] and {0, *choices}.issuperset(shape) and any(shape)
    )
    if not allowed:
        raise ValueError(f"{shape} is not a shape of this supernet")
    value = row[measure.name]
    if value is None and row.get(value_is) in ("nan", "inf"):
        value = float(row[value_is])
    elif type(value) is not float or not math.isfinite(value):  # JSON may say 1e999, which Python reads as infinity
        raise ValueError(f"{measure.name} {value!r} is not a number")
    return {"shape": shape, measure.name: value, **CHECKS[measure.name](row, value)}


def check_loss(row: Mapping[str, Any], loss: float) -> dict[str, float]:
    """Return perplexity and accuracy of a record, or raise a ValueError that says what is wrong with them."""
    accuracy, expected, found = row["accuracy"], perplexity(loss), row["perplexity"]
    if type(accuracy) is not float or not 0 <= accuracy <= 1:
        raise ValueError(f"accuracy {accuracy!r} is not a number from 0 to 1")
    if math.isfinite(expected):
        agrees = type(found) is float and math.isclose(found, expected, rel_tol=1e-9)
    else:
        agrees = found is None
    if not agrees:
        raise ValueError(f"perplexity {found!r} is not the exponential of loss {loss}")
    return {"perplexity": expected, "accuracy": accuracy}


def check_distance(row: Mapping[str, Any], distance: float) -> dict[str, float]:
    """Return the cosine of a record, or raise a ValueError that says what is wrong with it or with its distance."""
    cosine = math.nan if row["cosine"] is None and not math.isfinite(distance) else row["cosine"]
    if distance < 0:
        raise ValueError(f"distance {distance} is below 0")
    if type(cosine) is not float or abs(cosine) > 1 + ROUNDING:  # not a number where the states are not finite
        raise ValueError(f"cosine {cosine!r} is not a number from -1 to 1")
    return {"cosine": cosine}


def check_task_loss(row: Mapping[str, Any], loss: float) -> dict[str, float | None]:
    """Return the score of a record, or raise a ValueError that says what is wrong with it or with its loss."""
    score = row["score"]
    if loss < 0:
        raise ValueError(f"task_loss {loss} is below 0")
    if score is not None and (type(score) is not float or not math.isfinite(score)):
        raise ValueError(f"score {score!r} is neither a number nor null")
    return {"score": score}


CHECKS: dict[str, Callable[[Mapping[str, Any], float], dict[str, Any]]] = {
    "loss": check_loss,
    "distance": check_distance,
    "task_loss": check_task_loss,
}


def is_shape(value: Any) -> bool:
    """Return whether a JSON value is a list of integers. True and False are not integers here."""
    return isinstance(value, list) and all(type(width) is int for width in value)


# Publishing


def to_dataset(records: Sequence[Record], space: SearchSpace | None = None) -> Dataset:
    """Return records as a dataset, whose columns are the keys of the records.

    These are `shape`, `loss`, `perplexity` and `accuracy`; or `shape`, `distance` and `cosine`; or `shape`, `task_loss`
    and `score`. Without any record they are those of losses. Its `to_list()` returns the same records, also after a way
    through Parquet.

    Args:
        records: Records from `evaluate_shapes` or `read_records`.
        space: The search space. If it is given, the column `parameters` holds the size of the subnet of each shape.

    Raises:
        ValueError: If a shape is not in `space`, or the records are of different measures.

    Example:
        >>> record = {"shape": [120, 0, 768], "loss": 2.0, "perplexity": 7.389, "accuracy": 0.5}
        >>> to_dataset([record]).column_names
        ['shape', 'loss', 'perplexity', 'accuracy']
    """
    keys = measure_of(records).keys
    columns: dict[str, list[Any]] = {key: [record[key] for record in records] for key in keys}
    features: dict[str, Any] = {key: Value("float64") for key in keys} | {"shape": List(Value("int64"))}
    if space is not None:
        columns["parameters"] = [space.num_parameters(shape) for shape in columns["shape"]]
        features["parameters"] = Value("int64")
    return Dataset.from_dict(columns, features=Features(features))
