"""What can be measured of a shape, and what it is called in records, messages, tables and plots.

Lower is better for all measures: the masked-LM loss, which needs a masked-LM head; the distance to the original, which
every encoder has; the loss on a task, which needs the head of a task and labelled examples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from ..checks import check_choice


@dataclass(frozen=True)
class Measure:
    """The words for one measure.

    Attributes:
        name: Its name, which is also the key of its value in a record.
        plural: The name for several values.
        keys: The keys of a record.
        shown: What a reader sees instead of the value, also a key of a record: the perplexity instead of the loss.
        title: What a reader sees, in words.
        unit: The unit of the value with a blank before it, or nothing.
        text: The text that all shapes are measured on, in words.
        digits: Digits after the point, where a table shows it.
    """

    name: str
    plural: str
    keys: tuple[str, ...]
    shown: str
    title: str
    unit: str
    text: str
    digits: int

    @overload
    def show(self, values: float) -> float: ...
    @overload
    def show(self, values: np.ndarray) -> np.ndarray: ...
    def show(self, values):
        """Return what a reader sees instead of measured or predicted values.

        Example:
            >>> MEASURES["loss"].show(0.0), MEASURES["distance"].show(0.5)
            (1.0, 0.5)
        """
        shown = np.exp(values) if self.shown == "perplexity" else values
        return shown if isinstance(values, np.ndarray) else float(shown)

    def amount(self, value: float) -> str:
        """Return a value in words, for messages.

        Example:
            >>> MEASURES["loss"].amount(2.5), MEASURES["distance"].amount(0.25)
            ('2.500 nats', '0.250')
        """
        return f"{value:.3f}{self.unit}"


MEASURES = {
    "loss": Measure(
        name="loss",
        plural="losses",
        keys=("shape", "loss", "perplexity", "accuracy"),
        shown="perplexity",
        title="perplexity",
        unit=" nats",
        text="masked text",
        digits=2,
    ),
    "distance": Measure(
        name="distance",
        plural="distances",
        keys=("shape", "distance", "cosine"),
        shown="distance",
        title="distance to the original",
        unit="",
        text="text",
        digits=3,
    ),
    "task_loss": Measure(
        name="task_loss",
        plural="losses on the task",
        keys=("shape", "task_loss", "score"),
        shown="task_loss",
        title="loss on the task",
        unit="",
        text="examples of the task",
        digits=3,
    ),
}


def find_measure(name: str) -> Measure:
    """Return the measure of this name.

    Raises:
        ValueError: If there is none.

    Example:
        >>> find_measure("perplexity")
        Traceback (most recent call last):
        ValueError: measure='perplexity' is unknown. Allowed: 'loss', 'distance', 'task_loss'.
    """
    check_choice("measure", name, MEASURES)
    return MEASURES[name]


def measure_of(records: Sequence[Mapping[str, Any]]) -> Measure:
    """Return what the records of shapes hold. Without any record it is the loss.

    Raises:
        ValueError: If a record has no value of a measure, or not what the others have.

    Example:
        >>> measure_of([{"shape": [8, 16], "distance": 0.5}]).name
        'distance'
    """
    found = [next((name for name in MEASURES if name in record), None) for record in records]
    if None in found:
        raise ValueError(
            f"The record {records[found.index(None)]!r} has none of {', '.join(map(repr, MEASURES))}. Use records of "
            "evaluate_shapes."
        )
    if len(set(found)) > 1:
        first, second = [measure.plural for measure in MEASURES.values() if measure.name in found][:2]
        raise ValueError(
            f"Some records hold {first} and others {second}, which cannot be compared. Measure all shapes with the "
            "same measure."
        )
    return MEASURES[found[0] or "loss"] if found else MEASURES["loss"]
