"""What the scripts of the study share: their options, where the data lies, and the files of results.

Each script asks one question. It measures what is missing, writes every figure into its JSON file as soon as it has it,
and may be stopped and started again at any time. `report.py` writes the answers out of these files.

All scripts are started from the root of the repository, such as `python -m benchmarks.study.tasks --data DATA --bert
MINILM`. DATA is a folder with the folders `corpus` and `tasks`, MINILM that of all-MiniLM-L6-v2.
"""

import argparse
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure

from supershaper_hf.devices import device_name
from supershaper_hf.files import parse_json, read_json, to_json, write_json


RESULTS = Path(__file__).parent / "results"
FORMAT = "supershaper-hf study 1"
CORPORA = (
    "sotu",
    "sqlite",
    "apache",
    "python",
    "postgresql",
    "wordnet",
    "wiki",
)  # what the released model was trained on
SUPERNET = "checkpoints/supershaper-minilm-l6"
STS, FLOPS = "sts", "flops"  # names of figures in rows: a correlation with human judgement, and operations
SHOWN = {STS: (100, 1), FLOPS: (1e-12, 1)}  # figure -> its factor and its digits in tables; others have 1 and 3

Row = dict[str, Any]


class Target(NamedTuple):
    """What was to be reached, and what was measured; `met` is `None` while that is open."""

    what: str
    to_reach: str
    measured: str
    met: bool | None

    def row(self) -> dict[str, str]:
        """Return the row of a table."""
        words = {True: "yes", False: "no", None: "open"}
        return {"target": self.what, "measured": self.measured, "to reach": self.to_reach, "met": words[self.met]}


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every script has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder with the folders corpus and tasks")
    parser.add_argument("--bert", required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--supernet", default=SUPERNET, help="folder of the released supernet")
    parser.add_argument("--output_dir", default=Path("outputs/study"), type=Path, help="folder of runs and models")
    parser.add_argument("--results", default=RESULTS, type=Path, help="folder of the JSON files with the results")
    parser.add_argument("--seeds", type=int, nargs="+", help="random seeds; by default those of the study")
    return parser


def training_text(data: Path) -> list[str]:
    """Return the files of text that supernets are trained on."""
    return [str(file) for name in CORPORA for file in sorted((data / "corpus").glob(f"{name}*.txt.xz"))]


def held_out_text(data: Path) -> str:
    """Return the file of text that nothing is trained on."""
    return str(data / "corpus" / "validation.txt.xz")


def task_file(data: Path, task: str, split: str) -> str:
    """Return the file of the examples of a task: `split` is "train" or "validation"."""
    return str(data / "tasks" / task / f"{split}.csv")


class Results:
    """The rows that answer one question, in a JSON file that is written again after each row.

    Args:
        folder: The folder of the file.
        question: The name of the question and of the file.
        settings: What all rows depend on. Rows of other settings, or of another device, never stand in one file.

    Raises:
        ValueError: If the file has rows of other settings.
    """

    def __init__(self, folder: Path, question: str, settings: Mapping[str, Any]) -> None:
        self.file = folder / f"{question}.json"
        self.settings = parse_json(to_json(dict(settings)), str(self.file))
        self.machine = describe_machine()
        self.rows: list[Row] = []
        if not self.file.exists():
            return
        found = read_json(self.file, FORMAT)
        self.rows, before = found["rows"], {**found["settings"], "device": found["machine"]["device"]}
        now = {**self.settings, "device": self.machine["device"]}
        changed = [name for name in before.keys() | now.keys() if before.get(name) != now.get(name)]
        if changed:
            raise ValueError(
                f"{self.file} has rows with other settings: {', '.join(sorted(changed))}. Remove the file, or choose "
                "another folder with --results."
            )

    def find(self, **key: Any) -> list[Row]:
        """Return the rows with these values."""
        return [row for row in self.rows if all(row.get(name) == value for name, value in key.items())]

    def add(self, row: Mapping[str, Any]) -> Row:
        """Add a row and write the file."""
        self.rows.append(parse_json(to_json(dict(row)), str(self.file)))
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.file, FORMAT, {"settings": self.settings, "machine": self.machine, "rows": self.rows})
        return self.rows[-1]


def describe_machine() -> dict[str, Any]:
    """Return the device, the number of threads, and the versions of the libraries."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    libraries = {name: version(name) for name in ("torch", "transformers", "accelerate", "datasets")}
    return {
        "device": device_name(torch.device(device)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **libraries,
    }


def read_rows(folder: Path, question: str) -> list[Row]:
    """Return the rows that answer a question; none if nothing was measured yet."""
    file = folder / f"{question}.json"
    return read_json(file, FORMAT)["rows"] if file.exists() else []


def read_settings(folder: Path, question: str) -> dict[str, Any]:
    """Return what all rows of a file depend on."""
    return dict(read_json(folder / f"{question}.json", FORMAT)["settings"])


def command_and_machine(folder: Path, question: str, script: str) -> str:
    """Return the sentences that say which command has measured the rows of a file, and where."""
    machine = read_json(folder / f"{question}.json", FORMAT)["machine"]
    return (
        f"`python -m benchmarks.study.{script} --data DATA --bert MINILM`, measured on: {machine['device']}, torch "
        f"{machine['torch']}."
    )


def save_picture(figure: Figure, file: Path) -> None:
    """Write a PNG that depends on what is drawn alone: it names neither a date nor the version of a library."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120, metadata={"Software": None})


def encoder_parameters(config: Any) -> int:
    """Return the number of parameters in the layers of a BERT: 10,646,784 in those of all-MiniLM-L6-v2."""
    hidden, inner = config.hidden_size, config.intermediate_size
    layer = 4 * hidden * (hidden + 1) + 2 * hidden * inner + inner + hidden + 4 * hidden
    return int(config.num_hidden_layers * layer)


def cell(values: Sequence[float], figure: str = "") -> str:
    """Return the cell of a table: the mean over seeds, with the standard deviation if there are several.

    Args:
        values: One for each seed; without any the cell is "-".
        figure: What they are, for the unit: see `SHOWN`.

    Example:
        >>> cell([0.5, 0.7]), cell([0.5]), cell([]), cell([0.7], STS)
        ('0.600 ± 0.141', '0.500', '-', '70.0')
    """
    if not values:
        return "-"
    return " ± ".join(number(value, figure) for value in mean_and_spread(values) if value is not None)


def number(value: float, figure: str = "", sign: str = "") -> str:
    """Return a figure as it is shown: see `cell`. With `sign="+"` it has one, as differences do."""
    factor, digits = SHOWN.get(figure, (1, 3))
    return f"{round(factor * value, digits) + 0.0:{sign}.{digits}f}"  # without a minus before 0


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def rank_correlation_error(correlation: float, pairs: int) -> float:
    """Return the standard error of Spearman's correlation (Bonett and Wright, 2000).

    Example:
        >>> round(rank_correlation_error(0.7, 750), 4)
        0.0208
    """
    return float((1 - correlation**2) * ((1 + correlation**2 / 2) / (pairs - 3)) ** 0.5)


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the standard deviation; `None` for the deviation of one value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
